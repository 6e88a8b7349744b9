"""The page about a programme: its stages, their curves on one axis of tokens, what they read, and what came of it.

Like a run's report (nemo_lite/train/report.py, whose charts these are) it needs no server and no network. It is made
from the stages' records, the runs' metrics, evaluation.json files and the models themselves, which complete a prompt.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from nemo_lite.evaluate.ruler import CHANCE, DISTRACTORS
from nemo_lite.programme import record as records
from nemo_lite.programme.record import Verdict
from nemo_lite.programme.stages import Row, Stage, lanes, lanes_across, load_programme
from nemo_lite.train import report as charts
from nemo_lite.train.metrics import METRICS_FILE, compact, duration, percent, write_atomically
from nemo_lite.train.report import Point, Run, Series

PROMPT = 'def read_config(path):\n    """Read a configuration file and return'
SAMPLE_TOKENS = 48
LARGEST_SAMPLED = 4e9  # bytes of weights; above this nobody waits for a CPU's completion
COLORS = ("train", "mtp1", "mtp3", "mtp2", "mtp4", "peak", "rate", "speed")


@dataclass
class Trained:
    """A training stage's run, and where on the programme's axis of tokens its own count begins."""

    stage: Stage
    run: Run
    offset: float
    color: str

    def points(self, key: str, records_: list[dict[str, Any]]) -> list[Point]:
        return [
            (self.offset + r["tokens"], charts._number(r.get(key))) for r in records_ if charts._number(r.get("tokens"))
        ]

    @property
    def end(self) -> float:
        return self.offset + max((charts._number(r.get("tokens")) or 0 for r in self.run.train), default=0)


@dataclass
class Page:
    """Everything the page is made of."""

    name: str
    stages: list[Stage]
    verdicts: dict[str, Verdict]
    trained: list[Trained] = field(default_factory=list)
    evaluations: dict[str, Any] = field(default_factory=dict)  # stage -> evaluation.json
    prompt: str = ""
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # stage, completion, or why there is none

    def verdict(self, stage: Stage) -> Verdict:
        """A stage's, but of the one that makes this page: the page is the same, whoever asked for it."""
        return Verdict("this page") if str(path_of(self.name)) in stage.outputs else self.verdicts[stage.name]


# -------------------------------------------------------------------------------------------------------------- reading


def read_page(folder: Path, prompt: str) -> Page:
    stages = load_programme(folder)
    page = Page(folder.resolve().name, stages, records.verdicts(stages), prompt=prompt)
    ends: dict[str, float] = {}  # stage -> tokens that the weights it writes have seen
    for stage in stages:
        before = max((ends[name] for name in stage.after), default=0.0)
        if stage.trains and (stage.run_dir / METRICS_FILE).is_file():
            # A run that goes on from another one counts on; one that starts from weights counts from nothing.
            offset = before if stage.recipe.init_from else 0.0
            if (other := _resumed(stage, page)) is not None:
                offset = other.offset
            color = COLORS[len(page.trained) % len(COLORS)]
            page.trained.append(Trained(stage, charts.read_run(stage.run_dir), offset, color))
            before = page.trained[-1].end
        ends[stage.name] = before
        for path in map(Path, stage.outputs):
            if (found := path / "evaluation.json").is_file() or (found := path).name == "evaluation.json":
                page.evaluations[stage.name] = json.loads(found.read_text(encoding="utf-8"))
    page.samples = list(_samples(stages, prompt))
    return page


def _resumed(stage: Stage, page: Page) -> Trained | None:
    """The run that a stage goes on from."""
    asked = stage.recipe.resume_from
    return next((one for one in page.trained if asked and one.stage.writes(asked)), None)


