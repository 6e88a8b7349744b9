"""``nemo-lite watch``: a run, or a programme, while another process is at it: curves in a terminal, lines in a pipe."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_lite.config import UserError
from nemo_lite.process import PROCESS_FILE, alive
from nemo_lite.programme.stages import Stage, is_programme, load_programme

EVERY = 1.0  # seconds between looks

# ---------------------------------------------------------------------------------------------------------------- a run


class Run:
    """A RUN_DIR as it grows. ``state``: waiting, running, finished, stopped (in order, before its end) or died."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.records = run_dir, []
        self.state, self.end = "waiting", 0
        self._place: tuple[int, int] = (0, 0)  # inode and bytes read of metrics.jsonl
        self._recipe_time = 0

    def poll(self) -> list[dict[str, Any]]:
        """Look again; the new records."""
        going = self._process()  # before the records: what a run writes last is there once its process is gone
        self._read_recipe()
        new = self._read_records()
        if going:
            self.state = "running"
        elif going is False:
            self.state = "died"
        elif self.records or self.end:
            self.state = "finished" if self.end and self.step >= self.end else "stopped" if self.records else "waiting"
        return new

    def _process(self) -> bool | None:
        """Whether the run's process lives; None where the run left none behind, as one that ended in order."""
        try:
            # A process of another machine cannot be seen; its file is there until it ends in order.
            return alive(json.loads((self.run_dir / PROCESS_FILE).read_text())) is not False
        except OSError:
            return None
        except ValueError:  # being written
            return True

    def _read_recipe(self) -> None:
        import yaml

        path = self.run_dir / "recipe.yaml"
        try:
            if (now := path.stat().st_mtime_ns) == self._recipe_time:
                return
            train = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
            self.end = train.get("stop_after") or train["steps"]
            self._recipe_time = now
        except (OSError, yaml.YAMLError, TypeError, KeyError):
            pass  # not there yet, or being written: the next look finds it

    def _read_records(self) -> list[dict[str, Any]]:
        try:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                stat = os.fstat(file.fileno())
                inode, read = self._place
                if stat.st_ino != inode or stat.st_size < read:  # a resumed run has cut its history
                    self.records, read = [], 0
                file.seek(read)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._place = stat.st_ino, read + len(whole) + len(newline)
        new = []
        for line in whole.split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                new.append(record)
        self.records += new
        return new

    @property
    def step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def checkpoint(self) -> int | None:
        steps = [path.name.removeprefix("step_") for path in (self.run_dir / "checkpoints").glob("step_*")]
        return max((int(step) for step in steps if step.isdigit()), default=None)

    def sentence(self) -> str:
        """How it ended."""
        if self.state == "finished":
            return f"{self.run_dir}: finished, {self.end} steps"
        kept = f"; checkpoint step_{self.checkpoint}" if self.checkpoint else "; no checkpoint yet"
        if self.state == "died":
            return f"{self.run_dir}: died after step {self.step} of {self.end}: its process is gone{kept}"
        return f"{self.run_dir}: stopped at step {self.step} of {self.end}{kept}; the same command goes on"


# --------------------------------------------------------------------------------------------------------------- curves

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille character, by row and column


def braille(points: Sequence[tuple[float, float]], width: int, height: int, low: float, high: float) -> list[str]:
    """A curve through points (x, y), y from ``low`` to ``high``, in ``height`` lines of ``width`` characters."""
    cells = [[0] * width for _ in range(height)]
    left, right = points[0][0], points[-1][0]
    across, down = 2 * width - 1, 4 * height - 1

    def place(x: float, y: float) -> tuple[int, int]:
        share = min(max((y - low) / ((high - low) or 1), 0), 1)
        return round((x - left) / ((right - left) or 1) * across), round((1 - share) * down)

    before = place(*points[0])
    for point in points:
        after = place(*point)
        steps = max(abs(after[0] - before[0]), abs(after[1] - before[1]), 1)
        for i in range(steps + 1):
            column = round(before[0] + (after[0] - before[0]) * i / steps)
            row = round(before[1] + (after[1] - before[1]) * i / steps)
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        before = after
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


