"""Decoding on a GPU: a step of all layers captured in a CUDA graph, beside the time its bytes need.

    python benchmarks/gpu_decode.py                                        # Nano's shapes, some batches and contexts
    python benchmarks/gpu_decode.py --config nemotron3_nano --batch 1 --context 131072
    python benchmarks/gpu_decode.py --kernels experts=triton,norm=lean     # other backends; auto where not named

Random bfloat16 weights in the recipe's shapes; every row continues a context of random keys, values and states. A step
embeds the rows' tokens, runs all layers and the head, takes the likeliest token and writes it, keys, values, windows
and states where the next step finds them: positions are on the device too, and a step is the graph replayed. The floor
is what a step must read and write (weights, of the experts those that are hit, counted; keys and values of the context;
states and windows twice) over the bandwidth measured on this device just before. Sampling, scheduling and the server
are not in it.

Writes benchmarks/results/gpu_decode.json with machine, commit, command and floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "pretrain"
PLACES = 16  # of a block of keys and values


# ------------------------------------------------------------------------------------------- shared with gpu_train.py


def machine() -> dict:
    """Where this ran, at which commit, with which versions."""
    import platform

    import torch

    def words(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    device = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,power.limit"
    return {
        "gpu": device.name, "gpu_memory_gb": round(device.total_memory / 1e9, 1),
        "processors": device.multi_processor_count, "capability": f"{device.major}.{device.minor}",
        "driver, clock, power": words("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version,
        "commit": words("git", "rev-parse", "--short", "HEAD"),
        "dirty": bool(words("git", "status", "--porcelain", "--", "nemo_lite", "kernels", "benchmarks/*.py")),
    }  # fmt: skip


def seconds_of(work, repeats: int) -> float:
    """Device seconds of one call of `work`, over `repeats` calls in a row."""
    import torch

    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    for _ in range(repeats):
        work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / repeats


def kernels_of(text: str) -> dict[str, str]:
    """ "op=backend,.." as a table."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and torch finds none")


def write(path: Path, rows: list[dict], **facts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": machine(), **facts, "rows": rows}, indent=1) + "\n")
    print(f"{path}", flush=True)


# --------------------------------------------------------------------------------------------------------- the decoding


def bandwidth(gib: int = 4) -> float:
    """Bytes per second of device memory: the best of copying (read and write) and of adding up (read)."""
    import torch

    source = torch.ones(gib << 28, device="cuda")
    target = torch.empty_like(source)
    size = source.numel() * 4
    best = 0.0
    for _ in range(5):
        best = max(best, 2 * size / seconds_of(lambda: target.copy_(source), 3), size / seconds_of(source.sum, 3))
    return best


def build(config, device, kernels: dict[str, str], dtype):
    """The recipe's model with random weights, made on the device."""
    import torch

    from nemo_lite import HybridLM
    from nemo_lite.model.hf import materialise
    from nemo_lite.parallel.layers import Layers

    model = HybridLM(config, device="meta", layers=Layers(device, kernels))
    materialise(model, dtype, device)
    model.dtype = dtype
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 2)
            if leaf[-1] == "A_log":
                parameter.uniform_(1, 16, generator=generator).log_()
            elif leaf[-1] == "dt_bias":  # inverse softplus of 0.001 to 0.1
                parameter.uniform_(1e-3, 1e-1, generator=generator).expm1_().log_()
            elif leaf[-1] == "D" or "norm" in leaf[-2]:
                parameter.fill_(1.0)
            elif leaf[-2] == "conv1d":
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model.eval()


