"""Number formats in Triton: the definitions, and what this equals bit for bit, are in nemo_lite_kernels.quant.

Two passes over the matrix: largest magnitudes of the blocks, from which torch takes those of the matrices; then scales,
codes and values of a tile at a time. Every element makes its own random word, eight times more than are used: a GPU
waits for memory here. Divisions are IEEE's, not Triton's faster ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_lite_kernels import quant as reference
from nemo_lite_kernels.quant import E2M1, FLT_MAX, FORMATS, SCHEMES, Quantized, Spec
from nemo_lite_kernels.triton.norm import on_device

TILE = 128  # columns: a multiple of every block's width
NVFP4, MXFP8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(x):
    return x.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _pairs(x, ROWS: tl.constexpr, TILE: tl.constexpr, APART: tl.constexpr):
    """Sums and differences of the columns that lie APART from each other."""
    y = tl.permute(tl.reshape(x, (ROWS, TILE // (2 * APART), 2, APART)), (0, 1, 3, 2))
    a, b = tl.split(y)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, TILE))


@triton.jit
def _load(x, r, c, R, K, stride_r, stride_c, HADAMARD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    inside = (r[:, None] < R) & (c[None, :] < K)
    at = r[:, None].to(tl.int64) * stride_r + c[None, :].to(tl.int64) * stride_c
    m = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HADAMARD:
        minus = ((0xD7E8 >> (c[None, :] % 16)) & 1) == 1
        m = tl.where(minus, -m, m)
        m = _pairs(m, ROWS, TILE, 1)
        m = _pairs(m, ROWS, TILE, 2)
        m = _pairs(m, ROWS, TILE, 4)
        m = _pairs(m, ROWS, TILE, 8)
        m = (m * 0.25).to(x.dtype.element_ty).to(tl.float32)
    return m


@triton.jit
def _largest_kernel(
    x, out, R, K, NB, stride_r, stride_c, HADAMARD: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The bits of the blocks' largest magnitudes, [rows / HIGH, NB]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m = _load(x, r, c, R, K, stride_r, stride_c, HADAMARD, ROWS, TILE)
    size = _bits(m) & 0x7FFFFFFF
    top = tl.max(tl.max(tl.reshape(size, (ROWS // HIGH, HIGH, TILE // WIDE, WIDE)), 3), 1)
    rb = tl.program_id(0) * (ROWS // HIGH) + tl.arange(0, ROWS // HIGH)
    cb = tl.program_id(1) * (TILE // WIDE) + tl.arange(0, TILE // WIDE)
    inside = (rb[:, None] * HIGH < R) & (cb[None, :] < NB)
    tl.store(out + rb[:, None].to(tl.int64) * NB + cb[None, :], top, mask=inside)


@triton.jit
def _round(v, random, M: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Value and magnitude's code: the reference's `round_to`, which clamps here."""
    size = tl.minimum(tl.abs(v), LARGEST)
    e = tl.maximum(_bits(size) >> 23, 127 + LEAST)
    units = size * _float((254 + M - e) << 23)
    if STOCHASTIC:
        n = tl.floor(units)
        n = tl.where((units - n) * 65536.0 > random.to(tl.float32) + 0.5, n + 1.0, n)
    else:
        n = (units + 12582912.0) - 12582912.0
    code = ((e - (127 + LEAST)) << M) + n.to(tl.int32)
    return n * _float((e - M) << 23), code


