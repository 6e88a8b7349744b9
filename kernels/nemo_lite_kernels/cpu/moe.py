"""Routed experts and the router's choice on a CPU: moe.cpp; the references are in nemo_lite_kernels.moe.

float32 and bfloat16 inputs; weights in the inputs' dtype or, for bfloat16 inputs, as float32 master weights, which are
cast while they are packed and whose gradients are float32 sums. Anything else goes to the loop over experts.
"""

import torch

from nemo_lite_kernels.cpu import Kernel
from nemo_lite_kernels.moe import experts_loop
from nemo_lite_kernels.route import route as route_reference

_SORT = Kernel("experts_sort", "pppppiii")
_FORWARD = Kernel("experts_forward", "pppppppppp" + "i" * 7)
_BACKWARD = Kernel("experts_backward", "p" * 16 + "i" * 7)
_FORWARD_MASTER = Kernel("experts_forward_master", "pppppppppp" + "i" * 7)
_BACKWARD_MASTER = Kernel("experts_backward_master", "p" * 16 + "i" * 7)


def experts(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF):
    """y_t = sum_k weight_tk down_e(relu(up_e x_t)^2) with the experts' products in one call, and the same backward."""
    dtypes = {up_EFL.dtype, down_ELF.dtype}
    if x_TL.dtype not in (torch.float32, torch.bfloat16) or dtypes not in ({x_TL.dtype}, {torch.float32}):
        return experts_loop(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF)
    return _Experts.apply(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF, torch.is_grad_enabled())


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF, training):
        x, up, down = x_TL.contiguous(), up_EFL.contiguous(), down_ELF.contiguous()
        expert, weight = expert_Tk.contiguous(), weight_Tk.to(torch.float32).contiguous()
        (T, k), (E, F, L) = expert.shape, up.shape
        copy, token, place = torch.empty(3, T * k, dtype=torch.int32).unbind()
        offsets = torch.empty(E + 2, dtype=torch.int64)
        _SORT(expert, copy, token, place, offsets, T * k, k, E)
        S, parts = offsets[E:].tolist()
        training = training and any(ctx.needs_input_grad)
        u_S = torch.empty(-(-F // 32), S, 32, dtype=x.dtype) if training else None  # relu(up x), in panels
        y_SL, y_TL = torch.empty(parts, S, L), torch.empty_like(x)
        kernel = (_FORWARD if up.dtype == x.dtype else _FORWARD_MASTER)[x.dtype]
        sizes = (T, k, E, L, F, S, parts)
        kernel(x, weight, up, down, token, place, offsets, u_S, y_SL, y_TL, *sizes)
        if training:
            ctx.save_for_backward(x, weight, up, down, u_S, copy, token, place, offsets)
            ctx.sizes, ctx.weight_dtype = sizes, weight_Tk.dtype
        return y_TL

    @staticmethod
    def backward(ctx, dy_TL):
        x, weight, up, down, u_S, copy, token, place, offsets = ctx.saved_tensors
        L, _, S, parts = ctx.sizes[3:]
        dx, dweight, dup, ddown = (torch.empty_like(tensor) for tensor in (x, weight, up, down))
        dweight_S, dx_SL = torch.empty(parts, S), torch.empty(parts, S, L)
        kernel = (_BACKWARD if up.dtype == x.dtype else _BACKWARD_MASTER)[x.dtype]
        kernel(
            *(dy_TL.contiguous(), x, weight, up, down, token, copy, place, offsets, u_S),
            *(dweight_S, dx_SL, dx, dweight, dup, ddown, *ctx.sizes),
        )
        return dx, None, dweight.to(ctx.weight_dtype), dup, ddown, None


_ROUTE = Kernel("route_forward", "ppppppppp" + "iiif" + "iiii")
_ROUTE_BACKWARD = Kernel("route_backward", "pppppp" + "iiif" + "ii")
_CHUNK = 64  # tokens whose statistics moe.cpp sums at a time


def route(logits_TE, bias_E, k, scaling, normalise, n_group, topk_group, rows=0, count_BL=None):
    """`nemo_lite_kernels.route.route` in one pass over the tokens."""
    if logits_TE.dtype != torch.float32 or (rows and logits_TE.shape[0] == 0):
        return route_reference(logits_TE, bias_E, k, scaling, normalise, n_group, topk_group, rows, count_BL)
    expert, weight, counts, aux = _Route.apply(
        logits_TE, bias_E, k, scaling, normalise, n_group, topk_group, rows, count_BL
    )
    return (expert, weight, counts, aux) if rows else (expert, weight, None, None)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, bias_E, k, scaling, normalise, n_group, topk_group, rows, count_BL):
        T, E = logits_TE.shape
        length = T // rows if rows else 0
        scores, weight_Tk = torch.empty(T, E), torch.empty(T, k)
        expert_Tk = torch.empty(T, k, dtype=torch.int64)
        count = None if count_BL is None or not rows else count_BL.to(torch.float32).contiguous()
        sums = torch.empty(3, rows, -(-length // _CHUNK), E) if rows else None
        _ROUTE(
            *(
                logits_TE.contiguous(),
                bias_E.to(torch.float32).contiguous(),
                count,
                scores,
                expert_Tk,
                weight_Tk,
                *(sums if sums is not None else (None,) * 3),
            ),
            *(T, E, k, scaling, normalise, n_group, topk_group, length),
        )
        counts_E = aux = share_BE = None
        if sums is not None:
            counts_E, (hits_BE, p_BE) = sums[0].sum((0, 1)).to(torch.int64), sums[1:].sum(2)
            n_B = scores.new_full((rows,), length) if count is None else count.sum(-1).clamp(min=1)
            share_BE = hits_BE * ((E / k) / n_B.square())[:, None]  # the gradient of aux over the sums of p
            aux = (share_BE * p_BE).sum()
            ctx.mark_non_differentiable(counts_E)
        ctx.mark_non_differentiable(expert_Tk)
        ctx.save_for_backward(scores, expert_Tk, share_BE, count)
        ctx.settings = (k, scaling, normalise, length)
        return expert_Tk, weight_Tk, counts_E, aux

    @staticmethod
    def backward(ctx, _, dweight_Tk, __, daux):
        scores, expert_Tk, share_BE, count = ctx.saved_tensors
        (T, E), (k, scaling, normalise, length) = scores.shape, ctx.settings
        dshares = None if share_BE is None or daux is None else (share_BE * daux).contiguous()
        dlogits = torch.empty_like(scores)
        _ROUTE_BACKWARD(
            *(scores, expert_Tk, dweight_Tk.contiguous(), dshares, count, dlogits),
            *(T, E, k, scaling, normalise, length),
        )
        return dlogits, *(None,) * 8


_USE_AMX = Kernel("tiles_use_amx", "i")


def use_amx(wanted: bool) -> None:
    """Whether products may use AMX where it is there: for tests and benchmarks."""
    _USE_AMX(wanted)
