"""Number formats against a definition in exact rational arithmetic, torch's casts, torchao, and between backends."""

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
from nemo_lite_kernels import cpu, quant, select
from nemo_lite_kernels.quant import (
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    SIGNS,
    Spec,
    dequantize,
    fake_quantize,
    hadamard,
    philox,
    quantize,
    quantize_matrix,
    round_to,
)

BLOCKS = [(name, block) for name, format in FORMATS.items() for block in format.blocks or (None,)]
ELEMENTS = {"e2m1": E2M1, "e4m3": E4M3, "e5m2": E5M2}

# -------------------------------------------------------- the formats in rational numbers, written from the definitions


def f32(value: Fraction) -> Fraction:
    """The nearest float32, ties to even; what is larger than the largest becomes None's stand-in, infinity."""
    if value == 0:
        return value
    size = abs(value)
    exponent = max(math.floor(math.log2(size.numerator)) - math.floor(math.log2(size.denominator)) - 1, -126)
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    while exponent > -126 and Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    nearest = round(size / unit) * unit  # Python rounds halves of Fractions to even
    if nearest > FLT_MAX:
        return INFINITY
    return nearest if value > 0 else -nearest


FLT_MAX = Fraction(torch.finfo(torch.float32).max)
INFINITY = Fraction(2) ** 128


def numbers(mantissa, least, largest):
    """All magnitudes of an element by code."""
    found = [Fraction(n) * Fraction(2) ** (least - mantissa) for n in range(2**mantissa)]
    exponent = least
    while found[-1] < largest:
        found += [(1 + Fraction(n, 2**mantissa)) * Fraction(2) ** exponent for n in range(2**mantissa)]
        exponent += 1
    return [value for value in found if value <= largest]


CODES = {
    "e2m1": numbers(1, 0, 6),
    "e4m3": numbers(3, -6, 448),
    "e5m2": numbers(2, -14, 57344),
}


def code_of(value: Fraction, element: str) -> int:
    """The nearest magnitude's code, ties to the even one; larger values take the largest."""
    table = CODES[element]
    size = min(abs(value), table[-1])
    best = min(range(len(table)), key=lambda code: (abs(table[code] - size), code % 2))
    return best


def exact(rows, format, block):
    """Codes, scales and tensor scale of a matrix of Fractions: every step is a float32 operation of the format."""
    R, K = len(rows), len(rows[0])
    element = {"nvfp4": "e2m1", "mxfp8_e5m2": "e5m2", "fp8_e5m2": "e5m2"}.get(format, "e4m3")
    largest = CODES[element][-1]
    A = max(abs(v) for row in rows for v in row)
    high, wide = block or (R, K)
    codes, scales, tensor_scale = [[0] * K for _ in range(R)], {}, None
    if format == "nvfp4":
        S = min(f32(Fraction(2688) / A), FLT_MAX) if A else Fraction(1)
        tensor_scale, sixth, inverse = f32(A / 2688), f32(Fraction(1, 6)), f32(1 / S)
        S6 = f32(S * sixth)
    elif format in ("fp8", "fp8_e5m2"):
        S = min(f32(largest / A), FLT_MAX) if A else Fraction(1)
        tensor_scale = f32(1 / S)
    for top in range(0, R, high):
        for left in range(0, K, wide):
            inside = [(r, k) for r in range(top, min(top + high, R)) for k in range(left, min(left + wide, K))]
            a = max(abs(rows[r][k]) for r, k in inside)
            if format == "nvfp4":
                scale_code = code_of(min(f32(a * S6), Fraction(448)), "e4m3")
                s = CODES["e4m3"][scale_code]
                product = f32(s * inverse)
                factor = FLT_MAX if product == 0 else min(f32(1 / product), FLT_MAX)
                scales[top, left] = s
            elif format.startswith("mxfp8"):
                wanted = f32(a * f32(1 / largest))
                power = -127
                while Fraction(2) ** power < wanted:
                    power += 1
                scales[top, left] = Fraction(2) ** power
                factor = 1 / scales[top, left]
            elif format == "fp8_block":
                ratio = min(f32(largest / a), FLT_MAX) if a else Fraction(1)
                power = 127
                while Fraction(2) ** power > ratio:
                    power -= 1
                factor = Fraction(2) ** power
                scales[top, left] = 1 / factor
            else:
                factor = S
            for r, k in inside:
                sign = rows[r][k] < 0
                codes[r][k] = code_of(f32(rows[r][k] * factor), element) | sign << (3 if element == "e2m1" else 7)
    return codes, scales, tensor_scale


def unpacked(q):
    """Codes one a number."""
    codes = q.codes.view(torch.uint8)
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1) if FORMATS[q.spec.format].element is E2M1 else codes


