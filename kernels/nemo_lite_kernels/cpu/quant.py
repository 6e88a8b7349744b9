"""Number formats on a CPU: quant.cpp; the definitions, which this equals bit for bit, are in nemo_lite_kernels.quant.

What it is not written for (float16, blocks of several rows along the tokens, a transposed matrix with one scale) goes
to the reference.
"""

import torch
from torch import Tensor

from nemo_lite_kernels import quant as reference
from nemo_lite_kernels.cpu import Kernel
from nemo_lite_kernels.quant import E2M1, E5M2, FORMATS, SCHEMES, Quantized, Spec

_QUANTIZE = Kernel("quantize", "p" * 8 + "i" * 13)
_VALUES = Kernel("quantized_values", "ppp" + "i" * 5)


def _run(x: Tensor, spec: Spec, seed, amax, offsets, transpose, codes: bool, dtype: torch.dtype | None):
    """Codes, scales, values, tensor scale, largest magnitudes, and where segments begin; None for what is not asked."""
    format = FORMATS[spec.format]
    x = x if x.stride(-1) == 1 else x.contiguous()
    bounds, starts = reference.places(x, spec, offsets, transpose)
    n, width = len(bounds) - 1, spec.width
    R, P = (x.shape[1], int(starts[-1])) if transpose else (x.shape[0], -(-x.shape[1] // width) * width)
    four = format.element is E2M1
    code = torch.empty(R, P // 2 if four else P, dtype=torch.uint8) if codes else None
    scales = torch.empty(R, P // width, dtype=format.scales) if codes and format.scales is not None else None
    v = None if dtype is None else torch.empty(*((P, R) if transpose else (R, P)), dtype=dtype)
    own, tensor_scale = torch.empty(2, n).unbind() if format.tensor_scale else (None, None)
    given = None if amax is None else amax.to(torch.float32).expand(n).contiguous()
    _QUANTIZE[x.dtype](
        *(x, bounds, given, own, tensor_scale, code, scales, v),
        *(x.shape[0], x.shape[1], x.stride(0), n, P, 1 if spec.block is None else spec.block[0], _int64(seed)),
        *(SCHEMES[format.scales], format.element is E5M2, transpose, spec.stochastic, spec.hadamard),
        dtype == torch.bfloat16,
    )
    if v is not None and transpose:
        v = v.T
    return code, scales, v, tensor_scale, own, None if offsets is None else starts


def _int64(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _takes(x: Tensor, spec: Spec, transpose: bool) -> bool:
    high = 1 if spec.block is None else spec.block[0]
    return x.dtype in (torch.float32, torch.bfloat16) and not (transpose and (high > 1 or spec.block is None))


def quantize_matrix(x, spec, seed=0, amax=None, offsets=None, transpose=False) -> Quantized:
    """`nemo_lite_kernels.quant.quantize_matrix`."""
    if not _takes(x, spec, transpose):
        return reference.quantize_matrix(x, spec, seed, amax, offsets, transpose)
    codes, scales, _, tensor_scale, own, starts = _run(x, spec, seed, amax, offsets, transpose, True, None)
    assert codes is not None
    return reference.assemble(x, spec, transpose, codes, scales, tensor_scale, own, starts)


def operand(x, spec, seed=0, amax=None, offsets=None, transpose=False, dtype=torch.float32):
    """`nemo_lite_kernels.quant.operand`: in one pass, without codes."""
    if not _takes(x, spec, transpose) or dtype not in (torch.float32, torch.bfloat16):
        return reference.operand(x, spec, seed, amax, offsets, transpose, dtype)
    _, _, v, tensor_scale, _, _ = _run(x, spec, seed, amax, offsets, transpose, False, dtype)
    return v, tensor_scale


def values(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`nemo_lite_kernels.quant.values`."""
    if dtype not in (torch.float32, torch.bfloat16):
        return reference.values(q, dtype)
    format = FORMATS[q.spec.format]
    R, P = q.codes.shape[0], q.columns
    out = torch.empty(R, P, dtype=dtype)
    width = P if q.spec.block is None else q.spec.block[1]
    _VALUES[dtype](q.codes, q.scales, out, R, P, max(width, 1), SCHEMES[format.scales], format.element is E5M2)
    return out
