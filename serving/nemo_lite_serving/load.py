"""`nemo-lite bench serve URL`: load on any OpenAI server, and what it did under it.

The generator shares the machine with the server it measures, so it is light: a plain HTTP/1.1 client on asyncio
streams (httpx takes 2.6 times the CPU for each chunk of a stream), and of a stream only the first and
the last events are parsed; the others are only clocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import platform
import random
import re
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from nemo_lite.config import UserError

_WORDS = """
time person year way day thing man world life hand part child eye woman place work week case point company number group
problem fact be have do say get make go know take see come think look want give use find tell ask seem feel try leave
call good new first last long great little own other old right big high different small large next early young important
few public bad same able red blue green stone water fire wind light dark river road house
"""
WORDS = _WORDS.split()

# What clients get wrong. Each must be answered with a 4xx.
MALFORMED: dict[str, bytes | dict[str, Any]] = {
    "json": b'{"model": "x", "prompt": ',
    "utf-8": b'{"prompt": "\xff\xfe"}',
    "type": {"max_tokens": "many"},
    "negative": {"max_tokens": -1},
    "huge": {"max_tokens": 10**30},
    "nan": {"temperature": math.nan},
    "model": {"model": "no such model"},
    "body": b"[1, 2, 3]",
}


# ------------------------------------------------------------------------------------------------------- HTTP, plainly


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, body: bytes):
        super().__init__(status)
        self.status, self.body = status, body

    def __str__(self) -> str:
        try:
            told = json.loads(self.body)
            return str(told["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return self.body[:200].decode("utf-8", "replace").strip() or f"status {self.status}"


class Connection:
    """One HTTP/1.1 connection, used for one request after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str):
        self.reader, self.writer, self.host = reader, writer, host
        self.status, self.used, self.reusable = 0, False, False

    async def start(self, method: str, path: str, body: bytes = b"", headers: Sequence[str] = ()) -> None:
        """Send a request and read the head of its answer."""
        head = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", f"Content-Length: {len(body)}", *headers]
        if body:
            head.append("Content-Type: application/json")
        self.reusable = False
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        self.used = True
        self.status = int(lines[0].split()[1])
        self._length, self._chunked, self._keep = None, False, True
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip().lower()
            if name == b"content-length":
                self._length = int(value)
            elif name == b"transfer-encoding":
                self._chunked = b"chunked" in value
            elif name == b"connection":
                self._keep = value != b"close"

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes. When it ends the connection can serve again."""
        if self._chunked:
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            while await self.reader.readuntil(b"\r\n") != b"\r\n":
                pass  # trailers
        elif self._length is not None:
            if self._length:
                yield await self.reader.readexactly(self._length)
        else:
            self._keep = False
            while part := await self.reader.read(65536):
                yield part
        self.reusable = self._keep

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    def drop(self) -> None:
        self.writer.transport.abort()


class Client:
    """Connections to one server; idle ones are used again."""

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url} is not the address of a server; it looks like http://127.0.0.1:8000")
        self.host, self.tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = [f"Authorization: Bearer {api_key}"] if api_key else []
        self.idle: list[Connection] = []

    async def start(self, method: str, path: str, body: bytes = b"", fresh: bool = False) -> Connection:
        """A connection on which the answer's head was read. Give it back with :meth:`done`."""
        while True:
            connection = None if fresh or not self.idle else self.idle.pop()
            if connection is None:
                reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=1 << 24)
                connection = Connection(reader, writer, f"{self.host}:{self.port}")
            try:
                await connection.start(method, self.prefix + path, body, self.headers)
                return connection
            except (asyncio.IncompleteReadError, ConnectionError):
                connection.drop()
                if not connection.used:  # a kept one may have been closed by the server meanwhile: once more
                    raise
            except BaseException:
                connection.drop()
                raise

    def done(self, connection: Connection) -> None:
        if connection.reusable:
            self.idle.append(connection)
        else:
            connection.drop()

    async def fetch(self, method: str, path: str, body: Any = None, fresh: bool = False) -> bytes:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = await self.start(method, path, data, fresh)
        try:
            answer = await connection.body()
        finally:
            self.done(connection)
        if connection.status >= 400:
            raise Refused(connection.status, answer)
        return answer

    def close(self) -> None:
        while self.idle:
            self.idle.pop().drop()


