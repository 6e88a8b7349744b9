"""Linears of a few rows in C++ (linear.h): every weight is read once, at the speed of memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nemo_lite_kernels import linear as linear_reference
from nemo_lite_kernels.cpu import Kernel, dense
from nemo_lite_kernels.linear import PackedWeight

FEW_ROWS = 16
KINDS = {torch.float32: 0, torch.bfloat16: 1}


class Weight(ctypes.Structure):
    """`struct Weight` of linear.h: a weight [N, K], or a stack of them, where it lies."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "kind", "group", "data_stride", "scale_stride")),
    ]  # fmt: skip

    @classmethod
    def of(cls, weight: Tensor | PackedWeight | None) -> Weight:
        if weight is None:
            return cls()
        rows, cols = weight.shape[-2:]
        if isinstance(weight, PackedWeight):
            codes, scales = weight.codes, weight.scales
            return cls(
                codes.data_ptr(), scales.data_ptr(), rows, cols, 2 if weight.bits == 8 else 3, weight.group,
                codes[0].nbytes if codes.dim() == 5 else 0, scales[0].nbytes if scales.dim() == 4 else 0,
            )  # fmt: skip
        assert weight.is_contiguous()
        return cls(weight.data_ptr(), None, rows, cols, KINDS[weight.dtype], 0, rows * cols * weight.element_size(), 0)


_few_rows, _unpack = Kernel("few_rows", "ppipii"), Kernel("unpack", "pipi")


def linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """y [.., N] = x [.., K] W^T: up to 16 rows without gradients here, everything else by torch (dense.py)."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows > FEW_ROWS or rows == 0 or torch.is_grad_enabled() or not _takes(x, weight):
        return dense.linear(x, unpack(weight, x.dtype))
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    matrix = Weight.of(weight)
    _few_rows(ctypes.addressof(matrix), x, KINDS[x.dtype], y, KINDS[x.dtype], rows)
    return y


def unpack(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """A tensor as it is; a packed weight as a tensor of this dtype."""
    if not isinstance(weight, PackedWeight) or dtype not in KINDS:
        return linear_reference.unpack(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    one = Weight.of(weight)
    _unpack(ctypes.addressof(one), weight.shape[:-2].numel(), out, KINDS[dtype])
    return out


def _takes(x: Tensor, weight: Tensor | PackedWeight) -> bool:
    if not x.is_cpu or x.dtype not in KINDS or len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        return False
    return isinstance(weight, PackedWeight) or (weight.is_cpu and weight.dtype in KINDS and weight.is_contiguous())
