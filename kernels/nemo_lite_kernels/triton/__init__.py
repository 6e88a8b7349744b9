"""Kernels written in Triton, for CUDA devices.

Importing this package does not import triton: a backend does, when it is chosen, by importing the module of its op.
"""

import functools

import torch


@functools.lru_cache
def reason() -> str | None:
    """Why Triton's kernels cannot be used here, or None. triton is imported only where there is a CUDA device."""
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as e:  # no driver, one too old, a build without CUDA: in torch's words
            return f"needs a CUDA device, and there is none: {e}".strip()
        return "needs a CUDA device, and torch sees none"
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f"needs triton, which cannot be imported: {e}"
    return None
