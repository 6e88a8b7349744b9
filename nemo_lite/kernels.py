"""``nemo-lite kernels``: the backends of every op, why some cannot be used here, and what a model would take."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from nemo_lite_kernels import OPS, Backend, chosen

from nemo_lite.config import ModelConfig, UserError, load_recipe
from nemo_lite.precision.recipe import formats


def wanted(text: str | None, device: str | torch.device = "cpu") -> dict[str, str]:
    """``op=name[,op=name]`` of a command line as a dict; UserError, one sentence, for what cannot be used."""
    if text is None:
        return {}
    found: dict[str, str] = {}
    for part in text.split(","):
        op, equals, name = (piece.strip() for piece in part.partition("="))
        if not (op and equals and name):
            raise UserError(f"--kernels {text}: {part!r} is not op=name, such as ssd=chunked")
        if found.setdefault(op, name) != name:
            raise UserError(f"--kernels {text}: {op} is given twice")
    _choices(found, device)
    return found


def _choices(asked: dict[str, str], device: str | torch.device):
    try:
        return list(chosen(device, asked))
    except ValueError as error:
        raise UserError(str(error)) from None


# ------------------------------------------------------------------------------------------------------------ the facts


def cpu_facts() -> dict[str, str]:
    """torch's bfloat16; the C++ kernels: instruction sets, compiler, where the library lies, AMX."""
    from nemo_lite_kernels import cpu
    from nemo_lite_kernels.common import multiplies_bfloat16

    levels = ", ".join(cpu.levels())
    widened = not multiplies_bfloat16()
    bf16 = {"bfloat16": "torch has no product for it here: multiplied in float32" if widened else "multiplied by torch"}
    if (reason := cpu.reason()) is not None:
        return bf16 | {"instruction sets": levels, "C++ kernels": f"not used: {reason}"}
    from nemo_lite_kernels.cpu.dense import available

    library = Path(cpu.lib()._name)
    return bf16 | {
        "instruction sets": f"{library.name.split('-')[0]} is used, of {levels}",
        "AMX": "used for products in bfloat16" if available() else "not used: this CPU or its system does not offer it",
        "compiler": cpu._run([*cpu._compiler(), "--version"]).splitlines()[0],
        "library": str(library).replace(str(Path.home()), "~", 1),
        "threads": str(torch.get_num_threads()),
    }


def unused(op: str, config: ModelConfig, quantised: bool = False) -> str | None:
    """Why a model does not use an op, or None."""
    letters, shared = config.layers + config.mtp_layers, config.n_shared_experts > 0
    if op in ("ssd", "conv") and "M" not in letters:
        return "the model has no Mamba-2 layer"
    if op == "attention" and "*" not in letters:
        return "the model has no attention layer"
    if op in ("experts", "router") and "E" not in letters:
        return "the model has no MoE layer"
    if op == "quant" and not quantised:
        return "no linear has a number format of its own"
    if op == "activation" and "-" not in letters and not (shared and "E" in letters):
        return "the model has no MLP and no shared expert"
    return None


def _refused(backend: Backend, dtype: torch.dtype, training: bool) -> str:
    """What of this work a backend does not take; empty where it takes all."""
    narrow = [] if dtype in backend.dtypes else [str(dtype).removeprefix("torch.")]
    return ", ".join(narrow + ["gradients"] * (training and not backend.gradient))


def used(op: str, why: str, chain: list[str], dtype: torch.dtype, training: bool) -> tuple[str, str]:
    """The backend that computes in this dtype, and why."""
    if op == "router":  # it reads logits in float32 or better
        dtype = torch.promote_types(dtype, torch.float32)
    reasons = []
    for name in chain:
        missing = _refused(OPS[op][name], dtype, training)
        if not missing:
            return name, f"{'; '.join(reasons)}; next in the table that does" if reasons else why
        reasons.append(f"{name} does not take {missing}")
    return "none", "; ".join(reasons)


# -------------------------------------------------------------------------------------------------------------- command


def _target(path: str) -> tuple[ModelConfig, torch.dtype, bool, dict[str, str], bool]:
    """The config, computing dtype, whether it is trained, backends asked for, and whether linears have number formats:
    of a MODEL_DIR or a recipe."""
    if not Path(path).is_dir():
        recipe = load_recipe(path)
        quantised = any(not gemms.plain for gemms in formats(recipe.model, recipe.precision).values())
        return recipe.model, getattr(torch, recipe.train.dtype), True, dict(vars(recipe.kernels)), quantised
    from nemo_lite.model.hf import TensorFiles, load_config

    config, files = load_config(path), TensorFiles(Path(path))
    dtypes = [files.dtype(name) for name in files.names() if "embed" in name]
    return config, dtypes[0] if dtypes else torch.float32, False, {}, False


def _show(target: str | None, device: str, asked: dict[str, str]) -> None:
    from rich.table import Table

    from nemo_lite.train import metrics

    console = metrics.console()

    def table(title: str, *columns: str) -> Table:
        console.print(title, style="bold")
        made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=any(columns))
        for i, column in enumerate(columns):
            made.add_column(column, no_wrap=i < 2, overflow="fold")
        return made

    config, dtype, training, quantised = None, torch.float32, False, False
    if target is not None:
        config, dtype, training, own, quantised = _target(target)
        asked = own | asked
    choices = _choices(asked, device)

    if device == "cpu":
        facts = table("This CPU", "", "")
        for name, value in cpu_facts().items():
            facts.add_row(name, value)
        console.print(facts)
        console.print()

    backends = table(f"Backends on {device}", "op", "backend", "here", "does not take")
    for op, row in OPS.items():
        for i, (name, backend) in enumerate(row.items()):
            reason = backend.refusal(device)
            limits = "" if reason == f"runs on {' and '.join(backend.devices)} only" else ", ".join(backend.limits)
            backends.add_row("" if i else op, name, reason or "available", limits)
    console.print(backends)
    console.print()

    work = f"{'training' if training else 'inference'} in {str(dtype).removeprefix('torch.')}"
    uses = table(f"What {target or 'a model'} would use on {device} ({work})", "op", "backend", "why")
    for op, _, why, chain, _ in choices:
        if config is not None and (reason := unused(op, config, quantised)) is not None:
            uses.add_row(op, "", reason)
        else:
            uses.add_row(op, *used(op, why, chain, dtype, training))
    console.print(uses)


def main(argv: list[str]) -> int:
    """`nemo-lite kernels [MODEL_DIR|RECIPE]`."""
    parser = argparse.ArgumentParser(
        prog="nemo-lite kernels",
        description="The backends of every op: which can be used here, or why not, and which a model would take. A "
        "recipe takes one by name with kernels.OP: NAME, the other commands with --kernels.",
    )
    parser.add_argument("target", metavar="MODEL_DIR|RECIPE", nargs="?", help="what is to run (default: any model)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--kernels", metavar="OP=NAME[,...]", help="backends asked for by name")
    args = parser.parse_args(argv)
    _show(args.target, args.device, wanted(args.kernels, args.device))
    return 0
