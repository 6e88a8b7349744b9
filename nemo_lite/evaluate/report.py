"""Figures for people: tables on the terminal, and FOLDER/evaluation.html beside evaluation.json.

The page is like a run's report (nemo_lite/train/report.py, whose charts these are): static, no server, no network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemo_lite.data.mixture import lines
from nemo_lite.evaluate.ruler import CHANCE
from nemo_lite.train import report as charts
from nemo_lite.train.metrics import compact, percent, write_atomically
from nemo_lite.train.report import Series

COLORS = ("train", "mtp1", "mtp3", "mtp2", "mtp4", "peak", "norm")
MARGIN_NOTE = (
    f"likeliest: the answer beats four wrong ones of its form ({CHANCE:.0%} by chance); margin: nats above their mean, "
    "with its standard error (0 by chance)"
)
Table = tuple[list[str], list[list[str]]]  # heads and rows; the first column is words


def _length(found: dict[str, Any] | None) -> str:
    return f"{found['acceptance_length']:.2f}" if found else "–"


def _kept(found: dict[str, Any]) -> str:
    return f"{_length(found)} (kept by position: {', '.join(f'{share:.0%}' for share in found['by_position'])})"


def _size(tokens: int | str) -> str:
    """2048 as 2k."""
    tokens = int(tokens)
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _margin(found: dict[str, Any]) -> str:
    error = found["margin_error"]
    return f"{found['margin']:+.1f}" + (f" ± {error:.1f}" if error is not None else "")


def _span(bin: dict[str, Any]) -> str:
    return str(bin["from"]) if bin["from"] == bin["to"] else f"{bin['from']}-{bin['to']}"


# -------------------------------------------------------------------------------------------------------------- tables


def labels(figures: dict[str, Any]) -> dict[str, str]:
    """source -> what it is called here: its last part, where that tells it from the others."""
    names = list(figures["sources"])
    short = [name if name.startswith("hf:") else Path(name).name for name in names]
    return {name: one if short.count(one) == 1 else name for name, one in zip(names, short)}


def sources_table(figures: dict[str, Any]) -> Table:
    rows = {label: figures["sources"][name] for name, label in labels(figures).items()}
    rows |= {"all": figures} if len(rows) > 1 else {}
    drafts = figures["mtp"] is not None
    depths = len(figures["mtp"]["accuracy_by_depth"]) if drafts else 0
    heads = ["held-out text", "bytes", "bits/byte", "gzip -9", "loss", "next token"]
    heads += [f"MTP {k + 1}" for k in range(depths)] + ["accepted, text", "accepted, free"] * drafts
    return heads, [
        [
            name, compact(each["bytes"]), f"{each['bits_per_byte']:.3f}", f"{each['gzip9_bits_per_byte']:.3f}",
            f"{each['loss']:.3f}", percent(each["next_token_accuracy"]),
            *(percent(share) for share in (each["mtp"]["accuracy_by_depth"] if drafts else [])),
            *([_length(each["teacher_forced"]), _length(each["free_running"])] if drafts else []),
        ]
        for name, each in rows.items()
    ]  # fmt: skip


def position_table(figures: dict[str, Any]) -> Table:
    """Loss by tokens of context: of everything, and where there are several sources of each."""
    names = labels(figures) if len(figures["sources"]) > 1 else {}
    losses = {
        name: {bin["from"]: f"{bin['loss']:.3f}" for bin in figures["sources"][name]["loss_by_position"]}
        for name in names
    }
    return ["tokens of context", "predicted", "loss", "up to there", *names.values()], [
        [
            _span(bin), f"{bin['tokens']:,}", f"{bin['loss']:.3f}", f"{bin['cumulative']:.3f}",
            *(losses[name].get(bin["from"], "–") for name in names),
        ]
        for bin in figures["loss_by_position"]
    ]  # fmt: skip


def ruler_table(figures: dict[str, Any]) -> Table:
    """Score, share likeliest and margin by task and length."""
    lengths = list(figures["ruler"])
    tasks = list(dict.fromkeys(task for by_task in figures["ruler"].values() for task in by_task if task != "all"))
    heads = ["long-range questions"]
    for length in lengths:
        heads += [f"{_size(length)}: exact", "likeliest", "margin"]
    rows = []
    for task in [*tasks, "all"]:
        row = [task]
        for length in lengths:
            each = figures["ruler"][length].get(task)
            row += [percent(each["exact"]), percent(each["likeliest"]), _margin(each)] if each else ["–"] * 3
        rows.append(row)
    return heads, rows


def experts_table(figures: dict[str, Any]) -> Table:
    special = figures["specialisation"]
    heads = ["router", "least used", "busiest", "load of", *(["tells sources apart"] if special else [])]
    return heads, [
        [
            name, percent(each["min_over_mean"]), percent(each["max_over_mean"]),
            f"{each['effective']:.1f} of {len(each['shares'])}",
            *([f"{special[name]['bits']:.3f} bits, {percent(special[name]['share'])}"] if special else []),
        ]
        for name, each in figures["experts"].items()
    ]  # fmt: skip


def harness_table(figures: dict[str, Any]) -> Table:
    rows = []
    for task, found in figures["harness"].items():
        for name, value in found.items():
            if name in ("score", "samples") or "_stderr" in name:
                continue
            error = found.get(f"{name.split(' ')[0]}_stderr{name.removeprefix(name.split(' ')[0])}")
            rows.append([task, name, f"{value:.4g}", f"± {error:.2g}" if isinstance(error, float) else ""])
    return ["lm-eval", "metric", "value", ""], rows


def differences(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(what, its comparison, whether less is better)."""
    found = figures["against"]["differences"]
    for source, each in found["bits_per_byte"].items():
        yield f"bits/byte, {labels(figures)[source]}", each, True
    for each in found.get("loss_by_position", []):
        yield f"loss at {_span(each)}", each, True
    for length, by_kind in found["ruler"].items():
        for name, each in by_kind.items():
            yield f"questions of {_size(length)}, {name}", each, False


