"""State-space duality on CUDA devices: the chunked scan, forward and backward, and the few tokens of decoding.

The functions are those of ``nemo_lite_kernels.ssd``, which has the equations and the shape letters; sums are float32.
The scan is the block decomposition of arXiv 2405.21060, section 6, in chunks of Q tokens (a power of two, 16 to 128).
With a_t = dt_t A, s_t the sum of a up to and with t inside its chunk, S the state a chunk starts from, and decays that
are zero across the start of a document:

    y_i = exp(s_i) S C_i + sum_{j <= i} exp(s_i - s_j) (C_i . B_j) dt_j x_j + D x_i
    S'  = exp(s_Q) S + sum_j exp(s_Q - s_j) dt_j x_j B_j^T

Forward: ``_cumulate`` sums logarithms; ``_pass`` goes through the chunks of a head with the state in registers and
stores S for each; ``_scan`` makes y. Backward: ``_pass`` in reverse does the same for the gradient of S'; ``_grad_x``
and ``_grad_rows`` make the gradients of x, B and C; ``_finish`` those of the logarithms. Nothing of size Q x Q is kept
but one sum over the heads of a group, inside the backward pass. ``_scan`` and the gradients work on one chunk of one
*group*, so that scores C B^T are built once for all its heads. Sums have a fixed order: there are no atomics.

Logarithms are kept to the base 2, as the hardware raises 2 to a power. Only their differences are raised.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # of float32 inputs: three products of 19-bit numbers, about as exact
FEW = 16  # up to so many tokens without gradients are a recurrence in registers
PROGRAMS = 264  # what fills a large device twice
CHUNK = 128  # the longest chunk: two tiles
FLOAT32_CHUNK = 64  # of inputs twice as wide
TILE = 64  # rows of a chunk that one program of the products takes


def _tuned(*choices: tuple[int, int]):
    """Measured once per shape, on the device: the best of a few (warps, stages)."""
    if triton.knobs.runtime.interpret:
        choices = choices[:1]
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in choices]
    return triton.autotune(configs, key=["H", "P", "N", "CHUNK"])


# ---------------------------------------------------------------------------------------------------- pieces of kernels


@triton.jit
def _segments(seg, b, c, L, CHUNK: tl.constexpr):
    """The document before chunk c and the one at its end. Document 0 is the one of the state carried in."""
    row = seg + b.to(tl.int64) * L
    before = tl.load(row + c * CHUNK - 1, mask=c > 0, other=0)
    return before, tl.load(row + tl.minimum((c + 1) * CHUNK, L) - 1)


@triton.jit
def _rows(base, l, left, stride, columns, WIDTH: tl.constexpr):
    """Rows l of a matrix whose first `left` rows and first WIDTH columns exist; 0 elsewhere."""
    return tl.load(
        base + l[:, None] * stride + columns[None, :],
        mask=(l < left)[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _matrix(base, p, n, P: tl.constexpr, N: tl.constexpr):
    """A contiguous P x N matrix, a state; 0 beyond it."""
    return tl.load(base + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _cumulate(
    dt, A, cum, steps, L, padded, s_b, s_l, H: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """cum_BHL: sums of log2 decays from each chunk's start; steps_BHL: dt with the tokens of a head in a row."""
    c, b = tl.program_id(0), tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    l = c * CHUNK + tl.arange(0, CHUNK)
    inside = (l < L)[:, None] & (h < H)[None, :]
    step = tl.load(dt + b.to(tl.int64) * s_b + l.to(tl.int64)[:, None] * s_l + h[None, :], mask=inside, other=0.0)
    step = step.to(tl.float32)
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32) * LOG2E
    out = (b.to(tl.int64) * H + h)[None, :] * padded + l[:, None]
    tl.store(steps + out, step, mask=(h < H)[None, :])
    tl.store(cum + out, tl.cumsum(step * a[None, :], axis=0), mask=(h < H)[None, :])


