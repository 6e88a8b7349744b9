"""The Triton experts and router against the equations: whatever the routing, with gradients of everything.

Interpreted on a CPU, in float32; tests/gpu has the sizes and number formats of a GPU.
"""

import pytest
import torch
from kernels.interpreter import DEVICE, kernels, poison
from nemo_lite_kernels.moe import experts_reference
from tiny import assert_close

moe = kernels("moe")
NAMES = ("x", "weight", "up", "down")


def routing(kind, T, k, E):
    generator = torch.Generator().manual_seed(T)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(T)]) if T else torch.empty(0, k)
    chosen = chosen.long()
    if kind == "one":  # all copies on one expert, also twice of one token: the others are empty
        chosen[:] = E - 1
    elif kind == "holes":  # some tokens dropped, some copies dropped, experts below 3 empty
        chosen[chosen < 3] = -1
        chosen[::3] = -1
    elif kind == "dropped":
        chosen[:] = -1
    return chosen.to(DEVICE)


def inputs(T, k, E, L, F):
    generator = torch.Generator().manual_seed(T + E)
    shapes = {"x": (T, L), "weight": (T, k), "up": (E, F, L), "down": (E, L, F)}
    return {n: 0.5 * torch.randn(s, generator=generator).to(DEVICE) for n, s in shapes.items()}


def run(function, tensors, expert):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    y = function(leaves["x"], expert, leaves["weight"], leaves["up"], leaves["down"])
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    # The second term is zero; it gives every input a gradient where no expert was hit.
    ((y * weighting).sum() + sum(0 * t.sum() for t in leaves.values())).backward()
    return y, {n: t.grad for n, t in leaves.items()}


def compare(tensors, expert, function=moe.experts):
    y, grads = run(function, tensors, expert)
    y_ref, grads_ref = run(experts_reference, {n: t.double() for n, t in tensors.items()}, expert)
    assert y.dtype == tensors["x"].dtype
    assert_close(y, y_ref, 2e-5, "y")
    for name in NAMES:
        assert_close(grads[name], grads_ref[name], 2e-5, f"gradient of {name}")


@pytest.mark.parametrize("few", [True, False], ids=["compared", "sorted"])
@pytest.mark.parametrize("kind", ["random", "one", "holes", "dropped"])
@pytest.mark.parametrize("T,k,E", [(0, 2, 4), (1, 1, 1), (1, 3, 8), (23, 3, 8)])
def test_every_routing(few, kind, T, k, E, monkeypatch):
    if not few:
        monkeypatch.setattr(moe, "FEW_COPIES", 0)
    expert, tensors = routing(kind, T, k, E), inputs(T, k, E, 8, 16)
    poison(monkeypatch)
    compare(tensors, expert)


@pytest.mark.parametrize("T,k,E,L,F", [(5, 2, 4, 7, 19), (40, 3, 5, 33, 70), (70, 2, 2, 17, 65), (260, 2, 3, 130, 20)])
def test_odd_sizes_and_every_block_size(T, k, E, L, F, monkeypatch):
    """16, 32, 64 and 128 rows a block; sizes that fill no block."""
    assert moe.block_rows(T * k, E) == {5: 16, 40: 32, 70: 128, 260: 128}[T]
    expert, tensors = routing("holes" if E > 3 else "random", T, k, E), inputs(T, k, E, L, F)
    poison(monkeypatch)
    compare(tensors, expert)


@pytest.mark.parametrize("T,k,E,block_m", [(1, 22, 64, 16), (7, 3, 16, 16), (50, 4, 5, 32), (100, 3, 4, 64)])
@pytest.mark.parametrize("kind", ["random", "one", "holes", "dropped"])
def test_the_schedule_has_every_copy_once(kind, T, k, E, block_m, monkeypatch):
    expert = routing(kind, T, k, E)
    tables = [[t.cpu() for t in moe.schedule(expert, E, block_m)]]
    monkeypatch.setattr(moe, "FEW_COPIES", 0)
    tables.append([t.cpu() for t in moe.schedule(expert, E, block_m)])
    flat, S = expert.flatten().cpu(), T * k
    for block_X3, place_Tk, order_S, start_E1 in tables:
        assert block_X3.shape[0] == min(S, E) + S // block_m
        assert order_S.sort().values.tolist() == list(range(S))
        computed = int(start_E1[-1])
        assert computed == int((flat >= 0).sum())
        assert flat[order_S[:computed]].tolist() == sorted(flat[flat >= 0].tolist())
        assert [int(order_S[p]) if p >= 0 else None for p in place_Tk.flatten()] == [
            i if e >= 0 else None for i, e in enumerate(flat.tolist())
        ]
        seen = []
        for e, first, stop in block_X3.tolist():
            if e >= 0:
                rows = range(first, min(first + block_m, stop))
                assert len(rows) > 0 and all(flat[order_S[r]] == e for r in rows)
                seen += rows
        assert sorted(seen) == list(range(computed))
    for a, b in zip(*tables):
        used = tables[0][0][:, 0] >= 0
        assert torch.equal(a[used], b[used]) if a.dim() == 2 and a.shape == tables[0][0].shape else torch.equal(a, b)


def test_views_as_inputs():
    tensors, expert = inputs(7, 2, 4, 8, 16), routing("random", 7, 2, 4)
    wide = torch.stack([expert, expert], dim=-1)[..., 0]

    def of_views(x, expert, *others):
        views = [torch.stack([t, t], dim=-1)[..., 0] for t in (x, *others)]
        return moe.experts(views[0], wide, *views[1:])

    compare(tensors, expert, of_views)