def verdict(each: dict[str, Any], less: bool) -> str:
    """`better` or `worse` where the interval leaves 0 out, else ``."""
    if each["low"] is None or each["low"] <= 0 <= each["high"]:
        return ""
    return "better" if (each["high"] < 0) == less else "worse"


def against_table(figures: dict[str, Any]) -> Table:
    heads = ["", "this", "other", "difference", "95 % interval", ""]
    rows = []
    for what, each, less in differences(figures):
        between = "–" if each["low"] is None else f"{each['low']:+.3f} to {each['high']:+.3f}"
        row = [what, f"{each['a']:.3f}", f"{each['b']:.3f}", f"{each['difference']:+.3f}", between]
        rows.append([*row, verdict(each, less)])
    return heads, rows


def _speed(speed: dict[str, Any]) -> str:
    drafted = speed["speculative_tokens_per_second"]
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s"
        + (f", {drafted:,.0f} with MTP drafts" if drafted else "")
        + f"; first token of {speed['prompt_tokens']} after {1000 * speed['time_to_first_token']:.0f} ms "
        f"({speed['threads']} thread{'s' * (speed['threads'] != 1)})"
    )


def _lines(table: Table) -> list[str]:
    return lines([table[0], *table[1]], left=1)


def describe(figures: dict[str, Any]) -> str:
    """The figures for a person at a terminal."""
    said = [*_lines(sources_table(figures)), ""]
    if forced := figures["teacher_forced"]:
        said.append(f"acceptance length, text   {_kept(forced)}")
    if free := figures["free_running"]:
        said.append(f"acceptance length, free   {_kept(free)}, {free['repeated_8grams']:.0%} of its 8-grams repeat")
    if figures["speed"]:
        said.append(f"generation                {_speed(figures['speed'])}")
    said += ["", *_lines(position_table(figures))]
    if figures["experts"]:
        said += ["", *_lines(experts_table(figures))]
    if figures["ruler"]:
        said += ["", *_lines(ruler_table(figures)), MARGIN_NOTE]
    if figures.get("harness"):
        said += ["", *_lines(harness_table(figures))]
    if against := figures.get("against"):
        said += ["", f"beside {against['model']}", *_lines(against_table(figures))]
        if "loss_by_position" not in against["differences"]:
            said.append("their tokenizers differ, so losses by position cannot be compared")
    said += [f"warning: {warning}" for warning in figures["warnings"]]
    return "\n".join(said)


# ---------------------------------------------------------------------------------------------------------------- page


def _card(title: str, inside: str, note: str = "", wide: bool = True) -> str:
    caption = f'<p class="caption">{escape(note)}</p>' if note else ""
    head = f'<div class="head"><h2>{escape(title)}</h2></div>'
    return f'<section class="card{" wide" * wide}">{head}{inside}{caption}</section>'


def _html(table: Table, classes: Sequence[Sequence[str]] | None = None) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table[0])
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>'
            if i == 0
            else f'<td class="{classes[r][i]}">{escape(cell)}</td>'
            if classes
            else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for r, row in enumerate(table[1])
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _positions(figures: dict[str, Any], number: int) -> str:
    """Loss by position of each source, all sources, and the other model."""
    found = {label: figures["sources"][name]["loss_by_position"] for name, label in labels(figures).items()}
    series = [
        Series(name, [(bin["from"], bin["loss"]) for bin in bins], COLORS[i % len(COLORS)])
        for i, (name, bins) in enumerate(found.items())
    ]
    whole = figures["loss_by_position"]
    if len(found) > 1:
        series.append(Series("all", [(bin["from"], bin["loss"]) for bin in whole], "validation"))
    series.append(Series("all up to there", [(bin["from"], bin["cumulative"]) for bin in whole], "rate", "thin"))
    if against := figures.get("against"):
        other = against["figures"]["loss_by_position"]
        series.append(Series("the other model", [(bin["from"], bin["loss"]) for bin in other], "mtp4", "thin"))
    return charts.chart(
        "Loss by position", series, number=number, height="tall", wide=True, doubling=True, axis="tokens of context",
        note="Nats per token, by how many tokens of its document the model has seen in the row. Each point stands for "
        "the tokens from there to the next.",
    )  # fmt: skip