@_tuned((4, 3), (4, 2), (4, 4), (8, 3))
@triton.jit
def _pass(
    u, v, cum, steps, seg, first, states, last, other, inner, L, chunks, s_ub, s_ul, s_vb, s_vl,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_SEG: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The recurrence over chunks of one head, S' = whole S + sum_l weight_l u_l v_l^T, on a tile of P x N.

    Forward u, v are x, B and a token's weight is its step and its decay to the chunk's end; `states` are the chunks'
    first ones. In reverse u, v are the gradient of y and C, the weight is the decay from the chunk's start, `states`
    are gradients at the chunks' ends, and `inner` becomes the gradient of the logarithm of `whole`: their products with
    `other`, the forward's states, summed over the columns of the tile.
    """
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n_tile = tile % n_tiles
    p = tile // n_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    l = tl.arange(0, CHUNK)
    row = b.to(tl.int64) * H + h
    u += b.to(tl.int64) * s_ub + h * P
    v += b.to(tl.int64) * s_vb + h // (H // G) * N
    cum += row * chunks * CHUNK
    steps += row * chunks * CHUNK
    inside = (p < P)[:, None] & (n < N)[None, :]
    at = p[:, None] * N + n[None, :]
    if HAS_FIRST:
        state = tl.load(first + row * P * N + at, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        left = L - c * CHUNK
        start = (c * CHUNK).to(tl.int64)
        sums = tl.load(cum + start + l)
        whole = tl.load(cum + start + CHUNK - 1)
        if REVERSE:
            weight = tl.exp2(sums)
        else:
            weight = tl.exp2(whole - sums) * tl.load(steps + start + l)
        whole = tl.exp2(whole)
        if HAS_SEG:
            before, end = _segments(seg, b, c, L, CHUNK)
            document = tl.load(seg + b.to(tl.int64) * L + start + l, mask=l < left, other=-1)
            weight = tl.where(document == (before if REVERSE else end), weight, 0.0)
            whole = tl.where(before == end, whole, 0.0)
        block = (b.to(tl.int64) * chunks + c) * H + h
        tl.store(states + block * P * N + at, state.to(states.dtype.element_ty), mask=inside)
        if REVERSE:
            forward = tl.load(other + block * P * N + at, mask=inside, other=0.0).to(tl.float32)
            products = tl.sum(state * forward, axis=1) * whole
            tl.store(inner + (block * n_tiles + n_tile) * P + p, products, mask=p < P)
        u_lp = _rows(u + start * s_ul, l, left, s_ul, p, P)
        v_ln = _rows(v + start * s_vl, l, left, s_vl, n, N)
        u_lp = (u_lp.to(tl.float32) * weight[:, None]).to(v_ln.dtype)
        state = tl.dot(tl.trans(u_lp), v_ln, state * whole, input_precision=PRECISION)
    tl.store(last + row * P * N + at, state, mask=inside)


@_tuned((4, 2), (4, 3), (4, 1))
@triton.jit
def _scan(
    x, B, C, D, cum, steps, seg, states, y, L, chunks, heads, s_xb, s_xl, s_Bb, s_Bl, s_Cb, s_Cl,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_M tokens of a chunk, for `heads` heads of a group one after the other."""
    tiles: tl.constexpr = CHUNK // BLOCK_M
    c, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    h0 = g * (H // G) + tl.program_id(1) * heads
    i, j = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, CHUNK)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start, left = (c * CHUNK).to(tl.int64), L - c * CHUNK
    x += b.to(tl.int64) * s_xb + start * s_xl
    y += (b.to(tl.int64) * L + start) * H * P
    C_in = _rows(C + b.to(tl.int64) * s_Cb + start * s_Cl + g * N, i, left, s_Cl, n, N)
    B_jn = _rows(B + b.to(tl.int64) * s_Bb + start * s_Bl + g * N, j, left, s_Bl, n, N)
    scores = tl.dot(C_in, tl.trans(B_jn), input_precision=PRECISION)
    visible = i[:, None] >= j[None, :]
    reached = i < left
    if HAS_SEG:
        before, _ = _segments(seg, b, c, L, CHUNK)
        row = seg + b.to(tl.int64) * L + start
        seg_i, seg_j = tl.load(row + i, mask=i < left, other=-1), tl.load(row + j, mask=j < left, other=-1)
        visible = visible & (seg_i[:, None] == seg_j[None, :])
        reached = seg_i == before
    scores = tl.where(visible, scores, 0.0)
    for k in range(heads):
        h = h0 + k
        logs = cum + (b.to(tl.int64) * H + h) * chunks * CHUNK + start
        cum_i, cum_j = tl.load(logs + i), tl.load(logs + j)
        step_j = tl.load(steps + (b.to(tl.int64) * H + h) * chunks * CHUNK + start + j)
        state = _matrix(states + ((b.to(tl.int64) * chunks + c) * H + h) * P * N, p, n, P, N)
        x_jp = _rows(x + h * P, j, left, s_xl, p, P)
        # Hidden pairs have score 0; the minimum keeps their decay finite.
        mixed = tl.exp2(tl.minimum(cum_i[:, None] - cum_j[None, :], 0.0)) * step_j[None, :] * scores
        carried = tl.where(reached, tl.exp2(cum_i), 0.0)
        y_ip = tl.dot(C_in, tl.trans(state), input_precision=PRECISION) * carried[:, None]
        y_ip = tl.dot(mixed.to(x_jp.dtype), x_jp, y_ip, input_precision=PRECISION)
        y_ip += _rows(x + h * P, i, left, s_xl, p, P).to(tl.float32) * tl.load(D + h).to(tl.float32)
        tl.store(
            y + i[:, None] * (H * P) + (h * P + p)[None, :],
            y_ip.to(y.dtype.element_ty),
            mask=(i < left)[:, None] & (p < P)[None, :],
        )


@triton.jit
def _pairs(scores, total, x_jp, dy_ip, cum_i, cum_j, step_j):
    """What a tile of pairs adds to dscores, and per unit of dt_j their products with the scores, their weights in y and
    the products x_j . dy_i. A hidden pair has score 0; its part of dscores is masked where dscores is read."""
    decay = tl.exp2(tl.minimum(cum_i[None, :] - cum_j[:, None], 0.0))
    pairs = tl.dot(x_jp, tl.trans(dy_ip), input_precision=PRECISION)
    total += pairs * decay * step_j[:, None]
    mixed = decay * scores
    return total, pairs * mixed, mixed, pairs


@_tuned((4, 2), (4, 1), (4, 3))
@triton.jit
def _grad_x(
    dy, x, B, C, D, cum, steps, seg, dstates, dx, dsteps, dscores, rows, ends, dD, L, chunks, heads,
    s_yb, s_yl, s_xb, s_xl, s_Bb, s_Bl, s_Cb, s_Cl, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Gradients through what BLOCK_M tokens j give to later tokens i of the chunk and to the state at its end.

    dx; dsteps, of dt where it multiplies x; dscores [j, i], of C_i . B_j, summed over the heads; and of the logarithms:
    rows, a token's sum over what it receives from the tile, and ends, what the tile gives to the end. What a token
    gives is dsteps times dt. A chunk is one tile or two; the second one is `far` from the first.
    """
    tiles: tl.constexpr = CHUNK // BLOCK_M
    c, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    split, splits = tl.program_id(1), tl.num_programs(1)
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    batch = tl.num_programs(2) // G
    h0 = g * (H // G) + split * heads
    around = tl.arange(0, BLOCK_M)
    j = tile * BLOCK_M + around
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start, left = (c * CHUNK).to(tl.int64), L - c * CHUNK
    dy += b.to(tl.int64) * s_yb + start * s_yl
    x += b.to(tl.int64) * s_xb + start * s_xl
    C += b.to(tl.int64) * s_Cb + start * s_Cl + g * N
    dx += (b.to(tl.int64) * L + start) * H * P
    B_jn = _rows(B + b.to(tl.int64) * s_Bb + start * s_Bl + g * N, j, left, s_Bl, n, N)
    visible = around[None, :] >= around[:, None]
    kept = j < left
    if HAS_SEG:
        _, end = _segments(seg, b, c, L, CHUNK)
        row = seg + b.to(tl.int64) * L + start
        seg_j = tl.load(row + j, mask=j < left, other=-1)
        visible = visible & (tl.load(row + j, mask=j < left, other=-1)[None, :] == seg_j[:, None])
        kept = seg_j == end
    scores = tl.dot(B_jn, tl.trans(_rows(C, j, left, s_Cl, n, N)), input_precision=PRECISION)
    scores = tl.where(visible, scores, 0.0)
    total = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    if tiles == 2:
        i = BLOCK_M + around
        far_left = tl.where(tile == 0, left, 0)  # the second tile has nothing far from it
        far_scores = tl.dot(B_jn, tl.trans(_rows(C, i, far_left, s_Cl, n, N)), input_precision=PRECISION)
        if HAS_SEG:
            seg_i = tl.load(row + i, mask=i < left, other=-1)
            far_scores = tl.where(seg_i[None, :] == seg_j[:, None], far_scores, 0.0)
        far_total = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    for k in range(heads):
        h = h0 + k
        at = (b.to(tl.int64) * H + h) * chunks * CHUNK + start
        cum_j, step_j, cum_end = tl.load(cum + at + j), tl.load(steps + at + j), tl.load(cum + at + CHUNK - 1)
        x_jp, dy_jp = _rows(x + h * P, j, left, s_xl, p, P), _rows(dy + h * P, j, left, s_yl, p, P)
        dstate = _matrix(dstates + ((b.to(tl.int64) * chunks + c) * H + h) * P * N, p, n, P, N)
        # Through the state at the chunk's end, per unit of dt.
        to_end = tl.where(kept, tl.exp2(cum_end - cum_j), 0.0)
        dx_jp = tl.dot(B_jn, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
        given = tl.sum(dx_jp * x_jp.to(tl.float32), axis=1)
        dx_jp *= step_j[:, None]
        partial = ((b.to(tl.int64) * chunks + c) * H + h) * tiles + tile
        tl.store(ends + partial, tl.sum(given * step_j, axis=0))
        # Through the tokens of the tile, and straight through D x.
        total, products, mixed, pairs = _pairs(scores, total, x_jp, dy_jp, cum_j, cum_j, step_j)
        given += tl.sum(products, axis=1)
        received = rows + tile.to(tl.int64) * batch * H * chunks * CHUNK + at
        tl.store(received + j, tl.sum(products * step_j[:, None], axis=0))
        straight = around[None, :] == around[:, None]
        tl.store(dD + partial, tl.sum(tl.sum(tl.where(straight, pairs, 0.0), axis=1), axis=0))
        mixed = mixed * step_j[:, None] + tl.where(straight, tl.load(D + h).to(tl.float32), 0.0)
        dx_jp = tl.dot(mixed.to(dy_jp.dtype), dy_jp, dx_jp, input_precision=PRECISION)
        if tiles == 2:
            dy_ip = _rows(dy + h * P, i, far_left, s_yl, p, P)
            far_total, products, mixed, pairs = _pairs(
                far_scores, far_total, x_jp, dy_ip, tl.load(cum + at + i), cum_j, step_j
            )
            given += tl.sum(products, axis=1)
            # The second tile gives nothing to the first one, and says so.
            tl.store(received + tl.where(tile == 0, i, around), tl.sum(products * step_j[:, None], axis=0))
            dx_jp = tl.dot((mixed * step_j[:, None]).to(dy_ip.dtype), dy_ip, dx_jp, input_precision=PRECISION)
        tl.store(dsteps + at + j, given)
        tl.store(
            dx + j[:, None] * (H * P) + (h * P + p)[None, :],
            dx_jp.to(dx.dtype.element_ty),
            mask=(j < left)[:, None] & (p < P)[None, :],
        )
    dscores += (((b.to(tl.int64) * chunks + c) * G + g) * splits + split) * CHUNK * CHUNK + j[:, None] * CHUNK
    tl.store(dscores + j[None, :], total.to(dscores.dtype.element_ty))
    if tiles == 2:
        other = tl.where(tile == 0, i, around)
        tl.store(dscores + other[None, :], far_total.to(dscores.dtype.element_ty))


@_tuned((4, 2), (4, 3), (4, 4), (4, 1))
@triton.jit
def _grad_rows(
    u, v, w, cum, steps, seg, states, dscores, dw, received, L, chunks, splits, s_ub, s_ul, s_vb, s_vl, s_wb, s_wl,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SEG: tl.constexpr, OF_C: tl.constexpr,
):  # fmt: skip
    """The gradient dw of C or of B (w) for BLOCK_M tokens, summed over the heads of a group.

    Of C: u is the gradient of y, v is B, `states` start the chunks; and `received` is, per head, the gradient of the
    logarithm through what a token receives from the chunk's start. Of B: u is x, v is C, `states` are the gradients at
    the chunks' ends.
    """
    tiles: tl.constexpr = CHUNK // BLOCK_M
    c, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    g, b = tl.program_id(1), tl.program_id(2)
    l, other = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, CHUNK)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start, left = (c * CHUNK).to(tl.int64), L - c * CHUNK
    u += b.to(tl.int64) * s_ub + start * s_ul
    reached = l < left
    if HAS_SEG:
        before, end = _segments(seg, b, c, L, CHUNK)
        seg_l = tl.load(seg + b.to(tl.int64) * L + start + l, mask=l < left, other=-1)
        reached = seg_l == (before if OF_C else end)
    if OF_C:
        w_ln = _rows(w + b.to(tl.int64) * s_wb + start * s_wl + g * N, l, left, s_wl, n, N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(H // G):
        h = g * (H // G) + k
        at = (b.to(tl.int64) * H + h) * chunks * CHUNK + start
        if OF_C:
            weight = tl.exp2(tl.load(cum + at + l))
        else:
            weight = tl.exp2(tl.load(cum + at + CHUNK - 1) - tl.load(cum + at + l)) * tl.load(steps + at + l)
        weight = tl.where(reached, weight, 0.0)
        u_lp = _rows(u + h * P, l, left, s_ul, p, P)
        state = _matrix(states + ((b.to(tl.int64) * chunks + c) * H + h) * P * N, p, n, P, N)
        wide = u_lp.to(tl.float32) * weight[:, None]
        total = tl.dot(wide.to(u_lp.dtype), state, total, input_precision=PRECISION)
        if OF_C:
            product = tl.dot(w_ln, tl.trans(state), input_precision=PRECISION)
            tl.store(received + at + l, tl.sum(product * wide, axis=1))
    # Through the scores, [j, i] of B_j and C_i.
    j, i = (other, l) if OF_C else (l, other)
    visible = i[None, :] >= j[:, None]
    if HAS_SEG:
        row = seg + b.to(tl.int64) * L + start
        seg_i, seg_j = tl.load(row + i, mask=i < left, other=-1), tl.load(row + j, mask=j < left, other=-1)
        visible = visible & (seg_i[None, :] == seg_j[:, None])
    mixed = tl.zeros([CHUNK, BLOCK_M] if OF_C else [BLOCK_M, CHUNK], dtype=tl.float32)
    dscores += ((b.to(tl.int64) * chunks + c) * G + g) * splits * CHUNK * CHUNK + j[:, None] * CHUNK + i[None, :]
    for s in range(splits):
        mixed += tl.load(dscores + s * CHUNK * CHUNK, mask=visible, other=0.0).to(tl.float32)
    v_on = _rows(v + b.to(tl.int64) * s_vb + start * s_vl + g * N, other, left, s_vl, n, N)
    mixed = mixed.to(v_on.dtype)
    if OF_C:
        mixed = tl.trans(mixed)
    total = tl.dot(mixed, v_on, total, input_precision=PRECISION)
    tl.store(
        dw + ((b.to(tl.int64) * L + start + l) * G + g)[:, None] * N + n[None, :],
        total.to(dw.dtype.element_ty),
        mask=(l < left)[:, None] & (n < N)[None, :],
    )


@triton.jit
def _finish(
    A, steps, dsteps, rows, received, ends, ddt, dA, L, chunks, size, H: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, and each chunk's part of A's, from those of the sums of logarithms."""
    c, b = tl.program_id(0), tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    l = tl.arange(0, CHUNK)
    inside = (h < H)[:, None]
    at = (b.to(tl.int64) * H + h)[:, None] * chunks * CHUNK + c * CHUNK + l[None, :]
    step = tl.load(steps + at, mask=inside, other=0.0)
    direct = tl.load(dsteps + at, mask=inside, other=0.0)
    dcum = tl.load(received + at, mask=inside, other=0.0) - direct * step
    for tile in range(TILES):
        dcum += tl.load(rows + tile * size + at, mask=inside, other=0.0)
    block = (b.to(tl.int64) * chunks + c) * H + h
    dlog = tl.cumsum(dcum, axis=1, reverse=True) + tl.load(ends + block, mask=h < H, other=0.0)[:, None]
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    out = (b.to(tl.int64) * L + c * CHUNK + l)[None, :] * H + h[:, None]
    tl.store(
        ddt + out, (direct + a[:, None] * dlog).to(ddt.dtype.element_ty), mask=inside & (c * CHUNK + l < L)[None, :]
    )
    tl.store(dA + block, tl.sum(dlog * step, axis=1), mask=h < H)


@triton.jit
def _few(
    x, dt, A, B, C, D, state, counts, y, after, L, s_xb, s_xl, s_tb, s_tl, s_a, s_Bb, s_Bl, s_Cb, s_Cl,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_STATE: tl.constexpr, HAS_COUNTS: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """The recurrence on BLOCK_P rows of one head's state, read once: y of the tokens, the state after them, or both."""
    h, b = tl.program_id(1), tl.program_id(2)
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    at = (b.to(tl.int64) * H + h) * P * N + p[:, None] * N + n[None, :]
    if HAS_STATE:
        S = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    a = tl.load(A + b * s_a + h).to(tl.float32) * LOG2E
    x += b.to(tl.int64) * s_xb + h * P
    dt += b.to(tl.int64) * s_tb + h
    B += b.to(tl.int64) * s_Bb + h // (H // G) * N
    tokens = L
    if HAS_COUNTS:
        tokens = tl.minimum(tl.load(counts + b).to(tl.int32), L)
    for t in range(tokens):
        step = tl.load(dt + t * s_tl).to(tl.float32)
        x_p = tl.load(x + t * s_xl + p, mask=p < P, other=0.0).to(tl.float32)
        B_n = tl.load(B + t * s_Bl + n, mask=n < N, other=0.0).to(tl.float32)
        S = S * tl.exp2(step * a) + (x_p * step)[:, None] * B_n[None, :]
        if HAS_Y:
            C_at = b.to(tl.int64) * s_Cb + t * s_Cl + h // (H // G) * N + n
            C_n = tl.load(C + C_at, mask=n < N, other=0.0).to(tl.float32)
            y_p = tl.sum(S * C_n[None, :], axis=1) + x_p * tl.load(D + h).to(tl.float32)
            tl.store(y + ((b.to(tl.int64) * L + t) * H + h) * P + p, y_p.to(y.dtype.element_ty), mask=p < P)
    if HAS_AFTER:
        tl.store(after + at, S, mask=inside)


# ------------------------------------------------------------------------------------------------------------- launches


def _inner(t: Tensor) -> Tensor:
    """t, copied if one token's values are not contiguous: kernels take strides of rows and tokens only."""
    size = 1
    for d in range(t.dim() - 1, 1, -1):
        if t.shape[d] > 1 and t.stride(d) != size:
            return t.contiguous()
        size *= t.shape[d]
    return t


def _power(n: int) -> int:
    """The block that holds n: a power of two, and no less than matrix products take."""
    return max(16, triton.next_power_of_2(n))


class _Shapes:
    """The sizes of one scan, as its kernels want them."""

    def __init__(self, x: Tensor, B: Tensor, chunk_size: int):
        self.B, self.L, self.H, self.P = x.shape
        self.G, self.N = B.shape[2:]
        most = CHUNK if x.dtype.itemsize == 2 else FLOAT32_CHUNK
        self.Q = max(16, min(most, 1 << chunk_size.bit_length() - 1, _power(self.L)))
        self.chunks = -(-self.L // self.Q)
        self.BLOCK_M = min(TILE, self.Q)
        self.tiles = self.Q // self.BLOCK_M
        self.BLOCK_P, self.BLOCK_N = _power(self.P), _power(self.N)
        r = self.H // self.G
        self.splits = 1
        while r % (2 * self.splits) == 0 and self.products * self.splits < 2 * PROGRAMS:
            self.splits *= 2
        self.heads = r // self.splits

    @property
    def products(self) -> int:
        return self.chunks * self.tiles * self.B * self.G

    @property
    def sizes(self) -> dict:
        return {"H": self.H, "G": self.G, "P": self.P, "N": self.N, "CHUNK": self.Q}

    @property
    def blocks(self) -> dict:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_P": self.BLOCK_P, "BLOCK_N": self.BLOCK_N}

    @property
    def per_group(self) -> tuple[int, int, int]:
        return self.chunks * self.tiles, self.splits, self.B * self.G

    def state_tiles(self) -> tuple[int, int]:
        """The tile of P x N for a pass over the chunks: smaller ones where heads alone do not fill the device."""
        p, n = min(self.BLOCK_P, 64), min(self.BLOCK_N, 128)
        while self.B * self.H * -(-self.P // p) * -(-self.N // n) < PROGRAMS and p * n > 1024:
            p, n = (p, n // 2) if n >= p else (p // 2, n)
        return p, n

    def cumulate(self, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        cum = torch.empty(self.B, self.H, self.chunks * self.Q, dtype=torch.float32, device=dt.device)
        steps = torch.empty_like(cum)
        block = min(16, triton.next_power_of_2(self.H))
        _cumulate[self.chunks, triton.cdiv(self.H, block), self.B](
            dt, A, cum, steps, self.L, cum.shape[2], dt.stride(0), dt.stride(1), self.H, self.Q, block
        )  # fmt: skip
        return cum, steps

    def run_pass(self, u, v, cum, steps, seg, first, dtype, other=None):
        """States of all chunks [B, c, H, P, N], the last one, and in reverse (with `other`) `inner` [B, c, H]."""
        p, n = self.state_tiles()
        n_tiles = -(-self.N // n)
        states = torch.empty(self.B, self.chunks, self.H, self.P, self.N, dtype=dtype, device=u.device)
        last = torch.empty(self.B, self.H, self.P, self.N, dtype=torch.float32, device=u.device)
        reverse, inner = other is not None, None
        if reverse:
            inner = torch.empty(self.B, self.chunks, self.H, n_tiles * self.P, dtype=torch.float32, device=u.device)
        _pass[-(-self.P // p) * n_tiles, self.H, self.B](
            u, v, cum, steps, seg, first, states, last, other, inner, self.L, self.chunks, u.stride(0), u.stride(1),
            v.stride(0), v.stride(1), **self.sizes, BLOCK_P=p, BLOCK_N=n, HAS_SEG=seg is not None,
            HAS_FIRST=first is not None, REVERSE=reverse,
        )  # fmt: skip
        return states, last, None if inner is None else inner.sum(-1)


class _SSD(torch.autograd.Function):
    """Kept for the backward pass: the inputs, and each chunk's first state in x's dtype."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, seg, state, chunk_size):
        shapes = _Shapes(x, B, chunk_size)
        cum, steps = shapes.cumulate(dt, A)
        states, last, _ = shapes.run_pass(x, B, cum, steps, seg, state, x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _scan[shapes.per_group](
            x, B, C, D, cum, steps, seg, states, y, shapes.L, shapes.chunks, shapes.heads, x.stride(0), x.stride(1),
            B.stride(0), B.stride(1), C.stride(0), C.stride(1), **shapes.sizes, **shapes.blocks,
            HAS_SEG=seg is not None,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, seg, states)
        ctx.shapes, ctx.state_dtype = shapes, None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, seg, states = ctx.saved_tensors
        shapes = ctx.shapes
        with _on(x):
            return (*_gradients(shapes, dy, dlast, x, dt, A, B, C, D, seg, states, ctx.state_dtype), None)


def _gradients(shapes: _Shapes, dy, dlast, x, dt, A, B, C, D, seg, states, state_dtype):
    has_seg, sizes, blocks, tiles = seg is not None, shapes.sizes, shapes.blocks, shapes.tiles
    dy = torch.zeros_like(x) if dy is None else _inner(dy)
    dlast = None if dlast is None else dlast.contiguous()
    cum, steps = shapes.cumulate(dt, A)
    dstates, dstate, inner = shapes.run_pass(dy, C, cum, steps, seg, dlast, x.dtype, states)

    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    dsteps, received, rows = torch.empty_like(cum), torch.empty_like(cum), cum.new_empty(tiles, *cum.shape)
    ends, dD = cum.new_empty(2, shapes.B, shapes.chunks, shapes.H, tiles)
    groups = shapes.B, shapes.chunks, shapes.G
    dscores = torch.empty(*groups, shapes.splits, shapes.Q, shapes.Q, dtype=x.dtype, device=x.device)
    _grad_x[shapes.per_group](
        dy, x, B, C, D, cum, steps, seg, dstates, dx, dsteps, dscores, rows, ends, dD, shapes.L, shapes.chunks,
        shapes.heads, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), B.stride(0), B.stride(1), C.stride(0),
        C.stride(1), **sizes, **blocks, HAS_SEG=has_seg,
    )  # fmt: skip
    for u, v, w, of_chunks, dw in ((dy, B, C, states, dC), (x, C, B, dstates, dB)):
        _grad_rows[shapes.chunks * tiles, shapes.G, shapes.B](
            u, v, w, cum, steps, seg, of_chunks, dscores, dw, received, shapes.L, shapes.chunks, shapes.splits,
            u.stride(0), u.stride(1), v.stride(0), v.stride(1), w.stride(0), w.stride(1), **sizes, **blocks,
            HAS_SEG=has_seg, OF_C=dw is dC,
        )  # fmt: skip
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    dA = cum.new_empty(shapes.B, shapes.chunks, shapes.H)
    block = min(16, triton.next_power_of_2(shapes.H))
    _finish[shapes.chunks, triton.cdiv(shapes.H, block), shapes.B](
        A, steps, dsteps, rows, received, inner + ends.sum(-1), ddt, dA, shapes.L, shapes.chunks, cum.numel(),
        shapes.H, shapes.Q, block, tiles,
    )  # fmt: skip
    dstate = None if state_dtype is None else dstate.to(state_dtype)
    return dx, ddt, dA.sum((0, 1)).to(A.dtype), dB, dC, dD.sum((0, 1, 3)).to(D.dtype), None, dstate


def _on(x: Tensor):
    """Kernels start on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def ssd(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, chunk_size=128):
    """The scan, as ``nemo_lite_kernels.ssd.ssd_chunked``; the final state is float32.

    The chunk is the largest power of two up to `chunk_size` that suits the device, which the result does not depend on.
    """
    x, dt, B, C = (_inner(t) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    state = None if state_BHPN is None else state_BHPN.contiguous()
    with _on(x):
        if x.shape[1] <= FEW and reset_BL is None and not torch.is_grad_enabled():
            y, after = _steps(x, dt, A_H, B, C, D_H, state, y=True, after=True)
            return y, after
        seg = None if reset_BL is None else reset_BL.cumsum(1, dtype=torch.int32)
        return _SSD.apply(x, dt, A_H.contiguous(), B, C, D_H.contiguous(), seg, state, chunk_size)


def _steps(x, dt, A, B, C, D, state, counts=None, *, y=False, after=False):
    """A few tokens as a recurrence: (y or None, the state after the first counts_B of them or None)."""
    x, dt, B = (_inner(t) for t in (x, dt, B))
    C = _inner(C) if y else B
    (rows, L, H, P), (G, N) = x.shape, B.shape[2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if y else None
    state = None if state is None else state.contiguous()
    new = torch.empty(rows, H, P, N, dtype=torch.float32, device=x.device) if after else None
    block_n = triton.next_power_of_2(N)
    block_p = max(1, min(triton.next_power_of_2(P), 4096 // block_n))
    A = A.expand(rows, H).contiguous() if A.dim() == 2 else A.contiguous()
    with _on(x):
        _few[triton.cdiv(P, block_p), H, rows](
            x, dt, A, B, C, D, state, counts, out, new, L, x.stride(0), x.stride(1), dt.stride(0), dt.stride(1),
            H if A.dim() == 2 else 0, B.stride(0), B.stride(1), C.stride(0), C.stride(1), H, G, P, N, block_p, block_n,
            HAS_STATE=state is not None, HAS_COUNTS=counts is not None, HAS_Y=y, HAS_AFTER=after,
        )  # fmt: skip
    return out, new


def ssd_verify(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN):
    """y_BLHP of a few tokens after the state, of which nothing is kept, as ``nemo_lite_kernels.ssd.ssd_verify``."""
    return _steps(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN, y=True)[0]


def ssd_advance(x_BLHP, dt_BLH, A_H, B_BLGN, state_BHPN, counts_B):
    """The state after the first counts_B[b] of row b's tokens, as ``nemo_lite_kernels.ssd.ssd_advance``."""
    return _steps(x_BLHP, dt_BLH, A_H, B_BLGN, None, None, state_BHPN, counts_B, after=True)[1]


def state_update(x_B1HP, dt_B1H, A_H, B_B1GN, C_B1GN, D_H, state_BHPN):
    """One token of decoding: y_B1HP and the state after it, in one kernel. The state given stays as it is."""
    return _steps(x_B1HP, dt_B1H, A_H, B_B1GN, C_B1GN, D_H, state_BHPN, y=True, after=True)
