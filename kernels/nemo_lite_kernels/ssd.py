"""State-space duality: the Mamba-2 scan (Dao and Gu 2024, arXiv 2405.21060).

For every head, with a scalar decay per step (section 1.1 of the Mamba-2 paper's notation):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        state, [P, N]
    y_t = h_t C_t + D x_t

Shape letters: B batch, L length, H heads, P head size, G groups sharing B and C, N state size, c chunks, l chunk length,
r heads per group (H / G).

All functions take
    x_BLHP, dt_BLH (after softplus and clamp; 0 on padding), A_H (negative), B_BLGN, C_BLGN, D_H,
    reset_BL   bool or None: True where the state is zeroed before the token (a document starts),
    state_BHPN the state carried in, or None for zero,
compute in float32 or better, and return y_BLHP in x's dtype and the final state in the computing dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_lite_kernels.common import accumulate_dtype


def ssd_recurrent(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, all_states=False, **_):
    """The recurrence itself, one token after the other: the reference, and the form that decodes.

    With ``all_states`` the second result is the state after every token, [B, L, H, P, N], so that a verification can
    keep the state of the last accepted token.
    """
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    dtype = accumulate_dtype(x_BLHP)
    x, dt = x_BLHP.to(dtype), dt_BLH.to(dtype)
    decay_BLH = torch.exp(dt * A_H.to(dtype))
    if reset_BL is not None:
        decay_BLH = decay_BLH.masked_fill(reset_BL[..., None], 0.0)
    xdt = x * dt[..., None]
    B_BLHN = B_BLGN.to(dtype).repeat_interleave(H // G, dim=2)
    C_BLHN = C_BLGN.to(dtype).repeat_interleave(H // G, dim=2)
    state = x.new_zeros(B, H, P, N) if state_BHPN is None else state_BHPN.to(dtype)
    ys, states = [], []
    for t in range(L):
        state = decay_BLH[:, t, :, None, None] * state + xdt[:, t, :, :, None] * B_BLHN[:, t, :, None, :]
        ys.append((state @ C_BLHN[:, t, :, :, None]).squeeze(-1))
        states.append(state)
    y = torch.stack(ys, dim=1) + D_H.to(dtype)[:, None] * x
    return y.to(x_BLHP.dtype), (torch.stack(states, dim=1) if all_states else state)


def ssd_chunked(
    x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, chunk_size=128, all_states=False
):
    """The chunked form: products of matrices inside a chunk, the recurrence only across chunks.

    Scores C B^T are built once per *group*; the backward pass is written out, so that only the inputs, the output and
    the state at each chunk's start are kept.
    """
    if all_states:
        return ssd_recurrent(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL, state_BHPN, all_states=True)
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    dtype = accumulate_dtype(x_BLHP)
    l = min(chunk_size, L)
    pad = -L % l
    # Padding has dt = 0: it neither decays the state nor adds to it.
    x, dt, b, c = (
        F.pad(t.to(dtype), (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t.to(dtype)
        for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)
    )
    segment_Bcl = None
    if reset_BL is not None:
        segment = reset_BL.to(torch.int32).cumsum(1)
        segment_Bcl = torch.cat([segment, segment[:, -1:].expand(B, pad)], dim=1).view(B, -1, l)
    state = x.new_zeros(B, H, P, N) if state_BHPN is None else state_BHPN.to(dtype)
    y, final = _Chunked.apply(
        x.reshape(B, -1, l, H, P), dt.reshape(B, -1, l, H), A_H.to(dtype), b.reshape(B, -1, l, G, N),
        c.reshape(B, -1, l, G, N), D_H.to(dtype), segment_Bcl, state,
    )  # fmt: skip
    return y.reshape(B, L + pad, H, P)[:, :L].to(x_BLHP.dtype), final


def _decays(dt_Bclh: Tensor, A_h: Tensor, segment_Bcl: Tensor | None):
    """Decays of a chunk: between tokens [B,c,h,l,l], from its start [B,c,l,h], to its end [B,c,l,h], whole [B,c,h]."""
    cum_Bclh = (dt_Bclh * A_h).cumsum(2)
    cum_Bchl = cum_Bclh.transpose(2, 3)
    between = cum_Bchl[..., :, None] - cum_Bchl[..., None, :]
    l = between.shape[-1]
    causal = torch.ones(l, l, dtype=torch.bool, device=between.device).tril()
    from_start = cum_Bclh.exp()
    to_end = (cum_Bclh[:, :, -1:] - cum_Bclh).exp()
    whole = cum_Bclh[:, :, -1].exp()
    if segment_Bcl is None:
        return between.masked_fill_(~causal, -torch.inf).exp_(), from_start, to_end, whole
    same = (segment_Bcl[..., :, None] == segment_Bcl[..., None, :]) & causal
    between = between.masked_fill_(~same[:, :, None], -torch.inf).exp_()
    last_Bc = segment_Bcl[:, :, -1]
    # The incoming state belongs to segment 0 at the row's start: a reset on the first token makes that one 1.
    before_Bc = F.pad(last_Bc[:, :-1], (1, 0), value=0)
    from_start = from_start * (segment_Bcl == before_Bc[..., None])[..., None]
    to_end = to_end * (segment_Bcl == last_Bc[..., None])[..., None]
    whole = whole * (last_Bc == before_Bc)[..., None]
    return between, from_start, to_end, whole


class _Chunked(torch.autograd.Function):
    """y and the final state of the chunked scan, with its gradient (arXiv 2405.21060, section 6, differentiated)."""

    @staticmethod
    def forward(ctx, x_Bclhp, dt_Bclh, A_h, B_Bclgn, C_Bclgn, D_h, segment_Bcl, state_Bhpn):
        Bt, c, l, h, p = x_Bclhp.shape
        g, n = B_Bclgn.shape[3:]
        r = h // g
        between, from_start, to_end, whole = _decays(dt_Bclh, A_h, segment_Bcl)
        xdt_Bchlp = (x_Bclhp * dt_Bclh[..., None]).transpose(2, 3)
        B_Bcgln, C_Bcgln = B_Bclgn.transpose(2, 3), C_Bclgn.transpose(2, 3)

        scores_Bcgll = C_Bcgln @ B_Bcgln.transpose(-1, -2)
        mixed = between.view(Bt, c, g, r, l, l).mul_(scores_Bcgll[:, :, :, None])
        y_Bchlp = mixed.view(Bt, c, h, l, l) @ xdt_Bchlp

        weighted = (xdt_Bchlp * to_end.transpose(2, 3)[..., None]).view(Bt, c, g, r, l, p)
        added_Bchpn = (weighted.transpose(-1, -2).reshape(Bt, c, g, r * p, l) @ B_Bcgln).view(Bt, c, h, p, n)
        states = [state_Bhpn]
        for i in range(c):
            states.append(torch.addcmul(added_Bchpn[:, i], whole[:, i, :, None, None], states[-1]))
        states_Bchpn = torch.stack(states[:-1], dim=1)

        carried = C_Bcgln @ states_Bchpn.view(Bt, c, g, r * p, n).transpose(-1, -2)  # [B, c, g, l, r*p]
        carried_Bclhp = carried.transpose(2, 3).reshape(Bt, c, l, h, p)
        y = torch.addcmul(D_h[:, None] * x_Bclhp, from_start[..., None], carried_Bclhp)
        y += y_Bchlp.transpose(2, 3)
        ctx.save_for_backward(
            x_Bclhp, dt_Bclh, A_h, B_Bclgn, C_Bclgn, D_h, segment_Bcl, states_Bchpn, states[-1], y
        )
        return y, states[-1]

    @staticmethod
    def backward(ctx, dy_Bclhp, dfinal_Bhpn):
        x, dt, A, B, C, D, segment, states, final, y = ctx.saved_tensors
        Bt, c, l, h, p = x.shape
        g, n = B.shape[3:]
        r = h // g
        between, from_start, to_end, whole = _decays(dt, A, segment)
        xdt_Bchlp = (x * dt[..., None]).transpose(2, 3).contiguous()
        dy_Bchlp = dy_Bclhp.transpose(2, 3).contiguous()
        B_Bcgln, C_Bcgln = B.transpose(2, 3), C.transpose(2, 3)

        # Through the incoming state of every chunk.
        dcarried = (dy_Bchlp * from_start.transpose(2, 3)[..., None]).view(Bt, c, g, r, l, p)
        dcarried = dcarried.transpose(3, 4).reshape(Bt, c, g, l, r * p)
        dC_Bcgln = dcarried @ states.view(Bt, c, g, r * p, n)
        from_y = (dcarried.transpose(-1, -2) @ C_Bcgln).view(Bt, c, h, p, n)
        dstate = dfinal_Bhpn
        dadded, dend = [], []  # of each chunk's own contribution, and of its whole decay's logarithm
        for i in reversed(range(c)):
            out = states[:, i + 1] if i + 1 < c else final
            dadded.append(dstate)
            dend.append((dstate * out).sum((-1, -2)))
            dstate = torch.addcmul(from_y[:, i], whole[:, i, :, None, None], dstate)
        dadded_Bchpn = torch.stack(dadded[::-1], dim=1)
        dend_Bch = torch.stack(dend[::-1], dim=1)

        # Through a chunk's contribution to the state at its end.
        dadded_g = dadded_Bchpn.view(Bt, c, g, r * p, n)
        dx_state = (B_Bcgln @ dadded_g.transpose(-1, -2)).view(Bt, c, g, l, r, p).transpose(3, 4)
        dxdt = dx_state.reshape(Bt, c, h, l, p) * to_end.transpose(2, 3)[..., None]
        weighted = (xdt_Bchlp * to_end.transpose(2, 3)[..., None]).view(Bt, c, g, r, l, p)
        dB_Bcgln = weighted.transpose(3, 4).reshape(Bt, c, g, l, r * p) @ dadded_g

        # Inside the chunks.
        scores = C_Bcgln @ B_Bcgln.transpose(-1, -2)
        dmixed = dy_Bchlp @ xdt_Bchlp.transpose(-1, -2)
        dscores = dmixed.mul_(between).view(Bt, c, g, r, l, l).sum(3)
        mixed = between.view(Bt, c, g, r, l, l).mul_(scores[:, :, :, None]).view(Bt, c, h, l, l)
        dxdt += mixed.transpose(-1, -2) @ dy_Bchlp
        dC_Bcgln += dscores @ B_Bcgln
        dB_Bcgln += dscores.transpose(-1, -2) @ C_Bcgln

        # d/d(log decay): a token's row of outputs minus its column of inputs; all sums collapse to these two products.
        dxdt = dxdt.transpose(2, 3)
        ddt = (dxdt * x).sum(-1)
        dcum = (dy_Bclhp * (y - D[:, None] * x)).sum(-1) - ddt * dt
        dcum[:, :, -1] += dend_Bch
        dlog = dcum.flip(2).cumsum(2).flip(2)
        dA = (dlog * dt).sum((0, 1, 2))
        ddt = ddt + dlog * A
        dx = torch.addcmul(D[:, None] * dy_Bclhp, dxdt, dt[..., None])
        dD = (dy_Bclhp * x).sum((0, 1, 2, 4))
        return dx, ddt, dA, dB_Bcgln.transpose(2, 3), dC_Bcgln.transpose(2, 3), dD, None, dstate
