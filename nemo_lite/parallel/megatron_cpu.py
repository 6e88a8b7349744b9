"""What Megatron-core asks of CUDA where there is none: stand-ins inside its own modules, nothing in torch is changed.

Megatron-core names CUDA outright in a few places that have nothing to do with a GPU. `install` gives the modules below
a `torch` of their own that answers those calls with the CPU; it is called by the megatron engine only, and only where
it trains on a CPU. `as_cuda` lets the optimizer take parameters that lie in the CPU's memory.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Module of megatron.core -> what it asks CUDA for.
MODULES = {
    "tensor_parallel.layers": "current_device(), for gradients that are reduced and scattered",
    "tensor_parallel.mappings": "current_device(), for what a collective writes",
    "utils": "current_device(), for the memory that gathers share",
    "distributed.param_and_grad_buffer": "current_device(), for the flat buffers of parameters and gradients",
    "distributed.distributed_data_parallel": "current_device(), for a communication stream",
    "optimizer.optimizer": 'torch.tensor(device="cuda"), for the loss scale, which is 1',
    "optimizer.distrib_optimizer": "current_device(), for optimizer states read from its own checkpoints",
    "pipeline_parallel.schedules": 'torch.zeros(device="cuda"), for a count of tokens',
    "pipeline_parallel.p2p_communication": "current_device() and synchronize(), for what arrives from another stage",
}


class _Cuda:
    """torch.cuda, as far as those modules use it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def stream(self, _: Any):
        return contextlib.nullcontext()


class _Torch:
    """torch, whose CUDA device is the CPU."""

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args, device: Any = None, **options):
        return torch.tensor(*args, device=_cpu(device), **options)

    def zeros(self, *args, device: Any = None, **options):
        return torch.zeros(*args, device=_cpu(device), **options)


def _cpu(device: Any) -> Any:
    return "cpu" if device == "cuda" else device


def install() -> None:
    """Give Megatron-core's modules their stand-ins."""
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = _Torch()  # type: ignore[attr-defined]


_TYPES = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float16: "torch.cuda.HalfTensor"}


def as_cuda(parameters: Iterable[nn.Parameter]) -> None:
    """Have parameters answer `type()` as on a GPU, by which Megatron's optimizers tell their dtypes.

    float64, which they do not know, passes for float32: both are their own master weights.
    """
    for parameter in parameters:
        name = _TYPES.get(parameter.dtype, "torch.cuda.FloatTensor")
        parameter.type = lambda *_, name=name: name  # type: ignore[method-assign, assignment]