@triton.jit
def _half_word(i, low, high):
    """The random half word of element i (int64): Philox4x32-7."""
    c0 = (i // 8).to(tl.uint32)
    c1 = ((i // 8) >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = c2 + low.to(tl.uint32)
    k1 = c2 + high.to(tl.uint32)
    for _ in tl.static_range(7):
        m0 = c2 * 0 + 0xD2511F53
        m1 = c2 * 0 + 0xCD9E8D57
        a = tl.umulhi(c2, m1) ^ c1 ^ k0
        b = c2 * m1
        c = tl.umulhi(c0, m0) ^ c3 ^ k1
        d = c0 * m0
        c0, c1, c2, c3 = a, b, c, d
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    word = (i % 8) // 2
    chosen = tl.where(word < 2, tl.where(word == 0, c0, c1), tl.where(word == 2, c2, c3))
    return ((chosen >> ((i % 2) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["low", "high"])
def _kernel(
    x, largest, tensors, segment, codes, scales, values, R, K, P, NB, stride_r, stride_c, low, high,
    SCHEME: tl.constexpr, M: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, FOUR: tl.constexpr,
    ACROSS: tl.constexpr, STOCHASTIC: tl.constexpr, HADAMARD: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    rb = tl.program_id(0) * (ROWS // HIGH) + tl.arange(0, ROWS // HIGH)
    cb = tl.program_id(1) * (TILE // WIDE) + tl.arange(0, TILE // WIDE)
    inside_b = (rb[:, None] * HIGH < R) & (cb[None, :] < NB)
    m = _load(x, r, c, R, K, stride_r, stride_c, HADAMARD, ROWS, TILE)
    a = _float(tl.load(largest + rb[:, None].to(tl.int64) * NB + cb[None, :], mask=inside_b, other=0))
    good = a == a
    if SCHEME == NVFP4 or SCHEME == FP8:  # noqa: SIM109  (constants of the kernel, not Python's)
        # Of the matrix that a block lies in: S/6, 1/S, S, and whether it is finite.
        if ACROSS:
            s = tl.load(segment + cb, mask=cb < NB, other=0)[None, :] + rb[:, None] * 0
        else:
            s = tl.load(segment + rb * HIGH, mask=rb * HIGH < R, other=0)[:, None] + cb[None, :] * 0
        good = tl.load(tensors + 4 * s + 3) > 0
    if SCHEME == NVFP4:
        wanted = tl.minimum(tl.where(good, a, 0.0) * tl.load(tensors + 4 * s), 448.0)
        scale, scale_code = _round(wanted, _bits(wanted), 3, -6, 448.0, False)
        factor = tl.minimum(tl.div_rn(wanted * 0 + 1.0, scale * tl.load(tensors + 4 * s + 1)), 3.4028234663852886e38)
    elif SCHEME == MXFP8:
        good = _bits(a) < INFINITE
        bits = _bits(tl.maximum(tl.where(good, a, 0.0) * (1.0 / LARGEST), 5.877471754111438e-39))
        scale_code = tl.where(bits <= 0x400000, 0, tl.maximum((bits + 0x7FFFFF) >> 23, 1))
        scale = tl.where(scale_code == 0, _float(scale_code * 0 + 0x400000), _float(scale_code << 23))
        factor = _float((254 - scale_code) << 23)
        scale_code = tl.where(good, scale_code, 255)
    elif SCHEME == FP8:
        factor = tl.load(tensors + 4 * s + 2)
        scale = factor * 0 + 1.0
        scale_code = s
    else:
        good = _bits(a) < INFINITE
        safe = tl.where((a > 0) & good, a, 1.0)
        factor = tl.minimum(tl.div_rn(safe * 0 + LARGEST, safe), 3.4028234663852886e38)
        factor = tl.where((a > 0) & good, _float(_bits(factor) & INFINITE), 1.0)
        scale = tl.div_rn(factor * 0 + 1.0, factor)
        scale_code = _bits(scale)
    if SCHEME == MXFP8 or SCHEME == 3:
        scale = tl.where(good, scale, _float(scale_code * 0 + 0x7FC00000))
    if CODES and SCHEME != FP8:
        for h in tl.static_range(HIGH):
            at = (rb[:, None] * HIGH + h).to(tl.int64) * NB + cb[None, :]
            if SCHEME == 3:
                tl.store(scales + at, scale, mask=inside_b & (rb[:, None] * HIGH + h < R))
            else:
                tl.store(scales + at, scale_code.to(tl.uint8), mask=inside_b & (rb[:, None] * HIGH + h < R))
    factor = tl.where(good, factor, 0.0)
    m4 = tl.reshape(m, (ROWS // HIGH, HIGH, TILE // WIDE, WIDE))
    m4 = tl.where(good[:, None, :, None], m4, 0.0) * factor[:, None, :, None]
    v = tl.reshape(m4, (ROWS, TILE))
    random = _bits(v)
    if STOCHASTIC:
        random = _half_word(r[:, None].to(tl.int64) * P + c[None, :], low, high)
    q, code = _round(v, random, M, LEAST, LARGEST, STOCHASTIC)
    minus = _bits(v) < 0
    if VALUES:
        q = tl.where(minus, -q, q)
        out = tl.reshape(
            tl.reshape(q, (ROWS // HIGH, HIGH, TILE // WIDE, WIDE)) * scale[:, None, :, None], (ROWS, TILE)
        )
        at = r[:, None].to(tl.int64) * P + c[None, :]
        tl.store(values + at, out.to(values.dtype.element_ty), mask=(r[:, None] < R) & (c[None, :] < P))
    if CODES:
        if FOUR:
            code = code | tl.where(minus, 8, 0)
            even, odd = tl.split(tl.reshape(code, (ROWS, TILE // 2, 2)))
            c2 = tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)
            at = r[:, None].to(tl.int64) * (P // 2) + c2[None, :]
            tl.store(codes + at, (even | odd << 4).to(tl.uint8), mask=(r[:, None] < R) & (c2[None, :] < P // 2))
        else:
            code = code | tl.where(minus, 128, 0)
            at = r[:, None].to(tl.int64) * P + c[None, :]
            tl.store(codes + at, code.to(tl.uint8), mask=(r[:, None] < R) & (c[None, :] < P))


def _run(x: Tensor, spec: Spec, seed: int, amax, offsets, transpose: bool, want_codes: bool, dtype: torch.dtype | None):
    """Codes, scales, values, tensor scale, largest magnitudes, and where segments begin; None for what is not asked."""
    format, device = FORMATS[spec.format], x.device
    high, wide = spec.block or (1, TILE)
    if offsets is not None and transpose:  # every matrix's tokens padded apart
        m, segment, starts, sizes = reference.arrange(x, Spec(spec.format, spec.block), offsets, True)
    else:
        bounds, starts = reference.places(x, spec, offsets, transpose)
        m, sizes = (x.T if transpose else x), bounds.diff()
        segment = torch.arange(len(sizes)).repeat_interleave(starts.diff()).to(device)
    (R, K), n = m.shape, len(sizes)
    P = -(-K // spec.width) * spec.width
    NB, ROWS = -(-P // wide), max(high, 16)
    grid, strides = (triton.cdiv(R, ROWS), triton.cdiv(P, TILE)), (m.stride(0), m.stride(1))
    largest = torch.zeros(-(-R // high), NB, dtype=torch.int32, device=device)
    tensors = torch.zeros(n, 4, device=device)
    codes = scales = v = own = tensor_scale = None
    with on_device(x):
        if R and P:
            _largest_kernel[grid](
                m, largest, R, K, NB, *strides, HADAMARD=spec.hadamard, HIGH=high, WIDE=wide, ROWS=ROWS, TILE=TILE
            )
        if format.tensor_scale:
            of_block = segment[::wide] if transpose else segment[::high]
            blocks = largest.view(torch.float32)
            top = blocks.amax(0 if transpose else 1) if blocks.numel() else blocks.new_zeros(len(of_block))
            own = blocks.new_zeros(n).scatter_reduce(0, of_block, top, "amax")
            A, most = own if amax is None else amax.to(own).expand_as(own), format.element.largest
            most = torch.tensor(most * 448.0 if format.element is E2M1 else most, device=device)
            S = torch.where(A > 0, (most / A).clamp(max=FLT_MAX), 1.0)
            S, fine = torch.where(S > 0, S, 1.0), own.isfinite()
            sixth = 1 / torch.tensor(6.0, device=device)
            tensors = torch.stack([S * sixth, 1.0 / S, S, fine.float()], 1).contiguous()
            tensor_scale = torch.where(fine, A / most if format.element is E2M1 else 1.0 / S, torch.nan)
        four = format.element is E2M1
        if want_codes:
            codes = torch.empty(R, P // 2 if four else P, dtype=torch.uint8, device=device)
            if format.scales is not None:
                kind = torch.float32 if format.scales == torch.float32 else torch.uint8
                scales = torch.empty(R, NB, dtype=kind, device=device)
        if dtype is not None:
            v = torch.empty(R, P, dtype=dtype, device=device)
        if R and P:
            element, nothing = format.element, largest
            _kernel[grid](
                m, largest, tensors, segment[::wide].contiguous() if transpose else segment,
                nothing if codes is None else codes, nothing if scales is None else scales, nothing if v is None else v,
                R, K, P, NB, *strides, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF,
                SCHEME=SCHEMES[format.scales], M=element.mantissa, LEAST=element.least, LARGEST=element.largest,
                FOUR=four, ACROSS=transpose, STOCHASTIC=spec.stochastic, HADAMARD=spec.hadamard,
                CODES=codes is not None, VALUES=v is not None, HIGH=high, WIDE=wide, ROWS=ROWS, TILE=TILE,
            )  # fmt: skip
    if scales is not None:
        scales = scales.view(format.scales)
    return codes, scales, v, tensor_scale, own, None if offsets is None else starts.to(device)


def _takes(x: Tensor, spec: Spec, offsets: Tensor | None, transpose: bool) -> bool:
    """Tiles hold whole blocks: not where a block of several rows may end inside one."""
    high = 1 if spec.block is None else spec.block[0]
    split = high > 1 and offsets is not None and bool((offsets % high != 0).any())
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not split
        and not (transpose and offsets is not None and spec.block is None)
    )


def quantize_matrix(x, spec, seed=0, amax=None, offsets=None, transpose=False) -> Quantized:
    """`nemo_lite_kernels.quant.quantize_matrix`."""
    if not _takes(x, spec, offsets, transpose):
        return reference.quantize_matrix(x, spec, seed, amax, offsets, transpose)
    codes, scales, _, tensor_scale, own, starts = _run(x, spec, seed, amax, offsets, transpose, True, None)
    assert codes is not None
    return reference.assemble(x, spec, transpose, codes, scales, tensor_scale, own, starts)


def operand(x, spec, seed=0, amax=None, offsets=None, transpose=False, dtype=torch.float32):
    """`nemo_lite_kernels.quant.operand`: without codes."""
    if not _takes(x, spec, offsets, transpose):
        return reference.operand(x, spec, seed, amax, offsets, transpose, dtype)
    _, _, v, tensor_scale, _, _ = _run(x, spec, seed, amax, offsets, transpose, False, dtype)
    return v, tensor_scale


@triton.jit
def _values_kernel(
    codes, scales, out, R, P, NB, FOUR: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (r < R) & (c < P)
    if FOUR:
        byte = tl.load(codes + r.to(tl.int64) * (P // 2) + c // 2, mask=inside, other=0).to(tl.int32)
        code = (byte >> (c % 2 * 4)) & 15
        n = code & 7
        # 0, 1/2, 1, 3/2 are n/2; above, the exponent and one bit of the mantissa.
        v = tl.where(n < 4, n.to(tl.float32) * 0.5, (2 + n % 2).to(tl.float32) * (n // 2 - 1).to(tl.float32))
        v = tl.where(code > 7, -v, v)
    else:
        v = tl.load(codes + r.to(tl.int64) * P + c, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        v = v * tl.load(scales + r.to(tl.int64) * NB + c // WIDE, mask=inside, other=0.0)
    tl.store(out + r.to(tl.int64) * P + c, v.to(out.dtype.element_ty), mask=inside)


def values(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`nemo_lite_kernels.quant.values`."""
    four = FORMATS[q.spec.format].element is E2M1
    R, P = q.codes.shape[0], q.columns
    out = torch.empty(R, P, dtype=dtype, device=q.codes.device)
    if not R or not P:
        return out
    # Scales, and codes of eight bits, are widened by torch: Triton's own casts of them differ by GPU.
    scales = None if q.scales is None else q.scales.float()
    codes = q.codes if four else q.codes.float()
    wide = P if q.spec.block is None else q.spec.block[1]
    with on_device(out):
        _values_kernel[triton.cdiv(R, 16), triton.cdiv(P, TILE)](
            codes, codes if scales is None else scales, out, R, P, 1 if scales is None else scales.shape[1], FOUR=four,
            SCALED=scales is not None, WIDE=wide, ROWS=16, TILE=TILE,
        )  # fmt: skip
    return out
