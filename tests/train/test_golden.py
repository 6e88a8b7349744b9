"""Losses of three tiny recipes against stored ones: nothing that changes the numbers goes unnoticed.

A change that is meant to change them stores the new ones:

    python -m pytest tests/train/test_golden.py --update-golden
"""

from pathlib import Path

import pytest
from runs import ROOT, records

GOLDEN = ROOT / "tests" / "fixtures" / "golden"
TOLERANCE = 1e-5


def measured(run_dir: Path) -> list[tuple[str, float]]:
    """Every loss of every line, as (name, value)."""
    found = []
    for record in records(run_dir):
        for key in ("loss", "mtp_loss", "aux_loss", "val_loss", "val_mtp_loss"):
            values = record.get(key)
            values = values if isinstance(values, list) else [] if values is None else [values]
            for depth, value in enumerate(values, start=1):
                found.append((f"{record['step']} {key}{f'.{depth}' * key.endswith('mtp_loss')}", value))
    return found


@pytest.mark.parametrize("name", ["golden_mem", "golden_dense", "golden_grouped"])
def test_losses_are_the_stored_ones(forks, tmp_path, name, request):
    forks.train(name, tmp_path / "run")
    got = measured(tmp_path / "run")
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden", default=False):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{key} {value!r}\n" for key, value in got))
        pytest.skip(f"stored {len(got)} values in {file.relative_to(ROOT)}")
    stored = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
    assert [key for key, _ in got] == [key for key, _ in stored]
    off = {key: value - float(want) for (key, value), (_, want) in zip(got, stored)}
    off = {key: difference for key, difference in off.items() if abs(difference) > TOLERANCE}
    assert not off, f"off by {off}; if that is meant, store the new losses (see the top of this file)"
