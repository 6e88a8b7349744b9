"""The hybrid cache: what a sequence carries from one forward to the next.

Per attention layer keys and values in slots; per Mamba layer the last W-1 inputs of the convolution and the SSM state
(float32 or better); the same for the layers of the MTP block, which runs one position behind the trunk; and the trunk
outputs that the block has not read yet, because their next token was not known.

A forward appends. After a *tentative* forward, `commit(n)` keeps its first n tokens a row and `rollback()` none,
without running the model again: the scan's inputs were kept, and the state is advanced by those that stay.
`snapshot()` and `restore()` return to an earlier point of the same cache at the price of references: states that a
snapshot holds are not written in place, and slots only beyond the current length.

Shape letters: B batch, L length, S slots, w = W-1, H heads or hidden, K key/value heads, D, P head sizes, N state size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_lite import pattern as patterns
from nemo_lite.config import ModelConfig
from nemo_lite.model.context import Context


@dataclass
class Replay:
    """The inputs of one tentative scan, the state before it, and the op `ssd_advance` that takes them."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    state_BHPN: Tensor
    advance: Callable

    def after(self, counts_B: Tensor) -> Tensor:
        """The state [B, H, P, N] after the first counts_B tokens."""
        return self.advance(self.x_BLHP, self.dt_BLH, self.A_H, self.B_BLGN, self.state_BHPN, counts_B)


class MambaState:
    """Convolution window [B, w, C] and SSM state [B, H, P, N] of one Mamba layer; None stands for zeros."""

    def __init__(self, width: int):
        self.w = width - 1
        self._window: Tensor | None = None
        self._state: Tensor | None = None
        self._held: tuple[Tensor, Replay] | None = None  # of the last forward, if it was tentative
        self._keep: list[int] | None = None  # how many of its tokens count, as long as nobody has asked for the result
        self.shared = False  # whether a snapshot may hold window and state too
        self.later: Callable[[list[int]], None] | None = None  # after a fused step: takes them in, for all layers

    @property
    def window(self) -> Tensor | None:
        self._settle()
        return self._window

    @property
    def state(self) -> Tensor | None:
        self._settle()
        return self._state

    def advance(self, x_BLC: Tensor, state: Tensor, ctx: Context) -> None:
        """Take in the tokens of one forward; `state` is the one after them."""
        self._window, self._state = self._windows(self._extended(x_BLC), ctx.counts or []), state
        self._held = self.later = None

    def hold(self, x_BLC: Tensor, replay: Replay, ctx: Context) -> None:
        """Take in the tokens of a tentative forward; until `keep` says otherwise, all of them."""
        self._held, self.later = (self._extended(x_BLC), replay), None
        self._keep = ctx.counts

    def keep(self, counts: list[int]) -> None:
        """Keep only the first counts[b] tokens of the last forward, which must have been tentative."""
        assert self._held is not None or self.later is not None, "only a tentative forward can be shortened"
        self._keep = counts

    def hold_later(self, counts: list[int], later: Callable[[list[int]], None]) -> None:
        """As `hold`, where `later` knows how to take the tokens in."""
        self._held, self._keep, self.later = None, counts, later

    def become(self, window: Tensor | None, state: Tensor | None) -> None:
        """Window and state after the tokens so far."""
        self._window, self._state, self.shared = window, state, False
        self._held = self._keep = self.later = None

    def _settle(self) -> None:
        if self._keep is None:
            return
        if self.later is not None:
            self.later(self._keep)
            return
        assert self._held is not None
        extended, replay = self._held
        self._window = self._windows(extended, self._keep)
        self._state = replay.after(torch.tensor(self._keep, device=extended.device))
        self._keep = None

    def _extended(self, x_BLC: Tensor) -> Tensor:
        window = self.window
        before = window if window is not None else x_BLC.new_zeros(x_BLC.shape[0], self.w, x_BLC.shape[2])
        return torch.cat([before, x_BLC], dim=1)

    def _windows(self, extended: Tensor, counts: list[int]) -> Tensor:
        if len(set(counts)) == 1:
            return extended[:, counts[0] : counts[0] + self.w]
        device = extended.device
        columns = torch.tensor(counts, device=device)[:, None] + torch.arange(self.w, device=device)
        return extended[torch.arange(len(counts), device=device)[:, None], columns]

    def snapshot(self):
        saved = self.window, self.state
        self.shared = True
        return saved

    def restore(self, saved) -> None:
        self.become(*saved)
        self.shared = True


