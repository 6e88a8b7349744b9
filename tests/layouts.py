"""Layouts of the megatron engine against one native process: what the fork server's children run, a child a rank.

Every rank compares what lies on it with the native engine's whole tensors, which one process has written before, and
writes the largest differences to a file. Nothing is gathered.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_lite.config import CheckpointConfig, OptimRule, Recipe, check_world_size
from nemo_lite.data.packing import Batch
from nemo_lite.parallel.layout import group
from nemo_lite.parallel.native import World
from nemo_lite.train import loop
from nemo_lite.train.checkpoint import Checkpointer, checkpoints

ROWS, LENGTH, MICRO, RATE = 8, 32, 2, 1e-2
ALONE = World(0, 1, torch.device("cpu"))
PARALLEL = {"tp", "pp", "ep", "cp", "sp", "distributed_optimizer"}


def recipe_for(engine: str, options: dict[str, Any]) -> Recipe:
    """A tiny hybrid with latent experts and MTP, whose heads divide by 4 and whose groups and KV heads are 2.

    options: keys of `parallel`, `pattern`, `mtp`, `dtype`, `precision`."""
    made = Recipe()
    made.model = tiny_config(
        options.get("pattern", "ME*EM*E"), options.get("mtp", "*E"), 2, vocab_size=64, n_groups=2, mamba_num_heads=8,
        mamba_head_dim=4, num_attention_heads=8, head_dim=4, router_aux_loss_coef=1e-2, router_bias_update_rate=1e-2,
        tie_word_embeddings=options.get("tied", False),
    )  # fmt: skip
    made.model.moe_latent_size = options.get("latent", 16)
    made.parallel.engine = engine  # type: ignore[assignment]
    if engine == "megatron":
        for name in PARALLEL & set(options):
            setattr(made.parallel, name, options[name])
    made.data.seq_len, made.init_from = LENGTH, options.get("init_from")
    made.train.global_batch_size, made.train.micro_batch_size = ROWS, MICRO
    made.train.dtype, made.train.loss_chunk = options.get("dtype", "float64"), 10
    made.train.recompute = options.get("recompute", "none")
    made.precision.preset = options.get("precision", "bf16")
    made.precision.reduce_dtype = options.get("reduce", "float32")
    made.optim.rules = [OptimRule(*rule) for rule in options.get("rules", ())]
    made.optim.lr, made.optim.clip_grad, made.optim.weight_decay = RATE, 0.5, 0.1
    return made


def model_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that the native engine knows of."""
    return {key: value for key, value in options.items() if key not in PARALLEL}


def batch_of(step: int, padding: bool = True) -> Batch:
    """A global batch of packed rows: documents of all lengths, some of them a token, padding, labels left out."""
    generator = torch.Generator().manual_seed(7 + step)
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=generator)
    starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.12
    starts[0] = False  # a row that is one document
    starts[1, 9:11] = True
    labels = ids.masked_fill(torch.rand(ROWS, LENGTH, generator=generator) < 0.05, -100)
    doc_ids = starts.long().cumsum(1)
    if padding:
        doc_ids[2, -7:] = doc_ids[5] = -1  # padding: the end of a row, and a whole one
    labels[doc_ids < 0] = -100
    return Batch(ids, doc_ids, labels, torch.zeros(ROWS).bool(), list(range(ROWS)), [[]] * ROWS)