def _samples(stages: list[Stage], prompt: str) -> Iterator[tuple[str, str, str]]:
    """Every model of the programme completes the prompt: last checkpoints, and directories of models."""
    for stage in stages:
        for path in map(Path, stage.outputs):
            model = not stage.trains and (path / "config.json").is_file() and any(path.glob("*.safetensors"))
            if not path.exists() or not (stage.trains or model):
                continue
            if stage.trains and not (path / "manifest.json").is_file():
                continue
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if size > LARGEST_SAMPLED:
                yield stage.name, "", f"{size / 1e9:.0f} GB, not loaded for a sample"
                continue
            with tempfile.TemporaryDirectory() as folder:
                if stage.trains:
                    from nemo_lite.export import export

                    export(path, path := Path(folder) / "model")
                yield stage.name, complete(path, prompt), ""


def complete(model_dir: Path, prompt: str) -> str:
    """The greedy completion of a prompt by a MODEL_DIR."""
    import torch

    from nemo_lite.data.tokenizer import load_tokenizer
    from nemo_lite.model.hybrid import HybridLM

    model, tokenizer = HybridLM.from_pretrained(model_dir), load_tokenizer(str(model_dir))
    ids = torch.tensor([tokenizer.encode(prompt)])
    stop = () if tokenizer.eod_id is None else (tokenizer.eod_id,)
    tokens = model.generate(ids, max_tokens=SAMPLE_TOKENS, stop_ids=stop)[0, ids.shape[1] :]
    return tokenizer.decode([int(token) for token in tokens if token not in stop])


# ---------------------------------------------------------------------------------------------------------------- cards


def _graph(page: Page) -> str:
    """The stages, one a line, with the graph to their left."""
    rows = lanes(page.stages)
    wide = lanes_across(rows)
    lines = []
    for stage, row in zip(page.stages, rows, strict=True):
        one = page.verdict(stage)
        color = next((trained.color for trained in page.trained if trained.stage is stage), "soft")
        seconds = one.record.seconds if one.record else 0.0
        due = one.state not in ("done", "running", "this page")
        state, why = ("due", one.why) if due else (one.state, "")
        css = "open" if due or state == "running" else "done"
        lines.append(
            f'<li>{_lines(row, wide, color)}<b>{escape(stage.name)}</b><span class="does">{escape(_does(stage))}</span>'
            f'<span class="state {css}" title="{escape(why)}">{state}</span>'
            f"<span class=time>{duration(seconds) if seconds else '–'}</span></li>"
        )
    return (
        '<section class="card wide"><div class="head"><h2>Stages</h2></div>'
        f'<ol class="stages" style="--lanes:{wide}">{"".join(lines)}</ol></section>'
    )


def _lines(row: Row, wide: int, color: str) -> str:
    """One line of the graph as SVG, stretched to the line's height."""
    parts = [f"M{lane + 0.5} 0V1" for lane in sorted(row.passing)]
    parts += [f"M{row.lane + 0.5} 0V.5"] * row.above + [f"M{row.lane + 0.5} .5V1"] * row.below
    for lane in sorted(row.incoming):
        parts.append(f"M{lane + 0.5} 0C{lane + 0.5} .5 {lane + 0.5} .5 {row.lane + 0.5} .5")
    return (
        f'<svg viewBox="0 0 {wide} 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="way" d="{"".join(parts)}"/>'
        f'<path class="node" style="stroke:var(--{color})" d="M{row.lane + 0.5} .5h0"/></svg>'
    )


def _does(stage: Stage) -> str:
    if not stage.trains:
        return str(stage.recipe.stage.command)
    recipe, start = stage.recipe, stage.recipe.resume_from or stage.recipe.init_from
    lengths = " and ".join(map(str, dict.fromkeys(recipe.data.seq_len_cycle or [recipe.data.seq_len])))
    came = f", from {Path(start).name}" if start else ""
    return f"train to step {stage.last_step:,}, rows of {lengths} tokens{came}"


