"""`nemo-lite serve --engine vllm` on this CPU, driven by the official client; the native server answers the same."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from scripted import scripted_model
from tiny import wider_heads

from nemo_lite import HybridLM
from nemo_lite.data import load_tokenizer

pytest.importorskip("vllm.parser", reason="vLLM is not installed here (make vllm)")
pytestmark = pytest.mark.vllm

TRAINED = Path(__file__).parents[2] / "fixtures" / "tiny_trained"
SECONDS = 180
THOUGHT = ["I should look it up.", "\n</think>\nLet me see. "]
CALL = ["<tool_call>\n<function=weather>\n", "<parameter=city>\nParis\n</parameter>\n", "</function>\n</tool_call>"]
ANSWER = ["The answer ", "is forty", "-two."]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Server:
    """`nemo-lite serve` with an engine, until it answers; ended with SIGTERM."""

    def __init__(self, model: Path, engine: str, log: Path, *argv: str):
        command = [sys.executable, "-m", "nemo_lite", "serve", str(model), "--served-model-name", "tiny",
                   "--engine", engine, "--port", "0", "--threads", "1", "--max-model-len", "2048", *argv]  # fmt: skip
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
            )
        until, url = time.monotonic() + SECONDS, None
        while url is None or not self._answers(url):
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                pytest.fail(log.read_text()[-5000:])
            found = re.search(
                r"(?:serving tiny at|Starting vLLM server on|server.* on) (http://[\d.:]+)", log.read_text()
            )
            url = found and found[1]
            time.sleep(0.2)
        self.http = httpx.Client(base_url=url, timeout=SECONDS)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    @staticmethod
    def _answers(url: str) -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def chat(self, text: str = "What is it?", **how):
        messages = how.pop("messages", [{"role": "user", "content": text}])
        return self.openai.chat.completions.create(**{"model": "tiny", "messages": messages, "temperature": 0, **how})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(60) in (0, -15), self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The vLLM server and the native one with a model that says what the test wrote."""
    folder = tmp_path_factory.mktemp("servers")
    scripted_model(folder / "model", TRAINED, {ord("\n"): THOUGHT + CALL, ord(">"): ANSWER})
    mtp = ("--speculative", "mtp", "--draft-tokens", "2")
    with (
        Server(folder / "model", "vllm", folder / "vllm.log", *mtp, "--memory-gib", "0.25") as vllm,
        Server(folder / "model", "native", folder / "native.log", *mtp) as native,
    ):
        yield vllm, native


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both servers with a model that was trained on text, in float32, so that only ties can differ."""
    folder = tmp_path_factory.mktemp("trained")
    wider_heads(HybridLM.from_pretrained(TRAINED)).save_pretrained(folder / "model", tokenizer=load_tokenizer(TRAINED))
    mtp = ("--speculative", "mtp", "--draft-tokens", "3")
    with (
        Server(folder / "model", "vllm", folder / "vllm.log", *mtp, "--memory-gib", "0.25") as vllm,
        Server(folder / "model", "native", folder / "native.log", *mtp) as native,
    ):
        yield vllm, native


CONVERSATIONS = [
    [("user", "Write a class.")],
    [("system", "Be brief."), ("user", "def forward(self, x):")],
    [("user", "import os"), ("assistant", "import sys"), ("user", "and now?")],
    [("user", "# The"), ("assistant", "first"), ("user", "x"), ("assistant", "y = 1"), ("user", "return")],
    [("system", "Code."), ("user", "for i in range(")],
]


def test_recorded_conversations_get_the_same_texts(trained):
    """Greedy, MTP on in both. At most one of the five may part at a tie."""
    texts = []
    for server in trained:
        talks = [[{"role": role, "content": text} for role, text in talk] for talk in CONVERSATIONS]
        answers = [server.chat(messages=talk, max_tokens=64).choices[0] for talk in talks]
        texts.append([(answer.message.content, answer.finish_reason) for answer in answers])
    assert sum(a != b for a, b in zip(*texts, strict=True)) <= 1, texts
    assert all(len(text) > 20 for text, _ in texts[0])


def said(message) -> tuple:
    """Reasoning, text and calls of a message, whoever wrote it."""
    extra = message.model_extra or {}
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
    return (extra.get("reasoning_content") or extra.get("reasoning") or "").strip(), message.content or "", calls


def streamed(chunks) -> tuple:
    """The same of a stream."""
    reasoning, text, calls = "", "", []
    for chunk in chunks:
        for choice in chunk.choices:
            extra = choice.delta.model_extra or {}
            reasoning += extra.get("reasoning_content") or extra.get("reasoning") or ""
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.function.name:
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments or ""
    return reasoning.strip(), text, [(name, json.loads(arguments)) for name, arguments in calls]


def test_reasoning_and_a_tool_call_whole_and_streamed(servers):
    for server in servers:
        found = said(server.chat(tools=[WEATHER], extra_body=THINK).choices[0].message)
        assert found == (THOUGHT[0], "Let me see. ", [("weather", {"city": "Paris"})])
        assert streamed(server.chat(tools=[WEATHER], stream=True, extra_body=THINK)) == found


def test_without_reasoning_and_without_tools(servers):
    found = [said(server.chat().choices[0].message) for server in servers]
    assert found[0] == found[1] == ("", "".join(ANSWER), [])
    plain = [said(server.chat(extra_body=THINK).choices[0].message) for server in servers]
    assert plain[0] == plain[1] == (THOUGHT[0], "Let me see. " + "".join(CALL), [])


def test_completions_whole_streamed_and_cut(servers):
    for server in servers:
        how = {"model": "tiny", "prompt": "<think></think>", "temperature": 0}
        whole = server.openai.completions.create(**how, max_tokens=16).choices[0]
        assert (whole.text, whole.finish_reason) == ("".join(ANSWER), "stop")
        chunks = server.openai.completions.create(**how, max_tokens=16, stream=True)
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.text
        cut = server.openai.completions.create(**how, max_tokens=2).choices[0]
        assert (cut.text, cut.finish_reason) == ("".join(ANSWER[:2]), "length")


def test_metrics_show_what_was_accepted(servers):
    for server in servers:
        text = server.http.get("/metrics").text
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            lines = [line for line in text.splitlines() if line.startswith(f"vllm:spec_decode_{name}_total")]
            assert lines and sum(float(line.split()[-1]) for line in lines) > 0, name


def test_many_at_once(servers):
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(said(servers[0].chat().choices[0].message))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8 and len(set(map(str, texts))) == 1
