"""Linears over many rows in bfloat16 by torch, and on CPUs with AMX the weight's gradient in C++ (dense.cpp).

oneDNN takes twice as long for a product of two operands that both have to be turned round, and leaves a bfloat16 result
that float32 master weights want cast. Here the gradient comes out as float32 sums. Where torch has no bfloat16 product
(`product_dtype`), operands are widened and results rounded, so that the numbers are bfloat16's.
"""

import torch
from torch import Tensor

from nemo_lite_kernels import cpu
from nemo_lite_kernels import linear as reference
from nemo_lite_kernels.common import product_dtype

MANY_ROWS = 64
_AVAILABLE = cpu.Kernel("dense_available", "p")
_BACKWARD_W = cpu.Kernel("dense_backward_w", "ppppiiii")


def available() -> bool:
    """Whether this CPU has AMX, the library was compiled for it, and the system lets it be used."""
    out = torch.zeros(1, dtype=torch.int64)
    _AVAILABLE(out)
    return bool(out)


def weight_gradient(dy_MN: Tensor, x_MK: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """dy^T x in `dtype`, or added to `into` of that dtype, which is returned."""
    (M, N), K = dy_MN.shape, x_MK.shape[1]
    if dy_MN.dtype != torch.bfloat16 or dtype not in cpu.SUFFIX or M < MANY_ROWS or not available():
        kind = product_dtype(dy_MN)
        part = dy_MN.to(kind).T @ x_MK.to(kind)
        return part.to(dtype) if into is None else into.add_(part)
    dw = torch.empty(N, K, dtype=dtype) if into is None else into
    space = torch.empty((M + 31) // 32 * 32 * ((K + 15) // 16 * 16), dtype=torch.bfloat16)
    _BACKWARD_W[dtype](dy_MN.contiguous(), x_MK.contiguous(), dw, space, M, N, K, into is not None)
    return dw


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.dtype = weight.dtype
        return reference.linear(x, cast)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.to(product_dtype(dy))
        dx = (dy @ weight.to(dy.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(dy, x, ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw


def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T in x's dtype, differentiable; the gradient of W is in W's dtype and never rounded to x's."""
    if torch.is_grad_enabled() and weight_NK.requires_grad and x_MK.dtype == torch.bfloat16 and x_MK.dim() == 2:
        return _Linear.apply(x_MK, weight_NK)
    return reference.linear(x_MK, weight_NK)