def _loss(page: Page, number: int) -> str:
    series, held = [], []
    for one in page.trained:
        raw = one.points("loss", one.run.train)
        series.append(Series("each log interval", charts.thin(raw), one.color, "faint", legend=False))
        smoothed = charts.thin(charts.smooth(raw, charts._reach(len(raw))))
        series.append(Series(one.stage.name, smoothed, one.color))
        points = one.points("val_loss", one.run.validation)
        held += [*points, *((x, None) for x, _ in points[-1:])]  # a gap between stages
    series.append(Series("held out", charts.thin(held), "validation", "dots", step=True))
    values = [y for one in series if one.style != "faint" for _, y in one.points if y is not None]
    note = "Nats per token; bold is smoothed. Stages may read other text, so that their levels differ."
    if not values:
        return charts.chart("Loss", [], number=number, wide=True)
    floor, high, cut = charts.loss_range(values)
    note += f" The axis ends at {charts._format(high)}." if cut else ""
    return charts.chart(
        "Loss over all stages", series, number=number, note=note, low=floor, high=high, height="tall", wide=True,
        axis="tokens",
    )  # fmt: skip


def _curve(page: Page, number: int, title: str, key: str, **options: Any) -> str:
    series = [Series(one.stage.name, charts.thin(one.points(key, one.run.train)), one.color) for one in page.trained]
    return charts.chart(title, series, number=number, axis="tokens", **options)


def mixtures(page: Page) -> dict[str, dict[str, float]]:
    """Stage -> source -> tokens that it read of it, as its run has counted them."""
    found: dict[str, dict[str, float]] = {}
    totals: dict[str, dict[str, float]] = {}
    for one in page.trained:
        last = next((r["sources"] for r in reversed(one.run.train) if isinstance(r.get("sources"), list)), [])
        total = {row["source"]: float(row["tokens"]) for row in last}
        before = {}
        if (other := _resumed(one.stage, page)) is not None:  # it counts on, unless its data began anew
            before = totals[other.stage.name]
            if any(total.get(source, 0) < tokens for source, tokens in before.items()):
                before = {}
        totals[one.stage.name] = total
        read = {source: tokens - before.get(source, 0) for source, tokens in total.items()}
        found[one.stage.name] = {source: tokens for source, tokens in read.items() if tokens > 0}
    return {name: read for name, read in found.items() if read}


def _mixture(page: Page) -> str:
    read = mixtures(page)
    if not read:
        return ""
    sources = list(dict.fromkeys(source for one in read.values() for source in one))
    shade = {source: round(i / max(1, len(sources) - 1) * 7) for i, source in enumerate(sources)}
    rows = []
    for name, tokens in read.items():
        whole = sum(tokens.values())
        parts = "".join(
            f'<i style="flex-grow:{tokens[s] / whole:.4f};background:var(--ramp{shade[s]})" '
            f'title="{escape(s)}: {compact(tokens[s])} tokens"><span>{percent(tokens[s] / whole)}</span></i>'
            for s in sources
            if s in tokens
        )
        rows.append(f"<li><b>{escape(name)}</b><div>{parts}</div><span>{compact(whole)}</span></li>")
    keys = "".join(
        f'<li><i class="dots" style="background:var(--ramp{shade[s]})"></i>{escape(Path(s).name)}</li>' for s in sources
    )
    return (
        f'<section class="card"><div class="head"><h2>What each stage read</h2><ul class="legend">{keys}</ul></div>'
        f'<ul class="mixture">{"".join(rows)}</ul><p class="caption">Shares of tokens, as the runs counted them.</p>'
        "</section>"
    )


def _heat_maps(page: Page, number: int) -> list[str]:
    cards = []
    for one in page.trained:
        load = [r for r in one.run.train if isinstance(r.get("expert_load"), dict) and any(r["expert_load"].values())]
        if load:
            kept = {name: shares for name, shares in load[-1]["expert_load"].items() if shares}
            wide = max(map(len, kept.values())) > 32
            title = f"Expert load, {one.stage.name}"
            cards.append(charts.heat_map(kept, load[-1]["step"], number=number + len(cards), wide=wide, title=title))
    return cards


