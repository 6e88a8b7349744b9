"""The cross-entropy of rows of logits in C++ against torch's, at every level of this machine."""

import pytest
import torch
import torch.nn.functional as F
from kernels.levels import compiled_for
from nemo_lite_kernels import cpu
from nemo_lite_kernels.cpu.dense import linear, weight_gradient
from nemo_lite_kernels.cpu.loss import nll_and_gradient
from nemo_lite_kernels.loss import nll_and_gradient as reference
from tiny import TOLERANCE, assert_close

from nemo_lite.train.loss import cross_entropy_chunked


@pytest.fixture(params=cpu.LEVELS)
def level(request):
    with compiled_for(request.param):
        yield request.param


def plain(logits, labels, weights):
    logits = logits.double().requires_grad_()
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll.detach(), torch.autograd.grad((nll * weights.double()).sum(), logits)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,V", [(0, 5), (1, 1), (5, 3), (7, 29), (3, 100), (33, 257), (2, 4099)])
def test_equals_torch(level, T, V, dtype):
    generator = torch.Generator().manual_seed(V)
    logits = (torch.randn(T, V, generator=generator) * 4).to(dtype)
    labels, weights = torch.randint(0, V, (T,), generator=generator), torch.rand(T, generator=generator)
    nll_ref, grad_ref = plain(logits, labels, weights)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for function in (nll_and_gradient, reference):
            nll, grad = function(logits.clone(), labels, weights, True)
            assert nll.dtype == torch.float32 and grad.dtype == dtype
            assert_close(nll, nll_ref, 2e-6)
            assert_close(grad, grad_ref, 2e-6 if dtype == torch.float32 else 5e-3)
    torch.set_num_threads(1)
    before = logits.clone()
    nll, grad = nll_and_gradient(logits, labels, weights, False)
    assert grad is None and torch.equal(logits, before)
    assert_close(nll, nll_ref, 2e-6)


def test_views(level):
    logits, labels, weights = torch.randn(6, 40), torch.randint(0, 40, (6,)), torch.rand(6)
    double = [torch.stack([t, t], dim=-1)[..., 0] for t in (logits, labels, weights)]
    nll, grad = nll_and_gradient(*double, True)
    nll_ref, grad_ref = nll_and_gradient(logits.clone(), labels, weights, True)
    assert torch.equal(nll, nll_ref) and torch.equal(grad, grad_ref)


def test_extreme_logits(level):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, -1e30, -1e30], [-torch.inf, 3.0, 2.0]])
    nll, grad = nll_and_gradient(logits.clone(), torch.tensor([1, 0, 1]), torch.ones(3), True)
    nll_ref, grad_ref = plain(logits, torch.tensor([1, 0, 1]), torch.ones(3))
    assert_close(nll, nll_ref, 1e-6)
    assert_close(grad, grad_ref, 1e-6)
    for bad in (torch.nan, torch.inf):
        nll, _ = nll_and_gradient(torch.tensor([[0.0, bad] + [1.0] * 20]), torch.tensor([0]), torch.ones(1), True)
        assert not bool(nll.isfinite().any())


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 over float32"])
def test_chunked_cross_entropy(level, dtypes):
    dtype, *rest = (getattr(torch, name) for name in dtypes.split(" over "))
    generator = torch.Generator().manual_seed(0)
    h, labels = torch.randn(90, 24, generator=generator).to(dtype), torch.randint(0, 70, (90,), generator=generator)
    weight, weights = (
        torch.randn(70, 24, generator=generator).to(*(rest or [dtype])),
        torch.rand(90, generator=generator),
    )
    labels[::7] = -100
    h, weight = h.requires_grad_(), weight.requires_grad_()
    double = [t.detach().double().requires_grad_() for t in (h, weight)]
    nll_ref = F.cross_entropy(double[0] @ double[1].T, labels, ignore_index=-100, reduction="none")
    (3 * (nll_ref * weights.double()).sum()).backward()
    for chunk in (16, 128):
        h.grad = weight.grad = None
        loss, nll = cross_entropy_chunked(h, weight, labels, weights, chunk, nll_and_gradient, weight_gradient)
        (3 * loss).backward()
        assert_close(nll, nll_ref, TOLERANCE[dtype])
        for got, want in zip((h, weight), double):
            assert got.grad.dtype == got.dtype
            assert_close(got.grad, want.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_linear(level, weight_dtype, frozen):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(70, 24, generator=generator).bfloat16(), torch.randn(70, 40, generator=generator).bfloat16()
    weight = torch.randn(40, 24, generator=generator).to(weight_dtype)
    x, weight = x.requires_grad_(frozen != "x"), weight.requires_grad_(frozen != "weight")
    double = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, want = linear(x, weight), double[0] @ double[1].T
    y.backward(dy)
    want.backward(dy.double())
    assert_close(y, want, 2e-2)
    for got, ref, name in zip((x, weight), double, ("x", "weight")):
        assert (got.grad is None) == (frozen == name)
        if got.grad is not None:
            assert got.grad.dtype == got.dtype
            assert_close(got.grad, ref.grad, 2e-2)
