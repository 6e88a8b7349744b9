"""RMSNorm and the gated group RMSNorm: torch's backends against the equation."""

import pytest
import torch
import torch.nn.functional as F
from nemo_lite_kernels import OPS, load
from nemo_lite_kernels.norm import gated_norm, rms_norm
from tiny import TOLERANCE, assert_close

BACKENDS = [
    (n, {function: load(path) for function, path in b.functions.items()})
    for n, b in OPS["norm"].items()
    if b.missing is None
]
EPS = 1e-5


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    x, z = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5
    return x, z, weight.to(torch.promote_types(dtype, torch.float32))


def run(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * weighting.to(y.dtype)).sum().backward()
    return y, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (1, 8), (7, 12), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(backend, shape, dtype):
    x, _, weight = inputs(shape, dtype)
    y, grads = run(lambda x, w: backend[1]["rms_norm"](x, w, EPS), x, weight)
    y_ref, grads_ref = run(lambda x, w: rms_norm(x, w, EPS), x.double(), weight.double())
    assert y.dtype == dtype and [g.dtype for g in grads] == [dtype, weight.dtype]
    for got, want in zip((y, *grads), (y_ref, *grads_ref)):
        assert_close(got, want, TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(backend[1]["rms_norm"](x, weight, EPS), y, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("shape,groups", [((1, 4), 1), ((5, 12), 4), ((3, 12), 12), ((0, 8), 2), ((2, 3, 24), 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gated_norm(backend, shape, groups, dtype):
    x, z, weight = inputs(shape, dtype)
    wide = torch.stack([z, z], dim=-2).flatten(-2)  # the gate comes as a slice of a projection
    y, grads = run(lambda x, z, w: backend[1]["gated_norm"](x, z[..., : shape[-1]], w, EPS, groups), x, wide, weight)
    grads[1] = grads[1][..., : shape[-1]]
    y_ref, grads_ref = run(lambda x, z, w: gated_norm(x, z, w, EPS, groups), x.double(), z.double(), weight.double())
    assert y.dtype == dtype
    for got, want in zip((y, *grads), (y_ref, *grads_ref)):
        assert_close(got, want, TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(backend[1]["gated_norm"](x, z, weight, EPS, groups), y, TOLERANCE[dtype])


def test_the_references_are_the_equations():
    x, z, weight = inputs((5, 12), torch.float64)
    assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (12,), weight, EPS), 1e-12)
    gated = x * z * torch.sigmoid(z)
    parts = [F.rms_norm(part, (4,), w, EPS) for part, w in zip(gated.split(4, -1), weight.split(4))]
    assert_close(gated_norm(x, z, weight, EPS, 3), torch.cat(parts, -1), 1e-12)