def scores(evaluation: Any) -> dict[str, dict[str, float]]:
    """Task -> model -> share in [0, 1] that an evaluation.json tells of its model and the other one.

    Of a long-range question whether the answer was the ``likeliest``, which tells small models apart where none writes
    an answer; of a harness's task its ``score``.
    """
    found: dict[str, dict[str, float]] = {}

    def walk(node: Any, path: list[str], model: str) -> None:
        if not isinstance(node, dict):
            return
        value = charts._number(node.get("likeliest", node.get("score")))
        if value is not None and 0 <= value <= 1 and path:
            found.setdefault(" ".join(path), {})[model] = value
            return
        for name, inner in node.items():
            walk(inner, [*path, str(name)], model)

    if isinstance(evaluation, dict):
        other = evaluation.get("against") or {}
        sides = [(evaluation, {k: v for k, v in evaluation.items() if k != "against"}), (other, other.get("figures"))]
        for side, figures in sides:
            walk(figures, [], Path(str(side.get("model", "model"))).name)
    return found


def _evaluation(page: Page) -> str:
    cards = []
    for name, body in page.evaluations.items():
        found = scores(body)
        if not found:
            continue
        models = list(dict.fromkeys(model for one in found.values() for model in one))
        color = {model: COLORS[i % len(COLORS)] for i, model in enumerate(models)}
        rows = "".join(
            f"<li><b>{escape(task)}</b><div>"
            + "".join(
                f'<i style="width:{100 * one[m]:.1f}%;background:var(--{color[m]})" title="{escape(m)}"></i>'
                f"<span>{percent(one[m])}</span>"
                for m in models
                if m in one
            )
            + "</div></li>"
            for task, one in found.items()
        )
        keys = "".join(f'<li><i class="dots" style="background:var(--{color[m]})"></i>{escape(m)}</li>' for m in models)
        cards.append(
            f'<section class="card"><div class="head"><h2>Scores, {escape(name)}</h2><ul class="legend">{keys}</ul>'
            "</div>"
            f'<ul class="bars">{rows}</ul><p class="caption">Long-range questions: how often the answer is likelier '
            f"than {DISTRACTORS} wrong ones of its form, {percent(CHANCE)} by chance.</p></section>"
        )
    return "".join(cards)


def _sampled(page: Page) -> str:
    if not page.samples:
        return ""
    rows = "".join(
        f"<li><b>{escape(name)}</b><pre><span>{escape(page.prompt)}</span>{escape(text.rstrip())}</pre></li>"
        if not why
        else f"<li><b>{escape(name)}</b><p class=none>{escape(why)}</p></li>"
        for name, text, why in page.samples
    )
    return (
        '<section class="card wide"><div class="head"><h2>The same prompt, stage by stage</h2></div>'
        f'<ul class="samples">{rows}</ul><p class="caption">Greedy completions of {SAMPLE_TOKENS} tokens; the prompt '
        "is grey.</p></section>"
    )


