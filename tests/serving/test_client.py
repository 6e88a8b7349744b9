"""`nemo-lite chat` against a fake server: piped, on a terminal of its own, and with a server it starts itself."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nemo_lite_serving import client
from nemo_lite_serving.client import Answer, Chat, Failed, Remote, Screen, command, parse_params, started
from serving.fake_server import FakeServer

from nemo_lite import cli
from nemo_lite.config import UserError

ANSWER = "The quick brown fox jumps over the dog"
CHAT = [sys.executable, "-m", "nemo_lite", "chat"]


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def piped(monkeypatch, capsys, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = cli.guard(client.main, list(argv))
    return code, *capsys.readouterr()


def test_piped_one_message_plain_answer(server, monkeypatch, capsys):
    argv = ["--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "30", "--think", "off"]
    out = piped(monkeypatch, capsys, "reason about\nthis", server.url, *argv)
    assert out == (0, ANSWER + "\n", "")  # neither the reasoning nor a colour
    sent = server.requests[-1]
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "reason about\nthis"},
    ]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("tiny", 0.5, 30)
    # Not this project's server: only what others know is sent.
    assert sent["chat_template_kwargs"] == {"enable_thinking": False} and "token_origins" not in sent


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("wrong", "The prompt has 600 tokens; this model takes 512."),
        ("busy", "The queue is full. (try again in 2 s)"),
        ("break", "The engine ended while it answered."),
        ("cut", "answer"),
        ("", "standard input is empty; give a message"),
    ],
)
def test_piped_errors_are_sentences(server, monkeypatch, capsys, said, sentence):
    code, _, error = piped(monkeypatch, capsys, said, server.url)
    assert code == 1 and error.startswith("nemo-lite: error: ") and sentence in error and error.count("\n") == 1


def test_wrong_targets_and_keys(monkeypatch, capsys):
    code, _, error = piped(monkeypatch, capsys, "x", "no/such/dir")
    assert code == 1 and "neither a MODEL_DIR nor a URL" in error
    code, _, error = piped(monkeypatch, capsys, "x", "http://127.0.0.1:9")
    assert code == 1 and "does not answer" in error
    with FakeServer(key="secret") as server:
        code, _, error = piped(monkeypatch, capsys, "x", server.url)
        assert code == 1 and "The API key is missing or wrong." in error
        assert piped(monkeypatch, capsys, "x", server.url + "/v1/", "--api-key", "secret")[:2] == (0, ANSWER + "\n")
        monkeypatch.setenv("NEMO_LITE_API_KEY", "secret")
        assert piped(monkeypatch, capsys, "x", server.url)[0] == 0


def test_a_conversation(server):
    out = io.StringIO()
    screen = Screen(out, terminal=True, colour=True)
    chat = Chat(Remote(server.url), "tiny", ours=True)
    chat.ask("reason first", screen)
    shown = out.getvalue()
    assert f"\x1b[2mLet me see\x1b[0m\n\n{ANSWER}\n" in shown  # dim, then not
    assert "12 tokens" in shown and "acceptance length 2.20" in shown and "1 of 2 prompt tokens cached" in shown
    chat.ask("call a tool", screen)
    assert 'call weather {"city": "Oslo"}\x1b[0m\n' in out.getvalue()
    assert chat.messages[-1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    with pytest.raises(Failed):
        chat.ask("wrong", screen)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    with pytest.raises(Failed):
        chat.ask("break", screen)
    assert chat.messages[-1]["content"] == "The quick brown"  # what came is kept


def test_commands():
    chat = Chat(Remote("http://x"), "tiny", ours=True)
    assert command(chat, "/system Be  brief.") and chat.system == "Be  brief."
    assert command(chat, "/think low") and chat.body()["reasoning_effort"] == "low"
    assert command(chat, '/params temperature=0.7 stop=["a b", "c"] seed=3 user=me') == (
        'temperature=0.7 stop=["a b", "c"] seed=3 user="me"'
    )
    assert command(chat, "/params seed= user=") == 'temperature=0.7 stop=["a b", "c"]'
    assert chat.body()["temperature"] == 0.7 and chat.body()["token_origins"]
    chat.messages.append({"role": "user", "content": "x"})
    assert command(chat, "/reset") and chat.messages == []
    assert command(chat, "/system") and command(chat, "/think") and command(chat, "/help")
    assert chat.system is None and chat.think is None
    assert command(chat, "/quit") is None
    for wrong in ("/nothing", "/think maybe", "/params temperature", "/params stream=false"):
        with pytest.raises(Failed):
            command(chat, wrong)
    assert parse_params("a=1.5 b=1x c=") == {"a": 1.5, "b": "1x", "c": None}


def test_the_terminal_obeys_no_model():
    out = io.StringIO()
    screen = Screen(out, terminal=True, colour=False)
    screen.answer("a\x1b]0;title\x07b\tc\n")
    assert out.getvalue() == "a�]0;title�b\tc\n"


def test_events_of_other_servers():
    """Reasoning under its other name, no usage, calls without an index."""
    answer, out = Answer(), io.StringIO()
    screen = Screen(out, terminal=True, colour=False)
    answer.take({"choices": [{"delta": {"reasoning": "hm", "content": None}}]}, screen)
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    answer.take({"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}, screen)
    answer.take({"choices": [], "usage": None}, screen)
    screen.end()
    assert out.getvalue() == "hm\ncall f {}\n"
    assert answer.message["tool_calls"][0]["id"] == "c" and answer.summary().startswith("2 tokens")


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *argv, home):
        self.master, slave = pty.openpty()
        # Nothing that other tests or their libraries have put into the environment.
        environment = {name: os.environ[name] for name in ("PATH", "VIRTUAL_ENV", "LANG") if name in os.environ}
        environment |= {"HOME": str(home), "TERM": "xterm", "PYTHONFAULTHANDLER": "1"}
        # Its controlling terminal, so that Ctrl-C reaches it; set in the child, as forking beside threads is not safe.
        # Signals as a terminal's programs have them: what starts tests in the background ignores Ctrl-C.
        own = (
            "import fcntl, os, signal, sys, termios; signal.pthread_sigmask(signal.SIG_SETMASK, []); "
            "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU)]; "
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", own, *CHAT, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text, seconds=60.0):
        end = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.master], [], [], max(0, end - time.monotonic()))[0]:
                self.process.send_signal(signal.SIGABRT)  # it says where it hangs
                self.process.wait(10)
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                raise AssertionError(f"{text!r}: {self.seen!r}")
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended before {text!r}: {self.seen!r}") from None
        before, self.seen = self.seen.split(text, 1)
        return before

    def send(self, text):
        os.write(self.master, text.encode())

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.mark.alone
def test_on_a_terminal(server, tmp_path):
    terminal = Terminal(server.url, home=tmp_path)
    try:
        terminal.until("> ")
        terminal.send("hello\n")
        terminal.until("The quick")
        terminal.until("8 tokens")
        terminal.until("> ")
        terminal.send("slow please\n")
        terminal.until("The quick")
        terminal.send("\x03")  # the answer ends, the program does not
        terminal.until("stopped")
        terminal.until("> ")
        terminal.send("/nothing\n")
        terminal.until("error: there is no /nothing")
        terminal.until("> ")
        terminal.send("half a line\x03")
        terminal.until("> ")
        terminal.send("and on\n")
        terminal.until("8 tokens")
        terminal.until("> ")
        terminal.send("\x04")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()
    end = time.monotonic() + 5
    while not server.dropped and time.monotonic() < end:
        time.sleep(0.02)
    assert server.dropped == 1
    sent = server.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant"] * 2 + ["user"]
    kept = next(tmp_path.rglob("chat_history"))
    assert "slow please" in kept.read_text() and kept.stat().st_mode & 0o077 == 0


PRETEND = """
import sys, threading
sys.path.insert(0, {tests!r})
from serving.fake_server import FakeServer
print("loading", sys.argv[1:], flush=True)
with FakeServer() as fake:
    print("listening on", fake.url, flush=True)
    threading.Event().wait()
