"""The model on paged memory: one ragged forward a step, verification, and drafting for the next step.

A step's tokens lie one after the other, [T]. Linears, norms and experts see all of them at once; convolution, scan and
attention see *parts*: all sequences that read equally many tokens (next token plus drafts) are one part [B, L], every
piece of a prompt is one [1, L]. A piece ends where a snapshot is wanted, so keeping one costs no extra forward.

The MTP block reads, at position p, the trunk output of p and token p + 1. Its keys and values of p lie in place p + 1:
what a block of the cache holds then depends on the tokens of that block and before, in the trunk and in the MTP block
alike, and can be shared. It runs at the end of a step, when every sequence's next token is known.

Shape letters: T tokens, B rows, L length, R rows of logits, V vocabulary, H hidden, w = W-1, C channels, M Mamba
layers, S slots, N blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from functools import cached_property

import torch
from nemo_lite_kernels.quant import stochastic_round
from torch import Tensor

from nemo_lite import pattern as patterns
from nemo_lite.config import ModelConfig, UserError
from nemo_lite.generate import adjust, probabilities
from nemo_lite.model.cache import Nothing, Replay
from nemo_lite.model.context import Context
from nemo_lite_serving.protocol import Output, Request, TokenLogprobs
from nemo_lite_serving.scheduler import Sequence, Span
from nemo_lite_serving.speculation import DraftPolicy

PENDING = 1024  # trunk outputs a sequence that is not drafting may keep before the MTP block reads them


class Pool:
    """The tensors behind blocks and slots: per attention layer k, v [N, block size, K, D]; for all Mamba layers of the
    trunk, and of the MTP block, windows [M, S, w, C] and states [M, S, H, P, N]. Zeroed, because padded attention looks
    at places nobody has written."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, num_slots: int, *,
        dtype: torch.dtype, state_dtype: torch.dtype, device: torch.device, mtp: bool,
    ):  # fmt: skip
        self.block_size, self.device, self.dtype = block_size, device, dtype
        self.compute_dtype = torch.promote_types(dtype, torch.float32)
        self.rounds = state_dtype == torch.float16
        channels = config.mamba_inner + 2 * config.mamba_groups_state
        state = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        keys = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)

        def allocate(letters: str):
            """(letter, k or windows, v or states, number among its kind) of each layer; stacked windows and states."""
            M = letters.count(patterns.MAMBA)
            windows = torch.zeros(M, num_slots, config.conv_kernel - 1, channels, dtype=dtype, device=device)
            states = torch.zeros(M, num_slots, *state, dtype=state_dtype, device=device)
            layers = []
            for letter in letters:
                pair: tuple[Tensor | None, Tensor | None] = (None, None)
                if letter == patterns.ATTENTION:
                    pair = (
                        torch.zeros(keys, dtype=dtype, device=device),
                        torch.zeros(keys, dtype=dtype, device=device),
                    )
                elif letter == patterns.MAMBA:
                    i = letters[: len(layers)].count(letter)
                    pair = (windows[i], states[i])
                layers.append((letter, *pair, letters[: len(layers)].count(letter)))
            return layers, (windows, states)

        self.trunk, self.trunk_mamba = allocate(config.layers)
        self.mtp, self.mtp_mamba = allocate(config.mtp_layers if mtp else "")
        self.mtp_stateful = len(self.mtp_mamba[0]) > 0
        self._lanes: dict = {}

    def pages(self, layers) -> bool:
        """Whether these layers have keys and values."""
        return any(letter == patterns.ATTENTION for letter, *_ in layers)

    def lane_cache(self, step, layers):
        """The tensors of the trunk's or the MTP block's layers as the fused step takes them."""
        if id(layers) not in self._lanes:
            self._lanes[id(layers)] = step.cache([a for _, a, _, _ in layers], [b for _, _, b, _ in layers])
        return self._lanes[id(layers)]

    @staticmethod
    def sizes(
        config: ModelConfig, block_size: int, dtype: torch.dtype, state_dtype: torch.dtype, mtp: bool
    ) -> tuple[int, int]:
        """Bytes of one block and of one slot, over all layers."""
        letters = config.layers + (config.mtp_layers if mtp else "")
        keys = 2 * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize
        window = (config.conv_kernel - 1) * (config.mamba_inner + 2 * config.mamba_groups_state) * dtype.itemsize
        state = config.mamba_inner * config.ssm_state_size * state_dtype.itemsize
        return letters.count(patterns.ATTENTION) * keys, letters.count(patterns.MAMBA) * (window + state)

    def copy_slot(self, source: int, target: int, *, only_mtp: bool = False) -> None:
        for tensor in (*(() if only_mtp else self.trunk_mamba), *self.mtp_mamba):
            tensor[:, target] = tensor[:, source]

    def clear_slot(self, slot: int) -> None:
        for tensor in (*self.trunk_mamba, *self.mtp_mamba):
            tensor[:, slot] = 0

    def copy_block(self, source: int, target: int) -> None:
        for letter, k, v, _ in (*self.trunk, *self.mtp):
            if letter == patterns.ATTENTION:
                k[target], v[target] = k[source], v[source]

    def clear_block(self, block: int) -> None:
        for letter, k, v, _ in (*self.trunk, *self.mtp):
            if letter == patterns.ATTENTION:
                k[block], v[block] = 0, 0


