"""Backends from libraries that are not ours, with the references' signatures: mamba-ssm, causal-conv1d, flash-attn, and
two forms of attention that torch has for CUDA.

Each function says here what its library is given; shapes that a library refuses go to torch's plain form. A library is
imported when it is first called. The shape letters are those of the references.
"""

from __future__ import annotations

import functools
import importlib
import inspect

import torch
import torch.nn.functional as F

from nemo_lite_kernels.attention import attention
from nemo_lite_kernels.conv import causal_conv_lean

MODULES = {
    "mamba_ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal_conv1d": "causal_conv1d",
    "flash_attn": "flash_attn",
    "varlen": "torch.nn.attention.varlen",
    "flex": "torch.nn.attention.flex_attention",
    "transformer_engine": "transformer_engine.pytorch",
}


def reason(name: str) -> str | None:
    """Why a library cannot be used here, or None."""
    try:
        module = importlib.import_module(MODULES[name])
        if name == "varlen" and not {"window_size", "enable_gqa"} <= set(
            inspect.signature(module.varlen_attn).parameters
        ):
            return f"needs a newer torch than {torch.__version__}"
        if name == "flex":
            importlib.import_module("triton")  # which the compiled form is written in
    except Exception as error:  # an extension built for another torch fails with whatever it likes
        if isinstance(error, ModuleNotFoundError) and error.name == MODULES[name].split(".")[0]:
            return "is not installed"
        lines = str(error).strip().splitlines() or ["no message"]
        return f"cannot be imported: {type(error).__name__}: {lines[0]}"
    return None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"


def ssd_mamba_ssm(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, reset_BL=None, state_BHPN=None, *, chunk_size=128):
    """``mamba_chunk_scan_combined``: documents are numbers in `seq_idx`, and the state carried in belongs to number 0.

    It multiplies in x's dtype and TF32 for float32.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x_BLHP, dt_BLH.float(), A_H.float(), B_BLGN.to(x_BLHP.dtype), C_BLGN.to(x_BLHP.dtype), chunk_size,
        D=D_H.float(),
        initial_states=None if state_BHPN is None else state_BHPN.float(),
        seq_idx=None if reset_BL is None else reset_BL.cumsum(1, dtype=torch.int32),
        return_final_states=True,
    )  # fmt: skip


def conv_causal_conv1d(x_BLC, weight_CW, bias_C, reset_BL=None, window_BwC=None):
    """``causal_conv1d_fn`` with channels last. It takes 2 to 4 taps, and channels in multiples of 8.

    It does not take documents and a window at once: a window is put in front as tokens of document 0.
    """
    from causal_conv1d import causal_conv1d_fn

    W, C, w = weight_CW.shape[1], x_BLC.shape[2], 0
    if not 2 <= W <= 4 or C % 8 or not x_BLC.numel():
        return causal_conv_lean(x_BLC, weight_CW, bias_C, reset_BL, window_BwC)
    document_BL = None if reset_BL is None else reset_BL.cumsum(1, dtype=torch.int32)
    if window_BwC is not None:
        w = W - 1
        x_BLC = torch.cat([window_BwC.to(x_BLC.dtype), x_BLC], dim=1)
        document_BL = None if document_BL is None else F.pad(document_BL, (w, 0))
    elif x_BLC.stride(2) != 1 or x_BLC.stride(0) % 8 or x_BLC.stride(1) % 8:
        x_BLC = x_BLC.contiguous()
    y_BCL = causal_conv1d_fn(
        x_BLC.transpose(1, 2), weight_CW, bias_C.to(weight_CW.dtype), seq_idx=document_BL, activation="silu"
    )
    return y_BCL.transpose(1, 2)[:, w:]


def attention_flash_attn(q_TAD, k_TKD, v_TKD, lengths: list[int]):
    """``flash_attn_varlen_func``: all documents in one call, told apart by where they start. Heads of up to 256."""
    from flash_attn import flash_attn_varlen_func

    if _odd(q_TAD):
        return attention(q_TAD, k_TKD, v_TKD, lengths)
    starts, longest = _starts(tuple(lengths), q_TAD.device), max(lengths)
    return flash_attn_varlen_func(q_TAD, k_TKD, v_TKD, starts, starts, longest, longest, causal=True)


def attention_varlen(q_TAD, k_TKD, v_TKD, lengths: list[int]):
    """torch's own ``varlen_attn``, as :func:`attention_flash_attn`; a window of (-1, 0) is causal."""
    from torch.nn.attention.varlen import varlen_attn

    if _odd(q_TAD):
        return attention(q_TAD, k_TKD, v_TKD, lengths)
    starts, longest = _starts(tuple(lengths), q_TAD.device), max(lengths)
    return varlen_attn(
        q_TAD, k_TKD, v_TKD, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=True
    )  # fmt: skip


def attention_flex(q_TAD, k_TKD, v_TKD, lengths: list[int]):
    """torch's ``flex_attention``, compiled, over blocks that hold a visible pair: one call for all documents, also in
    float32."""
    mask = _block_mask(tuple(lengths), q_TAD.device)
    q, k, v = (t.transpose(0, 1)[None] for t in (q_TAD, k_TKD, v_TKD))
    return _flex()(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _odd(q_TAD) -> bool:
    """Whether the flash kernels refuse this size of heads, or there is nothing to do."""
    return q_TAD.shape[2] % 8 != 0 or q_TAD.shape[2] > 256 or not q_TAD.numel()


# Every attention layer of a forward is called with the same lengths.
@functools.lru_cache(8)
@torch.inference_mode(False)
def _starts(lengths: tuple[int, ...], device: torch.device):
    """Where each document starts, and the end, [n + 1] int32."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)


@functools.lru_cache(8)
@torch.inference_mode(False)
def _block_mask(lengths: tuple[int, ...], device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    T = sum(lengths)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def visible(b, h, i, j):
        return (i >= j) & (document_T[i] == document_T[j])

    return create_block_mask(visible, None, None, T, T, device)


@functools.cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
