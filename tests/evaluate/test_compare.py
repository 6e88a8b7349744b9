"""The paired bootstrap: intervals hold the truth as often as they say, and what both models share cancels."""

import numpy as np
import pytest

from nemo_lite.evaluate.compare import difference


def made(rng, documents, gap):
    """Documents of different sizes and difficulty, the same for two models that differ by `gap` on average."""
    size = rng.integers(50, 400, documents).astype(float)
    hard = rng.normal(2.0, 0.8, documents)
    a = (hard + gap + rng.normal(0, 0.1, documents)) * size
    b = (hard + rng.normal(0, 0.1, documents)) * size
    return (a, size), (b, size)


def test_the_interval_covers_the_truth_and_ignores_what_documents_share():
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for trial in range(200):
        found = difference(*made(rng, 60, 0.05), draws=400, seed=trial)
        inside += found["low"] <= 0.05 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.88 <= inside / 200 <= 0.99
    assert np.mean(widths) < 0.12  # unpaired it would be about 4 * 0.8 / sqrt(60) = 0.4


def test_values_are_ratios_of_sums_and_bins_are_columns():
    a = np.array([[1.0, 8.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    b = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    found = difference(a, b)
    assert found["a"] == [2.0, 3.0] and found["b"] == [1.0, 1.0] and found["difference"] == [1.0, 2.0]
    assert len(found["low"]) == len(found["high"]) == 2 and found["documents"] == 2


def test_equal_models_have_an_interval_of_nothing_and_one_document_has_none():
    pair = np.array([3.0, 5.0, 9.0]), np.array([2.0, 2.0, 2.0])
    found = difference(pair, pair)
    assert found["low"] == found["high"] == found["difference"] == 0
    alone = difference((np.array([1.0]), np.array([2.0])), (np.array([2.0]), np.array([2.0])))
    assert alone["low"] is None and alone["difference"] == -0.5


def test_the_same_seed_gives_the_same_interval():
    pairs = made(np.random.default_rng(1), 30, 0.2)
    assert difference(*pairs) == difference(*pairs)
    assert difference(*pairs)["low"] == pytest.approx(difference(*pairs, seed=9)["low"], abs=0.02)
