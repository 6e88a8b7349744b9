"""Documents packed into rows of fixed length, and each rank's part of them.

Documents follow each other without gaps in one stream (`blend.py`); row r is tokens ``r * L`` to ``(r + 1) * L`` of
it. A document that does not fit goes on in the next row. No token is lost and none appears twice in an epoch of its
source. A global batch is G consecutive rows, and rank r of W takes the r-th W-th of them: which rows are trained on
together does not depend on W. With `data.seq_len_cycle` successive batches have rows of the lengths it lists, as many
more as they are shorter: a batch has the same number of tokens, and the stream does not change.

Shape letters: b rows of a rank, L tokens of a row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nemo_lite.config import DataConfig, UserError
from nemo_lite.data.blend import Blend, Spans
from nemo_lite.data.mixture import mixture_of, unique_sources
from nemo_lite.data.sources import TokenSource, open_source, ranges
from nemo_lite.data.tokenizer import Tokenizer

STATE_FORMAT = 2
Span = tuple[int, int, int, int]


@dataclass
class Batch:
    """One rank's rows of a global batch.

    input_ids: [b, L] int64.
    doc_ids: [b, L] int64, the documents of a row counted from 0; -1 is padding, which only the end of a finite
        validation pass has.
    labels: [b, L] int64, not shifted: the token itself, or -100 where it must not be a target (padding; the
        end-of-document token under train_on_eod=false). The model shifts, and leaves out the first token of a document.
    continued: [b] bool, whether the row starts inside a document.
    rows: global number of each row, counted from the start of training.
    sources: per row its spans (source index, document index, start, stop): the identity of the batch.
    """

    input_ids: torch.Tensor
    doc_ids: torch.Tensor
    labels: torch.Tensor
    continued: torch.Tensor
    rows: list[int] = field(default_factory=list)
    sources: list[list[Span]] = field(default_factory=list)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = (self.input_ids, self.doc_ids, self.labels, self.continued)
        return Batch(*(change(each) for each in tensors), rows=self.rows, sources=self.sources)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU run in the background."""
        return self._map(torch.Tensor.pin_memory)

    def split(self, rows: int) -> Iterator[Batch]:
        """Microbatches of at most `rows` rows, in order."""
        for start in range(0, len(self.rows), rows):
            part = slice(start, start + rows)
            tensors = (self.input_ids[part], self.doc_ids[part], self.labels[part], self.continued[part])
            yield Batch(*tensors, rows=self.rows[part], sources=self.sources[part])


def _assemble(
    spans: Spans, sources: list[TokenSource], first_row: int, rows: range, seq_len: int, mask_last: bool
) -> Batch:
    """Rows `rows` of the stream that `spans` start at row `first_row`; reads the tokens of these rows only.

    `mask_last`: the last token of a document is no target. Rows beyond the spans are padding.
    """
    L, b = seq_len, len(rows)
    spans, row_of_span = spans.cut(L)
    # Rows are in order, so the rank's spans are consecutive.
    low, high = np.searchsorted(row_of_span, [rows.start - first_row, rows.stop - first_row])
    spans, row_of_span = spans[low:high], row_of_span[low:high] - (rows.start - first_row)
    count = spans.tokens
    total = int(count.sum())
    begin = np.cumsum(count) - count  # where each span starts among the rank's tokens

    ids = np.zeros(b * L, np.int64)
    for number, source in enumerate(sources):
        chosen = np.flatnonzero(spans.source == number)
        if not len(chosen):
            continue
        found = source.read(spans.document[chosen], spans.start[chosen], spans.stop[chosen])
        if len(chosen) == len(spans):
            ids[:total] = found
        else:
            ids[ranges(begin[chosen], count[chosen])] = found

    first_span = np.searchsorted(row_of_span, np.arange(b + 1))
    doc_ids = np.full(b * L, -1, np.int64)
    doc_ids[:total] = np.repeat(np.arange(len(spans)) - first_span[row_of_span], count)
    labels = np.full(b * L, -100, np.int64)
    labels[:total] = ids[:total]
    if mask_last:
        done = spans.stop == spans.length
        labels[(begin + count - 1)[done]] = -100

    continued = np.zeros(b, bool)
    filled = np.flatnonzero(np.diff(first_span))
    continued[filled] = spans.start[first_span[filled]] > 0
    listed = list(
        zip(spans.source.tolist(), spans.document.tolist(), spans.start.tolist(), spans.stop.tolist(), strict=True)
    )
    return Batch(
        input_ids=torch.from_numpy(ids.reshape(b, L)),
        doc_ids=torch.from_numpy(doc_ids.reshape(b, L)),
        labels=torch.from_numpy(labels.reshape(b, L)),
        continued=torch.from_numpy(continued),
        rows=list(rows),
        sources=[listed[first_span[row] : first_span[row + 1]] for row in range(b)],
    )


