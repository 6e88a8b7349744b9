"""Write what is generated: docs/recipes.md from the recipe's dataclasses, docs/results.md, the README's numbers and
those of docs/parallelism.md from the JSON files in benchmarks/results.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit 1 and name the files that are not current; a test does the same
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from nemo_lite.config import Recipe, recipe_keys

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

INTRO = """\
# Recipes

<!-- Written by docs/generate.py from nemo_lite/config.py; edit those. -->

A recipe is a YAML file that says everything about a training run. Keys left out keep the defaults below.

```
nemo-lite check recipes/pretrain/tiny.yaml                        # resolve it; count parameters, FLOPs, memory
nemo-lite train recipes/pretrain/tiny.yaml                        # one process
torchrun --nproc-per-node 2 -m nemo_lite.train recipes/pretrain/tiny.yaml train.steps=50    # two, the same program
```

**Overrides.** `key=value` after the file sets a key by its full path, an element of a list by its number:
`optim.lr=3e-4`, `data.blend.0.weight=2`, `data.blend='[{source: notes}, {source: stdlib}]'`. Text is taken as typed, so
that `model.pattern='M*E'` needs quotes for the shell only; `null` empties a key that may be null.

**Inheritance.** `base: other.yaml` at the top of a file, relative to that file, takes everything from there; the file's
own keys replace the base's one by one, a list replaces the whole list. A base has no base of its own.

**References.** `${train.steps}` stands for the value of another key.

**Paths** in a recipe are relative to the folder the command runs in.

**Mistakes** stop a run before anything is allocated, with one sentence:
`recipes/x.yaml:3: model.hiden_size: no such key; did you mean hidden_size?`

**Starting from a model.** With `init_from: MODEL_DIR` the architecture is the directory's. Of `model` only
`mtp.depth`, `mtp.loss_weight`, `router_aux_loss_coef`, `router_bias_update_rate` and `max_position_embeddings` can be
set beside it.

RUN_DIR keeps the resolved recipe as `recipe.yaml`; it is a recipe like any other.
"""


def recipes_page() -> str:
    """The text of docs/recipes.md."""
    sections = {name: item.metadata["doc"] for name, item in Recipe.__dataclass_fields__.items()}
    lines, current = [INTRO, "## Top level", ""], None
    header = ["| key | type | default | unit | bounds | meaning |", "|---|---|---|---|---|---|"]
    lines += header
    for key in recipe_keys():
        section = key.path.split(".")[0] if "." in key.path else None
        if section is not None and section != current:
            current = section
            lines += ["", f"## {section}: {sections[section]}", "", *header]
        cells = [f"`{key.path}`", key.type, f"`{key.default}`", key.unit, key.bounds, key.doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------------- results

RESULTS_INTRO = """\
# Results

