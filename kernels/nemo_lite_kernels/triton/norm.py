"""RMSNorm, the gated group RMSNorm of the Mamba-2 mixer, and squared ReLU in Triton.

    rms_norm:     y = x r weight,           r = 1 / sqrt(mean(x^2) + eps)
    gated_norm:   the same for x * silu(z), the mean taken over each of G groups of channels (gate first)
    squared_relu: y = relu(h)^2

With n = h r (h what is normed) and d = dy * weight: dh = r (d - n mean(d n)), dweight = sum over rows of dy n.

One program has some rows of one group and reads them once. In the backward pass a program goes through many rows and
keeps its sum of dweight; the programs' sums are added at the end, so that the order is fixed. Sums are in float32
(float64 for float64). Only inputs and r are kept.
"""

import contextlib

import torch
import triton
import triton.language as tl

from nemo_lite_kernels.common import accumulate_dtype

TILE = 8192  # elements a program has at a time
PROGRAMS = 512  # of the backward pass, over all groups


def on_device(x):
    """Kernels start on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rms_norm(x, weight, eps: float):
    """RMSNorm over the last dimension of x [..., H]; weight [H]."""
    with on_device(x):
        return _Norm.apply(x, None, weight, eps, 1)


def gated_norm(x, z, weight, eps: float, groups: int):
    """Gated RMSNorm of x [..., C] with gate z [..., C] and weight [C], over `groups` equal groups of channels."""
    with on_device(x):
        return _Norm.apply(x, z, weight, eps, groups)


def _rows(x):
    """x as [rows, width] with neighbouring channels side by side, a view where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _sizes(width: int):
    """Rows and columns of a tile, and warps for it."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(16, TILE // 4 // columns))
    return rows, columns, 16 if columns > TILE else 8 if columns * rows >= 4096 else 4


class _Norm(torch.autograd.Function):
    """Both norms (z None: not gated)."""

    @staticmethod
    def forward(ctx, x, z, weight, eps, groups):
        x2, z2 = _rows(x), None if z is None else _rows(z)
        rows, channels = x2.shape
        width = channels // groups
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(rows, groups, dtype=accumulate_dtype(x), device=x.device)
        ROWS, COLUMNS, warps = _sizes(width)
        if rows:
            _forward_kernel[triton.cdiv(rows, ROWS), groups](
                x2, z2, weight.contiguous(), y, scale, rows, width, x2.stride(0), 0 if z2 is None else z2.stride(0),
                eps, GATED=z is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(x, z, weight, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        x2, dy2, z2 = _rows(x), _rows(dy), None if z is None else _rows(z)
        (rows, channels), groups = x2.shape, scale.shape[1]
        width = channels // groups
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        ROWS, COLUMNS, warps = _sizes(width)
        programs = min(triton.cdiv(rows, ROWS), max(1, PROGRAMS // groups))
        parts = torch.empty(programs, channels, dtype=scale.dtype, device=x.device)
        if rows:
            _backward_kernel[programs, groups](
                x2, z2, weight.contiguous(), dy2, scale, dx, dz, parts, rows, width,
                x2.stride(0), 0 if z2 is None else z2.stride(0), dy2.stride(0),
                GATED=z is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=warps,
            )  # fmt: skip
        return dx, dz, parts.sum(0).to(weight.dtype), None, None


@triton.jit
def _forward_kernel(
    x, z, weight, y, scale, rows, width, stride_x, stride_z, eps,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    channel = group * width + column
    real = (row < rows)[:, None] & (column < width)[None, :]
    wide = scale.dtype.element_ty
    h = tl.load(x + row[:, None] * stride_x + channel[None, :], mask=real, other=0.0).to(wide)
    if GATED:
        gate = tl.load(z + row[:, None] * stride_z + channel[None, :], mask=real, other=0.0).to(wide)
        h = h * gate / (1.0 + tl.exp(-gate))
    r = 1.0 / tl.sqrt(tl.sum(h * h, 1) / width + eps)
    w = tl.load(weight + channel, mask=column < width, other=0.0).to(wide)
    result = h * r[:, None] * w[None, :]
    tl.store(y + row[:, None] * (groups * width) + channel[None, :], result.to(y.dtype.element_ty), mask=real)
    tl.store(scale + row * groups + group, r, mask=row < rows)


@triton.jit
def _backward_kernel(
    x, z, weight, dy, scale, dx, dz, parts, rows, width, stride_x, stride_z, stride_dy,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLUMNS)
    channel = group * width + column
    wide = scale.dtype.element_ty
    w = tl.load(weight + channel, mask=column < width, other=0.0).to(wide)
    dweight = tl.zeros([COLUMNS], wide)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        real = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * (groups * width) + channel[None, :]
        value = tl.load(x + row[:, None] * stride_x + channel[None, :], mask=real, other=0.0).to(wide)
        d = tl.load(dy + row[:, None] * stride_dy + channel[None, :], mask=real, other=0.0).to(wide)
        r = tl.load(scale + row * groups + group, mask=row < rows, other=0.0)[:, None]
        if GATED:
            gate = tl.load(z + row[:, None] * stride_z + channel[None, :], mask=real, other=0.0).to(wide)
            open_ = 1.0 / (1.0 + tl.exp(-gate))
            silu = gate * open_
            normed = value * silu * r
        else:
            normed = value * r
        dweight += tl.sum(d * normed, 0)
        d = d * w[None, :]
        dh = r * (d - normed * (tl.sum(d * normed, 1) / width)[:, None])
        if GATED:
            slope = open_ * (1.0 + gate * (1.0 - open_))
            tl.store(dz + at, (dh * value * slope).to(dz.dtype.element_ty), mask=real)
            dh = dh * silu
        tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=real)
    tl.store(parts + tl.program_id(0).to(tl.int64) * groups * width + channel, dweight, mask=column < width)


def squared_relu(h):
    """relu(h)^2. Only the result is kept, which the product behind it keeps anyway: relu(h) is its root."""
    with on_device(h):
        return _SquaredReLU.apply(h)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        y = torch.empty_like(h)
        if n := h.numel():
            _squared_relu_kernel[triton.cdiv(n, 1024),](h, h, y, n, BACKWARD=False, BLOCK=1024, num_warps=4)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dy = dy.contiguous()
        dh = torch.empty_like(dy)
        if n := dy.numel():
            _squared_relu_kernel[triton.cdiv(n, 1024),](y, dy, dh, n, BACKWARD=True, BLOCK=1024, num_warps=4)
        return dh


@triton.jit
def _squared_relu_kernel(h, dy, out, n, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(h + at, mask=at < n, other=0.0)
    wide = tl.float64 if value.dtype == tl.float64 else tl.float32
    value = value.to(wide)
    if BACKWARD:  # h is the result here
        value = 2.0 * tl.sqrt(value) * tl.load(dy + at, mask=at < n, other=0.0).to(wide)
    else:
        value = tl.maximum(value, 0.0)
        value = value * value
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)
