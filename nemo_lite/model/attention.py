"""Grouped-query attention: causal, without positional embedding (the Mamba layers carry position), without biases.

Shape letters: T tokens, B batch, L length, A query heads, K key/value heads, D head size.
"""

from torch import Tensor, nn

from nemo_lite.config import ModelConfig
from nemo_lite.model.context import Context
from nemo_lite.parallel.layers import Layers


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, name: str):
        super().__init__()
        self.head_dim = config.head_dim
        q, kv = (config.num_attention_heads, self.head_dim), (config.num_key_value_heads, self.head_dim)
        self.q_proj = layers.column_linear(f"{name}.q_proj", config.hidden_size, q)
        self.k_proj = layers.column_linear(f"{name}.k_proj", config.hidden_size, kv)
        self.v_proj = layers.column_linear(f"{name}.v_proj", config.hidden_size, kv)
        self.o_proj = layers.row_linear(f"{name}.o_proj", q[0] * q[1], config.hidden_size)
        self.ops, self.together = layers.ops, layers.together

    def forward(self, x_TH: Tensor, ctx: Context, index: int = 0) -> tuple[Tensor, None]:
        q_TAD, k_TKD, v_TKD = (
            y.unflatten(-1, (-1, self.head_dim)) for y in self.together(x_TH, self.q_proj, self.k_proj, self.v_proj)
        )
        y_TAD = ctx.over_parts(lambda part, q, k, v: self._attend(part, q, k, v, index), q_TAD, k_TKD, v_TKD)
        return self.o_proj(y_TAD.flatten(1)), None

    def _attend(self, ctx: Context, q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor, index: int) -> Tensor:
        if ctx.stream is None:
            assert ctx.lengths is not None
            return self.ops.attention(q_TAD, k_TKD, v_TKD, ctx.lengths)
        q, k, v = (t.unflatten(0, (ctx.batch, ctx.length)) for t in (q_TAD, k_TKD, v_TKD))
        return ctx.stream.states[index].attend(q, k, v, ctx, self.ops).flatten(0, 1)
