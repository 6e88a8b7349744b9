"""The experts, the router and the weight gradient in C++ against their references, at every level of this machine."""

import pytest
import torch
from kernels.levels import compiled_for
from nemo_lite_kernels import cpu
from nemo_lite_kernels.cpu.dense import available, weight_gradient
from nemo_lite_kernels.cpu.moe import experts, route, use_amx
from nemo_lite_kernels.moe import experts_reference
from nemo_lite_kernels.route import route as route_reference
from tiny import TOLERANCE, assert_close, distance

NAMES = ("x", "weight", "up", "down")
DTYPES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 over float32": (torch.bfloat16, torch.float32),
}
SIZES = [  # tokens, experts of a token, experts, L, F
    (0, 2, 4, 8, 16), (1, 1, 1, 8, 16), (1, 3, 8, 3, 5), (23, 3, 8, 8, 16), (7, 2, 4, 33, 17),
    (65, 2, 5, 128, 96), (300, 2, 3, 40, 56), (600, 1, 2, 16, 80),
]  # fmt: skip


@pytest.fixture(params=["amx", *cpu.LEVELS])
def level(request):
    name = "avx512_bf16" if request.param == "amx" else request.param
    with compiled_for(name):
        use_amx(request.param == "amx")
        if request.param != "amx" or available():
            yield request.param
        else:
            pytest.skip("no AMX")
        use_amx(True)


