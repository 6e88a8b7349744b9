"""A run as a person meets it: its files, its signals, torchrun, and numbers that are not finite."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import RECIPES, ROOT, free_port, losses, recipe_of, records, wait_for

from nemo_lite.train.checkpoint import checkpoints, newest_whole, step_of
from nemo_lite.train.loop import signals


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    forks.train("resume", run_dir)
    return losses(run_dir)


def close(got: dict, want: dict, exact: bool) -> None:
    assert list(got) == list(want)
    for step, values in want.items():
        assert got[step] == (values if exact else pytest.approx(values, rel=1e-4)), step


# ----------------------------------------------------------------------------------------------------------- files


def test_what_a_run_leaves(forks, tmp_path):
    """metrics.jsonl with the promised fields, validation lines, report, environment, the resolved recipe."""
    run_dir = tmp_path / "run"
    output = forks.train("golden_mem", run_dir)
    lines = records(run_dir)
    steps = [line for line in lines if "loss" in line]
    promised = {"step", "tokens", "loss", "mtp_loss", "aux_loss", "lr", "grad_norm", "tokens_per_second"}
    shown = {"mfu", "memory_gb", "eta_seconds", "skipped_steps", "data_seconds", "expert_load_max", "dead_experts"}
    assert [line["step"] for line in steps] == list(range(1, 21))
    for line in steps:
        assert promised | shown <= line.keys() and len(line["mtp_loss"]) == 2
        assert line["tokens"] == line["step"] * 8 * 64 and line["tokens_per_second"] > 0
        assert set(line["expert_load"]) == {"layers.1", "layers.4", "mtp.layers.1"}
    assert steps[3]["lr"] == 3e-3 and steps[-1]["lr"] == pytest.approx(3e-4)
    held_out = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in held_out] == [10, 20] and len(held_out[0]["val_mtp_loss"]) == 2
    for line in held_out:  # bytes, and the end-of-document tokens among them
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / 0.6931, rel=0.01)
    report = (run_dir / "report.html").read_text()
    assert "<svg" in report and "http-equiv" not in report and len(report) > 5000
    facts = json.loads((run_dir / "env.json").read_text())
    assert facts and "torch" in json.dumps(facts) and "ssd" in json.dumps(facts)
    from nemo_lite.config import load_recipe

    resolved = load_recipe(run_dir / "recipe.yaml").model
    assert (resolved.eos_token_id, resolved.pad_token_id) == (256, 257)  # the tokenizer's
    assert replace(resolved, eos_token_id=None, pad_token_id=None) == recipe_of("golden_mem").model
    assert (run_dir / "tokenizer").is_dir() and [step_of(p) for p in checkpoints(run_dir)] == [20]
    assert sum(line.startswith("step ") for line in output.splitlines()) == 20
    assert sum(line.startswith("val ") for line in output.splitlines()) == 2
    assert output.splitlines()[-1].startswith(f"note checkpoint {run_dir}/checkpoints/step_20, report {run_dir}/")


def test_validation_does_not_depend_on_the_number_of_ranks(forks, tmp_path):
    found = {}
    for ranks in (1, 2, 4):
        forks.train("resume", tmp_path / f"{ranks}", "eval.every=1", "train.steps=2", "eval.batches=3", ranks=ranks)
        found[ranks] = [line for line in records(tmp_path / f"{ranks}") if "val_loss" in line]
    for ranks in (2, 4):
        for a, b in zip(found[ranks], found[1], strict=True):
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-6)
            assert a["val_mtp_loss"] == pytest.approx(b["val_mtp_loss"], abs=1e-6)
            assert a["val_bits_per_byte"] == pytest.approx(b["val_bits_per_byte"], abs=1e-6)


def test_validation_does_not_change_training(forks, tmp_path, undisturbed):
    """Nor does how often a line is logged, or a checkpoint written."""
    forks.train("resume", tmp_path / "run", "eval.every=3", "checkpoint.every=1", "data.prefetch=0")
    close(losses(tmp_path / "run"), undisturbed, exact=True)


def command(run_dir: Path, cache: Path, *overrides: str) -> list[str]:
    return [str(RECIPES / "resume.yaml"), f"run_dir={run_dir}", f"data.cache_dir={cache}", *overrides]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_the_two_commands_are_the_same(tmp_path, cache, undisturbed):
    """`nemo-lite train` and `python -m nemo_lite.train`."""
    starts = [["-m", "nemo_lite", "train"], ["-m", "nemo_lite.train"]]
    runs = [
        subprocess.Popen([sys.executable, *start, *command(tmp_path / str(i), cache)], env=ENV, cwd=ROOT)
        for i, start in enumerate(starts)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    for i in range(2):
        close(losses(tmp_path / str(i)), undisturbed, exact=True)


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_0(forks, tmp_path, undisturbed, number, ranks):
    """To any one of the ranks: all of them stop after the same step."""
    run_dir = tmp_path / "run"
    children = forks.start("resume", run_dir, "checkpoint.every=0", ranks=ranks, patch="slow_steps:0.1")
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= 3)
    children[-1].kill(number)
    codes = [child.wait() for child in children]
    output = "".join(child.output for child in children)
    assert codes == [0] * ranks, output
    (folder,) = checkpoints(run_dir)
    step = step_of(folder)
    assert 3 <= step < 10 and f"stopped by a signal after step {step}" in output
    assert (run_dir / "report.html").exists() and list(losses(run_dir)) == list(range(1, step + 1))
    forks.train("resume", run_dir, ranks=ranks)
    close(losses(run_dir), undisturbed, exact=ranks == 1)


def test_asked_twice_it_dies_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    caught = []
    signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        with signals() as stopping:
            assert not stopping()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping() and not caught
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert caught == [1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [1, 1]
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------------------- torchrun


def torchrun(tmp_path: Path, *args: str, options: tuple = (), patch: str = "") -> subprocess.Popen:
    """torchrun with two ranks of cases.train; its output in a file."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport cases\n"
        f"sys.exit(cases.train(sys.argv[1:], {patch!r}))\n"
    )
    with open(tmp_path / "log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
             *options, str(script), *args],
            env=ENV, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_torchrun_stopped_by_sigterm(forks, tmp_path, cache, undisturbed):
    """torchrun passes SIGTERM on; its workers save and end before its grace time is over."""
    run_dir = tmp_path / "run"
    run = torchrun(tmp_path, *command(run_dir, cache, "checkpoint.every=0"), patch="slow_steps:0.1")
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= 3)
    asked = time.monotonic()
    run.send_signal(signal.SIGTERM)
    run.wait(60)
    assert time.monotonic() - asked < 25
    output = (tmp_path / "log").read_text()
    said: list[str] = []
    assert newest_whole(run_dir, said.append) is not None and not said, output
    step = step_of(checkpoints(run_dir)[-1])
    assert 3 <= step < 10 and f"stopped by a signal after step {step}" in output
    forks.train("resume", run_dir, ranks=2)
    close(losses(run_dir), undisturbed, exact=False)


