"""The OpenAI API (and vLLM's additions to it) over an engine's client: FastAPI application, routes, streams.

A request goes: `Gate` (request id, key, size, log) -> `Api.read` (JSON to a model of schemas.py) -> `Api.job` (one
engine request per choice) -> `Api.run` (the engine's outputs as shown tokens) -> an answer or a stream of events.
Every error a client meets has OpenAI's shape and is an `ApiError` (or the engine's UserError or EngineDead).
Imported by the server only, when it starts.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import nemo_lite
from nemo_lite.config import UserError
from nemo_lite.data.tokenizer import load_tokenizer
from nemo_lite.generate import Sampling
from nemo_lite_serving import guides
from nemo_lite_serving import text as texts
from nemo_lite_serving.chat import ChatTemplate
from nemo_lite_serving.parsers import MARKERS, Content, OutputParser, Reasoning, ToolCallDelta, ToolCallStart
from nemo_lite_serving.process import EngineDead
from nemo_lite_serving.protocol import Counts, EngineInfo, EngineStats, Guide, Output, Request, Thinking
from nemo_lite_serving.schemas import (
    ApiError,
    ChatCompletion,
    ChatRequest,
    Common,
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    Error,
    Health,
    M,
    ModelCard,
    ModelList,
    NamedTool,
    TokenizeChatRequest,
    Tokenized,
    TokenizeRequest,
    Tool,
    Version,
    calls_schema,
    guide_of,
    parse,
)

if TYPE_CHECKING:
    from nemo_lite_serving.metrics import Metrics

access_log = logging.getLogger("nemo_lite.access")
log = logging.getLogger(__name__)

WEB = Path(__file__).with_name("web")
CSP = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
COMPLETION_TOKENS = 16  # what a completion without max_tokens gets, as at OpenAI
BODY_SECONDS = 60.0  # a client has as long to send its request, and to take one event of its answer
LONG_TEXT = 20_000  # characters that are worth a thread to tokenise
LONG_BODY = 200_000  # bytes that are worth a thread to parse
GREEDY_BELOW = 1e-5  # a temperature below would overflow the logits; vLLM's limit


class Client(Protocol):
    """What of the engine's client is used here."""

    info: EngineInfo

    @property
    def alive(self) -> bool: ...

    def stats(self) -> EngineStats: ...

    def generate(self, request: Request) -> AsyncIterator[Output]: ...


@dataclass(frozen=True)
class ApiSettings:
    """max_queue: sequences waiting or running at once, beyond which a request is refused with 429."""

    model_dir: str | Path
    served_model_name: str
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_request_bytes: int = 8 << 20
    max_queue: int = 256
    request_timeout: float | None = None
    chat_template: str | Path | None = None
    reasoning_parser: Literal["auto", "none"] = "auto"
    tool_call_parser: Literal["auto", "qwen3_coder", "json", "none"] = "auto"
    log_prompts: bool = False


# ------------------------------------------------------------------------------------------------------------- errors


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client went away")
    if isinstance(error, HTTPException):  # routing: no such path, no such method
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = {404: "there is no such path", 405: "this path does not take this method"}.get(error.status_code)
        return ApiError(error.status_code, message or str(error.detail), code=code, headers=dict(error.headers or {}))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "an internal error; the server's log has its details")


# ------------------------------------------------------------------------------------------------- one answer's making


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class Plain:
    """A completion's text as it is."""

    called = False

    def push(self, shown: str, finish: str | None) -> dict[str, Any]:
        return {"content": shown} if shown else {}


class Chat:
    """A chat answer's text to deltas: reasoning, content, tool calls.

    forced: the text is guided to be the arguments of the function of that name, or (True) a JSON list of calls.
    """

    def __init__(self, parser: OutputParser, forced: str | bool = False):
        self._parser, self._forced = parser, forced
        self._list = ""
        self._started = False
        self.called = False

    def push(self, shown: str, finish: str | None) -> dict[str, Any]:
        events: list[Any] = list(self._parser.push(shown)) if shown else []
        if finish is not None:
            events += self._parser.flush(truncated=finish == "length")
        if self._forced:
            events = self._as_calls(events, finish is not None)
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, Reasoning):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
            elif isinstance(event, Content):
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, ToolCallStart):
                self.called = True
                function = {"name": event.name, "arguments": ""}
                calls[event.index] = {"index": event.index, "id": event.id, "type": "function", "function": function}
            elif isinstance(event, ToolCallDelta):
                call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.arguments
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _as_calls(self, events: Iterable[Any], last: bool) -> list[Any]:
        found = []
        for event in events:
            if not isinstance(event, Content):
                found.append(event)
            elif self._forced is True:
                self._list += event.text
            else:
                if not self._started:
                    self._started = True
                    found.append(ToolCallStart(0, call_id(), str(self._forced)))
                found.append(ToolCallDelta(0, event.text))
        if last and self._forced is True and self._list:
            try:
                calls = [(call["name"], json.dumps(call["arguments"])) for call in json.loads(self._list)]
            except (ValueError, TypeError, KeyError):  # cut short: text is better than nothing
                return [*found, Content(self._list)]
            for index, (name, arguments) in enumerate(calls):
                found += [ToolCallStart(index, call_id(), name), ToolCallDelta(index, arguments)]
        return found


