"""What one process reads: tokens per second and memory of the loader, and the speed of making shards and of cleaning.

    python benchmarks/data.py        # ten minutes; benchmarks/results/data.json, shown in docs/results.md

The text is the Python standard library's, its tokens those of a byte-level BPE of 4,096 ids trained on it. Each
measurement is a process of its own. The shards hold 100 M tokens: the documents again and again in shuffled orders. To
measure the making of shards the text is taken four times, so that starting processes is a small part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import ROOT, machine

from nemo_lite.config import DataConfig, SourceConfig
from nemo_lite.data import PackedLoader, documents, load_tokenizer, train_bpe
from nemo_lite.data.clean import clean
from nemo_lite.data.shards import ShardWriter, dtype_for
from nemo_lite.data.sources import encode
from nemo_lite.data.tokenize import tokenize

RESULT = ROOT / "benchmarks" / "results" / "data.json"
TOKENS, SHARDS, SEQ_LEN, ROWS = 100_000_000, 8, 4096, 32
COPIES = 4


def prepare(folder: Path) -> None:
    """Text as jsonl, a tokenizer, and the shards."""
    texts = list(documents(SourceConfig()))
    lines = "".join(json.dumps({"text": each.text}) + "\n" for each in texts)
    (folder / "text.jsonl").write_text(lines)
    (folder / "copies.jsonl").write_text(lines * COPIES)
    tokenizer = train_bpe((each.text for each in texts), 4096)
    tokenizer.save(folder / "tokenizer.json")
    ids = [np.append(each, tokenizer.eod_id) for each in encode(texts, tokenizer)]
    (folder / "shards").mkdir()
    dice, total = np.random.default_rng(0), 0
    for number in range(SHARDS):
        writer = ShardWriter(folder / "shards" / f"shard_{number}", dtype_for(tokenizer.vocab_size))
        while total < TOKENS * (number + 1) // SHARDS:
            for i in dice.permutation(len(ids)):
                writer.add(ids[i])
                total += len(ids[i])
        writer.finish()


def resident_mb() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def read(folder: Path, source: str, tokens: int) -> dict[str, Any]:
    """Shuffled batches until so many tokens (0: an epoch); what it took, opening (and tokenising) included."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        data = DataConfig(
            seq_len=SEQ_LEN, blend=[SourceConfig(source=str(folder / source))], validation_fraction=0.0, prefetch=0,
            cache_dir=cache,
        )  # fmt: skip
        before = resident_mb()
        started = time.perf_counter()
        with PackedLoader(data, tokenizer, seed=0, global_batch_size=ROWS, progress=lambda text: None) as loader:
            opened = time.perf_counter() - started
            done, most, tokens = 0, 0.0, tokens or loader.tokens_per_epoch[0]
            first = None
            while done < tokens:
                done += next(loader).input_ids.numel()
                most = max(most, resident_mb())
                first = first or most
        seconds = time.perf_counter() - started
    return {
        "tokens": done, "seconds": seconds, "tokens_per_second": done / seconds, "opening_seconds": opened,
        "growth_mb": most - first, "over_idle_mb": most - before,
    }  # fmt: skip


def make(folder: Path, workers: int) -> dict[str, Any]:
    """Shards of copies of the text; one worker uses one core only, as each of many does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        started = time.perf_counter()
        source = SourceConfig(source=str(folder / "copies.jsonl"))
        manifest = tokenize(
            [source],
            str(folder / "tokenizer.json"),
            Path(out),
            workers=workers,
            shard_bytes=2 << 20,
            say=lambda _: None,
        )
        seconds = time.perf_counter() - started
    return {"tokens": manifest["tokens"], "seconds": seconds, "tokens_per_second": manifest["tokens"] / seconds}


def sweep(folder: Path) -> dict[str, Any]:
    """Every step of cleaning over the text."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        started = time.perf_counter()
        report = clean([SourceConfig(source=str(folder / "text.jsonl"))], Path(out) / "kept.jsonl", say=lambda _: None)
        seconds = time.perf_counter() - started
    return {
        "documents": report.read, "kept": report.kept, "seconds": seconds,
        "megabytes_per_second": report.characters_read / 1e6 / seconds,
    }  # fmt: skip


WORK = {
    "shards": lambda folder: read(folder, "shards", TOKENS),
    "jsonl": lambda folder: read(folder, "text.jsonl", 0),
    "tokenize, one core": lambda folder: make(folder, 1),
    "tokenize, a process a core": lambda folder: make(folder, os.cpu_count() or 1),
    "clean": sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(WORK[args.work](args.folder)))
        return
    import datasketch  # noqa: F401  (cleaning needs it: said before minutes of work)

    found: dict[str, Any] = {"command": "python benchmarks/data.py", "machine": machine(), "rows": []}
    if args.rounds != 3:
        found["command"] += f" --rounds {args.rounds}"
    with tempfile.TemporaryDirectory(prefix="nemo_lite_data_") as name:
        prepare(Path(name))
        found["shards"] = {"tokens": TOKENS, "files": SHARDS, "rows": ROWS, "seq_len": SEQ_LEN}
        for work in WORK:
            command = [sys.executable, __file__, "--work", work, "--folder", name]
            rounds = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
                for _ in range(args.rounds)
            ]
            rounds.sort(key=lambda row: row["seconds"])
            found["rows"].append({"work": work, **rounds[len(rounds) // 2], "rounds": [r["seconds"] for r in rounds]})
            print(json.dumps(found["rows"][-1]), flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
