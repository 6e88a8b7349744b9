"""Training runs in number formats: every preset, resuming, the tail at the end, what is measured on the way."""

import json
import re
import shutil

import pytest
import torch
from nemo_lite_kernels.quant import fake_quantize
from runs import losses, records
from safetensors.torch import load_file, save_file

from nemo_lite import cli
from nemo_lite.config import UserError, load_recipe
from nemo_lite.model.hf import TensorFiles
from nemo_lite.model.hybrid import HybridLM
from nemo_lite.precision.recipe import formats

PRESETS = ["fp8", "mxfp8", "nvfp4", "nemotron3_super_nvfp4"]
STEPS = ("train.steps=6", "schedule.warmup_steps=2", "checkpoint.every=3")


def test_every_preset_trains_and_stays_near_bf16(forks, tmp_path):
    common = (*STEPS, "train.dtype=bfloat16")
    forks.train("resume", tmp_path / "bf16", *common)
    plain = losses(tmp_path / "bf16")
    for preset in PRESETS:
        forks.train("resume", tmp_path / preset, *common, f"precision={preset}")
        found = losses(tmp_path / preset)
        assert found[6] != plain[6] and found[6][0] == pytest.approx(plain[6][0], rel=0.03), preset
        assert found[6][0] < found[1][0]


def test_resuming_is_exact(forks, tmp_path, ranks=2):
    """Random numbers follow from the place in the run: 6 steps are 3 and 3, bit for bit."""
    precision = "precision={preset: nvfp4, statistics_every: 2}"
    forks.train("resume", tmp_path / "whole", *STEPS, precision, ranks=ranks)
    forks.train("resume", tmp_path / "parts", *STEPS, precision, "train.steps=3", ranks=ranks)
    assert max(losses(tmp_path / "parts")) == 3
    forks.train("resume", tmp_path / "parts", *STEPS, precision, ranks=ranks)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_may_end_in_bf16_and_checkpoints_take_any_precision(forks, tmp_path):
    """After the switch a run goes on as a bf16 run from its checkpoint would."""
    tail = "precision={preset: nvfp4, bf16_last_steps: 3}"
    forks.train("resume", tmp_path / "tail", *STEPS, tail)
    forks.train("resume", tmp_path / "moved", *STEPS, "precision=nvfp4", "train.steps=3")
    forks.train("resume", tmp_path / "moved", *STEPS, "precision=bf16")
    assert losses(tmp_path / "moved") == losses(tmp_path / "tail")
    forks.train("resume", tmp_path / "whole", *STEPS, "precision=nvfp4")
    whole, tail = losses(tmp_path / "whole"), losses(tmp_path / "tail")
    assert whole[3] == tail[3] and whole[4] != tail[4]


def test_what_is_measured(forks, tmp_path):
    """Per linear and operand, at the interval; in the report as a heat map."""
    precision = "precision={preset: nemotron3_super_nvfp4, statistics_every: 3}"
    forks.train("resume", tmp_path, *STEPS, precision, "log.every=10")
    lines = {r["step"]: r["quantisation"] for r in records(tmp_path) if "quantisation" in r}
    assert list(lines) == [3, 6]
    found = lines[6]
    assert set(found["layers.0.mixer.in_proj"]) == {"fprop x", "fprop w", "dgrad dy", "wgrad dy", "wgrad x"}
    assert "layers.1.mixer.experts.up_proj" in found and "layers.1.mixer.experts.down_proj" in found
    assert not any("latent" in name or name.startswith("mtp") for name in found)
    for name, operands in found.items():
        for operand, one in operands.items():
            assert 0 <= one["flushed"] < 0.6 and 0 <= one["saturated"] < 0.3, (name, operand)
            low, high = (0.01, 0.05) if ".out_proj" in name else (0.05, 0.25)
            assert low < one["error"] < high, (name, operand, one["error"])
            assert len(one["scales"]) == 16 and sum(one["scales"]) == pytest.approx(1, abs=1e-3)
    report = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    for expected in ("Number formats", "flushed to zero", "saturated", "block scales", "layers.0.mixer.in_proj"):
        assert expected in report, expected


# -------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def trained(request, forks, tmp_path_factory):
    """A run in the published recipe, with fp8 for attention, and its export in float32."""
    folder = tmp_path_factory.mktemp("exported")
    precision = "precision={preset: nemotron3_super_nvfp4, rules: [{match: '*.[qkvo]_proj', format: fp8}]}"
    forks.train("resume", folder / "run", *STEPS, "train.steps=3", f"train.dtype={request.param}", precision)
    assert cli.main(["export", str(folder / "run"), "--to", str(folder / "float32")]) == 0
    return folder


