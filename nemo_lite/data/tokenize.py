"""`nemo-lite data tokenize`: text to Megatron shards, by many processes, in pieces that do not depend on how many.

Sources are cut into parts of about the same size (`sources.cut`), part n becomes shard_n. Which parts there are depends
on the files and the size alone, so any number of workers, and a call that goes on after another was killed, write the
same bytes. manifest.json is replaced after every shard; what it lists is on disk.
"""

from __future__ import annotations

import concurrent.futures as futures
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lite.config import SourceConfig, UserError
from nemo_lite.data.mixture import content
from nemo_lite.data.shards import MANIFEST_FORMAT, ShardWriter, dtype_for, read_manifest, total
from nemo_lite.data.sources import Document, Part, ReadStats, batches, cut, encode, text_hash
from nemo_lite.data.tokenizer import Tokenizer, load_tokenizer
from nemo_lite.train.metrics import write_atomically

Job = tuple[str, SourceConfig, Part]  # name of the shard, what it is of
SAMPLES, SAMPLE = 32, 1 << 16  # blocks of a file that it is known again by, and bytes of each

# ------------------------------------------------------------------------------------------------- in a worker process

_worker: dict[str, Any] = {}
_PLACE = re.compile(r"(.*?)(?:[:#](\d+))?", re.DOTALL)  # of a document: file, and line or row


def _begin(tokenizer: str, folder: str, append_eod: bool, done: Any, parent: Connection | None) -> None:
    """Make a worker: open the tokenizer once. One of many ends when the other end of `parent` does, however it ends."""
    _worker.update(tokenizer=load_tokenizer(tokenizer), folder=Path(folder), append_eod=append_eod, done=done)
    if parent is None:
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def watch() -> None:
        parent.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _shard(job: Job) -> dict[str, Any]:
    """Write one shard and the list of its bad documents; the manifest's facts."""
    name, source, part = job
    tokenizer: Tokenizer = _worker["tokenizer"]
    folder, done = _worker["folder"], _worker["done"]
    tail = np.array([tokenizer.eod_id] if _worker["append_eod"] else [], np.int64)
    rejected: list[dict[str, Any]] = []
    stats = ReadStats(reject=lambda file, line, why: rejected.append({"file": file, "line": line, "reason": why}))
    writer = ShardWriter(folder / name, dtype_for(tokenizer.vocab_size))

    def with_text() -> Iterator[Document]:
        for each in part.read(source, stats):
            if each.text.strip():
                yield each
            else:
                file, line = _PLACE.fullmatch(each.name).groups()  # type: ignore[union-attr]
                rejected.append({"file": file, "line": line and int(line), "reason": "no text"})

    try:
        for group in batches(with_text()):
            tokens = 0
            for document, ids in zip(group, encode(group, tokenizer), strict=True):
                if len(ids):
                    writer.add(np.concatenate([ids, tail]), text_hash(document.text))
                    tokens += len(ids) + len(tail)
            with done.get_lock():
                done[0] += len(group)
                done[1] += tokens
        facts = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    bad = folder / f"{name}.bad.jsonl"
    bad.unlink(missing_ok=True)
    if rejected:
        bad.write_text("".join(json.dumps({"shard": name, **each}) + "\n" for each in rejected), encoding="utf-8")
    return {"name": name, "source": source.source, **facts, "rejected": len(rejected), "lines": stats.lines}


# ---------------------------------------------------------------------------------------------------------- the parent


