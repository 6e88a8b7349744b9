"""Training, prefill, decode and verification beside transformers and llama.cpp: same weights, one run, ratios.

    python benchmarks/peers.py decode --config bench_small --dtype bf16 --threads 2 --llama-python LLAMA/bin/python
    python benchmarks/peers.py all --llama-python LLAMA/bin/python     # every row of the bar (about two hours)
    python benchmarks/peers.py all --quick                             # bench_small's most telling rows, in minutes
    python benchmarks/peers.py parity --llama-python LLAMA/bin/python  # do llama.cpp and nemo_lite compute the same?
    python benchmarks/peers.py show                                    # the bar, from the results: met or not

Each measurement is a process of its own that opens saved weights; ours and the peers' alternate, so that a noisy
machine hits all. A round in which other processes took more than 5 % of the CPU is measured again (and kept, marked,
if the machine stays busy). Where a peer has settings, each is tried once and the fastest one is measured. Weights are
random, tokens too. Results go to benchmarks/results as JSON with machine, commit, command and the machine's limits.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "pretrain"
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / "runs" / "bench"  # models and GGUF files, made when they are missing
BUSY = 0.05
VERIFIED = 4  # tokens of one verification

PEERS = {"train": ["transformers"], "prefill": ["transformers", "llama.cpp"], "decode": ["llama.cpp"], "verify": []}
GGUF = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
MEMORY_AT_MOST, VERIFY_AT_MOST = 1.0, 1.6  # of the peer's peak; decode steps that one verification may cost


@dataclass(frozen=True)
class Job:
    """One row: a piece of work in one shape, format and number of threads."""

    work: str
    config: str
    dtype: str
    threads: int
    batch: int
    length: int  # tokens of a row; of its prompt where tokens are decoded after it
    new_tokens: int = 0

    def __str__(self) -> str:
        shape = f"{self.batch} x {self.length}" + (f" + {self.new_tokens}" if self.new_tokens else "")
        return f"{self.work:8}{self.config:13}{self.dtype:5}{self.threads} threads  {shape:11}"


def bar() -> list[Job]:
    """Every row that counts."""
    rows = []
    for threads, config in itertools.product((2, 1), ("bench_small", "bench_medium")):
        wide = ("fp32", "bf16")
        rows += [Job("train", config, dtype, threads, 4 if config == "bench_small" else 1, 512) for dtype in wide]
        rows += [Job("prefill", config, dtype, threads, 1, n) for n in (512, 2048) for dtype in wide]
        rows += [Job("decode", config, dtype, threads, 1, 64, 64) for dtype in GGUF]
        rows += [Job("decode", config, dtype, threads, 8, 64, 32) for dtype in wide]
        rows.append(Job("verify", config, "bf16", threads, 1, 64))
    return rows


def wanted_speed(job: Job) -> float:
    """How many times the better peer's speed a row of the bar asks for."""
    if job.work == "train":
        return 1.5 if job.dtype == "fp32" else 2.2 if job.config == "bench_small" else 2.0
    return 1.3 if job.work == "prefill" else 1.0 if job.batch == 1 else 2.0


def quick() -> list[Job]:
    """bench_small with two threads, without the long prompt."""
    return [job for job in bar() if (job.config, job.threads) == ("bench_small", 2) and job.length < 2048]


# ------------------------------------------------------------------------------------------ one measurement, in a child


class OtherCPU:
    """Share of the machine's CPU time that other processes took while the block ran."""

    @staticmethod
    def _busy() -> tuple[int, int]:
        fields = [int(x) for x in open("/proc/stat").readline().split()[1:9]]  # noqa: SIM115
        return sum(fields) - fields[3] - fields[4], sum(fields)

    def __enter__(self):
        self.before, self.own = self._busy(), sum(os.times()[:2])
        return self

    def __exit__(self, *_):
        after, ticks = self._busy(), os.sysconf("SC_CLK_TCK")
        own = (sum(os.times()[:2]) - self.own) * ticks
        others = after[0] - self.before[0] - own
        self.share = round(max(0.0, others) / max(1, after[1] - self.before[1]), 3)


