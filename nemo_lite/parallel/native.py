"""The native engine: one process, or FSDP2 over the processes that torchrun started.

Every layer is one FSDP2 group, gathered in the computing dtype. What must stay in float32 (norms, routers, A_log, D,
dt_bias, the convolution) is small: it is left out of the groups and replicated, so that no mixed precision casts it,
and its gradients are summed over the ranks by one all-reduce.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from nemo_lite.config import Recipe, UserError


@dataclass(frozen=True)
class World:
    """This process among the run's: rank, size, its device, and torch's device mesh (None for one process)."""

    rank: int
    size: int
    device: torch.device
    mesh: object | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This process among those that read rows of their own."""
        return self.rank

    @property
    def data_size(self) -> int:
        return self.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def from_main(self, value):
        """Rank 0's value of a small Python object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every rank. Its UserError ends all of them; only rank 0 says it."""
        value, error = None, None
        if self.main:
            try:
                value = work()
            except UserError as problem:
                error = problem
        value, failed = self.from_main((value, error is not None))
        if failed:
            raise error or SystemExit(1)
        return value


def keep_freed_memory() -> None:
    """Have glibc keep large freed buffers instead of handing them back to the system.

    A training step on a CPU frees and asks for the same buffers over and over; each return costs a page fault for every
    4 KiB when it comes back (5 to 10 % of a step, docs/log.md). Does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def start(device: str = "auto") -> World:
    """Join torchrun's processes where there are any (gloo on CPU, NCCL on CUDA)."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no CUDA device")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        keep_freed_memory()
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        return World(rank, size, place)
    from torch.distributed.device_mesh import init_device_mesh

    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun keeps one store when it restarts the ranks of a machine (--max-restarts), with the addresses of the
        # dead ones in it; so each life gets keys of its own. Several machines count restarts apart: they want a
        # rendezvous backend that makes a new store, such as c10d.
        store, rank, size = next(dist.rendezvous("env://"))
        store.set_timeout(default_pg_timeout)
        store = dist.PrefixStore(f"life_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    return World(rank, size, place, init_device_mesh(kind, (size,), mesh_dim_names=("dp",)))


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()


def stays_float32(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that no mixed precision may cast: everything that is no linear, expert, embedding or head."""
    from nemo_lite.parallel.layers import Embedding, Experts, Head, Linear

    cast = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Linear | Experts | Embedding | Head)
        for parameter in module.parameters(recurse=False)
    }
    return {parameter for parameter in model.parameters() if id(parameter) not in cast}


def parallelize(model: nn.Module, world: World, recipe: Recipe) -> nn.Module:
    """Shard a model over the ranks with FSDP2; with one process it stays as it is."""
    if world.size == 1:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    reduce = torch.float64 if recipe.train.dtype == "float64" else getattr(torch, recipe.precision.reduce_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if recipe.train.dtype == "bfloat16" else None,
        reduce_dtype=reduce,
        cast_forward_inputs=False,
    )
    replicated = stays_float32(model)

    def shard(module, reshard: bool) -> None:
        fully_shard(module, mesh=world.mesh, reshard_after_forward=reshard, mp_policy=policy, ignored_params=replicated)

    reshard = recipe.parallel.reshard_after_forward
    blocks = list(model.layers) + (list(model.mtp.layers) if model.mtp is not None else [])
    for block in blocks:
        shard(block, reshard)
    if model.mtp is not None:
        shard(model.mtp.eh_proj, reshard)
    # Read several times a step (every MTP depth), so they stay gathered through the forward.
    if model.config.tie_word_embeddings:
        shard([model.embedding, model.head], False)
    else:
        shard(model.embedding, False)
        shard(model.head, False)
    shard(model, False)
    # Nothing writes into an output in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            # Losses are divided by global counts already. A plain sum: gloo has no premultiplied one.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def sum_replicated_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum over the ranks the gradients of the parameters that every rank holds whole."""
    if world.size == 1:
        return
    replicated = [p for p in parameters if not is_sharded(p)]
    for p in replicated:
        if p.grad is None:  # every rank must bring the same tensors
            p.grad = torch.zeros_like(p)
    sum_flat_([p.grad for p in replicated if p.grad is not None])


def sum_flat_(tensors: list[Tensor], group: Any = None) -> None:
    """Sum tensors over the ranks of a group in place, by one all-reduce for each dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, flat.split([t.numel() for t in same])):
            tensor.copy_(part.view_as(tensor))


def gradient_norm(parameters: Iterable[nn.Parameter], world: World) -> Tensor:
    """The L2 norm of all gradients of all ranks, float64, the same on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for p in parameters:
        if p.grad is not None:
            norm = torch.linalg.vector_norm(local(p.grad), dtype=torch.promote_types(p.dtype, torch.float32))
            total[int(is_sharded(p))] += norm.double().square()
    return (total[0] + world.sum_(total[1].clone())).sqrt()


def copy_whole(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into a sharded one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if (part := getattr(parameter, "part", None)) is not None:
        parameter.copy_(part.take(whole))
    elif isinstance(parameter, DTensor):
        whole = whole.to(parameter.to_local().device, parameter.dtype)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(whole)
