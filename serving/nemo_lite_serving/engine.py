"""The engine: continuous batching of hybrid models with MTP speculation. `Engine.step` is all of it.

spans = scheduler.schedule()      who reads what, under one token budget
outputs = runner.read(spans)      one forward; next tokens, drafts verified exactly
runner.keep(spans)                every state back to the last token that stays
runner.draft(spans, ...)          the MTP block reads what is true now, and drafts
self._release(spans)              snapshots filed, finished sequences freed
"""

from __future__ import annotations

import time

import psutil
import torch

from nemo_lite.config import ModelConfig, UserError
from nemo_lite_serving.blocks import Blocks
from nemo_lite_serving.guides import Guides
from nemo_lite_serving.protocol import EngineInfo, EngineOptions, EngineStats, Output, Request
from nemo_lite_serving.runner import Pool, Runner
from nemo_lite_serving.scheduler import Scheduler, Sequence, Span
from nemo_lite_serving.speculation import DraftPolicy

MAX_DRAFTS = 4  # of --draft-tokens auto


def build(options: EngineOptions) -> Engine:
    """Load a MODEL_DIR and its tokenizer, and allocate the cache. Raises UserError in one sentence."""
    from nemo_lite.data.tokenizer import load_tokenizer
    from nemo_lite.kernels import wanted
    from nemo_lite.model.hybrid import HybridLM

    if options.threads:
        torch.set_num_threads(options.threads)
    kernels = wanted(options.kernels, options.device)
    model = HybridLM.from_pretrained(
        options.model_dir, dtype=options.dtype, device=options.device, kernels=kernels,
        quantization=options.quantization,
    )  # fmt: skip
    return Engine(model, options, load_tokenizer(options.model_dir))


