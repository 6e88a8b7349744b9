"""Evaluation of a MODEL_DIR on text that training did not see.

`held_out` measures bits per byte (beside gzip -9 on the same files), how evenly experts are used, and how many drafted
tokens the model accepts from its own MTP block: teacher-forced along the text, and free-running, with the share of
repeated 8-grams beside it, so that looping cannot pass for skill.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import torch

from nemo_lite.config import DataConfig, SourceConfig, UserError


@torch.no_grad()
def along_the_text(model, data: DataConfig, tokenizer, drafts: int, rows: int = 16) -> dict[str, Any]:
    """One pass over the held-out text: bits per byte, expert load, teacher-forced acceptance.

    Teacher-forced: at every position the drafts are made from the true text, and draft k counts as accepted when it and
    all before it equal the main head's own greedy choice given the true text. Length = 1 + accepted per position.
    """
    from nemo_lite.data import validation_batches
    from nemo_lite.train.loss import shift_left

    byte_lengths = torch.tensor(tokenizer.byte_lengths())
    nats = size = positions = 0.0
    accepted = torch.zeros(drafts, dtype=torch.float64)
    experts: dict[str, torch.Tensor] = {}
    was_training, depth = model.training, model.config.mtp.depth
    model.train()  # routers count only in training mode; nothing else differs
    model.config.mtp.depth = max(drafts, 1)
    try:
        for batch in validation_batches(data, tokenizer, rows_per_batch=rows, num_batches=10**9):
            ids, docs = batch.input_ids, batch.doc_ids
            out = model(ids, doc_ids=docs, mtp=drafts > 0)
            for name, n in out.expert_counts.items():
                experts[name] = experts.get(name, 0) + n
            here = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] >= 0)
            logp = out.logits.float().log_softmax(-1)
            nats -= float(logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][here].sum(dtype=torch.float64))
            size += float(byte_lengths[ids[:, 1:][here]].sum())
            choice = logp.argmax(-1)
            kept = (shift_left(docs, drafts + 1, -1) == docs) & (docs >= 0)
            positions += float(kept.sum())
            for k, logits in enumerate(out.mtp_logits if drafts else []):
                kept = kept & (logits.argmax(-1) == shift_left(choice, k + 1, -1))
                accepted[k] += float(kept.sum())
    finally:
        model.config.mtp.depth = depth
        model.train(was_training)
    shares = (accepted / max(positions, 1.0)).tolist()
    return {
        "bits_per_byte": nats / math.log(2) / max(size, 1.0),
        "bytes": int(size),
        "experts": {
            name: {
                "min_over_mean": float(n.min() / n.double().mean()),
                "max_over_mean": float(n.max() / n.double().mean()),
            }
            for name, n in experts.items()
        },
        "teacher_forced": {"acceptance_length": 1 + sum(shares), "by_position": shares} if drafts else None,
    }


def free_running(
    model, data: DataConfig, tokenizer, drafts: int, prompts: int, prompt_tokens: int, new_tokens: int, batch: int = 50
) -> dict[str, Any]:
    """Greedy speculative completion of held-out prompts: acceptance, and the share of 8-grams that repeat in a row."""
    from nemo_lite.data import validation_batches
    from nemo_lite.generate import generate

    heads = []
    for rows in validation_batches(data, tokenizer, rows_per_batch=1, num_batches=10**9):
        docs, ids = rows.doc_ids[0], rows.input_ids[0]
        for start in range(0, len(ids) - prompt_tokens + 1, prompt_tokens):
            part = slice(start, start + prompt_tokens)
            if docs[start] >= 0 and bool((docs[part] == docs[start]).all()):
                heads.append(ids[part])
    if not heads:
        raise UserError(f"no held-out document has {prompt_tokens} tokens for a prompt")
    heads = [heads[i * len(heads) // prompts] for i in range(prompts)] if len(heads) > prompts else heads
    steps = accepted = repeated = grams = 0
    by_position = [0] * drafts
    for start in range(0, len(heads), batch):
        out = generate(
            model,
            torch.stack(heads[start : start + batch]),
            max_tokens=new_tokens,
            speculative=True,
            draft_tokens=drafts,
        )
        steps, accepted = steps + out.stats.verify_steps, accepted + out.stats.accepted
        by_position = [a + b for a, b in zip(by_position, out.stats.accepted_at)]
        for row in out.tokens:
            found = [tuple(row[i : i + 8]) for i in range(len(row) - 7)]
            grams, repeated = grams + len(found), repeated + len(found) - len(set(found))
    return {
        "prompts": len(heads),
        "new_tokens": new_tokens,
        "acceptance_length": 1 + accepted / max(steps, 1),
        "by_position": [n / max(steps, 1) for n in by_position],
        "repeated_8grams": repeated / max(grams, 1),
    }


def held_out(
    model_dir: Path,
    data: DataConfig,
    *,
    drafts: int | None,
    prompts: int,
    new_tokens: int,
    kernels: dict[str, str] | None = None,
    quantization: str | None = None,
) -> dict[str, Any]:
    """All figures of a MODEL_DIR on the held-out split of `data`."""
    from nemo_lite.data import documents, load_tokenizer
    from nemo_lite.model.hybrid import HybridLM

    model = HybridLM.from_pretrained(model_dir, kernels=kernels, quantization=quantization)
    tokenizer = load_tokenizer(data.tokenizer)
    drafts = (model.config.mtp.depth if drafts is None else drafts) if model.mtp is not None else 0
    figures = along_the_text(model, data, tokenizer, drafts)
    raw = packed = 0
    for source in data.blend:
        for document in documents(source, "validation", data.validation_fraction, data.on_bad_line):
            text = document.text.encode()
            raw, packed = raw + len(text), packed + len(gzip.compress(text, 9))
    figures["gzip9_bits_per_byte"] = 8 * packed / max(raw, 1)
    figures["free_running"] = (
        free_running(model, data, tokenizer, drafts, prompts, 64, new_tokens) if drafts and prompts else None
    )
    return figures


def main(argv: list[str]) -> int:
    """`nemo-lite evaluate MODEL_DIR`."""
    import argparse
    import json

    parser = argparse.ArgumentParser(
        prog="nemo-lite evaluate",
        description="Bits per byte on held-out text beside gzip -9, expert load, and how many MTP drafts are accepted.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("--source", default="stdlib", help="source whose held-out part is read (default: stdlib)")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.02, metavar="F", help="as in training (default: 0.02)"
    )
    parser.add_argument("--seq-len", type=int, default=512, metavar="L", help="length of a row (default: 512)")
    parser.add_argument("--draft-tokens", type=int, metavar="K", help="drafts a step (default: the training depth)")
    parser.add_argument(
        "--prompts", type=int, default=200, metavar="N", help="prompts completed; 0 for none (default: 200)"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens a prompt (default: 128)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="pack weights as they are read (default: no)")
    parser.add_argument("--kernels", metavar="OP=NAME[,...]", help="backends of ops (default: auto; nemo-lite kernels)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from nemo_lite.kernels import wanted

    if args.threads:
        torch.set_num_threads(args.threads)
    data = DataConfig(
        tokenizer=str(args.model_dir), seq_len=args.seq_len, blend=[SourceConfig(source=args.source)],
        validation_fraction=args.validation_fraction,
    )  # fmt: skip
    figures = held_out(
        args.model_dir, data, drafts=args.draft_tokens, prompts=args.prompts, new_tokens=args.max_tokens,
        kernels=wanted(args.kernels), quantization=args.quantization,
    )  # fmt: skip
    print(json.dumps(figures) if args.json else describe(figures))
    return 0


def describe(figures: dict[str, Any]) -> str:
    """The figures for a person."""

    def length(found: dict[str, Any]) -> str:
        positions = ", ".join(f"{share:.0%}" for share in found["by_position"])
        return f"{found['acceptance_length']:.2f} (kept by position: {positions})"

    lines = [
        f"held-out bits per byte    {figures['bits_per_byte']:.3f}   "
        f"(gzip -9 on the same files: {figures['gzip9_bits_per_byte']:.3f})"
    ]
    if figures["experts"]:
        name, worst = min(figures["experts"].items(), key=lambda item: item[1]["min_over_mean"])
        lines.append(f"least used expert         {worst['min_over_mean']:.0%} of its layer's mean load ({name})")
    if forced := figures["teacher_forced"]:
        lines.append(f"acceptance length, text   {length(forced)}")
    if free := figures["free_running"]:
        lines.append(f"acceptance length, free   {length(free)}, {free['repeated_8grams']:.0%} of its 8-grams repeat")
    return "\n".join(lines)