def linear(name):
    """A checkpoint's name as rules know it."""
    name = name.removeprefix("backbone.").removesuffix(".weight")
    return "mtp.eh_proj" if "eh_proj" in name else re.sub(r"experts\.\d+\.\w+$", "experts", name)


@pytest.mark.parametrize("format,block", [("nvfp4", (16, 16)), ("fp8", None)])
def test_a_model_in_codes_is_what_training_multiplied_with(trained, format, block, capsys):
    target = trained / format
    assert cli.main(["export", str(trained / "run"), "--to", str(target), "--format", format]) == 0
    recipe = load_recipe(trained / "run" / "recipe.yaml", resolved=True)
    inside = {name for name, g in formats(recipe.model, recipe.precision).items() if g.fprop == format}
    assert inside
    plain, packed = TensorFiles(trained / "float32"), TensorFiles(target)
    assert plain.names() == packed.names()
    raw = {name: packed.stored(name) for name in packed.everything()}
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt" and config["quant_algo"] == format.upper()
    for name in plain.names():
        before, after = plain.get(name), packed.get(name)
        stem = name.removesuffix(".weight")
        if linear(name) in inside:
            multiplied = before.bfloat16().float() if recipe.train.dtype == "bfloat16" else before
            assert torch.equal(after, fake_quantize(multiplied, format, block)), name
            assert stem not in config["ignore"] and raw[f"{stem}.input_scale"] > 0
            if format == "nvfp4":
                assert raw[name].dtype == torch.uint8 and raw[name].shape == (before.shape[0], before.shape[1] // 2)
                assert raw[f"{stem}.weight_scale"].dtype == torch.float8_e4m3fn
                assert raw[f"{stem}.weight_scale"].shape == (before.shape[0], before.shape[1] // 16)
                assert raw[f"{stem}.weight_scale_2"].shape == ()
            else:
                assert raw[name].dtype == torch.float8_e4m3fn and raw[f"{stem}.weight_scale"].shape == ()
        else:
            wide = after.dtype == torch.float32
            assert torch.equal(after, before if wide else before.bfloat16()), name
            assert f"{stem}.input_scale" not in raw and (before.dim() != 2 or stem in config["ignore"]), name
    # Opened, generated from, and looked at.
    model = HybridLM.from_pretrained(target)
    assert model.layers[0].mixer.in_proj.weight.dtype == torch.float32
    ids = torch.arange(40)[None]
    other = HybridLM.from_pretrained(trained / "float32")
    assert not torch.equal(model(ids).logits, other(ids).logits)
    assert (model(ids).logits - other(ids).logits).norm() < 0.2 * other(ids).logits.norm()
    assert model.generate(ids, max_tokens=4, speculative=True).shape == (1, 44)
    capsys.readouterr()
    assert cli.main(["quant", "inspect", str(target)]) == 0
    text = capsys.readouterr().out
    assert format in text and "experts.{0..7}" in text and "bits each" in text
    assert cli.main(["quant", "inspect", str(target), "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines.keys() == packed.names()
    quantised = next(line for name, line in lines.items() if linear(name) in inside)
    bits = 4.5 if format == "nvfp4" else 8
    assert quantised["format"] == format and bits <= quantised["bits"] < bits + 0.2


def test_what_cannot_be_exported_or_opened_is_said(trained, tmp_path, capsys):
    assert cli.main(["export", str(trained / "run"), "--to", str(tmp_path / "m"), "--format", "nvfp4",
                     "--calibration-rows", "0"]) == 1  # fmt: skip
    assert "--calibration-rows 0: at least one row is needed" in capsys.readouterr().err
    recipe = (trained / "run" / "recipe.yaml").read_text()
    plain = tmp_path / "plain"
    shutil.copytree(trained / "run", plain)
    (plain / "recipe.yaml").write_text(
        recipe.replace("nemotron3_super_nvfp4", "bf16").replace("format: fp8", "format: mxfp8")
    )
    assert cli.main(["export", str(plain), "--to", str(tmp_path / "m"), "--format", "nvfp4"]) == 1
    assert "has no linear that was trained in nvfp4; its formats are bf16, mxfp8" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    assert cli.main(["quant", "inspect", str(tmp_path / "nowhere")]) == 1
    assert "is no MODEL_DIR" in capsys.readouterr().err
    broken = tmp_path / "broken"
    assert cli.main(["export", str(trained / "run"), "--to", str(broken), "--format", "fp8"]) == 0
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight_scale"))
    del tensors[name]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=rf"q_proj\.weight is quantised, and {re.escape(name)} is missing"):
        HybridLM.from_pretrained(broken)
