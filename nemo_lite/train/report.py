"""RUN_DIR/report.html: one static page made from metrics.jsonl, recipe.yaml and env.json alone.

The page needs no server, no network and no JavaScript (a short inline script adds read-outs under the pointer). Charts
are inline SVG stretched to the width of the page: lines keep their thickness by ``vector-effect``, dots are zero-length
strokes with round caps, and every number is HTML beside the SVG, so that a phone shows the same type size as a desk.

    page(...)            a run's data -> HTML text (pure)
    write_report(dir)    reads RUN_DIR, writes RUN_DIR/report.html at once
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from nemo_lite import pattern as patterns
from nemo_lite.config import UserError
from nemo_lite.train.metrics import METRICS_FILE, compact, duration, percent, read_metrics, write_atomically

MAX_POINTS = 600  # of a line; more than a screen has columns
Point = tuple[float, float | None]


# -------------------------------------------------------------------------------------------------------------- numbers


def _number(value: Any) -> float | None:
    """A finite number, or None for what is missing, null or no number at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _at(value: Any, index: int) -> float | None:
    return _number(value[index]) if isinstance(value, list) and index < len(value) else None


def _format(value: float | None) -> str:
    """A number of a chart in about four significant digits."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e4:
        return compact(value)
    if size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}" if size < 1000 else f"{value:.0f}"


def smooth(points: Sequence[Point], reach: float) -> list[Point]:
    """Exponential moving average over about ``reach`` points; gaps (None) stay gaps and leave the average alone.

    The reach grows with the run, from nothing to ``reach``: a loss falls fastest at its beginning, and an average of
    constant reach would trail above it there.
    """
    average, seen, result = 0.0, 0, []
    for x, y in points:
        if y is None:
            result.append((x, None))
            continue
        seen += 1
        average += (y - average) / min(reach, 1 + (seen - 1) / 10) if seen > 1 else y
        result.append((x, average))
    return result


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about ``limit`` points: of each stretch the lowest and the highest, so that spikes and gaps survive."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit / 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        known = [index for index, (_, y) in enumerate(part) if y is not None]
        if not known:
            kept.append(part[0])
            continue
        low = min(known, key=lambda index: part[index][1] or 0.0)
        high = max(known, key=lambda index: part[index][1] or 0.0)
        kept += [part[index] for index in sorted({low, high})]
    if kept[-1][0] != points[-1][0]:
        kept.append(points[-1])
    return kept


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values of an axis in one form: no trailing zeros, all with a power of ten where they are small or large."""
    largest = max(map(abs, values), default=0.0)
    if largest >= 1e4:
        factor, unit = next(pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if largest >= pair[0])
        return [f"{value / factor:.4g}{unit}" if value else "0" for value in values]
    if 0 < largest < 0.01:
        return [_power(value) if value else "0" for value in values]
    return [f"{value:.6g}" if value else "0" for value in values]


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high], or the powers alone over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    return [value for ten in decades for factor in factors if low <= (value := factor * 10.0**ten) <= high]


# ---------------------------------------------------------------------------------------------------------- line charts


@dataclass
class Series:
    """One line (or, with ``dots``, one point each) of a chart; ``color`` names a CSS variable."""

    name: str
    points: list[Point]
    color: str
    style: str = "line"  # line, faint, thin, dots
    legend: bool = True
    label: str = ""  # the legend's words, where they are not the name
    step: bool = False  # values at few steps: the read-out shows them only close to their own step

    @property
    def last(self) -> float | None:
        return next((y for _, y in reversed(self.points) if y is not None), None)


