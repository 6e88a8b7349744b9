"""``nemo-lite plan``: the legal layouts of a recipe on N GPUs, ranked by a cost model that is stated here.

    nemo-lite plan recipes/pretrain/nemotron3_super.yaml precision=mxfp8 --gpus 64 --gpu B300

Nothing is taken to overlap. The time of a micro batch in a pipeline stage is the sum of

- ``products``: each product of each linear, and attention's two, takes the longer of FLOPs / peak of its format and
  bytes of operands and result / HBM bandwidth;
- ``memory``: bytes that everything between the products reads and writes / HBM bandwidth: norms, convolution, scan,
  activations, router, sorting tokens by expert, quantising, loss;
- ``tp``, ``ep``, ``cp``, ``pp``: bytes a rank sends / bandwidth of the link, NVLink inside a domain, else the network.

A step of m micro batches in stages of t_1 .. t_pp seconds takes sum(t) + (m - 1) max(t) (1F1B; with equal stages
(pp - 1) / (m + pp - 1) of it is ``bubble``; with v interleaved stages a rank it waits a v-th of that), and once the
data parallel collectives (``dp``: gradients reduce-scattered, weights all-gathered) and the ``optimizer``.

Every bandwidth and peak is the data sheet's times an ``Efficiency`` that benchmarks/plan.py fits to published runs;
how far the model is off on each of them: docs/parallelism.md. T tokens of a micro batch on a rank, H hidden size.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from nemo_lite.check import layer_parameters
from nemo_lite.config import ModelConfig, Recipe, RecipeError, UserError, load_recipe
from nemo_lite.parallel.layout import Layout, group, problems, stages
from nemo_lite.precision.recipe import GEMMS, Part, formats, parts

# ------------------------------------------------------------------------------------------------------------- hardware

GB, TB, TFLOP = 1e9, 1e12, 1e12


@dataclass(frozen=True)
class Gpu:
    """Dense peaks in FLOP/s by format (without 2:4 sparsity), bytes/s in one direction, bytes, GPUs."""

    peak: dict[str, float]
    memory: float
    hbm: float
    nvlink: float
    domain: int
    network: float

    @property
    def island(self) -> int:
        """Ranks in a row that NVLink joins: the largest power of two of a domain, as layouts fill 64 of 72."""
        return 1 << (self.domain.bit_length() - 1)


def _gpu(
    bf16: float, fp8: float, fp4: float, memory: float, hbm: float, nvlink: float, domain: int, network: float
) -> Gpu:
    peak = {"fp32": bf16 / 2, "bf16": bf16, "fp8": fp8, "fp8_block": fp8}  # fp32 multiplies as TF32
    if fp4:
        peak |= {"mxfp8": fp8, "nvfp4": fp4}
    peak = {format: value * TFLOP for format, value in peak.items()}
    return Gpu(peak, memory * GB, hbm * TB, nvlink * GB, domain, network * GB)


# TFLOP/s, GB, TB/s, GB/s: NVLink and network in one direction (data sheets give NVLink's two together).
# H100   "NVIDIA H100 Tensor Core GPU" (SXM: 3,958 TFLOPS sparse FP8, 3.35 TB/s), "NVIDIA DGX H100" (8 x 400 Gb/s)
# H200   "NVIDIA H200 Tensor Core GPU" (141 GB, 4.8 TB/s; the H100's chip), "NVIDIA DGX H200"
# B200   "NVIDIA Blackwell Architecture Technical Brief" (HGX B200), "NVIDIA DGX B200" (1,440 GB, 64 TB/s, 8 x 400 Gb/s)
# B300   "NVIDIA DGX B300" (8 x 800 Gb/s), "NVIDIA Blackwell Ultra Datasheet"
# GB200  "NVIDIA Blackwell Architecture Technical Brief", "NVIDIA GB200 NVL72" (per rack; a 72nd here)
# GB300  "NVIDIA GB300 NVL72" (1,080 PFLOPS dense FP4, 720 sparse FP8, 20 TB, 576 TB/s a rack), ConnectX-8
# Read as other pages quote them, the sheets themselves were out of reach. The pages agree except on: B300's dense NVFP4
# (13.1 to 14 PFLOPS; 108 / 8 is taken), B300's and GB300's memory (268 to 288 GB), B200's and B300's HBM (7.7 or 8
# TB/s).
GPUS = {
    "H100": _gpu(989, 1979, 0, 80, 3.35, 450, 8, 50),
    "H200": _gpu(989, 1979, 0, 141, 4.8, 450, 8, 50),
    "B200": _gpu(2250, 4500, 9000, 180, 8, 900, 8, 50),
    "B300": _gpu(2250, 4500, 13500, 270, 8, 900, 8, 100),
    "GB200": _gpu(2500, 5000, 10000, 186, 8, 900, 72, 50),
    "GB300": _gpu(2500, 5000, 15000, 278, 8, 900, 72, 100),
}


@dataclass(frozen=True)
class Efficiency:
    """What share of the data sheet's figure the published runs reach, all that is not modelled included.

    products   of a format's peak
    memory     of HBM bandwidth
    nvlink     of NVLink
    network    of the network
    """

    products: float
    memory: float
    nvlink: float
    network: float


# Fitted by `python benchmarks/plan.py`, which writes benchmarks/results/plan.json; a test compares the two.
EFFICIENCY = Efficiency(products=0.8, memory=0.325, nvlink=0.275, network=0.595)

_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "fp8_block": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 1 / 2 + 1 / 16}
# How often what is quantised is read: formats with a scale of the whole tensor read it once more for its maximum.
_READS = {"fp32": 0, "bf16": 0, "fp8": 2, "fp8_block": 1, "mxfp8": 1, "nvfp4": 2}
BF16, FP32 = 2, 4
STATE = 12  # bytes a parameter has in the distributed optimizer: fp32 master weight and two moments


# ------------------------------------------------------------------------------------------------------------- estimate

KINDS = ("tp", "ep", "cp", "pp", "dp")
MEMORY = ("weights", "gradients", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class Estimate:
    """What a layout costs.

    seconds   of a step by part: products, memory, the ``KINDS``, bubble, optimizer; their sum is ``step``
    sent      bytes the busiest rank sends in a step, by kind of collective
    memory    bytes of the fullest rank by part
    """

    layout: Layout
    dp: int
    step: float
    tokens_per_second: float  # of one GPU
    seconds: dict[str, float]
    sent: dict[str, float]
    memory: dict[str, int]

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())


@dataclass
class _Cost:
    """Of one micro batch in one stage: seconds forward and backward, and bytes sent, by part."""

    forward: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    again: bool = False  # what is added is computed once more in the backward

    def add(self, kind: str, forward: float, backward: float) -> None:
        self.forward[kind] += forward
        self.backward[kind] += backward + (forward if self.again else 0)

    def send(self, kind: str, forward: tuple[float, float], backward: tuple[float, float]) -> None:
        """(bytes, seconds) of both directions."""
        self.add(kind, forward[1], backward[1])
        self.sent[kind] += forward[0] + backward[0] + (forward[0] if self.again else 0)

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


class _Links:
    """Collectives of a layout's groups as (bytes a rank sends, seconds)."""

    def __init__(self, gpu: Gpu, efficiency: Efficiency, layout: Layout, world: int):
        self.nvlink, self.network = gpu.nvlink * efficiency.nvlink, gpu.network * efficiency.network
        self.groups = {}
        for kind in ("tp", "cp", "dp_cp", "ep", "edp", "pp"):
            ranks = group(layout, world, kind, 0)
            self.groups[kind] = len(ranks), sum(rank < gpu.island for rank in ranks)

    def gather(self, kind: str, size: float) -> tuple[float, float]:
        """All-gather to, or reduce-scatter of, ``size`` bytes; every rank of an island has a network card."""
        n, near = self.groups[kind]
        inside = size * (n - 1) / n / self.nvlink if near > 1 else 0.0
        outside = size * (n - near) / n / (near * self.network)
        return size * (n - 1) / n, max(inside, outside)

    def exchange(self, kind: str, size: float) -> tuple[float, float]:
        """All-to-all of ``size`` bytes of each rank, evenly over the group, its own part included."""
        n, near = self.groups[kind]
        inside, outside = size * (near - 1) / n / self.nvlink, size * (n - near) / n / self.network
        return size * (n - 1) / n, max(inside, outside)

    def once(self, kind: str, tokens: float, choices: int, size: float) -> tuple[float, float]:
        """All-to-all where a token crosses the network once for each island and NVLink once for each rank."""
        n, near = self.groups[kind]

        def reached(places: float) -> float:
            return (places - 1) * (1 - (1 - 1 / places) ** choices)

        inside, outside = tokens * size * reached(n), tokens * size * reached(n / near)
        return inside + outside, max(inside / self.nvlink, outside / self.network)

    def neighbour(self, kind: str, size: float) -> tuple[float, float]:
        n, near = self.groups[kind]
        return (size, size / (self.nvlink if near == n else self.network)) if n > 1 else (0.0, 0.0)


