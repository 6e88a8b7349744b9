"""Routed experts: torch's backends against the equation, whatever the routing, with work that follows experts hit."""

import pytest
import torch
from nemo_lite_kernels import OPS, load
from nemo_lite_kernels.moe import experts_grouped_mm, experts_loop, experts_reference, sort_by_expert, squared_relu
from tiny import TOLERANCE, Watch, assert_close

BACKENDS = [
    (n, load(b.functions["experts"])) for n, b in OPS["experts"].items() if b.missing is None and n != "reference"
]
NAMES = ("x", "weight", "up", "down")


def routing(kind, T, k, E):
    generator = torch.Generator().manual_seed(T)
    chosen = (
        torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(T)]) if T else torch.empty(0, k).long()
    )
    if kind == "one":  # all copies on one expert: the others are empty
        chosen[:] = E - 1
    elif kind == "holes":  # some tokens dropped, some copies dropped, experts below 3 empty
        chosen[chosen < 3] = -1
        chosen[::3] = -1
    elif kind == "dropped":
        chosen[:] = -1
    return chosen


def inputs(T, k, E, L, F, dtype, weight_dtype=None):
    generator = torch.Generator().manual_seed(T + E)
    shapes = {"x": (T, L), "weight": (T, k), "up": (E, F, L), "down": (E, L, F)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for n, s in shapes.items()}
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to({"x": dtype, "weight": wide}.get(n, weight_dtype or dtype)) for n, t in tensors.items()}


def run(function, tensors, expert):
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    y = function(leaves["x"], expert, leaves["weight"], leaves["up"], leaves["down"])
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # The second term is zero; it gives every input a gradient where no expert was hit.
    ((y * weighting.to(y.dtype)).sum() + sum(0 * t.double().sum() for t in leaves.values())).backward()
    return y, {n: t.grad for n, t in leaves.items()}


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written is NaN, so that reading it shows."""

    def poison(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("kind", ["random", "one", "holes", "dropped"])
@pytest.mark.parametrize("T,k,E", [(0, 2, 4), (1, 1, 1), (1, 3, 8), (5, 2, 16), (23, 3, 8)])
def test_backend_equals_the_reference(backend, kind, T, k, E, poisoned):
    expert = routing(kind, T, k, E)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if not OPS["experts"][backend[0]].takes(dtype):
            continue
        tensors = inputs(T, k, E, 8, 16, dtype)
        y, grads = run(backend[1], tensors, expert)
        y_ref, grads_ref = run(experts_reference, {n: t.double() for n, t in tensors.items()}, expert)
        assert y.dtype == dtype
        assert_close(y, y_ref, TOLERANCE[dtype], f"y {dtype}")
        for name in NAMES:
            assert grads[name].dtype == tensors[name].dtype
            assert_close(grads[name], grads_ref[name], TOLERANCE[dtype], f"gradient of {name}, {dtype}")


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
def test_master_weights_in_float32(backend):
    """bf16 activations over float32 weights: the weights' gradients are float32."""
    expert = routing("random", 9, 2, 4)
    tensors = inputs(9, 2, 4, 8, 16, torch.bfloat16, torch.float32)
    y, grads = run(backend[1], tensors, expert)
    y_ref, grads_ref = run(experts_reference, {n: t.double() for n, t in tensors.items()}, expert)
    assert y.dtype == torch.bfloat16 and grads["up"].dtype == grads["down"].dtype == torch.float32
    assert_close(y, y_ref, 2e-2)
    for name in NAMES:
        assert_close(grads[name], grads_ref[name], 2e-2, name)


