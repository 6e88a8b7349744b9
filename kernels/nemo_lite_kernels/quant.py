"""Number formats: NVFP4, MXFP8 and FP8 as exact number systems; stochastic rounding with counter-based random numbers.

    format      codes                       a scale for                    scale               and for the tensor
    nvfp4       E2M1, two a byte            1x16 or 16x16                  E4M3                A / (6 * 448)
    mxfp8       E4M3 (mxfp8_e5m2: E5M2)     1x32                           E8M0, rounded up    -
    fp8         E4M3 (fp8_e5m2: E5M2)       -                              -                   A / largest
    fp8_block   E4M3                        1x128 or 128x128               a power of two      -

A value is code x block scale x tensor scale; A is the largest magnitude of the tensor. Blocks lie along the last axis,
that of the contraction. Steps are in float32 and in this order, since another order gives other bits (a_b: largest
magnitude of the block; E4M3() and E2M1() round to the nearest, ties to even):

    nvfp4       S = min(6*448 / A, largest float32), 1 where A = 0;  s_b = E4M3(min(a_b * (S * (1/6)), 448));
                e_b = min(1 / (s_b * (1/S)), largest float32);  q = E2M1(clamp(x e_b, +-6))
    mxfp8       s_b = 2^ceil(log2(a_b * (1/448))), at least 2^-127;  q = E4M3(x / s_b)
    fp8         S = min(448 / A, largest float32), 1 where A = 0;  q = E4M3(clamp(x S, +-448)), tensor scale 1/S
    fp8_block   S_b = 2^floor(log2(min(448 / a_b, largest float32))), 1 where a_b = 0;  q = E4M3(x S_b), scale 1/S_b

These are Transformer Engine's steps and bits (2.20, without its fast math), but for its random bits (eight a number, of
torch's generator) and for what is not finite: here an infinity or a NaN makes the scale over it NaN (the tensor's, or
without one its block's), and so all that is read back under that scale: nothing is hidden, nothing is refused.

Code x block scale, without the tensor's scale, is exact in bfloat16 for every format (down to 2^-133, bfloat16's own
end): that is what an emulated product multiplies.

Stochastic rounding takes the upper one of a value's two neighbours with the probability of its place between them, in
steps of 2^-16. The random half words are those of Philox4x32-7 with the key `seed` (low, high word) and the counter
(i // 8 low, high, 0, 0) for element i of the padded matrix: word (i % 8) // 2, its low half first.

The random Hadamard transform multiplies every 16 values along the last axis by H = diag(signs) H16 / 4, H16 being
Sylvester's matrix. H is orthogonal: applied to both operands of a product along the contraction, it cancels. Sums are
in float32 and rounded to the input's dtype, before magnitudes are taken.

Philox4x32 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", doi
10.1145/2063384.2063405) maps a counter of four words of 32 bits and a key of two to four random words. There is no
state to carry: the same counter and key give the same words on any device, in any batch.

NVFP4 training: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149. MXFP8: OCP Microscaling
Formats 1.0, with the scale rounded up as in arXiv 2506.08027.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1
ROUNDS = 5
SPREAD = (0x9E3779B97F4A7C15 - (1 << 64), 0xD1B54A32D192ED03 - (1 << 64))  # odd, of 64 bits, as int64


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor | int], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four tensors of random words in [0, 2^32) from a counter of four words and a key of two.

    Words are int64 tensors that broadcast, or ints, in [0, 2^32). A round multiplies words 0 and 2 and crosses the
    halves: (c0, c1, c2, c3) -> (hi(m1 c2) ^ c1 ^ k0, lo(m1 c2), hi(m0 c0) ^ c3 ^ k1, lo(m0 c0)). The paper's choice is
    10 rounds; 7 pass its tests of randomness, and 5 do for rounding where counters differ in many bits.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap around, which leaves the 64 bits of the unsigned product as they are.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & WORD, p1 & WORD, ((p0 >> 32) ^ c3 ^ k1) & WORD, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def stochastic_round(
    x: Tensor, dtype: torch.dtype, seed: Tensor, offset: Tensor, stream: Tensor | int = 0, rounds: int = ROUNDS
) -> Tensor:
    """x [B, ...] in float16 or bfloat16: each value becomes one of its two neighbours, the nearer one more often, so
    that the expectation is the value itself.

    Seed and offset are int64 [B]. The choice depends on the element's index within its row, the row's seed, its offset
    (a position in the text) and the stream (int or int64 [B]: a layer, say), and on nothing else: not on other rows.
    Values that the format holds stay as they are, larger ones than its largest become that one, NaN stays. 16 random
    bits an element make the expectation exact from float32 to normal values of either format, and within 2^-17 of
    their spacing otherwise.
    """
    if not x.is_floating_point() or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"stochastic rounding goes from floating point to float16 or bfloat16, not {x.dtype} to {dtype}"
        )
    if x.dtype == dtype:
        return x
    info = torch.finfo(dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-info.max, info.max)  # x itself is not changed
    random = _bits(wide[0].numel() if len(wide) else 0, seed, offset, stream, rounds).reshape(wide.shape)
    # The distance between neighbours: eps times the power of two at or below |x|, which the exponent's bits are.
    bits, exponent = (torch.int64, 0x7FF << 52) if wide.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    spacing = (wide.view(bits) & exponent).view(wide.dtype).clamp_(min=info.tiny).mul_(info.eps)
    scaled = wide.div_(spacing)  # exact: a power of two
    down = scaled.floor()
    # Uniform in (0, 1) in steps of 2^-16 from half a step: a fraction of k steps goes up k times out of 2^16.
    uniform = random.to(wide.dtype).mul_(2.0**-16).add_(0.5 + 2.0**-17)
    rounded = scaled.sub_(down).add_(uniform).floor_().add_(down).mul_(spacing)
    return rounded.copysign_(x).to(dtype)  # for -0


def _bits(n: int, seed_B: Tensor, offset_B: Tensor, stream: Tensor | int, rounds: int) -> Tensor:
    """n random int16 a row, [B, n]: eight from every counter (block, offset and stream, 0)."""
    block = torch.arange(-(-n // 8), device=seed_B.device)
    # Counters or keys that differ in one low bit, as neighbouring positions do, are not yet apart after five rounds:
    # correlations of 0.3 to 1 were measured. Multiplied by an odd constant they differ in many bits, and stay distinct.
    key = (seed_B.to(torch.int64) * SPREAD[0])[:, None]
    place = (offset_B.to(torch.int64) * SPREAD[0] + torch.as_tensor(stream, device=seed_B.device) * SPREAD[1])[:, None]
    counter = (block, place & WORD, (place >> 32) & WORD, 0)
    w0, w1, w2, w3 = philox(counter, (key & WORD, (key >> 32) & WORD), rounds)
    return torch.stack([w0 | w1 << 32, w2 | w3 << 32], dim=-1).view(torch.int16).flatten(1)[:, :n]


# ------------------------------------------------------------------------------------------------------ number formats

FLT_MAX = torch.finfo(torch.float32).max
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # of the Hadamard transform, the same everywhere


@dataclass(frozen=True)
class Element:
    """Codes of a sign, an exponent and `mantissa` bits; numbers below 2^least are subnormal."""

    mantissa: int
    least: int
    largest: float
    dtype: torch.dtype  # of a tensor of codes; uint8 for two codes a byte


E2M1 = Element(1, 0, 6.0, torch.uint8)
E4M3 = Element(3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Element(2, -14, 57344.0, torch.float8_e5m2)


@dataclass(frozen=True)
class Format:
    """One row of the table at the top. blocks: (rows, columns) under one scale, the usual choice first."""

    element: Element
    blocks: tuple[tuple[int, int], ...] = ()
    scales: torch.dtype | None = None
    tensor_scale: bool = False


FORMATS = {
    "nvfp4": Format(E2M1, ((1, 16), (16, 16)), torch.float8_e4m3fn, tensor_scale=True),
    "mxfp8": Format(E4M3, ((1, 32),), torch.float8_e8m0fnu),
    "mxfp8_e5m2": Format(E5M2, ((1, 32),), torch.float8_e8m0fnu),
    "fp8": Format(E4M3, tensor_scale=True),
    "fp8_e5m2": Format(E5M2, tensor_scale=True),
    "fp8_block": Format(E4M3, ((1, 128), (128, 128)), torch.float32),
}

# What compiled backends call a format, by the dtype of its scales.
SCHEMES = {torch.float8_e4m3fn: 0, torch.float8_e8m0fnu: 1, None: 2, torch.float32: 3}


@dataclass(frozen=True)
class Spec:
    """How a matrix is quantised: a format's name, its block (None for one scale a tensor), rounding, rotation."""

    format: str
    block: tuple[int, int] | None = None
    stochastic: bool = False
    hadamard: bool = False

    @classmethod
    def of(cls, format: str, block=None, rounding: str = "nearest", hadamard: bool = False) -> Spec:
        """A checked Spec; ValueError, one sentence, for what does not exist."""
        if format not in FORMATS:
            raise ValueError(f"{format!r} is no number format; there are {', '.join(FORMATS)}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding is nearest or stochastic, not {rounding!r}")
        blocks = FORMATS[format].blocks
        block = tuple(block) if block is not None else (blocks[0] if blocks else None)
        if block is not None and block not in blocks:
            allowed = " or ".join(f"{rows}x{columns}" for rows, columns in blocks) or "none: one scale for the tensor"
            raise ValueError(f"{format} has no blocks of {'x'.join(map(str, block))}; its blocks are {allowed}")
        return cls(format, block, rounding == "stochastic", hadamard)

    @property
    def width(self) -> int:
        """What the contraction is padded to a multiple of, with zeros."""
        return self.block[1] if self.block is not None else 16 if self.hadamard else 1


