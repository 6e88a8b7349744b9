"""The depthwise causal convolution in front of the Mamba-2 scan, with its SiLU.

    y_t = silu(bias + sum_j weight[:, W-1-j] * x_{t-j}),   j = 0..W-1, over tokens of the same document

Shape letters: B batch, L length, C channels, W width of the kernel.

Both functions take x_BLC, weight_CW, bias_C, reset_BL (True where a document starts, or None), window_BwC (the w = W-1
inputs before this call, or None for zeros) and return y_BLC in x's dtype.
"""

import torch
import torch.nn.functional as F

from nemo_lite_kernels.common import accumulate_dtype


def _same_document(reset_BL, width: int):
    """[B, L, 1] masks for lag 1..W-1: whether the token `lag` before belongs to the same document."""
    document = reset_BL.to(torch.int32).cumsum(1)
    masks = []
    for lag in range(1, width):
        before = F.pad(document[:, :-lag], (min(lag, document.shape[1]), 0))  # 0: the document of the window carried in
        masks.append((document == before)[..., None])
    return masks


def causal_conv(x_BLC, weight_CW, bias_C, reset_BL=None, window_BwC=None):
    """The reference: one product per tap."""
    dtype = accumulate_dtype(x_BLC)
    B, L, C = x_BLC.shape
    W = weight_CW.shape[1]
    x, weight = x_BLC.to(dtype), weight_CW.to(dtype)
    window = x.new_zeros(B, W - 1, C) if window_BwC is None else window_BwC.to(dtype)
    extended = torch.cat([window, x], dim=1)
    masks = _same_document(reset_BL, W) if reset_BL is not None else None
    y = bias_C.to(dtype) + x * weight[:, W - 1]
    for lag in range(1, W):
        tap = extended[:, W - 1 - lag : W - 1 - lag + L] * weight[:, W - 1 - lag]
        y = y + (tap if masks is None else tap * masks[lag - 1])
    return F.silu(y).to(x_BLC.dtype)


def causal_conv_lean(x_BLC, weight_CW, bias_C, reset_BL=None, window_BwC=None):
    """The same with the backward pass written out: only the input is kept. Without gradients, or with a window carried
    in, the reference runs."""
    if window_BwC is not None or not torch.is_grad_enabled():
        return causal_conv(x_BLC, weight_CW, bias_C, reset_BL, window_BwC)
    masks = _same_document(reset_BL, weight_CW.shape[1]) if reset_BL is not None else None
    return _LeanConv.apply(x_BLC, weight_CW, bias_C, masks)


class _LeanConv(torch.autograd.Function):
    @staticmethod
    def _before_silu(x, weight_CW, bias_C, masks):
        L, W = x.shape[1], weight_CW.shape[1]
        y = torch.addcmul(bias_C, x, weight_CW[:, W - 1])
        for lag in range(1, min(W, L)):
            tap = x[:, : L - lag]
            if masks is not None:
                tap = tap * masks[lag - 1][:, lag:]
            y[:, lag:].addcmul_(tap, weight_CW[:, W - 1 - lag])
        return y

    @staticmethod
    def forward(ctx, x_BLC, weight_CW, bias_C, masks):
        dtype = accumulate_dtype(x_BLC)
        ctx.save_for_backward(x_BLC, weight_CW, bias_C)
        ctx.masks = masks
        return F.silu(_LeanConv._before_silu(x_BLC.to(dtype), weight_CW.to(dtype), bias_C.to(dtype), masks)).to(
            x_BLC.dtype
        )

    @staticmethod
    def backward(ctx, dy_BLC):
        x_BLC, weight_CW, bias_C = ctx.saved_tensors
        dtype = accumulate_dtype(x_BLC)
        x, weight = x_BLC.to(dtype), weight_CW.to(dtype)
        L, W = x.shape[1], weight.shape[1]
        before = _LeanConv._before_silu(x, weight, bias_C.to(dtype), ctx.masks)
        dbefore = torch.ops.aten.silu_backward(dy_BLC.to(dtype), before)
        dx = dbefore * weight[:, W - 1]
        dweight = torch.zeros_like(weight)
        dweight[:, W - 1] = (dbefore * x).sum((0, 1))
        for lag in range(1, min(W, L)):
            tap = dbefore[:, lag:]
            if ctx.masks is not None:
                tap = tap * ctx.masks[lag - 1][:, lag:]
            dx[:, : L - lag].addcmul_(tap, weight[:, W - 1 - lag])
            dweight[:, W - 1 - lag] = (tap * x[:, : L - lag]).sum((0, 1))
        return dx.to(x_BLC.dtype), dweight.to(weight_CW.dtype), dbefore.sum((0, 1)).to(bias_C.dtype), None
