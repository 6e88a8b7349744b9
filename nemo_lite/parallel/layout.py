"""Where the parts of a model lie on many ranks: the layout, what makes one illegal, pipeline stages, rank groups.

Shapes only; nothing here imports torch.

    world = tp x cp x dp x pp ranks; a rank's number counts tp fastest, then cp, then dp, then pp

    tp   tensor parallel: the heads of a mixer and the inner size of an MLP are cut
    cp   context parallel: the tokens of a row are cut into 2 cp pieces; rank i holds pieces i and 2 cp - 1 - i
    dp   data parallel: rows are cut; follows from the others
    pp   pipeline parallel: layers are cut into stages; where the pattern's `|` make n pp of them, a rank has every
         pp-th stage and runs them interleaved (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)
    ep   expert parallel: the experts of a layer are cut over ep ranks that follow each other inside a stage, across tp,
         cp and dp (experts are never cut by tp); edp = tp x cp x dp / ep ranks hold the same experts
    sp   sequence parallel: between the cut linears, tokens are cut over the tp ranks
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from nemo_lite.check import flops_per_token, layer_flops
from nemo_lite.config import ModelConfig, Recipe
from nemo_lite.pattern import CUT
from nemo_lite.pattern import stages as cut_stages


@dataclass(frozen=True)
class Layout:
    """How many ranks share what; see the top of the file."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    sp: bool = False

    def dp(self, world: int) -> int:
        """Ranks that hold the same weights and other rows."""
        return world // (self.tp * self.cp * self.pp)

    @property
    def least_world(self) -> int:
        """The fewest ranks it takes."""
        return self.pp * math.lcm(self.tp * self.cp, self.ep)

    def edp(self, world: int) -> int:
        """Ranks that hold the same experts."""
        return world // (self.pp * self.ep)


def layout_of(recipe: Recipe) -> Layout:
    """A recipe's; sequence parallelism means nothing without tensor parallelism."""
    parallel = recipe.parallel
    return Layout(parallel.tp, parallel.pp, parallel.ep, parallel.cp, parallel.sp and parallel.tp > 1)


# ---------------------------------------------------------------------------------------------------------- rank groups

GROUPS = ("tp", "cp", "dp", "dp_cp", "pp", "ep", "edp")


def group(layout: Layout, world: int, kind: str, rank: int) -> list[int]:
    """The ranks, in order, that ``rank`` shares its group of one of the ``GROUPS`` with.

    ``dp_cp`` is who holds the same dense weights, ``edp`` who holds the same experts; ``ep`` is who shares a layer's
    experts; ``pp`` is a rank's pipeline, first stage first.
    """
    tp, cp, dp = layout.tp, layout.cp, layout.dp(world)
    stage = tp * cp * dp
    first, inner = rank // stage * stage, rank % stage  # the stage's first rank, and the place inside the stage
    if kind == "pp":
        return list(range(inner, world, stage))
    if kind == "ep":
        start = first + inner // layout.ep * layout.ep
        return list(range(start, start + layout.ep))
    if kind == "edp":
        return list(range(first + inner % layout.ep, first + stage, layout.ep))
    stride, size = {"tp": (1, tp), "cp": (tp, cp), "dp": (tp * cp, dp), "dp_cp": (tp, cp * dp)}[kind]
    start = rank - inner // stride % size * stride
    return list(range(start, start + size * stride, stride))


# ------------------------------------------------------------------------------------------------------------- legality


def problems(
    config: ModelConfig, layout: Layout, world: int, seq_len: int, global_batch: int, micro_batch: int
) -> list[str]:
    """What forbids ``layout`` on ``world`` ranks, one sentence each with the nearest legal values; empty when legal.

    ``seq_len`` tokens a row, ``global_batch`` and ``micro_batch`` rows.
    """
    tp, pp, ep, cp = layout.tp, layout.pp, layout.ep, layout.cp
    letters = config.layers + config.mtp_layers
    found = []
    for name, size in [("tp", tp), ("pp", pp), ("ep", ep), ("cp", cp)]:
        if size < 1:
            found.append(f"parallel.{name} is {size}, and must be at least 1")
    if found:  # nothing below can divide by it
        return found

    rules = _tp_rules(config)
    for sentence, legal in rules:
        if not legal(tp):
            near = _nearest(tp, world, lambda n: all(rule(n) for _, rule in rules))
            found.append(f"parallel.tp is {tp}, which {sentence} ({near})")
    used = tp * cp * pp
    if world % used:
        near = _nearest(used, world, lambda n: world % n == 0)
        found.append(
            f"parallel.tp x parallel.cp x parallel.pp is {tp} x {cp} x {pp} = {used}, which does not divide the "
            f"{world} ranks ({near})"
        )
    if "E" not in letters:
        if ep > 1:
            found.append(f"parallel.ep is {ep}, and the pattern has no experts (nearest: 1)")
    else:
        stage = world // pp if world % used == 0 else ep
        near = _nearest(ep, stage, lambda n: config.n_routed_experts % n == 0 and stage % n == 0)
        if config.n_routed_experts % ep:
            found.append(f"parallel.ep is {ep}, which does not divide the {config.n_routed_experts} experts ({near})")
        elif stage % ep:
            found.append(f"parallel.ep is {ep}, which does not divide the {stage} ranks of a pipeline stage ({near})")
    layers, cuts = len(config.layers), config.pattern.count(CUT)
    if cuts and (cuts + 1) % pp:
        near = _nearest(pp, cuts + 1, lambda n: (cuts + 1) % n == 0)
        found.append(f"parallel.pp is {pp}, which does not divide the {cuts + 1} stages of the pattern ({near})")
    elif pp > layers:
        found.append(f"parallel.pp is {pp}, more than the {layers} layers (nearest: {layers})")
    if cp > 1:
        least = 2 * cp * (config.conv_kernel if "M" in letters else 1)
        if seq_len < least:
            found.append(
                f"data.seq_len is {seq_len}, and with parallel.cp = {cp} each of a row's {2 * cp} pieces needs "
                f"{least // (2 * cp)} tokens (nearest: {least})"
            )
        elif seq_len % (2 * cp):
            near = _multiples(seq_len, 2 * cp)
            found.append(f"data.seq_len is {seq_len}, no multiple of 2 x parallel.cp = {2 * cp} ({near})")
    if layout.sp or (tp > 1 and "E" in letters):  # experts share tokens out over the tp ranks in any case
        tokens = micro_batch * seq_len // cp
        if tp == 1:
            found.append("parallel.sp is true, which needs parallel.tp above 1 (nearest: false)")
        elif tokens % tp:
            near = _nearest(tp, tokens, lambda n: tokens % n == 0)
            found.append(
                f"parallel.tp is {tp}, which does not divide the {tokens} tokens of a micro batch, as "
                f"{'parallel.sp needs' if layout.sp else 'experts need'} ({near})"
            )
    if world % used == 0:
        rows = layout.dp(world) * micro_batch
        if global_batch % rows:
            found.append(
                f"train.global_batch_size is {global_batch}, no multiple of the {rows} rows of {layout.dp(world)} data "
                f"parallel ranks x train.micro_batch_size = {micro_batch} ({_multiples(global_batch, rows)})"
            )
        elif cuts + 1 > pp > 1 and global_batch // rows % pp:
            found.append(
                f"train.global_batch_size is {global_batch}, {global_batch // rows} micro batches for each data "
                f"parallel rank, and interleaved stages take a multiple of parallel.pp = {pp} "
                f"({_multiples(global_batch, rows * pp)})"
            )
    return found