# ------------------------------------------------------------------------------------------------------- what to send


@dataclass
class Load:
    """A load. Token lengths are drawn from `length * (1 - range_ratio)` to `length * (1 + range_ratio)`.

    `prompts`: each a text, a list of token ids, a list of messages, or a dict of any of these under "prompt" or
    "messages" with request fields beside it; they are sent in turn. Without them, random text of about `input_len`
    tokens after `shared_prefix` tokens that all requests share (exactly so where the server has /tokenize and the
    endpoint takes token ids).
    """

    url: str
    requests: int = 100
    concurrency: int | None = None  # None: 8, or no limit where there is a rate
    request_rate: float = math.inf  # a second, Poisson; inf: as soon as there is room
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    shared_prefix: int = 0
    prompts: Sequence[Any] | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    model: str | None = None
    ignore_eos: bool = False
    temperature: float | None = 0.0
    seed: int = 0
    disconnect_fraction: float = 0.0
    malformed_fraction: float = 0.0
    warmup: int = 1  # requests before the clock starts
    timeout: float = 600.0  # of one request
    api_key: str | None = None
    health_every: float = 1.0  # seconds between probes; 0: none
    keep_answers: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # more request fields


@dataclass
class Result:
    """One request. `kind`: ok, disconnected (by us), malformed (and refused), or what went wrong."""

    index: int
    kind: str = ""
    status: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between chunks
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    detail: str | None = None
    text: str | None = None  # with keep_answers
    body: dict[str, Any] | None = None  # with keep_answers: what was sent


class Prompts:
    """Makes the requests' bodies."""

    def __init__(self, load: Load, model: str, pool: list[int] | None, per_word: float):
        self.load, self.model, self.pool, self.per_word = load, model, pool, per_word
        self.random = random.Random(load.seed)
        self.prefix = self._draw(load.shared_prefix)

    def _draw(self, tokens: int) -> list[Any]:
        """About so many tokens: ids where the server's are known, else words."""
        if self.pool:
            return self.random.choices(self.pool, k=tokens)
        return self.random.choices(WORDS, k=round(tokens / self.per_word))

    def _length(self, mean: int) -> int:
        ratio = self.load.range_ratio
        return max(1, round(self.random.uniform(mean * (1 - ratio), mean * (1 + ratio))))

    def body(self, index: int) -> dict[str, Any]:
        load = self.load
        body: dict[str, Any] = {"model": self.model, "max_tokens": self._length(load.output_len)}
        if load.prompts:
            given = load.prompts[index % len(load.prompts)]
        else:
            drawn = [*self.prefix, *self._draw(self._length(load.input_len))]
            given = drawn if self.pool else " ".join(drawn)
        if isinstance(given, dict):
            body |= given
        elif load.endpoint == "chat":
            body["messages"] = given if isinstance(given, list) else [{"role": "user", "content": given}]
        else:
            body["prompt"] = given
        if load.endpoint == "chat" and "messages" not in body:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        if load.temperature is not None:
            body["temperature"] = load.temperature
        if load.ignore_eos:
            body["ignore_eos"] = True
        return body | {"stream": True, "stream_options": {"include_usage": True}} | load.extra


