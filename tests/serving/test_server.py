"""The whole server with a model that was trained, driven by the official client, unchanged."""

import importlib.util
import json
import signal
import threading

import openai
import pytest
import torch
from runs import wait_for
from serving.real import END, SECONDS, Server, ids_of, logprobs, model, ties

from nemo_lite.generate import generate

PROMPTS = ["import ", "class ", "def forward(self, x):\n    ", "x", "# The", "    return "]


@pytest.fixture(scope="module")
def server():
    with Server("--max-queue", 64) as running:
        yield running
        wait_for(lambda: running.check()["in_flight"] == 0, SECONDS)
        books = running.check()
        assert books["ok"], books["error"]
        assert books["running"] == books["waiting"] == books["active"] == 0
        assert books["num_slots"] - books["free_slots"] == books["snapshots"]
        running.process.terminate()
        assert running.end() == 0
        assert not any("Traceback" in line for line in running.errors)


def text_of(stream):
    """The joined text of a stream and its last finish_reason."""
    text, finish = "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
            finish = choice.finish_reason or finish
    return text, finish


# ----------------------------------------------------------------------------------------------------- the same answers


def test_greedy_completions_are_the_models(server):
    """Alone and streaming, then all at once."""
    for prompt in PROMPTS[:2]:
        (choice,) = server.complete(prompt, max_tokens=40).choices
        assert ties(ids_of(prompt), choice.text, choice.finish_reason, 40) <= 1
        assert text_of(server.complete(prompt, max_tokens=40, stream=True)) == (choice.text, choice.finish_reason)
    answer = server.complete(PROMPTS, max_tokens=60)
    assert [choice.index for choice in answer.choices] == list(range(len(PROMPTS)))
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        assert ties(ids_of(prompt), choice.text, choice.finish_reason, 60) <= 1
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS))
    assert answer.usage.completion_tokens == 60 * len(PROMPTS)


def test_chat_is_the_models_answer_to_the_rendered_conversation(server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write a class."}]
    prompt = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    answer = server.chat(messages=messages, max_tokens=40)
    (choice,) = answer.choices
    assert answer.usage.prompt_tokens == len(prompt)
    assert ties(prompt, choice.message.content, choice.finish_reason, 40) <= 1
    stream = list(server.chat(messages=messages, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert text_of(stream) == (choice.message.content, choice.finish_reason)
    assert stream[-1].usage.completion_tokens == 40 and stream[-1].usage.prompt_tokens == len(prompt)


def test_seeds_repeat_and_answers_differ(server):
    how = {"temperature": 1.0, "max_tokens": 30}
    first = server.complete(seed=11, n=3, **how)
    again = server.complete(seed=11, n=3, **how)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3 and first.usage.prompt_tokens == 7
    own = generate(model(), torch.tensor([ids_of("import ")]), max_tokens=30, stop_ids=[END], seed=11, temperature=1.0)
    assert texts[0] == bytes(own.tokens[0]).decode()
    assert server.complete(seed=12, **how).choices[0].text == texts[1]
    assert text_of(server.complete(seed=11, stream=True, **how))[0] == texts[0]


def test_stop_strings_and_token_ids(server):
    whole = server.complete("class ", max_tokens=40).choices[0].text
    stop = whole[9:13]
    cut = whole[: whole.index(stop)]
    (choice,) = server.complete("class ", max_tokens=40, stop=["never this", stop]).choices
    assert (choice.text, choice.finish_reason) == (cut, "stop")
    assert text_of(server.complete("class ", max_tokens=40, stop=stop, stream=True)) == (cut, "stop")
    token = ord(whole[9])
    (choice,) = server.complete("class ", max_tokens=40, extra_body={"stop_token_ids": [token]}).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(whole[9])], "stop")


def test_logprobs_are_the_models_own(server):
    prompt = ids_of("class ")
    for temperature in (0, 1.0):  # of the model's distribution, not of the one that was drawn from
        (choice,) = server.complete("class ", max_tokens=12, logprobs=2, temperature=temperature, seed=1).choices
        own = logprobs(prompt, list(choice.text.encode()))
        chosen = own[range(12), list(choice.text.encode())]
        assert choice.logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-3)
        best = own.topk(2).values
        for told, row in zip(choice.logprobs.top_logprobs, best.tolist(), strict=True):
            assert sorted(told.values(), reverse=True)[:2] == pytest.approx(row, abs=1e-3)
    (choice,) = server.chat(max_tokens=3, logprobs=True, top_logprobs=1).choices
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [1, 1, 1]
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in choice.logprobs.content)


