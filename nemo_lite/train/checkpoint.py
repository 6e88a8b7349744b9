"""Sharded, asynchronous, atomic checkpoints of a run.

RUN_DIR/checkpoints/step_N holds torch.distributed.checkpoint's files (model and optimizer, sharded as they lay),
state.json (step, data position, model config), rng_R.pt per rank, and manifest.json with the size and CRC-32 of every
file. It is written as step_N.partial, and renamed when everything is on disk: what is called step_N is whole. A damaged
one is found by its manifest, named, and the one before it is used.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)

from nemo_lite.config import CheckpointConfig, UserError
from nemo_lite.parallel.native import World
from nemo_lite.parallel.parts import LoadPlanner, Pieces, SavePlanner

FORMAT = 1
FAILURES = (Exception, CheckpointException)  # torch derives the latter from BaseException
# Optimizer state by parameter name, not by group: groups depend on what is sharded, so on the number of ranks.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def _copy(tree: Any) -> Any:
    """A copy of a state dict's tensors: training goes on while they are written."""
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copy(value) for value in tree)
    if isinstance(tree, Pieces):
        return tree.map(lambda tensor: tensor.detach().to("cpu", copy=True))
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


def _rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path) -> None:
    """List every file of a checkpoint with its size and checksum, and force everything to disk."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.name != "manifest.json"):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc(path)}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
    _sync(manifest)
    _sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as its manifest says."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest.json is missing or broken"
    for name, facts in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
        if _crc(path) != facts["crc32"]:
            return f"{name} does not match its checksum"
    return None


def step_of(folder: Path) -> int:
    """The step in the name step_N, or -1."""
    head, _, number = folder.name.partition("_")
    return int(number) if head == "step" and number.isdigit() else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((p for p in (run_dir / "checkpoints").glob("step_*") if step_of(p) >= 0), key=step_of)


def newest_whole(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; each damaged one before it is named."""
    for folder in reversed(checkpoints(run_dir)):
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"checkpoint {folder} is damaged ({problem}); trying the one before it")
    return None


class Checkpointer:
    """Saves and restores model, optimizer and the loop's own state."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World, say: Callable[[str], None]):
        self.folder, self.run_dir, self.config, self.world, self.say = (
            run_dir / "checkpoints", run_dir, config, world, say,
        )  # fmt: skip
        # The writer's collectives must not interleave with those of training, so they get a group of their own.
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        # A thread of its own has the first CUDA device, until it is told.
        device = torch.cuda.set_device if world.device.type == "cuda" else lambda _: None
        self.worker = ThreadPoolExecutor(1, "checkpoint", initializer=device, initargs=(world.device,))
        self.running: Future | None = None
        self.last_saved = -1

    def save(self, step: int, model: nn.Module, optimizer: Any, loop_state: dict[str, Any]) -> None:
        """Write step_N in the background (at once where checkpoint.asynchronous is off)."""
        self.wait()
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
        self.world.barrier()
        state = _copy(_state(model, optimizer, writing=True)[0])
        self.running = self.worker.submit(self._write, step, state, loop_state, _rng_state())
        self.last_saved = step
        if not self.config.asynchronous:
            self.wait()

    def _write(self, step: int, state: dict[str, Any], loop_state: dict[str, Any], rng: dict[str, Any]) -> None:
        partial, final = self.folder / f"step_{step}.partial", self.folder / f"step_{step}"

        def own_files() -> None:
            partial.mkdir(parents=True, exist_ok=True)
            with open(partial / f"rng_{self.world.rank}.pt", "wb") as file:
                torch.save(rng, file)
            if self.world.main:
                body = {"format": FORMAT, "world_size": self.world.size, **loop_state}
                (partial / "state.json").write_text(json.dumps(body, indent=1) + "\n")

        def tensors() -> None:
            with warnings.catch_warnings():  # that torch.distributed is not initialised is what one process means
                warnings.simplefilter("ignore", UserWarning)
                dcp.save(
                    state,
                    storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
                    planner=SavePlanner(),
                    process_group=self.group,
                    no_dist=self.world.size == 1,
                )

        def finish() -> None:
            if not self.world.main:
                return
            write_manifest(partial)
            if final.exists():  # a damaged checkpoint of the same step
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.folder)
            if self.config.keep:  # later ones are damaged, or this run would have gone on from them
                for old in [p for p in checkpoints(self.run_dir) if step_of(p) <= step][: -self.config.keep]:
                    shutil.rmtree(old, ignore_errors=True)

        try:
            for part in (own_files, tensors, finish):
                self._together(part)
        except UserError:
            if self.world.main:  # a full disk should not be left fuller
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, work: Callable[[], None]) -> None:
        """Do a part of the writing on every rank; where it fails on one, UserError on all of them."""
        problem = None
        try:
            work()
        except FAILURES as error:
            problem = _reason(error)
        problems: list[str | None] = [problem]
        if self.group is not None:
            problems *= self.world.size
            dist.all_gather_object(problems, problem, group=self.group)
        found = next((each for each in problems if each), None)
        if found:
            raise UserError(found)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was being written in the background could not be; `wait` says why."""
        return self.running is not None and self.running.done() and self.running.exception() is not None

    def wait(self) -> None:
        """Wait for the checkpoint being written; UserError where it could not be."""
        if self.running is None:
            return
        running, self.running = self.running, None
        try:
            running.result()
        except FAILURES as error:
            if not self.world.main and isinstance(error, UserError):
                raise SystemExit(1) from None  # it is the same on every rank, and rank 0 says it
            reason = str(error) if isinstance(error, UserError) else _reason(error)
            whole = [p for p in checkpoints(self.run_dir) if step_of(p) < self.last_saved]
            kept = f"{whole[-1]} is whole" if whole else "there is none before it"
            raise UserError(
                f"the checkpoint of step {self.last_saved} could not be written: {reason}; {kept}"
            ) from error

    def close(self) -> None:
        self.worker.shutdown(wait=True)

    def load(self, folder: Path, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Restore model and optimizer in place; the loop's own state."""
        loop_state = read_state(folder)
        load_tensors(folder, model, optimizer, self.world)
        rng = folder / f"rng_{self.world.rank}.pt"
        if rng.exists() and loop_state["world_size"] == self.world.size:
            _set_rng_state(torch.load(rng, weights_only=False))
        self.last_saved = loop_state["step"]
        return loop_state


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint: state.json cannot be read ({error})") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {state.get('format')}; this version reads {FORMAT}")
    return state


