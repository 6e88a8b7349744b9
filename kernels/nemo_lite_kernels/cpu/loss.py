"""Softmax and its gradient over rows of logits in one pass (loss.cpp); the reference is nemo_lite_kernels.loss."""

import torch
from torch import Tensor

from nemo_lite_kernels.cpu import Kernel

_CROSS_ENTROPY = Kernel("cross_entropy", "ppppiii")


def nll_and_gradient(
    logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, training: bool
) -> tuple[Tensor, Tensor | None]:
    """nll [T] in float32 and, where `training`, the gradient in the logits' place."""
    logits, (T, V) = logits_TV.contiguous(), logits_TV.shape
    nll_T = torch.empty(T)
    labels, weights = labels_T.contiguous(), weights_T.to(torch.float32).contiguous()
    _CROSS_ENTROPY[logits.dtype](logits, labels, weights, nll_T, T, V, training)
    return nll_T, logits if training else None