def _times(count: float, cost: tuple[float, float]) -> tuple[float, float]:
    return count * cost[0], count * cost[1]


_COLUMN = {"in_proj", "q_proj", "k_proj", "v_proj", "up_proj", "lm_head"}
_ROW = {"out_proj", "o_proj", "down_proj"}


@dataclass(frozen=True)
class _Piece:
    """A product of one stage as one rank makes it, each run: ``rows`` x ``n_in`` by ``n_in`` x ``n_out``.

    ``weights`` of all its matrices on the rank; an expert has two products, the second with the sizes swapped. ``kind``
    is the letter of its layer, or nothing.
    """

    leaf: str
    kind: str
    n_in: int
    n_out: int
    weights: int
    runs: int
    formats: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every tp rank has all of it."""
        return self.leaf not in _COLUMN | _ROW and self.leaf != "experts"


class _Recipe:
    """What the layouts of one recipe share."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.config = recipe, recipe.model
        self.parts = list(parts(recipe.model))
        by_name = formats(recipe.model, recipe.precision)
        self.formats = {
            part.name: tuple(getattr(by_name[part.name], gemm) for gemm in GEMMS)
            if part.name in by_name
            else (part.fixed or "bf16",) * 3
            for part in self.parts
        }
        self._pieces: dict[tuple[int, int], dict[int | None, list[_Piece]]] = {}
        self._stages: dict[int, list[range]] = {}

    def stages(self, layout: Layout) -> list[range]:
        if layout.pp not in self._stages:
            self._stages[layout.pp] = stages(self.config, layout, self.recipe.data.seq_len)
        return self._stages[layout.pp]

    def pieces(self, layout: Layout) -> dict[int | None, list[_Piece]]:
        """The pieces of each trunk layer; under None the head's and the MTP block's."""
        key = layout.tp, layout.ep
        if key not in self._pieces:
            self._pieces[key] = found = {}
            for part in self.parts:
                found.setdefault(part.layer, []).append(self._piece(part, *key))
        return self._pieces[key]

    def _piece(self, part: Part, tp: int, ep: int) -> _Piece:
        config, leaf = self.config, part.name.rsplit(".", 1)[-1]
        n_in, n_out, weights = part.n_in, part.n_out, part.weights
        if leaf == "experts":
            weights //= ep
        elif leaf in _COLUMN:
            n_out //= tp
            if leaf in ("k_proj", "v_proj"):  # fewer heads than ranks are on several
                n_out = config.head_dim * max(config.num_key_value_heads // tp, 1)
            elif leaf == "in_proj":
                groups = max(config.n_groups // tp, 1)
                n_out = (2 * config.mamba_inner + config.mamba_num_heads) // tp + 2 * config.ssm_state_size * groups
            weights = n_in * n_out
        elif leaf in _ROW:
            n_in //= tp
            weights = n_in * n_out
        letters = config.mtp_layers if part.name.startswith("mtp.") else config.layers
        _, inside, place = part.name.partition("layers.")
        kind = letters[int(place.split(".")[0])] if inside else ""
        return _Piece(leaf, kind, n_in, n_out, weights, part.runs, self.formats[part.name])


class _Stage:
    """The layers of one pipeline rank, of one stage or of several: parameters, and the cost of a micro batch."""

    def __init__(self, model: _Model, layers: list[int], first: bool, last: bool):
        self.m, self.first, self.last = model, first, last
        config, layout = model.config, model.layout
        self.letters = Counter(config.layers[i] for i in layers)
        self.mtp = Counter(config.mtp_layers) if last else Counter()
        self.pieces = Counter(piece for i in layers for piece in model.pieces[i])
        self.tail = [piece for piece in model.pieces[None] if last]  # head and MTP
        blocks = Counter(self.pieces)
        blocks.update(piece for piece in self.tail if piece.leaf != "lm_head")
        self.experts = sum(count * piece.weights for piece, count in blocks.items() if piece.leaf == "experts")
        self.whole = sum(count * piece.weights for piece, count in blocks.items() if piece.whole)
        cut = sum(count * piece.weights for piece, count in blocks.items()) - self.experts - self.whole
        vectors = sum(count * _vectors(config, kind) for kind, count in (self.letters + self.mtp).items())
        table, H = config.vocab_size * config.hidden_size // layout.tp, config.hidden_size
        # The last stage embeds MTP's tokens: it has a copy of the embedding. A tied head is the embedding.
        self.copy = last and not first and (bool(self.mtp) or config.tie_word_embeddings)
        embedding = first or (self.copy and not config.tie_word_embeddings)
        head = last and not (first and config.tie_word_embeddings)
        tables = (embedding + head) * table
        self.dense = cut + self.whole + vectors + tables + (H + 3 * H * bool(self.mtp) if last else 0)
        self.table = table

    def cost(self) -> _Cost:
        cost = _Cost()
        for piece, count in self.pieces.items():
            cost.again = piece.kind in tuple(self.m.recipe.train.recomputed)
            self._multiply(cost, piece, count)
        depth = self.m.config.mtp.depth
        self._layers(cost, self.letters)
        self._layers(cost, Counter({kind: depth * count for kind, count in self.mtp.items()}))
        for piece in self.tail:
            cost.again = piece.kind in tuple(self.m.recipe.train.recomputed)
            self._multiply(cost, piece, 1)
        cost.again = False  # only layers are recomputed
        self._ends(cost)
        return cost

    def _multiply(self, cost: _Cost, piece: _Piece, count: int) -> None:
        """Three products of a piece, and quantising their operands."""
        m, config = self.m, self.m.config
        experts = piece.leaf == "experts"
        rows = m.scattered if piece.whole else m.tokens
        if experts:
            rows = m.tokens / m.layout.tp * config.num_experts_per_tok
        twice = 2 if experts else 1
        into, out, weights = rows * piece.n_in * twice, rows * piece.n_out * twice, piece.weights
        if experts:  # up reads n_in and writes n_out, down the reverse
            into = out = (into + out) / 2
        flops = 2 * rows * piece.n_in * piece.n_out * twice
        moved = [(into, weights, out), (out, weights, into), (into, out, weights)]
        seconds = []
        for format, (a, b, result) in zip(piece.formats, moved):
            width, end = _BYTES[format], result * BF16
            if result is weights and moved[-1] == (a, b, result):
                end = 2 * weights * m.gradient  # added to what is there
            reading = (a + b) * width + end
            seconds.append(max(flops / (m.gpu.peak[format] * m.efficiency.products), reading / m.hbm))
        runs = count * piece.runs
        cost.add("products", runs * seconds[0], runs * (seconds[1] + seconds[2]))

        def quantise(format: str, size: float) -> float:  # a copy for each of the two products it is in
            return size * (_READS[format] * BF16 + 2 * _BYTES[format]) / m.hbm if _READS[format] else 0.0

        cost.add("memory", runs * quantise(piece.formats[0], into), runs * quantise(piece.formats[1], out))

    def _layers(self, cost: _Cost, letters: Counter[str]) -> None:
        """Everything of layers that is no linear: bytes moved, attention, collectives."""
        m, config, layout, links = self.m, self.m.config, self.m.layout, self.m.links
        H, tp, T, S = config.hidden_size, layout.tp, m.tokens, m.scattered
        each = T / tp  # tokens whose experts this rank looks up
        unit = m.unit

        def move(count: int, forward: float, backward: float) -> None:
            cost.add("memory", count * forward / m.hbm, count * backward / m.hbm)

        def pair(count: int) -> None:
            """Around a column and a row linear. With sp: all-gather and reduce-scatter, their mirrors, and the
            all-gather of the saved input for the weight's gradient; without: an all-reduce in each direction."""
            if tp > 1:
                cost.send("tp", _times(2 * count, unit), _times((3 if layout.sp else 2) * count, unit))

        for kind, count in letters.items():
            cost.again = kind in m.recipe.train.recomputed
            # Norm and residual: x, normed, sum; backward dy, x, dx, sum.
            move(count, 5 * H * S * BF16, 6 * H * S * BF16)
            if kind == "M":
                heads, P, N = config.mamba_num_heads / tp, config.mamba_head_dim, config.ssm_state_size
                inner, gn = heads * P, N * max(config.n_groups / tp, 1)
                channels, state = inner + 2 * gn, heads * P * N * FP32 / config.chunk_size
                forward = (2 * channels + channels + inner + 3 * inner) * BF16 + 4 * state  # conv, scan, gated norm
                backward = (3 * channels + 3 * channels + 2 * inner + 5 * inner + 2 * (inner + channels)) * BF16
                move(count, T * forward, T * (backward + 8 * state))
                chunk, groups = min(config.chunk_size, m.seq_len), max(config.n_groups / tp, 1)
                scan = 2 * groups * chunk * N + 2 * heads * chunk * P + 4 * heads * P * N
                seconds = T * scan / (m.gpu.peak["bf16"] * m.efficiency.products)
                cost.add("products", count * seconds, count * 2.5 * seconds)
                pair(count)
                if layout.cp > 1:
                    # Two pieces a rank: their halo and state go on, one piece after the other, and gradients back.
                    one = m.rows * (heads * P * N * FP32 + (config.conv_kernel - 1) * channels * BF16)
                    sent, seconds = links.neighbour("cp", one)
                    sends = min(2, layout.cp - 1)  # the ranks at the ends have one neighbour
                    chain = count * sends * sent, count * 2 * (layout.cp - 1) * seconds
                    cost.send("cp", chain, chain)
            elif kind == "*":
                q, kv = config.num_attention_heads / tp, max(config.num_key_value_heads / tp, 1)
                size = (2 * q + 2 * kv) * config.head_dim * BF16
                move(count, T * size, 2 * T * size)
                seconds = T * 2 * q * config.head_dim * m.seq_len / (m.gpu.peak["bf16"] * m.efficiency.products)
                cost.add("products", count * seconds, count * 2.5 * seconds)  # the scores are computed again
                pair(count)
                if layout.cp > 1:
                    both = _times(count, links.gather("cp", T * layout.cp * 2 * kv * config.head_dim * BF16))
                    cost.send("cp", both, both)
            elif kind == "E":
                k, L, E = config.num_experts_per_tok, config.expert_size, config.n_routed_experts
                copies, hidden = each * k * L * BF16, each * k * config.moe_intermediate_size * BF16
                move(count, S * 6 * E * FP32, S * 4 * E * FP32)  # scores, choice, statistics
                move(count, 6 * copies + 2 * hidden, 6 * copies + 3 * hidden)  # sorted twice each way, activation
                if config.n_shared_experts:
                    shared = T * config.moe_shared_expert_intermediate_size / tp * BF16
                    move(count, 2 * shared + 3 * H * S * BF16, 3 * shared)
                    pair(count)
                if layout.ep > 1:
                    if m.once:
                        there = back = links.once("ep", each, k, L * BF16)
                    else:
                        there = links.exchange("ep", copies + each * k * FP32)  # with the routing weights
                        back = links.exchange("ep", copies)
                    both = _times(count, (there[0] + back[0], there[1] + back[1]))
                    cost.send("ep", both, both)
                if tp > 1 and not layout.sp:  # each rank's slice of the experts' sums, and of their gradients
                    both = _times(count, links.gather("tp", T * H * BF16))
                    cost.send("tp", both, both)
            else:
                inner = T * config.intermediate_size / tp * BF16
                move(count, 2 * inner, 3 * inner)
                pair(count)

    def _ends(self, cost: _Cost) -> None:
        """Embedding, head and loss, and what goes to the next stage."""
        m, config, layout, links = self.m, self.m.config, self.m.layout, self.m.links
        depth = config.mtp.depth if self.mtp else 0
        lookups, heads = self.first + depth, (1 + depth) * self.last
        wide = m.scattered * config.hidden_size * BF16
        cost.add("memory", lookups * 2 * wide / m.hbm, lookups * 2 * wide / m.hbm)
        logits = heads * m.tokens * config.vocab_size / layout.tp
        cost.add("memory", logits * (BF16 + FP32) / m.hbm, logits * (BF16 + FP32) / m.hbm)
        if layout.tp > 1:
            # Embedding: its rows are summed; with sp scattered. Head: gathered, and the gradient summed.
            whole, sp = m.unit, layout.sp
            cost.send("tp", _times(lookups * (1 if sp else 2), whole), _times(lookups * sp, whole))
            cost.send("tp", _times(heads * sp, whole), _times(heads * 2, whole))
        if layout.pp > 1:
            one = links.neighbour("pp", wide)
            cost.send("pp", _times(m.each - self.last, one), _times(m.each - self.first, one))

    def step(self) -> tuple[float, dict[str, float], float]:
        """Once a step: seconds of the collectives, bytes sent by kind, seconds of the optimizer."""
        m, links = self.m, self.m.links
        sent: defaultdict[str, float] = defaultdict(float)
        waiting = 0.0
        for kind, count in (("dp_cp", self.dense), ("edp", self.experts)):
            for width in (m.gradient, BF16):
                size, seconds = links.gather(kind, count * width)
                sent["dp"] += size
                waiting += seconds
        if m.layout.sp:  # what every tp rank has whole has seen a part of the tokens
            size, seconds = _times(2, links.gather("tp", self.whole * m.gradient))
            sent["tp"] += size
            waiting += seconds
        if m.layout.pp > 1 and (self.copy or (self.first and m.stages[-1].copy)):
            size, seconds = links.neighbour("pp", self.table * m.gradient)
            sent["pp"] += size
            waiting += seconds
        own = self.dense / m.dense_ranks + self.experts / m.expert_ranks
        # Reads gradient and state, writes state and weight; gradients are set to zero, and read for their norm.
        moved = own * (m.gradient + 2 * STATE + BF16) + 2 * m.gradient * (self.dense + self.experts)
        return waiting, sent, moved / m.hbm

    def memory(self, place: int) -> dict[str, int]:
        """Bytes by part; ``place``: which rank of the pipeline, which says how many micro batches are under way."""
        m, config, layout = self.m, self.m.config, self.m.layout
        count = self.dense + self.experts
        letters = self.letters + Counter({kind: config.mtp.depth * n for kind, n in self.mtp.items()})
        H = config.hidden_size * BF16
        each = {kind: _saved(config, kind, layout) for kind in letters}
        size = {kind: scattered * m.scattered + cut * m.tokens for kind, (scattered, cut) in each.items()}
        if layout.cp > 1 and "*" in size:  # keys and values of the other ranks' tokens, gathered
            kv = max(config.num_key_value_heads / layout.tp, 1)
            size["*"] += m.tokens * (layout.cp - 1) * 2 * kv * config.head_dim * BF16
        again = [kind for kind in letters if kind in m.recipe.train.recomputed]
        kept = sum(n * (H * m.scattered if kind in again else size[kind]) for kind, n in letters.items())
        now = max((size[kind] for kind in again), default=0.0)
        if self.last:
            kept += H * m.scattered * (2 + 5 * bool(self.mtp) * config.mtp.depth)
        # Forwards of a stage before the first backward (Megatron-core's schedules).
        forwards = layout.pp - place if m.each == 1 else 2 * (layout.pp - place) - 1 + (m.each - 1) * layout.pp
        under_way = min(m.micro_batches, forwards / m.each)
        chunk = min(m.recipe.train.loss_chunk, m.tokens)
        memory = {
            "weights": BF16 * count,
            "gradients": m.gradient * count,
            "optimizer": STATE * (self.dense / m.dense_ranks + self.experts / m.expert_ranks),
            "activations": kept * under_way + now,
            "logits": 2 * FP32 * chunk * config.vocab_size / layout.tp * self.last,
        }
        return {name: round(size) for name, size in memory.items()}


def _vectors(config: ModelConfig, kind: str) -> int:
    """Parameters of a layer that are in no product: norms, convolution, the expert bias."""
    one = layer_parameters(config, kind)
    return one["active"] - one["matmul"]


def _saved(config: ModelConfig, kind: str, layout: Layout) -> tuple[float, float]:
    """Bytes a layer keeps for its backward, by kernels that save their inputs: of each token it has without sp's
    scattering, and of each of its T tokens: (scattered, cut by tp)."""
    tp, H = layout.tp, config.hidden_size
    scattered, cut = 2 * H * BF16, 0.0  # the residual stream, the normed input
    if kind == "M":
        heads, P, N = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        inner, channels = heads * P, heads * P + 2 * config.mamba_groups_state
        # in_proj's outputs, the convolution's; dt, the states of chunks; the scan's and the gated norm's output.
        cut = (inner + 2 * channels + heads + 2 * inner) * BF16 + heads * FP32 + inner * N * FP32 / config.chunk_size
    elif kind == "*":
        cut = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads) * BF16
    elif kind == "E":
        k, L, F = config.num_experts_per_tok, config.expert_size, config.moe_intermediate_size
        scattered += config.n_routed_experts * FP32 + (2 * L * BF16 if config.moe_latent_size else 0)
        cut = k * (2 * L + F) * BF16  # rows in and out, the hidden before its activation
        if config.n_shared_experts:
            cut += 2 * config.moe_shared_expert_intermediate_size * BF16
    else:
        cut = 2 * config.intermediate_size * BF16
    return scattered, cut / tp


class _Model:
    """A recipe in a layout on ``world`` GPUs. ``once``: see :meth:`_Links.once`."""

    def __init__(
        self, shared: _Recipe, layout: Layout, world: int, gpu: Gpu, efficiency: Efficiency = EFFICIENCY, once=False
    ):
        self.recipe, self.config, self.layout = shared.recipe, shared.config, layout
        self.world, self.gpu, self.efficiency, self.once = world, gpu, efficiency, once
        self.links = _Links(gpu, efficiency, layout, world)
        self.hbm = gpu.hbm * efficiency.memory
        self.seq_len, self.rows = self.recipe.data.seq_len, self.recipe.train.micro_batch_size
        self.tokens = self.rows * self.seq_len / layout.cp  # T
        self.scattered = self.tokens / (layout.tp if layout.sp else 1)
        self.micro_batches = self.recipe.train.global_batch_size // (self.rows * layout.dp(world))
        self.gradient = {"float32": FP32, "bfloat16": BF16}[self.recipe.precision.reduce_dtype]
        self.dense_ranks, self.expert_ranks = layout.dp(world) * layout.cp, layout.edp(world)
        # What an all-gather or reduce-scatter of [T, H] over tp costs.
        self.unit = self.links.gather("tp", self.tokens * self.config.hidden_size * BF16)
        self.pieces, cut = shared.pieces(layout), shared.stages(layout)
        self.each = len(cut) // layout.pp  # stages of a rank
        layers = [[i for stage in cut[rank :: layout.pp] for i in stage] for rank in range(layout.pp)]
        self.stages = [_Stage(self, mine, rank == 0, rank == layout.pp - 1) for rank, mine in enumerate(layers)]

    def estimate(self) -> Estimate:
        layout, dp = self.layout, self.layout.dp(self.world)
        costs = [stage.cost() for stage in self.stages]
        slow = max(costs, key=lambda cost: cost.total)
        seconds: dict[str, float] = dict.fromkeys(("products", "memory", *KINDS), 0.0)
        for kind in slow.forward:
            seconds[kind] = self.micro_batches * (slow.forward[kind] + slow.backward[kind])
        seconds["bubble"] = (sum(cost.total for cost in costs) - slow.total) / self.each
        ends = [stage.step() for stage in self.stages]
        seconds["dp"] = max(waiting for waiting, _, _ in ends)
        seconds["optimizer"] = max(optimizer for _, _, optimizer in ends)
        sent = {
            kind: max(self.micro_batches * cost.sent[kind] + once[kind] for cost, (_, once, _) in zip(costs, ends))
            for kind in KINDS
        }
        memory = max((stage.memory(i) for i, stage in enumerate(self.stages)), key=lambda parts: sum(parts.values()))
        step = sum(seconds.values())
        speed = self.recipe.train.global_batch_size * self.seq_len / step / self.world
        return Estimate(layout, dp, step, speed, seconds, sent, memory)


def estimate(recipe: Recipe, layout: Layout, world: int, gpu: Gpu) -> Estimate:
    """What ``recipe`` costs on ``world`` GPUs in a legal ``layout``; memory and bytes do not depend on ``gpu``."""
    return _Model(_Recipe(recipe), layout, world, gpu).estimate()


# --------------------------------------------------------------------------------------------------------------- search


def layouts(recipe: Recipe, world: int) -> list[Layout]:
    """Every legal layout on ``world`` ranks. Raises :class:`RecipeError` with a sentence when there is none."""

    def divisors(n: int) -> list[int]:
        return [i for i in range(1, n + 1) if n % i == 0]

    def wrong(layout: Layout, ranks: int) -> list[str]:
        train = recipe.train
        return problems(
            recipe.model, layout, ranks, recipe.data.seq_len, train.global_batch_size, train.micro_batch_size
        )

    legal, refused = [], None
    # What is wrong with a tp is so whatever the rest.
    tps = [tp for tp in divisors(world) if not any("tp is" in text for text in wrong(Layout(tp=tp), tp))]
    for tp, cp, pp in itertools.product(tps, divisors(world), divisors(world)):
        stage, left = divmod(world, pp)
        if left or stage % (tp * cp):
            continue
        eps = [ep for ep in divisors(stage) if recipe.model.n_routed_experts % ep == 0]
        if "E" not in recipe.model.layers + recipe.model.mtp_layers:
            eps = [1]
        for ep, sp in itertools.product(eps, (False, True) if tp > 1 else (False,)):
            layout = Layout(tp, pp, ep, cp, sp)
            found = wrong(layout, world)
            if not found:
                legal.append(layout)
            elif refused is None or len(found) < len(refused):
                refused = found
    if not legal:
        raise RecipeError(f"no layout of {world} GPUs is legal: {(refused or ['there are none'])[0]}")
    return legal


def plan(recipe: Recipe, world: int, gpu: Gpu, limit: float) -> list[Estimate]:
    """Every legal layout: those that fit into ``limit`` bytes by speed, then the others by memory."""
    shared = _Recipe(recipe)
    found = [_Model(shared, layout, world, gpu).estimate() for layout in layouts(recipe, world)]
    return sorted(found, key=lambda e: (0, -e.tokens_per_second) if e.total_memory <= limit else (1, e.total_memory))


# -------------------------------------------------------------------------------------------------------------- command

GIB = 2**30


def facts(found: list[Estimate], limit: float) -> list[dict[str, Any]]:
    """What ``plan --json`` prints of each layout."""
    return [
        dataclasses.asdict(each.layout)
        | {name: getattr(each, name) for name in ("dp", "tokens_per_second", "step", "seconds", "sent", "memory")}
        | {"total_memory": each.total_memory, "fits": each.total_memory <= limit}
        for each in found
    ]


def _show(found: list[Estimate], title: str, limit: float) -> None:
    from rich.table import Table

    from nemo_lite.train import metrics

    console = metrics.console()

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("#", *columns):
            made.add_column(column, justify="right", no_wrap=True)
        return made

    speed = table(
        "tp", "sp", "pp", "ep", "cp", "dp", "tok/s", "step s", "math", "memory", "links", "bubble", "GiB", "fits"
    )
    links, memory = table(*KINDS), table(*MEMORY, "all")
    for rank, each in enumerate(found, 1):
        layout = each.layout

        def share(*parts: str, of: Estimate = each) -> str:
            return f"{sum(of.seconds[part] for part in parts) / of.step:.0%}"

        sizes = (layout.tp, "yes" if layout.sp else "", layout.pp, layout.ep, layout.cp, each.dp)
        speed.add_row(
            *(str(size) for size in (rank, *sizes)), f"{each.tokens_per_second:,.0f}", f"{each.step:,.2f}",
            share("products"), share("memory", "optimizer"), share(*KINDS), share("bubble"),
            f"{each.total_memory / GIB:,.1f}", "yes" if each.total_memory <= limit else "no",
        )  # fmt: skip
        links.add_row(str(rank), *(f"{each.sent[k] / GB:,.2f}  {share(k):>4}" if each.sent[k] else "" for k in KINDS))
        memory.add_row(str(rank), *(f"{n / GIB:,.2f}" for n in (*each.memory.values(), each.total_memory)))
    for heading, one in (
        (title, speed),
        ("GB that the busiest rank sends in a step, and the share of the step", links),
        ("GiB of the fullest rank", memory),
    ):
        console.print(heading, style="bold")
        console.print(one)
        console.print()


def main(argv: list[str]) -> int:
    """``nemo-lite plan RECIPE [key=value ...] --gpus N [--gpu NAME] [--memory GIB] [--top N] [--json]``."""
    parser = argparse.ArgumentParser(
        prog="nemo-lite plan",
        description="Legal layouts of a recipe on N GPUs, the fastest first, by a cost model. Nothing is allocated.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe in YAML")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set, such as precision=mxfp8")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", choices=list(GPUS), default="H100", help="which (default H100)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="GiB a rank may use (default the GPU's)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show (default 10)")
    parser.add_argument("--json", action="store_true", help="print the same facts as one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    gpu = GPUS[arguments.gpu]
    for name, value in (("--gpus", arguments.gpus), ("--top", arguments.top), ("--memory", arguments.memory)):
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}, and must be above 0")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.train.dtype != "bfloat16":
        raise RecipeError(
            f"{arguments.recipe}: train.dtype: {recipe.train.dtype} is not planned for; set train.dtype=bfloat16"
        )
    used = {format for three in _Recipe(recipe).formats.values() for format in three}
    if unknown := sorted(used - set(gpu.peak)):
        known = ", ".join(format for format in gpu.peak if format != "fp32")
        raise UserError(
            f"{arguments.gpu} does not multiply in {unknown[0]}, which precision asks for; it does in {known}"
        )
    limit = arguments.memory * GIB if arguments.memory else gpu.memory
    try:
        found = plan(recipe, arguments.gpus, gpu, limit)
    except RecipeError as error:
        raise RecipeError(f"{arguments.recipe}: {error}") from None
    top = found[: arguments.top]
    if arguments.json:
        asked = {"gpu": arguments.gpu, "gpus": arguments.gpus, "memory_limit": limit, "legal": len(found)}
        print(json.dumps(asked | {"layouts": facts(top, limit)}, indent=2))
    else:
        fitting = sum(each.total_memory <= limit for each in found)
        _show(
            top,
            f"{fitting} of {len(found)} legal layouts fit on {arguments.gpus} {arguments.gpu}; tok/s of one GPU",
            limit,
        )
    if found[0].total_memory > limit:
        helps = ["more GPUs"]
        helps += ["train.recompute=full"] if recipe.train.recompute != "full" else []
        helps += ["a smaller train.micro_batch_size"] if recipe.train.micro_batch_size > 1 else []
        raise UserError(
            f"no legal layout fits into {limit / GIB:.1f} GiB; the closest, above, needs "
            f"{found[0].total_memory / GIB:.1f}; {' or '.join(helps)} would help"
        )
    return 0
