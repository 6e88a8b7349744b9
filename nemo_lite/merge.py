"""Averages of a run's checkpoints: a model for every point of the stable phase, without a decay of the learning rate.

Checkpoints theta_0 .. theta_n of a window are theta_0 minus all updates up to theirs; u_j is the sum of the updates
between theta_{j-1} and theta_j. Had the learning rate scaled those by d_j, the result would be

    theta_0 - sum_j d_j u_j  =  sum_i w_i theta_i        with  w_i = d_i - d_{i+1},  d_0 = 1,  d_{n+1} = 0

so any decay d of updates is an average of checkpoints, and any average is a decay: d_j = w_j + .. + w_n. It is exact
for the updates that were made; a run that really decays would have met other gradients. (WSM, arXiv 2507.17634.)
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_lite.config import (
    FREE_WITH_INIT_FROM,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    UserError,
    load_recipe,
)
from nemo_lite.data import load_tokenizer
from nemo_lite.export import find_checkpoint, new_model_dir, refuse_to_replace
from nemo_lite.model.hf import Stored
from nemo_lite.model.hybrid import HybridLM
from nemo_lite.train.checkpoint import Weights, checkpoints, damage, read_state, step_of
from nemo_lite.train.schedule import learning_rate

KINDS = ("uniform", "exponential", "decay")
HALVINGS = 4  # `exponential`: over the window; the oldest checkpoint weighs 1/16 of the newest
APART = 1000  # steps between two MODEL_DIRs, which do not say theirs: only their ratio matters


# ---------------------------------------------------------------------------------------------------------- the weights


def weights_of_decay(factors: Sequence[Any]) -> list[Any]:
    """Weights w_0 .. w_n of the checkpoints from the factors d_1 .. d_n of the updates between them; they sum to 1."""
    return [here - following for here, following in itertools.pairwise([1, *factors, 0])]


def decay_factors(steps: Sequence[int], schedule: ScheduleConfig, lr: float) -> list[float]:
    """What a decay over all these steps would multiply the updates between each two by: the mean over their steps.

    The curve is that of `schedule` (its shape and how far down it goes, from the peak `lr`), whatever its kind is.
    """
    length = steps[-1] - steps[0]
    wsd = ScheduleConfig("wsd", 0, length, schedule.decay_shape, schedule.min_lr / lr)
    curve = [learning_rate(step, length, OptimConfig(lr=1.0), wsd) for step in range(length)]
    starts = [step - steps[0] for step in steps]
    return [math.fsum(curve[a:b]) / (b - a) for a, b in itertools.pairwise(starts)]


def weights_of(kind: str, steps: Sequence[int], schedule: ScheduleConfig, lr: float) -> list[float]:
    """The weight of the checkpoint of each of these steps, oldest first; they sum to 1."""
    if kind == "uniform":
        return [1 / len(steps)] * len(steps)
    if kind == "decay":
        return weights_of_decay(decay_factors(steps, schedule, lr))
    span = steps[-1] - steps[0]
    raw = [2.0 ** (-HALVINGS * (steps[-1] - step) / span) for step in steps]
    return [value / math.fsum(raw) for value in raw]


# ---------------------------------------------------------------------------------------------------- what is averaged


@dataclass
class Member:
    """One of the models of an average; read(name, like) gives its weights one at a time."""

    path: Path
    step: int
    read: Callable[..., Any]
    tokens: int | None = None  # a MODEL_DIR does not say


class Average:
    """The average of several models, one tensor at a time, summed in float64."""

    def __init__(self, readers: Sequence[Callable[..., Any]], weights: Sequence[float]):
        self.parts = [(read, weight) for read, weight in zip(readers, weights) if weight]

    def __call__(self, name: str, like: Tensor) -> Tensor:
        total = torch.zeros(like.shape, dtype=torch.float64)
        for read, weight in self.parts:
            total.add_(read(name, like), alpha=weight)
        return total


def in_window(source: Path, tokens: int) -> tuple[Recipe, list[Member]]:
    """The recipe of a run and its checkpoints in the last `tokens` tokens, both ends included, oldest first.

    source: a RUN_DIR (the window ends at its newest checkpoint) or one checkpoint of it (it ends there).
    """
    run_dir, last = find_checkpoint(source)
    recipe = load_recipe(run_dir / "recipe.yaml", resolved=True)
    ends = read_state(last)["train"]["tokens"]
    if tokens > ends:
        raise UserError(f"a window of {tokens:,} tokens: {last} has seen {ends:,} only")
    every, end = recipe.checkpoint.every, step_of(last)
    first = end - tokens // recipe.tokens_per_step
    asked = {step for step in range(every, end, every) if step >= first} if every else set()
    found, at = [], {}
    for folder in checkpoints(run_dir):
        at[step_of(folder)] = seen = read_state(folder)["train"]["tokens"]
        if step_of(folder) <= end and seen >= ends - tokens:
            found.append(folder)
    there = [step_of(folder) for folder in found]
    if gone := sorted(asked - set(there)):
        since = [step for step in there if step > gone[-1]]
        keep = f" (checkpoint.keep = {recipe.checkpoint.keep} removes older ones)" if recipe.checkpoint.keep else ""
        usable = f"; --window {ends - at[since[0]]} takes the last {len(since)}" if len(since) > 1 else ""
        raise UserError(
            f"{run_dir}: of the checkpoints in the window those of steps {_listed(gone)} are not there{keep}, those of "
            f"steps {_listed(there)} are{usable}"
        )
    if len(found) < 2:
        others = [step for step in at if step <= end and step not in there]
        nearest = f"; --window {ends - at[others[-1]]} reaches step {others[-1]}" if others else ""
        saves = "" if every else ", and checkpoint.every = 0 saves no other"
        raise UserError(f"{run_dir}: the window holds the checkpoint of step {end} only{saves}{nearest}")
    for folder in found[:-1]:
        if problem := damage(folder):
            raise UserError(f"checkpoint {folder} is damaged: {problem}")
    return recipe, [Member(folder, step_of(folder), Weights(folder), at[step_of(folder)]) for folder in found]


def _listed(steps: Sequence[int]) -> str:
    text = [str(step) for step in steps]
    return ", ".join(text) if len(text) < 9 else f"{', '.join(text[:4])} .. {', '.join(text[-2:])} ({len(text)})"


def model_dirs(folders: Sequence[Path]) -> list[Member]:
    """MODEL_DIRs of one architecture and tokenizer as members, in the order given, oldest first."""
    if len(folders) < 2:
        raise UserError(f"{folders[0]} is one model; an average takes a RUN_DIR, or several MODEL_DIRs")
    stored = [Stored(folder) for folder in folders]
    facts = [_architecture(each.config) for each in stored]
    for folder, other in zip(folders[1:], facts[1:]):
        for name, value in facts[0].items():
            if other[name] != value:
                raise UserError(
                    f"{folder} has {name} = {other[name]!r} and {folders[0]} {value!r}; sizes must be equal"
                )
        if _text(folder / "tokenizer.json") != _text(folders[0] / "tokenizer.json"):
            raise UserError(f"{folder} and {folders[0]} have different tokenizers")
    return [Member(folder, i * APART, read) for i, (folder, read) in enumerate(zip(folders, stored))]


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """What must be equal for an average of weights to mean anything."""
    free = {*FREE_WITH_INIT_FROM, "initializer_range", "max_position_embeddings", "chunk_size", "bos_token_id",
            "eos_token_id", "pad_token_id", "time_step_min", "time_step_max", "time_step_floor"}  # fmt: skip
    found = asdict(config)
    return {"mtp.pattern": found.pop("mtp")["pattern"]} | {k: v for k, v in found.items() if k not in free}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


# -------------------------------------------------------------------------------------------------------- the command


def merge(
    sources: Sequence[Path], target: Path, kind: str = "uniform", window: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Write the MODEL_DIR `target`, an average; facts about it, which are in its merge.json too.

    sources    a RUN_DIR or one checkpoint of it, with the window in tokens; or several MODEL_DIRs, without
    kind       uniform, exponential (halved HALVINGS times over the window) or decay (the recipe's decay_shape)
    dtype      of linears and embeddings; None: as stored
    """
    refuse_to_replace(target)
    for source in sources:
        if target.resolve() == source.resolve():
            raise UserError(f"{target} is what is averaged; write to another folder")
    facts: dict[str, Any] = {"weights": kind}
    if all((source / "config.json").exists() for source in sources):
        if window is not None:
            raise UserError("--window is for a RUN_DIR: a MODEL_DIR does not say how many tokens it has seen")
        members, recipe = model_dirs(sources), Recipe()
        newest: Any = members[-1].read
        config, stored, where = newest.config, newest.dtype, members[-1].path
    else:
        if len(sources) > 1:
            raise UserError("an average takes one RUN_DIR (or checkpoint) with --window, or several MODEL_DIRs")
        if window is None:
            raise UserError(f"{sources[0]}: --window says over how many of its last tokens to average, such as 500M")
        recipe, members = in_window(sources[0], window)
        config, where = recipe.model, members[-1].path.parents[1] / "tokenizer"
        stored = torch.float64 if recipe.train.dtype == "float64" else torch.float32
        facts |= {"window_tokens": window, "averaged_tokens": (members[-1].tokens or 0) - (members[0].tokens or 0)}
    steps = [member.step for member in members]
    weights = weights_of(kind, steps, recipe.schedule, recipe.optim.lr)
    if kind == "decay":
        facts |= {"decay_shape": recipe.schedule.decay_shape, "decay_to": recipe.schedule.min_lr / recipe.optim.lr}
    if members[-1].tokens is not None and (rates := _rates(recipe, steps))[0] > rates[1]:
        facts["learning_rate"] = list(rates)
    made = getattr(torch, dtype) if dtype else stored
    facts |= {"dtype": str(made).removeprefix("torch."), "of": [
        {"path": str(member.path), **({} if member.tokens is None else {"step": member.step, "tokens": member.tokens}),
         "weight": weight}
        for member, weight in zip(members, weights)
    ]}  # fmt: skip
    model = HybridLM(config, device="meta").to(stored)
    tokenizer = None
    if (where / "tokenizer.json").exists():
        tokenizer = load_tokenizer(str(where))
        for name, value in (("eos_token_id", tokenizer.eod_id), ("pad_token_id", tokenizer.pad_id)):
            if getattr(model.config, name) is None:
                setattr(model.config, name, value)
    average = Average([member.read for member in members], weights)
    with new_model_dir(target) as partial:
        model.save_pretrained(partial, dtype=made, tokenizer=tokenizer, read=average)
        (partial / "merge.json").write_text(json.dumps(facts, indent=1) + "\n")
    return {"model_dir": str(target), **facts}