def test_the_reference_is_the_equation():
    tensors = inputs(6, 2, 4, 5, 7, torch.float64)
    expert = routing("holes", 6, 2, 4)
    y = experts_reference(tensors["x"], expert, tensors["weight"], tensors["up"], tensors["down"])
    for t in range(6):
        total = torch.zeros(5, dtype=torch.float64)
        for slot, e in enumerate(expert[t].tolist()):
            if e >= 0:
                inner = (tensors["up"][e] @ tensors["x"][t]).clamp(min=0) ** 2
                total += tensors["weight"][t, slot] * (tensors["down"][e] @ inner)
        assert_close(y[t], total, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
def test_views_as_inputs(backend):
    dtype = torch.float32
    tensors = inputs(7, 2, 4, 8, 16, dtype)
    expert = routing("random", 7, 2, 4)
    views = {n: torch.stack([t, t], dim=-1)[..., 0] for n, t in tensors.items()}
    if backend[0] == "grouped_mm":  # its GEMM reads weights row by row
        views |= {n: tensors[n] for n in ("up", "down")}
    wide = torch.stack([expert, expert], dim=-1)[..., 0]
    y, grads = run(lambda *args: backend[1](*args), dict(views.items()), wide)
    y_ref, grads_ref = run(experts_reference, tensors, expert)
    assert_close(y, y_ref, 2e-5)
    for name in NAMES:
        assert_close(grads[name], grads_ref[name], 2e-5, name)


def test_sorting_keeps_every_copy_once():
    expert = torch.tensor([[3, -1], [0, 3], [-1, -1], [3, 0]])
    order, counts = sort_by_expert(expert, 5)
    assert order.tolist() == [2, 7, 0, 3, 6] and counts.tolist() == [2, 0, 0, 3, 0]


def test_work_follows_the_experts_hit_not_their_number():
    launches = {}
    for E in (8, 64, 512):
        tensors = inputs(6, 2, E, 4, 8, torch.float32)
        expert = torch.tensor([[0, 5], [5, 7], [7, 0], [0, 7], [5, -1], [0, 7]])
        with Watch() as watch:
            experts_loop(tensors["x"], expert, tensors["weight"], tensors["up"], tensors["down"])
        assert len(watch.named("mm")) == 2 * 3, "two products for each of the three experts hit"
        assert sum(a[0].shape[0] for _, a, _ in watch.named("mm")) == 2 * 11, "each copy is computed once"
        launches[E] = len(watch.calls)
    assert len(set(launches.values())) == 1, launches


@pytest.mark.parametrize("kind", ["random", "one", "holes", "dropped"])
@pytest.mark.parametrize("T", [0, 1, 2, 3, 8, 32, 64, 65])
def test_decoding_equals_the_reference(kind, T, poisoned):
    """Without gradients few tokens take a path of their own."""
    expert = routing(kind, T, 3, 8)
    before = expert.clone()
    for dtype, weight_dtype in (
        (torch.float64,) * 2,
        (torch.float32,) * 2,
        (torch.bfloat16,) * 2,
        (torch.bfloat16, None),
    ):
        tensors = inputs(T, 3, 8, 8, 16, dtype, weight_dtype or torch.float32)
        copies = {n: t.clone() for n, t in tensors.items()}
        views = {n: torch.stack([t, t], dim=-1)[..., 0] for n, t in tensors.items()}
        y_ref = experts_reference(
            *(tensors["x"].double(), expert), *(tensors[n].double() for n in ("weight", "up", "down"))
        )
        with torch.no_grad():
            for given in (tensors, views):
                y = experts_loop(given["x"], expert, given["weight"], given["up"], given["down"])
                assert y.dtype == dtype
                assert_close(y, y_ref, 1e-12 if dtype == torch.float64 else TOLERANCE[dtype], str(dtype))
        assert all(torch.equal(tensors[n], copies[n]) for n in tensors) and torch.equal(expert, before)


def test_decoding_adds_up_an_expert_chosen_twice():
    tensors = inputs(3, 2, 4, 8, 16, torch.float64)
    expert = torch.tensor([[1, 1], [2, 1], [-1, 2]])
    with torch.no_grad():
        y = experts_loop(tensors["x"], expert, tensors["weight"], tensors["up"], tensors["down"])
    assert_close(y, experts_reference(tensors["x"], expert, *(tensors[n] for n in ("weight", "up", "down"))), 1e-12)


def test_decoding_reads_each_expert_hit_once_and_no_other():
    calls = {}
    for E in (32, 512):
        tensors = inputs(6, 2, E, 4, 8, torch.bfloat16)
        expert = torch.tensor([[0, 5], [5, 7], [7, 0], [0, 7], [5, -1], [0, 7]])
        with torch.no_grad(), Watch() as watch:
            experts_loop(tensors["x"], expert, tensors["weight"], tensors["up"], tensors["down"])
        products = watch.named("mm", "linear")
        assert len(products) == 2 * 3, "two products for each of the three experts hit"
        assert all(a.dim() < 3 for name, args, _ in watch.calls if name != "select" for a in args), (
            "all experts at once"
        )
        calls[E] = len(watch.calls)
    assert calls[32] == calls[512]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_relu(dtype):
    h = torch.randn((5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    h[0, :3] = 0.0
    a, b = h.clone().requires_grad_(), h.double().requires_grad_()
    (squared_relu(a).sum() * 3).backward()
    (torch.relu(b).square().sum() * 3).backward()
    assert_close(squared_relu(a), torch.relu(b).square(), TOLERANCE[dtype])
    assert_close(a.grad, b.grad, TOLERANCE[dtype])
    with torch.no_grad():
        before = h.clone()
        assert_close(squared_relu(h), squared_relu(a), 0)
        assert torch.equal(h, before), "the input is not the op's to change"


def test_grouped_gemm_is_two_launches():
    tensors = inputs(6, 2, 32, 8, 16, torch.bfloat16)
    with Watch() as watch:
        experts_grouped_mm(tensors["x"], routing("random", 6, 2, 32), *(tensors[n] for n in ("weight", "up", "down")))
    assert len(watch.named("_grouped_mm")) == 2
