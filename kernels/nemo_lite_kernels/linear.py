"""The product of a linear, y = x W^T, with weights as they are stored or packed to 8 or 4 bits.

Shape letters: M rows, K inputs, N outputs, E stacked matrices, p panels of 16 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_lite_kernels.common import product_dtype

PANEL = 16
AT_ONCE = 1 << 20  # weights that are packed at a time
GROUPS = (32, 64, 128)


class PackedWeight:
    """A weight [N, K] or [E, N, K] in 8- or 4-bit integers with one float16 scale per row and group of `group` inputs.

        w = scale * (code - zero),   zero = 128 (int8) or 8 (int4)

    codes   uint8 [.., p, K/4, 16, 4], or for int4 [.., p, K/8, 16, 4] whose low halves are 4 inputs, the high ones the
            next 4: rows of a panel side by side, as the CPU kernels read them.
    scales  float16 [.., p, groups, 16]
    """

    def __init__(self, codes: Tensor, scales: Tensor, shape: torch.Size, bits: int, group: int):
        self.codes, self.scales, self.shape, self.bits, self.group = codes, scales, shape, bits, group

    @classmethod
    def pack(cls, weight: Tensor, bits: int, group: int = 32) -> PackedWeight:
        """Round a weight to the nearest codes; int4 scales are those of least squared error among some candidates."""
        *stack, N, K = weight.shape
        if bits not in (8, 4) or group not in GROUPS or K % 32:
            raise ValueError(f"cannot pack {list(weight.shape)} to int{bits} in groups of {group}: "
                             "bits are 8 or 4, groups 32, 64 or 128, inputs a multiple of 32")  # fmt: skip
        panels, groups = -(-N // PANEL), -(-K // group)
        codes = torch.empty(*stack, panels, K // (32 // bits), PANEL, 4, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(*stack, panels, groups, PANEL, dtype=torch.float16, device=weight.device)
        flat = weight.detach().reshape(-1, N, K)
        # A few panels at a time: what is needed beside the result stays small.
        some = max(1, AT_ONCE // (PANEL * K))
        for w, c, s in zip(flat, codes.view(-1, *codes.shape[-4:]), scales.view(-1, *scales.shape[-3:])):
            for first in range(0, panels, some):
                part = w[first * PANEL : (first + some) * PANEL].float()
                here = slice(first, first + some)
                missing = len(s[here]) * PANEL - len(part)
                part = F.pad(part, (0, groups * group - K, 0, missing)).view(-1, groups, group)
                scale, q = _round8(part) if bits == 8 else _round4(part)
                s[here] = scale.view(-1, PANEL, groups).transpose(1, 2)
                q = q.view(-1, groups * group)[:, :K]
                if bits == 8:
                    c[here] = q.view(-1, PANEL, K // 4, 4).transpose(1, 2)
                else:
                    halves = q.view(-1, PANEL, K // 8, 2, 4)
                    c[here] = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2)
        return cls(codes, scales, weight.shape, bits, group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight these codes stand for, [.., N, K]."""
        *stack, N, K = self.shape
        codes = self.codes.transpose(-3, -2)  # [.., p, 16, K/4, 4]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-2)
        codes = codes.reshape(*stack, -1, K)[..., :N, :].to(dtype) - (128 if self.bits == 8 else 8)
        scales = self.scales.transpose(-2, -1).reshape(*stack, -1, self.scales.shape[-2])[..., :N, :].to(dtype)
        return codes.mul_(scales.repeat_interleave(self.group, dim=-1)[..., :K])

    def __getitem__(self, e: int) -> PackedWeight:
        return PackedWeight(self.codes[e], self.scales[e], torch.Size(self.shape[1:]), self.bits, self.group)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device


def _round8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [N, groups], codes [N, groups, group]."""
    scale = (w.abs().amax(-1) / 127).half()
    return scale, _codes(w, scale, 127, 128)


def _round4(w: Tensor) -> tuple[Tensor, Tensor]:
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_scale = best_error = None
    # The code -8 has no partner: the largest value is put there. A little clipping or slack often errs less.
    for steps in (8.0, 7.75, 7.5, 7.25, 7.0, 8.25, 8.5, 8.75):
        scale = (extreme / -steps).half()
        error = (_codes(w, scale, 8, 8).float().sub_(8).mul_(scale.float()[..., None]) - w).square_().sum(-1)
        if best_error is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale, _codes(w, best_scale, 8, 8)


def _codes(w: Tensor, scale: Tensor, most: int, zero: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    least = -most
    return (w * inverse[..., None]).round_().clamp_(least, most if zero == 128 else most - 1).add_(zero).to(torch.uint8)


def linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """y [.., N] = x [.., K] W^T in x's dtype, W cast to it: the reference."""
    kind = product_dtype(x)
    return F.linear(x.to(kind), unpack(weight, x.dtype).to(x.dtype).to(kind)).to(x.dtype)


def unpack(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """A tensor as it is; a packed weight as a tensor of this dtype."""
    return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight
