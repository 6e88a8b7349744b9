"""What number formats do to a run: the share flushed to zero, saturated and lost, by linear and operand."""

from __future__ import annotations

import time

import torch
from nemo_lite_kernels.quant import FORMATS, Spec, arrange, quantize_matrix, values
from torch import Tensor

BINS = 16


class Statistics:
    """Sums over everything that is quantised while it is `Numerics.watch`."""

    def __init__(self) -> None:
        self.seconds = 0.0  # that measuring took
        self.sums: dict[tuple[str, str], Tensor] = {}

    def __call__(self, name: str, operand: str, x: Tensor, spec: Spec, offsets: Tensor | None, transpose: bool) -> None:
        """Measure x, which the operand "fprop x" (or the like) of the linear `name` is made from."""
        if not x.numel():
            return
        began = time.perf_counter()
        transpose = transpose and spec.block is not None
        m = arrange(x, spec, offsets, transpose)[0]
        q = quantize_matrix(x, spec, offsets=offsets, transpose=transpose)
        scale = q.spread_scale()
        scale = torch.ones((), device=x.device) if scale is None else scale
        v = values(q, torch.float32) * scale
        blocks = torch.ones(1, 1, device=x.device) if q.scales is None else q.scales.float()
        width = m.shape[1] if q.scales is None else spec.width
        most = FORMATS[spec.format].element.largest * blocks.repeat_interleave(width, 1) * scale
        size = m.abs()
        sums = [
            (m != 0).sum(), ((m != 0) & (v == 0)).sum(), (size > most * (1 + 2.0**-10)).sum(),
            (m - v).square().sum(dtype=torch.float64), m.square().sum(dtype=torch.float64),
        ]  # fmt: skip
        below = (blocks.amax() / blocks).log2().floor().clamp(0, BINS - 1)  # of scale 0: in the last bin
        found = torch.cat([torch.stack([s.double() for s in sums]), torch.histc(below, BINS, 0, BINS).double()])
        key = (name, operand)
        self.sums[key] = self.sums[key] + found if key in self.sums else found
        self.seconds += time.perf_counter() - began

    def record(self) -> dict[str, dict[str, dict]]:
        """Linear -> operand -> `flushed` and `saturated`, shares of the values that are not zero; `error`, the norm of
        what rounding changed over the norm of all; `scales`, the shares of block scales by how many powers of two they
        lie below the largest (the last: 2^-15 and less)."""
        found: dict[str, dict[str, dict]] = {}
        for (name, operand), s in sorted(self.sums.items()):
            count, flushed, saturated, error, norm, *bins = s.tolist()
            found.setdefault(name, {})[operand] = {
                "flushed": _digits(flushed / max(count, 1)),
                "saturated": _digits(saturated / max(count, 1)),
                "error": _digits((error / norm) ** 0.5 if norm else 0.0),
                "scales": [_digits(b / max(sum(bins), 1)) for b in bins],
            }
        return found


def _digits(x: float) -> float:
    return float(f"{x:.4g}")
