"""Long-range questions to a model (data/longrange.py), and two ways to mark the answers.

`exact` is strict: greedy decoding would write the whole answer. That needs no decoding: it does so if and only if each
token of the answer is the likeliest one given the tokens before it. A model too small for any answer still has a
`margin`: the log-probability of the answer minus the mean over distractors of the same form. A model that cannot find
the place has 0 on average, whatever its taste in numbers, since answer and distractors are drawn alike.

Shape letters: B samples, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_lite.config import UserError
from nemo_lite.data.longrange import DISTRACTORS, TASKS, Sample, counter, make
from nemo_lite.evaluate.text import padded

CHANCE = 1 / (1 + DISTRACTORS)  # of being the likeliest
BATCH = 1 << 14  # tokens read at once


@dataclass(frozen=True)
class Mark:
    """How one sample was answered: score is the share of the answer's parts that greedy decoding gets right, each after
    the true ones before it; margin in nats; likeliest: above every distractor."""

    score: float
    exact: bool
    margin: float
    likeliest: bool


def parse_lengths(text: str) -> list[int]:
    """``1k,4k`` as [1024, 4096]; ``0`` is none. UserError for what is no length."""
    found = []
    for word in text.split(","):
        digits, unit = word.strip().lower(), 1
        if digits.endswith("k"):
            digits, unit = digits[:-1], 1024
        if not digits.isdigit():
            raise UserError(f"--ruler {text}: {word.strip()!r} is no length in tokens; say for example 1k,4k, or 0")
        found.append(int(digits) * unit)
    return sorted({length for length in found if length})


def ask(lengths: Sequence[int], count: int, tokenizer, seed: int = 0) -> dict[tuple[int, str], list[Sample]]:
    """`count` samples of every (length, task) that can be as short as that."""
    count_tokens = counter(tokenizer)
    asked = {}
    for length in lengths:
        for task in TASKS:
            samples = [make(task, length, count_tokens, seed=seed, index=i) for i in range(count)]
            if all(samples):
                asked[length, task] = [sample for sample in samples if sample is not None]
    if lengths and not asked:
        raise UserError(f"--ruler {lengths[-1]}: no task is as short as that; ask for more tokens")
    return asked


@torch.no_grad()
def mark(model, tokenizer, samples: Sequence[Sample]) -> list[Mark]:
    """Marks of samples. A prompt is read once; answer and distractors are tried on its cache and taken back."""
    marks: list[Mark] = []
    encoded = [(sample, *_encode(tokenizer, sample)) for sample in samples]
    was_training = model.training
    model.eval()
    try:
        while encoded:
            size = max(1, BATCH // len(encoded[0][1]))
            marks += _marked(model, encoded[:size])
            encoded = encoded[size:]
    finally:
        model.train(was_training)
    return marks


def _encode(tokenizer, sample: Sample) -> tuple[list[int], list[list[int]], list[int]]:
    """Ids of the prompt, of the answer and each distractor, and where the answer's parts end among its ids."""
    question, *tails = (
        ids.tolist()
        for ids in tokenizer.encode_batch(
            [
                sample.question,
                *(sample.question + text for text in (sample.answer, *sample.distractors)),
                *(sample.question + "".join(sample.parts[: i + 1]) for i in range(len(sample.parts))),
            ],
            special=False,
        )
    )
    answers = [ids[len(question) :] for ids in tails[: 1 + len(sample.distractors)]]
    ends = [len(ids) - len(question) for ids in tails[1 + len(sample.distractors) :]]
    return list(tokenizer.encode(sample.prompt)), answers, ends


def _marked(model, batch: Sequence[tuple[Sample, list[int], list[list[int]], list[int]]], chunk: int = 2048):
    device = model.device
    cache = model.new_cache(len(batch))
    ids, docs = padded([prompt[:-1] for _, prompt, _, _ in batch], device)
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        model(ids[:, part], doc_ids=docs[:, part], cache=cache)
    logps, right = [], []
    for which in range(1 + DISTRACTORS):
        tries = [answers[which] for _, _, answers, _ in batch]
        # The prompt's last token gives the logits of the answer's first.
        ids, docs = padded([[prompt[-1], *answer[:-1]] for (_, prompt, _, _), answer in zip(batch, tries)], device)
        targets, _ = padded(tries, device)
        logits = model(ids, doc_ids=docs, cache=cache, tentative=True).logits.float()
        cache.rollback()
        logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        logps.append((logp * (docs >= 0)).sum(-1))
        if which == 0:
            right = [row[: len(answer)].tolist() for row, answer in zip(logits.argmax(-1) == targets, tries)]
    for b, (_, _, _, ends) in enumerate(batch):
        parts = [all(right[b][begin:end]) for begin, end in zip([0, *ends], ends)]
        answer, others = float(logps[0][b]), [float(logp[b]) for logp in logps[1:]]
        yield Mark(
            sum(parts) / len(parts), all(parts), answer - sum(others) / len(others), answer > max(others)
        )  # fmt: skip


def summary(marks: Sequence[Mark]) -> dict[str, float | None]:
    """Means over samples, and the standard error of the margin's."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    margins = [each.margin for each in marks]
    error = statistics.stdev(margins) / math.sqrt(len(margins)) if len(margins) > 1 else None
    return {
        "score": mean([each.score for each in marks]),
        "exact": mean([each.exact for each in marks]),
        "likeliest": mean([each.likeliest for each in marks]),
        "margin": mean(margins),
        "margin_error": error,
    }


def figures(marks: dict[tuple[int, str], list[Mark]]) -> dict[str, Any]:
    """length -> task -> summary; `all` is the mean over tasks."""
    found: dict[str, Any] = {}
    for length in sorted({length for length, _ in marks}):
        by_task = {task: each for (n, task), each in marks.items() if n == length}
        found[str(length)] = {task: summary(each) for task, each in by_task.items()}
        found[str(length)]["all"] = summary([mark for each in by_task.values() for mark in each])
    return found
