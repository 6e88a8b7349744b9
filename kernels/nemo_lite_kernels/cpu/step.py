"""A step of a few tokens through a stack of layers, in one call (step.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_lite_kernels.cpu import Kernel
from nemo_lite_kernels.cpu.linear import KINDS, Weight

FEW_TOKENS = 32
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Vector(ctypes.Structure):
    _fields_ = [("data", _P), ("kind", _I)]

    @classmethod
    def of(cls, tensor: Tensor) -> Vector:
        assert tensor.is_contiguous()
        return cls(tensor.data_ptr(), KINDS[tensor.dtype])


class LayerPlan(ctypes.Structure):
    """`struct Layer` of step.cpp: one layer's numbers, and where its weights lie."""

    _fields_ = [
        ("letter", _I), ("eps", _F), ("gate_eps", _F), ("dt_min", _F), ("dt_max", _F), ("scaling", _F),
        ("normalise", ctypes.c_int32), ("norm", Vector),
        *((name, _I) for name in ("heads", "head_dim", "groups", "state", "width")),
        *((name, _I) for name in ("topk", "route_groups", "topk_groups", "experts")),
        *((name, Weight) for name in "abcdefgh"),
        *((name, Vector) for name in ("conv", "conv_bias", "dt_bias", "A_log", "D", "gate_norm", "route_bias")),
    ]  # fmt: skip


class PartPlan(ctypes.Structure):
    """`struct Part` of step.cpp: rows of equal length, and the cache behind them.

    The cache is given by layer: `a` windows [slots, w, C] or keys [blocks, block size, K, D], `b` states
    [slots, H, P, N] or values; `_in` is read, `_out` written (the same memory, except where a cache is never written in
    place). Everything referred to must be alive as long as this is.
    """

    _fields_ = [
        *((name, _I) for name in ("rows", "length", "tentative", "first", "block_size", "table_width")),
        *((name, _P) for name in ("starts", "slots", "table", "a_in", "b_in", "a_out", "b_out", "held")),
    ]  # fmt: skip


def _pointers(tensors: Sequence[Tensor | None]):
    return (_P * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _address(array) -> int:
    return ctypes.addressof(array)


_step, _advance = Kernel("step", "piiipipi"), Kernel("advance", "piipp")


class Step:
    """The plan of a stack of layers. `keep` holds what the plans' pointers point into."""

    few_tokens = FEW_TOKENS
    dtypes = tuple(KINDS)  # of the model's activations, and so of the cache's windows, keys and values

    def __init__(self, plans: Sequence[LayerPlan], hidden: int, keep):
        self.plans, self.hidden, self.keep = (LayerPlan * len(plans))(*plans), hidden, keep
        self._held_a_token = sum(
            2 * (p.heads * p.head_dim + 2 * p.groups * p.state) + p.heads for p in plans if p.letter == ord("M")
        )

    def __reduce__(self):
        """Pointers cannot be copied: a copied model has None here, and plans anew."""
        return type(None), ()

    def held_size(self, tokens: int) -> int:
        """Elements of the float32 buffer that a tentative part of so many tokens needs."""
        return tokens * self._held_a_token

    @staticmethod
    def cache(a: Sequence[Tensor | None], b: Sequence[Tensor | None]):
        """A cache's tensors by layer, as `part` takes them: windows or keys, states or values."""
        return _pointers(a), _pointers(b), a, b

    def part(
        self, *, rows: int, length: int, tentative: bool, starts: Sequence[int], slots: Sequence[int],
        table: Sequence[int], block_size: int, inputs, outputs, held: Tensor | None, first: int = 0,
    ) -> PartPlan:  # fmt: skip
        """Rows of equal length. `table` has the blocks of each row, row after row, `inputs` and `outputs` are what
        `cache` gave; they differ where states are never written in place."""
        arrays = tuple((_I * len(values))(*values) for values in (starts, slots, table))
        plan = PartPlan(
            rows, length, tentative, first, block_size, len(table) // rows, *map(_address, arrays),
            _address(inputs[0]), _address(inputs[1]), _address(outputs[0]), _address(outputs[1]),
            None if held is None else held.data_ptr(),
        )  # fmt: skip
        plan.alive = (arrays, inputs, outputs, held)
        return plan

    def run(self, x_TH: Tensor, parts: Sequence[PartPlan], cache_dtype: torch.dtype) -> Tensor:
        """x through the layers, [T, H] float32, in place."""
        array = (PartPlan * len(parts))(*parts)
        _step(
            _address(self.plans), len(self.plans), self.hidden, KINDS[cache_dtype], x_TH, x_TH.shape[0],
            _address(array), len(parts),
        )  # fmt: skip
        return x_TH

    def advance(self, part: PartPlan, counts: Sequence[int], cache_dtype: torch.dtype, outputs=None) -> None:
        """Take in the first counts[b] tokens of each row of a tentative part, into its outputs or others."""
        if outputs is not None:
            part.a_out, part.b_out = _address(outputs[0]), _address(outputs[1])
        array = (_I * len(counts))(*counts)
        _advance(_address(self.plans), len(self.plans), KINDS[cache_dtype], _address(part), _address(array))
