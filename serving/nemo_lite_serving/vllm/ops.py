"""The operations that vLLM's CPU build lacks, with the signatures vLLM calls them by. Imports vLLM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from nemo_lite_kernels import select
from nemo_lite_kernels.moe import sort_by_expert
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype as decode
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant as fake_quantize
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID


def convolve(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: bool | str | None,
    conv_state_indices: Tensor, num_accepted_tokens: Tensor, query_start_loc: Tensor, **_,
) -> Tensor:  # fmt: skip
    """A causal depthwise convolution of width W over each sequence's few tokens, which goes on from its state.

    x                    [T, D], sequences after each other
    conv_state           [slots, D, W - 1 + drafts], written: inputs that later tokens see
    weight, bias         [D, W], [D]
    conv_state_indices   [n, blocks], of which the first counts: slots
    num_accepted_tokens  [n]: how many of the tokens before were kept: the state begins with what the second one sees
    query_start_loc      [n + 1]: where sequences begin
    """
    past, n = weight.shape[1] - 1, len(conv_state_indices)
    slot, starts = conv_state_indices[:, 0].long(), query_start_loc[:n].long()
    lengths = query_start_loc[: n + 1].diff().long()
    place = torch.arange(int(lengths.max()))
    here = place < lengths[:, None]  # [n, longest]
    rows = (starts[:, None] + place).clamp(max=len(x) - 1)
    new = x[rows].transpose(1, 2).to(conv_state.dtype)  # [n, D, longest]
    kept = num_accepted_tokens[:n].long().clamp(min=1) - 1
    history = (kept[:, None] + torch.arange(past))[:, None].expand(-1, x.shape[1], -1)
    window = torch.cat([conv_state[slot].gather(2, history), new], 2)
    y = F.conv1d(window.to(weight.dtype), weight[:, None], bias, groups=len(weight))
    if activation in (True, "silu", "swish"):
        y = F.silu(y)
    out = torch.empty_like(x)
    out[rows[here]] = y.transpose(1, 2)[here].to(x.dtype)
    real, width = slot != NULL_BLOCK_ID, min(window.shape[2] - 1, conv_state.shape[2])
    conv_state[slot[real], :, :width] = window[real, :, 1 : 1 + width]
    return out


def advance(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    state_batch_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, out: Tensor,
    null_block_id: int = NULL_BLOCK_ID, **_,
) -> None:  # fmt: skip
    """Mamba-2's state over a few tokens of each sequence: h = exp(dt A) h + dt x B^T, out = h C + D x, where dt is
    softplus(dt + dt_bias).

    state                [slots, H, P, N], written: the state after the j-th token goes to the j-th slot of its sequence
    x, out, dt           [T, H, P], sequences after each other; dt the same for all P
    A, D, dt_bias, B, C  [H, P, N], [H, P], [H, P], [T, G, N], [T, G, N]
    state_batch_indices  [n, 1 + drafts]: slots
    num_accepted_tokens  [n]: how many of the last tokens were kept, which says whose state to go on from
    cu_seqlens           [n + 1]: where sequences begin
    """
    n, heads = len(state_batch_indices), x.shape[1] // B.shape[1]
    slot, starts, lengths = state_batch_indices.long(), cu_seqlens[:n].long(), cu_seqlens[: n + 1].diff()
    kept = num_accepted_tokens[:n].long().clamp(min=1) - 1
    h = state[slot.gather(1, kept[:, None])[:, 0]].float()
    for j in range(int(lengths.max())):
        here = (lengths > j).nonzero()[:, 0]
        row = starts[here] + j
        d = F.softplus(dt[row, :, 0].float() + dt_bias[:, 0].float())[..., None]  # [m, H, 1]
        x_mHP = x[row].float()
        b, c = (t[row].float().repeat_interleave(heads, 1) for t in (B, C))  # [m, H, N]
        now = h[here] * (d * A[:, :1, 0]).exp()[..., None] + (d * x_mHP)[..., None] * b[:, :, None]
        out[row] = ((now @ c[..., None])[..., 0] + D * x_mHP).to(out.dtype)
        h[here] = now
        to = slot[here, j]
        state[to[to != null_block_id]] = now[to != null_block_id].to(state.dtype)


def spread(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:  # fmt: skip
    """Each request's value for all its tokens: x [n], running sums cu_num_tokens [n] -> [num_tokens]. Values equal to
    `replace_from` become `replace_to`."""
    lengths = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(lengths, output_size=num_tokens)


class ReluSquaredExperts(CPUUnquantizedExperts):
    """y = sum_k weight_k down_k relu(up_k x)^2 by nemo_lite's kernels; w1 [E, F, L] and w2 [E, L, F] are as stored."""

    @staticmethod
    def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
        return mk.FusedMoEExperts.is_supported_config(cls, moe_config, weight_key, activation_key, activation_format)

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.RELU2_NO_MUL

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.op = select("cpu").experts

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
        a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
    ) -> None:  # fmt: skip
        expert_Tk = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
        weight_Tk = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        output.copy_(self.op(hidden_states, expert_Tk, weight_Tk, w1, w2))


class Nvfp4ReluSquaredExperts(ReluSquaredExperts):
    """The same with weights and activations in NVFP4: weights are decoded when they are read, inputs of both products
    are rounded to NVFP4 by the checkpoint's scales, as on a GPU; products are in the model's dtype."""

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key) -> bool:
        return (weight_key, activation_key) == (kNvfp4Static, kNvfp4Dynamic)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        dtype = self.moe_config.in_dtype
        config = self.quant_config
        self.up = decode(layer.w13_weight, config.w1_scale, config.g1_alphas, dtype, 16, swizzle=False)
        self.down = decode(layer.w2_weight, config.w2_scale, config.g2_alphas, dtype, 16, swizzle=False)

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
        a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
    ) -> None:  # fmt: skip
        expert_Tk = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
        order, counts = sort_by_expert(expert_Tk, len(self.up))
        token_S = order // expert_Tk.shape[1]
        x_SL = fake_quantize(hidden_states, self.a1_gscale, 16)[token_S]
        sizes, hit = counts.tolist(), counts.nonzero().flatten().tolist()
        if not hit:
            output.zero_()
            return
        pieces = zip(hit, x_SL.split([sizes[e] for e in hit]))
        u_SF = torch.cat([F.linear(x, self.up[e]) for e, x in pieces]).relu().square()
        u_SF = fake_quantize(u_SF, self.a2_gscale, 16)
        pieces = zip(hit, u_SF.split([sizes[e] for e in hit]))
        y_SL = torch.cat([F.linear(u, self.down[e]) for e, u in pieces]).float()
        if not apply_router_weight_on_input:
            y_SL *= topk_weights.flatten()[order, None]
        output.copy_(torch.zeros_like(output, dtype=torch.float32).index_add_(0, token_S, y_SL))
