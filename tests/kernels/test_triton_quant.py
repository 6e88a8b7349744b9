"""Number formats in Triton against the reference, bit for bit. Interpreted on a CPU, where float32 alone is right."""

import math

import pytest
import torch
from kernels.interpreter import DEVICE, kernels, poison
from kernels.test_quant import BLOCKS, adversarial, same
from nemo_lite_kernels import quant
from nemo_lite_kernels.quant import Spec

triton_quant = kernels("quant")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities in the interpreter


def check(x, spec, seed=7, amax=None, offsets=None, transpose=False):
    want = quant.quantize_matrix(x, spec, seed, amax, offsets, transpose)
    got = triton_quant.quantize_matrix(x, spec, seed, amax, offsets, transpose)
    assert same(got.codes, want.codes) and same(got.scales, want.scales)
    assert same(got.tensor_scale, want.tensor_scale) and same(got.amax, want.amax)
    assert got.shape == want.shape and same(got.segments, want.segments) and got.across == want.across
    v, scale = quant.operand(x, spec, seed, amax, offsets, transpose)
    w, found = triton_quant.operand(x, spec, seed, amax, offsets, transpose)
    assert same(w, v) and same(found, scale)
    assert same(triton_quant.values(want, torch.float32), v)


@pytest.mark.parametrize("format,block", BLOCKS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_equals_the_reference_bit_for_bit(format, block, stochastic, monkeypatch):
    poison(monkeypatch)
    for i, (R, K) in enumerate([(0, 32), (37, 144)]):
        x = torch.randn(R, K, generator=torch.Generator().manual_seed(i)).to(DEVICE)
        for rotate in (False, True) if format == "nvfp4" else (False,):
            spec = Spec(format, block, stochastic, rotate)
            check(x, spec)
            check(x, spec, transpose=True)
        if R == 37:
            offsets = torch.tensor([0, 0, 16, 37])
            check(x, spec, -5, offsets=offsets)
            check(x, spec, 1 << 40, offsets=offsets, transpose=True)
            check(x, spec, amax=torch.tensor([2.5, 2.5, 1.0], device=DEVICE), offsets=offsets)


@pytest.mark.parametrize("format,block", BLOCKS)
def test_adversarial_tensors(format, block):
    for name, x in adversarial():
        if name not in ("normal", "large", "denormal", "zero blocks", "largest"):
            continue
        check(x.to(DEVICE), Spec(format, block))
    for bad in (math.inf, math.nan):
        x = torch.randn(40, 64)
        x[33, 7] = bad
        check(x.to(DEVICE), Spec(format, block))
