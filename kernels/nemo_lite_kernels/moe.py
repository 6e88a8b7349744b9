"""Routed experts: y_t = sum_k weight_tk * down_e(relu(up_e x_t)^2), e = expert_tk (squared ReLU, not gated).

Shape letters: T tokens, k experts of a token, E experts, L size experts read and write (latent or hidden), F inner size,
S = T*k token copies sorted by expert.

All functions take x_TL, expert_Tk (int64; -1: this copy is not computed), weight_Tk, up_EFL, down_ELF and return y_TL in
x's dtype. Tokens are sorted once; work and launches follow the experts hit, not their number.
"""

import torch

from nemo_lite_kernels.common import accumulate_dtype


def experts_reference(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """The equation, one expert after the other, differentiated by autograd."""
    y = torch.zeros_like(x_TL, dtype=accumulate_dtype(x_TL))
    for e in range(up_EFL.shape[0]):
        token, slot = (expert_Tk == e).nonzero(as_tuple=True)
        if len(token):
            h = torch.relu(x_TL[token] @ up_EFL[e].to(x_TL.dtype).T).square() @ down_ELF[e].to(x_TL.dtype).T
            y = y.index_add(0, token, h.to(y.dtype) * weight_Tk[token, slot, None].to(y.dtype))
    return y.to(x_TL.dtype)


def sort_by_expert(expert_Tk, n_experts: int):
    """Copies grouped by expert: their flat indices into [T*k] (those of expert -1 left out), and counts [E]."""
    flat = expert_Tk.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=n_experts + 1)
    return order[int(counts[0]) :] if expert_Tk.numel() else order, counts[1:]


def experts_loop(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """A loop over the non-empty experts' contiguous slices, with the backward pass written out (CPU)."""
    order, counts = sort_by_expert(expert_Tk, up_EFL.shape[0])
    slices, start = [], 0
    for e, count in enumerate(counts.tolist()):
        if count:
            slices.append((e, start, start + count))
            start += count
    return _Loop.apply(x_TL, weight_Tk, up_EFL, down_ELF, order, slices)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TL, weight_Tk, up_EFL, down_ELF, order, slices):
        k = weight_Tk.shape[1]
        token_S = order // k
        x_SL = x_TL[token_S]
        weight_S = weight_Tk.flatten()[order].to(x_TL.dtype)
        u_SF = x_TL.new_empty(len(order), up_EFL.shape[1])  # relu(up x), all that backward needs besides x
        y_SL = torch.empty_like(x_SL)
        dtype = x_TL.dtype
        for e, start, end in slices:
            u = u_SF[start:end]
            torch.mm(x_SL[start:end], up_EFL[e].to(dtype).T, out=u)
            u.relu_()
            torch.mm(u.square(), down_ELF[e].to(dtype).T, out=y_SL[start:end])
        y_TL = torch.zeros_like(x_TL, dtype=accumulate_dtype(x_TL))
        y_TL.index_add_(0, token_S, (y_SL * weight_S[:, None]).to(y_TL.dtype))
        ctx.save_for_backward(x_SL, u_SF, y_SL, weight_S, token_S, order, up_EFL, down_ELF)
        ctx.slices, ctx.shapes = slices, (x_TL.shape, weight_Tk.shape, weight_Tk.dtype)
        return y_TL.to(x_TL.dtype)

    @staticmethod
    def backward(ctx, dy_TL):
        x_SL, u_SF, y_SL, weight_S, token_S, order, up_EFL, down_ELF = ctx.saved_tensors
        (x_shape, weight_shape, weight_dtype) = ctx.shapes
        dtype = x_SL.dtype
        dy_SL = dy_TL[token_S]
        dweight = dy_TL.new_zeros(weight_shape, dtype=weight_dtype).flatten()
        dweight[order] = (dy_SL * y_SL).sum(-1, dtype=accumulate_dtype(x_SL)).to(weight_dtype)
        dy_SL = dy_SL * weight_S[:, None]
        dup, ddown = torch.zeros_like(up_EFL), torch.zeros_like(down_ELF)
        dx_SL = torch.empty_like(x_SL)
        for e, start, end in ctx.slices:
            x, u, dy = x_SL[start:end], u_SF[start:end], dy_SL[start:end]
            _mm_into(ddown[e], dy.T, u.square())
            du = (dy @ down_ELF[e].to(dtype)).mul_(u).mul_(2)  # relu(h)^2 has slope 2 relu(h)
            _mm_into(dup[e], du.T, x)
            torch.mm(du, up_EFL[e].to(dtype), out=dx_SL[start:end])
        dx = torch.zeros(x_shape, dtype=accumulate_dtype(x_SL), device=x_SL.device)
        dx.index_add_(0, token_S, dx_SL.to(dx.dtype))
        return dx.to(dtype), dweight.view(weight_shape), dup, ddown, None, None


def _mm_into(out, a, b):
    """out = a @ b, also where out has another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def experts_grouped_mm(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """Two grouped GEMMs over the sorted copies (CUDA; rows must be 16-byte aligned, so L and F multiples of 8)."""
    order, counts = sort_by_expert(expert_Tk, up_EFL.shape[0])
    token_S = order // weight_Tk.shape[1]
    offsets = counts.cumsum(0).to(torch.int32)
    dtype = x_TL.dtype
    h = torch._grouped_mm(x_TL[token_S], up_EFL.to(dtype).transpose(-1, -2), offs=offsets)
    h = torch._grouped_mm(torch.relu(h).square(), down_ELF.to(dtype).transpose(-1, -2), offs=offsets)
    weight_S = weight_Tk.flatten()[order]
    y = torch.zeros_like(x_TL, dtype=accumulate_dtype(x_TL))
    return y.index_add(0, token_S, h.to(y.dtype) * weight_S[:, None].to(y.dtype)).to(dtype)
