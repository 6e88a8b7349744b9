"""A model whose MTP acceptance is dialled from 0 to 1, for tests of speculation: a random model accepts nothing.

Embeddings are unit vectors and the head is a permutation of them, so that a trunk whose layers are silent says
"token u is followed by next(u)". The MTP block is just that: eh_proj passes the embedding on and its layers are silent.
The louder the trunk's own layers (their output projections are scaled, by bisection), the more often what the trunk
says depends on the whole past, and the block is wrong. One more coordinate, the same for every token, keeps the trunk
from ever saying token 0; at acceptance 0 the block has its sign turned and says nothing else.
"""

import copy
import functools

import torch

from nemo_lite import HybridLM, ModelConfig, MTPConfig
from nemo_lite.generate import generate

ROWS, TOKENS = 64, 24  # what one measurement of the bisection generates


def rigged_model(acceptance: float, *, vocab: int = 64, seed: int = 0, **sizes) -> HybridLM:
    """A model that accepts this share of its first drafts under greedy decoding; 0 and 1 are exact, others within 0.1.

    `sizes` are ModelConfig's (hidden_size must exceed vocab). At 1 tokens do not depend on the past, logits do.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance {acceptance} is not between 0 and 1")
    return copy.deepcopy(_rigged(acceptance, vocab, seed, tuple(sorted(sizes.items()))))


@functools.cache
def _rigged(acceptance, vocab, seed, sizes):
    defaults = {
        "pattern": "MEM*E",
        "mtp": MTPConfig("*E", 2),
        "hidden_size": vocab + 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_latent_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "initializer_range": 0.1,
        "chunk_size": 16,
    }
    model = HybridLM(ModelConfig(vocab_size=vocab, **(defaults | dict(sizes))), seed=seed).eval()
    _rig(model, vocab, seed)
    projections = [p for name, p in model.named_parameters() if not name.startswith("mtp.") and _writes(name)]
    originals = [p.detach().clone() for p in projections]

    def louder(scale):
        for p, original in zip(projections, originals):
            p.data.copy_(original * scale)

    if acceptance == 1:
        louder(1e-3)
        assert _measure(model, vocab, seed) == 1.0
        return model
    low, high = 1e-2, 1e2  # all right, hardly ever right
    target = acceptance or 0.5  # at 0 the trunk still listens to the past, so that a wrong rollback shows
    for _ in range(16):
        middle = (low * high) ** 0.5
        louder(middle)
        share = _measure(model, vocab, seed)
        if abs(share - target) < 0.02:
            break
        low, high = (middle, high) if share > target else (low, middle)
    if acceptance == 0:
        model.mtp.eh_proj.weight.data[vocab, vocab] *= -1
    return model


def _writes(name):
    """Whether this is a projection into the residual stream."""
    parts = name.split(".")
    return parts[-1] == "down" or parts[-2] in ("out_proj", "o_proj", "fc2_latent", "down")


@torch.no_grad()
def _rig(model, vocab, seed):
    config = model.config
    assert config.hidden_size > vocab, "unit vectors need hidden_size above vocab"
    for name, p in model.named_parameters():
        if _writes(name):
            if name.startswith("mtp."):
                p.zero_()
            elif p.shape[0] == config.hidden_size:
                p[vocab:] = 0.0  # nothing moves the extra coordinates
    following = _following(vocab, seed)
    model.embedding.weight.zero_()
    model.head.weight.zero_()
    tokens = torch.arange(vocab)
    model.embedding.weight[tokens, tokens] = 1.0
    model.embedding.weight[:, vocab] = 1.0
    model.head.weight[following, tokens] = 1.0
    model.head.weight[0] = 0.0
    model.head.weight[0, vocab] = -100.0
    model.mtp.eh_proj.weight.zero_()
    model.mtp.eh_proj.weight[torch.arange(vocab + 1), torch.arange(vocab + 1)] = 1.0


def _following(vocab, seed):
    """next(u): one cycle through every token but 0, which leads into it."""
    order = torch.randperm(vocab - 1, generator=torch.Generator().manual_seed(seed)) + 1
    following = torch.empty(vocab, dtype=torch.int64)
    following[order] = order.roll(-1)
    following[0] = order[0]
    return following


def _measure(model, vocab, seed):
    """The share of greedy tokens that are what the block would have said."""
    prompts = torch.randint(1, vocab, (ROWS, 3), generator=torch.Generator().manual_seed(seed + 1))
    tokens = generate(model, prompts, max_tokens=TOKENS).sequences[:, 3:]
    return float((_following(vocab, seed)[tokens[:, :-1]] == tokens[:, 1:]).double().mean())
