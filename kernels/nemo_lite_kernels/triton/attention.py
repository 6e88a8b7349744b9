"""Attention of a few new tokens over paged keys and values in Triton: decoding, and verifying drafts.

    y_blad = sum_p softmax_p(q_bla . k_bpk / sqrt(D)) v_bpkd       over places first <= p <= starts_b + first + l

Place p of row b lies in block table[b, p // size] at p % size. The query heads of one key head, and all new tokens,
read a key together. A row's places are cut into pieces of equal length, one program each, so that one long sequence
alone keeps a GPU busy; a second kernel joins the pieces by their maxima and sums (as FlashDecoding does). The number of
pieces follows from shapes alone and lengths are read on the device: a CUDA graph can hold it.

Shape letters: B batch, L new tokens, A query heads, K key/value heads, R = L * A/K queries of a key head, D head size,
Nb blocks, b their size, N blocks of a row, J pieces.
"""

import functools

import torch
import triton
import triton.language as tl

from nemo_lite_kernels import attention as reference
from nemo_lite_kernels.triton.norm import on_device

MANY = 64
PLACES = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # keys read at a time
QUERIES = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}  # the most that share them in a program


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def attention_paged(
    q_BLAD, k_NbKD, v_NbKD, table_BN, starts_B, first: int = 0, *,
    starts: list[int] | None = None, place: int | None = None, pieces: int | None = None,
):  # fmt: skip
    """As ``nemo_lite_kernels.attention.attention_paged``, which also takes what is longer than decoding and verifying.

    starts_B and table_BN are integer tensors on q's device. `pieces`: how many programs share a row (default: enough to
    fill the device).
    """
    B, L, A, D = q_BLAD.shape
    if L > MANY:  # a prompt: torch's attention has more work for a key than this
        return reference.attention_paged(q_BLAD, k_NbKD, v_NbKD, table_BN, starts_B, first, starts=starts, place=place)
    size, K = k_NbKD.shape[1:3]
    N = table_BN.shape[1]
    q, out = q_BLAD.contiguous(), q_BLAD.new_empty(B, L, A, D)
    if q.dtype not in PLACES:
        raise TypeError(f"the Triton attention takes float32, bfloat16 or float16, not {q.dtype}")
    if not out.numel():
        return out
    group = A // K
    BLOCK_R = min(QUERIES[q.dtype], max(16, triton.next_power_of_2(L * group)))
    tiles = triton.cdiv(L * group, BLOCK_R)
    if pieces is None:
        wanted = triton.cdiv(2 * _processors(q.device), B * K * tiles)
        pieces = max(1, min(wanted, triton.cdiv(N * size, 128)))
    part, log = out, out
    if pieces > 1:
        part = torch.empty(B, L, A, pieces, D, device=q.device)
        log = torch.empty(B, L, A, pieces, device=q.device)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    with on_device(q):
        # log2(e): powers of two are what the hardware has.
        _piece_kernel[B * K * tiles, pieces](
            q, k_NbKD, v_NbKD, table_BN, starts_B, part, log, first, L, K, D**-0.5 * 1.4426950408889634,
            *k_NbKD.stride(), *v_NbKD.stride(), *table_BN.stride(), starts_B.stride(0),
            GROUP=group, D=D, SIZE=size, BLOCK_R=BLOCK_R, BLOCK_P=PLACES[q.dtype], BLOCK_D=BLOCK_D, ONE=pieces == 1,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
        if pieces > 1:
            _join_kernel[B * L * A,](
                part, log, out, pieces, D=D, BLOCK_J=triton.next_power_of_2(pieces), BLOCK_D=BLOCK_D,
                num_warps=4 if pieces <= 64 else 8,
            )  # fmt: skip
    return out


@triton.jit
def _piece_kernel(
    q, k, v, table, starts, out, log, first, L, K, scale,
    k_block, k_place, k_head, k_d, v_block, v_place, v_head, v_d, table_b, table_n, starts_b,
    GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one row, for BLOCK_R of a key head's queries: the softmax over its places, not yet joined."""
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(L * GROUP, BLOCK_R)
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, b = row % K, (row // K).to(tl.int64)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    real = r < L * GROUP
    token, query = r // GROUP, r % GROUP
    at = (b * L + token) * (K * GROUP) + head * GROUP + query  # row of [B, L, A]
    d = tl.arange(0, BLOCK_D)
    q_RD = tl.load(q + at[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)

    place_R = tl.load(starts + b * starts_b).to(tl.int32) + first + token
    stop = tl.load(starts + b * starts_b).to(tl.int32) + first + L
    length = tl.cdiv(tl.cdiv(stop - first, BLOCK_P), pieces) * BLOCK_P
    low = first + piece * length
    high = tl.minimum(low + length, stop)

    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for p0 in range(low, high, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        there = p < high
        block = tl.load(table + b * table_b + (p // SIZE) * table_n, mask=there, other=0).to(tl.int64)
        inside = there[:, None] & (d < D)[None, :]
        k_at = block * k_block + (p % SIZE) * k_place + head * k_head
        k_PD = tl.load(k + k_at[:, None] + d[None, :] * k_d, mask=inside, other=0.0)
        score = tl.dot(q_RD, tl.trans(k_PD), input_precision=PRECISION) * scale
        score = tl.where(there[None, :] & (p[None, :] <= place_R[:, None]), score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen nothing yet
        share = tl.exp2(score - safe[:, None])
        keep = tl.exp2(best - safe)
        total = total * keep + tl.sum(share, 1)
        v_at = block * v_block + (p % SIZE) * v_place + head * v_head
        v_PD = tl.load(v + v_at[:, None] + d[None, :] * v_d, mask=inside, other=0.0)
        acc = tl.dot(share.to(v_PD.dtype), v_PD, acc * keep[:, None], input_precision=PRECISION)
        best = new
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if ONE:
        o_at = out + at[:, None] * D + d[None, :]
        tl.store(o_at, acc.to(out.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])
    else:
        at = at * pieces + piece
        tl.store(out + at[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])
        tl.store(log + at, best + tl.log2(total), mask=real)  # -inf for a piece with nothing to see


@triton.jit
def _join_kernel(part, log, out, pieces, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """One query: its pieces, weighted by their sums of exponentials."""
    at = tl.program_id(0).to(tl.int64)
    j, d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    log_J = tl.load(log + at * pieces + j, mask=j < pieces, other=float("-inf"))
    share = tl.exp2(log_J - tl.max(log_J, 0))  # a query sees itself at least: the maximum is finite
    seen = (log_J > float("-inf"))[:, None] & (d < D)[None, :]
    values = tl.load(part + (at * pieces + j)[:, None] * D + d[None, :], mask=seen, other=0.0)
    y = tl.sum(values * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + at * D + d, y.to(out.dtype.element_ty), mask=d < D)
