"""Labels, their counts, and the chunked cross-entropy.

Labels follow the Hugging Face convention: ``labels[b, t]`` is the token at t itself, or -100 where that token is no
target. What position t predicts is found by shifting here: the main head predicts t+1, MTP depth k predicts t+k+1,
never across a document's end.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from nemo_lite_kernels import loss as reference
from nemo_lite_kernels.common import product_dtype
from torch import Tensor

IGNORE = -100


def shift_left(x_BL: Tensor, by: int, fill: int) -> Tensor:
    """x[b, t + by], and `fill` beyond the row's end."""
    if by >= x_BL.shape[1]:
        return torch.full_like(x_BL, fill)
    return F.pad(x_BL[:, by:], (0, by), value=fill)


def shifted_labels(labels_BL: Tensor, doc_ids_BL: Tensor | None, by: int) -> Tensor:
    """[B, L]: the label `by` positions ahead where it is of the same document, else -100."""
    labels = shift_left(labels_BL, by, IGNORE)
    if doc_ids_BL is not None:
        same = (shift_left(doc_ids_BL, by, -1) == doc_ids_BL) & (doc_ids_BL >= 0)
        labels = labels.masked_fill(~same, IGNORE)
    return labels


def label_counts(labels_BL: Tensor, doc_ids_BL: Tensor | None, depth: int) -> Tensor:
    """[1 + depth] int64: how many labels the main head and each MTP depth have in this batch."""
    return torch.stack([(shifted_labels(labels_BL, doc_ids_BL, k + 1) != IGNORE).sum() for k in range(depth + 1)])


def cross_entropy_chunked(
    h_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    chunk: int,
    nll_and_gradient: Callable = reference.nll_and_gradient,
    weight_gradient: Callable = reference.weight_gradient,
) -> tuple[Tensor, Tensor]:
    """(sum_t weights_t * nll_t, nll [T] detached; 0 where the label is -100), without ever holding T x V logits.

    The gradient is formed chunk by chunk in the forward pass, while the chunk's logits are there, and scaled in the
    backward pass; so nothing is computed twice. The two functions are the backend's.
    """
    training = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        h_TH, weight_VH, labels_T, weights_T, chunk, training, nll_and_gradient, weight_gradient
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TH, weight_VH, labels_T, weights_T, chunk, training, nll_and_gradient, weight_gradient):
        dtype = torch.promote_types(h_TH.dtype, torch.float32)
        keep_T = (labels_T != IGNORE).nonzero().squeeze(-1)  # masked positions cost nothing
        kind = product_dtype(h_TH)
        weight = weight_VH.to(h_TH.dtype).to(kind)
        nll_T = h_TH.new_zeros(len(labels_T), dtype=dtype)
        need_h, need_w = (training and need for need in ctx.needs_input_grad[:2])
        dh = torch.zeros_like(h_TH) if need_h else None
        dw = None
        for rows in keep_T.split(chunk):
            h = h_TH[rows].to(kind)
            nll_T[rows], dlogits = nll_and_gradient(h @ weight.T, labels_T[rows], weights_T[rows], need_h or need_w)
            if dh is not None:
                dh[rows] = (dlogits @ weight).to(dh.dtype)
            if need_w:
                dw = weight_gradient(dlogits, h, dtype, dw)
        if need_w and dw is None:
            dw = torch.zeros_like(weight_VH, dtype=dtype)
        ctx.save_for_backward(dh, dw)
        ctx.dtypes = weight_VH.dtype
        ctx.mark_non_differentiable(nll_T)
        return (nll_T * weights_T.to(dtype)).sum(), nll_T

    @staticmethod
    def backward(ctx, dloss, _):
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else (dh * dloss).to(dh.dtype),
            None if dw is None else (dw * dloss).to(ctx.dtypes),
            *(None,) * 6,
        )