<!-- Written by docs/generate.py from benchmarks/results/*.json; measure again, then run it. -->

Every number here has the command that made it, the machine and the commit. How to measure, and how to read noise:
[benchmarks/README.md](../benchmarks/README.md).
"""

NOT_MEASURED = "Not measured yet."
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first two columns are words, the others numbers."""
    rule = ["---"] * min(2, len(header)) + ["---:"] * (len(header) - 2)
    return ["| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _machine(facts: dict[str, Any]) -> str:
    changes = " with uncommitted changes" if facts.get("dirty") else ""
    return (
        f"{facts['cpu']}, {facts['cores']} cores; Python {facts['python']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}; commit {facts['commit']}{changes}."
    )


def _source(found: dict[str, Any]) -> list[str]:
    return [f"`{found['command']}`", "", _machine(found["machine"]), ""]


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    """The result files that match a glob, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(name))]


def _shape(row: dict[str, Any]) -> str:
    new = f" + {row['new_tokens']}" if "new_tokens" in row else ""
    return f"{row['batch']} x {row['length']}{new}"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _peer_row(row: dict[str, Any]) -> list[str]:
    ours, name = row["nemo_lite"], row.get("peer", "transformers")
    peer = row[name]
    return [
        row["config"], row["work"], row["dtype"], str(row["threads"]), _shape(row),
        _number(ours["tokens_per_second"]), _peer_name(row), _number(peer["tokens_per_second"]),
        f"**{row['speedup']:.2f}x**", _range(row["speedup_by_round"]), _number(ours["peak_mb"]),
        _number(peer["peak_mb"]), "yes" if row["noisy"] else "no",
    ]  # fmt: skip


def _peer_name(row: dict[str, Any]) -> str:
    """The faster peer, and that it computed in float32 where bfloat16 would have been slower for it."""
    name = row.get("peer", "transformers")
    wider = row["dtype"] == "bf16" and row[name].get("setting", "").startswith("float32")
    return f"{name} in fp32" if wider else name


PEER_HEADER = [
    "model", "work", "dtype", "threads", "shape", "nemo_lite tok/s", "peer", "its tok/s", "speedup", "by round",
    "nemo_lite MB", "its MB", "noisy",
]  # fmt: skip


PEERS_INTRO = """\
## Beside transformers and llama.cpp

Training steps, prefill and decode of the same random model in nemo_lite, transformers and llama.cpp, each measurement
in a process of its own, ours and theirs in turn; the faster peer counts. Shape is rows x tokens (decode: + new tokens).
Tokens per second are medians over rounds; the speedup is the median of the rounds' ratios, with their range beside it;
MB is peak resident memory. bf16 training keeps float32 weights. On a CPU without bfloat16 products transformers is
measured in float32, which is many times faster there. *Noisy* means that other processes took more than 5 % of the
machine in some round.
"""


def _accuracy(found: list[dict[str, Any]]) -> list[str]:
    """What packed weights cost on held-out text."""
    lines = []
    for each in found:
        rows = [
            [
                row["implementation"],
                row["dtype"],
                f"{row['kl']:.1e}",
                f"{row['kl_p99']:.1e}",
                f"{row['same_choice']:.2%}",
            ]
            for row in each["rows"]
        ]
        way = "one token at a time" if each["one_by_one"] else "a row at a time"
        lines += [
            "## Accuracy of packed weights",
            "",
            f"Divergence of next-token distributions from float32 over {each['tokens']:,} held-out tokens, read {way}.",
            "",
            *_source(each),
            *_table(["", "weights", "KL, mean", "KL, 99 %", "same likeliest token"], rows),
            "",
        ]
    return lines


def _peers(found: list[dict[str, Any]]) -> list[str]:
    lines = [PEERS_INTRO]
    if not found:
        return [*lines, f"{NOT_MEASURED} `make bench` does it.", ""]
    for each in found:
        config = ", ".join(dict.fromkeys(row["config"] for row in each["rows"]))
        lines += [f"### {config}, {each['machine']['cpu']}", "", *_source(each)]
        if rows := [_peer_row(row) for row in each["rows"] if "speedup" in row]:
            lines += [*_table(PEER_HEADER, rows), ""]
        checks = [
            f"{row['verify_over_step']:.2f} ({row['config']}, {row['dtype']}, {row['threads']} threads)"
            for row in each["rows"] if "verify_over_step" in row
        ]  # fmt: skip
        if checks:
            lines += [f"Verifying 4 tokens of one request and keeping them, in decode steps: {', '.join(checks)}.", ""]
    return lines


def _positions(shares: list[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def _demo_figures(demo: dict[str, Any]) -> list[list[str]]:
    """(what, value) of the demo's model on held-out files."""
    found, parameters = demo["evaluation"], demo["parameters"]
    mtp = f"; MTP {parameters['mtp']['total'] / 1e6:.2f} M more" if parameters["mtp"]["total"] else ""
    rows = [
        ["parameters", f"{parameters['total'] / 1e6:.2f} M, {parameters['active'] / 1e6:.2f} M active{mtp}"],
        ["held-out bits per byte", f"{found['bits_per_byte']:.3f}"],
        ["gzip -9 on the same files", f"{found['gzip9_bits_per_byte']:.3f}"],
    ]
    if found["experts"]:
        least = min(each["min_over_mean"] for each in found["experts"].values())
        most = max(each["max_over_mean"] for each in found["experts"].values())
        rows.append(["expert load over its layer's mean", f"{least:.0%} to {most:.0%}"])
    if forced := found["teacher_forced"]:
        rows.append(
            [
                "acceptance length along the text",
                f"{forced['acceptance_length']:.2f} (kept: {_positions(forced['by_position'])})",
            ]
        )
    if free := found["free_running"]:
        rows += [
            [
                f"acceptance length, free-running greedy, {free['prompts']} prompts x {free['new_tokens']} tokens",
                f"{free['acceptance_length']:.2f} (kept: {_positions(free['by_position'])})",
            ],
            ["8-grams of it that repeat", f"{free['repeated_8grams']:.0%}"],
        ]
    return rows


DEMO_INTRO = """\
## The demo

The model that `make demo` trains on the Python standard library's own sources, on files held out from training.
Acceptance length is 1 + accepted drafts per verify step. Along the text, drafts are made from the true text and count
when they equal the main head's own greedy choice; free-running, the model completes held-out prompts.
"""


def _demo(found: list[dict[str, Any]]) -> list[str]:
    lines = [DEMO_INTRO]
    if not found:
        return [*lines, f"{NOT_MEASURED} `python benchmarks/demo.py` does it.", ""]
    demo = found[0]
    seconds = [[name, f"{value:.0f} s"] for name, value in demo["seconds"].items()]
    return [
        *lines, *_source(demo), *_table(["figure", "value"], _demo_figures(demo)), "",
        *_table(["step", "time"], seconds), "",
    ]  # fmt: skip


SERVE_INTRO = """\
## Serving

`demo` is the model of `make demo`, `bench_small` has random weights. What is compared alternates in one process; a
ratio is the median of the rounds' ratios. *Floor* is the time of reading a step's weights (of the experts expected to
be hit) and of reading and writing its states, at the bandwidth measured beside it.
"""
SERVE_PARTS = {
    "step": "Decode steps through the engine, and bare steps of the same model and batch",
    "mtp": "Greedy completion of held-out prompts, one at a time: MTP speculation on against off",
    "transformers": "64 new tokens for 1 or 8 prompts of 64, prefill included: the engine and transformers' generate",
    "load": "`nemo-lite serve` under `nemo-lite bench serve`, both on this machine: 64 tokens in, 64 out",
    "engines": "The same with `--engine native` and `--engine vllm` (its CPU build) in turn, a thread each; 2 drafts",
}
SERVE_HEADERS = {
    "step": ["model", "dtype, threads", "batch", "bare ms", "engine ms", "bare / engine", "tok/s", "floor ms", "noisy"],
    "mtp": ["drafts", "dtype, threads", "off tok/s", "on tok/s", "on / off", "acceptance length", "tokens a step",
            "8-grams that repeat", "noisy"],
    "transformers": ["model", "dtype, threads", "batch", "MTP", "nemo_lite tok/s", "transformers tok/s", "speedup",
                     "noisy"],
    "load": ["MTP", "", "concurrency", "requests/s", "output tok/s", "TTFT p50 ms", "TTFT p99 ms", "inter-token p50 ms",
             "inter-token p99 ms", "/health p99 ms"],
    "engines": ["engine", "MTP", "concurrency", "requests/s", "output tok/s", "acceptance length", "TTFT p50 ms",
                "inter-token p50 ms", "inter-token p99 ms"],
}  # fmt: skip


def _milliseconds(found: dict[str, Any], name: str, key: str) -> str:
    return f"{found[name][key]:.1f}" if found.get(name) else ""


def _serve_row(work: str, row: dict[str, Any]) -> list[str]:
    kind = f"{row['dtype']}, {row['threads']}" if "dtype" in row else ""
    noisy = "yes" if row.get("noisy") else "no"
    if row["work"] == "step":
        return [row["model"], kind, str(row["batch"]), f"{row['bare_ms']:.2f}", f"{row['engine_ms']:.2f}",
                f"**{row['ratio']:.2f}**", _number(row["tokens_per_second"]), f"{row['floor_ms']:.2f}",
                noisy]  # fmt: skip
    if row["work"] == "mtp":
        return [str(row["draft_tokens"]), kind, _number(row["off_tokens_per_second"]),
                _number(row["on_tokens_per_second"]), f"**{row['ratio']:.2f}x**", f"{row['acceptance_length']:.2f}",
                f"{row['tokens_per_step']:.2f}", f"{row['repeated_8grams']:.0%}", noisy]  # fmt: skip
    if row["work"] == "transformers":
        return [row["model"], kind, str(row["batch"]), "yes" if row["speculative"] else "no",
                _number(row["tokens_per_second"]), _number(row["transformers_tokens_per_second"]),
                f"**{row['ratio']:.2f}x**", noisy]  # fmt: skip
    found = row["report"]
    if work == "engines":
        length = found["acceptance_length"]
        return [row["engine"], "yes" if row["speculative"] else "no", str(row["concurrency"]),
                f"{found['requests_per_second']:.1f}", _number(found["output_tokens_per_second"]),
                f"{length:.2f}" if length else "", _milliseconds(found, "ttft_ms", "p50"),
                _milliseconds(found, "itl_ms", "p50"), _milliseconds(found, "itl_ms", "p99")]  # fmt: skip
    return ["yes" if row["speculative"] else "no", "", str(row["concurrency"]), f"{found['requests_per_second']:.1f}",
            _number(found["output_tokens_per_second"]), _milliseconds(found, "ttft_ms", "p50"),
            _milliseconds(found, "ttft_ms", "p99"), _milliseconds(found, "itl_ms", "p50"),
            _milliseconds(found, "itl_ms", "p99"), _milliseconds(found, "health_ms", "p99")]  # fmt: skip


def _serve(folder: Path) -> list[str]:
    lines = [SERVE_INTRO]
    for work, title in SERVE_PARTS.items():
        found = _read(folder, f"serve_{work}.json")
        lines += [f"### {title}", ""]
        if not found:
            lines += [f"{NOT_MEASURED} `python benchmarks/serve.py {work}` does it.", ""]
        for each in found:
            lines += [*_source(each), *_table(SERVE_HEADERS[work], [_serve_row(work, row) for row in each["rows"]]), ""]
    return lines


FORMATS_INTRO = """\
## Number formats

A hybrid of about four million parameters, [ablation.yaml](../recipes/precision/ablation.yaml), trained on the Python
standard library's sources once an arm and seed; arms of a seed start from the same weights and read the same data in
the same order. A difference is the mean over seeds of the paired relative difference of the last validation loss from
BF16's, with its 95 % interval (Student's t).

![Validation loss over BF16's](images/precision.svg)
"""


def _formats(found: list[dict[str, Any]]) -> list[str]:
    """What number formats do to the loss, and cost."""
    if not found:
        return [f"## Number formats\n\n{NOT_MEASURED} `python benchmarks/precision.py` does it.\n"]
    result, rows = found[0], []
    for name, arm in result["arms"].items():
        last = arm["differences"][str(result["steps"])]
        losses = ", ".join(f"{loss:.4f}" for loss in arm["val_loss"])
        difference = "" if name == "bf16" else _difference(last)
        rows.append([arm["label"], f"`{arm['precision'].strip('{}')}`", losses, difference])
    bf16 = result["arms"]["bf16"]
    below = ", ".join(f"{1 - late / early:.0%}" for early, late in zip(bf16["val_loss_50"], bf16["val_loss"]))
    lines = [FORMATS_INTRO, *_source(result)]
    most = max(len(arm["val_loss"]) for arm in result["arms"].values())
    more = f", {most} of the first two arms" if most > len(result["seeds"]) else ""
    lines += [f"{result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens, {len(result['seeds'])} seeds{more}; "
              f"{result['minutes']:.0f} minutes in all. BF16 ends {below} below its loss at step 50.", ""]  # fmt: skip
    lines += [*_table(["arm", "precision", "validation loss", "over BF16"], rows), ""]
    for name, title in (("super", "the Super recipe"), ("all_nvfp4", "every linear in NVFP4")):
        flushed = result["arms"].get(name, {}).get("flushed")
        if not flushed:
            continue
        operands = sorted({o for values in flushed.values() for o in values})
        shares = [
            [kind, "", *(f"{values[o]:.1%}" if o in values else "" for o in operands)]
            for kind, values in sorted(flushed.items())
        ]
        lines += [f"Share of the values that are not zero flushed to zero, {title}, second half of the run:", ""]
        lines += [*_table(["linear", "", *operands], shares), ""]
    if cost := result.get("cost"):
        lines += ["`python benchmarks/precision.py --cost`", "", _machine(cost["machine"]), ""]
        lines += [
            *_table(
                ["preset", "", "seconds a step", "over bf16", "kept for the backward, MB"],
                [[name, "", f"{c['seconds']:.2f}", f"**{c['over_bf16']:.2f}x**", f"{c['kept_mb']:.0f}"]
                 for name, c in cost["presets"].items()],
            ), "",
        ]  # fmt: skip
    return lines


def _layouts(found: list[dict[str, Any]]) -> list[str]:
    """What layouts of the megatron engine cost on few cores."""
    lines = [
        "## Layouts of the megatron engine", "",
        "On processes of one machine, which has fewer cores than the last rows have processes: what the engine costs "
        "where nothing is gained by it. [parallelism.md](parallelism.md) says what is sent.", "",
    ]  # fmt: skip
    if not found:
        return [*lines, f"{NOT_MEASURED} `python benchmarks/megatron.py` does it.", ""]
    rows = []
    for row in found[0]["rows"]:
        layout = ", ".join(f"{k} {v}" for k, v in row["parallel"].items() if k != "engine") or "data parallel"
        engine, sent = row["parallel"]["engine"], sum(row["sent"].values()) / 1e6
        rows.append([
            f"{engine}, {layout if row['ranks'] > 1 else 'one process'}", "", str(row["ranks"]),
            f"{row['seconds']:.2f}", f"{row['seconds'] / found[0]['rows'][0]['seconds']:.2f}x",
            f"{row['memory_gb']:.2f}", f"{sent:.0f}" if sent else "",
        ])  # fmt: skip
    header = ["layout", "", "processes", "seconds a step", "of native, one", "GB a process", "MB sent a step"]
    return [*lines, *_source(found[0]), *_table(header, rows), ""]


ABLATIONS_INTRO = """\
## What the parts are worth at toy size

A hybrid of about a million parameters, [hybrid.yaml](../recipes/ablation/hybrid.yaml), trained on the Python standard
library's sources once an arm and seed. All arms have as many active parameters and read as many tokens; arms of a seed
read the same ones in the same order. A difference is the mean over seeds of the paired relative difference of the main
head's validation loss, with its 95 % interval (Student's t): below zero where the part pays. *Active* is of the
trunk's layers. All attention is attention as it is in this model, without positional embedding. MTP adds a block in
training only. *Merged* is the uniform average of the checkpoints of the last steps of a run at a constant learning
rate.
"""


def _ablations(found: list[dict[str, Any]]) -> list[str]:
    """LatentMoE, the mixers, MTP and merging, each against what it replaces."""
    if not found:
        return [f"{ABLATIONS_INTRO}\n{NOT_MEASURED} `python benchmarks/ablations.py` does it.\n"]
    result = found[0]
    arms = [
        [
            arm["label"], ", ".join(f"`{change}`" for change in arm["changes"]),
            f"{arm['active']:,}", f"{arm['total']:,}", ", ".join(f"{loss:.4f}" for loss in arm["val_loss"]),
        ]
        for arm in result["arms"].values()
    ]  # fmt: skip
    labels = {name: arm["label"] for name, arm in result["arms"].items()}
    differences = [
        [labels[each["arm"]], labels[each["over"]], _difference(each), _verdict(each)]
        for each in result["differences"]
    ]  # fmt: skip
    return [
        ABLATIONS_INTRO, *_source(result),
        f"{result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens a run, {len(result['seeds'])} seeds, "
        f"{result['window']} steps merged; {result['minutes']:.0f} minutes in all.", "",
        *_table(["what", "over", "validation loss", ""], differences), "",
        *_table(["arm", "changes", "active", "in all", "validation loss by seed"], arms), "",
    ]  # fmt: skip


def _difference(each: dict[str, float]) -> str:
    return f"{100 * each['mean']:+.2f} % ± {100 * each['half_width']:.2f}"


def _verdict(each: dict[str, float]) -> str:
    """Whether the interval leaves out zero."""
    if abs(each["mean"]) <= each["half_width"]:
        return "no difference shown"
    return "lower" if each["mean"] < 0 else "higher"


LONG_INTRO = """\
## Long rows

**Memory.** Steps of `nemo-lite train` on a row of one document, the demo's model with MTP at both depths: the peak
resident set of the process, all of Python and torch included.
"""
STAGE_INTRO = """\
**A long stage.** A small hybrid trained on rows of 4,096 tokens, [short.yaml](../recipes/long_context/short.yaml), goes
on for the same tokens in rows of 65,536, [long.yaml](../recipes/long_context/long.yaml), and in rows of 4,096. Loss in
nats a byte by position in held-out documents of 65,536 bytes, the Python standard library's largest files; the last
column is of the last 4,096.

![Mean loss over a document's first tokens](images/long_context.svg)
"""


def _long_context(found: list[dict[str, Any]]) -> list[str]:
    """Memory of long rows, and loss by position before and after a long stage."""
    result = found[0] if found else {}
    lines = [LONG_INTRO]
    if memory := result.get("memory"):
        rows = [
            [f"{row['seq_len']:,}", row["recompute"], f"{row['peak_gib']:.2f}", f"{row['seconds']:.3g}"]
            for row in memory["rows"]
        ]
        header = ["tokens of the row", "recomputed layers", "peak, GiB", "seconds a step"]
        lines += [*_source(memory), *_table(header, rows), ""]
    else:
        lines += [f"{NOT_MEASURED} `python benchmarks/long_context.py memory` does it.", ""]
    if (stage := result.get("stage")) is None:
        command = "python benchmarks/long_context.py stage"
        return [*lines, f"A long stage: {NOT_MEASURED[0].lower()}{NOT_MEASURED[1:]} `{command}` does it.", ""]
    names = {"short": "before", "control": "rows of 4,096", "long": "rows of 65,536"}
    columns = [i for i in range(1, len(stage["edges"])) if stage["edges"][i] in (64, 1024, 4096, 16384, 65536)]
    table = []
    for arm, name in names.items():
        curve = stage["cumulative"][arm]
        ends = ", ".join(f"{loss:.4f}" for loss in stage["at_the_end"][arm])
        table.append([name, "", *(f"{curve[i - 1]:.3f}" for i in columns), ends])
    header = ["model", "", *(f"first {stage['edges'][i]:,}" for i in columns), "last 4,096, by seed"]
    over = stage["differences"]
    return [
        *lines, STAGE_INTRO, *_source(stage),
        f"{stage['started_from_tokens'] / 1e6:.2f} M tokens, then {stage['tokens'] / 1e6:.2f} M in {stage['steps']} "
        f"steps; {len(stage['seeds'])} seeds, {stage['documents']} documents; {stage['minutes']:.0f} minutes in all. "
        f"In the last 4,096 tokens the long stage is at {_difference(over['long over control'])} of its control and at "
        f"{_difference(over['long over short'])} of the model before it.", "",
        *_table(header, table), "",
    ]  # fmt: skip


DATA_WORDS = {
    "shards": "shuffled batches from .bin/.idx",
    "jsonl": "tokenising a jsonl, then shuffled batches of an epoch",
    "tokenize, one core": "`nemo-lite data tokenize`, one core",
    "tokenize, a process a core": "`nemo-lite data tokenize`, a process a core",
    "clean": "`nemo-lite data clean`, every step",
}


def _data(found: list[dict[str, Any]]) -> list[str]:
    """What the loader and the commands around it read in a second."""
    lines = [
        "## Data",
        "",
        "Opening a source is part of the time. Growth is of resident memory after the first batch.",
        "",
    ]
    if not found:
        return [*lines, f"{NOT_MEASURED} `python benchmarks/data.py` does it.", ""]
    rows = []
    for row in found[0]["rows"]:
        size = f"{row['tokens'] / 1e6:.1f} M tokens" if "tokens" in row else f"{row['documents']:,} documents"
        speed = f"{row['tokens_per_second'] / 1e6:.2f} M tokens/s" if "tokens" in row else (
            f"{row['megabytes_per_second']:.2f} MB/s")  # fmt: skip
        growth = f"{row['growth_mb']:.0f}" if "growth_mb" in row else ""
        rows.append([DATA_WORDS[row["work"]], size, f"{row['seconds']:.1f}", speed, _range(row["rounds"]), growth])
    return [
        *lines, *_source(found[0]), *_table(["work", "size", "seconds", "speed", "by round", "growth, MB"], rows), "",
    ]  # fmt: skip


def results_page(folder: Path = RESULTS) -> str:
    """The text of docs/results.md."""
    peers = _peers(_read(folder, "peers_*.json")) + _accuracy(_read(folder, "accuracy*.json"))
    return "\n".join(
        [
            RESULTS_INTRO,
            *_demo(_read(folder, "demo.json")),
            *_serve(folder),
            *_ablations(_read(folder, "ablations.json")),
            *_long_context(_read(folder, "long_context.json")),
            *_formats(_read(folder, "precision.json")),
            *_layouts(_read(folder, "megatron.json")),
            *_data(_read(folder, "data.json")),
            *peers,
        ]
    )


def numbers(folder: Path = RESULTS) -> str:
    """The README's block of numbers: the demo's figures, and the peers' with the most threads."""
    lines = []
    if demo := _read(folder, "demo.json"):
        lines += [f"`{demo[0]['command']}`: {_machine(demo[0]['machine'])}", ""]
        minutes = demo[0]["seconds"]["total"] / 60
        lines += [
            *_table(["the demo's model", ""], [*_demo_figures(demo[0]), ["time, all steps", f"{minutes:.1f} min"]]),
            "",
        ]
    else:
        lines += ["The demo's model: not measured yet; `python benchmarks/demo.py` writes it.", ""]
    if peers := _read(folder, "peers_*.json"):
        lines += _peers_by_cpu(peers)
    else:
        lines += ["Training and decoding beside peers: not measured yet; `make bench` writes it.", ""]
    for found in _read(folder, "serve_step.json"):
        lines += [f"`{found['command']}`: {_machine(found['machine'])}", "", *_engine_table(found["rows"]), ""]
    return "\n".join(lines[:-1])


def _peers_by_cpu(peers: list[dict[str, Any]]) -> list[str]:
    """A table of the rows with the most threads, the last full measurement of each, with columns for every CPU."""
    most = max(row["threads"] for found in peers for row in found["rows"])
    cells: dict[tuple[str, ...], dict[str, list[str]]] = {}
    sources: dict[str, None] = {}
    cpus = dict.fromkeys(found["machine"]["cpu"] for found in peers)
    for found in sorted(
        peers, key=lambda found: (not found.get("quick", False), found.get("finished", "")), reverse=True
    ):
        cpu = found["machine"]["cpu"]
        for row in (row for row in found["rows"] if row["threads"] == most and "speedup" in row):
            here = cells.setdefault((f"{row['config']}, {row['work']} {_shape(row)}", row["dtype"]), {})
            if cpu not in here:
                mark = " (noisy)" if row["noisy"] else ""
                speed = f"**{row['speedup']:.2f}x** {_peer_name(row)}{mark}"
                here[cpu] = [_number(row["nemo_lite"]["tokens_per_second"]), speed, f"{row['memory_ratio']:.2f}x"]
                sources[f"`{found['command']}`: {_machine(found['machine'])}"] = None
    header = [f"{most} threads", "format", *(text for cpu in cpus for text in (f"{cpu}: tok/s", "speedup", "memory"))]
    body = [
        [*key, *(text for cpu in cpus for text in here.get(cpu, ["", "", ""]))] for key, here in sorted(cells.items())
    ]
    return ["Beside the faster peer:", "", *_table(header, body), "", *(text for s in sources for text in (s, ""))]


def _engine_table(rows: list[dict[str, Any]]) -> list[str]:
    """Tokens per second of the engine by batch, and the share of bare steps' rate that it keeps at its worst."""
    most = max(row["threads"] for row in rows)
    kinds: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["threads"] == most:
            kinds.setdefault((row["model"], row["dtype"]), {})[row["batch"]] = row
    batches = sorted({row["batch"] for row in rows})
    header = ["decoding in the server's engine", "format", *(f"tok/s, {b} at once" for b in batches), "of bare steps"]
    body = [
        [
            model, f"{dtype}, {most} threads", *(_number(found[b]["tokens_per_second"]) for b in batches),
            f"{min(row['ratio'] for row in found.values()):.0%} to {max(row['ratio'] for row in found.values()):.0%}",
        ]
        for (model, dtype), found in kinds.items()
    ]  # fmt: skip
    return _table(header, body)


def planning(folder: Path) -> str:
    """How far the planner is from published runs, and FLOPs of a token by convention, from plan.json."""
    found = _read(folder, "plan.json")
    if not found:
        return f"{NOT_MEASURED} `python benchmarks/plan.py` does it."
    each, notes = found[0], []
    header = [
        "model", "system", "format", "GPUs", "rows", "layout", "published tok/s", "predicted", "error",
        "one out", "system out", "five only", "source",
    ]  # fmt: skip
    body = []
    for row in each["rows"]:
        layout, errors, mark = row["layout"], row["error"], ""
        words = [f"{name} {layout[name]}" for name in ("tp", "pp", "ep", "cp") if layout[name] > 1]
        if row["note"]:
            notes.append(f"({len(notes) + 1}) {row['note']}")
            mark = f" ({len(notes)})"
        body.append(
            [
                row["model"] + (" *" if row["anchor"] else ""), row["gpu"], row["precision"], str(row["gpus"]),
                f"{row['batch']} by {row['micro']} x {row['seq_len']}", ", ".join(words), _number(row["tokens"]),
                _number(row["predicted"]),
                *(f"{errors[way]:+.0%}" for way in ("fitted", "left_out", "elsewhere", "anchors")),
                row["source"] + mark,
            ]
        )  # fmt: skip

    def worst(name: str) -> str:
        sizes = [abs(row["error"][name]) for row in each["rows"] if row["balanced"]]
        return f"{max(sizes):.0%} at most, {sum(sizes) / len(sizes):.0%} on average"

    unseen = [abs(row["error"]["anchors"]) for row in each["rows"] if row["balanced"] and not row["anchor"]]
    constants = [
        [name, *(f"{each[fit][name]:.1%}" for fit in ("efficiency", "anchors"))] for name in each["efficiency"]
    ]
    lines = [
        f"`{each['command']}`", "",
        *_table(["share of the data sheet's figure", "fitted to", "all runs", "the five"],
                [[name, "", *values] for name, *values in constants]), "",
        f"Errors: {worst('fitted')} where all runs are fitted; {worst('left_out')} with the run left out; "
        f"{worst('elsewhere')} with all of the model's runs on the system left out; from the five "
        f"runs marked *, {max(unseen):.0%} at most and {sum(unseen) / len(unseen):.0%} on average on "
        f"the {len(unseen)} others, {sum(error > 0.25 for error in unseen)} of them above 25 %.", "",
        *_table(header, body), "",
        *(f"{note}." + ("  " if note is not notes[-1] else "") for note in notes), "",
    ]  # fmt: skip
    for row in each["rows"]:
        if row["gib"]:
            lines += [
                f"Memory: {row['predicted_gib']:.0f} GiB predicted for {row['model']} on {row['gpu']} in "
                f"{row['precision']}, {row['gib']:.0f} GiB allocated at most in the published run.", "",
            ]  # fmt: skip
    models = list(each["flops"])
    ways = [[way, "", *(f"{each['flops'][model][way]:.2f}" for model in models)] for way in each["flops"][models[0]]]
    return "\n".join([*lines, *_table(["training GFLOPs of a token, rows of 8,192", "", *models], ways)])


def between(text: str, begin: str, end: str, block: str) -> str:
    """``text`` with a current block between two marks."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def readme(text: str, folder: Path = RESULTS) -> str:
    """README's text with a current block of numbers."""
    return between(text, BEGIN, END, numbers(folder))


# ---------------------------------------------------------------------------------------------------------- parallelism


def layout_table(tp: int = 4, ep: int = 16) -> list[str]:
    """Every kind of weight, whole and on a rank, as the megatron engine cuts it."""
    from types import SimpleNamespace

    import torch

    from nemo_lite.config import load_recipe
    from nemo_lite.model.hybrid import HybridLM
    from nemo_lite.parallel import megatron

    overrides = ["model.pattern=M*E-", "model.intermediate_size=5376"]
    config = load_recipe(ROOT / "recipes" / "pretrain" / "nemotron3_super.yaml", overrides).model
    groups = [SimpleNamespace(rank=lambda: 0, size=lambda size=size: size) for size in (tp, 1, ep)]
    world = megatron.Ranks(0, tp * ep, torch.device("cpu"), None, megatron.Layout(tp, 1, ep, 1, True))
    layers = megatron.Placed(world, megatron.config_of(world.layout, config.hidden_size), megatron.Groups(*groups))
    rows: dict[str, list[str]] = {}
    for name, parameter in HybridLM(config, device="meta", layers=layers).named_parameters():
        if name.startswith("mtp.layers"):
            continue  # as the trunk's
        kind = re.sub(r"layers\.\d+\.", "", name)
        part = getattr(parameter, "part", None)
        if part is None:
            local, how = parameter.shape, "whole on every rank"
        elif "experts" in name:
            local, how = part.local_shape, "by expert, over ep"
        else:
            local = part.local_shape
            how = "by input column" if part.dim else "by output row" if len(part.shape) > 1 else "by channel"
            copies = max(run.copies for run in part.runs)
            if len(part.runs) > 1:
                how += ", each segment for itself"
            how += f"; {copies} ranks hold copies" if copies > 1 else ""
        whole = parameter.shape if part is None else part.shape
        rows.setdefault(kind, [f"`{kind}`", " x ".join(map(str, whole)), " x ".join(map(str, local)), how])
    return _table(["weight", "whole", f"on a rank of tp {tp}, ep {ep}", "cut"], list(rows.values()))


def parallelism_page(folder: Path) -> str:
    """docs/parallelism.md with its tables current."""
    from nemo_lite.parallel.megatron_cpu import MODULES

    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    modules = [[f"`megatron.core.{name}`", why] for name, why in MODULES.items()]
    blocks = {"layout": layout_table(), "stand-ins": _table(["module", "what it asks for"], modules)}
    for name, lines in blocks.items():
        text = between(text, f"<!-- {name} -->", f"<!-- /{name} -->", "\n".join(lines))
    return between(text, "<!-- plan -->", "<!-- /plan -->", planning(folder))


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {
        ROOT / "docs" / "recipes.md": recipes_page(),
        ROOT / "docs" / "results.md": results_page(folder),
        ROOT / "docs" / "parallelism.md": parallelism_page(folder),
        ROOT / "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8"), folder),
    }


def main(argv: list[str]) -> int:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if argv == ["--check"]:
        print(f"not current: {names}; run: python docs/generate.py" if stale else "all generated pages are current")
        return 1 if stale else 0
    if argv:
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    current = pages()
    for path in stale:
        path.write_text(current[path], encoding="utf-8")
    print(f"written: {names}" if stale else "all generated pages are current")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
