"""The engine process and its client: what streams, what is aborted, and that no death of either side leaves a wait."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import psutil
import pytest
from fake_engine import DRAFTED, EXIT, RAISE, REFUSE, FakeEngine
from nemo_lite_serving import process
from nemo_lite_serving.process import EngineClient, EngineDead, EngineEnd, LocalEngine
from nemo_lite_serving.protocol import EngineOptions, Output, Request

from nemo_lite.config import UserError

TESTS = Path(__file__).parents[1]
SECONDS = 60.0  # no wait lasts longer; nearly all end in milliseconds


@pytest.fixture(autouse=True)
def others():
    """Other tests' processes, such as a fork server that lives as long as the session."""
    OTHERS.clear()
    OTHERS.update(psutil.Process().children())


OTHERS: set[psutil.Process] = set()


def children() -> set[psutil.Process]:
    """What this test has started and is still there."""
    return set(psutil.Process().children()) - OTHERS


def options(**how):
    return EngineOptions(json.dumps(how), max_num_seqs=4)


async def start(on_death="restart", **how):
    return await EngineClient.start(options(**how), "fake_engine:build", on_death, ready_timeout=SECONDS, backoff=0.01)


def run(coroutine):
    async def limited():
        async with asyncio.timeout(SECONDS):
            return await coroutine

    return asyncio.run(limited())


async def collect(client, id="a", prompt=(5,), max_tokens=4, **more):
    outputs = [output async for output in client.generate(Request(id, list(prompt), max_tokens=max_tokens, **more))]
    return [token for output in outputs for token in output.tokens], outputs


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


async def ended(pid):
    """No process with this id; a zombie would be one."""
    await until(lambda: not psutil.pid_exists(pid))


def test_streams_refusals_aborts_and_a_graceful_end():
    async def body():
        client = await start()
        assert client.alive and client.info.vocab_size == fake_engine.VOCABULARY and client.pid != os.getpid()

        tokens, outputs = await collect(client)
        assert tokens == [6, 7, 8, 9]
        assert [output.finish_reason for output in outputs] == [None, None, None, "length"]
        assert outputs[-1].counts.new_tokens == 4 and outputs[0].counts is None

        # Many at once, more than run together: each gets its own tokens in order.
        answers = await asyncio.gather(*(collect(client, f"m{i}", (i,), 20) for i in range(40)))
        assert [tokens for tokens, _ in answers] == [[(i + 1 + k) % 1000 for k in range(20)] for i in range(40)]
        tokens, outputs = await collect(client, "spec", (DRAFTED,), 7)
        assert [output.depths for output in outputs] == [[1, 2, 0], [1, 2, 0], [0]]

        with pytest.raises(UserError, match=r"^the prompt is refused, as asked$"):
            await collect(client, "no", (REFUSE,))
        assert client.in_flight == 0

        # A long prompt arrives whole while short ones run beside it.
        long, short = await asyncio.gather(
            collect(client, "long", (0,) * 1_000_000, 2), collect(client, "short", (1,), 3)
        )
        assert long[0] == [1, 2] and short[0] == [2, 3, 4]

        # Closing the iterator and cancelling its task abort; the engine stops working on them.
        stream = client.generate(Request("closed", [1], max_tokens=10**9))
        await anext(stream)
        task = asyncio.create_task(collect(client, "cancelled", (1,), 10**9))
        await until(lambda: client.stats().running == 2)
        await stream.aclose()
        await until(lambda: client.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: client.stats().running == 0)
        assert client.in_flight == 0 and client.alive

        # The grace period: a request that ends within it does, one that does not is told, and the child ends.
        pid = client.pid
        brief = asyncio.create_task(collect(client, "brief", (1,), 3000))
        await until(lambda: client.in_flight == 1)
        await client.close(grace=SECONDS)
        assert len((await brief)[0]) == 3000
        assert not client.alive
        with pytest.raises(EngineDead, match="shutting down"):
            await collect(client, "late")
        await ended(pid)

    run(body())


def test_a_check_ends_with_its_engine(tmp_path):
    hold = tmp_path / "hold"

    async def body():
        client = await start("exit", hold=str(hold))
        hold.touch()
        request = asyncio.create_task(collect(client))
        await until(Path(f"{hold}.held").exists)  # it cannot read now
        check = asyncio.create_task(client.check())
        await asyncio.sleep(0)
        os.kill(client.pid, signal.SIGKILL)
        for task in (request, check):
            with pytest.raises(EngineDead):
                await task
        with pytest.raises(EngineDead):
            await client.check()
        await client.close()

    run(body())


