"""State-space duality: the Mamba-2 scan (Dao and Gu 2024, arXiv 2405.21060).

For every head, with a scalar decay per step (section 1.1 of the Mamba-2 paper's notation):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        state, [P, N]
    y_t = h_t C_t + D x_t

Shape letters: B batch, L length, H heads, P head size, G groups sharing B and C, N state size, c chunks, l chunk
length, r heads per group (H / G).

All functions take
    x_BLHP, dt_BLH (after softplus and clamp; 0 on padding), A_H (negative), B_BLGN, C_BLGN, D_H,
    reset_BL   bool or None: True where the state is zeroed before the token (a document starts),
    state_BHPN the state carried in, or None for zero,
compute in float32 or better, and return y_BLHP in x's dtype and the final state in the computing dtype.

``ssd_verify`` and ``ssd_advance`` are the same recurrence for a handful of tokens in speculative decoding: all outputs
first, and the state once it is known how many of the tokens stay.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_lite_kernels.common import accumulate_dtype


def ssd_recurrent(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, all_states=False, **_):
    """The recurrence itself, one token after the other: the reference, and the form that decodes.

    With ``all_states`` the second result is the state after every token, [B, L, H, P, N]: the reference of
    :func:`ssd_advance`.
    """
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    dtype = accumulate_dtype(x_BLHP)
    if L == 1 and reset_BL is None and state_BHPN is not None and not all_states and not torch.is_grad_enabled():
        return _one_step(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN, dtype)
    x, dt = x_BLHP.to(dtype), dt_BLH.to(dtype)
    decay_BLH = torch.exp(dt * A_H.to(dtype))
    if reset_BL is not None:
        decay_BLH = decay_BLH.masked_fill(reset_BL[..., None], 0.0)
    # Heads are viewed as groups x heads of a group (r), so that B and C are never repeated.
    decay_BLGr11 = decay_BLH.view(B, L, G, -1, 1, 1)
    xdt_BLGrP1 = (x * dt[..., None]).view(B, L, G, -1, P, 1)
    B_BLG11N, C_BLGN1 = B_BLGN.to(dtype)[:, :, :, None, None], C_BLGN.to(dtype)[..., None]
    state = x.new_zeros(B, G, H // G, P, N) if state_BHPN is None else state_BHPN.to(dtype).view(B, G, -1, P, N)
    ys, states = [], []
    for t in range(L):
        state = torch.addcmul(decay_BLGr11[:, t] * state, xdt_BLGrP1[:, t], B_BLG11N[:, t])
        ys.append(state.flatten(2, 3) @ C_BLGN1[:, t])
        states.append(state)
    y = torch.addcmul(torch.stack(ys, dim=1).view(B, L, H, P), D_H.to(dtype)[:, None], x)
    after = torch.stack(states, dim=1).view(B, L, H, P, N) if all_states else state.view(B, H, P, N)
    return y.to(x_BLHP.dtype), after


def _one_step(x_B1HP, dt_B1H, A_H, B_B1GN, C_B1GN, D_H, state_BHPN, dtype):
    """One token of :func:`ssd_recurrent` in few operations: decoding runs it for every layer and token."""
    B, _, H, P = x_B1HP.shape
    G, N = B_B1GN.shape[2:]
    x_BHP, dt_BH11 = x_B1HP[:, 0].to(dtype), dt_B1H.to(dtype).reshape(B, H, 1, 1)
    decayed = state_BHPN * torch.exp(dt_BH11 * A_H.view(-1, 1, 1))
    xdt = (x_BHP.unsqueeze(-1) * dt_BH11).view(B * G, -1, 1)
    state = decayed.view(B * G, -1, N).baddbmm_(xdt, B_B1GN.to(dtype).reshape(B * G, 1, N))
    y = torch.bmm(state, C_B1GN.to(dtype).reshape(B * G, N, 1)).view(B, H, P)
    y = torch.addcmul(y, x_BHP, D_H.to(dtype)[:, None]).to(x_B1HP.dtype)
    return y[:, None], state.view(B, H, P, N)


def ssd_verify(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN):
    """y_BLHP of a few tokens after the state, in closed form and with no state kept (arXiv 2405.21060, section 6):

        y_t = exp(a_0 + .. + a_t) S C_t + sum_{j <= t} exp(a_{j+1} + .. + a_t) (C_t . B_j) dt_j x_j + D x_t,   a = dt A

    Quadratic in L and without a loop over it: for verifying drafts, where the state is read once and L is 2 to 8.
    """
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    dtype = accumulate_dtype(x_BLHP)
    x, dt = x_BLHP.to(dtype), dt_BLH.to(dtype)
    sums, hidden = _spans(L, dtype, x.device)
    log_decay = (dt * _per_row(A_H, dtype)).transpose(1, 2).reshape(B * H, L)
    decay = (
        torch.addmm(hidden, log_decay, sums).exp_().view(B, G, -1, L, L + 1)
    )  # [.., t, j]: into t from state, tokens
    C = C_BLGN.to(dtype).transpose(1, 2).reshape(B * G, L, N)
    scores = torch.bmm(C, B_BLGN.to(dtype).permute(0, 2, 3, 1).reshape(B * G, N, L))
    mixed = (decay[..., 1:] * scores.view(B, G, 1, L, L)).view(B * H, L, L)
    decayed_C = (decay[..., :1] * C.view(B, G, 1, L, N)).view(B * H, L, N)
    xdt = (x * dt[..., None]).transpose(1, 2).reshape(B * H, L, P)
    y = torch.bmm(decayed_C, state_BHPN.to(dtype).reshape(B * H, P, N).transpose(1, 2)).baddbmm_(mixed, xdt)
    return torch.addcmul(y.view(B, H, L, P).transpose(1, 2), x, D_H.to(dtype)[:, None]).to(x_BLHP.dtype)


def ssd_advance(x_BLHP, dt_BLH, A_H, B_BLGN, state_BHPN, counts_B):
    """The state after the first counts_B[b] of row b's L tokens, 0 to L: what a verification accepted.

        S' = exp(a_0 + .. + a_{n-1}) S + sum_{j < n} exp(a_{j+1} + .. + a_{n-1}) dt_j x_j B_j^T

    A may be [H], or [B, H] where rows are of several layers, which then advance in one call.
    """
    B, L = dt_BLH.shape[:2]
    G, N = B_BLGN.shape[2:]
    dtype = accumulate_dtype(x_BLHP)
    counted = torch.arange(L, device=x_BLHP.device)[:, None] < counts_B[:, None, None]
    dt = dt_BLH.to(dtype) * counted  # a token that is not counted neither decays the state nor adds to it
    sums, _ = _spans(L, dtype, dt.device)
    decay = torch.matmul(sums.view(L, L, -1)[:, -1].T, dt * _per_row(A_H, dtype)).exp_()  # [B, 1 + L, H], to the end
    xdt = (x_BLHP.to(dtype) * (dt * decay[:, 1:])[..., None]).view(B, L, G, -1).transpose(1, 2).reshape(B * G, L, -1)
    state = state_BHPN.to(dtype) * decay[:, 0, :, None, None]
    state.view(B * G, -1, N).baddbmm_(xdt.transpose(1, 2), B_BLGN.to(dtype).transpose(1, 2).reshape(B * G, L, N))
    return state


def _per_row(A_H: Tensor, dtype: torch.dtype) -> Tensor:
    """A [H] or [B, H] as [1 or B, 1, H]."""
    return A_H.to(dtype).view(-1, 1, A_H.shape[-1])


@functools.lru_cache
@torch.inference_mode(False)  # what is kept may meet a call that is differentiated
def _spans(L: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A row of L logarithms times the first result [L, L * (L+1)], plus the second [L * (L+1)], is for every token t
    the logarithm of its decay from the state (j = 0) and from every token (j - 1); -inf for the tokens after t.

    Each is a sum of its own: the difference of two sums from the start would lose what cancels.
    """
    step, start = torch.arange(L, device=device), torch.arange(L + 1, device=device)
    inside = (start <= step[:, None, None]) & (step[:, None, None] <= step[:, None])  # [step, t, j]
    hidden = torch.zeros(L, L + 1, dtype=dtype, device=device).masked_fill(start > step[:, None] + 1, -torch.inf)
    return inside.to(dtype).view(L, -1), hidden.view(-1)


