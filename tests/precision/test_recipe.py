"""Presets and rules: which linear gets which format, and the sentences for rules that do nothing or everything."""

import json

import pytest
from tiny import tiny_config

from nemo_lite.check import main as check
from nemo_lite.config import PrecisionConfig, PrecisionRule, RecipeError, load_recipe
from nemo_lite.model.hybrid import HybridLM
from nemo_lite.parallel.layers import Layers
from nemo_lite.precision import recipe as formats_of
from nemo_lite.precision.recipe import Gemms, formats, parts, tail_layers

SUPER = "recipes/pretrain/nemotron3_super.yaml"


def by_name(config, **precision):
    return {name: formats_of.label(g) for name, g in formats(config, PrecisionConfig(**precision)).items()}


class Recorder(Layers):
    """Which names the model asks for, and how many weights each one holds."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    def linear(self, name, n_in, n_out):
        self.asked[name] = n_in * n_out
        return super().linear(name, n_in, n_out)

    def head(self, name, hidden_size, vocab_size):
        self.asked[name] = hidden_size * vocab_size
        return super().head(name, hidden_size, vocab_size)

    def experts(self, name, n_experts, size, inner):
        self.asked[name] = 2 * n_experts * size * inner
        return super().experts(name, n_experts, size, inner)


@pytest.mark.parametrize("config", [
    tiny_config("MEM*E-", mtp="*E"), tiny_config("M-", moe_latent_size=None), tiny_config("E*", n_shared_experts=0),
    tiny_config("ME", mtp="M-", moe_latent_size=None), load_recipe(SUPER).model,
], ids=lambda c: c.pattern[:8])  # fmt: skip
def test_the_names_and_sizes_are_the_models(config):
    layers = Recorder()
    model = HybridLM(config, device="meta", layers=layers)
    named = {p.name: p.weights for p in parts(config) if not p.name.endswith(".gate")}
    assert named == layers.asked
    routers = [m.router.weight.numel() for m in model.modules() if hasattr(m, "router")]
    assert [p.weights for p in parts(config) if p.name.endswith(".gate")] == routers


def test_the_published_recipe():
    config = load_recipe(SUPER).model
    found = by_name(config, preset="nemotron3_super_nvfp4")
    assert len(config.layers) == 88 and tail_layers(88, 0.15) == 14
    assert {format for name, format in found.items() if name.startswith("mtp")} == {"bf16"}
    for i, letter in enumerate(config.layers):
        mixer, tail = f"layers.{i}.mixer", i >= 74
        if letter == "M":
            assert found[f"{mixer}.in_proj"] == ("bf16" if tail else "nvfp4")
            assert found[f"{mixer}.out_proj"] == ("bf16" if tail else "mxfp8")
        elif letter == "*":
            assert {found[f"{mixer}.{p}_proj"] for p in "qkvo"} == {"bf16"}
        else:
            for part in ("experts", "shared_experts.up_proj", "shared_experts.down_proj"):
                assert found[f"{mixer}.{part}"] == ("bf16" if tail else "nvfp4")
            assert found[f"{mixer}.fc1_latent_proj"] == found[f"{mixer}.fc2_latent_proj"] == "bf16"
    no_tail = by_name(config, preset="nemotron3_super_nvfp4", tail=0.0)
    assert no_tail["layers.87.mixer.experts"] == "nvfp4" and no_tail["mtp.eh_proj"] == "bf16"
    shares = formats_of.shares(config, PrecisionConfig(preset="nemotron3_super_nvfp4"))
    assert sum(s["weights"] for s in shares.values()) == pytest.approx(1)
    assert sum(s["flops"] for s in shares.values()) == pytest.approx(1)
    assert shares["nvfp4"]["weights"] > 0.75


@pytest.mark.parametrize("layers,share,count", [(88, 0.15, 14), (10, 0.1, 1), (10, 0.0, 0), (3, 1.0, 3), (20, 0.15, 3)])
def test_the_tail_is_rounded_up(layers, share, count):
    assert tail_layers(layers, share) == count


def test_the_first_rule_that_matches_decides():
    config = tiny_config("MEM*E-")
    rules = [
        PrecisionRule("layers.0.*", "mxfp8"), PrecisionRule("*.in_proj", "fp8", wgrad="bf16"),
        PrecisionRule("layers.[12].*", "bf16"),
    ]  # fmt: skip
    found = by_name(config, preset="nvfp4", rules=rules, tail=0.2)
    assert found["layers.0.mixer.in_proj"] == found["layers.0.mixer.out_proj"] == "mxfp8"
    assert found["layers.2.mixer.in_proj"] == "fp8 / fp8 / bf16" and found["layers.1.mixer.experts"] == "bf16"
    assert found["layers.3.mixer.q_proj"] == "nvfp4"
    assert found["layers.4.mixer.experts"] == found["layers.5.mixer.up_proj"] == "bf16"  # the tail: 2 of 6
    gemms = formats(config, PrecisionConfig(preset="nvfp4", hadamard=False, stochastic_rounding=False))
    assert gemms["layers.0.mixer.in_proj"] == Gemms("nvfp4", "nvfp4", "nvfp4", False, False, True)
    assert all(g.plain for g in formats(config, PrecisionConfig()).values())


@pytest.fixture
def write(tmp_path):
    def write(precision: str, **more):
        path = tmp_path / "x.yaml"
        rest = "".join(f"{key}: {value}\n" for key, value in more.items())
        path.write_text(f"model: {{pattern: MEM*E}}\n{rest}precision: {precision}\n")
        return path

    return write


@pytest.mark.parametrize("precision,sentence", [
    ("nvfp5", "x.yaml:2: precision.preset: 'nvfp5' is not one of bf16, fp8, fp8_block, mxfp8, nvfp4, "
              "nemotron3_super_nvfp4; did you mean nvfp4?"),
    ('{rules: [{match: "*.qproj", format: fp8}]}', "precision.rules[0].match: '*.qproj' matches no linear; names are"),
    ('{rules: [{match: "*", format: fp8}]}', "matches every linear; say precision.preset: fp8 instead"),
    ('{rules: [{match: "layers.*", format: fp8}]}', "matches every linear"),
    ('{rules: [{match: "lm_head", format: fp8}]}', "'lm_head' matches lm_head only, which stays in train.dtype"),
    ('{rules: [{match: "*.gate", format: fp8}]}', "which stays in float32"),
    ('{rules: [{match: "layers.0.*", format: fp8}, {match: "layers.0.mixer.in_proj", format: bf16}]}',
     "precision.rules[1].match: 'layers.0.mixer.in_proj' matches only what the rules above it have taken"),
    ('{rules: [{match: "*", format: fp8, wgrad: bf16}]}', "'*' matches every linear; only a preset may"),
    ("{preset: mxfp8, hadamard: false}", "precision.hadamard: false changes nothing: no product is in nvfp4"),
    ("{tail: 1.5}", "precision.tail: must be <= 1, got 1.5"),
    ("{rules: [{match: '*.in_proj', format: nvfp8}]}", "'nvfp8' is not one of bf16, fp8, fp8_block, mxfp8, nvfp4"),
    ("{bf16_last_steps: 1000}", "precision.bf16_last_steps: 1000 exceeds train.steps = 100"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(write, precision, sentence):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(precision))
    assert sentence in str(error.value), str(error.value)


def test_float64_has_no_number_formats(write):
    with pytest.raises(RecipeError, match=r"train\.dtype is float64"):
        load_recipe(write("nvfp4", train="{dtype: float64}"))
    load_recipe(write("bf16", train="{dtype: float64}"))


def test_a_name_stands_for_the_preset(write):
    assert load_recipe(write("mxfp8")).precision.preset == "mxfp8"
    assert load_recipe(write("mxfp8"), ["precision=nvfp4", "precision.tail=0.5"]).precision.tail == 0.5
    recipe = load_recipe(write("mxfp8"), ["precision={preset: nvfp4, hadamard: false}"])
    assert recipe.precision.preset == "nvfp4" and not recipe.precision.hadamard
    with pytest.raises(RecipeError, match=r"command line: precision.preset: 'nvfp5'"):
        load_recipe(write("mxfp8"), ["precision=nvfp5"])


def test_check_prints_every_linear(capsys, write):
    check([SUPER, "precision=nemotron3_super_nvfp4"])
    text = capsys.readouterr().out
    for part in parts(load_recipe(SUPER).model):
        assert part.name.rsplit(".", 1)[-1] in text
    lines = text[text.index("Number formats") :].splitlines()
    out = next(line for line in lines if ".out_proj" in line and line.rstrip().endswith("mxfp8"))
    assert out.startswith("layers.{0..73}.mixer.out_proj ") and " 34 " in out
    check([str(write("nemotron3_super_nvfp4")), "--json"])
    facts = json.loads(capsys.readouterr().out)["precision"]
    assert facts["linears"]["layers.0.mixer.in_proj"] == "nvfp4" and facts["linears"]["lm_head"] == "bf16"
    assert facts["linears"]["layers.1.mixer.gate"] == "fp32" and set(facts["shares"]) == {
        "bf16",
        "fp32",
        "mxfp8",
        "nvfp4",
    }
