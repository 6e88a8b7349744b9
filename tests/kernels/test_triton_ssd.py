"""Triton's scan against the recurrence in float64: outputs, every gradient, carried state, documents; and its decoding
of a few tokens."""

import pytest
import torch
from kernels.interpreter import DEVICE, kernels, poison
from nemo_lite_kernels.ssd import ssd_recurrent
from tiny import TOLERANCE, assert_close

triton_ssd = kernels("ssd")
TOLERANCE = TOLERANCE[torch.float32]
NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def inputs(shape, state=True, dtype=torch.float64):
    """x, B and C are slices of one tensor, as in the model."""
    B, L, H, P, G, N = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, b, c = normal(B, L, H * P + 2 * G * N).to(dtype).split([H * P, G * N, G * N], dim=-1)
    dt = torch.rand(B, L, H, generator=generator, dtype=torch.float64) * 0.5
    A = -torch.rand(H, generator=generator, dtype=torch.float64) * 4 - 0.1
    return {
        "x": x.unflatten(-1, (H, P)),
        "dt": dt.to(dtype),
        "A": A.to(dtype),
        "B": b.unflatten(-1, (G, N)),
        "C": c.unflatten(-1, (G, N)),
        "D": normal(H).to(dtype),
        "state": normal(B, H, P, N).to(dtype) if state else None,
    }


def resets(documents, B, L):
    if documents == "none":
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[:, 0] = documents == "first"
    reset[:] |= documents == "every"
    if documents == "ragged":  # rows cut in different places, with a document of one token
        reset[0, [L // 3, L // 2, min(L // 2 + 1, L - 1)]] = True
        reset[-1, L - 1] = True
    return reset


def run(function, tensors, reset, dtype, device, outputs=("y", "final"), **options):
    """Outputs, and gradients of a random weighting of them with respect to every input."""
    leaves = {n: None if t is None else t.detach().to(device, dtype).requires_grad_() for n, t in tensors.items()}
    reset = None if reset is None else reset.to(device)
    y, final = function(*(leaves[n] for n in NAMES[:6]), reset, leaves["state"], **options)
    generator = torch.Generator().manual_seed(9)
    loss = 0.0
    for name, t in (("y", y), ("final", final)):
        weighting = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(device, t.dtype)
        loss = loss + (t * weighting).sum() if name in outputs else loss
    loss.backward()
    return y.cpu(), final.cpu(), {n: t.grad.cpu() for n, t in leaves.items() if t is not None and t.grad is not None}


def compare(ours, reference):
    assert ours[1].dtype == torch.float32
    assert_close(ours[0], reference[0], TOLERANCE, "y")
    assert_close(ours[1], reference[1], TOLERANCE, "final state")
    for name, grad in reference[2].items():
        assert_close(ours[2][name], grad, TOLERANCE, f"gradient of {name}")


# batch, length, heads, head size, groups, state size; chunk. One tile a chunk, and two (128).
CASES = [
    ((2, 1, 4, 3, 2, 5), 128, "first", True),
    ((1, 17, 4, 4, 4, 6), 16, "none", True),
    ((1, 40, 2, 4, 1, 3), 16, "every", False),
    ((2, 33, 6, 5, 2, 4), 16, "ragged", True),
    ((2, 33, 2, 5, 1, 4), 32, "none", False),
    ((1, 150, 4, 18, 2, 20), 128, "ragged", True),
    ((1, 129, 2, 3, 1, 2), 3, "none", True),  # smaller than what the device multiplies
]


@pytest.mark.parametrize("shape,chunk,documents,state", CASES, ids=str)
def test_equals_the_recurrence(monkeypatch, shape, chunk, documents, state):
    reset, tensors = resets(documents, *shape[:2]), inputs(shape, state)
    reference = run(ssd_recurrent, tensors, reset, torch.float64, "cpu")
    poison(monkeypatch)
    compare(run(triton_ssd.ssd, tensors, reset, torch.float32, DEVICE, chunk_size=chunk), reference)


@pytest.mark.parametrize("documents", ["none", "ragged"])
@pytest.mark.parametrize("length", [128, 201])
def test_chunks_of_two_tiles(monkeypatch, length, documents):
    """As for 16-bit inputs, where a chunk is of 128 tokens."""
    monkeypatch.setattr(triton_ssd, "FLOAT32_CHUNK", 128)
    shape = (2, length, 2, 4, 1, 5)
    reset, tensors = resets(documents, *shape[:2]), inputs(shape)
    reference = run(ssd_recurrent, tensors, reset, torch.float64, "cpu")
    poison(monkeypatch)
    compare(run(triton_ssd.ssd, tensors, reset, torch.float32, DEVICE), reference)


@pytest.mark.parametrize("output", ["y", "final"])
def test_gradients_of_one_output_alone(output):
    shape = (1, 20, 2, 3, 1, 4)
    tensors = inputs(shape)
    reference = run(ssd_recurrent, tensors, None, torch.float64, "cpu", (output,))
    ours = run(triton_ssd.ssd, tensors, None, torch.float32, DEVICE, (output,), chunk_size=16)
    for name, grad in reference[2].items():
        assert_close(ours[2][name], grad, TOLERANCE, name)


def test_heads_of_a_group_shared_between_programs_or_not(monkeypatch):
    shape = (1, 18, 6, 4, 1, 3)
    tensors = inputs(shape)
    shared = run(triton_ssd.ssd, tensors, None, torch.float32, DEVICE)
    monkeypatch.setattr(triton_ssd, "PROGRAMS", 0)
    whole = run(triton_ssd.ssd, tensors, None, torch.float32, DEVICE)
    compare(whole, shared)


def test_a_scan_in_two_parts_with_gradients_through_the_carried_state():
    tensors, cut = inputs((2, 21, 4, 4, 2, 3)), 17

    def parts(x, dt, A, B, C, D, reset, state):
        y1, middle = triton_ssd.ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, None, state)
        y2, final = triton_ssd.ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, None, middle)
        return torch.cat([y1, y2], dim=1), final

    reference = run(ssd_recurrent, tensors, None, torch.float64, "cpu")
    compare(run(parts, tensors, None, torch.float32, DEVICE), reference)


