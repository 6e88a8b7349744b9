"""Context parallelism: a row of tokens cut over ranks, and the three ops that look across the cuts.

A row is cut into 2 cp pieces and rank r holds pieces r and 2 cp - 1 - r, so that causal attention is the same work on
every rank; its tokens are those of one piece after the other. What crosses a cut, per layer:

    attention   keys and values of the whole row, gathered
    convolution the last W - 1 inputs of the piece before
    scan        each piece starts from the state that the pieces before it leave. With h_0 the state it is given,
                y_t = y_t(h_0 = 0) + C_t exp(sum_{s <= t} dt_s A) h_0, so a piece is scanned once, from nothing, and
                what it was given is added after; states go from piece to piece along the ranks and back

Documents end at a reset, wherever it lies: nothing before it is carried over. Ids and labels are cut after they have
been shifted, so MTP needs nothing from other ranks.

Shape letters: T tokens here, B rows, L a row's tokens here, H heads, P head size, G groups, N state size; K key/value
heads of size D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from nemo_lite_kernels import Ops
from nemo_lite_kernels.attention import attention_cached
from nemo_lite_kernels.common import product_dtype
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemo_lite.model.context import Tokens


def pieces_of(rank: int, ranks: int) -> tuple[int, int]:
    """The pieces of a row that a rank holds."""
    return rank, 2 * ranks - 1 - rank


def _last(q_LAD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    """Causal attention of the last L of S tokens, [L, A, D]; on a GPU without ever forming its mask."""
    if not q_LAD.is_cuda:
        return attention_cached(q_LAD[None], k_SKD[None], v_SKD[None], [len(k_SKD) - len(q_LAD)])[0]
    kind = product_dtype(q_LAD)
    q, k, v = (t.to(kind).transpose(0, 1)[None] for t in (q_LAD, k_SKD, v_SKD))
    mask = causal_lower_right(len(q_LAD), len(k_SKD))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return y[0].transpose(0, 1).to(q_LAD.dtype)


class Documents(list):
    """Lengths of the documents of `rows` whole rows, none of which crosses a row's end."""

    def __init__(self, lengths: list[int], rows: int):
        super().__init__(lengths)
        self.rows = rows


def cut(tokens: Tokens, rank: int, ranks: int) -> Tokens:
    """A rank's part of every row."""
    if ranks == 1:
        return tokens

    def part(x_BL: Tensor | None) -> Tensor | None:
        if x_BL is None:
            return None
        pieces = x_BL.chunk(2 * ranks, 1)
        return torch.cat([pieces[i] for i in pieces_of(rank, ranks)], 1)

    contexts = [
        replace(
            ctx, length=ctx.length // ranks, valid_BL=part(ctx.valid_BL), reset_BL=part(ctx.reset_BL),
            count_BL=part(ctx.count_BL), lengths=Documents(ctx.lengths or [], ctx.batch),
        )
        for ctx in tokens.contexts
    ]  # fmt: skip
    return Tokens([part(x) for x in tokens.ids], [part(x) for x in tokens.labels], contexts)  # type: ignore[misc]


