"""The depthwise causal convolution with its SiLU on CUDA devices, forward and backward.

The equation and the shape letters are those of ``nemo_lite_kernels.conv``; sums are float32. A program takes a tile of
tokens and channels and reads the inputs once per tap, from the caches after the first time. Only the inputs are kept:
the backward pass makes what goes into the SiLU again.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
import contextlib

import torch
import triton
import triton.language as tl

BLOCK_L = 64  # tokens of a program


def _tuned(*choices: tuple[int, int]):
    """Measured once per number of channels, on the device: the best of a few (channels of a program, warps)."""
    if triton.knobs.runtime.interpret:
        choices = choices[:1]
    configs = [triton.Config({"BLOCK_C": block}, num_warps=warps) for block, warps in choices]
    return triton.autotune(configs, key=["C", "W"])


@triton.jit
def _document(seg, t, L, HAS_SEG: tl.constexpr):
    """The documents of tokens t; before the row it is document 0, that of the window carried in."""
    if HAS_SEG:
        return tl.load(seg + t, mask=(t >= 0) & (t < L), other=0)
    return tl.zeros_like(t)


@triton.jit
def _inputs(x, window, t, L, stride, c, C: tl.constexpr, W: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Inputs at times t [l] and channels c; those before the row are in the window, or 0."""
    x_lc = tl.load(
        x + t.to(tl.int64)[:, None] * stride + c[None, :],
        mask=((t >= 0) & (t < L))[:, None] & (c < C)[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_WINDOW:
        x_lc += tl.load(
            window + (t + W - 1)[:, None] * C + c[None, :],
            mask=((t < 0) & (t > -W))[:, None] & (c < C)[None, :],
            other=0.0,
        ).to(tl.float32)
    return x_lc


@triton.jit
def _before_silu(
    x, weight, bias, seg, window, t, L, stride, c, C: tl.constexpr, W: tl.constexpr, HAS_SEG: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The convolution at times t [l] and channels c, with its bias."""
    document = _document(seg, t, L, HAS_SEG)
    total = tl.zeros([t.shape[0], c.shape[0]], dtype=tl.float32)
    total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(W):
        tap = _inputs(x, window, t - lag, L, stride, c, C, W, HAS_WINDOW)
        if HAS_SEG and lag > 0:
            tap = tl.where((_document(seg, t - lag, L, HAS_SEG) == document)[:, None], tap, 0.0)
        total += tap * tl.load(weight + c * W + (W - 1 - lag), mask=c < C, other=0.0).to(tl.float32)[None, :]
    return total


@_tuned((64, 4), (128, 8), (64, 8))
@triton.jit
def _forward(
    x, weight, bias, seg, window, y, L, s_b, s_l, C: tl.constexpr, W: tl.constexpr, HAS_SEG: tl.constexpr,
    HAS_WINDOW: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if HAS_WINDOW:
        window += b * (W - 1) * C
    if HAS_SEG:
        seg += b * L
    total = _before_silu(x + b * s_b, weight, bias, seg, window, t, L, s_l, c, C, W, HAS_SEG, HAS_WINDOW)
    out = y + (b * L + t)[:, None] * C + c[None, :]
    tl.store(out, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=(t < L)[:, None] & (c < C)[None, :])


@_tuned((64, 8), (32, 4), (128, 8))
@triton.jit
def _backward(
    dy, x, weight, bias, seg, window, dx, dwindow, partial, L, s_yb, s_yl, s_b, s_l, C: tl.constexpr, W: tl.constexpr,
    HAS_SEG: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs at times t, from the outputs t .. t+W-1; with a window, t starts W-1 before the row.

    partial [tile, W+1, C] is the tile's share of the gradients of the weights and (last) of the bias.
    """
    b = tl.program_id(2).to(tl.int64)
    before = W - 1 if HAS_WINDOW else 0
    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L) - before
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if HAS_WINDOW:
        window += b * (W - 1) * C
    if HAS_SEG:
        seg += b * L
    x += b * s_b
    dy += b * s_yb
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * C + c
    own = _inputs(x, window, t, L, s_l, c, C, W, HAS_WINDOW)
    document = _document(seg, t, L, HAS_SEG)
    dx_lc = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    for lag in tl.static_range(W):
        at = t + lag
        total = _before_silu(x, weight, bias, seg, window, at, L, s_l, c, C, W, HAS_SEG, HAS_WINDOW)
        gate = tl.sigmoid(total)
        d = tl.load(
            dy + at.to(tl.int64)[:, None] * s_yl + c[None, :],
            mask=((at >= 0) & (at < L))[:, None] & (c < C)[None, :],
            other=0.0,
        ).to(tl.float32)
        d *= gate * (1.0 + total * (1.0 - gate))
        if lag == 0:
            tl.store(partial + W * C, tl.sum(d, axis=0), mask=c < C)
        elif HAS_SEG:
            d = tl.where((_document(seg, at, L, HAS_SEG) == document)[:, None], d, 0.0)
        tl.store(partial + (W - 1 - lag) * C, tl.sum(d * own, axis=0), mask=c < C)
        dx_lc += d * tl.load(weight + c * W + (W - 1 - lag), mask=c < C, other=0.0).to(tl.float32)[None, :]
    inside = (c < C)[None, :]
    out = dx + (b * L + t)[:, None] * C + c[None, :]
    tl.store(out, dx_lc.to(dx.dtype.element_ty), mask=((t >= 0) & (t < L))[:, None] & inside)
    if HAS_WINDOW:
        out = dwindow + (b * (W - 1) + t + (W - 1))[:, None] * C + c[None, :]
        tl.store(out, dx_lc.to(dwindow.dtype.element_ty), mask=(t < 0)[:, None] & inside)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, seg, window):
        (B, L, C), W = x.shape, weight.shape[1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[lambda meta: (triton.cdiv(L, BLOCK_L), triton.cdiv(C, meta["BLOCK_C"]), B)](
            x, weight, bias, seg, window, y, L, x.stride(0), x.stride(1), C, W, HAS_SEG=seg is not None,
            HAS_WINDOW=window is not None, BLOCK_L=BLOCK_L,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, seg, window)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, seg, window = ctx.saved_tensors
        (B, L, C), W = x.shape, weight.shape[1]
        dy = dy if dy.stride(2) == 1 or C == 1 else dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dwindow = None if window is None else torch.empty_like(window)
        tiles = triton.cdiv(L if window is None else L + W - 1, BLOCK_L)
        partial = torch.empty(B * tiles, W + 1, C, dtype=torch.float32, device=x.device)
        with _on(x):
            _backward[lambda meta: (tiles, triton.cdiv(C, meta["BLOCK_C"]), B)](
                dy, x, weight, bias, seg, window, dx, dwindow, partial, L, dy.stride(0), dy.stride(1), x.stride(0),
                x.stride(1), C, W, HAS_SEG=seg is not None, HAS_WINDOW=window is not None, BLOCK_L=BLOCK_L,
            )  # fmt: skip
        summed = partial.sum(0)
        return dx, summed[:W].T.to(weight.dtype), summed[W].to(bias.dtype), None, dwindow


def _on(x: torch.Tensor):
    """Kernels start on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def causal_conv(x_BLC, weight_CW, bias_C, reset_BL=None, window_BwC=None):
    """As ``nemo_lite_kernels.conv.causal_conv``."""
    x = x_BLC if x_BLC.stride(2) == 1 or x_BLC.shape[2] == 1 else x_BLC.contiguous()
    seg = None if reset_BL is None else reset_BL.cumsum(1, dtype=torch.int32)
    window = None if window_BwC is None else window_BwC.contiguous()
    with _on(x):
        return _Conv.apply(x, weight_CW.contiguous(), bias_C.contiguous(), seg, window)
