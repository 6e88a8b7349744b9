"""What the chunked cross-entropy does with a chunk of logits: the references.

Shape letters: T tokens, V vocabulary, M rows, N and K outputs and inputs of a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_lite_kernels.common import accumulate_dtype


def nll_and_gradient(
    logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, training: bool
) -> tuple[Tensor, Tensor | None]:
    """nll [T], in float32 or float64, and where `training` the logits' gradient of sum_t weights_t nll_t, in their
    dtype. It may be in their place: the logits are not to be used again."""
    dtype = accumulate_dtype(logits_TV)
    logp = logits_TV.to(dtype).log_softmax(-1)
    nll_T = -logp.gather(-1, labels_T[:, None]).squeeze(-1)
    if not training:
        return nll_T, None
    gradient = logp.exp_()
    gradient.scatter_add_(-1, labels_T[:, None], gradient.new_full((len(labels_T), 1), -1.0))
    return nll_T, gradient.mul_(weights_T[:, None].to(dtype)).to(logits_TV.dtype)


def weight_gradient(dy_MN: Tensor, x_MK: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """dy^T x in `dtype`, or added to `into`, which is returned."""
    part = dy_MN.T @ x_MK
    return part.to(dtype) if into is None else into.add_(part)