@dataclass
class Choice:
    """One sequence: what the engine is asked, and what came of it."""

    index: int
    request: Request
    text: texts.TokenText
    form: Plain | Chat
    asked: int  # max_tokens as the client has it (the engine is asked for one at least)
    first: bool = True  # the first of its prompt, whose tokens are counted once
    counts: Counts = field(default_factory=Counts)
    finish: str | None = None
    prompt_logprobs: Sequence[Any] | None = None


@dataclass
class Step:
    """What one output of the engine adds to a choice."""

    choice: Choice
    tokens: list[texts.Token]
    delta: dict[str, Any]
    finish: str | None = None


@dataclass
class Job:
    id: str
    created: int
    choices: list[Choice]
    arrived: float
    deadline: float | None
    facts: dict[str, Any]  # for the access log


async def merged(streams: Sequence[AsyncGenerator[Step, None]]) -> AsyncGenerator[Step, None]:
    """The steps of several choices as they come. Closing it closes them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for step in stream:
                yield step
        return
    queue: asyncio.Queue[Step | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Step, None]) -> None:
        try:
            async with aclosing(stream):
                async for step in stream:
                    queue.put_nowait(step)
            queue.put_nowait(None)
        except Exception as error:  # handed on to whoever reads the queue
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


T = TypeVar("T")


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The work's result; if the client goes away first the work is cancelled and ClientDisconnect raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()
        # Wait for the work's own clean-up: what it held is free when the request counts as ended.
        await asyncio.gather(task, gone, return_exceptions=True)


def event(data: dict[str, Any] | str) -> bytes:
    written = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + written.encode() + b"\n\n"


class EventStream(Response):
    """Server-sent events. The first one is there before the status is sent, so that a refusal has its own status."""

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], facts: dict[str, Any]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._facts = first, rest, facts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            self._facts["finish"] = "abort"
        finally:
            await self._rest.aclose()

    async def _send_all(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(BODY_SECONDS):  # a client that does not read holds the engine's memory
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                raise ClientDisconnect from None

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await write(event(self._first))
        try:
            async for each in self._rest:
                await write(event(each))
        except (ClientDisconnect, OSError):
            raise
        except Exception as error:  # the status is sent already: OpenAI's clients raise for an event like this
            self._facts["finish"] = "error"
            await write(event(as_api_error(error).body))
        await write(event("[DONE]"), more=False)


# ----------------------------------------------------------------------------------------------------------- the server


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object")
    return found


class Api:
    """The state behind the routes: tokenizer, template, defaults, and how much is under way."""

    def __init__(self, client: Client, settings: ApiSettings, metrics: Metrics):
        self.client, self.settings, self.metrics = client, settings, metrics
        self.created = int(time.time())
        self.active = 0  # sequences in the engine
        self.seconds = 1.0  # a request takes, on average of late
        folder = Path(settings.model_dir)
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.byte_lengths()  # made once, not while the first request waits
        override = settings.chat_template
        self.template = ChatTemplate.load(folder, None if override is None else str(override))
        ids = {name: self.tokenizer.backend.token_to_id(name) for name in (*MARKERS, "<|im_end|>")}
        self.markers = {index for name in MARKERS if (index := ids[name]) is not None}
        self.think_end = tuple(self._encode("</think>", add_special_tokens=False))
        generation = _read_json(folder / "generation_config.json")
        self.sampling = self._defaults(generation, folder / "generation_config.json")
        ends: set[int] = set()
        for source in (generation, _read_json(folder / "config.json")):
            eos = source.get("eos_token_id")
            ends.update(each for each in (eos if isinstance(eos, list) else [eos]) if isinstance(each, int))
        if self.tokenizer.eod_id is not None:
            ends.add(self.tokenizer.eod_id)
        self.ends = {each for each in ends if 0 <= each < client.info.vocab_size}
        # Whether answers may hold a reasoning part that the prompt does not open.
        self.reasons = ids["</think>"] is not None or "</think>" in self.template.source
        im_end = ids["<|im_end|>"]
        self.chat_ends = self.ends | ({im_end} if im_end is not None else set())

    @staticmethod
    def _defaults(generation: dict[str, Any], file: Path) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: generation[name] for name in names if generation.get(name) is not None}
        try:
            return Sampling(**{"temperature": 1.0, **given})
        except (UserError, TypeError) as error:
            raise UserError(f"{file}: {error}") from error

    # ------------------------------------------------------------------------------------------------------- reading

    async def read(self, http: HTTPRequest, model: type[M], other: type[M] | None = None) -> M:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Only JSON: a web page may post forms and plain text to this machine without asking the browser first.
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            message = f"the Content-Type must be application/json, not {kind[:100] or 'missing'}"
            raise ApiError(415, message, code="unsupported_media_type")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                raw = await http.body()
        except TimeoutError:
            raise ApiError(408, "the request's body did not arrive in time", code="timeout") from None
        if len(raw) > LONG_BODY:
            return await asyncio.to_thread(parse, model, raw, other)
        return parse(model, raw, other)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.served_model_name:
            message = f"there is no model {name[:200]!r} here, only {self.settings.served_model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_room(self, sequences: int) -> None:
        if not self.client.alive:
            raise ApiError(503, "the engine is not running", code="engine_dead")
        limit = self.settings.max_queue
        if sequences > limit:
            message = f"the request is for {sequences} answers, at most {limit} are possible"
            raise ApiError(400, message, param="n", code="invalid_combination")
        if self.active + sequences > limit:
            message = f"{self.active} answers are being made or wait, at most {limit} are taken; try again later"
            wait = {"Retry-After": str(min(60, max(1, math.ceil(self.seconds))))}
            raise ApiError(429, message, code="queue_full", headers=wait)

    def check_ids(self, ids: Iterable[int], param: str, size: int) -> None:
        for index in ids:
            if index >= size:
                message = f"`{param}`: the token id {index} is outside the model's {size} ids"
                raise ApiError(400, message, param=param, code="invalid_token_id")

    # ------------------------------------------------------------------------------------------------------ tokenising

    def _encode(self, written: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.backend.encode(written, add_special_tokens=add_special_tokens).ids

    async def encode(self, written: list[str], add_special_tokens: bool) -> list[list[int]]:
        def work() -> list[list[int]]:
            return [self._encode(each, add_special_tokens) for each in written]

        return await asyncio.to_thread(work) if sum(map(len, written)) > LONG_TEXT else work()

    async def render(self, messages: Sequence[BaseModel], tools: Sequence[Tool] | None, **arguments: Any) -> str:
        """The prompt of a conversation; what the template refuses is the client's mistake."""
        unused = {"refusal", "annotations", "audio", "function_call"}  # a former answer's fields
        plain = [message.model_dump(exclude_none=True, exclude=unused) for message in messages]
        described = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None

        def work() -> str:
            return self.template.render(plain, tools=described, **arguments)

        size = sum(len(str(message.get("content"))) for message in plain)
        try:
            # Templates are programs: a long conversation may keep one busy for a while.
            return await asyncio.to_thread(work) if size > LONG_TEXT or len(plain) > 50 else work()
        except UserError as error:
            param = "chat_template_kwargs" if str(error).startswith("chat_template_kwargs") else "messages"
            raise ApiError(400, str(error), param=param, code="invalid_prompt") from error

    # ------------------------------------------------------------------------------------------------------ preparing

    def sampling_of(self, body: Common) -> Sampling:
        def given(name: str) -> Any:
            value = getattr(body, name)
            return getattr(self.sampling, name) if value is None else value

        temperature = given("temperature")
        bias = [(int(index), value) for index, value in (body.logit_bias or {}).items()]
        self.check_ids((index for index, _ in bias), "logit_bias", self.client.info.vocab_size)
        return Sampling(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=max(0, given("top_k")),
            top_p=given("top_p"),
            min_p=given("min_p"),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=given("repetition_penalty"),
            logit_bias=tuple(dict(bias).items()),
            seed=body.seed,
        )

    async def guide(self, body: Common) -> Guide | None:
        guide, param = guide_of(body)
        if guide is not None:
            await self.check_guide(guide, param)
        return guide

    async def check_guide(self, guide: Guide, param: str) -> None:
        """Refuse here, where the field is known by its name, what the engine would refuse."""
        try:
            await asyncio.to_thread(guides.check, guide)
        except UserError as error:
            code = "invalid_schema" if guides.available() else "not_supported"
            raise ApiError(400, f"`{param}`: {error}", param=param, code=code) from error

    def job(
        self,
        http: HTTPRequest,
        body: Common,
        kind: str,
        prompts: list[list[int]],
        param: str,
        *,
        max_tokens: tuple[str, int] | None,
        default: int | None,
        guide: Guide | None,
        form: Callable[[], Plain | Chat],
        keep: set[int] | None = None,
        ends: set[int],
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        thinking: Thinking | None = None,
    ) -> Job:
        """The engine's requests. `max_tokens` is the field's name and value; `default` None: all that is left."""
        facts = http.scope["nemo_lite"]
        limit, size = self.client.info.max_model_len, self.client.info.vocab_size
        n = body.n or 1
        self.check_room(n * len(prompts))
        if body.stream_options is not None and not body.stream:
            raise ApiError(
                400, "`stream_options` needs stream: true", param="stream_options", code="invalid_combination"
            )
        extra = tuple(body.stop_token_ids or ())
        self.check_ids(extra, "stop_token_ids", size)
        sampling = self.sampling_of(body)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        stop_ids = tuple(sorted({*extra, *(() if body.ignore_eos else ends)}))
        arrived = time.monotonic()
        id, choices = f"{kind}-{uuid.uuid4().hex}", []
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, f"`{param}` has no tokens", param=param, code="invalid_prompt")
            left = limit - len(prompt)
            if left < 1:
                message = f"the context is {limit} tokens, which leaves no room behind a prompt of {len(prompt)}"
                raise ApiError(400, message, param=param, code="context_length_exceeded")
            if max_tokens is None:
                asked = left if default is None else min(default, left)
            else:
                name, asked = max_tokens
                if asked > left:
                    message = f"the context is {limit} tokens, the prompt has {len(prompt)} and `{name}` is {asked}"
                    raise ApiError(400, message, param=name, code="context_length_exceeded")
            least = body.min_tokens or 0
            if least > asked:
                message = f"`min_tokens` is {least}, more than the {asked} tokens the answer may have"
                raise ApiError(400, message, param="min_tokens", code="invalid_combination")
            for number in range(n):
                seed = sampling.seed if sampling.seed is None else (sampling.seed + number) % (1 << 63)
                request = Request(
                    id=f"{id}-{len(choices)}",
                    prompt=prompt,
                    sampling=Sampling(**{**vars(sampling), "seed": seed}),
                    max_tokens=max(1, asked),
                    min_tokens=least,
                    stop_ids=stop_ids,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    guide=guide,
                    thinking=thinking,
                )
                text = texts.TokenText(
                    self.tokenizer,
                    stops=stops,
                    stop_ids=stop_ids,
                    include_stop=bool(body.include_stop_str_in_output),
                    skip_special=body.skip_special_tokens is not False,
                    keep=keep or set(),
                    min_tokens=least,
                )
                choices.append(Choice(len(choices), request, text, form(), asked, first=number == 0))
        facts["prompt_tokens"] = sum(map(len, prompts))
        timeout = self.settings.request_timeout
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        return Job(id, int(time.time()), choices, arrived, deadline, facts)

    # --------------------------------------------------------------------------------------------------------- running

    async def run(self, job: Job) -> AsyncGenerator[Step, None]:
        """All choices through the engine. The last step of each has a `finish`."""
        self.check_room(len(job.choices))
        self.active += len(job.choices)
        try:
            async with aclosing(merged([self._run_one(job, choice) for choice in job.choices])) as steps:
                async for step in steps:
                    yield step
            self.seconds += 0.2 * (time.monotonic() - job.arrived - self.seconds)
        finally:
            self.active -= len(job.choices)
            job.facts["new_tokens"] = sum(choice.text.consumed for choice in job.choices)
            reasons = [choice.finish or "abort" for choice in job.choices]
            job.facts["finish"] = reasons[0] if len(reasons) == 1 else reasons

    async def _run_one(self, job: Job, choice: Choice) -> AsyncGenerator[Step, None]:
        text, last = choice.text, None
        reason, ran = "abort", False
        choice.counts = Counts(prompt_tokens=len(choice.request.prompt))
        try:
            async with aclosing(self.client.generate(choice.request)) as outputs:  # type: ignore[type-var]
                while choice.finish is None:
                    try:
                        async with asyncio.timeout_at(job.deadline):
                            output = await anext(outputs, None)
                    except TimeoutError:
                        reason = "error"
                        message = f"the answer was not there after {self.settings.request_timeout:g} seconds"
                        raise ApiError(504, message, code="timeout") from None
                    if output is None or output.finish_reason == "error":
                        reason = "error"
                        message = output.error if output is not None and output.error else "the engine gave no answer"
                        raise ApiError(500, message, code="engine_error")
                    ran = True
                    if output.tokens:
                        now = time.monotonic()
                        if last is None:
                            self.metrics.first_token(now - job.arrived)
                        else:
                            self.metrics.inter_token(now - last, tokens=len(output.tokens))
                        last = now
                    if output.prompt_logprobs is not None:
                        choice.prompt_logprobs = output.prompt_logprobs
                    if output.counts is not None:
                        choice.counts = output.counts
                    tokens = text.push(output) if choice.asked else []
                    finish = "stop" if text.stopped else output.finish_reason
                    if finish is not None and not choice.asked:
                        finish = "length"
                    delta = choice.form.push("".join(token.text for token in tokens), finish)
                    if finish is not None:
                        reason = finish
                        self._settle(choice)
                    if finish == "stop" and choice.form.called:
                        finish = "tool_calls"
                    choice.finish = finish
                    yield Step(choice, tokens, delta, finish)
        except (UserError, EngineDead):
            reason = "error"
            raise
        finally:
            self._settle(choice)
            self.metrics.finished(choice.counts if ran else None, reason, time.monotonic() - job.arrived)

    @staticmethod
    def _settle(choice: Choice) -> None:
        """Counts of what the client got: after a stop string the engine tells none, or more than was used."""
        counts, text = choice.counts, choice.text
        if counts.new_tokens != text.consumed:
            if not counts.verify_steps:
                counts.accepted, counts.accepted_at = sum(text.accepted_at), tuple(text.accepted_at)
            counts.new_tokens = text.consumed

    def usage(self, choices: Iterable[Choice]) -> dict[str, Any]:
        choices = list(choices)
        prompt = sum(len(choice.request.prompt) for choice in choices if choice.first)
        new = sum(choice.text.consumed for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.counts.cached_tokens for choice in choices if choice.first)
            },
        }

    async def respond(
        self,
        http: HTTPRequest,
        job: Job,
        body: Common,
        whole: Callable[[Job], Awaitable[dict[str, Any]]],
        chunks: Callable[[Job], AsyncGenerator[dict[str, Any], None]],
    ) -> Response:
        if not body.stream:
            return JSONResponse(await unless_gone(http.receive, whole(job)))
        stream = chunks(job)
        try:
            first = await unless_gone(http.receive, anext(stream))
        except BaseException:
            await stream.aclose()
            raise
        return EventStream(first, stream, job.facts)

    # ----------------------------------------------------------------------------------------------------- completions

    async def completions(self, http: HTTPRequest) -> Response:
        body = await self.read(http, CompletionRequest)
        self.check_model(body.model)
        self.check_room(1)
        if body.best_of is not None and body.best_of != (body.n or 1):
            message = "`best_of` must equal n: answers are not ranked here"
            raise ApiError(400, message, param="best_of", code="invalid_combination")
        given: Any = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
        if isinstance(given[0], str):
            prompts = await self.encode(given, body.add_special_tokens is not False)
        else:
            prompts = given
            for prompt in prompts:
                self.check_ids(prompt, "prompt", self.client.info.vocab_size)
        if self.settings.log_prompts:
            http.scope["nemo_lite"]["prompt"] = body.prompt
        job = self.job(
            http,
            body,
            "cmpl",
            prompts,
            "prompt",
            max_tokens=("max_tokens", body.max_tokens) if body.max_tokens is not None else None,
            default=COMPLETION_TOKENS,
            guide=await self.guide(body),
            form=Plain,
            ends=self.ends,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

        def logprobs(tokens: list[texts.Token], offset: int) -> dict[str, Any] | None:
            if body.logprobs is None:
                return None
            return texts.completion_logprobs(self.tokenizer, tokens, body.logprobs, offset)

        def echoed(choice: Choice) -> list[texts.Token]:
            if not body.echo:
                return []
            return texts.prompt_tokens(self.tokenizer, choice.request.prompt, choice.prompt_logprobs)

        async def whole(job: Job) -> dict[str, Any]:
            tokens: dict[int, list[texts.Token]] = {choice.index: [] for choice in job.choices}
            async with aclosing(self.run(job)) as steps:
                async for step in steps:
                    tokens[step.choice.index] += step.tokens
            choices = []
            for choice in job.choices:
                shown = echoed(choice) + tokens[choice.index]
                choices.append(
                    {
                        "index": choice.index,
                        "text": "".join(token.text for token in shown),
                        "logprobs": logprobs(shown, 0),
                        "finish_reason": choice.finish,
                    }
                )
            return self._whole(job, "text_completion", choices, body)

        async def chunks(job: Job) -> AsyncGenerator[dict[str, Any], None]:
            offsets: dict[int, int] = {}
            async with aclosing(self.run(job)) as steps:
                async for step in steps:
                    index, shown = step.choice.index, step.tokens
                    if index not in offsets:
                        offsets[index] = 0
                        shown = echoed(step.choice) + shown
                    if not shown and step.finish is None:
                        continue
                    written = "".join(token.text for token in shown)
                    choice = {
                        "index": index,
                        "text": written,
                        "logprobs": logprobs(shown, offsets[index]),
                        "finish_reason": step.finish,
                    }
                    offsets[index] += len(written)
                    yield self._chunk(job, "text_completion", choice, body, step)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield self._chunk(job, "text_completion", None, body)

        return await self.respond(http, job, body, whole, chunks)

    # ------------------------------------------------------------------------------------------------ chat completions

    async def chat(self, http: HTTPRequest) -> Response:
        body = await self.read(http, ChatRequest)
        self.check_model(body.model)
        self.check_room(1)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "`top_logprobs` needs logprobs: true", param="top_logprobs", code="invalid_combination")
        guide, tools, forced = await self._tools(body)
        continued = bool(body.continue_final_message)
        prompt = await self.render(
            body.messages,
            tools,
            add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continued,
            variables=body.chat_template_kwargs,
            **self._effort(body.reasoning_effort),
        )
        (ids,) = await self.encode([prompt], False)
        opened = self.template.reasoning_open(prompt, continued)
        reasoning = self.settings.reasoning_parser == "auto" and (opened or self.reasons)
        thinking = Thinking(self.think_end, True, body.thinking_token_budget) if opened else None
        calls = bool(tools) and not forced and self.settings.tool_call_parser != "none"

        def form() -> Chat:
            described = [tool.model_dump(exclude_none=True) for tool in tools or ()] if calls else None
            chosen = self.settings.tool_call_parser
            parser = OutputParser(reasoning, reasoning and opened, described, None if chosen == "none" else chosen)
            return Chat(parser, forced)

        if self.settings.log_prompts:
            http.scope["nemo_lite"]["prompt"] = prompt
        limits = [("max_completion_tokens", body.max_completion_tokens), ("max_tokens", body.max_tokens)]
        top = body.top_logprobs or 0
        job = self.job(
            http,
            body,
            "chatcmpl",
            [ids],
            "messages",
            max_tokens=next(((name, value) for name, value in limits if value is not None), None),
            default=None,
            guide=guide,
            form=form,
            keep=self.markers if reasoning or calls else None,
            ends=self.chat_ends,
            logprobs=top if body.logprobs else None,
            thinking=thinking,
        )

        def logprobs(tokens: list[texts.Token]) -> dict[str, Any] | None:
            if not body.logprobs:
                return None
            return {"content": texts.chat_logprobs(self.tokenizer, tokens, top), "refusal": None}

        async def whole(job: Job) -> dict[str, Any]:
            tokens: dict[int, list[texts.Token]] = {choice.index: [] for choice in job.choices}
            messages: dict[int, dict[str, Any]] = {choice.index: {} for choice in job.choices}
            async with aclosing(self.run(job)) as steps:
                async for step in steps:
                    tokens[step.choice.index] += step.tokens
                    _extend(messages[step.choice.index], step.delta)
            choices = []
            for choice in job.choices:
                found = messages[choice.index]
                message = {"role": "assistant", "content": found.get("content"), "refusal": None}
                if "reasoning_content" in found:
                    message["reasoning_content"] = found["reasoning_content"]
                if "tool_calls" in found:
                    calls = found["tool_calls"].values()
                    message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                elif message["content"] is None:
                    message["content"] = ""
                choices.append(
                    {
                        "index": choice.index,
                        "message": message,
                        "logprobs": logprobs(tokens[choice.index]),
                        "finish_reason": choice.finish,
                    }
                )
            return self._whole(job, "chat.completion", choices, body)

        async def chunks(job: Job) -> AsyncGenerator[dict[str, Any], None]:
            kind = "chat.completion.chunk"
            begun: set[int] = set()
            async with aclosing(self.run(job)) as steps:
                async for step in steps:
                    index = step.choice.index

                    def one(delta: dict[str, Any], finish: str | None, index: int = index) -> dict[str, Any]:
                        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

                    if index not in begun:
                        begun.add(index)
                        yield self._chunk(job, kind, one({"role": "assistant", "content": ""}, None), body)
                    if step.delta or (step.tokens and (body.logprobs or body.token_origins)):
                        choice = {**one(step.delta, None), "logprobs": logprobs(step.tokens)}
                        yield self._chunk(job, kind, choice, body, step, ended=False)
                    if step.finish is not None:
                        yield self._chunk(job, kind, one({}, step.finish), body, Step(step.choice, [], {}, step.finish))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield self._chunk(job, kind, None, body)

        return await self.respond(http, job, body, whole, chunks)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """The reasoning effort as the template's variables."""
        if effort is None or (effort == "none" and not self.template.thinking):
            return {}
        mode = {"none": "off", "minimal": "low", "low": "low"}.get(effort, "on")
        try:
            found = self.template.thinking_variables(mode)  # type: ignore[arg-type]
        except UserError as error:
            raise ApiError(400, str(error), param="reasoning_effort", code="not_supported") from error
        return {**found, "reasoning_effort": effort} if "reasoning_effort" in self.template.variables else found

    async def _tools(self, body: ChatRequest) -> tuple[Guide | None, list[Tool] | None, str | bool]:
        """(guide, the tools the model is told of, what it is forced to call)"""
        guide, choice = await self.guide(body), body.tool_choice
        if not body.tools:
            if choice not in (None, "none", "auto"):
                raise ApiError(400, "`tool_choice` needs `tools`", param="tool_choice", code="invalid_combination")
            return guide, None, False
        if choice == "none":
            return guide, None, False
        if choice in (None, "auto"):
            return guide, body.tools, False
        if guide is not None:
            message = "`tool_choice` decides the output's form, so that nothing else can guide it"
            raise ApiError(400, message, param="tool_choice", code="invalid_combination")
        if isinstance(choice, NamedTool):
            name = choice.function.name
            tool = next((each for each in body.tools if each.function.name == name), None)
            if tool is None:
                message = f"`tool_choice` names the function {name[:200]!r}, which is not among `tools`"
                raise ApiError(400, message, param="tool_choice", code="invalid_combination")
            schema, forced = tool.function.parameters or {"type": "object"}, name
        else:
            schema, forced = calls_schema(body.tools, body.parallel_tool_calls is not False), True
        guide = Guide("json_schema", json.dumps(schema))
        await self.check_guide(guide, "tool_choice")
        return guide, body.tools, forced

    # ----------------------------------------------------------------------------------------------- shapes of answers

    def _whole(self, job: Job, kind: str, choices: list[dict[str, Any]], body: Common) -> dict[str, Any]:
        answer = {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": self.settings.served_model_name,
            "choices": choices,
            "usage": self.usage(job.choices),
        }
        if body.token_origins:
            counts = [asdict(choice.counts) for choice in job.choices]
            answer["nemo_lite"] = {"counts": counts[0] if len(counts) == 1 else counts}
        return answer

    def _chunk(
        self,
        job: Job,
        kind: str,
        choice: dict[str, Any] | None,
        body: Common,
        step: Step | None = None,
        ended: bool = True,
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": self.settings.served_model_name,
            "choices": [] if choice is None else [choice],
        }
        options = body.stream_options
        if options is not None and options.include_usage:
            chunk["usage"] = self.usage(job.choices) if choice is None or options.continuous_usage_stats else None
        if body.token_origins and step is not None:
            extra: dict[str, Any] = {"tokens": [[token.text, token.depth] for token in step.tokens]}
            if step.finish is not None and ended:
                extra["counts"] = asdict(step.choice.counts)
            chunk["nemo_lite"] = extra
        return chunk

    # ------------------------------------------------------------------------------------------------------- the others

    async def tokenize(self, http: HTTPRequest) -> dict[str, Any]:
        body: Any = await self.read(http, TokenizeRequest, TokenizeChatRequest)
        self.check_model(body.model)
        if isinstance(body, TokenizeRequest):
            prompt, special = body.prompt, True
        else:
            opened = body.add_generation_prompt is not False
            prompt = await self.render(
                body.messages, body.tools, add_generation_prompt=opened, variables=body.chat_template_kwargs
            )
            special = False  # the template writes them
        if body.add_special_tokens is not None:
            special = body.add_special_tokens
        (ids,) = await self.encode([prompt], special)
        names = [texts.token_string(self.tokenizer, index)[0] for index in ids] if body.return_token_strs else None
        limit = self.client.info.max_model_len
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}

    async def detokenize(self, http: HTTPRequest) -> dict[str, Any]:
        body = await self.read(http, DetokenizeRequest)
        self.check_model(body.model)
        self.check_ids(body.tokens, "tokens", self.tokenizer.vocab_size)
        if len(body.tokens) > LONG_TEXT:
            return {"prompt": await asyncio.to_thread(self.tokenizer.decode, body.tokens)}
        return {"prompt": self.tokenizer.decode(body.tokens)}

    def card(self) -> dict[str, Any]:
        return {
            "id": self.settings.served_model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "nemo_lite",
            "max_model_len": self.client.info.max_model_len,
        }


