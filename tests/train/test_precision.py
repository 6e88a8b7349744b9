"""Training runs in number formats: every preset, resuming, the tail at the end, what is measured on the way."""

import pytest
from runs import losses, records

PRESETS = ["fp8", "mxfp8", "nvfp4", "nemotron3_super_nvfp4"]
STEPS = ("train.steps=6", "schedule.warmup_steps=2", "checkpoint.every=3")


def test_every_preset_trains_and_stays_near_bf16(forks, tmp_path):
    common = (*STEPS, "train.dtype=bfloat16")
    forks.train("resume", tmp_path / "bf16", *common)
    plain = losses(tmp_path / "bf16")
    for preset in PRESETS:
        forks.train("resume", tmp_path / preset, *common, f"precision={preset}")
        found = losses(tmp_path / preset)
        assert found[6] != plain[6] and found[6][0] == pytest.approx(plain[6][0], rel=0.03), preset
        assert found[6][0] < found[1][0]


def test_resuming_is_exact(forks, tmp_path, ranks=2):
    """Random numbers follow from the place in the run: 6 steps are 3 and 3, bit for bit."""
    precision = "precision={preset: nvfp4, statistics_every: 2}"
    forks.train("resume", tmp_path / "whole", *STEPS, precision, ranks=ranks)
    forks.train("resume", tmp_path / "parts", *STEPS, precision, "train.steps=3", ranks=ranks)
    assert max(losses(tmp_path / "parts")) == 3
    forks.train("resume", tmp_path / "parts", *STEPS, precision, ranks=ranks)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_may_end_in_bf16_and_checkpoints_take_any_precision(forks, tmp_path):
    """After the switch a run goes on as a bf16 run from its checkpoint would."""
    tail = "precision={preset: nvfp4, bf16_last_steps: 3}"
    forks.train("resume", tmp_path / "tail", *STEPS, tail)
    forks.train("resume", tmp_path / "moved", *STEPS, "precision=nvfp4", "train.steps=3")
    forks.train("resume", tmp_path / "moved", *STEPS, "precision=bf16")
    assert losses(tmp_path / "moved") == losses(tmp_path / "tail")
    forks.train("resume", tmp_path / "whole", *STEPS, "precision=nvfp4")
    whole, tail = losses(tmp_path / "whole"), losses(tmp_path / "tail")
    assert whole[3] == tail[3] and whole[4] != tail[4]


def test_what_is_measured(forks, tmp_path):
    """Per linear and operand, at the interval; in the report as a heat map."""
    precision = "precision={preset: nemotron3_super_nvfp4, statistics_every: 3}"
    forks.train("resume", tmp_path, *STEPS, precision, "log.every=10")
    lines = {r["step"]: r["quantisation"] for r in records(tmp_path) if "quantisation" in r}
    assert list(lines) == [3, 6]
    found = lines[6]
    assert set(found["layers.0.mixer.in_proj"]) == {"fprop x", "fprop w", "dgrad dy", "wgrad dy", "wgrad x"}
    assert "layers.1.mixer.experts.up_proj" in found and "layers.1.mixer.experts.down_proj" in found
    assert not any("latent" in name or name.startswith("mtp") for name in found)
    for name, operands in found.items():
        for operand, one in operands.items():
            assert 0 <= one["flushed"] < 0.6 and 0 <= one["saturated"] < 0.3, (name, operand)
            low, high = (0.01, 0.05) if ".out_proj" in name else (0.05, 0.25)
            assert low < one["error"] < high, (name, operand, one["error"])
            assert len(one["scales"]) == 16 and sum(one["scales"]) == pytest.approx(1, abs=1e-3)
    report = (tmp_path / "report.html").read_text()
    assert "Number formats" in report and "flushed to zero" in report and "layers.0.mixer.in_proj" in report