def test_only_what_is_asked_for_is_differentiated():
    tensors, expert = inputs(6, 2, 4, 8, 16), routing("random", 6, 2, 4)
    _, want = run(experts_reference, tensors, expert)
    for name in NAMES:
        given = dict(tensors)
        given[name] = given[name].clone().requires_grad_()
        y = moe.experts(given["x"], expert, given["weight"], given["up"], given["down"])
        weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        (y * weighting).sum().backward()
        assert_close(given[name].grad, want[name], 2e-5, name)


def test_the_same_bits_every_time():
    tensors, expert = inputs(23, 3, 8, 8, 16), routing("holes", 23, 3, 8)
    (y, grads), (again, grads_again) = run(moe.experts, tensors, expert), run(moe.experts, tensors, expert)
    assert torch.equal(y, again) and all(torch.equal(grads[n], grads_again[n]) for n in NAMES)


def test_float64_is_refused():
    tensors = {n: t.double() for n, t in inputs(2, 1, 2, 8, 16).items()}
    with pytest.raises(TypeError, match="float64"):
        run(moe.experts, tensors, routing("random", 2, 1, 2))


# --------------------------------------------------------------------------------------------------------------- router


def plain_route(logits, bias, topk, scaling, normalise, n_group, topk_group):
    """The equation: sigmoid scores, chosen by score + bias within the best groups, weighted by the score alone."""
    scores = logits.sigmoid()
    with torch.no_grad():
        biased = scores + bias
        if n_group > 1:
            grouped = biased.unflatten(-1, (n_group, -1))
            best = grouped.topk(2).values.sum(-1).topk(topk_group).indices
            out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=best.device).scatter_(-1, best, False)
            biased = grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
        expert = biased.topk(topk).indices
    weight = scores.gather(-1, expert)
    if normalise:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return expert, weight * scaling, scores


CASES = [
    (5, 16, 3, 2.5, True, 1, 1),
    (3, 12, 12, 1.0, False, 1, 1),
    (1, 1, 1, 2.0, True, 1, 1),
    (4, 24, 4, 5.0, True, 4, 2),
    (4, 30, 5, 1.5, False, 3, 1),
    (0, 8, 2, 1.0, True, 1, 1),
]


@pytest.mark.parametrize("T,E,topk,scaling,normalise,n_group,topk_group", CASES)
def test_route(T, E, topk, scaling, normalise, n_group, topk_group):
    generator = torch.Generator().manual_seed(E)
    logits, bias = torch.randn(T, E, generator=generator).to(DEVICE), 0.3 * torch.randn(E, generator=generator)
    bias, rest = bias.to(DEVICE), (topk, scaling, normalise, n_group, topk_group)
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    expert, weight, scores = moe.route(mine, bias, *rest)
    expert_ref, weight_ref, scores_ref = plain_route(theirs, bias.double(), *rest)
    assert expert.dtype == torch.int64 and weight.dtype == scores.dtype == torch.float32
    assert torch.equal(expert, expert_ref)
    assert_close(weight, weight_ref, 2e-6)
    assert_close(scores, scores_ref, 2e-6)
    u, v = torch.randn(T, topk, generator=generator).to(DEVICE), torch.randn(T, E, generator=generator).to(DEVICE)
    ((weight * u).sum() + (scores * v).sum()).backward()
    ((weight_ref * u).sum() + (scores_ref * v).sum()).backward()
    assert_close(mine.grad, theirs.grad, 2e-6)
    alone = logits.clone().requires_grad_()
    (moe.route(alone, bias, *rest)[1] * u).sum().backward()
    again = logits.double().requires_grad_()
    (plain_route(again, bias.double(), *rest)[1] * u).sum().backward()
    assert_close(alone.grad, again.grad, 2e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [0, 2])
def test_router_has_the_references_statistics(rows, padded):
    reference = pytest.importorskip("nemo_lite_kernels.route")
    generator = torch.Generator().manual_seed(3)
    logits, bias = torch.randn(12, 10, generator=generator).to(DEVICE), torch.randn(10, generator=generator).to(DEVICE)
    count_BL = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6], dtype=torch.bool, device=DEVICE) if padded else None
    rest = (3, 2.5, True, 1, 1, rows, count_BL)
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, want = moe.router(mine, bias, *rest), reference.route(theirs, bias.double(), *rest)
    assert torch.equal(got[0].sort().values, want[0].sort().values)
    for a, b in zip(got[2:], want[2:]):
        assert (a is None) == (b is None) == (not rows)
    loss, loss_ref = got[1].square().sum(), want[1].square().sum()
    if rows:
        assert torch.equal(got[2], want[2])
        assert_close(got[3], want[3], 1e-5)
        loss, loss_ref = loss + got[3], loss_ref + want[3]
    loss.backward()
    loss_ref.backward()
    assert_close(mine.grad, theirs.grad, 1e-5)


def test_equal_scores_and_nonsense_still_choose_different_experts():
    nan = float("nan")
    logits = torch.tensor([[0.0] * 6, [nan] * 6, [nan, 1.0, nan, 2.0, nan, nan]], device=DEVICE)
    expert, _, _ = moe.route(logits, torch.zeros(6, device=DEVICE), 3)
    assert expert.tolist() == [[0, 1, 2], [0, 1, 2], [3, 1, 0]]
    # One group of two experts stays eligible, and three are wanted.
    expert, _, _ = moe.route(logits[:1], torch.zeros(6, device=DEVICE), 3, n_group=3, topk_group=1)
    assert len(set(expert[0].tolist())) == 3