def _extend(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content"):
        if name in delta:
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls", ()):
        known = message.setdefault("tool_calls", {}).setdefault(call["index"], call)
        if known is not call:
            known["function"]["arguments"] += call["function"]["arguments"]


# --------------------------------------------------------------------------------------------------------- the gate


class Gate:
    """Around every request: its id, the key, the size of the body, the access log, and errors nobody foresaw."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope["nemo_lite"] = facts
        status, seen = 0, 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            self._check_size(seen)
            return message

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                self._check_key(scope, headers)
                length = headers.get(b"content-length", b"")
                if length.isdigit():  # b"" where the body comes in chunks
                    self._check_size(int(length[:20]))
                await self._app(scope, limited, marked)
            except Exception as error:
                if status:  # part of the answer is sent: only ending the connection tells the client
                    raise
                await as_api_error(error).response(scope, receive, marked)
        finally:
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            seconds = time.monotonic() - started
            self._metrics.http(route, status)
            line = {"method": scope["method"], "route": route, "status": status, "request_id": request_id}
            access_log.info(json.dumps({**line, "seconds": round(seconds, 6), **facts}, ensure_ascii=False))

    def _check_size(self, size: int) -> None:
        if size > self._settings.max_request_bytes:
            message = f"the request's body is larger than {self._settings.max_request_bytes} bytes"
            raise ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if not self._keys or not (path.startswith("/v1/") or path.rstrip("/") in ("/tokenize", "/detokenize", "/v1")):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All are compared, each in constant time, so that the time taken tells nothing about a key.
        known = [hmac.compare_digest(digest, each) for each in self._keys]
        if scheme.lower() != b"bearer" or not any(known):
            message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


# ---------------------------------------------------------------------------------------------------- the application


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    described = {
        400: "the request is wrong; `param` names the field",
        401: "the API key is missing or wrong",
        404: "there is no such model",
        408: "the request's body did not arrive in time",
        413: "the request's body is too large",
        415: "the request's body is not announced as JSON",
        429: "the queue is full; Retry-After tells when to come back",
        500: "the server's own mistake",
        503: "the engine is not running",
        504: "the answer took longer than this server allows",
    }
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": described[status]} for status in statuses
    }
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return found


def _body(*models: type[BaseModel]) -> dict[str, Any]:
    references = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def create_app(client: Client, settings: ApiSettings, metrics: Metrics) -> FastAPI:
    """The application; reads tokenizer, template and defaults from the model's folder (UserError if it cannot)."""
    api = Api(client, settings, metrics)
    # The interactive pages of FastAPI load scripts from elsewhere; this server works offline.
    app = FastAPI(title="nemo_lite", version=nemo_lite.__version__, docs_url=None, redoc_url=None)
    app.state.api = api
    keyed = (401,) if settings.api_keys else ()
    posted = (400, 404, 408, 413, 415, 500, *keyed)
    generating = _errors(*posted, 429, 503, 504)
    data = {"type": "string", "description": "A chunk as JSON, OpenAI's; the last one is [DONE]."}
    item = {"type": "object", "required": ["data"], "properties": {"data": data}}
    event_stream = {"text/event-stream": {"itemSchema": item}}  # as FastAPI writes it for its own streams

    async def on_error(http: HTTPRequest, error: Exception) -> Response:
        return as_api_error(error).response

    for kind in (ApiError, UserError, EngineDead, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, on_error)

    @app.post(
        "/v1/completions",
        responses={200: {"model": Completion, "content": event_stream}, **generating},
        openapi_extra=_body(CompletionRequest),
    )
    async def completions(http: HTTPRequest) -> Response:
        return await api.completions(http)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatCompletion, "content": event_stream}, **generating},
        openapi_extra=_body(ChatRequest),
    )
    async def chat_completions(http: HTTPRequest) -> Response:
        return await api.chat(http)

    @app.post(
        "/tokenize",
        responses={200: {"model": Tokenized}, **_errors(*posted)},
        openapi_extra=_body(TokenizeRequest, TokenizeChatRequest),
    )
    async def tokenize(http: HTTPRequest) -> Response:
        return JSONResponse(await api.tokenize(http))

    @app.post(
        "/detokenize",
        responses={200: {"model": Detokenized}, **_errors(*posted)},
        openapi_extra=_body(DetokenizeRequest),
    )
    async def detokenize(http: HTTPRequest) -> Response:
        return JSONResponse(await api.detokenize(http))

    @app.get("/v1/models", responses={200: {"model": ModelList}, **_errors(*keyed)})
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [api.card()]})

    @app.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}, **_errors(404, *keyed)})
    async def model(model: str) -> Response:
        api.check_model(model)
        return JSONResponse(api.card())

    @app.get("/health", responses={200: {"model": Health}, **_errors(503)})
    async def health() -> Response:
        if not client.alive:
            raise ApiError(503, "the engine is not running", code="engine_dead")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def prometheus() -> Response:
        return Response(metrics.render(client.stats()), media_type=metrics.content_type)

    @app.get("/version", responses={200: {"model": Version}})
    async def version() -> Response:
        return JSONResponse({"version": nemo_lite.__version__})

    if WEB.is_dir():
        _add_page(app)
    app.openapi = lambda: _document(app, api)  # type: ignore[method-assign]
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.allowed_origins:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _add_page(app: FastAPI) -> None:
    headers = {
        "Content-Security-Policy": CSP,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB / "index.html", headers=headers)

    # Names are looked up, not made into paths, so that none leads elsewhere.
    files = {file.relative_to(WEB).as_posix(): file for file in WEB.rglob("*") if file.is_file()}

    @app.get("/static/{name:path}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], headers=headers)


def _document(app: FastAPI, api: Api) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, with the bodies of requests, which are read by hand, and this model's limits."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    from fastapi.openapi.utils import get_openapi

    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies = (CompletionRequest, ChatRequest, TokenizeRequest, TokenizeChatRequest, DetokenizeRequest)
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas = document["components"]["schemas"]
    schemas.update(found["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own error; here it is a 400
            operation["responses"].setdefault("405", {
                "description": "this path does not take this method",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            })  # fmt: skip
    info = api.client.info
    for body in bodies:
        properties = schemas[body.__name__]["properties"]
        properties["model"] = {"enum": [api.settings.served_model_name, None]}
        for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
            for each in properties.get(name, {}).get("anyOf", ()):
                if each.get("type") == "integer":
                    each.pop("exclusiveMaximum", None)
                    each["maximum"] = info.max_model_len
    _limit_ids({name: schemas[name] for name in ("CompletionRequest", "ChatRequest")}, info.vocab_size)
    _limit_ids(schemas["DetokenizeRequest"], api.tokenizer.vocab_size)
    if api.settings.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, path in document["paths"].items():
            if name.startswith("/v1/") or name in ("/tokenize", "/detokenize"):
                for operation in path.values():
                    operation["security"] = [{"key": []}]
    app.openapi_schema = document
    return document


def _limit_ids(schema: Any, size: int) -> None:
    """Set the bound of every token id to the vocabulary's."""
    if isinstance(schema, dict):
        inner = schema.get("items")
        if isinstance(inner, dict) and inner.get("exclusiveMaximum") == 1 << 31:
            inner["exclusiveMaximum"] = size
        for each in schema.values():
            _limit_ids(each, size)
    elif isinstance(schema, list):
        for each in schema:
            _limit_ids(each, size)
