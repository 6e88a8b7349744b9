"""RMSNorm, and the gated group RMSNorm of the Mamba-2 mixer.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * weight
    gated_norm: y = rms_norm of (x * silu(z)), the mean taken over each of G groups of channels (gate first)

Computed in float32 or better; the result has x's dtype. The references are plain; the lean forms keep only their inputs
for the backward pass.
"""

import torch
import torch.nn.functional as F

from nemo_lite_kernels.common import accumulate_dtype


def rms_norm(x, weight, eps: float):
    """RMSNorm over the last dimension of x [..., H]; weight [H]."""
    dtype = accumulate_dtype(x)
    h = x.to(dtype)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.to(dtype)).to(x.dtype)


def gated_norm(x, z, weight, eps: float, groups: int):
    """Gated RMSNorm of x [..., C] with gate z [..., C] and weight [C], over `groups` equal groups of channels."""
    dtype = accumulate_dtype(x)
    h = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (groups, -1))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h.flatten(-2) * weight.to(dtype)).to(x.dtype)


def rms_norm_lean(x, weight, eps: float):
    """:func:`rms_norm` with its backward pass written out."""
    return _LeanNorm.apply(x, None, weight, eps, 1) if torch.is_grad_enabled() else rms_norm(x, weight, eps)


def gated_norm_lean(x, z, weight, eps: float, groups: int):
    """:func:`gated_norm` with its backward pass written out."""
    if not torch.is_grad_enabled():
        return gated_norm(x, z, weight, eps, groups)
    return _LeanNorm.apply(x, z, weight, eps, groups)


class _LeanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps, groups):
        dtype = accumulate_dtype(x)
        h = x.to(dtype)
        if z is not None:
            h = h * F.silu(z.to(dtype))
        h = h.unflatten(-1, (groups, -1))
        size = h.shape[-1]
        # ||h||^2 without an [.., H] temporary.
        scale = (torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(size).add_(eps)).rsqrt_()
        ctx.save_for_backward(x, z, weight, scale)
        ctx.groups = groups
        return ((h * scale).flatten(-2) * weight.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        dtype = accumulate_dtype(x)
        h = x.to(dtype)
        gate = F.silu(z.to(dtype)) if z is not None else None
        if gate is not None:
            h = h * gate
        normed = h.unflatten(-1, (ctx.groups, -1)) * scale
        dy = dy.to(dtype)
        dweight = (dy * normed.flatten(-2)).flatten(0, -2).sum(0)
        dnormed = (dy * weight.to(dtype)).unflatten(-1, (ctx.groups, -1))
        along = (dnormed * normed).mean(-1, keepdim=True)
        dh = dnormed.addcmul_(normed, along, value=-1).mul_(scale).flatten(-2)
        if gate is None:
            return dh.to(x.dtype), None, dweight.to(weight.dtype), None, None
        dz = torch.ops.aten.silu_backward(dh * x.to(dtype), z.to(dtype))
        return (dh * gate).to(x.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None, None