class KVState:
    """Keys and values [B, S, K, D] of one attention layer; how many slots of a row count is the stream's to know."""

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def attend(self, q_BLAD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, ctx: Context, ops) -> Tensor:
        """Append the new tokens' keys and values; their attention over everything up to them, [B, L, A, D]."""
        return ops.attention_cached(q_BLAD, *self.append(k_BLKD, v_BLKD, ctx), ctx.starts)

    def append(self, k_BLKD: Tensor, v_BLKD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Write the valid new tokens behind each row's slots; the slots in use, [B, S', K, D] each."""
        assert ctx.starts is not None and ctx.counts is not None
        end = max(start + count for start, count in zip(ctx.starts, ctx.counts))
        self.reserve(end, k_BLKD)
        assert self.k is not None and self.v is not None
        if ctx.uniform:
            start = ctx.starts[0]
            self.k[:, start:end], self.v[:, start:end] = k_BLKD, v_BLKD
        else:
            device = k_BLKD.device
            column = torch.arange(ctx.length, device=device)
            row, column = (column < torch.tensor(ctx.counts, device=device)[:, None]).nonzero(as_tuple=True)
            slot = torch.tensor(ctx.starts, device=device)[row] + column
            self.k[row, slot], self.v[row, slot] = k_BLKD[row, column], v_BLKD[row, column]
        return self.k[:, :end], self.v[:, :end]

    def reserve(self, slots: int, like: Tensor) -> None:
        """Room for so many slots; `like` [B, any, K, D] tells the shape and dtype."""
        B, _, K, D = like.shape
        old = 0 if self.k is None else self.k.shape[1]
        if self.k is not None and slots <= old:
            return
        capacity = max(slots, 2 * old, 64)
        # Zeros, not garbage: padded queries look at slots nobody has written.
        for name, before in (("k", self.k), ("v", self.v)):
            grown = like.new_zeros(B, capacity, K, D)
            if before is not None:
                grown[:, :old] = before
            setattr(self, name, grown)

    def keep(self, counts: list[int]) -> None:
        """Nothing to do: slots beyond a row's length are overwritten."""

    def snapshot(self):
        return None

    def restore(self, saved) -> None:
        pass


class Nothing:
    """The state of a layer that carries none."""

    def keep(self, counts: list[int]) -> None:
        pass

    def snapshot(self):
        return None

    def restore(self, saved) -> None:
        pass