async def _prompts(load: Load, client: Client, model: str) -> Prompts:
    if load.prompts:
        return Prompts(load, model, None, 1.0)
    text = " ".join(WORDS)
    for name in ("prompt", "content"):  # vLLM's field, llama.cpp's
        try:
            told = json.loads(await client.fetch("POST", "/tokenize", {name: text}))
            ids = [token for token in told["tokens"] if isinstance(token, int)]
        except (Refused, ValueError, KeyError, TypeError):
            continue
        if ids:
            return Prompts(load, model, ids if load.endpoint == "completions" else None, len(ids) / len(WORDS))
    # No tokenizer to ask: the usage of one request tells how many tokens a word is.
    body = Prompts(load, model, None, 1.0).body(0) | {"stream": False, "max_tokens": 1}
    body.pop("stream_options")
    if load.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    usage = json.loads(await client.fetch("POST", _path(load), body)).get("usage") or {}
    return Prompts(load, model, None, max(0.2, usage.get("prompt_tokens", len(WORDS)) / len(WORDS)))


def _path(load: Load) -> str:
    return "/v1/chat/completions" if load.endpoint == "chat" else "/v1/completions"


# --------------------------------------------------------------------------------------------------------- one request

_FINISH = re.compile(rb'"finish_reason":\s*"')
_USAGE = re.compile(rb'"usage":\s*\{')


def _content(event: dict[str, Any]) -> str:
    """All text of an event, reasoning and tool arguments too."""
    found = []
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        found += [choice.get("text"), delta.get("reasoning_content"), delta.get("reasoning"), delta.get("content")]
        found += [(call.get("function") or {}).get("arguments") for call in delta.get("tool_calls") or []]
    return "".join(filter(None, found))


async def _stream(connection: Connection, result: Result, began: float, cut: int | None, keep: bool) -> None:
    """Read one stream into `result`; with `cut`, leave it after so many chunks of text."""
    rest, texts, chunks, ended, last = b"", [], 0, False, began
    async for part in connection.parts():
        now = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                continue
            finish = _FINISH.search(data)
            with_text = True
            if keep or finish or not chunks or _USAGE.search(data) or b'"error"' in data:
                event = json.loads(data)
                if error := event.get("error"):
                    result.kind = "error in the stream"
                    result.detail = error.get("message") if isinstance(error, dict) else str(error)
                    return
                if usage := event.get("usage"):
                    result.prompt_tokens = usage.get("prompt_tokens", 0)
                    result.output_tokens = usage.get("completion_tokens", 0)
                if finish:
                    result.finish_reason = event["choices"][0]["finish_reason"]
                text = _content(event)
                with_text = bool(text)
                texts.append(text)
            if with_text:
                if chunks:
                    result.gaps.append(now - last)
                else:
                    result.ttft = now - began
                last, chunks = now, chunks + 1
                if cut is not None and chunks >= cut:
                    result.kind = "disconnected"
                    return
    result.latency = time.perf_counter() - began
    result.text = "".join(texts) if keep else None
    # Without usage in the stream (or without `stream_options`) a chunk counts as a token.
    result.output_tokens = result.output_tokens or chunks
    result.kind = "ok" if ended else "stream without its end"
    result.ttft = result.ttft or result.latency  # an answer without text, such as a stop token at once


async def _one(load: Load, client: Client, result: Result, body: dict[str, Any], cut: int | None, wrong: str) -> None:
    data = json.dumps(body).encode()
    if wrong:
        change = MALFORMED[wrong]
        data = change if isinstance(change, bytes) else json.dumps(body | change).encode()
    result.body = body if load.keep_answers else None
    connection = None
    try:
        async with asyncio.timeout(load.timeout):
            began = time.perf_counter()
            if cut == 0:  # gone before the answer began
                with contextlib.suppress(TimeoutError):
                    early = await asyncio.wait_for(client.start("POST", _path(load), data, fresh=True), 0.005)
                    early.drop()
                result.kind = "disconnected"
                return
            connection = await client.start("POST", _path(load), data)
            result.status = connection.status
            if connection.status >= 400:
                result.detail = str(Refused(connection.status, await connection.body()))
                expected = wrong and connection.status < 500 and connection.status not in (401, 408, 429)
                result.kind = "malformed" if expected else f"status {connection.status}"
            elif wrong:
                result.kind = f"malformed ({wrong}), yet answered"
            else:
                await _stream(connection, result, began, cut, load.keep_answers)
    except TimeoutError:
        result.kind = "timeout"
    except (asyncio.IncompleteReadError, ConnectionError, OSError) as error:
        result.kind = "connection lost" if connection else "no connection"
        result.detail = str(error)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        result.kind, result.detail = "not understood", f"{type(error).__name__}: {error}"
    finally:
        if connection:
            client.done(connection)  # dropped unless its answer was read to the end


