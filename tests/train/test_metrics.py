"""metrics.jsonl, the console line, trackers, expert load, the machine's facts."""

import json
import math
import sys

import pytest
import torch

from nemo_lite.config import LogConfig, Recipe, UserError
from nemo_lite.train import metrics as m


def step(number, **more):
    record = {
        "step": number,
        "tokens": number * 4096,
        "loss": 4.3214,
        "mtp_loss": [4.8, 5.12],
        "aux_loss": 0.01,
        "lr": 4.5e-4,
        "grad_norm": 0.83,
        "tokens_per_second": 12345.0,
        "mfu": 0.31,
        "expert_load_max": 1.8,
        "dead_experts": 0,
        "memory_gb": 1.2,
        "eta_seconds": 192.0,
        "skipped_steps": 0,
    }
    return record | more


def run(folder, steps, **options):
    with m.Metrics(folder, LogConfig(), total_steps=100, **options) as metrics:
        for number in steps:
            metrics.log(step(number))
    return folder / m.METRICS_FILE


def steps_of(path):
    return [record["step"] for record in m.read_metrics(path)[0]]


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


def test_a_line_a_record_flushed_and_valid_json(tmp_path):
    with m.Metrics(tmp_path, LogConfig(), total_steps=10) as metrics:
        metrics.log(step(1, loss=math.nan, mtp_loss=[1.0, -math.inf], grad_norm=torch.tensor(math.inf), extra={"a": 1}))
        text = (tmp_path / m.METRICS_FILE).read_text()  # before close: each line is on disk when log returns

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    assert text.endswith("\n") and text.count("\n") == 1
    assert record["loss"] is None and record["mtp_loss"] == [1.0, None] and record["grad_norm"] is None
    assert record["extra"] == {"a": 1} and record["time"] > 0 and record["elapsed_seconds"] >= 0


def test_resume_drops_what_was_written_after_the_checkpoint(tmp_path, capsys):
    run(tmp_path, [10, 20, 30, 40])
    path = run(tmp_path, [30], resume_step=20)
    assert steps_of(path) == [10, 20, 30]
    assert "dropped 2 lines after step 20" in capsys.readouterr().out


def test_elapsed_time_goes_on_after_resume(tmp_path):
    path = run(tmp_path, [10])
    record = json.loads(path.read_text()) | {"elapsed_seconds": 500.0}
    path.write_text(json.dumps(record) + "\n")
    records, _ = m.read_metrics(run(tmp_path, [20], resume_step=10))
    assert 500 <= records[-1]["elapsed_seconds"] < 530


def test_a_torn_last_line_is_dropped(tmp_path):
    path = run(tmp_path, [10, 20])
    path.write_bytes(path.read_bytes() + '{"step":30,"loss":"é'.encode()[:-1])  # cut inside a character
    records, bad = m.read_metrics(path)
    assert [record["step"] for record in records] == [10, 20] and bad == 1
    assert steps_of(run(tmp_path, [30], resume_step=20)) == [10, 20, 30]
    assert m.read_metrics(path)[1] == 0


def test_a_last_line_without_newline_is_kept_and_not_glued(tmp_path):
    path = run(tmp_path, [10])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert steps_of(run(tmp_path, [20], resume_step=10)) == [10, 20]


def test_a_run_from_step_0_starts_an_empty_file(tmp_path):
    run(tmp_path, [0, 10])
    assert steps_of(run(tmp_path, [5])) == [5]


def test_an_untouched_history_is_not_rewritten(tmp_path):
    path = run(tmp_path, [10, 20])
    before = path.stat().st_ino
    run(tmp_path, [], resume_step=20)
    assert path.stat().st_ino == before


def test_a_full_disk_is_a_sentence(tmp_path):
    metrics = m.Metrics(tmp_path, LogConfig(), total_steps=10)
    metrics._file.close()
    metrics._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl: step 3 could not be logged: No space left"):
        metrics.log(step(3))
    metrics.close()


def test_shares_of_many_experts_are_written_seldom_their_summary_always(tmp_path):
    counts = {f"layers.{index}": torch.arange(1, 513) for index in range(8)}
    with m.Metrics(tmp_path, LogConfig(), total_steps=1000) as metrics:
        for number in range(1, 51):
            metrics.log(step(number) | m.load_summary(counts))
        metrics.log(step(1000) | m.load_summary(counts))
    records, _ = m.read_metrics(tmp_path / m.METRICS_FILE)
    assert [r["step"] for r in records if "expert_load" in r] == [1, 11, 21, 31, 41, 1000]
    assert all(len(r["expert_load_by_layer"]) == 8 for r in records)


