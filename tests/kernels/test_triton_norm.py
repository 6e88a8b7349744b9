"""The Triton norms and squared ReLU against the equations. Interpreted on a CPU, where bfloat16 would be wrong."""

import pytest
import torch
from kernels.interpreter import DEVICE, kernels, poison
from nemo_lite_kernels.norm import gated_norm, rms_norm
from tiny import assert_close

norm = kernels("norm")
EPS = 1e-5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    x, z = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5
    return x, z, weight.to(DEVICE, dtype)


def run(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * weighting.to(y)).sum().backward()
    return y, *(leaf.grad for leaf in leaves)


def compare(mine, reference, *tensors):
    dtype = tensors[0].dtype
    for got, want in zip(run(mine, *tensors), run(reference, *(t.double() for t in tensors))):
        assert got.dtype == dtype
        assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (1, 8), (7, 12), (2, 3, 24), (40, 100), (3, 2100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rms_norm(shape, dtype, monkeypatch):
    x, _, weight = inputs(shape, dtype)
    poison(monkeypatch)
    compare(lambda x, w: norm.rms_norm(x, w, EPS), lambda x, w: rms_norm(x, w, EPS), x, weight)


@pytest.mark.parametrize("shape,groups", [((1, 4), 1), ((5, 12), 4), ((3, 12), 12), ((0, 8), 2), ((2, 3, 24), 2),
                                          ((37, 90), 3)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gated_norm(shape, groups, dtype, monkeypatch):
    x, z, weight = inputs(shape, dtype)
    wide = torch.cat([z, z], dim=-1)  # the gate comes as a slice of a projection
    poison(monkeypatch)
    compare(
        lambda x, z, w: norm.gated_norm(x, z[..., : shape[-1]], w, EPS, groups),
        lambda x, z, w: gated_norm(x, z[..., : shape[-1]], w, EPS, groups),
        x, wide, weight,
    )  # fmt: skip


def test_extreme_gates():
    x, z, weight = inputs((4, 8), torch.float32)
    z = z * torch.tensor([1.0, 300.0, -300.0, 0.0], device=DEVICE)[:, None]
    compare(lambda *t: norm.gated_norm(*t, EPS, 2), lambda *t: gated_norm(*t, EPS, 2), x, z, weight)


def test_programs_that_go_through_many_rows(monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    x, z, weight = inputs((90, 20), torch.float32)
    compare(lambda x, w: norm.rms_norm(x, w, EPS), lambda x, w: rms_norm(x, w, EPS), x, weight)
    compare(lambda *t: norm.gated_norm(*t, EPS, 2), lambda *t: gated_norm(*t, EPS, 2), x, z, weight)


def test_views_as_inputs():
    x, z, weight = inputs((6, 5, 8), torch.float32)

    def views(function):
        return lambda x, z, w: function(x.transpose(0, 1), torch.stack([z, z], -1)[..., 0].transpose(0, 1), w, EPS, 2)

    compare(views(norm.gated_norm), views(gated_norm), x, z, weight)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 700), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_squared_relu(shape, dtype, monkeypatch):
    h, _, _ = inputs(shape, dtype) if len(shape) > 1 else (torch.linspace(-1, 1, shape[0], dtype=dtype).to(DEVICE),) * 3
    poison(monkeypatch)
    compare(norm.squared_relu, lambda h: torch.relu(h).square(), h)
    compare(
        lambda h: norm.squared_relu(h.mT if h.dim() > 1 else h),
        lambda h: torch.relu(h.mT if h.dim() > 1 else h) ** 2,
        h,
    )
