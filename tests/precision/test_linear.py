"""Quantised linears and experts against their three products written out; what they keep; where seeds come from."""

import itertools

import pytest
import torch
from nemo_lite_kernels import select
from nemo_lite_kernels.moe import experts_reference
from nemo_lite_kernels.quant import dequantize, hadamard, quantize_matrix
from tiny import assert_close, random_ids, tiny_config

from nemo_lite.config import PrecisionConfig
from nemo_lite.model.hybrid import HybridLM
from nemo_lite.parallel.layers import Layers
from nemo_lite.precision.linear import Emulated, Numerics, spec_of
from nemo_lite.precision.recipe import Gemms, formats

FORMATS = ["nvfp4", "mxfp8", "fp8", "fp8_block"]


def plan(gemms, kernels=None, name="linear", seed=0):
    return Emulated(name, gemms, Numerics(seed), select("cpu", kernels))


def everywhere(format, **options):
    return Gemms(format, format, format, **options)


def rounded(x, gemms, gemm, which, transpose=False, seed=0):
    """The operand in float64, with its tensor scale, [rows, contraction]."""
    spec = spec_of(gemms, gemm, which)
    if spec is None:
        return (x.T if transpose else x).double()
    if transpose and spec.block is None:
        return dequantize(quantize_matrix(x, spec, seed)).T.double()
    q = quantize_matrix(x, spec, seed, transpose=transpose)
    return dequantize(q).double()


def product(a, b):
    K = min(a.shape[1], b.shape[1])
    return a[:, :K] @ b[:, :K].T


def written_out(x, w, dy, gemms, seeds=(0, 0)):
    y = product(rounded(x, gemms, "fprop", "x"), rounded(w, gemms, "fprop", "w"))
    dx = product(rounded(dy, gemms, "dgrad", "dy", seed=seeds[0]), rounded(w, gemms, "dgrad", "w", True))
    dw = product(rounded(dy, gemms, "wgrad", "dy", True, seed=seeds[1]), rounded(x, gemms, "wgrad", "x", True))
    return y, dx[:, : x.shape[1]], dw


def run(f, *tensors, dy):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    y.backward(dy)
    return (y.detach(), *(leaf.grad for leaf in leaves))


