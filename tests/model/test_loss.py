"""Labels and the chunked cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TOLERANCE, Watch, assert_close

from nemo_lite.train.loss import IGNORE, cross_entropy_chunked, label_counts, shift_left, shifted_labels


def inputs(T, V, H, mask, dtype, weight_dtype=None):
    generator = torch.Generator().manual_seed(T)
    h = torch.randn((T, H), generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn((V, H), generator=generator, dtype=torch.float64).to(weight_dtype or dtype)
    labels = torch.randint(0, V, (T,), generator=generator)
    if mask == "some":
        labels[torch.rand(T, generator=generator) < 0.5] = IGNORE
    elif mask == "all":
        labels[:] = IGNORE
    weights = torch.rand(T, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return h, weight, labels, weights


def plain(h, weight, labels, weights):
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    nll = F.cross_entropy(h @ weight.T, labels, ignore_index=IGNORE, reduction="none")
    loss = (nll * weights.double()).sum()
    (3 * loss).backward()
    return loss, nll, h.grad, weight.grad


@pytest.mark.parametrize("mask", ["none", "some", "all"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "bfloat16", "bfloat16 over float32"])
def test_equals_the_plain_cross_entropy(mask, chunk, dtypes):
    dtype, *rest = (getattr(torch, name) for name in dtypes.split(" over "))
    h, weight, labels, weights = inputs(17, 29, 8, mask, dtype, *rest)
    loss_ref, nll_ref, dh, dw = plain(h, weight, labels, weights)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    loss, nll = cross_entropy_chunked(h, weight, labels, weights, chunk)
    (3 * loss).backward()  # the gradient is formed in forward and must still be scaled
    assert not nll.requires_grad and loss.dtype == nll.dtype == torch.promote_types(dtype, torch.float32)
    assert h.grad.dtype == h.dtype and weight.grad.dtype == weight.dtype
    tolerance = TOLERANCE[dtype]
    for got, want in ((loss, loss_ref), (nll, nll_ref), (h.grad, dh), (weight.grad, dw)):
        assert_close(got, want, tolerance)
    with torch.no_grad():
        assert_close(cross_entropy_chunked(h, weight, labels, weights, chunk)[0], loss, 1e-6)


def test_frozen_inputs_get_no_gradient():
    h, weight, labels, weights = inputs(9, 11, 4, "some", torch.float64)
    _, _, dh, dw = plain(h, weight, labels, weights)
    for frozen in ("h", "weight"):
        a, b = (t.detach().clone().requires_grad_(frozen != name) for t, name in ((h, "h"), (weight, "weight")))
        (3 * cross_entropy_chunked(a, b, labels, weights, 4)[0]).backward()
        assert (a.grad is None) == (frozen == "h") and (b.grad is None) == (frozen == "weight")
        assert_close(b.grad if frozen == "h" else a.grad, dw if frozen == "h" else dh, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_tokens_times_vocabulary(dtype):
    T, V, H, chunk = 512, 300, 8, 16
    h, weight, labels, weights = inputs(T, V, H, "none", dtype)
    with Watch() as watch:
        loss, _ = cross_entropy_chunked(h.requires_grad_(), weight.requires_grad_(), labels, weights, chunk)
        loss.backward()
    largest = max(t.numel() for _, _, results in watch.calls for t in results)
    assert largest <= max(chunk * V, T * H, V * H)


def test_very_large_logits_stay_finite():
    h = torch.full((2, 1), 1e4, requires_grad=True)
    loss, _ = cross_entropy_chunked(h, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), torch.ones(2), 8)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and bool(h.grad.isfinite().all())


def test_shifted_labels():
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    docs = torch.tensor([[0, 0, 0, 1, 1, -1]])
    x = IGNORE
    assert shifted_labels(labels, None, 1).tolist() == [[11, 12, 13, 14, 15, x]]
    assert shifted_labels(labels, docs, 1).tolist() == [[11, 12, x, 14, x, x]]
    assert shifted_labels(labels, docs, 2).tolist() == [[12, x, x, x, x, x]]
    assert shifted_labels(labels, docs, 9).tolist() == [[x] * 6]
    masked = labels.masked_fill(labels == 12, x)
    assert shifted_labels(masked, docs, 1).tolist() == [[11, x, x, 14, x, x]]
    assert label_counts(masked, docs, 2).tolist() == [2, 0, 0]
    assert label_counts(labels, docs, 2).tolist() == [3, 1, 0]
    assert shift_left(labels, 2, 0).tolist() == [[12, 13, 14, 15, 0, 0]]


def test_left_padding_and_documents_that_return():
    """-1 is never a document, and an id may come again after another one: what counts is the token `by` ahead."""
    labels = torch.tensor([[7, 7, 1, 2, 3]])
    docs = torch.tensor([[-1, -1, 0, 0, 0]])
    assert shifted_labels(labels, docs, 1).tolist() == [[IGNORE, IGNORE, 2, 3, IGNORE]]
