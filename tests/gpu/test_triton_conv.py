"""Triton's causal convolution on a CUDA device at the models' sizes against float64, in bfloat16 and float32."""

import pytest
import torch
from nemo_lite_kernels.conv import causal_conv as reference
from nemo_lite_kernels.triton import reason
from tiny import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason() is not None, reason=str(reason()))]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def run(function, tensors, reset, dtype):
    leaves = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    y = function(leaves["x"][..., 8:-8], leaves["weight"], leaves["bias"], reset, leaves["window"])
    weighting = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda").bfloat16()
    (y * weighting.to(dtype)).sum(dtype=torch.float64).backward()
    return {"y": y} | {f"gradient of {n}": t.grad for n, t in leaves.items() if t is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [False, True], ids=["start", "carried"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("L,C", [(1000, 10240), (515, 6144), (3, 100)])
def test_convolution(L, C, packed, window, dtype):
    from nemo_lite_kernels.triton.conv import causal_conv

    generator = torch.Generator("cuda").manual_seed(L)
    shapes = {"x": (2, L, C + 16), "weight": (C, 4), "bias": (C,), "window": (2, 3, C)}
    tensors = {n: torch.randn(s, generator=generator, device="cuda").to(dtype) for n, s in shapes.items()}
    if not window:
        tensors["window"] = None
    reset = None
    if packed:
        reset = torch.zeros(2, L, dtype=torch.bool, device="cuda")
        reset[0, [L // 3, L // 2, L - 1]] = True
    exact = run(reference, tensors, reset, torch.float64)
    for name, t in run(causal_conv, tensors, reset, dtype).items():
        assert_close(t, exact[name], TOLERANCE[dtype], name)
