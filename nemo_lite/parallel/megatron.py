"""The megatron engine: the same HybridLM under tensor, sequence, pipeline, expert, context and data parallelism.

From Megatron-core: process groups and rank order, vocabulary-, column- and row-parallel layers and their collectives,
the 1F1B schedule and the interleaved one, DistributedDataParallel with its overlap, and the distributed optimizer. What
its released version does not have for this architecture is here, on its groups: Mamba-2's cut, experts over ranks in
latent space, the vocabulary-parallel loss in chunks, rows cut over ranks (sequence.py), and checkpoints (parts.py).

    Placed          what a model part is built from: this rank's share of every weight, and the collectives around it
    Stage           the layers of a pipeline stage, as Megatron's schedule calls them; a rank has one, or several
    Optimizer       data parallelism and AdamW around stages; gradients, their norm, masters, checkpoints
    Trainer         a recipe's model and optimizer, a step and a validation: what the training loop calls

Activations are token-major, [T, H]; with sequence parallelism, T is cut over the tensor-parallel ranks between blocks.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from nemo_lite_kernels.common import accumulate_dtype
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Megatron-core would do with packages that are not here
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, mappings
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
    from megatron.core.transformer import TransformerConfig

from nemo_lite.config import Recipe, UserError
from nemo_lite.model.context import Tokens
from nemo_lite.model.hybrid import HybridLM, Layer, Normalizers
from nemo_lite.parallel import layers as whole
from nemo_lite.parallel import megatron_cpu, native, sequence
from nemo_lite.parallel.layers import Segment
from nemo_lite.parallel.layout import Layout, layout_of, stages
from nemo_lite.parallel.parts import Part, Pieces
from nemo_lite.precision.linear import Gemms, Numerics
from nemo_lite.precision.recipe import formats as number_formats
from nemo_lite.train.loss import IGNORE
from nemo_lite.train.optim import clipping, refuse_idle_rules, scales, update_router_biases

# ----------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Ranks(native.World):
    """This process among the run's, and the layout they lie in."""

    layout: Layout = field(default_factory=Layout)

    @property
    def data_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()


def start(recipe: Recipe) -> Ranks:
    """Join torchrun's processes, and make Megatron's groups of them for the recipe's layout."""
    # Megatron-core overlaps collectives with products by the order in which kernels are launched; read by CUDA once.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    world = native.start(recipe.train.device)
    layout = layout_of(recipe)
    if world.size == 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if world.device.type == "cpu":
        megatron_cpu.install()
    elif recipe.train.dtype == "float64":
        raise UserError("train.dtype float64 with parallel.engine megatron runs on CPU only, where tests use it")
    # Names of torch's that Megatron-core calls and torch has given newer ones; what it would do with packages not here.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*", category=UserWarning)
    each = len(stages(recipe.model, layout, recipe.data.seq_len)) // layout.pp
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, each if each > 1 else None, context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1, create_gloo_process_groups=False,
    )  # fmt: skip
    return Ranks(world.rank, world.size, world.device, world.mesh, layout)


def stop(world: Ranks) -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ placement


@dataclass(frozen=True)
class Groups:
    """The process groups that weights and tokens are cut over."""

    tp: Any
    cp: Any
    ep: Any

    @classmethod
    def of_megatron(cls) -> Groups:
        return cls(
            parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
        )  # fmt: skip


