"""Averages of checkpoints: the identity behind the weights, what is read and what is written, and what is refused."""

import json
import shutil
import weakref
from fractions import Fraction

import pytest
import torch
from runs import ALONE, ROOT, Forks, recipe_of
from tiny import tiny_config, tiny_model

from nemo_lite import HybridLM, cli
from nemo_lite.config import CheckpointConfig, OptimConfig, ScheduleConfig, UserError, load_recipe, recipe_to_yaml
from nemo_lite.data import load_tokenizer
from nemo_lite.merge import KINDS, _tokens, decay_factors, merge, weights_of, weights_of_decay
from nemo_lite.train.checkpoint import Checkpointer, Weights, checkpoints, step_of
from nemo_lite.train.loop import build_model, train
from nemo_lite.train.schedule import learning_rate

TOKENS = 8 * 64  # a step of tests/recipes/resume.yaml


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("tokens"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def runs(forks, tmp_path_factory):
    """Ten steps with a checkpoint of each, in float64: by one process, and by two that share the weights."""
    folders = {ranks: tmp_path_factory.mktemp(f"run{ranks}") / "run" for ranks in (1, 2)}
    for ranks, run_dir in folders.items():
        forks.train(
            "resume", run_dir, "checkpoint.every=1", "checkpoint.keep=0", "train.dtype=float64", "schedule.min_lr=1e-4",
            "train.micro_batch_size=4", ranks=ranks,
        )  # fmt: skip
    return folders


def weights_at(run_dir, *steps: int) -> list[dict[str, torch.Tensor]]:
    model = HybridLM(load_recipe(run_dir / "recipe.yaml", resolved=True).model, device="meta").double()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    readers = [Weights(run_dir / "checkpoints" / f"step_{step}") for step in steps]
    return [{name: read(name, like) for name, like in tensors.items()} for read in readers]


def weights_in(model_dir) -> dict[str, torch.Tensor]:
    model = HybridLM.from_pretrained(model_dir)
    return dict(model.named_parameters()) | dict(model.named_buffers())


# ---------------------------------------------------------------------------------------------------------- the weights


def test_a_decay_of_updates_is_an_average_exactly():
    """SGD on a quadratic in rational numbers: not one digit is lost, so that the two sides must be the same number."""
    target, rate = [Fraction(3), Fraction(-2, 7)], Fraction(1, 5)
    theta = [[Fraction(1, 3), Fraction(5)]]
    for _ in range(8):
        theta.append([x - rate * (x - goal) for x, goal in zip(theta[-1], target)])
    curve = [Fraction(learning_rate(s, 8, *_wsd("minus_sqrt", 8))) for s in range(8)]
    for every in (1, 2, 4):  # the checkpoints that there are; updates between two get one factor
        kept = theta[::every]
        factors = [sum(curve[i : i + every]) / every for i in range(0, 8, every)]
        average = [sum(w * x[i] for w, x in zip(weights_of_decay(factors), kept, strict=True)) for i in range(2)]
        decayed = list(theta[0])
        for d, before, after in zip(factors, kept, kept[1:]):
            decayed = [x - d * (b - a) for x, b, a in zip(decayed, before, after)]
        assert average == decayed
        assert sum(weights_of_decay(factors)) == 1


def _wsd(shape: str, steps: int, min_lr: float = 0.0):
    return OptimConfig(lr=1.0), ScheduleConfig("wsd", 0, steps, shape, min_lr)


@pytest.mark.parametrize("shape", ["minus_sqrt", "linear", "cosine"])
def test_factors_are_the_schedule_s_own_curve(shape):
    schedule = ScheduleConfig("constant", decay_shape=shape, min_lr=2e-4)
    every = decay_factors(list(range(40, 51)), schedule, lr=1e-3)
    assert every == [learning_rate(s, 10, *_wsd(shape, 10, 0.2)) for s in range(10)]
    assert every[-1] == pytest.approx(0.2)
    uneven = decay_factors([40, 43, 50], schedule, lr=1e-3)
    assert uneven == pytest.approx([sum(every[:3]) / 3, sum(every[3:]) / 7])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [[0, 1], [5, 10, 15, 20], [7, 8, 20, 21, 90]])
