"""Evaluation of a MODEL_DIR: `nemo-lite evaluate`.

    text.py     held-out text: bits per byte beside gzip -9, loss by position, expert load, MTP's drafts, speed
    ruler.py    long-range questions, marked by exact match and by the margin over wrong answers
    compare.py  two models on the same documents and questions, with intervals
    harness.py  lm-evaluation-harness
    report.py   the tables on the terminal, and evaluation.html

`free_running` measures acceptance on the model's own text, with the share of repeated 8-grams beside it, so that
looping cannot pass for skill.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.evaluate.text import Reading, free_running, read

PROMPT_TOKENS = 64


@dataclass
class Kept:
    """What figures were made of, for a comparison: readings by source, marks by length and task."""

    readings: dict[str, Reading]
    marks: dict[tuple[int, str], list]


def evaluate(
    model,
    tokenizer,
    data: DataConfig,
    *,
    drafts: int | None = None,
    prompts: int = 200,
    new_tokens: int = 128,
    asked: dict[tuple[int, str], list] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Kept]:
    """All figures of a model: on the held-out text of each source of `data` and of all, and on the questions `asked`
    (ruler.ask). Keys: docs/evaluation.md."""
    from nemo_lite.data.tokenizer import check_vocabulary
    from nemo_lite.evaluate import ruler
    from nemo_lite.evaluate.text import collapse, pieces, specialisation, speed

    check_vocabulary(tokenizer, model.config.vocab_size)
    drafts = (model.config.mtp.depth if drafts is None else drafts) if model.mtp is not None else 0
    parts = {source.source: replace(data, blend=[source]) for source in data.blend}
    readings: dict[str, Reading] = {}
    sources: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    sizes: dict[str, tuple[int, int]] = {}
    for name, part in parts.items():
        say(f"reading the held-out text of {name}")
        readings[name] = read(model, part, tokenizer, drafts)
        sizes[name] = _gzip9(part, tokenizer)
        sources[name] = readings[name].figures() | {"gzip9_bits_per_byte": _share(sizes[name]), "free_running": None}
        if drafts and prompts:
            say(f"completing prompts of {name}")
            each = -(-prompts // len(parts))
            try:
                sources[name]["free_running"] = free_running(
                    model, part, tokenizer, drafts, each, PROMPT_TOKENS, new_tokens
                )
            except UserError as error:
                warnings.append(f"{name}: {error}")
    whole = Reading.joined(list(readings.values()))
    figures = whole.figures()
    figures["gzip9_bits_per_byte"] = _share(tuple(map(sum, zip(*sizes.values()))))
    figures["free_running"] = _together([each["free_running"] for each in sources.values()])
    figures["specialisation"] = specialisation({name: each.experts for name, each in readings.items()})
    figures["sources"] = sources
    marks = {}
    for (length, task), samples in (asked or {}).items():
        say(f"asking {task} at {length} tokens")
        marks[length, task] = ruler.mark(model, tokenizer, samples)
    figures["ruler"] = ruler.figures(marks) if marks else None
    say("timing")
    prompt = next((piece for tokens in (256, PROMPT_TOKENS) for piece in pieces(data, tokenizer, tokens)), None)
    figures["speed"] = speed(model, prompt, drafts) if prompt is not None else None
    figures["warnings"] = [*collapse(figures["experts"]), *warnings]
    return figures, Kept(readings, marks)


def _gzip9(data: DataConfig, tokenizer) -> tuple[int, int]:
    """Bytes of the held-out documents, each packed by gzip -9, and as they are."""
    from nemo_lite.data import open_source

    packed = raw = 0
    for source in data.blend:
        held = open_source(source, data, tokenizer, "validation")
        for d, length in enumerate(held.lengths):
            text = tokenizer.decode(held.read(*np.array([[d], [0], [length]])), skip_special=True).encode()
            raw, packed = raw + len(text), packed + len(gzip.compress(text, 9))
    return packed, raw


def _share(sizes: tuple[int, ...]) -> float:
    return 8 * sizes[0] / max(sizes[1], 1)


def _together(found: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Free-running figures of several sources as one: every verify step weighs the same."""
    there = [each for each in found if each is not None]
    if not there:
        return None
    steps = sum(each["verify_steps"] for each in there) or 1

    def mean(values: list[float]) -> float:
        return sum(v * each["verify_steps"] for v, each in zip(values, there)) / steps

    return {
        "prompts": sum(each["prompts"] for each in there),
        "new_tokens": there[0]["new_tokens"],
        "verify_steps": steps,
        "acceptance_length": mean([each["acceptance_length"] for each in there]),
        "by_position": [mean(list(shares)) for shares in zip(*(each["by_position"] for each in there))],
        "repeated_8grams": sum(each["repeated_8grams"] * each["prompts"] for each in there)
        / sum(each["prompts"] for each in there),
    }