def test_echo_with_logprobs(server):
    prompt = "def forward(self"
    (choice,) = server.complete(prompt, max_tokens=4, echo=True, logprobs=0).choices
    assert choice.text.startswith(prompt) and len(choice.text) == len(prompt) + 4
    ids = ids_of(choice.text)
    own = logprobs(ids[:1], ids[1:])[range(len(ids) - 1), ids[1:]]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own.tolist(), abs=1e-3)
    (scored,) = server.complete(prompt, max_tokens=0, echo=True, logprobs=0).choices
    assert scored.text == prompt
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(own[: len(prompt) - 1].tolist(), abs=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs llguidance")
def test_output_that_follows_a_schema(server):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["conv", "norm"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "layer", "schema": schema}}
    for temperature in (0, 1.5):
        (choice,) = server.chat(max_tokens=60, temperature=temperature, response_format=form, seed=3).choices
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert set(found) == {"name", "size"} and found["name"] in ("conv", "norm") and 0 <= found["size"] <= 99
    tool = {"type": "function", "function": {"name": "build", "parameters": schema}}
    (choice,) = server.chat(max_tokens=80, tools=[tool], tool_choice="required", parallel_tool_calls=False).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "build"
    assert set(json.loads(call.function.arguments)) == {"name", "size"}


# ------------------------------------------------------------------------------------------------------------- counters


def test_drafts_and_prefix_hits_are_told(server):
    before = {name: server.metric(name) for name in ("prefix_cache_hits_total", "spec_decode_num_drafts_total")}
    accepted = server.metric("spec_decode_num_accepted_tokens_total")
    prompt = "@once\nclass Once(torch.nn.Module):\n    "
    how = {"max_tokens": 40, "extra_body": {"token_origins": True}}
    first, second = server.complete(prompt, **how), server.complete(prompt, **how)
    counts = first.nemo_lite["counts"]
    assert counts["accepted"] > 0 and counts["drafted"] >= counts["accepted"] == sum(counts["accepted_at"])
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == len(prompt)
    assert second.choices[0].text == first.choices[0].text
    stream = list(server.complete(prompt, stream=True, **how))
    depths = [depth for chunk in stream for _, depth in chunk.nemo_lite["tokens"]]
    assert len(depths) == 40 and max(depths) > 0
    wait_for(lambda: server.metric("num_requests_running") == 0, SECONDS)
    assert server.metric("prefix_cache_hits_total") == before["prefix_cache_hits_total"] + 2 * len(prompt)
    assert server.metric("spec_decode_num_drafts_total") > before["spec_decode_num_drafts_total"]
    assert server.metric("spec_decode_num_accepted_tokens_total") >= accepted + counts["accepted"]


# --------------------------------------------------------------------------------------------------- clients and faults


def test_a_client_that_leaves_frees_its_request_at_once(server):
    made = server.metric("generation_tokens_total")
    stream = server.complete(max_tokens=8000, stream=True, n=2, extra_body={"ignore_eos": True})
    next(iter(stream))
    wait_for(lambda: server.metric("num_requests_running") == 2, SECONDS)
    stream.close()
    wait_for(lambda: server.metric("num_requests_running") == 0, SECONDS)
    assert server.check()["running"] == server.check()["in_flight"] == 0
    assert server.metric("generation_tokens_total") - made < 8000, "it was made to the end"

    # Without a stream, too.
    impatient = server.openai.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt="x", max_tokens=8000, extra_body={"ignore_eos": True})
    wait_for(lambda: server.check()["running"] == 0, SECONDS)
    assert server.metric("generation_tokens_total") - made < 8000


def test_probes_are_answered_while_the_engine_computes(server):
    prompt = "y = f(x)\n" * 880  # some 8,000 tokens
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.complete(prompt, max_tokens=2)))
    thread.start()
    wait_for(lambda: server.check()["in_flight"] == 1, SECONDS)
    probes = 0
    while thread.is_alive():
        assert server.health() == 200
        probes += not answers
    thread.join(SECONDS)
    assert answers[0].usage.prompt_tokens == len(prompt)
    assert probes >= 3

    # And while it stands still in the midst of whatever it does.
    engine = server.engine
    engine.suspend()
    try:
        thread = threading.Thread(target=lambda: answers.append(server.complete("z = ", max_tokens=2)))
        thread.start()
        assert [server.health() for _ in range(3)] == [200] * 3
        assert thread.is_alive()
    finally:
        engine.resume()
    thread.join(SECONDS)
    assert ties(ids_of("z = "), answers[1].choices[0].text, answers[1].choices[0].finish_reason, 2) == 0


def test_an_engine_that_is_killed_is_started_again(server):
    stream = server.complete(max_tokens=8000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    server.engine.kill()
    with pytest.raises(openai.APIError, match="the engine died while the request was running"):
        list(stream)
    assert server.health() == 503
    with pytest.raises(openai.APIStatusError) as caught:
        server.complete(max_tokens=1)
    assert caught.value.status_code == 503
    wait_for(lambda: server.health() == 200, SECONDS, every=0.05)
    (choice,) = server.complete("class ", max_tokens=20).choices
    assert ties(ids_of("class "), choice.text, choice.finish_reason, 20) == 0


def test_ends_as_configured():
    with Server("--on-engine-death", "exit") as server:
        stream = server.complete(max_tokens=8000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.engine.send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine died"):
            list(stream)
        assert server.end() == 1
        assert "nemo-lite: error: the engine process was ended by SIGKILL" in server.errors
    with Server() as server:
        stream = server.complete("class ", max_tokens=600, stream=True, extra_body={"ignore_eos": True})
        began = next(iter(stream)).choices[0].text
        server.process.terminate()
        text, finish = text_of(stream)
        assert finish == "length" and len(began + text) == 600
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.errors)
