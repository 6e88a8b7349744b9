"""What the worker processes of the equality tests run: layouts of the megatron engine against one native process.

Eight processes are started once. A case needs 1 to 8 of them: its ranks join a process group of their own, train a few
steps, and compare what lies on them with the native engine's numbers, which one process has written before.
"""

from __future__ import annotations

import math
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_lite.config import Recipe, check_world_size
from nemo_lite.data.packing import Batch

ROWS, LENGTH, MICRO, STEPS, RATE = 8, 32, 1, 5, 1e-2


def recipe(pattern: str = "ME*EM*E", mtp: str = "*E", dtype: str = "float64", **parallel) -> Recipe:
    """A tiny hybrid whose heads, groups and experts divide by 2 and 4, and are fewer than ranks where that is legal."""
    from tiny import tiny_config

    made = Recipe()
    made.model = tiny_config(
        pattern, mtp, 2, vocab_size=64, n_groups=2, mamba_num_heads=8, mamba_head_dim=4, num_attention_heads=8,
        head_dim=4, router_aux_loss_coef=1e-2, router_bias_update_rate=1e-2,
    )  # fmt: skip
    made.data.seq_len = LENGTH
    made.train.global_batch_size, made.train.micro_batch_size, made.train.dtype = ROWS, MICRO, dtype
    made.train.loss_chunk = 10
    made.optim.lr, made.optim.clip_grad, made.optim.weight_decay = RATE, 0.5, 0.1
    for name, value in parallel.items():
        setattr(made.parallel, name, value)
    return made


def batches(steps: int) -> list[Batch]:
    """Global batches of packed rows: documents of all lengths, one of them a token, and labels that are left out."""
    generator, found = torch.Generator().manual_seed(7), []
    for _ in range(steps):
        ids = torch.randint(0, 64, (ROWS, LENGTH), generator=generator)
        starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.12
        starts[0] = False  # a row that is one document
        starts[1, 9:11] = True
        labels = ids.masked_fill(torch.rand(ROWS, LENGTH, generator=generator) < 0.05, -100)
        doc_ids = starts.long().cumsum(1)
        found.append(Batch(ids, doc_ids, labels, torch.zeros(ROWS, dtype=torch.bool), list(range(ROWS)), [[]] * ROWS))
    return found


def rows_of(batch: Batch, rank: int, size: int) -> Batch:
    return list(batch.split(ROWS // size))[rank]


def native_run(path: Path, made: Recipe, steps: int = STEPS) -> None:
    """Train in this process with the native engine and write all that the layouts are held against."""
    from nemo_lite.parallel.native import World
    from nemo_lite.train import loop

    world = World(0, 1, torch.device("cpu"))
    model = loop.build_model(made, world).train()
    optimizer = loop.build_optimizer(model, made.optim)
    gradients: list[dict] = []
    clip = loop.clip_

    def look(parameters, norm, limit):
        if not gradients:
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        clip(parameters, norm, limit)

    loop.clip_ = look
    try:
        results = [loop.train_step(model, optimizer, list(b.split(MICRO)), RATE, made, world) for b in batches(steps)]
    finally:
        loop.clip_ = clip
    torch.save(
        {
            "results": [[*r.losses, r.aux_loss, r.grad_norm] for r in results],
            "counts": [r.expert_counts for r in results],
            "gradients": gradients,
            "weights": {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        },
        path,
    )


@dataclass
class Case:
    """A layout, and what it is held against."""

    parallel: dict[str, Any]
    reference: str
    world: int
    dtype: str = "float64"
    model: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1e-9
    step_tolerance: float = 1e-9


def difference(found: torch.Tensor, wanted: torch.Tensor, largest: float) -> float:
    return float((found.double() - wanted.double()).abs().max()) / max(largest, 1e-30) if found.numel() else 0.0


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Train under the layout; the largest differences on this rank, and where they are."""
    from nemo_lite.parallel import megatron

    made = recipe(dtype=case.dtype, engine="megatron", **case.parallel, **case.model)
    wanted = torch.load(folder / case.reference, weights_only=False)
    check_world_size(made, dist.get_world_size())
    world = megatron.start(made)
    try:
        trainer = megatron.Trainer(made, world)
        optimizer, norm = trainer.optimizer, trainer.optimizer.norm
        worst: dict[str, Any] = {"results": 0.0, "gradient": (0.0, ""), "weight": (0.0, ""), "counts": True}

        def note(kind: str, name: str, found: torch.Tensor, whole: torch.Tensor, master) -> None:
            largest = float(whole.abs().max())
            for piece, here in master.pieces(found).pieces:
                there = whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes))]
                worst[kind] = max(worst[kind], (difference(here, there, largest), name))

        def look():
            for master in optimizer.masters:
                note("gradient", master.name, master.gradient, wanted["gradients"][0][master.name], master)
            return norm()

        for step, batch in enumerate(batches(len(wanted["results"]))):
            mine = rows_of(batch, world.data_rank, world.data_size)
            if step == 0:
                optimizer.norm = look
            result = trainer.step(list(mine.split(MICRO)), RATE)
            optimizer.norm = norm
            found = [*result.losses, result.aux_loss, result.grad_norm]
            for a, b in zip(found, wanted["results"][step], strict=True):
                worst["results"] = max(
                    worst["results"], abs(a - b) / max(abs(b), 1e-12) if math.isfinite(a) else math.inf
                )
            same = all(torch.equal(result.expert_counts[n], c) for n, c in wanted["counts"][step].items())
            worst["counts"] = worst["counts"] and same and set(result.expert_counts) == set(wanted["counts"][step])
        for master in optimizer.masters:
            note("weight", master.name, master.flat, wanted["weights"][master.name], master)
        for name, buffer in trainer.model.named_buffers():
            worst["weight"] = max(
                worst["weight"], (difference(buffer, wanted["weights"][name], float(buffer.abs().max())), name)
            )
        return worst
    finally:
        megatron.stop(world)


def work(rank: int, queue: Any, answers: Any) -> None:
    """One of the eight: join the group of each case that wants this process, and report."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    while (job := queue.get()) is not None:
        number, first, case, folder, call = job
        try:
            store = dist.FileStore(str(folder / f"store_{number}"), case.world)
            dist.init_process_group("gloo", store=store, rank=rank - first, world_size=case.world)
            answers.put((number, rank - first, globals()[call](case, folder)))
        except BaseException:
            answers.put((number, rank - first, traceback.format_exc()))
            if dist.is_initialized():
                dist.destroy_process_group()