class Memory:
    """Peak resident size in MB: of the process so far (`peak_mb`), and of the block alone (`use_mb`).

    What comes before the block is opening the model. The kernel's mark is that of the program itself; getrusage's can
    be its parent's. Where the mark cannot be reset, the block's peak is the process's.
    """

    @staticmethod
    def _mark() -> float:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    def __enter__(self):
        self.before = self._mark()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_):
        self.use_mb = self._mark()
        self.peak_mb = max(self.before, self.use_mb)


def model_dir(config: str, dtype: str) -> Path:
    """Where the random model of a recipe is kept: quantised ones are made from float32, as llama.cpp makes its."""
    recipes = sorted(RECIPES.glob("bench_*.yaml"))  # one is based on the other
    stamp = zlib.crc32(b"".join(path.read_bytes() for path in recipes))
    return MODELS / f"{config}-{stamp:08x}" / ("bf16" if dtype == "bf16" else "fp32")


def random_ids(vocabulary: int, batch: int, length: int):
    """The same ids for everyone (llama.py draws them in this way too)."""
    import numpy as np
    import torch

    return torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (batch, length)))


def open_ours(job: Job):
    """A HybridLM in a row's format."""
    from nemo_lite import HybridLM

    dtype = "bfloat16" if job.dtype == "bf16" and job.work != "train" else "float32"
    folder = model_dir(job.config, "bf16" if dtype == "bfloat16" else "fp32")
    quantization = job.dtype if job.dtype in ("int8", "int4") else None
    return HybridLM.from_pretrained(folder, dtype=dtype, quantization=quantization)


