"""`make demo`, timed step by step, and its model's figures on held-out files: benchmarks/results/demo.json.

    python benchmarks/demo.py              # a first run: about ten minutes on two cores
    python benchmarks/demo.py --evaluate   # only the figures again, of the model in runs/demo/model; times are kept

The times are those of a run from nothing, so it refuses to start where runs/demo or runs/demo-tokenizer exists.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peers import ROOT, machine

RESULT = ROOT / "benchmarks" / "results" / "demo.json"
RECIPE = "recipes/demo.yaml"
MODEL = "runs/demo/model"
# What each step of recipes/demo.sh is called in the result, by a word of the line that it prints first.
STEPS = {
    "tokenizer": "tokenizer",
    "training": "train",
    "export": "export",
    "evaluation": "evaluate",
    "completion": "generate",
}


def environment() -> dict[str, str]:
    """This interpreter's own commands first, as the Makefile has it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def step_of(line: str) -> str | None:
    """The step that a line of the demo's output begins, or None: ``== training: ...`` is train."""
    if not line.startswith("== "):
        return None
    first = min((line.index(word), name) for word, name in STEPS.items() if word in line)
    return first[1]


def timed(lines, clock=time.perf_counter) -> dict[str, float]:
    """Seconds of each step and in total, from the demo's output as it comes; it is passed on."""
    started = clock()
    seconds: dict[str, float] = {}
    current, since = None, started
    for line in lines:
        print(line, end="", flush=True)
        if step := step_of(line):
            now = clock()
            if current is not None:
                seconds[current] = seconds.get(current, 0.0) + now - since
            current, since = step, now
    end = clock()
    if current is not None:
        seconds[current] = seconds.get(current, 0.0) + end - since
    return {name: round(value, 1) for name, value in (seconds | {"total": end - started}).items()}


def run_demo() -> dict[str, float]:
    """recipes/demo.sh from nothing; how long each step took."""
    left = [name for name in ("runs/demo", "runs/demo-tokenizer") if (ROOT / name).exists()]
    if left:
        sys.exit(
            f"{' and '.join(left)} exists; remove it, so that the times are those of a first run, or use --evaluate"
        )
    demo = subprocess.Popen(
        ["sh", "recipes/demo.sh"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert demo.stdout is not None
    seconds = timed(demo.stdout)
    if demo.wait():
        sys.exit(f"recipes/demo.sh ended with exit code {demo.returncode}; nothing is written")
    return seconds


def command_json(*words: str) -> dict[str, Any]:
    """The JSON object that a nemo-lite command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "nemo_lite", *words, "--json"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"nemo-lite {' '.join(words)} failed; nothing is written")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="keep the times and measure the model's figures again")
    args = parser.parse_args()
    if args.evaluate:
        if not RESULT.exists():
            sys.exit(f"{RESULT.relative_to(ROOT)} does not exist: there are no times to keep; run without --evaluate")
        seconds = json.loads(RESULT.read_text(encoding="utf-8"))["seconds"]
    else:
        seconds = run_demo()
    evaluation = command_json(
        "evaluate", MODEL, "--validation-fraction", "0.05", "--seq-len", "256", "--threads", "2"
    )  # fmt: skip
    facts = subprocess.run(
        [sys.executable, "-m", "nemo_lite", "check", RECIPE, "--json"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    body = {
        "command": "make demo",
        "machine": machine(),
        "seconds": seconds,
        "evaluation": evaluation,
        "parameters": json.loads(facts.stdout)["parameters"],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(f"written to {RESULT.relative_to(ROOT)}; python docs/generate.py puts it into the documents")


if __name__ == "__main__":
    main()