def test_a_rank_that_dies_is_restarted_by_torchrun(tmp_path, cache, undisturbed):
    """--max-restarts 1: from the last checkpoint to the end, as if nothing had happened."""
    run_dir = tmp_path / "run"
    run = torchrun(
        tmp_path, *command(run_dir, cache), options=("--max-restarts", "1"), patch=f"die_at:8:1:{tmp_path / 'died'}"
    )
    assert run.wait(120) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "died").exists() and "resuming" in (tmp_path / "log").read_text()
    close(losses(run_dir), undisturbed, exact=False)


def test_a_rank_that_dies_ends_the_others_promptly(forks, tmp_path, undisturbed):
    """Without anybody who would end them: the next collective fails."""
    run_dir = tmp_path / "run"
    started = time.monotonic()
    children = forks.start("resume", run_dir, ranks=2, patch=f"die_at:8:1:{tmp_path / 'died'}")
    assert children[1].wait() == -signal.SIGKILL
    died = time.monotonic()
    assert children[0].wait() not in (0, -signal.SIGKILL), children[0].output
    assert time.monotonic() - died < 30 and time.monotonic() - started < 90
    forks.train("resume", run_dir, ranks=2)
    close(losses(run_dir), undisturbed, exact=False)


# ------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(forks, tmp_path, ranks):
    """NaN in one rank's gradient in steps 3 and 4 (microbatches of one row share): nothing moves, both are counted."""
    run_dir = tmp_path / "run"
    output = forks.train(
        "resume", run_dir, "train.micro_batch_size=4", "checkpoint.every=1", "checkpoint.keep=0",
        f"train.global_batch_size={4 * ranks}", "train.steps=5", ranks=ranks, patch="poisoned_gradients:3:4",
    )  # fmt: skip
    assert "step 3: loss or gradient is not finite, step skipped (1 in a row)" in output and "(2 in a row)" in output
    lines = records(run_dir)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2]
    assert lines[2]["grad_norm"] is None and lines[4]["grad_norm"] > 0
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    states = []
    for step in (2, 3, 4, 5):
        dcp_to_torch_save(run_dir / f"checkpoints/step_{step}", tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt", weights_only=False)["model"])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]) and torch.equal(tensor, states[2][name]), name
    assert any(not torch.equal(tensor, states[3][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_in_a_row_stop_the_run(forks, tmp_path, ranks):
    run_dir = tmp_path / "run"
    output = forks.train(
        "resume", run_dir, "train.micro_batch_size=4", "checkpoint.every=2", f"train.global_batch_size={4 * ranks}",
        "train.max_nonfinite=3", ranks=ranks, patch="poisoned_gradients:3:5:6:7", code=1,
    )  # fmt: skip
    assert "was not finite for 3 steps in a row" in output and "Traceback" not in output
    files = sorted(run_dir.glob("nonfinite_step_7_rank_*.json"))
    assert len(files) == ranks and str(files[0]) in output
    rows = [json.loads(file.read_text()) for file in files]
    assert sorted(number for row in rows for number in row["rows"]) == list(range(6 * 4 * ranks, 7 * 4 * ranks))
    assert all(len(span) == 4 for row in rows for spans in row["sources"] for span in spans)
    said: list[str] = []
    assert step_of(newest_whole(run_dir, said.append)) == 6 and not said


@pytest.mark.slow
def test_compiled_layers_train_alike(forks, tmp_path):
    """One dense layer: on a CPU, Inductor takes minutes for layers that loop (five with a Mamba-2 layer besides)."""
    small = ("model.pattern=-", "model.mtp.pattern=", "train.steps=3", "train.micro_batch_size=8")
    forks.train("resume", tmp_path / "plain", *small)
    forks.train("resume", tmp_path / "compiled", *small, "train.compile=true")
    close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), exact=False)


# ----------------------------------------------------------------------------------------- phases, stages of a pipeline

MIXED = (
    "data.blend=[{source: tests/fixtures/text, max_epochs: 1}, {source: tests/fixtures/text/short.jsonl, weight: 0.2}]",
    "data.phases=[{tokens: 3000, blend: [{source: tests/fixtures/text/short.jsonl}]}]",
    "data.seq_len_cycle=[64, 16]",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_in_two_stages(forks, tmp_path, ranks):
    """Phase 1 until stop_after, then the rest: bit for bit the run in one go, over phases and row lengths."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    output = forks.train("resume", whole, *MIXED, "schedule.kind=cosine", ranks=ranks)
    assert "what will be read:" in output and "3,000       tests/fixtures/text/short.jsonl" in output
    assert "what was read:" in output
    stopped = forks.train("resume", parts, *MIXED, "schedule.kind=cosine", "train.stop_after=7", ranks=ranks)
    assert f"checkpoint {parts}/checkpoints/step_7" in stopped
    assert step_of(newest_whole(parts, print)) == 7 and list(losses(parts)) == list(range(1, 8))
    again = forks.train("resume", parts, *MIXED, "schedule.kind=cosine", "train.stop_after=7", ranks=ranks)
    assert "at step 7 of 10" in again and list(losses(parts)) == list(range(1, 8))
    forks.train("resume", parts, *MIXED, "schedule.kind=cosine", ranks=ranks)
    assert losses(parts) == losses(whole)
    last, expected = records(parts)[-1], records(whole)[-1]
    assert last["sources"] == expected["sources"] and last["lr"] == expected["lr"]
    assert sum(each["tokens"] for each in last["sources"]) == 10 * 8 * 64
    assert [each["source"] for each in last["sources"]] == ["tests/fixtures/text", "tests/fixtures/text/short.jsonl"]
    assert "Data read" in (parts / "report.html").read_text()


def test_a_blend_that_ends_too_soon(forks, tmp_path):
    cap = "data.blend=[{source: tests/fixtures/text/short.jsonl, max_epochs: 1}]"
    output = forks.train("resume", tmp_path / "run", cap, "train.steps=1000", code=1)
    assert "max_epochs leaves" in output and not (tmp_path / "run" / "metrics.jsonl").exists()
