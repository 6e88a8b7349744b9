"""What a run reads of which source: phases, budgets and caps as weights; the expected mixture before a run.

A run has phases: `data.blend` from its first token, each of `data.phases` from the first step that begins at or after
its `tokens`. All phases draw from one list of sources. A source that several of them name goes on where it was, so that
nothing is read twice before everything was read once.

Budgets (`tokens`) become weights: of a blend of budgets only, they are the weights; beside weights, they take their
part of the phase, and the weights share the rest. A cap (`max_epochs`) is on passes over the source since the start of
the run: a source that reached it is drawn from no more, and the others go on by their weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_lite.config import DataConfig, SourceConfig, UserError

OF_A_BLEND = ("weight", "tokens", "max_epochs")  # keys that say how much of a source is read, not what it is


def content(source: SourceConfig) -> dict[str, Any]:
    """The keys that decide what a source holds."""
    return {name: value for name, value in dataclasses.asdict(source).items() if name not in OF_A_BLEND}


@dataclass(frozen=True)
class Phase:
    """From token `start` of the run on, up to `stop` (None: open), the sources with a weight above 0 are drawn.

    `key` names its blend in the recipe. `weights` and `caps` (in epochs; None: no cap) stand beside `Mixture.sources`.
    """

    key: str
    start: int
    stop: int | None
    weights: list[float]
    caps: list[int | None]


@dataclass(frozen=True)
class Mixture:
    """Every source that a recipe names, once, in order of mention, and its phases."""

    sources: list[SourceConfig]
    phases: list[Phase]

    def number_at(self, tokens: int) -> int:
        """The phase of a step that begins after `tokens` tokens of the run."""
        return max(i for i, phase in enumerate(self.phases) if phase.start <= tokens)


def _placed(data: DataConfig) -> tuple[list[SourceConfig], list[list[int]]]:
    """Every source that a recipe names, once, and for each blend which ones it names."""
    blends = [blend for _, _, blend in data.blends]
    if not all(blends):
        raise UserError("data.blend: it names no source")
    numbers: dict[tuple[str, int], int] = {}
    sources: list[SourceConfig] = []
    placed: list[list[int]] = []
    for blend in blends:
        seen: dict[str, int] = {}
        placed.append([])
        for source in blend:  # one that a blend names twice is two sources
            what = json.dumps(content(source), sort_keys=True)
            seen[what] = seen.get(what, 0) + 1
            key = what, seen[what]
            if key not in numbers:
                numbers[key] = len(sources)
                sources.append(source)
            placed[-1].append(numbers[key])
    return sources, placed


def unique_sources(data: DataConfig) -> list[SourceConfig]:
    """Every source that a recipe names, once, in order of mention."""
    return _placed(data)[0]


def mixture_of(data: DataConfig, run_tokens: int | None = None) -> Mixture:
    """The mixture of a recipe; `run_tokens` is the length of its run, which budgets beside weights need to be known."""
    sources, placed = _placed(data)
    stops = [*(start for _, start, _ in data.blends[1:]), run_tokens]
    phases = []
    for (key, start, blend), stop, at in zip(data.blends, stops, placed, strict=True):
        weights: list[float] = [0.0] * len(sources)
        caps: list[int | None] = [None] * len(sources)
        for number, source, weight in zip(at, blend, _weights(blend, start, stop), strict=True):
            weights[number], caps[number] = weight, source.max_epochs
        phases.append(Phase(key, start, stop, weights, caps))
    return Mixture(sources, phases)


def _weights(blend: Sequence[SourceConfig], start: int, stop: int | None) -> list[float]:
    budgets = sum(source.tokens or 0 for source in blend)
    free = sum(source.weight for source in blend if source.tokens is None)
    if not budgets or not free:
        return [float(source.tokens or source.weight) for source in blend]
    left = (stop - start if stop is not None else 0) - budgets
    if left <= 0:
        raise UserError(
            f"data.blend: budgets of {budgets:,} tokens beside weights need a run, or a phase, that is longer"
        )
    return [float(source.tokens or left * source.weight / free) for source in blend]


# ---------------------------------------------------------------------------------------------------------- expectation


@dataclass
class Share:
    """One source in one phase: `share` of its tokens as weighted, `tokens` that the phase will draw of it, `epochs` of
    it that the run has read by the end of the phase; None where its size `holds` is not known. `capped_at`: the token
    of the run from which its cap keeps it out."""

    source: str
    share: float
    tokens: float
    holds: int | None
    epochs: float | None
    max_epochs: int | None = None
    capped_at: float | None = None


@dataclass
class Expected:
    """A phase, of the blend at `key`, as it will be read: `length` tokens from `start` on, as far as the run goes;
    `short` of them are missing because every source is capped."""

    key: str
    start: int
    length: int
    shares: list[Share]
    short: float = 0.0


def expected(mixture: Mixture, holds: Sequence[int | None], run_tokens: int) -> list[Expected]:
    """What a run of `run_tokens` tokens will draw, from the tokens that an epoch of each source holds (None: unknown).

    Exact up to the length of a document.
    """
    drawn = [0.0] * len(mixture.sources)
    found = []
    for phase in mixture.phases:
        start, stop = min(phase.start, run_tokens), min(phase.stop or run_tokens, run_tokens)
        active = [i for i, weight in enumerate(phase.weights) if weight]
        whole = sum(phase.weights)
        room = {
            i: math.inf
            if (cap := phase.caps[i]) is None or (size := holds[i]) is None
            else max(cap * size - drawn[i], 0)
            for i in active
        }
        taken, reached, at = dict.fromkeys(active, 0.0), {}, float(start)
        live = list(active)
        while live and at < stop:
            weight = sum(phase.weights[i] for i in live)
            # The first of them that reaches its cap, after so many tokens of all of them.
            until, first = min(((room[i] - taken[i]) * weight / phase.weights[i], i) for i in live)
            step = min(until, stop - at)
            for i in live:
                taken[i] += step * phase.weights[i] / weight
            at += step
            if until <= step and at < stop:
                reached[first] = at
                live.remove(first)
        shares = []
        for i in active:
            drawn[i] += taken[i]
            size = holds[i]
            shares.append(
                Share(
                    mixture.sources[i].source, phase.weights[i] / whole, taken[i], size,
                    drawn[i] / size if size else None, phase.caps[i], reached.get(i),
                )
            )  # fmt: skip
        found.append(Expected(phase.key, phase.start, max(stop - start, 0), shares, max(stop - at, 0.0)))
    return found


def warnings(phases: Sequence[Expected]) -> list[str]:
    """What of an expected mixture a person should know before the run starts, one sentence each."""
    found = []
    for phase in phases:
        length = phase.length
        if phase.start and length == 0:
            found.append(f"{phase.key.removesuffix('.blend')} never begins: the run ends before")
        for share in phase.shares:
            if share.capped_at is not None and share.holds:
                would = share.share * length / share.holds
                found.append(
                    f"{phase.key}: {share.source} would be read {would:.2f} times in {length:,} tokens and is "
                    f"capped at max_epochs = {share.max_epochs}: from token {share.capped_at:,.0f} of the run on the "
                    "others share its part"
                )
    return found


def budget_warnings(data: DataConfig, run_tokens: int) -> list[str]:
    """Blends of budgets only, whose sum is not what their phase reads: all are scaled."""
    ends = [*(start for _, start, _ in data.blends[1:]), run_tokens]
    found = []
    for (key, start, blend), end in zip(data.blends, ends, strict=True):
        budgets, length = sum(source.tokens or 0 for source in blend), min(end, run_tokens) - start
        if length > 0 and all(source.tokens for source in blend) and abs(budgets - length) > 0.001 * length:
            found.append(
                f"{key}: the budgets are {budgets:,} tokens, {length:,} are read: each is scaled by "
                f"{length / budgets:.3f}"
            )
    return found


def refuse_short(phases: Sequence[Expected]) -> None:
    """UserError where the caps leave the run without tokens."""
    for phase in phases:
        if phase.short >= 1:
            raise UserError(
                f"{phase.key}: max_epochs leaves {phase.length - phase.short:,.0f} of the "
                f"{phase.length:,} tokens that are to be read; raise a cap, or add a source without one"
            )


def _count(tokens: float) -> str:
    """Exact up to ten millions, then four digits: 9,013,220 and 1.2 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e7, "M")):
        if tokens >= size:
            return f"{tokens / (1e6 if unit == 'M' else size):.4g} {unit}"
    return f"{tokens:,.0f}"


def table(phases: Sequence[Expected]) -> list[list[str]]:
    """Rows of phase, source, share, tokens, size and epochs; the first is the header."""
    rows = [["from token", "source", "share", "tokens", "holds", "epochs", "cap"]]
    for phase in phases:
        for share in phase.shares:
            rows.append(
                [
                    _count(phase.start), share.source, f"{share.share:.1%}", _count(share.tokens),
                    "unknown" if share.holds is None else _count(share.holds),
                    "" if share.epochs is None else f"{share.epochs:.2f}",
                    "" if share.max_epochs is None else str(share.max_epochs),
                ]
            )  # fmt: skip
    return rows


def lines(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """A table as lines of plain text: its first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = []
    for row in rows:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        found.append("  ".join(cells).rstrip())
    return found
