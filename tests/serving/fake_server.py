"""A small OpenAI server with canned answers, for testing what talks to one. What the last message or prompt says
decides the answer: `slow`, `reason`, `tool`, `wrong` (a 400), `busy` (a 429), `break` (an error within the stream),
`cut` (the connection is dropped), `html` (text that must not become markup); all else gets the plain answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

WEB = Path(__file__).resolve().parents[2] / "serving" / "nemo_lite_serving" / "web"
ANSWER = [("The", 0), (" quick", 0), (" brown", 1), (" fox", 2), (" jumps", 0), (" over", 1), (" the", 2), (" dog", 3)]
THOUGHT = [("Let", 0), (" me", 1), (" see", 0), ("</think>", 0)]
HTML = [("<b id=injected>", 0), ("<img src=x onerror=alert(1)>", 0)]
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class FakeServer:
    """Serves from a thread of its own: `with FakeServer() as server: server.url`."""

    def __init__(self, *, key: str | None = None, delay: float = 0.0, extension: bool = True, metrics: bool = True):
        self.key, self.delay, self.extension, self.with_metrics = key, delay, extension, metrics
        self.requests: list[dict] = []  # bodies of completions and chats that were understood
        self.dropped = 0  # connections that the client left within an answer
        self.running = self.most_running = self.connections = 0
        self.drafts = self.accepted = self.prompt_tokens = self.hits = 0

    def __enter__(self) -> FakeServer:
        started = threading.Event()

        async def serve():
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await self.stop.wait()
            server.close()

        self.thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split()
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(writer, method, path.split("?")[0], headers, body)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer, method, path, headers, body):
        if method == "GET" and (path == "/" or path.startswith("/static/")):
            name = "index.html" if path == "/" else path.removeprefix("/static/")
            return self._send(writer, 200, (WEB / name).read_bytes(), TYPES[name.rsplit(".", 1)[1]])
        if path == "/health":
            return self._send(writer, 200, b"")
        if path == "/metrics" and self.with_metrics:
            return self._send(writer, 200, self._metrics().encode(), "text/plain")
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return self._error(writer, 401, "The API key is missing or wrong.")
        if path == "/v1/models":
            return self._json(writer, 200, {"data": [{"id": "tiny", "object": "model", "max_model_len": 512}]})
        if path == "/version":
            return self._json(writer, 200, {"version": "0.0-fake"})
        try:
            request = json.loads(body)
            assert isinstance(request, dict)
        except (ValueError, AssertionError):
            return self._error(writer, 400, "The request is not JSON.")
        if path == "/tokenize":
            return self._json(writer, 200, {"tokens": [len(word) for word in request["prompt"].split()]})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return self._error(writer, 404, f"There is no {path}.")
        if problem := self._problem(request):
            return self._error(writer, 400, problem)
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._complete(writer, request, chat=path == "/v1/chat/completions")
        finally:
            self.running -= 1

    def _problem(self, request) -> str | None:
        temperature, max_tokens = request.get("temperature", 1), request.get("max_tokens", 16)
        if not isinstance(max_tokens, int) or not 0 < max_tokens < 10**6:
            return "max_tokens: must be a positive integer."
        if not isinstance(temperature, (int, float)) or not 0 <= temperature <= 2:
            return "temperature: must be a number from 0 to 2."
        if request.get("model", "tiny") != "tiny":
            return f"model: {request['model']} is not served here; tiny is."
        if not isinstance(request.get("messages", []), list):
            return "messages: must be a list."
        return None

    async def _complete(self, writer, request, chat):
        asked = request["messages"][-1]["content"] if chat else request["prompt"]
        words = len(asked) if isinstance(asked, list) else len(asked.split())
        asked = asked if isinstance(asked, str) else ""
        if "wrong" in asked:
            return self._error(writer, 400, "The prompt has 600 tokens; this model takes 512.")
        if "busy" in asked:
            return self._error(writer, 429, "The queue is full.", ("Retry-After: 2",))
        tokens = [(text, depth, "content") for text, depth in (HTML if "html" in asked else ANSWER)]
        limit = request.get("max_tokens", 16)
        tokens = tokens * (limit // len(tokens) + 1) if request.get("ignore_eos") or "slow" in asked else tokens
        finish = "length" if len(tokens) > limit else "stop"
        tokens = tokens[:limit]
        if "reason" in asked:
            tokens = [(text, depth, "reasoning_content") for text, depth in THOUGHT] + tokens
        accepted = sum(depth > 0 for _, depth, _ in tokens)
        steps = max(1, len(tokens) - accepted - 1)
        self.drafts, self.accepted = self.drafts + steps, self.accepted + accepted
        self.prompt_tokens, self.hits = self.prompt_tokens + words, self.hits + words // 2
        usage = {"prompt_tokens": words, "completion_tokens": len(tokens), "total_tokens": words + len(tokens)}
        usage["prompt_tokens_details"] = {"cached_tokens": words // 2}
        calls = [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}]
        arguments = ['{"city": ', '"Oslo"}'] if chat and "tool" in asked else []
        if not request.get("stream"):
            message = {"role": "assistant", "content": "".join(text for text, _, kind in tokens if kind == "content")}
            choice = {
                "index": 0,
                "finish_reason": finish,
                **({"message": message} if chat else {"text": message["content"]}),
            }
            return self._json(writer, 200, {"choices": [choice], "usage": usage})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        origins = self.extension and request.get("token_origins")

        async def event(body):
            data = b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"
            try:
                writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                await writer.drain()
                await asyncio.sleep(0.05 if "slow" in asked else self.delay)
                if writer.transport.is_closing():
                    raise ConnectionResetError
            except ConnectionError:
                self.dropped += 1
                raise

        async def part(delta, told=(), finish=None):
            choice = {"index": 0, "finish_reason": finish}
            choice |= {"delta": delta} if chat else {"text": delta.get("content", "")}
            extra = {"nemo_lite": {"tokens": [list(token) for token in told]}} if origins and told else {}
            await event({"choices": [choice], "usage": None} | extra)

        if chat:
            await part({"role": "assistant", "content": ""})
        for i, (text, depth, kind) in enumerate(tokens):
            if i == 3 and "break" in asked:
                await event({"error": {"message": "The engine ended while it answered.", "code": 500}})
                break
            if i == 3 and "cut" in asked:
                writer.transport.abort()
                return
            # A tag is a token without a place in the text.
            await part({kind: text} if text != "</think>" else {}, [(text, depth)])
        if arguments:
            await part({"tool_calls": calls})
            for piece in arguments:
                await part({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}, [(piece, 0)])
            finish = "tool_calls"
        await part({}, finish=finish)
        counts = {"prompt_tokens": words, "cached_tokens": words // 2, "new_tokens": len(tokens), "accepted": accepted}
        counts |= {"drafted": 3 * steps, "accepted_at": [accepted], "verify_steps": steps}
        await event({"choices": [], "usage": usage} | ({"nemo_lite": {"counts": counts}} if origins else {}))
        await event(b"[DONE]")
        writer.write(b"0\r\n\r\n")

    def _metrics(self) -> str:
        names = {
            "spec_decode_num_drafts": self.drafts,
            "spec_decode_num_draft_tokens": 3 * self.drafts,
            "spec_decode_num_accepted_tokens": self.accepted,
            "prefix_cache_queries": self.prompt_tokens,
            "prefix_cache_hits": self.hits,
        }
        lines = [
            f'# TYPE vllm:{name} counter\nvllm:{name}_total{{model_name="tiny"}} {n}.0' for name, n in names.items()
        ]
        return "\n".join(lines) + f"\nvllm:prefix_cache_queries_created {time.time()}\n"

    def _json(self, writer, status, body, extra=()):
        self._send(writer, status, json.dumps(body).encode(), "application/json", extra)

    def _error(self, writer, status, message, extra=()):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
        self._json(writer, status, {"error": error}, extra)

    def _send(self, writer, status, body, kind="text/plain", extra=()):
        head = [f"HTTP/1.1 {status} {REASONS[status]}", f"Content-Type: {kind}; charset=utf-8"]
        head += [f"Content-Length: {len(body)}", "Content-Security-Policy: default-src 'self'", *extra, "", ""]
        writer.write("\r\n".join(head).encode() + body)


if __name__ == "__main__":
    with FakeServer(delay=0.03) as fake:
        print(fake.url, flush=True)
        threading.Event().wait()
