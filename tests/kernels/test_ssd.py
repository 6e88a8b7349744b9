"""The SSD scan: torch's backends against the recurrence, in outputs, all gradients, and carried state."""

import pytest
import torch
from nemo_lite_kernels import OPS, load
from nemo_lite_kernels.ssd import ssd_chunked, ssd_recurrent
from tiny import TOLERANCE, Watch, assert_close

NAMES = ("x", "dt", "A", "B", "C", "D", "state")
BACKENDS = [(n, load(b.functions["ssd"])) for n, b in OPS["ssd"].items() if b.missing is None and n != "recurrent"]

# batch, length, heads, head size, groups, state size
SHAPES = [(2, 1, 4, 3, 2, 5), (2, 2, 4, 4, 1, 3), (1, 17, 4, 4, 4, 6), (2, 33, 6, 5, 2, 4), (1, 130, 2, 3, 1, 2)]


def inputs(shape, dtype, state=True, seed=0):
    B, L, H, P, G, N = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = {
        "x": normal(B, L, H, P),
        "dt": torch.rand((B, L, H), generator=generator, dtype=torch.float64) * 0.5,
        "A": -torch.rand(H, generator=generator, dtype=torch.float64) * 4 - 0.1,
        "B": normal(B, L, G, N),
        "C": normal(B, L, G, N),
        "D": normal(H),
        "state": normal(B, H, P, N) if state else None,
    }
    # The decay's inputs and the state are float32 or better in the model, whatever the activations are.
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: None if t is None else t.to(dtype if name in "xBC" else wide).requires_grad_()
        for name, t in tensors.items()
    }


def run(function, tensors, reset=None, **options):
    """Outputs, and gradients of a random weighting of them with respect to every input."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, final = function(*(leaves[n] for n in NAMES[:6]), reset, leaves["state"], **options)
    generator = torch.Generator().manual_seed(9)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum() for t in (y, final)
    )
    loss.backward()
    return y, final, {name: t.grad for name, t in leaves.items() if t is not None}


def resets(kind, B, L):
    if kind == "none":
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    if kind == "first":
        reset[:, 0] = True
    elif kind == "every":
        reset[:] = True
    else:  # rows cut in different places, with a document of one token
        reset[0, [L // 3, L // 2, min(L // 2 + 1, L - 1)]] = True
        reset[-1, L - 1] = True
    return reset


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("chunk", [1, 3, 8, 128])
@pytest.mark.parametrize("documents", ["none", "first", "every", "ragged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backend_equals_the_recurrence(backend, chunk, documents, shape):
    reset = resets(documents, *shape[:2])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if dtype != torch.float64 and shape[1] > 40:
            continue
        tensors = inputs(shape, dtype, state=documents != "every")
        y, final, grads = run(backend[1], tensors, reset, chunk_size=chunk)
        y_ref, final_ref, grads_ref = run(ssd_recurrent, tensors, reset)
        assert y.dtype == dtype and final.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(y, y_ref, TOLERANCE[dtype], f"y {dtype}")
        assert_close(final, final_ref, TOLERANCE[dtype], f"final state {dtype}")
        for name, grad in grads_ref.items():
            assert grads[name].dtype == tensors[name].dtype
            # Sums over all tokens that cancel: five times the outputs' tolerance.
            assert_close(grads[name], grad, 5 * TOLERANCE[dtype], f"gradient of {name}, {dtype}")


def test_the_recurrence_is_the_equation():
    """One head, written with numbers only."""
    t = {name: v.detach() for name, v in inputs((1, 5, 1, 2, 1, 3), torch.float64).items()}
    reset = torch.tensor([[False, False, True, False, False]])
    y, final = ssd_recurrent(*(t[n] for n in NAMES[:6]), reset, t["state"])
    h = t["state"][0, 0]
    for i in range(5):
        decay = 0.0 if reset[0, i] else torch.exp(t["dt"][0, i, 0] * t["A"][0])
        h = decay * h + t["dt"][0, i, 0] * torch.outer(t["x"][0, i, 0], t["B"][0, i, 0])
        assert_close(y[0, i, 0], h @ t["C"][0, i, 0] + t["D"][0] * t["x"][0, i, 0], 1e-12)
    assert_close(final[0, 0], h, 1e-12)


@pytest.mark.parametrize("cut", [1, 2, 9, 16])
def test_a_scan_in_two_parts_with_gradients_through_the_carried_state(cut):
    tensors = inputs((2, 17, 4, 4, 2, 3), torch.float64)

    def parts(x, dt, A, B, C, D, reset, state, **options):
        y1, middle = ssd_chunked(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, None, state, **options)
        y2, final = ssd_chunked(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, None, middle, **options)
        return torch.cat([y1, y2], dim=1), final

    whole, apart = run(ssd_chunked, tensors, chunk_size=4), run(parts, tensors, chunk_size=4)
    assert_close(apart[0], whole[0], 1e-10)
    assert_close(apart[1], whole[1], 1e-10)
    for name, grad in whole[2].items():
        assert_close(apart[2][name], grad, 1e-10, name)


def test_state_after_every_token():
    tensors = inputs((2, 5, 4, 3, 2, 4), torch.float64)
    args = [tensors[n].detach() for n in NAMES[:6]]
    _, states = ssd_recurrent(*args, None, tensors["state"].detach(), all_states=True)
    for n in range(1, 6):
        short = [t[:, :n] if t.dim() > 1 else t for t in args]
        assert_close(states[:, n - 1], ssd_recurrent(*short, None, tensors["state"].detach())[1], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
def test_inputs_that_are_views(backend):
    """The model passes slices of one projection."""
    tensors = inputs((2, 11, 4, 4, 2, 3), torch.float64)
    views = {
        name: t if t is None or t.dim() < 3 else torch.stack([t.detach(), t.detach()], dim=-1)[..., 1]
        for name, t in tensors.items()
    }
    assert not views["x"].is_contiguous()
    args = [views[n] for n in NAMES[:6]]
    y, final = backend[1](*args, None, views["state"], chunk_size=4)
    y_ref, final_ref = ssd_recurrent(*(tensors[n] for n in NAMES[:6]), None, tensors["state"])
    assert_close(y, y_ref, 1e-10)
    assert_close(final, final_ref, 1e-10)


def test_steps_that_forget_everything_stay_finite():
    """exp(dt A) underflows; differences of large sums of logarithms must not become 0 * inf."""
    tensors = inputs((1, 20, 2, 3, 1, 4), torch.float32)
    with torch.no_grad():
        tensors["dt"][:, ::3] = 300.0
        tensors["dt"][:, 1::3] = 0.0
    y, final, grads = run(ssd_chunked, tensors, chunk_size=8)
    y_ref, final_ref, _ = run(ssd_recurrent, tensors)
    assert_close(y, y_ref, 1e-4)
    assert_close(final, final_ref, 1e-4)
    assert all(bool(grad.isfinite().all()) for grad in grads.values())


def test_scores_are_built_per_group_not_per_head():
    B, L, H, P, G, N, chunk = 2, 32, 8, 3, 2, 5, 16
    tensors = [t.detach() for t in inputs((B, L, H, P, G, N), torch.float32).values()]
    with Watch() as watch:
        ssd_chunked(*tensors[:6], None, tensors[6], chunk_size=chunk)
    scores = [a for _, a, _ in watch.named("bmm") if a[0].shape[1:] == (chunk, N) and a[1].shape[1:] == (N, chunk)]
    assert sum(a[0].shape[0] for a in scores) == B * (L // chunk) * G
