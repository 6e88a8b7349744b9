"""A programme: the stages in a folder's recipes, what each reads and writes, and so the order they run in.

A stage is a YAML file with a section ``stage``. With ``stage.command`` it is that command; else it trains the recipe
that the file is. Edges are not written down: a stage comes after those whose outputs it reads.
"""

from __future__ import annotations

import difflib
import graphlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from nemo_lite.config import Recipe, RecipeError, UserError, load_recipe, sections_of
from nemo_lite.process import PROCESS_FILE


@dataclass
class Stage:
    """One stage. Paths are text, as the recipe has them, relative to the folder that commands run in."""

    name: str
    file: Path
    recipe: Recipe
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)  # stages that write what this one reads
    missing: list[str] = field(default_factory=list)  # inputs that neither exist nor are written by a stage

    @property
    def trains(self) -> bool:
        return self.recipe.stage.command is None

    @property
    def words(self) -> list[str]:
        """Its command as the shell would split it; ValueError where a quote does not end."""
        return shlex.split(self.recipe.stage.command or "")

    @property
    def ours(self) -> bool:
        """Whether nemo_lite does its work."""
        return self.trains or self.words[:1] == ["nemo-lite"]

    @property
    def goes_on(self) -> bool:
        """Whether, broken off, it goes on with what it left. A command of somebody else's is thought to."""
        if self.trains or not self.ours:
            return True
        return self.words[1:2] in (["train"], ["pipeline"]) or self.words[1:3] == ["data", "tokenize"]

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir or "")

    @property
    def last_step(self) -> int:
        return self.recipe.train.stop_after or self.recipe.train.steps

    @property
    def place(self) -> Path:
        """What the record and the log lie beside: the run's folder, or the first output."""
        return self.run_dir if self.trains else Path(self.outputs[0])

    @property
    def log(self) -> Path:
        return Path(f"{self.place}.stage.log")

    @property
    def record(self) -> Path:
        return Path(f"{self.place}.stage.json")

    def writes(self, path: str) -> bool:
        """Whether a path is one of the outputs, the run's folder, or within one."""
        return any(Path(path).is_relative_to(own) for own in (*self.outputs, str(self.place)))


def is_programme(folder: Path) -> bool:
    """Whether a folder holds stage files. (A run's resolved recipe has a section ``stage`` too.)"""
    if not folder.is_dir() or any((folder / name).exists() for name in ("metrics.jsonl", PROCESS_FILE)):
        return False
    return any("stage" in sections_of(path) for path in folder.glob("*.yaml"))


def load_programme(folder: Path) -> list[Stage]:
    """The stages of a folder, each after those it reads from; :class:`UserError` where that cannot be."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that holds a YAML file a stage")
    stages: dict[str, Stage] = {}
    for path in sorted(folder.glob("*.yaml")):
        sections = sections_of(path)
        if "stage" not in sections:  # a base that stages inherit from
            continue
        # What init_from names may be made by an earlier stage, so it is not opened yet.
        recipe = load_recipe(path, resolved=True)
        if recipe.stage.command is not None and (idle := sections - {"stage", "base"}):
            raise RecipeError(
                f"{path}: {sorted(idle)[0]}: says nothing to a stage with a command of its own; leave it out, or leave "
                "stage.command out to train"
            )
        stages[path.stem] = Stage(path.stem, path, recipe)
        try:
            _ = stages[path.stem].words
        except ValueError as error:
            raise RecipeError(f"{path}: stage.command: {str(error).lower()}: {recipe.stage.command}") from None
    if not stages:
        raise UserError(f"{folder} holds no stage: no .yaml file in it has a section `stage`")
    for stage in stages.values():
        last = stage.run_dir / "checkpoints" / f"step_{stage.last_step}"
        stage.outputs = [str(last)] if stage.trains else stage.recipe.stage.outputs
    _refuse_shared_outputs(list(stages.values()))
    for stage in stages.values():
        _connect(stage, stages)
    try:
        order = graphlib.TopologicalSorter({name: stage.after for name, stage in stages.items()}).static_order()
        return [stages[name] for name in order]
    except graphlib.CycleError as error:
        raise UserError(
            f"{folder}: the stages read from one another in a circle: {' <- '.join(error.args[1])}"
        ) from None


def _refuse_shared_outputs(stages: list[Stage]) -> None:
    for i, one in enumerate(stages):
        for other in stages[i + 1 :]:
            for path in (*other.outputs, str(other.place)):
                if one.writes(path) or any(other.writes(own) for own in (*one.outputs, str(one.place))):
                    raise RecipeError(
                        f"{other.file}: writes {path}, and so does the stage {one.name}; give it another place"
                    )


def _connect(stage: Stage, stages: dict[str, Stage]) -> None:
    """Resolve a stage's inputs to paths, and note which stages make them."""
    others = {name: other for name, other in stages.items() if other is not stage}
    for written in [*stage.recipe.stage.inputs, *(_read_in_training(stage.recipe) if stage.trains else [])]:
        if written in others:
            paths, makers = others[written].outputs, [others[written]]
        else:
            makers = [other for other in others.values() if other.writes(written)]
            # A whole run is read: its last checkpoint stands for it.
            paths = makers[0].outputs if makers and Path(written) == makers[0].place else [written]
            if not makers and not _named(written) and not Path(written).exists():
                if near := difflib.get_close_matches(written, others, 1):
                    raise RecipeError(f"{stage.file}: stage.inputs: {written} is no stage; did you mean {near[0]}?")
                stage.missing.append(written)
        stage.inputs += [path for path in paths if path not in stage.inputs]
        stage.after += [maker.name for maker in makers if maker.name not in stage.after]


