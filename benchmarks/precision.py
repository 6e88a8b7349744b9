"""What each choice of the NVFP4 recipe does to the loss: the same small hybrid trained once an arm and seed.

    python benchmarks/precision.py                    # all arms: an hour and a half on two cores
    python benchmarks/precision.py --arms bf16 super  # some of them
    python benchmarks/precision.py --draw             # the table and the picture again, from the runs there are
    python benchmarks/precision.py --cost             # time and memory of a step beside bf16's

Runs live in runs/precision/ARM/SEED and go on where they stopped; finished ones are not run again. Arms of one seed
read the same data in the same order from the same initial weights, so that differences are paired. The result is
benchmarks/results/precision.json and docs/images/precision.svg; docs/results.md shows both.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from arms import COLOURS, Study, make_tokenizer, relative, svg, text
from peers import ROOT, machine

RESULT = ROOT / "benchmarks" / "results" / "precision.json"
PICTURE = ROOT / "docs" / "images" / "precision.svg"
RECIPE = "recipes/precision/ablation.yaml"
SEEDS = (0, 1, 2)
MORE_SEEDS = {"bf16": (3, 4), "super": (3, 4)}  # of the two whose difference decides: with three its interval is wide
SUPER = "preset: nemotron3_super_nvfp4"
# Arm -> what the table calls it, and `precision` of the recipe.
ARMS: dict[str, tuple[str, str]] = {
    "bf16": ("BF16", "{preset: bf16}"),
    "super": ("NVFP4, the Super recipe", f"{{{SUPER}, statistics_every: 50}}"),
    "all_nvfp4": ("every linear NVFP4", "{preset: nvfp4, statistics_every: 50}"),
    "no_hadamard": ("Super without Hadamard", f"{{{SUPER}, hadamard: false}}"),
    "no_stochastic": ("Super without stochastic rounding", f"{{{SUPER}, stochastic_rounding: false}}"),
    "rows": ("Super with weights in 1x16 blocks", f"{{{SUPER}, square_weight_blocks: false}}"),
    "no_tail": ("Super without the BF16 tail", f"{{{SUPER}, tail: 0}}"),
    "mxfp8": ("every linear MXFP8", "{preset: mxfp8}"),
    "fp8": ("every linear FP8", "{preset: fp8}"),
}
STUDY = Study(Path("runs/precision"), RECIPE, {arm: [f"precision={words}"] for arm, (_, words) in ARMS.items()},
              MORE_SEEDS)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the table


def summary(arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Every arm's losses and its paired difference from BF16, relative, at every validation."""
    curves = {arm: [STUDY.curve(arm, seed) for seed in STUDY.seeds_of(arm, seeds)] for arm in arms}
    last = max(curves["bf16"][0])
    found = {}
    for arm in arms:
        differences = {}
        for step in curves["bf16"][0]:
            pairs = [(mine.get(step), theirs.get(step)) for mine, theirs in zip(curves[arm], curves["bf16"])]
            if all(a is not None and b is not None for a, b in pairs):
                differences[step] = relative(*zip(*pairs))
        found[arm] = {
            "label": ARMS[arm][0], "precision": ARMS[arm][1], "val_loss": [c.get(last) for c in curves[arm]],
            "val_loss_50": [c.get(50) for c in curves[arm]], "differences": differences,
            "seconds": [STUDY.seconds(arm, seed) for seed in STUDY.seeds_of(arm, seeds)],
            "tokens_per_second": [_speed(arm, seed) for seed in seeds], "flushed": _flushed(arm, seeds[0]),
        }  # fmt: skip
    return {"steps": last, "tokens": STUDY.tokens(arms[0], seeds[0]), "arms": found}


