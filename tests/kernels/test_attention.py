"""Attention: torch's backends against the written-out softmax, documents apart, with and without a cache."""

import pytest
import torch
from nemo_lite_kernels import OPS, load
from nemo_lite_kernels.attention import attention_cached, attention_masked, attention_paged
from tiny import TOLERANCE, assert_close

BACKENDS = [
    (n, load(b.functions["attention"])) for n, b in OPS["attention"].items() if b.missing is None and n != "reference"
]
LENGTHS = [[1], [7], [4, 4, 4], [3, 1, 1, 9], [1, 1], [5, 2]]


def qkv(T, dtype, heads=4, kv_heads=2, size=6):
    generator = torch.Generator().manual_seed(T)
    return [
        torch.randn((T, n, size), generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def run(function, tensors, lengths):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves, lengths)
    (
        y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    ).sum().backward()
    return y, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_backend_equals_the_reference(backend, kv_heads, lengths):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = qkv(sum(lengths), dtype, kv_heads=kv_heads)
        y, grads = run(backend[1], tensors, lengths)
        y_ref, grads_ref = run(attention_masked, [t.double() for t in tensors], lengths)
        assert y.dtype == dtype
        assert_close(y, y_ref, TOLERANCE[dtype])
        for name, grad, grad_ref in zip("qkv", grads, grads_ref):
            assert_close(grad, grad_ref, TOLERANCE[dtype], f"gradient of {name}")


def test_the_reference_is_the_equation():
    q, k, v = qkv(7, torch.float64)
    y = attention_masked(q, k, v, [5, 2])
    for start, end in ((0, 5), (5, 7)):
        for t in range(start, end):
            for head in range(4):
                scores = k[start : t + 1, head // 2] @ q[t, head] / 6**0.5
                assert_close(y[t, head], scores.softmax(0) @ v[start : t + 1, head // 2], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
def test_views_as_inputs(backend):
    tensors = qkv(8, torch.float64)
    views = [torch.stack([t, t], dim=-1)[..., 0] for t in tensors]
    assert_close(run(backend[1], views, [5, 3])[0], run(attention_masked, tensors, [5, 3])[0], 1e-12)


@pytest.mark.parametrize("starts,L", [([0, 0], 6), ([5, 5], 1), ([4, 4], 2), ([1, 4], 2), ([0, 3], 3), ([2, 2], 2)])
def test_new_tokens_over_a_cache(starts, L):
    """Row b's token i sees slots 0..starts[b]+i, whatever stands behind them."""
    S = 6
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((2, n, h, 4), generator=generator, dtype=torch.float64) for n, h in ((L, 4), (S, 2), (S, 2)))
    y = attention_cached(q, k, v, starts)
    for b, start in enumerate(starts):
        for i in range(L):
            end = start + i + 1
            padded = torch.zeros(end, 4, 4, dtype=torch.float64)
            padded[-1] = q[b, i]
            assert_close(y[b, i], attention_masked(padded, k[b, :end], v[b, :end], [end])[-1], 1e-12)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("blocks", [[3, 4, 5], [4, 0, 2], [[1, 4, 0], [5, 3, 2]]], ids=str)
def test_slots_in_blocks(blocks, first):
    """Neighbouring blocks, others, two rows: what lies in the blocks besides the rows' slots is not seen."""
    table, size, L = torch.tensor(blocks).view(-1, 3), 4, 2
    generator = torch.Generator().manual_seed(2)
    starts = [5, 3][: len(table)]
    q, k, v = (
        torch.randn((len(table), n, h, 4), generator=generator, dtype=torch.float64)
        for n, h in ((L, 4), (max(starts) + L, 2), (max(starts) + L, 2))
    )
    pools = []
    for of_rows in (k, v):
        pool = torch.full((6, size, 2, 4), 1e3, dtype=torch.float64)
        for b in range(len(table)):
            for p in range(of_rows.shape[1]):
                pool[table[b, (first + p) // size], (first + p) % size] = of_rows[b, p]
        pools.append(pool)
    wanted = attention_cached(q, k, v, starts)
    assert_close(attention_paged(q, *pools, table, torch.tensor(starts), first), wanted, 1e-12)
    if blocks == [3, 4, 5]:
        y = attention_paged(q, *pools, table, torch.tensor(starts), first, starts=starts, place=3 * size)
        assert_close(y, wanted, 1e-12)
