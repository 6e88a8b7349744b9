"""lm-evaluation-harness on a model in this process: its `LM` interface over HybridLM.

Through a server no adapter is needed: the harness's own `local-completions` client works against ``nemo-lite serve``
(docs/evaluation.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_lite.config import UserError
from nemo_lite.evaluate.text import padded

BATCH = 1 << 13  # tokens read at once


class _Stop(Exception):
    """A stop string has come."""


def adapter(model, tokenizer):
    """An `lm_eval` language model. Texts are never cut: there is no position embedding that would end."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod_id if tokenizer.eod_id is not None else 0

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            # A template of the tokenizer would put its tokens between the pieces that the harness joins.
            return list(tokenizer.encode(string, special=False))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            pairs = [([self.eot_token_id], self.tok_encode(request.args[0])) for request in requests]
            return [nats for nats, _ in log_likelihoods(model, pairs)]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._until(context, **options) for context, options in (r.args for r in requests)]

        def _until(self, context: str, **options: Any) -> str:
            from nemo_lite.generate import generate

            wanted = normalize_gen_kwargs(options, 256)
            stream, stops = tokenizer.stream(skip_special=True), [stop for stop in wanted["until"] if stop]
            text = ""

            def take(row: int, tokens: list[int]) -> None:
                nonlocal text
                text += "".join(stream.push(token) for token in tokens)
                if any(stop in text for stop in stops):
                    raise _Stop

            ids = self.tok_encode(context) or [self.eot_token_id]
            try:
                generate(
                    model, torch.tensor([ids], device=model.device), max_tokens=wanted["max_gen_toks"],
                    temperature=wanted.get("temperature") or 0.0, stop_ids=[self.eot_token_id], on_tokens=take,
                )  # fmt: skip
                text += stream.flush()
            except _Stop:
                pass
            ends = [text.index(stop) for stop in stops if stop in text]
            return text[: min(ends)] if ends else text

    return Adapter()


@torch.no_grad()
def log_likelihoods(model, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each (context, continuation), both token ids and the context not empty: log p(continuation | context) in
    nats, and whether greedy decoding would write it."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    was_training = model.training
    model.eval()
    try:
        while order:
            size = 1
            while size < len(order) and (size + 1) * sum(map(len, pairs[order[size]])) <= BATCH:
                size += 1
            chosen, order = order[:size], order[size:]
            rows = [[*context, *continuation][:-1] for context, continuation in (pairs[i] for i in chosen)]
            ids, docs = padded(rows, model.device)
            hidden = model(ids, doc_ids=docs).hidden
            for b, i in enumerate(chosen):
                context, continuation = pairs[i]
                targets = torch.tensor(continuation, device=hidden.device)
                nats, greedy = 0.0, True
                states = hidden[b, len(context) - 1 : len(context) - 1 + len(targets)]
                for state, target in zip(states.split(1024), targets.split(1024)):
                    logits = model.head(state).float()
                    nats += float(logits.log_softmax(-1).gather(-1, target[:, None]).sum(dtype=torch.float64))
                    greedy = greedy and bool((logits.argmax(-1) == target).all())
                found[i] = (nats, greedy)
    finally:
        model.train(was_training)
    return found


def resolve(tasks: Sequence[str]) -> list[str]:
    """Tasks as `run` takes them; UserError for what is neither one of the harness's names nor the path of a task's
    YAML."""
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise UserError(f"--harness {task}: there is no such file")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('--harness needs the package lm-eval; install it with: pip install "nemo-lite[eval]"')
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for task in tasks:
        if not task.endswith((".yaml", ".yml")) and task not in known:
            raise UserError(f"--harness {task}: lm-eval has no such task, and it is no path of a .yaml")
    return [str(Path(task).absolute()) if task.endswith((".yaml", ".yml")) else task for task in tasks]


def run(model, tokenizer, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """task -> metric -> value, and `samples`; `tasks` come from :func:`resolve`."""
    from lm_eval import simple_evaluate

    try:
        out = simple_evaluate(adapter(model, tokenizer), tasks=list(tasks), bootstrap_iters=1000, log_samples=False)
    except Exception as error:  # a dataset that cannot be loaded, a task's own code: anything may go wrong in there
        raise UserError(f"--harness {','.join(tasks)}: lm-eval stopped ({type(error).__name__}: {error})") from error
    assert out is not None
    return {task: _metrics(each, out["n-samples"].get(task)) for task, each in out["results"].items()}


def _metrics(found: dict[str, Any], samples: dict[str, int] | None) -> dict[str, Any]:
    """``acc,none`` of the harness as `acc`; a filter other than none stays in the name."""
    values = {
        name.removesuffix(",none").replace(",", " "): value
        for name, value in found.items() if isinstance(value, int | float) and name not in ("sample_len",)
    }  # fmt: skip
    if samples:
        values["samples"] = samples["effective"]
    score = next((values[name] for name in ("acc", "exact_match") if name in values), None)
    return values if score is None else {"score": score} | values
