"""Every backend of every op beside the machine's limits: time, operations, bytes, and the share of the roofline.

    python kernels/bench                                     # all that fits: some minutes
    python kernels/bench --quick                             # two small models, in about 90 seconds
    python kernels/bench --ops ssd,conv --configs nemotron3_nano --threads 2 --out before.json --plot before.svg
    python kernels/bench --device cuda
    python kernels/bench --draw benchmarks/results/kernels_cpu.json --plot again.svg   # measures nothing

A share is floor / time. The floor is the longest of a call's products over the rate of a large product in its dtype,
its other operations over that of float32, and its bytes over the rate of reading as many: bench/cases.py has the
formulas, and the rates are measured first, with the same threads. Inputs are the same in all calls, so that what fits a
cache lies there, in the measured rates as in the ops.

The backends of a case take turns, and each one's time is the median. A case in which other processes took more than 5 %
of the CPU is measured again, and marked if the machine stays busy. The limits are measured before and after, and the
higher rate counts. Results are JSON and one picture; a quick run's go to runs/. What was left out, and why, is in the
JSON too. The whole stack (`step`) is measured by benchmarks/peers.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402
from bench import figure  # noqa: E402
from bench.cases import DTYPES, FUNCTIONS, PACKED, SIZES, Case, cases, cost, inputs, memory  # noqa: E402
from nemo_lite_kernels import OPS, SHARED  # noqa: E402

BUSY = 0.05
# What functions outside the table are made of.
NAMED = {"ssd_verify": "closed form", "attention_cached": "sdpa"}


@dataclass(frozen=True)
class Effort:
    """How long a run may take, in seconds."""

    sample: float  # of one timed loop of calls
    backend: float  # of all loops of a backend in a case
    call: float  # a call expected to take longer is left out
    tries: int  # at a case, where the machine is busy


FULL, QUICK = Effort(0.002, 0.2, 4.0, 2), Effort(0.001, 0.03, 0.25, 1)


class OtherCPU:
    """Share of the machine's CPU time that other processes took while the block ran; 0 where nobody says."""

    @staticmethod
    def _busy() -> tuple[int, int]:
        try:
            with open("/proc/stat") as file:
                fields = [int(x) for x in file.readline().split()[1:9]]
        except OSError:
            return 0, 0
        return sum(fields) - fields[3] - fields[4], sum(fields)

    def __enter__(self):
        self.before, self.own = self._busy(), sum(os.times()[:2])
        return self

    def __exit__(self, *_):
        after = self._busy()
        own = (sum(os.times()[:2]) - self.own) * os.sysconf("SC_CLK_TCK")
        others = after[0] - self.before[0] - own
        self.share = round(max(0.0, others) / max(1, after[1] - self.before[1]), 3)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable, device: str, loops: int = 1) -> float:
    """Seconds of a call, the mean of a loop."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(loops):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / loops


# ---------------------------------------------------------------------------------------------------------- the limits


def fastest(call: Callable, device: str, seconds: float) -> float:
    """Seconds of the fastest call."""
    call()
    loops = max(1, int(0.001 / max(timed(call, device), 1e-7)))
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        found.append(timed(call, device, loops))
    return min(found)


def measure_limits(device: str, quick: bool) -> dict[str, Any]:
    """GEMM rates by dtype, rates of reading by size, and the time of torch's smallest operation."""
    seconds = 0.3 if quick else 1.0
    # A small product may fit between two interruptions, a large one shows the rate of long work: the faster one counts.
    sizes = (4096, 8192) if device == "cuda" else (1024,) if quick else (1024, 2048)
    limits: dict[str, Any] = {
        "threads": torch.get_num_threads(), "gemm_sizes": sizes, "gemm_gflops": {}, "reading_gbs": {}
    }  # fmt: skip
    with OtherCPU() as others, torch.no_grad():
        for name, dtype in (*DTYPES.items(), ("int8", torch.int8)):
            multiply = torch._int_mm if name == "int8" else torch.mm
            for n in sizes:
                a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
                try:
                    spent = fastest(lambda a=a, b=b, multiply=multiply: multiply(a, b), device, seconds)
                except RuntimeError:  # no product of integers here
                    break
                rate = round(2 * n**3 / spent / 1e9, 1)
                limits["gemm_gflops"][name] = max(rate, limits["gemm_gflops"].get(name, 0.0))
        one = torch.ones(1, device=device)
        call = fastest(lambda: one + one, device, 0.05)
        limits["call_us"] = round(1e6 * call, 2)
        most = 2**32 if device == "cuda" else 2**28 if quick else 2**30
        memory = torch.ones(most // 4, device=device)
        vector = torch.ones(1024, device=device)
        for power in range(20, int(math.log2(most)) + 1, 2):
            part = memory[: 2**power // 4]
            matrix = part.view(-1, 1024)
            readers = part.sum, lambda matrix=matrix: matrix @ vector
            spent = min(fastest(reader, device, seconds / 4) for reader in readers)
            # A call's own time is no reading: it counts little for what is large, and nothing may be read in no time.
            limits["reading_gbs"][str(2**power)] = round(2**power / max(spent - call, spent / 2) / 1e9, 1)
    return limits | {"other_cpu": others.share}


def faster(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measured limits each: what disturbs them only slows them down."""
    limits = dict(one)
    for kind in ("gemm_gflops", "reading_gbs"):
        limits[kind] = {name: max(rate, other[kind][name]) for name, rate in one[kind].items()}
    limits |= {name: min(one[name], other[name]) for name in ("call_us", "other_cpu")}
    # More bytes are not read faster: where it looks so, something disturbed the smaller size.
    best = 0.0
    for size in sorted(limits["reading_gbs"], key=int, reverse=True):
        best = limits["reading_gbs"][size] = max(best, limits["reading_gbs"][size])
    return limits


def reading_rate(limits: dict[str, Any], size: float) -> float:
    """GB/s of reading `size` bytes: between two measured sizes by their logarithms."""
    known = sorted((int(n), rate) for n, rate in limits["reading_gbs"].items())
    if size <= known[0][0]:
        return known[0][1]
    for (low, fast), (high, slow) in itertools.pairwise(known):
        if size <= high:
            return fast + (slow - fast) * math.log(size / low) / math.log(high / low)
    return known[-1][1]


def floor(case: Case, limits: dict[str, Any]) -> tuple[float, str]:
    """Seconds that a call takes at least, and what they go to."""
    needed, rates = cost(case), limits["gemm_gflops"]
    # Integers may be multiplied as whatever is fastest.
    rate = max(rates.values()) if case.dtype in PACKED else rates[case.dtype]
    return max(
        (needed.products / rate / 1e9, "products"),
        (needed.others / rates["float32"] / 1e9, "others"),
        (needed.bytes / reading_rate(limits, needed.bytes) / 1e9, "bytes"),
    )


def share(case: Case, seconds: float, limits: dict[str, Any]) -> dict[str, Any]:
    """A row's floor, what it goes to, the share of it that was achieved, and whether calling takes longer."""
    least, bound = floor(case, limits)
    return {
        "floor_ms": _short(1e3 * least), "bound": bound, "share": _short(least / seconds),
        "call_bound": 1e6 * least < limits["call_us"],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what is measured


def available(device: str) -> float:
    """Bytes of memory that may be used: a share of what is free now."""
    if device == "cuda":
        return 0.8 * torch.cuda.mem_get_info()[0]
    import psutil  # pyright: ignore[reportMissingModuleSource]

    return psutil.virtual_memory().available * 0.45


def functions(case: Case, device: str) -> Iterator[tuple[str, Callable]]:
    """Every backend that takes a case, and its function."""
    kind = DTYPES.get(case.dtype, torch.float32)
    state = case.mode == "decode" and case.op in ("ssd", "conv")
    for name, path in _paths(case, device):
        backend = OPS[case.op].get(name)
        if backend is None or backend.takes(kind, case.train, state=state):
            module, function = path.split(":")
            yield name, getattr(importlib.import_module(f"nemo_lite_kernels.{module}"), function)


def _paths(case: Case, device: str) -> Iterator[tuple[str, str]]:
    for name, backend in OPS[case.op].items():
        if case.function in backend.functions and backend.refusal(device) is None:
            yield name, backend.functions[case.function]
    if case.function in SHARED:
        yield NAMED[case.function], SHARED[case.function]


def measure(calls: dict[str, Callable], device: str, effort: Effort) -> tuple[dict[str, list[float]], float]:
    """Seconds of every call, several times, and other processes' share of the CPU: the quietest of some tries."""
    plans = {}
    for name, call in calls.items():
        once = timed(call, device)
        loops = max(1, int(effort.sample / max(once, 1e-7)))
        plans[name] = (loops, 1 if once > effort.call else min(30, max(3, int(effort.backend / (loops * once)))))
    best: tuple[dict[str, list[float]], float] | None = None
    for _ in range(effort.tries):
        found: dict[str, list[float]] = {name: [] for name in calls}
        with OtherCPU() as others:
            for turn in range(max(samples for _, samples in plans.values())):
                for name, (loops, samples) in plans.items():
                    if turn < samples:
                        found[name].append(timed(calls[name], device, loops))
        if best is None or others.share < best[1]:
            best = found, others.share
        if others.share <= BUSY:
            break
    assert best is not None
    return best


class Run:
    """Rows, and what was left out and why."""

    def __init__(self, device: str, effort: Effort, limits: dict[str, Any]):
        self.device, self.effort, self.limits = device, effort, limits
        self.rows: list[dict[str, Any]] = []
        self.cases: list[Case] = []  # of the rows
        self.left_out: list[dict[str, Any]] = []
        self.slowness: dict[tuple, float] = {}  # time over floor, as last seen

    def case(self, case: Case) -> list[dict[str, Any]]:
        """Measure all backends of a case; its rows."""
        least = floor(case, self.limits)[0]
        room, calls, held = available(self.device), {}, None
        for name, function in functions(case, self.device):
            key = (case.function, name, case.mode, case.dtype)
            expected = self.slowness.get(key, 1.0) * least
            if memory(case, name) > room:
                self._leave(case, name, f"needs about {memory(case, name) / 1e9:.1f} GB")
            elif expected > self.effort.call:
                self._leave(case, name, f"would take about {expected:.2g} s a call")
            else:
                held = held or inputs(case, self.device)
                call = held.call(function)
                try:  # compiles, tunes
                    timed(call, self.device)
                except Exception as error:  # a library's refusal is a finding, too
                    words = str(error).strip().splitlines() or [""]
                    self._leave(case, name, f"{type(error).__name__}: {words[0]}")
                else:
                    calls[name] = call
        if not calls:
            return []
        found, others = measure(calls, self.device, self.effort)
        needed, rows = cost(case), []
        for name, seconds in found.items():
            spent = statistics.median(seconds)
            self.slowness[case.function, name, case.mode, case.dtype] = spent / least
            row = asdict(case) | {
                "backend": name, "shape": case.shape, "ms": _short(1e3 * spent), "best_ms": _short(1e3 * min(seconds)),
                "samples": len(seconds), "products": needed.products, "others": needed.others, "bytes": needed.bytes,
                "other_cpu": others, "noisy": others > BUSY,
            }  # fmt: skip
            rows.append(row | share(case, spent, self.limits))
            self.cases.append(case)
        self.rows += rows
        return rows

    def finish(self, limits: dict[str, Any]) -> None:
        """Shares of these limits, in place of those that the run began with."""
        self.limits = limits
        for case, row in zip(self.cases, self.rows):
            row |= share(case, row["ms"] / 1e3, limits)

    def _leave(self, case: Case, backend: str, reason: str) -> None:
        self.left_out.append(asdict(case) | {"backend": backend, "reason": reason})


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def machine(device: str) -> dict[str, Any]:
    """Where this ran, at which commit."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "name": name, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", "kernels")),
    }  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share > 0.1 else 1 if share > 0.01 else 2}f} %"


def line(rows: list[dict[str, Any]]) -> str:
    """A case in a line: each backend's time and share."""
    first = rows[0]
    each = ", ".join(f"{row['backend']} {row['ms']:.4g} ms {_percent(row['share'])}" for row in rows)
    what = f"{first['config']:16}{first['function']:17}{first['shape']:18}{first['dtype']:9}"
    return f"{what}{each}  [{first['bound']}]{' (busy)' if first['noisy'] else ''}"


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    missing = {
        f"{op}.{name}": reason
        for op in FUNCTIONS
        for name, backend in OPS[op].items()
        if (reason := backend.refusal(args.device))
    }
    first = measure_limits(args.device, args.quick)
    limits = faster(first, first)
    print(json.dumps(limits))
    run = Run(args.device, QUICK if args.quick else FULL, limits)
    complete = False
    try:
        for config in args.configs:
            for case in cases(config, args.device, args.quick, args.ops):
                if rows := run.case(case):
                    print(line(rows), flush=True)
            gc.collect()
        complete = True
    except KeyboardInterrupt:
        print("interrupted: what is measured is kept", file=sys.stderr)
    run.finish(faster(limits, measure_limits(args.device, args.quick)))
    for left in run.left_out:
        what = f"{left['config']} {left['function']} {left['mode']} {left['dtype']} {left['B']} x {left['L']}"
        print(f"left out: {what}, {left['backend']}: {left['reason']}")
    return {
        "command": " ".join(["python kernels/bench", *args.words]), "machine": machine(args.device),
        "device": args.device, "complete": complete, "limits": run.limits, "refused": missing,
        "rows": run.rows, "left_out": run.left_out,
    }  # fmt: skip


def names(known) -> Callable[[str], tuple[str, ...]]:
    """The argument parser's type of a list of names with commas."""

    def split(text: str) -> tuple[str, ...]:
        found = tuple(word for word in text.split(",") if word)
        if unknown := [word for word in found if word not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return found

    return split


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", type=names(FUNCTIONS), default=(), help="names with commas (default: all)")
    parser.add_argument("--configs", type=names(SIZES), default=None, help="models whose layers' shapes are measured")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: as torch chooses)")
    parser.add_argument("--quick", action="store_true", help="two small models, few shapes, short measurements")
    parser.add_argument("--out", type=Path, help="JSON (default: benchmarks/results/kernels_DEVICE.json)")
    parser.add_argument("--plot", type=Path, help="SVG (default: docs/images/kernels.svg, with _cuda for CUDA)")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw an earlier run")
    args = parser.parse_args(words)
    args.words = words
    small = ("bench_small", "bench_medium")
    args.configs = args.configs or (small if args.quick else (*small, "nemotron3_nano", "nemotron3_super"))
    runs = ROOT / "runs" / f"kernels_{args.device}_quick"
    args.out = args.out or (
        runs.with_suffix(".json") if args.quick else ROOT / "benchmarks" / "results" / f"kernels_{args.device}.json"
    )
    cuda = "_cuda" if args.device == "cuda" else ""
    args.plot = args.plot or (
        runs.with_suffix(".svg") if args.quick else ROOT / "docs" / "images" / f"kernels{cuda}.svg"
    )
    if args.device == "cuda" and not args.draw and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    return args


def main(words: list[str]) -> None:
    args = parse(words)
    if args.draw:
        result = json.loads(args.draw.read_text())
    else:
        result = benchmark(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # A row a line: the file stays readable, and so do its differences.
        parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in result.items() if k not in ("rows", "left_out")]
        for k in ("rows", "left_out"):
            inner = ",\n".join(json.dumps(row) for row in result[k])
            parts.append(f"{json.dumps(k)}: [\n{inner}\n]")
        args.out.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        print(f"written to {args.out}")
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    args.plot.write_text(figure.draw(result))
    print(f"drawn in {args.plot}")


def keep_freed_memory() -> None:
    """Have glibc keep large freed buffers, as it does for a training run: otherwise every call's outputs are paid for
    with a page fault for every 4 KiB."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    keep_freed_memory()
    main(sys.argv[1:])
