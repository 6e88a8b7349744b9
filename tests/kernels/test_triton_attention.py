"""Triton attention over paged keys and values against the softmax written out. Interpreted on a CPU, in float32."""

import pytest
import torch
from kernels.interpreter import DEVICE, kernels, poison
from tiny import assert_close

attention = kernels("attention")


def pages(B, L, A, K, D, size, starts, first, seed=0):
    """Random queries; keys and values whose places beyond the rows' ends, and before `first`, are NaN; a table in no
    order, in which rows share no block."""
    generator = torch.Generator().manual_seed(seed)
    N = max(-(-(start + first + L) // size) for start in starts) + 1
    count = B * N + 2
    q = torch.randn(B, L, A, D, generator=generator)
    k, v = (torch.randn(count, size, K, D, generator=generator) for _ in range(2))
    table = torch.randperm(count, generator=generator)[: B * N].view(B, N)
    for b, start in enumerate(starts):
        for p in [*range(first), *range(start + first + L, N * size)]:
            k[table[b, p // size], p % size] = v[table[b, p // size], p % size] = float("nan")
    return [t.to(DEVICE) for t in (q, k, v, table)]


def expected(q, k, v, table, starts, first):
    _, L, A, D = q.shape
    group, y = A // k.shape[2], torch.empty_like(q, dtype=torch.float64)
    for b, start in enumerate(starts):
        keys, values = (t[table[b]].flatten(0, 1).double().repeat_interleave(group, 1) for t in (k, v))
        for i in range(L):
            seen = slice(first, start + first + i + 1)
            scores = torch.einsum("ad,pad->ap", q[b, i].double(), keys[seen]) * D**-0.5
            y[b, i] = torch.einsum("ap,pad->ad", scores.softmax(-1), values[seen])
    return y


CASES = [
    # B, L, A, K, D, block size, starts, first
    (1, 1, 4, 2, 16, 16, [0], 0),
    (1, 1, 4, 2, 16, 16, [40], 1),
    (3, 1, 6, 1, 20, 8, [0, 17, 130], 0),
    (2, 4, 4, 4, 8, 16, [3, 70], 1),
    (2, 9, 4, 2, 32, 4, [0, 31], 0),
    (1, 5, 32, 2, 16, 16, [150], 0),
]


@pytest.mark.parametrize("pieces", [None, 1, 3, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_softmax(case, pieces, monkeypatch):
    *_, starts, first = case
    q, k, v, table = pages(*case)
    starts_B = torch.tensor(starts, device=DEVICE)
    poison(monkeypatch)
    y = attention.attention_paged(q, k, v, table, starts_B, first, pieces=pieces)
    assert y.shape == q.shape and y.dtype == q.dtype
    assert_close(y, expected(q, k, v, table, starts, first), 2e-6)


def test_views_as_inputs():
    starts = [5, 20]
    q, k, v, table = pages(2, 2, 4, 2, 16, 8, starts, 0)
    wide = torch.stack([k, v], 2).transpose(1, 3)  # [Nb, K, 2, b, D]
    y = attention.attention_paged(
        q.transpose(1, 2).contiguous().transpose(1, 2), wide[:, :, 0].transpose(1, 2), wide[:, :, 1].transpose(1, 2),
        torch.stack([table, table], -1)[..., 0], torch.tensor([*starts, 0], device=DEVICE, dtype=torch.int32)[:2], 0,
    )  # fmt: skip
    assert_close(y, expected(q, k, v, table, starts, 0), 2e-6)


def test_large_scores_do_not_overflow():
    starts = [70]
    q, k, v, table = pages(1, 1, 2, 1, 16, 16, starts, 0)
    for pieces in (1, 4):
        y = attention.attention_paged(100 * q, k, v, table, torch.tensor(starts, device=DEVICE), pieces=pieces)
        assert_close(y, expected(100 * q, k, v, table, starts, 0), 2e-5)


def test_nothing_to_do_and_float64():
    q, k, v, table = pages(1, 1, 2, 1, 16, 16, [3], 0)
    assert attention.attention_paged(q[:0], k, v, table[:0], torch.tensor([], device=DEVICE)).shape == (0, 1, 2, 16)
    with pytest.raises(TypeError, match="float64"):
        attention.attention_paged(q.double(), k, v, table, torch.tensor([3], device=DEVICE))