def micros_of(step: int, world: World, padding: bool = True) -> list[Batch]:
    rows = list(batch_of(step, padding).split(ROWS // world.data_size))[world.data_rank]
    return list(rows.split(MICRO))


# ----------------------------------------------------------------------------------------------------------- references


def native_run(path: Path, options: dict[str, Any], steps: int) -> None:
    """Train in this process with the native engine and write all that layouts are held against."""
    made = recipe_for("native", options)
    trainer = loop.Native.Trainer(made, ALONE, True)
    trainer.model.train()
    gradients: dict[str, torch.Tensor] = {}
    clip = loop.clip_

    def look(parameters, norm, limit):
        if not gradients:  # of the first step
            gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        clip(parameters, norm, limit)

    loop.clip_ = look
    try:
        results = [trainer.step(micros_of(step, ALONE), RATE, False) for step in range(steps)]
    finally:
        loop.clip_ = clip
    found = {
        "results": [[*r.losses, r.aux_loss, r.grad_norm] for r in results],
        "counts": [r.expert_counts for r in results],
        "gradients": gradients,
        "weights": whole_weights(trainer.model),
        "evaluation": trainer.evaluate([batch_of(100)], torch.ones(64)),
    }
    torch.save(found, path)


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def native_state(folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a checkpoint holds as one native process loads it, by name, whole."""
    trainer = loop.Native.Trainer(recipe_for("native", options), ALONE, False)
    saver = Checkpointer(folder, CheckpointConfig(), ALONE, print)
    saver.load(checkpoints(folder)[-1], trainer.model, trainer.optimizer)
    saver.close()
    names = {p: name for name, p in trainer.model.named_parameters()}
    moments = {f"{names[p]}.{k}": v for p, s in trainer.optimizer.state.items() for k, v in s.items()}
    return whole_weights(trainer.model) | moments


def native_save(folder: Path, options: dict[str, Any], steps: int) -> None:
    """A checkpoint of the native engine's."""
    trainer = loop.Native.Trainer(recipe_for("native", options), ALONE, True)
    trainer.model.train()
    for step in range(steps):
        trainer.step(micros_of(step, ALONE), RATE, False)
    _save(folder, ALONE, trainer, steps)


def _save(folder: Path, world: World, trainer: Any, step: int) -> None:
    saver = Checkpointer(folder, CheckpointConfig(asynchronous=False), world, print)
    saver.save(step, trainer.model, trainer.optimizer, {"step": step})
    saver.close()


# -------------------------------------------------------------------------------------------------------- what ranks do


class Layout:
    """The megatron engine on this rank under a layout, and the largest differences it has seen."""

    def __init__(self, options: dict[str, Any], fresh: bool = True):
        from nemo_lite.parallel import megatron

        self.engine, self.recipe = megatron, recipe_for("megatron", options)
        check_world_size(self.recipe, int(os.environ["WORLD_SIZE"]))
        self.world = megatron.start(self.recipe)
        self.trainer = megatron.Trainer(self.recipe, self.world, fresh)
        self.worst: dict[str, tuple[float, str]] = {}

    def step(self, step: int):
        return self.trainer.step(micros_of(step, self.world), RATE)

    def note(self, kind: str, name: str, off: float) -> None:
        self.worst[kind] = max(self.worst.get(kind, (0.0, "")), (off if math.isfinite(off) else math.inf, name))

    def pieces(self, kind: str, name: str, found: torch.Tensor, wanted: torch.Tensor, master: Any) -> None:
        """Note how far this rank's pieces of a tensor are off, relative to the whole tensor's largest value."""
        largest = max(float(wanted.abs().max()), 1e-30)
        for piece, here in master.pieces(found).pieces:
            there = wanted[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes))]
            self.note(kind, name, float((here.double() - there.double()).abs().max()) / largest)

    def end(self, out: str, **found: Any) -> None:
        torch.save(self.worst | found, f"{out}.{self.world.rank}")
        self.engine.stop(self.world)


def train(options: dict[str, Any], reference: str, out: str) -> None:
    """Train as the reference did; results, gradients of the first step, weights at the end, expert choices."""
    wanted = torch.load(reference, weights_only=False)
    at = Layout(options)
    optimizer = at.trainer.optimizer
    norm, same = optimizer.norm, True

    def look():
        for master in optimizer.masters:
            at.pieces("gradient", master.name, master.gradient, wanted["gradients"][master.name], master)
        return norm()

    for step, expected in enumerate(wanted["results"]):
        optimizer.norm = norm if step else look
        result = at.step(step)
        for place, (a, b) in enumerate(zip([*result.losses, result.aux_loss, result.grad_norm], expected, strict=True)):
            at.note("results", f"step {step}, {place}", abs(a - b) / max(abs(b), 1e-12))
        counts = wanted["counts"][step]
        same = same and set(counts) == set(result.expert_counts)
        same = same and all(torch.equal(result.expert_counts[name], n) for name, n in counts.items())
    for master in optimizer.masters:
        at.pieces("weight", master.name, master.flat, wanted["weights"][master.name], master)
    for name, buffer in at.trainer.model.named_buffers():
        at.note("weight", name, float((buffer - wanted["weights"][name]).abs().max()))
    rows = list(batch_of(100).split(ROWS // at.world.data_size))[at.world.data_rank]
    for pieces in ([rows], list(rows.split(MICRO))):
        evaluation = at.trainer.evaluate(pieces, torch.ones(64))
        for key in ("val_loss", "val_bits_per_byte"):
            at.note("evaluation", key, abs(evaluation[key] - wanted["evaluation"][key]) / wanted["evaluation"][key])
    at.end(out, same=same)


def save(options: dict[str, Any], folder: str, steps: int, out: str) -> None:
    """Train a few steps and write a checkpoint; then a few more, for whoever resumes."""
    at = Layout(options)
    for step in range(steps):
        at.step(step)
    _save(Path(folder), at.world, at.trainer, steps)
    for step in range(steps, 2 * steps):
        at.step(step)
    at.end(out, masters={m.name: m.flat.detach().clone() for m in at.trainer.optimizer.masters})


def started(options: dict[str, Any], reference: str, out: str) -> None:
    """Fresh weights, or those of init_from: every piece here must be the whole tensor's."""
    wanted, at = torch.load(reference), Layout(options)
    for master in at.trainer.optimizer.masters:
        at.pieces("started", master.name, master.flat, wanted[master.name], master)
    at.end(out)


def load(options: dict[str, Any], folder: str, reference: str, out: str) -> None:
    """Read a checkpoint of any layout: every piece here must be the whole tensor's, bit for bit."""
    wanted = torch.load(reference)
    at = Layout(options, fresh=False)
    saver = Checkpointer(Path(folder), CheckpointConfig(), at.world, print)
    saver.load(checkpoints(Path(folder))[-1], at.trainer.model, at.trainer.optimizer)
    saver.close()
    for master in at.trainer.optimizer.masters:
        for key, flat in {"": master.flat, ".exp_avg": master.adam["exp_avg"],
                          ".exp_avg_sq": master.adam["exp_avg_sq"]}.items():  # fmt: skip
            at.pieces("state", master.name + key, flat, wanted[master.name + key], master)
        at.note("state", "step", float(abs(master.adam["step"] - wanted[f"{master.name}.step"])))
        weight = master.parameter.detach().view(-1)[master.start : master.end]
        at.pieces("model", master.name, weight, wanted[master.name].to(weight.dtype), master)
    for name, buffer in at.trainer.model.named_buffers():
        at.note("state", name, float((buffer - wanted[name]).abs().max()))
    at.end(out)


def resume(options: dict[str, Any], folder: str, steps: int, before: str, out: str) -> None:
    """Go on from a checkpoint under the layout that wrote it: the masters of whoever did not stop, bit for bit."""
    at = Layout(options, fresh=False)
    wanted = torch.load(f"{before}.{at.world.rank}", weights_only=False)["masters"]
    saver = Checkpointer(Path(folder), CheckpointConfig(), at.world, print)
    saver.load(checkpoints(Path(folder))[-1], at.trainer.model, at.trainer.optimizer)
    saver.close()
    for step in range(steps, 2 * steps):
        at.step(step)
    for master in at.trainer.optimizer.masters:
        at.note("resumed", master.name, float((master.flat - wanted[master.name]).abs().max()))
    at.end(out)


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends, by what a group of ranks shares and the collective. Rings: an all-reduce of n ranks
    sends 2 (n - 1) / n of its tensor, gathers and reduce-scatters (n - 1) / n of the whole one."""

    OPS = {
        "allreduce_": ("all-reduce", "tensors"), "allreduce_coalesced_": ("all-reduce", "tensors"),
        "_allgather_base_": ("gather", "output_tensor"), "allgather_into_tensor_coalesced_": ("gather", "outputs"),
        "_reduce_scatter_base_": ("reduce-scatter", "input_tensor"),
        "reduce_scatter_tensor_coalesced_": ("reduce-scatter", "inputs"),
        "alltoall_base_": ("all-to-all", "input"), "send": ("send", "tensors"),
    }  # fmt: skip

    def __init__(self, groups: dict[str, list[int]]):
        super().__init__()
        self.groups, self.bytes = groups, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, which = self.OPS.get(func._schema.name.removeprefix("c10d::"), ("", ""))
        if func.namespace == "c10d" and name:
            given = {a.name: v for a, v in zip(func._schema.arguments, args)}
            group = torch.distributed.ProcessGroup.unbox(given["process_group"])
            ranks = torch.distributed.get_process_group_ranks(group)
            self.add(name, ranks, group.rank(), given[which], given.get("input_split_sizes"))
        return func(*args, **(kwargs or {}))

    def add(self, name: str, ranks: list[int], rank: int, found: Any, splits: list[int] | None) -> None:
        n, tensors = len(ranks), found if isinstance(found, list) else [found]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if name == "all-to-all":
            x = tensors[0]
            stays = splits[rank] if splits else len(x) // n
            size *= 1 - stays / max(len(x), 1)
        else:
            size *= {"all-reduce": 2 * (n - 1) / n, "send": 1}.get(name, (n - 1) / n)
        kind = next((kind for kind, mine in self.groups.items() if mine == ranks), str(ranks))
        self.bytes[f"{kind} {name}"] = self.bytes.get(f"{kind} {name}", 0) + size


def traffic(options: dict[str, Any], out: str) -> None:
    """What one step sends."""
    at = Layout(options)
    world = at.world
    groups = {
        kind: group(world.layout, world.size, kind, world.rank) for kind in ("tp", "cp", "ep", "pp", "dp_cp", "edp")
    }
    at.step(0)  # buckets are settled in the first
    with Traffic({kind: ranks for kind, ranks in groups.items() if len(ranks) > 1}) as counted:
        at.trainer.step(micros_of(1, world, padding=False), RATE)  # padding goes to no expert
    at.end(out, traffic=counted.bytes)
