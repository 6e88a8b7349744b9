"""Draft, sample, accept: the pure functions of decoding, and the plain loop over them.

Speculative decoding (arXiv 2211.17192): the MTP block drafts K tokens from a distribution q, the trunk reads them in
one forward and gives p; draft d is kept with probability min(1, p(d)/q(d)), the first one refused is replaced by a draw
from max(p - q, 0), and when all are kept one more token is drawn from p. What comes out is distributed as p, exactly;
greedy decoding is the case where p and q are one-hot.

A row with a seed is verified in another exact way (arXiv 2408.07978): the noise of position i is a function of seed and
i alone, the token is argmax p / noise, the draft was argmax q / noise, and it is kept when the two agree. Somewhat
fewer drafts are kept, but the text depends on the seed only: not on speculation, neighbours or interruptions.

Shape letters: B rows, L prompt length, V vocabulary, K drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_lite.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in the terms of the OpenAI and vLLM APIs.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave the distribution whole. The penalties look at the tokens
    so far: presence and frequency at the new ones, repetition (CTRL, arXiv 1909.05858) at the prompt too. logit_bias
    holds (token, added to its logit). With a seed, the noise of a position depends on seed and position alone, so that
    neither speculation nor neighbours nor preemption changes a token; without one every draw is fresh.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    def __post_init__(self):
        finite = float("inf")
        if not 0 <= self.temperature < finite:
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be between 0 and 1, not {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} must be between -2 and 2, not {getattr(self, name)}")
        if not 0 < self.repetition_penalty < finite:
            raise UserError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise UserError(f"logit_bias must map token ids to -100 to 100, not {token} to {bias}")


def adjust(
    logits_KV: Tensor,
    sampling: Sampling,
    prompt: Sequence[int] | Tensor,
    output: Sequence[int],
    drafts: Sequence[int] = (),
) -> Tensor:
    """The logits with bias and penalties. Row k stands after prompt, output and the first k drafts."""
    presence, frequency, repetition = (
        sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty,
    )  # fmt: skip
    if not (presence or frequency or sampling.logit_bias or repetition != 1):
        return logits_KV
    logits = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32), copy=True)
    rows, V = logits.shape
    if presence or frequency or repetition != 1:
        new = torch.bincount(torch.as_tensor(output, dtype=torch.int64), minlength=V).to(logits).repeat(rows, 1)
        for k, token in enumerate(drafts[: rows - 1]):
            new[k + 1 :, token] += 1
        if repetition != 1:
            old = torch.bincount(torch.as_tensor(prompt, dtype=torch.int64), minlength=V).to(logits.device)
            logits = torch.where(
                (new > 0) | (old > 0), torch.where(logits > 0, logits / repetition, logits * repetition), logits
            )
        logits -= frequency * new + presence * (new > 0)
    for token, bias in sampling.logit_bias:
        logits[:, token] += bias
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [..., V] that a token is drawn from: temperature, then top-k, top-p, min-p."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The largest is taken away first: a tiny temperature must not overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= sampling.top_p  # the token that crosses top_p stays
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    if sampling.top_p < 1 or sampling.min_p > 0:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs_V: Tensor, generator: torch.Generator | None) -> int:
    """One token from a distribution (which need not be normalised). A certain one takes no random number."""
    possible = probs_V.nonzero()
    if len(possible) == 1:
        return int(possible)
    cumulative = probs_V.double().cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1].cpu()
    index = int(torch.searchsorted(cumulative, point.to(cumulative.device), right=True))
    return min(index, int(possible[-1]))  # rounding must not reach a token of probability 0


def accept(drafts_K: Sequence[int], q_KV: Tensor, p_KV: Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    """(drafts kept, the token after them) for one row; q_KV [K, V] and p_KV [K + 1, V] are distributions."""
    for k, token in enumerate(drafts_K):
        p, q = float(p_KV[k, token]), float(q_KV[k, token])
        # A certain draft needs no random number, so greedy decoding draws none.
        if p >= q or (p > 0 and float(torch.rand((), generator=generator, dtype=torch.float64)) * q < p):
            continue
        rest = (p_KV[k] - q_KV[k]).clamp(min=0)
        return k, draw(rest if float(rest.sum()) > 0 else p_KV[k], generator)
    return len(drafts_K), draw(p_KV[len(drafts_K)], generator)


class Draws:
    """The randomness of one row: from its seed by position, or fresh (seed None)."""

    def __init__(self, seed: int | None):
        self.seed = seed
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()

    def choose(self, p_V: Tensor, index: int) -> int:
        """The row's new token number `index`, drawn from p_V."""
        if self.seed is None:
            return draw(p_V, self.generator)
        # An exponential race: argmax p / noise is distributed as p (the Gumbel-max trick).
        self.generator.manual_seed(_mix(self.seed, index))
        noise = torch.empty(p_V.shape[-1], dtype=torch.float64).exponential_(generator=self.generator)
        return int((p_V.double() / noise.clamp_(min=1e-300).to(p_V.device)).argmax())

    def verify(self, drafts_K: Sequence[int], q_KV: Tensor, p_KV: Tensor, index: int) -> tuple[int, int]:
        """(drafts kept, the token after them); draft 0 would be new token number `index`."""
        if self.seed is None:
            return accept(drafts_K, q_KV, p_KV, self.generator)
        for k, token in enumerate(drafts_K):
            right = self.choose(p_KV[k], index + k)
            if right != token:
                return k, right
        return len(drafts_K), self.choose(p_KV[len(drafts_K)], index + len(drafts_K))


