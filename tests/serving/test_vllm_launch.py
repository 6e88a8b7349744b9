"""The command that starts vLLM's server: every option of ours is in it, or refused by name. Needs no vLLM."""

import argparse
import json
import shlex

import pytest
import torch
from nemo_lite_serving import serve
from nemo_lite_serving.vllm import launch
from tiny import tiny_config, tiny_model

from nemo_lite.config import UserError
from nemo_lite.model.hf import vllm_problems

CPU, GPU = launch.Build("0.32.0", True), launch.Build("0.32.0", False)
HEADS = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config("MEM*E", "*E", **HEADS), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def made(model_dir, *argv, build=CPU):
    """The command for `nemo-lite serve MODEL_DIR argv`: {flag: value, or True}, and the command itself."""
    parser = serve._parser()
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args([str(model_dir), "--engine", "vllm", *argv[:at]])
    args.vllm_args = list(argv[at + 1 :])
    serve._check(parser, args)
    command = launch.command(args, build)
    flags, words = {}, command.argv[3:]
    for word, after in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            flags[word] = True if after.startswith("--") else after
    return flags, command


def test_what_is_said_for_a_cpu(model_dir):
    flags, command = made(model_dir, "--speculative", "mtp")
    assert command.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert flags["--model"] == flags["--served-model-name"] == str(model_dir)
    assert json.loads(flags["--speculative-config"]) == {"method": "mtp", "num_speculative_tokens": 2}
    assert flags["--dtype"] == "bfloat16" and flags["--mamba-ssm-cache-dtype"] == "float32"
    assert flags["--enforce-eager"] and flags["--no-enable-prefix-caching"]
    assert flags["--reasoning-parser"] == flags["--tool-call-parser"] == "nemo_lite"
    assert flags["--chat-template"].endswith("chat_template.jinja")
    assert command.env["OMP_NUM_THREADS"] == "1" and command.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert command.notes == [
        "prefix caching is off: on a CPU vLLM has no kernel that keeps Mamba states at block boundaries"
    ]
    assert shlex.split(str(command))[-len(command.argv) :] == command.argv


def test_what_is_said_for_a_gpu(model_dir):
    flags, command = made(model_dir, "--", "--tensor-parallel-size", "8", "--enable-expert-parallel", build=GPU)
    assert command.argv[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(model_dir)]
    assert "--enforce-eager" not in flags and "--no-enable-prefix-caching" not in flags and not command.notes
    assert flags["--tensor-parallel-size"] == "8" and flags["--enable-expert-parallel"]
    assert "OMP_NUM_THREADS" not in command.env
    flags, command = made(model_dir, "--speculative", "mtp", build=GPU)
    assert flags["--no-enable-prefix-caching"] and "vllm-project/vllm#43559" in command.notes[0]
    flags, _ = made(model_dir, "--mamba-ssm-cache-dtype", "float16", build=GPU)
    assert flags["--enable-mamba-cache-stochastic-rounding"]


def test_every_option_maps_or_is_refused(model_dir, tmp_path):
    """Whoever adds an option to `serve` decides here what it is with vLLM."""
    maps = {
        "--served-model-name": ("name", "--served-model-name"), "--draft-tokens": ("3", "--speculative-config"),
        "--dtype": ("bfloat16", "--dtype"), "--device": ("cpu", None), "--threads": ("2", None),
        "--max-model-len": ("64", "--max-model-len"), "--max-num-seqs": ("4", "--max-num-seqs"),
        "--max-num-batched-tokens": ("99", "--max-num-batched-tokens"),
        "--memory-gib": ("1", "--kv-cache-memory-bytes"),
        "--mamba-ssm-cache-dtype": ("bfloat16", "--mamba-ssm-cache-dtype"),
        "--chat-template": ("file", "--chat-template"), "--reasoning-parser": ("none", None),
        "--tool-call-parser": ("json", "--tool-call-parser"), "--host": ("::1", "--host"), "--port": ("8001", "--port"),
        "--api-key": ("key", None), "--allowed-origins": ("http://a", "--allowed-origins"),
        "--ssl-certfile": ("c.pem", "--ssl-certfile"), "--ssl-keyfile": ("k.pem", "--ssl-keyfile"),
        "--max-queue": ("5", "--max-num-queued-reqs"), "--shutdown-grace": ("7", "--shutdown-timeout"),
    }  # fmt: skip
    switches = {"--no-enable-prefix-caching", "--log-prompts", "--print-command"}
    refused = {"--quantization": "int8", "--kernels": "x=y", "--block-size": "16", "--max-request-bytes": "9",
               "--request-timeout": "9", "--on-engine-death": "exit"}  # fmt: skip
    options = {o for a in serve._parser()._actions for o in a.option_strings if o.startswith("--")}
    assert options - {"--help", "--engine", "--speculative"} == {*maps, *switches, *refused}
    needed = {"--draft-tokens": ["--speculative", "mtp"], "--ssl-keyfile": ["--ssl-certfile", "c.pem"]}
    for option, (value, flag) in maps.items():
        flags, _ = made(model_dir, option, value, *needed.get(option, []))
        assert flag is None or (flag in flags and flags[flag] is not True), option
    assert json.loads(made(model_dir, "--speculative", "mtp", "--draft-tokens", "3")[0]["--speculative-config"]) == {
        "method": "mtp", "num_speculative_tokens": 3,
    }  # fmt: skip
    assert made(model_dir, "--threads", "2")[1].env["OMP_NUM_THREADS"] == "2"
    assert "--reasoning-parser" not in made(model_dir, "--reasoning-parser", "none")[0]
    assert made(model_dir, "--tool-call-parser", "json")[0]["--tool-call-parser"] == "nemo_lite_json"
    _, command = made(model_dir, "--api-key", "secret")
    assert command.env["VLLM_API_KEY"] == "secret" and "secret" not in str(command)
    for option, value in refused.items():
        with pytest.raises(UserError, match=f"^{option} with --engine vllm: "):
            made(model_dir, option, value)


