"""AdamW and the router-bias update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from nemo_lite.config import OptimConfig, OptimRule, UserError
from nemo_lite.parallel.native import is_sharded

NO_DECAY_LEAVES = ("A_log", "D", "dt_bias", "bias")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: never to norms, biases, A_log, D and dt_bias."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NO_DECAY_LEAVES


def scales(name: str, parameter: Tensor, optim: OptimConfig) -> tuple[float, float]:
    """What learning rate and weight decay are multiplied by for this parameter."""
    rule = next((rule for rule in optim.rules if fnmatchcase(name, rule.match)), OptimRule())
    return rule.lr_scale, rule.weight_decay_scale if decays(name, parameter) else 0.0


def refuse_idle_rules(names: Iterable[str], optim: OptimConfig) -> None:
    """UserError for a rule that matches no parameter."""
    names = list(names)
    for i, rule in enumerate(optim.rules):
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise UserError(
                f"optim.rules[{i}].match: {rule.match!r} matches no parameter; names are such as "
                f"{', '.join(names[:1] + names[len(names) // 2 :][:1] + names[-1:])}"
            )


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW in torch's fused form. Sharded and replicated tensors are kept in groups of their own."""
    refuse_idle_rules((name for name, _ in model.named_parameters()), optim)
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((*scales(name, parameter, optim), is_sharded(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_scale": lr, "weight_decay": optim.weight_decay * decay}
            for (lr, decay, _), parameters in groups.items()
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