def _speed(arm: str, seed: int) -> float:
    """The median over the log intervals after the first."""
    speeds = sorted(r["tokens_per_second"] for r in STUDY.records(arm, seed) if "loss" in r and r["step"] > 25)
    return speeds[len(speeds) // 2]


def _flushed(arm: str, seed: int) -> dict[str, dict[str, float]]:
    """Kind of linear -> operand -> share flushed to zero, over the layers and the second half of the run."""
    measured = [r["quantisation"] for r in STUDY.records(arm, seed) if "quantisation" in r]
    sums: dict[str, dict[str, list[float]]] = {}
    for one in measured[len(measured) // 2 :]:
        for name, operands in one.items():
            kind = "experts." + name.rsplit(".", 1)[1] if ".experts." in name else name.split("mixer.")[-1]
            for operand, values in operands.items():
                sums.setdefault(kind, {}).setdefault(operand, []).append(values["flushed"])
    return {kind: {o: sum(v) / len(v) for o, v in operands.items()} for kind, operands in sums.items()}


def show(result: dict[str, Any]) -> None:
    bf16 = result["arms"]["bf16"]
    for arm in result["arms"].values():
        final = arm["differences"][result["steps"]]
        text = "" if arm is bf16 else f"{final['mean']:+.2%} +- {final['half_width']:.2%}"
        losses = " ".join(f"{loss:.4f}" for loss in arm["val_loss"])
        print(f"{arm['label']:<36} {losses}  {text}")
    for early, late in zip(bf16["val_loss_50"], bf16["val_loss"]):
        print(f"BF16: {early:.3f} at step 50, {late:.3f} at the end, {1 - late / early:.0%} below")


# ---------------------------------------------------------------------------------------------------------- the picture


def draw(result: dict[str, Any]) -> str:
    """Relative difference of the validation loss from BF16 over the tokens, a line an arm; bars are 95 % intervals at
    the end."""
    width, height, left, top, right, bottom = 800, 420, 64, 48, 310, 52
    arms = {name: arm for name, arm in result["arms"].items() if name != "bf16"}
    per_step = result["tokens"] / result["steps"]
    points = {
        name: [(int(step) * per_step / 1e6, 100 * d["mean"]) for step, d in arm["differences"].items()]
        for name, arm in arms.items()
    }  # fmt: skip
    ends = {name: 100 * arm["differences"][result["steps"]]["half_width"] for name, arm in arms.items()}
    values = [y for line in points.values() for x, y in line if x >= 0.3 * result["tokens"] / 1e6]
    values += [points[name][-1][1] + sign * ends[name] for name in arms for sign in (-1, 1) if ends[name] < 5]
    low, high = min([*values, -0.2]), max([*values, 0.5])
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    end = result["tokens"] / 1e6

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, low), high)
        return left + x / end * (width - left - right), top + (high - y) / (high - low) * (height - top - bottom)

    parts = [text(left, 24, "Validation loss over BF16's, at equal tokens, mean of paired seeds", 15)]
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / s <= 8)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        x, y = place(0, i * step)
        strong = "#888" if i == 0 else "#e4e4e4"
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="{strong}"/>')
        parts.append(text(x - 8, y + 4, f"{i * step:+.1f} %" if i else "0", anchor="end"))
    for i in range(5):
        x, y = place(end * i / 4, low)
        parts.append(text(x, y + 18, f"{end * i / 4:.2f}", anchor="middle"))
    parts.append(text((left + width - right) / 2, height - 12, "million tokens", anchor="middle"))
    order = sorted(arms, key=lambda name: -points[name][-1][1])
    labels = []
    for name in order:
        y = place(end, points[name][-1][1])[1]
        labels.append(max(y, labels[-1] + 17 if labels else top))
    over = max(0.0, labels[-1] - (height - bottom)) if labels else 0.0
    for name, at in zip(order, labels):
        colour = COLOURS[1 + list(arms).index(name) % (len(COLOURS) - 1)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points[name]))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        x, y = place(*points[name][-1])
        shift = 4 + 4 * list(arms).index(name)
        (_, y0), (_, y1) = place(end, points[name][-1][1] - ends[name]), place(end, points[name][-1][1] + ends[name])
        parts.append(f'<path d="M{x + shift:.1f} {y0:.1f}V{y1:.1f}" stroke="{colour}" stroke-width="2"/>')
        final = arms[name]["differences"][result["steps"]]
        words = f"{arms[name]['label']}  {100 * final['mean']:+.2f} %"
        parts.append(text(width - right + 44, at - over + 4, words, 12, fill=colour))
    return svg(width, height, "Validation loss of number formats over BF16", parts)


