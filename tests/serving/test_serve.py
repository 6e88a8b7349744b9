"""`nemo-lite serve`: its arguments, its errors as sentences, and how a server starts, stops and dies."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from fake_engine import EXIT
from nemo_lite_serving import serve
from runs import wait_for

from nemo_lite import cli

TESTS = Path(__file__).parents[1]
SECONDS = 60.0  # no wait lasts longer


@pytest.fixture
def model_dir(tmp_path):
    """A folder with a tokenizer, which the fake engine serves; its steps are held while `hold` is in it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TESTS / "fixtures" / "tiny_trained" / file, folder)
    (folder / "config.json").write_text(json.dumps({"fake": {"hold": str(folder / "hold")}}))
    return folder


def fails(*argv, factory="fake_engine:build"):
    """Exit code of the command in this process, with errors told as the command line tells them."""
    return cli.guard(lambda rest: serve.main(rest, factory), [str(arg) for arg in argv])


class Server:
    """A server in a process, on a free port."""

    def __init__(self, *argv):
        program = "import sys; from nemo_lite import cli; from nemo_lite_serving import serve\n"
        program += "sys.exit(cli.guard(lambda argv: serve.main(argv, 'fake_engine:build'), sys.argv[1:]))"
        path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, argv), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )
        # Both are read to their ends: a request's log line must not wait for room in a pipe.
        self.printed, self.errors, serving = [], [], threading.Event()

        def read(stream, into):
            for line in stream:
                into.append(line.rstrip("\n"))
                if match := re.match(r"serving .* at (http://\S+)", line):
                    self.address = match[1]
                    serving.set()
            serving.set()

        streams = ((self.process.stdout, self.printed), (self.process.stderr, self.errors))
        self.readers = [threading.Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in self.readers:
            reader.start()
        assert serving.wait(SECONDS)
        if not hasattr(self, "address"):
            pytest.fail("\n".join(self.errors))
        (self.engine,) = psutil.Process(self.process.pid).children()

    def get(self, path):
        try:
            with urllib.request.urlopen(self.address + path, timeout=SECONDS) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def post(self, prompt=(5,), max_tokens=3):
        """Status of a completion and its body."""
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "ignore_eos": True}
        request = urllib.request.Request(
            self.address + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def post_later(self, **body):
        """The same in a thread; its answer is in the list once it has ended."""
        answers = []
        thread = threading.Thread(target=lambda: answers.append(self.post(**body)), daemon=True)
        thread.start()
        return thread, answers

    def end(self):
        """Exit code and what it said on standard error; nothing of it is left."""
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for reader in self.readers:
            reader.join(SECONDS)
        errors = "".join(f"{line}\n" for line in self.errors)
        wait_for(lambda: not self.engine.is_running() or self.engine.status() == psutil.STATUS_ZOMBIE, 10)
        return self.process.returncode, errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def test_a_server_outlives_its_engine_finishes_what_runs_and_exits_0(model_dir):
    hold = model_dir / "hold"
    with Server(model_dir, "--served-model-name", "tiny", "--shutdown-grace", "50") as server:
        assert server.printed[0].startswith("engine: native; ")
        assert server.printed[1] == "nothing needs memory here"
        assert server.get("/health") == 200
        status, body = server.post()
        assert status == 200 and body["usage"]["completion_tokens"] == 3

        server.engine.kill()
        wait_for(lambda: server.get("/health") == 503, SECONDS)
        assert server.post()[0] == 503
        wait_for(lambda: server.get("/health") == 200, SECONDS)
        (server.engine,) = psutil.Process(server.process.pid).children()

        hold.touch()
        thread, answers = server.post_later(max_tokens=5)
        wait_for(hold.with_suffix(".held").exists, SECONDS)
        assert server.get("/health") == 200  # answered while a step is held open
        server.process.send_signal(signal.SIGTERM)
        server.engine.send_signal(signal.SIGTERM)  # as a service manager does
        wait_for(lambda: refuses(server.address), SECONDS)
        assert not answers
        hold.unlink()
        thread.join(SECONDS)
        assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 5
        code, errors = server.end()
        assert code == 0 and "Traceback" not in errors
        # The access log: a line of JSON for each request, without the prompt.
        lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
        assert [line["status"] for line in lines if line["route"] == "/v1/completions"] == [200, 503, 200]
        assert not any("prompt" in line for line in lines)


def refuses(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) != 0


def test_the_grace_period_ends_and_a_second_ctrl_c_ends_at_once(model_dir):
    hold = model_dir / "hold"
    hold.touch()
    with Server(model_dir, "--shutdown-grace", "0.2") as server:
        thread, answers = server.post_later()
        wait_for(hold.with_suffix(".held").exists, SECONDS)
        server.process.send_signal(signal.SIGINT)
        thread.join(SECONDS)
        assert answers[0][0] == 503 and "shutting down" in answers[0][1]["error"]["message"]
        code, errors = server.end()
        assert code == 0 and "Traceback" not in errors
    hold.with_suffix(".held").unlink()
    with Server(model_dir, "--shutdown-grace", "60") as server:
        request = urllib.request.Request(server.address + "/v1/completions", b'{"prompt": [5]}')
        request.add_header("Content-Type", "application/json")
        thread = threading.Thread(target=lambda: suppress(request), daemon=True)
        thread.start()
        wait_for(hold.with_suffix(".held").exists, SECONDS)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: server.errors, SECONDS)
        assert "stopping" in server.errors[0]
        server.process.send_signal(signal.SIGINT)
        assert server.end()[0] == 130
        thread.join(SECONDS)


