"""What several ops share."""

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in for inputs of x's dtype: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def row_blocks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Blocks of rows to run a chain of elementwise operations on, one after the other.

    On a CPU a block of about 256 KiB a thread stays in the cores' second-level caches through the chain; a GPU takes
    all rows at once.
    """
    step = max(1, (torch.get_num_threads() << 16) // max(width, 1)) if device.type == "cpu" else max(rows, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]
