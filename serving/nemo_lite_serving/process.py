"""The engine in a process of its own, so that the API answers while it computes.

The child is a fresh interpreter at the other end of a socket pair. What crosses is pickled and framed by its length:
to the engine ("add", Request), ("abort", id), ("check", None), ("shutdown", None); from it ("ready", EngineInfo) or
("failed", sentence) once, ("refused", Output) for a request that cannot run, ("checked", dict), and ("step", (outputs,
stats or None)) once a step. Each side sees the other's death as the end of the stream, kill -9 included.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import psutil

from nemo_lite.config import UserError
from nemo_lite_serving.protocol import EngineInfo, EngineOptions, EngineStats, Output, Request

if TYPE_CHECKING:
    from nemo_lite_serving.engine import Engine

FACTORY = "nemo_lite_serving.engine:build"
STATS_EVERY = 0.1  # seconds between the statistics of a busy engine
END_SECONDS = 3.0  # an engine that was asked to end has this long, then it is killed
QUICK_DEATH = 30.0  # an engine that lived for less died quickly
QUICK_DEATHS = 3  # as many in a row, and it is not started again

log = logging.getLogger(__name__)


class EngineDead(RuntimeError):
    """There is no engine to run the request, or no longer; the message is one sentence."""


class _ParentGone(Exception):
    """Nobody reads what the engine says."""


# ----------------------------------------------------------------------------------------------------------- the stream

_SIZE = struct.Struct("<Q")


def _pack(message: tuple[str, Any]) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _SIZE.pack(len(body)) + body


class _Frames:
    """Bytes as they come in, whole messages out."""

    def __init__(self):
        self._data = bytearray()

    def feed(self, chunk: bytes) -> list[tuple[str, Any]]:
        data, messages, start = self._data, [], 0
        data += chunk
        while len(data) >= start + _SIZE.size:
            end = start + _SIZE.size + _SIZE.unpack_from(data, start)[0]
            if len(data) < end:
                break
            messages.append(pickle.loads(data[start + _SIZE.size : end]))
            start = end
        del data[:start]
        return messages


class EngineEnd:
    """The engine's end of the stream: it blocks, and looks for messages without blocking."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(True)
        self._sock, self._frames, self._poll = sock, _Frames(), select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, *message: Any) -> None:
        try:
            self._sock.sendall(_pack(message))  # type: ignore[arg-type]
        except OSError as error:
            raise _ParentGone from error

    def receive(self, wait: bool) -> list[tuple[str, Any]]:
        """All messages that are there; with `wait` at least one."""
        messages = []
        while (wait and not messages) or self._poll.poll(0):
            try:
                chunk = self._sock.recv(1 << 18)
            except OSError as error:
                raise _ParentGone from error
            if not chunk:
                raise _ParentGone
            messages += self._frames.feed(chunk)
        return messages

    def close(self) -> None:
        self._sock.close()


# ---------------------------------------------------------------------------------------------------- the engine's side


def engine_main(conn: EngineEnd, factory: str, options: EngineOptions) -> int:
    """Build the engine and run it until the parent ends it or goes away; returns the exit code."""
    module, function = factory.split(":")
    try:
        try:
            engine = getattr(importlib.import_module(module), function)(options)
        except UserError as error:
            conn.send("failed", str(error))
            return 1
        gc.collect()
        gc.freeze()  # what is there now stays: no later collection is to look through it in the midst of a step
        return run_engine(conn, engine)
    except _ParentGone:
        return 0


