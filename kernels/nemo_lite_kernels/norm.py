"""RMSNorm, and the gated group RMSNorm of the Mamba-2 mixer.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * weight
    gated_norm: y = rms_norm of (x * silu(z)), the mean taken over each of G groups of channels (gate first)

Computed in float32 or better; the result has x's dtype. The references are plain; the lean forms keep only their inputs
for the backward pass.
"""

import torch
import torch.nn.functional as F

from nemo_lite_kernels.common import accumulate_dtype, row_blocks


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
    """:func:`rms_norm` with its backward pass written out; without gradients torch's own, one operation."""
    if torch.is_grad_enabled():
        return _LeanNorm.apply(x, None, weight, eps, 1)
    dtype = accumulate_dtype(x)
    return torch.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


def gated_norm_lean(x, z, weight, eps: float, groups: int):
    """:func:`gated_norm` with its backward pass written out; without gradients in few operations."""
    if torch.is_grad_enabled():
        return _LeanNorm.apply(x, z, weight, eps, groups)
    dtype = accumulate_dtype(x)
    h = F.silu(z.to(dtype)).mul_(x).unflatten(-1, (groups, -1))
    return torch.rms_norm(h, h.shape[-1:], None, eps).flatten(-2).mul_(weight).to(x.dtype)


class _LeanNorm(torch.autograd.Function):
    """Both norms (z None: not gated), a block of rows at a time."""

    @staticmethod
    def forward(ctx, x, z, weight, eps, groups):
        dtype = accumulate_dtype(x)
        x2, z2 = x.flatten(0, -2), z.flatten(0, -2) if z is not None else None
        rows, width = x2.shape
        y = torch.empty(x2.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(rows, groups, 1, dtype=dtype, device=x.device)
        wide = weight.to(dtype)
        for part in row_blocks(rows, width, x.device):
            h = x2[part].to(dtype)
            if z2 is not None:
                h = F.silu(z2[part].to(dtype)).mul_(h)
            h = h.unflatten(-1, (groups, -1))
            # ||h||^2 without a temporary of h's size.
            s = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
            scale[part] = s
            y[part] = (h * s).flatten(-2).mul_(wide)
        ctx.save_for_backward(x, z, weight, scale)
        return y.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        dtype, groups = accumulate_dtype(x), scale.shape[1]
        x2, dy2 = x.flatten(0, -2), dy.flatten(0, -2)
        z2 = z.flatten(0, -2) if z is not None else None
        dx = torch.empty(x2.shape, dtype=x.dtype, device=x.device)
        dz = torch.empty(x2.shape, dtype=x.dtype, device=x.device) if z is not None else None
        wide = weight.to(dtype)
        dweight = torch.zeros_like(wide)
        for part in row_blocks(x2.shape[0], x2.shape[1], x.device):
            h, d = x2[part].to(dtype), dy2[part].to(dtype)
            if z2 is not None:
                zp = z2[part].to(dtype)
                gate = F.silu(zp)
                h = h * gate
            normed = h.unflatten(-1, (groups, -1)) * scale[part]
            dnormed = d * normed.flatten(-2)
            dweight += dnormed.sum(0)
            along = dnormed.mul_(wide).unflatten(-1, (groups, -1)).mean(-1, keepdim=True)
            dh = (d * wide).unflatten(-1, (groups, -1)).addcmul_(normed, along, value=-1).mul_(scale[part]).flatten(-2)
            if z2 is None or dz is None:
                dx[part] = dh
            else:
                torch.mul(dh, gate, out=gate)
                dx[part] = gate
                dz[part] = torch.ops.aten.silu_backward(dh.mul_(x2[part]), zp)
        return dx.view_as(x), dz.view_as(z) if dz is not None else None, dweight.to(weight.dtype), None, None