def test_grace_has_an_end(tmp_path):
    hold = tmp_path / "hold"

    async def body():
        client = await start(hold=str(hold))
        pid = client.pid
        hold.touch()
        endless = asyncio.create_task(collect(client, "endless"))
        await until(lambda: client.in_flight == 1)
        # The engine sits in its step and cannot read: it is killed.
        begin = time.monotonic()
        process_end, process.END_SECONDS = process.END_SECONDS, 0.2
        await client.close(grace=0.05)
        process.END_SECONDS = process_end
        assert time.monotonic() - begin < 5
        with pytest.raises(EngineDead, match="shutting down"):
            await endless
        await ended(pid)
        await client.close()  # again is fine

    run(body())


def test_a_probe_is_answered_while_a_step_is_held_open(tmp_path):
    hold = tmp_path / "hold"

    async def body():
        client = await start(hold=str(hold))
        hold.touch()
        held = asyncio.create_task(collect(client))
        aborted = asyncio.create_task(collect(client, "aborted"))
        await until(lambda: client.in_flight == 2)
        delays = []
        for _ in range(20):
            begin = time.monotonic()
            await asyncio.sleep(0)
            assert client.alive
            client.stats()
            delays.append(time.monotonic() - begin)
        assert sorted(delays)[10] < 0.1
        aborted.cancel()  # does not wait for the step
        with pytest.raises(asyncio.CancelledError):
            await aborted
        assert not held.done()
        hold.unlink()
        assert (await held)[0] == [6, 7, 8, 9]
        await client.close()

    run(body())


def test_kill_9_restarts_and_every_request_hears_of_it(tmp_path, caplog):
    hold = tmp_path / "hold"

    async def body():
        client = await start("restart", hold=str(hold))
        hold.touch()
        first = client.pid
        requests = [asyncio.create_task(collect(client, f"r{i}")) for i in range(10)]
        await until(lambda: client.in_flight == 10)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(5):
            for error in await asyncio.gather(*requests, return_exceptions=True):
                assert isinstance(error, EngineDead) and "died" in str(error)
        assert not client.alive and client.in_flight == 0 and client.stats().running == 0
        with pytest.raises(EngineDead, match="being started again"):
            await collect(client, "meanwhile")
        hold.unlink()
        await until(lambda: client.alive)
        assert client.pid != first and client.restarts == 1
        assert (await collect(client, "after"))[0] == [6, 7, 8, 9]

        # An engine that ends in the middle of a step is the same thing.
        with pytest.raises(EngineDead):
            await collect(client, "exit", (EXIT,))
        assert not client.alive
        await client.close()  # while it is being started again
        assert not children()

    with caplog.at_level(logging.WARNING, process.__name__):
        run(body())
    assert "the engine process was ended by SIGKILL; starting it again" in caplog.text


def test_exceptions_end_requests_and_the_process(capfd):
    async def body():
        ends = []
        client = await start("exit")
        client.on_exit = ends.append
        pid = client.pid
        outputs = (await collect(client, "bad", (RAISE,), 3))[1]
        assert [output.finish_reason for output in outputs] == [None, None, "error"]
        assert outputs[-1].error == "the engine failed with RuntimeError: raised, as asked"
        await until(lambda: ends)
        assert ends == ["the engine process ended with exit code 1"]
        assert not client.alive
        with pytest.raises(EngineDead, match="shutting down"):
            await collect(client, "late")
        await ended(pid)
        await client.close()

    run(body())
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"refuse": "x/config.json: no such file"}, UserError, r"^x/config.json: no such file$"),
        ({"crash": True}, EngineDead, "ended while it was loading"),
    ],
)
def test_a_load_that_fails(how, error, message):
    with pytest.raises(error, match=message):
        run(start(**how))
    assert not children()


def test_a_load_that_takes_too_long_or_is_cancelled():
    async def body():
        with pytest.raises(EngineDead, match=r"not ready after 0\.01 seconds"):
            await EngineClient.start(options(), "fake_engine:build", ready_timeout=0.01)
        task = asyncio.create_task(start())
        await until(lambda: children())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not children())

    run(body())


