"""`nemo-lite chat MODEL_DIR|URL`: talk to a model in the terminal.

There is one way to do it: over HTTP, to any OpenAI server. For a MODEL_DIR a server is started beside, on a free port
of this machine, and ended with the chat.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from nemo_lite.config import UserError

HELP = """\
/system TEXT          set the system prompt (without TEXT: none)
/think on|off|low     reason before the answer, or not (/think alone: the model's default)
/params key=value ... request fields, such as temperature=0.7 max_tokens=200 stop=["END"] (key= removes one)
/reset                forget the conversation
/help, /quit          Ctrl-C stops an answer, Ctrl-D ends"""
COMMANDS = ("/help", "/params", "/quit", "/reset", "/system", "/think")
ADDRESS = re.compile(r"https?://[\w.\[\]:-]+:(\d+)")
HISTORY = "~/.local/state/nemo-lite/chat_history"


class Failed(Exception):
    """A request went wrong; the text is a sentence. The chat goes on."""


# ------------------------------------------------------------------------------------------------- the server, by HTTP


@dataclass
class Remote:
    """An OpenAI server."""

    url: str
    api_key: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if not parts.hostname:
            raise UserError(f"{self.url} is not the address of a server; it looks like http://127.0.0.1:8000")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port, self._prefix = parts.port, parts.path.rstrip("/").removesuffix("/v1")

    @contextlib.contextmanager
    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        """The answer, if it is one of success. Leaving early drops the connection, which ends the work on it."""
        if self._tls:
            context = ssl.create_default_context()
            link = http.client.HTTPSConnection(self._host, self._port, timeout=self.timeout, context=context)
        else:
            link = http.client.HTTPConnection(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            link.request(method, self._prefix + path, None if body is None else json.dumps(body), headers)
            with link.getresponse() as answer:  # it holds the socket too
                if answer.status >= 400:
                    raise Failed(_sentence(answer))
                yield answer
        except TimeoutError as error:
            raise Failed(f"{self.url} was silent for {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{self.url} does not answer: {error or type(error).__name__}") from error
        finally:
            link.close()

    def models(self) -> list[dict[str, Any]]:
        with self.request("GET", "/v1/models") as answer:
            try:
                return list(json.loads(answer.read())["data"])
            except (ValueError, LookupError, TypeError) as error:
                raise Failed(f"{self.url} is no OpenAI server: /v1/models is not a list of models") from error

    def chat(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed chat completion."""
        with self.request("POST", "/v1/chat/completions", body) as answer:
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                try:
                    event = json.loads(data)
                except ValueError as error:
                    raise Failed(f"the server sent what is not JSON: {data[:80]!r}") from error
                if problem := event.get("error"):
                    raise Failed(str(problem.get("message") if isinstance(problem, dict) else problem))
                yield event
            raise Failed("the connection ended before the answer did; the server may have stopped")


def _sentence(answer: http.client.HTTPResponse) -> str:
    try:
        said = str(json.loads(answer.read())["error"]["message"])
    except (ValueError, LookupError, TypeError):
        said = f"the server answered {answer.status} {answer.reason}"
    wait = answer.headers.get("Retry-After")
    return f"{said} (try again in {wait} s)" if wait else said


@contextlib.contextmanager
def started(model_dir: str, arguments: list[str], notes: IO[str], program: list[str] | None = None) -> Iterator[str]:
    """Serve a MODEL_DIR on a free port for as long as the block runs; its URL."""
    program = program or [sys.executable, "-m", "nemo_lite", "serve"]
    child = subprocess.Popen(
        [*program, model_dir, "--host", "127.0.0.1", "--port", "0", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C stops an answer, not the server
    )
    last: deque[str] = deque(maxlen=20)
    found: list[str] = []
    settled = threading.Event()

    def read() -> None:  # to the end, so that the server never waits for a reader
        for line in child.stdout or ():
            last.append(line.rstrip())
            if not found and (address := ADDRESS.search(line)) and address[1] != "0":
                found.append(address[0])
                settled.set()
        settled.set()

    reader = threading.Thread(target=read, daemon=True)
    try:
        reader.start()
        print(f"starting a server for {model_dir} ...", file=notes, flush=True)
        settled.wait()
        if found:
            _wait_until_ready(found[0], child)
        if not found or child.poll() is not None:
            child.wait()
            reader.join(1)
            told = [line for line in last if line.strip()]
            error = next(
                (line for line in reversed(told) if "error: " in line), told[-1] if told else "it said nothing"
            )
            raise UserError(f"the server did not start: {error.split('error: ', 1)[-1]}")
        yield found[0]
    finally:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_until_ready(url: str, child: subprocess.Popen) -> None:
    """The address may be printed a moment before it answers."""
    while child.poll() is None:
        with contextlib.suppress(Failed), Remote(url, timeout=5).request("GET", "/health"):
            return
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- the conversation


@dataclass
class Chat:
    """A conversation, and what is asked for with each message."""

    remote: Remote
    model: str
    ours: bool = False  # the server is of this project and takes its extensions
    system: str | None = None
    think: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {"model": self.model, "messages": [*system, *self.messages], "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.ours:
            body["token_origins"] = True
        if self.think and self.ours:
            body["reasoning_effort"] = {"on": "medium", "low": "low", "off": "none"}[self.think]
        elif self.think:  # what vLLM and llama.cpp hand to the template
            low = {"low_effort": True} if self.think == "low" else {}
            body["chat_template_kwargs"] = {"enable_thinking": self.think != "off", **low}
        return body | self.params

    def ask(self, text: str, screen: Screen) -> None:
        """Send a message and show the answer. Ctrl-C ends the answer; what came of it is kept."""
        self.messages.append({"role": "user", "content": text})
        answer = Answer()
        try:
            with contextlib.closing(self.remote.chat(self.body())) as events:
                for event in events:
                    answer.take(event, screen)
        except KeyboardInterrupt:
            answer.finish = "stopped"
        finally:
            screen.end()
            if answer.text or answer.calls:
                self.messages.append(answer.message)
            else:
                self.messages.pop()  # no answer: as if it had not been asked
        screen.note(answer.summary())


class Answer:
    """One answer as it comes."""

    def __init__(self):
        self.text, self.calls, self.finish = "", {}, None
        self.usage: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self.start, self.first, self.last, self.chunks = time.perf_counter(), 0.0, 0.0, 0

    def take(self, event: dict[str, Any], screen: Screen) -> None:
        self.usage = event.get("usage") or self.usage
        self.counts = (event.get("nemo_lite") or {}).get("counts") or self.counts
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            thought, said = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
            if thought:
                screen.reasoning(thought)
            if said:
                self.text += said
                screen.answer(said)
            for part in delta.get("tool_calls") or []:
                self._take_call(part, screen)
            if thought or said or delta.get("tool_calls"):
                self.last = time.perf_counter()
                self.first, self.chunks = self.first or self.last, self.chunks + 1
            self.finish = choice.get("finish_reason") or self.finish

    def _take_call(self, part: dict[str, Any], screen: Screen) -> None:
        called = part.get("function") or {}
        call = self.calls.get(part.get("index", 0))
        if call is None:
            call = {"id": part.get("id"), "type": "function", "function": {"name": "", "arguments": ""}}
            self.calls[part.get("index", 0)] = call
            screen.call(f"\ncall {called.get('name') or ''} ")
        call["function"]["name"] += called.get("name") or ""
        call["function"]["arguments"] += called.get("arguments") or ""
        screen.call(called.get("arguments") or "")

    @property
    def message(self) -> dict[str, Any]:
        calls = {"tool_calls": list(self.calls.values())} if self.calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    def summary(self) -> str:
        """What it cost, in a line."""
        tokens = self.usage.get("completion_tokens") or self.chunks
        parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if self.first:
            parts.append(f"first after {self.first - self.start:.2f} s")
        if tokens > 1 and self.last > self.first:
            parts.append(f"{(tokens - 1) / (self.last - self.first):.1f} tokens/s")
        if self.counts.get("verify_steps"):
            parts.append(f"acceptance length {1 + self.counts['accepted'] / self.counts['verify_steps']:.2f}")
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached:
            parts.append(f"{cached} of {self.usage.get('prompt_tokens')} prompt tokens cached")
        ends = {"length": "cut at the token limit", "tool_calls": "asks for a tool", "stopped": "stopped"}
        if self.finish in ends:
            parts.append(ends[self.finish])
        return ", ".join(parts)


# Of a model's text only what moves nothing but the cursor's line; a terminal would obey the rest.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Screen:
    """Where answers go. On a terminal reasoning is dim; otherwise only the answer and its tool calls are written."""

    def __init__(self, out: IO[str], terminal: bool, colour: bool):
        self.out, self.terminal, self.colour = out, terminal, colour
        self._style, self._last = "", "\n"

    def _write(self, text: str, style: str) -> None:
        if not text:
            return
        if style != self._style and self.colour:
            self.out.write(f"\x1b[0m{style}")
        self._style = style
        # A pipe gets the model's text as it is.
        self.out.write(_CONTROL.sub("�", text) if self.terminal else text)
        self.out.flush()
        self._last = text[-1]

    def reasoning(self, text: str) -> None:
        if self.terminal:
            self._write(text, "\x1b[2m")

    def answer(self, text: str) -> None:
        if self._style == "\x1b[2m" and self._last != "\n":
            self._write("\n\n", "")
        self._write(text, "")

    def call(self, text: str) -> None:
        self._write(text.lstrip("\n") if self._last == "\n" else text, "\x1b[36m")

    def end(self) -> None:
        """The answer is over: a fresh line, in the terminal's own colours."""
        self._write("" if self._last == "\n" else "\n", "")
        if self.colour:
            self.out.write("\x1b[0m")
        self._style, self._last = "", "\n"
        self.out.flush()

    def note(self, text: str) -> None:
        """A line beside the conversation; a pipe has none."""
        if self.terminal:
            self._write(f"{text}\n\n", "\x1b[2m")
            self.end()


# --------------------------------------------------------------------------------------------------------- the command


def parse_params(words: str) -> dict[str, Any]:
    """`key=value ...` as request fields: JSON where it is JSON, else text; None where the value is left out."""
    found: dict[str, Any] = {}
    decoder = json.JSONDecoder()
    rest = words.strip()
    while rest:
        match = re.match(r"(\w+)=", rest)
        if not match:
            raise Failed(f"{rest.split()[0]} is not key=value")
        rest = rest[match.end() :]
        try:
            value, end = decoder.raw_decode(rest)
            if end < len(rest) and not rest[end].isspace():
                raise ValueError
        except ValueError:
            end = re.match(r"\S*", rest).end()  # type: ignore[union-attr]
            value = rest[:end] or None
        found[match[1]] = value
        rest = rest[end:].lstrip()
    return found


def command(chat: Chat, line: str) -> str | None:
    """Obey a line that begins with a slash; what to say about it, or None to end."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return None
    if name == "/reset":
        chat.messages.clear()
        return "the conversation is forgotten"
    if name == "/system":
        chat.system = rest or None
        return "system prompt set" if rest else "no system prompt"
    if name == "/think":
        if rest not in ("", "on", "off", "low"):
            raise Failed(f"/think {rest}: it is on, off or low")
        chat.think = rest or None
        return f"thinking: {rest or 'the default of the model'}"
    if name == "/params":
        given = parse_params(rest)
        if own := set(given) & {"messages", "stream", "stream_options", "n"}:
            raise Failed(f"{sorted(own)[0]} is this program's own")
        chat.params = {key: value for key, value in (chat.params | given).items() if value is not None}
        return " ".join(f"{key}={json.dumps(value)}" for key, value in chat.params.items()) or "no parameters"
    if name == "/help":
        return HELP
    raise Failed(f"there is no {name}; /help lists what there is")


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Line editing, the commands on Tab, and the lines of earlier chats (readable by their owner only)."""
    try:
        import readline
    except ImportError:  # an interpreter built without it
        yield
        return
    path = Path(HISTORY).expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    readline.set_completer(lambda text, i: [*(name for name in COMMANDS if name.startswith(text)), None][i])
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def converse(chat: Chat, screen: Screen) -> None:
    """Read lines from the terminal until Ctrl-D or /quit."""
    while True:
        try:
            line = input("> " if screen.terminal else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                said = command(chat, line)
                if said is None:
                    return
                screen.note(said)
            else:
                chat.ask(line, screen)
        except Failed as problem:
            print(f"error: {problem}", file=sys.stderr)


def main(argv: list[str]) -> int:
    """`nemo-lite chat MODEL_DIR|URL`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="nemo-lite chat",
        description="Talk to a model: a MODEL_DIR, served for as long as the chat lasts, or any OpenAI server. Without "
        "a terminal one message is read from standard input and the answer is printed.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="MODEL_DIR|URL")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--think", choices=["on", "off", "low"], help="reason before the answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="(default: the server's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: the server's)")
    parser.add_argument("--model", help="(default: the first that the server names)")
    parser.add_argument("--api-key", metavar="KEY", help="of the server (default: $NEMO_LITE_API_KEY)")
    parser.add_argument("--speculative", choices=["mtp"], help="MODEL_DIR: draft with the model's own MTP block")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="MODEL_DIR: pack weights as they are read")
    parser.add_argument("--kernels", metavar="OP=NAME[,...]", help="MODEL_DIR: backends of ops (nemo-lite kernels)")
    args = parser.parse_args(argv)
    terminal = sys.stdin.isatty()
    key = args.api_key or os.environ.get("NEMO_LITE_API_KEY")
    with contextlib.ExitStack() as stack:
        if re.match(r"https?://", args.target):
            for flag in ("speculative", "quantization", "kernels"):
                if getattr(args, flag):
                    parser.error(f"--{flag} is for a MODEL_DIR; a server has its own")
            url = args.target
        elif Path(args.target).is_dir():
            arguments = ["--speculative", args.speculative] if args.speculative else []
            for flag in ("quantization", "kernels"):
                value = getattr(args, flag)
                arguments += [f"--{flag}", value] if value else []
            for hangup in (signal.SIGHUP, signal.SIGTERM):  # the server has a session of its own: it ends through us
                signal.signal(hangup, lambda number, _: sys.exit(128 + number))
            notes = sys.stderr if terminal else stack.enter_context(tempfile.TemporaryFile("w"))
            url, key = stack.enter_context(started(args.target, arguments, notes)), None
        else:
            raise UserError(f"{args.target} is neither a MODEL_DIR nor a URL such as http://127.0.0.1:8000")
        try:
            remote = Remote(url, key)
            models = remote.models()
            if not models and not args.model:
                raise Failed(f"{url} serves no model")
            model = args.model or str(models[0]["id"])
            ours = any(entry.get("owned_by") == "nemo_lite" for entry in models)
            params = {"temperature": args.temperature, "max_tokens": args.max_tokens}
            params = {name: value for name, value in params.items() if value is not None}
            chat = Chat(remote, model, ours, args.system, args.think, params)
            out_is_terminal = sys.stdout.isatty()
            screen = Screen(sys.stdout, out_is_terminal, out_is_terminal and "NO_COLOR" not in os.environ)
            if not terminal:
                text = sys.stdin.read().strip()
                if not text:
                    raise Failed("standard input is empty; give a message")
                chat.ask(text, screen)
                return 0
        except Failed as problem:
            raise UserError(str(problem)) from problem
        screen.note(f"{model} at {url}; /help lists the commands, Ctrl-D ends")
        stack.enter_context(history())
        converse(chat, screen)
    return 0
