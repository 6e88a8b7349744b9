"""The router's choice of experts, the weights of their outputs, and the statistics of its balance.

Shape letters: T tokens, B rows of L tokens, E experts, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    logits_TE: Tensor, bias_E: Tensor, k: int, scaling: float, normalise: bool, n_group: int, topk_group: int,
    rows: int = 0, count_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Chosen experts [T, k] int64, their weights [T, k], tokens per expert [E] int64, auxiliary loss.

    Sigmoid scores; the choice is made on score + bias, the weight is the score alone. With n_group > 1 a group's score
    is the sum of its two largest biased scores, and only the topk_group best groups stay eligible. The last two are
    None where `rows` (B) is 0; they are over the counted positions only, and per row the loss is
    E / (k n^2) * sum_e (tokens whose top-k of p holds e) * (sum of p_e), p = s / sum s.
    """
    scores_TE = logits_TE.sigmoid()
    with torch.no_grad():
        biased_TE = _eligible(scores_TE + bias_E.to(scores_TE.dtype), n_group, topk_group)
        expert_Tk = biased_TE.topk(k, sorted=False).indices
    weight_Tk = scores_TE.gather(-1, expert_Tk)
    if normalise:
        weight_Tk = weight_Tk / (weight_Tk.sum(-1, keepdim=True) + 1e-20)
    weight_Tk = weight_Tk * scaling
    if not rows:
        return expert_Tk, weight_Tk, None, None
    E = scores_TE.shape[-1]
    p_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    with torch.no_grad():
        hits_BE = _tally(p_TE.topk(k, sorted=False).indices, rows, count_BL, E)
        counts_E = _tally(expert_Tk, rows, count_BL, E).sum(0)
    p_BLE = p_TE.unflatten(0, (rows, -1))
    n_B = p_TE.new_full((rows,), p_BLE.shape[1])
    if count_BL is not None:
        p_BLE = p_BLE * count_BL[..., None]
        n_B = count_BL.sum(-1).to(p_TE.dtype).clamp(min=1)
    aux_B = (hits_BE.to(p_TE.dtype) * p_BLE.sum(1)).sum(-1) * (E / k) / n_B.square()
    return expert_Tk, weight_Tk, counts_E, aux_B.sum()


def _eligible(biased_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    if n_group == 1:
        return biased_TE
    grouped = biased_TE.unflatten(-1, (n_group, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1, sorted=False).indices
    keep = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter_(-1, best, True)
    return grouped.masked_fill(~keep[..., None], -torch.inf).flatten(-2)


def _tally(expert_Tk: Tensor, rows: int, count_BL: Tensor | None, n_experts: int) -> Tensor:
    """How often each row's counted tokens chose each expert, [B, E] int64."""
    chosen = expert_Tk.view(rows, -1)
    ones = torch.ones_like(chosen)
    if count_BL is not None:
        ones = count_BL[..., None].expand(-1, -1, expert_Tk.shape[-1]).reshape(rows, -1).to(chosen.dtype)
    return chosen.new_zeros(rows, n_experts).scatter_add_(1, chosen, ones)