# ------------------------------------------------------------------------------------------------------ beside the load


async def _probe(load: Load, client: Client, times: list[float], failures: Counter, lag: list[float]) -> None:
    """Ask /health about once a second. `lag`: how late this process itself woke up, so that it is not the server's."""
    while True:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(10):
                await client.fetch("GET", "/health", fresh=True)
            times.append(time.perf_counter() - began)
        except Refused as refused:
            failures[f"status {refused.status}"] += 1
            if refused.status == 404:  # a server without it
                return
        except TimeoutError:
            failures["timeout"] += 1
        except (asyncio.IncompleteReadError, OSError):
            failures["no connection"] += 1
        due = max(0.0, began + load.health_every - time.perf_counter())
        asleep = time.perf_counter()
        await asyncio.sleep(due)
        lag.append(time.perf_counter() - asleep - due)


COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "prefix_queries": "vllm:prefix_cache_queries",
    "prefix_hits": "vllm:prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
}


def read_counters(text: str) -> dict[str, float]:
    """The counters of a Prometheus page that are read here, summed over their labels."""
    names = {f"{name}{suffix}": key for key, name in COUNTERS.items() for suffix in ("", "_total")}
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("vllm:") and (key := names.get(re.split(r"[{\s]", line, maxsplit=1)[0])):
            found[key] = found.get(key, 0.0) + float(line.rsplit("}", 1)[-1].split()[0 if "}" in line else 1])
    return found


async def _counters(client: Client) -> dict[str, float]:
    try:
        return read_counters((await client.fetch("GET", "/metrics")).decode("utf-8", "replace"))
    except (Refused, ValueError, IndexError, asyncio.IncompleteReadError, OSError):
        return {}


