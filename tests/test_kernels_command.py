"""`nemo-lite kernels`, and --kernels of the commands that run a model: what is printed, taken and refused."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from nemo_lite_kernels import OPS, cpu

from nemo_lite import cli, kernels
from nemo_lite.config import UserError

MODEL_DIR = Path(__file__).parent / "fixtures" / "tiny_trained"
RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def printed(capsys, *argv):
    assert cli.main(["kernels", *map(str, argv)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out, "plain where it is no terminal"
    return out


def rows(out, title):
    """The lines of the table under a title that starts so, as lists of cells."""
    lines = iter(out.splitlines())
    assert any(line.startswith(title) for line in lines), out
    table = []
    for line in lines:
        if not line.strip():
            break
        table.append(re.split(r"\s{3,}", line.strip()))
    return table


def uses(out):
    return {row[0]: row[1:] for row in rows(out, "What ")[1:]}


def test_every_backend_is_there_with_its_reason_and_its_limits(capsys):
    out = printed(capsys)
    table = rows(out, "Backends on cpu")
    names = [row[1] if len(row) > 1 and row[0] in OPS else row[0] for row in table[1:]]
    assert names == [name for row in OPS.values() for name in row]
    assert ["mamba_ssm", "runs on cuda only"] in table and ["chunked", "available"] in table
    if cpu.reason() is None:
        assert ["ssd", "cpp", "available", "float16, float64"] in table
    assert set(uses(out)) == set(OPS)


def test_this_cpu(capsys, monkeypatch):
    facts = dict(row for row in rows(printed(capsys), "This CPU") if len(row) == 2)
    if cpu.reason() is None:
        assert facts["instruction sets"].startswith(cpu.levels()[0]) and "portable" in facts["instruction sets"]
        assert facts["library"].endswith(".so") and facts["compiler"] and "used" in facts["AMX"]
    assert "multiplied" in facts["bfloat16"]
    monkeypatch.setattr(cpu, "reason", lambda: "no C++ compiler (c++, g++, clang++)")
    out = printed(capsys)
    assert dict(rows(out, "This CPU"))["C++ kernels"] == "not used: no C++ compiler (c++, g++, clang++)"
    assert ["ssd", "cpp", "no C++ compiler (c++, g++, clang++)", "float16, float64"] in rows(out, "Backends on cpu")
    assert uses(out)["ssd"][0] == "chunked" and uses(out)["step"][0] == "layers"


def test_cuda_is_told_of_without_one(capsys):
    out = printed(capsys, "--device", "cuda")
    assert "This CPU" not in out
    assert ["cpp", "runs on cpu only"] in [row[-2:] for row in rows(out, "Backends on cuda")]
    assert uses(out)["experts"] == ["grouped_mm", "first in the table that runs on cuda"]


def test_a_model_dir(capsys):
    out = printed(capsys, MODEL_DIR, "--kernels", "ssd=recurrent,norm=auto")
    assert f"What {MODEL_DIR} would use on cpu (inference in float32)" in out
    assert uses(out)["ssd"] == ["recurrent", "asked for by name"]
    assert uses(out)["step"][0] == "layers"


def test_a_recipe_s_own_choice_stands_unless_the_command_line_has_another(capsys, tmp_path):
    recipe = tmp_path / "some.yaml"
    recipe.write_text("model: {pattern: MM}\ntrain: {dtype: float64}\nkernels: {ssd: recurrent, norm: reference}\n")
    found = uses(printed(capsys, recipe, "--kernels", "norm=lean"))
    assert found["ssd"] == ["recurrent", "asked for by name"] and found["norm"][0] == "lean"
    assert found["attention"] == ["the model has no attention layer"]
    assert found["experts"] == found["router"] == ["the model has no MoE layer"]
    assert found["activation"] == ["the model has no MLP and no shared expert"]
    assert found["step"][0] == "layers", "which is for inference"
    if cpu.reason() is None:
        assert found["conv"] == ["lean", "cpp does not take float64; next in the table that does"]
        assert uses(printed(capsys, RECIPE))["step"] == [
            "layers",
            "cpp does not take gradients; next in the table that does",
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_router_computes_in_float32(dtype):
    if cpu.reason() is None:
        assert kernels.used("router", "first", ["cpp", "reference"], dtype, False) == ("cpp", "first")


REFUSALS = [
    ("ssd", "--kernels ssd: 'ssd' is not op=name, such as ssd=chunked"),
    ("ssd=chunked,", "--kernels ssd=chunked,: '' is not op=name, such as ssd=chunked"),
    ("ssd=chunked,ssd=recurrent", "--kernels ssd=chunked,ssd=recurrent: ssd is given twice"),
    ("ssd=chunkd", "kernels.ssd: no backend 'chunkd'; did you mean chunked?"),
    ("nrom=lean", "kernels.nrom: no such op; did you mean norm?"),
    ("ssd=triton", "kernels.ssd: 'triton' cannot be used on cpu: runs on cuda only"),
]


@pytest.mark.parametrize("text,sentence", REFUSALS)
def test_a_wrong_choice_is_one_sentence(text, sentence):
    with pytest.raises(UserError) as caught:
        kernels.wanted(text)
    assert str(caught.value) == sentence


def test_spaces_are_forgiven_and_nothing_is_nothing():
    assert kernels.wanted("ssd=chunked, norm=lean") == {"ssd": "chunked", "norm": "lean"}
    assert kernels.wanted(None) == {}


@pytest.mark.parametrize("target", ["nowhere.yaml", "nowhere/"])
def test_a_target_that_is_not_there(target, capsys):
    assert cli.main(["kernels", target]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error and error.count("\n") == 1


@pytest.fixture
def built(monkeypatch):
    """The kernels that models are loaded with; none is loaded."""
    from nemo_lite.model.hybrid import HybridLM

    found = []

    class Stop(Exception):
        pass

    def from_pretrained(model_dir, *, kernels=None, **options):
        found.append(kernels)
        raise Stop

    monkeypatch.setattr(HybridLM, "from_pretrained", staticmethod(from_pretrained))
    return found, Stop


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["evaluate"]], ids=lambda c: c[0])
def test_generate_and_evaluate_take_backends_by_name(command, built, capsys):
    found, stop = built
    with pytest.raises(stop):
        cli.main([command[0], str(MODEL_DIR), *command[1:], "--kernels", "ssd=chunked,norm=lean"])
    assert found == [{"ssd": "chunked", "norm": "lean"}]
    assert cli.main([command[0], str(MODEL_DIR), *command[1:], "--kernels", "ssd=chunkd"]) == 1
    assert "did you mean chunked?" in capsys.readouterr().err and len(found) == 1


def test_serve_hands_them_to_the_engine(built):
    from nemo_lite_serving import engine, serve

    def options(*argv):
        args = serve._parser().parse_args(["model", *argv], argparse.Namespace(vllm_args=[]))
        serve._check_native(serve._parser(), args)
        return serve._options(args)

    found, stop = built
    with pytest.raises(stop):
        engine.build(options("--kernels", "ssd=chunked"))
    assert found == [{"ssd": "chunked"}]
    with pytest.raises(UserError, match="did you mean chunked"):
        engine.build(options("--kernels", "ssd=chunkd"))
    assert options().kernels is None


def test_chat_hands_them_to_its_server(monkeypatch, capsys):
    from nemo_lite_serving import client

    class Stop(Exception):
        pass

    def started(model_dir, arguments, notes, program=None):
        assert arguments == ["--kernels", "ssd=chunked"]
        raise Stop

    monkeypatch.setattr(client, "started", started)
    monkeypatch.setattr(client.signal, "signal", lambda *args: None)
    with pytest.raises(Stop):
        client.main([str(MODEL_DIR), "--kernels", "ssd=chunked"])
    with pytest.raises(SystemExit):
        client.main(["http://127.0.0.1:1", "--kernels", "ssd=chunked"])
    assert "--kernels is for a MODEL_DIR" in capsys.readouterr().err


def test_generated_text_is_the_same_whoever_computes(capsys):
    texts = []
    for choice in ([], ["--kernels", "ssd=recurrent,norm=reference,conv=reference,experts=reference,step=layers"]):
        assert cli.main(["generate", str(MODEL_DIR), "--prompt", "def", "--max-tokens", "6", *choice]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("def")