def _own_rows(first_row: int, per_batch: int, rank: int, world_size: int) -> range:
    share = per_batch // world_size
    return range(first_row + rank * share, first_row + (rank + 1) * share)


def _check_ranks(name: str, rows: int, rank: int, world_size: int) -> None:
    if rows < 1 or rows % world_size:
        raise UserError(f"{name}: {rows} rows cannot be shared equally by {world_size} ranks")
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not one of {world_size} ranks")


class PackedLoader:
    """An endless iterator over this rank's rows of each global batch.

    `global_batch_size` rows of data.seq_len a batch over all `world_size` ranks; rank r gets the r-th part.
    `run_tokens` is the length of the run, which token budgets beside weights need. With `data.prefetch` above zero that
    many batches are made ahead by a thread, whose errors come out of `next`. With `device` the tensors are moved there
    when they are handed out.

    Sources are opened on construction, and tokenised if the cache lacks them (`progress` gets lines about it).
    Raises :class:`UserError` for bad sources, and for a source with fewer tokens in an epoch than one row.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        device: torch.device | str | None = None,
        progress: Callable[[str], None] | None = None,
        run_tokens: int | None = None,
    ):
        _check_ranks("train.global_batch_size", global_batch_size, rank, world_size)
        self.mixture = mixture_of(data, run_tokens)
        self._data, self._seed, self._tokenizer = data, seed, tokenizer
        self._per_batch, self._rank, self._world = global_batch_size, rank, world_size
        self._device = torch.device(device) if device is not None else None
        self.sources = _open_all(data, tokenizer, split, progress)
        for number, source in enumerate(self.sources):
            if source.num_tokens < data.seq_len:
                raise UserError(
                    f"data.blend.{number}: the source {source.name} has {source.num_tokens} tokens in its {split} "
                    f"split, one row needs data.seq_len = {data.seq_len}; add text or shorten the rows"
                )
        self._phase = 0
        first = self.mixture.phases[0]
        lengths = [source.lengths for source in self.sources]
        self._blend = Blend(lengths, first.weights, seed=seed, shuffle=data.shuffle, epochs=first.caps)
        # Of the next batch to be made: its number, its first row, tokens before it, and those of each source; and where
        # the batch before it began.
        self._batch = self._row = self._tokens = 0
        self._began = -1
        self._drawn = [0] * len(self.sources)
        self._position = self._where()  # after the last batch handed out
        self._queue: queue.Queue[Any] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def tokens_per_epoch(self) -> list[int]:
        """Tokens of one epoch of each source."""
        return [source.num_tokens for source in self.sources]

    def realised(self) -> list[dict[str, Any]]:
        """What the batches handed out held: for each source its name, tokens, and epochs."""
        drawn = zip(self.sources, self._position["tokens_of"], strict=True)
        return [{"source": s.name, "tokens": n, "epochs": round(n / s.num_tokens, 4)} for s, n in drawn]

    # ---------------------------------------------------------------------------------------------------- iteration

    def __iter__(self) -> PackedLoader:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this loader is closed")
        if self._data.prefetch == 0:
            batch, position = self._make()
        else:
            if self._thread is None:
                self._start()
            assert self._queue is not None
            found = self._queue.get()
            if isinstance(found, BaseException):
                self._end_thread()
                self._restore(self._position)  # so that a caller who goes on loses no batch
                raise found
            batch, position = found
        self._position = position
        return batch.to(self._device) if self._device is not None else batch

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        cycle, seq_len = self._data.seq_len_cycle, self._data.seq_len
        number = self.mixture.number_at(self._tokens)
        if number != self._phase:
            self._phase, phase = number, self.mixture.phases[number]
            self._blend.reweigh(phase.weights, phase.caps)
        length = cycle[self._batch % len(cycle)] if cycle else seq_len
        per_batch, count = self._per_batch * (seq_len // length), self._per_batch * seq_len
        spans = self._blend.take(count)
        if int(spans.tokens.sum()) < count:
            raise UserError("data.blend: every source has reached its max_epochs; raise a cap, or end the run here")
        rows = _own_rows(self._row, per_batch, self._rank, self._world)
        mask = self._data.append_eod and not self._data.train_on_eod
        batch = _assemble(spans, self.sources, self._row, rows, length, mask)
        self._batch, self._row = self._batch + 1, self._row + per_batch
        self._began, self._tokens = self._tokens, self._tokens + count
        drawn = np.bincount(spans.source, spans.tokens, len(self.sources)).astype(np.int64)
        self._drawn = [before + more for before, more in zip(self._drawn, drawn.tolist(), strict=True)]
        if self._device is not None and self._device.type == "cuda":
            batch = batch.pin()
        return batch, self._where()

    def _start(self) -> None:
        self._queue = queue.Queue(maxsize=self._data.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(self._queue, self._stop), name="nemo_lite data", daemon=True
        )
        self._thread.start()

    def _work(self, results: queue.Queue[Any], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                item: Any = self._make()
            except BaseException as error:  # handed to the caller of next()
                item = error
            while not stop.is_set():
                try:
                    results.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _end_thread(self) -> None:
        if self._thread is not None and self._queue is not None:
            self._stop.set()
            while not self._queue.empty():  # room for what the thread may be waiting to put
                self._queue.get_nowait()
            self._thread.join()
            self._thread, self._queue = None, None

    def close(self) -> None:
        """Stop the background thread; the loader cannot be used afterwards. May be called twice."""
        self._closed = True
        self._end_thread()

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- state

    def _where(self) -> dict[str, Any]:
        counts = {"batch": self._batch, "row": self._row, "began": self._began, "tokens": self._tokens}
        return {**counts, "tokens_of": self._drawn, **self._blend.state_dict()}

    def _restore(self, position: dict[str, Any]) -> None:
        self._batch, self._row = int(position["batch"]), int(position["row"])
        self._began, self._tokens = int(position["began"]), int(position["tokens"])
        new = [0] * (len(self.sources) - len(position["tokens_of"]))  # sources of phases that were added since
        self._drawn = [*map(int, position["tokens_of"]), *new][: len(self.sources)]
        self._phase = self.mixture.number_at(max(self._began, 0))
        phase = self.mixture.phases[self._phase]
        self._blend.reweigh(phase.weights, phase.caps)
        drawn = [*position["drawn"], *([0, 0, 0] for _ in new)][: len(self.sources)]
        self._blend.load_state_dict({"drawn": drawn, "begun": position["begun"]})
        self._position = self._where()

    def _identity(self) -> dict[str, Any]:
        """What a position means something for."""
        data, phases = self._data, self.mixture.phases
        return {
            "seq_len": data.seq_len,
            "seq_len_cycle": list(data.seq_len_cycle),
            "seed": self._seed,
            "shuffle": data.shuffle,
            "starts": [phase.start for phase in phases],
            "weights": [phase.weights for phase in phases],
            "caps": [phase.caps for phase in phases],
            "names": [source.name for source in self.sources],
            "fingerprints": [source.fingerprint for source in self.sources],
            "tokenizer": self._tokenizer.fingerprint,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, and what it belongs to.

        Numbers, strings and lists only; the same on every rank, for every world size and every amount of prefetching.
        """
        return {"format": STATE_FORMAT, "identity": self._identity(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the last token of a `state_dict`.

        World size, global batch size and prefetching may differ, and phases that had not begun; raises
        :class:`UserError` when the data read so far, their weights, the tokenizer, the length of rows or the seed do.
        """
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError("the saved data position is of another version of nemo_lite, or damaged")
        position = state["position"]
        saved, mine = _begun(state["identity"], position["began"]), _begun(self._identity(), position["began"])
        keys = {"seq_len": "data.seq_len", "seq_len_cycle": "data.seq_len_cycle", "seed": "seed",
                "shuffle": "data.shuffle", "starts": "data.phases tokens", "weights": "data.blend weights",
                "caps": "data.blend max_epochs"}  # fmt: skip
        for name, key in keys.items():
            if saved[name] != mine[name]:
                raise UserError(
                    f"{key}: the run was saved with {saved[name]} and cannot go on with {mine[name]}, "
                    "since the order of its data would change"
                )
        if saved["fingerprints"] != mine["fingerprints"]:
            if saved["tokenizer"] != mine["tokenizer"]:
                raise UserError(
                    "data.tokenizer: the run was saved with another tokenizer and cannot go on with this one"
                )
            for number, (before, now) in enumerate(zip(saved["fingerprints"], mine["fingerprints"])):
                if before != now:
                    raise UserError(
                        f"data.blend.{number}: the tokens of {mine['names'][number]} are not those of "
                        f"{saved['names'][number]} that the run was saved with; restore the source, its split and "
                        "data.append_eod, or start a new run"
                    )
        self._end_thread()
        self._restore(position)


def _begun(identity: dict[str, Any], began: int) -> dict[str, Any]:
    """An identity without the phases that no step up to the one from token `began` on has read, and their sources."""
    count = max(1, sum(start <= began for start in identity["starts"]))
    weights, caps = identity["weights"][:count], identity["caps"][:count]
    used = max(i for phase in weights for i, weight in enumerate(phase) if weight) + 1
    return {
        **identity,
        "starts": identity["starts"][:count],
        "weights": [phase[:used] for phase in weights],
        "caps": [phase[:used] for phase in caps],
        "names": identity["names"][:used],
        "fingerprints": identity["fingerprints"][:used],
    }


class ValidationBatches:
    """The held-out documents from their start, in order, as batches; can be iterated again and again.

    `len()` is the number of batches, the same on every rank; the last one may end in padding, and then some ranks may
    hold rows of nothing else.
    """

    def __init__(
        self,
        data: DataConfig,
        sources: list[TokenSource],
        rows_per_batch: int,
        num_batches: int,
        rank: int,
        world_size: int,
        run_tokens: int | None = None,
    ):
        self.sources = sources
        self._data, self._rows, self._rank, self._world = data, rows_per_batch, rank, world_size
        per_batch = rows_per_batch * data.seq_len
        # A source of a later phase counts with its weight there: what is validated on stays the same all through.
        phases = mixture_of(data, run_tokens).phases
        columns = zip(*(phase.weights for phase in phases), strict=True)
        self._weights = [next(weight for weight in column if weight) for column in columns]
        available = sum(source.num_tokens for source in sources)
        self._batches = min(num_batches, -(-available // per_batch))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        data = self._data
        blend = Blend(
            [source.lengths for source in self.sources], self._weights, shuffle=False, epochs=[1] * len(self.sources)
        )
        mask = data.append_eod and not data.train_on_eod
        for number in range(self._batches):
            first = number * self._rows
            spans = blend.take(self._rows * data.seq_len)
            rows = _own_rows(first, self._rows, self._rank, self._world)
            yield _assemble(spans, self.sources, first, rows, data.seq_len, mask)


def validation_batches(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    rows_per_batch: int,
    num_batches: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str], None] | None = None,
    run_tokens: int | None = None,
) -> ValidationBatches:
    """This rank's part of at most `num_batches` batches of `rows_per_batch` rows (over all ranks) of held-out text.

    Sources are blended by weight until they run out. Raises :class:`UserError` when nothing is held out.
    """
    _check_ranks("rows of a validation batch", rows_per_batch, rank, world_size)
    sources = _open_all(data, tokenizer, "validation", progress)
    if not sum(source.num_tokens for source in sources):
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"data.validation_fraction: {data.validation_fraction} leaves no document of {names} for validation; raise "
            "it, add documents, or train with eval.every=0"
        )
    return ValidationBatches(data, sources, rows_per_batch, num_batches, rank, world_size, run_tokens)


def _open_all(
    data: DataConfig, tokenizer: Tokenizer, split: Any, progress: Callable[[str], None] | None
) -> list[TokenSource]:
    return [open_source(source, data, tokenizer, split, progress) for source in unique_sources(data)]


def prepare(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    validation: bool = True,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Tokenise every source of a recipe into the cache: one rank does it, the others wait and then find it."""
    _open_all(data, tokenizer, "train", progress)
    if validation and data.validation_fraction > 0:
        _open_all(data, tokenizer, "validation", progress)
