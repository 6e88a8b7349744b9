"""The depthwise causal convolution with its SiLU in C++: the reference's signature, for x in float32 or bfloat16."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_lite_kernels.conv import causal_conv as reference
from nemo_lite_kernels.cpu import Kernel

MOST_TAPS = 16
_forward, _backward = Kernel("conv_forward", "ppppppiiiiii"), Kernel("conv_backward", "pppppppppiiiiiiii")


def causal_conv(x_BLC, weight_CW, bias_C, reset_BL=None, window_BwC=None):
    if weight_CW.shape[1] > MOST_TAPS or not x_BLC.numel():
        return reference(x_BLC, weight_CW, bias_C, reset_BL, window_BwC)
    weight, bias = weight_CW.float(), bias_C.float()
    window = None if window_BwC is None else window_BwC.float()
    if torch.is_grad_enabled():
        return _Conv.apply(x_BLC, weight, bias, reset_BL, window)
    return _run(x_BLC, weight, bias, reset_BL, window)


def _run(x: Tensor, weight_CW: Tensor, bias: Tensor, reset: Tensor | None, window: Tensor | None) -> Tensor:
    x = _strided(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    _forward[x.dtype](
        x, weight_CW.T.contiguous(), bias.contiguous(), _whole(reset), _whole(window), y,
        *x.shape, weight_CW.shape[1], *x.stride()[:2],
    )  # fmt: skip
    return y


def _strided(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class _Conv(torch.autograd.Function):
    """The input is all that is kept."""

    @staticmethod
    def forward(ctx, x, weight_CW, bias, reset, window):
        ctx.save_for_backward(x, weight_CW, bias, reset, window)
        return _run(x, weight_CW, bias, reset, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight_CW, bias, reset, window = ctx.saved_tensors
        (B, L, C), taps = x.shape, weight_CW.shape[1]
        x, dy = _strided(x), _strided(dy)
        dx, partial = torch.empty(x.shape, dtype=x.dtype), torch.empty(B, taps + 1, C)
        dwindow = torch.empty(window.shape) if window is not None and ctx.needs_input_grad[4] else None
        _backward[x.dtype](
            x, weight_CW.T.contiguous(), bias.contiguous(), _whole(reset), _whole(window), dy, dx, dwindow, partial,
            B, L, C, taps, *x.stride()[:2], *dy.stride()[:2],
        )  # fmt: skip
        total = partial.sum(0)
        return dx, total[:taps].T, total[taps], None, dwindow
