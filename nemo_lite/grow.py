"""Larger models from trained ones: more layers, more experts, wider parts, experts where a dense MLP was.

What is new starts so that it adds nothing and still learns: fresh weights towards it, zeros on the way back. So the
function is preserved wherever the sizes allow it; where they do not, `Growth.changes` says why.

Depth. Old layers keep their order and take the places of the new pattern that are nearest in relative depth: the least
number of `-` turned into `E`, then the least sum of |(j + 1/2) / new - (i + 1/2) / old|, the earliest on a tie. A layer
that was added copies the kept layer of its letter before it (after it, if there is none before; without any it starts
fresh), and its output projection is zero.

Widths. New inner units of an MLP or an expert, and new latent dimensions, have fresh inputs and zero outputs. From
plain experts to a latent size below the hidden size, both projections are the directions that the experts' weights have
most of (their largest singular vectors): not preserved. Where the latent size goes, the experts take its projections.

Experts, E to r E of them:
  top-k times r    An expert's inner units are dealt to r new ones, u to number u mod r, which share its router row:
                   scores are equal, so that all r or none are chosen. Normalised weights are then 1/r of what they
                   were, and routed_scaling_factor is multiplied by r; without normalisation it stays. (r whole copies
                   would preserve the function too, but get equal gradients and stay copies for ever.)
  same top-k       New experts are copies that sleep: their router bias is so low that no score lifts them over an old
                   one. They are woken by the balance of the experts (router_bias_update_rate).
  same top-k, and n_group = r, topk_group = 1 where there was one group
                   Every router group is a copy of all experts; whichever group wins a tie, the function is the same.

A dense MLP (`-`) becomes an MoE (`E`): the inner units with the largest |up|^2 |down| go to the shared expert, as many
as it holds; the rest is dealt to g parts, the fewest that fit the experts, and expert e is part e mod g. g neighbours
share a fresh router row, so that top-k takes whole sets of parts, and `down` is multiplied by g over the scaling
factor. It needs normalised top-k: without, the weights depend on the token. ("Virtual groups", arXiv 2410.07524.)
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_lite.config import ModelConfig, RecipeError, UserError, model_with
from nemo_lite.data import load_tokenizer
from nemo_lite.export import new_model_dir, refuse_to_replace
from nemo_lite.model.hf import Stored, load_config, rows
from nemo_lite.model.hybrid import HybridLM

KEYS = (
    "pattern", "mtp.pattern", "intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "moe_intermediate_size", "moe_latent_size", "n_shared_experts", "moe_shared_expert_intermediate_size",
    "routed_scaling_factor",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- depth


@dataclass(frozen=True)
class Origin:
    """Where a layer comes from: a layer of the old stack (None: fresh weights), itself or an added one like it."""

    layer: int | None
    kept: bool


def align(old: str, new: str) -> list[Origin]:
    """The origin of every layer of pattern `new`, by the rule above; UserError where an old layer has no place.

    Both patterns without pipeline cuts.
    """
    never = (len(old) + 1, 0)
    # best[i][j]: (layers converted, distance) of the first i old layers among the first j new ones
    best = [[(0, 0)] * (len(new) + 1)] + [[never] * (len(new) + 1) for _ in old]

    def placed(i: int, j: int) -> tuple[int, int]:
        """best[i][j] where old layer i-1 takes place j-1."""
        here, there = old[i - 1], new[j - 1]
        if (here != there and here + there != "-E") or best[i - 1][j - 1] >= never:
            return never
        converted, distance = best[i - 1][j - 1]
        return converted + (here != there), distance + abs((2 * j - 1) * len(old) - (2 * i - 1) * len(new))

    for i in range(1, len(old) + 1):
        for j in range(i, len(new) + 1):
            best[i][j] = min(best[i][j - 1], placed(i, j))
    if best[-1][-1] >= never:
        fits = max(i for i in range(len(old) + 1) if best[i][-1] < never)
        raise UserError(
            f"pattern {new}: layer {fits} ({old[fits]}) of {old} has no place; all old layers must be in it in their "
            "order, where E may take the place of -"
        )
    kept: dict[int, int] = {}  # place -> old layer
    i = len(old)
    for j in range(len(new), 0, -1):
        if i and best[i][j - 1] > best[i][j]:
            kept[j - 1] = i = i - 1
    found = []
    for j, letter in enumerate(new):
        before = [place for place in kept if place < j and new[place] == letter]
        after = [place for place in kept if place > j and new[place] == letter]
        like = max(before) if before else min(after, default=None)
        found.append(Origin(kept[j], True) if j in kept else Origin(None if like is None else kept[like], False))
    return found


# -------------------------------------------------------------------------------------------------------------- experts


@dataclass
class Experts:
    """What every new expert is: part `part[e]` of `parts` of old expert `parent[e]`."""

    parent: list[int]
    part: list[int]
    parts: int
    asleep: list[bool]
    factor: float  # what must be made up for in scale
    what: str = ""
    changes: list[str] = field(default_factory=list)


def experts_of_experts(old: ModelConfig, new: ModelConfig) -> Experts:
    """How the experts of `old` become those of `new`; UserError where there is no rule."""
    E, more, k, chosen = old.n_routed_experts, new.n_routed_experts, old.num_experts_per_tok, new.num_experts_per_tok
    inner, wanted = old.moe_intermediate_size, new.moe_intermediate_size
    groups = (old.n_group, old.topk_group)
    if more < E:
        raise UserError(f"n_routed_experts: {more} is less than {E}, and nothing is taken away")
    r, rest = divmod(more, E)
    if r > 1 and not rest and chosen == r * k and groups == (new.n_group, new.topk_group):
        if r * wanted < inner:
            raise UserError(
                f"moe_intermediate_size: {r} parts of {wanted} do not hold an expert of {inner}; {-(-inner // r)} would"
            )
        found = Experts(
            [e // r for e in range(more)], [e % r for e in range(more)], r, [False] * more,
            float(r) if old.norm_topk_prob else 1.0, f"the inner units of each expert dealt to {r}",
        )  # fmt: skip
        if old.topk_group < old.n_group:
            found.changes.append(
                "a router group's score is the sum of its two largest, and these are parts of one expert now"
            )
        return found
    if wanted < inner:
        raise UserError(
            f"moe_intermediate_size: {wanted} is less than {inner}; an expert is divided where n_routed_experts and "
            f"num_experts_per_tok are multiplied by one number, such as {2 * E} and {2 * k}"
        )
    if groups != (new.n_group, new.topk_group):
        if rest or groups != (1, 1) or (new.n_group, new.topk_group) != (r, 1) or chosen != k:
            raise UserError(
                f"n_group: router groups can only be made from a model without, each a copy of all experts: "
                f"n_routed_experts = {max(new.n_group, 2) * E}, n_group = {max(new.n_group, 2)}, topk_group = 1, "
                f"num_experts_per_tok = {k}"
            )
        return Experts(
            list(range(E)) * r, [0] * more, 1, [False] * more, 1.0, f"{r} router groups, each a copy of all experts"
        )
    if rest := more % old.n_group:
        raise UserError(f"n_routed_experts: {more} cannot be shared by {old.n_group} router groups")
    # Old experts first within each router group, then copies of them in turn.
    own, size = E // old.n_group, more // old.n_group
    parent = [group * own + e % own for group in range(old.n_group) for e in range(size)]
    asleep = [e >= own for _ in range(old.n_group) for e in range(size)]
    found = Experts(parent, [0] * more, 1, asleep, 1.0)
    if more > E:
        found.what = f"{more - E} copies that sleep"
    if chosen != k:
        found.changes.append(f"{chosen} experts are chosen for a token, which were {k}")
    return found


def experts_of_dense(inner: int, new: ModelConfig) -> tuple[int, Experts]:
    """How the `inner` units of a dense MLP become an MoE: units of the shared expert, and parts of the rest."""
    E, k = new.n_routed_experts, new.num_experts_per_tok
    shared = min(inner, new.moe_shared_expert_intermediate_size) if new.n_shared_experts else 0
    rest, most = inner - shared, math.gcd(k, E // new.n_group)
    fitting = [g for g in range(1, most + 1) if most % g == 0 and g * new.moe_intermediate_size >= rest]
    if not fitting:
        raise UserError(
            f"moe_intermediate_size: the {inner} inner units of a dense MLP have no room: "
            f"{f'the shared expert takes {shared}, and ' if shared else ''}{most} parts of {new.moe_intermediate_size} "
            f"do not hold {rest}; {-(-rest // most)} would (parts divide num_experts_per_tok = {k} and the "
            f"{E // new.n_group} experts{' of a router group' if new.n_group > 1 else ''})"
        )
    g = fitting[0]
    # Without normalisation a fresh router's scores are one half, more or less.
    factor = float(g) if new.norm_topk_prob else 2.0 * g / k
    found = Experts([0] * E, [e % g for e in range(E)], g, [False] * E, factor)
    if rest:
        found.what = f"{E // g} copies of {f'{g} parts of ' if g > 1 else ''}{rest} inner units"
        latent = new.moe_latent_size
        if latent is not None and latent < min(rest, new.hidden_size):
            found.changes.append(
                f"a dense MLP of {rest} units works in {latent} latent dimensions, which are less than the "
                f"{min(rest, new.hidden_size)} that its weights may use"
            )
        if not new.norm_topk_prob:
            found.changes.append("norm_topk_prob is off: the weights of a dense MLP's copies depend on the token")
    return shared, found


# --------------------------------------------------------------------------------------------------------------- growth


@dataclass
class Core:
    """The known part of an MoE layer: E experts of F units that work in B dimensions."""

    up_EFB: Tensor
    down_EBF: Tensor
    fc1_BH: Tensor | None = None
    fc2_HB: Tensor | None = None
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None


@dataclass(frozen=True)
class Change:
    """How a tensor of the new model is made; `what` is empty where it is taken over as it is."""

    what: str
    make: Callable[[], Tensor]


class Growth:
    """What every tensor of a larger model is made from. Nothing is read before it is asked for."""

    def __init__(self, model_dir: Path, overrides: Sequence[str], seed: int = 0):
        """overrides: KEY=VALUE of the keys KEYS. UserError, or RecipeError, where there is no rule."""
        self.old = Stored(model_dir)
        self.config, named = model_with(self.old.config, overrides)
        if wrong := sorted(named - set(KEYS)):
            raise RecipeError(f"command line: model.{wrong[0]}: does not grow; the keys that do are {', '.join(KEYS)}")
        self.changes: list[str] = []
        self.notes: list[str] = []
        old, new = self.old.config, self.config.validate()
        self.config.pattern, self.config.mtp.pattern = new.layers, new.mtp_layers
        self.origins = {
            "layers": align(old.layers, new.layers),
            "mtp.layers": align(old.mtp_layers, new.mtp_layers) if new.mtp_layers else [],
        }
        self.letters = {"layers": (old.layers, new.layers), "mtp.layers": (old.mtp_layers, new.mtp_layers)}
        self._rules(named)
        self.model = HybridLM(self.config, device="meta").to(self.old.dtype)
        self.seed = seed
        self._core = functools.lru_cache(1)(self._core_of)
        shapes = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        self.tensors = {row.ours: self._change(row.ours, shapes[row.ours].shape) for row in rows(self.model)}

    def __call__(self, name: str, like: Tensor | None = None) -> Tensor:
        """A tensor of the new model."""
        return self.tensors[name].make()

    def _pairs(self) -> set[str]:
        """Old and new letter of the layers that come from an old one, such as -E."""
        return {
            self.letters[stack][0][origin.layer] + self.letters[stack][1][i]
            for stack, origins in self.origins.items()
            for i, origin in enumerate(origins)
            if origin.layer is not None
        }

    def _rules(self, named: set[str]) -> None:
        """Choose the rules for widths and experts; refuse what has none."""
        old, new, pairs = self.old.config, self.config, self._pairs()

        def keep(condition: bool, name: str) -> None:
            was, is_ = getattr(old, name), getattr(new, name)
            if condition and is_ < was:
                raise UserError(f"{name}: {is_} is less than {was}, and nothing is taken away")

        self.experts: dict[str, Experts] = {}
        self.dense_shared = 0
        keep("--" in pairs, "intermediate_size")
        if "EE" in pairs:
            keep(bool(old.n_shared_experts), "n_shared_experts")
            keep(bool(old.n_shared_experts), "moe_shared_expert_intermediate_size")
            before, after = old.moe_latent_size, new.moe_latent_size
            if before is not None and after is not None and after < before:
                raise UserError(f"moe_latent_size: {after} is less than {before}, and nothing is taken away")
            self.experts["E"] = rule = experts_of_experts(old, new)
            if "routed_scaling_factor" not in named:
                new.routed_scaling_factor = old.routed_scaling_factor * rule.factor
            if before is None and after is not None and after < new.hidden_size:
                rule.changes.append(f"experts of hidden size {new.hidden_size} work in {after} latent dimensions")
            if any(rule.asleep):
                self.notes.append(
                    f"{sum(rule.asleep)} new experts a layer sleep: they are copies whose router bias keeps them from "
                    "being chosen until training with router_bias_update_rate above 0 has raised it"
                )
        if "-E" in pairs:
            self.dense_shared, self.experts["-"] = experts_of_dense(old.intermediate_size, new)
        for rule in self.experts.values():
            self.changes += rule.changes
        if old.mtp_layers and not new.mtp_layers:
            self.notes.append("the MTP block is left out")
        elif new.mtp_layers and not old.mtp_layers:
            self.notes.append("the MTP block is new")
        latent = {"E": old.moe_latent_size, "-": None}
        if any(
            math.frexp(self._scale(letter))[0] != 0.5
            or self._narrows(letter)
            or (latent[letter] is not None and new.moe_latent_size is None)
            for letter in self.experts
        ):
            self.notes.append(
                f"weights that are multiplied are rounded to {str(self.old.dtype).removeprefix('torch.')}"
            )

    def _scale(self, letter: str) -> float:
        """What `down` of routed experts that come from a layer of this letter is multiplied by."""
        before = self.old.config.routed_scaling_factor if letter == "E" else 1.0
        return self.experts[letter].factor * before / self.config.routed_scaling_factor

    # ------------------------------------------------------------------------------------------------------ one tensor

    def _change(self, name: str, shape: torch.Size) -> Change:
        """The rule for one tensor."""
        match = re.fullmatch(r"(mtp\.layers|layers)\.(\d+)\.(.+)", name)

        def fresh() -> Tensor:
            if name.endswith("router.bias"):
                return torch.zeros(shape)
            return self.model.initial(name, shape, self.seed)

        if match is None:
            if name in self.old.shapes:
                return Change("", lambda: self.old(name))
            return Change("fresh", fresh)
        stack, i, leaf = match[1], int(match[2]), match[3]
        origin, (olds, news) = self.origins[stack][i], self.letters[stack]
        if not origin.kept and leaf in self._outputs(news[i]):
            return Change("zero", lambda: torch.zeros(shape))
        if origin.layer is None:
            return Change("fresh", fresh)
        there = f"{stack}.{origin.layer}."
        if news[i] == "E" and leaf != "norm.weight":
            return self._of_moe(name, there, olds[origin.layer], leaf, shape, fresh)
        if self.old.shapes[there + leaf] == shape:
            # A file's tensors must not share memory, as two of one mapped tensor would.
            return Change("", lambda: self.old(there + leaf) if origin.kept else self.old(there + leaf).clone())
        if leaf == "mixer.up.weight":
            return Change("new units fresh", lambda: _into(fresh(), self.old(there + leaf)))
        return Change("new units zero", lambda: _into(torch.zeros(shape), self.old(there + leaf)))

    def _outputs(self, letter: str) -> set[str]:
        """The tensors that write to the residual stream."""
        routed = "experts.down" if self.config.moe_latent_size is None else "fc2_latent.weight"
        names = {"M": ["out_proj.weight"], "*": ["o_proj.weight"], "-": ["down.weight"]}
        return {f"mixer.{name}" for name in names.get(letter, [routed, "shared.down.weight"])}

    def _of_moe(self, name: str, there: str, letter: str, leaf: str, shape, fresh) -> Change:
        """A tensor of an MoE layer that comes from an MoE layer or a dense MLP (`letter`)."""
        rule = self.experts[letter]
        old, new, scale, leaf = self.old.config, self.config, self._scale(letter), leaf.removeprefix("mixer.")
        part = leaf.split(".")[0]
        same = letter == "E" and self.old.shapes.get(f"{there}mixer.{leaf}") == shape
        if same and not (
            (part in ("experts", "router") and rule.what)
            or (part == "experts" and old.moe_latent_size != new.moe_latent_size)
            or (leaf == "experts.down" and scale != 1)
        ):
            return Change("", lambda: self.old(f"{there}mixer.{leaf}").clone())

        def core() -> Core:
            return self._core(there, letter)

        if leaf == "router.weight" and letter == "-":
            g = rule.parts
            return Change(
                f"fresh{f', a row for {g} neighbours' if g > 1 else ''}",
                lambda: fresh()[torch.arange(shape[0]) // g * g],
            )
        if leaf == "router.bias" and letter == "-":
            return Change("zero", fresh)
        if leaf == "router.weight":
            return Change("rows of " + rule.what, lambda: self.old(f"{there}mixer.{leaf}")[rule.parent])
        if leaf == "router.bias":

            def bias() -> Tensor:
                b = self.old(f"{there}mixer.{leaf}")
                # Scores are in 0 .. 1: below the lowest of the old ones whatever the score.
                return b[rule.parent] - (1 + b.max() - b.min()) * torch.tensor(rule.asleep, dtype=b.dtype)

            return Change(f"that of {rule.what}{', lowered' if any(rule.asleep) else ''}", bias)
        if part == "fc1_latent":
            what = "directions of the experts' inputs" if self._narrows(letter) else "known dimensions kept, new fresh"
            return Change(what, lambda: _into(fresh(), core().fc1_BH))
        if part == "fc2_latent":
            what = "directions of the experts' outputs" if self._narrows(letter) else "known dimensions kept, new zero"
            return Change(what, lambda: _into(torch.zeros(shape), core().fc2_HB))
        if leaf == "shared.up.weight":
            return Change(
                f"the {self.dense_shared} largest inner units" if letter == "-" else "new units fresh",
                lambda: _into(fresh(), core().shared_up),
            )
        if leaf == "shared.down.weight":
            return Change(
                f"the {self.dense_shared} largest inner units" if letter == "-" else "new units zero",
                lambda: _into(torch.zeros(shape), core().shared_down),
            )
        what = rule.what or ("no unit of the dense MLP" if letter == "-" else "")
        wider = letter == "E" and shape[1 if leaf == "experts.up" else 2] * rule.parts > old.moe_intermediate_size
        more = [f"new units {'fresh' if leaf == 'experts.up' else 'zero'}"] if wider else []
        more += [f"times {scale:.6g}"] if leaf == "experts.down" and scale != 1 else []
        before = old.moe_latent_size if letter == "E" else None
        more += [f"in {new.moe_latent_size or 'hidden'} dimensions"] if before != new.moe_latent_size else []
        what = "; ".join(filter(None, [what, *more]))
        return Change(what, lambda: self._deal(fresh(), core(), rule, leaf == "experts.up", scale))

    def _narrows(self, letter: str) -> bool:
        """Whether a latent size below the hidden size is new for layers that come from this letter."""
        before = self.old.config.moe_latent_size if letter == "E" else None
        latent = self.config.moe_latent_size
        return before is None and latent is not None and latent < self.config.hidden_size

    @staticmethod
    def _deal(value: Tensor, core: Core, rule: Experts, is_up: bool, scale: float) -> Tensor:
        """Put the parts of the known experts into fresh `up` [E, F, L] or `down` [E, L, F]."""
        known = core.up_EFB.shape[2]
        value = value.to(torch.promote_types(value.dtype, core.up_EFB.dtype))
        for e, (parent, part) in enumerate(zip(rule.parent, rule.part)):
            units = slice(part, None, rule.parts)
            if is_up:
                up = core.up_EFB[parent][units]
                value[e, : len(up), :known] = up
                value[e, : len(up), known:] = 0
            else:
                down = core.down_EBF[parent][:, units]
                value[e, :known, : down.shape[1]] = down.to(value.dtype) * scale
                value[e, :known, down.shape[1] :] = 0
        return value

    def _core_of(self, there: str, letter: str) -> Core:
        """The known part of an MoE layer, from the layer `there` of the old model."""
        old, new = self.old.config, self.config
        latent, hidden = new.moe_latent_size, new.hidden_size
        if letter == "-":
            up, down = (self.old(f"{there}mixer.{leaf}.weight") for leaf in ("up", "down"))
            size = up.double().square().sum(1) * down.double().norm(dim=0)
            order = size.argsort(descending=True, stable=True)
            first, rest = order[: self.dense_shared], order[self.dense_shared :].sort().values
            shared = (up[first], down[:, first]) if len(first) else (None, None)
            up, down = up[rest][None], down[:, rest][None]
            if not len(rest):  # the routed experts know nothing
                known = hidden if latent is None else 0
                return Core(up[:, :, :known], down[:, :known], None, None, *shared)
            before = None
        else:
            up, down = (self.old(f"{there}mixer.experts.{leaf}") for leaf in ("up", "down"))
            shared, before = (None, None), old.moe_latent_size
            if old.n_shared_experts:
                up_, down_ = (self.old(f"{there}mixer.shared.{leaf}.weight") for leaf in ("up", "down"))
                shared = (up_, down_)
        if before is not None:
            fc1, fc2 = (self.old(f"{there}mixer.{leaf}_latent.weight") for leaf in ("fc1", "fc2"))
            if latent is not None:
                return Core(up, down, fc1, fc2, *shared)
            return Core(up.double() @ fc1.double(), fc2.double() @ down.double(), None, None, *shared)
        if latent is None:
            return Core(up, down, None, None, *shared)
        if latent >= hidden:
            one = torch.eye(hidden, dtype=up.dtype)
            return Core(up, down, one, one, *shared)
        inputs_HB = _directions(up.flatten(0, 1), latent)
        outputs_HB = _directions(down.transpose(1, 2).flatten(0, 1), latent)
        return Core(up.double() @ inputs_HB, outputs_HB.T @ down.double(), inputs_HB.T, outputs_HB, *shared)


def _into(value: Tensor, known: Tensor | None) -> Tensor:
    """`value` with `known`, if there is any, in its first rows and columns."""
    if known is None:
        return value
    value = value.to(torch.promote_types(value.dtype, known.dtype))
    value[tuple(slice(size) for size in known.shape)] = known
    return value


def _directions(rows_NH: Tensor, count: int) -> Tensor:
    """[H, count] orthonormal: what rows_NH have most of, in float64 (fewer columns where there are fewer rows)."""
    square = torch.linalg.qr(rows_NH.double(), mode="r").R  # same right singular vectors, at most H x H
    return torch.linalg.svd(square, full_matrices=False).Vh[:count].T


# -------------------------------------------------------------------------------------------------------------- command


def difference(before: Path, after: Path, tokens: int) -> dict[str, float]:
    """Largest difference of two models' logits (MTP's too, where both have it) on random tokens, in float64, and the
    largest logit of the first. One model is in memory at a time."""
    found = []
    for folder in (before, after):
        model = HybridLM.from_pretrained(folder, dtype=torch.float64)
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            out = model(ids, mtp=True)
            found.append([out.logits, *out.mtp_logits])
        del model, out
    return {
        "tokens": tokens,
        "largest_difference": max(float((a - b).abs().max()) for a, b in zip(*found)),
        "largest_logit": max(float(a.abs().max()) for a in found[0]),
    }


def grow(
    model_dir: Path, target: Path, overrides: Sequence[str], tokens: int = 64, seed: int = 0,
    say: Callable[[Growth], None] = lambda growth: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the larger MODEL_DIR `target`; facts about it, which are in its grow.json too.

    overrides   KEY=VALUE of the model, of the keys KEYS
    tokens      random tokens that the change of the logits is measured on; 0 for no measurement
    seed        of fresh weights
    say         told what will be done, before it is
    """
    refuse_to_replace(target)
    if target.resolve() == model_dir.resolve():
        raise UserError(f"{target} is what grows; write to another folder")
    growth = Growth(model_dir, overrides, seed)
    say(growth)
    tokenizer = load_tokenizer(model_dir) if (model_dir / "tokenizer.json").exists() else None
    facts: dict[str, Any] = {
        "from": str(model_dir), "keys": list(overrides), "preserved": not growth.changes, "changes": growth.changes,
        "notes": growth.notes, "seed": seed,
    }  # fmt: skip
    with new_model_dir(target) as partial:
        growth.model.save_pretrained(partial, dtype=growth.old.dtype, tokenizer=tokenizer, read=growth)
        if tokens:
            facts["measured"] = difference(model_dir, partial, tokens)
        (partial / "grow.json").write_text(json.dumps(facts, indent=1) + "\n")
    return {"model_dir": str(target), **facts}


