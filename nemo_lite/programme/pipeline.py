"""``nemo-lite pipeline DIR``: run the stages of a programme that are out of date, one after the other."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemo_lite import process
from nemo_lite.config import UserError
from nemo_lite.programme import record as records
from nemo_lite.programme.record import Record, Verdict
from nemo_lite.programme.stages import Stage, drawn, lanes, lanes_across, load_programme

LAST_LINES = 15  # of a failed stage's log

# ---------------------------------------------------------------------------------------------------- how it is started


def command(stage: Stage, processes: int) -> list[str]:
    """The words that start a stage: its command, or training it, inside a Slurm job on all of its machines."""
    if not stage.trains:
        # The same interpreter, whatever is on the path.
        return [sys.executable, "-m", "nemo_lite", *stage.words[1:]] if stage.ours else stage.words
    program = ["-m", "nemo_lite.train", str(stage.file)]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    nodes = os.environ.get("SLURM_NNODES", "1")
    if nodes != "1":
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        first = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
        meeting = [
            "--rdzv-id",
            os.environ["SLURM_JOB_ID"],
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{first}:29500",
        ]
        return ["srun", *torchrun, "--nnodes", nodes, "--nproc-per-node", str(processes), *meeting, *program]
    if processes > 1:
        return [*torchrun, "--standalone", "--nproc-per-node", str(processes), *program]
    return [sys.executable, *program]


def slurm(folder: Path, stages: list[Stage], found: dict[str, Verdict], processes: int) -> str:
    """A shell script that submits a job for every stage that is due, each after those it reads from."""
    due = {stage.name: f"job_{re.sub(r'[^a-zA-Z0-9]', '_', stage.name)}" for stage in stages if found[stage.name].due}
    parts = [
        "#!/bin/sh",
        f"# Submits what is out of date in {folder}: a job a stage, each once those before it have succeeded.",
        "# sbatch also reads SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT. A job that ran out of time goes on",
        "# when this is made and run again.",
        "set -eu",
    ]
    for stage in stages:
        if stage.name not in due:
            continue
        options = [f"--job-name={shlex.quote(f'{folder.name}-{stage.name}')}"]
        if stage.trains:
            options += [f"--nodes={stage.recipe.stage.nodes}", "--ntasks-per-node=1", f"--gpus-per-node={processes}"]
        elif "cuda" in stage.words:
            options += ["--gpus-per-node=1"]
        waits = ":".join(f"${due[name]}" for name in stage.after if name in due)
        options += ["--kill-on-invalid-dep=yes", f'--dependency="afterok:{waits}"'] if waits else []
        words = ["nemo-lite", "pipeline", str(folder), "--only", stage.name, "--nproc-per-node", str(processes)]
        parts += [
            "",
            f"{due[stage.name]}=$(sbatch --parsable {' '.join(options)} <<'STAGE'",
            "#!/bin/sh",
            f"exec {shlex.join(words)}",
            "STAGE",
            ")",
            f'echo "{stage.name}: job ${due[stage.name]}"',
        ]
    return "\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------ one stage's run


def run(stage: Stage, found: Verdict, processes: int, tell: Any = lambda line: None) -> Record:
    """Run a stage to its end; its record, also on disk. ``tell`` gets the log's newest line now and then.

    Raises :class:`UserError` where it failed or was stopped.
    """
    old = found.record
    again = found.state == "resume" and old is not None
    if not again:
        _make_room(stage, old)
    for path in (*stage.outputs, str(stage.place)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    words = command(stage, processes)
    made = Record(
        "running", records.recipe_keys(stage), records.version(stage), found.inputs, command=words,
        started=old.started if again and old else time.time(), seconds=old.seconds if again and old else 0.0,
        pipeline=process.facts(),
    )  # fmt: skip
    began, spent = time.monotonic(), made.seconds
    with open(stage.log, "ab" if again else "wb") as log:
        log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(words)}\n".encode())
        log.flush()
        try:
            # A session of its own: Ctrl-C reaches it through here alone, since asked twice a run dies at once.
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{stage.file}: stage.command: {words[0]} cannot be started: {error.strerror}") from None
        made.process = process.facts(child.pid)
        records.write(stage, made)
        made.code, asked = _wait(child, lambda: tell(_last_line(stage.log)))
    made.seconds = round(spent + time.monotonic() - began, 3)
    written = {path: records.content(path) for path in stage.outputs}
    missing = [path for path, one in written.items() if one is None]
    made.status = "stopped" if asked and (made.code or missing) else "failed" if made.code or missing else "done"
    if made.status == "done":
        made.outputs = {path: one for path, one in written.items() if one is not None}
    records.write(stage, made)
    if made.status == "stopped":
        raise UserError(f"{stage.name} was stopped; the same command goes on (log: {stage.log})")
    if made.status == "failed":
        what = f"failed with exit code {made.code}" if made.code else f"ended without writing {missing[0]}"
        raise UserError(f"{stage.name} {what}; the end of {stage.log}:\n{_tail(stage.log)}")
    return made


def _wait(child: subprocess.Popen, tick: Any) -> tuple[int, bool]:
    """Wait for a stage, passing on the first signal that asks to stop; its exit code, and whether one did."""
    asked = False

    def stop(number, frame) -> None:
        nonlocal asked
        # Training finishes its step and saves; a second signal is for those who cannot wait.
        os.killpg(child.pid, signal.SIGTERM if not asked else signal.SIGKILL)
        asked = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            try:
                return child.wait(0.5), asked
            except subprocess.TimeoutExpired:
                tick()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_room(stage: Stage, old: Record | None) -> None:
    """Clear the place of outputs: what a command wrote, and can write again, is deleted; all else is moved aside."""
    for path in [stage.run_dir] if stage.trains else map(Path, stage.outputs):
        if not path.exists():
            continue
        ours = False
        if old is not None and not stage.trains:
            now = records.content(str(path)) or {}
            ours = old.status != "done" or old.outputs.get(str(path), {}).get("digest") == now["digest"]
        if not ours:
            path.rename(next(aside for n in range(1, 10**6) if not (aside := Path(f"{path}.old{n}")).exists()))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


def _last_line(path: Path) -> str:
    lines = _tail(path).splitlines()
    return lines[-1].strip() if lines else ""


# ------------------------------------------------------------------------------------------------------------ the table

STYLES = {"done": "green", "running": "cyan", "resume": "yellow", "run": "bold", "wait": "dim", "failed": "red"}


def table(stages: list[Stage], found: dict[str, Verdict], brief: bool = False) -> Any:
    """The programme as a table for rich: the graph, each stage's state, how long it took, why, and what it writes;
    ``brief`` leaves out the last and keeps to a line a stage."""
    from rich.table import Table
    from rich.text import Text

    from nemo_lite.train.metrics import duration

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "stage", "state", "time", "why", *([] if brief else ["writes"])):
        made.add_column(name, no_wrap=brief or name not in ("why", "writes"), overflow="ellipsis" if brief else "fold")
    rows = lanes(stages)
    width = lanes_across(rows)
    for stage, row in zip(stages, rows):
        one = found[stage.name]
        failed = one.record is not None and one.record.status in ("failed", "running", "stopped") and one.due
        style = STYLES["failed" if failed and one.state != "wait" else one.state]
        seconds = one.record.seconds if one.record else 0
        made.add_row(
            Text(drawn(row, width), style="blue"), Text(stage.name, style="bold" if stage.trains else ""),
            Text(one.state, style=style), duration(seconds) if seconds else "", Text(one.why),
            *([] if brief else [", ".join([str(stage.run_dir)] if stage.trains else stage.outputs)]),
        )  # fmt: skip
    return made


def main(argv: list[str]) -> int:
    """`nemo-lite pipeline DIR`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="nemo-lite pipeline",
        description="Run the stages of a programme whose outputs are not what they would make now, in order. A stage "
        "that is done is left alone; one that was broken off goes on.",
        epilog="docs/programme.md tells what a stage is.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with a YAML file a stage")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and why")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone, where it is out of date")
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        default=1,
        metavar="N",
        help="processes of a training stage, a machine (default: 1)",
    )
    parser.add_argument("--slurm", action="store_true", help="print a script that submits a job a stage; run nothing")
    args = parser.parse_args(argv)
    from rich.console import Console

    stages = load_programme(args.folder)
    if args.only and args.only not in {stage.name for stage in stages}:
        raise UserError(f"--only {args.only}: no such stage; the stages are {', '.join(s.name for s in stages)}")
    found = records.verdicts(stages)
    if args.slurm:
        print(slurm(args.folder, stages, found, args.nproc_per_node), end="")
        if not any(one.due for one in found.values()):
            print("everything is up to date: the script submits nothing", file=sys.stderr)
        return 0
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    console.print(table(stages, found))
    if args.dry_run:
        return 0
    for stage in stages:
        if stage.missing and args.only in (None, stage.name):
            raise UserError(f"{stage.file}: reads {stage.missing[0]}, which does not exist, and no stage writes it")
    done: dict[str, Verdict] = {}
    for stage in stages:
        one = done[stage.name] = records.verdict(stage, done)
        if args.only not in (None, stage.name):
            continue
        if one.state == "running":
            if one.record is not None and process.alive(one.record.process) is None:
                raise UserError(
                    f"{stage.name} is running on another machine ({one.why}); if that is gone, write stopped for its "
                    f"status in {stage.record}"
                )
            raise UserError(f"{stage.name} is running already ({one.why}); nemo-lite watch {args.folder} shows it")
        if one.state == "wait":
            raise UserError(f"{stage.name} has to wait {one.why}")
        if one.state == "done":
            continue
        done[stage.name] = Verdict("done", record=_shown(stage, one, args.nproc_per_node, console))
    ran = sum(before.due and not done[name].due for name, before in found.items())
    if args.only is None:
        console.print(f"{ran} of {len(stages)} stages run, all are up to date" if ran else "everything is up to date")
    return 0


def _shown(stage: Stage, one: Verdict, processes: int, console: Any) -> Record:
    """Run a stage with a line before and after, and the log's newest line meanwhile where there is a terminal."""
    from rich.markup import escape

    from nemo_lite.train.metrics import duration

    console.print(f"{stage.name}: {one.why}; log {stage.log}", markup=False)
    if not console.is_terminal:
        made = run(stage, one, processes)
    else:
        with console.status(stage.name) as status:
            left = console.width - len(stage.name) - 6
            made = run(
                stage, one, processes, lambda line: status.update(f"{stage.name}  [dim]{escape(line[:left])}[/]")
            )
    console.print(f"{stage.name}: done in {duration(made.seconds)}", markup=False)
    return made