class Rows:
    """The cache of a fixed number of rows at fixed addresses: what a graph can hold. One row, one run of blocks.

    starts_B is how many places each row has; it is read and moved on by the device alone.
    """

    def __init__(self, config, batch: int, context: int, steps: int, device, dtype):
        import torch

        from nemo_lite.model.context import Context

        n = -(-(context + steps) // PLACES)
        self.context, self.steps = context, steps
        self.starts_B = torch.full((batch,), context, device=device)
        self.table_BN = torch.randperm(batch * n, device=device).view(batch, n)
        self.places_B = torch.empty_like(self.starts_B)
        channels = config.mamba_inner + 2 * config.mamba_groups_state
        state = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        keys = (batch * n, PLACES, config.num_key_value_heads, config.head_dim)

        def noise(*shape, dtype=dtype, scale=1.0):
            return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, scale)

        self.states = [
            Mamba(noise(batch, config.conv_kernel - 1, channels), noise(batch, *state, dtype=torch.float32, scale=0.1))
            if letter == "M"
            else Keys(self, noise(*keys), noise(*keys))
            if letter == "*"
            else None
            for letter in config.layers
        ]
        # The host's counts are for the context's shape only: nothing captured reads them.
        self.ctx = Context(batch, 1, stream=self, starts=[context] * batch, counts=[1] * batch)  # type: ignore[arg-type]

    def begin(self) -> None:
        """Where this step's keys and values go."""
        block_B = self.table_BN.gather(1, (self.starts_B // PLACES)[:, None])[:, 0]
        self.places_B.copy_(block_B * PLACES + self.starts_B % PLACES)

    def saved(self) -> list:
        return [t.clone() for state in self.states if isinstance(state, Mamba) for t in (state.window, state.state)]

    def restore(self, saved: list) -> None:
        tensors = [t for state in self.states if isinstance(state, Mamba) for t in (state.window, state.state)]
        for tensor, value in zip(tensors, saved):
            tensor.copy_(value)
        self.starts_B.fill_(self.context)

    def bytes(self) -> dict[str, int]:
        """What a step reads of keys and values, and reads and writes of states."""
        size = {"keys and values": 0, "states": 0}
        for state in self.states:
            if isinstance(state, Keys):
                one = state.k[0, 0].numel() * state.k.element_size()
                size["keys and values"] += 2 * one * len(self.starts_B) * (self.context + self.steps // 2)
            elif isinstance(state, Mamba):
                size["states"] += 2 * sum(t.numel() * t.element_size() for t in (state.window, state.state))
        return size


class Mamba:
    """Window and state of a Mamba layer, written in place."""

    def __init__(self, window, state):
        self.window, self.state = window, state

    def advance(self, x_BLC, state, ctx) -> None:
        import torch

        self.window.copy_(torch.cat([self.window[:, 1:], x_BLC], 1))
        self.state.copy_(state)


class Keys:
    """Keys and values of an attention layer, in blocks."""

    def __init__(self, rows: Rows, k, v):
        self.rows, self.k, self.v = rows, k, v

    def attend(self, q_BLAD, k_BLKD, v_BLKD, ctx, ops):
        from nemo_lite_kernels.triton.attention import attention_paged

        for pool, new in ((self.k, k_BLKD), (self.v, v_BLKD)):
            pool.flatten(0, 1).index_copy_(0, self.rows.places_B, new[:, 0])
        return attention_paged(q_BLAD, self.k, self.v, self.rows.table_BN, self.rows.starts_B)


def stepper(model, rows: Rows, ids_B):
    """One step of all rows, without a word to the host."""

    def step() -> None:
        rows.begin()
        ids_B.copy_(model.head(model.trunk(ids_B, rows.ctx)).argmax(-1))
        rows.starts_B.add_(1)

    return step


def weight_bytes(model, step) -> dict[str, float]:
    """What one step reads of weights; of experts those that it hits."""
    hit: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def count(_module, args, name=name):
                hit[name] = int(args[1].unique().numel())

            hooks.append(module.register_forward_pre_hook(count))
    step()
    for hook in hooks:
        hook.remove()
    size = {"experts": 0.0, "other weights": 0.0}
    for name, parameter in model.named_parameters():
        if name.startswith("mtp.") or (name.startswith("embedding.") and parameter is not model.head.weight):
            continue
        layer, _, _ = name.rpartition(".")
        nbytes = parameter.numel() * parameter.element_size()
        if layer in hit:
            size["experts"] += nbytes * hit[layer] / parameter.shape[0]
        else:
            size["other weights"] += nbytes
    return size


def measure(model, batch: int, context: int, args, speed: float) -> dict:
    import torch

    # One of the steps is for counting the experts, one for tuning kernels, some for comparing.
    steps, compared = args.steps, 8
    rows = Rows(model.config, batch, context, steps, model.device, model.dtype)
    first = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)
    ids_B = first.clone()
    step, saved = stepper(model, rows, ids_B), rows.saved()

    def again() -> None:
        rows.restore(saved)
        ids_B.copy_(first)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiling, tuning, allocating
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    weights = weight_bytes(model, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def tokens(run) -> list:
        again()
        found = []
        for _ in range(min(compared, steps)):
            run()
            found.append(ids_B.tolist())
        return found

    same = tokens(step) == tokens(graph.replay)
    timed: dict[str, list[float]] = {"graph": [], "launched": []}
    for _ in range(args.rounds):
        for name, run in (("graph", graph.replay), ("launched", step)):
            again()
            timed[name].append(seconds_of(run, steps))
    parts = weights | rows.bytes()
    median = {name: statistics.median(values) for name, values in timed.items()}
    floor = sum(parts.values()) / speed
    return {
        "batch": batch, "context": context, "steps": steps,
        "graph_ms": round(1e3 * median["graph"], 4), "graph_ms_by_round": [round(1e3 * s, 4) for s in timed["graph"]],
        "launched_ms": round(1e3 * median["launched"], 4), "floor_ms": round(1e3 * floor, 4),
        "share_of_bandwidth": round(floor / median["graph"], 3),
        "tokens_per_second": round(batch / median["graph"], 1),
        "gigabytes": {name: round(value / 1e9, 4) for name, value in parts.items()}, "same_tokens_as_launched": same,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nemotron3_nano", help="recipe in recipes/pretrain (default: its 31.6 B)")
    parser.add_argument("--layers", type=int, help="only the first so many layers (for models that do not fit)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--kernels", default="", help="op=backend,... (default: auto)")
    parser.add_argument("--steps", type=int, default=64, help="steps timed at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_decode.json")
    args = parser.parse_args()
    need_cuda()

    import torch

    from nemo_lite import load_recipe

    config = load_recipe(RECIPES / f"{args.config}.yaml").model
    config.mtp.pattern = ""
    if args.layers:
        config.pattern = config.layers[: args.layers]
    with torch.no_grad():
        speed = bandwidth()
        print(f"{speed / 1e9:.0f} GB/s", flush=True)
        start = time.perf_counter()
        model = build(config, torch.device("cuda"), kernels_of(args.kernels), torch.bfloat16)
        chosen = {choice["op"]: choice["backend"] for choice in model.kernel_choices}
        print(f"built in {time.perf_counter() - start:.0f} s; {chosen}", flush=True)
        if "E" in config.layers and chosen["experts"] != "triton":
            sys.exit(f"experts={chosen['experts']} waits for the host, which a graph cannot; it takes experts=triton")
        found = []
        for context in args.context:
            for batch in args.batch:
                try:
                    row = measure(model, batch, context, args, speed)
                except torch.cuda.OutOfMemoryError:
                    row = {"batch": batch, "context": context, "error": "does not fit"}
                print(json.dumps(row), flush=True)
                found.append(row)
                torch.cuda.empty_cache()
    write(
        args.out, found, config=args.config, layers=config.layers, kernels=chosen,
        floor="bytes a step must move over the measured bandwidth", bandwidth_gb_per_second=round(speed / 1e9, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
