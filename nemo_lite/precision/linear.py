"""What a linear multiplies with: the number format's matmul.

A matmul takes x [..., in] in the computing dtype and the weight [out, in] as it is stored (float32 master weights in
training), and returns [..., out] in x's dtype. A linear is given its matmul by name when it is built.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Matmul = Callable[[Tensor, Tensor], Tensor]

FEW_ROWS = 32


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in x's dtype, the weight cast to it."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if x.dim() == 2 and x.shape[0] <= FEW_ROWS and x.is_cpu and not torch.is_grad_enabled():
        return _few_rows(x, weight)
    return F.linear(x, weight)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Decoding: the weight is read once for a few rows, and the form of the product counts (docs/kernels.md)."""
    rows, inner = x.shape
    if x.dtype == torch.bfloat16 and rows:
        # oneDNN takes 20 us to start a bfloat16 product, longer than it takes to cast a small weight.
        if weight.numel() < 1 << 17 and rows * weight.numel() <= 1 << 18:
            return F.linear(x.float(), weight.float()).to(x.dtype)
        if rows == 1:
            return torch.mv(weight, x[0])[None]
        if rows < 16:  # beyond, bringing the result back into rows costs what is won
            return (weight @ x.T).T.contiguous()
    # With several threads, MKL's float32 product takes twice as long for 16 rows as for 12, the other way round not.
    elif x.dtype == torch.float32 and rows >= 16 and inner >= 512 and torch.get_num_threads() > 1:
        return (weight @ x.T).T.contiguous()
    return F.linear(x, weight)
