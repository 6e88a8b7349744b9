"""Rows of 65,536 tokens: the memory of a training step, and what a long stage does to the loss far into a document.

    python benchmarks/long_context.py memory              # one document of 65,536 tokens through the demo's model
    python benchmarks/long_context.py stage               # three seeds
    python benchmarks/long_context.py stage --seeds 0     # the first alone
    python benchmarks/long_context.py draw                # table and picture again, from the runs there are

memory: `nemo-lite train recipes/long_context/row.yaml` in a process of its own, whose peak resident set is read when it
has ended. stage: a model trained on rows of 4,096 (short.yaml) goes on for the same tokens in rows of 65,536
(long.yaml) and, its control, in rows of 4,096; then all three read held-out documents of 65,536 tokens from their
start. Documents are the Python standard library's largest files. Runs live in runs/long_context and go on where they
stopped.

The result is benchmarks/results/long_context.json and docs/images/long_context.svg; docs/results.md shows both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import COLOURS, Study, command, make_tokenizer, relative, svg, text
from peers import ROOT, machine

RESULT = ROOT / "benchmarks" / "results" / "long_context.json"
PICTURE = ROOT / "docs" / "images" / "long_context.svg"
FOLDER = Path("runs/long_context")
LENGTH = 65_536
TRAINED = 4_096  # tokens of a row before the long stage
GIB = 2**30
# Tokens of a row, and train.recompute.
ROWS = ((4_096, "none"), (4_096, "full"), (LENGTH, "full"))
START = Study(FOLDER, "recipes/long_context/short.yaml", {"short": []})
MODEL = f"init_from={FOLDER}/short/{{seed}}/model"
STAGES = Study(
    FOLDER, "recipes/long_context/long.yaml",
    {"long": [MODEL],
     "control": [MODEL, f"data.seq_len={TRAINED}", f"train.global_batch_size={LENGTH // TRAINED}"]},
)  # fmt: skip
LABELS = {
    "short": f"trained on rows of {TRAINED:,}",
    "control": f"then as many tokens more in rows of {TRAINED:,}",
    "long": f"then as many tokens more in rows of {LENGTH:,}",
}
EDGES = [0, *(2**p for p in range(6, 17))]  # of the bins of position
END = slice(LENGTH - 4_096, LENGTH)  # what "at 64 K" is the mean over


# ------------------------------------------------------------------------------------------------------------ documents


def large_files(least: int) -> Iterator[str]:
    """Texts of the standard library's files of at least so many bytes."""
    from nemo_lite.config import SourceConfig
    from nemo_lite.data import documents

    for document in documents(SourceConfig("stdlib")):
        if len(document.text.encode()) >= least:
            yield document.text


