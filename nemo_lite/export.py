"""From a training run to a MODEL_DIR."""

from __future__ import annotations

import shutil
from pathlib import Path

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


def export(source: Path, target: Path, dtype: str | None = None) -> dict:
    """Write the MODEL_DIR `target` from a run or checkpoint; facts about it. The target appears whole or not at all."""
    import torch

    from nemo_lite.data import load_tokenizer
    from nemo_lite.model.hf import materialise
    from nemo_lite.model.hybrid import HybridLM
    from nemo_lite.train.checkpoint import load_tensors, read_state

    run_dir, folder = find_checkpoint(source)
    if target.exists() and not (target / "config.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is no MODEL_DIR; it is left as it is")
    recipe = load_recipe(run_dir / "recipe.yaml", resolved=True)
    model = HybridLM(recipe.model, device="meta")
    wide = torch.float64 if recipe.train.dtype == "float64" else torch.float32
    materialise(model, wide, "cpu")
    load_tensors(folder, model, None, None)
    tokenizer = load_tokenizer(str(run_dir / "tokenizer"))
    for name, value in (("eos_token_id", tokenizer.eod_id), ("pad_token_id", tokenizer.pad_id)):
        if getattr(model.config, name) is None:
            setattr(model.config, name, value)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, dtype=getattr(torch, dtype) if dtype else None, tokenizer=tokenizer)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target} could not be written: {error.strerror or error}") from error
    return {
        "model_dir": str(target),
        "checkpoint": str(folder),
        "step": read_state(folder)["step"],
        "bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
        "dtype": dtype or str(wide).removeprefix("torch."),
    }


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
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    args = parser.parse_args(argv)
    facts = export(args.source, args.to, args.dtype)
    if args.json:
        print(json.dumps(facts))
    else:
        print(f"{facts['model_dir']}: step {facts['step']}, {facts['dtype']}, {facts['bytes'] / 1e6:.1f} MB")
    return 0
