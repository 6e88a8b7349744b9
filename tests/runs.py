"""Starting runs from tests: recipes over the frozen text, and children of one fork server that stand for processes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from nemo_lite.config import Recipe, load_recipe
from nemo_lite.parallel.native import World

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "tests" / "recipes"
ALONE = World(0, 1, torch.device("cpu"))


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, list]:
    """step -> every loss and the gradient norm of that logged step."""
    return {
        r["step"]: [r["loss"], *r["mtp_loss"], r["aux_loss"], r["grad_norm"]] for r in records(run_dir) if "loss" in r
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Child:
    """A forked process of the server."""

    def __init__(self, server: "Forks", pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self.server.ask({"wait": self.pid})

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Forks:
    """The fork server, and what it is asked for."""

    def __init__(self, folder: Path, cache: Path, *modules: str):
        """modules: imported by the server too."""
        self.folder, self.cache, self.count = folder, cache, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forkserver.py")), *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env,
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the fork server ended"
        return json.loads(line)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def call(self, function: str, *args, ranks: int = 1) -> list[Child]:
        """Start `ranks` processes of module:function."""
        port, children = str(free_port()), []
        for rank in range(ranks):
            self.count += 1
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": port}  # fmt: skip
            log = self.folder / f"{self.count}.log"
            request = {"call": function, "args": list(args), "env": env, "log": str(log)}
            children.append(Child(self, self.ask(request), log))
        return children

    def start(self, name: str, run_dir: Path, *overrides: str, ranks: int = 1, patch: str = "") -> list[Child]:
        """`nemo-lite train` of a recipe in tests/recipes, with a patch of cases.py before it."""
        argv = [str(RECIPES / f"{name}.yaml"), f"run_dir={run_dir}", f"data.cache_dir={self.cache}", *overrides]
        return self.call("cases:train", argv, patch, ranks=ranks)

    def train(self, name: str, run_dir: Path, *overrides: str, ranks: int = 1, patch: str = "", code: int = 0) -> str:
        """Such a run from start to end; its output."""
        children = self.start(name, run_dir, *overrides, ranks=ranks, patch=patch)
        codes = [child.wait() for child in children]
        output = "".join(child.output for child in children)
        assert codes == [code] * ranks, f"exit codes {codes}:\n{output}"
        return output

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def wait_for(condition, seconds: float = 60.0, every: float = 0.005) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