def _state(model: nn.Module, optimizer: Any, writing: bool) -> tuple[dict[str, Any], Callable[[], None]]:
    """Weights and optimizer states as they lie here, by names that all engines share; and what puts them in place once
    a checkpoint has been read into them."""
    if hasattr(optimizer, "state_pieces"):
        return optimizer.state_pieces(writing), optimizer.spread
    weights = get_model_state_dict(model)  # first: it puts back the shards of what a validation left gathered
    if optimizer is None:
        return {"model": weights}, lambda: model.load_state_dict(weights) and None
    whole = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
    states = {name: value for name, value in whole.items() if name.startswith("state.")}

    def put() -> None:
        # Weight decay, betas and the like are the recipe's, which may have changed them since.
        chosen = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=whole | states, options=BY_NAME)
        for group, own in zip(optimizer.param_groups, chosen):
            group.update(own)

    return {"model": weights, "optim": states}, put


def load_tensors(folder: Path, model: nn.Module, optimizer: Any, world: World | None) -> None:
    """Fill model (and optimizer) from a checkpoint, whatever engine and number of ranks wrote it."""
    state, put = _state(model, optimizer, writing=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, checkpoint_id=folder, planner=LoadPlanner(), no_dist=world is None or world.size == 1)
    except FAILURES as error:
        raise UserError(f"{folder} does not fit this model: {_reason(error)}") from error
    put()


class Weights(dcp.FileSystemReader):
    """The weights of a checkpoint, one at a time: nobody holds the model, whatever layout wrote it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder, self._metadata = folder, super().read_metadata()

    def read_metadata(self, *args, **options):
        return self._metadata

    def __call__(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A weight of the shape and dtype of `like`, which may be on the meta device."""
        tensor = torch.empty(like.shape, dtype=like.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                dcp.load({"model": {name: tensor}}, storage_reader=self, no_dist=True)
        except FAILURES as error:
            raise UserError(f"{self.folder} does not fit this model: {_reason(error)}") from error
        return tensor


def _reason(error: BaseException) -> str:
    """The innermost cause of an error, on one line."""
    failures = getattr(error, "failures", None)  # torch's CheckpointException: rank -> (exception, traceback)
    while failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
        failures = getattr(error, "failures", None)
    seen = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    if isinstance(seen, OSError) and seen.strerror:
        return f"{seen.strerror}{f' ({seen.filename})' if seen.filename else ''}"
    text = str(seen).strip().splitlines()
    return f"{type(seen).__name__}: {text[0] if text else 'no message'}"
