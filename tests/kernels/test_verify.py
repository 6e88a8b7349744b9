"""A few tokens in closed form against the recurrence: outputs, and the state after any number of them."""

import pytest
import torch
from nemo_lite_kernels.ssd import ssd_advance, ssd_recurrent, ssd_verify
from tiny import TOLERANCE, Watch, assert_close

# batch, length, heads, head size, groups, state size
SHAPES = [(1, 1, 4, 3, 2, 5), (1, 2, 4, 4, 1, 3), (3, 3, 6, 5, 2, 4), (2, 8, 4, 4, 4, 6), (5, 5, 2, 8, 1, 16)]


def inputs(shape, dtype, state_dtype=None):
    B, L, H, P, G, N = shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    # x, B and C are slices of one convolution's output, as in the model.
    xBC = torch.randn(B, L, H * P + 2 * G * N, generator=generator, dtype=torch.float64).to(dtype)
    x, b, c = xBC.split([H * P, G * N, G * N], dim=-1)
    dt = torch.rand(B, L, H, generator=generator, dtype=torch.float64).to(wide)
    A = (-torch.rand(H, generator=generator, dtype=torch.float64) * 4 - 0.1).to(wide)
    D = torch.randn(H, generator=generator, dtype=torch.float64).to(wide)
    state = torch.randn(B, H, P, N, generator=generator, dtype=torch.float64).to(state_dtype or wide)
    return x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)), D, state


def advance(x, dt, A, b, c, D, state, counts):
    return ssd_advance(x, dt, A, b, state, counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_states_are_the_recurrence_s(shape, dtype):
    tensors = inputs(shape, dtype)
    x, dt, A, b, c, D, state = tensors
    before = state.clone()
    y_ref, states = ssd_recurrent(x, dt, A, b, c, D, None, state, all_states=True)
    y = ssd_verify(*tensors)
    assert y.dtype == dtype and y.shape == x.shape
    assert_close(y, y_ref, 1e-12 if dtype == torch.float64 else TOLERANCE[dtype])
    B, L = x.shape[:2]
    states = torch.cat([state[:, None], states], dim=1)
    for first in range(L + 1):  # each row its own count, every count in some row
        counts = (first + torch.arange(B)) % (L + 1)
        after = advance(*tensors, counts)
        assert after.dtype == states.dtype
        wanted = states[torch.arange(B), counts]
        assert_close(after, wanted, 1e-12 if dtype == torch.float64 else TOLERANCE[torch.float32])
    assert torch.equal(state, before), "the state carried in is not the op's to change"


def test_no_token_leaves_the_state_bit_for_bit():
    tensors = inputs((3, 3, 6, 5, 2, 4), torch.float32)
    assert torch.equal(advance(*tensors, torch.tensor([0, 2, 0]))[::2], tensors[-1][::2])


def test_a_token_not_counted_is_not_read():
    x, dt, A, b, _, _, state = inputs((2, 4, 4, 4, 2, 3), torch.float64)
    counts = torch.tensor([2, 0])
    wanted = ssd_advance(x, dt, A, b, state, counts)
    x, dt = x.clone(), dt.clone()
    x[0, 2:], x[1], dt[0, 2:], dt[1] = 1e9, -1e9, 1e9, 1e9
    assert torch.equal(ssd_advance(x, dt, A, b, state, counts), wanted)


def test_outputs_do_not_see_later_tokens():
    x, dt, A, b, c, D, state = inputs((2, 4, 4, 4, 2, 3), torch.float64)
    whole = ssd_verify(x, dt, A, b, c, D, state)
    for n in range(1, 4):
        assert_close(ssd_verify(x[:, :n], dt[:, :n], A, b[:, :n], c[:, :n], D, state), whole[:, :n], 1e-13)


def test_layers_advance_in_one_call():
    """Rows of several layers, each with its own A."""
    layers = [inputs((2, 3, 4, 4, 2, 3), torch.float64) for _ in range(3)]
    layers = [(x * (i + 1), dt, A * (i + 1), b, c, D, state) for i, (x, dt, A, b, c, D, state) in enumerate(layers)]
    counts = torch.tensor([3, 1])
    together = ssd_advance(
        torch.cat([t[0] for t in layers]),
        torch.cat([t[1] for t in layers]),
        torch.cat([t[2].expand(2, -1) for t in layers]),
        torch.cat([t[3] for t in layers]),
        torch.cat([t[6] for t in layers]),
        counts.repeat(3),
    )
    assert_close(together, torch.cat([advance(*t, counts) for t in layers]), 1e-13)


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_state_stored_narrow_is_computed_wide(state_dtype):
    tensors = inputs((2, 3, 4, 4, 2, 3), torch.float32, state_dtype)
    wide = (*tensors[:-1], tensors[-1].float())
    assert torch.equal(ssd_verify(*tensors), ssd_verify(*wide))
    after = advance(*tensors, torch.tensor([1, 3]))
    assert after.dtype == torch.float32 and torch.equal(after, advance(*wide, torch.tensor([1, 3])))


def test_steps_that_forget_everything_stay_finite():
    x, dt, A, b, c, D, state = inputs((1, 8, 2, 3, 1, 4), torch.float32)
    dt[:, ::3], dt[:, 1::3] = 300.0, 0.0
    y_ref, states = ssd_recurrent(x, dt, A, b, c, D, None, state, all_states=True)
    assert_close(ssd_verify(x, dt, A, b, c, D, state), y_ref, 1e-4)
    assert_close(ssd_advance(x, dt, A, b, state, torch.tensor([5])), states[:, 4], 1e-4)


def test_work_does_not_grow_with_the_tokens():
    """No loop over the tokens: as many operations for eight as for two."""
    counts = {}
    for L in (2, 8):
        tensors = inputs((3, L, 4, 4, 2, 3), torch.float32)
        for name, run in (
            ("verify", lambda t: ssd_verify(*t)),
            ("advance", lambda t: advance(*t, torch.full((3,), 2))),
        ):
            run(tensors)  # the constants of this length are made once
            with Watch() as watch:
                run(tensors)
            counts.setdefault(name, []).append(len(watch.calls))
    assert all(len(set(n)) == 1 for n in counts.values()), counts