@dataclass(frozen=True)
class Rows:
    """The ops of rows that are cut over the ranks of `group`, over those of whole rows."""

    ops: Ops
    group: Any

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def ranks(self) -> int:
        return self.group.size()

    def over(self) -> Ops:
        """The ops with those replaced that look across tokens."""
        return replace(self.ops, attention=self.attention, causal_conv=self.causal_conv, ssd=self.ssd)

    def gather(self, x: Tensor) -> Tensor:
        """[B, 2, ...] of every rank in the order of the row, [2 cp, B, ...]; gradients are summed."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        x = gather_from_sequence_parallel_region(x.contiguous(), group=self.group)
        x = x.unflatten(0, (self.ranks, -1))
        return torch.cat([x[:, :, 0], x[:, :, 1].flip(0)])

    def attention(self, q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Documents) -> Tensor:
        """As the op `attention`, of documents in whole rows."""
        rows, L = lengths.rows, sum(lengths) // lengths.rows
        size = L // (2 * self.ranks)
        both = torch.cat([k_TKD, v_TKD], -1).unflatten(0, (rows, 2, size))
        k_BLKD, v_BLKD = self.gather(both).transpose(0, 1).flatten(1, 2).split(k_TKD.shape[-1], -1)
        q = q_TAD.unflatten(0, (rows, 2, size))
        ends, found = torch.tensor(lengths).cumsum(0).tolist(), []
        for row in range(rows):
            for i, piece in enumerate(pieces_of(self.rank, self.ranks)):
                first, last = row * L + piece * size, row * L + (piece + 1) * size
                for length, end in zip(lengths, ends):
                    start = end - length
                    a, b = max(start, first), min(end, last)
                    if a >= b:
                        continue
                    keys = slice(start - row * L, b - row * L)
                    found.append(_last(q[row, i, a - first : b - first], k_BLKD[row, keys], v_BLKD[row, keys]))
        return torch.cat(found)

    def causal_conv(self, x_BLC, weight_CW, bias_C, reset_BL, window_BwC=None):
        """As the op `causal_conv`."""
        B, width = len(x_BLC), weight_CW.shape[1] - 1
        x = x_BLC.unflatten(1, (2, -1))
        tails = x[:, :, x.shape[2] - width :]
        if reset_BL is not None:  # a document that starts in a tail leaves nothing of the one before
            starts = reset_BL.unflatten(1, (2, -1))[:, :, x.shape[2] - width :].long()
            tails = tails * (starts.flip(2).cumsum(2).flip(2) == starts)[..., None]
        window = _Before.apply(tails.transpose(0, 1).contiguous(), self.group).transpose(0, 1).flatten(0, 1)
        reset = None if reset_BL is None else reset_BL.unflatten(1, (2, -1)).flatten(0, 1)
        y = self.ops.causal_conv(x.flatten(0, 1), weight_CW, bias_C, reset, window)
        return y.unflatten(0, (B, 2)).flatten(1, 2)

    def ssd(self, x_BLHP, dt_BLH, A_H, b_BLGN, c_BLGN, D_H, reset_BL, state=None, chunk_size: int = 128):
        """As the op `ssd`, without a state in or out."""
        B = len(x_BLHP)
        x, dt, b, c = (t.unflatten(1, (2, -1)).flatten(0, 1) for t in (x_BLHP, dt_BLH, b_BLGN, c_BLGN))
        reset = None if reset_BL is None else reset_BL.unflatten(1, (2, -1)).flatten(0, 1)
        y, final = self.ops.ssd(x, dt, A_H, b, c, D_H, reset, None, chunk_size=chunk_size)
        log_decay_BLH = (dt * A_H).cumsum(1)
        alive_BL = torch.ones_like(dt[..., 0]) if reset is None else (reset.cumsum(1) == 0).to(dt.dtype)
        decay_BLH = log_decay_BLH.exp() * alive_BL[..., None]
        given = _Chain.apply(
            final.unflatten(0, (B, 2)).transpose(0, 1), decay_BLH[:, -1].unflatten(0, (B, 2)).transpose(0, 1),
            self.group,
        )  # fmt: skip
        h_BGHPN = given.transpose(0, 1).flatten(0, 1).unflatten(1, (b.shape[2], -1))
        added = torch.einsum("blgn,bghpn->blghp", c.to(h_BGHPN.dtype), h_BGHPN).flatten(2, 3) * decay_BLH[..., None]
        y = (y + added).to(x.dtype)
        return y.unflatten(0, (B, 2)).flatten(1, 2), None


class _Before(torch.autograd.Function):
    """What the pieces before those here hold, [2, ...]; nought before a row's first."""

    @staticmethod
    def forward(ctx, x, group):
        rank, ranks = group.rank(), group.size()
        ctx.group = group
        before = torch.zeros_like(x)
        up = (x[0], rank + 1), (before[0], rank - 1)  # pieces 0 .. cp - 1 lie on ascending ranks
        down = (x[1], rank - 1), (before[1], rank + 1)  # the others on descending ones
        _exchange([up, down], group)
        if rank == ranks - 1:
            before[1] = x[0]
        return before

    @staticmethod
    def backward(ctx, dbefore):
        rank, ranks = ctx.group.rank(), ctx.group.size()
        dbefore = dbefore.contiguous()
        dx = torch.zeros_like(dbefore)
        up = (dbefore[0], rank - 1), (dx[0], rank + 1)
        down = (dbefore[1], rank + 1), (dx[1], rank - 1)
        _exchange([up, down], ctx.group)
        if rank == ranks - 1:
            dx[0] = dbefore[1]
        return dx, None


def _exchange(pairs: list[tuple], group: Any) -> None:
    """For each ((what is sent, to), (what is received, from)); ranks outside the group are left out."""
    ops = []
    for (x, to), (y, source) in pairs:
        for op, tensor, other in ((dist.isend, x, to), (dist.irecv, y, source)):
            if 0 <= other < group.size():
                ops.append(dist.P2POp(op, tensor, group=group, group_peer=other))
    for work in dist.batch_isend_irecv(ops) if ops else []:
        work.wait()


class _Chain(torch.autograd.Function):
    """The states that pieces start from: h_{i+1} = decay_i h_i + final_i, h_0 = 0, from piece to piece along the ranks.

    final [2, B, H, P, N] and decay [2, B, H] of the two pieces here; [2, B, H, P, N].
    """

    @staticmethod
    def forward(ctx, final, decay, group):
        rank, ranks = group.rank(), group.size()
        given = final.new_zeros(final.shape)  # what is received lies in one stretch of memory
        if rank:
            _receive(given[0], rank - 1, group)
        left = _after(given[0], decay[0], final[0])
        if rank < ranks - 1:
            _send(left, rank + 1, group)
            _receive(given[1], rank + 1, group)
        else:
            given[1] = left
        if rank:
            _send(_after(given[1], decay[1], final[1]), rank - 1, group)
        ctx.group = group
        ctx.save_for_backward(given, decay)
        return given

    @staticmethod
    def backward(ctx, dgiven):
        given, decay = ctx.saved_tensors
        rank, ranks = ctx.group.rank(), ctx.group.size()
        dfinal = torch.zeros_like(given)  # of the state that each piece leaves
        if rank:
            _receive(dfinal[1], rank - 1, ctx.group)
        before = _after(dfinal[1], decay[1], dgiven[1])
        if rank < ranks - 1:
            _send(before, rank + 1, ctx.group)
            _receive(dfinal[0], rank + 1, ctx.group)
        else:
            dfinal[0] = before
        if rank:
            _send(_after(dfinal[0], decay[0], dgiven[0]), rank - 1, ctx.group)
        return dfinal, (dfinal * given).sum((-2, -1)), None


def _after(h: Tensor, decay: Tensor, final: Tensor) -> Tensor:
    return decay[..., None, None] * h + final


def _send(x: Tensor, to: int, group: Any) -> None:
    dist.send(x.contiguous(), dist.get_global_rank(group, to), group)


def _receive(x: Tensor, source: int, group: Any) -> None:
    dist.recv(x, dist.get_global_rank(group, source), group)