def _rates(recipe: Recipe, steps: Sequence[int]) -> tuple[float, float]:
    """Largest and smallest learning rate in the window, by the recipe."""
    rates = [
        learning_rate(step, recipe.train.steps, recipe.optim, recipe.schedule) for step in range(steps[0], steps[-1])
    ]
    return max(rates), min(rates)


def _tokens(text: str) -> int:
    """A number of tokens: 25165824, 500M, 125B."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    unit = units.get(text[-1:].upper())
    count = round(float(text[:-1]) * unit) if unit else int(float(text))
    if count < 1:
        raise ValueError
    return count


def main(argv: list[str]) -> int:
    """`nemo-lite merge RUN_DIR --window TOKENS --to MODEL_DIR`, or several MODEL_DIRs."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="nemo-lite merge",
        description="Average the checkpoints of a run in a window of training tokens, or several MODEL_DIRs, into a "
        "MODEL_DIR. One tensor is read at a time and summed in float64. Everything that a MODEL_DIR holds is averaged "
        "with the same weights, the routers' biases too. Moments, step and data position stay in the run: to train on, "
        "name the result as init_from, with fresh moments. merge.json in it says what it was made of.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RUN_DIR|CHECKPOINT|MODEL_DIR", type=Path,
        help="a run (the window ends at its newest checkpoint) or its step_N (it ends there); or MODEL_DIRs, the "
        "oldest first",
    )  # fmt: skip
    parser.add_argument("--window", type=_tokens, metavar="TOKENS", help="last tokens of the run, such as 500M")
    parser.add_argument(
        "--weights", choices=KINDS, default="uniform",
        help=f"uniform (default); exponential: halved {HALVINGS} times over the window; decay: as if the learning rate "
        "had decayed over the window in the recipe's schedule.decay_shape, to min_lr (MODEL_DIRs: 1 - sqrt, to 0)",
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="MODEL_DIR", type=Path, help="directory to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of linears and embeddings (default: as stored)"
    )
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    args = parser.parse_args(argv)
    facts = merge(args.sources, args.to, args.weights, args.window, args.dtype)
    print(json.dumps(facts) if args.json else describe(facts))
    return 0


def describe(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    lines = [
        f"{'step ' + str(part['step']) if 'step' in part else part['path']:<14}  "
        f"{format(part['tokens'], ',') + ' tokens  ' if 'tokens' in part else ''}weight {part['weight']:.4f}"
        for part in facts["of"]
    ]
    if "learning_rate" in facts:
        high, low = facts["learning_rate"]
        lines.append(
            f"The recipe's learning rate falls from {high:.3g} to {low:.3g} in this window; the average comes on top."
        )
    how = f"decay by {facts['decay_shape']} to {facts['decay_to']:.3g}" if "decay_shape" in facts else facts["weights"]
    return "\n".join([*lines, f"{facts['model_dir']}: {len(facts['of'])} models, {how}, {facts['dtype']}"])
