"""Routed experts and their router in Triton: y_t = sum_k weight_tk * down_e(relu(up_e x_t)^2), e = expert_tk.

Copies are sorted by expert, and each expert's rows are cut into blocks of BLOCK_M. Which expert and rows a block has is
written down on the device, in a table as long as it can ever get: nothing waits for the host, shapes do not depend on
the routing, and all of it can be captured in a CUDA graph. Blocks beyond the last one return at once.

    h_s  = relu(up_e x_t)^2                                     s: row of copy (t, k) among the sorted ones
    z_s  = weight_tk * down_e h_s                               y_t = sum_k z_s(t, k)

    g_s  = down_e^T dy_t                                        dweight_tk = h_s . g_s
    du_s = 2 weight_tk sqrt(h_s) g_s                            dx_t = sum_k up_e^T du_s(t, k)
    dup_e = sum_s du_s x_t^T                                    ddown_e = sum_s weight_tk dy_t h_s^T

Only x and h are kept for the backward pass: relu(h) is the root of its square. Every sum has a fixed order.

Shape letters: T tokens, k experts of a token, E experts, L size experts read and write, F inner size, S = T*k sorted
copies, X blocks.
"""

import torch
import triton
import triton.language as tl

from nemo_lite_kernels.triton.norm import on_device

FEW_COPIES = 2048  # up to here each copy's row is found by comparing it with all others, in one launch; beyond, by sort
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """Semantics of nemo_lite_kernels.moe.experts_reference; float32, bfloat16 or float16 activations."""
    if x_TL.dtype not in DTYPES:
        raise TypeError(f"the Triton experts take float32, bfloat16 or float16 activations, not {x_TL.dtype}")
    with on_device(x_TL):
        return _Experts.apply(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF)


def block_rows(copies: int, n_experts: int) -> int:
    """Rows of a block: about what an expert gets, so that little of a block is empty."""
    share = copies / max(n_experts, 1)
    return next((rows for rows in (16, 32, 64) if share <= rows), 128)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
        x, weight = x_TL.contiguous(), weight_Tk.contiguous()
        E, F, L = up_EFL.shape
        S, topk = expert_Tk.numel(), expert_Tk.shape[1]
        table = schedule(expert_Tk, E, block_rows(S, E))
        h_SF, z_SL = x.new_empty(S, F), x.new_empty(S, L)
        up, down = up_EFL.to(x.dtype).contiguous(), down_ELF.to(x.dtype).contiguous()
        grouped(x, up, h_SF, table, topk, (F * L, L, 1), gather=True, end="squared_relu")
        grouped(h_SF, down, z_SL, table, topk, (L * F, F, 1), weight=weight, end="weighted")
        ctx.save_for_backward(x, weight, h_SF, up_EFL, down_ELF, *table)
        return _combine(z_SL, table[1], x_TL.shape)

    @staticmethod
    def backward(ctx, dy_TL):
        x, weight, h_SF, up_EFL, down_ELF, *table = ctx.saved_tensors
        _, place_Tk, order_S, _ = table
        dy = dy_TL.contiguous()
        (E, F, L), (S, topk) = up_EFL.shape, (order_S.shape[0], weight.shape[1])
        need_x, _, need_weight, need_up, need_down = ctx.needs_input_grad
        dx = dweight = dup = ddown = None
        if need_x or need_weight or need_up:
            # Each block of columns leaves its share of h . g.
            du_SF, parts_SN = x.new_empty(S, F), torch.empty(S, column_blocks(F, S, E), device=x.device)
            grouped(
                dy, down_ELF.to(x.dtype).contiguous(), du_SF, table, topk, (L * F, 1, F),
                gather=True, weight=weight, h=h_SF, parts=parts_SN, end="backward",
            )  # fmt: skip
            if need_weight:
                found = parts_SN.sum(-1)[place_Tk.clamp(min=0).long()] if S else torch.zeros_like(weight)
                dweight = torch.where(place_Tk >= 0, found, 0.0).to(weight.dtype)
            if need_x:
                dz_SL = x.new_empty(S, L)
                grouped(du_SF, up_EFL.to(x.dtype).contiguous(), dz_SL, table, topk, (F * L, 1, L))
                dx = _combine(dz_SL, place_Tk, x.shape)
            if need_up:
                dup = torch.empty_like(up_EFL, memory_format=torch.contiguous_format)
                _weight_gradient(du_SF, x, dup, table, weight, gather_left=False)
        if need_down:
            ddown = torch.empty_like(down_ELF, memory_format=torch.contiguous_format)
            _weight_gradient(dy, h_SF, ddown, table, weight, gather_left=True)
        return dx, None, dweight, dup, ddown