def main(argv: list[str]) -> int:
    """`nemo-lite evaluate MODEL_DIR`."""
    import argparse
    import json
    import sys

    parser = argparse.ArgumentParser(
        prog="nemo-lite evaluate",
        description="Bits per byte on held-out text beside gzip -9, loss by position, expert load and specialisation, "
        "how many MTP drafts are accepted, long-range questions, and speed; of one model, or of two beside each other.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument(
        "--source", action="append", metavar="S", help="whose held-out part is read; may be repeated (default: stdlib)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.02,
        metavar="F",
        help="as in training; 1 reads all of a text that no training saw (default: 0.02)",
    )
    parser.add_argument("--seq-len", type=int, default=512, metavar="L", help="length of a row (default: 512)")
    parser.add_argument("--draft-tokens", type=int, metavar="K", help="drafts a step (default: the training depth)")
    parser.add_argument(
        "--prompts", type=int, default=200, metavar="N", help="prompts completed; 0 for none (default: 200)"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens a prompt (default: 128)")
    parser.add_argument(
        "--ruler", default="512,2k", metavar="L[,...]", help="tokens of long-range questions; 0: none (default: 512,2k)"
    )
    parser.add_argument(
        "--questions", type=int, default=10, metavar="N", help="of each task and length (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the questions (default: 0)")
    parser.add_argument("--harness", metavar="TASK[,...]", help="tasks of lm-eval too: names, or paths of .yaml files")
    parser.add_argument("--against", type=Path, metavar="MODEL_DIR", help="measure this one too, and the differences")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="pack weights as they are read (default: no)")
    parser.add_argument("--kernels", metavar="OP=NAME[,...]", help="backends of ops (default: auto; nemo-lite kernels)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write evaluation.json and evaluation.html there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from nemo_lite.data import load_tokenizer
    from nemo_lite.evaluate import compare, harness, ruler
    from nemo_lite.evaluate.report import describe, write
    from nemo_lite.kernels import wanted
    from nemo_lite.model.hf import load_config
    from nemo_lite.model.hybrid import HybridLM
    from nemo_lite.train.metrics import plain

    if args.threads:
        torch.set_num_threads(args.threads)
    for folder in (args.model_dir, *([args.against] if args.against else [])):
        load_config(folder)  # before the first one is measured
    names = args.source or ["stdlib"]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"--source {name} is given twice")
    if not 0 < args.validation_fraction <= 1:
        raise UserError(f"--validation-fraction must be above 0 and at most 1, not {args.validation_fraction}")
    for flag, least in (("seq_len", 2), ("prompts", 0), ("max_tokens", 1), ("questions", 1)):
        if getattr(args, flag) < least:
            name = "--" + flag.replace("_", "-")
            raise UserError(f"{name} must be {least} or more, not {getattr(args, flag)}")
    tasks = [task.strip() for task in (args.harness or "").split(",") if task.strip()]
    tasks = harness.resolve(tasks) if tasks else []
    lengths = ruler.parse_lengths(args.ruler)
    if args.to is not None:
        try:  # before minutes of work
            args.to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--to {args.to} cannot be made ({error.strerror or error})") from error
    asked = ruler.ask(lengths, args.questions, load_tokenizer(args.model_dir), args.seed)

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def measure(model_dir: Path) -> tuple[dict[str, Any], Kept, str]:
        say(f"opening {model_dir}")
        model = HybridLM.from_pretrained(
            model_dir, device=args.device, kernels=wanted(args.kernels, args.device), quantization=args.quantization
        )
        tokenizer = load_tokenizer(model_dir)
        data = DataConfig(
            tokenizer=str(model_dir), seq_len=args.seq_len, blend=[SourceConfig(source=name) for name in names],
            validation_fraction=args.validation_fraction,
        )  # fmt: skip
        figures, kept = evaluate(
            model, tokenizer, data, drafts=args.draft_tokens, prompts=args.prompts, new_tokens=args.max_tokens,
            asked=asked, say=say,
        )  # fmt: skip
        if tasks:
            say("lm-eval")
            figures["harness"] = harness.run(model, tokenizer, tasks)
        return {"model": str(model_dir)} | figures, kept, tokenizer.fingerprint

    figures, kept, tokens = measure(args.model_dir)
    if args.against is not None:
        other, other_kept, other_tokens = measure(args.against)
        differences = compare.text(kept.readings, other_kept.readings, tokens == other_tokens)
        differences["ruler"] = compare.ruler(kept.marks, other_kept.marks)
        figures["warnings"] += [
            f"{name}: the two tokenizers leave out different documents, so that it cannot be compared"
            for name in kept.readings
            if name not in differences["bits_per_byte"]
        ]
        figures["against"] = {"model": str(args.against), "figures": other, "differences": differences}
    say("")
    figures = plain(figures)
    if args.to is not None:
        write(args.to, figures)
    print(json.dumps(figures) if args.json else describe(figures))
    if args.to is not None and not args.json:
        print(f"\nwritten to {args.to / 'evaluation.html'} and evaluation.json")
    return 0
