"""Checkpoints: exact, atomic, asynchronous, on any number of ranks; and what happens when one is damaged."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import ALONE, RECIPES, losses, recipe_of, wait_for

from nemo_lite.config import CheckpointConfig, UserError
from nemo_lite.train.checkpoint import Checkpointer, checkpoints, damage, newest_whole, step_of
from nemo_lite.train.loop import build_model
from nemo_lite.train.optim import build_optimizer


@pytest.fixture(scope="module")
def loaded(forks, tmp_path_factory):
    """The state in a run's newest checkpoint as so many ranks load it."""
    folder, count = tmp_path_factory.mktemp("loaded"), iter(range(1000))

    def load(run_dir: Path, ranks: int, *overrides: str) -> dict:
        out = folder / f"{next(count)}.pt"
        settings = [f"run_dir={run_dir}", f"data.cache_dir={forks.cache}", *overrides]
        children = forks.call("cases:state_of", str(RECIPES / "resume.yaml"), settings, str(out), ranks=ranks)
        assert [child.wait() for child in children] == [0] * ranks, "".join(child.output for child in children)
        return torch.load(out, weights_only=False)

    return load


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    """Ten steps in one go, on one rank and on two."""
    folders = {ranks: tmp_path_factory.mktemp(f"whole{ranks}") / "run" for ranks in (1, 2)}
    for ranks, run_dir in folders.items():
        forks.train("resume", run_dir, ranks=ranks)
    return folders