# Key of a record, title, colour.
CURVES = (
    ("loss", "loss", "cyan"),
    ("lr", "learning rate", "magenta"),
    ("tokens_per_second", "tokens/s", "green"),
    ("expert_load_max", "busiest expert over the mean", "yellow"),
)


def _panel(run: Run, key: str, title: str, color: str, width: int, height: int) -> Any:
    from rich.panel import Panel
    from rich.text import Text

    from nemo_lite.train.report import _format, loss_range

    points = [(r["step"], r[key]) for r in run.records if isinstance(r.get(key), (int, float))]
    text, head = Text("nothing logged yet", style="dim"), title
    if points:
        values = [y for _, y in points]
        low, high = min(values), max(values)
        if key == "loss":
            _, high, _ = loss_range(values)
        if key == "tokens_per_second":
            low = 0
        labels = [_format(high), _format(low)]
        wide = max(map(len, labels))
        lines = braille(points, max(width - wide - 6, 8), height - 3, low, high)
        text = Text()
        for i, line in enumerate(lines):
            label = labels[0] if i == 0 else labels[1] if i == len(lines) - 1 else ""
            text.append(f"{label:>{wide}} ", "dim").append(line + "\n", color)
        text.append(f"{'':>{wide}} step {points[0][0]:,.0f} to {points[-1][0]:,.0f}", "dim")
        head = f"{title}  [bold]{_format(values[-1])}[/]"
        if key == "loss" and (held := [r["val_loss"] for r in run.records if isinstance(r.get("val_loss"), float)]):
            head += f"  [dim]held out[/] [bold]{_format(held[-1])}[/]"
    return Panel(text, title=head, title_align="left", border_style="dim", height=height, width=width)