class Placed(whole.Layers):
    """This rank's share of every weight; collectives are Megatron-core's.

    Every parameter made here has its `Part` as `.part`; what has none is whole on every rank. Experts are cut over the
    expert-parallel ranks alone, and see the tokens of their own rank: with tensor but without sequence parallelism
    they first take their share of them.
    """

    def __init__(
        self, world: Ranks, config: Any, groups: Groups, kernels: Mapping[str, str] | None = None,
        formats: Mapping[str, Gemms] | None = None, numerics: Numerics | None = None,
    ):  # fmt: skip
        super().__init__(world.device, kernels, formats, numerics)
        self.config, self.sp = config, world.layout.sp
        self.tp, self.cp, self.ep = groups.tp, groups.cp, groups.ep
        self.rank, self.ranks = self.tp.rank(), self.tp.size()
        if self.cp.size() > 1:
            self.ops = sequence.Rows(self.ops, self.cp).over()

    def local(self, n: int) -> int:
        return max(n // self.ranks, 1)

    def part(self, parameter: nn.Parameter, segments: Iterable[Segment], dim: int = 0) -> None:
        rest = [n for i, n in enumerate(parameter.shape) if i != dim]
        parameter.part = Part.cut(list(segments), rest, self.rank, self.ranks, dim)  # type: ignore[attr-defined]

    # Whole activations are the same on all tensor-parallel ranks and have their whole gradient on each of them.

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tokens, for something that every rank does with all of them alike."""
        return mappings.gather_from_sequence_parallel_region(x, False, group=self.tp) if self.sp else x

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's tokens of all."""
        return mappings.scatter_to_sequence_parallel_region(x, group=self.tp) if self.sp else x

    def mine(self, x: Tensor) -> Tensor:
        return x.chunk(self.ranks)[self.rank] if self.sp else x

    def column_linear(self, name: str, n_in: int, *segments: Segment) -> nn.Module:
        module = Column(self, name, n_in, self.rows(segments))
        self.part(module.weight, segments)
        return module

    def together(self, x: Tensor, *columns: nn.Module) -> list[Tensor]:
        """As one product, so that tokens are gathered and gradients summed once."""
        if any(column.matmul is not None for column in columns):
            x = self.enter(x)
            return [nn.functional.linear(x, c.weight) if c.matmul is None else c.matmul(x, c.weight) for c in columns]
        weights = [column.weight for column in columns]
        y = linear_with_grad_accumulation_and_async_allreduce(
            x, torch.cat(weights), None, False, self.ranks > 1 and not self.sp, self.sp, tp_group=self.tp
        )
        return list(y.split([len(weight) for weight in weights], -1))

    def enter(self, x: Tensor) -> Tensor:
        """All tokens, for products that every rank does a part of."""
        if self.sp:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp)

    def row_linear(self, name: str, n_in: int, n_out: int) -> nn.Module:
        module = Row(self, name, n_in, n_out)
        self.part(module.weight, [(self.ranks, n_in // self.ranks)], 1)
        return module

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> nn.Module:
        module = Embedding(self, vocab_size, hidden_size)
        self.part(module.weight, [(vocab_size, 1)])
        return module

    def head(self, name: str, hidden_size: int, vocab_size: int) -> Head:
        module = Head(self, hidden_size, vocab_size)
        self.part(module.weight, [(vocab_size, 1)])
        return module

    def norm(self, name: str, size: int, eps: float) -> nn.Module:
        if name in ("norm_f", "mtp.final_layernorm"):
            return Norm(size, eps, self.ops.rms_norm, None, self.gather)
        return Norm(size, eps, self.ops.rms_norm, self.scatter if name == "mtp.hnorm" else None, None)

    def gated_norm(self, name: str, size: int, groups: int, eps: float) -> nn.Module:
        if groups >= self.ranks:
            module = super().gated_norm(name, size, groups, eps)
        else:
            module = SharedGroupNorm(self, size, groups, eps)
        self.part(module.weight, [(size, 1)])
        return module

    def channels(self, name: str, *segments: Segment, width: int | None = None) -> nn.Parameter:
        parameter = super().channels(name, *segments, width=width)
        self.part(parameter, segments)
        return parameter

    def experts(self, name: str, n_experts: int, size: int, inner: int) -> nn.Module:
        module = Experts(self, name, n_experts, size, inner)
        for parameter in module.parameters():
            rank, ranks, rest = self.ep.rank(), self.ep.size(), parameter.shape[1:]
            parameter.part = Part.cut([(n_experts, 1)], rest, rank, ranks)  # type: ignore[attr-defined]
            parameter.allreduce = False  # Megatron's mark of what the expert-data-parallel ranks share
        return module

    def route(self, logits_TE, bias, k, scaling, normalise, n_group, topk_group, rows=0, count_BL=None):
        """Tokens are this rank's. Their count comes back, and their part of the auxiliary loss of whole rows."""
        expert_Tk, weight_Tk, *balance = self.ops.route(
            logits_TE, bias, k, scaling, normalise, n_group, topk_group, 0 if self.apart else rows, count_BL
        )
        if rows and self.apart:
            balance = self._balance(logits_TE, expert_Tk, rows, count_BL)
        return expert_Tk, weight_Tk, *balance

    @property
    def apart(self) -> bool:
        """Whether the tokens of a row lie on several ranks."""
        return self.sp or self.cp.size() > 1

    def _balance(self, logits_TE: Tensor, expert_Tk: Tensor, rows: int, count_BL: Tensor | None) -> list[Tensor]:
        (T, E), k = logits_TE.shape, expert_Tk.shape[1]
        ranks = self.ranks if self.sp else 1
        row_T = torch.arange(T * ranks, device=logits_TE.device) // (T * ranks // rows)
        row_T, count_T = self.mine(row_T), logits_TE.new_ones(T)
        if count_BL is not None:
            count_T = self.mine(count_BL.flatten()).to(count_T.dtype)
        scores_TE = logits_TE.sigmoid()
        p_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        with torch.no_grad():
            ones = count_T[:, None].expand(-1, k).flatten()
            hits_B = logits_TE.new_zeros(rows, E + 1)  # by the unbiased choice; last, the row's counted tokens
            chosen = p_TE.topk(k, sorted=False).indices
            hits_B.view(-1).index_add_(0, (row_T[:, None] * (E + 1) + chosen).flatten(), ones)
            hits_B[:, E].index_add_(0, row_T, count_T)
            group = parallel_state.get_tensor_and_context_parallel_group() if self.sp else self.cp
            dist.all_reduce(hits_B, group=group)
            counts_E = logits_TE.new_zeros(E).index_add_(0, expert_Tk.flatten(), ones).long()
            share_B = (E / k) / hits_B[:, E].clamp(min=1).square()
        aux = (p_TE * (hits_B[:, :E] * share_B[:, None])[row_T]).sum(-1) @ count_T
        return [counts_E, aux]


class Column(ColumnParallelLinear):
    """x [T, in] W^T with W [out / tp, in]; gathers tokens first under sequence parallelism."""

    def __init__(self, layers: Placed, name: str, n_in: int, rows: int):
        super().__init__(
            n_in, rows * layers.ranks, config=layers.config, init_method=_nothing, bias=False, tp_group=layers.tp
        )
        self.matmul = layers.matmul_for(name, n_in, rows) if name in layers.emulated else None
        self.enter = layers.enter

    def forward(self, x: Tensor) -> Tensor:
        if self.matmul is None:
            return super().forward(x)[0]
        return self.matmul(self.enter(x), self.weight)


class Row(RowParallelLinear):
    """x [T, in / tp] W^T with W [out, in / tp], summed over ranks; scatters tokens under sequence parallelism."""

    def __init__(self, layers: Placed, name: str, n_in: int, n_out: int):
        super().__init__(
            n_in, n_out, config=layers.config, init_method=_nothing, bias=False, input_is_parallel=True,
            skip_bias_add=False, tp_group=layers.tp,
        )  # fmt: skip
        mine = n_in // layers.ranks
        self.matmul = layers.matmul_for(name, mine, n_out) if name in layers.emulated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.matmul is None:
            return super().forward(x)[0]
        y = self.matmul(x, self.weight)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)


class Embedding(VocabParallelEmbedding):
    """Rows of W [V / tp, H]: ids [T] to [T, H], a rank's tokens of them under sequence parallelism."""

    def __init__(self, layers: Placed, vocab_size: int, hidden_size: int):
        super().__init__(
            vocab_size, hidden_size, init_method=_nothing, reduce_scatter_embeddings=layers.sp, config=layers.config,
            tp_group=layers.tp,
        )  # fmt: skip

    def forward(self, ids_T: Tensor) -> Tensor:
        x = super().forward(ids_T[None])  # [1, T, H], or [T / tp, 1, H]
        return x.squeeze(1 if self.reduce_scatter_embeddings else 0)


class Head(whole.Head):
    """The output projection W [V / tp, H]; the loss is over all V, in the chunks of train/loss.py.

    Megatron-core's own loss holds all logits, in float32.
    """

    def __init__(self, layers: Placed, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size // layers.ranks, layers.ops.linear, layers.ops)
        self.tp = layers.tp
        self.loss_ops = functools.partial(nll_and_gradient, group=layers.tp), layers.ops.weight_gradient

    def forward(self, h_TH: Tensor, labels_T: Tensor | None = None, weights_T: Tensor | None = None):
        """As the whole head's, the same on all ranks."""
        h_TH = mappings.copy_to_tensor_model_parallel_region(h_TH, group=self.tp)
        found = super().forward(h_TH, labels_T, weights_T)
        if labels_T is None:
            return mappings.gather_from_tensor_model_parallel_region(found, group=self.tp)
        return found


def nll_and_gradient(logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, training: bool, *, group: Any):
    """As the op of that name, of logits whose columns are cut over the ranks of `group`."""
    dtype, V = accumulate_dtype(logits_TV), logits_TV.shape[1]
    logits, place_T = logits_TV.to(dtype), labels_T - group.rank() * V
    largest_T = logits.amax(-1)
    dist.all_reduce(largest_T, dist.ReduceOp.MAX, group)
    logits = logits - largest_T[:, None]
    here_T, place_T1 = (place_T >= 0) & (place_T < V), place_T.clamp(0, V - 1)[:, None]
    target_T = logits.gather(1, place_T1).squeeze(1) * here_T
    e = logits.exp_()
    both = torch.stack([e.sum(-1), target_T])
    dist.all_reduce(both, group=group)
    nll_T = both[0].log() - both[1]
    if not training:
        return nll_T, None
    gradient = e.div_(both[0][:, None]).scatter_add_(1, place_T1, -here_T[:, None].to(dtype))
    return nll_T, gradient.mul_(weights_T[:, None].to(dtype)).to(logits_TV.dtype)


class Norm(whole.Norm):
    """RMSNorm with tokens gathered after or scattered before it."""

    def __init__(self, size: int, eps: float, op: Callable, before: Callable | None, after: Callable | None):
        super().__init__(size, eps, op)
        self.before, self.after = before or _same, after or _same

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


class SharedGroupNorm(nn.Module):
    """The gated RMSNorm where a group of channels lies on several ranks: they sum its squares."""

    def __init__(self, layers: Placed, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers.local(size)))
        self.tp, self.eps, self.width = layers.tp, eps, size // groups
        self.group, self.groups = layers.rank // (layers.ranks // groups), groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        h = y.to(dtype) * nn.functional.silu(z.to(dtype))
        squares = h.new_zeros(len(h), self.groups)
        squares = squares.index_add(1, torch.tensor([self.group], device=h.device), h.square().sum(-1, keepdim=True))
        # Every rank uses the sum for channels of its own, so that its gradient is a sum over ranks too.
        squares = mappings.copy_to_tensor_model_parallel_region(
            mappings.reduce_from_tensor_model_parallel_region(squares, group=self.tp), group=self.tp
        )
        h = h * torch.rsqrt(squares[:, self.group, None] / self.width + self.eps)
        return (h * self.weight.to(dtype)).to(y.dtype)


class Experts(nn.Module):
    """Routed experts cut over ranks, up [E / ep, F, L], down [E / ep, L, F]: tokens go to them and come back.

    What travels are tokens of latent size L, one copy for each expert chosen, with its weight.
    """

    def __init__(self, layers: Placed, name: str, n_experts: int, size: int, inner: int):
        super().__init__()
        self.ep, self.tp, self.n_experts = layers.ep, layers.tp, n_experts
        mine = n_experts // self.ep.size()
        self.up = nn.Parameter(torch.empty(mine, inner, size))
        self.down = nn.Parameter(torch.empty(mine, size, inner))
        self.op = layers.experts_for(name)
        self.alike = layers.ranks > 1 and not layers.sp  # whether all tensor-parallel ranks have the same tokens

    def forward(self, x_TL: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        if self.alike:
            x_TL, weight_Tk = (mappings.scatter_to_sequence_parallel_region(t, self.tp) for t in (x_TL, weight_Tk))
            expert_Tk = expert_Tk.chunk(self.tp.size())[self.tp.rank()]
        if self.ep.size() == 1:
            y_TL = self.op(x_TL, expert_Tk, weight_Tk, self.up, self.down)
        else:
            y_TL = self.over_ranks(x_TL, expert_Tk, weight_Tk)
        if self.alike:
            y_TL = mappings.gather_from_sequence_parallel_region(y_TL, False, group=self.tp)
        return y_TL

    def over_ranks(self, x_TL: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        ranks, mine = self.ep.size(), len(self.up)
        chosen = torch.where(expert_Tk < 0, self.n_experts, expert_Tk).flatten()  # padding goes nowhere, and last
        counts_E = torch.bincount(chosen, minlength=self.n_experts + 1)[: self.n_experts]
        order = chosen.argsort(stable=True)[: int(counts_E.sum())]
        token_S = order // expert_Tk.shape[1]
        arriving = torch.empty_like(counts_E)  # [rank, expert here]
        dist.all_to_all_single(arriving, counts_E, group=self.ep)
        sent, received = counts_E.view(ranks, mine).sum(1).tolist(), arriving.view(ranks, mine).sum(1).tolist()
        x_SL = mappings.all_to_all(self.ep, x_TL[token_S], received, sent)
        weight_S1 = mappings.all_to_all(self.ep, weight_Tk.flatten()[order, None], received, sent)
        here = torch.arange(mine, device=x_TL.device).repeat(ranks).repeat_interleave(arriving)
        y_SL = self.op(x_SL, here[:, None], weight_S1, self.up, self.down)
        y_SL = mappings.all_to_all(self.ep, y_SL, sent, received)
        dtype = torch.promote_types(x_TL.dtype, torch.float32)
        return torch.zeros_like(x_TL, dtype=dtype).index_add(0, token_S, y_SL.to(dtype)).to(x_TL.dtype)


def _same(x: Tensor) -> Tensor:
    return x


def _nothing(weight: Tensor) -> None:
    """Megatron-core's layers ask for an initial distribution; the model has its own."""


# ---------------------------------------------------------------------------------------------------------------- stage


class Stage(nn.Module):
    """A pipeline stage of a HybridLM: its layers; with the first the embedding; with the last norm, head, loss and MTP,
    for which it has an embedding of its own."""

    def __init__(self, model: HybridLM, layers: range, first: bool, last: bool):
        super().__init__()
        # Not a part of this: data parallelism takes what is, and the model has the rank's other stages.
        object.__setattr__(self, "model", model)
        self.first, self.last = first, last
        self.model_type = ModelType.encoder_or_decoder  # the schedule asks
        self.blocks = nn.ModuleList(model.layers[i] for i in layers)
        if first or (last and _two_embeddings(model)):
            self.embedding = model.embedding
        if last:
            self.norm_f, self.head, self.mtp = model.norm_f, model.head, model.mtp
        self.arrived: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """What the stage before sent, [T, 1, H]: the schedule's way."""
        self.arrived = tensors[0]

    def forward(self, tokens: Tokens, normalizers: Normalizers) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states for the next stage [T, 1, H], or the loss; and what was measured on the way."""
        model, ctx = self.model, tokens.contexts[0]
        if self.first:
            x_TH = model.embedding(tokens.ids[0].flatten()).to(model.dtype)
        else:
            assert self.arrived is not None
            x_TH = self.arrived.squeeze(1)
        x_TH, stats = model.run_layers(self.blocks, x_TH, ctx)
        if self.last:
            out = model.finish(model.norm_f(x_TH), tokens, stats, normalizers)
            assert out.loss is not None
            return out.loss, {"losses": out.losses, "aux": out.aux_loss, "counts": out.expert_counts}
        measured: dict[str, Any] = {"counts": {name: stat.counts_E for name, stat in stats}}
        if stats:
            aux = model.auxiliary_loss(stats, normalizers)
            measured["aux"] = aux.detach()
            x_TH = _Attach.apply(x_TH, aux)
        return x_TH[:, None], measured


def _two_embeddings(model: HybridLM) -> bool:
    """Whether the last stage needs the embedding too: for the tokens ahead of MTP; a tied head is the embedding."""
    return bool(model.config.mtp_layers) or model.config.tie_word_embeddings


def stages_here(model: HybridLM, cuts: list[range], rank: int, ranks: int) -> list[Stage]:
    """Every `ranks`-th stage from `rank` on; modules of other ranks are dropped. Names stay the model's."""
    mine, first, last = range(rank, len(cuts), ranks), rank == 0, rank == ranks - 1
    here = {i for stage in mine for i in cuts[stage]}
    for i in range(len(model.layers)):
        if i not in here:
            model.layers[i] = nn.Identity()
    if not first and not (last and _two_embeddings(model)):
        model.embedding = nn.Identity()
    found = [Stage(model, cuts[stage], stage == 0, stage == len(cuts) - 1) for stage in mine]
    if not last:
        model.norm_f, model.head, model.mtp = nn.Identity(), nn.Identity(), None
    return found


class _Attach(torch.autograd.Function):
    """x, whose backward also starts that of a loss."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, torch.ones((), dtype=ctx.dtype, device=dx.device)


# ------------------------------------------------------------------------------------------------------------ optimizer


@dataclass
class Master:
    """What the optimizer steps: elements start..end of a parameter, flat, in float32 or better."""

    name: str
    parameter: nn.Parameter
    flat: Tensor
    start: int
    end: int
    adam: dict[str, Tensor]  # its moments and step

    @property
    def gradient(self) -> Tensor:
        """Of the same elements, reduced over the data-parallel ranks."""
        return self.parameter.main_grad.view(-1)[self.start : self.end]  # type: ignore[attr-defined]

    def pieces(self, flat: Tensor) -> Pieces:
        """`flat`, of the same elements, as rectangles of the whole parameter."""
        part, flat = self.parameter.part, flat.view(-1)  # type: ignore[attr-defined]
        pieces = part.pieces(self.start, self.end)
        return Pieces(part.shape, [(p, flat[p.start - self.start :][: p.numel].view(p.sizes)) for p in pieces])


class Optimizer:
    """Megatron-core's data parallelism and AdamW around this rank's stages, and the masters that it steps."""

    def __init__(self, model: HybridLM, stages: list[Stage], recipe: Recipe, world: Ranks, config: Any):
        optim, sharded = recipe.optim, recipe.parallel.distributed_optimizer
        self.recipe, self.world, self.model, self.sharded = recipe, world, model, sharded
        dtype, first, last = getattr(torch, recipe.train.dtype), stages[0].first, stages[-1].last
        # The last stage's embedding is a copy: the first's is counted and written.
        self.shares_embedding = first != last and _two_embeddings(model)
        self.copied = {"embedding.weight"} if self.shares_embedding and not first else set()
        if self.shares_embedding:
            model.embedding.weight.shared_embedding = True  # so that it is cut alike on both ranks
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=dtype != torch.float64 and recipe.precision.reduce_dtype == "float32",
            overlap_grad_reduce=True, use_distributed_optimizer=sharded,
        )  # fmt: skip
        # Of a rank's later stages each is one bucket, as Megatron-core's own training has it.
        self.ddp = [
            DistributedDataParallel(config, reduction, s, disable_bucketing=i > 0) for i, s in enumerate(stages)
        ]
        pauses = [ddp.no_sync for ddp in self.ddp]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
        config.finalize_model_grads_func = self._finish_gradients
        if world.device.type == "cpu":
            megatron_cpu.as_cuda(model.parameters())
        # torch's AdamW, as the native engine's: other libraries keep the step elsewhere, and checkpoints would lose it.
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
        self.chain = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=optim.lr, min_lr=0.0, weight_decay=optim.weight_decay, adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1], adam_eps=optim.eps, bf16=dtype == torch.bfloat16, params_dtype=dtype,
                use_distributed_optimizer=sharded, clip_grad=0.0,
            ),
            self.ddp, self._overrides(), use_gloo_process_groups=False,
        )  # fmt: skip
        self.parts = [o for o in self.chain.chained_optimizers if not getattr(o, "is_stub_optimizer", False)]
        self.masters = list(self._masters())
        parameters = [(p, p.part) for p in model.parameters()]  # type: ignore[attr-defined]
        # Under sequence parallelism what is whole on every rank has seen the tokens of one.
        self.of_tokens = [p for p, part in parameters if world.layout.sp and part.whole]
        self.of_copies = [p for p, part in parameters if not part.whole and any(r.copies > 1 for r in part.runs)]

    def _overrides(self) -> dict[Any, dict[str, float]]:
        """The recipe's scales of learning rate and weight decay, as Megatron-core's groups take them."""
        optim, found = self.recipe.optim, {}
        names = {p: name for name, p in self.model.named_parameters()}
        for lr, decay in sorted({scales(name, p, optim) for p, name in names.items()}):

            def mine(p: nn.Parameter, _: str, wanted: tuple = (lr, decay)) -> bool:
                return scales(names[p], p, optim) == wanted

            predicate = ParamWithNamePredicate(f"{lr} {decay}", mine)
            found[ParamKey(with_name_predicate=predicate)] = {"lr_mult": lr, "wd_mult": decay}
        return found

    def _masters(self) -> Iterator[Master]:
        names = {p: name for name, p in self.model.named_parameters()}
        for each in self.parts:
            for group in each.optimizer.param_groups:
                group["fused"], group["foreach"] = True, None  # the native engine's arithmetic
            if self.sharded:
                pairs = [
                    (each.model_float16_groups, each.shard_fp32_from_float16_groups),
                    (each.model_fp32_groups, each.shard_fp32_groups),
                ]
            elif hasattr(each, "float16_groups"):
                pairs = [
                    (each.float16_groups, each.fp32_from_float16_groups),
                    (each.fp32_from_fp32_groups, each.fp32_from_fp32_groups),
                ]
            else:
                own = [group["params"] for group in each.optimizer.param_groups]
                pairs = [(own, own)]
            for models, masters in pairs:
                for parameter, flat in zip(itertools.chain(*models), itertools.chain(*masters)):
                    start, end = 0, parameter.numel()
                    if self.sharded:
                        span = each._get_model_param_range_map(parameter)["param"]
                        start, end = span.start, span.end
                    state = each.optimizer.state[flat]
                    if not state:  # moments of nought, so that a checkpoint has somewhere to be read to
                        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
                    yield Master(names[parameter], parameter, flat, start, end, state)

    @torch.no_grad()
    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Masters from local weights in full precision."""
        for master in self.masters:
            master.flat.view(-1).copy_(weights[master.name].view(-1)[master.start : master.end])

    @torch.no_grad()
    def spread(self) -> None:
        """The model's weights from the masters, on every rank that holds them."""
        for each in self.parts:
            if hasattr(each, "_copy_main_params_to_model_params"):
                each._copy_main_params_to_model_params()
        if self.sharded:
            for ddp in self.ddp:
                ddp.start_param_sync(force_sync=True)

    def step(self, norm: float, rate: float) -> None:
        """One AdamW step with gradients of this norm, clipped as the recipe says."""
        optim, scale = self.recipe.optim, clipping(norm, self.recipe.optim.clip_grad)
        for master in self.masters:
            master.flat.grad = master.gradient.to(master.flat.dtype).view_as(master.flat) * scale
        for each in self.parts:
            for group in each.optimizer.param_groups:
                group["lr"] = rate * group["lr_mult"]
                group["weight_decay"] = optim.weight_decay * group["wd_mult"]
            if self.sharded:  # its own way gathers all weights once for the dense part and once for the experts
                MixedPrecisionOptimizer.step_with_ready_grads(each)
            else:
                each.step_with_ready_grads()
        if self.sharded:
            for ddp in self.ddp:
                ddp.start_param_sync()
        for master in self.masters:
            master.flat.grad = None

    # ------------------------------------------------------------------------------------------------------- gradients

    def _finish_gradients(self, *_, **__) -> None:
        """After the last backward: gradients over data-parallel ranks, and of what several ranks hold a copy of."""
        for ddp in self.ddp:
            ddp.finish_grad_sync()
        tp = parallel_state.get_tensor_model_parallel_group()
        native.sum_flat_([p.main_grad for p in self.of_tokens], tp)
        for p in self.of_copies:
            self._sum_copies(p, tp)
        if self.shares_embedding:
            dist.all_reduce(self.model.embedding.weight.main_grad, group=parallel_state.get_embedding_group())

    @staticmethod
    def _sum_copies(parameter: nn.Parameter, tp: Any) -> None:
        """Heads or groups of which several ranks hold a copy: each copy's gradient becomes the sum of all."""
        part, gradient = parameter.part, parameter.main_grad  # type: ignore[attr-defined]
        for run in (run for run in part.runs if run.copies > 1):
            mine = gradient.narrow(part.dim, run.local, run.rows)
            units = tp.size() // run.copies
            every = mine.new_zeros(units, *mine.shape)
            every[tp.rank() // run.copies] = mine
            dist.all_reduce(every, group=tp)
            mine.copy_(every[tp.rank() // run.copies])

    def norm(self) -> Tensor:
        """The L2 norm of all gradients, every element counted once, float64; the same on every rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for master in self.masters:
            if master.name in self.copied:
                continue
            ranks = self._holders(master)
            for piece, here in master.pieces(master.gradient).pieces:
                dtype = torch.promote_types(here.dtype, torch.float32)
                total += torch.linalg.vector_norm(here, dtype=dtype).double().square() / (piece.copies * ranks)
        dist.all_reduce(total)
        return total.sqrt()

    def _holders(self, master: Master) -> int:
        """How many data-parallel ranks hold the same master."""
        if self.sharded:
            return 1
        if getattr(master.parameter, "allreduce", True):
            return parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return parallel_state.get_expert_data_parallel_world_size()

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def state_pieces(self, writing: bool) -> dict[str, Any]:
        """Masters and moments under the native engine's names, as rectangles of whole tensors, in place: what a
        checkpoint writes, or reads into before `spread`. Another stage's copies are read, not written."""
        model: dict[str, Any] = dict(self.model.named_buffers())
        optim: dict[str, Any] = {}
        for master in self.masters:
            if writing and master.name in self.copied:
                continue
            model[master.name] = master.pieces(master.flat)
            for key in ("exp_avg", "exp_avg_sq"):
                optim[f"state.{master.name}.{key}"] = master.pieces(master.adam[key])
            optim[f"state.{master.name}.step"] = master.adam["step"]
        return {"model": model, "optim": optim}


# -------------------------------------------------------------------------------------------------------------- trainer


def config_of(
    layout: Layout, hidden_size: int, dtype: torch.dtype = torch.float32, deterministic: bool = False, each: int = 1
):
    """What Megatron-core's layers, schedule and data parallelism ask for; of the model only a width. `each`: stages a
    rank has."""
    interleaved = each > 1
    return TransformerConfig(
        virtual_pipeline_model_parallel_size=each if interleaved else None,
        # Together, sends and receives between two ranks that are each other's next would mistake one for the other.
        overlap_p2p_comm=interleaved, batch_p2p_comm=not interleaved,
        num_layers=layout.pp * each, hidden_size=hidden_size, num_attention_heads=layout.tp,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp, sequence_parallel=layout.sp, pipeline_dtype=dtype,
        params_dtype=torch.float64 if dtype == torch.float64 else torch.float32, bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True, perform_initialization=False, deterministic_mode=deterministic,
        # Losses are divided by global counts already: gradients are summed, never averaged.
        calculate_per_token_loss=True,
    )  # fmt: skip


class Trainer:
    """A recipe's model and optimizer on this rank, a step, and a validation."""

    def __init__(self, recipe: Recipe, world: Ranks, fresh: bool = True):
        self.recipe, self.world, self.layout = recipe, world, world.layout
        self.dtype = getattr(torch, recipe.train.dtype)
        hidden, exact = recipe.model.hidden_size, recipe.train.deterministic
        cuts = stages(recipe.model, self.layout, recipe.data.seq_len)
        self.config = config_of(self.layout, hidden, self.dtype, exact, len(cuts) // self.layout.pp)
        self.model, self.stages = self._build(cuts)
        self.here = {name for name, module in self.model.named_modules() if isinstance(module, Layer)}
        weights = self._initial(fresh)
        self.optimizer = Optimizer(self.model, self.stages, recipe, world, self.config)
        if weights is not None:
            self.optimizer.set_masters(weights)

    # ----------------------------------------------------------------------------------------------------------- build

    def _build(self, cuts: list[range]) -> tuple[HybridLM, list[Stage]]:
        """The model with this rank's layers, and the stages they are in."""
        recipe = self.recipe
        try:
            formats = number_formats(recipe.model, recipe.precision)
            layers = Placed(
                self.world, self.config, Groups.of_megatron(), vars(recipe.kernels), formats, Numerics(recipe.seed)
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        model = HybridLM(recipe.model, device="meta", layers=layers)
        refuse_idle_rules((name for name, _ in model.named_parameters()), recipe.optim)
        if self.dtype == torch.float64:
            model = model.double()
        model.dtype = self.dtype
        model.head.chunk = recipe.train.loss_chunk
        model.recompute = recipe.train.recomputed
        found = stages_here(model, cuts, parallel_state.get_pipeline_model_parallel_rank(), self.layout.pp)
        for parameter in model.parameters():
            if not hasattr(parameter, "part"):
                parameter.part = Part.replicated(parameter.shape, layers.ranks)  # type: ignore[attr-defined]
        kept = {name: vars(parameter) for name, parameter in model.named_parameters()}
        model.to_empty(device=self.world.device)
        if recipe.model.tie_word_embeddings and found[-1].last:
            model.head.weight = model.embedding.weight
        for name, parameter in model.named_parameters():
            vars(parameter).update(kept[name])
        return model.train(), found

    def _initial(self, fresh: bool) -> dict[str, Tensor] | None:
        """Initial weights, in full precision, before what may be cast is cast."""
        weights = None
        if fresh and self.recipe.init_from:
            from pathlib import Path

            from nemo_lite.model.hf import load_weights

            load_weights(self.model, Path(self.recipe.init_from), whole=HybridLM(self.recipe.model, device="meta"))
        elif fresh:
            self.model.init_weights(self.recipe.seed)
        else:
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor.detach().zero_()
        if self.dtype == torch.bfloat16:
            cast = (Column, Row, whole.Linear, Embedding, Head, Experts)
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()} if fresh else None
            for module in self.model.modules():
                if isinstance(module, cast):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(torch.bfloat16)
        return weights

    # ------------------------------------------------------------------------------------------------------------ step

    def step(self, micros: list[Any], rate: float, stopping: bool = False):
        """One optimizer step over this data-parallel rank's micro batches of a global batch."""
        from nemo_lite.train.loop import StepResult, global_rows

        cp, depth = parallel_state.get_context_parallel_group(), self.depth
        batches = [Tokens.of(m.input_ids, m.doc_ids, m.labels, depth) for m in micros]
        counts = torch.stack([tokens.label_counts() for tokens in batches]).sum(0)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        normalizers = Normalizers(counts.double().tolist(), global_rows(self.recipe, micros))
        for ddp in self.optimizer.ddp:
            ddp.zero_grad_buffer()
        measured = self._run([sequence.cut(tokens, cp.rank(), cp.size()) for tokens in batches], normalizers)
        sums = self._sum(measured, stopping)
        norm = float(self.optimizer.norm())
        losses = sums["losses"].tolist()
        finite = math.isfinite(norm) and all(math.isfinite(loss) for loss in losses)
        if finite:
            self.optimizer.step(norm, rate)
            update_router_biases(self.model, {n: c for n, c in sums["counts"].items() if n in self.here})
        return StepResult(losses, float(sums["aux"]), norm, finite, sums["stopping"], sums["counts"])

    @property
    def depth(self) -> int:
        config = self.recipe.model
        return config.mtp.depth if config.mtp_layers else 0

    def _run(self, batches: list[Tokens], normalizers: Normalizers, forward_only: bool = False) -> list[dict]:
        """Forward and backward of all micro batches by Megatron-core's schedule; what each measured here."""
        measured: list[dict] = []
        numbers = self.model.numerics
        # Ranks that see the same tokens round alike, so that what they hold copies of stays equal.
        rank = self.world.rank if self.layout.sp else self.world.rank // self.layout.tp

        def forward(iterator, stage):
            micro, tokens = next(iterator)
            numbers.begin(micro, rank)
            output, found = stage(tokens, normalizers)
            measured.append(found)
            return output, lambda loss: (loss, torch.zeros((), dtype=torch.int), {})

        ctx = batches[0].contexts[0]
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=[enumerate(batches) for _ in self.stages],
            model=self.optimizer.ddp, num_microbatches=len(batches), micro_batch_size=1,
            seq_length=ctx.batch * ctx.length * self.layout.cp, forward_only=forward_only,
        )  # fmt: skip
        return measured

    def _sum(self, measured: list[dict], stopping: bool) -> dict[str, Any]:
        """What all micro batches on all ranks measured, by one all-reduce."""
        config, n_experts = self.recipe.model, self.recipe.model.n_routed_experts
        names = [f"layers.{i}" for i, letter in enumerate(config.layers) if letter == "E"]
        if config.mtp_layers:
            names += [f"mtp.layers.{i}" for i, letter in enumerate(config.mtp_layers) if letter == "E"]
        losses = torch.zeros(self.depth + 1, dtype=torch.float64, device=self.world.device)
        aux, counts = losses.new_zeros(()), losses.new_zeros(len(names), n_experts)
        for found in measured:
            if "losses" in found:
                losses += found["losses"]
            if "aux" in found:
                aux += found["aux"]
            for name, n in found.get("counts", {}).items():
                counts[names.index(name)] += n
        flat = torch.cat([losses, aux[None], counts.flatten(), losses.new_tensor([float(stopping)])])
        dist.all_reduce(flat)
        # Without sequence parallelism routers saw the same tokens on all tensor-parallel ranks; the head always does.
        tp = self.layout.tp
        flat[: self.depth + 1] /= tp
        if not self.layout.sp:
            flat[self.depth + 1 : -1] /= tp
        losses, aux, counts, asked = flat.split([self.depth + 1, 1, counts.numel(), 1])
        return {"losses": losses, "aux": aux, "stopping": bool(asked > 0),
                "counts": dict(zip(names, counts.view(-1, n_experts)))}  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ validation

    @torch.no_grad()
    def evaluate(self, batches: Iterable, byte_lengths: Tensor) -> dict[str, Any]:
        """As the native engine's: losses by depth, and bits per UTF-8 byte of the predicted tokens."""
        cp, depth = parallel_state.get_context_parallel_group(), self.depth
        totals = torch.zeros(2 * depth + 3, dtype=torch.float64, device=self.world.device)
        ranks = self.layout.tp * self.layout.cp * self.layout.pp  # that read the same rows
        self.model.eval()
        for batch in batches:
            micros = batch.to(self.world.device).split(self.recipe.train.micro_batch_size)
            found = [Tokens.of(m.input_ids, m.doc_ids, m.labels, depth) for m in micros]
            for tokens in found:
                totals[depth + 1 : -1] += tokens.label_counts()
                totals[-1] += byte_lengths[tokens.labels[0][tokens.labels[0] != IGNORE]].sum()
            cut = [sequence.cut(tokens, cp.rank(), cp.size()) for tokens in found]
            if len(self.stages) > 1:  # interleaved stages take a multiple of pp: some twice, whose losses do not count
                cut += [cut[-1]] * (-len(cut) % self.layout.pp)
            measured = self._run(cut, Normalizers([1.0] * (depth + 1), 1.0), forward_only=True)
            for each in [each for each in measured if "losses" in each][: len(found)]:
                totals[: depth + 1] += each["losses"].double()
        self.model.train()
        dist.all_reduce(totals)
        totals[: depth + 1] /= self.layout.tp
        totals[depth + 1 :] /= ranks
        losses = [float(a / max(b, 1.0)) for a, b in zip(totals[: depth + 1], totals[depth + 1 : -1])]
        bits = float(totals[0] / math.log(2) / max(totals[-1], 1.0))
        return {"val_loss": losses[0], "val_mtp_loss": losses[1:], "val_bits_per_byte": bits}
