"""What the fork server's children run: training from the command line with something broken in it, and rank cases.

A rank case is a function of a recipe's path, overrides and an output file; rank 0 writes what it measured there.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_lite.config import load_recipe
from nemo_lite.parallel import native
from nemo_lite.train import checkpoint as checkpoints
from nemo_lite.train import loop


def train(argv: list[str], patch: str = "") -> int:
    from nemo_lite.cli import guard
    from nemo_lite.train.__main__ import main

    if patch:
        name, *values = patch.split(":")
        globals()[name](*values)
    return guard(main, argv)


# ------------------------------------------------------------------------------------------------ what can be broken


def slow_saving(seconds: str) -> None:
    """Every file of a checkpoint takes its time, so that a kill can be aimed into a save."""
    sync = checkpoints._sync

    def slow(path):
        time.sleep(float(seconds))
        sync(path)

    checkpoints._sync = slow


def before_steps(do: Callable[[], None]) -> None:
    """Do something before every step of either engine."""

    def after(step: Callable) -> Callable:
        def both(*args, **options):
            do()
            return step(*args, **options)

        return both

    loop.train_step = after(loop.train_step)
    if (megatron := sys.modules.get("nemo_lite.parallel.megatron")) is not None:
        megatron.Trainer.step = after(megatron.Trainer.step)


def slow_steps(seconds: str) -> None:
    before_steps(lambda: time.sleep(float(seconds)))


def full_disk(step: str, rank: str) -> None:
    """From a step on, the disk of one rank has no room for its part of a checkpoint."""
    save = torch.save

    def refuse(value, file, *args, **options):
        path = Path(getattr(file, "name", ""))
        if path.name == f"rng_{rank}.pt" and checkpoints.step_of(path.parent.with_suffix("")) >= int(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(value, file, *args, **options)

    checkpoints.torch.save = refuse


def no_manifest(step: str) -> None:
    """From a step on, rank 0 cannot write the manifest."""
    write = checkpoints.write_manifest

    def refuse(folder):
        if checkpoints.step_of(folder.with_suffix("")) >= int(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "manifest.json"))
        write(folder)

    checkpoints.write_manifest = refuse


def poisoned_gradients(*steps: str) -> None:
    """One gradient element becomes NaN in these steps (counted from 1), on the last rank only."""
    chosen, count = {int(step) for step in steps}, 0
    forward = loop.HybridLM.forward

    def poison(self, *args, normalizers=None, **options):
        nonlocal count
        out = forward(self, *args, normalizers=normalizers, **options)
        if normalizers is not None and self.training:
            count += 1
            if count in chosen and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                out.hidden.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan")))
        return out

    loop.HybridLM.forward = poison


def die_at(step: str, rank: str, once: str) -> None:
    """kill -9 itself in the middle of a step, the first time only (`once` names a file that remembers)."""
    count = 0

    def die() -> None:
        nonlocal count
        count += 1
        if count == int(step) and os.environ["RANK"] == rank and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), 9)

    before_steps(die)


# ------------------------------------------------------------------------------------------------------------- ranks


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if native.is_sharded(tensor) else tensor).clone()


class Setup:
    """The parts of a run, without the loop around them."""

    def __init__(self, path: str, overrides: list[str]):
        self.recipe = load_recipe(path, overrides)
        self.world = native.start("cpu")
        self.model = loop.build_model(self.recipe, self.world).train()
        self.optimizer = loop.build_optimizer(self.model, self.recipe.optim)
        tokenizer = loop.load_tokenizer(self.recipe.data.tokenizer)
        self.loader = loop.PackedLoader(
            self.recipe.data, tokenizer, seed=0, global_batch_size=self.recipe.train.global_batch_size,
            rank=self.world.rank, world_size=self.world.size,
        )  # fmt: skip

    def step(self):
        micros = list(next(self.loader).split(self.recipe.train.micro_batch_size))
        return loop.train_step(self.model, self.optimizer, micros, self.recipe.optim.lr, self.recipe, self.world)

    def end(self, found: dict, out: str) -> None:
        self.loader.close()
        if self.world.main:
            torch.save(found, out)
        native.stop(self.world)


def steps(path: str, overrides: list[str], out: str, count: int, every_gradient: bool = True) -> None:
    """Losses, gradients (of each step), norms and final weights of `count` steps."""
    setup = Setup(path, overrides)
    gradients = []

    def keep(*_):
        if every_gradient:
            gradients.append({name: whole(p.grad) for name, p in setup.model.named_parameters()})

    setup.optimizer.register_step_pre_hook(keep)
    results = [setup.step() for _ in range(count)]
    tensors = [*setup.model.named_parameters(), *setup.model.named_buffers()]
    found = {
        "losses": [[*r.losses, r.aux_loss] for r in results],
        "norms": [r.grad_norm for r in results],
        "gradients": gradients,
        "counts": [r.expert_counts for r in results],
        "weights": {name: whole(t) for name, t in tensors},
        "sharded": [name for name, p in setup.model.named_parameters() if native.is_sharded(p)],
        "tied": setup.model.head.weight is setup.model.embedding.weight,
    }
    setup.end(found, out)


def dtypes(path: str, overrides: list[str], out: str) -> None:
    """The dtypes of parameters as each module's forward sees them, and of what the routers and scans compute."""
    from nemo_lite.model import mamba2, moe
    from nemo_lite.parallel import layers

    seen: dict[str, set] = {}

    def watch(cls):
        forward = cls.forward

        def watched(self, *args, **options):
            for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
                seen.setdefault(f"{cls.__name__}.{name}", set()).add(tensor.dtype)
                assert not native.is_sharded(tensor), name
            for name, module in self.named_children():
                if name == "conv1d":
                    for inner, tensor in module.named_parameters(recurse=False):
                        seen.setdefault(f"conv1d.{inner}", set()).add(tensor.dtype)
            first = next((a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()), None)
            if first is not None:
                seen.setdefault(f"{cls.__name__} input", set()).add(first.dtype)
            out = forward(self, *args, **options)
            if cls is moe.Router:
                seen.setdefault("scores", set()).add(out[1].dtype)
            return out

        cls.forward = watched

    for cls in (mamba2.Mamba2, moe.Router, layers.Linear, layers.Experts, layers.Embedding, layers.Head, layers.Norm,
                layers.GatedNorm):  # fmt: skip
        watch(cls)
    setup = Setup(path, overrides)
    setup.step()
    masters = {p.dtype for p in setup.model.parameters()}
    moments = {t.dtype for state in setup.optimizer.state.values() for t in state.values()}
    setup.end({"seen": seen, "masters": masters, "moments": moments}, out)


