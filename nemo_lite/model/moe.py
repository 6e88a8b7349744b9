"""LatentMoE and the dense squared-ReLU MLP.

    l = fc1_latent x                                         H -> latent
    y = fc2_latent( sum_k w_k down_e(relu(up_e l)^2) )       experts work in latent space
        + shared_down(relu(shared_up x)^2)                   one shared expert, on the full hidden size

The router sees the full hidden size, in float32. Without `moe_latent_size` the experts work on x itself.

Shape letters: T tokens, B batch, L length, H hidden, E experts, k experts of a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_lite.config import ModelConfig
from nemo_lite.model.context import Context
from nemo_lite.parallel.layers import Layers


@dataclass
class RouterStats:
    """What one call of a router leaves for the balance of its experts.

    counts_E: tokens per expert of the (biased) choice; aux: auxiliary loss summed over rows, not yet times its
    coefficient. Both over the counted positions only.
    """

    counts_E: Tensor
    aux: Tensor


class Router(nn.Module):
    """Sigmoid scores in float32; the choice is made on score + bias, the weight is the score alone.

    `bias` (e_score_correction_bias) is moved by the training loop after each step, not by gradients. With n_group > 1 a
    group's score is the sum of its two largest biased scores, and only the topk_group best groups stay eligible.
    """

    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        self.topk, self.scaling, self.normalise = (
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            config.norm_topk_prob,
        )
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))
        self.mine, self.route = layers.mine, layers.route

    def forward(self, x_TH: Tensor, ctx: Context) -> tuple[Tensor, Tensor, RouterStats | None]:
        """Chosen experts [T, k] (-1 on padding), their weights [T, k] in float32, and statistics when training."""
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        logits_TE = F.linear(x_TH.to(dtype), self.weight.to(dtype))
        rows = ctx.batch if self.training else 0
        expert_Tk, weight_Tk, counts_E, aux = self.route(
            logits_TE, self.bias, self.topk, self.scaling, self.normalise, self.n_group, self.topk_group, rows,
            ctx.count_BL,
        )  # fmt: skip
        if ctx.valid_BL is not None:
            expert_Tk = expert_Tk.masked_fill(~self.mine(ctx.valid_BL.flatten())[:, None], -1)
        stats = None if counts_E is None or aux is None else RouterStats(counts_E, aux)
        return expert_Tk, weight_Tk, stats


class MLP(nn.Module):
    """down(relu(up x)^2): a dense layer, and the shared expert."""

    def __init__(self, layers: Layers, name: str, hidden_size: int, inner: int):
        super().__init__()
        self.up = layers.column_linear(f"{name}.up_proj", hidden_size, (inner, 1))
        self.down = layers.row_linear(f"{name}.down_proj", inner, hidden_size)
        self.squared_relu = layers.ops.squared_relu

    def forward(self, x_TH: Tensor, ctx: Context | None = None, index: int = 0) -> tuple[Tensor, None]:
        return self.down(self.squared_relu(self.up(x_TH))), None


class LatentMoE(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        hidden, latent = config.hidden_size, config.moe_latent_size
        self.router = Router(config, layers, f"{name}.gate")
        self.fc1_latent = layers.linear(f"{name}.fc1_latent_proj", hidden, latent) if latent else nn.Identity()
        self.experts = layers.experts(
            f"{name}.experts", config.n_routed_experts, config.expert_size, config.moe_intermediate_size
        )
        self.fc2_latent = layers.linear(f"{name}.fc2_latent_proj", latent, hidden) if latent else nn.Identity()
        self.shared = (
            MLP(layers, f"{name}.shared_experts", hidden, config.moe_shared_expert_intermediate_size)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_TH: Tensor, ctx: Context, index: int = 0) -> tuple[Tensor, RouterStats | None]:
        expert_Tk, weight_Tk, stats = self.router(x_TH, ctx)
        y_TH = self.fc2_latent(self.experts(self.fc1_latent(x_TH), expert_Tk, weight_Tk))
        if self.shared is not None:
            y_TH = y_TH + self.shared(x_TH)[0]
        return y_TH, stats