@pytest.fixture
def threads(level):
    """Two at the levels that differ most, one at the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if level in ("amx", "portable") else 1)
    yield
    torch.set_num_threads(before)


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


def sized(T, k, E, L, F, dtype, weight_dtype=None):
    """Inputs, with weights whose products are about as large as their inputs."""
    generator = torch.Generator().manual_seed(T + E)
    shapes = {"x": (T, L), "weight": (T, k), "up": (E, F, L), "down": (E, L, F)}
    factors = {"x": 0.5, "weight": 0.5, "up": L**-0.5, "down": F**-0.5}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) * factors[n] for n, s in shapes.items()}
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to({"x": dtype, "weight": wide}.get(n, weight_dtype or dtype)) for n, t in tensors.items()}


def run(function, tensors, expert):
    leaves = {n: t.clone(memory_format=torch.preserve_format).requires_grad_() for n, t in tensors.items()}
    y = function(leaves["x"], expert, leaves["weight"], leaves["up"], leaves["down"])
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # The second term is zero; it gives every input a gradient where no expert was hit.
    ((y * weighting.to(y.dtype)).sum() + sum(0 * t.double().sum() for t in leaves.values())).backward()
    return y.detach(), {n: t.grad for n, t in leaves.items()}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", ["random", "one", "holes", "dropped"])
def test_experts_equal_the_reference(level, threads, kind, dtypes):
    dtype, weight_dtype = DTYPES[dtypes]
    for sizes in SIZES:
        tensors, expert = sized(*sizes, dtype, weight_dtype), routing(kind, *sizes[:3])
        y, grads = run(experts, tensors, expert)
        y_ref, grads_ref = run(experts_reference, {n: t.double() for n, t in tensors.items()}, expert)
        assert y.dtype == dtype
        assert_close(y, y_ref, TOLERANCE[dtype], f"y {sizes}")
        for name in NAMES:
            assert grads[name].dtype == tensors[name].dtype
            assert_close(grads[name], grads_ref[name], TOLERANCE[dtype], f"gradient of {name} {sizes}")
        with torch.no_grad():
            y = experts(tensors["x"], expert, tensors["weight"], tensors["up"], tensors["down"])
        assert y.dtype == dtype
        assert_close(y, y_ref, TOLERANCE[dtype], f"y without gradients {sizes}")


@pytest.mark.parametrize("dtypes", DTYPES)
def test_experts_of_views(level, dtypes):
    tensors, expert = sized(40, 2, 4, 24, 16, *DTYPES[dtypes]), routing("random", 40, 2, 4)
    views = {n: torch.stack([t, t], dim=-1)[..., 0] for n, t in tensors.items()}
    wide = torch.stack([expert, expert], dim=-1)[..., 0]
    y, grads = run(experts, views, wide)
    y_ref, grads_ref = run(experts, tensors, expert)
    assert torch.equal(y, y_ref) and all(torch.equal(grads[n], grads_ref[n]) for n in NAMES)
    with torch.no_grad():
        few = {n: t if n in ("up", "down") else t[:3] for n, t in views.items()}
        y = experts(few["x"], wide[:3], few["weight"], few["up"], few["down"])
    assert_close(y, y_ref[:3], 2e-2)


def test_experts_leave_their_inputs_and_do_not_depend_on_threads():
    tensors, expert = sized(300, 2, 8, 40, 56, torch.bfloat16, torch.float32), routing("random", 300, 2, 8)
    before = {n: t.clone() for n, t in tensors.items()}
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(experts, tensors, expert))
    torch.set_num_threads(1)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in NAMES)
    assert all(torch.equal(tensors[n], before[n]) for n in tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(level, bad):
    tensors, expert = sized(40, 2, 4, 8, 16, torch.bfloat16, None), routing("random", 40, 2, 4)
    tensors["x"][7, 3] = bad
    for training in (True, False):
        with torch.set_grad_enabled(training):
            x = tensors["x"].clone().requires_grad_(training)
            y = experts(x, expert, tensors["weight"], tensors["up"], tensors["down"])
        assert not bool(y[7].isfinite().all()) and bool(torch.cat([y[:7], y[8:]]).isfinite().all())


def test_float64_and_mixed_dtypes_go_to_the_loop():
    tensors, expert = sized(9, 2, 4, 8, 16, torch.float64), routing("random", 9, 2, 4)
    y, _ = run(experts, tensors, expert)
    assert_close(y, run(experts_reference, tensors, expert)[0], 1e-12)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(
    "L,E,k,n_group,topk_group", [(1, 8, 3, 1, 1), (70, 37, 5, 1, 1), (9, 24, 3, 4, 2), (5, 96, 8, 8, 4)]
)
def test_route_equals_the_reference(level, threads, L, E, k, n_group, topk_group, rows, counted):
    generator = torch.Generator().manual_seed(L)
    logits = torch.randn(3 * L, E, generator=generator, dtype=torch.float64)
    bias = torch.randn(E, generator=generator, dtype=torch.float64) * 0.1
    weighting = torch.randn(3 * L, k, generator=generator, dtype=torch.float64)
    count = torch.rand(3, L, generator=generator) < 0.7 if counted else None
    for normalise in (False, True):
        found = []
        for function, dtype in ((route, torch.float32), (route_reference, torch.float64)):
            x = logits.to(dtype).requires_grad_()
            expert, weight, counts, aux = function(
                x, bias.to(dtype), k, 2.5, normalise, n_group, topk_group, rows, count
            )
            assert (counts is None) == (aux is None) == (rows == 0) and expert.dtype == torch.int64
            expert, order = expert.sort(-1)
            weight = weight.gather(-1, order)
            loss = (weight * weighting.to(dtype)).sum() + (0 if aux is None else 3 * aux)
            found.append((expert, weight, counts, aux, torch.autograd.grad(loss, x)[0]))
        (expert, weight, counts, aux, grad), (expert_ref, weight_ref, counts_ref, aux_ref, grad_ref) = found
        assert torch.equal(expert, expert_ref) and weight.dtype == torch.float32
        assert_close(weight, weight_ref, 1e-6)
        assert_close(grad, grad_ref, 2e-6)
        if rows:
            assert torch.equal(counts, counts_ref) and counts.dtype == torch.int64
            assert_close(aux, aux_ref, 1e-6)


def test_route_of_ties_and_of_what_is_not_a_number(level):
    """Experts are distinct and valid whatever the scores."""
    for logits in (torch.zeros(4, 16), torch.full((4, 16), float("nan")), torch.full((4, 16), -1e9)):
        expert, _, counts, _ = route(logits, torch.zeros(16), 5, 1.0, True, 4, 2, 2)
        assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 16 for row in expert.tolist())
        assert int(counts.sum()) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M,N,K", [(3, 5, 7), (64, 5, 7), (65, 64, 64), (257, 33, 130), (1024, 80, 48)])
def test_weight_gradient(level, threads, M, N, K, dtype):
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=generator).bfloat16()
    dy = torch.stack([torch.randn(M, N, generator=generator).bfloat16()] * 2, dim=-1)[..., 0]
    want = dy.double().T @ x.double()
    tolerance = 1e-6 if dtype == torch.float32 and M >= 64 and level == "amx" else 5e-3
    dw = weight_gradient(dy, x, dtype)
    assert dw.dtype == dtype
    assert_close(dw, want, tolerance)
    twice = weight_gradient(dy, x, dtype, dw)
    assert twice is dw and distance(dw, 2 * want) <= 2 * tolerance
