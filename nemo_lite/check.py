"""``nemo-lite check``: a recipe resolved, and what it asks for: parameters, FLOPs per token, memory a rank needs.

Everything is counted from the shapes, so that a 120 B recipe is checked in a moment on a laptop.

FLOPs of one token, forward (a multiply and an add are two):

- every matrix product: 2 x active weights (chosen experts only; the embedding lookup is free);
- convolution: 2 x channels x width;
- attention, causal: 2 products x 2 x heads x head_dim x seq_len / 2;
- SSD scan, chunks of c: 2 G c N (scores, per group) + 2 H c P (scores times x) + 4 H P N (state in, state out);
- MTP: each of the `depth` runs costs its projection, its block and the output head once more.

Training counts three times the forward: the backward makes two products for each one. Recomputation is not counted,
so that a share of peak computed from these figures is of useful work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any

from nemo_lite.config import ModelConfig, Recipe, RecipeError, UserError, check_world_size, load_recipe, recipe_to_yaml
from nemo_lite.precision.recipe import lines, shares
from nemo_lite.precision.recipe import table as number_formats

KINDS = {"M": "Mamba-2", "*": "attention", "E": "MoE", "-": "MLP"}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


# ----------------------------------------------------------------------------------------------------------- parameters


def layer_parameters(config: ModelConfig, kind: str) -> dict[str, int]:
    """``total``, ``active`` (chosen experts only) and ``matmul`` (active weights in matrix products) of one layer.

    The pre-norm is counted with its layer; so is the expert bias, a buffer that checkpoints hold.
    """
    H = config.hidden_size
    vectors, matmul, idle = H, 0, 0  # the pre-norm; `idle`: weights of the experts a token does not choose
    if kind == "M":
        inner, channels = config.mamba_inner, config.mamba_inner + 2 * config.mamba_groups_state
        matmul = H * (inner + channels + config.mamba_num_heads) + inner * H
        vectors += channels * (config.conv_kernel + 1) + 3 * config.mamba_num_heads + inner
    elif kind == "*":
        matmul = 2 * H * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    elif kind == "E":
        expert = 2 * config.expert_size * config.moe_intermediate_size
        latent = 2 * H * config.moe_latent_size if config.moe_latent_size else 0
        shared = 2 * H * config.moe_shared_expert_intermediate_size * config.n_shared_experts
        matmul = config.n_routed_experts * H + latent + shared + config.num_experts_per_tok * expert
        idle = (config.n_routed_experts - config.num_experts_per_tok) * expert
        vectors += config.n_routed_experts
    else:
        matmul = 2 * H * config.intermediate_size
    return {"total": matmul + vectors + idle, "active": matmul + vectors, "matmul": matmul}


def parameter_counts(config: ModelConfig) -> dict[str, Any]:
    """Exact parameter counts from the shapes.

    ``total`` and the three ``active...`` are the trunk's: all its matrices, embedding and head included; what one token
    uses, counting the whole embedding matrix, only the head, or neither. ``mtp`` stands apart (``total``, ``active`` of
    one run; embedding and head are the trunk's). A tied head is counted once, as the head.
    """
    table = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else table

    def layers(letters: str) -> dict[str, dict[str, int]]:
        found = {}
        for kind in KINDS:
            if count := letters.count(kind):
                one = layer_parameters(config, kind)
                found[kind] = {"layers": count} | {name: count * one[name] for name in ("total", "active")}
        return found

    trunk, block = layers(config.layers), layers(config.mtp_layers)
    used = sum(part["active"] for part in trunk.values()) + config.hidden_size
    total = embedding + sum(part["total"] for part in trunk.values()) + config.hidden_size + table
    mtp = {"total": 0, "active": 0, "projection_and_norms": 0, "layers": block}
    if block:
        # eh_proj, and the norms enorm, hnorm and final_layernorm
        mtp["projection_and_norms"] = around = 2 * config.hidden_size**2 + 3 * config.hidden_size
        for name in ("total", "active"):
            mtp[name] = around + sum(part[name] for part in block.values())
    return {
        "embedding": embedding,
        "layers": trunk,
        "final_norm": config.hidden_size,
        "head": table,
        "total": total,
        "active": used + embedding + table,
        "active_without_embedding": used + table,
        "active_layers_only": used,
        "mtp": mtp,
        "total_with_mtp": total + mtp["total"],
    }


# ---------------------------------------------------------------------------------------------------------------- FLOPs


def layer_flops(config: ModelConfig, kind: str, seq_len: int) -> int:
    """FLOPs of one token in one layer, forward, in a row of ``seq_len``; see the top."""
    flops = 2 * layer_parameters(config, kind)["matmul"]
    if kind == "M":
        H, P, N, G = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, config.n_groups
        c = min(config.chunk_size, seq_len)
        flops += 2 * (config.mamba_inner + 2 * config.mamba_groups_state) * config.conv_kernel
        flops += 2 * G * c * N + 2 * H * c * P + 4 * H * P * N
    elif kind == "*":
        flops += 2 * config.num_attention_heads * config.head_dim * seq_len
    return flops


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """FLOPs of one token in a row of ``seq_len``: ``parts`` (forward, by part), ``forward``, ``train``; see the top.

    ``forward`` is the trunk and its head; ``train`` is 3 x (forward + all MTP runs).
    """
    parts = {
        KINDS[kind]: config.layers.count(kind) * layer_flops(config, kind, seq_len)
        for kind in KINDS
        if kind in config.layers
    }
    parts["head"] = head = 2 * config.vocab_size * config.hidden_size
    forward, mtp = sum(parts.values()), 0
    if config.mtp_layers:
        block = sum(layer_flops(config, kind, seq_len) for kind in config.mtp_layers)
        mtp = config.mtp.depth * (4 * config.hidden_size**2 + block + head)
    return {"parts": parts, "forward": forward, "mtp": mtp, "train": 3 * (forward + mtp)}


# --------------------------------------------------------------------------------------------------------------- memory


def _layer_activations(config: ModelConfig, kind: str, seq_len: int, width: int) -> int:
    """Bytes one token leaves for a layer's backward: ``width`` a number, 4 or more where the layer computes in fp32."""
    full = max(4, width)
    kept = 2 * width * config.hidden_size  # the residual stream before the norm, and the normed input
    if kind == "M":
        H, P, N, G = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, config.n_groups
        inner, channels, c = config.mamba_inner, config.mamba_inner + 2 * G * N, min(config.chunk_size, seq_len)
        kept += width * (inner + 2 * channels + H)  # z, the convolution's input and output, dt
        kept += full * (channels + G * c + 2 * H * c + 2 * H * P * N // c)  # the scan's inputs, scores, decays, states
        kept += full * inner + 2 * width * inner  # y, gated and normed
    elif kind == "*":
        kept += (
            2 * width * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        )  # q, k, v, output
    elif kind == "E":
        each = 2 * config.expert_size + 2 * config.moe_intermediate_size  # in, hidden, its square, out
        kept += full * 3 * config.n_routed_experts + width * config.num_experts_per_tok * each
        kept += width * (2 * config.moe_latent_size if config.moe_latent_size else 0)
        kept += width * 2 * config.moe_shared_expert_intermediate_size * config.n_shared_experts
    else:
        kept += width * 2 * config.intermediate_size
    return kept


def _megatron(recipe: Recipe, world_size: int):
    """The planner's estimate of a recipe's own layout; memory and bytes are the same on any GPU."""
    from nemo_lite.parallel.layout import layout_of
    from nemo_lite.plan import GPUS, estimate

    return estimate(recipe, layout_of(recipe), world_size, GPUS["GB300"])


def communication_per_step(recipe: Recipe, world_size: int) -> dict[str, float]:
    """Bytes that the busiest rank sends in a step by what the ranks share; the megatron engine's only."""
    if not recipe.parallel.uses_megatron:
        return {}
    return {kind: size for kind, size in _megatron(recipe, world_size).sent.items() if size}


def memory_per_rank(recipe: Recipe, world_size: int = 1) -> dict[str, int]:
    """Bytes one of ``world_size`` ranks needs, by part, and their ``total``; of the megatron engine's, the fullest.

    Exact: ``weights``, ``gradients`` and ``optimizer`` (two AdamW moments), each parameters / world_size in float32
    (float64 where train.dtype is). Estimates: ``gathered``, what FSDP2 holds whole (two of the largest layers, or the
    model without reshard_after_forward, in train.dtype; nothing on one rank in full precision);
    ``activations``, tokens of a micro batch x bytes a layer keeps for its backward (of what is recomputed, each layer's
    input and the largest layer); ``logits``, one chunk of the loss with its gradient in float32.
    """
    if recipe.parallel.uses_megatron:
        memory = _megatron(recipe, world_size).memory
        return memory | {"total": sum(memory.values())}
    config, train = recipe.model, recipe.train
    counts, width = parameter_counts(config), _BYTES[train.dtype]
    master = max(4, width)
    mine = -(-counts["total_with_mtp"] // world_size)
    letters = config.layers + config.mtp_layers
    gathered = 0
    if world_size > 1 or width < master:
        layers = sorted(layer_parameters(config, kind)["total"] for kind in letters)
        held = sum(layers[-2:]) if recipe.parallel.reshard_after_forward else counts["total_with_mtp"]
        gathered = width * held
    tokens = train.micro_batch_size * recipe.data.seq_len
    runs = config.layers + config.mtp_layers * config.mtp.depth
    each = {kind: _layer_activations(config, kind, recipe.data.seq_len, width) for kind in set(runs)}
    again = [kind for kind in runs if kind in train.recomputed]
    kept = sum(each[kind] for kind in runs if kind not in train.recomputed)
    kept += len(again) * width * config.hidden_size + max((each[kind] for kind in again), default=0)
    depths = config.mtp.depth if config.mtp_layers else 0
    kept += width * config.hidden_size * (2 + 5 * depths)  # final norm; enorm, hnorm, their concatenation, final norm
    memory = {
        "weights": mine * master,
        "gradients": mine * master,
        "optimizer": 2 * mine * master,
        "gathered": gathered,
        "activations": tokens * kept,
        "logits": 2 * max(4, width) * min(train.loss_chunk, tokens) * config.vocab_size,
    }
    return memory | {"total": sum(memory.values())}


# -------------------------------------------------------------------------------------------------------------- command


def facts(recipe: Recipe, world_size: int = 1) -> dict[str, Any]:
    """What ``check --json`` prints: ``recipe``, ``parameters``, ``flops_per_token``, ``memory``, ``communication``,
    ``precision``, ``world_size``, ``tokens_per_step``, ``mixture``."""
    return {
        "recipe": _plain(dataclasses.asdict(recipe)),
        "parameters": parameter_counts(recipe.model),
        "flops_per_token": flops_per_token(recipe.model, recipe.data.seq_len),
        "memory": memory_per_rank(recipe, world_size),
        "communication": communication_per_step(recipe, world_size),
        "precision": {
            "linears": {part.name: format for part, format in number_formats(recipe.model, recipe.precision)},
            "shares": shares(recipe.model, recipe.precision),
        },
        "world_size": world_size,
        "tokens_per_step": recipe.tokens_per_step,
        "mixture": [dataclasses.asdict(phase) for phase in mixture(recipe)[0]],
    }


def mixture(recipe: Recipe) -> tuple[list[Any], list[str]]:
    """What the run will read by phase and source, and warnings about it. Sources are not tokenised for it: the size of
    one that is not here, or was never tokenised, is not known."""
    from nemo_lite.data import load_tokenizer, mixture

    found = mixture.mixture_of(recipe.data, recipe.run_tokens)
    try:
        from nemo_lite.data.sources import known_tokens

        tokenizer = load_tokenizer(recipe.data.tokenizer)
        holds = [known_tokens(source, recipe.data, tokenizer) for source in found.sources]
    except UserError:  # its tokenizer is not here
        holds = [None] * len(found.sources)
    phases = mixture.expected(found, holds, recipe.run_tokens)
    return phases, [*mixture.warnings(phases), *mixture.budget_warnings(recipe.data, recipe.run_tokens)]


def _plain(value: Any) -> Any:
    """A tree as strict JSON can hold it: infinity as the word."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def short(count: float, units: tuple[str, ...] = ("", "K", "M", "G", "T")) -> str:
    """A number with two decimals and a unit, e.g. ``12.23 B``."""
    step = 0
    while abs(count) >= 1000 and step < len(units) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.2f} {units[step]}" if step else f"{count:.0f}"


_COUNT = ("", "K", "M", "B", "T")


_SENT = {
    "tp": "tokens and sums between the ranks of a layer",
    "ep": "tokens to their experts and back, in latent space",
    "cp": "keys, values and states of a row",
    "pp": "hidden states to the next stage and back",
    "dp": "gradients and weights",
}


def _show(recipe: Recipe, world_size: int) -> None:
    from rich.table import Table

    from nemo_lite.train import metrics

    console = metrics.console()
    counts = parameter_counts(recipe.model)
    flops = flops_per_token(recipe.model, recipe.data.seq_len)
    memory = memory_per_rank(recipe, world_size)
    mtp = counts["mtp"]

    def table(title: str, *columns: str, notes: bool = False) -> Table:
        made = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 3, 0, 0),
            show_header=any(columns),
        )
        for i, column in enumerate(columns):
            left = i == 0 or (notes and i == len(columns) - 1)
            made.add_column(column, justify="left" if left else "right", no_wrap=True)
        return made

    def exact(count: int) -> str:
        return f"{count:,}"

    print(recipe_to_yaml(recipe))
    parts = table("Parameters by part", "", "layers", "total", "active", "")
    parts.add_row(
        "embedding", "", exact(counts["embedding"]), exact(counts["embedding"]), short(counts["embedding"], _COUNT)
    )
    for kind, part in counts["layers"].items():
        parts.add_row(
            f"{kind}  {KINDS[kind]}",
            str(part["layers"]),
            exact(part["total"]),
            exact(part["active"]),
            short(part["total"], _COUNT),
        )
    parts.add_row("final norm", "", exact(counts["final_norm"]), exact(counts["final_norm"]), "")
    parts.add_row("head", "", exact(counts["head"]), exact(counts["head"]), short(counts["head"], _COUNT))
    if mtp["total"]:
        block = recipe.model.mtp.pattern
        parts.add_row(f"MTP block {block}", "", exact(mtp["total"]), exact(mtp["active"]), short(mtp["total"], _COUNT))
    console.print(parts)
    console.print()

    sums = table("Parameters in all", "", "", "")
    rows = [
        ("trunk, total", counts["total"]),
        ("trunk, active, embedding and head counted", counts["active"]),
        ("trunk, active, head counted", counts["active_without_embedding"]),
        ("trunk, active, layers only", counts["active_layers_only"]),
    ]
    if mtp["total"]:
        rows += [("MTP apart, total", mtp["total"]), ("MTP apart, active, each run", mtp["active"])]
    for name, count in rows:
        sums.add_row(name, exact(count), short(count, _COUNT))
    console.print(sums)
    console.print()

    work = table(f"FLOPs of a token, rows of {recipe.data.seq_len}", "", "", "")
    for name, count in flops["parts"].items():
        work.add_row(f"forward, {name}", short(count), f"{count / flops['forward']:.0%}")
    work.add_row("forward", short(flops["forward"]), "")
    if flops["mtp"]:
        work.add_row(f"forward, MTP run {recipe.model.mtp.depth} times", short(flops["mtp"]), "")
    work.add_row("training, 3 x forward and MTP", short(flops["train"]), "")
    work.add_row(
        f"training, a step of {exact(recipe.tokens_per_step)} tokens",
        short(flops["train"] * recipe.tokens_per_step, ("", "K", "M", "G", "T", "P", "E")),
        "",
    )
    console.print(work)
    console.print()

    _show_mixture(recipe, table, console)
    _show_formats(recipe, table, console)
    ranks = "the only rank" if world_size == 1 else f"each of {world_size} ranks"
    if recipe.parallel.uses_megatron:
        ranks = f"the fullest of {world_size}"
    needs = table(f"Memory of {ranks}", "", "GiB", "", notes=True)
    notes = {
        "weights": "master copy, sharded",
        "gradients": "sharded",
        "optimizer": "two AdamW moments, sharded",
        "gathered": f"layers whole in {recipe.train.dtype}, estimate",
        "activations": f"{recipe.train.micro_batch_size} x {recipe.data.seq_len} tokens, estimate",
        "logits": "one chunk of the loss, estimate",
        "total": "",
    }
    for name, size in memory.items():
        note = "estimate" if recipe.parallel.uses_megatron and name != "total" else notes.get(name, "")
        needs.add_row(name, f"{size / 2**30:,.3f}", note)
    console.print(needs)
    if sent := communication_per_step(recipe, world_size):
        console.print()
        bytes_ = table("Sent by the busiest rank in a step", "", "GiB", "", notes=True)
        for kind, size in sent.items():
            bytes_.add_row(kind, f"{size / 2**30:,.3f}", _SENT[kind])
        console.print(bytes_)


def _show_mixture(recipe: Recipe, table, console) -> None:
    from nemo_lite.data.mixture import table as rows

    phases, warnings = mixture(recipe)
    header, *body = rows(phases)
    made = table(f"Data of {recipe.run_tokens:,} tokens", *header)
    made.columns[1].justify, made.columns[1].no_wrap, made.columns[1].overflow = "left", False, "fold"
    for row in body:
        made.add_row(*row)
    console.print(made)
    for warning in warnings:
        console.print(f"warning: {warning}")
    console.print()


def _show_formats(recipe: Recipe, table, console) -> None:
    found = lines(recipe.model, recipe.precision)
    weights, flops = sum(line.weights for line in found), sum(line.flops for line in found)
    made = table(
        "Number formats of the products (bf16 is train.dtype)", "", "", "weights", "FLOPs", "format", notes=True
    )
    made.columns[-1].no_wrap, made.columns[-1].overflow = False, "fold"
    for line in found:
        made.add_row(
            line.names, str(line.count), f"{line.weights / weights:.1%}", f"{line.flops / flops:.1%}", line.format
        )
    made.add_section()
    for format, share in shares(recipe.model, recipe.precision).items():
        made.add_row("all", "", f"{share['weights']:.1%}", f"{share['flops']:.1%}", format)
    console.print(made)
    console.print()


def main(argv: list[str]) -> int:
    """``nemo-lite check RECIPE [key=value ...] [--json] [--world-size N]``."""
    parser = argparse.ArgumentParser(
        prog="nemo-lite check",
        description="Resolve a recipe and print it with its parameters, FLOPs per token and the memory a rank needs. "
        "Nothing is allocated.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe in YAML")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to set, such as train.steps=100")
    parser.add_argument("--json", action="store_true", help="print the same facts as one JSON object")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks that share the work (default: as few as the layout takes)"
    )
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.stage.command is not None:
        stage = dataclasses.asdict(recipe.stage)
        print(json.dumps({"stage": stage}, indent=2) if arguments.json else f"a stage that runs: {stage['command']}")
        return 0
    if arguments.world_size is None:
        from nemo_lite.parallel.layout import layout_of

        arguments.world_size = layout_of(recipe).least_world if recipe.parallel.uses_megatron else 1
    try:
        check_world_size(recipe, arguments.world_size)
    except RecipeError as error:
        raise RecipeError(f"{arguments.recipe}: {error}") from None
    if arguments.json:
        print(json.dumps(facts(recipe, arguments.world_size), indent=2))
    else:
        _show(recipe, arguments.world_size)
    return 0
