"""How far `nemo-lite plan` is from published training runs: benchmarks/results/plan.json. Nothing is measured here.

    python benchmarks/plan.py      # fit the efficiencies, predict every run; some minutes, no GPU

The runs are those of Megatron Bridge's documentation and recipes (commit 067f987), for Nemotron 3 Super, Nano, and
Nemotron 3.5 Lightning (Nano with an MTP block). Each is predicted by efficiencies fitted to all runs, which
nemo_lite/plan.py has; to all but this run; to all but this model's on this system; and to the five runs marked
``anchor``: MXFP8 of both models on the largest system, a Hopper run, EP across nodes, a BF16 run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lite.check import flops_per_token
from nemo_lite.config import ModelConfig, Recipe, load_recipe
from nemo_lite.parallel.layout import Layout
from nemo_lite.plan import EFFICIENCY, GPUS, Efficiency, Estimate, _Model, _Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "plan.json"
RECIPES = {"Super": "nemotron3_super.yaml", "Nano": "nemotron3_nano.yaml", "Lightning": "nemotron3_nano.yaml"}
MOST = {"products": 0.8}
MTP = ("model.mtp.pattern=*E", "model.mtp.depth=2")


@dataclass(frozen=True)
class Run:
    """One published run: tokens/s of one GPU, rows in a step and in a micro batch."""

    model: str
    gpu: str
    gpus: int
    precision: str
    batch: int
    layout: Layout
    tokens: float
    source: str
    micro: int = 1
    seq_len: int = 8192
    recompute: str = "none"
    anchor: bool = False
    balanced: bool = True  # experts get equally many tokens, as the model takes it; others are not fitted to
    gib: float | None = None  # GiB allocated at most, where it is told for a run with all of the optimizer's state
    note: str = ""


TP2 = Layout(tp=2, ep=64, sp=True)
EP8, EP64 = Layout(ep=8), Layout(ep=64)
# Each system's newest figure. "26.xx": performance summary, container 26.xx; "card": model verification card.
RUNS = [
    Run("Super", "GB300", 64, "mxfp8", 512, EP64, 9856, "26.08", anchor=True),
    Run("Super", "GB300", 64, "nvfp4", 512, EP64, 10240, "26.08"),
    Run("Super", "GB200", 64, "mxfp8", 512, TP2, 7040, "26.08"),
    Run("Super", "GB200", 64, "nvfp4", 512, TP2, 7168, "26.08"),
    # The card's tokens/s is half of what its step time of 9.926 s and its TFLOP/s say.
    Run("Super", "GB200", 64, "bf16", 512, TP2, 512 * 8192 / 64 / 9.92635, "card", note="from the step time"),
    Run("Super", "B300", 64, "mxfp8", 512, EP8, 7867, "26.06"),
    Run("Super", "B300", 64, "nvfp4", 512, EP8, 8131, "26.06", note="recomputes activations and norms"),
    Run("Super", "B200", 64, "mxfp8", 512, EP64, 6400, "26.04.01", anchor=True, note="no CUDA graphs"),
    Run("Super", "B200", 64, "nvfp4", 512, TP2, 5632, "26.04.01"),
    Run("Super", "H100", 64, "bf16", 1280, Layout(pp=2, ep=32), 2969, "card", seq_len=4096, recompute="*E",
        note="recomputes all but Mamba"),
    Run("Nano", "GB300", 8, "mxfp8", 512, EP8, 39936, "26.08", micro=4, anchor=True),
    Run("Nano", "GB200", 8, "mxfp8", 512, EP8, 34816, "26.06.01", micro=2),
    Run("Nano", "B300", 8, "mxfp8", 512, EP8, 37316, "26.06", micro=4),
    Run("Nano", "B200", 8, "mxfp8", 512, EP8, 32768, "26.04.01", micro=2),
    Run("Nano", "H100", 16, "fp8", 1024, EP8, 14719, "26.06", anchor=True),
    Run("Lightning", "GB200", 8, "mxfp8", 512, EP8, 28672, "26.08", micro=2),
    Run("Lightning", "GB200", 8, "bf16", 512, EP8, 28750, "card", micro=2, anchor=True, gib=156.85),
    Run("Lightning", "H100", 16, "bf16", 512, EP8, 14195, "card", note="offloads activations"),
    Run("Lightning", "H100", 16, "bf16", 512, Layout(cp=2, ep=8), 7110, "card", recompute="E", balanced=False,
        note="real data, natural routing: experts that get more tokens than others, which is not modelled"),
]  # fmt: skip


def recipe(run: Run) -> Recipe:
    overrides = [
        f"train.global_batch_size={run.batch}", f"train.micro_batch_size={run.micro}", f"data.seq_len={run.seq_len}",
        f"train.recompute={run.recompute}", "precision.reduce_dtype=bfloat16",
    ]  # fmt: skip
    overrides += MTP if run.model == "Lightning" else ()
    if run.precision == "nvfp4":
        overrides.append("precision.preset=nemotron3_super_nvfp4")
    elif run.precision != "bf16":
        overrides.append(f"precision.preset={run.precision}")
        if run.model != "Nano":
            overrides.append("precision.rules=[{match: 'mtp.*', format: bf16}]")
    return load_recipe(ROOT / "recipes" / "pretrain" / RECIPES[run.model], overrides)


class Predictor:
    """Predicts runs. Their dispatcher sends a token to a rank or node once, ours sends a copy for each expert."""

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.shared = {run: _Recipe(recipe(run)) for run in runs}

    def __call__(self, run: Run, efficiency: Efficiency) -> Estimate:
        return _Model(self.shared[run], run.layout, run.gpus, GPUS[run.gpu], efficiency, once=True).estimate()

    def fit(self, runs: list[Run]) -> Efficiency:
        """The efficiencies with the least squared error of log tokens/s, by coordinate search on a grid of 0.005.

        Products are held to at most 0.8 of peak: the runs hardly tell products from memory, and no kernel reaches more.
        """

        def loss(found: dict[str, float]) -> float:
            efficiency = Efficiency(**found)
            return sum(math.log(self(run, efficiency).tokens_per_second / run.tokens) ** 2 for run in runs)

        best = {"products": 0.7, "memory": 0.4, "nvlink": 0.4, "network": 0.6}
        least, step = loss(best), 0.08
        while step >= 0.005:
            for name, by in [(name, by) for name in best for by in (step, -step)]:
                other = best | {name: round(min(MOST.get(name, 0.95), max(0.1, best[name] + by)), 3)}
                if (value := loss(other)) < least - 1e-9:
                    best, least = other, value
                    break
            else:
                step /= 2
        return Efficiency(**best)


def published_flops(config: ModelConfig, seq_len: int, width: int | None = None) -> int:
    """Training FLOPs of one token as Megatron Bridge counts them (training/utils/flop_utils.py, ``hybrid_flops``).

    Mamba-2's inner size is taken to be ``width``, twice the hidden size by default, and its scan 7 FLOPs for each of
    inner x state; attention is causal; router, convolution and MTP's projection are left out; MTP at every depth.
    """
    H, N = config.hidden_size, config.ssm_state_size
    width = width or 2 * H
    latent = 4 * H * config.moe_latent_size if config.moe_latent_size else 0
    each = {
        "M": 2 * H * (2 * width + 2 * config.mamba_groups_state + config.mamba_num_heads)
        + 7 * width * N
        + 2 * width * H,
        "*": 4 * H * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        + 2 * config.num_attention_heads * config.head_dim * seq_len,
        "E": 4 * config.expert_size * config.moe_intermediate_size * config.num_experts_per_tok
        + latent
        + 4 * H * config.moe_shared_expert_intermediate_size * config.n_shared_experts,
        "-": 4 * H * config.intermediate_size,
    }
    depth = config.mtp.depth if config.mtp_layers else 0
    letters = config.layers + config.mtp_layers * depth
    return 3 * (sum(each[kind] for kind in letters) + 2 * H * config.vocab_size * (1 + depth))


def conventions(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Training FLOPs of one token in G, counted in different ways."""
    ours = flops_per_token(config, seq_len)
    letters = config.layers + config.mtp_layers * config.mtp.depth
    attention = 3 * letters.count("*") * 2 * config.num_attention_heads * config.head_dim * seq_len
    P, N, heads, c = config.mamba_head_dim, config.ssm_state_size, config.mamba_num_heads, config.chunk_size
    scan = 3 * letters.count("M") * (2 * config.n_groups * c * N + 2 * heads * c * P + 4 * heads * P * N)
    one = ours["mtp"] / config.mtp.depth
    found = {
        "published: causal attention, every MTP depth, scan, Mamba-2 twice as wide as the model": published_flops(
            config, seq_len
        ),
        "the same with Mamba-2's true width": published_flops(config, seq_len, config.mamba_inner),
        "nemo-lite check: causal attention, every MTP depth, scan": ours["train"],
        "the same, whole attention matrix": ours["train"] + attention,
        "the same, without the scan": ours["train"] - scan,
        "the same, one MTP depth": 3 * (ours["forward"] + one),
        "the same, no MTP": 3 * ours["forward"],
    }
    return {name: value / 1e9 for name, value in found.items()}


