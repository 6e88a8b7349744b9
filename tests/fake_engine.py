"""An engine without a model: token i of a request is (its last prompt token + i + 1) mod vocabulary.

Its model_dir is JSON, or a folder whose config.json has it under "fake": {"hold": FILE} holds every step open while
FILE exists, and makes FILE.held meanwhile; {"refuse": SENTENCE} and {"crash": true} are loads that fail;
{"step_seconds": S} is the least time of a step. A prompt that ends in one of the tokens below does what its name says.
"""

import json
import os
import threading
import time
from collections import deque
from pathlib import Path

from nemo_lite_serving.protocol import Counts, EngineInfo, EngineOptions, EngineStats, Output, Request

from nemo_lite.config import UserError

VOCABULARY = 1000
RAISE, EXIT, REFUSE = 901, 902, 903
DRAFTED = 904  # tokens come in threes, as two accepted drafts and one from the main model


def build(options: EngineOptions) -> "FakeEngine":
    folder = Path(options.model_dir)
    how = json.loads((folder / "config.json").read_text())["fake"] if folder.is_dir() else json.loads(options.model_dir)
    if "refuse" in how:
        raise UserError(how["refuse"])
    if how.get("crash"):
        os._exit(7)
    return FakeEngine(options, **how)


class FakeEngine:
    def __init__(self, options: EngineOptions, hold: str | None = None, step_seconds: float = 0.0):
        self.info = EngineInfo(4096, VOCABULARY, ["nothing needs memory here"])
        self.options, self.hold, self.step_seconds = options, hold, step_seconds
        self.open = threading.Event()  # for a test in the same process
        self.open.set()
        self.aborted: list[str] = []
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, list[int], float]] = {}
        self._stats = EngineStats()

    def add(self, request: Request) -> None:
        if request.prompt[-1] == REFUSE:
            raise UserError("the prompt is refused, as asked")
        self._waiting.append(request)

    def abort(self, id: str) -> None:
        self.aborted.append(id)
        self._running.pop(id, None)
        self._waiting = deque(request for request in self._waiting if request.id != id)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> list[Output]:
        while self._waiting and len(self._running) < self.options.max_num_seqs:
            request = self._waiting.popleft()
            self._running[request.id] = (request, [], time.monotonic())
            self._stats.prompt_tokens += len(request.prompt)
        while self.hold and Path(self.hold).exists():
            Path(f"{self.hold}.held").touch()
            time.sleep(0.002)
        self.open.wait(30)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self._stats.steps += 1
        outputs = []
        for request, tokens, started in list(self._running.values()):
            if request.prompt[-1] == RAISE and len(tokens) == request.max_tokens - 1:
                raise RuntimeError("raised, as asked")
            if request.prompt[-1] == EXIT and len(tokens) == request.max_tokens - 1:
                os._exit(9)
            count = 3 if request.prompt[-1] == DRAFTED else 1
            count = min(count, request.max_tokens - len(tokens))
            new = [(request.prompt[-1] + 1 + len(tokens) + i) % VOCABULARY for i in range(count)]
            tokens += new
            self._stats.new_tokens += count
            output = Output(request.id, new, [*range(1, count), 0])
            if len(tokens) >= request.max_tokens or new[-1] in request.stop_ids:
                output.finish_reason = "stop" if new[-1] in request.stop_ids else "length"
                output.counts = Counts(
                    len(request.prompt), new_tokens=len(tokens), first_token_seconds=time.monotonic() - started
                )
                del self._running[request.id]
            outputs.append(output)
        return outputs

    def stats(self) -> EngineStats:
        stats = EngineStats(**vars(self._stats))
        stats.running, stats.waiting = len(self._running), len(self._waiting)
        return stats