class Part:
    """Rows of equal length in one forward, and the cache behind them as the layers see it (`ctx.stream`).

    first       the place of position 0: 0 in the trunk, 1 in the MTP block.
    save_slot   keep the states after this part there too.
    """

    def __init__(
        self, pool: Pool, layers, seqs: Rows[Sequence], starts: list[int], length: int, *,
        first: int = 0, tentative: bool = False, save_slot: int | None = None,
    ):  # fmt: skip
        self.pool, self.layers, self.seqs, self.save_slot = pool, layers, seqs, save_slot
        self.starts, self.length, self.first = starts, length, first
        self.end = max(starts) + length + first
        B = len(seqs)
        # Neighbouring slots are a view; else they are gathered and scattered.
        self.slots: list[int] = [seq.slot for seq in seqs]  # type: ignore[misc]
        neighbours = B == 1 or self.slots == list(range(self.slots[0], self.slots[0] + B))
        self.slot = self.slots[0] if neighbours else None
        self._offered = self._lane = None  # to a fused step; and once it has run
        self.ctx = Context(B, length, stream=self, starts=starts, counts=[length] * B, tentative=tentative)  # type: ignore[arg-type]

    def _table(self) -> tuple[list[int], int]:
        """The blocks of each row, row after row, and how many a row has."""
        n = -(-self.end // self.pool.block_size)
        # Shorter rows are filled with a block of their own: what is masked must still be finite.
        return [b for seq in self.seqs for b in (*seq.blocks[:n], *seq.blocks[-1:] * (n - len(seq.blocks)))], n

    # What the layers use when they run one after the other; the fused step never asks for these.

    @cached_property
    def slots_B(self) -> Tensor:
        return torch.tensor(self.slots, device=self.pool.device)

    @cached_property
    def table_BN(self) -> Tensor:
        blocks, n = self._table()
        return torch.tensor(blocks, device=self.pool.device).view(-1, n)

    @cached_property
    def place(self) -> int | None:
        """Where position 0 lies, for a single row whose blocks are neighbours."""
        if len(self.seqs) > 1:
            return None
        blocks, n = self._table()
        return blocks[0] * self.pool.block_size if blocks == list(range(blocks[0], blocks[0] + n)) else None

    @cached_property
    def starts_B(self) -> Tensor:
        return torch.tensor(self.starts, device=self.pool.device)

    @cached_property
    def places_T(self) -> Tensor:
        size, columns = self.pool.block_size, torch.arange(self.length, device=self.pool.device)
        position_BL = self.starts_B[:, None] + self.first + columns
        block_BL = self.table_BN.gather(1, position_BL // size)
        return (block_BL * size + position_BL % size).flatten()

    @cached_property
    def states(self) -> list:
        return [
            PagedMamba(self, i, a, b) if letter == patterns.MAMBA
            else PagedKV(self, a, b) if letter == patterns.ATTENTION
            else _NOTHING
            for letter, a, b, i in self.layers
        ]  # fmt: skip

    def lane(self, step, ctx: Context, dtype: torch.dtype):
        """This part as the fused step reads it, or None where it cannot: states narrower than float32, or one to be
        saved."""
        pool = self.pool
        if pool.trunk_mamba[1].dtype != torch.float32 or self.save_slot is not None or pool.dtype != dtype:
            return None
        cache = pool.lane_cache(step, self.layers)
        tokens = ctx.batch * ctx.length
        held = torch.empty(step.held_size(tokens), dtype=torch.float32) if ctx.tentative else None
        blocks = self._table()[0] if pool.pages(self.layers) else self.slots
        plan = step.part(
            rows=ctx.batch, length=ctx.length, tentative=ctx.tentative, starts=self.starts, slots=self.slots,
            table=blocks, block_size=pool.block_size, inputs=cache, outputs=cache, held=held, first=self.first,
        )  # fmt: skip
        self._offered = (plan, step, dtype)
        return plan

    def stepped(self, ctx: Context) -> None:
        """The fused step has run: the pool holds the states already."""
        self._lane = self._offered

    def write(self, tensor: Tensor, rows: Tensor, dim: int = 0) -> None:
        """Write the rows' slots, which are dimension `dim` of the tensor."""
        if self.slot is not None:
            tensor.narrow(dim, self.slot, len(self.seqs)).copy_(rows)
        else:
            tensor.index_copy_(dim, self.slots_B, rows.to(tensor.dtype))
        if self.save_slot is not None:
            tensor.select(dim, self.save_slot).copy_(rows.select(dim, 0))

    def keep(self, counts: list[int]) -> None:
        """Take in the first counts[b] >= 1 tokens of this part, which was tentative: all its Mamba layers at once."""
        if self._lane is not None:
            plan, step, dtype = self._lane
            step.advance(plan, counts, dtype)
            return
        held = [state.held for state in self.states if isinstance(state, PagedMamba)]
        if not held:
            return
        windows, states = self.pool.trunk_mamba
        M, B, w = len(held), len(counts), windows.shape[2]
        extended = torch.stack([extended for extended, _ in held])
        replays = [replay for _, replay in held]
        counts_B = torch.tensor(counts, device=extended.device)
        if len(set(counts)) == 1:
            window = extended[:, :, counts[0] : counts[0] + w]
        else:
            columns = counts_B[:, None] + torch.arange(w, device=counts_B.device)
            window = extended.gather(2, columns[None, ..., None].expand(M, -1, -1, extended.shape[3]))
        x, dt, b, state = (
            torch.cat([getattr(replay, name) for replay in replays])
            for name in ("x_BLHP", "dt_BLH", "B_BLGN", "state_BHPN")
        )
        A = torch.stack([replay.A_H for replay in replays])
        A = A.repeat_interleave(B, 0) if B > 1 else A
        state = replays[0].advance(x, dt, A, b, state, counts_B.repeat(M))
        self.write(windows, window, dim=1)
        state = state.unflatten(0, (M, B))
        self.write(states, self.rounded(state, range(M), counts_B) if self.pool.rounds else state, dim=1)

    def rounded(self, state_MBHPN: Tensor, layers: Rows[int], counts_B: Tensor | int) -> Tensor:
        """States in half precision. Rounding to the nearest loses what is small beside the state, always to the same
        side; stochastic rounding does not. The noise is a function of layer and position alone."""
        M, B = state_MBHPN.shape[:2]
        after_B = self.starts_B + counts_B
        stream = torch.tensor(layers, device=after_B.device).repeat_interleave(B)
        offset = after_B.repeat(M)
        flat = stochastic_round(
            state_MBHPN.flatten(0, 1), torch.float16, torch.zeros_like(offset), offset, stream=stream
        )
        return flat.unflatten(0, (M, B))


_NOTHING = Nothing()


class PagedMamba:
    """One Mamba layer's windows and states for the rows of a part; see :class:`nemo_lite.model.cache.MambaState`."""

    def __init__(self, part: Part, layer: int, windows: Tensor, states: Tensor):
        self.part, self.layer, self.windows, self.states = part, layer, windows, states
        self.held: tuple[Tensor, Replay]
        # The rows of neighbouring slots as views.
        slot, B = part.slot, len(part.seqs)
        self.live = None if slot is None else (windows.narrow(0, slot, B), states.narrow(0, slot, B))

    @property
    def window(self) -> Tensor:
        return self.live[0] if self.live is not None else self.windows.index_select(0, self.part.slots_B)

    @property
    def state(self) -> Tensor:
        found = self.live[1] if self.live is not None else self.states.index_select(0, self.part.slots_B)
        return found.to(self.part.pool.compute_dtype)

    def advance(self, x_BLC: Tensor, state: Tensor, ctx: Context) -> None:
        part, w = self.part, self.windows.shape[1]
        window = x_BLC[:, -w:] if ctx.length >= w else torch.cat([self.window, x_BLC], 1)[:, -w:]
        if part.pool.rounds:
            state = part.rounded(state[None], [self.layer], ctx.length)[0]
        if self.live is not None and part.save_slot is None:
            self.live[0].copy_(window)
            self.live[1].copy_(state)
        else:
            part.write(self.windows, window)
            part.write(self.states, state)

    def hold(self, x_BLC: Tensor, replay: Replay, ctx: Context) -> None:
        self.held = torch.cat([self.window, x_BLC], 1), replay


class PagedKV:
    """One attention layer's keys and values for the rows of a part; see :class:`nemo_lite.model.cache.KVState`."""

    def __init__(self, part: Part, k: Tensor, v: Tensor):
        self.part, self.k, self.v = part, k, v

    def attend(self, q_BLAD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, ctx: Context, ops) -> Tensor:
        part = self.part
        for pool, new_BLKD in ((self.k, k_BLKD), (self.v, v_BLKD)):
            pool.flatten(0, 1).index_copy_(0, part.places_T, new_BLKD.flatten(0, 1))
        return ops.attention_paged(
            q_BLAD, self.k, self.v, part.table_BN, part.starts_B, part.first, starts=part.starts, place=part.place
        )


def _context(parts: Rows[Part]) -> Context:
    if len(parts) == 1:
        return parts[0].ctx
    return Context(1, sum(p.ctx.batch * p.ctx.length for p in parts), parts=tuple(p.ctx for p in parts))


class Runner:
    """Reads spans, chooses tokens, keeps what was accepted, drafts."""

    def __init__(self, model, pool: Pool, policy: DraftPolicy | None):
        self.model, self.pool, self.policy = model, pool, policy
        self._parts: list[tuple[Part, list[Span]]] = []
        self._hidden_TH: Tensor | None = None

    # --------------------------------------------------------------------------------------------------------- reading

    def read(self, spans: list[Span]) -> list[Output]:
        """One forward over all spans; the next tokens of those that reach their sequence's end, drafts verified."""
        by_count: dict[int, list[Span]] = {}
        prompts = []
        for span in spans:
            if span.start == len(span.seq.tokens) - 1 and not span.saves:
                by_count.setdefault(span.count, []).append(span)
            elif span.count:
                prompts.append(span)
        self._parts, self._hidden_TH, ids, offset = [], None, [], 0
        for count, group in by_count.items():
            group.sort(key=lambda span: span.seq.slot)  # type: ignore[arg-type,return-value]
            starts, seqs = [span.start for span in group], [span.seq for span in group]
            part = Part(self.pool, self.pool.trunk, seqs, starts, count, tentative=count > 1)
            self._parts.append((part, group))
            for span in group:
                span.offset = offset
                ids += [span.seq.tokens[-1], *span.seq.drafts]
                offset += count
        for span in prompts:
            span.offset = offset
            ids += span.seq.tokens[span.start : span.start + span.count]
            offset += span.count
            self._parts += [(part, []) for part in self._pieces(span.seq, span.start, span.count, span.saves)]
        if ids:
            ids_T = torch.tensor(ids, device=self.pool.device)
            self._hidden_TH = self.model.trunk(ids_T, _context([part for part, _ in self._parts]))
        return self._choose(spans)

    def _pieces(self, seq: Sequence, start: int, count: int, saves, *, first: int = 0) -> list[Part]:
        """The parts of one sequence's next `count` positions, cut where a state is to be saved."""
        layers = self.pool.mtp if first else self.pool.trunk
        parts, at, end = [], start, start + count
        for position, slot in [*((p - first, s) for p, s, *_ in saves), (end, None)]:
            if at < position <= end:
                parts.append(Part(self.pool, layers, [seq], [at], position - at, first=first, save_slot=slot))
                at = position
            elif at == position and slot is not None and first:  # nothing to read, but a state to save
                self.pool.copy_slot(seq.slot, slot, only_mtp=True)  # type: ignore[arg-type]
        return parts

    def _choose(self, spans: list[Span]) -> list[Output]:
        """Sample and verify; the sequences take their new tokens."""
        sampling = sorted((span for span in spans if span.samples), key=lambda span: span.offset)
        outputs = [self._prompt_logprobs(span) for span in spans if span.seq.request.prompt_logprobs is not None]
        outputs = [output for output in outputs if output is not None]
        if not sampling:
            return outputs
        logits_RV = self.model.head(self._rows_of(sampling))
        best, likeliest = logits_RV.max(-1)
        best, likeliest, row = best.tolist(), likeliest.tolist(), 0
        for span in sampling:
            here = slice(row, row + span.drafts + 1)
            row += span.drafts + 1
            outputs.append(self._take(span, logits_RV[here], likeliest[here], best[here]))
        return outputs

    def _rows_of(self, sampling: list[Span]) -> Tensor:
        """The trunk outputs [R, H] that the next tokens and the drafts' verification are read off."""
        h_TH, total = self._hidden_TH, sum(span.drafts + 1 for span in sampling)
        if h_TH is not None and total == len(h_TH) and all(span.count for span in sampling):
            return h_TH  # only decode steps
        # A span without tokens: the whole prompt was in the prefix cache, and with it this output.
        return torch.cat([
            span.seq.hidden[-1][-1:] if h_TH is None or span.count == 0
            else h_TH[span.offset + span.count - span.drafts - 1 : span.offset + span.count]
            for span in sampling
        ])  # fmt: skip

    def _take(self, span: Span, logits_KV: Tensor, likeliest: list[int], best: list[float]) -> Output:
        seq, drafts = span.seq, span.seq.drafts
        if any(value != value for value in best):
            return self._fail(span, "the model's output is not a number")
        if seq.plain:
            kept = 0
            while kept < len(drafts) and likeliest[kept] == drafts[kept]:
                kept += 1
            token = likeliest[kept]
        else:
            p_KV = self.distributions(seq, logits_KV, drafts)
            q_KV = seq.draft_probs
            if q_KV is None and drafts:
                q_KV = torch.zeros_like(p_KV[:-1]).scatter_(1, torch.tensor(drafts, device=p_KV.device)[:, None], 1.0)
            kept, token = seq.draws.verify(drafts, q_KV, p_KV, len(seq.output))
        new = [*drafts[:kept], token]
        if seq.matcher is not None:
            try:
                new = self._guided(seq, new)
            except UserError as error:
                return self._fail(span, str(error))
        taken = seq.take(new)
        span.taken = span.count - span.drafts + min(kept, taken)
        if span.drafts:
            self._count(seq, span.drafts, min(kept, taken))
        if seq.matcher is not None and seq.matcher.finished and seq.finish_reason is None:
            seq.finish_reason = "stop"
        seq.drafts, seq.draft_probs = [], None
        output = Output(seq.request.id, new[:taken], [*range(1, kept + 1), 0][:taken])
        if seq.request.logprobs is not None:
            output.logprobs = _logprobs(logits_KV[:taken], output.tokens, seq.request.logprobs)
        output.finish_reason = seq.finish_reason  # type: ignore[assignment]
        return output

    def _fail(self, span: Span, sentence: str) -> Output:
        seq = span.seq
        seq.finish_reason, span.taken = "error", span.count - span.drafts
        seq.drafts, seq.draft_probs = [], None
        return Output(seq.request.id, error=sentence, finish_reason="error")

    def _guided(self, seq: Sequence, new: list[int]) -> list[int]:
        """The new tokens up to the guide's end; it sees what comes behind the reasoning."""
        first = seq.answer_behind(new)
        if first is None:
            return new
        before = max(first - len(seq.output), 0)
        return new[: before + seq.matcher.advance(new[before:])]

    def _count(self, seq: Sequence, drafted: int, accepted: int) -> None:
        counts = seq.counts
        counts.verify_steps += 1
        counts.drafted += drafted
        counts.accepted += accepted
        at = [*counts.accepted_at, *[0] * (drafted - len(counts.accepted_at))]
        for k in range(accepted):
            at[k] += 1
        counts.accepted_at = tuple(at)
        assert self.policy is not None
        self.policy.observe(seq, drafted, accepted)

    def distributions(self, seq: Sequence, logits_KV: Tensor, drafts: Rows[int]) -> Tensor:
        """What row k is drawn from, [K, V]: behind the sequence's tokens and the first k drafts."""
        request, output = seq.request, seq.output
        logits = adjust(logits_KV, request.sampling, request.prompt, output, drafts)
        answer = seq.answer_behind(list(drafts))
        if seq.matcher is not None and answer is not None:
            skip = max(answer - len(output), 0)
            logits = torch.cat([logits[:skip], seq.matcher.mask(logits[skip:], drafts[skip:])])
        if len(output) < request.min_tokens and request.stop_ids:
            longer = logits.clone()
            longer[: request.min_tokens - len(output), list(request.stop_ids)] = -torch.inf
            # A guide that allows nothing but the end has the last word.
            logits = torch.where(longer.amax(-1, keepdim=True) == -torch.inf, logits, longer)
        thinking = request.thinking
        if thinking is not None and thinking.budget is not None:
            for k in range(logits.shape[0]):
                at = len(output) + k
                if at >= thinking.budget and (answer is None or answer > at):
                    token = forced_end(thinking.end_ids, [*output, *drafts[:k]][thinking.budget :])
                    if token is not None:
                        logits = logits.clone()
                        logits[k] = -torch.inf
                        logits[k, token] = 0.0
        return probabilities(logits, request.sampling)

    def _prompt_logprobs(self, span: Span) -> Output | None:
        """Collect log-probabilities of the prompt; told with the first new token."""
        seq, n = span.seq, span.seq.request.prompt_logprobs
        assert n is not None
        if seq.output:  # told before a preemption
            return None
        inside = min(span.start + span.count, len(seq.request.prompt) - 1) - span.start
        if inside > 0:
            assert self._hidden_TH is not None
            logits = self.model.head(self._hidden_TH[span.offset : span.offset + inside])
            targets = seq.request.prompt[span.start + 1 : span.start + inside + 1]
            seq.prompt_logprobs += _logprobs(logits, targets, n)
        if not span.samples:
            return None
        return Output(seq.request.id, prompt_logprobs=[None, *seq.prompt_logprobs])

    # --------------------------------------------------------------------------------------------------------- keeping

    def keep(self, spans: list[Span]) -> None:
        """Bring every state to the last position that stays."""
        for part, group in self._parts:
            if part.ctx.tentative:
                part.keep([span.taken for span in group])
        for span in spans:
            seq = span.seq
            seq.computed = span.start + span.taken
            if span.count == 0:
                continue
            assert self._hidden_TH is not None
            rows = self._hidden_TH[span.offset : span.offset + span.taken]
            if self.policy is None:
                seq.hidden, seq.mtp_computed = [rows[-1:]], seq.computed - 1
            else:  # few rows must not keep a long step's outputs alive
                seq.hidden.append(rows.clone() if len(self._hidden_TH) > 4 * len(rows) + PENDING // 16 else rows)

    def boundary(self, span: Span, position: int) -> tuple[int, Tensor]:
        """What a snapshot at `position`, which the span has read, keeps: how many positions the MTP block has read, and
        the trunk outputs [n, H] of the others."""
        assert self._hidden_TH is not None
        seq = span.seq
        if self.policy is not None and seq.mtp_computed < position - 1:
            return seq.mtp_computed, torch.cat(seq.hidden)[: position - seq.mtp_computed].clone()
        at = span.offset + position - 1 - span.start
        return position - 1, self._hidden_TH[at : at + 1].clone()

    # -------------------------------------------------------------------------------------------------------- drafting

    def draft(self, spans: list[Span], most: list[int]) -> None:
        """Let the MTP block catch up, and draft up to most[i] tokens for the sequence of spans[i]."""
        assert self.policy is not None
        todo: list[tuple[Span, int]] = []
        # While nobody drafts, the block need not read: it catches up when it must.
        eager = self.policy.on or self.pool.mtp_stateful
        for span, count in zip(spans, most):
            seq = span.seq
            seq.idle_steps = 0 if count else seq.idle_steps + 1
            behind = seq.computed - seq.mtp_computed
            if seq.finish_reason == "error":
                continue
            late = count or behind > PENDING or (eager and seq.remaining > 1)
            if (seq.finish_reason is None and late) or (eager and span.saves):
                todo.append((span, count))
        if not todo:
            return
        clock, reading = time.perf_counter(), sum(span.seq.computed - span.seq.mtp_computed for span, _ in todo)
        last_h = self._catch_up([span for span, _ in todo])
        drafting = [(span.seq, count, h_H) for (span, count), h_H in zip(todo, last_h) if count]
        if not drafting:
            return
        device, policy = self.pool.device, self.policy
        seqs, counts = [seq for seq, _, _ in drafting], [count for _, count, _ in drafting]
        h_BH = torch.stack([h_H for _, _, h_H in drafting])
        slots = torch.tensor([seq.slot for seq in seqs], device=device)
        saved = [tensor[:, slots] for tensor in self.pool.mtp_mamba] if self.pool.mtp_stateful else []
        probs: list[list[Tensor]] = [[] for _ in seqs]
        chances = [1.0] * len(seqs)
        rows, k = list(range(len(seqs))), 0
        for seq in seqs:
            seq.confidence = []
        while True:
            for i, token, confidence in zip(
                rows, *self._pick(self.model.head(h_BH), [seqs[i] for i in rows], probs, rows)
            ):
                seqs[i].drafts.append(token)
                seqs[i].confidence.append(confidence)
                chances[i] *= policy.chance(confidence)
            policy.block.learn(reading, time.perf_counter() - clock)
            clock, k = time.perf_counter(), k + 1
            further = policy.go_on(k, [chances[i] for i in rows])
            alive = [at for at, i in enumerate(rows) if further[at] and counts[i] > k]
            if not alive:
                break
            if len(alive) < len(rows):
                h_BH, rows = h_BH[alive], [rows[at] for at in alive]
            reading = len(rows)
            ids_B = torch.tensor([seqs[i].drafts[-1] for i in rows], device=device)
            starts = [seqs[i].computed + k - 1 for i in rows]
            part = Part(self.pool, self.pool.mtp, [seqs[i] for i in rows], starts, 1, first=1)
            h_BH = self.model.mtp_block(h_BH, ids_B, part.ctx)
        for seq, q, chance in zip(seqs, probs, chances):
            # To drop a draft because of what was drawn would bend the distribution of a sampled token. And what a
            # sequence learns when it tries again is worth a row.
            exact = seq.plain or seq.draws.seed is not None
            if exact and not (seq.retrying and len(seq.drafts) == 1) and not policy.keep_last(len(seq.drafts), chance):
                del seq.drafts[-1], q[-1:]
                if not seq.drafts:
                    policy.observe(seq, 0, 0)
            if q:
                seq.draft_probs = torch.stack(q)
        for tensor, before in zip(self.pool.mtp_mamba, saved):
            tensor[:, slots] = before

    def _pick(self, logits_BV: Tensor, seqs: list[Sequence], probs, rows: list[int]) -> tuple[list[int], list[float]]:
        """A draft of each row, and the probability that the block gave it; probs[rows[b]] grows by row b's
        distribution unless its drafts are certain."""
        assert self.policy is not None
        best, likeliest = logits_BV.max(-1)
        tokens, confidence = likeliest.tolist(), [1.0] * len(seqs)
        if self.policy.adaptive:
            confidence = (best.float() - logits_BV.float().logsumexp(-1)).exp_().tolist()
        for b, (seq, row) in enumerate(zip(seqs, rows)):
            if not seq.plain:
                sampling, drafts = seq.request.sampling, seq.drafts
                history = [*seq.output, *drafts]
                q_V = probabilities(adjust(logits_BV[b : b + 1], sampling, seq.request.prompt, history), sampling)[0]
                probs[row].append(q_V)
                tokens[b] = seq.draws.choose(q_V, len(seq.output) + len(drafts))
                confidence[b] = float(q_V[tokens[b]])
        return tokens, confidence

    def _catch_up(self, spans: list[Span]) -> list[Tensor]:
        """Read every position whose next token is known; the block's output [H] at each sequence's last one."""
        groups: dict[int, list[int]] = {}
        for i, span in enumerate(spans):
            behind = span.seq.computed - span.seq.mtp_computed
            groups.setdefault(behind if behind <= 8 and not span.saves else -1 - i, []).append(i)
        parts, ids, hidden, lengths, ends, offset = [], [], [], [], {}, 0
        for group in groups.values():
            group.sort(key=lambda i: spans[i].seq.slot)  # type: ignore[arg-type,return-value]
            for i in group:
                seq = spans[i].seq
                ahead = seq.tokens[seq.mtp_computed + 1 : seq.computed + 1]
                pieces = torch.cat(seq.hidden) if len(seq.hidden) > 1 else seq.hidden[0]
                # One less where the sequence ended with a token that the trunk has read.
                seq.hidden = [pieces[len(ahead) :]] if len(ahead) < len(pieces) else []
                ids += ahead
                hidden.append(pieces[: len(ahead)])
                offset += len(ahead)
                ends[i] = offset - 1
            seqs = [spans[i].seq for i in group]
            length = len(hidden[-1])
            lengths.append(length)
            if len(group) == 1:
                saves = spans[group[0]].saves if self.pool.mtp_stateful else []
                parts += self._pieces(seqs[0], seqs[0].mtp_computed, length, saves, first=1)
            else:
                parts.append(Part(self.pool, self.pool.mtp, seqs, [s.mtp_computed for s in seqs], length, first=1))
        h_TH = self.model.mtp_block(torch.cat(hidden), torch.tensor(ids, device=self.pool.device), _context(parts))
        for rows, group in zip(lengths, groups.values()):
            for i in group:
                spans[i].seq.mtp_computed += rows
        return [h_TH[ends[i]] for i in range(len(spans))]

    # ------------------------------------------------------------------------------------------------------ measuring

    def time_trunk(self, blocks, rows: int, drafts: int) -> tuple[int, float]:
        """(rows, seconds) of a verifying forward over about that many tokens in all, head and commit included."""
        length = min(rows, drafts + 1)
        B = max(1, rows // length)
        seqs = self._stand_ins(blocks, B, length)
        ids_T = torch.zeros(B * length, dtype=torch.int64, device=self.pool.device)

        def step() -> None:
            part = Part(self.pool, self.pool.trunk, seqs, [0] * B, length, tentative=length > 1)
            self.model.head(self.model.trunk(ids_T, part.ctx)).max(-1)[1].tolist()
            if length > 1:
                part.keep([1] * B)

        return B * length, self._timed(step, seqs, blocks)

    def time_block(self, blocks, rows: int) -> tuple[int, float]:
        """(rows, seconds) of one step of the MTP block over that many sequences, with its head."""
        seqs = self._stand_ins(blocks, rows, 2)
        ids_T = torch.zeros(rows, dtype=torch.int64, device=self.pool.device)
        hidden_TH = self.model.embedding(ids_T).to(self.pool.dtype)

        def step() -> None:
            part = Part(self.pool, self.pool.mtp, seqs, [0] * rows, 1, first=1)
            self.model.head(self.model.mtp_block(hidden_TH, ids_T, part.ctx)).max(-1)[1].tolist()

        return rows, self._timed(step, seqs, blocks)

    def _stand_ins(self, blocks, count: int, length: int) -> list[Sequence]:
        seqs = [Sequence(Request("", [0]), [0]) for _ in range(count)]
        for seq in seqs:
            seq.slot, seq.blocks = blocks.take_slot(), blocks.take_blocks(blocks.blocks_for(length))
        return seqs

    def _timed(self, step, seqs: list[Sequence], blocks) -> float:
        try:
            step()
            best = float("inf")
            for _ in range(3):
                if self.pool.device.type == "cuda":
                    torch.cuda.synchronize(self.pool.device)
                clock = time.perf_counter()
                step()
                best = min(best, time.perf_counter() - clock)
            return best
        finally:
            for seq in seqs:
                blocks.release_slot(seq.slot)
                blocks.release_blocks(seq.blocks)


def forced_end(end_ids: Rows[int], since: Rows[int]) -> int | None:
    """The token that must come next when the reasoning has used up its budget and then went on by `since`; None when
    its end is written."""
    done = 0
    while done < len(since) and done < len(end_ids) and since[done] == end_ids[done]:
        done += 1
    return end_ids[done] if done < len(end_ids) else None


def _logprobs(logits_KV: Tensor, tokens: Rows[int], top: int) -> list[TokenLogprobs]:
    logprobs = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32)).log_softmax(-1)
    rows = []
    for logprobs_V, token in zip(logprobs, tokens):
        values, indices = logprobs_V.topk(min(top, len(logprobs_V)))
        rows.append(TokenLogprobs(float(logprobs_V[token]), tuple(zip(indices.tolist(), values.tolist()))))
    return rows
