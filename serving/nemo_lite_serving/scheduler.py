"""Who computes what in the next step: one token budget for prompts in chunks, next tokens and drafts to verify.

A sequence has tokens (its prompt and what came of it) and `computed`, how many of them the trunk has read. A step moves
`computed` forward: by one token plus drafts when only the newest is unread, by a chunk of the prompt otherwise. There
is no other state of being "in prefill" or "in decode", and a preempted sequence simply starts again at 0, or at a
snapshot, with the tokens it had.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemo_lite.generate import Draws
from nemo_lite_serving.blocks import Blocks
from nemo_lite_serving.protocol import Counts, Request


@dataclass(eq=False)
class Sequence:
    """One request on its way. Positions count from 0; the block table holds position p in block p // block size."""

    request: Request
    tokens: list[int]
    output: list[int] = field(default_factory=list)
    computed: int = 0  # positions the trunk has read
    mtp_computed: int = 0  # positions the MTP block has read with their true trunk output
    hidden: list = field(default_factory=list)  # trunk outputs [n, H] of the positions between the two, in pieces
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None  # of the Mamba states; None: not running
    drafts: list[int] = field(default_factory=list)
    draft_probs: Any = None  # [K, V] that the drafts were drawn from; None: they are certain
    finish_reason: str | None = None
    chain: list[bytes] = field(default_factory=list)  # digests of whole blocks
    save_at: list[int] = field(default_factory=list)  # positions where a snapshot is wanted, ascending
    prompt_logprobs: list = field(default_factory=list)
    matcher: Any = None  # of a guided output
    answer_from: int | None = None  # the new token behind the reasoning's end; None: the reasoning is still open
    counts: Counts = field(default_factory=Counts)
    arrival: float = field(default_factory=time.monotonic)
    gain: float | None = None  # drafts kept a step that drafts, running mean
    confidence: list[float] = field(default_factory=list)  # the MTP block's probability of each draft
    idle_steps: int = 0  # decode steps since the last draft
    patience: int = 32  # so many of them, and it tries again
    retrying: bool = False  # it drafts to learn whether that pays by now

    def __post_init__(self):
        sampling, request = self.request.sampling, self.request
        self.draws = Draws(sampling.seed)
        # Greedy without anything that touches the logits: argmax is all there is to do.
        self.plain = (
            sampling.temperature == 0
            and not (sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias)
            and sampling.repetition_penalty == 1
            and request.guide is None
            and request.min_tokens == 0
            and (request.thinking is None or request.thinking.budget is None)
        )
        if request.thinking is None or not request.thinking.open:
            self.answer_from = 0
        self.counts.prompt_tokens = len(request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens the trunk has not read; 1 when the newest token is the only one."""
        return len(self.tokens) - self.computed

    def answer_behind(self, following: list[int]) -> int | None:
        """`answer_from` if these tokens follow."""
        if self.answer_from is not None or self.request.thinking is None:
            return self.answer_from
        end = list(self.request.thinking.end_ids)
        first = max(len(self.output) - len(end) + 1, 0)
        tail = [*self.output[first:], *following]
        for at in range(len(tail) - len(end) + 1):
            if tail[at : at + len(end)] == end:
                return first + at + len(end)
        return None

    def take(self, new: list[int]) -> int:
        """Append new tokens up to the sequence's end; how many were taken."""
        request = self.request
        new = new[: request.max_tokens - len(self.output)]
        for i, token in enumerate(new):
            if token in request.stop_ids:
                new = new[: i + 1]
                self.finish_reason = "stop"
                break
        if self.answer_from is None:
            self.answer_from = self.answer_behind(new)
        self.tokens += new
        self.output += new
        self.counts.new_tokens = len(self.output)
        if self.finish_reason is None and len(self.output) >= request.max_tokens:
            self.finish_reason = "length"
        return len(new)


@dataclass(eq=False)
class Span:
    """A sequence's part of one step: `count` positions from `start` on, the last `drafts` of them drafts.

    saves   (position, slot): keep the state after that many positions in that slot.
    offset  the first token's place in the step's flat tokens (set by the runner).
    taken   how many of the positions stay (set once the drafts are verified).
    """

    seq: Sequence
    start: int
    count: int
    drafts: int = 0
    saves: list[tuple[int, int | None]] = field(default_factory=list)
    offset: int = 0
    taken: int = 0

    @property
    def samples(self) -> bool:
        """Whether a next token comes out of it: it reaches the sequence's end."""
        return self.start + self.count - self.drafts == len(self.seq.tokens)


class Scheduler:
    """First come, first served; the youngest sequence gives way when memory runs out."""

    def __init__(
        self, blocks: Blocks, *, max_num_seqs: int, max_num_batched_tokens: int, lookahead: int,
        copy_slot: Callable[[int, int], None], copy_block: Callable[[int, int], None],
        clear_slot: Callable[[int], None], clear_block: Callable[[int], None], join: Callable[[list], Any],
    ):  # fmt: skip
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.lookahead = lookahead  # positions beyond the trunk's that the MTP block writes
        self.copy_slot, self.copy_block = copy_slot, copy_block
        self.clear_slot, self.clear_block, self.join = clear_slot, clear_block, join
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    def schedule(self) -> list[Span]:
        """The spans of the next step: next tokens first, then prompts under way, then new sequences."""
        spans: list[Span] = []
        budget, preempted = self.max_num_batched_tokens, self.preemptions
        order = sorted(self.running, key=lambda seq: seq.remaining > 1)
        for i, seq in enumerate(order):
            if seq.slot is None:  # preempted for an older one, a moment ago
                continue
            # Every other one still to come reads a token at least: drafts and long prompts starve nobody.
            count = min(seq.remaining + len(seq.drafts), budget - (len(order) - i - 1))
            if not self._room_or_preempt(seq, seq.computed + count + self.lookahead):
                continue
            spans.append(self._span(seq, count))
            budget -= count
        if self.preemptions != preempted:
            return [span for span in spans if span.seq.slot is not None]
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self._admit(seq) and (self.running or not self._admit(seq, cached=False)):
                break
            self.running.append(self.waiting.popleft())
            spans.append(self._span(seq, min(seq.remaining, budget)))
            budget -= spans[-1].count
        return spans

    def _span(self, seq: Sequence, count: int) -> Span:
        drafts = max(0, count - seq.remaining)
        if drafts < len(seq.drafts):
            seq.drafts = seq.drafts[:drafts]
            seq.draft_probs = seq.draft_probs[:drafts] if seq.draft_probs is not None else None
        span = Span(seq, seq.computed, count, drafts, taken=count - drafts)
        while seq.save_at and seq.save_at[0] <= span.start + count - drafts:
            position = seq.save_at.pop(0)
            slot = self.blocks.take_slot() if self.blocks.stateful else None
            if slot is not None or not self.blocks.stateful:
                span.saves.append((position, slot))
        return span

    # ------------------------------------------------------------------------------------------------------- memory

    def room(self, seq: Sequence, positions: int) -> bool:
        """Give the sequence blocks for that many positions, if there are."""
        missing = self.blocks.blocks_for(positions) - len(seq.blocks)
        if missing <= 0:
            return True
        taken = self.blocks.take_blocks(missing)
        if taken is None:
            return False
        seq.blocks += taken
        return True

    def _room_or_preempt(self, seq: Sequence, positions: int) -> bool:
        while not self.room(seq, positions):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.computed = seq.mtp_computed = 0
        seq.hidden, seq.drafts, seq.draft_probs, seq.save_at = [], [], None, []
        seq.prompt_logprobs = []
        seq.counts.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self.blocks.release_blocks(seq.blocks)
        seq.blocks = []
        if seq.slot is not None:
            self.blocks.release_slot(seq.slot)
            seq.slot = None

    def _admit(self, seq: Sequence, cached: bool = True) -> bool:
        """Give a waiting sequence its slot and the blocks of all its tokens, from a snapshot where one fits. (A
        snapshot's last block is held beside its copy: when that one block is missing, it must do without.)"""
        blocks, fresh = self.blocks, not seq.output and not seq.counts.preemptions
        snapshot = None
        if blocks.caching and seq.request.prompt_logprobs is None:
            blocks.digests(seq.tokens, seq.chain)
            snapshot = blocks.find(seq.tokens, seq.chain) if cached else None
        if snapshot is not None:
            snapshot.pinned = True
        whole = snapshot.length // blocks.block_size if snapshot is not None else 0
        seq.blocks = blocks.share(snapshot.blocks[:whole]) if snapshot is not None else []
        seq.slot = slot = blocks.take_slot()
        fits = slot is not None and self.room(seq, len(seq.tokens) + self.lookahead)
        if snapshot is not None:
            snapshot.pinned = False
        if not fits or slot is None:
            self._release(seq)
            return False
        if snapshot is None:
            self.clear_slot(slot)
        else:
            if snapshot.slot is not None:
                self.copy_slot(snapshot.slot, slot)
            if snapshot.length % blocks.block_size:
                self.copy_block(snapshot.blocks[whole], seq.blocks[whole])
            seq.computed, seq.mtp_computed, seq.hidden = snapshot.length, snapshot.mtp_length, [snapshot.hidden]
        if fresh:
            seq.counts.queued_seconds = time.monotonic() - seq.arrival
            if blocks.caching and seq.request.prompt_logprobs is None:
                self.prefix_queries += len(seq.tokens)
                self.prefix_hits += seq.computed
                seq.counts.cached_tokens = seq.computed
                self._plan_saves(seq)
        return True

    def _plan_saves(self, seq: Sequence) -> None:
        size, length = self.blocks.block_size, len(seq.tokens)
        wanted = {length, (length - 1) // size * size, self.blocks.parting(seq.chain)}
        seq.save_at = sorted(position for position in wanted if position > seq.computed)

    # ----------------------------------------------------------------------------------------------- end of a sequence

    def keep_snapshots(self, span: Span, boundary: Callable[[int], tuple[int, Any]]) -> None:
        """File what a span saved; boundary(n) gives the MTP block's part of a snapshot of n tokens."""
        seq = span.seq
        for position, slot in span.saves:
            mtp_length, hidden = boundary(position)
            sound = seq.finish_reason != "error" and bool(hidden.isfinite().all())
            kept = sound and self.blocks.keep(seq.tokens, position, seq.chain, seq.blocks, slot, mtp_length, hidden)
            if not kept and slot is not None:
                self.blocks.release_slot(slot)
        span.saves = []

    def finish(self, seq: Sequence) -> None:
        """End a running sequence; what it computed stays as a snapshot."""
        self.running.remove(seq)
        if seq.finish_reason == "error":  # a mask does not hide what is not a number
            for block in seq.blocks:
                if self.blocks.references[block] == 1:
                    self.clear_block(block)
        elif self.blocks.caching and seq.request.prompt_logprobs is None and seq.hidden:
            self.blocks.digests(seq.tokens, seq.chain)
            slot = seq.slot if self.blocks.stateful else None
            hidden = self.join(seq.hidden)
            if self.blocks.keep(seq.tokens, seq.computed, seq.chain, seq.blocks, slot, seq.mtp_computed, hidden):
                seq.slot = None if self.blocks.stateful else seq.slot
        self._release(seq)

    def abort(self, id: str) -> Sequence | None:
        """Drop a sequence and free what it held."""
        for seq in self.running:
            if seq.request.id == id:
                self.running.remove(seq)
                self._release(seq)
                return seq
        for seq in self.waiting:
            if seq.request.id == id:
                self.waiting.remove(seq)
                return seq
        return None

    def check(self) -> None:
        """Raise AssertionError if memory is lost or held twice."""
        self.blocks.check([(seq.blocks, seq.slot) for seq in self.running])
