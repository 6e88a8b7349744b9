"""vLLM's own parser takes every command of docs/vllm.md, and of the manifest; nothing is started."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_config, tiny_model

# Not `vllm`: this very folder could pass for it.
pytest.importorskip("vllm.parser", reason="vLLM is not installed here (make vllm)")

from nemo_lite_serving import serve
from nemo_lite_serving.vllm import launch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli import serve as vllm_serve
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "serving" / "deploy"
CPU, GPU = launch.Build("0.32.0", True), launch.Build("0.32.0", False)


def documented() -> list[list[str]]:
    """Every command of the page that starts vLLM, in words, as `nemo-lite serve`; a backslash continues a line."""
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    inside = [image(words[words.index("nemo-lite") + 1 :]) for words in found if words[:2] == ["docker", "run"]]
    return [words for words in found if "--engine" in words] + inside


def image(argv: list[str]) -> list[str]:
    """The command of the image with these arguments."""
    entrypoint = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[-1]
    return [*json.loads(entrypoint), *argv]


def manifest() -> list[str]:
    deployment = next(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    return image(server["args"])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config("MEM*E", "*E", head_dim=32, num_attention_heads=2, num_key_value_heads=2)
    tiny_model(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parsers():
    """What `vllm serve` and the module for CPUs read their arguments with."""
    main = FlexibleArgumentParser()
    vllm_serve.ServeSubcommand().subparser_init(main.add_subparsers(dest="subparser"))
    return {"vllm.entrypoints.cli.main": main, launch.CPU_SERVE[0]: make_arg_parser(FlexibleArgumentParser())}


def parse(words, model_dir, parsers) -> argparse.Namespace:
    """vLLM's arguments of `nemo-lite serve MODEL_DIR --engine vllm ...`, made of a tiny model."""
    program, command, *argv = words
    assert Path(program).name == "nemo-lite" and command == "serve"
    at = argv.index("--") if "--" in argv else len(argv)
    parser = serve._parser()
    args = parser.parse_args(argv[:at])
    assert args.engine == "vllm"
    args.model_dir, args.vllm_args = str(model_dir), argv[at + 1 :]
    serve._check(parser, args)
    _, _, module, *rest = launch.command(args, CPU if ".venv-vllm" in program else GPU).argv
    found = parsers[module].parse_args(rest)
    validate_parsed_serve_args(found)
    AsyncEngineArgs.from_cli_args(found)
    assert str(model_dir) in (found.model, found.model_tag)
    return found


@pytest.mark.parametrize("words", [*documented(), manifest()], ids=shlex.join)
def test_vllm_takes_the_flags(words, model_dir, parsers):
    found = parse(words, model_dir, parsers)
    if "--speculative" in words or "--speculative=mtp" in words:
        assert found.speculative_config["method"] == "mtp"


def test_headless_is_heeded(model_dir, parsers, monkeypatch):
    """The module for CPUs takes the flag and starts a server all the same; `vllm serve`, for GPUs, does not."""
    started = []
    monkeypatch.setattr(vllm_serve, "run_headless", started.append)
    commands = [words for words in documented() if "--headless" in words]
    for words in commands:
        vllm_serve.ServeSubcommand.cmd(parse(words, model_dir, parsers))
    assert commands and all(each.headless for each in started) and len(started) == len(commands)


def test_every_way_to_scale_is_shown():
    flags = {word.partition("=")[0] for words in documented() for word in words}
    assert flags >= {
        "--tensor-parallel-size", "--enable-expert-parallel", "--pipeline-parallel-size", "--data-parallel-size",
        "--data-parallel-size-local", "--data-parallel-address", "--headless", "--distributed-executor-backend",
        "--nnodes", "--node-rank", "--master-addr",
    }  # fmt: skip


def test_a_wrong_flag_is_refused(model_dir, parsers):
    for more in (["--tensor-parallel-sizes", "8"], ["--tensor-parallel-size", "eight"], ["--nodes", "2"]):
        with pytest.raises(SystemExit):
            parse(image(["MODEL_DIR", "--", *more]), model_dir, parsers)
