"""Number formats: stochastic rounding with counter-based random numbers.

Philox4x32 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", doi
10.1145/2063384.2063405) maps a counter of four words of 32 bits and a key of two to four random words. There is no
state to carry: the same counter and key give the same words on any device, in any batch.
"""

from collections.abc import Sequence

import torch
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
