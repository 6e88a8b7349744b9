"""One pass over held-out text: bits per byte, loss by position, expert load, and how good MTP's drafts are.

What is summed is kept by document, so that two models can be compared on the same documents (compare.py).

Shape letters: B rows, L tokens of a row, D documents, P bins of position, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_lite.config import DataConfig, UserError

LOGITS = 1 << 26  # of a forward: what bounds its rows where the vocabulary is large


@dataclass
class Reading:
    """Sums over the held-out text of one source, or of several joined.

    nats_DP, tokens_DP  cross-entropy and predicted tokens, by document and bin: bin p holds the tokens predicted from
                        2^p to 2^(p+1) - 1 tokens of context. Context begins where a document or a row does.
    bytes_D             UTF-8 bytes of the predicted tokens.
    right, depth_*      predicted tokens that were the likeliest; the same, cross-entropy and counts by MTP depth.
    accepted, drafted   positions at which drafts 1 .. k were all the model's own greedy choice, and all positions.
    experts             MoE layer -> tokens per expert [E].
    """

    nats_DP: np.ndarray
    tokens_DP: np.ndarray
    bytes_D: np.ndarray
    drafts: int
    right: float = 0.0
    drafted: float = 0.0
    accepted: Tensor = field(default_factory=lambda: torch.zeros(0))
    depth_right: Tensor = field(default_factory=lambda: torch.zeros(0))
    depth_nats: Tensor = field(default_factory=lambda: torch.zeros(0))
    depth_tokens: Tensor = field(default_factory=lambda: torch.zeros(0))
    experts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, readings: Sequence[Reading]) -> Reading:
        """All documents of several sources."""
        first = readings[0]
        layers = first.experts
        return cls(
            nats_DP=np.concatenate([each.nats_DP for each in readings]),
            tokens_DP=np.concatenate([each.tokens_DP for each in readings]),
            bytes_D=np.concatenate([each.bytes_D for each in readings]),
            drafts=first.drafts,
            right=sum(each.right for each in readings),
            drafted=sum(each.drafted for each in readings),
            accepted=torch.stack([each.accepted for each in readings]).sum(0),
            depth_right=torch.stack([each.depth_right for each in readings]).sum(0),
            depth_nats=torch.stack([each.depth_nats for each in readings]).sum(0),
            depth_tokens=torch.stack([each.depth_tokens for each in readings]).sum(0),
            experts={name: torch.stack([each.experts[name] for each in readings]).sum(0) for name in layers},
        )

    @property
    def tokens(self) -> float:
        return max(float(self.tokens_DP.sum()), 1.0)

    def by_position(self) -> list[dict[str, Any]]:
        """Of each bin: its tokens, their mean loss in nats, and the mean over this bin and all before it."""
        nats, tokens = self.nats_DP.sum(0), self.tokens_DP.sum(0)
        below, counted = nats.cumsum(), tokens.cumsum()
        return [
            {
                "from": 2**p, "to": 2 ** (p + 1) - 1, "tokens": int(tokens[p]), "loss": float(nats[p] / tokens[p]),
                "cumulative": float(below[p] / counted[p]),
            }
            for p in range(len(nats)) if tokens[p]
        ]  # fmt: skip

    def figures(self) -> dict[str, Any]:
        nats = float(self.nats_DP.sum())
        shares = (self.accepted / max(self.drafted, 1.0)).tolist()
        counts = self.depth_tokens.clamp(min=1)
        return {
            "bits_per_byte": nats / math.log(2) / max(float(self.bytes_D.sum()), 1.0),
            "bytes": int(self.bytes_D.sum()),
            "tokens": int(self.tokens_DP.sum()),
            "loss": nats / self.tokens,
            "next_token_accuracy": self.right / self.tokens,
            "loss_by_position": self.by_position(),
            "experts": {name: load(n) for name, n in self.experts.items()},
            "teacher_forced": {"acceptance_length": 1 + sum(shares), "by_position": shares} if self.drafts else None,
            "mtp": {
                "accuracy_by_depth": (self.depth_right / counts).tolist(),
                "loss_by_depth": (self.depth_nats / counts).tolist(),
            }
            if self.drafts
            else None,
        }


@torch.no_grad()
def read(model, data: DataConfig, tokenizer, drafts: int, rows: int = 16) -> Reading:
    """Read the held-out text of `data` once.

    Teacher-forced drafts: at every position they are made from the true text, and draft k counts as accepted when it
    and all before it equal the main head's own greedy choice given the true text. Depth k's accuracy is about the true
    token instead.
    """
    from nemo_lite.data import validation_batches
    from nemo_lite.train.loss import shift_left

    rows = max(1, min(rows, LOGITS // (data.seq_len * model.config.vocab_size)))
    device = model.device
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=device)
    batches = validation_batches(data, tokenizer, rows_per_batch=rows, num_batches=10**9)
    firsts = np.cumsum([0, *(source.num_documents for source in batches.sources)])
    D, P = int(firsts[-1]), max(1, (data.seq_len - 1).bit_length())
    sums = {name: torch.zeros(D * P, dtype=torch.float64, device=device) for name in ("nats", "tokens", "bytes")}
    found = Reading(np.zeros((D, P)), np.zeros((D, P)), np.zeros(D), drafts)
    accepted, right, nats, counts = torch.zeros(4, drafts, dtype=torch.float64, device=device)
    was_training, depth = model.training, model.config.mtp.depth
    model.train()  # routers count only in training mode; nothing else differs
    model.config.mtp.depth = max(drafts, 1)
    try:
        for batch in batches:
            batch = batch.to(device)
            ids, docs = batch.input_ids, batch.doc_ids
            out = model(ids, doc_ids=docs, mtp=drafts > 0)
            for name, n in out.expert_counts.items():
                found.experts[name] = found.experts.get(name, 0) + n
            here = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] >= 0)
            logits = out.logits.float()
            choice = logits.argmax(-1)
            nll = _nll(logits[:, :-1], ids[:, 1:])
            bins = _bins(batch.sources, docs, firsts, P)[:, 1:][here]
            target = ids[:, 1:][here]
            sums["nats"].index_add_(0, bins, nll[here].double())
            sums["tokens"].index_add_(0, bins, torch.ones_like(target, dtype=torch.float64))
            sums["bytes"].index_add_(0, bins, byte_lengths[target].double())
            found.right += float((choice[:, :-1][here] == target).sum())
            kept = (shift_left(docs, drafts + 1, -1) == docs) & (docs >= 0)
            found.drafted += float(kept.sum())
            for k, logits in enumerate(out.mtp_logits if drafts else []):
                draft = logits.argmax(-1)
                kept = kept & (draft == shift_left(choice, k + 1, -1))
                accepted[k] += kept.sum()
                truth, same = shift_left(ids, k + 2, 0), (shift_left(docs, k + 2, -1) == docs) & (docs >= 0)
                right[k] += (draft == truth)[same].sum()
                nats[k] += _nll(logits.float(), truth)[same].sum(dtype=torch.float64)
                counts[k] += same.sum()
    finally:
        model.config.mtp.depth = depth
        model.train(was_training)
    found.experts = {name: n.cpu() for name, n in found.experts.items()}
    found.nats_DP, found.tokens_DP, bytes_DP = (sums[name].view(D, P).cpu().numpy() for name in sums)
    found.bytes_D = bytes_DP.sum(1)
    found.accepted, found.depth_right, found.depth_nats, found.depth_tokens = (
        each.cpu() for each in (accepted, right, nats, counts)
    )
    return found


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of the targets [B, L] under logits [B, L, V]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _bins(spans: list, docs_BL: Tensor, firsts: np.ndarray, P: int) -> Tensor:
    """document * P + bin of the context before each token, [B, L]; what padding and first tokens get means nothing."""
    B, L = docs_BL.shape
    widest = max([1, *map(len, spans)])
    numbers = torch.zeros(B, widest, dtype=torch.int64)
    for b, row in enumerate(spans):
        for k, (source, document, _, _) in enumerate(row):
            numbers[b, k] = int(firsts[source]) + document
    document_BL = numbers.to(docs_BL.device).gather(1, docs_BL.clamp(min=0))
    at_L = torch.arange(L, device=docs_BL.device)
    begins_BL = torch.ones_like(docs_BL, dtype=torch.bool)
    begins_BL[:, 1:] = docs_BL[:, 1:] != docs_BL[:, :-1]
    before_BL = at_L - (at_L * begins_BL).cummax(1).values
    powers = 2 ** torch.arange(1, P, device=docs_BL.device)
    return document_BL * P + torch.bucketize(before_BL, powers, right=True)


def padded(rows: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and document ids: 0, or -1 on the padding to the right."""
    width = max(map(len, rows))
    ids, docs = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -1)
    for b, row in enumerate(rows):
        ids[b, : len(row)], docs[b, : len(row)] = torch.tensor(row), 0
    return ids.to(device), docs.to(device)


