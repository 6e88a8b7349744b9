"""`nemo-lite data clean`: documents that are worth training on, and of every other one the name, step and reason.

A document passes the steps in the order of `STEPS` and is dropped by the first that objects:

length       too few or too many words
repetition   lines, paragraphs or n-grams that are repeated: the rules and limits of Gopher (Rae et al. 2021, table A1)
exact        the text of an earlier document
against      a run of 13 words that an evaluation set has too (all words of an item with fewer, from 8 on)
near         about the words of an earlier one that was kept: MinHash signatures of 5-grams, found by LSH (datasketch)

Words of the last two are runs of letters and digits in lower case. What is kept may then be rearranged for
fill-in-the-middle (Bavarian et al. 2022): prefix, suffix, middle, cut at two random characters.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lite.config import SourceConfig, UserError
from nemo_lite.data.sources import Document, ReadStats, documents, text_items
from nemo_lite.data.tokenizer import Tokenizer

STEPS = ("length", "repetition", "exact", "against", "near")
SHINGLE, PERMUTATIONS = 5, 128
OVERLAP, SHORTEST_OVERLAP = 13, 8  # words
# Shares of lines and paragraphs that are repeats, and of their characters.
REPEATED_LINES, REPEATED_PARAGRAPHS = (0.30, 0.20), (0.30, 0.20)
# n -> share of characters in the most frequent n-gram, and in n-grams that occur twice or more.
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
# Names of the tokens before prefix, suffix and middle, as published tokenizers have them.
FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)

Objection = tuple[str, str]  # kind of reason, details
_WORD = re.compile(r"\w+")


# -------------------------------------------------------------------------------------------------------------- n-grams


class Words:
    """The words of a text as 64-bit hashes, each hashed once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        known = self._known
        if len(known) > 1 << 21:  # bounds the memory; hashes are the same ever after
            known.clear()
        for word in words:
            if word not in known:
                digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                known[word] = int.from_bytes(digest, "little")
        return np.fromiter((known[word] for word in words), np.uint64, len(words))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n neighbours, uint64 [T - n + 1]; empty where there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    found = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):
            found = found * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
            found ^= found >> np.uint64(29)
    return found


# ------------------------------------------------------------------------------------------------------------ the steps


def too_short_or_long(text: str, least: int, most: int) -> Objection | None:
    count = len(text.split())
    if count < least:
        return "too few words", f"{count}, under {least}"
    if count > most:
        return "too many words", f"{count}, over {most}"
    return None


def repetitive(text: str, hashed: Words) -> Objection | None:
    """The first of Gopher's limits that a text passes."""

    def beyond(kind: str, share: float, limit: float) -> Objection | None:
        return (kind, f"{share:.0%}, over {limit:.0%}") if share > limit else None

    parts = (("lines", r"\n+", REPEATED_LINES), ("paragraphs", r"\n{2,}", REPEATED_PARAGRAPHS))
    for name, border, (limit, limit_of_characters) in parts:
        pieces = [piece for piece in re.split(border, text.strip()) if piece.strip()]
        repeats = [(piece, times) for piece, times in Counter(pieces).items() if times > 1]
        share = sum(times - 1 for _, times in repeats) / max(len(pieces), 1)
        characters = sum((times - 1) * len(piece) for piece, times in repeats) / max(len(text), 1)
        found = beyond(f"repeated {name}", share, limit)
        found = found or beyond(f"characters in repeated {name}", characters, limit_of_characters)
        if found:
            return found
    words = text.split()
    hashes = hashed(words)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    whole = max(len(text), 1)
    for n, limit in TOP_NGRAM.items():
        grams = ngrams(hashes, n)
        if len(grams):
            _, first, times = np.unique(grams, return_index=True, return_counts=True)
            # Of several that are as frequent the first in the text, whatever its hash.
            top = min(np.flatnonzero(times == times.max()), key=lambda i: first[i])
            size = int(lengths[first[top] : first[top] + n].sum()) + n - 1
            share = size * int(times[top]) / whole if times[top] > 1 else 0.0
            if found := beyond(f"characters in the top {n}-gram", share, limit):
                return found
    for n, limit in REPEATED_NGRAMS.items():
        if found := beyond(
            f"characters in repeated {n}-grams", _repeated(ngrams(hashes, n), lengths, n) / whole, limit
        ):
            return found
    return None