# -------------------------------------------------------------------------------------------------------- expert load


def test_load_summary():
    found = m.load_summary({"a": torch.tensor([4, 4, 4, 4]), "b": torch.tensor([0, 2, 6, 0])})
    assert found["expert_load_max"] == 3.0 and found["expert_load_min"] == 0.0 and found["dead_experts"] == 2
    assert found["expert_load"] == {"a": [0.25] * 4, "b": [0.0, 0.25, 0.75, 0.0]}
    assert found["expert_load_by_layer"]["a"] == {"max": 1.0, "min": 1.0, "dead": 0, "entropy": 1.0}
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(4)
    assert found["expert_load_by_layer"]["b"]["entropy"] == pytest.approx(entropy, abs=1e-4)
    assert found["expert_entropy"] == found["expert_load_by_layer"]["b"]["entropy"]


def test_load_summary_at_the_edges():
    assert m.load_summary({}) == {}
    idle = m.load_summary({"a": torch.zeros(3, dtype=torch.long)})
    assert idle["expert_load_max"] is None and idle["dead_experts"] == 3 and idle["expert_load"] == {"a": [0.0] * 3}
    one = m.load_summary({"a": torch.tensor([7])})
    assert one["expert_load_max"] == 1.0 and one["expert_entropy"] == 1.0
    assert sum(m.load_summary({"a": torch.randint(1, 99, (64,))})["expert_load"]["a"]) == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------------------- console lines


def test_the_line_of_a_step():
    assert m.format_step(step(120), 1000) == (
        "step  120/1000  loss 4.321  mtp 4.80 5.12  lr 4.5e-4  grad 0.83  12.3k tok/s  31% peak  "
        "load 1.8x dead 0  1.2 GB  eta 3m12s"
    )
    assert len(m.format_step(step(120), 100000)) <= 128


def test_the_lines_of_a_run_align():
    early = step(5, loss=11.25, tokens_per_second=611.0, grad_norm=0.5)
    late = step(1000, loss=2.1, tokens_per_second=123456.0, grad_norm=0.25, eta_seconds=200.0)
    first, last = (m.format_step(record, 1000) for record in (early | {"loss": 9.25}, late))
    assert len(first) == len(last) and first.index("tok/s") == last.index("tok/s")


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_loses_the_least_important_fields(width):
    line = m.format_step(step(120), 1000, width)
    assert len(line) <= width and line.startswith("step  120/1000  loss 4.321")
    assert len(m.format_step(step(120), 1000, 10)) > 10  # step and loss always stay


def test_missing_and_non_finite_values():
    assert m.format_step({"step": 1, "loss": None}, 10) == "step  1/10  loss   nan"
    line = m.format_step(step(1, loss=math.nan, mtp_loss=[None], mfu=None, expert_load_max=None, skipped_steps=2), 10)
    assert "loss   nan" in line and "peak" not in line and "load" not in line and "skipped 2" in line


