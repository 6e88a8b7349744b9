"""Which number format each product of each linear takes: named presets, and rules on top of them.

    precision: nemotron3_super_nvfp4              # a preset
    precision:
      preset: nvfp4
      rules:                                      # the first that matches a linear's name decides; then the preset
        - {match: "*.out_proj", format: mxfp8}
        - {match: "layers.0.*", format: nvfp4, wgrad: bf16}

Names are those of the model's parts: layers.3.mixer.in_proj, layers.4.mixer.experts, mtp.eh_proj. `bf16` stands for
train.dtype. The embedding, the output head and the convolution stay in train.dtype, the router in float32.

nemotron3_super_nvfp4 is the published recipe: everything in NVFP4 except the last 15 % of the layers, attention, latent
projections and the MTP block (bf16), and Mamba-2's out_proj (MXFP8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_lite.config import ModelConfig, PrecisionConfig

GEMMS = ("fprop", "dgrad", "wgrad")
# Name -> (share of the last layers left in bf16, rules).
PRESETS: dict[str, tuple[float, tuple[tuple[str, str], ...]]] = {
    "bf16": (0.0, (("*", "bf16"),)),
    "fp8": (0.0, (("*", "fp8"),)),
    "fp8_block": (0.0, (("*", "fp8_block"),)),
    "mxfp8": (0.0, (("*", "mxfp8"),)),
    "nvfp4": (0.0, (("*", "nvfp4"),)),
    "nemotron3_super_nvfp4": (
        0.15,
        (
            ("mtp.*", "bf16"),
            ("*.[qkvo]_proj", "bf16"),
            ("*.fc[12]_latent_proj", "bf16"),
            ("*.out_proj", "mxfp8"),
            ("*", "nvfp4"),
        ),
    ),
}


@dataclass(frozen=True)
class Gemms:
    """The number format of each of a linear's products, and what NVFP4 does on top of them.

    hadamard     transform both operands of wgrad
    stochastic   round gradients stochastically
    square       weights in blocks of 16x16, not 1x16
    """

    fprop: str = "bf16"
    dgrad: str = "bf16"
    wgrad: str = "bf16"
    hadamard: bool = True
    stochastic: bool = True
    square: bool = True

    @property
    def plain(self) -> bool:
        return self.fprop == self.dgrad == self.wgrad == "bf16"


@dataclass(frozen=True)
class Part:
    """A linear, or a layer's routed experts: its weights, those one token multiplies with, and how often it does.

    n_in, n_out   sizes of a linear, or of an expert's first product (its second has them the other way round)
    layer         its place in the trunk; None in the MTP block and for what is in no layer
    fixed         the format that no rule changes, or None
    """

    name: str
    n_in: int
    n_out: int
    weights: int
    used: int
    runs: int = 1
    layer: int | None = None
    fixed: str | None = None


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every product of the model, by name, in order."""
    H = config.hidden_size

    def linear(name: str, n_in: int, n_out: int, runs: int, layer: int | None, fixed=None) -> Part:
        return Part(name, n_in, n_out, n_in * n_out, n_in * n_out, runs, layer, fixed)

    def mixer(letter: str, name: str, runs: int, layer: int | None) -> Iterator[Part]:
        if letter == "M":
            inner = config.mamba_inner
            wide = 2 * inner + 2 * config.mamba_groups_state + config.mamba_num_heads
            yield linear(f"{name}.in_proj", H, wide, runs, layer)
            yield linear(f"{name}.out_proj", inner, H, runs, layer)
        elif letter == "*":
            q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
            for leaf, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                yield linear(f"{name}.{leaf}", H, size, runs, layer)
            yield linear(f"{name}.o_proj", q, H, runs, layer)
        elif letter == "-":
            yield linear(f"{name}.up_proj", H, config.intermediate_size, runs, layer)
            yield linear(f"{name}.down_proj", config.intermediate_size, H, runs, layer)
        else:
            yield linear(f"{name}.gate", H, config.n_routed_experts, runs, layer, "fp32")
            n_in, n_out = config.expert_size, config.moe_intermediate_size
            one = 2 * n_in * n_out
            count, chosen = config.n_routed_experts, config.num_experts_per_tok
            if config.moe_latent_size:
                yield linear(f"{name}.fc1_latent_proj", H, config.moe_latent_size, runs, layer)
            yield Part(f"{name}.experts", n_in, n_out, count * one, chosen * one, runs, layer)
            if config.moe_latent_size:
                yield linear(f"{name}.fc2_latent_proj", config.moe_latent_size, H, runs, layer)
            if config.n_shared_experts:
                for leaf in ("up_proj", "down_proj"):
                    size = config.moe_shared_expert_intermediate_size
                    yield linear(f"{name}.shared_experts.{leaf}", H, size, runs, layer)

    depth = config.mtp.depth if config.mtp_layers else 0
    for i, letter in enumerate(config.layers):
        yield from mixer(letter, f"layers.{i}.mixer", 1, i)
    yield linear("lm_head", H, config.vocab_size, 1 + depth, None, "bf16")
    if depth:
        yield linear("mtp.eh_proj", 2 * H, H, depth, None)
        for i, letter in enumerate(config.mtp_layers):
            yield from mixer(letter, f"mtp.layers.{i}.mixer", depth, None)


