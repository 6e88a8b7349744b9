"""Two models on the same documents and the same questions: differences with 95 % intervals by the paired bootstrap.

Documents (or questions) are drawn again with replacement, the same for both models, and the difference is formed anew
each time; the interval holds the middle 95 % of these. What all documents have in common, easy or hard, cancels. With
fewer than about twenty documents such intervals are too narrow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nemo_lite.evaluate.ruler import Mark
from nemo_lite.evaluate.text import Reading

DRAWS = 2000


def difference(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """sum(numerators) / sum(denominators) of a minus that of b, for numerators and denominators [D] or [D, P] by
    document. Values are numbers, or lists over P; `low` and `high` are None for a single document."""
    rng = np.random.default_rng(seed)
    D = len(a[0])

    def ratio(pair, weights_RD):
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights_RD @ pair[0]) / (weights_RD @ pair[1])

    ones = np.ones((1, D))
    values = [ratio(pair, ones)[0] for pair in (a, b)]
    found = {"a": values[0].tolist(), "b": values[1].tolist(), "difference": (values[0] - values[1]).tolist()}
    if D < 2:
        return found | {"low": None, "high": None, "documents": D}
    samples = []
    left = draws
    while left:
        count = min(left, max(1, (1 << 22) // D))
        weights = rng.multinomial(D, np.full(D, 1 / D), size=count).astype(np.float64)
        samples.append(ratio(a, weights) - ratio(b, weights))
        left -= count
    low, high = np.nanquantile(np.concatenate(samples), [0.025, 0.975], axis=0)
    return found | {"low": low.tolist(), "high": high.tolist(), "documents": D}


def text(a: dict[str, Reading], b: dict[str, Reading], same_tokens: bool) -> dict[str, Any]:
    """Bits per byte by source, and where both models have the same tokens, loss by position."""
    found: dict[str, Any] = {"bits_per_byte": {}}
    for source in a:
        pairs = [(each.nats_DP.sum(1) / math.log(2), each.bytes_D) for each in (a[source], b[source])]
        if len(pairs[0][1]) != len(pairs[1][1]):  # a document that one tokenizer has no token for
            continue
        found["bits_per_byte"][source] = difference(*pairs)
    if same_tokens:
        whole = [Reading.joined(list(each.values())) for each in (a, b)]
        there = whole[0].tokens_DP.sum(0) > 0
        pairs = [(each.nats_DP[:, there], each.tokens_DP[:, there]) for each in whole]
        both = difference(*pairs)
        bins = [p for p, any_ in enumerate(there) if any_]
        found["loss_by_position"] = [
            {"from": 2**p, "to": 2 ** (p + 1) - 1}
            | {name: value[i] if isinstance(value, list) else value for name, value in both.items()}
            for i, p in enumerate(bins)
        ]
    return found


def ruler(a: dict[tuple[int, str], list[Mark]], b: dict[tuple[int, str], list[Mark]]) -> dict[str, Any]:
    """By length, over all tasks: score, share likeliest, and margin."""
    found: dict[str, Any] = {}
    for length in sorted({length for length, _ in a}):
        marks = [[mark for (n, _), each in one.items() if n == length for mark in each] for one in (a, b)]
        ones = np.ones(len(marks[0]))
        found[str(length)] = {
            name: difference(*((np.array([float(getattr(m, name)) for m in each]), ones) for each in marks))
            for name in ("score", "likeliest", "margin")
        }
    return found