@pytest.mark.parametrize(
    "argv,build,sentence",
    [
        (["--dtype", "float64"], CPU, "--dtype float64 with --engine vllm: it computes in float32 or bfloat16"),
        (
            ["--dtype", "float32", "--speculative", "mtp"],
            GPU,
            "is stored in bfloat16, and vLLM keeps one MTP projection",
        ),
        (["--speculative", "mtp", "--draft-tokens", "auto"], CPU, "--draft-tokens auto with --engine vllm"),
        (["--mamba-ssm-cache-dtype", "float16"], CPU, "--mamba-ssm-cache-dtype float16 needs stochastic rounding"),
        (["--device", "cuda"], CPU, "--device cuda: vLLM 0.32.0 is built for CPUs"),
        (["--device", "cpu"], GPU, "--device cpu: vLLM 0.32.0 is built for GPUs; `make vllm-cpu`"),
        (["--threads", "2"], GPU, "--threads with --engine vllm"),
        (["--", "--enable-prefix-caching"], CPU, "--enable-prefix-caching: on a CPU vLLM has no kernel"),
        (["--speculative", "mtp", "--", "--enable-prefix-caching"], GPU, "it corrupted the answers of hybrids (vllm-"),
    ],
)
def test_refusals(model_dir, argv, build, sentence):
    with pytest.raises(UserError) as caught:
        made(model_dir, *argv, build=build)
    assert sentence in str(caught.value)


def test_models_that_vllm_cannot_serve(tmp_path, model_dir):
    for pattern, mtp, more, sentence in [
        ("ME*", "M*", {}, "its MTP block M* has M, and vLLM has * and E there only"),
        ("*E", "", {}, "its pattern *E has no Mamba-2 layer"),
        ("M*", "", {"tie_word_embeddings": True}, "its head is tied to its embedding"),
    ]:
        config = tiny_config(pattern, mtp, **HEADS | more)
        assert any(sentence in problem for problem in vllm_problems(config))
        tiny_model(config).save_pretrained(tmp_path / pattern.replace("*", "a"))
        with pytest.raises(UserError) as caught:
            made(tmp_path / pattern.replace("*", "a"))
        assert sentence in str(caught.value)
    tiny_model(tiny_config("M*")).save_pretrained(tmp_path / "heads")
    with pytest.raises(UserError, match="has attention heads of 8, and vLLM on a CPU only heads of 32, 64"):
        made(tmp_path / "heads")
    with pytest.raises(UserError, match="has no MTP block"):
        tiny_model(tiny_config("M*", **HEADS)).save_pretrained(tmp_path / "plain")
        made(tmp_path / "plain", "--speculative", "mtp")
    raw = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_algo": "FP8"}}))
    with pytest.raises(UserError, match="is stored in FP8, and vLLM on a CPU has no kernel"):
        made(tmp_path / "plain")


def test_auto_says_why(model_dir, monkeypatch):
    args = argparse.Namespace(device=None)
    monkeypatch.setattr(launch.Build, "installed", classmethod(lambda cls: None))
    assert launch.choose(args) == ("native", "vLLM is not installed")
    monkeypatch.setattr(launch.Build, "installed", classmethod(lambda cls: CPU))
    assert launch.choose(args) == ("native", "on a CPU the native engine is the faster one")
    if not torch.cuda.is_available():
        monkeypatch.setattr(launch.Build, "installed", classmethod(lambda cls: GPU))
        assert launch.choose(args) == ("native", "vLLM 0.32.0 is built for GPUs, and there is none")


def test_the_command_is_printed(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(launch.Build, "installed", classmethod(lambda cls: CPU))
    assert serve.main([str(model_dir), "--engine", "vllm", "--print-command", "--", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "-m vllm.entrypoints.openai.api_server --model" in out and out.strip().endswith("--seed 1")
    monkeypatch.setattr(launch.Build, "installed", classmethod(lambda cls: None))
    with pytest.raises(UserError, match="vLLM is not installed: `pip install"):
        serve.main([str(model_dir), "--engine", "vllm"])
    with pytest.raises(SystemExit):
        serve.main([str(model_dir), "--engine", "native", "--", "--seed", "1"])