def test_inputs_that_are_views():
    """Of which no dimension is contiguous."""
    tensors = inputs((2, 19, 4, 4, 2, 3))
    views = {n: torch.stack([t.to(DEVICE, torch.float32)] * 2, dim=-1)[..., 1] for n, t in tensors.items()}
    assert views["x"].stride(-1) == 2
    y_ref, final_ref = ssd_recurrent(*(tensors[n] for n in NAMES[:6]), None, tensors["state"])
    y, final = triton_ssd.ssd(*(views[n] for n in NAMES[:6]), None, views["state"])
    assert_close(y.cpu(), y_ref, TOLERANCE)
    assert_close(final.cpu(), final_ref, TOLERANCE)


def test_steps_that_forget_everything_stay_finite():
    tensors = inputs((1, 20, 2, 3, 1, 4))
    tensors["dt"][:, ::3] = 300.0
    tensors["dt"][:, 1::3] = 0.0
    y_ref, final_ref, grads_ref = run(ssd_recurrent, tensors, None, torch.float64, "cpu")
    y, final, grads = run(triton_ssd.ssd, tensors, None, torch.float32, DEVICE, chunk_size=16)
    assert_close(y, y_ref, 1e-4)
    assert_close(final, final_ref, 1e-4)
    for name, grad in grads.items():
        assert bool(grad.isfinite().all()), name
        assert name in ("dt", "A") or assert_close(grad, grads_ref[name], 1e-3, name) is None


FEW = [(1, 1, 4, 3, 2, 5), (3, 3, 6, 5, 2, 4), (2, 9, 2, 40, 1, 130)]


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_few_tokens(monkeypatch, shape):
    """Outputs, the state after any number of tokens, and both at once, are the recurrence's."""
    tensors = inputs(shape)
    args = [tensors[n] for n in NAMES[:6]]
    y_ref, states = ssd_recurrent(*args, None, tensors["state"], all_states=True)
    states = torch.cat([tensors["state"][:, None], states], dim=1)
    args, state = [t.to(DEVICE, torch.float32) for t in args], tensors["state"].to(DEVICE, torch.float32)
    before = state.clone()
    poison(monkeypatch)
    assert_close(triton_ssd.ssd_verify(*args, state).cpu(), y_ref, TOLERANCE)
    B, L = shape[:2]
    for first in range(L + 1):  # each row its own count, every count in some row
        counts = (first + torch.arange(B)) % (L + 1)
        after = triton_ssd.ssd_advance(*args[:4], state, counts.to(DEVICE)).cpu()
        assert_close(after, states[torch.arange(B), counts], TOLERANCE)
        for b in (counts == 0).nonzero():
            assert torch.equal(after[b], before[b].cpu()), "no token leaves the state bit for bit"
    y, after = triton_ssd.state_update(*args, state)
    assert_close(y.cpu(), y_ref, TOLERANCE)
    assert_close(after.cpu(), states[:, -1], TOLERANCE)
    with torch.no_grad():
        y, after = triton_ssd.ssd(*args, None, None)
    y_ref, after_ref = ssd_recurrent(*(tensors[n] for n in NAMES[:6]))
    assert_close(y.cpu(), y_ref, TOLERANCE)
    assert_close(after.cpu(), after_ref, TOLERANCE)
    assert torch.equal(state, before), "the state carried in is not the op's to change"


def test_rows_with_rates_of_their_own():
    """Rows of several layers advance in one call; a token that is not counted is not read."""
    tensors = inputs((3, 4, 4, 4, 2, 3), dtype=torch.float32)
    A = tensors["A"] * torch.tensor([[1.0], [2.0], [3.0]])
    counts = torch.tensor([4, 2, 0])
    x, dt, B, state = (tensors[n].clone().to(DEVICE) for n in ("x", "dt", "B", "state"))
    x[1, 2:], dt[1, 2:], x[2], dt[2] = torch.nan, torch.nan, torch.nan, torch.nan
    after = triton_ssd.ssd_advance(x, dt, A.to(DEVICE), B, state, counts.to(DEVICE)).cpu()
    for row, n in enumerate(counts.tolist()):
        args = [tensors[k][row : row + 1, :n].double() for k in ("x", "dt", "B", "C")]
        wanted = tensors["state"][row : row + 1].double()
        if n:
            D = tensors["D"].double()
            wanted = ssd_recurrent(args[0], args[1], A[row].double(), args[2], args[3], D, None, wanted)[1]
        assert_close(after[row : row + 1], wanted, TOLERANCE)
