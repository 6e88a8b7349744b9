"""Linears of few rows in C++, and weights packed to 8 and 4 bits, against float64, at every level of this machine."""

import pytest
import torch
import torch.nn.functional as F
from kernels.levels import compiled_for
from nemo_lite_kernels import cpu
from nemo_lite_kernels import linear as linear_module
from nemo_lite_kernels.cpu.linear import FEW_ROWS, linear, unpack
from nemo_lite_kernels.linear import PackedWeight
from nemo_lite_kernels.linear import linear as reference

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
# [N, K]: no multiples of a vector or panel among them, and whole tiles.
SHAPES = [(1, 1), (5, 7), (3, 33), (37, 130), (48, 64), (129, 1000), (16, 2048)]
PACKED = [(1, 32), (7, 32), (16, 64), (37, 96), (50, 160), (33, 1056)]  # K a multiple of 32
ROWS = [*range(1, 8), 12, 13, 16, 17]


@pytest.fixture(scope="module", params=list(cpu.LEVELS), autouse=True)
def level(request):
    with compiled_for(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel is given to write into holds NaN: what it leaves out shows."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def with_threads(n, function, *args):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def assert_near(y, x, weight, dtype, rounded=0.0):
    """Within the rounding of sums, of the result where it is bfloat16, and of x by `rounded` of its size."""
    x, weight = x.double(), weight.double()
    exact, size = F.linear(x, weight), F.linear(x.abs(), weight.abs())
    allowed = size * (EPS[torch.float32] * x.shape[-1] ** 0.5 + rounded) + 1e-30
    if dtype == torch.bfloat16:
        # Where bfloat16 is multiplied in hardware, and in torch's products, tiny numbers and partial sums are rounded.
        allowed = allowed + exact.abs() * EPS[dtype] + (size * EPS[dtype] / 8 if len(x) > FEW_ROWS else 0)
    assert y.dtype == dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed).all()), float((y.double() - exact).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kinds", ["float32", "bfloat16", "float32 over bfloat16", "bfloat16 over float32"])
def test_product_and_nothing_depends_on_the_neighbours(shape, kinds, poison):
    (N, K), (x_kind, _, w_kind) = shape, kinds.partition(" over ")
    dtype, weight_dtype = getattr(torch, x_kind), getattr(torch, w_kind or x_kind)
    weight = numbers(N, K, dtype=weight_dtype)
    rounded = 2.0**-8 if kinds == "float32 over bfloat16" else 0.0
    alone = None
    for rows in reversed(ROWS):
        x = numbers(ROWS[-1], K, seed=1, dtype=dtype)[:rows]
        used = weight.to(dtype) if rows > FEW_ROWS else weight
        y = linear(x, weight)
        assert_near(y, x, used, dtype, rounded)
        if rows <= FEW_ROWS:
            alone = torch.cat([linear(row, weight) for row in x.split(1)]) if alone is None else alone
            assert torch.equal(y, alone[:rows])
            assert torch.equal(with_threads(2, linear, x, weight), y)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", PACKED, ids=str)
def test_packed_product_and_nothing_depends_on_the_neighbours(shape, bits, group, poison):
    N, K = shape
    weight = PackedWeight.pack(numbers(N, K), bits, group)
    plain = weight.dequantize(torch.float64)
    alone = None
    for dtype in (torch.float32, torch.bfloat16):
        x_all = numbers(FEW_ROWS, K, seed=2, dtype=dtype)
        x_all[0, :32] = 0
        alone = torch.cat([linear(row, weight) for row in x_all.split(1)])
        for rows in (1, 2, 5, 6, 7, 13, 16):
            x = x_all[:rows]
            y = linear(x, weight)
            # x is rounded by half of 1/127 of a group's largest value.
            padded = F.pad(x.double().abs(), (0, -K % group)).unflatten(-1, (-1, group))
            half = (padded.amax(-1, keepdim=True) / 254).expand_as(padded).flatten(-2)[:, :K]
            exact = F.linear(x.double(), plain)
            allowed = F.linear(half, plain.abs()) + 1e-5 * F.linear(x.double().abs(), plain.abs())
            allowed = allowed + (exact.abs() + allowed) * (EPS[dtype] if dtype == torch.bfloat16 else 0)
            assert bool(((y.double() - exact).abs() <= allowed + 1e-30).all())
            assert torch.equal(y, alone[:rows])
        assert torch.equal(with_threads(2, linear, x_all, weight), alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_that_both_sides_have_are_multiplied_exactly(bits, level):
    """Every code against every code: sums of whole numbers leave nothing to round."""
    top = 127 if bits == 8 else 7
    w = torch.arange(-top, top + 1).repeat(100)[: 20 * 64].view(20, 64).float()
    w[:, 31::32] = -(top + 1 if bits == 4 else top)  # so that the scale of each group is 1
    weight = PackedWeight.pack(w, bits)
    assert torch.equal(weight.dequantize(), w)
    x = torch.arange(-127, 128).repeat(6)[: 9 * 64].view(9, 64).float()
    x[:, ::32] = 127  # likewise
    assert torch.equal(linear(x, weight), x @ w.T)
    assert torch.equal(linear(-x, weight), -(x @ w.T))


def test_any_number_of_dimensions_and_strides():
    weight = numbers(24, 40)
    x = numbers(2, 3, 40)
    assert torch.equal(linear(x, weight), linear(x.flatten(0, 1), weight).view(2, 3, 24))
    assert torch.equal(linear(x[0, 0], weight), linear(x[0, :1], weight)[0])
    strided = numbers(40, 5).T
    assert torch.equal(linear(strided, weight), linear(strided.contiguous(), weight))
    turned = numbers(40, 24).T  # a weight that does not lie as the kernels read it
    torch.testing.assert_close(linear(x, turned), x @ turned.T)
    assert linear(x[:0], weight).shape == (0, 3, 24)
    # Memory at an odd place: nothing may ask for alignment.
    shifted = numbers(24 * 40 + 1)[1:].view(24, 40)
    torch.testing.assert_close(linear(x, shifted), x @ shifted.T)


def test_what_the_kernel_does_not_take_goes_to_torch():
    weight, x = numbers(6, 32), numbers(3, 32)
    assert torch.equal(linear(x.double(), weight), F.linear(x.double(), weight.double()))
    packed = PackedWeight.pack(weight, 8)
    assert torch.equal(linear(x.double(), packed), reference(x.double(), packed))
    assert linear(x.to("meta"), weight.to("meta")).shape == (3, 6)
    for wrong in (numbers(3, 31), numbers(3, 64)):
        for w in (weight, PackedWeight.pack(weight, 4)):
            with pytest.raises(RuntimeError):
                linear(wrong, w)
    with torch.inference_mode(False), torch.enable_grad():
        w = numbers(6, 32).requires_grad_()
        linear(numbers(3, 32), w).sum().backward()
        assert w.grad is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_shows(bits):
    weight = PackedWeight.pack(numbers(20, 64), bits)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = numbers(3, 64)
        x[1, 40] = bad
        y = linear(x, weight)
        assert bool(y[[0, 2]].isfinite().all()) and not bool(y[1].isfinite().any())
    for tiny in (1e-37, 1e-40, 1e-45, 0.0):  # too small to be divided by: nothing, and no NaN
        assert float(linear(torch.full((2, 64), tiny), weight).abs().max()) < 1e-33


# ------------------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 32), (37, 160), (3, 5, 96)], ids=str)
def test_packing_rounds_to_the_nearest(shape, group):
    w = numbers(*shape)
    for bits in (8, 4):
        packed = PackedWeight.pack(w, bits, group)
        back = packed.dequantize()
        assert back.shape == w.shape and back.dtype == torch.float32
        K = shape[-1]
        scale = packed.scales.float().transpose(-2, -1).flatten(-3, -2)[..., : shape[-2], :].abs()
        scale = scale.repeat_interleave(group, -1)[..., :K]
        # Half a step; and int4 may clip what is as large as the largest with the other sign: to 7 of 8.75 steps.
        slack = 0.5 if bits == 8 else 1.75
        assert bool(((back - w).abs() <= slack * scale * 1.001).all())
        assert packed.shape == w.shape and packed.numel() == w.numel()
        if shape[-2] % 16 == 0:
            assert packed.nbytes == w.numel() * bits // 8 + 2 * w.numel() // group
        if len(shape) == 3:
            for e in range(shape[0]):
                one = packed[e]
                assert one.shape == w.shape[1:] and torch.equal(one.dequantize(), back[e])
                alone = PackedWeight.pack(w[e], bits, group)
                assert torch.equal(alone.codes, one.codes) and torch.equal(alone.scales, one.scales)
        for dtype in (torch.bfloat16, torch.float64):
            torch.testing.assert_close(packed.dequantize(dtype).float(), back, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [*PACKED, (3, 5, 96)], ids=str)
def test_unpacking(shape, bits):
    for group in (32, 64, 128):
        packed = PackedWeight.pack(numbers(*shape), bits, group)
        want = packed.dequantize()
        for threads in (1, 2):
            assert torch.equal(with_threads(threads, unpack, packed, torch.float32), want)
            assert torch.equal(with_threads(threads, unpack, packed, torch.bfloat16), want.bfloat16())
        assert torch.equal(unpack(packed, torch.float64), packed.dequantize(torch.float64))
    plain = numbers(3, 32)
    assert unpack(plain, torch.bfloat16) is plain


def test_int4_errs_less_than_plain_rounding():
    w = numbers(64, 256)
    for group in (32, 64, 128):
        blocks = w.view(64, -1, group)
        scale = blocks.abs().amax(-1, keepdim=True) / 7
        naive = ((blocks / scale).round() * scale).view_as(w)
        error = (PackedWeight.pack(w, 4, group).dequantize() - w).square().mean()
        assert error < 0.85 * (naive - w).square().mean()
        assert (PackedWeight.pack(w, 8, group).dequantize() - w).square().mean() < error / 100


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zero(bits):
    w = numbers(18, 64)
    w[3], w[17, 32:] = 0, 0
    packed = PackedWeight.pack(w, bits)
    back = packed.dequantize()
    assert bool((back[3] == 0).all()) and bool((back[17, 32:] == 0).all()) and bool((back[4] != 0).any())
    y = linear(numbers(2, 64), packed)
    assert bool((y[:, 3] == 0).all()) and bool(y.isfinite().all())


def test_what_cannot_be_packed_is_refused():
    for shape, bits, group in (((4, 33), 8, 32), ((4, 32), 5, 32), ((4, 32), 4, 48), ((4, 16), 4, 32)):
        with pytest.raises(ValueError, match="cannot pack"):
            PackedWeight.pack(numbers(*shape), bits, group)


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_in_pieces(bits, monkeypatch):
    w = numbers(2, 37, 96)
    whole = PackedWeight.pack(w, bits)
    monkeypatch.setattr(linear_module, "AT_ONCE", 16 * 96 + 1)
    pieces = PackedWeight.pack(w, bits)
    assert torch.equal(pieces.codes, whole.codes) and torch.equal(pieces.scales, whole.scales)
