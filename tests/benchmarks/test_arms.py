"""What ablations share: paired intervals, runs that count as finished; and that arms are as large as they say."""

import importlib
import json
import math
from pathlib import Path

import pytest

from nemo_lite.check import parameter_counts
from nemo_lite.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch):
    """A module of benchmarks/, imported as its scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_paired_differences(load):
    """Three differences of 1, 2 and 3 %: mean 2 %, half width 4.303 x 1 % / sqrt(3)."""
    found = load("arms").relative([1.01, 2.04, 4.12], [1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(0.02)
    assert found["half_width"] == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert load("arms").relative([1.1], [1.0])["half_width"] == math.inf


def test_a_run_is_finished_when_its_last_checkpoint_is_there(load, monkeypatch, tmp_path):
    arms = load("arms")
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    (tmp_path / "recipe.yaml").write_text("train: {steps: 4}\n")
    study = arms.Study(arms.Path("runs/x"), "recipe.yaml", {"a": ["init_from=models/{seed}"]}, {"a": [7]})
    assert study.seeds_of("a", [0, 1]) == [0, 1, 7]
    assert study.overrides("a", 7) == ["run_dir=runs/x/a/7", "seed=7", "init_from=models/7"]
    folder = tmp_path / study.run_dir("a", 7)
    (folder / "checkpoints" / "step_2").mkdir(parents=True)
    records = [{"step": 2, "loss": 3.0}, {"step": 2, "val_loss": 3.5, "elapsed_seconds": 8.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert not study.finished("a", 7)
    assert study.curve("a", 7) == {2: 3.5} and study.seconds("a", 7) == 8.0
    (folder / "checkpoints" / "step_4").mkdir()
    assert study.finished("a", 7) and not study.finished("a", 0)


def test_arms_have_equal_active_parameters(load):
    """All of benchmarks/ablations.py within a thousandth; LatentMoE and plain MoE in total too, within a twentieth."""
    study = load("ablations").STUDY
    counts = {arm: parameter_counts(study.loaded(arm, 0).model) for arm in study.arms}
    first = counts["hybrid"]
    for arm, each in counts.items():
        assert each["active_layers_only"] == pytest.approx(first["active_layers_only"], rel=1e-3), arm
    assert counts["plain"]["total"] == pytest.approx(first["total"], rel=0.05)
    assert counts["mtp"]["total"] == first["total"] and counts["mtp"]["mtp"]["total"] > 0


def test_the_control_reads_the_same_tokens(load):
    """Rows of 65,536 and rows of 4,096: as many tokens a step, from the same model, at the same rates."""
    study = load("long_context").STAGES
    words = {arm: study.overrides(arm, 0) for arm in ("long", "control")}
    start = "init_from=runs/long_context/short/0/model"
    assert all(start in each for each in words.values())
    long, control = (
        load_recipe(ROOT / study.recipe, [word for word in each if word != start]) for each in words.values()
    )
    assert long.data.seq_len == 65536 and control.data.seq_len == 4096
    assert long.tokens_per_step == control.tokens_per_step == 65536
    assert (long.seed, long.optim, long.schedule) == (control.seed, control.optim, control.schedule)