# -------------------------------------------------------------------------------------------------------------- experts


def load(counts_E: Tensor) -> dict[str, Any]:
    """How evenly a layer's experts are used. `effective` is exp of the entropy: E when even, 1 when one takes all."""
    share_E = counts_E.double() / counts_E.sum().clamp(min=1)
    entropy = float(-torch.special.xlogy(share_E, share_E).sum())
    return {
        "min_over_mean": float(counts_E.min() / counts_E.double().mean()),
        "max_over_mean": float(counts_E.max() / counts_E.double().mean()),
        "dead": int((counts_E == 0).sum()),
        "entropy_bits": entropy / math.log(2),
        "effective": math.exp(entropy),
        "shares": share_E.tolist(),
    }


def specialisation(counts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]] | None:
    """source -> layer -> tokens per expert: by layer, the mutual information between source and expert.

    Every source weighs the same, whatever its size. `share` is of the most it could be: 1 when no two sources share an
    expert, 0 when the expert says nothing about the source. None for fewer than two sources.
    """
    if len(counts) < 2:
        return None
    found = {}
    for layer in next(iter(counts.values())):
        p_DE = torch.stack([each[layer].double() / each[layer].sum().clamp(min=1) for each in counts.values()])
        mixed_E = p_DE.mean(0)
        inside = -torch.special.xlogy(p_DE, p_DE).sum(1).mean()
        bits = max(0.0, float(-torch.special.xlogy(mixed_E, mixed_E).sum() - inside) / math.log(2))
        most = math.log2(min(p_DE.shape))
        found[layer] = {"bits": bits, "share": bits / most if most else 0.0}
    return found


