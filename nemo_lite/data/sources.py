"""Where text comes from, and its tokens kept on disk.

`documents` reads a source of a recipe one document at a time, always in the same order, split into train and
validation by a hash of the document's content. `open_source` tokenises a split once and keeps the result in the token
cache: a flat array of ids (uint16 or uint32, memory-mapped) and where each document starts. A source that is shards
already (`shards.py`) is mapped as it is.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "all"]

CACHE_FORMAT = 1
_LINE_FILES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
# Tests would be a third of the standard library, bundled wheels are no text, and the rest is other people's code.
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_FOLDER_SKIP = {"__pycache__", "node_modules"}
_NEED_DATA = 'install it with: pip install "nemo-lite[data]"'


@dataclass(frozen=True)
class Document:
    """One document: its text, and where it came from (a file relative to the source, with line or row).

    `fim`: special tokens spelled in the text that count as such (prefix, suffix, middle), where `nemo-lite data clean`
    rearranged it for fill-in-the-middle; any other text is only text.
    """

    text: str
    name: str
    fim: tuple[str, ...] = ()

    def pieces(self) -> list[str]:
        """The plain text after each token of `fim` (without any, the text)."""
        found, rest = [], self.text
        for name in self.fim:
            before, name, rest = rest.partition(name)
            found.append(before)
        return [*found[1:], rest] if self.fim else [rest]


@dataclass
class ReadStats:
    """What a pass over a source met; `bad_lines` and `undecodable` were left out."""

    documents: int = 0
    bad_lines: int = 0
    undecodable: int = 0
    first_bad: str = ""
    lines: int = field(default=0, compare=False)  # of line files, read so far
    # Told file, line or row, and reason of what is bad.
    reject: Callable[[str, int | None, str], None] | None = field(default=None, compare=False)


# ------------------------------------------------------------------------------------------------------ finding files


def stdlib_folder() -> Path:
    """Folder of the running Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "os.py").is_file():
        raise UserError(f"stdlib: the sources of the standard library are not at {folder}; name another data source")
    return folder


def _walk(folder: Path, include: Iterable[str], skip: set[str]) -> Iterator[Path]:
    """Files under `folder` whose name matches a pattern, in sorted order; hidden folders and files are left out."""
    patterns = list(include)
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                found.append(Path(root, name))
    # By relative name with / between the parts, so that the order does not depend on the system.
    yield from sorted(found, key=lambda path: path.relative_to(folder).as_posix())


Kind = Literal["stdlib", "hf", "folder", "file", "shards"]


def source_kind(source: SourceConfig) -> tuple[Kind, Path]:
    """What a source is, and its path; of a single shard the path of its .idx."""
    name = source.source
    if name == "stdlib":
        return "stdlib", stdlib_folder()
    if name.startswith("hf:"):
        return "hf", Path(name[3:])
    path = Path(name).expanduser()
    index = path.with_suffix(".idx") if path.suffix in (".idx", ".bin") else path.with_name(f"{path.name}.idx")
    if index.is_file():
        return "shards", index
    if path.is_dir() and (any(path.glob("*.idx")) or (path / "manifest.json").is_file()):
        return "shards", path
    if path.is_dir():
        return "folder", path
    if path.is_file():
        return "file", path
    raise UserError(
        f"data source {name}: there is no such file or folder; give a path, `stdlib`, or `hf:NAME` for a Hugging Face "
        "dataset"
    )


def _files(kind: str, root: Path, source: SourceConfig) -> list[tuple[Path, str]]:
    """(path, relative name) of every file of a local source."""
    if kind == "file":
        return [(root, root.name)]
    include = ["*.py"] if kind == "stdlib" else list(source.include)
    skip = _STDLIB_SKIP if kind == "stdlib" else _FOLDER_SKIP
    found = [(path, path.relative_to(root).as_posix()) for path in _walk(root, include, skip)]
    if kind == "stdlib":  # written when Python was built: full of paths of that machine
        found = [(path, name) for path, name in found if not path.name.startswith("_sysconfigdata")]
    if not found:
        raise UserError(f"data source {source.source}: no file in it matches include = {include}")
    return found


# ---------------------------------------------------------------------------------------------------------- reading


