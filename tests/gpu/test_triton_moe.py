"""The Triton experts and router on a GPU, at the published models' shapes, against float64; and in a CUDA graph."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
moe = pytest.importorskip("nemo_lite_kernels.triton.moe")

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Largest error relative to the largest value, and root mean square of the error relative to that of the values.
TOLERANCE = {torch.float32: (5e-5, 1e-5), torch.bfloat16: (2e-2, 8e-3)}
SHAPES = {  # E, k, L, F
    "super": (512, 22, 1024, 2688),
    "nano": (128, 6, 2688, 1856),
}


def check(got, want, dtype, what):
    got, want = got.detach().double(), want.double()
    assert got.isfinite().all(), what
    worst, rms = TOLERANCE[dtype]
    error = got - want
    assert float(error.abs().max()) <= worst * float(want.abs().max().clamp(min=1e-30)), f"{what}: worst"
    assert float(error.norm()) <= rms * float(want.norm().clamp(min=1e-30)), f"{what}: root mean square"


def inputs(name, T, dtype, dropped=0.0, skewed=False, weight_dtype=None):
    E, k, L, F = SHAPES[name]
    torch.manual_seed(T)
    logits = torch.randn(T, E, device=DEVICE)
    if skewed:  # some experts get most copies, many get none
        logits += torch.linspace(6, -6, E, device=DEVICE)
    expert = logits.topk(k, -1).indices
    expert[torch.rand(T, k, device=DEVICE) < dropped] = -1
    x = torch.randn(T, L, device=DEVICE, dtype=dtype)
    up = torch.randn(E, F, L, device=DEVICE, dtype=weight_dtype or dtype) * L**-0.5
    down = torch.randn(E, L, F, device=DEVICE, dtype=weight_dtype or dtype) * F**-0.5
    return x, expert, torch.rand(T, k, device=DEVICE) / k, up, down


def check_all(x, expert, weight, up, down):
    """Outputs and gradients against float64, one expert after the other so that no float64 copy of all is held."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, up, down)]
    y = moe.experts(leaves[0], expert, *leaves[1:])
    dy = torch.randn_like(y)
    dx, dweight, dup, ddown = torch.autograd.grad(y, leaves, dy)
    assert y.dtype == dx.dtype == x.dtype and dup.dtype == ddown.dtype == up.dtype and dweight.dtype == weight.dtype
    y64, dx64 = (torch.zeros(x.shape, dtype=torch.float64, device=DEVICE) for _ in range(2))
    dweight64 = torch.zeros(weight.shape, dtype=torch.float64, device=DEVICE)
    errors = {"dup": [0.0, 0.0, 0.0, 0.0], "ddown": [0.0, 0.0, 0.0, 0.0]}
    for e in range(up.shape[0]):
        token, slot = (expert == e).nonzero(as_tuple=True)
        # What is multiplied is in x's dtype, also where the weights are kept in another.
        u64, d64 = up[e].to(x.dtype).double(), down[e].to(x.dtype).double()
        xe, dye, we = x[token].double(), dy[token].double(), weight[token, slot, None].double()
        u = torch.relu(xe @ u64.T)
        h = u * u
        g = dye @ d64
        y64.index_add_(0, token, we * (h @ d64.T))
        dweight64[token, slot] = (g * h).sum(-1)
        du = 2 * we * u * g
        dx64.index_add_(0, token, du @ u64)
        for name, got, want in (("dup", dup[e], du.T @ xe), ("ddown", ddown[e], (we * dye).T @ h)):
            error, sums = got.double() - want, errors[name]
            if len(token) == 0:
                assert not got.any(), f"{name} of an expert that nobody chose"
                continue
            sums[0], sums[1] = max(sums[0], float(error.abs().max())), max(sums[1], float(want.abs().max()))
            sums[2], sums[3] = sums[2] + float(error.square().sum()), sums[3] + float(want.square().sum())
    check(y, y64, x.dtype, "y")
    check(dx, dx64, x.dtype, "gradient of x")
    check(dweight, dweight64, x.dtype, "gradient of the weights")
    worst, rms = TOLERANCE[x.dtype]
    for name, (error, value, errors2, values2) in errors.items():
        assert error <= worst * value and errors2**0.5 <= rms * values2**0.5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("T", [1, 37, 512])