def ssd_chunked(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, chunk_size=128):
    """The chunked form: products of matrices inside a chunk, the recurrence only across chunks.

    Scores C B^T are built once per *group*; the backward pass is written out, so that only the inputs, the output and
    the state at each chunk's start are kept. The chunk used is at most `chunk_size` (the result does not depend on it):
    on a CPU one chunk's matrices should fit the second-level cache.
    """
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    dtype = accumulate_dtype(x_BLHP)
    l = min(chunk_size, L, CPU_CHUNK if x_BLHP.device.type == "cpu" else chunk_size)
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


CPU_CHUNK = 64


class _Decays:
    """exp of sums of dt A inside each chunk: between two tokens, from the chunk's start, to its end, over all of it.

    Chunks of all rows are counted through, Z = B c. Across a document's start every decay is zero.
    """

    def __init__(self, dt_Bclh: Tensor, A_h: Tensor, segment_Bcl: Tensor | None):
        B, c, l, h = dt_Bclh.shape
        self.cum_Zlh = (dt_Bclh * A_h).cumsum(2).view(B * c, l, h)
        self.cum_Zhl = self.cum_Zlh.transpose(1, 2).contiguous()
        self.from_start_Zlh = self.cum_Zlh.exp()
        self.to_end_Zlh = (self.cum_Zlh[:, -1:] - self.cum_Zlh).exp()
        self.whole_Bch = self.cum_Zlh[:, -1].exp().view(B, c, h)
        self.hidden_ll = torch.ones(l, l, dtype=torch.bool, device=dt_Bclh.device).triu(1)
        self.segment_Zl = None
        if segment_Bcl is not None:
            last_Bc = segment_Bcl[:, :, -1]
            # The incoming state belongs to segment 0 at the row's start: a reset on the first token makes that one 1.
            before_Bc = F.pad(last_Bc[:, :-1], (1, 0), value=0)
            same_start, same_end = segment_Bcl == before_Bc[..., None], segment_Bcl == last_Bc[..., None]
            self.from_start_Zlh *= same_start.view(B * c, l, 1)
            self.to_end_Zlh *= same_end.view(B * c, l, 1)
            self.whole_Bch = self.whole_Bch * (last_Bc == before_Bc)[..., None]
            self.segment_Zl = segment_Bcl.view(B * c, l)

    def between_zhll(self, part: slice) -> Tensor:
        """The decay from token j to token i of a chunk, [z, h, i, j]; 0 where i cannot see j."""
        cum = self.cum_Zhl[part]
        hidden = self.hidden_ll
        if self.segment_Zl is not None:
            segment = self.segment_Zl[part]
            hidden = (hidden | (segment[:, :, None] != segment[:, None, :]))[:, None]
        return (cum[..., :, None] - cum[..., None, :]).masked_fill_(hidden, -torch.inf).exp_()


