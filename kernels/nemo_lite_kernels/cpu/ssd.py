"""The chunked Mamba-2 scan in C++: the references' signature, for x, B and C in float32 or bfloat16."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_lite_kernels.cpu import Kernel

CHUNK = 64  # at most: the matrices of a chunk and head then fit the second-level cache
UNITS = 16  # that a gradient is split into where there are as many heads, so that threads up to that do not change it

_forward, _backward = Kernel("ssd_forward", "p" * 12 + "i" * 7), Kernel("ssd_backward", "p" * 20 + "i" * 8)


def ssd(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, chunk_size=128):
    if not x_BLHP.dtype == B_BLGN.dtype == C_BLGN.dtype:
        y, final = ssd(
            x_BLHP.float(), dt_BLH, A_H, B_BLGN.float(), C_BLGN.float(), D_H, reset_BL, state_BHPN,
            chunk_size=chunk_size,
        )  # fmt: skip
        return y.to(x_BLHP.dtype), final
    state = None if state_BHPN is None else state_BHPN.float()
    args = (x_BLHP, dt_BLH.float(), A_H.float(), B_BLGN, C_BLGN, D_H.float(), reset_BL, state)
    if torch.is_grad_enabled():
        return _Scan.apply(*args, chunk_size)
    return _scan(*args, chunk_size, False)[:2]


def _sizes(x: Tensor, B: Tensor, chunk: int) -> tuple[int, ...]:
    """B, L, H, P, G, N, and the chunk."""
    return *x.shape, *B.shape[2:], max(1, min(chunk, CHUNK, x.shape[1]))


def _strided(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([stride for t in tensors for stride in t.stride()[:3]])


def _padded(n: int) -> int:
    """Room for whole vectors of any level."""
    return -(-n // 16) * 16


def _scan(x, dt, A, B, C, D, reset, state, chunk_size, keep):
    """y, the final state, and where they are kept the states at the chunks' starts, as the library lays them out."""
    x, B, C = _strided(x), _strided(B), _strided(C)
    sizes = batch, L, H, P, _, N, chunk = _sizes(x, B, chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype)
    final = torch.empty(batch, H, P, N)
    kept = torch.empty(batch, -(-L // chunk), H, _padded(N), _padded(P)) if keep else None
    _forward[x.dtype](
        x, dt, A.contiguous(), B, C, D.contiguous(), _whole(reset), _whole(state), y, kept, final,
        _strides(x, dt, B, C), *sizes,
    )  # fmt: skip
    return y, final, kept


class _Scan(torch.autograd.Function):
    """Only the inputs and the states at the chunks' starts are kept."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, reset, state, chunk_size):
        y, final, kept = _scan(x, dt, A, B, C, D, reset, state, chunk_size, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, dt, A, B, C, D, reset, kept)
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, reset, kept = ctx.saved_tensors
        x, B, C = _strided(x), _strided(B), _strided(C)
        sizes = batch, _, H, P, G, N, _ = _sizes(x, B, ctx.chunk_size)
        dy = torch.zeros(x.shape, dtype=x.dtype) if dy is None else _strided(dy)
        # Heads of a unit; the threads decide only where they are more than UNITS.
        parts = -(-max(UNITS, torch.get_num_threads()) // max(1, batch * G))
        heads = max(1, H // G // parts)
        blocks = -(-(H // G) // heads)
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype) for t in (x, B, C))
        ddt, dA, dD = torch.empty(dt.shape), torch.empty(batch, H), torch.empty(batch, H)
        dstate = torch.empty(batch, H, P, N) if ctx.needs_input_grad[7] else None
        summed = blocks == 1 and x.dtype == torch.float32
        parts_B, parts_C = (dB, dC) if summed else (torch.empty(blocks, *B.shape), torch.empty(blocks, *C.shape))
        _backward[x.dtype](
            x, dt, A.contiguous(), B, C, D.contiguous(), _whole(reset), kept, dy, _whole(dfinal),
            dx, ddt, dA, dB, dC, dD, dstate, parts_B, parts_C, _strides(x, dt, B, C, dy), *sizes, heads,
        )  # fmt: skip
        return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), None, dstate, None
