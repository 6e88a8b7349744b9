"""Philox against published answers; stochastic rounding: unbiased, repeatable, and better than rounding to nearest."""

import pytest
import torch
from nemo_lite_kernels.quant import philox, stochastic_round
from nemo_lite_kernels.ssd import ssd_recurrent

FORMATS = [torch.float16, torch.bfloat16]

# Random123 1.14, tests/kat_vectors: rounds, counter, key, result.
KNOWN = """
7  00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


def rows(*values):
    return torch.tensor(values, dtype=torch.int64)


def repeated(value, n, dtype=torch.float32):
    return torch.full((1, n), value, dtype=dtype)


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_known_answers(line):
    rounds, *words = line.split()
    words = [int(word, 16) for word in words]
    assert [int(w) for w in philox(words[:4], words[4:6], int(rounds))] == words[6:]
    # The same, vectorised: this counter among others.
    counter = [torch.tensor([5, w, 7]) for w in words[:4]]
    assert [int(w[1]) for w in philox(counter, [torch.tensor(w) for w in words[4:6]], int(rounds))] == words[6:]


def test_words_are_words_and_their_bits_are_half_ones():
    n = 1 << 14
    for rounds in (5, 10):
        words = torch.stack(philox((torch.arange(n), 0, 0, 0), (0, 0), rounds))
        assert words.min() >= 0 and words.max() < 1 << 32
        bits = ((words[:, None] >> torch.arange(32)[:, None]) & 1).double()
        assert (bits.mean(-1) - 0.5).abs().max() < 5 * 0.5 / n**0.5


def test_choices_at_neighbouring_places_are_independent():
    """Errors at the same element must not repeat from position to position, nor from layer to layer or seed to seed:
    they would add up instead of cancelling."""
    n = 1 << 16
    halfway = repeated(1.0 + 2.0**-11, n)
    places = [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 100, 0), (0, 101, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (2, 0, 0)]
    signs = torch.stack(
        [
            stochastic_round(halfway, torch.float16, rows(seed), rows(offset), stream)[0].double().gt(1) * 2.0 - 1
            for seed, offset, stream in places
        ]
    )
    signs = signs.view(len(places), -1, 8).transpose(1, 2).flatten(0, 1)  # the eight elements of a counter, apart
    signs = torch.cat([signs, signs[:8].roll(1, -1)])
    correlation = signs @ signs.T / signs.shape[1] - torch.eye(len(signs))
    assert correlation.abs().max() < 5.5 / signs.shape[1] ** 0.5


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [1.0003, -0.7770001, 3.1e-5, 1.2e-6, -4.7e-8, 700.3, -60001.5])
def test_the_expectation_is_the_value(value, wide, dtype):
    n = 1 << 16
    x = repeated(value, n, wide)
    rounded = stochastic_round(x, dtype, rows(3), rows(11))
    assert rounded.dtype == dtype and rounded.shape == x.shape
    neighbours = rounded.unique().double()
    exact = x[0, 0].double()
    assert len(neighbours) == 2 and neighbours[0] < exact < neighbours[1]
    # They are neighbours: nothing lies between them.
    assert torch.nextafter(neighbours[0].to(dtype), neighbours[1].to(dtype)).double() == neighbours[1]
    spacing = neighbours[1] - neighbours[0]
    share = (exact - neighbours[0]) / spacing
    deviation = (share * (1 - share) / n).sqrt()
    up = (rounded == neighbours[1].to(dtype)).double().mean()
    assert abs(up - share) < 5 * deviation + 2.0**-16


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_value_of_the_format_stays(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[every.isfinite()][None]
    for seed in range(3):
        for wide in (torch.float32, torch.float64):
            rounded = stochastic_round(every.to(wide), dtype, rows(seed), rows(0))
            assert torch.equal(rounded.view(torch.int16), every.view(torch.int16)), "bit for bit, the sign of 0 too"
    assert torch.equal(stochastic_round(every, dtype, rows(0), rows(0)), every)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_large_values_and_nan(dtype):
    largest = torch.finfo(dtype).max
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, -inf, nan, largest * 1.0001, -largest * 1.0001, 3e38, -3e38]])
    for seed in range(20):
        rounded = stochastic_round(x, dtype, rows(seed), rows(0))[0].float()
        assert rounded[2].isnan() and rounded[[0, 1, 3, 4]].tolist() == [largest, -largest, largest, -largest]
        assert rounded.abs()[[5, 6]].max() <= largest and rounded[[0, 1, 3, 4, 5, 6]].isfinite().all()
    below = largest * (1 - torch.finfo(dtype).eps / 8)  # between the two largest
    assert stochastic_round(repeated(below, 4096), dtype, rows(1), rows(1)).float().unique().numel() == 2


def test_subnormals():
    """Below the smallest normal number the spacing stays the smallest number; what is far below goes up rarely."""
    smallest = 2.0**-24
    x = repeated(2.25 * smallest, 1 << 14)
    assert stochastic_round(x, torch.float16, rows(0), rows(0)).double().unique().tolist() == [
        2 * smallest,
        3 * smallest,
    ]
    assert not stochastic_round(repeated(1e-30, 1 << 14), torch.float16, rows(0), rows(0)).any()
    crossing = repeated(2.0**-14 - 0.5 * smallest, 1 << 14)  # from the largest subnormal number to the first normal one
    assert stochastic_round(crossing, torch.float16, rows(0), rows(0)).double().unique().tolist() == [
        2.0**-14 - smallest,
        2.0**-14,
    ]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64])
def test_a_row_does_not_see_its_neighbours(size):
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    seed, offset = rows(1, 2**40, -3, 2**62, 1), rows(0, 5, 5, 2**33, 9)
    layer = rows(0, 1, 2, 3, 0)
    together = stochastic_round(x, torch.float16, seed, offset, layer)
    assert torch.equal(together, stochastic_round(x, torch.float16, seed, offset, layer)), "deterministic"
    for b in (4, 2, 0, 1, 3):
        alone = stochastic_round(x[b : b + 1], torch.float16, seed[b : b + 1], offset[b : b + 1], int(layer[b]))
        assert torch.equal(alone[0], together[b])
    # An element's choice depends on its index, not on the row's length or shape.
    longer = torch.cat([x, x], dim=1)
    assert torch.equal(stochastic_round(longer, torch.float16, seed, offset, layer)[:, :size], together)
    assert torch.equal(stochastic_round(x[..., None], torch.float16, seed, offset, layer)[..., 0], together)


def test_seed_position_and_stream_each_change_the_choice():
    x = repeated(1.0 + 2.0**-11, 256)  # halfway between two values
    base = stochastic_round(x, torch.float16, rows(1), rows(1), 1)
    others = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1 + 2**32, 1, 1), (1, 1 + 2**32, 1)]
    for seed, offset, stream in others:
        differ = (stochastic_round(x, torch.float16, rows(seed), rows(offset), stream) != base).sum()
        assert 80 < differ < 176, (seed, offset, stream)


def test_views_the_input_and_empty_rows():
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    view, before = x.transpose(1, 2), x.clone()
    args = (torch.bfloat16, rows(1, 2, 3, 4), rows(0, 0, 0, 0))
    assert torch.equal(stochastic_round(view, *args), stochastic_round(view.contiguous(), *args))
    assert torch.equal(x, before), "the input is not the op's to change"
    assert stochastic_round(torch.empty(0, 3), torch.float16, rows(), rows()).shape == (0, 3)
    with pytest.raises(ValueError, match=r"float16 or bfloat16, not torch.float32 to torch.int8"):
        stochastic_round(x, torch.int8, *args[1:])


def test_plain_float16_state_drifts_more():
    """Thousands of recurrent steps with the state stored in fp16 after each: to nearest, an addition below half the
    spacing is lost every time; rounded stochastically, only noise is added."""
    B, H, P, N, steps = 1, 2, 4, 8, 5000
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    A, D = torch.tensor([-0.3, -1.0], dtype=torch.float64), torch.zeros(H, dtype=torch.float64)
    dt = torch.full((B, 1, H), 1e-3, dtype=torch.float64)  # a memory of thousands of tokens
    x, b, c = 1 + 0.3 * normal(steps, B, 1, H, P), 1 + 0.3 * normal(steps, B, 1, 1, N), normal(steps, B, 1, 1, N)
    store = {
        "exact": lambda state, t: state,
        "nearest": lambda state, t: state.half(),
        "stochastic": lambda state, t: stochastic_round(state, torch.float16, rows(7), rows(t)),
    }
    states = {name: torch.zeros(B, H, P, N, dtype=torch.float64) for name in store}
    outputs = {name: [] for name in store}
    late = {name: [] for name in store}
    with torch.no_grad():
        for t in range(steps):
            for name in store:
                dtype = torch.float64 if name == "exact" else torch.float32
                args = (a.to(dtype) for a in (x[t], dt, A, b[t], c[t], D))
                y, state = ssd_recurrent(*args, None, states[name].to(dtype))
                states[name] = store[name](state, t)
                if t >= steps - 1000:
                    outputs[name].append(y.double())
                    late[name].append(states[name].double())
    for kept in (outputs, late):
        exact = torch.stack(kept["exact"])
        error = {name: float((torch.stack(kept[name]) - exact).norm() / exact.norm()) for name in store}
        assert error["nearest"] > 0.03 and error["stochastic"] < 0.02, error
        assert error["nearest"] > 4 * error["stochastic"], error
