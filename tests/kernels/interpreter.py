"""Triton kernels for tests: compiled where there is a CUDA device, interpreted on the CPU where there is none.

Triton chooses when it is imported: tests/conftest.py asks for the interpreter before that. The interpreter computes
bfloat16 wrongly: on the CPU only float32 is tested.
"""

import importlib
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernels(module: str) -> ModuleType:
    """nemo_lite_kernels.triton.`module`, to be called with tensors on DEVICE; skips the tests where triton is missing.

    It may stand at the top of a file or in a test.
    """
    try:
        import triton
    except ImportError as e:
        pytest.skip(f"triton is not installed: {e}", allow_module_level=True)
    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("triton was imported before its interpreter could be asked for", allow_module_level=True)
    return importlib.import_module(f"nemo_lite_kernels.triton.{module}")


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch.empty and its relatives give NaN, so that what a kernel leaves unwritten is seen."""

    def filled(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