# ------------------------------------------------------------------------------------------------------------- schedule


def schedule(expert_Tk, n_experts: int, block_m: int):
    """(block_X3, place_Tk, order_S, start_E1), all int32: expert (-1: none), first row and last row + 1 of each block;
    the row of each copy (-1: not computed); the copy in each row; the first row of each expert, and the end of all.

    X = min(S, E) + S // block_m: an expert's last block is the only one that is not full.
    """
    S, E, device = expert_Tk.numel(), n_experts, expert_Tk.device
    X = min(S, E) + S // block_m
    if 0 < S <= FEW_COPIES:
        block = torch.empty(X, 3, dtype=torch.int32, device=device)
        place, order = (torch.empty(shape, dtype=torch.int32, device=device) for shape in (expert_Tk.shape, S))
        start = torch.empty(E + 1, dtype=torch.int32, device=device)
        COPIES, BLOCKS = 64, 16
        _schedule_kernel[triton.cdiv(S, COPIES) + triton.cdiv(X, BLOCKS),](
            expert_Tk.contiguous(), block, place, order, start, S, E, X, block_m,
            COPIES=COPIES, BLOCKS=BLOCKS, ALL_COPIES=triton.next_power_of_2(max(S, COPIES)),
            ALL_EXPERTS=triton.next_power_of_2(E + 1), num_warps=4,
        )  # fmt: skip
        return block, place, order, start
    flat = expert_Tk.flatten().to(torch.int32)
    key, order = torch.where(flat < 0, E, flat).sort(stable=True)
    start = torch.searchsorted(key, torch.arange(E + 1, dtype=torch.int32, device=device))
    ends = ((start.diff() + block_m - 1) // block_m).cumsum(0)  # blocks of this expert and those before
    number = torch.arange(X, device=device)
    expert = torch.searchsorted(ends, number, right=True)
    e = expert.clamp(max=E - 1)
    before = torch.where(e > 0, ends[e - 1], 0)
    block = torch.stack([torch.where(expert < E, expert, -1), start[e] + (number - before) * block_m, start[e + 1]], 1)
    place = torch.empty_like(flat).scatter_(0, order, torch.arange(S, dtype=torch.int32, device=device))
    place = torch.where(flat < 0, -1, place).view(expert_Tk.shape)
    return block.to(torch.int32), place, order.to(torch.int32), start.to(torch.int32)


@triton.jit
def _schedule_kernel(
    expert, block, place, order, start, S, E, X, block_m,
    COPIES: tl.constexpr, BLOCKS: tl.constexpr, ALL_COPIES: tl.constexpr, ALL_EXPERTS: tl.constexpr,
):  # fmt: skip
    """The first programs find the rows of COPIES copies each, the others write BLOCKS blocks each."""
    pid = tl.program_id(0)
    placing = tl.cdiv(S, COPIES)
    if pid < placing:
        _place_copies(pid, expert, place, order, S, E, COPIES)
    else:
        _cut_blocks(pid - placing, expert, block, start, S, E, X, block_m, BLOCKS, ALL_COPIES, ALL_EXPERTS)


@triton.jit
def _place_copies(pid, expert, place, order, S, E, COPIES: tl.constexpr):
    """A copy's row is the number of copies before it: of lower experts, or earlier ones of its own."""
    s = pid * COPIES + tl.arange(0, COPIES)
    e = tl.load(expert + s, mask=s < S, other=0).to(tl.int32)
    key = tl.where(e < 0, E, e)
    row = tl.zeros([COPIES], tl.int32)
    for i in range(0, S, COPIES):
        t = i + tl.arange(0, COPIES)
        other = tl.load(expert + t, mask=t < S, other=0).to(tl.int32)
        other = tl.where(t < S, tl.where(other < 0, E, other), E + 1)
        earlier = (other[None, :] == key[:, None]) & (t[None, :] < s[:, None])
        row += tl.sum((earlier | (other[None, :] < key[:, None])).to(tl.int32), 1)
    tl.store(order + row, s, mask=s < S)
    tl.store(place + s, tl.where(e < 0, -1, row), mask=s < S)


@triton.jit
def _cut_blocks(
    pid, expert, block, start, S, E, X, block_m,
    BLOCKS: tl.constexpr, ALL_COPIES: tl.constexpr, ALL_EXPERTS: tl.constexpr,
):  # fmt: skip
    s, n = tl.arange(0, ALL_COPIES), tl.arange(0, ALL_EXPERTS)
    e = tl.load(expert + s, mask=s < S, other=-1).to(tl.int32)
    # What is not computed is counted in the last bin, which is no expert's.
    count = tl.histogram(tl.where(e < 0, ALL_EXPERTS - 1, e), ALL_EXPERTS)
    count = tl.where(n < E, count, 0)
    first_row = tl.cumsum(count, 0) - count
    blocks = (count + block_m - 1) // block_m
    ends = tl.cumsum(blocks, 0)
    b = pid * BLOCKS + tl.arange(0, BLOCKS)
    owner = tl.sum((ends[None, :] <= b[:, None]).to(tl.int32), 1)
    mine = n[None, :] == owner[:, None]
    first = tl.sum(tl.where(mine, (first_row - (ends - blocks) * block_m)[None, :], 0), 1) + b * block_m
    end = tl.sum(tl.where(mine, (first_row + count)[None, :], 0), 1)
    tl.store(block + b * 3, tl.where(owner < E, owner, -1), mask=b < X)
    tl.store(block + b * 3 + 1, first, mask=b < X)
    tl.store(block + b * 3 + 2, end, mask=b < X)
    if pid == 0:
        tl.store(start + n, first_row, mask=n <= E)


# ------------------------------------------------------------------------------------------------------------- products


def _tuned(kernel, key, *tiles):
    """The kernel with the first of `tiles` (BLOCK_K, warps, stages) that is fastest; interpreted, with the first."""
    configs = [triton.Config({"BLOCK_K": k}, num_warps=warps, num_stages=stages) for k, warps, stages in tiles]
    return triton.autotune(configs[:1] if triton.knobs.runtime.interpret else configs, key=key)(kernel)


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 are exact to float32, whatever tensor cores could do faster."""
    return "ieee" if dtype == torch.float32 else "tf32"


COLUMNS = {16: 64, 32: 64, 64: 128, 128: 128}  # BLOCK_N by BLOCK_M


def column_blocks(N: int, copies: int, n_experts: int) -> int:
    return triton.cdiv(N, COLUMNS[block_rows(copies, n_experts)])


def grouped(a, b, out_SN, table, topk, strides, *, end="plain", gather=False, weight=None, h=None, parts=None):
    """out_s = a_s b_e for every row s of every expert e, and `end`. a [S, K], or with `gather` tokens [T, K]; b's
    element (e, n, k) at strides . (e, n, k)."""
    block_X3, _, order_S, start_E1 = table
    (S, N), K, X = out_SN.shape, a.shape[1], block_X3.shape[0]
    if not X:
        return
    block_m = block_rows(S, start_E1.shape[0] - 1)
    block_n = COLUMNS[block_m]
    _grouped[block_m][X * triton.cdiv(N, block_n),](
        a, b, out_SN, block_X3, order_S, weight, h, parts, N, K, topk, *strides,
        GATHER=gather, END=end, BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=_precision(a.dtype),
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    a, b, out, block, order, weight, h, parts, N, K, topk, stride_e, stride_n, stride_k,
    GATHER: tl.constexpr, END: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows; the blocks of one expert, which share its weights, come right after each other.
    blocks_n = tl.cdiv(N, BLOCK_N)
    number, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    e = tl.load(block + number * 3)
    if e < 0:
        return
    first, stop = tl.load(block + number * 3 + 1), tl.load(block + number * 3 + 2)
    row = first + tl.arange(0, BLOCK_M)
    real = row < stop
    row = tl.where(real, row, first).to(tl.int64)  # rows of the padding compute the first one again
    copy = tl.load(order + row)
    a_row = (copy // topk).to(tl.int64) if GATHER else row
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    k = tl.arange(0, BLOCK_K)
    a_at = a + a_row[:, None] * K + k[None, :]
    b_at = b + e.to(tl.int64) * stride_e + n[None, :] * stride_n + k[:, None] * stride_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, K, BLOCK_K):
        here = k < K - i
        a_MK = tl.load(a_at, mask=here[None, :], other=0.0)
        b_KN = tl.load(b_at, mask=here[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a_MK, b_KN, acc, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_k
    write = real[:, None] & inside[None, :]
    at = row[:, None] * N + n[None, :]
    if END == "squared_relu":
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    elif END == "weighted":
        acc = acc * tl.load(weight + copy).to(tl.float32)[:, None]
    elif END == "backward":
        squares = tl.load(h + at, mask=write, other=0.0).to(tl.float32)
        share = tl.sum(tl.where(write, acc * squares, 0.0), 1)
        tl.store(parts + row * blocks_n + block_n, share, mask=real)
        acc = 2.0 * acc * tl.sqrt(squares) * tl.load(weight + copy).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=write)


_grouped = {
    16: _tuned(_grouped_kernel, ["N", "K", "END"], (128, 4, 4), (64, 4, 6), (256, 4, 3)),
    32: _tuned(_grouped_kernel, ["N", "K", "END"], (128, 4, 4), (64, 4, 5)),
    64: _tuned(_grouped_kernel, ["N", "K", "END"], (64, 4, 4), (64, 8, 3), (32, 4, 4)),
    128: _tuned(_grouped_kernel, ["N", "K", "END"], (64, 8, 3), (64, 8, 4), (32, 8, 4)),
}


def _weight_gradient(left, right, out_EMN, table, weight, gather_left: bool):
    """out_e = sum over the rows s of e of left_s right_s^T. One side is rows [S, ..], the other, gathered, tokens: the
    left one times the copies' weights, or the right one as it is."""
    _, _, order_S, start_E1 = table
    E, M, N = out_EMN.shape
    block_m, block_n = (min(128, max(16, triton.next_power_of_2(size))) for size in (M, N))
    _weight[E * triton.cdiv(M, block_m) * triton.cdiv(N, block_n),](
        left, right, out_EMN, start_E1, order_S, weight, M, N, weight.shape[1],
        GATHER_LEFT=gather_left, BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=_precision(left.dtype),
    )  # fmt: skip


@triton.jit
def _weight_kernel(
    left, right, out, start, order, weight, M, N, topk,
    GATHER_LEFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * blocks_n
    e, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    m = (tile // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    stop = tl.load(start + e + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.load(start + e), stop, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        real = row < stop
        copy = tl.load(order + row, mask=real, other=0)
        token, row = (copy // topk).to(tl.int64), row.to(tl.int64)
        # Both sides are zero where there is no row: what lies there may be anything, and 0 x NaN is NaN.
        a = tl.load(
            left + (token if GATHER_LEFT else row)[None, :] * M + m[:, None],
            mask=real[None, :] & (m < M)[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            right + (row if GATHER_LEFT else token)[:, None] * N + n[None, :],
            mask=real[:, None] & (n < N)[None, :], other=0.0,
        )  # fmt: skip
        if GATHER_LEFT:
            scale = tl.load(weight + copy, mask=real, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * scale[None, :]).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = e.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


_weight = _tuned(_weight_kernel, ["M", "N", "GATHER_LEFT"], (64, 8, 3), (32, 8, 4))


def _combine(z_SL, place_Tk, shape):
    """y_t = sum of the rows of t's copies: gathered, so that the sum has one order."""
    y_TL = z_SL.new_empty(shape)
    T, L = shape
    if y_TL.numel():
        topk = place_Tk.shape[1]
        wide = triton.next_power_of_2(topk)
        block = min(triton.next_power_of_2(L), max(64, 4096 // wide))
        _combine_kernel[T, triton.cdiv(L, block)](z_SL, place_Tk, y_TL, L, topk, TOPK=wide, BLOCK=block, num_warps=4)
    return y_TL


@triton.jit
def _combine_kernel(z, place, y, L, topk, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TOPK)
    row = tl.load(place + t * topk + j, mask=j < topk, other=-1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * L + column[None, :]
    values = tl.load(z + at, mask=(row >= 0)[:, None] & (column < L)[None, :], other=0.0)
    tl.store(y + t * L + column, tl.sum(values.to(tl.float32), 0).to(y.dtype.element_ty), mask=column < L)


# --------------------------------------------------------------------------------------------------------------- router


def route(logits_TE, bias_E, topk: int, scaling: float = 1.0, normalise: bool = True, n_group=1, topk_group=1):
    """(expert_Tk int64, weight_Tk, scores_TE), float32, best first: scores = sigmoid(logits); the choice is made on
    score + bias, the weight is the score alone, over the sum of those chosen if `normalise`, times `scaling`.

    With n_group > 1 a group's score is the sum of its two largest biased scores, and only the topk_group best groups
    stay eligible. Of equals the first is chosen. Weights and scores are differentiable in the logits.
    """
    with on_device(logits_TE):
        return _Route.apply(logits_TE, bias_E, topk, scaling, normalise, n_group, topk_group)


def router(
    logits_TE, bias_E, k: int, scaling: float, normalise: bool, n_group: int, topk_group: int, rows: int = 0,
    count_BL=None,
):  # fmt: skip
    """:func:`route` with the signature, and the statistics, of nemo_lite_kernels.route.route: (experts, weights, tokens
    per expert [E] or None, auxiliary loss or None)."""
    expert_Tk, weight_Tk, scores_TE = route(logits_TE, bias_E, k, scaling, normalise, n_group, topk_group)
    if not rows:
        return expert_Tk, weight_Tk, None, None
    from nemo_lite_kernels.route import _tally

    E = scores_TE.shape[-1]
    p_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    with torch.no_grad():
        hits_BE = _tally(p_TE.topk(k, sorted=False).indices, rows, count_BL, E).to(p_TE.dtype)
        counts_E = _tally(expert_Tk, rows, count_BL, E).sum(0)
    p_BLE = p_TE.unflatten(0, (rows, -1))
    n_B = p_TE.new_full((rows,), p_BLE.shape[1])
    if count_BL is not None:
        p_BLE = p_BLE * count_BL[..., None]
        n_B = count_BL.sum(-1).to(p_TE.dtype).clamp(min=1)
    return expert_Tk, weight_Tk, counts_E, ((hits_BE * p_BLE.sum(1)).sum(-1) * (E / k) / n_B.square()).sum()


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, bias_E, topk, scaling, normalise, n_group, topk_group):
        logits = logits_TE.contiguous()
        T, E = logits.shape
        scores = torch.empty(T, E, device=logits.device)
        expert = torch.empty(T, topk, dtype=torch.int64, device=logits.device)
        weight = torch.empty(T, topk, device=logits.device)
        if T:
            _route_kernel[T,](
                logits, bias_E, scores, expert, weight, E, E // n_group, topk, scaling,
                NORMALISE=normalise, N_GROUP=n_group, TOPK_GROUP=topk_group, TOPK=triton.next_power_of_2(topk),
                GROUPS=triton.next_power_of_2(n_group), MEMBERS=triton.next_power_of_2(E // n_group), num_warps=4,
            )  # fmt: skip
        ctx.mark_non_differentiable(expert)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, expert)
        ctx.scaling, ctx.normalise, ctx.dtype = scaling, normalise, logits_TE.dtype
        return expert, weight, scores

    @staticmethod
    def backward(ctx, _, dweight_Tk, dscores_TE):
        scores, expert = ctx.saved_tensors
        ds = torch.zeros_like(scores) if dscores_TE is None else dscores_TE
        if dweight_Tk is not None:
            dchosen = dweight_Tk * ctx.scaling
            if ctx.normalise:
                chosen = scores.gather(-1, expert)
                total = chosen.sum(-1, keepdim=True) + 1e-20
                dchosen = (dchosen - (dchosen * chosen).sum(-1, keepdim=True) / total) / total
            ds = ds.scatter_add(-1, expert, dchosen)
        return (ds * scores * (1 - scores)).to(ctx.dtype), None, None, None, None, None, None


@triton.jit
def _route_kernel(
    logits, bias, scores, expert, weight, E, members, topk, scaling,
    NORMALISE: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOPK: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """One token: its experts as a tile of groups x members, and the best one taken topk times."""
    t = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)
    e = group[:, None] * members + member[None, :]
    free = (group < N_GROUP)[:, None] & (member < members)[None, :]
    score = tl.sigmoid(tl.load(logits + t * E + e, mask=free, other=0.0).to(tl.float32))
    tl.store(scores + t * E + e, score, mask=free)
    biased = score + tl.load(bias + e, mask=free, other=0.0).to(tl.float32)
    # Not a number is the last choice, and never an expert that does not exist.
    biased = tl.where(free & (biased > float("-inf")), biased, float("-inf"))
    if N_GROUP > 1:
        best = tl.max(biased, 1)
        at = tl.min(tl.where(biased == best[:, None], member[None, :], MEMBERS), 1)
        second = tl.max(tl.where(member[None, :] == at[:, None], float("-inf"), biased), 1)
        both = best + second
        eligible = tl.zeros([GROUPS], tl.int32)
        waiting = group < N_GROUP
        for _ in tl.static_range(TOPK_GROUP):
            value = tl.max(tl.where(waiting, both, float("-inf")), 0)
            one = group == tl.min(tl.where(waiting & (both == value), group, GROUPS), 0)
            eligible = tl.where(one, 1, eligible)
            waiting = waiting & (eligible == 0)
        biased = tl.where((eligible == 1)[:, None], biased, float("-inf"))
    slot = tl.arange(0, TOPK)
    chosen_e, chosen = tl.zeros([TOPK], tl.int32), tl.zeros([TOPK], tl.float32)
    for i in range(topk):
        value = tl.max(tl.max(tl.where(free, biased, float("-inf")), 1), 0)
        found = tl.min(tl.min(tl.where(free & (biased == value), e, E - 1), 1), 0)
        here = e == found
        chosen_e = tl.where(slot == i, found, chosen_e)
        chosen = tl.where(slot == i, tl.sum(tl.sum(tl.where(here & free, score, 0.0), 1), 0), chosen)
        free = free & (e != found)
    if NORMALISE:
        chosen = chosen / (tl.sum(chosen, 0) + 1e-20)
    tl.store(expert + t * topk + slot, chosen_e.to(tl.int64), mask=slot < topk)
    tl.store(weight + t * topk + slot, chosen * scaling, mask=slot < topk)
