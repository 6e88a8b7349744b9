"""The learning rate at every corner of each schedule."""

import math
from itertools import pairwise

import pytest

from nemo_lite.config import OptimConfig, ScheduleConfig
from nemo_lite.train.schedule import learning_rate

PEAK, LOW, STEPS = 2.0, 0.5, 40


def rates(**schedule) -> list[float]:
    config = ScheduleConfig(**({"min_lr": LOW} | schedule))
    return [learning_rate(step, STEPS, OptimConfig(lr=PEAK), config) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(kind):
    got = rates(kind=kind, warmup_steps=8, decay_steps=10)
    assert got[:8] == pytest.approx([PEAK * (i + 1) / 8 for i in range(8)])
    assert got[8] == pytest.approx(PEAK, rel=0.01) and (kind == "cosine" or got[8] == PEAK)


@pytest.mark.parametrize("shape", ["minus_sqrt", "linear", "cosine"])
def test_wsd_decays_over_the_last_steps_to_min_lr(shape):
    got = rates(kind="wsd", warmup_steps=4, decay_steps=16, decay_shape=shape)
    assert set(got[4:24]) == {PEAK}
    remaining = {
        "minus_sqrt": lambda x: 1 - math.sqrt(x),
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }[shape]
    assert got[24:] == pytest.approx([LOW + (PEAK - LOW) * remaining((i + 1) / 16) for i in range(16)])
    assert got[24] < PEAK and got[-1] == pytest.approx(LOW, abs=1e-15)
    assert all(a > b for a, b in pairwise(got[23:]))


def test_cosine_ends_at_min_lr():
    got = rates(kind="cosine", warmup_steps=4, decay_steps=30)  # decay_steps belongs to wsd
    assert got[4 + 17] == pytest.approx((PEAK + LOW) / 2)  # the middle of the 36 steps after the warmup
    assert got[-1] == pytest.approx(LOW, abs=1e-15) and all(a > b for a, b in pairwise(got[3:]))


def test_constant_and_no_decay_stay_at_the_peak():
    assert set(rates(kind="constant", decay_steps=10)) == {PEAK}
    assert set(rates(kind="wsd", decay_steps=0)) == {PEAK}
    assert rates(kind="wsd", decay_steps=STEPS)[-1] == pytest.approx(LOW)
    assert rates(kind="cosine", warmup_steps=STEPS)[-1] == PEAK