def plan(growth: Growth) -> list[str]:
    """Where every layer comes from, and what is done to each tensor that is not taken over as it is."""
    lines = []
    for stack, origins in growth.origins.items():
        olds, news = growth.letters[stack]
        for i, origin in enumerate(origins):
            source = "fresh" if origin.layer is None else f"{stack}.{origin.layer} {olds[origin.layer]}"
            added = "" if origin.kept else ", added with output zero"
            lines.append(f"{stack}.{i} {news[i]} <- {source}{added}")
            for name, change in growth.tensors.items():
                if change.what and name.startswith(f"{stack}.{i}."):
                    lines.append(f"    {name.removeprefix(f'{stack}.{i}.'):<24} {change.what}")
    lines += [
        f"{name}  {change.what}"
        for name, change in growth.tensors.items()
        if change.what and not re.match(r"(mtp\.)?layers\.", name)
    ]
    return lines


def main(argv: list[str]) -> int:
    """`nemo-lite grow MODEL_DIR --to MODEL_DIR2 KEY=VALUE...`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="nemo-lite grow",
        description="Make a larger model from a MODEL_DIR, without changing its function where that can be: more "
        "layers (pattern), more or divided experts, wider parts, E in the place of -. Says what becomes of each "
        "tensor, whether the function is preserved, and how far logits moved. Train it on with init_from.",
        epilog=f"Keys: {', '.join(KEYS)}. A key not given stays; routed_scaling_factor follows divided experts.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="of the model, such as pattern='MEMEM*EE'")
    parser.add_argument("--to", metavar="MODEL_DIR", type=Path, help="directory to write")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; read no weights")
    parser.add_argument(
        "--measure", type=int, default=64, metavar="TOKENS",
        help="random tokens that old and new logits are compared on, in float64; 0 for none (default: 64)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of fresh weights (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    args = parser.parse_args(argv)
    if args.measure < 0:
        raise UserError(f"--measure {args.measure}: needs a number of tokens, or 0")
    if args.dry_run and args.json:
        parser.error("--dry-run prints no JSON")
    if args.dry_run:
        _tell(Growth(args.model_dir, args.overrides, args.seed))
        return 0
    if args.to is None:
        parser.error("--to MODEL_DIR is needed (or --dry-run)")
    what = args.model_dir, args.to, args.overrides, args.measure, args.seed
    if args.json:
        print(json.dumps(grow(*what)))
        return 0
    facts = grow(*what, say=_tell)
    if measured := facts.get("measured"):
        print(
            f"Largest difference of logits on {measured['tokens']} random tokens: "
            f"{measured['largest_difference']:.3g}, of logits up to {measured['largest_logit']:.3g}"
        )
    print(f"{facts['model_dir']}: {load_config(args.to).layers}")
    return 0


def _tell(growth: Growth) -> None:
    print("\n".join([*plan(growth), *verdict(growth)]), flush=True)


def verdict(growth: Growth) -> list[str]:
    """Whether the function is preserved, as sentences."""
    if growth.changes:
        lines = ["The function is not preserved: " + "; ".join(growth.changes) + "."]
    else:
        lines = ["The function is preserved."]
    return lines + [note[0].upper() + note[1:] + "." for note in growth.notes]