def _path(points: Sequence[Point], place: Callable[[float, float], tuple[float, float]]) -> str:
    """SVG path data; a missing value lifts the pen, and a value between two gaps is drawn as a dot."""
    parts: list[str] = []
    pen = False
    for x, y in points:
        if y is None:
            pen = False
            continue
        across, down = place(x, y)
        parts.append(f"{'L' if pen else 'M'}{across:.1f} {down:.1f}")
        if not pen:
            parts.append("h0")  # with round caps, a point of its own
        pen = True
    return "".join(parts)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    number: int,
    note: str = "",
    low: float | None = None,
    high: float | None = None,
    logarithmic: bool = False,
    doubling: bool = False,
    show: Callable[[float], str] = _format,
    factor: float = 1.0,
    unit: str = "",
    height: str = "short",
    wide: bool = False,
    legend: str = "",
    level: float | None = None,
    axis: str = "step",
) -> str:
    """A card with one line chart; ``low`` and ``high`` bound the y axis where given, else the data do. ``axis`` is what
    x counts.

    ``show`` writes a value in the legend and the read-outs, ``factor`` and ``unit`` the axis. ``level`` draws a dashed
    line at a value, ``doubling`` makes x a scale of powers of two. A chart without a value is a card that says so.
    """
    series = [one for one in series if one.last is not None]
    values = [y for one in series for _, y in one.points if y is not None]
    steps = [x for one in series for x, _ in one.points]
    card = f"card{' wide' if wide else ''}"
    if not values:
        return (
            f'<section class="{card}"><div class="head"><h2>{escape(title)}</h2></div>'
            f'<p class="none">Nothing logged yet.</p></section>'
        )
    logarithmic = logarithmic and min(values) > 0
    bottom = min(values) if low is None else low
    top = max(values) if high is None else high
    if logarithmic:
        bottom, top = bottom / 1.15, top * 1.15
    elif top <= bottom:
        bottom, top = bottom - (abs(bottom) * 0.1 or 1), top + (abs(top) * 0.1 or 1)
    else:
        margin = (top - bottom) * 0.06
        bottom, top = (bottom if low is not None else bottom - margin), top + margin
        if min(values) >= 0:
            bottom = max(0.0, bottom)
    along: Callable[[float], float] = (lambda x: math.log2(max(x, 1.0))) if doubling else float
    left, right = along(min(steps)), along(max(steps))
    if right <= left:
        left, right = left - 1, right + 1
    width = (right - left) * 1.02
    left -= (right - left) * 0.01

    def up(value: float) -> float:
        if logarithmic:
            return math.log(max(value, 1e-300) / bottom) / math.log(top / bottom)
        return (value - bottom) / (top - bottom)

    def place(x: float, y: float) -> tuple[float, float]:
        return (along(x) - left) / width * 1000, (1 - min(max(up(y), -3), 4)) * 1000

    y_ticks = log_ticks(bottom, top) if logarithmic else ticks(bottom, top, 5 if height == "tall" else 4)
    if logarithmic and len(y_ticks) < 2:
        y_ticks = ticks(bottom, top, 4)
    if doubling:
        x_ticks = [2.0**n for n in range(math.ceil(along(min(steps))), math.floor(along(max(steps))) + 1)]
        x_ticks = x_ticks[:: -(-len(x_ticks) // 10)]
    else:
        x_ticks = [x for x in ticks(min(steps), max(steps), 6) if x == int(x)]
    drawing = [
        f'<line class="grid" x1="0" x2="1000" y1="{place(left, y)[1]:.1f}" y2="{place(left, y)[1]:.1f}"/>'
        for y in y_ticks
    ]
    if level is not None and bottom <= level <= top:
        down = place(left, level)[1]
        drawing.append(f'<line class="level" x1="0" x2="1000" y1="{down:.1f}" y2="{down:.1f}"/>')
    order = {"faint": 0, "thin": 1, "line": 2, "dots": 3}
    for one in sorted(series, key=lambda one: order[one.style]):
        color = f'style="stroke:var(--{one.color})"'
        if one.style == "dots":
            drawing.append(f'<path class="thin" {color} d="{_path(one.points, place)}"/>')
            dots = "".join("M{:.1f} {:.1f}h0".format(*place(x, y)) for x, y in one.points if y is not None)
            drawing.append(f'<path class="halo" d="{dots}"/><path class="dots" {color} d="{dots}"/>')
        else:
            # A run of one log line is a dot, not a line of no length.
            style = one.style if sum(y is not None for _, y in one.points) > 1 else "dots"
            drawing.append(f'<path class="{style}" {color} d="{_path(one.points, place)}"/>')
    # What a read-out needs: where each point is, and its value.
    data = [
        {
            "name": one.name,
            "color": one.color,
            "near": one.step,
            "points": [[x, round(place(x, y)[0] / 10, 2), show(y)] for x, y in one.points if y is not None],
        }
        for one in series
        if one.style != "faint"
    ]
    ends = ", ".join(f"{one.name} {show(one.last)}" for one in series if one.legend and one.last is not None)
    described = f"{title} from {axis} {min(steps):.0f} to {max(steps):.0f}; last values: {ends}."
    keys = legend or "".join(
        f'<li><i class="{one.style}" style="background:var(--{one.color})"></i>{escape(one.label or one.name)} '
        f"<b>{escape(show(one.last or 0.0))}</b></li>"
        for one in series
        if one.legend
    )
    y_labels = "".join(
        f'<span style="top:{place(left, y)[1] / 10:.2f}%">{escape(label + unit)}</span>'
        for y, label in zip(y_ticks, tick_labels([y * factor for y in y_ticks]), strict=True)
        if -1 <= place(left, y)[1] <= 1001
    )
    x_labels = "".join(
        f'<span style="left:{place(x, bottom)[0] / 10:.2f}%">{escape(label)}</span>'
        for x, label in zip(x_ticks, [f"{x:.0f}" for x in x_ticks] if doubling else tick_labels(x_ticks), strict=True)
    )
    return (
        f'<section class="{card}"><div class="head"><h2>{escape(title)}</h2><ul class="legend">{keys}</ul></div>'
        f'<div class="frame {height}"><div class="ys" aria-hidden="true">{y_labels}</div>'
        f'<div class="plot" tabindex="0" data-chart="chart{number}" data-axis="{axis}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="title{number} desc{number}"><title id="title{number}">{escape(title)}</title>'
        f'<desc id="desc{number}">{escape(described)}</desc>{"".join(drawing)}</svg></div>'
        f'<div class="xs" aria-hidden="true">{x_labels}</div></div>'
        f"{f'<p class=caption>{escape(note)}</p>' if note else ''}"
        f'<script type="application/json" id="chart{number}">{_json(data)}</script></section>'
    )


def _json(data: Any) -> str:
    """JSON that can stand inside a <script>: no ``<`` ever opens or closes a tag."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


# ---------------------------------------------------------------------------------------------------------- expert load

LEVELS = 8  # steps of colour on either side of the mean; the last stands for four times it, or a quarter


def heat_level(ratio: float) -> int:
    """Colour step of a load over the mean: 0 at the mean, LEVELS at four times, -LEVELS at a quarter, less if dead."""
    if ratio <= 0:
        return -LEVELS - 1
    return max(-LEVELS, min(LEVELS, round(math.log2(ratio) / 2 * LEVELS)))


def _level_class(level: int) -> str:
    return "dead" if level < -LEVELS else "even" if level == 0 else f"{'o' if level > 0 else 'u'}{abs(level)}"


def short_names(names: Sequence[str]) -> list[str]:
    """Labels of layers: their index, and ``MTP`` where the name has it; the names themselves if that is ambiguous."""
    labels = []
    for name in names:
        words = [word for word in name.split(".") if word.isdigit() or word == "mtp"]
        labels.append(" ".join(words).replace("mtp", "MTP"))
    return list(names) if len(set(labels)) < len(names) or "" in labels else labels


def heat_map(
    load: Mapping[str, Sequence[float]], step: float | None, *, number: int, wide: bool, title: str = "Expert load"
) -> str:
    """A card with layers down, experts across, colour by the expert's share over its layer's mean."""
    when = "" if step is None else f", at step {step:,.0f}"
    labels = short_names(list(load))
    rows: list[list[float]] = []
    for shares in load.values():
        known = [_number(share) or 0.0 for share in shares]
        total = sum(known)
        rows.append([share * len(known) / total if total else 0.0 for share in known])
    experts = max(map(len, rows))
    gap = (0.08, 0.1) if experts <= 64 and len(rows) <= 48 else (0.0, 0.0)
    # One path a colour, neighbours of one colour merged: 40 layers of 512 experts stay below some hundred kilobytes.
    paths: dict[int, list[str]] = {}
    for down, row in enumerate(rows):
        start = 0
        while start < len(row):
            level, end = heat_level(row[start]), start + 1
            while not gap[0] and end < len(row) and heat_level(row[end]) == level:
                end += 1
            across, high = end - start - 2 * gap[0], 1 - 2 * gap[1]
            paths.setdefault(level, []).append(
                f"M{start + gap[0]:g} {down + gap[1]:g}h{across:g}v{high:g}h-{across:g}z"
            )
            start = end
    drawing = "".join(
        f'<path class="{_level_class(level)}" d="{"".join(parts)}"/>' for level, parts in sorted(paths.items())
    )
    written = ""
    if experts <= 16 and len(rows) <= 24:
        written = "".join(
            f'<span class="{"on" if abs(heat_level(ratio)) >= 6 else ""}" '
            f'style="left:{(index + 0.5) / experts * 100:.2f}%;top:{(down + 0.5) / len(rows) * 100:.2f}%">'
            f"{ratio:.2f}</span>"
            for down, row in enumerate(rows)
            for index, ratio in enumerate(row)
        )
    every = max(1, math.ceil(len(rows) / 24))
    y_labels = "".join(
        f'<span style="top:{(index + 0.5) / len(rows) * 100:.2f}%">{escape(label)}</span>'
        for index, label in enumerate(labels)
        if index % every == 0
    )
    stride = max(1, 2 ** math.ceil(math.log2(max(1, experts / 8))))
    x_labels = "".join(
        f'<span style="left:{(index + 0.5) / experts * 100:.2f}%">{index}</span>' for index in range(0, experts, stride)
    )
    # Low rows stay readable without making 40 of them a tower, and two of them a billboard.
    pixels = min(520, max(len(rows) * (24 if len(rows) <= 14 else 13), 100 if wide else 190))
    flat = [ratio for row in rows for ratio in row]
    dead = sum(ratio <= 0 for ratio in flat)
    described = (
        f"Load of {experts} experts in {len(rows)} layers{when}, relative to the mean of their layer: "
        f"highest {max(flat):.2f}, lowest {min(flat):.2f}, {dead} without a token."
    )
    scale = "".join(f'<i class="{_level_class(level)}"></i>' for level in range(-LEVELS, LEVELS + 1))
    legend = (
        f'<div class="scale" role="img" aria-label="Colours from a quarter of the mean over the mean to four times it">'
        f"<span>¼×</span>{scale}<span>4×</span><i class='dead key'></i><span>no token</span></div>"
    )
    data = {"labels": labels, "rows": [[round(ratio, 2) for ratio in row] for row in rows]}
    return (
        f'<section class="card{" wide" if wide else ""}"><div class="head"><h2>{escape(title)}</h2>{legend}</div>'
        f'<div class="frame heat" style="--h:{pixels}px"><div class="ys" aria-hidden="true">{y_labels}</div>'
        f'<div class="plot" tabindex="0" data-heat="chart{number}">'
        f'<svg viewBox="0 0 {experts} {len(rows)}" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="title{number} desc{number}"><title id="title{number}">Expert load per layer</title>'
        f'<desc id="desc{number}">{described}</desc>{drawing}</svg>'
        f'<div class="values{" many" if experts > 10 else ""}" aria-hidden="true">{written}</div></div>'
        f'<div class="xs" aria-hidden="true">{x_labels}</div></div>'
        f'<p class="caption">Tokens per expert over the mean of its layer{when}. '
        f"Layers down, experts across.</p>"
        f'<script type="application/json" id="chart{number}">{_json(data)}</script></section>'
    )


def _layer_ratios(record: Mapping[str, Any]) -> dict[str, float | None]:
    """max/mean of each layer in one record, from the summary or, in its absence, from the shares."""
    found: dict[str, float | None] = {}
    summary = record.get("expert_load_by_layer")
    if isinstance(summary, dict):
        for name, layer in summary.items():
            found[name] = _number(layer.get("max")) if isinstance(layer, dict) else None
    elif isinstance(record.get("expert_load"), dict):
        for name, shares in record["expert_load"].items():
            known = [_number(share) or 0.0 for share in shares] if isinstance(shares, list) else []
            found[name] = max(known) * len(known) / sum(known) if known and sum(known) > 0 else None
    return found


# ------------------------------------------------------------------------------------------------------- number formats

_OPERANDS = ["fprop x", "fprop w", "dgrad w", "dgrad dy", "wgrad dy", "wgrad x"]
# Key of a record -> heading, the value of the strongest colour, the caption's words.
_MEASURES = {
    "flushed": ("flushed to zero, %", 0.4, "Flushed and saturated are shares of the values that are not zero."),
    "saturated": ("saturated, %", 0.4, "A block's largest value saturates where its scale was rounded down."),
    "error": ("relative error, %", 0.25, "The relative error is the norm of what rounding changed over that of all."),
    "scales": ("block scales", 1, "Block scales: the largest on the left, a bar a power of two, 2^-15 and less last."),
}


def _quantisation(run: Run) -> str:
    """A card with linears down, operands across: what rounding to codes flushed to zero, saturated and changed, and how
    far block scales spread."""
    rows = [r for r in run.train if isinstance(r.get("quantisation"), dict) and r["quantisation"]]
    if not rows:
        return ""
    measured, step = rows[-1]["quantisation"], rows[-1]["step"]
    operands = sorted({operand for one in measured.values() for operand in one}, key=_OPERANDS.index)
    products = [operand.split()[0] for operand in operands]
    # A wider gap where a measure begins, a narrow one where a product does.
    gaps = ["measure" if n == 0 else "product" if products[n - 1] != name else "" for n, name in enumerate(products)]
    columns = list(zip(gaps, operands, strict=True))

    def has(key: str) -> bool:
        values = [one.get(key) for linear in measured.values() for one in linear.values()]
        if key == "scales":  # without blocks, all are in the first bin
            return any(isinstance(shares, list) and any(shares[1:]) for shares in values)
        return any(_number(value) is not None for value in values)

    def cell(key: str, gap: str, value: Any) -> str:
        if isinstance(value, list):
            return f'<td class="{gap}">{_bars(value)}</td>'
        if (value := _number(value)) is None:
            return f'<td class="{gap}"></td>'
        level = min(LEVELS, round(LEVELS * value / _MEASURES[key][1]))
        return f'<td class="{gap} o{level}">{100 * value:.{0 if value >= 0.0995 else 1}f}</td>'

    keys = [key for key in _MEASURES if has(key)]
    titles = "".join(
        f'<th class="measure" colspan="{len(operands)}" scope="colgroup">{_MEASURES[key][0]}</th>' for key in keys
    )
    groups = "".join(
        f'<th class="{gap}" colspan="{products.count(name)}" scope="colgroup">{name}</th>'
        for gap, name in zip(gaps, products, strict=True)
        if gap
    )
    heads = "".join(f'<th class="{gap}" scope="col">{operand.split()[1]}</th>' for gap, operand in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name).replace(".", ".<wbr>")}</th>'
        + "".join(cell(key, gap, one.get(operand, {}).get(key)) for key in keys for gap, operand in columns)
        + "</tr>"
        for name, one in measured.items()
    )
    said = " ".join(_MEASURES[key][2] for key in keys)
    return (
        f'<section class="card wide"><div class="head"><h2>Number formats</h2></div><div class="scroll formats"><table>'
        f"<thead><tr><th></th>{titles}</tr><tr><th></th>{groups * len(keys)}</tr>"
        f'<tr><th scope="col">Linear</th>{heads * len(keys)}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="caption">At step {step:,.0f}. {said} fprop reads x and w; dgrad dy, and w where it does not take '
        f"fprop's codes; wgrad dy and x along the tokens.</p></section>"
    )


def _bars(shares: Sequence[Any]) -> str:
    """Shares of block scales as bars, from the largest scales on the left to the smallest."""
    known = [_number(share) or 0.0 for share in shares]
    top = max(known, default=0.0) or 1.0
    bars = "".join(f"M{bin} 16v-{16 * share / top:.3g}h1V16z" for bin, share in enumerate(known) if share)
    said = ", ".join(f"2^{-bin}: {share:.1%}" for bin, share in enumerate(known) if share >= 0.0005)
    return (
        f'<svg viewBox="0 0 {len(known)} 16" preserveAspectRatio="none" role="img"><title>{said}</title>'
        f'<path d="{bars}"/></svg>'
    )


# ---------------------------------------------------------------------------------------------------------------- page


@dataclass
class Run:
    """Everything the page is made of."""

    name: str
    records: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    env: dict[str, Any] = field(default_factory=dict)
    bad_lines: int = 0

    def __post_init__(self) -> None:
        with_step = [record for record in self.records if _number(record.get("step")) is not None]
        self.train = sorted((r for r in with_step if "val_loss" not in r), key=lambda r: r["step"])
        self.validation = sorted((r for r in with_step if "val_loss" in r), key=lambda r: r["step"])

    def key(self, path: str) -> Any:
        """A value of the recipe by its dotted key, or None."""
        value: Any = self.recipe
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def column(self, key: str) -> list[Point]:
        return [(record["step"], _number(record.get(key))) for record in self.train]

    def last(self, key: str) -> float | None:
        return next((y for _, y in reversed(self.column(key)) if y is not None), None)

    @property
    def step(self) -> int:
        return int(max((record["step"] for record in [*self.train, *self.validation]), default=0))

    @property
    def steps(self) -> int | None:
        steps = _number(self.key("train.steps"))
        return int(steps) if steps else None

    @property
    def depths(self) -> int:
        lists = [r.get("mtp_loss") for r in self.train] + [r.get("val_mtp_loss") for r in self.validation]
        return max((len(one) for one in lists if isinstance(one, list)), default=0)


def _tile(label: str, value: str, below: str = "") -> str:
    below = f"<small>{escape(below)}</small>" if below else ""
    return f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}{below}</dd></div>'


def _tiles(run: Run) -> str:
    tiles = []
    raw = run.column("loss")
    final = smooth(raw, _reach(len(raw)))[-1:] if raw and raw[-1][1] is not None else []
    if (loss := run.last("loss")) is not None:
        average = f"smoothed {final[0][1]:.3f}" if len(raw) > 1 and final and final[0][1] is not None else ""
        tiles.append(_tile("Training loss", f"{loss:.3f}", average))
    known = [r for r in run.validation if _number(r.get("val_loss")) is not None]
    if known:
        last = known[-1]
        bits, nats = _number(last.get("val_bits_per_byte")), f"loss {last['val_loss']:.3f}"
        if bits is not None:
            tiles.append(_tile("Validation", f"{bits:.3f}", f"bits per byte · {nats}"))
        else:
            tiles.append(_tile("Validation loss", f"{last['val_loss']:.3f}"))
    if (tokens := run.last("tokens")) is not None:
        tiles.append(_tile("Tokens", compact(tokens), f"{run.step:,} steps"))
    speeds = [y for _, y in run.column("tokens_per_second") if y is not None]
    if speeds:
        shares = [y for _, y in run.column("mfu") if y is not None]
        below = f"{percent(_quantile(shares, 0.5))} of the machine's peak" if shares else "median"
        tiles.append(_tile("Tokens per second", compact(_quantile(speeds, 0.5)), below))
    memory = max((y for _, y in run.column("memory_gb") if y is not None), default=None)
    elapsed = run.last("elapsed_seconds")
    if elapsed is None:
        times = [y for _, y in run.column("time") if y is not None]
        elapsed = times[-1] - times[0] if len(times) > 1 else None
    if elapsed is not None:
        tiles.append(_tile("Time", duration(elapsed), f"{memory:.1f} GB memory" if memory is not None else ""))
    parameters = run.env.get("parameters")
    if isinstance(parameters, dict) and _number(parameters.get("total")) is not None:
        active = _number(parameters.get("active"))
        below = f"{compact(active)} active per token" if active is not None else ""
        tiles.append(_tile("Parameters", compact(parameters["total"]), below))
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _reach(count: int) -> float:
    """How many points the smoothing takes together: about a fiftieth of the run, at least a few."""
    return max(2.0, count / 50)


_MIXERS = {
    patterns.MAMBA: ("mamba", "Mamba-2"),
    patterns.ATTENTION: ("attention", "attention"),
    patterns.MOE: ("moe", "MoE"),
    patterns.MLP: ("mlp", "MLP"),
}


def _architecture(run: Run) -> str:
    """The layer pattern as a strip of coloured cells, trunk first, MTP block apart."""
    pattern, mtp = run.key("model.pattern"), run.key("model.mtp.pattern")
    if not isinstance(pattern, str) or not pattern:
        return ""

    def strip(letters: str) -> str:
        return "".join(
            f'<i class="{_MIXERS[letter][0]}">{escape(letter)}</i>' if letter in _MIXERS else '<i class="cut"></i>'
            for letter in letters
        )

    used = [pair for letter, pair in _MIXERS.items() if letter in f"{pattern}{mtp or ''}"]
    parts = [f'<span class="strip">{strip(pattern)}</span>']
    if isinstance(mtp, str) and mtp:
        depth = _number(run.key("model.mtp.depth")) or 1
        parts.append(f'<span class="strip"><em>MTP</em>{strip(mtp)}<em>× {depth:.0f}</em></span>')
    keys = "".join(f'<li><i class="{name}"></i>{label}</li>' for name, label in used)
    said = f"Layer pattern {pattern}" + (f", MTP block {mtp}" if mtp else "")
    return (
        f'<div class="model"><div class="architecture" aria-label="{escape(said)}" role="img">{"".join(parts)}</div>'
        f'<ul class="legend mixers">{keys}</ul></div>'
    )


def loss_range(values: Sequence[float]) -> tuple[float, float, bool]:
    """Where an axis of losses begins and ends, and whether it leaves some out: a run falls from the logarithm of the
    vocabulary within its first steps, which are cut where they would press the rest of it flat."""
    low, high = min(values), max(values)
    bulk = low + 1.8 * (_quantile(values, 0.9) - low)
    cut = len(values) > 20 and high > bulk > low
    high = bulk if cut else high
    return max(0.0, low - 0.06 * (high - low)), high, cut


def _losses(run: Run, number: int) -> str:
    raw = run.column("loss")
    reach = _reach(len(raw))
    series = [
        Series("each log interval", thin(raw), "train", "faint", legend=False),
        Series("training", thin(smooth(raw, reach)), "train"),
    ]
    for depth in range(run.depths):
        points = [(r["step"], _at(r.get("mtp_loss"), depth)) for r in run.train]
        series.append(Series(f"MTP {depth + 1}", thin(smooth(points, reach)), f"mtp{min(depth + 1, 4)}", "thin"))
    points = [(r["step"], _number(r.get("val_loss"))) for r in run.validation]
    series.append(Series("validation", thin(points), "validation", "dots", step=True))
    # Single spikes of the faint line never set the range.
    values = [y for one in series[1:] for _, y in one.points if y is not None]
    if not values:
        return chart("Loss", [], number=number, wide=True)
    floor, high, cut = loss_range(values)
    note = f" The axis ends at {_format(high)}; the first steps lie above it." if cut else ""
    described = "Nats per token; bold is smoothed, faint is each log interval." if len(raw) > 8 else "Nats per token."
    return chart("Loss", series, number=number, note=described + note, low=floor, high=high, height="tall", wide=True)


def _layers_over_time(run: Run, number: int, wide: bool) -> str:
    """A card with the max/mean of each layer over the steps: few layers by name, many by a ramp of colour."""
    by_layer: dict[str, list[Point]] = {}
    for record in run.train:
        for name, ratio in _layer_ratios(record).items():
            by_layer.setdefault(name, []).append((record["step"], ratio))
    if not by_layer:
        return ""
    names = list(by_layer)
    labels = [f"layer {label}" if label[:1].isdigit() else label for label in short_names(names)]
    reach = _reach(max(map(len, by_layer.values())))
    many = len(names) > 8
    limit = max(60, 6000 // len(names))
    series = []
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        shade = round(index / max(1, len(names) - 1) * 7)
        points = thin(smooth(by_layer[name], reach), limit)
        series.append(Series(label, points, f"ramp{shade}", "thin" if many else "line"))
    values = [y for one in series for _, y in one.points if y is not None]
    if not values:
        return ""
    legend = ""
    if many:
        shades = "".join(f'<i style="background:var(--ramp{shade})"></i>' for shade in range(8))
        legend = f'<li class="ramp">{escape(labels[0])}<span>{shades}</span>{escape(labels[-1])}</li>'
    high = max(1.5, min(max(values), 2.5 * _quantile(values, 0.9)))
    return chart(
        "Busiest expert over the mean",
        series,
        number=number,
        note="Per layer, smoothed; the dashed line is perfect balance.",
        low=0.9,
        high=high,
        legend=legend,
        wide=wide,
        height="tall" if wide else "short",
        level=1.0,
        show=lambda value: f"{value:.2f}×",
        unit="×",
    )


def _validation_table(run: Run) -> str:
    rows = run.validation
    if not rows:
        return ""
    measured = [row for row in rows if _number(row.get("val_loss")) is not None]
    best_row = min(measured, key=lambda row: row["val_loss"], default=None)
    shown = rows
    if len(rows) > 16:  # the first, the last, the best, and others evenly between
        keep = {round(index * (len(rows) - 1) / 14) for index in range(15)}
        keep |= {index for index, row in enumerate(rows) if row is best_row}
        shown = [row for index, row in enumerate(rows) if index in keep]
    with_bytes = any(_number(row.get("val_bits_per_byte")) is not None for row in rows)
    heads = ["Step", "Loss", *(f"MTP {depth + 1}" for depth in range(run.depths)), *(["Bits per byte"] * with_bytes)]
    body = []
    for row in shown:
        loss = _number(row.get("val_loss"))
        cells = [loss, *(_at(row.get("val_mtp_loss"), depth) for depth in range(run.depths))]
        if with_bytes:
            cells.append(_number(row.get("val_bits_per_byte")))
        mark = ' <span class="best">best</span>' if row is best_row and len(rows) > 1 else ""
        numbers = "".join(f"<td>{'–' if value is None else f'{value:.3f}'}</td>" for value in cells)
        body.append(f'<tr><th scope="row">{row["step"]:,.0f}{mark}</th>{numbers}</tr>')
    left_out = f"<p class=caption>{len(shown)} of {len(rows)} validations shown.</p>" if len(shown) < len(rows) else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<section class="card wide"><div class="head"><h2>Validation</h2></div><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{left_out}</section>"
    )


def _sources_table(run: Run) -> str:
    """What was read of each source, as realised."""
    last = next((r for r in reversed(run.train) if isinstance(r.get("sources"), list)), None)
    if last is None:
        return ""
    rows = [row for row in last["sources"] if isinstance(row, dict) and _number(row.get("tokens")) is not None]
    whole = sum(row["tokens"] for row in rows) or 1
    body = "".join(
        f'<tr><th scope="row">{escape(str(row.get("source")))}</th><td>{row["tokens"]:,}</td>'
        f"<td>{percent(row['tokens'] / whole)}</td><td>{_number(row.get('epochs')) or 0:.2f}</td></tr>"
        for row in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Source", "Tokens", "Share", "Epochs"))
    return (
        f'<section class="card wide"><div class="head"><h2>Data read</h2></div><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}.{index}")
    else:
        yield path, value


def _folded(run: Run) -> str:
    parts = []
    kernels = run.env.get("kernels")
    if isinstance(kernels, list) and kernels and all(isinstance(kernel, dict) for kernel in kernels):
        heads = list(dict.fromkeys(name for kernel in kernels for name in kernel))
        head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in heads)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(_cell(kernel.get(name)))}</td>' for name in heads)}</tr>" for kernel in kernels
        )
        parts.append(
            f'<details><summary>Kernels</summary><div class="scroll"><table class="text"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></details>"
        )
    if text := escape(run.recipe_text.strip()):
        parts.append(f"<details><summary>Resolved recipe</summary><pre>{text}</pre></details>")
    rest = {name: value for name, value in run.env.items() if name != "kernels" or not parts}
    if rest:
        facts = _flat(rest)
        body = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(_cell(value))}</td></tr>' for name, value in facts
        )
        parts.append(
            f'<details><summary>Environment</summary><div class="scroll"><table class="text"><tbody>{body}</tbody>'
            f"</table></div></details>"
        )
    return f'<div class="folded">{"".join(parts)}</div>' if parts else ""


def _state(run: Run) -> tuple[str, str]:
    """(CSS class, words) of how far the run is."""
    if not run.train and not run.validation:
        return "empty", "nothing logged yet"
    if run.steps is None:
        return "open", f"at step {run.step:,}"
    if run.step >= run.steps:
        return "done", f"finished, {run.steps:,} steps"
    return "open", f"at step {run.step:,} of {run.steps:,}"


def _facts_line(run: Run) -> str:
    """One line under the title: where, how and from which commit."""
    parts = []
    machine = run.env.get("machine")
    if isinstance(machine, dict):
        gpus = machine.get("gpus")
        on_gpu = str(run.env.get("device", "")).startswith("cuda")
        if on_gpu and isinstance(gpus, list) and gpus and isinstance(gpus[0], dict):
            parts.append(str(gpus[0].get("name", "GPU")))
        elif machine.get("cpu"):
            cores = machine.get("cores")
            parts.append(f"{machine['cpu']}, {cores} core{'s' * (cores != 1)}" if cores else str(machine["cpu"]))
    ranks = _number(run.env.get("world_size"))
    if ranks:
        parts.append(f"{ranks:.0f} rank{'s' * (ranks != 1)}")
    if isinstance(run.key("train.dtype"), str):
        parts.append(run.key("train.dtype"))
    if run.key("seed") is not None:
        parts.append(f"seed {run.key('seed')}")
    git = run.env.get("git")
    if isinstance(git, dict) and git.get("commit"):
        parts.append(f"commit {str(git['commit'])[:10]}{' + changes' if git.get('dirty') else ''}")
    skipped = run.last("skipped_steps")
    if skipped:
        parts.append(f"{skipped:.0f} step{'s' * (skipped != 1)} skipped as non-finite")
    if run.bad_lines:
        parts.append(f"{run.bad_lines} unreadable line{'s' * (run.bad_lines != 1)} in {METRICS_FILE} left out")
    return f'<p class="facts">{" · ".join(map(escape, parts))}</p>' if parts else ""


def page(run: Run) -> str:
    """The whole report as HTML text."""
    kind, state = _state(run)
    cards = [_losses(run, 1)]

    def single(number: int, title: str, key: str, color: str, **options: Any) -> None:
        points = run.column(key)
        if any(y is not None for _, y in points):
            if key in ("tokens_per_second", "mfu", "grad_norm") and len(points) > 8:
                faint = Series(title, thin(points), color, "faint", legend=False)
                series = [faint, Series(title, thin(smooth(points, _reach(len(points)))), color)]
            else:
                series = [Series(title, thin(points), color)]
            series[-1].label = "last"
            cards.append(chart(title, series, number=number, **options))

    rates = [y for _, y in run.column("lr") if y is not None]
    highest = tick_labels([max(rates, default=0.0)])[0]
    single(2, "Learning rate", "lr", "rate", low=0, note=f"Highest {highest}.")
    norms = [y for _, y in run.column("grad_norm") if y is not None]
    clip = _number(run.key("optim.clip_grad"))
    single(
        3,
        "Gradient norm",
        "grad_norm",
        "norm",
        logarithmic=bool(norms) and max(norms) > 8 * _quantile(norms, 0.5) and min(norms) > 0,
        note=f"Before clipping; the dashed line is the clip at {clip:g}." if clip else "",
        level=clip or None,
    )
    single(4, "Tokens per second", "tokens_per_second", "speed", low=0, show=compact, note=_ranks_note(run))
    peak = run.env.get("peak_flops")
    source = str(peak.get("source") or "") if isinstance(peak, dict) else ""
    shown = {"show": percent, "factor": 100, "unit": "%", "note": _sentence(source)}
    single(5, "Share of the machine's peak", "mfu", "peak", low=0, **shown)
    load = [r for r in run.train if isinstance(r.get("expert_load"), dict) and any(r["expert_load"].values())]
    wide = bool(load) and max(map(len, load[-1]["expert_load"].values())) > 32
    if load:
        kept = {name: shares for name, shares in load[-1]["expert_load"].items() if shares}
        cards.append(heat_map(kept, load[-1]["step"], number=6, wide=wide))
    cards.append(_layers_over_time(run, 7, wide))
    cards.append(_quantisation(run))
    cards.append(_validation_table(run))
    cards.append(_sources_table(run))
    main = f'{_tiles(run)}<div class="cards">{"".join(cards)}</div>{_folded(run)}'
    state = f'<span class="state {kind}">{escape(state)}</span>'
    return document(run.name, "training report", state, f"{_facts_line(run)}{_architecture(run)}", main)


def document(title: str, kind: str, state: str, facts: str, main: str, style: str = "") -> str:
    """A page as HTML text that needs no server and no network: its title, of what kind it is, its state, facts and
    content as HTML, and style of its own."""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · nemo_lite {kind}</title><style>{_STYLE}{style}</style></head><body>"
        f'<header><div class="title"><p class="over">nemo_lite {kind}</p><h1>{escape(title)}</h1>{state}</div>'
        f"{facts}</header><main>{main}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _ranks_note(run: Run) -> str:
    ranks = _number(run.env.get("world_size")) or 1
    return f"All {ranks:.0f} ranks together." if ranks > 1 else ""


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


# ---------------------------------------------------------------------------------------------------------------- style

# Diverging colours mix a hue into the card's own background, so that "at the mean" recedes in light and in dark alike.
_HEAT = "".join(
    f".{side}{level}{{--c:color-mix(in oklab,var(--{hue}) {round(3 + 97 * (level / LEVELS) ** 1.15)}%,var(--even))}}"
    for side, hue in (("o", "over"), ("u", "under"))
    for level in range(1, LEVELS + 1)
)

_STYLE = (
    """
:root{--page:#f5f4f0;--card:#fff;--ink:#1a1d21;--soft:#5b626c;--line:#e3e1da;--grid:#eceae4;--even:#efede7;
--train:#1f5fd0;--validation:#1a1d21;--mtp1:#c2570c;--mtp2:#9333b8;--mtp3:#0b7f6b;--mtp4:#a8324a;
--rate:#7a5af0;--norm:#b3471d;--speed:#0b7f6b;--peak:#0e7490;--over:#c8460a;--under:#1f5fd0;--dead:#1a1d21;
--mamba:#1f5fd0;--attention:#c2570c;--moe:#0b7f6b;--mlp:#69707b;--good:#0a6b4f;--goodback:#dcf3e8;
--wait:#7a4a00;--waitback:#fdeecd;--ramp0:#f0a500;--ramp1:#ee7d2c;--ramp2:#e05050;--ramp3:#c9347a;--ramp4:#9c2f9f;
--ramp5:#6c38b5;--ramp6:#3d43ad;--ramp7:#20328a}
@media(prefers-color-scheme:dark){:root{--page:#0e1116;--card:#161b22;--ink:#e8eaed;--soft:#a0a8b4;--line:#2a313b;
--grid:#222934;--even:#242b35;--train:#6ea8ff;--validation:#f2f4f7;--mtp1:#ff9d5c;--mtp2:#d58cf5;--mtp3:#4fd1b5;
--mtp4:#ff8fa3;--rate:#a995ff;--norm:#ff9d70;--speed:#4fd1b5;--peak:#56c7e0;--over:#ff8a3d;--under:#5b9dff;--dead:#f2f4f7;
--mamba:#2c6bd6;--attention:#bd560f;--moe:#0d8270;--mlp:#69727e;--good:#7fe0b8;--goodback:#12382b;
--wait:#ffcf70;--waitback:#3d2e0a;--ramp0:#ffd166;--ramp1:#ffa552;--ramp2:#ff7d6b;--ramp3:#f565a0;--ramp4:#d070dd;
--ramp5:#a680f0;--ramp6:#7f92f5;--ramp7:#6ab0ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",Ubuntu,sans-serif;-webkit-text-size-adjust:100%}
header,main{max-width:1200px;margin:0 auto;padding:0 24px}
header{padding-top:28px}main{padding-top:20px}
.title{display:grid;grid-template-columns:1fr auto;align-items:end;gap:0 16px}
.over{grid-column:1/-1;margin:0;color:var(--soft);font-size:13px}
h1{margin:0;font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.015em;overflow-wrap:anywhere}
.state{padding:4px 12px;border-radius:99px;font-size:13px;font-weight:600;white-space:nowrap;margin-bottom:3px}
.state.done{color:var(--good);background:var(--goodback)}
.state.open,.state.empty{color:var(--wait);background:var(--waitback)}
.facts{margin:6px 0 0;color:var(--soft);font-size:13.5px;overflow-wrap:anywhere}
.model{display:flex;flex-wrap:wrap;align-items:center;justify-content:space-between;gap:8px 24px;margin:16px 0 0}
.architecture{display:flex;flex-wrap:wrap;gap:10px 18px}
.strip{display:flex;flex-wrap:wrap;gap:3px;align-items:center}
.strip i{font:600 12px/22px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;width:22px;
height:22px;text-align:center;border-radius:5px;color:#fff}
.strip em{font-style:normal;font-size:12.5px;color:var(--soft);margin:0 4px}
.strip .cut{width:2px;border-radius:0;background:var(--soft);margin:0 3px}
i.mamba{background:var(--mamba)}i.attention{background:var(--attention)}i.moe{background:var(--moe)}
i.mlp{background:var(--mlp)}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:0 0 20px;padding:0;
background:var(--line);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.tile{background:var(--card);padding:14px 16px 13px;flex:1 1 150px}
.tile dt{color:var(--soft);font-size:13px}
.tile dd{margin:0;font-size:25px;line-height:1.25;font-weight:620;letter-spacing:-.01em;
font-variant-numeric:tabular-nums}
.tile small{display:block;color:var(--soft);font-size:12.5px;font-weight:400;letter-spacing:0}
.cards{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px 12px;min-width:0}
.wide{grid-column:1/-1}
.head{display:flex;flex-wrap:wrap;align-items:baseline;justify-content:space-between;gap:2px 18px;margin-bottom:10px}
h2{margin:0;font-size:15.5px;font-weight:620}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0;padding:0;list-style:none;color:var(--soft);font-size:13px}
.legend li{display:flex;align-items:center;gap:6px}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.legend i{width:14px;height:3px;border-radius:2px}
.legend i.thin{height:2px}.legend i.dots{width:9px;height:9px;border-radius:50%}
.mixers i{width:10px;height:10px;border-radius:3px}
.ramp span{display:flex}.legend .ramp i{width:12px;height:8px;border-radius:0}
.frame{display:grid;grid-template:auto 20px/46px minmax(0,1fr)}
.ys,.xs{position:relative;color:var(--soft);font-size:12px;line-height:1;font-variant-numeric:tabular-nums}
.ys span{position:absolute;right:8px;transform:translateY(-50%);white-space:nowrap}
.xs{grid-column:2}
.xs span{position:absolute;top:7px;transform:translateX(-50%);white-space:nowrap}
.plot{position:relative;border-radius:4px;outline-offset:3px}
.plot:focus-visible{outline:2px solid var(--train)}
.plot svg{display:block;width:100%;height:190px;border-bottom:1px solid var(--line)}
.tall .plot svg{height:320px}
.heat .plot svg{height:var(--h);border:0}
svg path,svg line{fill:none;vector-effect:non-scaling-stroke;stroke-linecap:round;stroke-linejoin:round}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .level{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 5}
svg .line{stroke-width:2.4}svg .thin{stroke-width:1.6}
svg .faint{stroke-width:1;opacity:.38}
svg .dots{stroke-width:8}svg .halo{stroke-width:11;stroke:var(--card)}
.heat svg path{fill:var(--c);stroke:none}
.heat svg{shape-rendering:crispEdges}
.even{--c:var(--even)}.dead{--c:var(--dead)}
.scale{display:flex;align-items:center;font-size:12.5px;color:var(--soft)}
.scale i{width:9px;height:11px;background:var(--c)}
.scale span{margin:0 6px}.scale .key{margin-left:10px;width:11px}
.values span{position:absolute;transform:translate(-50%,-50%);font-size:12px;font-variant-numeric:tabular-nums;
pointer-events:none}
.values .on{color:var(--card);font-weight:600}
.caption{margin:8px 0 0;color:var(--soft);font-size:12.5px}
.none{color:var(--soft);margin:8px 0 12px}
.rule{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.mark{position:absolute;border:2px solid var(--ink);border-radius:3px;pointer-events:none}
.tip{position:absolute;top:6px;z-index:2;background:var(--ink);color:var(--card);border-radius:7px;padding:6px 10px;
font-size:12.5px;line-height:1.45;white-space:nowrap;pointer-events:none;font-variant-numeric:tabular-nums;
max-height:320px;overflow:hidden}
.tip div{display:flex;justify-content:space-between;gap:14px}
.tip b{font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
th:first-child{text-align:left}
thead th{color:var(--soft);font-size:12.5px}
tbody tr:last-child>*{border-bottom:0}
.best{color:var(--good);background:var(--goodback);border-radius:99px;padding:1px 8px;font-size:12px;margin-left:6px}
.formats table{border-collapse:separate;border-spacing:0;font-size:12.5px}
.formats th,.formats td{padding:3px 4px;background:var(--c)}
.formats thead th{text-align:center}
.formats thead tr:not(:last-child)>*{border-bottom:0}
.formats th:first-child{position:sticky;left:0;z-index:1;padding:3px 6px 3px 0;background:var(--card);text-align:left}
.formats .measure{border-left:12px solid var(--card)}.formats .product{border-left:2px solid var(--card)}
.formats .o8{color:var(--card)}
@media(prefers-color-scheme:dark){.formats .o6,.formats .o7{color:var(--card)}}
.formats svg{display:block;width:34px;height:16px;margin:0 auto;background:var(--grid);shape-rendering:crispEdges}
.formats svg path{fill:var(--under);stroke:none}
.formats wbr{display:none}
table.text th,table.text td{text-align:left;white-space:normal;vertical-align:top;overflow-wrap:anywhere}
table.text tbody th{color:var(--soft);width:32%}
.folded{margin:16px 0 40px;display:grid;gap:8px}
details{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:0 16px}
summary{padding:11px 0;font-weight:600;cursor:pointer}
details[open]{padding-bottom:14px}
pre{margin:0;overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media(max-width:760px){header,main{padding:0 14px}header{padding-top:18px}main{padding-top:16px}h1{font-size:24px}
.title{grid-template-columns:1fr}.state{justify-self:start;margin:6px 0 2px}
.cards{grid-template-columns:minmax(0,1fr);gap:12px}.card{padding:12px 12px 10px}
.tiles{margin:0 0 12px}.tile{padding:11px 12px;flex:1 1 40%}.tile dd{font-size:21px}
.frame{grid-template-columns:42px minmax(0,1fr)}.tall .plot svg{height:240px}.plot svg{height:160px}
.values span{font-size:11px}.values.many{display:none}th,td{padding:5px 6px}.formats wbr{display:inline}
.best{display:inline-block;width:8px;height:8px;padding:0;font-size:0;background:var(--good)}}
@media print{body{background:#fff}.card,details{break-inside:avoid}}
"""
    + _HEAT
).replace("\n", "")

_SCRIPT = """
(() => {
  const make = (parent, name) => {
    const node = document.createElement('div');
    node.className = name; node.hidden = true; parent.append(node);
    return node;
  };
  const row = (tip, name, value) => {
    const [line, left, right] = ['div', 'span', 'b'].map(name => document.createElement(name));
    left.textContent = name; right.textContent = value;
    line.append(left, right); tip.append(line);
  };
  const put = (plot, tip, x) => {
    tip.hidden = false;
    const room = plot.clientWidth - tip.offsetWidth;
    const at = x + 14 > room ? x - tip.offsetWidth - 14 : x + 14;
    tip.style.left = Math.max(0, Math.min(room, at)) + 'px';
  };
  const bind = (plot, show, hide, columns) => {
    let at = null;
    const go = (x, y) => { at = [x, y]; show(x, y); };
    const point = event => {
      const box = plot.getBoundingClientRect();
      go((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    plot.addEventListener('pointermove', point);
    plot.addEventListener('pointerdown', point);
    plot.addEventListener('pointerleave', hide);
    plot.addEventListener('blur', hide);
    plot.addEventListener('keydown', event => {
      const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
      if (!move) return;
      event.preventDefault();
      const [x, y] = at || [.5, .5];
      const within = value => Math.max(0, Math.min(.999, value));
      go(within(x + move[0] / columns[0]), within(y + move[1] / columns[1]));
    });
  };
  for (const plot of document.querySelectorAll('[data-chart]')) {
    const series = JSON.parse(document.getElementById(plot.dataset.chart).textContent);
    const rule = make(plot, 'rule'), tip = make(plot, 'tip');
    const nearest = (points, x) => {
      let low = 0, high = points.length - 1;
      while (high - low > 1) { const half = low + high >> 1; points[half][1] < x ? low = half : high = half; }
      return Math.abs(points[low][1] - x) <= Math.abs(points[high][1] - x) ? points[low] : points[high];
    };
    bind(plot, x => {
      const found = series.map(one => [one, nearest(one.points, x * 100)]).filter(pair => pair[1]);
      const lead = found.filter(pair => !pair[0].near)[0] || found[0];
      if (!lead) return;
      tip.textContent = '';
      row(tip, plot.dataset.axis, lead[1][0].toLocaleString('en'));
      const shown = found.filter(([one, point]) => !one.near || Math.abs(point[1] - x * 100) < 3);
      for (const [one, point] of shown.slice(0, 12))
        row(tip, one.near ? one.name + ' at ' + point[0].toLocaleString('en') : one.name, point[2]);
      if (shown.length > 12) row(tip, '… and ' + (shown.length - 12) + ' more', '');
      rule.hidden = false; rule.style.left = lead[1][1] + '%';
      put(plot, tip, lead[1][1] / 100 * plot.clientWidth);
    }, () => { rule.hidden = tip.hidden = true; }, [100, 1]);
  }
  for (const plot of document.querySelectorAll('[data-heat]')) {
    const {labels, rows} = JSON.parse(document.getElementById(plot.dataset.heat).textContent);
    const mark = make(plot, 'mark'), tip = make(plot, 'tip');
    const wide = Math.max(...rows.map(row => row.length));
    bind(plot, (x, y) => {
      const down = Math.min(rows.length - 1, Math.floor(y * rows.length)), across = Math.floor(x * wide);
      const value = rows[down] && rows[down][across];
      if (value === undefined) return;
      tip.textContent = '';
      row(tip, 'layer', labels[down]); row(tip, 'expert', across); row(tip, 'load over mean', value.toFixed(2) + '×');
      Object.assign(mark.style, {left: across / wide * 100 + '%', top: down / rows.length * 100 + '%',
        width: 100 / wide + '%', height: 100 / rows.length + '%'});
      mark.hidden = false;
      put(plot, tip, (across + 1) / wide * plot.clientWidth);
    }, () => { mark.hidden = tip.hidden = true; }, [wide, rows.length]);
  }
})();
"""


# ---------------------------------------------------------------------------------------------------------------- entry


def read_run(run_dir: Path) -> Run:
    """What RUN_DIR holds; a missing recipe or env.json leaves its part of the page out, metrics must be there."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder; give the RUN_DIR of a training run")
    if not (run_dir / METRICS_FILE).is_file():
        raise UserError(f"{run_dir} has no {METRICS_FILE}; give the RUN_DIR of a training run")
    records, bad = read_metrics(run_dir / METRICS_FILE)
    recipe: Any = {}
    text = ""
    if (run_dir / "recipe.yaml").is_file():
        from omegaconf import OmegaConf

        text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
        try:
            recipe = OmegaConf.to_container(OmegaConf.create(text))
        except Exception as error:
            raise UserError(f"{run_dir / 'recipe.yaml'} is no YAML that can be read: {error}") from error
    env: Any = {}
    if (run_dir / "env.json").is_file():
        try:
            env = json.loads((run_dir / "env.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{run_dir / 'env.json'} is no JSON: {error}") from error
    return Run(
        name=run_dir.resolve().name,
        records=records,
        recipe=recipe if isinstance(recipe, dict) else {},
        recipe_text=text,
        env=env if isinstance(env, dict) else {},
        bad_lines=bad,
    )


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from metrics.jsonl, recipe.yaml and env.json; return its path."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, page(read_run(Path(run_dir))).encode("utf-8"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """``nemo-lite report RUN_DIR|DIR``."""
    parser = argparse.ArgumentParser(
        prog="nemo-lite report",
        description="Write RUN_DIR/report.html: loss curves, learning rate, throughput and expert load of a training "
        "run, as one page that needs no server and no network. Of a programme's folder DIR, one page about all its "
        "stages, runs/DIR/report.html.",
    )
    parser.add_argument("folder", metavar="RUN_DIR|DIR", type=Path, help="a run, or a folder of stage files")
    parser.add_argument("--prompt", metavar="TEXT", help="of a programme: what every stage's model completes")
    arguments = parser.parse_args(argv)
    from nemo_lite.programme.stages import is_programme

    if is_programme(arguments.folder):
        from nemo_lite.programme.report import PROMPT, write_programme_report

        print(write_programme_report(arguments.folder, arguments.prompt or PROMPT))
        return 0
    if arguments.prompt is not None:
        raise UserError(f"--prompt is of a programme, and {arguments.folder} holds no stage files")
    print(write_report(arguments.folder))
    return 0