def suppress(request):
    """A request whose server goes away."""
    with pytest.raises(OSError):
        urllib.request.urlopen(request, timeout=SECONDS)


def test_death_of_the_engine_as_configured(model_dir):
    with Server(model_dir, "--on-engine-death", "exit") as server:
        assert server.post(prompt=[EXIT], max_tokens=1)[0] == 503
        code, errors = server.end()
        assert code == 1
        assert "nemo-lite: error: the engine process ended with exit code 9\n" in errors
        assert "Traceback" not in errors


# ------------------------------------------------------------------------------------------------------------ sentences


def test_help_groups_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        serve.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for group in ("engine:", "memory and batching:", "answers:", "network:", "limits:"):
        assert f"\n{group}\n" in text
    flags = [action for action in serve._parser()._actions if action.option_strings and action.dest != "help"]
    assert len(flags) == 32
    for action in flags:
        assert "default:" in action.help, action.option_strings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--draft-tokens", "3"], "--draft-tokens needs --speculative mtp"),
        (["--speculative", "mtp", "--draft-tokens", "some"], "invalid auto or int value: 'some'"),
        (["--speculative", "mtp", "--draft-tokens", "0"], "must be 1 or more, not 0"),
        (["--ssl-keyfile", "k"], "--ssl-keyfile needs --ssl-certfile"),
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--max-num-seqs", "0"], "must be 1 or more, not 0"),
        (["--memory-gib", "nan"], "must be above 0, not nan"),
        (["--shutdown-grace", "-1"], "must be 0 or more, not -1"),
        (["--tool-call-parser", "x"], "invalid choice: 'x'"),
    ],
)
def test_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        serve.main(["model", *argv])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_sentence_and_leave_no_process(model_dir, tmp_path, monkeypatch, capsys):
    def error(*argv):
        before = set(psutil.Process().children())  # of other tests of this process
        assert fails(*argv) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("nemo-lite: error: "), err
        assert set(psutil.Process().children()) <= before
        return err

    assert "is no MODEL_DIR: it has no config.json" in error(tmp_path / "nowhere")
    assert "vLLM is not installed: `pip install" in error(model_dir, "--engine", "vllm")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in error(model_dir, "--port", port)
    assert "cannot listen on 192.0.2.1 port 0" in error(model_dir, "--host", "192.0.2.1", "--port", "0")
    assert "--host no.such.host.invalid" in error(model_dir, "--host", "no.such.host.invalid")

    junk = tmp_path / "junk.pem"
    assert f"--ssl-certfile {junk}: No such file" in error(model_dir, "--ssl-certfile", junk)
    junk.write_text("no certificate")
    assert "no certificate and unencrypted key" in error(model_dir, "--ssl-certfile", junk)

    # The engine's own sentence, when it cannot load the model.
    (model_dir / "config.json").write_text(json.dumps({"fake": {"refuse": "the model is too large for 1 GiB"}}))
    assert error(model_dir, "--port", "0") == "nemo-lite: error: the model is too large for 1 GiB\n"

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "nemo-lite[serve]"' in error(model_dir)


def test_flags_become_options():
    text = "model --speculative mtp --draft-tokens 2 --max-num-seqs 3 --no-enable-prefix-caching --memory-gib 0.5"
    text += " --mamba-ssm-cache-dtype float16 --max-model-len 99 --block-size 8 --threads 2"
    args = serve._parser().parse_args(text.split(" "))
    options = serve._options(args)
    assert options.speculative and options.draft_tokens == 2 and options.max_num_seqs == 3
    assert not options.prefix_caching and options.memory_gib == 0.5 and options.mamba_cache_dtype == "float16"
    assert options.max_model_len == 99 and options.block_size == 8 and options.threads == 2
    assert serve._options(serve._parser().parse_args(["m"])).draft_tokens == "auto"
