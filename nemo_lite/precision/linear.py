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
    weight = weight.to(x.dtype)
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        rows = x.numel() // x.shape[-1]
        # Decoding reads the weight once for a row or a few; these forms reach more of the memory's bandwidth than
        # F.linear does (benchmarks/README.md).
        if rows == 1:
            return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        if rows < FEW_ROWS and x.dtype == torch.bfloat16:
            return (weight @ x.reshape(rows, -1).T).T.reshape(*x.shape[:-1], -1)
    return F.linear(x, weight)
