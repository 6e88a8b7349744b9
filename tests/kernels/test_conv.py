"""The causal convolution: torch's backends against the equation, documents and the carried window included."""

import pytest
import torch
import torch.nn.functional as F
from nemo_lite_kernels import OPS, load
from nemo_lite_kernels.conv import causal_conv
from tiny import TOLERANCE, assert_close

BACKENDS = [(n, load(b.functions["causal_conv"])) for n, b in OPS["conv"].items() if b.missing is None]


def equation(x, weight, bias, reset=None, window=None):
    """Token by token and tap by tap."""
    B, L, C = x.shape
    W = weight.shape[1]
    rows = []
    for b in range(B):
        history = list(window[b]) if window is not None else [torch.zeros(C, dtype=x.dtype)] * (W - 1)
        out = []
        for t in range(L):
            if reset is not None and reset[b, t]:
                history = [torch.zeros(C, dtype=x.dtype)] * (W - 1)
            history = [*history[-(W - 1) :], x[b, t]]
            out.append(bias + sum(history[-1 - lag] * weight[:, W - 1 - lag] for lag in range(W)))
        rows.append(torch.stack(out))
    return F.silu(torch.stack(rows))


def inputs(B, L, C, W, dtype, window):
    generator = torch.Generator().manual_seed(L * 10 + W)
    shapes = {"x": (B, L, C), "weight": (C, W), "bias": (C,), "window": (B, W - 1, C)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    if not window:
        tensors["window"] = None
    return tensors


def run(function, tensors, reset):
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}
    y = function(leaves["x"], leaves["weight"], leaves["bias"], reset, leaves["window"])
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    (y * weighting).sum().backward()
    return y, {n: t.grad for n, t in leaves.items() if t is not None}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("window", [False, True], ids=["start", "carried"])
@pytest.mark.parametrize("documents", ["none", "first", "every", "ragged"])
@pytest.mark.parametrize("L,W", [(1, 4), (2, 4), (3, 4), (4, 4), (11, 4), (5, 2), (7, 6)])
def test_backend_equals_the_equation(backend, window, documents, L, W):
    reset = None
    if documents != "none":
        reset = torch.zeros(2, L, dtype=torch.bool)
        reset[:, 0] = documents == "first"
        reset[:] |= documents == "every"
        if documents == "ragged":
            reset[0, [L // 2, min(L // 2 + 1, L - 1)]] = True
            reset[1, L - 1] = True
    tensors = inputs(2, L, 3, W, torch.float64, window)
    y, grads = run(backend[1], tensors, reset)
    y_ref, grads_ref = run(equation, tensors, reset)
    assert_close(y, y_ref, 1e-12)
    for name, grad in grads_ref.items():
        assert_close(grads[name], torch.zeros_like(tensors[name]) if grad is None else grad, 1e-10, name)
    with torch.no_grad():
        assert_close(backend[1](tensors["x"], tensors["weight"], tensors["bias"], reset, tensors["window"]), y, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_computes_in_float32(backend, dtype):
    tensors = inputs(2, 13, 5, 4, dtype, False)
    reset = torch.zeros(2, 13, dtype=torch.bool)
    reset[:, [0, 6]] = True
    y, grads = run(backend[1], tensors, reset)
    exact, exact_grads = run(causal_conv, {n: None if t is None else t.double() for n, t in tensors.items()}, reset)
    assert y.dtype == dtype
    assert_close(y, exact, TOLERANCE[dtype])
    for name, grad in exact_grads.items():
        assert grads[name].dtype == dtype
        assert_close(grads[name], grad, TOLERANCE[dtype], name)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b[0])
def test_a_view_as_input(backend):
    tensors = inputs(2, 9, 4, 4, torch.float64, False)
    wide = torch.cat([tensors["x"], tensors["x"]], dim=-1)
    y, grads = run(backend[1], tensors, None)
    view = wide.requires_grad_()[..., 4:]
    out = backend[1](view, tensors["weight"], tensors["bias"])
    assert_close(out, y, 1e-12)
    (out * torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).sum().backward()
    assert_close(wide.grad[..., 4:], grads["x"], 1e-12)


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_two_parts_with_the_window_between(cut):
    t = inputs(2, 10, 3, 4, torch.float64, True)
    whole = causal_conv(t["x"], t["weight"], t["bias"], None, t["window"])
    extended = torch.cat([t["window"], t["x"]], dim=1)
    first = causal_conv(t["x"][:, :cut], t["weight"], t["bias"], None, t["window"])
    second = causal_conv(t["x"][:, cut:], t["weight"], t["bias"], None, extended[:, cut : cut + 3])
    assert_close(torch.cat([first, second], dim=1), whole, 1e-12)
