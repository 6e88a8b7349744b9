"""`nemo-lite data tokenize|clean|longrange`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_lite.config import SourceConfig, UserError
from nemo_lite.data import longrange
from nemo_lite.data.clean import STEPS, clean, dropped_file, fim_tokens
from nemo_lite.data.mixture import lines
from nemo_lite.data.tokenizer import load_tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-lite data", description="Prepare text for training; see docs/data.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tokenize = commands.add_parser("tokenize", help="text to Megatron .bin/.idx shards, which a blend can name")
    tokenize.add_argument("source", nargs="+", metavar="SOURCE", help="as data.blend[].source in a recipe")
    tokenize.add_argument("--tokenizer", required=True, metavar="T", help="as data.tokenizer in a recipe")
    tokenize.add_argument("--to", required=True, metavar="FOLDER", help="where; what is there already is kept")
    tokenize.add_argument("--no-eod", action="store_true", help="end no document with the end-of-document token")
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    tokenize.add_argument(
        "--shard-mb", type=float, default=256, metavar="MB", help="text that becomes one shard (default: %(default)s)"
    )
    tokenize.set_defaults(run=_tokenize)

    cleaning = commands.add_parser("clean", help="drop duplicates, repetition and evaluation text; rearrange code")
    cleaning.add_argument("source", nargs="+", metavar="SOURCE", help="as data.blend[].source in a recipe")
    cleaning.add_argument(
        "--to", required=True, metavar="OUT.jsonl", help="what is kept; OUT.dropped.jsonl says the rest"
    )
    cleaning.add_argument("--against", nargs="+", default=[], metavar="FILE", help="evaluation sets, jsonl or text")
    cleaning.add_argument(
        "--skip", action="append", default=[], choices=STEPS, help="leave a step out; may be repeated"
    )
    cleaning.add_argument("--min-words", type=int, default=50, metavar="N", help="fewest of a document (%(default)s)")
    cleaning.add_argument(
        "--max-words", type=int, default=100_000, metavar="N", help="most of a document (%(default)s)"
    )
    cleaning.add_argument(
        "--near",
        type=float,
        default=0.8,
        metavar="X",
        help="Jaccard likeness that makes a near duplicate (%(default)s)",
    )
    cleaning.add_argument(
        "--fim", type=float, default=0.0, metavar="RATE", help="share rearranged to fill in the middle"
    )
    cleaning.add_argument("--tokenizer", metavar="T", help="for --fim: whose special tokens mark the parts")
    cleaning.add_argument(
        "--fim-tokens", nargs=3, metavar=("PREFIX", "SUFFIX", "MIDDLE"), help="their names, where they are unusual"
    )
    cleaning.set_defaults(run=_clean)

    commands.add_parser("longrange", help="synthetic documents whose ends ask for what is far above", add_help=False)

    for command in (tokenize, cleaning):
        command.add_argument("--text-key", default="text", help="field that holds the text (jsonl, parquet, hf)")
        command.add_argument("--include", action="append", metavar="PATTERN", help="file names read from a folder")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, raises :class:`UserError` on bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["longrange"]:
        return longrange.main(argv[1:])
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _sources(arguments: argparse.Namespace) -> list[SourceConfig]:
    found = []
    for name in arguments.source:
        found.append(SourceConfig(source=name, text_key=arguments.text_key))
        if arguments.include:
            found[-1].include = arguments.include
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tokenize(arguments: argparse.Namespace) -> int:
    from nemo_lite.data.tokenize import tokenize  # POSIX only

    if arguments.shard_mb <= 0 or (arguments.workers is not None and arguments.workers < 1):
        raise UserError("--shard-mb and --workers need numbers above zero")
    folder = Path(arguments.to)
    manifest = tokenize(
        _sources(arguments), arguments.tokenizer, folder, append_eod=not arguments.no_eod, workers=arguments.workers,
        shard_bytes=max(1, int(arguments.shard_mb * 1e6)), say=_say,
    )  # fmt: skip
    facts: dict[str, Any] = {"folder": str(folder), "shards": len(manifest["shards"])}
    facts |= {name: manifest[name] for name in ("documents", "tokens", "rejected")}
    if arguments.json:
        print(json.dumps(facts))
        return 0
    print(f"{folder}: {facts['documents']:,} documents, {facts['tokens']:,} tokens in {facts['shards']} shards")
    if facts["rejected"]:
        print(f"{facts['rejected']:,} bad documents left out, listed in {folder / 'quarantine.jsonl'}")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    names: tuple[str, ...] = ()
    if not 0 <= arguments.fim <= 1 or not 0 < arguments.near <= 1:
        raise UserError("--fim and --near are shares between 0 and 1")
    if not 0 <= arguments.min_words <= arguments.max_words:
        raise UserError("--min-words exceeds --max-words")
    if arguments.fim and not arguments.tokenizer:
        raise UserError("--fim needs --tokenizer, whose special tokens mark prefix, suffix and middle")
    if arguments.fim:
        names = fim_tokens(load_tokenizer(arguments.tokenizer), arguments.fim_tokens)
    out = Path(arguments.to)
    report = clean(
        _sources(arguments), out, against=[Path(name) for name in arguments.against], skip=arguments.skip,
        words=(arguments.min_words, arguments.max_words), near=arguments.near, fim=arguments.fim, fim_names=names,
        say=_say,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps({"out": str(out), "dropped": str(dropped_file(out)), **report.plain()}))
        return 0
    print("\n".join(lines(report.rows())))
    print(f"written to {out}, what was dropped to {dropped_file(out)}")
    return 0
