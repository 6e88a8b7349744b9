"""Megatron's shards of tokens, a pair of files each: NAME.bin, ids back to back, and NAME.idx, where documents start.

`write_shard` makes what megatron-core's IndexedDataset reads, `read_index` reads what its builder makes, and
`open_shards` turns a folder of them (or one) into a source of a blend: memory-mapped, never tokenised again. A folder
that `nemo-lite data tokenize` made also holds manifest.json, which names the tokenizer and every file's checksum, and
NAME.hash, 8 bytes a document that decide on which side of the validation split it falls.

.idx, little-endian: "MMIDIDX\\0\\0", version 1 (u64), type of ids (u8), sequences (u64), documents + 1 (u64); then for
each sequence its length (i32) and its first byte in .bin (i64), and the first sequence of each document and of none
(i64).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.data.sources import Mapped, Split, TokenSource, ranges, source_kind
from nemo_lite.data.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")  # version, type, sequences, documents + 1
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
CODES = {np.dtype(name): code for code, name in TYPES.items()}
MANIFEST_FORMAT = 1
CHECKED_DOCUMENTS = 1000  # of a shard without manifest, whose ids and ends are looked at when it is opened


def dtype_for(vocab_size: int) -> np.dtype:
    """Megatron's own choice: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def digest(path: Path) -> str:
    """Checksum of a file, as `b2sum -l 128` prints it."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def document_hash(ids: np.ndarray) -> int:
    """64 bits that depend on a document's ids alone, whatever type they are stored in."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest(), "little")


# -------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes PREFIX.bin document by document, then PREFIX.idx and PREFIX.hash; each appears whole or not at all."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype = prefix, dtype
        self._lengths: list[int] = []
        self._hashes: list[int] = []
        # A name of its own: an interrupted call's worker may still be writing the same shard.
        self._work = {end: prefix.with_name(f".{prefix.name}.{end}.{os.getpid()}") for end in ("bin", "idx", "hash")}
        self._bin = self._work["bin"].open("wb")
        self._sum = hashlib.blake2b(digest_size=16)

    def add(self, ids: np.ndarray, hashed: int | None = None) -> None:
        """A document, at least one id, and the hash of its text that its split follows (None: that of its ids)."""
        data = ids.astype(self.dtype).tobytes()
        self._bin.write(data)
        self._sum.update(data)
        self._lengths.append(len(ids))
        self._hashes.append(document_hash(ids) if hashed is None else hashed)

    def finish(self) -> dict[str, Any]:
        """Put the files in place; documents, tokens, sizes and checksums. Without a document there are no files."""
        facts = {"documents": len(self._lengths), "tokens": sum(self._lengths), "files": {}}
        self._bin.close()
        if not self._lengths:
            self.abandon()
            return facts
        self._work["idx"].write_bytes(index_bytes(np.array(self._lengths), self.dtype))
        self._work["hash"].write_bytes(np.array(self._hashes, dtype="<u8").tobytes())
        for end, path in self._work.items():
            checksum = self._sum.hexdigest() if end == "bin" else digest(path)
            facts["files"][end] = {"bytes": path.stat().st_size, "blake2b": checksum}
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, self.prefix.with_name(f"{self.prefix.name}.{end}"))
        return facts

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._bin.close()
        for path in self._work.values():
            path.unlink(missing_ok=True)


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The .idx of documents of one sequence each."""
    count = len(lengths)
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    head = MAGIC + HEADER.pack(1, CODES[dtype], count, count + 1)
    documents = np.arange(count + 1, dtype="<i8")
    return head + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + documents.tobytes()


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Index:
    """What an .idx says: documents that begin at id `start` of .bin and are `length` ids long; int64 [D] each."""

    dtype: np.dtype
    start: np.ndarray
    length: np.ndarray
    content: bytes = field(repr=False)


def read_index(path: Path) -> Index:
    """Read an .idx; UserError where it is none, is damaged, or does not fit its .bin."""
    try:
        content = path.read_bytes()
        size = path.with_suffix(".bin").stat().st_size
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    start = len(MAGIC) + HEADER.size
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise UserError(f"{path} is no Megatron index")
    version, code, sequences, documents = HEADER.unpack_from(content, len(MAGIC))
    if version != 1 or code not in TYPES:
        raise UserError(f"{path}: version {version} with ids of type {code} cannot be read")
    rest = len(content) - start - 12 * sequences - 8 * documents
    if rest == sequences > 0:
        raise UserError(f"{path} is of a multimodal data set, and only text can be read")
    if rest != 0:
        raise UserError(f"{path} is damaged: its length is not what its header says")
    dtype = np.dtype(TYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, start).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, start + 4 * sequences)
    firsts = np.frombuffer(content, "<i8", documents, start + 12 * sequences)
    ends = np.cumsum(lengths)
    bounds = np.concatenate([[0], ends])
    if not np.array_equal(pointers, bounds[:-1] * dtype.itemsize) or np.any(lengths < 0):
        raise UserError(f"{path}: its sequences do not follow each other in the .bin, which is not supported")
    if not documents or firsts[0] != 0 or firsts[-1] != sequences or np.any(np.diff(firsts) < 0):
        raise UserError(f"{path}: its documents do not cover its sequences")
    if size != bounds[-1] * dtype.itemsize:
        raise UserError(
            f"{path.with_suffix('.bin')} is damaged: it has {size} bytes, not {bounds[-1] * dtype.itemsize}"
        )
    offsets = bounds[firsts]
    return Index(dtype, offsets[:-1], np.diff(offsets), content)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of a folder of shards, or None where there is none."""
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != MANIFEST_FORMAT:
            raise UserError(f"{path} is of another version of nemo_lite; tokenise the text again")
        found["tokenizer"]["fingerprint"], found["shards"], found["complete"]
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error


