"""Triton's causal convolution against the reference in float64: outputs, every gradient, documents, carried windows."""

import pytest
import torch
from kernels.interpreter import DEVICE, kernels, poison
from nemo_lite_kernels.conv import causal_conv
from tiny import TOLERANCE, assert_close

triton_conv = kernels("conv")
TOLERANCE = TOLERANCE[torch.float32]


def inputs(B, L, C, W, window, dtype=torch.float64):
    generator = torch.Generator().manual_seed(L * 10 + W)
    shapes = {"x": (B, L, C), "weight": (C, W), "bias": (C,), "window": (B, W - 1, C)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {n: None if n == "window" and not window else t.to(dtype) for n, t in tensors.items()}


def resets(documents, B, L):
    if documents == "none":
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[:, 0] = documents == "first"
    reset[:] |= documents == "every"
    if documents == "ragged":  # with a document of one token
        reset[0, [L // 2, min(L // 2 + 1, L - 1)]] = True
        reset[-1, L - 1] = True
    return reset


def run(function, tensors, reset, dtype, device):
    leaves = {n: None if t is None else t.detach().to(device, dtype).requires_grad_() for n, t in tensors.items()}
    reset = None if reset is None else reset.to(device)
    y = function(leaves["x"], leaves["weight"], leaves["bias"], reset, leaves["window"])
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (y * weighting.to(device, dtype)).sum().backward()
    return y.cpu(), {n: t.grad.cpu() for n, t in leaves.items() if t is not None}


@pytest.mark.parametrize("window", [False, True], ids=["start", "carried"])
@pytest.mark.parametrize("documents", ["none", "first", "every", "ragged"])
@pytest.mark.parametrize("L,C,W", [(1, 3, 4), (3, 5, 4), (11, 130, 4), (70, 3, 4), (5, 2, 2), (7, 3, 6)])
def test_equals_the_reference(monkeypatch, window, documents, L, C, W):
    reset, tensors = resets(documents, 2, L), inputs(2, L, C, W, window)
    y_ref, grads_ref = run(causal_conv, tensors, reset, torch.float64, "cpu")
    poison(monkeypatch)
    y, grads = run(triton_conv.causal_conv, tensors, reset, torch.float32, DEVICE)
    assert_close(y, y_ref, TOLERANCE, "y")
    for name, grad in grads_ref.items():
        assert_close(grads[name], grad, TOLERANCE, name)


def test_views():
    """The model passes slices of one projection, and gradients come back as views."""
    tensors = inputs(2, 9, 4, 4, False, torch.float32)
    wide = torch.cat([tensors["x"], tensors["x"]], dim=-1).to(DEVICE).requires_grad_()
    y_ref, grads_ref = run(causal_conv, tensors, None, torch.float32, "cpu")
    weighting = torch.randn(y_ref.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    for x in (wide[..., 4:], torch.stack([wide[..., 4:]] * 2, dim=-1)[..., 1]):
        wide.grad = None
        y = triton_conv.causal_conv(x, tensors["weight"].to(DEVICE), tensors["bias"].to(DEVICE))
        assert_close(y.cpu(), y_ref, TOLERANCE)
        (y.transpose(1, 2) * weighting.to(DEVICE).transpose(1, 2)).sum().backward()
        assert_close(wide.grad[..., 4:].cpu(), grads_ref["x"], TOLERANCE)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_two_parts_with_gradients_through_the_window(cut):
    tensors = inputs(2, 10, 3, 4, True)

    def parts(x, weight, bias, reset, window):
        extended = torch.cat([window, x], dim=1)
        first = triton_conv.causal_conv(x[:, :cut], weight, bias, None, window)
        second = triton_conv.causal_conv(x[:, cut:], weight, bias, None, extended[:, cut : cut + 3])
        return torch.cat([first, second], dim=1)

    y_ref, grads_ref = run(causal_conv, tensors, None, torch.float64, "cpu")
    y, grads = run(parts, tensors, None, torch.float32, DEVICE)
    assert_close(y, y_ref, TOLERANCE)
    for name, grad in grads_ref.items():
        assert_close(grads[name], grad, TOLERANCE, name)