class Engine:
    """Continues many requests at once. Not thread-safe: one caller adds, aborts and steps."""

    def __init__(self, model, options: EngineOptions, tokenizer=None):
        self.model, self.options = model.eval(), options
        self.config: ModelConfig = model.config
        if options.speculative and model.mtp is None:
            raise UserError("this model has no MTP block to draft with; serve it without --speculative mtp")
        drafts = MAX_DRAFTS if options.draft_tokens == "auto" else int(options.draft_tokens)
        if options.speculative and drafts < 1:
            raise UserError(f"draft_tokens must be 1 or more, or auto, not {options.draft_tokens}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(options, name) < 1:
                raise UserError(f"{name} must be 1 or more, not {getattr(options, name)}")
        if options.max_num_batched_tokens < options.max_num_seqs:
            raise UserError(
                f"--max-num-batched-tokens ({options.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({options.max_num_seqs}): every running sequence reads a token a step"
            )
        self.drafts = drafts if options.speculative else 0
        self.guides = Guides(tokenizer, self.config.vocab_size)
        plan = MemoryPlan(self.config, options, model.embedding.weight.dtype, model.device, self.drafts)
        self.plan = plan
        with torch.inference_mode():
            pool = Pool(
                self.config, plan.num_blocks, options.block_size, plan.num_slots, dtype=plan.dtype,
                state_dtype=plan.state_dtype, device=model.device, mtp=options.speculative,
            )  # fmt: skip
        self.blocks = Blocks(
            plan.num_blocks,
            options.block_size,
            plan.num_slots,
            caching=plan.prefix_caching,
            stateful=plan.slot_bytes > 0,
        )
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=plan.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens,
            lookahead=1 if options.speculative else 0,
            copy_slot=pool.copy_slot, copy_block=pool.copy_block, clear_slot=pool.clear_slot,
            clear_block=pool.clear_block, join=torch.cat,
        )  # fmt: skip
        adaptive = options.draft_tokens == "auto"
        self.policy = DraftPolicy(self.drafts, adaptive=adaptive) if self.drafts else None
        self.runner = Runner(model, pool, self.policy)
        if self.policy is not None and adaptive:
            with torch.inference_mode():
                self.policy.measure(self)
        self.info = EngineInfo(
            plan.max_model_len, self.config.vocab_size, plan.lines, "mtp" if options.speculative else None,
            str(options.draft_tokens) if options.speculative else "0",
        )  # fmt: skip
        self._stats = EngineStats(accepted_at=[0] * self.drafts)
        self._live: dict[str, Sequence] = {}
        self._warned = False

    # -------------------------------------------------------------------------------------------------------- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises UserError, one sentence, if it can never run."""
        if request.id in self._live:
            raise UserError(f"there is already a request {request.id!r}")
        if not request.prompt:
            raise UserError("the prompt is empty; give at least one token")
        if request.max_tokens < 1:
            raise UserError(f"max_tokens must be 1 or more, not {request.max_tokens}")
        V, limit, thinking = self.config.vocab_size, self.plan.max_model_len, request.thinking
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(request, name) or 0) < 0:
                raise UserError(f"{name} must be 0 or more, not {getattr(request, name)}")
        ids = [*request.prompt, *request.stop_ids, *(t for t, _ in request.sampling.logit_bias)]
        if thinking is not None:
            if not thinking.end_ids or (thinking.budget or 0) < 0:
                raise UserError("thinking needs the ids of its end, and a budget of 0 or more")
            ids += thinking.end_ids
        outside = next((token for token in ids if not 0 <= token < V), None)
        if outside is not None:
            raise UserError(f"token id {outside} is outside the model's {V} ids")
        if len(request.prompt) + request.max_tokens > limit:
            raise UserError(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} new ones exceed the context of {limit}"
            )
        seq = Sequence(request, list(request.prompt))
        if request.guide is not None:
            seq.matcher = self.guides.matcher(request.guide, request.stop_ids)
        self._live[request.id] = seq
        self.scheduler.waiting.append(seq)

    def abort(self, id: str) -> None:
        """Forget a request and free all it holds; unknown ids are ignored."""
        seq = self._live.pop(id, None)
        if seq is not None:
            self.scheduler.abort(id)
            self._count(seq)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    # ------------------------------------------------------------------------------------------------------------ step

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One forward for everybody; what came of it."""
        clock = time.perf_counter()
        spans = self.scheduler.schedule()
        outputs = self.runner.read(spans)
        self.runner.keep(spans)
        reading = time.perf_counter() - clock
        if self.policy is not None:
            self.runner.draft(spans, self.policy.choose(spans, self.scheduler.room))
        self._release(spans)
        if self.policy is not None and all(span.count == 1 + span.drafts for span in spans):
            rows, tokens = sum(span.count for span in spans), sum(len(output.tokens) for output in outputs)
            self.policy.stepped(rows, tokens, reading, time.perf_counter() - clock)
        return self._report(outputs)

    def _release(self, spans: list[Span]) -> None:
        for span in spans:
            if span.saves:
                self.scheduler.keep_snapshots(span, lambda position, span=span: self.runner.boundary(span, position))
            if span.seq.finish_reason is not None:
                self.scheduler.finish(span.seq)

    def _report(self, outputs: list[Output]) -> list[Output]:
        stats = self._stats
        stats.steps += 1
        for output in outputs:
            seq = self._live[output.id]
            stats.new_tokens += len(output.tokens)
            if output.tokens and not seq.counts.first_token_seconds:
                seq.counts.first_token_seconds = time.monotonic() - seq.arrival
                stats.prompt_tokens += seq.counts.prompt_tokens
            if output.finish_reason is not None:
                output.counts = seq.counts
                del self._live[output.id]
                self._count(seq)
        if self.blocks.regretted and not self._warned:
            self._warned = True
            print(
                "prefix cache: a prompt came back whose snapshot had been evicted; more memory (--memory-gib) or fewer "
                "sequences (--max-num-seqs) would keep more of them. Said once; /metrics counts evictions.", flush=True,
            )  # fmt: skip
        return outputs

    def _count(self, seq: Sequence) -> None:
        counts, stats = seq.counts, self._stats
        stats.drafts += counts.verify_steps
        stats.draft_tokens += counts.drafted
        stats.accepted_tokens += counts.accepted
        for k, n in enumerate(counts.accepted_at):
            stats.accepted_at[k] += n

    def stats(self) -> EngineStats:
        """Where the engine stands. Acceptance is counted when a request ends."""
        scheduler, blocks, stats = self.scheduler, self.blocks, self._stats
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        held = {block for seq in scheduler.running for block in seq.blocks}
        stats.kv_usage = len(held) / max(blocks.num_blocks, 1)
        stats.preemptions = scheduler.preemptions
        stats.prefix_queries, stats.prefix_hits = scheduler.prefix_queries, scheduler.prefix_hits
        stats.prefix_evictions = blocks.evictions
        return stats

    def check(self) -> None:
        """Raise AssertionError if a block, slot or sequence is lost or held twice."""
        self.scheduler.check()
        queued = {seq.request.id for seq in [*self.scheduler.running, *self.scheduler.waiting]}
        assert queued == set(self._live), "requests are lost"


class MemoryPlan:
    """How many tokens and sequences fit, and why, as numbers and as `lines` for a person."""

    def __init__(self, config: ModelConfig, options: EngineOptions, dtype, device: torch.device, drafts: int):
        self.dtype = dtype
        try:
            self.state_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
                options.mamba_cache_dtype
            ]
        except KeyError:
            raise UserError(
                f"mamba_cache_dtype must be float32, bfloat16 or float16, not {options.mamba_cache_dtype}"
            ) from None
        if dtype == torch.float64:
            self.state_dtype = torch.float64
        size = options.block_size
        block_bytes, self.slot_bytes = Pool.sizes(config, size, self.dtype, self.state_dtype, options.speculative)
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
        budget = free / 2 if options.memory_gib is None else options.memory_gib * 2**30
        asked = options.max_model_len
        if asked is not None and asked < 1:
            raise UserError(f"max_model_len must be 1 or more, not {asked}")
        length = asked or config.max_position_embeddings
        beyond = 2 + drafts  # positions that drafting and the MTP block use beyond the last token

        def blocks_for(tokens: int) -> int:
            return -(-(tokens + beyond) // size)

        seqs = min(options.max_num_seqs, max(1, int(budget / 2 / max(self.slot_bytes, 1))))
        left = budget - seqs * self.slot_bytes
        if left < 0:
            raise UserError(
                f"one sequence's Mamba states take {_size(self.slot_bytes)}, more than the {_size(budget)} there are"
            )
        snapshots = 0
        if options.prefix_caching:
            # At most four a sequence and a quarter of the memory; without Mamba layers a snapshot needs no slot.
            snapshots = min(4 * seqs, int(budget / 4 / self.slot_bytes)) if self.slot_bytes else 0
        left -= snapshots * self.slot_bytes
        useful = seqs * blocks_for(length) * (2 if options.prefix_caching else 1)
        self.num_blocks = min(useful, int(left / block_bytes)) if block_bytes else useful
        if self.num_blocks < blocks_for(length):
            fits = self.num_blocks * size - beyond
            if asked is not None or fits < 1:
                raise UserError(
                    f"{budget / 2**30:.2f} GiB hold a context of {max(fits, 0)} tokens, not {length}: lower "
                    f"--max-model-len or --max-num-seqs, or raise --memory-gib"
                )
            length = fits
        self.max_model_len, self.max_num_seqs, self.num_slots = length, seqs, seqs + snapshots
        self.prefix_caching = options.prefix_caching and (snapshots > 0 or not self.slot_bytes)
        why = "--memory-gib" if options.memory_gib is not None else f"half of {free / 2**30:.1f} GiB free"
        used = self.num_blocks * block_bytes + self.num_slots * self.slot_bytes
        self.lines = [
            f"memory: {_size(used)} of at most {_size(budget)} ({why})",
            f"context: {length:,} tokens a sequence; at most {seqs} sequences at once"
            + (
                f", not {options.max_num_seqs}: their Mamba states may take at most half of the memory"
                if seqs < options.max_num_seqs
                else ""
            ),
            f"attention: {self.num_blocks:,} blocks of {size} tokens, {self.num_blocks * size:,} in all, "
            f"{_size(block_bytes / size)} a token"
            + (" (all that the sequences can use)" if self.num_blocks == useful else " (all that memory allows)"),
            f"Mamba: {_size(self.slot_bytes)} a sequence ({str(self.state_dtype).removeprefix('torch.')} states), "
            f"{seqs} for sequences, {snapshots} for snapshots of prefixes",
        ]
        if not self.prefix_caching:
            reason = "switched off" if not options.prefix_caching else "no snapshot of the Mamba states fits in memory"
            self.lines.append(f"prefix cache: off ({reason})")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