def _read_in_training(recipe: Recipe) -> list[str]:
    sources = [source.source for _, _, blend in recipe.data.blends for source in blend]
    found = [recipe.resume_from, recipe.init_from, recipe.data.tokenizer, *sources]
    return [path for path in dict.fromkeys(found) if path and path != "bytes"]


def _named(source: str) -> bool:
    """Whether text comes from what a name stands for, rather than from a path."""
    return source == "stdlib" or source.startswith("hf:")


def reduced(stages: list[Stage]) -> dict[str, list[str]]:
    """Stage -> those it directly comes after, without edges that a longer way makes plain: what is drawn."""
    above: dict[str, set[str]] = {}
    for stage in stages:
        above[stage.name] = {name for direct in stage.after for name in (direct, *above[direct])}
    return {
        stage.name: [one for one in stage.after if not any(one in above[other] for other in stage.after)]
        for stage in stages
    }


@dataclass
class Row:
    """One line of the drawing: the stage's lane, lanes that pass, and lanes that come in from stages above."""

    lane: int
    passing: set[int]  # lanes that go on below this line and are not this stage's
    incoming: set[int]  # lanes of the stages it comes after
    ending: set[int]  # of those, the ones that nobody below reads
    above: bool  # whether its own lane comes from above
    below: bool  # whether a stage below reads from it


def lanes(stages: list[Stage]) -> list[Row]:
    """The graph as one line a stage, from top to bottom, as version-control logs draw it."""
    edges, names = reduced(stages), [stage.name for stage in stages]
    last = {name: max((i for i, other in enumerate(names) if name in edges[other]), default=-1) for name in names}
    held: dict[int, str] = {}  # lane -> the stage whose output it carries
    rows = []
    for i, name in enumerate(names):
        incoming = {lane for lane, other in held.items() if other in edges[name]}
        ending = {lane for lane in incoming if last[held[lane]] == i}
        free = next(lane for lane in range(len(names)) if lane not in held)
        lane = min(ending) if ending else free
        for done in ending:
            del held[done]
        passing = set(held)
        if last[name] > i:
            held[lane] = name
        rows.append(Row(lane, passing, incoming - {lane}, ending - {lane}, lane in incoming, last[name] > i))
    return rows


def lanes_across(rows: list[Row]) -> int:
    """How many lanes a drawing is wide."""
    return max((max([row.lane, *row.passing, *row.incoming]) for row in rows), default=0) + 1


def drawn(row: Row, width: int) -> str:
    """A line of the drawing in characters, two a lane."""
    low, high = min([row.lane, *row.incoming]), max([row.lane, *row.incoming])
    text = ""
    for lane in range(width):
        within, goes_on = low <= lane <= high, lane in row.passing
        if lane == row.lane:
            mark = "●"
        elif lane in row.incoming:
            left, right = lane > low, lane < high
            mark = {
                (True, True): "┼" if goes_on else "┴",
                (True, False): "┤" if goes_on else "╯",
                (False, True): "├" if goes_on else "╰",
            }[left, right]
        elif within:
            mark = "┼" if goes_on else "─"
        else:
            mark = "│" if goes_on else " "
        text += mark + ("─" if low <= lane < high else " ")
    return text.rstrip()
