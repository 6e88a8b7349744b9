"""What several ops share."""

import functools

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in for inputs of x's dtype: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of x are formed in: x's, but float32 for bfloat16 on a CPU for which torch's library has
    no bfloat16 product (no AVX-512); its fallback is 10 to 100 times slower than float32."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if slow else x.dtype


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch's library has a bfloat16 product on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def row_blocks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Blocks of rows to run a chain of elementwise operations on, one after the other.

    On a CPU a block of about 256 KiB a thread stays in the cores' second-level caches through the chain; a GPU takes
    all rows at once.
    """
    step = max(1, (torch.get_num_threads() << 16) // max(width, 1)) if device.type == "cpu" else max(rows, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]
