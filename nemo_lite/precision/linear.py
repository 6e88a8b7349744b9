"""What a linear multiplies with: the number format's matmul.

A matmul takes x [..., in] in the computing dtype and the weight [out, in] as it is stored (float32 master weights in
training), and returns [..., out] in x's dtype. A linear is given its matmul by name when it is built.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Matmul = Callable[[Tensor, Tensor], Tensor]

FEW_ROWS = 16


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in x's dtype, the weight cast to it."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    few = x.dim() == 2 and x.shape[0] < FEW_ROWS
    if few and x.dtype == torch.bfloat16 and x.is_cpu and not torch.is_grad_enabled():
        # Decoding reads the weight once for a row or a few; in bfloat16 these forms reach more of the memory's
        # bandwidth than F.linear does (docs/kernels.md).
        return torch.mv(weight, x[0])[None] if x.shape[0] == 1 else (weight @ x.T).T.contiguous()
    return F.linear(x, weight)