def _repeated(grams: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters in n-grams that occurred before, none counted twice."""
    if len(np.unique(grams)) == len(grams):
        return 0
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    seen: set[int] = set()
    i = characters = 0
    listed = grams.tolist()
    while i < len(listed):
        if listed[i] in seen:
            characters += ends[i + n] - ends[i]
            i += n
        else:
            seen.add(listed[i])
            i += 1
    return characters


class Exact:
    """Texts seen so far, as 16 bytes each; white space at the ends does not count."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def __call__(self, document: Document) -> Objection | None:
        text = document.text.strip().encode("utf-8", "surrogatepass")
        name = self._seen.setdefault(hashlib.blake2b(text, digest_size=16).digest(), document.name)
        return None if name is document.name else ("duplicate", f"of {name}")


class Near:
    """Documents kept so far, by the MinHash of their 5-grams."""

    def __init__(self, threshold: float):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UserError(
                'finding near duplicates needs the package datasketch; install it with: pip install "nemo-lite[data]", '
                "or use --skip near"
            ) from error
        self.threshold = threshold
        self._new = lambda: MinHash(PERMUTATIONS, seed=1, hashfunc=int)
        self._index = MinHashLSH(min(threshold, 0.9), PERMUTATIONS)  # it knows no more; what it finds is compared below
        self._kept: list[tuple[str, Any]] = []

    def __call__(self, document: Document, words: np.ndarray) -> Objection | None:
        if not len(words):  # nothing to compare
            return None
        grams = np.unique(ngrams(words, min(SHINGLE, len(words))) >> np.uint64(32)).tolist()
        sketch = self._new()
        for start in range(0, len(grams), 1 << 14):  # bounds the memory of a long document
            sketch.update_batch(grams[start : start + (1 << 14)])
        for number in sorted(self._index.query(sketch)):
            name, other = self._kept[number]
            if (likeness := sketch.jaccard(other)) >= self.threshold:
                return "near duplicate", f"{likeness:.2f} like {name}"
        self._index.insert(len(self._kept), sketch)
        self._kept.append((document.name, sketch))
        return None


class Against:
    """Runs of words of evaluation sets."""

    def __init__(self, files: Sequence[Path], hashed: Words):
        self._grams: dict[int, dict[int, str]] = {}
        self.items = self.too_short = 0
        for file in files:
            for name, text in text_items(file):
                words = hashed(_WORD.findall(text.lower()))
                n = min(OVERLAP, len(words))
                self.items += 1
                if n < SHORTEST_OVERLAP:  # would be found everywhere
                    self.too_short += 1
                    continue
                for gram in ngrams(words, n).tolist():
                    self._grams.setdefault(n, {}).setdefault(gram, name)
        if not self._grams:
            raise UserError(
                f"--against {', '.join(map(str, files))}: no text in it has {SHORTEST_OVERLAP} words or more"
            )

    def __call__(self, words: np.ndarray) -> Objection | None:
        for n, known in self._grams.items():
            for gram in ngrams(words, n).tolist():
                if gram in known:
                    return "in an evaluation set", f"{n} words in a row of {known[gram]}"
        return None


# ------------------------------------------------------------------------------------------------------------------ FIM


def fim_tokens(tokenizer: Tokenizer, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The tokenizer's tokens before prefix, suffix and middle: those asked for, or of known names."""
    for names in [tuple(asked)] if asked else FIM_TOKENS:
        if all(tokenizer.special_id(name) is not None for name in names):
            return names
    what = f"special tokens {' '.join(asked)}" if asked else "fill-in-the-middle tokens of a known name"
    raise UserError(
        f"the tokenizer {tokenizer.name} has no {what}; name three of its tokens with --fim-tokens, or train one with "
        "`nemo-lite tokenizer train --special NAME`"
    )


def rearrange(document: Document, rate: float, names: tuple[str, ...]) -> Document:
    """The document, or with probability `rate` its prefix, suffix and middle in this order; the text decides, so that a
    second pass does the same. A text that spells one of the tokens stays as it is."""
    text = document.text
    seed = hashlib.blake2b(b"fim" + text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    dice = random.Random(int.from_bytes(seed, "little"))
    if dice.random() >= rate or any(name in text for name in names):
        return document
    first, second = sorted(dice.randint(0, len(text)) for _ in range(2))
    parts = text[:first], text[second:], text[first:second]
    return Document("".join(part for pair in zip(names, parts, strict=True) for part in pair), document.name, names)


# ------------------------------------------------------------------------------------------------------------- the pass


@dataclass
class Report:
    """What a pass read, kept and dropped; `steps`: step -> kind of reason -> documents."""

    read: int = 0
    kept: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    rearranged: int = 0
    steps: dict[str, Counter] = field(default_factory=dict)
    characters: Counter = field(default_factory=Counter)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        steps = {
            step: {"dropped": kinds.total(), "characters": self.characters[step], "reasons": dict(kinds)}
            for step, kinds in self.steps.items()
        }
        counts = {name: getattr(self, name) for name in ("read", "kept", "characters_read", "characters_kept")}
        return {**counts, "rearranged": self.rearranged, "steps": steps}

    def rows(self) -> list[list[str]]:
        """As a table: step, reason, documents, characters; the first row is the header."""
        rows = [["step", "reason", "documents", "characters"]]
        rows.append(["read", "", f"{self.read:,}", f"{self.characters_read:,}"])
        for step, kinds in self.steps.items():
            rows.append([step, "dropped", f"{kinds.total():,}", f"{self.characters[step]:,}"])
            if kinds:
                rows += [["", f"- {kind}", f"{count:,}", ""] for kind, count in kinds.most_common()]
        rows.append(["kept", "", f"{self.kept:,}", f"{self.characters_kept:,}"])
        if self.rearranged:
            rows.append(["", "- rearranged for fill-in-the-middle", f"{self.rearranged:,}", ""])
        return rows


def clean(
    sources: Sequence[SourceConfig],
    out: Path,
    *,
    against: Sequence[Path] = (),
    skip: Sequence[str] = (),
    words: tuple[int, int] = (50, 100_000),
    near: float = 0.8,
    fim: float = 0.0,
    fim_names: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Report:
    """Write the documents of `sources` that pass every step not in `skip` to the jsonl `out`, and the others' names and
    reasons to `dropped_file(out)`.

    `words`: fewest and most of a document; `near`: the likeness (Jaccard, of 5-grams) that makes a duplicate; `fim`:
    the share that is rearranged with the tokens `fim_names`. Both files appear when all is done; a list of dropped
    documents without its `out` is replaced. Raises :class:`UserError` for sources that cannot be read, and where `out`
    exists or is named as no jsonl is.
    """
    if out.suffix != ".jsonl":  # read as one plain text, whatever is in it
        raise UserError(f"{out} would hold jsonl; end its name with .jsonl")
    if out.exists():
        raise UserError(f"{out} exists; move it away, or write to another file")
    hashed, exact = Words(), Exact()
    steps = [step for step in STEPS if step not in skip and (step != "against" or against)]
    similar = Near(near) if "near" in steps else None
    overlap = Against(against, hashed) if "against" in steps else None
    if overlap is not None and overlap.too_short:
        few = f"{overlap.too_short} of {overlap.items} evaluation texts"
        say(f"{few} have under {SHORTEST_OVERLAP} words and are not looked for")
    report = Report(steps={step: Counter() for step in ("unreadable", *steps)})

    def objection(document: Document) -> tuple[str, Objection] | None:
        normal: np.ndarray | None = None
        for step in steps:
            if step in ("near", "against") and normal is None:
                normal = hashed(_WORD.findall(document.text.lower()))
            found: Objection | None = None
            if step == "length":
                found = too_short_or_long(document.text, *words)
            elif step == "repetition":
                found = repetitive(document.text, hashed)
            elif step == "exact":
                found = exact(document)
            elif similar is not None and normal is not None and step == "near":
                found = similar(document, normal)
            elif overlap is not None and normal is not None:
                found = overlap(normal)
            if found is not None:
                return step, found
        return None

    partial = [path.with_name(f".{path.name}.{os.getpid()}") for path in (out, dropped_file(out))]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial[0].open("w", encoding="utf-8") as kept, partial[1].open("w", encoding="utf-8") as dropped:

            def drop(name: str, step: str, kind: str, detail: str, size: int = 0) -> None:
                report.steps[step][kind] += 1
                report.characters[step] += size
                dropped.write(json.dumps({"document": name, "step": step, "reason": f"{kind}: {detail}"}) + "\n")

            def reject(file: str, line: int | None, why: str) -> None:
                report.read += 1
                drop(file if line is None else f"{file}:{line}", "unreadable", "bad document", why)

            for document in _read(sources, reject):
                report.read += 1
                report.characters_read += len(document.text)
                if (found := objection(document)) is not None:
                    step, (kind, detail) = found
                    drop(document.name, step, kind, detail, len(document.text))
                else:
                    report.kept += 1
                    report.characters_kept += len(document.text)
                    changed = rearrange(document, fim, fim_names) if fim else document
                    report.rearranged += changed is not document
                    record: dict[str, Any] = {"text": changed.text, "name": changed.name}
                    kept.write(json.dumps(record | ({"fim": changed.fim} if changed.fim else {})) + "\n")
                if report.read % 10_000 == 0:
                    say(f"{report.read:,} documents read, {report.kept:,} kept")
        for path, work in zip((out, dropped_file(out)), partial, strict=True):
            os.replace(work, path)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error})") from error
    finally:
        for work in partial:
            work.unlink(missing_ok=True)
    return report


def _read(sources: Sequence[SourceConfig], reject: Callable[[str, int | None, str], None]) -> Iterator[Document]:
    for source in sources:
        yield from documents(source, on_bad_line="skip", stats=ReadStats(reject=reject))


def dropped_file(out: Path) -> Path:
    """Where the names of dropped documents go: x.jsonl -> x.dropped.jsonl."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.dropped.jsonl")