def _mix(seed: int, index: int) -> int:
    """A 64-bit hash (splitmix64), so that neighbouring positions and seeds have nothing in common."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        z = ((z ^ (z >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


@dataclass
class Stats:
    """Counts of one generation. Acceptance length = 1 + accepted drafts / verify steps."""

    rows: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    verify_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # by draft position

    @property
    def tokens_per_second(self) -> float:
        """New tokens after each row's first one, which is the prefill's, per second of decoding."""
        decoded = self.new_tokens - self.rows
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        return 1 + self.accepted / self.verify_steps if self.verify_steps else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of verify steps in which draft 1, 2, ... was kept."""
        return [n / self.verify_steps for n in self.accepted_at] if self.verify_steps else []

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "acceptance_length": self.acceptance_length,
            "acceptance_by_position": self.acceptance_by_position,
        }


@dataclass
class Generation:
    """New tokens of every row (they end with the stop token, if one came), the same behind the prompts, and counts."""

    tokens: list[list[int]]
    sequences: Tensor
    stats: Stats


def generate(
    model,
    input_ids: Tensor,
    *,
    doc_ids: Tensor | None = None,
    max_tokens: int = 64,
    seed: int | None = 0,
    speculative: bool = False,
    draft_tokens: int = 2,
    stop_ids: Sequence[int] = (),
    prefill_chunk: int = 2048,
    drafter: Callable | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    **sampling_options: Any,
) -> Generation:
    """Continue the prompts input_ids [B, L] by at most max_tokens tokens a row.

    doc_ids        -1 marks padding of shorter prompts, left or right.
    speculative    draft `draft_tokens` tokens with the MTP block and verify them; the tokens are the same.
    seed           row b's is seed + b, so neighbours change nothing; None draws afresh.
    prefill_chunk  tokens of the prompts read at once.
    drafter        replaces the MTP block in tests: (cache, next tokens [B], K) -> drafts [B, K], taken as certain.
    on_tokens      called as (row, new tokens) when they are final.
    The other options are those of :class:`Sampling` (temperature, top_k, ...); the default is greedy.
    """
    sampling = Sampling(**sampling_options)
    B, L = input_ids.shape
    if max_tokens < 1:
        raise UserError(f"max_tokens must be 1 or more, not {max_tokens}")
    if speculative and drafter is None and model.mtp is None:
        raise UserError("this model has no MTP block to draft with; generate without speculation")
    if speculative and draft_tokens < 1:
        raise UserError(f"draft_tokens must be 1 or more, not {draft_tokens}")
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk must be 1 or more, not {prefill_chunk}")
    if L == 0 or (doc_ids is not None and bool((doc_ids < 0).all(1).any())):
        raise UserError("the prompt is empty; give at least one token")
    was_training, draws = model.training, [Draws(None if seed is None else seed + b) for b in range(B)]
    prompts = [row if doc_ids is None else row[doc_ids[b] >= 0] for b, row in enumerate(input_ids)]
    greedy = sampling == Sampling()
    model.eval()
    stats = Stats(rows=B, prompt_tokens=B * L if doc_ids is None else int((doc_ids >= 0).sum()))
    stats.accepted_at = [0] * (draft_tokens if speculative else 0)
    cache = model.new_cache(B, speculative=speculative and drafter is None)
    rows: list[list[int]] = [[] for _ in range(B)]
    done = [False] * B

    def distributions(b: int, logits_KV: Tensor, drafts: Sequence[int] = ()) -> Tensor:
        """Row b's distributions behind its tokens so far and 0, 1, ... of the drafts."""
        return probabilities(adjust(logits_KV, sampling, prompts[b], rows[b], drafts), sampling)

    def choose(logits_BV: Tensor) -> list[int]:
        """The next token of every row."""
        if greedy:
            return logits_BV.argmax(-1).tolist()
        return [draws[b].choose(distributions(b, row[None])[0], len(rows[b])) for b, row in enumerate(logits_BV)]

    def draft(next_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, K] and the distributions [B, K, V] they were drawn from; None where they are certain."""
        if drafter is not None:
            return drafter(cache, next_B, draft_tokens), None
        if greedy:
            return model.draft(cache, next_B, draft_tokens, lambda logits: logits.argmax(-1)), None
        drafts: list[list[int]] = [[] for _ in range(B)]
        taken = []

        def pick(logits_BV: Tensor) -> Tensor:
            taken.append(torch.cat([
                distributions(b, row.expand(len(drafts[b]) + 1, -1), drafts[b])[-1:]
                for b, row in enumerate(logits_BV)
            ]))  # fmt: skip
            for b, q_V in enumerate(taken[-1]):
                drafts[b].append(draws[b].choose(q_V, len(rows[b]) + len(drafts[b])))
            return torch.tensor([row[-1] for row in drafts], device=logits_BV.device)

        return model.draft(cache, next_B, draft_tokens, pick), torch.stack(taken, dim=1)

    def take(b: int, new: list[int]) -> int:
        """Append to row b up to its end; how many were taken."""
        if done[b]:
            return 0
        new = new[: max_tokens - len(rows[b])]
        for i, token in enumerate(new):
            if token in stop_ids:
                new = new[: i + 1]
                done[b] = True
        rows[b] += new
        done[b] = done[b] or len(rows[b]) >= max_tokens
        if on_tokens is not None and new:
            on_tokens(b, new)
        return len(new)

    try:
        with torch.inference_mode():
            clock = time.perf_counter()
            last_BH = None
            for start in range(0, L, prefill_chunk):
                part = slice(start, start + prefill_chunk)
                docs = doc_ids[:, part] if doc_ids is not None else None
                out = model(input_ids[:, part], doc_ids=docs, cache=cache)
                if docs is None:
                    last_BH = out.hidden[:, -1]
                else:
                    valid = docs >= 0
                    position = (valid * torch.arange(1, docs.shape[1] + 1, device=docs.device)).argmax(1)
                    here = out.hidden[torch.arange(B, device=docs.device), position]
                    last_BH = here if last_BH is None else torch.where(valid.any(1)[:, None], here, last_BH)
            following = choose(model.head(last_BH))
            for b in range(B):
                take(b, [following[b]])
            stats.prefill_seconds, clock = time.perf_counter() - clock, time.perf_counter()

            while not all(done):
                next_B = torch.tensor(following, device=input_ids.device)
                if not speculative:
                    following = choose(model.head(model(next_B[:, None], cache=cache).hidden[:, -1]))
                    for b in range(B):
                        take(b, [following[b]])
                    continue
                drafts_BK, q_BKV = draft(next_B)
                out = model(torch.cat([next_B[:, None], drafts_BK], dim=1), cache=cache, tentative=True)
                p_BKV = torch.stack([distributions(b, row, drafts_BK[b].tolist()) for b, row in enumerate(out.logits)])
                if q_BKV is None:
                    q_BKV = torch.zeros_like(p_BKV[:, :-1]).scatter_(-1, drafts_BK[..., None], 1.0)
                keep = []
                for b in range(B):
                    drafts = drafts_BK[b].tolist()
                    kept, following[b] = draws[b].verify(drafts, q_BKV[b], p_BKV[b], len(rows[b]))
                    keep.append(kept + 1)
                    if not done[b]:
                        stats.verify_steps += 1
                        stats.drafted += draft_tokens
                        stats.accepted += kept
                        for k in range(kept):
                            stats.accepted_at[k] += 1
                        take(b, [*drafts[:kept], following[b]])
                cache.commit(keep)
            stats.decode_seconds = time.perf_counter() - clock
    finally:
        model.train(was_training)
    stats.new_tokens = sum(len(row) for row in rows)
    width = max(len(row) for row in rows)
    fill = model.config.pad_token_id or 0
    new = torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=input_ids.device)
    return Generation(rows, torch.cat([input_ids, new], dim=1), stats)


# ------------------------------------------------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    """`nemo-lite generate MODEL_DIR --prompt TEXT`."""
    import argparse
    import json
    import sys

    parser = argparse.ArgumentParser(
        prog="nemo-lite generate", description="Complete a text with a MODEL_DIR; tokens stream as they come."
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads it from standard input")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: 1, off)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: 0, off)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (default: 0)")
    parser.add_argument("--speculative", choices=["mtp"], help="draft with the model's own MTP block")
    parser.add_argument("--draft-tokens", type=int, metavar="K", help="drafts a step (default: the training depth)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-document token")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], help="default: as stored")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="pack weights as they are read (default: no)")
    parser.add_argument("--kernels", metavar="OP=NAME[,...]", help="backends of ops (default: auto; nemo-lite kernels)")
    parser.add_argument("--stats", action="store_true", help="print tokens/s and acceptance to standard error")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    args = parser.parse_args(argv)
    if args.prompt is None:
        parser.error("--prompt TEXT is needed")
    if args.draft_tokens is not None and args.speculative is None:
        parser.error("--draft-tokens needs --speculative mtp")
    from nemo_lite.data.tokenizer import load_tokenizer
    from nemo_lite.kernels import wanted
    from nemo_lite.model.hybrid import HybridLM

    if args.threads:
        torch.set_num_threads(args.threads)
    kernels = wanted(args.kernels, args.device)
    model = HybridLM.from_pretrained(
        args.model_dir, dtype=args.dtype, device=args.device, kernels=kernels, quantization=args.quantization
    )
    tokenizer = load_tokenizer(args.model_dir)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty; give at least one character")
    stop = () if args.ignore_eos or tokenizer.eod_id is None else (tokenizer.eod_id,)
    text = tokenizer.stream()

    def show(row: int, tokens: list[int]) -> None:
        sys.stdout.write("".join(text.push(token) for token in tokens if token not in stop))
        sys.stdout.flush()

    if not args.json:
        sys.stdout.write(prompt)
        sys.stdout.flush()
    out = generate(
        model,
        torch.tensor([ids], device=args.device),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        speculative=args.speculative is not None,
        draft_tokens=model.config.mtp.depth if args.draft_tokens is None else args.draft_tokens,
        stop_ids=stop,
        on_tokens=None if args.json else show,
    )
    if args.json:
        body = {
            "prompt": prompt,
            "text": tokenizer.decode([t for t in out.tokens[0] if t not in stop]),
            "tokens": out.tokens[0],
            "stats": out.stats.as_dict(),
        }
        print(json.dumps(body))
        return 0
    print(text.flush())
    if args.stats:
        print(describe(out.stats), file=sys.stderr)
    return 0


def describe(stats: Stats) -> str:
    """Statistics of one generation as a few lines for a person."""
    lines = [
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, "
        f"{stats.new_tokens} new tokens at {stats.tokens_per_second:.1f} tokens/s"
    ]
    if stats.verify_steps:
        positions = ", ".join(f"{share:.0%}" for share in stats.acceptance_by_position)
        lines.append(
            f"acceptance length {stats.acceptance_length:.2f} (1 + {stats.accepted} accepted drafts / "
            f"{stats.verify_steps} verify steps); kept by position: {positions}"
        )
    return "\n".join(lines)
