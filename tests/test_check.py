"""`nemo-lite check`: published counts, closed forms against the real model, FLOPs, memory, output."""

import importlib.util
import json
from pathlib import Path

import pytest

from nemo_lite import check
from nemo_lite.config import ModelConfig, MTPConfig, RecipeError, load_recipe

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "recipes" / "pretrain"


def counts_of(name):
    return check.parameter_counts(load_recipe(PRETRAIN / name).model)


def test_published_counts_of_super():
    counts = counts_of("nemotron3_super.yaml")
    assert counts["total"] == 120_668_707_840
    assert counts["active"] == 12_770_237_440
    assert counts["active_without_embedding"] == 12_233_366_528
    assert counts["active_layers_only"] == 11_696_495_616
    assert counts["mtp"]["total"] == 2_942_325_248
    assert counts["mtp"]["active"] == 244_863_488


def test_published_counts_of_nano():
    counts = counts_of("nemotron3_nano.yaml")
    assert counts["total"] == 31_577_940_288
    assert counts["active"] == 3_580_076_352
    assert counts["active_without_embedding"] == 3_227_754_816
    assert counts["active_layers_only"] == 2_875_433_280
    assert counts["mtp"]["total"] == 0


@pytest.mark.parametrize(
    "name, total, active, forward",
    [("bench_small.yaml", 52.37e6, 26.15e6, 56.7e6), ("bench_medium.yaml", 270.2e6, 136.0e6, 287.6e6)],
)
def test_counts_of_the_bench_recipes(name, total, active, forward):
    counts = counts_of(name)
    assert counts["total"] == pytest.approx(total, rel=1e-3)
    assert counts["active_without_embedding"] == pytest.approx(active, rel=1e-3)
    flops = check.flops_per_token(load_recipe(PRETRAIN / name).model, 512)
    assert flops["forward"] == pytest.approx(forward, rel=2e-3)
    assert flops["train"] == 3 * flops["forward"]


CASES = {
    "latent": ModelConfig(pattern="MEM*E", moe_latent_size=32, mtp=MTPConfig(pattern="*E")),
    "plain": ModelConfig(pattern="ME*-", moe_latent_size=None),
    "no shared expert": ModelConfig(pattern="E", n_shared_experts=0),
    "dense": ModelConfig(pattern="M-*-", mtp=MTPConfig(pattern="M*E-", depth=3)),
    "odd sizes": ModelConfig(
        pattern="M|*E",
        hidden_size=40,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        mamba_num_heads=6,
        mamba_head_dim=7,
        ssm_state_size=5,
        n_groups=3,
        conv_kernel=3,
        vocab_size=77,
    ),
    "tied": ModelConfig(pattern="M*", tie_word_embeddings=True),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_closed_form_is_the_model_itself(config):
    hybrid = pytest.importorskip("nemo_lite.model.hybrid")
    model = hybrid.HybridLM(config, device="meta")
    # The expert bias is a buffer in the model, and a tensor of every checkpoint.
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    sizes |= {name: tensor.numel() for name, tensor in model.named_buffers() if name.endswith("router.bias")}
    counts = check.parameter_counts(config)
    assert sum(sizes.values()) == counts["total_with_mtp"]
    assert sum(n for name, n in sizes.items() if name.startswith("mtp.")) == counts["mtp"]["total"]
    for kind, part in counts["layers"].items():
        mine = tuple(f"layers.{i}." for i, letter in enumerate(config.layers) if letter == kind)
        assert sum(n for name, n in sizes.items() if name.startswith(mine)) == part["total"]


def test_super_on_the_meta_device():
    hybrid = pytest.importorskip("nemo_lite.model.hybrid")
    config = load_recipe(PRETRAIN / "nemotron3_super.yaml").model
    model = hybrid.HybridLM(config, device="meta")
    biases = sum(tensor.numel() for name, tensor in model.named_buffers() if name.endswith("router.bias"))
    total = sum(tensor.numel() for tensor in model.parameters()) + biases
    assert total == 120_668_707_840 + 2_942_325_248


def test_flops_by_hand():
    config = ModelConfig(pattern="*-", vocab_size=10, hidden_size=8, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=4, intermediate_size=16)  # fmt: skip
    attention = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8) + 2 * 2 * 2 * 4 * 6 // 2
    mlp, head = 2 * (8 * 16 * 2), 2 * 10 * 8
    flops = check.flops_per_token(config, 6)
    assert flops["parts"] == {"attention": attention, "MLP": mlp, "head": head}
    assert flops["forward"] == attention + mlp + head
    config.mtp = MTPConfig(pattern="-", depth=3)
    assert check.flops_per_token(config, 6)["mtp"] == 3 * (2 * 8 * 16 + mlp + head)


def test_flops_of_the_published_run():
    """84.3 G FLOPs a trained token are implied by published throughput; ours counts the scan and convolution too."""
    recipe = load_recipe(PRETRAIN / "nemotron3_super.yaml")
    assert check.flops_per_token(recipe.model, 8192)["train"] == pytest.approx(84.3e9, rel=0.03)


def test_memory_is_shared_by_ranks():
    recipe = load_recipe(PRETRAIN / "tiny.yaml")
    one, two = check.memory_per_rank(recipe, 1), check.memory_per_rank(recipe, 2)
    parameters = check.parameter_counts(recipe.model)["total_with_mtp"]
    assert one["weights"] == one["gradients"] == 4 * parameters and one["optimizer"] == 8 * parameters
    assert two["weights"] == 2 * parameters
    assert one["gathered"] == 0 < two["gathered"]
    assert one["total"] == sum(size for part, size in one.items() if part != "total")
    recipe.train.recompute = "full"
    assert check.memory_per_rank(recipe, 1)["activations"] < one["activations"]
    recipe.train.dtype = "float64"
    assert check.memory_per_rank(recipe, 1)["weights"] == 8 * parameters


def test_the_page_of_facts(capsys):
    assert check.main([str(PRETRAIN / "nemotron3_super.yaml"), "--world-size", "64"]) == 0
    text = capsys.readouterr().out
    for figure in ("120,668,707,840", "12,770,237,440", "12,233,366,528", "2,942,325,248", "120.67 B", "2.94 B"):
        assert figure in text
    assert "hidden_size: 4096" in text and "the fullest of 64" in text and "Sent by the busiest rank" in text
    assert max(len(line.rstrip()) for line in text.splitlines() if "pattern:" not in line) <= 80


def test_json(capsys):
    assert check.main([str(PRETRAIN / "tiny.yaml"), "train.steps=30", "--json", "optim.lr=1e-2"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["parameters"]["total"] == 214_080 and found["parameters"]["active"] == 164_928
    assert found["flops_per_token"]["train"] > found["flops_per_token"]["forward"]
    assert found["memory"]["total"] > 0
    (phase,) = found["mixture"]
    assert phase["length"] == 30 * found["tokens_per_step"] and phase["shares"][0]["share"] == 1
    assert found["recipe"]["train"]["steps"] == 30 and found["recipe"]["optim"]["lr"] == 1e-2


def test_refusals():
    with pytest.raises(RecipeError, match=r"tiny.yaml: train.global_batch_size: 8 rows cannot be shared by 3 ranks"):
        check.main([str(PRETRAIN / "tiny.yaml"), "--world-size", "3"])
    with pytest.raises(SystemExit) as stop:
        check.main([])
    assert stop.value.code == 2


def test_docs_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == generate.recipes_page(), "run: python docs/generate.py"
