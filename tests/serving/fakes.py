"""An engine's client without an engine: it replays what a test tells it to, and sees when an answer is given up."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from nemo_lite_serving.process import EngineDead
from nemo_lite_serving.protocol import Counts, EngineInfo, EngineStats, Output, Request, TokenLogprobs

from nemo_lite.config import UserError

TINY = Path(__file__).parents[1] / "fixtures" / "tiny_trained"
PANGRAM = "The quick brown fox jumps over the lazy dog. "


class FakeClient:
    """`answer` is the text (or the ids) of every answer, or a function of the request that gives it.

    A text is its UTF-8 bytes, the ids of the tiny tokenizer; it ends with `end`, if there is room for that.
    """

    def __init__(
        self,
        answer: str | list[int] | Callable[[Request], str | list[int]] = PANGRAM * 4,
        *,
        max_model_len: int = 8192,
        vocab_size: int = 260,
        per_output: int = 3,
        end: int | None = 256,
        delay: float = 0.0,
    ):
        self.info = EngineInfo(max_model_len, vocab_size, ["as much as you like"])
        self.answer, self.per_output, self.end, self.delay = answer, per_output, end, delay
        self.alive = True
        self.refuse: str | None = None  # what the engine says to every request
        self.fail_after: int | None = None  # outputs, then the engine dies
        self.hold: asyncio.Event | None = None  # nothing comes after the first output until it is set
        self.hold_first = False  # not even the first
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), new_tokens=7, accepted_at=[3, 1])

    def _tokens(self, request: Request) -> tuple[list[int], str]:
        answer = self.answer(request) if callable(self.answer) else self.answer
        ids = list(answer.encode()) if isinstance(answer, str) else list(answer)
        if self.end is not None:
            ids.append(self.end)
        stops = [at for at, index in enumerate(ids) if index in request.stop_ids and at >= request.min_tokens]
        if stops and stops[0] < request.max_tokens:
            return ids[: stops[0] + 1], "stop"
        while len(ids) < request.max_tokens:
            ids += list(PANGRAM.encode())
        return ids[: request.max_tokens], "length"

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if not self.alive:
            raise EngineDead("the engine is not running")
        if self.refuse is not None:
            raise UserError(self.refuse)
        self.requests.append(request)
        self.running.add(request.id)
        ids, reason = self._tokens(request)
        finished, started = False, time.monotonic()
        try:
            for number, start in enumerate(range(0, len(ids), self.per_output)):
                if self.hold is not None and (number or self.hold_first):
                    await self.hold.wait()
                await asyncio.sleep(self.delay)
                if self.fail_after is not None and number >= self.fail_after:
                    self.alive = False
                    raise EngineDead("the engine died while the request was running")
                group = ids[start : start + self.per_output]
                output = Output(request.id, group, list(range(len(group))))
                if request.logprobs is not None:
                    output.logprobs = [fake_logprobs(index, request.logprobs) for index in group]
                if number == 0 and request.prompt_logprobs is not None:
                    rest = [fake_logprobs(index, request.prompt_logprobs) for index in request.prompt[1:]]
                    output.prompt_logprobs = [None, *rest]
                if start + self.per_output >= len(ids):
                    output.finish_reason, finished = reason, True
                    output.counts = Counts(
                        prompt_tokens=len(request.prompt),
                        cached_tokens=min(4, len(request.prompt) - 1),
                        new_tokens=len(ids),
                        verify_steps=number + 1,
                        drafted=2 * (number + 1),
                        accepted=len(ids) - number - 1,
                        accepted_at=(number + 1, len(ids) - 2 * (number + 1)),
                        first_token_seconds=time.monotonic() - started,
                    )
                yield output
        finally:
            self.running.discard(request.id)
            if not finished:
                self.aborted.append(request.id)


def fake_logprobs(index: int, top: int) -> TokenLogprobs:
    """The token itself is the likeliest, its successors follow."""
    likeliest = [((index + step) % 256, -0.25 - step) for step in range(top)]
    return TokenLogprobs(-0.25, tuple(likeliest))