def _tp_rules(config: ModelConfig) -> list[tuple[str, Callable[[int], bool]]]:
    """(what is wrong, whether a tp is legal) for everything that tp cuts."""
    letters = config.layers + config.mtp_layers
    cut, shared = [(config.vocab_size, "rows of the embedding and the head")], []
    if "*" in letters:
        cut.append((config.num_attention_heads, "query heads"))
        shared.append((config.num_key_value_heads, "key/value heads"))
    if "M" in letters:
        cut.append((config.mamba_num_heads, "Mamba-2 heads"))
        shared.append((config.n_groups, "Mamba-2 groups"))
    if "E" in letters and config.n_shared_experts:
        cut.append((config.moe_shared_expert_intermediate_size, "columns of the shared expert"))
    if "-" in letters:
        cut.append((config.intermediate_size, "columns of the MLP"))
    rules: list[tuple[str, Callable[[int], bool]]] = [
        (f"does not divide the {size} {what}", functools.partial(lambda size, n: size % n == 0, size))
        for size, what in cut
    ]
    # Fewer of these than ranks are replicated.
    return rules + [
        (
            f"neither divides the {size} {what} nor is a multiple of it",
            functools.partial(lambda size, n: size % n == 0 or n % size == 0, size),
        )
        for size, what in shared
    ]


def _nearest(value: int, most: int, legal: Callable[[int], bool]) -> str:
    """``nearest: 2, 4``: the next legal values below and above ``value``, up to ``most``."""
    low = next((n for n in range(min(value - 1, most), 0, -1) if legal(n)), None)
    high = next((n for n in range(value + 1, most + 1) if legal(n)), None)
    return f"nearest: {', '.join(str(n) for n in (low, high) if n)}"


def _multiples(value: int, of: int) -> str:
    low = value // of * of
    return f"nearest: {f'{low}, ' if low else ''}{low + of}"


# ------------------------------------------------------------------------------------------------------ pipeline stages


def stages(config: ModelConfig, layout: Layout, seq_len: int) -> list[range]:
    """The trunk layers of each pipeline stage: cut by ``|`` where the pattern has it, else balanced by FLOPs.

    Rank r of pp has stages r, pp + r, ...: more than one where the pattern is cut into more than pp.
    Balanced is the contiguous partition whose most expensive stage is the cheapest. The last stage also has the head
    and the MTP block, which runs ``mtp.depth`` times; the embedding is free.
    """
    if CUT in config.pattern and layout.pp > 1:
        sizes = [len(stage) for stage in cut_stages(config.pattern)]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [range(end - size, end) for end, size in zip(ends, sizes)]
    each = {kind: layer_flops(config, kind, seq_len) for kind in set(config.layers)}
    flops = flops_per_token(config, seq_len)
    return _balance([each[kind] for kind in config.layers], flops["parts"]["head"] + flops["mtp"], layout.pp)


def _balance(costs: list[int], last: int, count: int) -> list[range]:
    """``costs`` in ``count`` contiguous ranges, the last of which costs ``last`` more, with the least maximum."""
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    n = len(costs)
    # best[i]: the least maximum of the first i layers in the stages so far; where[s][i]: the start of the last of them.
    best, where = [float("inf")] * (n + 1), []
    best[0] = 0
    for stage in range(count):
        extra = last if stage == count - 1 else 0
        before, best, start = best, [float("inf")] * (n + 1), [0] * (n + 1)
        for i in range(stage + 1, n + 1):
            best[i], start[i] = min((max(before[j], sums[i] - sums[j] + extra), j) for j in range(stage, i))
        where.append(start)
    found, end = [], n
    for start in reversed(where):
        found.append(range(start[end], end))
        end = start[end]
    return found[::-1]