def run_engine(conn: EngineEnd, engine: Engine) -> int:
    """The loop: take what is asked, step, tell. One message out per step, so that its cost does not grow with rows."""
    running: set[str] = set()
    told = 0.0
    try:
        conn.send("ready", engine.info)
        while True:
            for kind, body in conn.receive(wait=not engine.has_work):
                if kind == "add":
                    try:
                        engine.add(body)
                        running.add(body.id)
                    except UserError as error:
                        conn.send("refused", Output(body.id, finish_reason="error", error=str(error)))
                elif kind == "abort":
                    engine.abort(body)
                    running.discard(body)
                elif kind == "check":
                    conn.send("checked", _checked(engine))
                else:
                    return 0
            outputs = engine.step() if engine.has_work else []
            for output in outputs:
                if output.finish_reason is not None:
                    running.discard(output.id)
            now, stats = time.monotonic(), None
            if now - told >= STATS_EVERY or not engine.has_work:  # what an idle engine tells last must be true
                stats, told = engine.stats(), now
            if outputs or stats is not None:
                conn.send("step", (outputs, stats))
    except _ParentGone:
        return 0
    except Exception as error:
        # The engine's state can no longer be trusted: tell the requests, and leave it to the parent to start afresh.
        traceback.print_exc()
        sentence = f"the engine failed with {type(error).__name__}: {error}"
        with contextlib.suppress(_ParentGone):  # then there is nobody to tell
            conn.send("step", ([Output(id, finish_reason="error", error=sentence) for id in sorted(running)], None))
        return 1


def _checked(engine: Engine) -> dict[str, Any]:
    """Whether the engine's books agree, and what they say."""
    error = None
    try:
        engine.check()
    except AssertionError as problem:
        error = str(problem)
    blocks, scheduler = engine.blocks, engine.scheduler
    return {
        "ok": error is None,
        "error": error,
        "free_blocks": len(blocks.free_blocks),
        "num_blocks": blocks.num_blocks,
        "free_slots": len(blocks.free_slots),
        "num_slots": blocks.num_slots,
        "snapshots": len(blocks.snapshots),
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "rss": psutil.Process().memory_info().rss,
    }


def child() -> None:
    """The child process: `python -c ... FD`; what to run is the first message."""
    # The server decides when the engine ends: Ctrl-C and a service manager's SIGTERM reach the whole group at once, and
    # running requests are to be finished. The end of the server is the end of the stream.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)

    def end_with_parent() -> None:
        poll = select.poll()
        poll.register(sock, 0)  # hang-up only: sleeps until the parent has closed its end, even during a long step
        poll.poll()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    conn = EngineEnd(sock)
    try:
        ((_, (factory, options)),) = conn.receive(wait=True)
    except _ParentGone:
        os._exit(0)
    code = engine_main(conn, factory, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing is left to save, and libraries' clean-up must not hold up a restart


# ---------------------------------------------------------------------------------------------- what the engine runs in

_HELD_BACK = {signal.SIGINT, signal.SIGTERM}


class _Worker(Protocol):
    @property
    def pid(self) -> int | None: ...

    @property
    def greeting(self) -> bytes:
        """What it waits for before it loads."""
        ...

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it has not ended by then."""
        ...

    def kill(self) -> None: ...


class _Process:
    """A fresh interpreter: nothing of the server's threads, locks and signal handlers is in it."""

    def __init__(self, theirs: socket.socket, factory: str, options: EngineOptions):
        program = "from nemo_lite_serving.process import child; child()"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # Held back, not ignored: a Ctrl-C between here and the child's own handlers reaches neither too early.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.pid = self._popen.pid
        self.greeting = _pack(("start", (factory, options)))

    def wait(self, seconds: float) -> int | None:
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self._popen.kill()


class _Thread:
    """A thread of this process around an engine that is there already; it cannot be killed, only asked."""

    pid = None
    greeting = b""

    def __init__(self, theirs: socket.socket, engine: Engine):
        self._code: int | None = None
        conn = EngineEnd(theirs)

        def run() -> None:
            try:
                self._code = run_engine(conn, engine)
            finally:
                conn.close()

        self._thread = threading.Thread(target=run, daemon=True, name="engine")
        self._thread.start()

    def wait(self, seconds: float) -> int | None:
        self._thread.join(seconds)
        return None if self._thread.is_alive() else self._code

    def kill(self) -> None:
        return None


# ------------------------------------------------------------------------------------------------------- the API's side


class _Link(asyncio.Protocol):
    """The API's end of the stream to one engine; asyncio's transport buffers what a busy engine has yet to read."""

    transport: asyncio.Transport | None = None

    def __init__(self, client: EngineClient, worker: _Worker):
        self.client, self.worker = client, worker
        self.ready: asyncio.Future[EngineInfo | Exception] = asyncio.get_running_loop().create_future()
        self.checks: deque[asyncio.Future[dict[str, Any]]] = deque()  # answered in turn
        self._frames = _Frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.worker.greeting)

    def data_received(self, data: bytes) -> None:
        for kind, body in self._frames.feed(data):
            if kind == "step":
                self.client._on_step(self, *body)
            elif kind == "refused":
                self.client._put(body.id, UserError(body.error))
            elif kind == "checked":
                check = self.checks.popleft()
                if not check.done():  # cancelled
                    check.set_result(body)
            elif not self.ready.done():
                self.ready.set_result(body if kind == "ready" else UserError(body))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_result(EngineDead("the engine ended while it was loading; the reason stands above"))
        for check in self.checks:
            if not check.done():
                check.set_exception(EngineDead("the engine ended before it answered"))
        self.client._on_lost(self)

    def send(self, kind: str, body: Any = None) -> None:
        assert self.transport is not None
        self.transport.write(_pack((kind, body)))

    async def end(self, seconds: float = 0.0) -> int | None:
        """Wait so long for the engine to end by itself, then kill it; returns its exit code."""
        try:
            code = await asyncio.to_thread(self.worker.wait, seconds)
        finally:  # a wait that is cancelled leaves no process behind either
            self.worker.kill()
            if self.transport is not None:
                self.transport.abort()
        return await asyncio.to_thread(self.worker.wait, END_SECONDS) if code is None else code


