"""What layouts of the megatron engine cost on this machine's processes: a step's time, memory, bytes sent.

    python benchmarks/megatron.py        # five minutes; benchmarks/results/megatron.json, shown in docs/results.md

More processes than cores are no faster, and these are no measurements of a cluster: they say what the engine and its
collectives cost where nothing is gained by them. Bytes are the planner's, which tests hold against what is sent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import ROOT, machine

from nemo_lite.config import load_recipe
from nemo_lite.parallel.layout import layout_of
from nemo_lite.plan import GPUS, estimate

RESULT = ROOT / "benchmarks" / "results" / "megatron.json"
RECIPE = "recipes/pretrain/bench_small.yaml"
COMMON = ["train.steps=6", "train.micro_batch_size=1", "log.every=1", "checkpoint.every=0"]
# Processes and what is set; the first two are the native engine's.
CASES: tuple[tuple[int, dict[str, str | int]], ...] = (
    (1, {"engine": "native"}),
    (2, {"engine": "native"}),
    (1, {}),
    (2, {}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"ep": 2}),
    (2, {"cp": 2}),
    (4, {"tp": 2, "pp": 2, "ep": 2}),
)


def measure(ranks: int, parallel: dict[str, str | int]) -> dict:
    """Median of the steps after the first."""
    parallel = {"engine": "megatron", **parallel}
    overrides = [*COMMON, *(f"parallel.{key}={value}" for key, value in parallel.items())]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m",
                   "nemo_lite.train", RECIPE, f"run_dir={folder}", *overrides]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "2" if ranks == 1 else "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    recipe = load_recipe(ROOT / RECIPE, overrides)
    tokens = recipe.tokens_per_step
    seconds = sorted(tokens / record["tokens_per_second"] for record in records if record["step"] > 1)
    sent = {}
    if parallel["engine"] == "megatron":
        # Planned in bf16; this run is in float32, as Megatron-core's products in bf16 take minutes on many CPUs.
        sent = {kind: 2 * size for kind, size in estimate(recipe, layout_of(recipe), ranks, GPUS["H100"]).sent.items()}
    return {
        "ranks": ranks, "parallel": parallel, "seconds": seconds[len(seconds) // 2],
        "memory_gb": records[-1]["memory_gb"], "loss": records[-1]["loss"], "sent": sent,
    }  # fmt: skip


def main() -> None:
    rows = []
    for ranks, parallel in CASES:
        rows.append(measure(ranks, parallel))
        row = rows[-1]
        print(ranks, row["parallel"], f"{row['seconds']:.2f} s, {row['memory_gb']:.2f} GB", flush=True)
    body = {"command": "python benchmarks/megatron.py", "machine": machine(), "recipe": RECIPE, "rows": rows}
    RESULT.write_text(json.dumps(body, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
