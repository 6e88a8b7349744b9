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
from nemo_lite.model.cache import Replay
from nemo_lite.model.context import Context
from nemo_lite.parallel.layers import Layers


class Conv(nn.Module):
    """Weight [C, W] and bias [C] of the depthwise causal convolution."""

    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        x, group = (config.mamba_num_heads, config.mamba_head_dim), (config.n_groups, config.ssm_state_size)
        self.weight = layers.channels(f"{name}.weight", x, group, group, width=config.conv_kernel)
        self.bias = layers.channels(f"{name}.bias", x, group, group)
        self.op = layers.ops.causal_conv

    def forward(self, x_BLC: Tensor, reset_BL: Tensor | None, window_BwC: Tensor | None) -> Tensor:
        return self.op(x_BLC, self.weight, self.bias, reset_BL, window_BwC)


class Mamba2(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        heads, inner = config.mamba_num_heads, config.mamba_inner
        self.heads, self.head_dim = layers.local(heads), config.mamba_head_dim
        self.groups, self.state = layers.local(config.n_groups), config.ssm_state_size
        self.chunk, self.limit = config.chunk_size, tuple(config.time_step_limit)
        ops = layers.ops
        self.ssd, self.ssd_recurrent, self.ssd_verify, self.ssd_advance = (
            ops.ssd, ops.ssd_recurrent, ops.ssd_verify, ops.ssd_advance,
        )  # fmt: skip
        x, group = (heads, self.head_dim), (config.n_groups, self.state)
        self.in_proj = layers.column_linear(f"{name}.in_proj", config.hidden_size, x, x, group, group, (heads, 1))
        self.conv1d = Conv(config, layers, f"{name}.conv1d")
        self.dt_bias = layers.channels(f"{name}.dt_bias", (heads, 1))
        self.A_log = layers.channels(f"{name}.A_log", (heads, 1))
        self.D = layers.channels(f"{name}.D", (heads, 1))
        self.norm = layers.gated_norm(f"{name}.norm", inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = layers.row_linear(f"{name}.out_proj", inner, config.hidden_size)

    def forward(self, u_TH: Tensor, ctx: Context, index: int = 0) -> tuple[Tensor, None]:
        inner, gn = self.heads * self.head_dim, self.groups * self.state
        z_TC, xBC_TC, dt_TH = self.in_proj(u_TH).split([inner, inner + 2 * gn, self.heads], dim=-1)
        y_TC = ctx.over_parts(lambda part, xBC, dt: self._mix(part, xBC, dt, index), xBC_TC, dt_TH)
        return self.out_proj(self.norm(y_TC, z_TC)), None

    def _mix(self, ctx: Context, xBC_TC: Tensor, dt_TH: Tensor, index: int) -> Tensor:
        """Convolution and scan, [T, heads * head size]."""
        B, L = ctx.batch, ctx.length
        inner, gn = self.heads * self.head_dim, self.groups * self.state
        xBC_BLC = xBC_TC.unflatten(0, (B, L))
        carried = ctx.stream.states[index] if ctx.stream is not None else None
        window, state = (carried.window, carried.state) if carried is not None else (None, None)
        conv_BLC = self.conv1d(xBC_BLC, ctx.reset_BL, window)
        x, b, c = conv_BLC.split([inner, gn, gn], dim=-1)
        x_BLHP = x.unflatten(-1, (self.heads, self.head_dim))
        b_BLGN, c_BLGN = (t.unflatten(-1, (self.groups, self.state)) for t in (b, c))
        dtype = torch.promote_types(xBC_TC.dtype, torch.float32)
        A_H = -torch.exp(self.A_log.to(dtype))
        dt_BLH = F.softplus(dt_TH.to(dtype) + self.dt_bias.to(dtype)).unflatten(0, (B, L))
        if self.limit != (0.0, float("inf")):  # softplus is within that already
            dt_BLH = dt_BLH.clamp(*self.limit)
        if ctx.valid_BL is not None:
            dt_BLH = dt_BLH * ctx.valid_BL[..., None]  # padding neither decays the state nor adds to it
        if ctx.tentative:
            assert carried is not None
            if state is None:
                state = dt_BLH.new_zeros(B, self.heads, self.head_dim, self.state)
            y_BLHP = self.ssd_verify(x_BLHP, dt_BLH, A_H, b_BLGN, c_BLGN, self.D, state)
            carried.hold(xBC_BLC, Replay(x_BLHP, dt_BLH, A_H, b_BLGN, state, self.ssd_advance), ctx)
        else:
            scan = self.ssd if L > 1 else self.ssd_recurrent
            y_BLHP, new_state = scan(
                x_BLHP, dt_BLH, A_H, b_BLGN, c_BLGN, self.D, ctx.reset_BL, state, chunk_size=self.chunk
            )
            if carried is not None:
                carried.advance(xBC_BLC, new_state, ctx)
        return y_BLHP.flatten(2).flatten(0, 1)