def open_transformers(job: Job, setting: str):
    """transformers' model of the same weights; `setting` names its way over the experts, and of bf16 training."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    half = job.dtype == "bf16" and not {"autocast", "float32"} & set(setting.split())
    return transformers.NemotronHForCausalLM.from_pretrained(
        model_dir(job.config, "bf16" if half else "fp32"),
        dtype=torch.bfloat16 if half else torch.float32,
        experts_implementation=setting.split()[-1],
    )


def training_step(job: Job, setting: str, model, ids):
    """A closure that makes one optimizer step."""
    import torch

    bf16 = job.dtype == "bf16"
    model.train()
    if not setting:  # ours
        from nemo_lite import load_recipe
        from nemo_lite.data import Batch
        from nemo_lite.parallel.native import World, keep_freed_memory
        from nemo_lite.train.loop import train_step
        from nemo_lite.train.optim import build_optimizer

        recipe = load_recipe(RECIPES / f"{job.config}.yaml")
        model.dtype = torch.bfloat16 if bf16 else torch.float32
        keep_freed_memory()  # as a run does when it starts
        optimizer = build_optimizer(model, recipe.optim)
        world, recipe.train.global_batch_size = World(0, 1, torch.device("cpu")), job.batch
        doc_ids = torch.zeros_like(ids)
        micros = [Batch(ids, doc_ids, ids, doc_ids[:, 0].bool(), list(range(job.batch)))]
        return lambda: train_step(model, optimizer, micros, 1e-4, recipe, world)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in setting):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(job: Job, setting: str, model, ids):
    """A closure that reads the prompts or decodes after them, and returns the seconds of what counts."""
    import torch

    @torch.inference_mode()
    def prefill() -> float:
        start = time.perf_counter()
        if setting:
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
        else:
            model.head(model(ids, cache=model.new_cache(job.batch)).hidden[:, -1])
        return time.perf_counter() - start

    def decode() -> float:
        from nemo_lite.generate import generate

        return generate(model, ids, max_tokens=job.new_tokens + 1).stats.decode_seconds

    @torch.inference_mode()
    def decode_transformers() -> float:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(job.new_tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1)
        return time.perf_counter() - start

    return prefill if job.work == "prefill" else decode_transformers if setting else decode


def measure(job: Job, setting: str, repeats: int) -> dict[str, Any]:
    """One run of nemo_lite (no setting) or transformers: tokens per second, and peak memory."""
    import torch

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if setting:
        model = open_transformers(job, setting)
    else:
        model = open_ours(job)
    ids = random_ids(model.config.vocab_size, job.batch, job.length)
    if job.work == "verify":
        return measure_verification(model, ids, 16 * repeats)
    step = (training_step if job.work == "train" else inference_step)(job, setting, model.eval(), ids)
    with Memory() as memory:
        step()  # allocations, thread pools
        seconds = []
        with OtherCPU() as others:
            for _ in range(repeats):
                start = time.perf_counter()
                inner = step()
                seconds.append(inner if isinstance(inner, float) else time.perf_counter() - start)
    units = job.batch * (job.new_tokens or job.length)
    return {
        "tokens_per_second": units / statistics.median(seconds),
        "best": units / min(seconds),
        "peak_mb": memory.peak_mb,
        "use_mb": memory.use_mb,
        "other_cpu": others.share,
    }


def measure_verification(model, ids, repeats: int) -> dict[str, Any]:
    """Milliseconds of one decode step, and of verifying VERIFIED tokens and keeping them all, in turn.

    Each has a cache of its own, so that what a commit leaves for the next forward to do is counted where it belongs.
    """
    import torch

    steps, checks = [], []

    @torch.inference_mode()
    def turn(cache, n: int, seconds: list[float]) -> None:
        start = time.perf_counter()
        out = model(ids[:, :n], cache=cache, tentative=n > 1)
        out.logits.argmax(-1).tolist()
        if n > 1:
            cache.commit(n)
        seconds.append(time.perf_counter() - start)

    with Memory() as memory, OtherCPU() as others:
        for i in range(repeats):
            if i % 16 == 0:  # the caches do not grow apart
                with torch.inference_mode():
                    caches = [model.new_cache(1, speculative=model.mtp is not None) for _ in range(2)]
                    for cache in caches:
                        model(ids, cache=cache)
                turn(caches[0], 1, [])
                turn(caches[1], VERIFIED, [])
            turn(caches[0], 1, steps)
            turn(caches[1], VERIFIED, checks)
    step, check = statistics.median(steps), statistics.median(checks)
    return {
        "tokens_per_second": 1 / step,
        "best": 1 / min(steps),
        "step_ms": 1000 * step,
        "verify_ms": 1000 * check,
        "verify_over_step": check / step,
        "peak_mb": memory.peak_mb,
        "use_mb": memory.use_mb,
        "other_cpu": others.share,
    }


def measure_limits(threads: int, sizes_mb: list[int]) -> dict[str, Any]:
    """The machine's GEMM rates, and its rates of reading 1 GiB (memory) and the sizes asked for (caches may help)."""
    import torch
    from nemo_lite_kernels.common import multiplies_bfloat16

    torch.set_num_threads(threads)

    def fastest(work, units: float) -> float:
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return units / min(seconds[2:]) / 1e9

    limits: dict[str, Any] = {"threads": threads}
    with OtherCPU() as others:
        for name, dtype in (
            ("fp32", torch.float32),
            ("bf16", torch.bfloat16 if multiplies_bfloat16() else torch.float32),
        ):
            a, b = torch.rand(2048, 2048, dtype=dtype), torch.rand(2048, 2048, dtype=dtype)
            limits[f"gemm_{name}_gflops"] = round(fastest(lambda a=a, b=b: a @ b, 2 * 2048**3), 1)
        memory = torch.ones(2**28)

        def reading(size: int) -> float:
            part = memory[: size // 4]
            times = max(1, 2**27 // size)
            matrix = part[: len(part) // 1024 * 1024].view(-1, 1024)
            vector = torch.ones(1024)
            summed = fastest(lambda: [part.sum() for _ in range(times)], times * size)
            return round(max(summed, fastest(lambda: [matrix @ vector for _ in range(times)], times * size)), 1)

        limits["memory_gbs"] = reading(2**30)
        limits["reading_gbs"] = {str(size): reading(min(size * 10**6, 2**30)) for size in sorted(set(sizes_mb))}
    return limits | {"other_cpu": others.share}


# --------------------------------------------------------------------------------------------------- what it must cost


def bytes_touched(job: Job) -> float:
    """Bytes one decode step must read at least: weights of the experts to expect, states and keys of all rows."""
    from nemo_lite import HybridLM, load_recipe
    from nemo_lite.model.hf import FLOAT32

    config = load_recipe(RECIPES / f"{job.config}.yaml").model
    width = {"fp32": 4.0, "bf16": 2.0, "int8": 34 / 32, "int4": 18 / 32}[job.dtype]  # a 16-bit scale for 32 weights
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** job.batch
    total = 0.0
    for name, weight in HybridLM(config, device="meta").named_parameters():
        if name.startswith("embedding"):
            count = float(job.batch * config.hidden_size)
        else:
            count = weight.numel() * (share if ".experts." in name else 1.0)
        total += count * (4.0 if FLOAT32.search(name) or weight.dim() < 2 else width)
    states = config.layers.count("M") * config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    keys = config.layers.count("*") * 2 * config.num_key_value_heads * config.head_dim
    keys *= job.length + job.new_tokens // 2
    return total + job.batch * (8 * states + (4.0 if job.dtype == "fp32" else 2.0) * keys)


def floor(job: Job, limits: dict[str, Any]) -> dict[str, Any]:
    """The most tokens per second that the machine's limits allow: of arithmetic, or of reading."""
    from nemo_lite import load_recipe
    from nemo_lite.check import flops_per_token

    if job.work in ("train", "prefill"):
        flops = flops_per_token(load_recipe(RECIPES / f"{job.config}.yaml").model, job.length)
        if job.work == "train":
            each = flops["train"]
        else:
            each = flops["forward"] - flops["parts"]["head"] * (1 - 1 / job.length)  # logits of the last token only
        rate = limits[f"gemm_{job.dtype}_gflops"]
        return {"mflops_per_token": round(each / 1e6, 2), "gflops": rate, "tokens_per_second": round(rate * 1e9 / each)}
    size = bytes_touched(job)
    rates = limits["memory_gbs"], limits["reading_gbs"][str(round(size / 1e6))]
    found = {"mb_per_step": round(size / 1e6, 1), "memory_gbs": rates[0], "reading_gbs": rates[1]}
    memory, cached = (round(job.batch * rate * 1e9 / size) for rate in rates)
    return found | {"tokens_per_second": memory, "tokens_per_second_cached": cached}


# --------------------------------------------------------------------------------------------- comparing, in the parent


class Failed(Exception):
    """A child ended without a measurement; the message is its last words."""


def run(command: list[Any], threads: int = 2) -> Any:
    """A child's last line of output, read as JSON (None if it printed nothing)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise Failed(last if done.returncode > 0 and last else f"ended with {done.returncode}: {last}")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


LLAMA = ROOT / "benchmarks" / "llama.py"


def find_llama(python: Path | None) -> tuple[str | None, str]:
    """An interpreter that has llama_cpp, and what it has or why there is none."""
    given = str(python or sys.executable)
    try:
        return given, run([given, LLAMA, "versions"])
    except (Failed, OSError) as error:
        return None, f"{given}: {error} (install constraints/llama.txt and give its python with --llama-python)"


def prepare(config: str, dtype: str, llama: str | None) -> None:
    """Write the random model of a recipe, and its GGUF, where they are missing."""
    folder = model_dir(config, dtype)
    if not (folder / "config.json").exists():
        print(f"writing {folder.relative_to(ROOT)}", flush=True)
        run([sys.executable, __file__, "prepare", "--config", config, "--dtype", dtype])
    if llama is None:
        return

    def make(kind: str, *command: Any) -> None:
        out = folder.parent / f"{kind}.gguf"
        if not out.exists():
            print(f"writing {out.relative_to(ROOT)}", flush=True)
            run([llama, LLAMA, *command, out.with_suffix(".partial"), "--dtype", kind])
            out.with_suffix(".partial").rename(out)

    kind = GGUF[dtype]
    make("bf16" if kind == "bf16" else "f32", "gguf", folder)
    if kind.startswith("q"):
        make(kind, "quantise", folder.parent / "f32.gguf")


def settings(job: Job, name: str) -> list[str]:
    """The ways to run a peer among which the fastest is taken."""
    from nemo_lite_kernels.common import multiplies_bfloat16

    if name == "transformers":
        experts = ["grouped_mm", "eager"]
        if job.dtype == "bf16" and not multiplies_bfloat16():
            return [f"float32 {way}" for way in experts]  # in bfloat16 a step takes minutes here
        if job.work == "train" and job.dtype == "bf16":
            return [f"{kind} {way}" for kind in ("autocast", "bfloat16") for way in experts]
        return experts
    if name == "llama.cpp" and job.dtype in ("int8", "int4"):
        return ["repacked", "as stored"]
    return ["" if name == "nemo_lite" else "as stored"]


REPEATS = {"train": 4, "prefill": 5, "decode": 4, "verify": 4}


def quietest(command: list[Any], threads: int, tries: int) -> dict[str, Any]:
    """A child's result; while the machine is busy it is tried again, and the least disturbed one is taken."""
    results: list[dict[str, Any]] = []
    while len(results) < tries and (not results or results[-1]["other_cpu"] > BUSY):
        results.append(run(command, threads))
    return min(results, key=lambda result: result["other_cpu"])


def child(job: Job, name: str, setting: str, llama: str | None, repeats: int, tries: int) -> dict[str, Any]:
    """Measure one implementation in a process of its own."""
    options = ["--threads", job.threads, "--batch", job.batch, "--length", job.length, "--repeats", repeats]
    options += ["--new-tokens", job.new_tokens] if job.new_tokens else []
    if name == "llama.cpp":
        file = model_dir(job.config, job.dtype).parent / f"{GGUF[job.dtype]}.gguf"
        command = [llama, LLAMA, job.work, file, *options, *(["--as-stored"] if setting == "as stored" else [])]
    else:
        command = [sys.executable, __file__, job.work, "--config", job.config, "--dtype", job.dtype, *options]
        command += ["--child", setting]
    return quietest(command, job.threads, tries)


def choose(job: Job, name: str, llama: str | None, repeats: int, tries: int) -> tuple[str, dict[str, Any]]:
    """The fastest setting of an implementation, and tokens per second of all (or why one failed)."""
    ways = settings(job, name)
    if len(ways) == 1:
        return ways[0], {}
    tried: dict[str, Any] = {}
    for way in ways:
        try:
            tried[way] = round(child(job, name, way, llama, repeats, tries)["tokens_per_second"], 1)
        except Failed as error:
            tried[way] = str(error)
    worked = {way: speed for way, speed in tried.items() if isinstance(speed, float)}
    if not worked:
        raise Failed("; ".join(f"{way}: {error}" for way, error in tried.items()))
    return max(worked, key=worked.__getitem__), tried


def compare(job: Job, peers: list[str], llama: str | None, args) -> dict[str, Any]:
    """Alternate the implementations for some rounds; medians, ratios, and how noisy it was."""
    rounds = args.rounds or (2 if args.quick else 3)
    repeats = args.repeats or (REPEATS[job.work] // 2 if args.quick else REPEATS[job.work])
    chosen, notes = {}, {}
    for name in ["nemo_lite", *peers]:
        if name == "llama.cpp" and llama is None:
            continue
        chosen[name], tried = choose(job, name, llama, max(1, repeats // 2), args.tries)
        notes[name] = ({"setting": chosen[name]} if chosen[name] else {}) | ({"settings": tried} if tried else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, setting in chosen.items():
            runs[name].append(child(job, name, setting, llama, repeats, args.tries))
    row: dict[str, Any] = {key: value for key, value in asdict(job).items() if value}
    for name, results in runs.items():
        row[name] = {
            "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in results), 1),
            "best": round(max(r["best"] for r in results), 1),
            "peak_mb": round(statistics.median(r["peak_mb"] for r in results)),
            "use_mb": round(statistics.median(r["use_mb"] for r in results)),
            "other_cpu": [r["other_cpu"] for r in results],
        } | notes[name]
    row["noisy"] = any(r["other_cpu"] > BUSY for results in runs.values() for r in results)
    if job.work == "verify":
        for key in ("step_ms", "verify_ms"):
            row["nemo_lite"][key] = round(statistics.median(r[key] for r in runs["nemo_lite"]), 3)
        ratios = [r["verify_over_step"] for r in runs["nemo_lite"]]
        row["verified"], row["verify_over_step"] = VERIFIED, round(statistics.median(ratios), 3)
        row["verify_over_step_by_round"] = [round(ratio, 3) for ratio in ratios]
    elif len(runs) > 1:
        ours = runs.pop("nemo_lite")
        row["peer"] = max(runs, key=lambda name: row[name]["tokens_per_second"])
        pairs = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, runs[row["peer"]])]
        row["speedup"] = round(statistics.median(pairs), 3)
        row["speedup_by_round"] = [round(pair, 3) for pair in pairs]
        peer = row[row["peer"]]
        row["memory_ratio"] = round(row["nemo_lite"]["peak_mb"] / peer["peak_mb"], 3)
        row["use_memory_ratio"] = round(row["nemo_lite"]["use_mb"] / peer["use_mb"], 3)
    return row


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    job = Job(**{key: row[key] for key in Job.__dataclass_fields__ if key in row})
    parts = [f"{job}: {row['nemo_lite']['tokens_per_second']:8.1f} tok/s"]
    if "verify_over_step" in row:
        parts.append(f"{row['verified']} tokens cost {row['verify_over_step']:.2f} steps")
    for name in ("transformers", "llama.cpp"):
        if name in row:
            setting = f" ({row[name]['setting']})" if "settings" in row[name] else ""
            parts.append(f"{name}{setting} {row[name]['tokens_per_second']:.1f}")
    if "speedup" in row:
        parts.append(
            f"{row['speedup']:.2f}x, memory {row['memory_ratio']:.2f}x ({row['use_memory_ratio']:.2f}x in use)"
        )
    if "floor" in row:
        parts.append(f"{row['nemo_lite']['tokens_per_second'] / row['floor']['tokens_per_second']:.0%} of the floor")
    return ", ".join(parts) + ("  (noisy)" if row["noisy"] else "")


def machine() -> dict:
    """Where this ran, at which commit, with which versions."""
    import platform

    import torch
    import transformers

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")  # noqa: SIM115
    return {
        "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "nemo_lite", "kernels", "serving", "benchmarks/*.py")),
    }  # fmt: skip


def benchmark(jobs: list[Job], args) -> None:
    """Measure the jobs and write their JSON after each row."""
    llama, versions = find_llama(args.llama_python)
    wanted = {job: args.peers or PEERS[job.work] for job in jobs}
    if llama is None and any("llama.cpp" in peers for peers in wanted.values()):
        print(f"without llama.cpp: {versions}", flush=True)
    started, limits, rows = time.perf_counter(), {}, []
    found = {"command": command_line(), "machine": machine(), "quick": args.quick}
    if llama:
        found["machine"] |= versions
    out = args.out or RESULTS / f"{result_name(args)}.json"
    for threads in dict.fromkeys(job.threads for job in jobs):
        sizes = [round(bytes_touched(job) / 1e6) for job in jobs if job.threads == threads and job.work == "decode"]
        command = [sys.executable, __file__, "limits", "--threads", threads, "--sizes", *(sizes or [1000])]
        limits[threads] = quietest(command, threads, args.tries)
        rates = {key: value for key, value in limits[threads].items() if key != "reading_gbs"}
        print(f"limits: {rates}", flush=True)
    for job in jobs:
        try:
            prepare(job.config, job.dtype, llama if "llama.cpp" in wanted[job] else None)
            row = compare(job, wanted[job], llama, args)
        except Failed as error:
            print(f"{job}: skipped: {error}", flush=True)
            continue
        if job.work != "verify":
            row["floor"] = floor(job, limits[job.threads])
        rows.append(row)
        print(line(row), flush=True)
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        found |= {
            "finished": finished,
            "seconds": round(time.perf_counter() - started),
            "limits": list(limits.values()),
        }
        out.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    print(f"written to {out}" if rows else "nothing was measured")


def command_line() -> str:
    """How this was called, without the path of llama.cpp's interpreter, which is nobody else's."""
    words = [word for word in sys.argv[1:] if not word.startswith("--llama-python=")]
    if "--llama-python" in words:
        at = words.index("--llama-python")
        del words[at : at + 2]
    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *words])


def result_name(args) -> str:
    """peers_WORK and whatever narrowed it, so that a part does not replace the whole."""
    parts = [args.config, args.dtype, args.threads and f"{args.threads}threads", args.batch and f"batch{args.batch}"]
    parts += [args.length and f"{args.length}tokens", *(args.peers or []), args.quick and "quick"]
    return "_".join(["peers", args.work, *(str(part).replace(".", "") for part in parts if part)])


def select(args) -> list[Job]:
    """The bar's rows that fit the options; where none does, the one that they describe."""
    fixed = {key: value for key in ("config", "dtype", "threads", "batch", "length") if (value := getattr(args, key))}
    if args.new_tokens:
        fixed["new_tokens"] = args.new_tokens
    rows = [job for job in (quick() if args.quick else bar()) if args.work in ("all", job.work)]
    found = [job for job in rows if all(getattr(job, key) == value for key, value in fixed.items())]
    if found or args.work == "all":
        return found
    first = asdict(next(job for job in rows if args.config in (None, job.config)) if rows else bar()[0])
    return [Job(**first | fixed)]


# ------------------------------------------------------------------------------------------------ parity and the bar


def parity(args) -> None:
    """Our float32 logits beside llama.cpp's on 100 random tokens."""
    import tempfile

    import numpy as np
    import torch

    from nemo_lite import HybridLM

    llama, why = find_llama(args.llama_python)
    if llama is None:
        raise SystemExit(f"parity needs llama.cpp: {why}")
    config = args.config or "bench_small"
    prepare(config, "fp32", llama)
    folder = model_dir(config, "fp32")
    model = HybridLM.from_pretrained(folder, dtype="float32")
    ids = random_ids(model.config.vocab_size, 1, 100)
    with torch.inference_mode():
        ours = model(ids).logits[0].numpy()
    with tempfile.TemporaryDirectory() as temporary:
        tokens, out = Path(temporary, "ids.npy"), Path(temporary, "logits.npy")
        np.save(tokens, ids.numpy())
        run([llama, LLAMA, "logits", folder.parent / "f32.gguf", tokens, out])
        theirs = np.load(out)[0]
    worst, same = float(np.abs(ours - theirs).max()), float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    print(f"{config}, 100 tokens: largest difference {worst:.1e} at a deviation of {ours.std():.3f}, argmax {same:.0%}")
    if worst > 1e-2 * ours.std():
        raise SystemExit("llama.cpp computes another model")


def show() -> None:
    """Print every row of the bar with what was measured last, and whether it is met."""
    known: dict[Job, tuple[tuple[bool, str], dict[str, Any]]] = {}
    for path in RESULTS.glob("peers_*.json"):
        found = json.loads(path.read_text())
        age = not found.get("quick", False), found.get("finished", "")
        for row in found["rows"] if age[1] else []:
            job = Job(**{key: row[key] for key in Job.__dataclass_fields__ if key in row})
            # Without the peer that counts a row says nothing about the bar.
            if (row.keys() >= set(PEERS[job.work])) and (job not in known or known[job][0] < age):
                known[job] = age, row
    head = f"{'work':8}{'config':13}{'dtype':6}{'threads':8}{'shape':12}{'tok/s':>9}  {'peer':>22}  {'speedup':>16}"
    print(f"{head}  {'memory':>6} {'in use':>6} {'floor':>6} {'asked':>6}  bar")
    met = 0
    for job in bar():
        shape = f"{job.batch} x {job.length}" + (f" + {job.new_tokens}" if job.new_tokens else "")
        start = f"{job.work:8}{job.config:13}{job.dtype:6}{job.threads:<8}{shape:12}"
        if job not in known:
            print(f"{start}{'':>9}  {'':>22}  {'':>16}  {'':>6} {'':>6} {'':>6} {'':>6}  not measured")
            continue
        row = known[job][1]
        ours = row["nemo_lite"]
        if job.work == "verify":
            good, many = row["verify_over_step"] <= VERIFY_AT_MOST, row["verify_over_step_by_round"]
            middle = f"{f'{VERIFIED} tokens / step':>22}  {row['verify_over_step']:>5.2f} {spread(many):>10}"
            middle += f"  {'':>6} {'':>6} {'':>6} {VERIFY_AT_MOST:>5.1f} "
        else:
            peer = row[row["peer"]]
            good = row["speedup"] >= wanted_speed(job)
            name = f"{row['peer']} {peer['tokens_per_second']:.1f}"
            middle = f"{name:>22}  {row['speedup']:>5.2f} {spread(row['speedup_by_round']):>10}"
            middle += f"  {row['memory_ratio']:>6.2f} {row['use_memory_ratio']:>6.2f}"
            middle += (
                f" {ours['tokens_per_second'] / row['floor']['tokens_per_second']:>6.0%} {wanted_speed(job):>5.1f}x"
            )
        met += good and not row["noisy"]
        more = row.get("memory_ratio", 0.0) > MEMORY_AT_MOST
        flags = (("more memory", more), ("noisy", row["noisy"]), ("quick", not known[job][0][0]))
        marks = [text for text, on in flags if on]
        verdict = ("met" if good else "not met") + (f" ({', '.join(marks)})" if marks else "")
        print(f"{start}{ours['tokens_per_second']:>9.1f}  {middle}  {verdict}")
    print(
        f"{met} of {len(bar())} as fast as asked, in quiet: so many times the better peer's speed; verifying "
        f"{VERIFIED} tokens for at most {VERIFY_AT_MOST:g} steps"
    )


def spread(numbers: list[float]) -> str:
    return f"{min(numbers):.2f}-{max(numbers):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = ["train", "prefill", "decode", "verify", "all", "parity", "show"]
    hidden = ["prepare", "limits"]
    parser.add_argument("work", choices=works + hidden, metavar="{" + ",".join(works) + "}")
    parser.add_argument("--config", help="recipe in recipes/pretrain: bench_small or bench_medium (default: both)")
    parser.add_argument(
        "--dtype",
        choices=list(GGUF),
        help="of the weights (default: all that the bar asks for); bf16 training keeps float32 weights",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: 2, then 1")
    parser.add_argument("--batch", type=int, metavar="N", help="rows (default: the bar's)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens a row, or of its prompt (default: the bar's)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="decoded tokens a row (default: the bar's)")
    parser.add_argument("--llama-python", type=Path, metavar="PATH", help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--peers", nargs="+", choices=["transformers", "llama.cpp"], help="others than the bar's")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3 (quick: 2)")
    parser.add_argument("--repeats", type=int, metavar="N", help="steps in one measurement")
    parser.add_argument("--tries", type=int, default=4, metavar="N", help="while the machine is busy (default: 4)")
    parser.add_argument("--quick", action="store_true", help="bench_small with 2 threads, 2 shorter rounds")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/peers_WORK...json)")
    parser.add_argument("--child", metavar="SETTING", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work == "show":
        show()
    elif args.work == "parity":
        parity(args)
    elif args.work == "limits":
        print(json.dumps(measure_limits(args.threads or 2, args.sizes or [])))
    elif args.work == "prepare":
        import torch

        from nemo_lite import HybridLM, load_recipe

        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        model = HybridLM(load_recipe(RECIPES / f"{args.config}.yaml").model)
        model.save_pretrained(model_dir(args.config, args.dtype), dtype=dtype)
    elif args.child is not None:
        keys = {key: getattr(args, key) for key in Job.__dataclass_fields__ if getattr(args, key) is not None}
        print(json.dumps(measure(Job(**keys), args.child, args.repeats)))
    else:
        benchmark(select(args), args)


if __name__ == "__main__":
    main()