@dataclass
class ShardSource(TokenSource):
    """One split of shards. Document d begins at id `begin[d]` of file `part[d]`, and `offsets` only counts."""

    part: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), repr=False)
    begin: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    vocab_size: int = 0

    def read(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """As TokenSource's; UserError for an id that the tokenizer does not have."""
        assert self.mapped is not None
        part, first, count = self.part[document], self.begin[document] + start, stop - start
        numbers = np.unique(part)
        if len(numbers) == 1:
            found = self.mapped.ids[numbers[0]][ranges(first, count)]
        else:
            found = np.empty(int(count.sum()), np.int64)
            place = np.cumsum(count) - count
            for number in numbers:
                own = np.flatnonzero(part == number)
                found[ranges(place[own], count[own])] = self.mapped.ids[number][ranges(first[own], count[own])]
        self.mapped.count(len(found), len(document))
        if len(found) and (int(found.max()) >= self.vocab_size or int(found.min()) < 0):
            raise UserError(
                f"data source {self.name}: it holds the id {int(found.max())}, and the tokenizer has "
                f"{self.vocab_size}; name the tokenizer that made it"
            )
        return found


def open_shards(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, split: Split, say: Callable[[str], None]
) -> ShardSource:
    """One split of a folder of shards, or of one shard, memory-mapped.

    A document belongs to validation by a hash of its text, as in a source of text; of shards that `data tokenize` did
    not write by a hash of its ids, which are read through once, and the hashes kept in the cache. Raises
    :class:`UserError` where a shard is damaged, another tokenizer made it, or its documents do not end as
    data.append_eod says.
    """
    name, fraction = source.source, data.validation_fraction
    folder, manifest, paths = _find(source, tokenizer)
    indices = [read_index(each) for each in paths]
    known = {shard["name"]: shard["files"] for shard in manifest["shards"]} if manifest is not None else {}
    prints = [
        known[each.stem]["bin"]["blake2b"] if each.stem in known else _fingerprint(each, index)
        for each, index in zip(paths, indices, strict=True)
    ]
    mapped = Mapped((each.with_suffix(".bin"), index.dtype) for each, index in zip(paths, indices, strict=True))
    _check_ends(name, data, tokenizer, manifest, mapped, indices)

    parts, begins, lengths = [], [], []
    for number, (each, index) in enumerate(zip(paths, indices, strict=True)):
        keep = index.length > 0
        if split != "all" and fraction > 0:
            hashes = _hashes(each, index, mapped, number, prints[number], each.stem in known, data, say)
            keep &= held_out(hashes, fraction) == (split == "validation")
        elif split == "validation":
            keep &= False
        parts.append(np.full(int(keep.sum()), number, np.int32))
        begins.append(index.start[keep])
        lengths.append(index.length[keep])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]))]).astype(np.int64)
    what = json.dumps([prints, split, fraction]).encode()
    meta = {"fingerprint": hashlib.blake2b(what, digest_size=16).hexdigest(), "manifest": manifest is not None}
    empty = np.empty(0, np.int32)
    return ShardSource(
        name, split, folder, empty, offsets, meta, mapped,
        np.concatenate([empty, *parts]), np.concatenate([np.empty(0, np.int64), *begins]), tokenizer.vocab_size,
    )  # fmt: skip


