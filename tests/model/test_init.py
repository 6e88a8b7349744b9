"""Initial weights: the table in HybridLM's docstring, and their independence of how the model came about."""

import math
import time
from pathlib import Path

import torch
from tiny import tiny_config

from nemo_lite import HybridLM, ModelConfig, load_recipe

ROOT = Path(__file__).parents[2]
BIG = {
    "hidden_size": 128,
    "vocab_size": 500,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "mamba_num_heads": 64,
    "mamba_head_dim": 4,
    "ssm_state_size": 32,
    "n_groups": 8,
    "intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_latent_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "initializer_range": 0.014,
}


def test_the_stated_spread():
    config = tiny_config("ME*-ME*-M", "*E", **BIG)
    model = HybridLM(config, seed=5)
    seen = set()
    small = 0.014 / math.sqrt(9)
    for name, tensor in model.named_parameters():
        module, leaf = name.split(".")[-2:]
        if leaf == "A_log":
            a = tensor.exp()
            assert a.min() >= 1 and a.max() <= 16 + 1e-4
            assert abs(a.mean() - 8.5) < 4 * 15 / math.sqrt(12 * len(a))
        elif leaf == "dt_bias":
            dt = torch.nn.functional.softplus(tensor)
            assert dt.min() >= 0.001 * 0.999 and dt.max() <= 0.1 * 1.001
            middle = (math.log(0.001) + math.log(0.1)) / 2
            assert abs(dt.log().mean() - middle) < 4 * math.log(100) / math.sqrt(12 * len(dt))
        elif leaf == "D" or "norm" in module:
            assert bool((tensor == 1).all()), name
        elif module == "conv1d":
            assert tensor.abs().max() <= 0.5 and abs(tensor.std() - 1 / math.sqrt(12)) < 0.02, name
        else:
            scaled = leaf == "down" or module in ("down", "o_proj", "out_proj", "fc2_latent")
            std = small if scaled else 0.014
            assert abs(tensor.std() / std - 1) < 0.05 and abs(tensor.mean()) < 5 * std / math.sqrt(tensor.numel()), name
        seen.add(leaf if module in ("mixer", "experts") else module)
    assert seen >= {
        "embedding", "head", "in_proj", "out_proj", "conv1d", "A_log", "dt_bias", "D", "q_proj", "o_proj", "router",
        "up", "down", "fc1_latent", "fc2_latent", "eh_proj", "enorm", "hnorm", "norm", "norm_f", "final_layernorm",
    }  # fmt: skip
    assert all(bool((buffer == 0).all()) for buffer in model.buffers())
    stated = HybridLM.__doc__
    for words in ("initializer_range / sqrt(layers)", "log of uniform(1, 16)", "inverse softplus", "+-1/sqrt(W)"):
        assert words in stated


def test_the_floor_of_dt():
    model = HybridLM(tiny_config("M", time_step_min=1e-6, time_step_max=1e-3, time_step_floor=1e-4, mamba_num_heads=64))
    dt = torch.nn.functional.softplus(model.layers[0].mixer.dt_bias)
    assert abs(dt.min() / 1e-4 - 1) < 1e-3 and int((dt < 1.001e-4).sum()) > 10


def test_same_seed_same_values_however_built():
    config = tiny_config("ME*-", "*E")
    model = HybridLM(config, seed=3)
    torch.manual_seed(77)  # the global generator plays no part
    later = HybridLM(config, device="meta").to_empty(device="cpu")
    later.init_weights(3)
    for (name, a), b in zip(model.state_dict().items(), later.state_dict().values()):
        assert torch.equal(a, b), name
    # Nor does what else there is: the same names have the same values in another model.
    other = HybridLM(tiny_config("M*"), seed=3)
    for name in ("embedding.weight", "layers.0.mixer.in_proj.weight", "layers.0.mixer.A_log", "head.weight"):
        assert torch.equal(model.get_parameter(name), other.get_parameter(name)), name
    different = HybridLM(config, seed=4)
    for name, parameter in model.named_parameters():
        if float(parameter.detach().std()) > 0:
            assert not torch.equal(parameter, different.get_parameter(name)), name


def test_layers_differ_from_each_other():
    model = HybridLM(tiny_config("MM"))
    a, b = (layer.mixer for layer in model.layers)
    assert not torch.equal(a.in_proj.weight, b.in_proj.weight) and not torch.equal(a.A_log, b.A_log)


def test_the_full_size_model_is_described_without_being_allocated():
    config = load_recipe(ROOT / "recipes/pretrain/nemotron3_super.yaml").model
    clock = time.perf_counter()
    model = HybridLM(config, device="meta")
    assert time.perf_counter() - clock < 30
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    mtp = sum(p.numel() for p in model.mtp.parameters())
    trunk = sum(p.numel() for p in model.parameters()) - mtp + sum(b.numel() for b in model.buffers())
    assert round(trunk / 1e9, 2) == 120.67 and round(mtp / 1e9, 2) == 2.94


def test_meta_device_context_does_not_leak():
    HybridLM(ModelConfig(), device="meta")
    assert torch.empty(1).device.type == "cpu"