def gathers(path: str, overrides: list[str], out: str) -> None:
    """How often each parameter is all-gathered in one step, and how often each group's gradients are reduced."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    setup = Setup(path, overrides)
    names = {id(p): name for name, p in setup.model.named_parameters()}
    gathered, reduced = {}, {}
    gather, reduce = groups.foreach_all_gather, groups.foreach_reduce

    def count(into, params):
        for p in params:
            name = names.get(id(p.sharded_param), "?")
            into[name] = into.get(name, 0) + 1

    def all_gather(params, *args, **options):
        count(gathered, params)
        return gather(params, *args, **options)

    def reduce_scatter(params, *args, **options):
        count(reduced, params)
        return reduce(params, *args, **options)

    groups.foreach_all_gather, groups.foreach_reduce = all_gather, reduce_scatter
    setup.step()
    setup.end({"gathered": gathered, "reduced": reduced}, out)


def state_of(path: str, overrides: list[str], out: str) -> None:
    """What a run_dir's newest checkpoint holds as this number of ranks loads it, and the next rows of data."""
    setup = Setup(path, overrides)
    saver = checkpoints.Checkpointer(Path(setup.recipe.run_dir), setup.recipe.checkpoint, setup.world, print)
    folder = checkpoints.newest_whole(Path(setup.recipe.run_dir), print)
    saved = saver.load(folder, setup.model, setup.optimizer)
    setup.loader.load_state_dict(saved["data"])
    rows = next(setup.loader).input_ids
    if setup.world.size > 1:
        parts = [torch.empty_like(rows) for _ in range(setup.world.size)]
        torch.distributed.all_gather(parts, rows)
        rows = torch.cat(parts)
    names = {id(p): name for name, p in setup.model.named_parameters()}
    found = {
        "weights": {name: whole(t) for name, t in setup.model.state_dict().items()},
        "moments": {
            f"{names[id(p)]}.{key}": whole(value)
            for p, state in setup.optimizer.state.items()
            for key, value in state.items()
        },
        "decay": {names[id(p)]: g["weight_decay"] for g in setup.optimizer.param_groups for p in g["params"]},
        "train": saved["train"],
        "rows": rows,
    }  # fmt: skip
    saver.close()
    setup.end(found, out)


def memory_of_merging(run_dirs: list[str], target: str, window: int, out: str) -> None:
    """Bytes that this process's memory grows by at most while it merges the last of two runs, in files of 4 MB."""
    import json

    from nemo_lite.merge import merge
    from nemo_lite.model import hf

    def resident(what: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) * 1024

    save = hf.save_model
    hf.save_model = lambda *args, **options: save(*args, shard_bytes=4_000_000, **options)
    for run_dir in run_dirs:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        merge([Path(run_dir)], Path(target), window=window)
    Path(out).write_text(json.dumps(resident("VmHWM") - before))
