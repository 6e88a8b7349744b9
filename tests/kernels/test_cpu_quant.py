"""Number formats in C++ against the reference, bit for bit, at every instruction-set level that this machine has."""

import math

import pytest
import torch
from kernels.interpreter import poison
from kernels.levels import compiled_for
from kernels.test_quant import BLOCKS, adversarial, check_backend
from nemo_lite_kernels import cpu
from nemo_lite_kernels.cpu import quant
from nemo_lite_kernels.quant import Spec

SHAPES = [(1, 16), (3, 70), (37, 48), (66, 144), (0, 32)]


@pytest.fixture(scope="module", params=list(cpu.LEVELS), autouse=True)
def level(request):
    with compiled_for(request.param):
        yield request.param


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("format,block", BLOCKS)
def test_equals_the_reference(format, block, stochastic, monkeypatch):
    poison(monkeypatch)
    for i, (R, K) in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(R, K, generator=torch.Generator().manual_seed(i)).to(dtype)
            for turned in (False, True):
                for rotate in (False, True) if format == "nvfp4" else (False,):
                    spec = Spec(format, block, stochastic, rotate)
                    check_backend(quant, x, spec, transpose=turned)
                    if R > 3:
                        offsets = torch.tensor([0, 0, R // 3, R - 2, R])
                        check_backend(quant, x, spec, -5, offsets=offsets, transpose=turned)
                        check_backend(quant, x, spec, amax=torch.tensor([2.5] * 4), offsets=offsets)


@pytest.mark.parametrize("format,block", BLOCKS)
def test_adversarial_tensors_and_views(format, block):
    for _, x in adversarial():
        check_backend(quant, x, Spec(format, block))
        check_backend(quant, x, Spec(format, block, True), transpose=True)
    for bad in (math.inf, math.nan):
        x = torch.randn(40, 64)
        x[33, 7] = bad
        check_backend(quant, x, Spec(format, block))
        check_backend(quant, x, Spec(format, block), transpose=True, offsets=torch.tensor([0, 16, 40]))
    apart = torch.randn(8, 200)[:, 3:131]  # rows that do not follow each other
    check_backend(quant, apart, Spec(format, block))
    check_backend(quant, apart, Spec(format, block), transpose=True)


@pytest.mark.parametrize("format,block", [("nvfp4", (1, 16)), ("mxfp8", (1, 32)), ("fp8", None)])
def test_threads_change_nothing(format, block):
    x = torch.randn(300, 64)
    spec = Spec(format, block, stochastic=True)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            check_backend(quant, x, spec)
            check_backend(quant, x, spec, transpose=True, offsets=torch.tensor([0, 7, 7, 300]))
    finally:
        torch.set_num_threads(before)