"""


def test_a_server_of_its_own(tmp_path):
    program = [sys.executable, "-c", PRETEND.format(tests=str(Path(__file__).parents[1]))]
    notes = io.StringIO()
    with started("some/model", ["--speculative", "mtp"], notes, program) as url:
        assert Remote(url).models()[0]["id"] == "tiny"
    with pytest.raises(Failed, match="does not answer"):
        Remote(url).models()
    assert notes.getvalue() == "starting a server for some/model ...\n"


def test_a_server_that_does_not_start():
    program = [sys.executable, "-c", "import sys; sys.exit('nemo-lite: error: some/model has no config.json')"]
    told = r"the server did not start: some/model has no config\.json"
    with pytest.raises(UserError, match=told), started("some/model", [], io.StringIO(), program):
        pass


def test_its_server_ends_with_it(tmp_path):
    """A closed terminal (SIGHUP) or a SIGTERM leaves no server behind."""
    script = f"""
import io, os, sys
from nemo_lite_serving import client
real = client.started
program = [sys.executable, "-c", {PRETEND.format(tests=str(Path(__file__).parents[1]))!r}]
client.started = lambda target, arguments, notes: real(target, arguments, notes, program)
sys.stdin.isatty = lambda: True
def converse(chat, screen):
    print(chat.remote.url, flush=True)
    import time; time.sleep(60)
client.converse = converse
client.main([{str(tmp_path)!r}])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert Remote(url).models()
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 128 + signal.SIGHUP
    process.stdout.close()
    with pytest.raises(Failed, match="does not answer"):
        Remote(url).models()
