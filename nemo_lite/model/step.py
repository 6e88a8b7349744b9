"""The fused step: a few tokens through a whole stack of layers in one call of the CPU kernels.

What it computes is what the layers compute one after the other (mamba2.py, attention.py, moe.py); here is only where
their weights lie. Only stacks that are whole, multiply in plain numbers or packed ones, and continue a cache can be
fused; for all others :func:`plan` gives None, and the layers run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nemo_lite.config import ModelConfig
from nemo_lite.model.attention import Attention
from nemo_lite.model.context import Context
from nemo_lite.model.mamba2 import Mamba2
from nemo_lite.model.moe import MLP, LatentMoE
from nemo_lite.parallel.layers import Experts


def plan(layers: Sequence[nn.Module], config: ModelConfig, ops):
    """The kernels' plan of these layers, or None where something in them is not as the kernels read it."""
    from nemo_lite_kernels.cpu.linear import KINDS
    from nemo_lite_kernels.linear import PackedWeight

    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    if any(type(t) not in (nn.Parameter, Tensor) or t.dtype not in KINDS or not t.is_contiguous() for t in tensors):
        return None
    packed = []
    for module in (m for layer in layers for m in layer.modules()):
        experts = module.op if isinstance(module, Experts) else ops.experts
        if getattr(module, "matmul", ops.linear) is not ops.linear or experts is not ops.experts:
            return None
        if module._forward_hooks or module._forward_pre_hooks:  # somebody wants to see each module run
            return None
        for expected in ("weight", "up", "down"):
            weight = getattr(module, expected, None)
            if isinstance(weight, PackedWeight):
                packed.append(weight)
                tensors += [weight.codes, weight.scales]
    if len({weight.group for weight in packed}) > 1 or any(not t.is_cpu for t in tensors):
        return None
    # The memory itself is kept: a parameter may be given another while a plan is in use.
    return ops.step([_layer(layer, config) for layer in layers], config.hidden_size, [t.detach() for t in tensors])


def _layer(layer, config: ModelConfig):
    from nemo_lite_kernels.cpu.linear import Weight
    from nemo_lite_kernels.cpu.step import LayerPlan, Vector

    mixer, at = layer.mixer, LayerPlan(letter=ord(layer.kind), eps=layer.norm.eps, norm=Vector.of(layer.norm.weight))
    if isinstance(mixer, Mamba2):
        at.a, at.b = Weight.of(mixer.in_proj.weight), Weight.of(mixer.out_proj.weight)
        at.heads, at.head_dim, at.groups, at.state = mixer.heads, mixer.head_dim, mixer.groups, mixer.state
        at.width, at.gate_eps, (at.dt_min, at.dt_max) = config.conv_kernel, mixer.norm.eps, mixer.limit
        for name in ("dt_bias", "A_log", "D"):
            setattr(at, name, Vector.of(getattr(mixer, name)))
        at.conv, at.conv_bias = Vector.of(mixer.conv1d.weight), Vector.of(mixer.conv1d.bias)
        at.gate_norm = Vector.of(mixer.norm.weight)
    elif isinstance(mixer, Attention):
        at.a, at.b, at.c, at.d = (
            Weight.of(proj.weight) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
        )
        at.heads, at.groups, at.head_dim = config.num_attention_heads, config.num_key_value_heads, mixer.head_dim
    elif isinstance(mixer, LatentMoE):
        router, shared = mixer.router, mixer.shared
        at.a, at.route_bias = Weight.of(router.weight), Vector.of(router.bias)
        at.b, at.c = (Weight.of(getattr(fc, "weight", None)) for fc in (mixer.fc1_latent, mixer.fc2_latent))
        at.e, at.f = Weight.of(mixer.experts.up), Weight.of(mixer.experts.down)
        if shared is not None:
            at.g, at.h = Weight.of(shared.up.weight), Weight.of(shared.down.weight)
        at.topk, at.experts, at.scaling, at.normalise = router.topk, len(router.bias), router.scaling, router.normalise
        at.route_groups, at.topk_groups = router.n_group, router.topk_group
    else:
        assert isinstance(mixer, MLP)
        at.a, at.b = Weight.of(mixer.up.weight), Weight.of(mixer.down.weight)
    return at


def run(step, x_TH: Tensor, ctx: Context) -> Tensor | None:
    """x through the planned layers, [T, H], or None where the caches behind ctx do not offer what the step needs."""
    parts = ctx.parts or (ctx,)
    if any(part.stream is None or part.valid_BL is not None or part.reset_BL is not None for part in parts):
        return None
    lanes = [part.stream.lane(step, part, x_TH.dtype) for part in parts]  # type: ignore[union-attr]
    if any(lane is None for lane in lanes):
        return None
    x = step.run(x_TH.to(torch.float32, copy=True), lanes, x_TH.dtype)
    for part in parts:
        part.stream.stepped(part)  # type: ignore[union-attr]
    return x.to(x_TH.dtype)