def test_the_child_ends_with_its_parent(tmp_path):
    """Even when the parent is killed and the child sits in a step."""
    hold = tmp_path / "hold"
    hold.touch()
    program = f"""
import asyncio, os, sys
from nemo_lite_serving.process import EngineClient
from nemo_lite_serving.protocol import EngineOptions, Request
async def main():
    client = await EngineClient.start(EngineOptions({options(hold=str(hold)).model_dir!r}), "fake_engine:build")
    stream = client.generate(Request("a", [1]))
    task = asyncio.ensure_future(anext(stream))
    while not client.in_flight:
        await asyncio.sleep(0)
    print(client.pid, flush=True)
    await task
asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        for number in (signal.SIGINT, signal.SIGTERM):  # those are the parent's to handle
            child.send_signal(number)
        time.sleep(0.1)
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        parent.kill()
    # An orphan is reaped by init, or stays a zombie where there is none.
    end = time.monotonic() + SECONDS
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------ in a thread of this process


def test_a_local_engine_is_the_same():
    async def body():
        engine = FakeEngine(options())
        client = await LocalEngine.start(engine)
        assert (await collect(client))[0] == [6, 7, 8, 9]
        engine.open.clear()
        stream = client.generate(Request("closed", [1], max_tokens=10))
        first = asyncio.create_task(anext(stream))
        await until(lambda: engine.has_work)
        first.cancel()
        engine.open.set()
        await until(lambda: engine.aborted == ["closed"] and not engine.has_work)
        left = asyncio.create_task(collect(client, "left", (1,), 10**9))
        await until(lambda: client.stats().running == 1)
        await client.close(grace=0.01)
        with pytest.raises(EngineDead):
            await left
        assert engine.aborted == ["closed", "left"] and not engine.has_work

    run(body())


def test_a_local_engine_that_fails(capfd):
    async def body():
        ends = []
        client = await LocalEngine.start(FakeEngine(options()), on_exit=ends.append)
        outputs = (await collect(client, "bad", (RAISE,), 1))[1]
        assert outputs[-1].finish_reason == "error"
        await until(lambda: ends)
        assert not client.alive
        await client.close()

    run(body())
    assert "raised, as asked" in capfd.readouterr().err


def test_a_slow_reader_holds_up_nobody():
    async def body():
        client = await LocalEngine.start(FakeEngine(options()))
        slow = client.generate(Request("slow", [0], max_tokens=500))
        await anext(slow)
        assert len((await collect(client, "quick", (0,), 1000))[0]) == 1000
        assert client._streams["slow"].qsize() == 499  # its own tokens and no more
        rest = [token async for output in slow for token in output.tokens]
        assert rest == [(2 + i) % 1000 for i in range(499)]
        await client.close()

    run(body())


def test_one_id_runs_once_at_a_time():
    async def body():
        client = await LocalEngine.start(FakeEngine(options()))
        stream = client.generate(Request("a", [0], max_tokens=10**9))
        await anext(stream)
        with pytest.raises(UserError, match="id a is running"):
            await collect(client, "a")
        await anext(stream)
        await stream.aclose()
        await client.close()

    run(body())


class _Doomed:
    """A worker that dies as soon as it is ready, or before."""

    pid, greeting = None, b""

    def __init__(self, theirs, ready):
        conn = EngineEnd(theirs)
        if ready:
            conn.send("ready", FakeEngine(options()).info)
        conn.close()

    def wait(self, seconds):
        return 3

    def kill(self):
        pass


@pytest.mark.parametrize("ready_again", [True, False])
def test_restarting_is_given_up_after_quick_deaths(ready_again, caplog):
    async def body():
        started, ends = [], []

        def launch(theirs):
            started.append(_Doomed(theirs, ready_again or not started))
            return started[-1]

        client = EngineClient(launch, "restart", ends.append, SECONDS, 0.001)
        await client._connect()
        await until(lambda: ends)
        assert len(started) == process.QUICK_DEATHS
        assert "3 times in a row and is not started again" in ends[0] and "\n" not in ends[0]
        with pytest.raises(EngineDead, match="not started again"):
            await collect(client)
        await client.close()

    with caplog.at_level(logging.WARNING, process.__name__):
        run(body())
    assert "not started again" in caplog.text


def test_messages_split_anywhere_come_out_whole():
    messages = [("step", ([Output(str(i), list(range(i)))], None)) for i in range(5)]
    data = b"".join(process._pack(message) for message in messages)
    for size in (1, 3, 7, 8, 9, 64, len(data)):
        frames = process._Frames()
        out = [m for start in range(0, len(data), size) for m in frames.feed(data[start : start + size])]
        assert out == messages
