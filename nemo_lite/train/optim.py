"""AdamW and the router-bias update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemo_lite.config import OptimConfig
from nemo_lite.parallel.native import is_sharded

NO_DECAY_LEAVES = ("A_log", "D", "dt_bias", "bias")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: never to norms, biases, A_log, D and dt_bias."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NO_DECAY_LEAVES


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW in torch's fused form. Sharded and replicated tensors are kept in groups of their own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((decays(name, parameter), is_sharded(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0}
            for (decay, _), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=True,
    )


def clipping(norm: float, limit: float) -> float:
    """What gradients are multiplied by: limit / norm where norm exceeds limit (0: never), else 1."""
    return limit / (norm + 1e-6) if limit and norm > limit else 1.0


@torch.no_grad()
def clip_(parameters, norm: float, limit: float) -> None:
    """Scale all gradients as `clipping` says."""
    if (scale := clipping(norm, limit)) != 1.0:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale)


@torch.no_grad()
def update_router_biases(model: nn.Module, counts: Mapping[str, Tensor]) -> None:
    """b += rate * sign(mean(n) - n), n the step's tokens per expert over all microbatches and ranks."""
    rate = model.config.router_bias_update_rate
    for name, n in counts.items():
        bias = model.get_submodule(name).mixer.router.bias
        n = n.to(bias.device, bias.dtype)
        bias += rate * torch.sign(n.mean() - n)
