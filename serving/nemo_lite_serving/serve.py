"""`nemo-lite serve MODEL_DIR`: the engine in its process, the API in this one, and an orderly end of both."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import ipaddress
import logging
import math
import os
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lite.config import UserError

if TYPE_CHECKING:
    from nemo_lite_serving.protocol import EngineOptions

NATIVE = "nemo_lite_serving.engine:build"
KEY_VARIABLE = "NEMO_LITE_API_KEY"
CANCEL_SECONDS = 5  # for what was cancelled at the end of the grace period to say so to its client


def main(argv: list[str], factory: str = NATIVE) -> int:
    """`nemo-lite serve MODEL_DIR`; `factory` is the module:function that builds the engine."""
    parser = _parser()
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    args.vllm_args = argv[at + 1 :]
    _check(parser, args)
    if not (Path(args.model_dir) / "config.json").is_file():
        raise UserError(f"{args.model_dir} is no MODEL_DIR: it has no config.json")
    args.why = None
    if args.engine != "native":
        from nemo_lite_serving.vllm import launch

        if args.engine == "auto":
            args.engine, args.why = launch.choose(args)
        if args.engine == "vllm":
            return launch.run(args)
    _check_native(parser, args)
    for module in ("fastapi", "uvicorn", "prometheus_client", "jinja2"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f'serving needs {error.name}, which `pip install "nemo-lite[serve]"` brings') from error
    # What can be known before a model is loaded is checked before.
    _check_tls(args.ssl_certfile, args.ssl_keyfile)
    sock = _bind(args.host, args.port)
    with sock:
        return asyncio.run(_serve(args, factory, sock))


# -------------------------------------------------------------------------------------------------------- the arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-lite serve",
        description="Serve a MODEL_DIR behind the OpenAI API, with a page to try it at /. Ctrl-C finishes what runs.",
        epilog="With --engine vllm, what follows -- goes to vLLM as it is: -- --tensor-parallel-size 8",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR")
    parser.add_argument("--served-model-name", metavar="NAME", help="name in the API (default: MODEL_DIR as given)")

    add = parser.add_argument_group("engine").add_argument
    add(
        "--engine",
        choices=["auto", "native", "vllm"],
        default="auto",
        help="what computes (default: auto, which is vllm where it is installed and there is a GPU)",
    )
    add("--speculative", choices=["mtp"], help="draft with the model's own MTP block (default: off)")
    add("--draft-tokens", type=_draft_tokens, metavar="auto|N", help="drafts a step (default: auto, as it pays)")
    add("--dtype", choices=["float32", "bfloat16", "float64"], help="number format (default: as stored)")
    add("--device", help="cpu or cuda (default: cpu; with vllm, what it is built for)")
    add("--threads", type=_positive, metavar="N", help="torch threads (default: torch's choice)")
    add("--quantization", choices=["int8", "int4"], help="pack weights as they are read (default: no)")
    add("--kernels", metavar="OP=NAME[,...]", help="backends of ops (default: auto; nemo-lite kernels lists them)")
    add("--print-command", action="store_true", help="with vllm: print what would be run (default: run it)")

    add = parser.add_argument_group("memory and batching").add_argument
    add("--max-model-len", type=_positive, metavar="N", help="tokens a sequence at most (default: the model's)")
    add("--max-num-seqs", type=_positive, metavar="N", help="sequences computed at once (default: 32, or vllm's)")
    add("--max-num-batched-tokens", type=_positive, metavar="N", help="tokens a step (default: 512, or vllm's)")
    add("--block-size", type=_positive, metavar="N", help="tokens of a KV block (default: 16)")
    what = "memory for KV blocks and Mamba states (default: what full use needs, at most half of what is free)"
    add("--memory-gib", type=_positive_float, metavar="G", help=what)
    add("--no-enable-prefix-caching", action="store_true", help="compute every prompt whole (default: prefixes kept)")
    choices = ["float32", "bfloat16", "float16"]
    what = "how Mamba states are stored (default: float32; float16 rounds stochastically)"
    add("--mamba-ssm-cache-dtype", choices=choices, default="float32", help=what)

    add = parser.add_argument_group("answers").add_argument
    add("--chat-template", metavar="FILE", help="jinja2 (default: the model's, else a built-in one)")
    what = "tell reasoning from the answer (default: auto; none leaves it in the text)"
    add("--reasoning-parser", choices=["auto", "none"], default="auto", help=what)
    choices = ["auto", "qwen3_coder", "json", "none"]
    add("--tool-call-parser", choices=choices, default="auto", help="how the model writes tool calls (default: auto)")

    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one and prints it (default: 8000)")
    what = f"a key that clients must send; may be repeated (default: ${KEY_VARIABLE}, else none)"
    add("--api-key", action="append", default=[], metavar="KEY", help=what)
    what = "another origin whose pages may call this server; may be repeated (default: none)"
    add("--allowed-origins", action="append", default=[], metavar="ORIGIN", help=what)
    add("--ssl-certfile", metavar="FILE", help="serve https with this certificate (default: http)")
    add("--ssl-keyfile", metavar="FILE", help="its key (default: in the certificate's file)")

    add = parser.add_argument_group("limits").add_argument
    what = "largest request body (default: 8388608, 8 MiB)"
    add("--max-request-bytes", type=_positive, metavar="N", help=what)
    what = "answers made or waiting, beyond which requests get 429 (default: 256)"
    add("--max-queue", type=_positive, metavar="N", help=what)
    what = "seconds a request may take; 0: no limit (default: 600)"
    add("--request-timeout", type=_seconds, metavar="S", help=what)
    what = "seconds that running requests may go on when the server is stopped (default: 30)"
    add("--shutdown-grace", type=_seconds, default=30.0, metavar="S", help=what)
    what = "if the engine dies: start it again, or end the server with an error (default: restart)"
    add("--on-engine-death", choices=["restart", "exit"], help=what)
    add("--log-prompts", action="store_true", help="prompt text in the access log (default: never)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def _draft_tokens(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


# argparse names the function in its message for what is no number.
_positive.__name__, _positive_float.__name__, _seconds.__name__ = "int", "number", "seconds"
_draft_tokens.__name__ = "auto or int"


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.draft_tokens is not None and args.speculative is None:
        parser.error("--draft-tokens needs --speculative mtp")
    if args.ssl_keyfile and not args.ssl_certfile:
        parser.error("--ssl-keyfile needs --ssl-certfile")
    if not 0 <= args.port < 65536:
        parser.error(f"--port must be between 0 and 65535, not {args.port}")


# What the native engine takes where nothing is said; vLLM has its own.
NATIVE_DEFAULTS = {
    "device": "cpu", "max_num_seqs": 32, "max_num_batched_tokens": 512, "block_size": 16, "max_request_bytes": 8 << 20,
    "max_queue": 256, "request_timeout": 600.0, "on_engine_death": "restart",
}  # fmt: skip


def _check_native(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.vllm_args or args.print_command:
        parser.error(f"{'what follows --' if args.vllm_args else '--print-command'} needs --engine vllm")
    for name, value in NATIVE_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def keys_of(args: argparse.Namespace) -> tuple[str, ...]:
    """API keys that a client must send one of; none where nobody asks for one."""
    return tuple(key for key in args.api_key or [os.environ.get(KEY_VARIABLE, "")] if key)


def _check_tls(certificate: str | None, key: str | None) -> None:
    if certificate is None:
        return
    for flag, file in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            Path(file or certificate).read_bytes()
        except OSError as error:
            raise UserError(f"{flag} {file}: {error.strerror}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        files = f"--ssl-certfile {certificate}" + (f" and --ssl-keyfile {key}" if key else "")
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{files}: no certificate and unencrypted key of it in PEM form ({reason})") from error


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not listen: nobody is to wait for a model that loads."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; try another --port") from error
    return sock


def _options(args: argparse.Namespace) -> EngineOptions:
    from nemo_lite_serving.protocol import EngineOptions

    return EngineOptions(
        model_dir=args.model_dir,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        quantization=args.quantization,
        kernels=args.kernels,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        memory_gib=args.memory_gib,
        prefix_caching=not args.no_enable_prefix_caching,
        speculative=args.speculative is not None,
        draft_tokens="auto" if args.draft_tokens is None else args.draft_tokens,
        mamba_cache_dtype=args.mamba_ssm_cache_dtype,
    )


# ----------------------------------------------------------------------------------------------------------- the server


async def _serve(args: argparse.Namespace, factory: str, sock: socket.socket) -> int:
    from nemo_lite_serving.api import ApiSettings, create_app
    from nemo_lite_serving.metrics import Metrics
    from nemo_lite_serving.process import EngineClient, EngineDead

    _set_up_logs()
    name = args.served_model_name or args.model_dir
    settings = ApiSettings(
        model_dir=args.model_dir,
        served_model_name=name,
        api_keys=keys_of(args),
        allowed_origins=tuple(args.allowed_origins),
        max_request_bytes=args.max_request_bytes,
        max_queue=args.max_queue,
        request_timeout=args.request_timeout or None,
        chat_template=args.chat_template,
        reasoning_parser=args.reasoning_parser,
        tool_call_parser=args.tool_call_parser,
        log_prompts=args.log_prompts,
    )
    stop = asyncio.Event()
    failures: list[str] = []
    client: EngineClient | None = None

    def on_signal(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            if client is not None:
                client.kill()
            print("nemo-lite: interrupted", file=sys.stderr, flush=True)
            os._exit(130)  # the engine of a client that is still starting ends with this process
        if not stop.is_set():
            print("nemo-lite: stopping; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        stop.set()

    def on_engine_exit(sentence: str) -> None:
        failures.append(sentence)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    stopped = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(EngineClient.start(_options(args), factory, args.on_engine_death, on_engine_exit))
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set() and not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return 0
    try:
        client = starting.result()
    except EngineDead as error:
        raise UserError(str(error)) from error
    try:
        if args.why:
            print(f"engine: native; {args.why}", flush=True)
        for line in client.info.capacity:
            print(line, flush=True)
        app = create_app(client, settings, Metrics(name, client.info.max_model_len))
        server = _server(app, args, sock, name)
        gc.collect()
        gc.freeze()  # a collection that looks through all of torch and pydantic again holds every answer up by 0.1 s
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True  # takes no more connections, waits for those that are being answered
        await asyncio.gather(client.close(args.shutdown_grace), serving)
    except OSError as error:  # another server began to listen while this one loaded its model
        raise UserError(f"cannot listen on {args.host} port {args.port}: {error.strerror}") from error
    finally:
        await client.close()
    if failures:
        raise UserError(failures[0])
    return 0


def _server(app: Any, args: argparse.Namespace, sock: socket.socket, name: str) -> Any:
    import contextlib
    from collections.abc import Iterator

    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are handled above: uvicorn would raise them again at the end, and so exit non-zero

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = sock.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            scheme = "https" if args.ssl_certfile else "http"
            print(f"serving {name} at {scheme}://{host}:{port}", flush=True)
            if not _is_loopback(host.strip("[]")) and not (args.api_key or os.environ.get(KEY_VARIABLE)):
                print("nemo-lite: warning: whoever reaches this address can use it; see --api-key", file=sys.stderr)

    config = uvicorn.Config(
        app,
        access_log=False,  # api.py writes its own
        log_config=None,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        timeout_graceful_shutdown=math.ceil(args.shutdown_grace) + CANCEL_SECONDS,
    )
    return Server(config)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _set_up_logs() -> None:
    """Warnings as lines for a person, the access log as lines of JSON; both to standard error."""
    logging.basicConfig(format="nemo-lite: %(message)s", level=logging.WARNING)
    access = logging.getLogger("nemo_lite.access")
    access.setLevel(logging.INFO)
    access.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