def same(a: dict, b: dict) -> None:
    assert a["weights"].keys() == b["weights"].keys() and a["moments"].keys() == b["moments"].keys()
    assert any(name.endswith("router.bias") and bool(t.any()) for name, t in a["weights"].items())
    for kind in ("weights", "moments"):
        for name, tensor in a[kind].items():
            assert torch.equal(tensor, b[kind][name]), name
    assert torch.equal(a["rows"], b["rows"])
    assert a["train"] == b["train"] and a["decay"] == b["decay"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_steps_are_five_and_five(forks, undisturbed, loaded, tmp_path, ranks):
    """Bit for bit: losses, weights, moments, router biases, data order."""
    run_dir = tmp_path / "run"
    forks.train("resume", run_dir, "train.steps=5", ranks=ranks)
    assert [step_of(p) for p in checkpoints(run_dir)] == [5] and list(losses(run_dir)) == [1, 2, 3, 4, 5]
    output = forks.train("resume", run_dir, ranks=ranks)
    assert f"resuming {run_dir} at step 5 of 10" in output
    assert losses(run_dir) == losses(undisturbed[ranks])
    same(loaded(run_dir, ranks), loaded(undisturbed[ranks], ranks))
    again = forks.train("resume", run_dir, ranks=ranks)  # a finished run stays as it is
    assert "at step 10 of 10" in again and losses(run_dir) == losses(undisturbed[ranks])


def test_two_ranks_to_one_and_back(forks, undisturbed, loaded, tmp_path):
    """What is loaded is exactly what was saved, and training goes on as if nothing had happened (up to rounding)."""
    run_dir = tmp_path / "run"
    for steps, ranks in ((4, 2), (7, 1), (10, 2)):
        forks.train("resume", run_dir, f"train.steps={steps}", ranks=ranks)
    mine, theirs = losses(run_dir), losses(undisturbed[1])
    assert list(mine) == list(theirs)
    for step, values in theirs.items():
        assert mine[step] == pytest.approx(values, rel=1e-4), step
    states = [[loaded(folder, ranks) for ranks in (1, 2)] for folder in (undisturbed[1], undisturbed[2], run_dir)]
    for one, two in states:
        same(one, two)
        assert torch.equal(one["rows"], states[0][0]["rows"])


def test_the_optimizer_settings_are_the_recipes(undisturbed, loaded):
    """Not those that a checkpoint was made with."""
    state = loaded(undisturbed[1], 1, "optim.weight_decay=0.3")
    assert set(state["decay"].values()) == {0.0, 0.3}


def saver_of(run_dir: Path, keep: int = 3, **overrides):
    recipe = recipe_of("resume", *overrides.get("recipe", ()))
    model = build_model(recipe, ALONE)
    optimizer = build_optimizer(model, recipe.optim)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    said: list[str] = []
    return Checkpointer(run_dir, CheckpointConfig(keep=keep), ALONE, said.append), model, optimizer, said


def test_an_asynchronous_save_does_not_see_later_updates(tmp_path, monkeypatch):
    saver, model, optimizer, _ = saver_of(tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
    write = saver._write

    def late(*args):
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(saver, "_write", late)
    started = time.monotonic()
    loop_state = {"step": 1, "list": [1]}
    saver.save(1, model, optimizer, loop_state)
    assert time.monotonic() - started < 0.4  # it went on in the background
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            t.add_(1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert checkpoints(tmp_path) == []
    saver.wait()
    saver.load(checkpoints(tmp_path)[0], model, optimizer)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    after = [t for state in optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    saver.close()


def test_keeps_the_last_n_and_removes_leftovers(tmp_path):
    saver, model, optimizer, _ = saver_of(tmp_path, keep=2)
    (tmp_path / "checkpoints" / "step_99.partial").mkdir(parents=True)
    for step in (1, 2, 3, 10):
        saver.save(step, model, optimizer, {"step": step})
    saver.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_3"]
    saver.config.keep = 0
    for step in (11, 12, 13):
        saver.save(step, model, optimizer, {"step": step})
    saver.close()
    assert [step_of(p) for p in checkpoints(tmp_path)] == [3, 10, 11, 12, 13]


def test_going_back_past_a_damaged_one_keeps_what_is_written_then(tmp_path):
    """keep=1 and a damaged step_20: the new step_15 must not be the one that is thrown away."""
    saver, model, optimizer, said = saver_of(tmp_path, keep=0)
    for step in (10, 20):
        saver.save(step, model, optimizer, {"step": step})
    saver.wait()
    (tmp_path / "checkpoints/step_20/state.json").unlink()
    assert newest_whole(tmp_path, said.append).name == "step_10"
    saver.config.keep = 1
    for step in (15, 20):
        saver.save(step, model, optimizer, {"step": step})
        saver.wait()
        assert newest_whole(tmp_path, said.append).name == f"step_{step}"
    assert [p.name for p in checkpoints(tmp_path)] == ["step_20"]
    saver.close()


def truncate(folder: Path) -> str:
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    return file.name


def flip(folder: Path) -> str:
    file = next(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "does not match its checksum"


def remove(folder: Path) -> str:
    (folder / "rng_0.pt").unlink()
    return "rng_0.pt is missing"


def unlist(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def garble(folder: Path) -> str:
    (folder / "manifest.json").write_text("[1, 2")
    return "manifest.json is missing or broken"


@pytest.mark.parametrize("harm", [truncate, flip, remove, unlist, garble])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(forks, undisturbed, tmp_path, harm):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[1], run_dir)
    assert damage(run_dir / "checkpoints/step_10") is None
    reason = harm(run_dir / "checkpoints/step_10")
    output = forks.train("resume", run_dir)
    assert f"checkpoint {run_dir}/checkpoints/step_10 is damaged" in output and reason in output
    assert f"resuming {run_dir} at step 5 of 10" in output
    assert losses(run_dir) == losses(undisturbed[1])
    assert damage(run_dir / "checkpoints/step_10") is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_refuses_to_start_over_what_it_cannot_read(forks, undisturbed, tmp_path, ranks):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[1], run_dir)
    for folder in checkpoints(run_dir):
        truncate(folder)
    output = forks.train("resume", run_dir, ranks=ranks, code=1)
    assert output.count("error: none of the 2 checkpoints") == 1 and "set another run_dir" in output
    assert "Traceback" not in output
    assert [step_of(p) for p in checkpoints(run_dir)] == [5, 10] and losses(run_dir) == losses(undisturbed[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_refuses_another_model_and_other_data(forks, undisturbed, tmp_path, ranks):
    for override, words in (
        ("model.hidden_size=64", "holds a run of another model (model.hidden_size is 64 and was 32)"),
        ("model.pattern=MEM*", "model.pattern is 'MEM*' and was 'MEM*E'"),
        ("data.seq_len=32", "data.seq_len: the run was saved with 64 and cannot go on with 32"),
        ("seed=3", "seed: the run was saved with 0"),
    ):
        output = forks.train("resume", undisturbed[ranks], override, "train.steps=12", ranks=ranks, code=1)
        assert words in output and "Traceback" not in output, output
    # What is a choice of the run may change.
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[ranks], run_dir)
    forks.train("resume", run_dir, "train.steps=11", "optim.lr=1e-4", "model.mtp.depth=1", ranks=ranks)
    assert len(losses(run_dir)[11]) == 4


# --------------------------------------------------------------------------------------------------- sudden ends

EVERY = ("checkpoint.every=1",)


@pytest.fixture(scope="module")
def every_step(forks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("every") / "run"
    forks.train("resume", run_dir, *EVERY)
    return losses(run_dir)


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_at_random_moments(forks, every_step, undisturbed, tmp_path, ranks):
    """A run that saves every step is killed again and again; at the end it is the run that nobody disturbed."""
    run_dir, dice, kills, partials = tmp_path / "run", random.Random(7), 0, 0
    for _ in range(20):
        children = forks.start("resume", run_dir, *EVERY, ranks=ranks, patch="slow_saving:0.01")
        goal = newest(run_dir) + dice.choice((2, 3) if ranks == 1 else (3, 4))  # each life gets some steps further
        wait_for(lambda: newest(run_dir) >= goal or done(children))  # noqa: B023
        time.sleep(dice.random() * 0.15)
        for child in children:
            child.kill(signal.SIGKILL)
        codes = [child.wait() for child in children]
        if codes == [0] * ranks:
            break
        kills += 1
        partials += any((run_dir / "checkpoints").glob("*.partial"))
        said: list[str] = []
        whole = newest_whole(run_dir, said.append)
        assert whole is not None and not said, f"{said} after {kills} kills"
    forks.train("resume", run_dir, *EVERY, ranks=ranks)
    assert kills >= 2 and step_of(checkpoints(run_dir)[-1]) == 10
    assert not list((run_dir / "checkpoints").glob("*.partial")) or partials
    got = losses(run_dir)
    assert list(got) == list(every_step)
    for step, values in every_step.items():
        assert got[step] == (values if ranks == 1 else pytest.approx(values, rel=1e-4)), step


def newest(run_dir: Path) -> int:
    return max((step_of(p) for p in checkpoints(run_dir)), default=-1)


def done(children) -> bool:
    """Whether all have ended (they are zombies until they are waited for)."""
    return all(Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z" for child in children)


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.45, 0.7])
def test_kill_9_in_the_middle_of_saving(forks, undisturbed, tmp_path, delay):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[1], run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_10")
    (child,) = forks.start("resume", run_dir, patch="slow_saving:0.2")
    partial = run_dir / "checkpoints/step_10.partial"
    wait_for(partial.exists)
    time.sleep(delay)
    child.kill(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and partial.exists()
    said: list[str] = []
    assert newest_whole(run_dir, said.append) == run_dir / "checkpoints/step_5" and not said
    output = forks.train("resume", run_dir)
    assert "resuming" in output and "at step 5 of 10" in output
    assert not partial.exists() and losses(run_dir) == losses(undisturbed[1])


# ------------------------------------------------------------------------------------------------------ disk full


@pytest.mark.parametrize("patch", ["full_disk:10:0", "full_disk:10:1", "no_manifest:10"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_full_while_saving(forks, undisturbed, tmp_path, ranks, patch):
    """One sentence from one rank, exit code 1, and the checkpoint before it whole; with space again it goes on."""
    if patch.endswith(":1") and ranks == 1:
        pytest.skip("there is no rank 1")
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[ranks], run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_10")
    longer = ("train.steps=40",)  # it is the save in the background that fails, long before the last step
    output = forks.train("resume", run_dir, *longer, ranks=ranks, patch=patch, code=1)
    sentence = "error: the checkpoint of step 10 could not be written: No space left on device"
    assert output.count(sentence) == 1 and "step_5 is whole" in output and "Traceback" not in output, output
    assert max(losses(run_dir)) < 40
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_5"]
    forks.train("resume", run_dir, ranks=ranks)
    assert losses(run_dir) == losses(undisturbed[ranks])


def test_a_disk_that_is_really_full(forks, tmp_path):
    """On a small tmpfs, where root may mount one."""
    import subprocess

    run_dir = tmp_path / "small"
    run_dir.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(run_dir)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        output = forks.train("resume", run_dir, "checkpoint.every=2", "checkpoint.asynchronous=false", code=1)
        assert "could not be written" in output and "is whole" in output and "Traceback" not in output, output
        said: list[str] = []
        assert newest_whole(run_dir, said.append) is not None and not said
    finally:
        subprocess.run(["umount", str(run_dir)], check=True)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    saver, model, optimizer, _ = saver_of(tmp_path)
    saver.save(1, model, optimizer, {"step": 1})
    saver.wait()
    state = tmp_path / "checkpoints/step_1/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99; this version reads 1"):
        saver.load(state.parent, model, optimizer)
    saver.close()
