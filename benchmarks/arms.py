"""What ablations share: one recipe trained once an arm and seed, in runs that go on where they stopped; and paired
differences with their intervals.

Arms of one seed read the same data in the same order from the same initial weights, so that differences are paired.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import ROOT

COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#B2529B", "#8A6D00", "#56B4E9", "#E69F00", "#707070")
STUDENT = {
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262,
}  # 97.5 %, n - 1 degrees of freedom  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Runs of `recipe` in FOLDER/ARM/SEED.

    arms  arm -> overrides of the recipe, in which {seed} stands for the seed
    more  arm -> seeds of its own beyond those of all arms
    """

    folder: Path
    recipe: str
    arms: Mapping[str, Sequence[str]]
    more: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return _load(self.recipe).train.steps

    def seeds_of(self, arm: str, seeds: Sequence[int]) -> list[int]:
        return [*seeds, *self.more.get(arm, ())]

    def run_dir(self, arm: str, seed: int) -> Path:
        """Relative to the repository, as the recipe's paths are."""
        return self.folder / arm / str(seed)

    def records(self, arm: str, seed: int) -> list[dict[str, Any]]:
        path = ROOT / self.run_dir(arm, seed) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finished(self, arm: str, seed: int) -> bool:
        """Whether the checkpoint of the last step is there, which is written last."""
        return (ROOT / self.run_dir(arm, seed) / "checkpoints" / f"step_{self.steps}").is_dir()

    def curve(self, arm: str, seed: int) -> dict[int, float]:
        """Step -> validation loss."""
        return {r["step"]: r["val_loss"] for r in self.records(arm, seed) if "val_loss" in r}

    def seconds(self, arm: str, seed: int) -> float:
        """Of training, pauses left out."""
        return self.records(arm, seed)[-1]["elapsed_seconds"]

    def tokens(self, arm: str, seed: int) -> int:
        """Read by a run so far."""
        return max(r.get("tokens", 0) for r in self.records(arm, seed))

    def arguments(self, description: str | None, seeds: Sequence[int]) -> argparse.ArgumentParser:
        """The command line of a script that runs its arms."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--arms", nargs="+", choices=list(self.arms), default=list(self.arms))
        parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
        parser.add_argument(
            "--at-once", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time, one thread each"
        )
        parser.add_argument("--draw", action="store_true", help="train nothing")
        return parser

    def loaded(self, arm: str, seed: int):
        """The recipe of a run."""
        return _load(self.recipe, *self.overrides(arm, seed))

    def overrides(self, arm: str, seed: int) -> list[str]:
        own = [each.replace("{seed}", str(seed)) for each in self.arms[arm]]
        return [f"run_dir={self.run_dir(arm, seed)}", f"seed={seed}", *own]

    def train(self, arm: str, seed: int) -> tuple[str, int, float]:
        """One run, or the rest of one; its seconds here."""
        folder = self.run_dir(arm, seed)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with open(ROOT / folder / "output.txt", "a") as log:
            code = command("train", self.recipe, *self.overrides(arm, seed), output=log)
        if code:
            raise SystemExit(f"{arm}, seed {seed}: exit code {code}; {folder}/output.txt tells why")
        return arm, seed, time.perf_counter() - began

    def run(self, arms: Sequence[str], seeds: Sequence[int], at_once: int) -> None:
        """All runs that are not finished, seed after seed."""
        wanted = [(arm, seed) for seed in seeds for arm in arms]
        wanted += [(arm, seed) for arm in arms for seed in self.more.get(arm, ())]
        left = [(arm, seed) for arm, seed in wanted if not self.finished(arm, seed)]
        print(f"{len(left)} runs of {self.steps} steps, {at_once} at a time", flush=True)
        with ThreadPoolExecutor(at_once) as pool:
            for job in [pool.submit(self.train, arm, seed) for arm, seed in left]:
                arm, seed, seconds = job.result()
                found = list(self.curve(arm, seed).values())
                loss = f"validation loss {found[-1]:.4f}" if found else "done"
                print(f"{arm:<14} seed {seed}: {loss}, {seconds:.0f} s", flush=True)


@functools.cache
def _load(recipe: str, *overrides: str):
    from nemo_lite import load_recipe

    return load_recipe(ROOT / recipe, list(overrides))


def command(*words: str, output=None) -> int:
    """`nemo-lite WORDS` in the repository; its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "nemo_lite", *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ
    ).returncode


def make_tokenizer(folder: Path, vocabulary: int = 512) -> None:
    """A byte-level BPE of the standard library's training text in `folder`, kept once it is there."""
    target = folder / "tokenizer.json"
    if not (ROOT / target).exists():
        words = ["--source", "stdlib", "--vocab-size", str(vocabulary), "--validation-fraction", "0.05"]
        if command("tokenizer", "train", *words, "--out", str(target)):
            raise SystemExit(f"{target} could not be made")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, STUDENT[n] * deviation / math.sqrt(n)


def relative(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Paired relative difference of losses: its mean and half_width."""
    mean, half = interval([(a - b) / b for a, b in zip(mine, theirs)])
    return {"mean": mean, "half_width": half}


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture on white ground."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="Helvetica Neue, Arial, Liberation Sans, sans-serif"><title>{title}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", fill: str = "#222") -> str:
    """Words in a picture."""
    from xml.sax.saxutils import escape

    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {where}>{escape(words)}</text>"
