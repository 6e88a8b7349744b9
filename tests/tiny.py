"""What many tests share: tiny models whose every parameter matters, and comparisons that say how far off they are."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_lite.config import ModelConfig, MTPConfig
from nemo_lite.model.hybrid import HybridLM

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def tiny_config(pattern: str = "MEM*E", mtp: str = "", depth: int = 2, **sizes) -> ModelConfig:
    """A model of some ten thousand parameters, with weights large enough that every part shows in the logits."""
    defaults = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 40,
        "initializer_range": 0.1,
        "routed_scaling_factor": 2.5,
        "router_aux_loss_coef": 0.0,
    }
    return ModelConfig(pattern=pattern, mtp=MTPConfig(mtp, depth), **(defaults | sizes))


@torch.no_grad()
def tiny_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype | None = None) -> HybridLM:
    """Fresh weights, with what initialisation leaves at 0 or 1 (router bias, norms, D) made random too."""
    model = HybridLM(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("router.bias"):
            tensor.normal_(0.0, 0.1, generator=generator)
        elif "norm" in name or name.endswith(".D"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    return (model.to(dtype) if dtype is not None else model).eval()


@torch.no_grad()
def wider_heads(model, width=32):
    """The same model with attention heads of `width`, zeros beyond: vLLM has none of 16 on a CPU."""
    config, narrow = copy.deepcopy(model.config), model.config.head_dim
    config.head_dim = width
    made = HybridLM(config)
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, new in [*made.named_parameters(), *made.named_buffers()]:
        value, dim = old[name], 1 if ".o_proj." in name else 0
        if value.shape != new.shape:
            if ".q_proj." in name:  # scores are divided by sqrt(width)
                value = value * (width / narrow) ** 0.5
            new = new.zero_().unflatten(dim, (-1, width)).narrow(dim + 1, 0, narrow)
            value = value.unflatten(dim, (-1, narrow))
        new.copy_(value)
    return made


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude where that is above 1."""
    assert a.shape == b.shape, f"{list(a.shape)} against {list(b.shape)}"
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    worst = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
    return float("inf") if worst != worst else worst


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str = "") -> None:
    assert distance(a, b) <= tolerance, f"{what}: off by {distance(a, b):.3g}, more than {tolerance:.0e}"


class Watch(TorchDispatchMode):
    """Records every operation that runs: its name, the shapes and dtypes of its tensor arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        results = [
            r for r in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(r, torch.Tensor)
        ]
        # Meta copies: shapes and dtypes are what is asked about, and nothing is kept alive.
        self.calls.append((func.overloadpacket.__name__, [_shape(t) for t in tensors], [_shape(t) for t in results]))
        return result

    def named(self, *names: str):
        return [call for call in self.calls if call[0] in names]


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