class Stream:
    """The states of a run of layers, and how many positions of each row they have taken in."""

    def __init__(self, layers: str, config: ModelConfig, batch: int):
        self.states = [
            MambaState(config.conv_kernel) if letter == patterns.MAMBA
            else KVState() if letter == patterns.ATTENTION
            else Nothing()
            for letter in layers
        ]  # fmt: skip
        self.config = config
        self.lengths = [0] * batch
        self._lane: Lane | None = None
        self._last: tuple[list[int], list[int]] | None = None  # lengths before and counts of the last forward

    def context(self, length: int, counts: list[int] | None, valid_BL: Tensor | None, tentative: bool) -> Context:
        """The context of a forward of `length` columns that continues this stream by counts[b] tokens a row."""
        counts = counts if counts is not None else [length] * len(self.lengths)
        return Context(
            len(self.lengths), length, valid_BL=valid_BL, count_BL=valid_BL, stream=self, starts=list(self.lengths),
            counts=counts, tentative=tentative,
        )  # fmt: skip

    def lane(self, step, ctx: Context, dtype: torch.dtype):
        """What the fused step needs to know of this cache for a forward of `ctx`; None where the cache was begun in
        another dtype."""
        for state in self.states:
            before = state.window if isinstance(state, MambaState) else state.k if isinstance(state, KVState) else None
            if before is not None and before.dtype != dtype:
                return None
        self._lane = Lane(self, step, ctx, dtype)
        return self._lane.plan

    def stepped(self, ctx: Context) -> None:
        """A fused step has run over the lane."""
        assert self._lane is not None
        self._lane.stepped(ctx)
        self._lane = None  # the states before are free

    def took(self, ctx: Context) -> None:
        """The forward of `ctx` is done."""
        assert ctx.starts is not None and ctx.counts is not None
        self._last = (ctx.starts, ctx.counts) if ctx.tentative else None
        self.lengths = [start + count for start, count in zip(ctx.starts, ctx.counts)]

    def commit(self, keep: list[int]) -> None:
        """Keep the first keep[b] tokens of the last, tentative forward."""
        if self._last is None:
            raise ValueError("there is no tentative forward to commit")
        starts, counts = self._last
        if any(not 0 <= n <= count for n, count in zip(keep, counts)):
            raise ValueError(f"cannot keep {keep} of {counts} tentative tokens")
        for state in self.states:
            state.keep(keep)
        self.lengths = [start + n for start, n in zip(starts, keep)]
        self._last = None

    def snapshot(self):
        return list(self.lengths), [state.snapshot() for state in self.states]

    def restore(self, saved) -> None:
        lengths, states = saved
        self.lengths, self._last = list(lengths), None
        for state, saved_state in zip(self.states, states):
            state.restore(saved_state)


