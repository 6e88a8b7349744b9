"""Training, prefill and decode beside transformers' NemotronH on the same shapes, in one run, as ratios.

    python benchmarks/peers.py train  --config bench_small --dtype fp32 --threads 2
    python benchmarks/peers.py decode --config bench_small --dtype bf16 --threads 2 --rounds 5
    python benchmarks/peers.py all                        # everything docs/results.md shows

Each measurement is a process of its own; ours and the peer's alternate, so that a noisy machine hits both. A round in
which other processes took more than 5 % of the CPU is measured again (and kept, marked, if the machine stays busy).
Weights are random, tokens too. Results go to benchmarks/results as JSON with machine, commit and command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "pretrain"
IMPLEMENTATIONS = ("nemo_lite", "transformers")
BUSY = 0.05


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


def peer_model(config):
    """transformers' model of the same shape."""
    import transformers
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from nemo_lite.model.hf import config_to_hf

    transformers.logging.set_verbosity_error()
    raw = config_to_hf(config, "float32")
    raw.pop("num_hidden_layers"), raw.pop("architectures"), raw.pop("dtype")
    return NemotronHForCausalLM(
        NemotronHConfig(**raw | {"num_nextn_predict_layers": 0, "time_step_limit": [0.0, 1e30]})
    )


def measure(args) -> dict:
    """One run of one implementation: tokens per second of the best steps, and peak memory."""
    import torch

    from nemo_lite import HybridLM, load_recipe

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recipe = load_recipe(RECIPES / f"{args.config}.yaml")
    config, ours, bf16 = recipe.model, args.implementation == "nemo_lite", args.dtype == "bf16"
    batch, length = args.batch, args.length
    ids = torch.randint(0, config.vocab_size, (batch, length))
    model = HybridLM(config) if ours else peer_model(config)

    if args.work == "train":
        from nemo_lite.data import Batch
        from nemo_lite.parallel.native import World, keep_freed_memory
        from nemo_lite.train.loop import train_step
        from nemo_lite.train.optim import build_optimizer

        model.train()
        if ours:
            model.dtype = torch.bfloat16 if bf16 else torch.float32
            keep_freed_memory()  # as a run does when it starts
            optimizer = build_optimizer(model, recipe.optim)
            world, recipe.train.global_batch_size = World(0, 1, torch.device("cpu")), batch
            doc_ids = torch.zeros_like(ids)
            micros = [Batch(ids, doc_ids, ids, doc_ids[:, 0].bool(), list(range(batch)))]

            def step():
                train_step(model, optimizer, micros, 1e-4, recipe, world)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

            def step():
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        units, repeats = batch * length, args.repeats or 4
    else:
        model = model.eval()
        if bf16:
            if ours:  # norms, routers, A_log, D, dt_bias stay in float32
                from nemo_lite.model.hf import FLOAT32

                for name, parameter in model.named_parameters():
                    if not FLOAT32.search(name):
                        parameter.data = parameter.data.bfloat16()
            else:
                model = model.bfloat16()
        if args.work == "prefill":

            @torch.inference_mode()
            def step():
                if ours:
                    out = model(ids, cache=model.new_cache(batch))
                    model.head(out.hidden[:, -1])
                else:
                    model(input_ids=ids, use_cache=True, logits_to_keep=1)

            units, repeats = batch * length, args.repeats or 5
        else:
            new = args.new_tokens
            if ours:
                from nemo_lite.generate import generate

                def step():
                    return generate(model, ids, max_tokens=new + 1).stats.decode_seconds
            else:
                from transformers import DynamicCache

                @torch.inference_mode()
                def step():
                    cache = DynamicCache(config=model.config)
                    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    start = time.perf_counter()
                    for _ in range(new):
                        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                        token = out.logits[:, -1].argmax(-1, keepdim=True)
                    return time.perf_counter() - start

            units, repeats = batch * new, args.repeats or 4
    step()  # allocations, thread pools
    seconds = []
    with OtherCPU() as others:
        for _ in range(repeats):
            start = time.perf_counter()
            inner = step()
            seconds.append(inner or time.perf_counter() - start)
    return {
        "tokens_per_second": units / statistics.median(seconds),
        "best": units / min(seconds),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "other_cpu": others.share,
    }


