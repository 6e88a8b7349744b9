"""What several ops share."""

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in for inputs of x's dtype: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