def tokenize(
    sources: list[SourceConfig],
    tokenizer_spec: str,
    folder: Path,
    *,
    append_eod: bool = True,
    workers: int | None = None,
    shard_bytes: int = 256 << 20,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Turn sources into shards in `folder`, or go on with those that are missing there; its manifest.

    `workers`: processes (None: one a core); `shard_bytes`: about how much text becomes a shard. `say` gets lines of
    progress. Raises :class:`UserError` for sources that cannot be read, and where the folder holds something else.
    """
    tokenizer = load_tokenizer(tokenizer_spec)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(f"the tokenizer {tokenizer.name} has no end-of-document token; use --no-eod")
    jobs: list[Job] = []
    for source in sources:
        jobs += [(f"shard_{len(jobs) + i:05}", source, part) for i, part in enumerate(cut(source, shard_bytes))]
    files = {path: _known_by(path) for path in {path for _, _, part in jobs for path, _ in part.files}}
    plan = {
        "tokenizer": tokenizer.fingerprint, "eod": tokenizer.eod_id if append_eod else None,
        "sources": [content(source) for source in sources],
        "parts": [[[(name, *files[path]) for path, name in part.files], part.start, part.stop] for _, _, part in jobs],
    }  # fmt: skip
    identity = hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _run(jobs, tokenizer, tokenizer_spec, folder, append_eod, workers, identity, sources, say)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error


def _known_by(path: Path) -> tuple[int, str]:
    """Size of a file and a digest of blocks from its start to its end (up to 2 MiB: of all); its time says nothing."""
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in sorted({max(0, size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return size, digest.hexdigest()


class _alone:
    """Refuse to write into a folder that another process writes into."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        self.file = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise UserError(f"{self.folder}: another process is writing shards there") from None

    def __exit__(self, *_: object) -> None:
        (self.folder / ".lock").unlink(missing_ok=True)
        self.file.close()


def _run(
    jobs: list[Job], tokenizer: Tokenizer, spec: str, folder: Path, append_eod: bool, workers: int | None,
    identity: str, sources: list[SourceConfig], say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    for begun in (".shard_*", ".manifest.json.*", ".quarantine.jsonl.*"):  # left by a call that was killed
        for path in folder.glob(begun):
            path.unlink(missing_ok=True)
    manifest = read_manifest(folder)
    if manifest is not None and not manifest["documents"] and manifest["plan"] != identity:
        for shard in manifest["shards"]:  # of a call that found no text, such as one with the wrong --text-key
            for end in shard["files"]:
                (folder / f"{shard['name']}.{end}").unlink(missing_ok=True)
        (folder / "quarantine.jsonl").unlink(missing_ok=True)
        manifest = None
    if manifest is None:
        if any(folder.glob("*.idx")):
            raise UserError(f"{folder} holds shards that this command did not make; choose another folder")
        manifest = {
            "format": MANIFEST_FORMAT, "complete": False, "plan": identity, "parts": len(jobs),
            "tokenizer": {
                "name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size
            },
            "eod": tokenizer.eod_id if append_eod else None, "dtype": dtype_for(tokenizer.vocab_size).name,
            "sources": [content(source) for source in sources], "documents": 0, "tokens": 0, "rejected": 0,
            "shards": [],
        }  # fmt: skip
        _write(folder / "manifest.json", manifest)
    elif manifest["plan"] != identity:
        raise UserError(
            f"{folder} holds shards that this call would not make: of other sources or files, of files that have "
            f"changed, of another --shard-mb or tokenizer ({manifest['tokenizer']['name']}), or with another --no-eod; "
            "choose another folder, or remove it"
        )
    shards = {shard["name"]: shard for shard in manifest["shards"] if _there(folder, shard)}
    missing = [job for job in jobs if job[0] not in shards]
    if missing and shards:
        say(f"{folder}: {len(shards)} of {len(jobs)} shards are there, going on with the others")
    started = said = time.perf_counter()
    counts, made = np.zeros(2, np.int64), 0

    def tell() -> None:
        speed = counts[1] / max(time.perf_counter() - started, 1e-9)
        say(
            f"tokenised {made} of {len(missing)} shards: {counts[0]:,} documents, {counts[1]:,} tokens, "
            f"{speed:,.0f} tokens/s"
        )

    for shard in _work(missing, spec, folder, append_eod, workers or len(os.sched_getaffinity(0)), counts):
        if shard is not None:
            made += 1
            shards[shard["name"]] = shard
            manifest["shards"] = [shards[name] for name, _, _ in jobs if name in shards]
            for what in ("documents", "tokens", "rejected"):
                manifest[what] = total(shards.values(), what)
            _write(folder / "manifest.json", manifest)
        if time.perf_counter() - said >= 5:
            said = time.perf_counter()
            tell()
    if missing:
        tell()
    _quarantine(folder, jobs, shards)
    if not manifest["documents"]:
        raise UserError(f"there is no document with text in {', '.join(source.source for source in sources)}")
    manifest["complete"] = True
    _write(folder / "manifest.json", manifest)
    return manifest


def _there(folder: Path, shard: dict[str, Any]) -> bool:
    paths = [(folder / f"{shard['name']}.{end}", facts["bytes"]) for end, facts in shard["files"].items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _work(
    jobs: list[Job], spec: str, folder: Path, append_eod: bool, workers: int, counts: np.ndarray
) -> Iterator[dict[str, Any] | None]:
    """The facts of each shard as it is made, and now and then None; `counts` follows documents and tokens."""
    context = multiprocessing.get_context("forkserver")
    workers = min(workers, len(jobs))
    if workers <= 1:
        done = context.Array("q", 2)
        _begin(spec, str(folder), append_eod, done, None)
        for job in jobs:
            yield _shard(job)
            counts[:] = done[:]
        return
    context.set_forkserver_preload(["nemo_lite.data.tokenize"])
    done = context.Array("q", 2)
    theirs, _ours = context.Pipe(duplex=False)
    setting = (spec, str(folder), append_eod, done, theirs)
    with futures.ProcessPoolExecutor(workers, context, initializer=_begin, initargs=setting) as pool:
        waiting = {pool.submit(_shard, job) for job in jobs}
        try:
            while waiting:
                ended, waiting = futures.wait(waiting, timeout=1, return_when=futures.FIRST_COMPLETED)
                counts[:] = done[:]
                for each in ended:
                    yield each.result()
                yield None
        except futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, which a machine out of memory does; the same command goes on, fewer "
                "--workers need less"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _quarantine(folder: Path, jobs: list[Job], shards: dict[str, dict[str, Any]]) -> None:
    """quarantine.jsonl: every bad document of the finished shards, lines counted from the start of their file."""
    path, entries = folder / "quarantine.jsonl", {}
    if path.is_file():  # of shards that an earlier call finished
        for line in path.read_text(encoding="utf-8").splitlines():
            entries.setdefault(json.loads(line)["shard"], []).append(line)
    before: dict[tuple[str, Path], int] = {}
    parts = []
    for name, source, part in jobs:
        bad = folder / f"{name}.bad.jsonl"
        base = 0
        if part.files and part.stop is not None and not part.files[0][0].name.endswith(".parquet"):
            key = source.source, part.files[0][0]
            base = before.get(key, 0)
            before[key] = base + shards[name]["lines"]
        if bad.is_file():
            found = [json.loads(line) for line in bad.read_text(encoding="utf-8").splitlines()]
            entries[name] = [json.dumps({**each, "line": each["line"] and each["line"] + base}) for each in found]
            parts.append(bad)
        elif not shards[name]["rejected"]:
            entries.pop(name, None)
    lines = [line for name, _, _ in jobs for line in entries.get(name, [])]
    if lines:
        write_atomically(path, ("\n".join(lines) + "\n").encode())
    for bad in parts:
        bad.unlink()


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode() + b"\n")
