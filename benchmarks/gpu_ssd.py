"""The scan on a CUDA device beside mamba-ssm's Triton kernels, forward and backward, in one run, as ratios.

    pip install --no-deps MAMBA_SSM_WHEEL              # MAMBA_SKIP_CUDA_BUILD=TRUE pip wheel --no-deps mamba-ssm
    python benchmarks/gpu_ssd.py                       # Super's and Nano's heads, 8K and 64K tokens
    python benchmarks/gpu_ssd.py --tokens 8192 --rounds 3 --out before.json

Ours and the peer's alternate within a round; each figure is the median over a round's repeats, and the speedup the
median over rounds of the ratio within a round. The peer runs with chunks of 128 and of 256 tokens, and the faster one
counts. Every row also has the floor: the bytes of the inputs, outputs and gradients at the device's bandwidth, and the
products of the chunked form at its matrix units' rate. Errors are against our scan in float64 on fewer tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"super": (128, 64, 8, 128), "nano": (64, 64, 8, 128)}  # heads, head size, groups, state size
NAMES = ("x", "dt", "A", "B", "C", "D")


def peer():
    """mamba-ssm's scan, without what its package imports first; or why there is none."""
    try:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            return "mamba-ssm is not installed"
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = package
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as e:
        return f"mamba-ssm cannot be imported: {e}"
    return mamba_chunk_scan_combined


def inputs(shape, tokens: int, dtype=torch.bfloat16):
    H, P, G, N = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    tensors = {
        "x": normal(1, tokens, H, P).to(dtype),
        "dt": torch.nn.functional.softplus(normal(1, tokens, H) - 3.0),
        "A": -torch.rand(H, generator=generator, device="cuda") * 15 - 1,
        "B": normal(1, tokens, G, N).to(dtype),
        "C": normal(1, tokens, G, N).to(dtype),
        "D": normal(H),
    }
    return {n: t.requires_grad_() for n, t in tensors.items()}, normal(1, tokens, H, P).to(dtype)


def floor(shape, tokens: int, chunk: int, bandwidth: float, rate: float) -> dict:
    """Bytes that forward and backward cannot but move, products that the chunked form makes, and milliseconds of each.

    Forward: scores of the lower triangle per group, and per head their product with x, the state's contribution and the
    chunk's to the state. Backward: twice that.
    """
    H, P, G, N = shape
    x, bc, dt = tokens * H * P * 2, tokens * G * N * 2, tokens * H * 4
    forward_bytes = 2 * x + 2 * bc + dt
    backward_bytes = 3 * x + 4 * bc + 2 * dt
    forward = tokens * (2 * G * N * chunk / 2 + H * (2 * P * chunk / 2 + 4 * P * N))
    milliseconds = [
        round(1e3 * max(moved / bandwidth, flops / rate), 4)
        for moved, flops in ((forward_bytes, forward), (backward_bytes, 2 * forward))
    ]
    return {
        "forward_bytes": forward_bytes, "backward_bytes": backward_bytes, "forward_flops": forward,
        "backward_flops": 2 * forward, "forward_ms": milliseconds[0], "backward_ms": milliseconds[1],
    }  # fmt: skip


def timed(work, repeats: int) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure(scan, tensors, dy, repeats: int) -> dict:
    """Milliseconds of the forward and of the backward pass, and the memory they take at most beyond the inputs."""
    leaves = [tensors[n] for n in NAMES]
    y = scan(*leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward = timed(lambda: scan(*leaves), repeats)
    backward = timed(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), repeats)
    return {
        "forward_ms": round(forward, 4), "backward_ms": round(backward, 4), "ms": round(forward + backward, 4),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }  # fmt: skip


def errors(scan, shape) -> dict:
    """Largest differences from float64, relative to the largest value, for 1000 tokens."""
    from nemo_lite_kernels.ssd import ssd_chunked

    tensors, dy = inputs(shape, 1000)
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    y_ref = ssd_chunked(*(exact[n] for n in NAMES), chunk_size=64)[0]
    grads_ref = torch.autograd.grad(y_ref, list(exact.values()), dy.double())
    y = scan(*(tensors[n] for n in NAMES))
    grads = torch.autograd.grad(y, [tensors[n] for n in NAMES], dy)
    pairs = zip(("y", *NAMES), (y, *grads), (y_ref, *grads_ref))
    return {n: float(f"{(a.double() - b).abs().max() / b.abs().max():.3g}") for n, a, b in pairs}


def machine() -> dict:
    def output(*words: str) -> str:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    import triton

    dirty = output("git", "status", "--porcelain", "--", "nemo_lite", "kernels", "serving", "benchmarks/*.py")
    return {
        "device": torch.cuda.get_device_name(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": triton.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD"), "dirty": bool(dirty),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="runs in a round")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second (default: the H200's)")
    parser.add_argument("--rate", type=float, default=989e12, help="bf16 operations a second (default: the H200's)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_ssd.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_ssd.py needs a CUDA device, and there is none")
    from nemo_lite_kernels.triton.ssd import CHUNK, ssd

    other = peer()
    scans = {"nemo_lite": lambda *t: ssd(*t)[0]}
    if callable(other):
        for chunk in (128, 256):
            scans[f"mamba_ssm_{chunk}"] = lambda x, dt, A, B, C, D, chunk=chunk: other(x, dt, A, B, C, chunk, D=D)
    else:
        print(other)
    rows = []
    for name in args.shapes:
        shape = SHAPES[name]
        wrong = {n: errors(scan, shape) for n, scan in scans.items()}
        for tokens in args.tokens:
            tensors, dy = inputs(shape, tokens)
            for scan in scans.values():  # compiles and tunes
                measure(scan, tensors, dy, 2)
            rounds = [
                {n: measure(scan, tensors, dy, args.repeats) for n, scan in scans.items()} for _ in range(args.rounds)
            ]
            best = {n: min((r[n] for r in rounds), key=lambda row: row["ms"]) for n in scans}
            row = {
                "shape": name, "tokens": tokens, "sizes": dict(zip("HPGN", shape)), "errors": wrong, "best": best,
                "floor": floor(shape, tokens, CHUNK, args.bandwidth, args.rate),
            }  # fmt: skip
            peers = [n for n in scans if n != "nemo_lite"]
            if peers:
                ratios = [min(r[n]["ms"] for n in peers) / r["nemo_lite"]["ms"] for r in rounds]
                row |= {
                    "speedup": round(statistics.median(ratios), 3),
                    "speedup_by_round": [round(r, 3) for r in ratios],
                }
            rows.append(row)
            print(
                f"{name} {tokens}: "
                + ", ".join(f"{n} {b['forward_ms']}+{b['backward_ms']} ms" for n, b in best.items())
            )
    command = " ".join(["python", "benchmarks/gpu_ssd.py", *sys.argv[1:]])
    args.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
