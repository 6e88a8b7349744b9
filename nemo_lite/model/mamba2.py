"""The Mamba-2 mixer (arXiv 2405.21060), with carried convolution window and SSM state.

    z, xBC, dt = split(in_proj u)                    in_proj rows in the order z, x, B, C, dt
    xBC = silu(causal_conv1d(xBC));  x, B, C = split
    dt = clamp(softplus(dt + dt_bias), time_step_limit);  A = -exp(A_log)
    y = ssd(x, dt, A, B, C) + D x
    out = out_proj(norm(y * silu(z)))                gate first, RMS per group

Shape letters: T tokens, B batch, L length, H heads, P head size, G groups, N state size, C channels of x, B and C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_lite.config import ModelConfig
from nemo_lite.model.context import Context
from nemo_lite.parallel.layers import Layers


class Conv(nn.Module):
    """Weight [C, W] and bias [C] of the depthwise causal convolution."""

    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        inner, gn = config.mamba_inner, config.mamba_groups_state
        self.weight = layers.channels(f"{name}.weight", inner, gn, gn, width=config.conv_kernel)
        self.bias = layers.channels(f"{name}.bias", inner, gn, gn)
        self.op = layers.ops.causal_conv

    def forward(self, x_BLC: Tensor, reset_BL: Tensor | None, window_BwC: Tensor | None) -> Tensor:
        return self.op(x_BLC, self.weight, self.bias, reset_BL, window_BwC)


class Mamba2(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        heads, inner, gn = config.mamba_num_heads, config.mamba_inner, config.mamba_groups_state
        self.heads, self.head_dim = layers.local(heads), config.mamba_head_dim
        self.groups, self.state = layers.local(config.n_groups), config.ssm_state_size
        self.chunk, self.limit = config.chunk_size, tuple(config.time_step_limit)
        self.ssd, self.ssd_recurrent = layers.ops.ssd, layers.ops.ssd_recurrent
        segments = (inner, inner, gn, gn, heads)
        self.in_proj = layers.column_linear(f"{name}.in_proj", config.hidden_size, sum(segments), segments)
        self.conv1d = Conv(config, layers, f"{name}.conv1d")
        self.dt_bias = layers.channels(f"{name}.dt_bias", heads)
        self.A_log = layers.channels(f"{name}.A_log", heads)
        self.D = layers.channels(f"{name}.D", heads)
        self.norm = layers.gated_norm(f"{name}.norm", inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = layers.row_linear(f"{name}.out_proj", inner, config.hidden_size)

    def forward(self, u_TH: Tensor, ctx: Context, index: int = 0) -> tuple[Tensor, None]:
        B, L = ctx.batch, ctx.length
        inner, gn = self.heads * self.head_dim, self.groups * self.state
        z_TC, xBC_TC, dt_TH = self.in_proj(u_TH).split([inner, inner + 2 * gn, self.heads], dim=-1)
        xBC_BLC = xBC_TC.unflatten(0, (B, L))
        if ctx.stream is None:
            window = state = None
        else:
            carried = ctx.stream.states[index]
            window, state = carried.window, carried.state
        conv_BLC = self.conv1d(xBC_BLC, ctx.reset_BL, window)
        x, b, c = conv_BLC.split([inner, gn, gn], dim=-1)
        dtype = torch.promote_types(u_TH.dtype, torch.float32)
        dt_BLH = F.softplus(dt_TH.to(dtype) + self.dt_bias.to(dtype)).unflatten(0, (B, L))
        if self.limit != (0.0, float("inf")):  # softplus is within that already
            dt_BLH = dt_BLH.clamp(*self.limit)
        if ctx.valid_BL is not None:
            dt_BLH = dt_BLH * ctx.valid_BL[..., None]  # padding neither decays the state nor adds to it
        scan = self.ssd if L > 1 and not ctx.tentative else self.ssd_recurrent
        y_BLHP, new_state = scan(
            x.unflatten(-1, (self.heads, self.head_dim)),
            dt_BLH,
            -torch.exp(self.A_log.to(dtype)),
            b.unflatten(-1, (self.groups, self.state)),
            c.unflatten(-1, (self.groups, self.state)),
            self.D,
            ctx.reset_BL,
            state,
            chunk_size=self.chunk,
            all_states=ctx.tentative,
        )
        if ctx.stream is not None:
            ctx.stream.states[index].advance(xBC_BLC, new_state, ctx)
        return self.out_proj(self.norm(y_BLHP.flatten(2).flatten(0, 1), z_TC)), None
