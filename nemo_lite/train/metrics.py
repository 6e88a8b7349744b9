"""What a run says while it trains: metrics.jsonl, the console, TensorBoard / W&B / MLflow, and the facts in env.json.

A record is a flat dict. Of a logged step it holds

| key | meaning |
|---|---|
| ``step``, ``tokens`` | optimizer steps done, tokens trained on since the beginning of the run |
| ``loss``, ``mtp_loss``, ``aux_loss`` | next-token loss, list of MTP losses by depth, router balance loss |
| ``lr``, ``grad_norm``, ``skipped_steps`` | learning rate, global norm before clipping, steps skipped as non-finite |
| ``tokens_per_second``, ``mfu``, ``data_seconds`` | over the interval; share of the machine's peak; waiting for data |
| ``memory_gb``, ``eta_seconds``, ``time``, ``elapsed_seconds`` | ``time`` is the Unix time, ``elapsed`` omits pauses |
| ``expert_load_max``, ``dead_experts``, ... | what :func:`load_summary` returns |

and of a validation ``step``, ``val_loss``, ``val_mtp_loss``, ``val_bits_per_byte``. Keys beyond these are kept as they
are. Each is one line of RUN_DIR/metrics.jsonl, written at once, so that a kill leaves at most one torn line.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nemo_lite_kernels.common import product_dtype

from nemo_lite.config import LogConfig, Recipe, UserError

METRICS_FILE = "metrics.jsonl"

# A line with every expert's share takes about 6 bytes an expert: nothing for 8 experts, 120 KB for 40 layers of 512.
# Above this many numbers the shares are written only about a hundred times a run; the per-layer summary always is.
FULL_LOAD_NUMBERS = 2048
FULL_LOAD_LINES = 100


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tensors and NumPy scalars become numbers, NaN and infinities become null."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and NumPy arrays of any rank
        return plain(value.tolist())
    return str(value)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All records of a metrics.jsonl, and the number of lines that are no JSON object (a torn last line, after a kill).

    A file that is missing reads as empty.
    """
    records, bad = [], 0
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # also a UnicodeDecodeError: a torn line may end inside a character
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad += 1
    return records, bad


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: a reader, or a kill, sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _dumps(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def cut_history(path: Path, resume_step: int) -> tuple[list[dict[str, Any]], str | None]:
    """Drop the lines of ``path`` after ``resume_step`` and torn ones; return what is kept and a sentence if any went.

    Lines after the checkpoint that a run resumes from were written before a crash; the steps are about to be done, and
    logged, again. A run that starts at step 0 starts an empty file.
    """
    records, bad = read_metrics(path)
    kept = [record for record in records if resume_step > 0 and _step(record) <= resume_step]
    if not path.exists() or (not bad and len(kept) == len(records) and path.read_bytes()[-1:] in (b"", b"\n")):
        return kept, None
    write_atomically(path, b"".join(_dumps(plain(record)) + b"\n" for record in kept))
    parts = []
    if dropped := len(records) - len(kept):
        parts.append(f"{dropped} line{'s' * (dropped > 1)} after step {resume_step}")
    if bad:
        parts.append(f"{bad} torn line{'s' * (bad > 1)}")
    return kept, f"{path.name}: dropped {' and '.join(parts)}, left by a run that was cut off" if parts else None


def _step(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, (int, float)) and not isinstance(step, bool) else 0


# ----------------------------------------------------------------------------------------------------- expert load


def load_summary(counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The record's keys on expert load, from the tokens each expert of each layer received in the interval.

    ``counts`` maps a layer's name to a tensor [E], summed over ranks. Returned are

    * ``expert_load_max``: busiest expert over the layer's mean, of the worst layer (1.0 is perfect balance);
    * ``expert_load_min``: idlest expert over the layer's mean, of the worst layer;
    * ``dead_experts``: how many experts received no token at all;
    * ``expert_entropy``: least normalised entropy of a layer (1.0 is perfect balance, 0.0 one expert does all);
    * ``expert_load``: layer -> share of each expert, summing to 1;
    * ``expert_load_by_layer``: layer -> ``max``, ``min``, ``dead``, ``entropy``.

    Without MoE layers the dict is empty. A layer that received nothing has null ratios and only dead experts.
    """
    shares: dict[str, list[float]] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, count_E in counts.items():
        load_E = count_E.detach().to("cpu", torch.float64)
        experts, total = load_E.numel(), load_E.sum().item()
        dead = int((load_E == 0).sum())
        if total <= 0:
            shares[name] = [0.0] * experts
            layers[name] = {"max": None, "min": None, "dead": dead, "entropy": None}
            continue
        share_E = load_E / total
        entropy = torch.special.entr(share_E).sum().item() / math.log(experts) if experts > 1 else 1.0
        shares[name] = [float(f"{share:.4g}") for share in share_E.tolist()]
        layers[name] = {
            "max": round(share_E.max().item() * experts, 4),
            "min": round(share_E.min().item() * experts, 4),
            "dead": dead,
            "entropy": round(entropy, 4),
        }
    if not layers:
        return {}

    def worst(key: str, choose: Callable[..., float]) -> float | None:
        values = [layer[key] for layer in layers.values() if layer[key] is not None]
        return choose(values) if values else None

    return {
        "expert_load_max": worst("max", max),
        "expert_load_min": worst("min", min),
        "expert_entropy": worst("entropy", min),
        "dead_experts": sum(layer["dead"] for layer in layers.values()),
        "expert_load": shares,
        "expert_load_by_layer": layers,
    }


# ----------------------------------------------------------------------------------------------------------- console


def console() -> Any:
    """Standard output for rich's tables; in a pipe a line is long rather than broken."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def compact(number: float) -> str:
    """A count in about four characters: ``611``, ``12.3k``, ``4.56M``, ``121B``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.99995:
            scaled = number / limit
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:.{digits}f}{unit}"
    return f"{number:.0f}" if abs(number) >= 99.95 or number == int(number) else f"{number:.1f}"


def duration(seconds: float) -> str:
    """``45s``, ``3m12s``, ``2h05m``, ``3d04h``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def percent(share: float) -> str:
    """``31%``, with a decimal below ten."""
    return f"{share * 100:.0f}%" if share >= 0.0995 else f"{share * 100:.1f}%"


def _fixed(value: float | None, digits: int, width: int = 0) -> str:
    if value is None or not math.isfinite(value):
        return "nan".rjust(width)
    return (f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}").rjust(width)


def _losses(label: str, values: Any, digits: int) -> list[tuple[str, str]]:
    return [(label, " ".join(_fixed(value, digits) for value in values))] if values else []


# A field is (label, value, unit); the number is how soon a narrow terminal gives it up (0: never).
_Field = tuple[int, str, str, str]


def _fields(record: Mapping[str, Any], total_steps: int) -> list[_Field]:
    width = len(str(total_steps))
    validation = "val_loss" in record
    head = "val " if validation else "step"
    fields: list[_Field] = [(0, head, f"{int(_step(record)):>{width}}/{total_steps}", "")]

    def add(rank: int, label: str, value: str, unit: str = "") -> None:
        fields.append((rank, label, value, unit))

    if validation:
        add(0, "loss", _fixed(record["val_loss"], 3, 5))
        if mtp := record.get("val_mtp_loss"):
            add(2, "mtp", " ".join(_fixed(loss, 2) for loss in mtp))
        if record.get("val_bits_per_byte") is not None:
            add(0, "", _fixed(record["val_bits_per_byte"], 3), "bits per byte")
        return fields
    add(0, "loss", _fixed(record.get("loss"), 3, 5))
    if mtp := record.get("mtp_loss"):
        add(2, "mtp", " ".join(_fixed(loss, 2) for loss in mtp))
    if record.get("lr") is not None:
        # 4.5e-4 rather than 4.5e-04: the exponent's zero says nothing
        add(5, "lr", re.sub(r"e([+-])0", r"e\1", f"{record['lr']:.1e}"))
    if "grad_norm" in record:
        add(4, "grad", _fixed(record["grad_norm"], 2, 4))
    if record.get("tokens_per_second") is not None:
        add(1, "", compact(record["tokens_per_second"]).rjust(5), "tok/s")
    if record.get("mfu") is not None:
        add(3, "", percent(record["mfu"]).rjust(4 if record["mfu"] < 0.0995 else 3), "peak")
    if record.get("expert_load_max") is not None:
        add(3, "load", f"{record['expert_load_max']:.1f}x", f"dead {record.get('dead_experts') or 0}")
    if record.get("memory_gb") is not None:
        gigabytes = record["memory_gb"]
        add(6, "", (f"{gigabytes:.1f}" if gigabytes < 99.95 else f"{gigabytes:.0f}").rjust(3), "GB")
    if record.get("skipped_steps"):
        add(0, "skipped", str(record["skipped_steps"]))
    if record.get("eta_seconds") is not None:
        add(1, "eta", duration(record["eta_seconds"]))
    return fields


def _render(fields: list[_Field]) -> str:
    return "  ".join(" ".join(part for part in field[1:] if part) for field in fields)


def format_step(record: Mapping[str, Any], total_steps: int, width: int | None = None) -> str:
    """The console line of a logged step, or of a validation (told by ``val_loss``).

    ``load`` is the busiest expert over the mean of its layer, in the worst layer. Values are padded so that the lines
    of a run align. Where ``width`` is given, the fields that matter least are left out until the line fits.
    """
    return _render(_fit(_fields(record, total_steps), width))


def _fit(fields: list[_Field], width: int | None) -> list[_Field]:
    while width is not None and len(_render(fields)) > width:
        least = max(fields, key=lambda field: field[0])
        if least[0] == 0:
            break
        fields = [field for field in fields if field is not least]
    return fields


class _Console:
    """Lines on standard output; where there is a terminal, a progress bar under them."""

    def __init__(self, total_steps: int, first_step: int):
        self.total_steps = total_steps
        self.progress = None
        self.lines_above_bar = False
        stream = next((stream for stream in (sys.stdout, sys.stderr) if stream is not None and stream.isatty()), None)
        if stream is None:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # rich reads NO_COLOR and TERM=dumb itself.
        console = Console(file=stream, highlight=False)
        if not console.is_terminal or console.is_dumb_terminal:
            return
        # With standard output in a file and standard error on a terminal, the one gets the lines, the other the bar.
        self.lines_above_bar = stream is sys.stdout
        self.progress = Progress(
            TextColumn("[bold]{task.fields[head]}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.percentage:>3.0f}%  {task.completed}/{task.total}[dim]{task.fields[tail]}"),
            console=console,
            refresh_per_second=2,  # it shares the cores with training
            redirect_stdout=self.lines_above_bar,
            redirect_stderr=True,
            expand=True,
        )
        self.task = self.progress.add_task("", total=total_steps, completed=first_step, head="training", tail="")
        self.progress.start()

    def advance(self, step: int, **fields: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step, **fields)

    def show(self, fields: list[_Field], style: str = "") -> None:
        if self.progress is None or not self.lines_above_bar:
            print(_render(fields), flush=True)
            return
        from rich.text import Text

        line = Text()
        for index, (_, label, value, unit) in enumerate(_fit(fields, self.progress.console.width)):
            line.append("  " if index else "")
            line.append(f"{label} " if label else "", style or "dim")
            line.append(value, "bold" if label == "loss" else style)
            line.append(f" {unit}" if unit else "", style or "dim")
        self.progress.console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        for index, line in enumerate(text.splitlines() or [""]):
            head = "note" if index == 0 else "    "
            if self.progress is None or not self.lines_above_bar:
                print(f"{head} {line}", flush=True)
            else:
                from rich.text import Text

                self.progress.console.print(Text.assemble((head, "yellow"), f" {line}"), soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


# ------------------------------------------------------------------------------------------- TensorBoard, W&B, MLflow


def _missing(tool: str, package: str, key: str, error: ImportError) -> UserError:
    return UserError(
        f"{key} asks for {tool}, but {package} cannot be imported ({error}); "
        f"install it with `pip install 'nemo-lite[log]'`, or leave the key out"
    )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under the names that trackers show: ``train/loss``, ``train/mtp_loss/1``, ..."""
    group = "validation" if "val_loss" in record else "train"
    found: dict[str, float] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value

    for key, value in record.items():
        if key in ("step", "time"):
            continue
        name = f"{group}/{key.removeprefix('val_')}"
        if isinstance(value, list) and len(value) <= 16:
            for depth, item in enumerate(value, 1):
                put(f"{name}/{depth}", item)
        elif key == "expert_load_by_layer":
            for layer, summary in value.items():
                put(f"experts_max_over_mean/{layer}", summary["max"])
        else:
            put(name, value)
    return found


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, run_dir: Path, resume_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing(self.name, "tensorboard", "log.tensorboard", error) from error
        # purge_step hides the events that a crash left after the checkpoint, as cut_history does for metrics.jsonl.
        purge = resume_step + 1 if (run_dir / "tensorboard").exists() else None
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge, flush_secs=30)

    def send(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    name = "Weights & Biases"

    def __init__(self, run_dir: Path, project: str, ids: dict[str, str], say: Callable[[str], None]):
        try:
            import wandb
        except ImportError as error:
            raise _missing(self.name, "wandb", "log.wandb", error) from error

        def start(mode: str | None) -> Any:
            settings = wandb.Settings(init_timeout=30, silent=True, console="off")
            return wandb.init(
                project=project,
                name=run_dir.resolve().name,
                dir=str(run_dir),
                id=ids.get("wandb"),
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                settings=settings,
            )

        try:
            self.run = start(None if _wandb_can_log_in(wandb) else "offline")
        except Exception as error:
            say(f"Weights & Biases could not be reached ({_first_line(error)}); writing offline")
            self.run = start("offline")
        ids["wandb"] = self.run.id
        if getattr(self.run, "offline", False) or self.run.settings.mode == "offline":
            say("Weights & Biases works offline; `wandb sync` on the folder in RUN_DIR/wandb uploads it")

    def send(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb_can_log_in(wandb: Any) -> bool:
    """Whether a mode or a key is set up; without either, wandb.init would stop a terminal session to ask for one."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # no network, or a version without `prompt`: the run is kept offline, and says so
        return False


class _MLflow:
    name = "MLflow"
    client: Any
    run: str

    def __init__(self, run_dir: Path, experiment: str, ids: dict[str, str], say: Callable[[str], None]):
        # A server that is down must cost seconds, not the minutes of MLflow's own retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        local = (run_dir / "mlruns").resolve().as_uri()
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise _missing(self.name, "mlflow-skinny", "log.mlflow", error) from error
        self.metric = Metric
        name = run_dir.resolve().name

        def start(uri: str) -> None:
            self.client = MlflowClient(tracking_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
            if ids.get("mlflow") and ids.get("mlflow_uri") == uri:
                self.run = ids["mlflow"]
                self.client.update_run(self.run, status="RUNNING")
            else:
                self.run = self.client.create_run(number, run_name=name).info.run_id
            ids["mlflow"], ids["mlflow_uri"] = self.run, uri

        server = os.environ.get("MLFLOW_TRACKING_URI")
        try:
            start(server or local)
        except Exception as error:
            if not server:
                raise
            say(f"MLflow's server could not be reached ({_first_line(error)}); writing to RUN_DIR/mlruns")
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            start(local)

    def send(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        # MLflow allows letters, digits, _ - . space : / in a name
        metrics = [self.metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 500):
            self.client.log_batch(self.run, metrics=metrics[start : start + 500])

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:120]


# ----------------------------------------------------------------------------------------------------------- Metrics


class Metrics:
    """Everything a run reports, opened by the training loop on rank 0::

        with Metrics(run_dir, recipe.log, total_steps=1000, resume_step=0) as metrics:
            metrics.advance(step)                  # every step: moves the progress bar, writes nothing
            metrics.log({"step": step, ...})       # every log.every steps, and after a validation
            metrics.note("checkpoint saved: ...")  # a sentence for the console

    On resume, what metrics.jsonl holds beyond ``resume_step`` is dropped, so that the file is one history.
    ``on_console=False`` leaves the terminal to the caller.
    """

    def __init__(
        self, run_dir: Path, log: LogConfig, *, total_steps: int, resume_step: int = 0, on_console: bool = True
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / METRICS_FILE
        self.total_steps = total_steps
        self._trackers: list[Any] = []
        self._failures: dict[str, int] = {}
        self._pending_notes: list[str] = []
        self._console: _Console | None = None
        self._file: Any = None
        self._last_full_load = -math.inf

        # A missing package is found before the history is touched or a progress bar is drawn.
        self._open_trackers(log, resume_step)
        kept, sentence = cut_history(self.path, resume_step)
        self._elapsed_before = max((record.get("elapsed_seconds") or 0.0 for record in kept), default=0.0)
        self._started = time.monotonic()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        if on_console:
            self._console = _Console(total_steps, resume_step)
        atexit.register(self.close)  # the terminal's cursor comes back, whatever ends the process
        for text in [*self._pending_notes, *([sentence] if sentence else [])]:
            self.note(text)

    def _open_trackers(self, log: LogConfig, resume_step: int) -> None:
        ids_path = self.run_dir / "trackers.json"
        try:
            ids = json.loads(ids_path.read_text()) if resume_step > 0 else {}
        except (OSError, ValueError):
            ids = {}
        before = dict(ids)
        say = self._pending_notes.append
        opened: list[Callable[[], Any]] = []
        if log.tensorboard:
            opened.append(lambda: _TensorBoard(self.run_dir, resume_step))
        if log.wandb:
            opened.append(lambda: _Wandb(self.run_dir, str(log.wandb), ids, say))
        if log.mlflow:
            opened.append(lambda: _MLflow(self.run_dir, str(log.mlflow), ids, say))
        for start in opened:
            try:
                self._trackers.append(start())
            except UserError:
                raise
            except Exception as error:
                say(f"a tracker could not be started and is left out: {type(error).__name__}: {_first_line(error)}")
        if ids != before:  # a resumed run continues the same W&B and MLflow run
            write_atomically(ids_path, json.dumps(ids, indent=1).encode() + b"\n")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self._console is not None:
            self._console.advance(step)

    def note(self, text: str) -> None:
        """A sentence on the console (and in no file)."""
        if self._console is not None:
            self._console.note(text)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` to metrics.jsonl, send its numbers to the trackers, show its line."""
        line = plain(record)
        step = int(_step(line))
        line.setdefault("time", round(time.time(), 3))
        line.setdefault("elapsed_seconds", round(self._elapsed_before + time.monotonic() - self._started, 3))
        self._thin_load(line, step)
        data = _dumps(line) + b"\n"
        try:
            # One unbuffered write a line: a kill between two lines leaves whole ones.
            written = self._file.write(data)
            if written != len(data):
                raise OSError(None, "the disk took only a part of the line")
        except OSError as error:
            raise UserError(f"{self.path}: step {step} could not be logged: {error.strerror or error}") from error
        self._send(line, step)
        if self._console is not None:
            validation = "val_loss" in line
            self._console.show(_fields(line, self.total_steps), "cyan" if validation else "")
            if not validation:
                parts = [f"loss {_fixed(line.get('loss'), 3)}"]
                if line.get("tokens_per_second") is not None:
                    parts.append(f"{compact(line['tokens_per_second'])} tok/s")
                if line.get("eta_seconds") is not None:
                    parts.append(f"eta {duration(line['eta_seconds'])}")
                self._console.advance(step, tail="".join(f"  {part}" for part in parts))

    def _thin_load(self, line: dict[str, Any], step: int) -> None:
        load = line.get("expert_load")
        if not load or sum(map(len, load.values())) <= FULL_LOAD_NUMBERS:
            return
        if step < self.total_steps and step - self._last_full_load < self.total_steps / FULL_LOAD_LINES:
            del line["expert_load"]
        else:
            self._last_full_load = step

    def _send(self, line: dict[str, Any], step: int) -> None:
        if not self._trackers:
            return
        values = scalars(line)
        for tracker in list(self._trackers):
            try:
                tracker.send(values, step)
                self._failures[tracker.name] = 0
            except Exception as error:  # whatever a client library raises, it must not cost the run
                failures = self._failures[tracker.name] = self._failures.get(tracker.name, 0) + 1
                if failures == 3:  # each try may cost seconds of training
                    self._trackers.remove(tracker)
                    self.note(
                        f"{tracker.name} takes no metrics ({_first_line(error)}); left out from here on, "
                        f"{METRICS_FILE} has everything"
                    )

    def close(self) -> None:
        """Flush and close everything; may be called twice."""
        atexit.unregister(self.close)
        if self._console is not None:
            self._console.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self.note(f"{tracker.name} did not close cleanly: {_first_line(error)}")
        self._trackers = []
        if self._file is not None:
            self._file.close()
            self._file = None


# ------------------------------------------------------------------------------------------- the machine, for env.json

# Dense peaks in TFLOP/s from the makers' data sheets, without sparsity: 16-bit (fp32 accumulate), TF32, plain fp32,
# fp64 (tensor cores where they do fp64). The first name that torch's device name contains wins: longer ones first.
_GPU_PEAKS: list[tuple[str, tuple[float, float, float, float]]] = [
    ("GB300", (2500, 1250, 80, 1.3)),
    ("B300", (2250, 1125, 75, 1.2)),
    ("GB200", (2500, 1250, 80, 40)),
    ("B200", (2250, 1125, 75, 37)),
    ("B100", (1750, 875, 60, 30)),
    ("GH200", (989.4, 494.7, 66.9, 66.9)),
    ("H200 NVL", (835.5, 417.5, 60, 60)),
    ("H200", (989.4, 494.7, 66.9, 66.9)),
    ("H100 NVL", (835.5, 417.5, 60, 60)),
    ("H100 PCIe", (756, 378, 51, 51)),
    ("H100", (989.4, 494.7, 66.9, 66.9)),
    ("H800", (989.4, 494.7, 66.9, 1)),
    ("H20", (148, 74, 44, 1)),
    ("A100", (312, 156, 19.5, 19.5)),
    ("A800", (312, 156, 19.5, 9.7)),
    ("A30", (165, 82, 10.3, 10.3)),
    ("A40", (149.7, 74.8, 37.4, 0.58)),
    ("A10G", (70, 35, 35, 0.55)),
    ("A10", (125, 62.5, 31.2, 0.49)),
    ("L40S", (362, 183, 91.6, 1.4)),
    ("L40", (181, 90.5, 90.5, 1.4)),
    ("L4", (121, 60, 30.3, 0.49)),
    ("RTX PRO 6000 Blackwell", (503.8, 251.9, 125.9, 1.97)),
    ("RTX 6000 Ada", (364.2, 182.1, 91.1, 1.4)),
    ("RTX A6000", (154.8, 77.4, 38.7, 0.6)),
    ("RTX 5090", (209.5, 104.8, 104.8, 1.6)),
    ("RTX 4090", (165.2, 82.6, 82.6, 1.3)),
    ("RTX 3090", (71.2, 35.6, 35.6, 0.56)),
]


def gpu_peak(name: str, dtype: torch.dtype, tf32: bool) -> tuple[float | None, str]:
    """Dense peak FLOP/s of the GPU that torch calls ``name``, or None, and the sentence on where it came from."""
    words = f" {name} "
    # A laptop's chip or a MIG slice bears the big one's name and a fraction of its speed.
    whole = "Laptop" not in name and "MIG" not in name and "Max-Q" not in name
    peaks = next((peaks for model, peaks in _GPU_PEAKS if whole and re.search(rf"(?<!\w){model}(?!\w)", words)), None)
    if peaks is None:
        return None, f"no dense peak is on record for {name!r}, so no share of it is shown"
    column = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1 if tf32 else 2, torch.float64: 3}.get(dtype)
    if column is None:
        return None, f"no dense peak is on record for {dtype} on {name!r}, so no share of it is shown"
    format_name = ("16-bit, dense", "TF32, dense", "fp32", "fp64")[column]
    return peaks[column] * 1e12, f"data sheet of {name} ({format_name})"


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> tuple[float | None, str]:
    """Peak FLOP/s of one process's device in ``dtype``, and the sentence on where it came from, for env.json.

    A GPU's is looked up (None where it is not known). A CPU's is measured: the best of several square GEMMs with the
    threads torch has now, in about 0.4 s. Ranks that share a machine measure at the same time, so that each finds its
    own share; the run's peak is the sum over ranks.
    """
    place = torch.device(device)
    if place.type == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        return gpu_peak(torch.cuda.get_device_name(place), dtype, tf32)
    if place.type != "cpu":
        return None, f"no dense peak is on record for a device of type {place.type!r}, so no share of it is shown"
    best, best_size, runs = 0.0, 0, 0
    dtype = product_dtype(torch.empty(0, dtype=dtype))  # without a bfloat16 product, products are float32's
    with torch.no_grad():
        # The larger size is nearer to the peak on wide machines, the smaller one is certain to end soon on slow ones.
        for size in (256, 512, 1024):
            left = torch.full((size, size), 0.5, dtype=dtype)
            right = torch.full((size, size), 0.25, dtype=dtype)
            torch.mm(left, right)  # the first call packs and allocates
            ends = time.perf_counter() + 0.12
            while True:
                start = time.perf_counter()
                torch.mm(left, right)
                seconds = max(time.perf_counter() - start, 1e-9)
                runs += 1
                if 2 * size**3 / seconds > best:
                    best, best_size = 2 * size**3 / seconds, size
                if time.perf_counter() > ends:
                    break
            if seconds > 0.1:  # eight times this would be felt
                break
    threads = torch.get_num_threads()
    return best, (
        f"measured at start: best of {runs} {str(dtype).removeprefix('torch.')} GEMMs up to {size}x{size} "
        f"(best at {best_size}), {threads} thread{'s' * (threads > 1)}"
    )


def memory_gb(device: torch.device | str) -> float:
    """GB (1e9 bytes) this process has needed: the peak that torch allocated on a GPU, the resident set on a CPU."""
    place = torch.device(device)
    if place.type == "cuda":
        return round(torch.cuda.max_memory_allocated(place) / 1e9, 3)
    import psutil

    return round(psutil.Process().memory_info().rss / 1e9, 3)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux; platform knows a shorter name
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any]:
    """Commit of the checkout this package runs from, and whether files were changed; nulls for an installed wheel."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel installed in some other project's .venv is inside that project's repository, but is no file of it.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


_VERSIONS = ["nemo-lite", "torch", "numpy", "omegaconf", "tokenizers", "safetensors", "transformers", "datasets"]
_VERSIONS += ["pyarrow", "triton", "mamba-ssm", "causal-conv1d", "flash-attn", "transformer-engine", "megatron-core"]
_VERSIONS += ["vllm", "tensorboard", "wandb", "mlflow-skinny", "mlflow"]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its local part: +cpu, +cu130
    return found


def environment(
    recipe: Recipe,
    kernels: list[dict[str, Any]],
    *,
    device: torch.device | str = "cpu",
    peak: tuple[float | None, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What env.json holds: commit, versions, machine, world size, chosen kernels and why, seed, peak FLOP/s.

    ``peak`` is what :func:`peak_flops` returned; it is asked here where not given. ``more`` adds keys, such as
    ``parameters={"total": ..., "active": ...}``, which the report shows. No host name and no home folder is written.
    """
    import psutil

    place = torch.device(device)
    if peak is None:
        peak = peak_flops(place, getattr(torch, recipe.train.dtype))
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gpus.append({"name": facts.name, "memory_gb": round(facts.total_memory / 1e9, 1)})
    facts = {
        "git": _git_state(),
        "versions": _versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
            "threads": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": gpus,
            "cuda": torch.version.cuda,
        },
        "device": str(place),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "torch_threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "peak_flops": {"per_process": peak[0], "source": peak[1]},
        "kernels": kernels,
        **more,
    }
    return _without_home(plain(facts))


def _without_home(value: Any) -> Any:
    """Every path below the home folder written from ``~``, so that env.json can be shared."""
    home = os.path.expanduser("~")
    if isinstance(value, str):
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, dict):
        return {name: _without_home(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    return value