def _find(source: SourceConfig, tokenizer: Tokenizer) -> tuple[Path, dict[str, Any] | None, list[Path]]:
    """Folder, manifest and .idx files of a source; UserError where they are not finished, or another tokenizer's."""
    name = source.source
    _, path = source_kind(source)
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder)
    if path.is_file():
        paths = [path]
        if manifest is not None and path.stem not in {shard["name"] for shard in manifest["shards"]}:
            manifest = None
    elif manifest is not None:
        if not manifest["complete"]:
            raise UserError(
                f"data source {name}: tokenising it did not end, {len(manifest['shards'])} of {manifest['parts']} "
                "shards are made; the same `nemo-lite data tokenize` goes on"
            )
        paths = [folder / f"{shard['name']}.idx" for shard in manifest["shards"] if shard["documents"]]
    else:
        paths = sorted(folder.glob("*.idx"))
    if manifest is not None and manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"data source {name}: its tokens are of the tokenizer {manifest['tokenizer']['name']}, not of "
            f"{tokenizer.name}; name that one in data.tokenizer, or tokenise the text again"
        )
    return folder, manifest, paths


def known_shard_tokens(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> int:
    """Tokens of the training split, estimated where the documents have no hashes yet."""
    _, manifest, paths = _find(source, tokenizer)
    fraction, cache = data.validation_fraction, Path(data.cache_dir).expanduser()
    tokens = 0
    for path in paths:
        index = read_index(path)
        file = path.with_suffix(".hash")
        if manifest is None:
            file = cache / f"shard-{_fingerprint(path, index)}.hash"
        if fraction == 0 or not file.is_file():
            tokens += round(int(index.length.sum()) * (1 - fraction))
        else:
            tokens += int(index.length[~held_out(np.fromfile(file, "<u8"), fraction)].sum())
    return tokens


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents of these hashes belong to validation, bool [D]."""
    return hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def _fingerprint(path: Path, index: Index) -> str:
    """Of a shard without manifest: its index, and 64 blocks of 4 KiB out of its ids, which may be many."""
    found = hashlib.blake2b(index.content, digest_size=16)
    with path.with_suffix(".bin").open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for place in np.linspace(0, max(size - 4096, 0), 64).astype(int):
            file.seek(int(place))
            found.update(file.read(4096))
    return found.hexdigest()


def _check_ends(
    name: str, data: DataConfig, tokenizer: Tokenizer, manifest: dict | None, mapped: Mapped, indices: list[Index]
) -> None:
    """Whether documents end as data.append_eod says, and the ids are the tokenizer's: shards are taken as they are."""
    if manifest is not None:
        ends = manifest["eod"] is not None
    else:
        ends = None
        for ids, index in zip(mapped.ids, indices, strict=True):
            some = np.flatnonzero(index.length)[:CHECKED_DOCUMENTS]
            if len(some):
                last = ids[index.start[some] + index.length[some] - 1]
                ends = bool(np.all(last == tokenizer.eod_id)) if tokenizer.eod_id is not None else False
                break
    if ends is not None and ends != data.append_eod:
        which = "do not end with" if data.append_eod else "end with"
        raise UserError(
            f"data source {name}: its documents {which} the end-of-document token of {tokenizer.name}; set "
            f"data.append_eod={str(ends).lower()}, or tokenise the text again"
        )


def _hashes(
    path: Path, index: Index, mapped: Mapped, number: int, fingerprint: str, ours: bool, data: DataConfig,
    say: Callable[[str], None],
) -> np.ndarray:  # fmt: skip
    """64 bits a document, uint64 [D]: kept beside our shards, of others made once and kept in the cache."""
    cache = Path(data.cache_dir).expanduser()
    file = path.with_suffix(".hash") if ours else cache / f"shard-{fingerprint}.hash"
    if file.is_file():
        found = np.fromfile(file, "<u8")
        if len(found) == len(index.length):
            return found
        if ours:
            raise UserError(f"{file} is damaged: it has {len(found)} documents, not {len(index.length)}")
    elif ours:
        raise UserError(f"{file} is missing, and says which documents are held out; tokenise the text again")
    say(f"hashing the documents of {path}")
    ids, made = mapped.ids[number], np.empty(len(index.length), "<u8")
    for i, (start, length) in enumerate(zip(index.start.tolist(), index.length.tolist(), strict=True)):
        made[i] = document_hash(ids[start : start + length])
        mapped.count(length, 1)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(dir=cache)
        with os.fdopen(handle, "wb") as out:
            out.write(made.tobytes())
        os.chmod(work, 0o644)
        os.replace(work, cache / f"shard-{fingerprint}.hash")
    except OSError as error:
        raise UserError(f"data.cache_dir: {cache} cannot be written ({error.strerror or error})") from error
    return made


def total(shards: Iterable[dict[str, Any]], what: str) -> int:
    """Sum of a count over shards of a manifest."""
    return sum(shard[what] for shard in shards)
