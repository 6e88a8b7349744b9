"""Multi-token prediction with one shared-weight block.

At depth k = 1..K, position t reads token t+k and the hidden state of depth k-1 (depth 0: the trunk's output after its
final norm):

    g = eh_proj [ enorm(embed(token_{t+k})) ; hnorm(h_t^{k-1}) ]     embedding first
    h_t^k = final_layernorm(layers(g))                               and the main head reads token t+k+1 off h_t^k

The block may be run more often when drafting than in training.
"""

import torch
from torch import Tensor, nn

from nemo_lite.config import ModelConfig
from nemo_lite.model.context import Context
from nemo_lite.parallel.layers import Layers


class MTP(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, build_layer):
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_epsilon
        self.enorm = layers.norm("mtp.enorm", hidden, eps)
        self.hnorm = layers.norm("mtp.hnorm", hidden, eps)
        self.eh_proj = layers.linear("mtp.eh_proj", 2 * hidden, hidden)
        self.layers = nn.ModuleList(
            build_layer(letter, f"mtp.layers.{i}") for i, letter in enumerate(config.mtp_layers)
        )
        self.final_layernorm = layers.norm("mtp.final_layernorm", hidden, eps)

    def forward(self, h_TH: Tensor, e_TH: Tensor, ctx: Context, run_layers) -> tuple[Tensor, list]:
        """Hidden states of the next depth [T, H] from those of this one and the embeddings of the tokens ahead."""
        g_TH = self.eh_proj(torch.cat([self.enorm(e_TH), self.hnorm(h_TH)], dim=-1))
        g_TH, stats = run_layers(self.layers, g_TH, ctx)
        return self.final_layernorm(g_TH), stats
