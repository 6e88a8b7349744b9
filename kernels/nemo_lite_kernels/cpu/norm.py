"""RMSNorm, the gated group RMSNorm and the squared ReLU in C++: the references' signatures, for float32 and bfloat16.

Only inputs are kept for the backward pass, of the squared ReLU only its output.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_lite_kernels.cpu import Kernel

_rms_forward, _rms_backward = Kernel("rms_forward", "pippiif"), Kernel("rms_backward", "pippipppiiif")
_gated_forward = Kernel("gated_forward", "pipippiiif")
_gated_backward = Kernel("gated_backward", "pipippippppiiiif")
_relu2_forward, _relu2_backward = Kernel("relu2_forward", "ppi"), Kernel("relu2_backward", "pppi")


def rms_norm(x, weight, eps: float):
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight.float(), eps)
    return _rms(_rows(x), weight.float(), eps).view(x.shape)


def gated_norm(x, z, weight, eps: float, groups: int):
    if z.dtype != x.dtype:
        return gated_norm(x.float(), z.float(), weight, eps, groups).to(x.dtype)
    if torch.is_grad_enabled():
        return _GatedNorm.apply(x, z, weight.float(), eps, groups)
    return _gated(_rows(x), _rows(z), weight.float(), eps, groups).view(x.shape)


def squared_relu(h):
    return _SquaredReLU.apply(h) if torch.is_grad_enabled() else _squared(h.contiguous())


def _rows(x: Tensor) -> Tensor:
    """x [..., width] as [rows, width], a view where its strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _parts(rows: int) -> int:
    """In how many parts a weight's gradient is summed: by the shape alone, so that threads do not change the result."""
    return max(1, min(32, rows // 16))


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    _rms_forward[x.dtype](x, x.stride(0), weight.contiguous(), y, *x.shape, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms(_rows(x), weight, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x2, dy2 = _rows(x), _rows(dy)
        (rows, width), parts = x2.shape, _parts(x2.shape[0])
        dx, partial = torch.empty(x2.shape, dtype=x.dtype), torch.empty(parts, width)
        dweight = torch.empty(width)
        _rms_backward[x.dtype](
            x2, x2.stride(0), weight.contiguous(), dy2, dy2.stride(0), dx, partial, dweight, rows, width, parts, ctx.eps
        )
        return dx.view(x.shape), dweight, None


def _gated(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    _gated_forward[x.dtype](x, x.stride(0), z, z.stride(0), weight.contiguous(), y, *x.shape, groups, eps)
    return y


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps, groups):
        ctx.save_for_backward(x, z, weight)
        ctx.options = eps, groups
        return _gated(_rows(x), _rows(z), weight, eps, groups).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, weight = ctx.saved_tensors
        eps, groups = ctx.options
        x2, z2, dy2 = _rows(x), _rows(z), _rows(dy)
        (rows, width), parts = x2.shape, _parts(x2.shape[0])
        dx, dz = torch.empty(x2.shape, dtype=x.dtype), torch.empty(x2.shape, dtype=x.dtype)
        partial, dweight = torch.empty(parts, width), torch.empty(width)
        _gated_backward[x.dtype](
            x2, x2.stride(0), z2, z2.stride(0), weight.contiguous(), dy2, dy2.stride(0), dx, dz, partial, dweight,
            rows, width, groups, parts, eps,
        )  # fmt: skip
        return dx.view(x.shape), dz.view(x.shape), dweight, None, None


def _squared(h: Tensor) -> Tensor:
    y = torch.empty_like(h)
    _relu2_forward[h.dtype](h, y, h.numel())
    return y


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        y = _squared(h.contiguous())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dh = torch.empty_like(y)
        _relu2_backward[y.dtype](y, dy.contiguous(), dh, y.numel())
        return dh