def view(run: Run, width: int, height: int) -> Any:
    """The run for rich: a line and a bar of how far it is, and four curves, in ``width`` x ``height`` characters."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from nemo_lite.train.metrics import compact, duration

    last = next((r for r in reversed(run.records) if "loss" in r), {})
    facts = [f"step {run.step:,} of {run.end:,}"]
    if last.get("tokens") is not None:
        facts.append(f"{compact(last['tokens'])} tokens")
    if run.state == "running" and last.get("eta_seconds") is not None:
        facts.append(f"{duration(last['eta_seconds'])} left")
    if last.get("dead_experts"):
        facts.append(f"{last['dead_experts']} experts without a token")
    if last.get("skipped_steps"):
        facts.append(f"{last['skipped_steps']} steps skipped")
    style = {"running": "cyan", "finished": "green", "died": "bold red"}.get(run.state, "yellow")
    head = Text.assemble((run.run_dir.name, "bold"), "  ", (run.state, style), "  ", ("  ".join(facts), ""))
    head.truncate(width)
    bar = Table.grid()  # which gives it a line of its own
    bar.add_row(ProgressBar(total=run.end or 1, completed=run.step, width=width))
    across = 2 if width >= 90 else 1
    rows = -(-len(CURVES) // across)
    tall = max((height - 2) // rows, 6)
    grid = Table.grid()
    panels = [_panel(run, *curve, width // across, tall) for curve in CURVES]
    shown = panels if across == 2 else panels[: max((height - 2) // tall, 1)]
    for i in range(0, len(shown), across):
        grid.add_row(*shown[i : i + across])
    return Group(head, bar, grid)


# ---------------------------------------------------------------------------------------------------------- a programme


class Programme:
    """The stages of a folder, and the run of the one that trains now, or trained last."""

    def __init__(self, folder: Path):
        self.folder, self.stages = folder, load_programme(folder)
        self.runs = {stage.name: Run(stage.run_dir) for stage in self.stages if stage.trains}
        self.verdicts: dict[str, Any] = {}
        self.running = False

    def poll(self) -> list[tuple[Stage, dict[str, Any]]]:
        from nemo_lite.programme import record as records

        # First the process: what it does last is on disk once it is gone.
        found = [records.read(stage) for stage in self.stages]
        self.running = any(alive(one.pipeline) is not False for one in found if one and one.pipeline)
        self.verdicts = records.verdicts(self.stages)
        self.running = self.running or any(one.state == "running" for one in self.verdicts.values())
        return [(stage, record) for stage in self.stages if stage.trains for record in self.runs[stage.name].poll()]

    @property
    def run(self) -> Run | None:
        """What to show curves of."""
        going = [run for name, run in self.runs.items() if self.verdicts[name].state == "running"]
        if going:
            return going[0]
        begun = [run for run in self.runs.values() if run.records]
        return max(begun, key=lambda run: run.records[-1].get("time") or 0, default=None)

    @property
    def broken(self) -> list[tuple[str, Any]]:
        """Stages whose last try failed or died."""
        return [
            (name, one) for name, one in self.verdicts.items()
            if one.due and one.record is not None and one.record.status in ("failed", "running")
        ]  # fmt: skip

    def sentence(self) -> str:
        due = [name for name, one in self.verdicts.items() if one.due]
        if not due:
            return f"{self.folder}: all {len(self.stages)} stages are up to date"
        for name, one in self.broken:
            log = next(stage.log for stage in self.stages if stage.name == name)
            return f"{self.folder}: {name} {one.why}; log {log}"
        count = f"{len(due)} of {len(self.stages)} stages are due"
        return f"{self.folder}: nothing is running, {count}; nemo-lite pipeline goes on"

    def view(self, width: int, height: int) -> Any:
        from rich.console import Group

        from nemo_lite.programme.pipeline import table

        shown = table(self.stages, self.verdicts, brief=True)
        left = height - len(self.stages) - 2
        if self.run is None or left < 9:
            return shown
        return Group(shown, "", view(self.run, width, left))


# ------------------------------------------------------------------------------------------------------------- the loop


def watch_run(run: Run) -> int:
    from nemo_lite.train.metrics import format_step

    def look() -> list[str]:
        return [format_step(record, run.end) for record in run.poll()]

    _follow(look, lambda: run.state in ("running", "waiting"), lambda width, height: view(run, width, height))
    print(run.sentence(), flush=True)
    return int(run.state == "died")


def watch_programme(programme: Programme) -> int:
    from nemo_lite.train.metrics import duration, format_step

    shown: dict[str, str] = {}

    def look() -> list[str]:
        new = programme.poll()
        lines = [f"{s.name}  {format_step(record, programme.runs[s.name].end)}" for s, record in new]
        for name, one in programme.verdicts.items():
            seconds = f" in {duration(one.record.seconds)}" if one.state == "done" and one.record else ""
            text = f"{one.state}{seconds}{f': {one.why}' if one.why else ''}"
            if one.state != "wait" and shown.get(name) != text:
                lines.append(f"{name}  {text}")
            shown[name] = text
        return lines

    _follow(look, lambda: programme.running, programme.view)
    print(programme.sentence(), flush=True)
    return int(bool(programme.broken))


def _follow(look: Any, goes_on: Any, shown: Any) -> None:
    """Look again and again until it is over: a screen of ``shown(width, height)`` on a terminal, else the new lines."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        while True:
            for line in look():
                print(line, flush=True)
            if not goes_on():
                return
            time.sleep(EVERY)
    from rich.live import Live

    look()
    if goes_on():
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while goes_on():
                live.update(shown(console.width, console.height - 1), refresh=True)
                time.sleep(EVERY)
                look()
    console.print(shown(console.width, min(console.height - 2, 30)))


def main(argv: list[str]) -> int:
    """`nemo-lite watch RUN_DIR|DIR`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="nemo-lite watch",
        description="Loss, learning rate, speed and expert balance of a run on this machine while it goes on; of a "
        "programme, the state of every stage too. Ends when it ends: with exit code 0, or 1 where it died.",
    )
    parser.add_argument("folder", metavar="RUN_DIR|DIR", type=Path, help="a run's folder, or a programme's stage files")
    folder = parser.parse_args(argv).folder
    if is_programme(folder):
        return watch_programme(Programme(folder))
    if not any((folder / name).exists() for name in ("recipe.yaml", "metrics.jsonl", PROCESS_FILE)):
        raise UserError(f"{folder} is neither a RUN_DIR (it has no recipe.yaml) nor a folder of stages")
    return watch_run(Run(folder))