def test_weights_sum_to_one_and_none_is_negative(kind, steps):
    weights = weights_of(kind, steps, ScheduleConfig(), 1e-3)
    assert len(weights) == len(steps) and sum(weights) == pytest.approx(1, abs=1e-12) and min(weights) >= 0
    if kind == "exponential":
        assert weights[-1] / weights[0] == pytest.approx(16) and weights == sorted(weights)


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_merged_run_is_the_run_with_scaled_updates(runs, tmp_path, ranks):
    """Every tensor of a MODEL_DIR, the routers' biases too, from whole and from sharded checkpoints."""
    facts = merge([runs[ranks]], tmp_path / "model", "decay", window=6 * TOKENS)
    assert [part["step"] for part in facts["of"]] == [4, 5, 6, 7, 8, 9, 10]
    at = weights_at(runs[ranks], *range(4, 11))
    recipe = recipe_of("resume")
    factors = [learning_rate(s, 6, *_wsd("minus_sqrt", 6, 1e-4 / recipe.optim.lr)) for s in range(6)]
    merged = weights_in(tmp_path / "model")
    moved = 0
    for name, base in at[0].items():
        expected = base + sum(d * (b[name] - a[name]) for d, a, b in zip(factors, at, at[1:]))
        assert merged[name].dtype == torch.float64
        torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-13, msg=name)
        moved += name.endswith("router.bias") and not torch.equal(merged[name], at[-1][name])
    assert moved == 3


def test_layouts_and_ways_in_agree(runs, tmp_path, capsys):
    """One process's run, two ranks' run, and the MODEL_DIRs of the same checkpoints."""
    for ranks in (1, 2):
        merge([runs[ranks] / "checkpoints/step_9"], tmp_path / f"m{ranks}", "exponential", window=3 * TOKENS)
    one, two = weights_in(tmp_path / "m1"), weights_in(tmp_path / "m2")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-9, msg=name)
    dirs = [tmp_path / f"e{step}" for step in (6, 7, 8, 9)]
    for step, folder in zip((6, 7, 8, 9), dirs):
        source = runs[1] / f"checkpoints/step_{step}"
        assert cli.main(["export", str(source), "--to", str(folder)]) == 0
    merge(dirs, tmp_path / "m3", "exponential")
    for name, value in weights_in(tmp_path / "m3").items():
        assert torch.equal(value, one[name]), name
    merge(dirs, tmp_path / "m4", "uniform", dtype="bfloat16")
    parts = weights_at(runs[1], 6, 7, 8, 9)
    for name, value in weights_in(tmp_path / "m4").items():
        mean = sum(part[name] for part in parts) / 4
        wide = name.endswith(("A_log", ".D", "dt_bias", "router.weight", "router.bias")) or "norm" in name
        assert value.dtype == (torch.float32 if wide else torch.bfloat16), name
        torch.testing.assert_close(value, mean.to(value.dtype), msg=name)
    meta = json.loads((tmp_path / "m3/merge.json").read_text())
    assert [part["path"] for part in meta["of"]] == [str(folder) for folder in dirs]
    assert sum(part["weight"] for part in meta["of"]) == pytest.approx(1)