def test_experts(name, T, dtype):
    check_all(*inputs(name, T, dtype, dropped=0.1 if T > 1 else 0.0))


@pytest.mark.parametrize("name", SHAPES)
def test_experts_of_a_training_step(name):
    """128 rows a block; very unequal experts, some of them empty."""
    check_all(*inputs(name, 4096, torch.bfloat16, skewed=True))


def test_master_weights_in_float32():
    check_all(*inputs("nano", 256, torch.bfloat16, weight_dtype=torch.float32))


@pytest.mark.parametrize("T", [1, 8, 64])
def test_experts_in_a_graph(T):
    """Captured once, replayed with another routing: shapes and launches do not depend on it."""
    x, expert, weight, up, down = inputs("super", T, torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiling and tuning
                moe.experts(x, expert, weight, up, down)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe.experts(x, expert, weight, up, down)
        for seed in range(3):
            torch.manual_seed(seed)
            x.normal_()
            # Once all copies on few experts, once some of them dropped.
            expert.copy_(torch.rand(T, up.shape[0] if seed else 22, device=DEVICE).topk(22, -1).indices)
            if seed == 2:
                expert[:, ::3] = -1
            graph.replay()
            assert torch.equal(y, moe.experts(x, expert, weight, up, down))


@pytest.mark.parametrize("copies", [1, 63, 64, 65, 2048])
def test_both_schedules_agree(copies, monkeypatch):
    torch.manual_seed(copies)
    expert = torch.randint(-1, 512, (copies, 1), device=DEVICE)
    for block_m in (16, 128):
        few = moe.schedule(expert, 512, block_m)
        with monkeypatch.context() as patch:
            patch.setattr(moe, "FEW_COPIES", 0)
            sorted_ = moe.schedule(expert, 512, block_m)
        used = few[0][:, 0] >= 0
        assert torch.equal(used, sorted_[0][:, 0] >= 0) and torch.equal(few[0][used], sorted_[0][used])
        assert all(torch.equal(a, b) for a, b in zip(few[1:], sorted_[1:]))


@pytest.mark.parametrize("T,E,k,groups,kept", [(1, 512, 22, 1, 1), (4096, 512, 22, 1, 1), (999, 128, 6, 1, 1),
                                               (77, 256, 8, 8, 4)])  # fmt: skip
def test_route(T, E, k, groups, kept):
    torch.manual_seed(E)
    logits = torch.randn(T, E, device=DEVICE, requires_grad=True)
    bias = 0.1 * torch.randn(E, device=DEVICE)
    expert, weight, scores = moe.route(logits, bias, k, 2.5, True, groups, kept)
    logits64 = logits.detach().double().requires_grad_()
    scores64 = logits64.sigmoid()
    biased = scores64.detach() + bias
    if groups > 1:
        grouped = biased.unflatten(-1, (groups, -1))
        best = grouped.topk(2).values.sum(-1).topk(kept).indices
        keep = torch.zeros(T, groups, dtype=torch.bool, device=DEVICE).scatter_(-1, best, True)
        biased = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(-2)
    # The float32 choice may differ where two scores are equal to float32.
    mine, best = biased.gather(-1, expert).sort().values, biased.topk(k).values.sort().values
    assert (mine - best).abs().max() < 1e-6
    assert all(len(set(row)) == k for row in expert[:50].tolist())
    chosen = scores64.gather(-1, expert)
    weight64 = 2.5 * chosen / chosen.sum(-1, keepdim=True)
    check(scores, scores64.detach(), torch.float32, "scores")
    check(weight, weight64.detach(), torch.float32, "weights")
    u, v = torch.randn_like(weight), torch.randn_like(scores)
    (got,) = torch.autograd.grad((weight * u).sum() + (scores * v).sum(), logits)
    (want,) = torch.autograd.grad((weight64 * u).sum() + (scores64 * v).sum(), logits64)
    check(got, want, torch.float32, "gradient of the logits")