def _decode_file(path: Path) -> str | None:
    """Text of a file, line ends kept; None if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


class _Zst(io.RawIOBase):
    """Reads a .zst file of one or more frames. The package's own reader takes a file that was cut off for its end."""

    def __init__(self, path: Path, zstandard: Any):
        self._file = path.open("rb")
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._frame = self._frame or self._new()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_lines(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path}: reading .zst needs the package zstandard; {_NEED_DATA}") from error
        return io.BufferedReader(_Zst(path, zstandard), 1 << 20)
    return path.open("rb")


def _text_of(line: bytes, text_key: str) -> tuple[str, tuple[str, ...]]:
    """The text in a line of jsonl and its fill-in-the-middle tokens; ValueError with what is wrong."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON (not UTF-8 at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object with the key `{text_key}` is expected")
    if text_key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise ValueError(f"no key `{text_key}` (it has: {keys}); set text_key")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"`{text_key}` holds a {type(text).__name__}, not a text")
    fim = record.get("fim")
    if not isinstance(fim, list) or not all(isinstance(name, str) and text.count(name) == 1 for name in fim):
        return text, ()  # somebody else's key
    where = [text.index(name) for name in fim]
    return text, tuple(fim) if where == sorted(where) and where[:1] == [0] else ()


def _read_lines(
    path: Path, name: str, source: SourceConfig, on_bad_line: str, stats: ReadStats, span: tuple[int, int] | None = None
) -> Iterator[Document]:
    """Documents of a line file; of a plain one those of the lines that start in bytes `span`, counted from 1 there."""
    read_errors: tuple[type[BaseException], ...] = (OSError, EOFError, zlib.error)
    if path.name.endswith(".zst"):
        try:
            import zstandard

            read_errors += (zstandard.ZstdError,)
        except ImportError:
            pass  # _open_lines says so
    number = 0
    try:
        with _open_lines(path) as lines:
            left = None
            if span is not None:
                lines.seek(max(span[0] - 1, 0))
                left = span[1] - span[0]
                if span[0] > 0:  # a line that starts before is another part's
                    left -= len(lines.readline()) - 1
            for number, line in enumerate(lines, 1):
                if left is not None and left <= 0:
                    break
                left = left - len(line) if left is not None else None
                stats.lines += 1
                if not line.strip():
                    continue
                try:
                    text, fim = _text_of(line, source.text_key)
                except ValueError as error:
                    where = f"{path}:{number}: {error}"
                    if on_bad_line == "fail":
                        raise UserError(f"{where}; with on_bad_line=skip such lines are left out") from error
                    stats.bad_lines += 1
                    stats.first_bad = stats.first_bad or where
                    if stats.reject is not None:
                        stats.reject(name, number, str(error))
                    continue
                yield Document(text, f"{name}:{number}", fim)
    except read_errors as error:
        raise UserError(f"{path} cannot be read beyond line {number} ({error})") from error


def _read_parquet(
    path: Path, name: str, source: SourceConfig, stats: ReadStats, groups: tuple[int, int] | None = None
) -> Iterator[Document]:
    """Documents of a parquet file, or of its row groups `groups`."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs the package pyarrow; {_NEED_DATA}") from error
    try:
        with parquet.ParquetFile(path) as table:
            if source.text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path}: no column `{source.text_key}` (it has: {columns}); set text_key")
            first, last = groups or (0, table.num_row_groups)
            row = sum(table.metadata.row_group(i).num_rows for i in range(first))
            chosen = range(first, last)
            for batch in table.iter_batches(batch_size=1024, row_groups=chosen, columns=[source.text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield from _checked(text, name, row, source, stats)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({error})") from error


def _checked(text: Any, name: str, row: int, source: SourceConfig, stats: ReadStats) -> Iterator[Document]:
    """A cell of a table as a document; a missing text is none."""
    if isinstance(text, str):
        yield Document(text, f"{name}#{row}")
        return
    what = f"`{source.text_key}` holds a {type(text).__name__}, not a text"
    if stats.reject is not None:
        what = what if text is not None else f"no `{source.text_key}`"
        stats.bad_lines += 1
        stats.first_bad = stats.first_bad or f"{name}#{row}: {what}"
        stats.reject(name, row, what)
    elif text is not None:
        raise UserError(f"{name}#{row}: {what}; set text_key")


def _hf_dataset(source: SourceConfig) -> Any:
    name = source.source[3:]
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data source {source.source}: needs the package datasets; {_NEED_DATA}") from error
    try:
        found = datasets.load_dataset(name, source.subset, split=source.split)
    except Exception as error:  # the hub, the network, a loading script: anything may go wrong in there
        raise UserError(
            f"data source {source.source}: datasets could not load it with subset={source.subset}, "
            f"split={source.split} ({type(error).__name__}: {error})"
        ) from error
    if source.text_key not in found.column_names:
        columns = ", ".join(found.column_names)
        raise UserError(f"data source {source.source}: no column `{source.text_key}` (it has: {columns}); set text_key")
    return found


def _read_hf(source: SourceConfig, stats: ReadStats, rows: tuple[int, int] | None = None) -> Iterator[Document]:
    found = _hf_dataset(source).select_columns([source.text_key])
    row, last = rows or (0, len(found))
    for batch in found.select(range(row, last)).iter(batch_size=1024):
        for text in batch[source.text_key]:
            row += 1
            yield from _checked(text, source.source, row, source, stats)


def _read(kind: Kind, root: Path, source: SourceConfig, on_bad_line: str, stats: ReadStats) -> Iterator[Document]:
    if kind == "hf":
        yield from _read_hf(source, stats)
    else:
        yield from _read_files(_files(kind, root, source), kind == "file", source, on_bad_line, stats)


def _read_files(
    files: Iterable[tuple[Path, str]], single: bool, source: SourceConfig, on_bad_line: str, stats: ReadStats
) -> Iterator[Document]:
    for path, name in files:
        if path.name.endswith(_LINE_FILES):
            yield from _read_lines(path, name, source, on_bad_line, stats)
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path, name, source, stats)
        elif (text := _decode_file(path)) is not None:
            yield Document(text, name)
        elif stats.reject is None and single:
            raise UserError(f"{path} is not UTF-8 text")
        else:
            stats.undecodable += 1
            if stats.reject is not None:
                stats.reject(name, None, "not UTF-8 text")


@dataclass(frozen=True)
class Part:
    """What one worker reads of a source: whole files, or from `start` to `stop` of one: bytes of a plain line file, row
    groups of a parquet file, rows of a Hugging Face dataset (which has no file)."""

    files: tuple[tuple[Path, str], ...] = ()
    start: int = 0
    stop: int | None = None

    def read(self, source: SourceConfig, stats: ReadStats) -> Iterator[Document]:
        """Its documents, in order; what is bad is told to `stats.reject`."""
        if self.stop is None:
            yield from _read_files(self.files, False, source, "skip", stats)
        elif not self.files:
            yield from _read_hf(source, stats, (self.start, self.stop))
        else:
            path, name = self.files[0]
            if path.name.endswith(".parquet"):
                yield from _read_parquet(path, name, source, stats, (self.start, self.stop))
            else:
                yield from _read_lines(path, name, source, "skip", stats, (self.start, self.stop))


def cut(source: SourceConfig, size: int) -> Iterator[Part]:
    """A source in parts of about `size` bytes; they depend on nothing but its files and `size`."""
    kind, root = source_kind(source)
    if kind == "shards":
        raise UserError(f"data source {source.source}: these are tokens already")
    if kind == "hf":
        found = _hf_dataset(source)
        rows = max(1, len(found) * size // max(found.data.nbytes, 1))
        for start in range(0, len(found), rows):
            yield Part(start=start, stop=min(start + rows, len(found)))
        return
    group: list[tuple[Path, str]] = []
    grouped = 0
    for path, name in _files(kind, root, source):
        here = path.stat().st_size
        if here > size and path.name.endswith((".jsonl", ".ndjson", ".parquet")):
            if group:
                yield Part(tuple(group))
                group, grouped = [], 0
            for start, stop in _row_groups(path, size) if path.name.endswith(".parquet") else _spans(here, size):
                yield Part(((path, name),), start, stop)
            continue
        group.append((path, name))
        grouped += here
        if grouped >= size:
            yield Part(tuple(group))
            group, grouped = [], 0
    if group:
        yield Part(tuple(group))


def _spans(whole: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, whole, size):
        yield start, min(start + size, whole)


def _row_groups(path: Path, size: int) -> Iterator[tuple[int, int]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs the package pyarrow; {_NEED_DATA}") from error
    try:
        facts = parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({error})") from error
    start = held = 0
    for i in range(facts.num_row_groups):
        held += facts.row_group(i).total_byte_size
        if held >= size or i + 1 == facts.num_row_groups:
            yield start, i + 1
            start, held = i + 1, 0


def text_items(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of everything that is text in an evaluation set: every string in a record of jsonl at any depth, or
    a whole file of another kind; UserError where it cannot be read."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from strings(inner)

    if not path.name.endswith(_LINE_FILES):
        if (text := _decode_file(path)) is None:
            raise UserError(f"{path} is not UTF-8 text")
        yield path.name, text
        return
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON ({error})") from error
                for text in strings(record):
                    yield f"{path.name}:{number}", text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def text_hash(text: str) -> int:
    """64 bits of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: decided by its content alone, so copies fall on the same side."""
    return text_hash(text) < fraction * 2.0**64


def _cut_file(document: Document, split: Split, fraction: float) -> Iterator[Document]:
    """A single text file is one document: its end, from the next line on, is what is held out."""
    if split == "all":
        yield document
        return
    text = document.text
    cut = len(text)
    if fraction > 0:
        cut = round(len(text) * (1 - fraction))
        line = text.find("\n", cut)
        # A last line longer than the held-out share would leave nothing: cut inside it.
        cut = line + 1 if cut and 0 <= line < len(text) - 1 else cut
    part = text[:cut] if split == "train" else text[cut:]
    if part.strip():
        yield Document(part, document.name)


def documents(
    source: SourceConfig,
    split: Split = "all",
    validation_fraction: float = 0.0,
    on_bad_line: Literal["skip", "fail"] = "fail",
    stats: ReadStats | None = None,
) -> Iterator[Document]:
    """The documents of one split of a source, always in the same order.

    Files of a folder (and of `stdlib`) and lines or rows of tables are one document each and are split by a hash of
    their content; a single text file is cut near its end. Documents of white space only are left out. What was
    skipped is counted in `stats` and reported by one warning at the end.

    Raises :class:`UserError` for a source that is missing, unreadable or without a single document in any split, and
    for a bad jsonl line under `on_bad_line="fail"`.
    """
    stats = stats if stats is not None else ReadStats()
    kind, root = source_kind(source)
    if kind == "shards":
        raise UserError(f"data source {source.source} holds tokens, and text is asked for; name the text they are of")
    single = kind == "file" and not root.name.endswith((*_LINE_FILES, ".parquet"))
    empty = True
    for document in _read(kind, root, source, on_bad_line, stats):
        if not document.text.strip():
            continue
        empty = False
        if single:
            kept: Iterable[Document] = _cut_file(document, split, validation_fraction)
        elif split == "all" or held_out(document.text, validation_fraction) == (split == "validation"):
            kept = (document,)
        else:
            continue
        for each in kept:
            stats.documents += 1
            yield each
    if stats.bad_lines:
        log.warning("data source %s: %d lines skipped, the first: %s", source.source, stats.bad_lines, stats.first_bad)
    if stats.undecodable:
        log.warning("data source %s: %d files skipped that are not UTF-8 text", source.source, stats.undecodable)
    if empty:
        why = f"; the first of {stats.bad_lines} skipped lines: {stats.first_bad}" if stats.bad_lines else ""
        why = why or (f"; {stats.undecodable} files are not UTF-8 text" if stats.undecodable else "")
        raise UserError(f"data source {source.source} is empty: it holds no document with text{why}")


# ------------------------------------------------------------------------------------------------------- token cache


# Pages of mapped files count as this process's memory until they are given back; the system keeps them as long as there
# is room. A span touches what the kernel maps around its first byte at least.
KEEP_BYTES, SPAN_BYTES = 64 << 20, 64 << 10


class Mapped:
    """Files of token ids, memory-mapped, whose pages are given back now and then."""

    def __init__(self, files: Iterable[tuple[Path, np.dtype]]):
        self._maps: list[mmap.mmap] = []
        self.ids: list[np.ndarray] = []
        self._read = 0
        for path, dtype in files:
            if not path.stat().st_size:  # cannot be mapped
                self.ids.append(np.empty(0, dtype))
                continue
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self.ids.append(np.frombuffer(self._maps[-1], dtype))

    def count(self, ids: int, spans: int) -> None:
        """So many ids of so many spans were read: gives pages back when they are many."""
        self._read += ids * 4 + spans * SPAN_BYTES
        if self._read > KEEP_BYTES:
            self._read = 0
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, .. (count[0] of them), start[1], ..; int64."""
    return np.arange(int(count.sum())) + np.repeat(start - (np.cumsum(count) - count), count)


@dataclass
class TokenSource:
    """One split of one source, tokenised.

    `tokens` [T] uint16 or uint32, documents back to back, each ended by the end-of-document token if the recipe says
    so; `offsets` [D + 1] int64, document d is `tokens[offsets[d]:offsets[d + 1]]`. `fingerprint` is a hash of both:
    equal wherever and whenever the same tokens were made.
    """

    name: str
    split: str
    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    meta: dict[str, Any] = field(repr=False)
    mapped: Mapped | None = field(default=None, repr=False)

    def read(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Tokens `start:stop` of each of some documents (int64 [n] each), one after the other."""
        found = self.tokens[ranges(self.offsets[document] + start, stop - start)]
        if self.mapped is not None:
            self.mapped.count(len(found), len(document))
        return found

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [D], all above zero."""
        return np.diff(self.offsets)


def _identity(source: SourceConfig) -> dict[str, Any]:
    """What decides a source's content without reading it."""
    kind, root = source_kind(source)
    if kind == "hf":
        found = _hf_dataset(source)
        return {"kind": kind, "name": source.source, "fingerprint": found._fingerprint, "rows": len(found)}
    listing = hashlib.blake2b(digest_size=16)
    for path, name in _files(kind, root, source):
        status = path.stat()
        listing.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    where = sys.version if kind == "stdlib" else ""
    return {"kind": kind, "root": str(root.resolve()), "python": where, "files": listing.hexdigest()}


def _cache_key(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, split: str) -> str:
    parts = {
        "format": CACHE_FORMAT,
        "identity": _identity(source),
        "text_key": source.text_key,
        "split": split,
        "validation_fraction": data.validation_fraction,
        "on_bad_line": data.on_bad_line,
        "tokenizer": tokenizer.fingerprint,
        "eod": tokenizer.eod_id if data.append_eod else None,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of each document, int64 [T]; UserError where one names special tokens that the tokenizer lacks."""
    pieces = [each.pieces() for each in documents]
    ids = iter(tokenizer.encode_batch([piece for each in pieces for piece in each], special=False))
    found = []
    for document, each in zip(documents, pieces, strict=True):
        own = [next(ids) for _ in each]
        if document.fim:
            marks = [tokenizer.special_id(name) for name in document.fim]
            if None in marks:
                raise UserError(
                    f"{document.name}: the tokenizer {tokenizer.name} has no special token "
                    f"{document.fim[marks.index(None)]}, which the text was rearranged with"
                )
            own = [part for mark, piece in zip(marks, own, strict=True) for part in (np.array([mark]), piece)]
        found.append(np.concatenate(own))
    return found


def batches(documents: Iterable[Document], characters: int = 2 << 20, count: int = 4096) -> Iterator[list[Document]]:
    """Documents in groups that keep the library's threads busy and its memory small."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= characters or len(group) >= count:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_tokens(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    eod: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write tokens.bin, offsets.npy and meta.json of a split into `folder`; returns the meta."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    content = hashlib.blake2b(digest_size=16)
    lengths: list[np.ndarray] = []
    tail = np.array([eod] if eod is not None else [], dtype=dtype)
    total = documents_done = 0
    with (folder / "tokens.bin").open("wb") as file:
        for group in batches(documents):
            encoded = [ids for ids in encode(group, tokenizer) if len(ids)]
            pieces = [piece for ids in encoded for piece in (ids.astype(dtype), tail)]
            if not pieces:
                continue
            flat = np.concatenate(pieces)
            lengths.append(np.array([len(ids) + len(tail) for ids in encoded], dtype=np.int64))
            content.update(flat.tobytes())
            file.write(flat.tobytes())
            total += len(flat)
            documents_done += len(encoded)
            progress(documents_done, total)
    offsets = np.zeros(documents_done + 1, dtype=np.int64)
    if lengths:
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
    content.update(offsets.astype("<i8").tobytes())
    np.save(folder / "offsets.npy", offsets)
    return {"dtype": dtype.name, "tokens": total, "documents": documents_done, "fingerprint": content.hexdigest()}


def _load(folder: Path, name: str, split: str) -> TokenSource | None:
    """What an earlier run left in the cache, or None if there is nothing or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta["dtype"])
        offsets = np.load(folder / "offsets.npy")
        whole = (folder / "tokens.bin").stat().st_size == meta["tokens"] * dtype.itemsize
        if not whole or len(offsets) != meta["documents"] + 1 or offsets[-1] != meta["tokens"]:
            raise ValueError("its sizes do not agree with meta.json")
        mapped = Mapped([(folder / "tokens.bin", dtype)])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        log.warning("token cache %s is damaged (%s) and is made again", folder, error)
        return None
    return TokenSource(name, split, folder, mapped.ids[0], offsets, meta, mapped)


def open_source(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    split: Split = "train",
    progress: Callable[[str], None] | None = None,
) -> TokenSource:
    """One split of a source as tokens, from the cache or tokenised now.

    Safe when several processes ask at once: each works in a folder of its own, the first one to finish puts it in
    place. `progress` receives a line at the start, every few seconds, and at the end of the work; nothing is said when
    the cache has it. Raises :class:`UserError` as :func:`documents` does, and when the cache cannot be written.
    """
    eod = tokenizer.eod_id if data.append_eod else None
    if data.append_eod and eod is None:
        raise UserError(
            f"data.append_eod: the tokenizer {tokenizer.name} has no end-of-document token; set data.append_eod=false"
        )
    say = progress or log.info
    if source_kind(source)[0] == "shards":
        from nemo_lite.data.shards import open_shards

        return open_shards(source, data, tokenizer, split, say)
    root = Path(data.cache_dir).expanduser()
    folder = root / _cache_key(source, data, tokenizer, split)
    found = _load(folder, source.source, split)
    if found is not None:
        return found

    started = said = time.perf_counter()
    title = f"{source.source} ({split})"
    stats = ReadStats()

    def tell(count: int, tokens: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said >= 5:
            said = now
            say(f"tokenising {title}: {count:,} documents, {tokens:,} tokens, {tokens / (now - started):,.0f} tokens/s")

    say(f"tokenising {title} with {tokenizer.name}")
    text = documents(source, split, data.validation_fraction, data.on_bad_line, stats)
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=root))
    except OSError as error:
        raise UserError(f"data.cache_dir: {root} cannot be written ({error.strerror or error})") from error
    try:
        meta = {
            "source": source.source,
            "split": split,
            "tokenizer": tokenizer.name,
            "eod": eod,
            **_write_tokens(work, text, tokenizer, eod, tell),
        }
        meta |= {"bad_lines": stats.bad_lines, "undecodable": stats.undecodable}
        (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _put_in_place(work, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir: writing {root} failed ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = _load(folder, source.source, split)
    if found is None:
        raise UserError(f"data.cache_dir: {folder} was written but cannot be read back; is its disk full?")
    seconds = time.perf_counter() - started
    say(f"tokenised {title}: {found.num_documents:,} documents, {found.num_tokens:,} tokens in {seconds:.1f} s")
    return found


def known_tokens(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> int | None:
    """Tokens of a source's training split as far as nothing needs to be read for it; None where it would.

    Of shards whose documents were never hashed the split is an estimate.
    """
    try:
        kind, _ = source_kind(source)
        if kind == "hf":  # may be far away
            return None
        if kind == "shards":
            from nemo_lite.data.shards import known_shard_tokens

            return known_shard_tokens(source, data, tokenizer)
        folder = Path(data.cache_dir).expanduser() / _cache_key(source, data, tokenizer, "train")
        found = _load(folder, source.source, "train")
    except UserError:
        return None
    return found.num_tokens if found is not None else None


def _put_in_place(work: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; where another process was first, its folder stays."""
    work.chmod(0o755)  # mkdtemp makes it private, a cache may be shared
    try:
        os.rename(work, folder)
        return
    except OSError:
        if not folder.is_dir():
            raise
    if _load(folder, "", "") is not None:
        return
    # What is there is damaged: move it out of the way first, since a rename cannot replace a folder with files in it.
    old = folder.with_name(f"{work.name}.damaged")
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(work, folder)