def test_the_whole_way_from_a_run_to_training_on(tmp_path, capsys):
    """A trained model trained on at a high constant rate; merged, evaluated beside its last checkpoint, trained on."""
    run_dir, cache, text = tmp_path / "run", f"data.cache_dir={tmp_path}", tmp_path / "text"
    settings = ["init_from=tests/fixtures/tiny_trained", "train.steps=40", "train.global_batch_size=4",
                "train.micro_batch_size=4", "schedule.kind=constant", "schedule.min_lr=0", "eval.every=0",
                "checkpoint.every=4", "checkpoint.keep=0", "log.every=100"]  # fmt: skip
    train(recipe_of("tiny_trained", f"run_dir={run_dir}", cache, *settings))
    merged, last = tmp_path / "merged", tmp_path / "last"
    capsys.readouterr()
    words = ["merge", str(run_dir), "--window", str(16 * 4 * 128), "--weights", "decay", "--to", str(merged)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[:-1]] == ["24", "28", "32", "36", "40"]
    assert said[-1] == f"{merged}: 5 models, decay by minus_sqrt to 0, float32"
    assert cli.main(["export", str(run_dir), "--to", str(last)]) == 0
    text.mkdir()
    for file in (ROOT / "tests/fixtures/text").glob("*.txt"):
        shutil.copy(file, text)
    capsys.readouterr()
    figures = {}
    for folder in (merged, last):
        argv = [str(folder), "--source", str(text), "--validation-fraction", "0.2", "--seq-len", "128"]
        assert cli.main(["evaluate", *argv, "--prompts", "0", "--json"]) == 0
        figures[folder] = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert figures[merged] < figures[last]  # what the average is for
    assert cli.main(["generate", str(merged), "--prompt", "def ", "--max-tokens", "8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 8
    again = tmp_path / "again"
    recipe = recipe_of("tiny_trained", f"run_dir={again}", cache, f"init_from={merged}", "train.steps=2",
                       "schedule.warmup_steps=0", "schedule.decay_steps=0", "eval.every=0")  # fmt: skip
    start = weights_in(merged)
    for name, value in build_model(recipe, ALONE).named_parameters():
        assert torch.equal(value, start[name]), name
    train(recipe)
    assert [step_of(p) for p in checkpoints(again)] == [2]


# ------------------------------------------------------------------------------------------------------------ streaming


def test_never_two_tensors_of_all_models_at_once(runs, tmp_path, monkeypatch):
    """What is alive of what was read, counted as it is read: one tensor of one checkpoint."""
    alive, most, largest = 0, 0, 0

    def gone(size):
        nonlocal alive
        alive -= size

    read = Weights.__call__

    def watched(self, name, like):
        nonlocal alive, most, largest
        tensor = read(self, name, like)
        alive, largest = alive + tensor.nbytes, max(largest, tensor.nbytes)
        most = max(most, alive)
        weakref.finalize(tensor, gone, tensor.nbytes)
        return tensor

    monkeypatch.setattr(Weights, "__call__", watched)
    merge([runs[2]], tmp_path / "model", window=8 * TOKENS)
    assert alive == 0 and largest <= most <= 2 * largest


def test_memory_holds_less_than_one_model(forks, runs, tmp_path):
    """Peak memory of merging six checkpoints, beside what merging a tiny run leaves in memory."""
    run_dir = tmp_path / "run"
    recipe = recipe_of(
        "resume", f"run_dir={run_dir}", "model.pattern=" + "-" * 24, "model.hidden_size=256",
        "model.intermediate_size=1024", "model.mtp.pattern=", "train.steps=6", "checkpoint.every=1",
    )  # fmt: skip
    model = build_model(recipe, ALONE)
    saver = Checkpointer(run_dir, CheckpointConfig(keep=0, asynchronous=False), ALONE, print)
    for step in range(1, 7):
        saver.save(step, model, torch.optim.SGD(model.parameters()), {"step": step, "train": {"tokens": step * TOKENS}})
    saver.close()
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    size = sum(p.nbytes for p in model.parameters())
    out = tmp_path / "peak.json"
    folders = [str(runs[1]), str(run_dir)]
    (child,) = forks.call("cases:memory_of_merging", folders, str(tmp_path / "model"), 5 * TOKENS, str(out))
    assert child.wait() == 0, child.output
    peak = json.loads(out.read_text())
    assert size > 45e6 and peak < 0.6 * size, f"{peak / 1e6:.1f} MB beside a model of {size / 1e6:.1f} MB"
    assert torch.equal(weights_in(tmp_path / "model")["norm_f.weight"], torch.ones(256))


# --------------------------------------------------------------------------------------------------------- what is said


def refused(capsys, *argv) -> str:
    code = cli.main(["merge", *map(str, argv)])
    err = capsys.readouterr().err
    assert code == 1 and "Traceback" not in err and len(err.strip().splitlines()) == 1
    return err


def test_checkpoints_that_are_gone_are_named(runs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(runs[1], run_dir)
    for step in (5, 6, 7):
        shutil.rmtree(run_dir / f"checkpoints/step_{step}")
    said = refused(capsys, run_dir, "--window", 6 * TOKENS, "--to", tmp_path / "m")
    assert "those of steps 5, 6, 7 are not there, those of steps 4, 8, 9, 10 are" in said
    assert f"--window {2 * TOKENS} takes the last 3" in said and not (tmp_path / "m").exists()
    merge([run_dir], tmp_path / "m", window=2 * TOKENS)
    (path,) = (run_dir / "checkpoints/step_9").glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1])
    assert "step_9 is damaged" in refused(capsys, run_dir, "--window", 2 * TOKENS, "--to", tmp_path / "m")
    assert (tmp_path / "m/merge.json").exists()  # what was there is left


def test_wrong_input_is_one_sentence(runs, tmp_path, capsys):
    run, to = runs[1], ("--to", tmp_path / "m")
    assert "--window says over how many" in refused(capsys, run, *to)
    assert "has seen 5,120 only" in refused(capsys, run, "--window", "1M", *to)
    said = refused(capsys, run, "--window", TOKENS - 1, *to)
    assert f"the checkpoint of step 10 only; --window {TOKENS} reaches step 9" in said
    assert "neither a RUN_DIR" in refused(capsys, tmp_path / "nothing", "--window", "1M", *to)
    assert "one RUN_DIR" in refused(capsys, run, run, "--window", "1M", *to)
    tokenizer = load_tokenizer("bytes")
    sizes = {"a": {}, "b": {}, "c": {"routed_scaling_factor": 1.0}}
    for name, size in sizes.items():
        tiny_model(tiny_config(vocab_size=260, **size)).save_pretrained(tmp_path / name, tokenizer=tokenizer)
    a, b, c = (tmp_path / name for name in sizes)
    assert "is one model" in refused(capsys, a, *to)
    assert "--window is for a RUN_DIR" in refused(capsys, a, b, "--window", "1M", *to)
    assert "routed_scaling_factor = 1.0" in refused(capsys, a, c, *to)
    assert "write to another folder" in refused(capsys, a, b, "--to", b)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    assert "is left as it is" in refused(capsys, a, b, "--to", tmp_path / "other")
    (b / "tokenizer.json").write_text("{}")
    assert "different tokenizers" in refused(capsys, a, b, *to)
    assert not (tmp_path / "m").exists()


def test_a_falling_rate_is_said(tmp_path, capsys):
    run_dir = tmp_path / "run"
    settings = ["schedule.kind=wsd", "schedule.decay_steps=4", "train.steps=8", "checkpoint.every=2"]
    train(recipe_of("resume", f"run_dir={run_dir}", f"data.cache_dir={tmp_path}", "checkpoint.keep=0", *settings))
    capsys.readouterr()
    assert cli.main(["merge", str(run_dir), "--window", str(4 * TOKENS), "--to", str(tmp_path / "m")]) == 0
    assert "learning rate falls from 0.0015 to 0 in this window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "count"), [("512", 512), ("1.5e3", 1500), ("500M", 5 * 10**8), ("0.125T", 125 * 10**9)]
)
def test_numbers_of_tokens(text, count):
    assert _tokens(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "many", "M"])
def test_what_is_no_number_of_tokens(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", str(tmp_path), "--window", text, "--to", str(tmp_path / "m")])
    assert end.value.code == 2


def test_an_export_replaces_nothing_it_should_not(runs, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is left as it is"):
        merge([runs[1]], tmp_path / "m", window=2 * TOKENS)
    assert (tmp_path / "m/notes.txt").read_text() == "mine"