def _tiles(page: Page) -> str:
    tiles = []
    if page.trained:
        tokens = max(one.end for one in page.trained)
        tiles.append(charts._tile("Tokens", compact(tokens), f"{len(page.trained)} training stages"))
        held = [
            r
            for one in page.trained
            for r in one.run.validation
            if charts._number(r.get("val_bits_per_byte")) is not None
        ]
        if held:
            tiles.append(charts._tile("Held out", f"{held[-1]['val_bits_per_byte']:.3f}", "bits per byte, last stage"))
        counts = page.trained[-1].run.env.get("parameters")
        if isinstance(counts, dict) and charts._number(counts.get("total")) is not None:
            active = charts._number(counts.get("active"))
            below = f"{compact(active)} active per token" if active is not None else ""
            tiles.append(charts._tile("Parameters", compact(counts["total"]), below))
    seconds = sum(one.record.seconds for one in map(page.verdict, page.stages) if one.record)
    tiles.append(charts._tile("Time", duration(seconds), "all stages, one after the other"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def html(page: Page) -> str:
    """The whole page as HTML text (pure)."""
    found = [one.state for one in map(page.verdict, page.stages) if one.state != "this page"]
    done = found.count("done")
    css, state = ("done", "all stages done") if done == len(found) else ("open", f"{done} of {len(found)} stages done")
    cards = [
        _graph(page),
        _loss(page, 1),
        _curve(page, 2, "Learning rate", "lr", low=0),
        _mixture(page),
        *_heat_maps(page, 10),
        _evaluation(page),
        _sampled(page),
    ]
    last = page.trained[-1].run if page.trained else None
    head = f"{charts._facts_line(last)}{charts._architecture(last)}" if last else ""
    return charts.document(
        page.name, "programme", f'<span class="state {css}">{escape(state)}</span>', head,
        f'{_tiles(page)}<div class="cards">{"".join(cards)}</div>', _STYLE,
    )  # fmt: skip


_STYLE = """
main{padding-bottom:40px}
ol,ul{margin:0;padding:0;list-style:none}
.stages li{display:grid;grid-template-columns:calc(var(--lanes)*18px) minmax(88px,max-content) minmax(0,1fr) auto 64px;
gap:0 12px;align-items:center;min-height:34px}
.stages svg{width:100%;height:100%;min-height:34px;align-self:stretch;overflow:visible}
.stages .way{stroke:var(--soft);stroke-width:2;opacity:.45}.stages .node{stroke-width:11}
.stages b,.mixture b,.bars b,.samples b{font-weight:600;font-size:13.5px;overflow-wrap:anywhere}
.stages .does{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.stages .state{margin:0;padding:1px 10px;font-size:12px}
.stages .time{text-align:right;font-variant-numeric:tabular-nums;color:var(--soft);font-size:13px}
.mixture li,.bars li{display:grid;grid-template-columns:84px minmax(0,1fr) 52px;gap:12px;align-items:center;
padding:4px 0}
.mixture div{display:flex;gap:2px;height:24px;border-radius:5px;overflow:hidden}
.mixture i{flex-basis:0;min-width:3px;overflow:hidden;font:600 12px/24px inherit;font-style:normal;text-align:center;
color:#fff}
.mixture i span{font:600 12px/24px system-ui,sans-serif;text-shadow:0 0 3px #0009}
@media(prefers-color-scheme:dark){.mixture i span{color:var(--card);text-shadow:none}}
.mixture li>span{text-align:right;color:var(--soft);font-size:13px;font-variant-numeric:tabular-nums}
.bars li{grid-template-columns:120px minmax(0,1fr)}
.bars div{display:grid;grid-template-columns:minmax(0,1fr) 44px;gap:2px 8px;align-items:center}
.bars i{height:10px;border-radius:3px;min-width:2px}
.bars span{font-size:12px;text-align:right;color:var(--soft);font-variant-numeric:tabular-nums}
.samples li{display:grid;grid-template-columns:84px minmax(0,1fr);gap:12px;padding:8px 0;
border-top:1px solid var(--line)}
.samples li:first-child{border-top:0}
.samples pre{max-height:18em;overflow-y:auto;white-space:pre-wrap;overflow-wrap:anywhere}
.samples pre span{color:var(--soft)}
@media(max-width:760px){.stages li{grid-template-columns:calc(var(--lanes)*12px) minmax(0,1fr) auto 54px;gap:0 8px}
.stages .does{display:none}.samples li{grid-template-columns:minmax(0,1fr);gap:4px}}
""".replace("\n", "")


def path_of(name: str) -> Path:
    """Where the page about a programme lies."""
    return Path("runs") / name / "report.html"


def write_programme_report(folder: Path, prompt: str = PROMPT) -> Path:
    """Write runs/NAME/report.html about the programme in ``folder``; its path."""
    path = path_of(folder.resolve().name)
    text = html(read_page(folder, prompt))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8"))
    return path