def adversarial():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(18, 40, generator=g)
    yield "normal", normal
    yield "bfloat16", normal.bfloat16().float()
    yield "small", normal * 1e-30
    yield "large", normal * 1e30
    yield "denormal", normal * 1e-40
    yield "wide", normal * torch.randn(18, 40, generator=g).mul(20).exp2()
    yield "one outlier", torch.where(torch.arange(40) == 3, 1e6, normal)
    yield "equal", torch.full((18, 40), 0.7)
    yield "zero", torch.zeros(18, 40)
    yield "zero blocks", normal * (torch.arange(40) % 32 < 16) * (torch.arange(18) % 5 < 2)[:, None]
    yield "powers of two", torch.randint(-9, 9, (18, 40), generator=g).float().exp2()
    yield "ties", torch.randint(-48, 49, (18, 40), generator=g) / 8
    yield "largest", torch.where(normal > 2, torch.finfo(torch.float32).max, normal)


@pytest.mark.parametrize("format,block", BLOCKS)
@pytest.mark.parametrize("name,x", list(adversarial()), ids=lambda v: v if isinstance(v, str) else "")
def test_equals_the_definition_in_rational_numbers(format, block, name, x):
    q = quantize_matrix(x, Spec.of(format, block))
    codes, scales, tensor_scale = exact([[Fraction(v) for v in row] for row in x.tolist()], format, block)
    found = unpacked(q)[:, :40].tolist()
    zero = 8 if FORMATS[format].element is E2M1 else 128
    same = [[a == b or {a, b} == {0, zero} for a, b in zip(*rows)] for rows in zip(found, codes)]  # the sign of zero
    assert all(map(all, same))
    if block is not None:
        high, wide = block
        for (top, left), scale in scales.items():
            assert all(Fraction(float(q.scales[r, left // wide])) == scale for r in range(top, min(top + high, 18)))
    if tensor_scale is not None:
        assert Fraction(float(q.tensor_scale)) == tensor_scale


def ordinary():
    """Matrices of whole blocks, on which the order of float32 operations decides nothing."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 512, generator=g)
    yield "normal", normal
    yield "bfloat16", normal.bfloat16()
    yield "wide", normal * torch.empty(64, 512).uniform_(-24, 24, generator=g).exp2()
    yield "wide rows", normal * torch.empty(64, 1).uniform_(-24, 24, generator=g).exp2()
    yield "zeros", normal * (torch.arange(512) % 64 < 32) * (torch.rand(64, 512, generator=g) < 0.5)
    ties = torch.randint(-24, 25, (64, 512), generator=g) / 4
    ties[:, ::16] = 6  # NVFP4's block scales are 1 here, the tensor's too
    ties[0, 0] = 2688
    yield "ties", ties


@pytest.mark.parametrize("name,x", list(ordinary()), ids=lambda v: v if isinstance(v, str) else "")
def test_equals_torchao(name, x):
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    q = quantize(x, "mxfp8")
    scales, codes = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    assert same(q.codes, codes) and same(q.scales, scales.view(q.scales.shape))

    q = quantize(x, "nvfp4")
    tensor_scale = per_tensor_amax_to_scale(x.abs().amax())
    scales, codes = nvfp4_quantize(x, per_tensor_scale=tensor_scale)
    assert torch.equal(q.tensor_scale, tensor_scale.view(1))
    normal = q.scales.float() >= 2**-6  # torchao lifts smaller ones to 2^-6; here they are subnormal or zero
    assert normal.any() and torch.equal(q.scales.float()[normal], scales.view(q.scales.shape).float()[normal])
    assert torch.equal(q.codes.view(*q.scales.shape, 8)[normal], codes.view(*q.scales.shape, 8)[normal])


# ------------------------------------------------------------------------------------------------------------ elements


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_and_every_tie(name):
    """All codes stand for what the table says and come back; halfway between two, the even code wins; a hair to either
    side decides otherwise."""
    element, table = ELEMENTS[name], [float(v) for v in CODES[name]]
    exact_values = torch.tensor(table)
    value, code = round_to(exact_values, element)
    assert torch.equal(value, exact_values) and code.tolist() == list(range(len(table)))
    sign = 1 << (3 if name == "e2m1" else 7)
    value, code = round_to(-exact_values, element)
    assert torch.equal(value, -exact_values) and code.tolist() == [c | sign for c in range(len(table))]
    middle = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(table)])
    even = [c if c % 2 == 0 else c + 1 for c in range(len(table) - 1)]
    assert round_to(middle, element)[1].tolist() == even
    up = torch.nextafter(middle, torch.tensor(math.inf))
    down = torch.nextafter(middle, torch.tensor(0.0))
    assert round_to(up, element)[1].tolist() == list(range(1, len(table)))
    assert round_to(down, element)[1].tolist() == list(range(len(table) - 1))


@pytest.mark.parametrize("element", [E4M3, E5M2])
def test_elements_are_torchs(element):
    """Every bfloat16 number and many float32 ones, within the range."""
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    x = torch.cat([bits.view(torch.float32), torch.randn(1 << 16) * torch.randn(1 << 16).mul(6).exp2()])
    x = x[x.isfinite() & (x.abs() <= element.largest)]
    value, code = round_to(x, element)
    theirs = x.to(element.dtype)
    assert torch.equal(value, theirs.float())
    assert torch.equal(code.to(torch.uint8), theirs.view(torch.uint8))


def test_stochastic_rounding_goes_up_as_often_as_it_should():
    """Over all 2^16 draws: exactly round(2^16 x place between the neighbours) times, for every element."""
    draws = torch.arange(1 << 16, dtype=torch.int32)
    for element in ELEMENTS.values():
        for low, high, place in [(0, 1, 0.3), (2, 3, 0.5), (3, 4, 0.0), (4, 5, 0.999), (1, 2, 2**-20)]:
            table = CODES[next(n for n, e in ELEMENTS.items() if e is element)]
            a, b = float(table[low]), float(table[high])
            v = torch.tensor(a + (b - a) * place, dtype=torch.float32)
            exact_place = (Fraction(float(v)) - Fraction(a)) / (Fraction(b) - Fraction(a))
            ups = (round_to(v.expand(1 << 16), element, draws)[1] == high).sum()
            assert abs(int(ups) - exact_place * 65536) <= Fraction(1, 2)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "fp8", "fp8_block"])
def test_stochastic_rounding_is_unbiased(format):
    """Over 400 seeds every value goes up as often as its place between its neighbours says: within five standard
    errors, which over all values have the spread and the mean that chance gives."""
    x, n = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)), 400
    samples = torch.stack([fake_quantize(x, format, rounding="stochastic", seed=seed) for seed in range(n)]).double()
    low, high = samples.amin(0), samples.amax(0)
    place, ups = (x.double() - low) / (high - low), (samples.mean(0) - low) / (high - low)
    clear = (place > 0.05) & (place < 0.95)  # elsewhere one neighbour may never have been taken
    z = ((ups - place) / (place * (1 - place) / n).sqrt())[clear]
    assert len(z) > 1500 and z.abs().max() < 5
    assert abs(float(z.mean())) < 5 / len(z) ** 0.5 and abs(float(z.std()) - 1) < 5 / (2 * len(z)) ** 0.5


def test_random_numbers_are_those_that_are_stated():
    """Element i: word (i % 8) // 2 of counter i // 8, its low half first."""
    x, seed = torch.full((4, 32), 0.3), 0x1234567890ABCDEF
    q = quantize_matrix(x, Spec.of("fp8", rounding="stochastic"), seed, amax=torch.tensor([448.0 * 5 / 8]))
    step = 448.0 / (448.0 * 5 / 8)
    v = torch.tensor(0.3) * step
    low = round_to(v, E4M3, torch.tensor(0xFFFF, dtype=torch.int32))[1]
    place = float((v - E4M3_value(int(low))) / (E4M3_value(int(low) + 1) - E4M3_value(int(low))))
    for i in (0, 1, 7, 8, 77, 127):
        words = philox((i // 8, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32), rounds=7)
        half = int(words[i % 8 // 2]) >> (16 * (i % 2)) & 0xFFFF
        up = place * 65536 > half + 0.5
        assert int(unpacked(q).flatten()[i]) == int(low) + up


def E4M3_value(code):
    return float(CODES["e4m3"][code])


# ------------------------------------------------------------------------------------------------------------ matrices


def test_the_hadamard_transform_is_sylvesters_with_the_fixed_signs():
    H = torch.ones(1, 1)
    for _ in range(4):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    H = torch.tensor(SIGNS, dtype=torch.float32)[:, None] * H / 4
    assert torch.equal(H @ H.T, torch.eye(16))
    x = torch.randint(-8, 8, (5, 48)).float()
    assert torch.equal(hadamard(x), (x.view(5, 3, 16) @ H).view(5, 48))


@pytest.mark.parametrize("format,block", BLOCKS)
def test_what_is_read_back_is_stored_again_unchanged(format, block):
    x = torch.randn(32, 256)
    once = fake_quantize(x, format, block)
    assert torch.equal(dequantize(quantize(x, format, block)), once)
    if format != "nvfp4":  # there the scales of what is read back may be others
        assert torch.equal(fake_quantize(once, format, block), once)
    assert (once - x).norm() < {"nvfp4": 0.12}.get(format, 0.07) * x.norm()


def test_two_codes_a_byte_the_even_column_low():
    q = quantize(torch.tensor([[6.0, 0.5, -1.0, 3.0, *[0.0] * 12]]), "nvfp4")
    assert q.codes.tolist() == [[7 | 1 << 4, (8 | 2) | 5 << 4, 0, 0, 0, 0, 0, 0]]
    assert q.scales.float().tolist() == [[448.0]] and float(q.tensor_scale) == pytest.approx(1 / 448)
    assert q.codes.dtype == torch.uint8 and q.scales.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("format,block", BLOCKS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(format, block, bad):
    x = torch.randn(32, 256)
    x[5, 40] = bad
    y = fake_quantize(x, format, block)
    if FORMATS[format].tensor_scale:
        assert y.isnan().all()
    else:
        high, wide = block
        hit = torch.zeros(32, 256, dtype=torch.bool)
        hit[5 // high * high : 5 // high * high + high, 40 // wide * wide : 40 // wide * wide + wide] = True
        assert torch.equal(y.isnan(), hit)
        clean = x.clone()
        clean[5, 40] = 0
        assert torch.equal(y[~hit], fake_quantize(clean, format, block)[~hit])


def test_a_given_amax_takes_the_place_of_the_tensors():
    x = torch.randn(4, 64)
    assert torch.equal(fake_quantize(x, "fp8", amax=x.abs().amax()), fake_quantize(x, "fp8"))
    wide = fake_quantize(x, "fp8", amax=torch.tensor(1.0))
    assert wide.abs().max() == 1.0  # saturated
    assert torch.equal(fake_quantize(x, "nvfp4", amax=x.abs().amax()), fake_quantize(x, "nvfp4"))
    x[0, 0] = math.inf
    assert fake_quantize(x, "fp8", amax=torch.tensor(1.0)).isnan().all()


@pytest.mark.parametrize("call", [
    lambda x: quantize(x, "nvfp5"),
    lambda x: quantize(x, "nvfp4", block=(1, 32)),
    lambda x: quantize(x, "fp8", block=(1, 32)),
    lambda x: quantize(x, "nvfp4", rounding="up"),
    lambda x: quantize(x.double(), "nvfp4"),
])  # fmt: skip
def test_what_does_not_exist_is_refused(call):
    with pytest.raises(ValueError, match=r"no number format|has no blocks|rounding is|are made from"):
        call(torch.randn(2, 32))


# ------------------------------------------------------------------------------------------------------------ backends


@functools.cache
def backends():
    found = {"reference": quant}
    if cpu.reason() is None:
        from nemo_lite_kernels.cpu import quant as cpp

        found["cpp"] = cpp
    return found


def same(a, b):
    """Equal bits; NaN is NaN."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point() and a.element_size() > 1:
        return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_backend(backend, x, spec, seed=7, amax=None, offsets=None, transpose=False):
    want = quantize_matrix(x, spec, seed, amax, offsets, transpose)
    got = backend.quantize_matrix(x, spec, seed, amax, offsets, transpose)
    assert same(got.codes, want.codes) and same(got.scales, want.scales)
    assert same(got.tensor_scale, want.tensor_scale) and same(got.amax, want.amax)
    assert got.shape == want.shape and same(got.segments, want.segments) and got.across == want.across
    for dtype in (torch.float32, torch.bfloat16):
        v, scale = quant.operand(x, spec, seed, amax, offsets, transpose, dtype)
        w, found = backend.operand(x, spec, seed, amax, offsets, transpose, dtype)
        assert same(w, v) and same(found, scale)
        assert same(backend.values(want, dtype), v)


@pytest.mark.parametrize("format,block", BLOCKS)
@pytest.mark.parametrize("backend", backends())
def test_padding_changes_nothing_else(format, block, backend):
    """Tokens that fill no whole block: the same codes as with zeros behind them, in other matrices too."""
    ops = backends()[backend]
    spec = Spec(format, block)
    x = torch.randn(53, 32)
    offsets = torch.tensor([0, 5, 5, 53])
    whole = ops.quantize_matrix(x, spec, offsets=offsets, transpose=True)
    at = 0
    for first, last in ((0, 5), (5, 53)):
        alone = ops.quantize_matrix(x[first:last], spec, transpose=True)
        P = unpacked(alone).shape[1]
        assert torch.equal(unpacked(whole)[:, at : at + P], unpacked(alone))
        padded = torch.cat([x[first:last], torch.zeros(-(last - first) % spec.width, 32)])
        assert same(ops.quantize_matrix(padded, spec, transpose=True).codes, alone.codes)
        at += P
    assert at == unpacked(whole).shape[1]


def test_the_table_has_the_fastest_backend_first():
    ops = select("cpu")
    choice = next(choice for choice in ops.choices if choice["op"] == "quant")
    assert choice["backend"] == ("cpp" if cpu.reason() is None else "reference")
    x = torch.randn(8, 32)
    spec = Spec.of("nvfp4")
    assert same(ops.quantize(x, spec).codes, quantize_matrix(x, spec).codes)
    assert ops.quantize(x.half(), spec).codes.shape == (8, 16)