@dataclass
class Quantized:
    """A matrix [R, K] in codes, or several (`segments`).

    codes         [R, P] float8, or [R, P/2] uint8 with two codes a byte, the even column in the low half; P is K padded
                  to a multiple of the block's width (each segment's own, where they split the contraction)
    scales        [R, P/width] in the format's dtype, repeated over the rows of a block; None without blocks
    tensor_scale  float32 [number of segments]; None for formats without one
    amax          float32 [number of segments]: largest magnitudes, where there is a tensor scale
    segments      int64 [n+1], where each matrix begins: rows, or padded columns if `across`; None for one matrix
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None
    spec: Spec
    shape: torch.Size
    amax: Tensor | None = None
    segments: Tensor | None = None
    across: bool = False

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.tensor_scale) if t is not None)

    @property
    def columns(self) -> int:
        """P."""
        return self.codes.shape[1] * (2 if FORMATS[self.spec.format].element is E2M1 else 1)

    def spread_scale(self) -> Tensor | None:
        """Each matrix's tensor scale where its elements are: a shape that broadcasts over [R, P]."""
        if self.tensor_scale is None or self.segments is None:
            return self.tensor_scale
        scale = self.tensor_scale.repeat_interleave(self.segments.diff())
        return scale if self.across else scale[:, None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, in the shape of what was quantised (rotated, if it was)."""
        v = _ops(self.codes.device.type).quantized_values(self, torch.float32)
        if (scale := self.spread_scale()) is not None:
            v = v * scale
        return v[:, : self.shape[-1]].reshape(self.shape).to(dtype) if not self.across else v.to(dtype)


def quantize(
    x: Tensor, format: str, block: tuple[int, int] | None = None, rounding: str = "nearest", seed: int = 0,
    *, hadamard: bool = False, amax: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """x [.., K] in codes. Leading dimensions are rows of one matrix, with one tensor scale.

    format      a key of FORMATS
    block       (rows, columns) under one scale (default: the format's first)
    rounding    "nearest" (ties to even) or "stochastic", with the random numbers of `seed`
    hadamard    transform the last axis first (its largest magnitude is then taken after that)
    amax        the tensor's largest magnitude, if it is not x's own: a calibrated or delayed one
    """
    spec = Spec.of(format, block, rounding, hadamard)
    return replace(_ops(x.device.type).quantize(x.reshape(-1, x.shape[-1]), spec, seed, amax), shape=x.shape)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes stand for: code x block scale x tensor scale in float32, then in `dtype`."""
    return q.dequantize(dtype)


class DelayedScaling:
    """FP8's delayed scaling (Micikevicius et al., arXiv 2209.05433): a tensor is scaled by the largest magnitude among
    its last `length` predecessors, which is known before the tensor is.

        q = scaling.quantize(x)      # x beyond those magnitudes saturates; the first one is scaled by its own
    """

    def __init__(self, format: str = "fp8", length: int = 1024):
        if FORMATS[format].blocks or not FORMATS[format].tensor_scale:
            raise ValueError(f"delayed scaling is for formats with one scale a tensor, and {format} is none")
        self.format, self.length = format, length
        self.history: list[float] = []  # the newest last; state to save and to restore

    def quantize(self, x: Tensor) -> Quantized:
        """x in codes; its largest magnitude joins the history, unless it is not finite."""
        amax = torch.tensor([max(self.history)], device=x.device) if self.history else None
        q = quantize(x, self.format, amax=amax)
        assert q.amax is not None
        if (own := float(q.amax)) < float("inf"):
            self.history = [*self.history, own][-self.length :]
        return q


def fake_quantize(
    x: Tensor, format: str, block: tuple[int, int] | None = None, rounding: str = "nearest", seed: int = 0,
    *, hadamard: bool = False, amax: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [.., K] rounded to the values that `quantize` can store, in x's dtype; the same arguments."""
    matrix, spec = x.reshape(-1, x.shape[-1]), Spec.of(format, block, rounding, hadamard)
    v, scale = _ops(x.device.type).operand(matrix, spec, seed, amax)
    v = v[:, : x.shape[-1]] if scale is None else v[:, : x.shape[-1]] * scale
    return v.reshape(x.shape).to(x.dtype)


@functools.cache
def _ops(device: str):
    """The fastest backend on a device."""
    from nemo_lite_kernels import select

    return select(device)


def hadamard(x: Tensor) -> Tensor:
    """Every 16 values along the last axis times H, in float32: signs, then sums and differences 1, 2, 4, 8 apart."""
    y = x.float().unflatten(-1, (-1, 16)) * torch.tensor(SIGNS, dtype=torch.float32, device=x.device)
    for apart in (1, 2, 4, 8):
        pairs = y.unflatten(-1, (-1, 2, apart))
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
    return (y * 0.25).flatten(-2)


def quantize_matrix(
    x: Tensor, spec: Spec, seed: int = 0, amax: Tensor | None = None, offsets: Tensor | None = None,
    transpose: bool = False,
) -> Quantized:  # fmt: skip
    """A matrix in codes, or a stack of them, each with a tensor scale of its own: the reference.

    x          float32, bfloat16 or float16 [R, K]; with `transpose` [K, R], and x.T is what is quantised
    amax       float32 [n]: largest magnitudes to scale by instead of the matrices' own
    offsets    int64 [n+1]: matrix i is rows offsets[i] to offsets[i+1] of x. Blocks start anew in each; with
               `transpose` each one's contraction is padded, and they stand side by side in the codes.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"number formats are made from float32, bfloat16 or float16, not from {x.dtype}")
    format, device = FORMATS[spec.format], x.device
    m, segment, starts, sizes = arrange(x, spec, offsets, transpose)
    rows, width = m.shape[0], spec.width
    top = m.abs().amax(0 if transpose else 1) if m.numel() else m.new_zeros(len(segment))
    own = m.new_zeros(len(sizes)).scatter_reduce(0, segment, top, "amax")
    A = own if amax is None else amax.to(own).expand_as(own)

    def over(per_matrix: Tensor, every: int) -> Tensor:
        """One number a matrix, where its elements are, every `every` columns."""
        return per_matrix[segment[::every]] if transpose else per_matrix[segment][:, None]

    # Tensors divide tensors: by a number, torch may multiply with its inverse instead.
    largest, one = (torch.tensor(x, device=device) for x in (format.element.largest, 1.0))
    if spec.block is None:
        step = torch.where(A > 0, (largest / A).clamp(max=FLT_MAX), 1.0)
        fine = own.isfinite()
        factor, scales, tensor_scale = over(step, 1), None, torch.where(fine, one / step, torch.nan)
        m = torch.where(over(fine, 1), m, 0.0)
    else:
        high = spec.block[0]
        blocks = m.abs().unflatten(-1, (-1, width)).amax(-1)  # [R, P/width]
        if high > 1:
            first = torch.arange(rows) - (0 if transpose else starts[:-1].repeat_interleave(sizes))
            new = (first % high == 0).to(device)
            group = new.cumsum(0) - 1
            most = blocks.new_zeros(int(new.sum()), blocks.shape[1])
            blocks = most.scatter_reduce(0, group[:, None].expand_as(blocks), blocks, "amax")[group]
        tensor_scale = None
        if format.tensor_scale:
            whole = torch.tensor(448.0 * 6.0, device=device)
            S = torch.where(A > 0, (whole / A).clamp(max=FLT_MAX), 1.0)
            S = torch.where(S > 0, S, 1.0)
            fine = own.isfinite()
            tensor_scale = torch.where(fine, A / whole, torch.nan)
            m = torch.where(over(fine, 1), m, 0.0)
            blocks = torch.where(over(fine, width), blocks, 0.0)
            wanted = blocks * over(S * (1 / torch.tensor(6.0, device=device)), width)
            scales = round_to(wanted.clamp(max=448.0), E4M3)[0]
            factor = (one / (scales * over(one / S, width))).clamp(max=FLT_MAX)
        else:
            fine = blocks.isfinite()
            m = torch.where(fine.repeat_interleave(width, 1), m, 0.0)
            blocks = torch.where(fine, blocks, 0.0)
            if format.scales == torch.float8_e8m0fnu:
                wanted = (blocks * (one / largest)).clamp(min=2.0**-127)
                bits = wanted.view(torch.int32)
                power = ((bits + 0x7FFFFF) >> 23).clamp(min=1) - 127  # rounded up
                power = torch.where(bits <= 0x400000, -127, power)  # float32 itself is subnormal there
                scales, factor = (
                    torch.ldexp(torch.ones_like(blocks), power),
                    torch.ldexp(torch.ones_like(blocks), -power),
                )
            else:
                factor = torch.where(blocks > 0, (largest / blocks).clamp(max=FLT_MAX), 1.0)
                factor = (factor.view(torch.int32) & 0x7F800000).view(torch.float32)
                scales = one / factor
            scales = torch.where(fine, scales, torch.nan)
        factor = factor.repeat_interleave(width, 1)
        assert format.scales is not None
        scales = scales.to(format.scales)

    random = None
    if spec.stochastic:
        key = (seed & WORD, seed >> 32 & WORD)
        block = torch.arange(-(-m.numel() // 8), device=device)
        w0, w1, w2, w3 = philox((block & WORD, block >> 32, 0, 0), key, rounds=7)
        words = torch.stack([w0 | w1 << 32, w2 | w3 << 32], dim=-1)
        random = words.view(torch.int16).flatten()[: m.numel()].view_as(m).to(torch.int32) & 0xFFFF
    _, code = round_to((m * factor).clamp(-largest, largest), format.element, random)
    code = code.to(torch.uint8)
    codes = code[:, 0::2] | code[:, 1::2] << 4 if format.element is E2M1 else code
    segments = None if offsets is None else starts.to(device)
    return assemble(x, spec, transpose, codes, scales, tensor_scale, own if format.tensor_scale else None, segments)


def places(x: Tensor, spec: Spec, offsets: Tensor | None, transpose: bool) -> tuple[Tensor, Tensor]:
    """Where each matrix begins, and the last one ends: among the rows of x, and among the rows of what is rounded (with
    `transpose` its columns, each matrix's padded). int64 [n+1], on the CPU."""
    bounds = torch.tensor([0, x.shape[0]]) if offsets is None else offsets.cpu()
    if not transpose:
        return bounds, bounds
    padded = (bounds.diff() + spec.width - 1) // spec.width * spec.width
    return bounds, F.pad(padded.cumsum(0), (1, 0))


def assemble(
    x: Tensor, spec: Spec, transpose: bool, codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None,
    amax: Tensor | None, starts: Tensor | None,
) -> Quantized:  # fmt: skip
    """What a backend made of x, codes as uint8."""
    q = Quantized(
        codes.view(FORMATS[spec.format].element.dtype), scales, tensor_scale, spec, x.shape, amax, starts, transpose
    )
    return replace(q, shape=torch.Size((len(codes), q.columns))) if transpose else q


def arrange(
    x: Tensor, spec: Spec, offsets: Tensor | None = None, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_matrix` rounds, in float32: turned round, padded, rotated, [R, P]; the matrix that each row (with
    `transpose` each column) belongs to; where each matrix begins among them; and the sizes of the matrices in x."""
    bounds, starts = places(x, spec, offsets, transpose)
    sizes, m = bounds.diff(), (x.T if transpose else x).float()
    if transpose:
        at = torch.arange(x.shape[0]) + (starts[:-1] - bounds[:-1]).repeat_interleave(sizes)
        wide = m.new_zeros(m.shape[0], int(starts[-1]))
        wide[:, at.to(x.device)] = m
        m = wide
    else:
        m = F.pad(m, (0, -m.shape[1] % spec.width))
    segment = torch.arange(len(sizes)).repeat_interleave(starts.diff())
    if spec.hadamard:
        m = hadamard(m).to(x.dtype).float()
    return m, segment.to(x.device), starts, sizes


def round_to(v: Tensor, element: Element, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """v float32, within the element's range: the magnitude's and sign's value, and the code as int32.

    random  int32 in [0, 2^16), to round stochastically
    """
    size, m = v.abs(), element.mantissa
    e = (size.view(torch.int32) >> 23).clamp(min=127 + element.least)
    units = size * ((254 + m - e) << 23).view(torch.float32)  # exact: of the distance between neighbours
    if random is None:
        n = units.round()
    else:
        n = units.floor()
        n = n + ((units - n) * 65536.0 > random.float() + 0.5)
    sign = torch.signbit(v).to(torch.int32) << (3 if element is E2M1 else 7)
    code = (e - 127 - element.least << m) + n.to(torch.int32) | sign
    return (n * ((e - m) << 23).view(torch.float32)).copysign(v), code


def values(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Code x block scale [R, P], exact in bfloat16 and float32: an operand of a product, without the tensor scale."""
    if FORMATS[q.spec.format].element is E2M1:
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=q.codes.device)
        table = torch.cat([table, -table])
        v = table[torch.stack([q.codes & 15, q.codes >> 4], dim=-1).long()].flatten(1)
    else:
        v = q.codes.float()
    if q.scales is not None:
        assert q.spec.block is not None
        v = v * q.scales.float().repeat_interleave(q.spec.block[1], dim=1)
    return v.to(dtype)


def operand(
    x: Tensor, spec: Spec, seed: int = 0, amax: Tensor | None = None, offsets: Tensor | None = None,
    transpose: bool = False, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`values` and tensor scale of what `quantize_matrix` makes, without keeping codes: [R, P], float32 [n] or None."""
    q = quantize_matrix(x, spec, seed, amax, offsets, transpose)
    return values(q, dtype), q.tensor_scale
