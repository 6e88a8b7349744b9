"""The Triton norms and squared ReLU on a GPU, at the published models' shapes, against float64."""

import pytest
import torch
from nemo_lite_kernels.norm import gated_norm, rms_norm

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
norm = pytest.importorskip("nemo_lite_kernels.triton.norm")

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EPS = 1e-5


def run(function, dy, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def compare(mine, reference, dtype, *tensors):
    dy = torch.randn(tensors[0].shape, device="cuda", dtype=dtype)
    got = run(mine, dy, *tensors)
    want = run(reference, dy.double(), *(t.double() for t in tensors))
    for name, a, b in zip(("y", "first", "second", "third"), got, want):
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
        assert error <= TOLERANCE[dtype], f"{name}: off by {error:.2g}"


def weight_of(width, dtype):
    return torch.rand(width, device="cuda", dtype=torch.promote_types(dtype, torch.float32)) + 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", [(1, 4096), (8192, 4096), (4097, 2688), (33, 16384), (5, 7)])
def test_rms_norm(rows, width, dtype):
    torch.manual_seed(rows)
    x = torch.randn(rows, width, device="cuda", dtype=dtype)
    compare(lambda x, w: norm.rms_norm(x, w, EPS), lambda x, w: rms_norm(x, w, EPS), dtype, x, weight_of(width, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", [(1, 8192), (4096, 8192), (1023, 4096)])
def test_gated_norm(rows, width, dtype):
    torch.manual_seed(rows)
    x = torch.randn(rows, width, device="cuda", dtype=dtype)
    wide = torch.randn(rows, 2 * width + 64, device="cuda", dtype=dtype)  # the gate is a slice of a projection
    compare(
        lambda x, z, w: norm.gated_norm(x, z[:, :width], w, EPS, 8),
        lambda x, z, w: gated_norm(x, z[:, :width], w, EPS, 8),
        dtype, x, wide, weight_of(width, dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_relu(dtype):
    torch.manual_seed(0)
    h = torch.randn(1000, 5376, device="cuda", dtype=dtype)
    compare(norm.squared_relu, lambda h: torch.relu(h).square(), dtype, h)


def test_the_same_bits_every_time():
    x, z = (torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight, dy = weight_of(8192, torch.bfloat16), torch.randn_like(x)
    one, two = (run(lambda *t: norm.gated_norm(*t, EPS, 8), dy, x, z, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
