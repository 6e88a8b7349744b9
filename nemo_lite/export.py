"""From a training run to a MODEL_DIR."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_lite.config import UserError, load_recipe


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(RUN_DIR, checkpoint folder) for a RUN_DIR (its newest whole checkpoint) or one checkpoint of it."""
    from nemo_lite.train.checkpoint import damage, newest_whole, step_of

    if step_of(path) >= 0 and path.parent.name == "checkpoints":
        if not path.is_dir():
            raise UserError(f"{path} does not exist")
        if problem := damage(path):
            raise UserError(f"checkpoint {path} is damaged: {problem}")
        return path.parent.parent, path
    if not (path / "recipe.yaml").exists():
        raise UserError(
            f"{path} is neither a RUN_DIR (it has no recipe.yaml) nor a checkpoint RUN_DIR/checkpoints/step_N"
        )
    folder = newest_whole(path, print)
    if folder is None:
        raise UserError(f"{path} has no whole checkpoint to export")
    return path, folder


def refuse_to_replace(target: Path) -> None:
    """UserError where `target` is something else than a MODEL_DIR or an empty folder."""
    if target.exists() and not (target / "config.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is no MODEL_DIR; it is left as it is")


@contextmanager
def new_model_dir(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes the MODEL_DIR `target`: whole or not at all; in another's place."""
    refuse_to_replace(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(
    source: Path, target: Path, dtype: str | None = None, format: str | None = None, calibration_rows: int = 8,
    reader: str | None = None,
) -> dict:  # fmt: skip
    """Write the MODEL_DIR `target` from a run or checkpoint; facts about it. The target appears whole or not at all.

    format             "nvfp4" or "fp8": linears that were trained in it are written in it, the others in `dtype` (then
                       bfloat16 by default)
    calibration_rows   rows of the run's training data that the ranges of their inputs are measured on
    reader             "vllm": a model that vLLM cannot serve is refused, and nothing written
    """
    import torch

    from nemo_lite.data import load_tokenizer
    from nemo_lite.model.hf import materialise, vllm_problems
    from nemo_lite.model.hybrid import HybridLM
    from nemo_lite.parallel.layers import Layers
    from nemo_lite.precision.recipe import formats
    from nemo_lite.train.checkpoint import Weights, load_tensors, read_state

    run_dir, folder = find_checkpoint(source)
    refuse_to_replace(target)
    recipe = load_recipe(run_dir / "recipe.yaml", resolved=True)
    if reader == "vllm" and (problems := vllm_problems(recipe.model)):
        raise UserError(f"{run_dir}: {problems[0]}; nothing is written")
    gemms = formats(recipe.model, recipe.precision)
    trained = {name: g for name, g in gemms.items() if g.fprop == format}
    if format is not None and not trained:
        others = sorted({g.fprop for g in gemms.values()})
        raise UserError(f"{run_dir} has no linear that was trained in {format}; its formats are {', '.join(others)}")
    model = HybridLM(recipe.model, device="meta", layers=Layers(formats=trained))
    wide = torch.float64 if recipe.train.dtype == "float64" else torch.float32
    options: dict[str, Any] = {}
    if format is None:
        model, options["read"] = model.to(wide), Weights(folder)
    else:  # ranges are measured on the whole model
        materialise(model, wide, "cpu")
        load_tensors(folder, model, None, None)
    tokenizer = load_tokenizer(str(run_dir / "tokenizer"))
    for name, value in (("eos_token_id", tokenizer.eod_id), ("pad_token_id", tokenizer.pad_id)):
        if getattr(model.config, name) is None:
            setattr(model.config, name, value)
    if format is not None:
        dtype = dtype or "bfloat16"
        options = _packing(model, recipe, tokenizer, trained, format, calibration_rows)
    with new_model_dir(target) as partial:
        model.save_pretrained(partial, dtype=getattr(torch, dtype) if dtype else None, tokenizer=tokenizer, **options)
    return {
        "model_dir": str(target),
        "checkpoint": str(folder),
        "step": read_state(folder)["step"],
        "bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
        "dtype": dtype or str(wide).removeprefix("torch."),
        **({"format": format} if format else {}),
    }


def _packing(model, recipe, tokenizer, trained, format: str, rows: int) -> dict:
    """What save_pretrained needs to write the linears `trained` in `format`: how, and what config.json says of it."""
    import torch

    from nemo_lite.model.hf import rows as table
    from nemo_lite.precision import modelopt

    def linear(name: str) -> str:
        """A checkpoint's X.weight under the name that the model's parts have; an expert's with its number."""
        stem = name.removeprefix("backbone.").removesuffix(".weight")
        return "mtp.eh_proj" if stem.endswith(".eh_proj") else stem

    computing = torch.bfloat16 if recipe.train.dtype == "bfloat16" else torch.float32
    packed, kept = {}, []
    for row in table(model):
        for name in row.theirs:
            part = re.sub(r"\.experts\.\d+\.\w+$", ".experts", linear(name))
            # In the file two codes are a byte and 16 share a scale; a layer's experts are stored in one format.
            sizes = row.shape if part.endswith(".experts") else row.shape[-1:]
            if part in trained and all(size % 16 == 0 for size in sizes):
                packed[name] = trained[part]
            elif len(row.shape) == 2 and name.endswith(".weight"):
                kept.append(name.removesuffix(".weight"))
    amax = modelopt.amax_over_experts(_input_ranges(model, recipe, tokenizer, rows), map(linear, packed))

    def pack(name, weight):
        # As training did: rounded to the computing dtype first.
        if name in packed:
            return modelopt.pack(name, weight.to(computing), format, packed[name].square, amax[linear(name)])

    return {"pack": pack, "quantization_config": modelopt.config(format, kept)}


def _input_ranges(model, recipe, tokenizer, rows: int) -> dict[str, float]:
    """The largest magnitude of what each quantised linear reads, over rows of the training data."""
    import torch

    from nemo_lite.data import PackedLoader, prepare

    found: dict[str, float] = {}

    def watch(name, operand, x, spec, offsets, transpose) -> None:
        if operand != "fprop x":
            return
        if offsets is None:
            found[name] = max(found.get(name, 0.0), float(x.abs().max()))
            return
        stem, projection = name.rsplit(".", 1)
        for e, part in enumerate(x.split(offsets.diff().tolist())):
            if len(part):
                key = f"{stem}.{e}.{projection}"
                found[key] = max(found.get(key, 0.0), float(part.abs().max()))

    prepare(recipe.data, tokenizer, validation=False, progress=lambda text: None)
    model.numerics.watch, model.numerics.after = watch, True
    data = dataclasses.replace(recipe.data, seq_len_cycle=[])
    loader = PackedLoader(data, tokenizer, seed=recipe.seed, global_batch_size=rows, run_tokens=recipe.run_tokens)
    with loader, torch.no_grad():
        for micro in next(iter(loader)).split(recipe.train.micro_batch_size):
            model(micro.input_ids, doc_ids=micro.doc_ids, labels=micro.labels)
    model.numerics.watch, model.numerics.after = None, False
    return found


def main(argv: list[str]) -> int:
    """`nemo-lite export RUN_DIR|CHECKPOINT --to MODEL_DIR`."""
    import argparse
    import json

    parser = argparse.ArgumentParser(
        prog="nemo-lite export",
        description="Write a checkpoint as a Hugging Face NemotronH directory: config, safetensors (MTP tensors "
        "included), tokenizer. transformers, vLLM and `nemo-lite generate` open it.",
    )
    parser.add_argument(
        "source", metavar="RUN_DIR|CHECKPOINT", type=Path, help="a run (its newest checkpoint), or step_N"
    )
    parser.add_argument("--to", required=True, metavar="MODEL_DIR", type=Path, help="directory to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of linears and embeddings (default: as trained)"
    )
    parser.add_argument(
        "--format",
        choices=["nvfp4", "fp8"],
        help="write linears that were trained in it as codes, in ModelOpt's layout",
    )
    parser.add_argument(
        "--calibration-rows", type=int, default=8, metavar="N",
        help="with --format: rows of the run's data that input ranges are measured on (default: 8)",
    )  # fmt: skip
    parser.add_argument("--for", dest="reader", choices=["vllm"], help="refuse what that cannot serve")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    args = parser.parse_args(argv)
    if args.calibration_rows < 1:
        raise UserError(f"--calibration-rows {args.calibration_rows}: at least one row is needed")
    facts = export(args.source, args.to, args.dtype, args.format, args.calibration_rows, args.reader)
    if args.json:
        print(json.dumps(facts))
    else:
        kind = facts.get("format", facts["dtype"])
        print(f"{facts['model_dir']}: step {facts['step']}, {kind}, {facts['bytes'] / 1e6:.1f} MB")
    return 0
