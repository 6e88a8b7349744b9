"""Whether the architecture's parts and the merge of checkpoints pay at toy size: the same tokens, as many active
parameters, once an arm and seed.

    python benchmarks/ablations.py                          # all arms, three seeds: less than an hour on two cores
    python benchmarks/ablations.py --arms hybrid plain      # some of them
    python benchmarks/ablations.py --draw                   # the table again, from the runs there are

LatentMoE against plain MoE; the hybrid against attention and Mamba-2 alone; with MTP against without; and a run at a
constant learning rate, its checkpoints merged (`nemo-lite merge`) against its last one. Runs live in
runs/ablations/ARM/SEED and go on where they stopped; finished ones are not run again. Arms of one seed read the same
data in the same order, so that differences are paired. The result is benchmarks/results/ablations.json;
docs/results.md shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arms import Study, command, make_tokenizer, relative
from peers import ROOT, machine

RESULT = ROOT / "benchmarks" / "results" / "ablations.json"
RECIPE = "recipes/ablation/hybrid.yaml"
SEEDS = (0, 1, 2)
WINDOW = 100  # steps whose checkpoints are merged
# Arm -> what the table calls it, and what it changes; widths so that active parameters are those of the first.
ARMS: dict[str, tuple[str, list[str]]] = {
    "hybrid": ("hybrid, LatentMoE", []),
    "plain": (
        "hybrid, plain MoE",
        ["model.moe_latent_size=null", "model.n_routed_experts=8", "model.num_experts_per_tok=2",
         "model.moe_intermediate_size=128"],
    ),
    "attention": (
        "all attention",
        ["model.pattern=*E**E*E", "model.num_attention_heads=10",
         "model.moe_shared_expert_intermediate_size=140"],
    ),
    "mamba": (
        "all Mamba-2",
        ["model.pattern=MEMMEME", "model.mamba_head_dim=26", "model.moe_shared_expert_intermediate_size=136"],
    ),
    "mtp": ("hybrid, with MTP", ["model.mtp.pattern=*E"]),
    "constant": ("hybrid, constant rate, last", ["schedule.kind=constant", "schedule.decay_steps=0"]),
}  # fmt: skip
MERGED = "merged"
LABELS = {name: label for name, (label, _) in ARMS.items()} | {
    MERGED: "hybrid, constant rate, merged"}  # fmt: skip
# What is compared: an arm, and the one it is to beat.
PAIRS = (("hybrid", "plain"), ("hybrid", "attention"), ("hybrid", "mamba"), ("mtp", "hybrid"), (MERGED, "constant"),
         (MERGED, "hybrid"))  # fmt: skip
STUDY = Study(Path("runs/ablations"), RECIPE, {name: changes for name, (_, changes) in ARMS.items()})


def merge(seed: int) -> None:
    """The average of the last checkpoints of the run at a constant rate, once."""
    run_dir = STUDY.run_dir("constant", seed)
    if not (ROOT / run_dir / MERGED).exists():
        window = str(WINDOW * STUDY.loaded("constant", seed).tokens_per_step)
        if command("merge", str(run_dir), "--window", window, "--weights", "uniform", "--to", str(run_dir / MERGED)):
            raise SystemExit(f"{run_dir} could not be merged")


def merged_loss(seed: int) -> float | None:
    """The validation loss that training would log for the average, on the same held-out rows; None without one."""
    import torch

    from nemo_lite.data import load_tokenizer, validation_batches
    from nemo_lite.model.hybrid import HybridLM
    from nemo_lite.parallel.native import World
    from nemo_lite.train.loop import evaluate

    folder = ROOT / STUDY.run_dir("constant", seed) / MERGED
    if not folder.exists():
        return None
    recipe = STUDY.loaded("constant", seed)
    tokenizer = load_tokenizer(str(folder))
    batches = validation_batches(
        recipe.data, tokenizer, rows_per_batch=recipe.train.global_batch_size, num_batches=recipe.eval.batches
    )
    lengths, world = torch.tensor(tokenizer.byte_lengths()), World(0, 1, torch.device("cpu"))
    return evaluate(HybridLM.from_pretrained(folder), batches, lengths, world)["val_loss"]


def summary(arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Losses and sizes of every arm, and the paired relative differences of those whose runs are all there."""
    from nemo_lite.check import parameter_counts

    found = {}
    for arm in arms:
        counts = parameter_counts(STUDY.loaded(arm, seeds[0]).model)
        found[arm] = {
            "label": LABELS[arm], "changes": ARMS[arm][1], "active": counts["active_layers_only"],
            "total": counts["total"], "mtp": counts["mtp"]["total"],
            "val_loss": [STUDY.curve(arm, seed)[STUDY.steps] for seed in seeds],
            "seconds": [STUDY.seconds(arm, seed) for seed in seeds],
        }  # fmt: skip
    losses = [merged_loss(seed) for seed in seeds] if "constant" in found else [None]
    if None not in losses:
        found[MERGED] = found["constant"] | {"label": LABELS[MERGED], "val_loss": losses, "seconds": []}
    differences = [
        {"arm": arm, "over": over} | relative(found[arm]["val_loss"], found[over]["val_loss"])
        for arm, over in PAIRS if arm in found and over in found
    ]  # fmt: skip
    tokens = STUDY.tokens(arms[0], seeds[0])
    return {"steps": STUDY.steps, "tokens": tokens, "window": WINDOW, "arms": found, "differences": differences}


def show(result: dict[str, Any]) -> None:
    for arm in result["arms"].values():
        losses = " ".join(f"{loss:.4f}" for loss in arm["val_loss"])
        print(f"{arm['label']:<30} {arm['active']:>9,} active  {losses}")
    for each in result["differences"]:
        print(f"{LABELS[each['arm']]} over {LABELS[each['over']]}: {each['mean']:+.2%} +- {each['half_width']:.2%}")


def main() -> None:
    args = STUDY.arguments(__doc__, SEEDS).parse_args()
    if not args.draw:
        make_tokenizer(STUDY.folder / "tokenizer")
        STUDY.run(args.arms, args.seeds, args.at_once)
        if "constant" in args.arms:
            for seed in args.seeds:
                merge(seed)
    done = [arm for arm in ARMS if all(STUDY.finished(arm, seed) for seed in args.seeds)]
    if not done:
        raise SystemExit("no arm's runs are all there")
    found = summary(done, args.seeds)
    show(found)
    # Of the runs themselves, which may have gone on in several pieces.
    minutes = sum(sum(arm["seconds"]) for arm in found["arms"].values()) / 60 / args.at_once
    result = {"command": "python benchmarks/ablations.py", "machine": machine(), "recipe": RECIPE, "seeds": args.seeds,
              "minutes": minutes, **found}  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