# --------------------------------------------------------------------------------------------- comparing, in the parent


def child(args, implementation: str) -> dict:
    command = [
        sys.executable, __file__, args.work, "--config", args.config, "--dtype", args.dtype,
        "--threads", str(args.threads), "--batch", str(args.batch), "--length", str(args.length),
        "--new-tokens", str(args.new_tokens), "--implementation", implementation,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{implementation} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args) -> dict:
    """Alternate the implementations for some rounds; medians, ratios, and how noisy it was."""
    runs: dict[str, list[dict]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(args.rounds):
        for name in IMPLEMENTATIONS:
            for _attempt in range(4):
                result = child(args, name)
                if result["other_cpu"] <= BUSY:
                    break
            runs[name].append(result)
    summary = {
        name: {
            "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in results), 1),
            "best": round(max(r["best"] for r in results), 1),
            "peak_mb": round(statistics.median(r["peak_mb"] for r in results)),
            "other_cpu": [r["other_cpu"] for r in results],
        }
        for name, results in runs.items()
    }
    ours, peer = summary["nemo_lite"], summary["transformers"]
    pairs = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*runs.values())]
    work = {key: getattr(args, key) for key in ("work", "config", "dtype", "threads", "batch", "length")} | (
        {"new_tokens": args.new_tokens} if args.work == "decode" else {}
    )
    return (
        work
        | summary
        | {
            "speedup": round(statistics.median(pairs), 3),
            "speedup_by_round": [round(pair, 3) for pair in pairs],
            "memory_ratio": round(ours["peak_mb"] / peer["peak_mb"], 3),
            "noisy": any(share > BUSY for part in (ours, peer) for share in part["other_cpu"]),
        }
    )


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


SHAPES = {"train": (4, 512), "prefill": (1, 512), "decode": (1, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "prefill", "decode", "all"])
    parser.add_argument("--config", default="bench_small", help="recipe in recipes/pretrain (default: bench_small)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 training: float32 weights, bf16 products"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="rows (default: 4 for training, else 1)")
    parser.add_argument("--length", type=int, help="tokens a row (default: 512; decode: 64 of prompt)")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, help="steps in one measurement")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/peers_WORK...json)")
    args = parser.parse_args()
    works = ["train", "prefill", "decode"] if args.work == "all" else [args.work]
    jobs = []
    for work in works:
        combinations = [(args.dtype, args.threads)]
        if args.work == "all":
            combinations = [(dtype, threads) for threads in (2, 1) for dtype in ("fp32", "bf16")]
        for dtype, threads in combinations:
            job = argparse.Namespace(**vars(args))
            job.work, job.dtype, job.threads = work, dtype, threads
            job.batch, job.length = args.batch or SHAPES[work][0], args.length or SHAPES[work][1]
            jobs.append(job)
    if args.implementation:
        print(json.dumps(measure(jobs[0])))
        return
    rows = []
    for job in jobs:
        row = compare(job)
        rows.append(row)
        print(
            f"{row['work']:8} {row['dtype']} {row['threads']} threads: "
            f"{row['nemo_lite']['tokens_per_second']:8.1f} tok/s, "
            f"transformers {row['transformers']['tokens_per_second']:8.1f}: {row['speedup']:.2f}x, "
            f"memory {row['memory_ratio']:.2f}x{'  (noisy)' if row['noisy'] else ''}",
            flush=True,
        )
    command = "python benchmarks/peers.py " + " ".join(sys.argv[1:])
    out = args.out or ROOT / "benchmarks" / "results" / f"peers_{args.work}_{args.config}.json"
    out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