def _parts(x_Zlhp: Tensor) -> list[slice]:
    """The chunks to work on at once: one a thread on a CPU, so that its matrices stay in cache, all on a GPU."""
    Z = x_Zlhp.shape[0]
    step = torch.get_num_threads() if x_Zlhp.device.type == "cpu" else max(Z, 1)
    return [slice(i, i + step) for i in range(0, Z, step)]


class _Chunked(torch.autograd.Function):
    """y and the final state of the chunked scan, with its gradient (arXiv 2405.21060, section 6, differentiated)."""

    @staticmethod
    def forward(ctx, x_Bclhp, dt_Bclh, A_h, B_Bclgn, C_Bclgn, D_h, segment_Bcl, state_Bhpn):
        Bt, c, l, h, p = x_Bclhp.shape
        g, n = B_Bclgn.shape[3:]
        r, Z = h // g, Bt * c
        decays = _Decays(dt_Bclh, A_h, segment_Bcl)
        x, dt = x_Bclhp.reshape(Z, l, h, p), dt_Bclh.reshape(Z, l, h)
        B_Zgln, C_Zgln = (t.reshape(Z, l, g, n).transpose(1, 2) for t in (B_Bclgn, C_Bclgn))

        y = x * D_h[:, None]
        added_Zhpn = x.new_empty(Z, h, p, n)  # what each chunk adds to the state at its end
        for part in _parts(x):
            xdt = x[part] * dt[part][..., None]  # [z, l, h, p]
            mixed = decays.between_zhll(part).unflatten(1, (g, r))
            mixed *= (C_Zgln[part] @ B_Zgln[part].transpose(-1, -2))[:, :, None]
            y[part] += (mixed.flatten(1, 2) @ xdt.transpose(1, 2)).transpose(1, 2)
            xdt *= decays.to_end_Zlh[part][..., None]
            weighted = xdt.view(-1, l, g, r * p).permute(0, 2, 3, 1)
            added_Zhpn[part] = (weighted @ B_Zgln[part]).view(-1, h, p, n)

        added, state, states_Zhpn = added_Zhpn.view(Bt, c, h, p, n), state_Bhpn, added_Zhpn
        for i in range(c):  # in the same memory: what a chunk adds gives way to the state it starts from
            following = torch.addcmul(added[:, i], decays.whole_Bch[:, i, :, None, None], state)
            added[:, i] = state
            state = following
        for part in _parts(x):
            carried = C_Zgln[part] @ states_Zhpn[part].view(-1, g, r * p, n).transpose(-1, -2)  # [z, g, l, r*p]
            carried = carried.transpose(1, 2).reshape(-1, l, h, p)
            y[part].addcmul_(decays.from_start_Zlh[part][..., None], carried)
        y = y.view(Bt, c, l, h, p)
        ctx.save_for_backward(
            x_Bclhp, dt_Bclh, A_h, B_Bclgn, C_Bclgn, D_h, segment_Bcl, states_Zhpn, state, y
        )  # fmt: skip
        return y, state

    @staticmethod
    def backward(ctx, dy_Bclhp, dfinal_Bhpn):
        x_Bclhp, dt_Bclh, A, B_Bclgn, C_Bclgn, D, segment, states, final, y_Bclhp = ctx.saved_tensors
        Bt, c, l, h, p = x_Bclhp.shape
        g, n = B_Bclgn.shape[3:]
        r, Z = h // g, Bt * c
        decays = _Decays(dt_Bclh, A, segment)
        dy_Bclhp = dy_Bclhp.contiguous()
        x, y, dy = (t.reshape(Z, l, h, p) for t in (x_Bclhp, y_Bclhp, dy_Bclhp))
        dt = dt_Bclh.reshape(Z, l, h)
        B, C = (t.reshape(Z, l, g, n).transpose(1, 2) for t in (B_Bclgn, C_Bclgn))
        dB_Zgln, dC_Zgln = x.new_empty(Z, g, l, n), x.new_empty(Z, g, l, n)
        dx, ddt, dcum = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dt)
        dD = torch.zeros_like(D)

        # Through the incoming state of every chunk, and then through the recurrence.
        from_y = x.new_empty(Z, h, p, n)
        for part in _parts(x):
            dcarried = (dy[part] * decays.from_start_Zlh[part][..., None]).view(-1, l, g, r * p).transpose(1, 2)
            dC_Zgln[part] = dcarried @ states[part].view(-1, g, r * p, n)
            from_y[part] = (dcarried.transpose(-1, -2) @ C[part]).view(-1, h, p, n)
        from_y_B, states_B, dstate = from_y.view(Bt, c, h, p, n), states.view(Bt, c, h, p, n), dfinal_Bhpn
        dend_Bch = torch.empty_like(decays.whole_Bch)  # of the logarithm of each chunk's whole decay
        for i in reversed(range(c)):
            out = states_B[:, i + 1] if i + 1 < c else final
            dend_Bch[:, i] = (dstate * out).sum((-1, -2))
            before = torch.addcmul(from_y_B[:, i], decays.whole_Bch[:, i, :, None, None], dstate)
            from_y_B[:, i] = dstate  # in the same memory: the gradient of what the chunk adds
            dstate = before
        dadded_Zgpn, dend_Zh = from_y.view(Z, g, r * p, n), dend_Bch.view(Z, h)

        for part in _parts(x):
            xdt = x[part] * dt[part][..., None]
            # A chunk's contribution to the state at its end.
            to_end = decays.to_end_Zlh[part][..., None]
            dxdt = (B[part] @ dadded_Zgpn[part].transpose(-1, -2)).transpose(1, 2).reshape(-1, l, h, p) * to_end
            dB = (xdt * to_end).view(-1, l, g, r * p).transpose(1, 2) @ dadded_Zgpn[part]
            # Inside the chunk.
            between, scores = decays.between_zhll(part), C[part] @ B[part].transpose(-1, -2)
            dmixed = dy[part].transpose(1, 2) @ xdt.permute(0, 2, 3, 1)
            dscores = dmixed.mul_(between).unflatten(1, (g, r)).sum(2)
            mixed = between.unflatten(1, (g, r)).mul_(scores[:, :, None]).flatten(1, 2)
            dxdt += (mixed.transpose(-1, -2) @ dy[part].transpose(1, 2)).transpose(1, 2)
            dC_Zgln[part] += dscores @ B[part]
            torch.add(dB, dscores.transpose(-1, -2) @ C[part], out=dB_Zgln[part])
            # d/d(log decay): a token's row of outputs minus its column of inputs; all sums collapse to two products.
            ddt[part] = (dxdt * x[part]).sum(-1)
            straight = (dy[part] * x[part]).sum(-1)  # through D x
            dcum[part] = (dy[part] * y[part]).sum(-1) - D * straight - ddt[part] * dt[part]
            dD += straight.sum((0, 1))
            torch.mul(dxdt, dt[part][..., None], out=dx[part])
            dx[part].addcmul_(dy[part], D[:, None])
        dcum[:, -1] += dend_Zh
        dlog = dcum.flip(1).cumsum(1).flip(1)
        dA = (dlog * dt).sum((0, 1))
        ddt = ddt.addcmul_(dlog, A)
        dB_Bclgn, dC_Bclgn = (t.transpose(1, 2).reshape(Bt, c, l, g, n) for t in (dB_Zgln, dC_Zgln))
        return dx.view_as(x_Bclhp), ddt.view_as(dt_Bclh), dA, dB_Bclgn, dC_Bclgn, dD, None, dstate
