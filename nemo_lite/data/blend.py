"""The order of documents: one endless stream, made from several sources with weights.

A :class:`Blend` knows documents by index and length only. It is a function of lengths, weights and seed, so every rank
computes the same stream, whatever the number of ranks, and its position is a handful of integers.

The rule: the next document comes from the source that is furthest behind its weight, that is, with the smallest
``tokens drawn so far / weight`` (ties: the first one). Each source is drawn a whole epoch at a time, in an order
shuffled anew every epoch. At any point the tokens of a source differ from its share by less than the longest documents.
A source whose epochs are counted and read is left out, and the others go on by the same rule. New weights
(:meth:`Blend.reweigh`) begin a new count of tokens, and nothing else changes: each source goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Documents of a source that are ordered ahead at once; any value gives the same stream.
LOOKAHEAD = 4096


@dataclass
class Spans:
    """Pieces of documents in stream order; all arrays int64 [n].

    Span i is tokens ``start[i]:stop[i]`` of document ``document[i]``, ``length[i]`` tokens long, of source
    ``source[i]``.
    """

    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> np.ndarray:
        return self.stop - self.start

    def __getitem__(self, index: slice | np.ndarray) -> Spans:
        return Spans(*(array[index] for array in vars(self).values()))

    def cut(self, every: int) -> tuple[Spans, np.ndarray]:
        """The same tokens in spans that do not cross multiples of `every` tokens, and the row of each span."""
        ends = np.cumsum(self.tokens)
        total = int(ends[-1]) if len(ends) else 0
        edges = np.union1d(ends, np.arange(every, total, every, dtype=np.int64))
        starts = np.concatenate([np.zeros(1, np.int64), edges[:-1]]) if total else edges
        index = np.searchsorted(ends, starts, side="right")
        found = self[index]
        shift = found.start - (ends - self.tokens)[index]
        found.start, found.stop = starts + shift, edges + shift
        return found, starts // every


def shuffled(count: int, seed: int, source: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), int64, that depends on nothing but its arguments.

    Sorts documents by splitmix64 of their index: NumPy promises no stable random streams over its versions, and a
    checkpoint outlives them.
    """
    name = f"{seed}/{source}/{epoch}".encode()
    base = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), dtype="<u8")[0]
    with np.errstate(over="ignore"):
        z = base + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").astype(np.int64)


class _Line:
    """The documents of one source in the order they are drawn, looked at from a position that moves on."""

    def __init__(self, lengths: np.ndarray, seed: int, number: int, shuffle: bool):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed, self.number, self.shuffle = seed, number, shuffle
        self.weight: float = 0.0
        self.epochs: int | None = None
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self.place(0, 0, 0)

    def place(self, epoch: int, index: int, tokens: int) -> None:
        """Look ahead from document `index` of `epoch`, `tokens` having been drawn before it."""
        self.epoch, self.index, self.tokens = epoch, index, tokens
        # Rows: document, length, tokens drawn before, epoch, index within the epoch.
        self.ahead = np.empty((5, 0), np.int64)

    def extend(self, count: int) -> None:
        """Order documents until `count` of them (of a small source fewer) are ahead, or the source ends."""
        count = min(count, 16 * len(self.lengths))  # every epoch is a round of this loop
        parts, have = [self.ahead], self.ahead.shape[1]
        while have < count and not self.ended():
            if self.index >= len(self.lengths):
                self.epoch, self.index = self.epoch + 1, 0
            if self._epoch != self.epoch:
                number, everything = self.number, len(self.lengths)
                self._order = (
                    shuffled(everything, self.seed, number, self.epoch) if self.shuffle else np.arange(everything)
                )
                self._epoch = self.epoch
            documents = self._order[self.index : self.index + count - have]
            lengths = self.lengths[documents]
            ends = self.tokens + np.cumsum(lengths)
            positions = np.arange(self.index, self.index + len(documents))
            parts.append(np.stack([documents, lengths, ends - lengths, np.full_like(documents, self.epoch), positions]))
            self.tokens, self.index, have = int(ends[-1]), self.index + len(documents), have + len(documents)
        self.ahead = np.concatenate(parts, axis=1)

    def ended(self) -> bool:
        if self.epochs is None:
            return not len(self.lengths)
        full = self.epoch + (self.index >= len(self.lengths))
        return not len(self.lengths) or full >= self.epochs


