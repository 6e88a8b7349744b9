"""Training on a GPU: steps of a hybrid of about a billion parameters, and their share of the measured GEMM peak.

    python benchmarks/gpu_train.py
    python benchmarks/gpu_train.py --set train.micro_batch_size=8 --set train.recompute=full
    python benchmarks/gpu_train.py --kernels experts=triton,ssd=chunked --profile profile.txt

A step is the training loop's own: forward, backward, gradient norm, AdamW over float32 weights, router biases. Tokens
are random, rows are one document each. MFU is the step's useful FLOPs (`nemo-lite check` counts them: three times the
forward, recomputation not counted) over its time, as a share of what bfloat16 GEMMs of 8192 reach on this device just
before (`mfu`) and of the datasheet's dense figure (`mfu_of_datasheet`). The floor of a step is these FLOPs at that
peak, plus the bytes that the optimizer must move at the bandwidth measured.

Writes benchmarks/results/gpu_train.json with machine, commit, command and floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from gpu_decode import ROOT, bandwidth, kernels_of, need_cuda, seconds_of, write

RECIPE = {  # 1.2 B parameters, 0.6 B of them active
    "model": {
        "pattern": "MEMEM*EMEMEM*EMEMEM*EME", "vocab_size": 32768, "hidden_size": 2048, "initializer_range": 0.02,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
        "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
        "chunk_size": 128, "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_latent_size": 512,
        "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 2048, "routed_scaling_factor": 2.5,
        "mtp": {"pattern": ""},
    },
    "data": {"tokenizer": "bytes", "seq_len": 4096},
    "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 4, "dtype": "bfloat16", "loss_chunk": 4096},
}  # fmt: skip


def recipe_of(overrides: list[str]):
    import yaml

    from nemo_lite import load_recipe

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(RECIPE, file)
        file.flush()
        return load_recipe(file.name, overrides)


def gemm_peak(size: int = 8192, seconds: float = 2.0) -> float:
    """FLOP/s of the fastest of many square bfloat16 products."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, best, ends = torch.empty_like(a), 0.0, time.perf_counter() + seconds
    seconds_of(lambda: torch.mm(a, b, out=out), 3)
    while time.perf_counter() < ends:
        best = max(best, 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), 5))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--kernels", default="", help="op=backend,... (default: auto)")
    parser.add_argument("--steps", type=int, default=10, help="steps timed (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, which compile and tune (default: 3)")
    parser.add_argument("--profile", type=Path, help="write the time of one step by kernel there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_train.json")
    args = parser.parse_args()
    need_cuda()

    import torch

    from nemo_lite.check import flops_per_token, parameter_counts
    from nemo_lite.data import Batch
    from nemo_lite.parallel.native import World
    from nemo_lite.train.loop import build_model, train_step
    from nemo_lite.train.metrics import peak_flops
    from nemo_lite.train.optim import build_optimizer

    recipe = recipe_of([*args.set, *(f"kernels.{op}={name}" for op, name in kernels_of(args.kernels).items())])
    rows, length, micro = recipe.train.global_batch_size, recipe.data.seq_len, recipe.train.micro_batch_size
    peak, speed = gemm_peak(), bandwidth()
    print(f"{peak / 1e12:.0f} TFLOP/s, {speed / 1e9:.0f} GB/s", flush=True)
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    world = World(0, 1, torch.device("cuda"))
    model = build_model(recipe, world).train()
    optimizer = build_optimizer(model, recipe.optim)
    ids = torch.randint(0, recipe.model.vocab_size, (rows, length), device="cuda")
    documents = torch.zeros_like(ids)
    batch = Batch(ids, documents, ids, documents[:, 0].bool(), list(range(rows)))
    micros = list(batch.split(micro))
    chosen = {choice["op"]: choice["backend"] for choice in model.kernel_choices}
    counts, flops = parameter_counts(recipe.model), flops_per_token(recipe.model, length)
    print(f"{counts['total'] / 1e9:.2f} B parameters, {counts['active'] / 1e9:.2f} B active; {chosen}", flush=True)

    def step():
        return train_step(model, optimizer, micros, 1e-4, recipe, world)

    for _ in range(args.warmup):
        result = step()
        print(f"loss {result.loss:.4f}", flush=True)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = step()  # it waits for the device: the loss is read
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if args.profile:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=80)
        args.profile.write_text(table)
    median, tokens = statistics.median(seconds), rows * length
    useful = flops["train"] * tokens
    datasheet, source = peak_flops("cuda", torch.bfloat16)
    # AdamW reads weight, gradient and two moments and writes all but the gradient, in float32.
    moved = 7 * 4 * counts["total_with_mtp"]
    floor = useful / peak + moved / speed
    row = {
        "rows": rows, "length": length, "micro_batch": micro, "seconds": round(median, 4),
        "seconds_by_step": [round(s, 4) for s in seconds], "tokens_per_second": round(tokens / median),
        "teraflops": round(useful / median / 1e12, 1), "mfu": round(useful / median / peak, 4),
        "mfu_of_datasheet": round(useful / median / datasheet, 4) if datasheet else None,
        "floor_seconds": round(floor, 4), "share_of_floor": round(floor / median, 4),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2), "loss": round(result.loss, 4),
        "finite": result.finite,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    write(
        args.out, [row], recipe=RECIPE, overrides=args.set, kernels=chosen,
        parameters={name: counts[name] for name in ("total", "active")}, flops_per_token=flops,
        floor="useful FLOPs at the measured GEMM peak, and AdamW's bytes at the measured bandwidth",
        gemm_peak_teraflops=round(peak / 1e12, 1), datasheet=source, bandwidth_gb_per_second=round(speed / 1e9, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