def formats(config: ModelConfig, precision: PrecisionConfig) -> dict[str, Gemms]:
    """The formats of every linear's three products, by name; what is fixed is left out."""
    tail, preset = PRESETS[precision.preset]
    if precision.tail is not None:
        tail = precision.tail
    last = len(config.layers) - tail_layers(len(config.layers), tail)
    found = {}
    for part in parts(config):
        if part.fixed:
            continue
        rule = next((rule for rule in precision.rules if fnmatchcase(part.name, rule.match)), None)
        if rule is not None:
            fprop, dgrad, wgrad = (getattr(rule, gemm) or rule.format for gemm in GEMMS)
        elif part.layer is not None and part.layer >= last:
            fprop = dgrad = wgrad = "bf16"
        else:
            fprop = dgrad = wgrad = next(format for pattern, format in preset if fnmatchcase(part.name, pattern))
        found[part.name] = Gemms(
            fprop, dgrad, wgrad, precision.hadamard, precision.stochastic_rounding, precision.square_weight_blocks
        )
    return found


def tail_layers(layers: int, share: float) -> int:
    """How many of the last layers a share of them is, rounded up."""
    return math.ceil(round(layers * share, 6))


def problems(config: ModelConfig, precision: PrecisionConfig, dtype: str) -> Iterator[tuple[str, str]]:
    """Rules that do nothing, or everything, as (key, sentence)."""
    names = [part.name for part in parts(config) if not part.fixed]
    fixed = {part.name: part.fixed for part in parts(config) if part.fixed}
    left = set(names)
    for i, rule in enumerate(precision.rules):
        where, hits = f"precision.rules[{i}].match", {name for name in names if fnmatchcase(name, rule.match)}
        if not hits:
            held = next((name for name in fixed if fnmatchcase(name, rule.match)), None)
            if held is not None:
                stays = {"fp32": "float32", "bf16": "train.dtype"}[fixed[held]]
                yield where, f"{rule.match!r} matches {held} only, which stays in {stays}"
            else:
                yield where, f"{rule.match!r} matches no linear; names are such as {', '.join(_examples(names))}"
        elif len(hits) == len(names):
            same = all(getattr(rule, gemm) in (None, rule.format) for gemm in GEMMS)
            right = f"say precision.preset: {rule.format} instead" if same else "only a preset may"
            yield where, f"{rule.match!r} matches every linear; {right}"
        elif not hits & left:
            yield where, f"{rule.match!r} matches only what the rules above it have taken; move it up or remove it"
        left -= hits
    used = {getattr(g, gemm) for g in formats(config, precision).values() for gemm in GEMMS}
    for name in ("hadamard", "stochastic_rounding", "square_weight_blocks"):
        if not getattr(precision, name) and "nvfp4" not in used:
            yield f"precision.{name}", "false changes nothing: no product is in nvfp4"
    if dtype == "float64" and used - {"bf16"}:
        yield "precision.preset", "number formats are made from float32 or bfloat16, and train.dtype is float64"


def _examples(names: list[str]) -> list[str]:
    seen: dict[str, str] = {}
    for name in names:
        seen.setdefault(name.rsplit(".", 1)[1], name)
    return list(seen.values())[:4]


# ------------------------------------------------------------------------------------------------- what `check` prints


@dataclass
class Line:
    """Linears of one kind with the same formats: their names with the layers' numbers drawn together."""

    names: str
    format: str
    count: int
    weights: int
    flops: int


def label(gemms: Gemms) -> str:
    """The formats of the three products, or the one of all."""
    three = (gemms.fprop, gemms.dgrad, gemms.wgrad)
    return three[0] if len(set(three)) == 1 else " / ".join(three)


def table(config: ModelConfig, precision: PrecisionConfig) -> list[tuple[Part, str]]:
    """Every product of the model with its format, the embedding left out (it multiplies nothing)."""
    by_name = formats(config, precision)
    return [(part, part.fixed or label(by_name[part.name])) for part in parts(config)]


def lines(config: ModelConfig, precision: PrecisionConfig) -> list[Line]:
    """`table` with layers that do the same drawn together."""
    found: dict[tuple[str, str], tuple[list[int], Line]] = {}
    everywhere: dict[str, list[int]] = {}
    for part, format in table(config, precision):
        pieces = part.name.split(".")
        number = next((i for i, piece in enumerate(pieces) if piece.isdecimal()), None)
        where = int(pieces[number]) if number is not None else None
        if number is not None:
            pieces[number] = "#"
        key = (".".join(pieces), format)
        numbers, line = found.setdefault(key, ([], Line(key[0], format, 0, 0, 0)))
        if where is not None:
            numbers.append(where)
            everywhere.setdefault(key[0], []).append(where)
        line.count += 1
        line.weights += part.weights
        line.flops += 2 * part.used * part.runs
    for (names, _), (numbers, line) in found.items():
        if numbers:
            line.names = names.replace("#", ranges(numbers, everywhere[names]))
    return [line for _, line in found.values()]


def ranges(numbers: list[int], among: list[int] | None = None) -> str:
    """3 for [3]; {0,2,4..6} for several. `among`: what there is at all, such as the layers that have this linear; what
    stands between two of those does not part them."""
    place = {n: i for i, n in enumerate(among)} if among is not None else None
    runs: list[list[int]] = []
    for n in numbers:
        before = runs[-1][1] if runs else None
        if before is not None and (n == before + 1 if place is None else place[n] == place[before] + 1):
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    return words[0] if len(numbers) == 1 else "{" + ",".join(words) + "}"


def shares(config: ModelConfig, precision: PrecisionConfig) -> dict[str, dict[str, float]]:
    """Format -> its share of the `weights` that are multiplied with, and of their `flops` for a token in training."""
    sums: dict[str, list[int]] = {}
    for line in lines(config, precision):
        total = sums.setdefault(line.format, [0, 0])
        total[0] += line.weights
        total[1] += line.flops
    weights, flops = (sum(column) for column in zip(*sums.values()))
    return {format: {"weights": w / weights, "flops": f / flops} for format, (w, f) in sums.items()}