class EngineClient:
    """An engine process, seen from the event loop of the API. Make one with `await EngineClient.start(...)`.

    When the engine dies, all its requests raise EngineDead. With on_death="restart" a new one is then started, unless
    it dies quickly several times in a row; with "exit", and when restarting is given up, `on_exit` is called with a
    sentence, so that the server can end.
    """

    info: EngineInfo

    def __init__(
        self,
        launch: Callable[[socket.socket], _Worker],
        on_death: Literal["restart", "exit"],
        on_exit: Callable[[str], None] | None,
        ready_timeout: float,
        backoff: float,
    ):
        self.on_exit = on_exit
        self.restarts = 0
        self._launch, self._on_death, self._ready_timeout, self._backoff = launch, on_death, ready_timeout, backoff
        self._link: _Link | None = None
        self._lost: _Link | None = None  # the last that died
        self._stats = EngineStats()
        self._streams: dict[str, asyncio.Queue[Output | Exception]] = {}
        self._drained = asyncio.Event()
        self._closing = False
        self._absence = "the engine is not running"
        self._ready_at = 0.0
        self._quick_deaths = 0
        self._revival: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        options: EngineOptions,
        factory: str = FACTORY,
        on_death: Literal["restart", "exit"] = "restart",
        on_exit: Callable[[str], None] | None = None,
        ready_timeout: float = 1800.0,
        backoff: float = 1.0,
    ) -> EngineClient:
        """Start an engine process and wait until it is ready; UserError if it cannot be, EngineDead if it crashed."""
        client = cls(lambda theirs: _Process(theirs, factory, options), on_death, on_exit, ready_timeout, backoff)
        await client._connect()
        return client

    @property
    def alive(self) -> bool:
        """Whether an engine is ready and running."""
        return self._link is not None

    @property
    def pid(self) -> int | None:
        return self._link.worker.pid if self._link else None

    @property
    def in_flight(self) -> int:
        """Requests that were submitted and are not finished."""
        return len(self._streams)

    def stats(self) -> EngineStats:
        """The latest known, at most about a tenth of a second old; zeros while there is no engine."""
        return self._stats

    async def check(self) -> dict[str, Any]:
        """The engine's books (free blocks, slots, ...; `ok`: they agree) and its memory: for tests of leaks."""
        if self._link is None:
            raise EngineDead(self._absence)
        answer = asyncio.get_running_loop().create_future()
        self._link.checks.append(answer)
        self._link.send("check")
        return await answer

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """The request's outputs up to the one with a finish_reason. Ids are never used twice.

        Closing or cancelling the iterator aborts the request. UserError if the engine refuses it, EngineDead if there
        is no engine or it dies.
        """
        if self._closing or self._link is None:
            raise EngineDead("the server is shutting down" if self._closing else self._absence)
        if request.id in self._streams:
            raise UserError(f"a request with the id {request.id} is running already")
        link, queue = self._link, asyncio.Queue[Output | Exception]()
        self._streams[request.id] = queue  # holds no more than the request's own tokens
        link.send("add", request)
        finished = False
        try:
            while not finished:
                item = await queue.get()
                finished = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            del self._streams[request.id]
            if not finished and link is self._link:
                link.send("abort", request.id)
            if not self._streams:
                self._drained.set()

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests, give the running ones `grace` seconds, then end them and the engine."""
        self._closing = True
        if self._revival is not None:
            self._revival.cancel()
            await asyncio.wait([self._revival])
        if self._lost is not None:
            await self._lost.end(1.0)
        if self._streams and self._link is not None:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):  # what is left after the grace period is ended below
                await asyncio.wait_for(self._drained.wait(), grace)
        self._fail_streams("the server is shutting down")
        if self._link is not None:
            link, self._link = self._link, None
            for id in self._streams:
                link.send("abort", id)
            link.send("shutdown")
            await link.end(END_SECONDS)

    def kill(self) -> None:
        """End the engine process now."""
        self._closing = True
        if self._link is not None:
            self._link.worker.kill()

    async def _connect(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            link = _Link(self, self._launch(theirs))
        except OSError:
            ours.close()
            raise
        try:
            async with asyncio.timeout(self._ready_timeout):
                await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
                answer = await link.ready
        except BaseException as error:  # cancelled while it loads, too
            await link.end()
            if isinstance(error, TimeoutError):
                raise EngineDead(f"the engine was not ready after {self._ready_timeout:g} seconds") from None
            raise
        if isinstance(answer, Exception):
            await link.end(END_SECONDS)
            raise answer
        self.info, self._link, self._ready_at = answer, link, time.monotonic()

    def _put(self, id: str, item: Output | Exception) -> None:
        queue = self._streams.get(id)
        if queue is not None:  # else aborted, and the engine did not know yet
            queue.put_nowait(item)

    def _on_step(self, link: _Link, outputs: list[Output], stats: EngineStats | None) -> None:
        for output in outputs:
            self._put(output.id, output)
        if stats is not None and (link is self._link or self._link is None):
            self._stats = stats

    def _on_lost(self, link: _Link) -> None:
        if link is not self._link:  # ended on purpose, or while loading, where _connect tells
            return
        self._link, self._lost = None, link
        self._stats = EngineStats()
        self._absence = "the engine died and is being started again; try again later"
        if self._on_death == "exit":
            self._absence = "the engine died and the server is shutting down"
        self._fail_streams("the engine died while the request was running")
        if not self._closing:
            self._revival = asyncio.create_task(self._after_death(link))

    def _fail_streams(self, sentence: str) -> None:
        for queue in self._streams.values():
            queue.put_nowait(EngineDead(sentence))

    async def _after_death(self, link: _Link) -> None:
        quick = self._quick_deaths + 1 if time.monotonic() - self._ready_at < QUICK_DEATH else 1
        sentence = f"the engine process {_how(await link.end(1.0))}"
        while self._on_death == "restart" and quick < QUICK_DEATHS:
            self._quick_deaths = quick
            delay = self._backoff * 2 ** (quick - 1)
            log.warning("%s; starting it again in %g s", sentence, delay)
            await asyncio.sleep(delay)
            try:
                await self._connect()
            except (UserError, EngineDead, OSError) as error:
                sentence, quick = str(error), quick + 1
            else:
                self.restarts += 1
                log.warning("the engine is ready again")
                return
        if self._on_death == "restart":
            sentence += f"; it died {quick} times in a row and is not started again"
            self._absence = "the engine died and is not started again"
        log.error("%s", sentence)
        if self.on_exit is not None:
            self.on_exit(sentence)


class LocalEngine(EngineClient):
    """The same around an Engine object, in a thread of this process: for tests and for embedding."""

    @classmethod
    async def start(cls, engine: Engine, on_exit: Callable[[str], None] | None = None) -> LocalEngine:  # type: ignore[override]
        client = cls(lambda theirs: _Thread(theirs, engine), "exit", on_exit, 60.0, 0.0)
        await client._connect()
        return client


def _how(code: int | None) -> str:
    if code is None:
        return "does not answer and cannot be ended"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
