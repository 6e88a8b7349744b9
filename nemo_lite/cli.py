"""``nemo-lite COMMAND``: one table of commands, each imported only when it is called.

A command is a function ``main(argv: list[str]) -> int | None``. Other distributions add commands through the
entry-point group ``nemo_lite.commands``; they cannot replace the ones here.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import select
import sys
from collections.abc import Callable

COMMANDS = {
    "train": ("nemo_lite.train.__main__:main", "train a recipe; an existing run resumes"),
    "check": ("nemo_lite.check:main", "resolve a recipe; count parameters, FLOPs and memory"),
    "plan": ("nemo_lite.plan:main", "layouts of a recipe on N GPUs, the fastest first, by a cost model"),
    "export": ("nemo_lite.export:main", "write a run or checkpoint as a Hugging Face MODEL_DIR"),
    "merge": ("nemo_lite.merge:main", "average the checkpoints of a run, or several MODEL_DIRs, into a MODEL_DIR"),
    "grow": ("nemo_lite.grow:main", "a larger MODEL_DIR from a MODEL_DIR: more layers, experts, wider parts"),
    "evaluate": (
        "nemo_lite.evaluate:main",
        "bits per byte, experts, MTP, long range, speed; of one model or of two",
    ),
    "generate": ("nemo_lite.generate:main", "complete text with a MODEL_DIR"),
    "serve": ("nemo_lite_serving.serve:main", "serve a MODEL_DIR behind the OpenAI API"),
    "chat": ("nemo_lite_serving.client:main", "chat with a MODEL_DIR or a server in the terminal"),
    "bench": ("nemo_lite_serving.load:main", "measure a server: nemo-lite bench serve URL"),
    "quant": ("nemo_lite.precision.inspect:main", "what a MODEL_DIR stores: formats, bits, outliers"),
    "kernels": ("nemo_lite.kernels:main", "the backends of the ops: which run here, which a model takes"),
    "tokenizer": ("nemo_lite.data.tokenizer:main", "train a tokenizer on a folder of text"),
    "data": ("nemo_lite.data.commands:main", "clean text; turn it into Megatron shards"),
    "report": ("nemo_lite.train.report:main", "write report.html of a run, or of a programme"),
    "watch": ("nemo_lite.programme.watch:main", "a run or a programme while it goes on, in the terminal"),
    "pipeline": ("nemo_lite.programme.pipeline:main", "run the stages of a programme that are out of date"),
}


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group="nemo_lite.commands")
    return {point.name: point for point in points if point.name not in COMMANDS}


def help_text() -> str:
    """What ``nemo-lite --help`` prints."""
    rows = [(name, line) for name, (_, line) in COMMANDS.items()]
    rows += [(name, f"from {point.dist.name if point.dist else point.value}") for name, point in _plugins().items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            "usage: nemo-lite COMMAND [ARGUMENTS]",
            "",
            "Train and serve hybrid Mamba-Transformer MoE language models.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {line}" for name, line in rows),
            "",
            "nemo-lite COMMAND --help tells a command's arguments; nemo-lite --version the version.",
        ]
    )


def guard(target: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Call a command; what a person can put right becomes one sentence on stderr, never a traceback.

    Returns the exit code: the command's own, 1 for a user's error, 130 after Ctrl-C, 141 when stdout was closed.
    """
    from nemo_lite.config import RecipeError, UserError

    try:
        code = target(argv) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        # Every torchrun rank reads the same recipe: one of them says what is wrong with it.
        if not isinstance(error, RecipeError) or os.environ.get("RANK", "0") == "0":
            print(f"nemo-lite: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nemo-lite: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_left():  # some other pipe broke, such as one to a worker process
            raise
        # The interpreter flushes stdout once more on exit; let it do so into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _reader_left() -> bool:
    """Whether nobody reads stdout any more, as after ``nemo-lite ... | head``."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``nemo-lite`` and ``python -m nemo_lite``; returns the exit code (2 for a usage error)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    name, *rest = argv
    if name in ("-V", "--version"):
        from nemo_lite import __version__

        print(f"nemo-lite {__version__}")
        return 0
    if name in COMMANDS:
        module, function = COMMANDS[name][0].split(":")

        def target(rest: list[str]) -> int | None:
            return getattr(importlib.import_module(module), function)(rest)

        return guard(target, rest)
    plugins = _plugins()
    if name in plugins:
        return guard(lambda rest: plugins[name].load()(rest), rest)
    near = difflib.get_close_matches(name, [*COMMANDS, *plugins], 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join([*COMMANDS, *plugins])}"
    print(f"nemo-lite: error: {name}: no such command; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