def write_documents() -> None:
    """The files of at least LENGTH bytes, every eighth held out."""
    if (ROOT / FOLDER / "held_out").is_dir():
        return
    for i, words in enumerate(large_files(LENGTH)):
        folder = ROOT / FOLDER / ("held_out" if i % 8 == 0 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.txt").write_text(words, encoding="utf-8")


def write_document() -> None:
    """One document of more tokens than two rows have."""
    target = ROOT / FOLDER / "document.txt"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(large_files(40_000))[: 12 * LENGTH], encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- memory


def peak(seq_len: int, recompute: str) -> dict[str, Any]:
    """Two steps of `nemo-lite train` in a process of its own: the peak of its resident set, seconds, losses."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "recipes/long_context/row.yaml", f"run_dir={folder}", f"data.seq_len={seq_len}",
                 f"train.recompute={recompute}"]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_lite", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        output = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"nemo-lite {' '.join(words)}:\n{output}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    seconds = seq_len / records[-1]["tokens_per_second"]
    found = {"seq_len": seq_len, "recompute": recompute, "peak_gib": usage.ru_maxrss * 1024 / GIB, "seconds": seconds,
             "losses": losses}  # fmt: skip
    print(f"{seq_len:>7,} tokens, recompute {recompute:<5} {found['peak_gib']:.2f} GiB, {seconds:.1f} s", flush=True)
    return found


def memory() -> dict[str, Any]:
    make_tokenizer(FOLDER / "tokenizer", 4096)
    write_document()
    rows = [peak(*row) for row in ROWS]  # before torch is here: a child's peak begins with its parent's size
    return {"command": "python benchmarks/long_context.py memory", "machine": machine(), "rows": rows}


# ---------------------------------------------------------------------------------------------------------------- stage


def run_stage(seeds: list[int]) -> None:
    write_documents()
    for seed in seeds:
        for study, arm in ((START, "short"), (STAGES, "long"), (STAGES, "control")):
            study.run([arm], [seed], 1)
            target = ROOT / study.run_dir(arm, seed) / "model"
            if not target.exists() and command("export", str(study.run_dir(arm, seed)), "--to", str(target)):
                raise SystemExit(f"{target} could not be made")
            read(study, arm, seed)


def read(study: Study, arm: str, seed: int) -> list[list[float]]:
    """The loss of every token of every held-out document, but the first ones, [documents, LENGTH]; kept in the run."""
    import torch

    from nemo_lite.model.hybrid import HybridLM

    kept = ROOT / study.run_dir(arm, seed) / "by_position.json"
    if not kept.exists():
        torch.set_num_threads(os.cpu_count() or 1)
        model, found, began = HybridLM.from_pretrained(kept.parent / "model"), [], time.perf_counter()
        for path in sorted((ROOT / FOLDER / "held_out").iterdir()):
            ids = torch.tensor(list(path.read_bytes()[: LENGTH + 1]))
            with torch.no_grad():
                hidden = model(ids[None, :-1]).hidden[0]
                found.append(model.head.loss(hidden, ids[1:], torch.ones(LENGTH))[1].tolist())
        kept.write_text(json.dumps([[round(loss, 5) for loss in row] for row in found]))
        print(f"{arm}, seed {seed}: {len(found)} documents read in {time.perf_counter() - began:.0f} s", flush=True)
    return json.loads(kept.read_text())


def stage() -> dict[str, Any] | None:
    """Losses by position of the seeds whose runs are all there; None without one."""
    arms = {"short": START, "control": STAGES, "long": STAGES}
    there = (ROOT / FOLDER / "long").glob("*/by_position.json")
    seeds = sorted(int(path.parent.name) for path in there)
    seeds = [s for s in seeds if all((ROOT / st.run_dir(a, s) / "by_position.json").exists() for a, st in arms.items())]
    if not seeds:
        return None
    bins, curves, ends = {}, {}, {}
    for arm, study in arms.items():
        by_seed = []
        for seed in seeds:
            rows = read(study, arm, seed)
            by_seed.append([fmean(column) for column in zip(*rows)])  # the mean over documents
        bins[arm] = [[fmean(each[a:b]) for a, b in itertools.pairwise(EDGES)] for each in by_seed]
        curves[arm] = [fmean([fmean(each[:b]) for each in by_seed]) for b in EDGES[1:]]
        ends[arm] = [fmean(each[END]) for each in by_seed]
    differences = {f"long over {other}": relative(ends["long"], ends[other]) for other in ("control", "short")}
    by_bin = [relative(*zip(*pairs)) for pairs in (
        [(long[i], control[i]) for long, control in zip(bins["long"], bins["control"])] for i in range(len(EDGES) - 1)
    )]  # fmt: skip
    steps = STAGES.steps
    return {
        "command": "python benchmarks/long_context.py stage", "machine": machine(), "seeds": seeds,
        "documents": len(rows), "steps": steps, "tokens": steps * LENGTH,
        "started_from_tokens": START.tokens("short", seeds[0]),
        "edges": EDGES, "loss": bins, "cumulative": curves, "at_the_end": ends, "differences": differences,
        "by_bin": by_bin,
        "minutes": sum(study.seconds(arm, seed) for arm, study in arms.items() for seed in seeds) / 60,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    for arm, label in LABELS.items():
        print(f"{label:<46}", " ".join(f"{fmean(column):.3f}" for column in zip(*found["loss"][arm])),
              " end", " ".join(f"{loss:.4f}" for loss in found["at_the_end"][arm]))  # fmt: skip
    for name, one in found["differences"].items():
        print(f"{name}: {one['mean']:+.2%} +- {one['half_width']:.2%}")


def draw(found: dict[str, Any]) -> str:
    """The mean loss over a document's first tokens, by how many; a line a model."""
    width, height, left, top, right, bottom = 800, 380, 64, 48, 300, 52
    ends = found["edges"][1:]
    values = [loss for line in found["cumulative"].values() for loss in line]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    first, last = math.log2(ends[0]), math.log2(ends[-1])

    def place(tokens: float, loss: float) -> tuple[float, float]:
        across = (math.log2(tokens) - first) / (last - first)
        return left + across * (width - left - right), top + (high - loss) / (high - low) * (height - top - bottom)

    parts = [text(left, 24, "Mean loss over the first tokens of a held-out document", 15)]
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if (high - low) / s <= 8)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        x, y = place(ends[0], i * step)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(text(x - 8, y + 4, f"{i * step:.2f}", anchor="end"))
    for tokens in ends[::2]:
        x, _ = place(tokens, low)
        parts.append(text(x, height - bottom + 18, f"{tokens:,}", anchor="middle"))
    x, _ = place(TRAINED, low)
    parts.append(f'<path d="M{x:.1f} {top}V{height - bottom}" stroke="#888" stroke-dasharray="4 4"/>')
    parts.append(text((left + width - right) / 2, height - 12, "tokens read", anchor="middle"))
    names, at = sorted(LABELS, key=lambda arm: found["cumulative"][arm][-1], reverse=True), 0.0
    for arm in names:
        colour, line = COLOURS[list(LABELS).index(arm)], found["cumulative"][arm]
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in zip(ends, line))
        wide = 'stroke-width="5" stroke-opacity=".4"' if arm == "control" else 'stroke-width="1.8"'  # seen beneath
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {wide}/>')
        at = max(place(ends[-1], line[-1])[1], at + 17)
        parts.append(text(width - right + 12, at, f"{line[-1]:.3f}", fill=colour))
        parts.append(text(width - right + 52, at, LABELS[arm], 11, fill=colour))
    return svg(width, height, "Loss by position after a long stage", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["memory", "stage", "draw"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if args.part == "memory":
        result["memory"] = memory()
    else:
        if args.part == "stage":
            run_stage(args.seeds)
        found = stage()
        if found is None:
            raise SystemExit("no seed's runs are all there; python benchmarks/long_context.py stage makes them")
        show(found)
        result["stage"] = found
        PICTURE.write_text(draw(found))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
