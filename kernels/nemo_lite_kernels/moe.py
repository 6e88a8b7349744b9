"""Routed experts: y_t = sum_k weight_tk * down_e(relu(up_e x_t)^2), e = expert_tk (squared ReLU, not gated).

Shape letters: T tokens, k experts of a token, E experts, L size experts read and write (latent or hidden), F inner
size, S = T*k token copies sorted by expert.

All functions take x_TL, expert_Tk (int64; -1: this copy is not computed), weight_Tk, up_EFL, down_ELF and return y_TL
in x's dtype. Tokens are sorted once; work and launches follow the experts hit, not their number.
"""

import torch
import torch.nn.functional as F

from nemo_lite_kernels.common import accumulate_dtype, product_dtype


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
    if x_TL.shape[0] <= FEW_TOKENS and not torch.is_grad_enabled():
        decode = _one_token if x_TL.shape[0] == 1 else _few_tokens
        if 2 * expert_Tk.numel() >= up_EFL.shape[0] and x_TL.shape[0] > 1 and up_EFL.numel() <= SMALL_EXPERTS:
            decode = _all_experts
        return decode(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF)
    if (kind := product_dtype(x_TL)) != x_TL.dtype:
        up, down = (weight.to(x_TL.dtype).to(kind) for weight in (up_EFL, down_ELF))
        return experts_loop(x_TL.to(kind), expert_Tk, weight_Tk, up, down).to(x_TL.dtype)
    order, counts = sort_by_expert(expert_Tk, up_EFL.shape[0])
    # bfloat16 products on a CPU are compiled per shape (ten times the product's own time, seen with torch 2.13), so an
    # expert's rows are padded with zeros to a multiple of 16 and few shapes occur.
    multiple = 16 if x_TL.dtype == torch.bfloat16 and len(order) > 64 else 1
    slices, start, first = [], 0, 0
    for e, count in enumerate(counts.tolist()):
        if count:
            rows = -(-count // multiple) * multiple
            slices.append((e, slice(start, start + count), slice(first, first + count), slice(first, first + rows)))
            start, first = start + count, first + rows
    return _Loop.apply(x_TL, weight_Tk, up_EFL, down_ELF, order, slices, first)


FEW_TOKENS = 64
SMALL_EXPERTS = 1 << 19  # elements of all up projections: both stay in a core's cache


def _one_token(x_1L, expert_1k, weight_1k, up_EFL, down_ELF):
    """Decoding one token: nothing to sort, every product is a matrix with a vector."""
    # In float32 also for bfloat16 weights: casting an expert first takes half the time of torch's own product.
    x = x_1L.to(accumulate_dtype(x_1L))
    y = torch.zeros_like(x)
    for e, weight in zip(expert_1k[0].tolist(), weight_1k[0].tolist()):
        if e >= 0:
            u = F.linear(x, up_EFL[e].to(x.dtype)).relu_()
            y.add_(F.linear(u.mul_(u), down_ELF[e].to(x.dtype)), alpha=weight)
    return y.to(x_1L.dtype)


def _all_experts(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """Small experts, many of them hit: two batched products over all of them take less time than starting one a piece.
    An expert that a token did not choose has weight 0 there."""
    dtype, kind = accumulate_dtype(x_TL), product_dtype(x_TL)
    T, E = x_TL.shape[0], up_EFL.shape[0]
    weight_TE = torch.zeros(T, E + 1, dtype=dtype, device=x_TL.device)
    weight_TE.scatter_add_(1, expert_Tk + 1, weight_Tk.to(dtype))  # column 0: copies that are not computed
    h_ETF = torch.matmul(x_TL.to(kind), up_EFL.to(kind).transpose(1, 2)).relu_()
    h_ETF = h_ETF.mul_(h_ETF).mul_(weight_TE[:, 1:].T.unsqueeze(-1))
    return torch.bmm(h_ETF, down_ELF.to(kind).transpose(1, 2)).sum(0, dtype=dtype).to(x_TL.dtype)


def _few_tokens(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """Decoding a batch or verifying drafts: an expert that is hit is read once for all its tokens, in one product up
    and one down. Everything between them is done once for all copies: these tensors are small, and operations count."""
    dtype = accumulate_dtype(x_TL)  # as for one token
    copies = {}
    for copy, e in enumerate(expert_Tk.flatten().tolist()):
        if e >= 0:
            copies.setdefault(e, []).append(copy)
    if not copies:
        return torch.zeros_like(x_TL)
    sizes = [len(of_expert) for of_expert in copies.values()]
    order = torch.tensor([copy for of_expert in copies.values() for copy in of_expert], device=x_TL.device)
    token_S = order // expert_Tk.shape[1]
    xs = x_TL.to(dtype).index_select(0, token_S).split(sizes)
    u_SF = torch.cat([F.linear(x, up_EFL[e].to(dtype)) for e, x in zip(copies, xs)]).relu_()
    us = u_SF.mul_(u_SF).mul_(weight_Tk.reshape(-1, 1).to(dtype).index_select(0, order)).split(sizes)
    y_SL = torch.cat([F.linear(u, down_ELF[e].to(dtype)) for e, u in zip(copies, us)])
    return torch.zeros_like(x_TL, dtype=dtype).index_add_(0, token_S, y_SL.to(dtype)).to(x_TL.dtype)


class _Loop(torch.autograd.Function):
    """`slices` holds for each expert hit: e, its copies among the sorted ones, their rows in the padded buffers, and
    these rows with their padding."""

    @staticmethod
    def forward(ctx, x_TL, weight_Tk, up_EFL, down_ELF, order, slices, rows):
        dtype = x_TL.dtype
        token_S = order // weight_Tk.shape[1]
        weight_S = weight_Tk.flatten()[order].to(dtype)
        padded = rows > len(order)
        x_RL = (x_TL.new_zeros if padded else x_TL.new_empty)(rows, x_TL.shape[1])
        u_RF = x_TL.new_empty(rows, up_EFL.shape[1])  # relu(up x), all that backward needs besides x
        y_RL = torch.empty_like(x_RL)
        if len(slices) > 4:  # otherwise cast only the experts that are hit
            up_EFL, down_ELF = up_EFL.to(dtype), down_ELF.to(dtype)
        y_TL = torch.zeros_like(x_TL, dtype=accumulate_dtype(x_TL))
        for e, copies, real, all_rows in slices:
            x, u = x_RL[all_rows], u_RF[all_rows]
            torch.index_select(x_TL, 0, token_S[copies], out=x_RL[real])
            torch.mm(x, up_EFL[e].to(dtype).T, out=u)
            u.relu_()
            torch.mm(u * u, down_ELF[e].to(dtype).T, out=y_RL[all_rows])
            y_TL.index_add_(0, token_S[copies], (y_RL[real] * weight_S[copies, None]).to(y_TL.dtype))
        ctx.save_for_backward(x_RL, u_RF, y_RL, weight_S, token_S, order, up_EFL, down_ELF)
        ctx.slices, ctx.shapes = slices, (x_TL.shape, weight_Tk.shape, weight_Tk.dtype)
        return y_TL.to(dtype)

    @staticmethod
    def backward(ctx, dy_TL):
        x_RL, u_RF, y_RL, weight_S, token_S, order, up_EFL, down_ELF = ctx.saved_tensors
        (x_shape, weight_shape, weight_dtype) = ctx.shapes
        dtype = x_RL.dtype
        dweight = dy_TL.new_zeros(weight_shape, dtype=weight_dtype).flatten()
        dup, ddown = torch.zeros_like(up_EFL, dtype=dtype), torch.zeros_like(down_ELF, dtype=dtype)
        dx = torch.zeros(x_shape, dtype=accumulate_dtype(x_RL), device=x_RL.device)
        for e, copies, real, all_rows in ctx.slices:
            x, u, n = x_RL[all_rows], u_RF[all_rows], real.stop - real.start
            dy = x.new_zeros(x.shape)
            torch.index_select(dy_TL, 0, token_S[copies], out=dy[:n])
            dweight[order[copies]] = (dy[:n] * y_RL[real]).sum(-1, dtype=dx.dtype).to(weight_dtype)
            dy[:n] *= weight_S[copies, None]
            torch.mm(dy.T, u * u, out=ddown[e])
            du = (dy @ down_ELF[e].to(dtype)).mul_(u)  # relu(h)^2 has slope 2 relu(h): the 2 rides on what follows
            torch.mm(du.T, x, out=dup[e])
            dup[e] *= 2
            dx.index_add_(0, token_S[copies], (du @ up_EFL[e].to(dtype))[:n].to(dx.dtype), alpha=2)
        return dx.to(dtype), dweight.view(weight_shape), dup, ddown, None, None, None


def squared_relu(h):
    """relu(h)^2, keeping only relu(h) for the backward pass."""
    return _SquaredReLU.apply(h) if torch.is_grad_enabled() else torch.relu(h).square_()


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        u = torch.relu(h)
        ctx.save_for_backward(u)
        return u * u

    @staticmethod
    def backward(ctx, dy):
        (u,) = ctx.saved_tensors
        return (dy * u).mul_(2)


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
