"""The depthwise causal convolution in front of the Mamba-2 scan, with its SiLU.

    y_t = silu(bias + sum_j weight[:, W-1-j] * x_{t-j}),   j = 0..W-1, over tokens of the same document

Shape letters: B batch, L length, C channels, W width of the kernel.

Both functions take x_BLC, weight_CW, bias_C, reset_BL (True where a document starts, or None), window_BwC (the w = W-1
inputs before this call, or None for zeros) and return y_BLC in x's dtype.
"""

import torch
import torch.nn.functional as F

from nemo_lite_kernels.common import accumulate_dtype, row_blocks


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
    """The same with the backward pass written out: only the input is kept. With a window carried in the reference runs,
    or for the few tokens of decoding one product and one sum."""
    if window_BwC is not None and reset_BL is None and x_BLC.shape[1] <= 16 and not torch.is_grad_enabled():
        dtype = accumulate_dtype(x_BLC)
        extended = torch.cat([window_BwC, x_BLC], dim=1).to(dtype)
        if x_BLC.shape[1] == 1:
            y = (extended * weight_CW.T).sum(1, keepdim=True)
        else:
            y = (extended.unfold(1, weight_CW.shape[1], 1) * weight_CW).sum(-1)
        return F.silu(y.add_(bias_C)).to(x_BLC.dtype)
    if window_BwC is not None or not torch.is_grad_enabled():
        return causal_conv(x_BLC, weight_CW, bias_C, reset_BL, window_BwC)
    masks = _same_document(reset_BL, weight_CW.shape[1]) if reset_BL is not None else None
    return _LeanConv.apply(x_BLC, weight_CW, bias_C, masks)


class _LeanConv(torch.autograd.Function):
    """Row by row and a block of time at a time; a block reads W-1 inputs before it (backward: outputs after it)."""

    @staticmethod
    def _before_silu(x, start, stop, weight_CW, bias_C, masks):
        """Convolution and bias of outputs start..stop of one row x [L, C]."""
        W, dtype = weight_CW.shape[1], weight_CW.dtype
        low = max(start - W + 1, 0)
        wide = x[low:stop].to(dtype)
        y = torch.addcmul(bias_C, wide[start - low :], weight_CW[:, W - 1])
        for lag in range(1, W):
            first = max(start, lag)  # the first output that has an input `lag` before it
            if first >= stop:
                break
            tap = wide[first - lag - low : stop - lag - low]
            if masks is not None:
                tap = tap * masks[lag - 1][first:stop]
            y[first - start :].addcmul_(tap, weight_CW[:, W - 1 - lag])
        return y

    @staticmethod
    def forward(ctx, x_BLC, weight_CW, bias_C, masks):
        dtype = accumulate_dtype(x_BLC)
        weight, bias = weight_CW.to(dtype), bias_C.to(dtype)
        y = torch.empty_like(x_BLC, memory_format=torch.contiguous_format)
        for b, x in enumerate(x_BLC):
            row_masks = [mask[b] for mask in masks] if masks is not None else None
            for part in row_blocks(x.shape[0], x.shape[1], x.device):
                stop = min(part.stop, x.shape[0])
                y[b, part] = F.silu(_LeanConv._before_silu(x, part.start, stop, weight, bias, row_masks), inplace=True)
        ctx.save_for_backward(x_BLC, weight_CW, bias_C)
        ctx.masks = masks
        return y

    @staticmethod
    def backward(ctx, dy_BLC):
        x_BLC, weight_CW, bias_C = ctx.saved_tensors
        dtype = accumulate_dtype(x_BLC)
        weight, bias = weight_CW.to(dtype), bias_C.to(dtype)
        L, W = x_BLC.shape[1], weight.shape[1]
        dx_BLC = torch.empty_like(x_BLC, memory_format=torch.contiguous_format)
        dweight_WC, dbias = torch.zeros_like(weight.T, memory_format=torch.contiguous_format), torch.zeros_like(bias)
        for b, (x, dy) in enumerate(zip(x_BLC, dy_BLC)):
            masks = [mask[b] for mask in ctx.masks] if ctx.masks is not None else None
            for part in row_blocks(x.shape[0], x.shape[1], x.device):
                start, stop = part.start, min(part.stop, L)
                ahead = min(stop + W - 1, L)  # inputs of this block act on outputs up to here
                before = _LeanConv._before_silu(x, start, ahead, weight, bias, masks)
                d = torch.ops.aten.silu_backward(dy[start:ahead].to(dtype), before)
                wide, n = x[start:stop].to(dtype), stop - start
                dx = d[:n] * weight[:, W - 1]
                dweight_WC[W - 1] += (d[:n] * wide).sum(0)
                dbias += d[:n].sum(0)
                for lag in range(1, W):
                    tap = d[lag : lag + n]
                    if len(tap) == 0:
                        break
                    if masks is not None:
                        tap = tap * masks[lag - 1][start + lag : start + lag + len(tap)]
                    dx[: len(tap)].addcmul_(tap, weight[:, W - 1 - lag])
                    dweight_WC[W - 1 - lag] += (tap * wide[: len(tap)]).sum(0)
                dx_BLC[b, part] = dx
        return dx_BLC, dweight_WC.T.to(weight_CW.dtype), dbias.to(bias_C.dtype), None