class Blend:
    """A stream of documents from weighted sources, endless unless every source has a number of `epochs`.

    `lengths` holds the document lengths of each source in tokens, all above zero; `weights` one number a source, of any
    scale; one with weight 0 is not drawn from.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        weights: Sequence[float],
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: Sequence[int | None] | None = None,
    ):
        self._lines = [_Line(each, seed, number, shuffle) for number, each in enumerate(lengths)]
        self._drawn = [(0, 0, 0) for _ in self._lines]  # epoch, index, tokens of the next document of each source
        self._weigh(weights, epochs)
        self._reset()

    def _weigh(self, weights: Sequence[float], epochs: Sequence[int | None] | None) -> None:
        total = float(sum(weights))
        for line, weight, limit in zip(self._lines, weights, epochs or [None] * len(self._lines), strict=True):
            line.weight, line.epochs = weight / total, limit

    def reweigh(self, weights: Sequence[float], epochs: Sequence[int | None] | None = None) -> None:
        """Go on from here with other weights and numbers of epochs; a document that is begun is ended first."""
        state = self.state_dict()
        state["drawn"] = [[epoch, index, 0] for epoch, index, _ in state["drawn"]]
        self._weigh(weights, epochs)
        self.load_state_dict(state)

    def _reset(self) -> None:
        # Rows: source, document, length, tokens drawn before, epoch, index; columns in stream order. The first one may
        # be a document that was begun: its first `_begun` tokens are gone.
        self._queue = np.empty((6, 0), np.int64)
        self._begun = 0

    def _refill(self) -> bool:
        """Order more documents; False at the end of a finite stream.

        A document may join the queue only when no source could still bring one that comes before it: up to the
        smallest tokens/weight at which a source's look-ahead ends.
        """
        lines = [(number, line) for number, line in enumerate(self._lines) if line.weight > 0]
        for _, line in lines:
            line.extend(LOOKAHEAD)
        ends = [(line.tokens / line.weight, number) for number, line in lines if not line.ended()]
        horizon, last = min(ends, default=(np.inf, len(self._lines)))
        keys, columns = [], []
        for number, line in lines:
            key = line.ahead[2] / line.weight
            count = int(np.searchsorted(key, horizon, side="right" if number < last else "left"))
            keys.append(key[:count])
            columns.append(np.concatenate([np.full((1, count), number, np.int64), line.ahead[:, :count]]))
            line.ahead = line.ahead[:, count:]
        joined = np.concatenate(columns, axis=1)
        if not joined.shape[1]:
            return False
        order = np.lexsort((joined[0], np.concatenate(keys)))
        self._queue = np.concatenate([self._queue, joined[:, order]], axis=1)
        return True

    def take(self, tokens: int) -> Spans:
        """The next `tokens` tokens of the stream (fewer only at the end of a finite one)."""
        while True:
            ends = np.cumsum(self._queue[2]) - self._begun
            if (len(ends) and ends[-1] >= tokens) or not self._refill():
                break
        count = min(int(np.searchsorted(ends, tokens, side="left")) + 1, len(ends))
        source, document, length, before, epoch, index = self._queue[:, :count]
        start = np.zeros(count, np.int64)
        stop = length.copy()
        if count:
            start[0] = self._begun
            stop[-1] -= max(int(ends[count - 1]) - tokens, 0)
            for number in range(len(self._lines)):
                where = np.flatnonzero(source == number)
                if len(where):
                    i = where[-1]
                    self._drawn[number] = (int(epoch[i]), int(index[i]) + 1, int(before[i] + length[i]))
            finished = stop[-1] == length[-1]
            self._queue = self._queue[:, count if finished else count - 1 :]
            self._begun = 0 if finished else int(stop[-1])
        return Spans(source, document, start, stop, length)

    def state_dict(self) -> dict[str, Any]:
        """The position: plain integers, a few per source. The document that is begun counts as drawn."""
        begun = [int(self._queue[0, 0]), int(self._queue[1, 0]), self._begun] if self._begun else None
        return {"drawn": [list(each) for each in self._drawn], "begun": begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` gave, of a blend with the same lengths, weights and seed.

        A document that was begun before the weights changed counts for none of them: its tokens are below zero.
        """
        self._reset()
        self._drawn = [tuple(map(int, each)) for each in state["drawn"]]  # type: ignore[misc]
        for line, (epoch, index, tokens) in zip(self._lines, self._drawn, strict=True):
            line.place(epoch, index, tokens)
        if state["begun"] is not None:
            source, document, self._begun = map(int, state["begun"])
            epoch, index, tokens = self._drawn[source]
            length = int(self._lines[source].lengths[document])
            column = [source, document, length, tokens - length, epoch, index - 1]
            self._queue = np.array([column], dtype=np.int64).T