def _server_side(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    delta = {key: after[key] - before.get(key, 0.0) for key in after}
    out: dict[str, Any] = {"counters": delta}
    if delta.get("drafts"):
        out["acceptance_length"] = 1 + delta.get("accepted", 0.0) / delta["drafts"]
    if delta.get("prefix_queries"):
        out["prefix_hit_rate"] = delta.get("prefix_hits", 0.0) / delta["prefix_queries"]
    return out


# ---------------------------------------------------------------------------------------------------------------- runs


def quantiles(values: Sequence[float], scale: float = 1e3) -> dict[str, float] | None:
    """Mean, quantiles (of the values there are: no interpolation) and maximum, by default seconds as milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    out = {"mean": sum(ordered) / len(ordered)}
    out |= {f"p{q}": ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)] for q in (50, 90, 99)}
    return {name: value * scale for name, value in (out | {"max": ordered[-1]}).items()}


def check(load: Load) -> None:
    """Refuse what makes no sense, before anything is sent."""
    for name in ("requests", "input_len", "output_len"):
        if getattr(load, name) < 1:
            raise UserError(f"{name} is {getattr(load, name)}; it must be at least 1")
    if load.concurrency is not None and load.concurrency < 1:
        raise UserError(f"concurrency is {load.concurrency}; it must be at least 1")
    if not load.request_rate > 0:
        raise UserError(f"request_rate is {load.request_rate}; it must be above 0 (inf: as soon as there is room)")
    for name in ("range_ratio", "disconnect_fraction", "malformed_fraction"):
        if not 0 <= getattr(load, name) <= 1:
            raise UserError(f"{name} is {getattr(load, name)}; it must be from 0 to 1")
    if load.disconnect_fraction + load.malformed_fraction > 1:
        raise UserError("disconnect_fraction and malformed_fraction are more than all requests together")
    if load.prompts is not None and not load.prompts:
        raise UserError("prompts is empty; give at least one, or none for random text")


async def run_async(load: Load) -> dict[str, Any]:
    """Put the load on the server. A dict of plain numbers; with `keep_answers` the `results` of the requests too."""
    check(load)
    client = Client(load.url, load.api_key)
    try:
        return await _run(load, client)
    except Refused as refused:
        raise UserError(f"{load.url} refused (status {refused.status}): {refused}") from refused
    except (asyncio.IncompleteReadError, OSError) as error:
        raise UserError(f"{load.url} does not answer: {error}") from error
    finally:
        client.close()


def run_load(url: str, **settings: Any) -> dict[str, Any]:
    """:func:`run_async` for callers without an event loop; `settings` are the fields of :class:`Load`."""
    return asyncio.run(run_async(Load(url, **settings)))


async def _run(load: Load, client: Client) -> dict[str, Any]:
    model = load.model
    if model is None:
        try:
            model = str(json.loads(await client.fetch("GET", "/v1/models"))["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{load.url}/v1/models names no model; give --model") from error
    try:
        version = json.loads(await client.fetch("GET", "/version")).get("version")
    except (Refused, ValueError, AttributeError):
        version = None
    prompts = await _prompts(load, client, model)
    rng = random.Random(load.seed + 1)
    for i in range(load.warmup):
        trial = Result(-1)
        await _one(load, client, trial, prompts.body(i), None, "")
        if trial.kind != "ok":
            raise UserError(f"the first request failed ({trial.kind}): {trial.detail or 'without a reason'}")

    limit = load.concurrency or (8 if math.isinf(load.request_rate) else load.requests)
    room, results = asyncio.Semaphore(limit), [Result(i) for i in range(load.requests)]
    open_now = peak = 0

    async def send(result: Result, *what: Any) -> None:
        nonlocal open_now, peak
        open_now += 1
        peak = max(peak, open_now)
        try:
            await _one(load, client, result, *what)
        finally:
            open_now -= 1
            room.release()

    before = await _counters(client)
    health: list[float] = []
    lag: list[float] = []
    unhealthy: Counter = Counter()
    probe = asyncio.create_task(_probe(load, client, health, unhealthy, lag)) if load.health_every else None
    kinds_of_wrong = itertools.cycle(MALFORMED)
    cpu, began = time.process_time(), time.perf_counter()
    due = began
    try:
        async with asyncio.TaskGroup() as group:
            for result in results:
                if not math.isinf(load.request_rate):
                    due += rng.expovariate(load.request_rate)
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                body, fate, wrong, cut = prompts.body(result.index), rng.random(), "", None
                if fate < load.malformed_fraction:
                    wrong = next(kinds_of_wrong)
                elif fate < load.malformed_fraction + load.disconnect_fraction:
                    cut = rng.randrange(body["max_tokens"] + 1)
                await room.acquire()
                group.create_task(send(result, body, cut, wrong))
    finally:
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        if probe:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
    after = await _counters(client)
    out = _summary(results, seconds)
    out |= {
        "url": load.url,
        "model": model,
        "server_version": version,
        "settings": {
            name: value if not isinstance(value, float) or math.isfinite(value) else str(value)
            for name, value in vars(load).items()
            if name not in ("url", "prompts", "api_key")
        },
        "peak_concurrency": peak,
        "server": _server_side(before, after),
        "health_ms": quantiles(health),
        "health_probes": len(health),
        "health_failures": dict(unhealthy),
        "client_lag_ms": quantiles(lag),
        "client_cpu_share": cpu / seconds,
    }
    if load.keep_answers:
        out["results"] = results
    return out


def _summary(results: list[Result], seconds: float) -> dict[str, Any]:
    good = [result for result in results if result.kind == "ok"]
    kinds = Counter(result.kind for result in results)
    output, prompt = sum(result.output_tokens for result in good), sum(result.prompt_tokens for result in good)
    details = {result.kind: result.detail for result in results if result.detail and result.kind != "malformed"}
    return {
        "seconds": seconds,
        "requests": len(results),
        "ok": len(good),
        "disconnected": kinds.pop("disconnected", 0),
        "malformed_refused": kinds.pop("malformed", 0),
        "failures": {kind: count for kind, count in kinds.items() if kind != "ok"},
        "failure_examples": details,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (output + prompt) / seconds,
        "finish_reasons": dict(Counter(str(result.finish_reason) for result in good)),
        "ttft_ms": quantiles([result.ttft for result in good]),
        "itl_ms": quantiles([gap for result in good for gap in result.gaps]),
        "tpot_ms": quantiles(
            [(result.latency - result.ttft) / (result.output_tokens - 1) for result in good if result.output_tokens > 1]
        ),
        "e2e_ms": quantiles([result.latency for result in good]),
    }


# --------------------------------------------------------------------------------------------------------- the command


def describe(out: dict[str, Any]) -> str:
    """The numbers as a table for a person."""
    lines = [
        f"{out['model']} at {out['url']}: {out['ok']} of {out['requests']} answered in {out['seconds']:.1f} s, "
        f"at most {out['peak_concurrency']} at once",
        "",
        f"{'requests/s':<28}{out['requests_per_second']:>10.2f}",
        f"{'output tokens/s':<28}{out['output_tokens_per_second']:>10.1f}",
        f"{'tokens/s, prompt and output':<28}{out['total_tokens_per_second']:>10.1f}",
        f"{'prompt / output tokens':<28}{out['prompt_tokens']:>10,} / {out['output_tokens']:,}",
    ]
    server = out["server"]
    if "acceptance_length" in server:
        lines.append(f"{'acceptance length':<28}{server['acceptance_length']:>10.2f}")
    if "prefix_hit_rate" in server:
        lines.append(f"{'prefix cache hits':<28}{server['prefix_hit_rate']:>10.1%}")
    lines += ["", f"{'milliseconds':<28}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99", "max"))]
    rows = {
        "ttft_ms": "to the first token",
        "itl_ms": "between chunks",
        "tpot_ms": "for each later token",
        "e2e_ms": "whole request",
        "health_ms": "/health under the load",
        "client_lag_ms": "this generator's own delay",
    }
    for name, title in rows.items():
        if row := out[name]:
            lines.append(f"{title:<28}" + "".join(f"{value:>10.1f}" for value in row.values()))
    notes = [f"{out[name]} {title}" for name, title in _FATES.items() if out[name]]
    notes += [f"{count} failed: {kind}{_because(out, kind)}" for kind, count in out["failures"].items()]
    notes += [f"{count} health probes failed: {kind}" for kind, count in out["health_failures"].items()]
    return "\n".join([*lines, *([""] if notes else []), *notes])


_FATES = {"disconnected": "left by us midway", "malformed_refused": "malformed on purpose, and refused"}


def _because(out: dict[str, Any], kind: str) -> str:
    detail = out["failure_examples"].get(kind)
    return f" ({detail})" if detail else ""


def machine() -> dict[str, Any]:
    """What the numbers were measured on, besides the server's version."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def read_prompts(path: Path) -> list[Any]:
    """One prompt a line: text, or in a .jsonl file a string or an object with "prompt", "text" or "messages"."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    if not lines:
        raise UserError(f"{path} has no prompts")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error}") from error
        if isinstance(entry, dict):
            entry = {"prompt": entry["text"]} if "text" in entry else entry
            entry = {name: entry[name] for name in ("prompt", "messages", "max_tokens") if name in entry}
        if not entry or (isinstance(entry, dict) and not {"prompt", "messages"} & set(entry)):
            raise UserError(f'{path}: line {number} has neither "prompt" nor "text" nor "messages"')
        prompts.append(entry)
    return prompts


def serve_main(argv: list[str]) -> int:
    """`nemo-lite bench serve URL`."""
    import argparse

    from nemo_lite import __version__

    parser = argparse.ArgumentParser(
        prog="nemo-lite bench serve",
        description="Put load on an OpenAI server (this one, vLLM, llama.cpp, ...) and measure it: times to the first "
        "token and between tokens, throughput, acceptance of drafts, prefix hits, failures, /health under the load.",
    )
    parser.add_argument("url", metavar="URL", help="such as http://127.0.0.1:8000")
    add = parser.add_argument
    add("--requests", type=int, default=100, metavar="N", help="requests to send (default: 100)")
    add("--concurrency", type=int, metavar="C", help="requests at once (default: 8; with a rate, no limit)")
    add("--request-rate", type=float, default=math.inf, metavar="R", help="a second, Poisson (default: inf)")
    add("--input-len", type=int, default=128, metavar="TOKENS", help="of a random prompt (default: 128)")
    add("--output-len", type=int, default=64, metavar="TOKENS", help="max_tokens (default: 64)")
    add("--range-ratio", type=float, default=0.0, metavar="F", help="lengths vary by this share (default: 0)")
    add("--shared-prefix", type=int, default=0, metavar="TOKENS", help="before each random prompt, the same for all")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with prompt, text or messages")
    add("--endpoint", choices=["completions", "chat"], default="completions", help="(default: completions)")
    add("--model", help="(default: the first of /v1/models)")
    add("--ignore-eos", action="store_true", help="answers of full length (vLLM's field; ours too)")
    add("--temperature", type=float, default=0.0, metavar="T", help="(default: 0)")
    add("--seed", type=int, default=0, metavar="S", help="of lengths, prompts and arrivals (default: 0)")
    add("--disconnect-fraction", type=float, default=0.0, metavar="F", help="leave so many at a random point")
    add("--malformed-fraction", type=float, default=0.0, metavar="F", help="send so many that must be refused")
    add("--warmup", type=int, default=1, metavar="N", help="requests before the clock starts (default: 1)")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one request (default: 600)")
    add("--api-key", metavar="KEY", help="(default: $NEMO_LITE_API_KEY)")
    add("--json", type=Path, metavar="FILE", help="write machine, version, command and numbers; - prints them")
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "prompts")}
    settings["api_key"] = args.api_key or os.environ.get("NEMO_LITE_API_KEY")
    out = run_load(**settings, prompts=read_prompts(args.prompts) if args.prompts else None)
    hidden = ["***" if previous == "--api-key" else word for previous, word in itertools.pairwise(["", *argv])]
    body = {
        "command": " ".join(["nemo-lite", "bench", "serve", *hidden]),
        "version": __version__,
        "machine": machine(),
        **out,
    }
    if str(args.json) == "-":
        print(json.dumps(body))
    else:
        print(describe(out))
        if args.json:
            try:
                args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{args.json} could not be written: {error.strerror}") from error
    return 0 if out["ok"] or not out["failures"] else 1


def main(argv: list[str]) -> int:
    """`nemo-lite bench serve URL`."""
    kinds = {"serve": serve_main}
    if argv and argv[0] in kinds:
        return kinds[argv[0]](argv[1:])
    shown = bool(argv) and argv[0] in ("-h", "--help")
    text = "usage: nemo-lite bench serve URL [ARGUMENTS]\n\n  serve  load on an OpenAI server, measured"
    if shown:
        print(text)
        raise SystemExit(0)
    print(text if not argv else f"nemo-lite bench: error: {argv[0]}: there is only `serve`", file=sys.stderr)
    return 2
