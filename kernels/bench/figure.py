"""The picture of a run: how near every backend comes to its limit. A row an op, a column a dtype, a line a backend."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

# Okabe and Ito's colours, which stay apart for colour-blind readers; the plain equation of each op is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B2529B", "#8A6D00")
GREY = "#707070"
PLAIN = ("reference", "recurrent")
MARKS = ("circle", "square", "diamond", "triangle", "cross")
SEVERAL = ("norm", "linear", "loss", "quant")  # ops whose functions stand one after the other
PAIRS = (("float32", "bfloat16"), ("int8", "int4"))
FONT = "font-family:'Helvetica Neue',Arial,'Liberation Sans',sans-serif"
WIDTH, LEFT, GAP, HEIGHT = 640, 58, 34, 190
HEAD, LETTER = 34, 4.9  # above an op's panels; how far a letter of a slanted label reaches down
LOW, HIGH = 0.1, 200.0  # percent
TICKS = (0.1, 1, 10, 100)
NAMES = {"nemotron3_nano": "Nemotron 3 Nano", "nemotron3_super": "Nemotron 3 Super"}


def draw(result: dict[str, Any]) -> str:
    """An SVG of a result as __main__ writes it."""
    rows = result["rows"]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    parts, top = _header(result), 128.0
    for op in ops:
        styles = _styles([row["backend"] for row in rows if row["op"] == op])
        parts += _legend(op, styles, top)
        top += HEAD
        for pair in PAIRS:
            of_pair = [[row for row in rows if row["op"] == op and row["dtype"] == dtype] for dtype in pair]
            if not any(of_pair):
                continue
            below = 22 + LETTER * max(len(row["shape"]) for drawn in of_pair for row in drawn)
            for column, (dtype, drawn) in enumerate(zip(pair, of_pair)):
                if drawn:
                    parts += _panel(dtype, drawn, styles, LEFT + column * (WIDTH + LEFT + GAP), top + 20, below)
            top += 20 + HEIGHT + below + 30
    total = 2 * (WIDTH + LEFT) + 2 * GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {top:.0f}" width="{total}" height="{top:.0f}" '
        f'role="img" style="{FONT}"><title>Achieved share of the roofline, by op</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, words: str, size: int = 13, **attributes: str) -> str:
    given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in ({"fill": "#222"} | attributes).items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{given}>{escape(words)}</text>'


def _header(result: dict[str, Any]) -> list[str]:
    machine, limits = result["machine"], result["limits"]
    rates = ", ".join(f"{name} {rate / 1000:,.2f}" for name, rate in limits["gemm_gflops"].items())
    reading = limits["reading_gbs"]
    sizes = sorted(reading, key=int)
    speeds = f"{reading[sizes[0]]:,.0f} GB/s of {int(sizes[0]) / 1e6:.0f} MB to {reading[sizes[-1]]:,.0f} GB/s of " \
             f"{int(sizes[-1]) / 1e9:.1f} GB"  # fmt: skip
    noisy = sum(bool(row.get("noisy")) for row in result["rows"])
    warning = f" Other processes were busy during {noisy} of {len(result['rows'])} measurements." if noisy else ""
    lines = (
        f"{machine['name']}, {limits['threads']} thread{'s' if limits['threads'] != 1 else ''}"
        f", torch {machine['torch']}, commit {machine['commit']}. Products in TFLOP/s: {rates}. Reading: {speeds}.",
        "100 % = the longest of products / measured GEMM rate, other operations / measured float32 rate, and bytes / "
        "measured reading rate of as many bytes. Below the axis: rows × length.",
        "Small hollow points: this limit is shorter than a call of torch's smallest operation takes "
        f"({limits['call_us']:.1f} µs). grad: forward and backward.{warning}",
    )
    return [
        _text(24, 36, "How near every kernel comes to the machine's limit", 22, font_weight="600"),
        *(_text(24, 62 + 20 * i, line, 13, fill="#444") for i, line in enumerate(lines)),
    ]


def _styles(backends: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each backend."""
    names = list(dict.fromkeys(backends))
    coloured = [name for name in names if name not in PLAIN]
    styles = {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(coloured)}
    return {name: styles.get(name, (GREY, "cross")) for name in names}


def _legend(op: str, styles: dict[str, tuple[str, str]], top: float) -> list[str]:
    parts = [
        f'<line x1="24" x2="{2 * (WIDTH + LEFT) + GAP}" y1="{top:.1f}" y2="{top:.1f}" stroke="#bbb"/>',
        _text(24, top + 25, op, 18, font_weight="600"),
    ]
    x = 150.0
    for name, (colour, mark) in styles.items():
        parts.append(f'<path d="M{x:.1f} {top + 19:.1f}h26" stroke="{colour}" stroke-width="2"/>')
        parts.append(_mark(mark, x + 13, top + 19, colour, False))
        parts.append(_text(x + 33, top + 24, name, 14))
        x += 60 + 8 * len(name)
    return parts