def _questions(figures: dict[str, Any]) -> str:
    table = ruler_table(figures)
    classes = []
    for row in table[1]:
        marks = [""]
        for i, cell in enumerate(row[1:]):
            if i % 3 != 1 or cell == "–":
                marks.append("measure" if i % 3 == 0 else "")
                continue
            share = figures["ruler"][list(figures["ruler"])[i // 3]][row[0]]["likeliest"]
            level = round(charts.LEVELS * (share - CHANCE) / (1 - CHANCE))
            marks.append("" if level == 0 else f"{'o' if level > 0 else 'u'}{min(abs(level), charts.LEVELS)}")
        classes.append(marks)
    note = f"Colour: above or below chance. {MARGIN_NOTE[:1].upper()}{MARGIN_NOTE[1:]}."
    return _card("Long-range questions", f'<div class="formats">{_html(table, classes)}</div>', note)


def _intervals(figures: dict[str, Any]) -> str:
    """The table of differences, with marks."""
    table = against_table(figures)
    classes = [
        ["", "", "", "", "", {"better": "good", "worse": "bad"}.get(row[-1], "")] for row in table[1]
    ]  # fmt: skip
    note = "Intervals by the paired bootstrap over documents and questions; marked where they leave 0 out."
    if "loss_by_position" not in figures["against"]["differences"]:
        note += " The tokenizers differ, so losses by position cannot be compared."
    return _card(f"Beside {figures['against']['model']}", _html(table, classes), note)


def _tiles(figures: dict[str, Any]) -> str:
    tiles = [
        charts._tile(
            "Bits per byte", f"{figures['bits_per_byte']:.3f}", f"gzip -9: {figures['gzip9_bits_per_byte']:.3f}"
        ),
        charts._tile("Next token", percent(figures["next_token_accuracy"]), f"loss {figures['loss']:.3f}"),
    ]
    if forced := figures["teacher_forced"]:
        free = figures["free_running"]
        below = f"free-running {_length(free)}" if free else "along the text"
        tiles.append(charts._tile("Acceptance length", _length(forced), below))
    if figures["ruler"]:
        length, by_task = list(figures["ruler"].items())[-1]
        below = f"likeliest at {_size(length)}, chance {CHANCE:.0%}"
        tiles.append(charts._tile("Long-range answers", percent(by_task["all"]["likeliest"]), below))
    if speed := figures["speed"]:
        first = f"first token after {1000 * speed['time_to_first_token']:.0f} ms"
        tiles.append(charts._tile("Tokens per second", compact(speed["tokens_per_second"]), first))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def page(figures: dict[str, Any]) -> str:
    """evaluation.html as text."""
    cards = [_card("Warnings", "".join(f"<p>{escape(each)}</p>" for each in figures["warnings"]))] * bool(
        figures["warnings"]
    )
    cards += [_positions(figures, 1), _card("By source", _html(sources_table(figures)))]
    if figures["ruler"]:
        cards.append(_questions(figures))
    if figures.get("against"):
        cards.append(_intervals(figures))
    if figures["experts"]:
        load = {name: each["shares"] for name, each in figures["experts"].items()}
        wide = max(map(len, load.values())) > 32
        cards.append(charts.heat_map(load, None, number=2, wide=wide))
        note = "Load of: exp of the entropy of the shares."
        if figures["specialisation"]:
            note += " Tells sources apart: mutual information of expert and source, and its share of the most possible."
        cards.append(_card("Routers", _html(experts_table(figures)), note, wide))
    if figures.get("harness"):
        cards.append(_card("lm-evaluation-harness", _html(harness_table(figures))))
    name, names = Path(figures["model"]).resolve(), ", ".join(labels(figures).values())
    title = name.parent.name if name.name == "model" else name.name  # RUN_DIR/model is what a run is called
    facts = f"{names} · {figures['tokens']:,} held-out tokens"
    if speed := figures["speed"]:
        facts += f" · {_speed(speed)}"
    return charts.document(
        title, "evaluation", "", f'<p class="facts">{escape(facts)}</p>',
        f'{_tiles(figures)}<div class="cards">{"".join(cards)}</div>', _STYLE,
    )  # fmt: skip


_STYLE = "main{padding-bottom:40px}td.good{color:var(--good)}td.bad{color:var(--over)}"


def write(folder: Path, figures: dict[str, Any]) -> None:
    """Write FOLDER/evaluation.json and evaluation.html."""
    write_atomically(folder / "evaluation.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_atomically(folder / "evaluation.html", page(figures).encode("utf-8"))