def main() -> None:
    predict, fitted = Predictor(RUNS), [run for run in RUNS if run.balanced]
    everything, anchors = predict.fit(fitted), predict.fit([run for run in fitted if run.anchor])
    rows: list[dict[str, Any]] = []
    for run in RUNS:
        others = predict.fit([other for other in fitted if other is not run])
        elsewhere = predict.fit([other for other in fitted if (other.model, other.gpu) != (run.model, run.gpu)])
        ways = {"fitted": everything, "left_out": others, "elsewhere": elsewhere, "anchors": anchors}
        guessed = {name: predict(run, efficiency).tokens_per_second for name, efficiency in ways.items()}
        errors = {name: round(value / run.tokens - 1, 4) for name, value in guessed.items()}
        memory = predict(run, everything).total_memory / 2**30
        more = {"predicted": round(guessed["fitted"]), "error": errors, "predicted_gib": round(memory, 1)}
        rows.append(dataclasses.asdict(run) | more)
        print(
            run.model,
            run.gpu,
            run.precision,
            round(run.tokens),
            {k: f"{v:+.0%}" for k, v in errors.items()},
            flush=True,
        )
    models = {
        "Super": load_recipe(ROOT / "recipes" / "pretrain" / RECIPES["Super"]).model,
        "Nano": load_recipe(ROOT / "recipes" / "pretrain" / RECIPES["Nano"]).model,
    }
    flops = {name: conventions(model, 8192) for name, model in models.items()}
    body = {
        "command": "python benchmarks/plan.py",
        "efficiency": dataclasses.asdict(everything),
        "anchors": dataclasses.asdict(anchors),
        "rows": rows,
        "flops": flops,
    }
    RESULT.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if everything != EFFICIENCY:
        print(f"nemo_lite/plan.py has other efficiencies; it should have {everything}")


if __name__ == "__main__":
    main()
