"""What number formats cost in accuracy: ours and llama.cpp's, same trained model, same held-out text.

    python benchmarks/accuracy.py MODEL_DIR TEXT --llama-python LLAMA/bin/python
    python benchmarks/accuracy.py runs/demo/model stdlib --llama-python LLAMA/bin/python    # what make demo trained

TEXT is a data source: `stdlib`, a folder, a file. Its held-out part is read: the documents that training with the same
--validation-fraction leaves out, in rows of --length tokens, each from an empty state. For every position the
next-token distribution of each format is compared with that of the float32 model here: Kullback-Leibler divergence in
nats, the share of positions with the same likeliest token, and nats per token of the text itself. llama.cpp receives
token ids, so tokenizers play no part; its f32 row shows how far apart the two implementations are by themselves.
Written to benchmarks/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from peers import GGUF, LLAMA, RESULTS, Failed, command_line, find_llama, machine, run

OURS = ("bf16", "int8", "int4")


def held_out_rows(model_dir: Path, text: str, fraction: float, rows: int, length: int):
    """Token ids [rows, length], spread evenly over the held-out documents."""
    import torch

    from nemo_lite.config import SourceConfig
    from nemo_lite.data import documents, load_tokenizer

    tokenizer, found = load_tokenizer(model_dir), []
    for document in documents(SourceConfig(source=text), "validation", fraction):
        ids = tokenizer.encode(document.text, special=False)
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not found:
        raise SystemExit(f"{text}: no held-out document has {length} tokens")
    count = min(rows, len(found))
    return torch.tensor([found[i * len(found) // count] for i in range(count)])


def open_in(model_dir: Path, dtype: str):
    """A HybridLM in one of the formats, or None where it has no such format."""
    from nemo_lite import HybridLM

    model = HybridLM.from_pretrained(model_dir, dtype="bfloat16" if dtype == "bf16" else "float32")
    if dtype in ("int8", "int4"):
        if not hasattr(model, "quantize_weights"):
            return None
        model.quantize_weights(dtype)
    return model


def our_logits(model, ids, one_by_one: bool):
    """Logits [rows, length, V] in float32, from whole rows or as decoding reads them."""
    import torch

    with torch.inference_mode():
        if not one_by_one:
            return torch.cat([model(part).logits.float() for part in ids.split(8)])
        cache = model.new_cache(len(ids))
        steps = [model(ids[:, i : i + 1], cache=cache).logits.float() for i in range(ids.shape[1])]
        return torch.cat(steps, dim=1)


def compared(reference, logits, ids) -> dict[str, float]:
    """How far `logits` are from the float32 model's."""
    import torch

    kl, same, nats = [], [], []
    for expected, got, row in zip(reference, logits, ids):
        p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
        nats.append(-q[:-1].gather(-1, row[1:, None])[:, 0])
    every = torch.cat(kl)
    return {
        "kl": float(every.mean()),
        "kl_p99": float(every.quantile(0.99)),
        "same_choice": float(torch.cat(same).mean()),
        "nats_per_token": float(torch.cat(nats).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("text", metavar="TEXT", help="stdlib, a folder or a file")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="F", help="as trained (default: 0.05)"
    )
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows read (default: 64)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a row (default: 256)")
    parser.add_argument("--one-by-one", action="store_true", help="read token by token, as decoding does")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--llama-python", type=Path, metavar="PATH", help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    args = parser.parse_args()

    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    llama, versions = find_llama(args.llama_python)
    ids = held_out_rows(args.model_dir, args.text, args.validation_fraction, args.rows, args.length)
    reference = our_logits(open_in(args.model_dir, "fp32"), ids, args.one_by_one)
    rows: list[dict[str, Any]] = []

    def add(name: str, dtype: str, logits) -> None:
        rows.append({"implementation": name, "dtype": dtype} | compared(reference, logits, ids))
        row = rows[-1]
        print(
            f"{name:10} {dtype:5} KL {row['kl']:.2e} (99 % below {row['kl_p99']:.2e}), same choice "
            f"{row['same_choice']:.2%}, {row['nats_per_token']:.4f} nats per token",
            flush=True,
        )

    add("nemo_lite", "fp32", reference)
    for dtype in OURS:
        model = open_in(args.model_dir, dtype)
        if model is None:
            print(f"nemo_lite  {dtype}: skipped, HybridLM has no quantize_weights", flush=True)
        else:
            add("nemo_lite", dtype, our_logits(model, ids, args.one_by_one))
    if llama is None:
        print(f"without llama.cpp: {versions}")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            np.save(folder / "ids.npy", ids.numpy())
            f32 = folder / "f32.gguf"
            run([llama, LLAMA, "gguf", args.model_dir, f32])
            for kind in GGUF.values():
                file = folder / f"{kind}.gguf"
                try:
                    if kind == "bf16":
                        run([llama, LLAMA, "gguf", args.model_dir, file, "--dtype", kind])
                    elif kind != "f32":
                        run([llama, LLAMA, "quantise", f32, file, "--dtype", kind])
                    options = ["--one-by-one"] if args.one_by_one else []
                    options += ["--threads", args.threads]
                    run([llama, LLAMA, "logits", file, folder / "ids.npy", folder / "logits.npy", *options])
                except Failed as error:
                    print(f"llama.cpp  {kind}: skipped: {error}", flush=True)
                    continue
                add("llama.cpp", kind, torch.from_numpy(np.load(folder / "logits.npy")))
                rows[-1]["file_mb"] = round(file.stat().st_size / 1e6, 2)
                if kind != "f32":
                    file.unlink()
    found = {
        "command": command_line(),
        "machine": machine() | (versions if llama else {}),
        "model": str(args.model_dir), "text": args.text, "tokens": ids.numel(), "length": args.length,
        "one_by_one": args.one_by_one, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