def collapse(experts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each layer whose router has collapsed: experts without a token, or half of them doing nothing."""
    said = []
    for name, layer in experts.items():
        E = len(layer["shares"])
        if layer["dead"] or layer["effective"] < E / 2:
            said.append(
                f"the router of {name} has collapsed: {layer['dead']} of {E} experts took no token, the busiest takes "
                f"{layer['max_over_mean']:.1f} times the mean, and the load is that of {layer['effective']:.1f} experts"
            )
    return said


# ----------------------------------------------------------------------------------------------------------- generation


def pieces(data: DataConfig, tokenizer, tokens: int) -> Iterator[Tensor]:
    """Pieces of `tokens` tokens of held-out text, each of one document."""
    from nemo_lite.data import validation_batches

    for rows in validation_batches(data, tokenizer, rows_per_batch=1, num_batches=10**9):
        docs, ids = rows.doc_ids[0], rows.input_ids[0]
        for start in range(0, len(ids) - tokens + 1, tokens):
            part = slice(start, start + tokens)
            if docs[start] >= 0 and bool((docs[part] == docs[start]).all()):
                yield ids[part]


def free_running(
    model, data: DataConfig, tokenizer, drafts: int, prompts: int, prompt_tokens: int, new_tokens: int, batch: int = 50
) -> dict[str, Any]:
    """Greedy speculative completion of held-out prompts: acceptance, and the share of 8-grams that repeat in a row."""
    from nemo_lite.generate import generate

    heads = list(pieces(data, tokenizer, prompt_tokens))
    if not heads:
        raise UserError(f"no held-out document has {prompt_tokens} tokens for a prompt")
    heads = [heads[i * len(heads) // prompts] for i in range(prompts)] if len(heads) > prompts else heads
    steps = accepted = repeated = grams = 0
    by_position = [0] * drafts
    for start in range(0, len(heads), batch):
        out = generate(
            model,
            torch.stack(heads[start : start + batch]).to(model.device),
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
        "verify_steps": steps,
        "acceptance_length": 1 + accepted / max(steps, 1),
        "by_position": [n / max(steps, 1) for n in by_position],
        "repeated_8grams": repeated / max(grams, 1),
    }


def speed(model, prompt: Tensor, drafts: int, new_tokens: int = 128, rounds: int = 3) -> dict[str, Any]:
    """One request at a time: seconds to the first token after `prompt` [T], then tokens per second, without and with
    speculation; medians."""
    from statistics import median

    from nemo_lite.generate import generate

    ids = prompt[None].to(model.device)

    def timed(**options: Any) -> tuple[float, float]:
        generate(model, ids, max_tokens=8, **options)
        runs = [generate(model, ids, max_tokens=new_tokens, **options).stats for _ in range(rounds)]
        return median(run.prefill_seconds for run in runs), median(run.tokens_per_second for run in runs)

    first, plain = timed()
    drafted = timed(speculative=True, draft_tokens=drafts)[1] if drafts else None
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "time_to_first_token": first,
        "tokens_per_second": plain,
        "speculative_tokens_per_second": drafted,
    }