class Lane:
    """A stream as the fused step sees it: states are written in place, unless a snapshot holds them too."""

    def __init__(self, stream: Stream, step, ctx: Context, dtype: torch.dtype):
        config, B, L = stream.config, ctx.batch, ctx.length
        assert ctx.starts is not None and ctx.counts is not None
        self.stream, self.step, self.dtype = stream, step, dtype
        self.mamba = [i for i, state in enumerate(stream.states) if isinstance(state, MambaState)]
        wide = torch.promote_types(dtype, torch.float32)
        channels = config.mamba_inner + 2 * config.mamba_groups_state
        window = (B, config.conv_kernel - 1, channels)
        state = (B, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.a: list[Tensor | None] = [None] * len(stream.states)
        self.b: list[Tensor | None] = [None] * len(stream.states)
        capacity = 1
        for i, at in enumerate(stream.states):
            if isinstance(at, MambaState):
                before = at.window, at.state
                self.a[i] = before[0].contiguous() if before[0] is not None else torch.zeros(window, dtype=dtype)
                self.b[i] = before[1].contiguous() if before[1] is not None else torch.zeros(state, dtype=wide)
            elif isinstance(at, KVState):
                like = torch.empty(B, 0, config.num_key_value_heads, config.head_dim, dtype=dtype)
                at.reserve(max(ctx.starts) + L, like)
                self.a[i], self.b[i] = at.k, at.v
                capacity = at.k.shape[1]  # type: ignore[union-attr]
        now = step.cache(self.a, self.b)
        self.new = None if ctx.tentative else self._outputs()
        held = torch.empty(step.held_size(B * L), dtype=torch.float32) if ctx.tentative else None
        self.plan = step.part(
            rows=B, length=L, tentative=ctx.tentative, starts=ctx.starts, slots=range(B), table=range(B),
            block_size=capacity, inputs=now, outputs=self.new or now, held=held,
        )  # fmt: skip

    def _outputs(self):
        a, b = list(self.a), list(self.b)
        for i in self.mamba:
            if self.stream.states[i].shared:
                a[i], b[i] = torch.empty_like(a[i]), torch.empty_like(b[i])
        return self.step.cache(a, b)

    def stepped(self, ctx: Context) -> None:
        states = self.stream.states
        if self.new is not None:
            for i in self.mamba:
                states[i].become(self.new[2][i], self.new[3][i])
            return
        assert ctx.counts is not None
        for i in self.mamba:
            states[i].hold_later(ctx.counts, self.advance)

    def advance(self, counts: list[int]) -> None:
        """Take in the first tokens of each row, in all layers."""
        new = self._outputs()
        self.step.advance(self.plan, counts, self.dtype, new)
        for i in self.mamba:
            self.stream.states[i].become(new[2][i], new[3][i])


@dataclass
class Pending:
    """Trunk outputs [n, H] of one row that the MTP block has not read, and the tokens [n] at their positions."""

    hidden: Tensor
    tokens: Tensor


class HybridCache:
    """The cache of `batch` rows. With `speculative` the MTP block's part is kept too."""

    def __init__(self, config: ModelConfig, batch: int, speculative: bool = False):
        if speculative and not config.mtp_layers:
            raise ValueError("this model has no MTP block to draft with")
        self.trunk = Stream(config.layers, config, batch)
        self.mtp = Stream(config.mtp_layers, config, batch) if speculative else None
        self.pending: list[Pending | None] = [None] * batch
        # Per row the token that the block's last slot has read and the block's output [H] there, to start drafting at.
        self.ahead: list[tuple[int, Tensor] | None] = [None] * batch
        self._tentative: list[Pending] | None = None

    @property
    def batch(self) -> int:
        return len(self.trunk.lengths)

    @property
    def lengths(self) -> list[int]:
        """Positions of each row that the trunk has taken in."""
        return self.trunk.lengths

    def remember(self, hidden_BLH: Tensor, tokens_BL: Tensor, ctx: Context) -> None:
        """Note the trunk outputs of a forward for the MTP block."""
        if self.mtp is None:
            return
        assert ctx.counts is not None
        new = [Pending(hidden_BLH[b, :n], tokens_BL[b, :n]) for b, n in enumerate(ctx.counts)]
        if ctx.tentative:
            self._tentative = new
        else:
            self._settle()
            self._add(new)

    def _settle(self) -> None:
        if self._tentative is not None:
            self._add(self._tentative)
            self._tentative = None

    def _add(self, new: list[Pending]) -> None:
        for b, item in enumerate(new):
            before = self.pending[b]
            if len(item.tokens) == 0:
                continue
            if before is not None:
                item = Pending(torch.cat([before.hidden, item.hidden]), torch.cat([before.tokens, item.tokens]))
            self.pending[b] = item

    def settled(self) -> list[Pending | None]:
        """Everything pending; a tentative forward that was not committed counts as kept."""
        self._settle()
        return self.pending

    def expect(self, next_tokens: list[int | None]) -> None:
        """Refuse next tokens that are not those the rows were drafted with: the block's last slots have read these."""
        for b, (ahead, pending, token) in enumerate(zip(self.ahead, self.settled(), next_tokens)):
            if ahead is not None and pending is None and token not in (None, ahead[0]):
                raise ValueError(
                    f"row {b} was drafted with next token {ahead[0]} and is now given {token}; restore a snapshot "
                    "taken before drafting"
                )

    def commit(self, keep: list[int] | int) -> None:
        """Keep the first n tokens a row of the last, tentative forward."""
        keep = [keep] * self.batch if isinstance(keep, int) else keep
        self.trunk.commit(keep)
        if self._tentative is not None:
            self._add([Pending(p.hidden[:n], p.tokens[:n]) for p, n in zip(self._tentative, keep)])
            self._tentative = None

    def rollback(self) -> None:
        """Forget the last, tentative forward."""
        self.commit(0)

    def snapshot(self):
        """A point to return to with :meth:`restore`; valid for this cache only."""
        self._settle()
        return self.trunk.snapshot(), self.mtp.snapshot() if self.mtp else None, list(self.pending), list(self.ahead)

    def restore(self, saved) -> None:
        trunk, mtp, pending, ahead = saved
        self.trunk.restore(trunk)
        if self.mtp is not None:
            self.mtp.restore(mtp)
        self.pending, self.ahead, self._tentative = list(pending), list(ahead), None