@pytest.mark.parametrize("gemms", [
    *(everywhere(format, stochastic=False) for format in FORMATS),
    everywhere("nvfp4", stochastic=False, hadamard=False),
    everywhere("nvfp4", stochastic=False, square=False),
    Gemms("nvfp4", "bf16", "mxfp8"),
    Gemms("bf16", "fp8", "nvfp4", stochastic=False),
    Gemms("mxfp8", "nvfp4", "bf16", stochastic=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("T,K,N", [(32, 48, 64), (37, 50, 21), (1, 16, 16), (130, 130, 260)])
def test_three_products(gemms, T, K, N):
    x, w, dy = torch.randn(T, K), torch.randn(N, K), torch.randn(T, N)
    got = run(plan(gemms), x, w, dy=dy)
    for mine, want, name in zip(got, written_out(x, w, dy, gemms), ("y", "dx", "dw")):
        assert_close(mine, want, 1e-5 * want.abs().max().item(), name)
    other = run(plan(gemms, {"quant": "reference"}), x, w, dy=dy)
    for mine, want in zip(got, other):
        assert torch.equal(mine, want)  # the same codes, the same product


def test_gradients_are_rounded_stochastically_with_the_linears_seed():
    x, w, dy = torch.randn(48, 32), torch.randn(32, 32), torch.randn(48, 32)
    gemms = everywhere("nvfp4")
    a, again, other_name, other_seed = (
        run(p, x, w, dy=dy) for p in (plan(gemms), plan(gemms), plan(gemms, name="another"), plan(gemms, seed=1))
    )
    assert all(torch.equal(p, q) for p, q in zip(a, again))
    for b in (other_name, other_seed):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])
    numerics = Numerics()
    seeds = {numerics.seed_for("a"), numerics.seed_for("a"), numerics.seed_for("b")}
    for step, micro, rank in itertools.product(range(3), range(3), range(3)):
        numerics.step = step
        numerics.begin(micro, rank)
        seeds.add(numerics.seed_for("a"))
    assert len(seeds) == 3 + 26  # (0, 0, 0) is the first again
    # Unbiased: the mean over many calls is the product of the unrounded gradient with the rounded weight.
    p, total = plan(gemms), torch.zeros(48, 32, dtype=torch.float64)
    for _ in range(200):
        total += run(p, x, w, dy=dy)[1]
    want = dy.double() @ rounded(w, gemms, "dgrad", "w")
    assert (total / 200 - want).norm() < 0.03 * want.norm()
    assert (a[1] - want).norm() > 0.05 * want.norm()


def test_the_hadamard_transform_cancels():
    """Without rounding, both operands of wgrad turned give the product of the unturned."""
    x, dy = torch.randn(64, 20), torch.randn(64, 12)
    assert_close(hadamard(dy.T) @ hadamard(x.T).T, dy.T.double() @ x.double(), 1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16(format):
    """Weights are rounded to the computing dtype first; the weight's gradient is a float32 sum."""
    x, w, dy = torch.randn(40, 64).bfloat16(), torch.randn(32, 64), torch.randn(40, 32).bfloat16()
    gemms = everywhere(format, stochastic=False)
    y, dx, dw = run(plan(gemms), x, w, dy=dy)
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    for mine, want in zip((y, dx, dw), written_out(x, w.bfloat16(), dy, gemms)):
        assert_close(mine, want, 2e-2 * want.abs().max().item())


def test_plain_ones_and_the_tail_are_the_ops():
    x, w = torch.randn(5, 32), torch.randn(16, 32)
    p = plan(everywhere("nvfp4"))
    p.numerics.on = False
    assert torch.equal(p(x, w), p.ops.linear(x, w))
    assert p(x.view(1, 5, 32), w).shape == (1, 5, 16)
    layers = Layers(formats={"a": Gemms(), "b": everywhere("mxfp8")})
    assert (
        layers.matmul_for("a", 32, 16) is layers.ops.linear and layers.matmul_for("b", 32, 16) is layers.emulated["b"]
    )
    assert layers.experts_for("a") is layers.ops.experts


# ------------------------------------------------------------------------------------------------------------- experts


def routed(T, k, E, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=g)
    scores[:, 1] = -1  # an expert without tokens
    expert = scores.topk(k, -1).indices
    expert[0, 0] = -1  # a copy that is not computed
    return expert, torch.rand(T, k, generator=g) + 0.1


@pytest.mark.parametrize("gemms", [
    *(everywhere(format, stochastic=False) for format in FORMATS),
    everywhere("nvfp4", stochastic=False, hadamard=False, square=False),
    Gemms("nvfp4", "bf16", "mxfp8"), Gemms("bf16", "fp8", "nvfp4", stochastic=False),
], ids=str)  # fmt: skip
def test_experts_are_linears_of_their_own(gemms):
    """Every expert by itself, over its own tokens: largest magnitudes, blocks and padding are its own."""
    T, k, E, L, F = 37, 2, 5, 32, 48
    x, up, down, dy = torch.randn(T, L), torch.randn(E, F, L), torch.randn(E, L, F), torch.randn(T, L)
    expert, weight = routed(T, k, E)

    def apart(x, weight, up, down):
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = (expert == e).nonzero(as_tuple=True)
            if len(token):
                a = torch.relu(plan(gemms)(x[token], up[e])).square() * weight[token, slot, None]
                y = y.index_add(0, token, plan(gemms)(a, down[e]))
        return y

    got = run(lambda x, weight, up, down: plan(gemms).experts(x, expert, weight, up, down), x, weight, up, down, dy=dy)
    for mine, want, name in zip(got, run(apart, x, weight, up, down, dy=dy), ("y", "dx", "dweight", "dup", "ddown")):
        assert_close(mine, want, 1e-5 * want.abs().max().item(), name)
    plain = run(lambda x, weight, up, down: experts_reference(x, expert, weight, up, down), x, weight, up, down, dy=dy)
    for mine, want in zip(got, plain):
        assert (mine - want).norm() < 0.35 * want.norm()


def test_experts_in_bfloat16_and_without_a_token():
    expert, weight = routed(20, 2, 4)
    x, up, down = torch.randn(20, 32).bfloat16(), torch.randn(4, 16, 32), torch.randn(4, 32, 16)
    y, dx, dweight, dup, ddown = run(
        lambda x, weight, up, down: plan(everywhere("nvfp4")).experts(x, expert, weight, up, down),
        x, weight, up, down, dy=torch.randn(20, 32).bfloat16(),
    )  # fmt: skip
    assert y.dtype == dx.dtype == torch.bfloat16 and dup.dtype == ddown.dtype == dweight.dtype == torch.float32
    assert all(t.isfinite().all() for t in (y, dx, dweight, dup, ddown)) and not dup[1].any()
    none = torch.full_like(expert, -1)
    y, *grads = run(
        lambda x, weight, up, down: plan(everywhere("mxfp8")).experts(x, none, weight, up, down),
        x, weight, up, down, dy=torch.ones(20, 32).bfloat16(),
    )  # fmt: skip
    assert not y.any() and not any(g.any() for g in grads)


# ------------------------------------------------------------------------------------------------- what is kept, seeds


def kept_bytes(f):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        f()
    return sum(sizes)


@pytest.mark.parametrize("format,bits", [("nvfp4", 4.5), ("mxfp8", 8.25), ("fp8", 8), ("fp8_block", 8.25)])
def test_activations_are_kept_as_codes(format, bits):
    x, w = torch.randn(512, 256).bfloat16().requires_grad_(), torch.randn(128, 256, requires_grad=True)
    kept = kept_bytes(lambda: plan(everywhere(format))(x, w))
    assert kept <= bits * (x.numel() + w.numel()) / 8 + 64
    plain = kept_bytes(lambda: select("cpu").linear(x, w))
    assert kept < 0.6 * plain
    assert kept_bytes(lambda: plan(everywhere(format))(x.detach(), w.detach())) == 0
    seen, p = [], plan(everywhere(format))
    p.numerics.watch = lambda name, operand, *rest: seen.append(operand)
    with torch.no_grad():
        p(x, w)
    assert not any("wgrad" in operand for operand in seen)  # nothing is made for a backward that does not come


def loss_and_gradients(model, ids):
    model.zero_grad()
    model.numerics.begin(0, 0)
    out = model(ids, labels=ids)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("preset", ["nvfp4", "nemotron3_super_nvfp4", "mxfp8", "fp8"])
def test_a_model_with_and_without_recomputation(preset):
    config = tiny_config("MEM*E-", mtp="*E", moe_latent_size=16)
    layers = Layers(formats=formats(config, PrecisionConfig(preset=preset)), numerics=Numerics(3))
    model, ids = HybridLM(config, layers=layers).train(), random_ids(config, 2, 40)
    kept = loss_and_gradients(model, ids)
    model.recompute = "M*E-"
    for a, b in zip(kept, loss_and_gradients(model, ids)):
        assert torch.equal(a, b)
    model.recompute = ""
    plain = loss_and_gradients(HybridLM(config).train(), ids)
    assert abs(kept[0] - plain[0]) < 0.05 and all(g.isfinite().all() for g in kept)
