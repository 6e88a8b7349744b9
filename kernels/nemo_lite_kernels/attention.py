"""Causal grouped-query attention without positional embedding.

Shape letters: T tokens of all rows one after the other, B batch, L new tokens, S cache slots, Nb blocks of b slots, N
blocks of a row, A query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F

from nemo_lite_kernels.common import product_dtype


def attention(q_TAD, k_TKD, v_TKD, lengths: list[int]):
    """Causal attention inside each of the packed documents of ``lengths`` tokens (they sum to T); [T, A, D].

    One call of torch's fused attention a document (or one in all, when they are equally long): no mask is built and no
    work is done across documents.
    """
    if len(set(lengths)) == 1:
        q, k, v = (t.unflatten(0, (len(lengths), -1)).transpose(1, 2) for t in (q_TAD, k_TKD, v_TKD))
        return _causal(q, k, v).transpose(1, 2).flatten(0, 1)
    parts = zip(*(t.split(lengths) for t in (q_TAD, k_TKD, v_TKD)))
    return torch.cat([_causal(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1) for part in parts])


def _causal(q, k, v):
    return _sdpa(q, k, v, is_causal=True)


def _sdpa(q, k, v, **options):
    kind = product_dtype(q)
    return F.scaled_dot_product_attention(q.to(kind), k.to(kind), v.to(kind), enable_gqa=True, **options).to(q.dtype)


def attention_masked(q_TAD, k_TKD, v_TKD, lengths: list[int]):
    """The reference: the softmax written out over all T x T pairs, documents apart by a mask."""
    A, D = q_TAD.shape[1:]
    group = A // k_TKD.shape[1]
    k, v = k_TKD.repeat_interleave(group, 1), v_TKD.repeat_interleave(group, 1)
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=q_TAD.device), torch.tensor(lengths, device=q_TAD.device)
    )
    visible = (document[:, None] == document[None]).tril()
    scores = (
        torch.einsum("qad,kad->aqk", q_TAD, k).float()
        if q_TAD.dtype != torch.float64
        else torch.einsum("qad,kad->aqk", q_TAD, k)
    )
    weights = (scores * D**-0.5).masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("aqk,kad->qad", weights, v)


def attention_cached(q_BLAD, k_BSKD, v_BSKD, starts: list[int]):
    """Attention of L new tokens a row over the cache's slots; [B, L, A, D].

    Row b's new token i stands in slot starts[b] + i and sees the slots up to its own.
    """
    L, S = q_BLAD.shape[1], k_BSKD.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q_BLAD, k_BSKD, v_BSKD))
    alike = len(set(starts)) == 1 and starts[0] + L == S
    if alike and starts[0] == 0:
        return _causal(q, k, v).transpose(1, 2)
    visible = None  # one new token in the last slot sees all
    if not (alike and L == 1):
        start_B = torch.tensor(starts, device=q.device)
        position_BL = start_B[:, None] + torch.arange(L, device=q.device)
        visible = (torch.arange(S, device=q.device) <= position_BL[..., None])[:, None]
    return _sdpa(q, k, v, attn_mask=visible).transpose(1, 2)


def attention_paged(
    q_BLAD, k_NbKD, v_NbKD, table_BN, starts_B, first: int = 0, *,
    starts: list[int] | None = None, place: int | None = None,
):  # fmt: skip
    """Attention of L new tokens a row over keys and values in blocks [Nb, b, K, D]; [B, L, A, D].

    The blocks hold the new tokens' already. Slot p of row b lies in block table[b, p // b] at p % b, its slots begin at
    `first`, and its new token i stands in slot first + starts[b] + i. What the host knows saves waiting for the device:
    `starts`, and `place`, where slot 0 of a single row lies whose blocks are neighbours. Others are gathered.
    """
    starts = starts_B.tolist() if starts is None else starts
    slots = slice(first, first + max(starts, default=0) + q_BLAD.shape[1])
    if place is not None:
        k, v = (t.flatten(0, 1)[None, place:][:, slots] for t in (k_NbKD, v_NbKD))
    else:
        blocks = (t.index_select(0, table_BN.flatten()) for t in (k_NbKD, v_NbKD))
        k, v = (t.view(len(table_BN), -1, *t.shape[2:])[:, slots] for t in blocks)
    return attention_cached(q_BLAD, k, v, starts)
