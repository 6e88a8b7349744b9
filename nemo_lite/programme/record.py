"""What was done: a stage's record beside its outputs, and what it says of the stage now.

A record holds what the outputs were made from: the recipe's keys, the version of nemo_lite, and a digest of every
input's content. A stage is out of date where one of these, or the content of an output, is another now. Times say
nothing: sizes and times of files only spare reading again what cannot have changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_lite import __version__
from nemo_lite.process import alive
from nemo_lite.programme.stages import Stage, _named

# Of a training recipe: what changes neither weights nor checkpoints.
_IDLE = ("stage.", "log.", "run_dir", "checkpoint.asynchronous", "train.threads", "data.prefetch", "data.cache_dir")


# ------------------------------------------------------------------------------------------------------------- content


_seen: dict[str, dict[str, str]] = {}  # what this process has read


def content(path: str, known: dict[str, str] | None = None) -> dict[str, str] | None:
    """``digest`` of a file's or folder's content, and ``stat`` of its sizes and times; None where it does not exist.

    ``known`` is what this returned before: where the sizes and times are still those, nothing is read.
    """
    if _named(path):
        return {"stat": "", "digest": f"{path} of Python {platform.python_version()}" if path == "stdlib" else path}
    root = Path(path)
    if not root.exists():
        return None
    files = [root]
    if root.is_dir():
        found = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
        files = sorted(file for file in found if not file.name.endswith((".tmp", ".partial")))
    stats = [(str(file.relative_to(root)), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    stat = hashlib.sha256(repr(stats).encode()).hexdigest()[:32]
    for before in (known, _seen.get(str(root.absolute()))):
        if before and before["stat"] == stat:
            return before
    whole = hashlib.sha256()
    for file, (name, _, _) in zip(files, stats):
        with open(file, "rb") as stream:
            whole.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    found = _seen[str(root.absolute())] = {"stat": stat, "digest": whole.hexdigest()[:32]}
    return found


def version(stage: Stage) -> str:
    """What else the outputs depend on: the release of nemo_lite, for its own commands."""
    return __version__ if stage.ours else ""


def recipe_keys(stage: Stage) -> dict[str, Any]:
    """The resolved keys that the outputs depend on, flat."""
    if not stage.trains:
        return {"stage.command": stage.recipe.stage.command}
    return {key: value for key, value in _flat(dataclasses.asdict(stage.recipe)) if not key.startswith(_IDLE)}


def _flat(tree: Any, path: str = ""):
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{path}.{name}" if path else name)
    else:
        yield path, json.loads(json.dumps(tree))


# -------------------------------------------------------------------------------------------------------------- records


@dataclass
class Record:
    """The last run of a stage. ``status``: running, done, stopped (by a signal) or failed."""

    status: str
    recipe: dict[str, Any]
    version: str
    inputs: dict[str, dict[str, str]]
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    started: float = 0.0  # Unix time of the first try
    seconds: float = 0.0  # over all tries
    code: int | None = None
    process: dict[str, Any] = field(default_factory=dict)  # of the stage
    pipeline: dict[str, Any] = field(default_factory=dict)  # of what started it


def read(stage: Stage) -> Record | None:
    """The record of a stage's last run; one that cannot be read counts as none."""
    try:
        return Record(**json.loads(stage.record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(stage: Stage, record: Record) -> None:
    from nemo_lite.train.metrics import write_atomically

    write_atomically(stage.record, json.dumps(dataclasses.asdict(record), indent=1).encode() + b"\n")


def inputs_now(stage: Stage, record: Record | None) -> dict[str, dict[str, str]]:
    """The content of every input that exists."""
    known = record.inputs if record else {}
    found = {path: content(path, known.get(path)) for path in stage.inputs}
    return {path: one for path, one in found.items() if one is not None}


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclass
class Verdict:
    """``state`` of a stage now, in a word, and why.

    done      its outputs are what it would make
    running   a process is at it
    resume    it was broken off, and goes on with what it left
    run       it has never run, or something that it depends on changed
    wait      a stage before it has to run first
    """

    state: str
    why: str = ""
    record: Record | None = None
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def due(self) -> bool:
        return self.state not in ("done", "running")


def verdict(stage: Stage, before: dict[str, Verdict]) -> Verdict:
    """What has to be done about a stage, given the verdicts of those before it."""
    record = read(stage)
    if record is not None and record.status == "running" and alive(record.process) is not False:
        return Verdict("running", f"since {time.strftime('%H:%M:%S', time.localtime(record.started))}", record)
    own = _changed_keys(stage, record) if record else "has never run"
    if late := [name for name in stage.after if before[name].state != "done"]:
        done = record is not None and record.status == "done" and not own
        return Verdict("wait", f"only if {late[0]} writes something else" if done else f"for {late[0]}", record)
    inputs = inputs_now(stage, record)
    if missing := next((path for path in stage.inputs if path not in inputs), None):
        return Verdict("run", f"{missing} does not exist", record, inputs)
    if record is None:
        return Verdict("run", own, None, inputs)
    why = own or _changed_inputs(record, inputs)
    if record.status != "done":
        ends = {"running": "died", "stopped": "was stopped", "failed": f"failed with exit code {record.code}"}
        how = ends[record.status]
        goes_on = stage.goes_on and not why
        return Verdict("resume" if goes_on else "run", f"{how}; {why}" if why else how, record, inputs)
    if not why and (why := _changed_outputs(stage, record)) and _lost_its_end(stage):
        return Verdict("resume", why, record, inputs)
    return Verdict("run" if why else "done", why, record, inputs)


def verdicts(stages: list[Stage]) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for stage in stages:
        found[stage.name] = verdict(stage, found)
    return found


def _changed_keys(stage: Stage, record: Record) -> str:
    now = recipe_keys(stage)
    names = [key for key in {**record.recipe, **now} if record.recipe.get(key) != now.get(key)]
    if names:
        first = names[0]
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        if first == "stage.command":
            return "its command is another"
        return f"{first} is {_short(now.get(first))} and was {_short(record.recipe.get(first))}{more}"
    return "" if record.version == version(stage) else f"nemo_lite {record.version or 'of no version'} made it"


def _changed_inputs(record: Record, inputs: dict[str, dict[str, str]]) -> str:
    changed = [path for path, one in inputs.items() if record.inputs.get(path, {}).get("digest") != one["digest"]]
    if changed:
        return f"{changed[0]} has changed" if changed[0] in record.inputs else f"{changed[0]} is a new input"
    gone = [path for path in record.inputs if path not in inputs]
    return f"{gone[0]} is no input any more" if gone else ""


def _changed_outputs(stage: Stage, record: Record) -> str:
    for path in stage.outputs:
        now = content(path, record.outputs.get(path))
        if now is None:
            return f"{path} is gone" if path in record.outputs else f"{path} is a new output"
        if path not in record.outputs or now["digest"] != record.outputs[path]["digest"]:
            return f"{path} is not what the stage wrote"
    return ""


def _lost_its_end(stage: Stage) -> bool:
    """Whether of a run the last checkpoint is gone, and an earlier one is left to go on from."""
    kept = (stage.run_dir / "checkpoints").glob("step_*/manifest.json")
    return stage.trains and not Path(stage.outputs[0]).exists() and any(kept)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
