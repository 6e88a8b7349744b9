"""Number formats on a CUDA device: Triton's codes are the reference's, and the emulation meets Transformer Engine where
both can be."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
from nemo_lite_kernels import libraries, select
from nemo_lite_kernels.quant import Spec, quantize_matrix

from nemo_lite.precision import te
from nemo_lite.precision.linear import Emulated, Numerics
from nemo_lite.precision.recipe import Gemms

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "fp8", "fp8_block"])
def test_triton_equals_the_reference_on_the_cpu(format, dtype):
    from nemo_lite_kernels.triton import quant

    x = torch.randn(200, 300).to(dtype)
    for stochastic in (False, True):
        for turned in (False, True):
            spec = Spec.of(format, None, "stochastic" if stochastic else "nearest")
            want, got = (
                f(t, spec, 5, None, None, turned) for f, t in ((quantize_matrix, x), (quant.quantize_matrix, x.cuda()))
            )
            assert torch.equal(want.codes.view(torch.uint8), got.codes.cpu().view(torch.uint8))
            if want.scales is not None:
                assert torch.equal(want.scales.view(torch.uint8), got.scales.cpu().view(torch.uint8))


@pytest.mark.parametrize("format", ["fp8", "mxfp8", "nvfp4"])
def test_the_emulation_meets_transformer_engine(format):
    """Forward equal up to bfloat16; gradients, stochastic in NVFP4, to its noise."""
    if (why := libraries.reason("transformer_engine")) is not None:
        pytest.skip(f"transformer_engine {why}")
    gemms = Gemms(format, format, format)
    if (why := te.refusal(gemms, 256, 512)) is not None:
        pytest.skip(why)
    ops, x = select("cuda"), torch.randn(512, 256, device="cuda").bfloat16()
    weight, dy = torch.randn(512, 256, device="cuda") * 0.05, torch.randn(512, 512, device="cuda").bfloat16()
    found = []
    emulated = Emulated("a", gemms, Numerics(), ops)
    for make in (emulated, te.Native(emulated)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = make(*leaves)
        y.backward(dy)
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for mine, theirs, tolerance in zip(*found, (1e-2, 0.2, 0.2)):
        assert (mine.float() - theirs.float()).norm() < tolerance * theirs.float().norm()
