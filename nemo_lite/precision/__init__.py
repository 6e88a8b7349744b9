"""Number formats and what linears multiply with.

from nemo_lite.precision import quantize, dequantize, fake_quantize

q = quantize(weight, "nvfp4", block=(16, 16))        # codes, block scales, tensor scale
weight_again = dequantize(q)
x_rounded = fake_quantize(x, "nvfp4", rounding="stochastic", seed=1)
"""

__all__ = ["dequantize", "fake_quantize", "quantize"]


def __getattr__(name: str):
    # A recipe is checked without torch.
    if name in __all__:
        from nemo_lite_kernels import quant

        return getattr(quant, name)
    raise AttributeError(f"module 'nemo_lite.precision' has no attribute {name!r}")