def test_the_line_of_a_validation():
    record = {"step": 100, "val_loss": 2.5, "val_mtp_loss": [3.0, 3.25], "val_bits_per_byte": 2.1234}
    assert m.format_step(record, 1000) == "val   100/1000  loss 2.500  mtp 3.00 3.25  2.123 bits per byte"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (5.25, "5.2"), (611, "611"), (999.96, "1.00k"), (12345, "12.3k"), (999990, "1.00M"), (120.67e9, "121B")],
)
def test_compact(number, text):
    assert m.compact(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (192, "3m12s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_duration(seconds, text):
    assert m.duration(seconds) == text


def test_piped_output_is_plain_lines(tmp_path, capsys):
    with m.Metrics(tmp_path, LogConfig(), total_steps=100) as metrics:
        metrics.note("checkpoint saved")
        metrics.advance(5)
        metrics.log(step(10))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["note checkpoint saved", m.format_step(step(10), 100)]


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_a_bar_and_lines_above_it(tmp_path, monkeypatch, no_color):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    with m.Metrics(tmp_path, LogConfig(), total_steps=100) as metrics:
        metrics.log(step(10))
        metrics.log({"step": 10, "val_loss": 2.0})
        metrics.advance(50)
    text = out.getvalue()
    assert "50/100" in text and "4.321" in text and "training" in text
    assert ("\x1b[36m" in text) is not no_color


# ------------------------------------------------------------------------------------------------------------ trackers


def test_tensorboard_events_are_readable(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = m.load_summary({"layers.1": torch.tensor([3, 1])})
    with m.Metrics(tmp_path, LogConfig(tensorboard=True), total_steps=100) as metrics:
        metrics.log(step(10) | summary)
        metrics.log(step(20, loss=math.nan))
        metrics.log({"step": 20, "val_loss": 2.5, "val_mtp_loss": [3.0]})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")] == [(10, 4.321)]
    assert events.Scalars("train/mtp_loss/2")[0].value == pytest.approx(5.12)
    assert events.Scalars("experts_max_over_mean/layers.1")[0].value == 1.5
    assert events.Scalars("validation/loss")[0].step == 20


@pytest.mark.parametrize(
    ("module", "log", "package"),
    [
        ("torch.utils.tensorboard", LogConfig(tensorboard=True), "tensorboard"),
        ("wandb", LogConfig(wandb="project"), "wandb"),
        ("mlflow.entities", LogConfig(mlflow="experiment"), "mlflow-skinny"),
    ],
)
def test_a_missing_tracker_is_a_sentence_and_leaves_the_history_alone(tmp_path, monkeypatch, module, log, package):
    path = run(tmp_path, [10, 20])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{package} cannot be imported .*pip install 'nemo-lite\[log\]'"):
        m.Metrics(tmp_path, log, total_steps=100)
    assert steps_of(path) == [10, 20]


def test_a_tracker_that_fails_is_said_once_and_costs_nothing(tmp_path, capsys):
    class Broken:
        name = "W"
        tries = 0

        def send(self, values, step):
            self.tries += 1
            raise ConnectionError("no route\nto host")

        def close(self):
            raise AssertionError("closed after it was left out")

    with m.Metrics(tmp_path, LogConfig(), total_steps=100) as metrics:
        broken = Broken()
        metrics._trackers.append(broken)
        for number in range(10):
            metrics.log(step(number))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == 1 and "no route" in notes[0] and broken.tries == 3
    assert len(steps_of(tmp_path / m.METRICS_FILE)) == 10


# -------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756),
        ("NVIDIA H200", torch.float32, True, 494.7),
        ("NVIDIA H200", torch.float32, False, 66.9),
        ("NVIDIA A100-SXM4-80GB", torch.float16, False, 312),
        ("NVIDIA GB200", torch.bfloat16, False, 2500),
        ("NVIDIA B200", torch.bfloat16, False, 2250),
        ("NVIDIA B300 SXM6 AC", torch.bfloat16, False, 2250),
        ("NVIDIA L40S", torch.bfloat16, False, 362),
        ("NVIDIA L4", torch.bfloat16, False, 121),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3", torch.int8, False, None),
        ("Some GPU", torch.bfloat16, False, None),
    ],
)
def test_gpu_peaks(name, dtype, tf32, teraflops):
    peak, source = m.gpu_peak(name, dtype, tf32)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12)) and name in source


def test_cpu_peak_is_measured():
    peak, source = m.peak_flops("cpu", torch.float32)
    assert peak is not None and 1e8 < peak < 1e14 and "measured" in source and "float32" in source
    assert 0.01 < m.memory_gb("cpu") < 1000


def test_environment_is_json_and_names_no_home_or_host(monkeypatch):
    import os
    import platform

    monkeypatch.setenv("WORLD_SIZE", "2")
    kernels = [{"op": "ssd", "backend": "torch", "why": f"{os.path.expanduser('~')}/lib is missing"}]
    found = m.environment(Recipe(seed=7), kernels, peak=(1e12, "a test"), parameters={"total": 5})
    text = json.dumps(found)
    assert found["seed"] == 7 and found["world_size"] == 2 and found["parameters"] == {"total": 5}
    assert found["versions"]["torch"] == torch.__version__ and found["peak_flops"]["per_process"] == 1e12
    assert set(found["git"]) == {"commit", "dirty"} and found["machine"]["cpu"]
    assert os.path.expanduser("~") not in text and found["kernels"][0]["why"].startswith("~/")
    assert len(platform.node()) < 4 or platform.node() not in found["machine"].values()