# --------------------------------------------------------------------------------------------------------------- cost


def cost(presets: tuple[str, ...] = ("bf16", "nemotron3_super_nvfp4", "nvfp4", "mxfp8", "fp8"), steps: int = 5):
    """Seconds of a training step and bytes that its forward keeps, by preset: rounds in turn, medians; this process."""
    import torch

    from nemo_lite import load_recipe
    from nemo_lite.parallel.native import World
    from nemo_lite.train.loop import build_model, train_step
    from nemo_lite.train.optim import build_optimizer

    torch.set_num_threads(2)
    world, models = World(0, 1, torch.device("cpu")), {}
    for preset in presets:
        recipe = load_recipe(ROOT / RECIPE, [f"precision={preset}", "seed=0"])
        model = build_model(recipe, world)
        models[preset] = recipe, model.train(), build_optimizer(model, recipe.optim)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {preset: [] for preset in presets}
    kept: dict[str, int] = {}
    for turn in range(steps + 1):
        for preset, (recipe, model, optimizer) in models.items():
            ids = torch.randint(0, 256, (recipe.train.micro_batch_size, recipe.data.seq_len), generator=generator)
            batch = _Batch(ids, torch.zeros_like(ids), ids)
            if preset not in kept:
                sizes: dict[int, int] = {}

                def note(t, sizes=sizes):
                    if t.device.type == "cpu":
                        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                    return t

                weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
                with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                    out = model(batch.input_ids, doc_ids=batch.doc_ids, labels=batch.labels)
                kept[preset] = sum(n for at, n in sizes.items() if at not in weights)
                del out
            began = time.perf_counter()
            train_step(model, optimizer, [batch], 1e-4, recipe, world)
            if turn:
                seconds[preset].append(time.perf_counter() - began)
    found = {}
    for preset in presets:
        ratios = sorted(a / b for a, b in zip(seconds[preset], seconds[presets[0]]))
        found[preset] = {"seconds": sorted(seconds[preset])[steps // 2], "over_bf16": ratios[steps // 2],
                         "kept_mb": kept[preset] / 1e6}  # fmt: skip
        one = found[preset]
        print(f"{preset:<24} {one['seconds']:.3f} s a step, {one['over_bf16']:.2f}x, keeps {one['kept_mb']:.1f} MB")
    return found


class _Batch:
    def __init__(self, input_ids, doc_ids, labels):
        self.input_ids, self.doc_ids, self.labels = input_ids, doc_ids, labels


def main() -> None:
    parser = STUDY.arguments(__doc__, SEEDS)
    parser.add_argument("--cost", action="store_true", help="only the time and memory of a step")
    args = parser.parse_args()
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if args.cost:
        result = {**known, "cost": {"machine": machine(), "presets": cost()}}
    else:
        if not args.draw:
            make_tokenizer(STUDY.folder / "tokenizer")
            STUDY.run(args.arms, args.seeds, args.at_once)
        done = [arm for arm in ARMS if all(STUDY.finished(arm, seed) for seed in STUDY.seeds_of(arm, args.seeds))]
        if "bf16" not in done:
            raise SystemExit("differences are from bf16, and its runs are not all there: add bf16 to --arms")
        found = summary(done, args.seeds)
        show(found)
        # Of the runs themselves, which may have gone on in several pieces.
        minutes = sum(sum(arm["seconds"]) for arm in found["arms"].values()) / 60 / args.at_once
        result = {
            "command": "python benchmarks/precision.py", "machine": machine(), "recipe": RECIPE, "seeds": args.seeds,
            "minutes": minutes, **found, **({"cost": known["cost"]} if "cost" in known else {}),
        }  # fmt: skip
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(draw(found))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
