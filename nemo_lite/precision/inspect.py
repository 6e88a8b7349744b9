"""``nemo-lite quant inspect MODEL_DIR``: the tensors of a MODEL_DIR, their formats, bits a weight, and outliers."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from nemo_lite.config import UserError
from nemo_lite.precision.recipe import ranges

NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "uint8": "nvfp4",
         "float8_e4m3fn": "fp8"}  # fmt: skip


def tensors(model_dir: Path) -> list[dict[str, Any]]:
    """One line a weight: name, shape, format, bytes with its scales, largest magnitude over the root of the mean
    square, share of zeros, and of magnitudes above six of those roots."""
    from nemo_lite.model.hf import TensorFiles
    from nemo_lite.precision import modelopt

    files = TensorFiles(model_dir)
    everything = files.everything()
    found = []
    for name in sorted(files.names()):
        w = files.get(name).float()
        stem = name.removesuffix(".weight")
        beside = [other for end in modelopt.BESIDE if (other := stem + end) in everything and other != name]
        size = sum(files.stored(one).nbytes for one in (name, *beside))
        root = float(w.square().mean().sqrt()) if w.numel() else 0.0
        found.append(
            {
                "name": name, "shape": list(w.shape), "format": _format(files, name), "bytes": size,
                "bits": 8 * size / max(w.numel(), 1),
                "largest": float(w.abs().max()) / root if root else 0.0,
                "zeros": float((w == 0).float().mean()) if w.numel() else 0.0,
                "outliers": float((w.abs() > 6 * root).float().mean()) if w.numel() else 0.0,
            }
        )  # fmt: skip
    return found


def _format(files, name: str) -> str:
    dtype = str(files.dtype(name)).removeprefix("torch.")
    return NAMES.get(dtype, dtype)


def grouped(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of tensors that differ only in a number (a layer's, an expert's) drawn together: sizes summed, the share of
    outliers averaged, the largest of all and whose it is."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        key = re.sub(r"\.\d+(?=\.)", ".#", line["name"])
        groups.setdefault((key, tuple(line["shape"]), line["format"]), []).append(line)
    found = []
    for (key, shape, format), inside in groups.items():
        numbers = zip(*(map(int, re.findall(r"\.(\d+)(?=\.)", line["name"])) for line in inside))
        for column in numbers:
            key = key.replace(".#", f".{ranges(sorted(set(column)))}", 1)
        worst = max(inside, key=lambda line: line["largest"])
        count = len(inside)
        found.append(
            {
                "name": key, "count": count, "shape": list(shape), "format": format,
                "bytes": sum(line["bytes"] for line in inside), "bits": inside[0]["bits"], "largest": worst["largest"],
                "where": worst["name"], "zeros": sum(line["zeros"] for line in inside) / count,
                "outliers": sum(line["outliers"] for line in inside) / count,
            }
        )  # fmt: skip
    return found


def _show(model_dir: Path, lines: list[dict[str, Any]], every: bool) -> None:
    from rich.table import Table

    from nemo_lite.train import metrics

    console = metrics.console()
    rows = [{**line, "count": 1} for line in lines] if every else grouped(lines)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for i, column in enumerate(("tensors", "", "shape", "format", "bits", "MB", "largest", "zeros", "above 6 rms")):
        table.add_column(column, justify="left" if i in (0, 3) else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"], f"{row['count']} x" if row["count"] > 1 else "", "x".join(map(str, row["shape"])),
            row["format"], f"{row['bits']:.2f}", f"{row['bytes'] / 1e6:.2f}", f"{row['largest']:.1f} rms",
            f"{row['zeros']:.1%}", f"{row['outliers']:.3%}",
        )  # fmt: skip
    console.print(table)
    size = sum(line["bytes"] for line in lines)
    count = sum(math.prod(line["shape"]) for line in lines)
    by_format: dict[str, int] = {}
    for line in lines:
        by_format[line["format"]] = by_format.get(line["format"], 0) + line["bytes"]
    parts = ", ".join(f"{name} {part / size:.0%}" for name, part in sorted(by_format.items()))
    console.print(
        f"{model_dir}: {count / 1e6:.2f} M numbers in {size / 1e6:.2f} MB, {8 * size / count:.2f} bits each; {parts}"
    )


def main(argv: list[str]) -> int:
    """`nemo-lite quant inspect MODEL_DIR`."""
    parser = argparse.ArgumentParser(prog="nemo-lite quant", description="Quantised models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect")
    inspect = commands.add_parser(
        "inspect", help="what a MODEL_DIR stores",
        description="The tensors of a MODEL_DIR: formats, bits a weight with its scales, the largest magnitude over "
        "the root of the mean square (rms), zeros, and the share of magnitudes above six of those roots. Tensors that "
        "differ in a layer's or an expert's number are drawn together; the largest of them is shown.",
    )  # fmt: skip
    inspect.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    inspect.add_argument("--all", action="store_true", help="one line a tensor")
    inspect.add_argument("--json", action="store_true", help="one line a tensor, as JSON")
    args = parser.parse_args(argv)
    if not args.model_dir.is_dir():
        raise UserError(f"{args.model_dir} is no MODEL_DIR")
    lines = tensors(args.model_dir)
    if args.json:
        print(json.dumps(lines, indent=1))
    else:
        _show(args.model_dir, lines, args.all)
    return 0