def _mark(mark: str, x: float, y: float, colour: str, hollow: bool) -> str:
    r = 3.2 if hollow else 4.4
    paths = {
        "circle": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "diamond": f"M{x - 1.25 * r:.1f} {y:.1f}l{1.25 * r} {-1.25 * r}l{1.25 * r} {1.25 * r}l{-1.25 * r} {1.25 * r}z",
        "triangle": f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r} {2.1 * r}h{-2.4 * r}z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
    }
    fill = "none" if mark == "cross" else "#fff" if hollow else colour
    width = 1.3 if hollow else 2 if mark == "cross" else 1
    return f'<path d="{paths[mark]}" fill="{fill}" stroke="{colour}" stroke-width="{width}"/>'


def _panel(dtype: str, rows: list[dict[str, Any]], styles: dict, left: float, top: float, below: float) -> list[str]:
    def height(percent: float) -> float:
        clipped = min(max(percent, LOW), HIGH)
        return top + HEIGHT * (1 - math.log(clipped / LOW) / math.log(HIGH / LOW))

    order = {"decode": 0, "verify": 1, "forward": 2, "train": 3}
    places = {(row["config"], row["function"], order[row["mode"]], row["B"] * row["L"]): row["shape"] for row in rows}
    configs = list(dict.fromkeys(row["config"] for row in rows))
    functions = list(dict.fromkeys(row["function"] for row in rows if row["op"] in SEVERAL)) or [""]
    ordered = sorted(
        places,
        key=lambda p: (configs.index(p[0]), functions.index(p[1]) if p[1] in functions else 0, p[2:]),
    )
    step = WIDTH / (len(ordered) + 0.6 * (len(configs) - 1))
    at, x = {}, left + step / 2
    for i, place in enumerate(ordered):
        if i and place[0] != ordered[i - 1][0]:
            x += 0.6 * step
        at[place] = x
        x += step

    base = top + HEIGHT

    def band(high: float, low: float, colour: str) -> str:
        y = height(high)
        return f'<rect x="{left:.1f}" y="{y:.1f}" width="{WIDTH}" height="{height(low) - y:.1f}" fill="{colour}"/>'

    parts = [
        band(HIGH, 50, "#eaf4ec"),
        band(10, LOW, "#fbf1ec"),
        _text(left, top - 7, dtype, 14, font_weight="600"),
        _text(left - 46, top - 7, "share", 12, fill="#444"),
    ]
    for tick in TICKS:
        y = height(tick)
        parts.append(f'<path d="M{left:.1f} {y:.1f}h{WIDTH}" stroke="{"#555" if tick == 100 else "#ccc"}"/>')
        parts.append(_text(left - 7, y + 4, f"{tick:g} %", 12, text_anchor="end"))
    for place, x in at.items():
        parts.append(f'<path d="M{x:.1f} {base:.1f}v4" stroke="#888"/>')
        turn = f"rotate(-60 {x + 4:.1f} {base + 15:.1f})"
        parts.append(_text(x + 4, base + 15, places[place], 11, text_anchor="end", transform=turn, fill="#333"))
    for config in configs:
        xs = [x for place, x in at.items() if place[0] == config]
        middle = (xs[0] + xs[-1]) / 2
        parts.append(
            f'<path d="M{xs[0] - step / 2.4:.1f} {base + below:.1f}H{xs[-1] + step / 2.4:.1f}" stroke="#999"/>'
        )
        parts.append(_text(middle, base + below + 15, NAMES.get(config) or config, 12, text_anchor="middle"))

    for backend, (colour, mark) in reversed(styles.items()):  # the first one on top
        points = {}
        for row in rows:
            if row["backend"] == backend:
                place = (row["config"], row["function"], order[row["mode"]], row["B"] * row["L"])
                points[place] = (at[place], height(100 * row["share"]), row)
        drawn = [place for place in ordered if place in points]
        line = ""
        for i, place in enumerate(drawn):
            joined = i > 0 and drawn[i - 1][:2] == place[:2]
            line += f"{'L' if joined else 'M'}{points[place][0]:.1f} {points[place][1]:.1f}"
        parts.append(f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-opacity=".55"/>')
        for px, py, row in (points[place] for place in drawn):
            words = f"{backend}, {row['config']} {row['shape']} {dtype}: {100 * row['share']:.2g} %, {row['ms']:.4g} ms"
            parts.append(f"<g><title>{escape(words)}</title>{_mark(mark, px, py, colour, row['call_bound'])}</g>")
    return parts
