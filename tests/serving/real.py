"""The real server around the tiny trained model, as a process, and the model itself to judge its answers by."""

import functools
import os
import re
import subprocess
import sys
import threading

import httpx
import openai
import psutil
import pytest
import torch
from serving.fakes import TINY

from nemo_lite import HybridLM
from nemo_lite.data import load_tokenizer
from nemo_lite.generate import generate

SECONDS = 60.0  # no wait lasts longer
END = 256  # the tiny tokenizer's end of text; the ids below are bytes
TIE = 1e-4  # log-probability: as near are two tokens between which float32 decides by the order of its sums

# `nemo-lite`, whose server has one more route: what the engine's books say, and what is left in the API's process.
PROGRAM = """
import asyncio, sys
import psutil
from nemo_lite_serving import api
create = api.create_app
def create_app(client, *rest):
    app = create(client, *rest)
    @app.get("/check")
    async def check():
        mine = {"in_flight": client.in_flight, "active": app.state.api.active, "tasks": len(asyncio.all_tasks())}
        return {**await client.check(), **mine, "api_rss": psutil.Process().memory_info().rss}
    return app
api.create_app = create_app
from nemo_lite.cli import main
sys.exit(main())
"""


class Server:
    """`nemo-lite serve` on a free port. Ended with SIGTERM it must exit with 0, its books in order."""

    def __init__(self, *argv: object):
        command = [sys.executable, "-c", PROGRAM, "serve", str(TINY), "--served-model-name", "tiny", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--speculative", "mtp", "--draft-tokens", "2", "--threads", "1", *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout and self.process.stderr
        self.errors: list[str] = []
        threading.Thread(target=self._read_errors, daemon=True).start()  # a full pipe would stop the server
        for line in self.process.stdout:
            if match := re.match(r"serving tiny at (http://\S+)", line):
                self.url = match[1]
                break
        else:
            self.process.wait(SECONDS)
            pytest.fail("\n".join(self.errors))
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            self.errors.append(line.rstrip())

    @property
    def engine(self) -> psutil.Process:
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def health(self) -> int:
        return self.http.get("/health").status_code

    def check(self) -> dict:
        return self.http.get("/check").raise_for_status().json()

    def metric(self, name: str) -> float:
        """A metric of vLLM's, summed over its labels."""
        text = self.http.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))

    def complete(self, prompt: str = "import ", **how):
        return self.openai.completions.create(**{"model": "tiny", "prompt": prompt, "temperature": 0, **how})

    def chat(self, text: str = "Write a class.", **how):
        messages = [{"role": "user", "content": text}]
        return self.openai.chat.completions.create(**{"model": "tiny", "messages": messages, "temperature": 0, **how})

    def end(self) -> int:
        self.http.close()
        self.openai.close()
        return self.process.wait(SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.end()


@functools.cache
def model() -> HybridLM:
    return HybridLM.from_pretrained(TINY)


@functools.cache
def tokenizer():
    return load_tokenizer(TINY)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text)


def greedy(prompt: list[int], max_tokens: int) -> list[int]:
    """The answer of the model by itself, its end included."""
    return generate(model(), torch.tensor([prompt]), max_tokens=max_tokens, stop_ids=[END]).tokens[0]


def logprobs(prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[answer, vocabulary]: the model's distribution for each token of the answer."""
    with torch.inference_mode():
        logits = model()(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def ties(prompt: list[int], text: str, finish: str, max_tokens: int) -> int:
    """Tokens in which a greedy answer differs from the model's own: none, but where two are as likely."""
    answer = list(text.encode()) + [END] * (finish == "stop")
    assert (finish == "stop") or len(answer) == max_tokens, "the answer is too short"
    if answer == greedy(prompt, max_tokens):
        return 0
    best = logprobs(prompt, answer).max(-1)
    gaps = best.values - logprobs(prompt, answer)[range(len(answer)), answer]
    assert float(gaps.max()) < TIE, f"not the greedy answer: {text!r}"
    return int((best.indices != torch.tensor(answer)).sum())
