"""The OpenAI API: driven by the official client, unchanged, and by hand where the client lets no mistake through."""

import asyncio
import importlib.util
import json
import logging
import socket
import threading
import time
import tracemalloc

import httpx
import openai
import pytest
import uvicorn
from nemo_lite_serving import api, schemas
from nemo_lite_serving.api import ApiSettings, create_app
from nemo_lite_serving.metrics import Metrics
from serving.fakes import PANGRAM, TINY, FakeClient

SECONDS = 20.0  # no wait lasts longer; nearly all end in milliseconds


class Server:
    """The application under uvicorn, in a thread, on a free port."""

    def __init__(self, client=None, **settings):
        self.client = client or FakeClient()
        self.app = create_app(self.client, ApiSettings(TINY, "tiny", **settings), Metrics("tiny"))
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", access_log=False))
        self.key = settings.get("api_keys", ("none",))[0]

    def __enter__(self):
        ready = threading.Event()

        async def serve():
            self.loop = asyncio.get_running_loop()
            task = asyncio.create_task(self.server.serve(sockets=[self.socket]))
            while not self.server.started and not task.done():
                await asyncio.sleep(0.005)
            ready.set()
            await task

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        assert ready.wait(SECONDS)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=SECONDS)
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS, headers={"Authorization": f"Bearer {self.key}"})
        return self

    def __exit__(self, *_):
        self.openai.close()
        self.http.close()
        self.release()
        self.server.should_exit = True
        self.thread.join(SECONDS)
        self.socket.close()
        assert not self.thread.is_alive()
        assert not self.client.running, "requests are left in the engine"
        assert self.app.state.api.active == 0, "requests are left in the count"

    def release(self):
        if self.client.hold is not None:
            self.loop.call_soon_threadsafe(self.client.hold.set)

    def post(self, path, body=None, raw=None, **how):
        if raw is not None:
            headers = {"Content-Type": "application/json", **how.pop("headers", {})}
            return self.http.post(path, content=raw, headers=headers, **how)
        return self.http.post(path, json=body, **how)

    def complete(self, **how):
        return self.openai.completions.create(**{"model": "tiny", "prompt": "hello", **how})

    def chat(self, **how):
        messages = [{"role": "user", "content": "hello"}]
        return self.openai.chat.completions.create(**{"model": "tiny", "messages": messages, **how})


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


def saying(answer, **how):
    return Server(FakeClient(answer, **how))


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def client(server):
    """The module's server, its engine as new."""
    server.client.requests.clear()
    server.client.aborted.clear()
    return server.client


# -------------------------------------------------------------------------------------------------------- completions


def test_completion(server, client):
    answer = server.complete(max_tokens=9, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == ("The quick", "length", 0, None)
    assert answer.object == "text_completion" and answer.model == "tiny"
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    (request,) = client.requests
    assert bytes(request.prompt) == b"hello"
    assert request.stop_ids == (256,) and request.guide is None and request.thinking is None
    assert server.complete().usage.completion_tokens == 16, "OpenAI's default"


def test_every_sampling_field_reaches_the_engine(server, client):
    server.complete(
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        logit_bias={"65": 5, "66": -100},
        max_tokens=20,
        stop=["zz"],
        user="me",
        extra_body={
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "stop_token_ids": [10],
            "min_tokens": 3,
            "ignore_eos": True,
            "metadata": {"a": "b"},
            "store": False,
        },
    )
    (request,) = client.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.2)
    assert sampling.seed == 7 and sampling.logit_bias == ((65, 5.0), (66, -100.0))
    assert (request.max_tokens, request.min_tokens, request.stop_ids) == (20, 3, (10,))


@pytest.mark.parametrize("off", [-1, 0])
def test_top_k_off_and_defaults(server, client, off):
    server.complete(extra_body={"top_k": off})
    (request,) = client.requests
    assert request.sampling.top_k == 0 and request.sampling.temperature == 1.0 and request.sampling.seed is None


def test_defaults_of_the_model(tmp_path):
    for file in TINY.iterdir():
        if "generation" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [256, 259]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = api.Api(FakeClient(), ApiSettings(tmp_path, "tiny"), Metrics("tiny"))
    body = schemas.CompletionRequest(prompt="a", top_k=5)
    sampling = found.sampling_of(body)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, 5)
    assert found.ends == {256, 259}
    assert found.sampling_of(schemas.CompletionRequest(prompt="a", temperature=1e-9)).temperature == 0, "would overflow"
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(api.UserError, match=r"generation_config\.json: temperature must be"):
        api.Api(FakeClient(), ApiSettings(tmp_path, "tiny"), Metrics("tiny"))


def test_prompts_of_every_kind(server, client):
    for prompt, expected in (
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ):
        client.requests.clear()
        answer = server.complete(prompt=prompt, max_tokens=2)
        assert [request.prompt for request in client.requests] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_several_choices_have_seeds_of_their_own(server, client):
    answer = server.complete(prompt=["a", "b"], n=2, seed=5, max_tokens=3)
    assert [(request.prompt, request.sampling.seed) for request in client.requests] == [
        ([97], 5),
        ([97], 6),
        ([98], 5),
        ([98], 6),
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 2, "a prompt is counted once"
    assert answer.usage.completion_tokens == 12
    assert len({request.id for request in client.requests}) == 4


def test_streamed_completion(server, client):
    options = {"include_usage": True}
    chunks = list(server.complete(max_tokens=10, stream=True, n=2, stream_options=options, logprobs=1))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == PANGRAM[:10]
        assert [choice.finish_reason for choice in mine][-1] == "length"
        offsets = [offset for choice in mine for offset in choice.logprobs.text_offset]
        assert offsets == list(range(10))
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_and_echo(server, client):
    answer = server.complete(prompt="hi", max_tokens=3, logprobs=2, echo=True)
    (choice,) = answer.choices
    assert choice.text == "hiThe"
    assert choice.logprobs.tokens == ["h", "i", "T", "h", "e"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs[2] == {"T": -0.25, "U": -1.25}
    (request,) = client.requests
    assert request.logprobs == request.prompt_logprobs == 2
    scored = server.complete(prompt="hi", max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == "hi" and scored.choices[0].logprobs.tokens == ["h", "i"]
    assert scored.usage.completion_tokens == 0 and scored.choices[0].finish_reason == "length"
    streamed = list(server.complete(prompt="hi", max_tokens=3, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "hiThe"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(server, client, stream, include):
    how = {"max_tokens": 60, "stop": ["brown f", "zzz"], "extra_body": {"include_stop_str_in_output": include}}
    expected = "The quick " + ("brown f" if include else "")
    if stream:
        chunks = list(server.complete(stream=True, stream_options={"include_usage": True}, **how))
        texts = [chunk.choices[0].text for chunk in chunks[:-1]]
        assert "".join(texts) == expected and chunks[-2].choices[0].finish_reason == "stop"
        usage = chunks[-1].usage
    else:
        answer = server.complete(**how)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        usage = answer.usage
    assert usage.completion_tokens == len("The quick brown f"), "what was consumed"
    assert client.aborted == [client.requests[0].id], "the engine is told to end"


def test_end_of_text(server, client):
    answer = server.complete(max_tokens=500)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PANGRAM * 4, "stop")
    assert answer.usage.completion_tokens == len(PANGRAM) * 4 + 1
    assert server.complete(max_tokens=500, extra_body={"ignore_eos": True}).choices[0].finish_reason == "length"
    assert not client.aborted


def test_token_origins(server, client):
    extra = {"token_origins": True}
    chunks = list(server.complete(max_tokens=7, stream=True, extra_body=extra))
    told = [chunk.model_dump()["nemo_lite"] for chunk in chunks]
    tokens = [tuple(token) for each in told for token in each["tokens"]]
    assert tokens == list(zip("The qui", [0, 1, 2, 0, 1, 2, 0], strict=True))
    assert "counts" not in told[0] and told[-1]["counts"]["new_tokens"] == 7
    whole = server.complete(max_tokens=7, extra_body=extra).model_dump()
    assert whole["nemo_lite"]["counts"]["verify_steps"] == 3
    assert "nemo_lite" not in server.complete(max_tokens=7).model_dump()
    chunks = list(server.chat(max_tokens=7, stream=True, extra_body=extra))
    told = [chunk.model_dump().get("nemo_lite", {}) for chunk in chunks]
    assert [tuple(token) for each in told for token in each.get("tokens", [])] == tokens
    assert told[-1]["counts"]["new_tokens"] == 7 and sum("counts" in each for each in told) == 1
    stopped = server.complete(max_tokens=40, stop="br", extra_body=extra).model_dump()["nemo_lite"]["counts"]
    assert stopped["new_tokens"] == 12 and stopped["accepted_at"] == [4, 4], "as far as is known without the engine"


# --------------------------------------------------------------------------------------------------- chat completions


def test_chat(server, client):
    answer = server.chat(max_completion_tokens=9, max_tokens=5)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == "The quick"
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    (request,) = client.requests
    prompt = bytes(index for index in request.prompt if index < 256).decode()
    assert "hello" in prompt and 258 in request.prompt, "the template's special tokens are tokens"
    assert request.stop_ids == (256, 259), "the end of a turn ends the answer"
    client.requests.clear()
    server.chat()
    assert client.requests[0].max_tokens == 8192 - len(client.requests[0].prompt), "what is left"


def test_streamed_chat(server, client):
    chunks = list(server.chat(max_tokens=9, stream=True, n=2, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 18 and chunks[-1].choices == []
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "The quick"
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]


def test_streaming_helper_of_the_client(server, client):
    with server.openai.chat.completions.stream(model="tiny", messages=[{"role": "user", "content": "x"}]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and final.choices[0].message.content == PANGRAM * 4


def test_chat_logprobs(server, client):
    answer = server.chat(max_tokens=4, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == list("The ")
    assert [top.token for top in content[0].top_logprobs] == ["T", "U"]
    assert content[0].bytes == [84] and content[0].logprob == -0.25
    chunks = list(server.chat(max_tokens=4, logprobs=True, stream=True))
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == list("The ") and entries[0].top_logprobs == []


def test_messages_of_every_role(server, client):
    answer = server.chat(max_tokens=4).choices[0].message
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            answer.model_dump(),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
            {"role": "user", "content": "lone \ud800 surrogate"},
        ],
        "max_tokens": 4,
    }
    reply = server.post("/v1/chat/completions", raw=json.dumps(body).encode())
    assert reply.status_code == 200, reply.text
    prompt = bytes(index for index in client.requests[-1].prompt if index < 256).decode()
    assert all(part in prompt for part in ("be brief", "one\ntwo", "<function=f>", "lone \ufffd surrogate"))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nSão Paulo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)


def joined_calls(chunks):
    calls = {}
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or []:
            known = calls.setdefault(call.index, [call.id, call.function.name, ""])
            known[2] += call.function.arguments or ""
    return [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize(
    "text", [CALL, '<tool_call>{"name": "weather", "arguments": {"city": "São Paulo", "days": 3}}']
)
def test_tool_calls(text):
    with saying(text if text is CALL else text + "</tool_call>") as server:
        answer = server.chat(tools=TOOLS).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather" and call.type == "function" and call.id
        assert json.loads(call.function.arguments) == {"city": "São Paulo", "days": 3}
        prompt = bytes(index for index in server.client.requests[0].prompt if index < 256).decode()
        assert "<name>weather</name>" in prompt
        chunks = list(server.chat(tools=TOOLS, stream=True, parallel_tool_calls=False))
        ((id, name, arguments),) = joined_calls(chunks)
        assert id and name == "weather" and json.loads(arguments) == {"city": "São Paulo", "days": 3}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        none = server.chat(tools=TOOLS, tool_choice="none").choices[0]
        assert none.message.tool_calls is None and "weather" in none.message.content
        assert none.finish_reason == "stop"


needs_llguidance = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs llguidance")


@needs_llguidance
@pytest.mark.parametrize("stream", [False, True])
def test_forced_tool_calls(stream):
    def answer(request):
        schema = json.loads(request.guide.value)
        arguments = '{"city": "Oslo"}'
        return arguments if schema["type"] == "object" else f'[{{"name": "weather", "arguments": {arguments}}}]'

    with saying(answer) as server:
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            got = server.chat(tools=TOOLS, tool_choice=choice, stream=stream)
            if stream:
                chunks = list(got)
                ((id, name, arguments),) = joined_calls(chunks)
                finish = chunks[-1].choices[0].finish_reason
            else:
                (call,) = got.choices[0].message.tool_calls
                id, name, arguments = call.id, call.function.name, call.function.arguments
                finish = got.choices[0].finish_reason
                assert got.choices[0].message.content is None
            assert (bool(id), name, json.loads(arguments), finish) == (True, "weather", {"city": "Oslo"}, "tool_calls")
        cut = server.chat(tools=TOOLS, tool_choice="required", max_tokens=12).choices[0]
        assert cut.finish_reason == "length" and cut.message.content == '[{"name": "w', "half a list is text"


def test_schema_of_forced_calls_keeps_references():
    inner = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "integer"}}}
    functions = [schemas.Function(name=name, parameters=inner) for name in ("f", "g")]
    tools = [schemas.Tool(type="function", function=function) for function in functions]
    found = schemas.calls_schema(tools, parallel=False)
    assert found["$defs"] == {"X": {"type": "integer"}} and found["maxItems"] == 1
    assert "$defs" not in found["items"]["anyOf"][0]["properties"]["arguments"] and "$defs" in inner
    tools[1].function.parameters = {**inner, "$defs": {"X": {"type": "string"}}}
    with pytest.raises(schemas.ApiError, match="define X in two ways"):
        schemas.calls_schema(tools, parallel=True)


def test_reasoning():
    with saying("I think\nhard.</think>\n\nForty-two.") as server:
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        answer = server.chat(extra_body=thinking).choices[0].message
        assert answer.content == "Forty-two." and answer.reasoning_content == "I think\nhard."
        chunks = list(server.chat(extra_body=thinking, stream=True))
        deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "I think\nhard."
        assert "".join(delta.get("content") or "" for delta in deltas) == "Forty-two."
        request = server.client.requests[0]
        assert request.thinking.open and request.thinking.budget is None
        assert bytes(request.thinking.end_ids) == b"</think>"
        server.chat(reasoning_effort="high", extra_body={"thinking_token_budget": 7})
        assert server.client.requests[-1].thinking.budget == 7
        server.chat(reasoning_effort="low")
        assert b"low" in bytes(index for index in server.client.requests[-1].prompt if index < 256)
        assert server.client.requests[-1].thinking.open
        server.chat(reasoning_effort="none")
        assert server.client.requests[-1].thinking is None
    with Server(FakeClient("Hm.</think>Yes."), reasoning_parser="none") as server:
        assert server.chat(extra_body=thinking).choices[0].message.content == "Hm.</think>Yes."


@needs_llguidance
def test_guided_output(server, client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "x", "schema": schema, "strict": True}
    for how, kind, value in (
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": named}}, "json_schema", json.dumps(schema)),
        ({"extra_body": {"guided_json": schema}}, "json_schema", json.dumps(schema)),
        ({"extra_body": {"guided_regex": "a+"}}, "regex", "a+"),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, "choice", '["yes", "no"]'),
        ({"extra_body": {"structured_outputs": {"regex": "[0-9]"}}}, "regex", "[0-9]"),
        ({"extra_body": {"structured_outputs": {"json": json.dumps(schema)}}}, "json_schema", json.dumps(schema)),
    ):
        client.requests.clear()
        server.chat(max_tokens=3, **how)
        (request,) = client.requests
        assert (request.guide.kind, request.guide.value) == (kind, value)
    server.chat(max_tokens=3, response_format={"type": "text"})
    assert client.requests[-1].guide is None


@needs_llguidance
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "JSON schema is not usable"),
        ({"guided_json": "{"}, "guided_json", "EOF"),
        ({"guided_regex": "("}, "guided_regex", "regular expression"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one way only"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None, "missing"),
        ({"response_format": {"type": "yaml"}}, "response_format", "its tag"),
    ],
)
def test_wrong_guides(server, client, body, param, words):
    reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **body})
    error = reply.json()["error"]
    assert reply.status_code == 400 and words in error["message"]
    assert error["param"] == (param or "response_format.json_schema.schema")


def test_without_llguidance(server, client, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llguidance" else find(name))
    with pytest.raises(openai.BadRequestError, match="needs the package llguidance") as caught:
        server.chat(response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="needs the package llguidance"):
        server.chat(tools=TOOLS, tool_choice="required")


# -------------------------------------------------------------------------------------------------------- the mistakes


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {}, "prompt", "missing"),
        ("completions", {"prompt": "a", "temprature": 1}, "temprature", "did you mean `temperature`"),
        ("completions", {"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ("completions", {"prompt": "a", "max_tokens": True}, "max_tokens", "valid integer"),
        ("completions", {"prompt": "a", "max_tokens": 2.5}, "max_tokens", "valid integer"),
        ("completions", {"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ("completions", {"prompt": "a", "max_tokens": 10**30}, "max_tokens", "less than"),
        ("completions", {"prompt": "a", "max_tokens": 9000}, "max_tokens", "context is 8192 tokens"),
        ("completions", {"prompt": "a", "temperature": -0.5}, "temperature", "greater than or equal to 0"),
        ("completions", {"prompt": "a", "temperature": 10**400}, "temperature", "number"),
        ("completions", {"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ("completions", {"prompt": "a", "seed": 1 << 63}, "seed", "less than"),
        ("completions", {"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ("completions", {"prompt": "a", "stop": ""}, "stop", "must be a string or a list"),
        ("completions", {"prompt": "a", "stop": ["a"] * 17}, "stop", "up to 16"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x", "match"),
        ("completions", {"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "outside"),
        ("completions", {"prompt": "a", "logit_bias": {"9": 101}}, "logit_bias.9", "less than or equal to 100"),
        ("completions", {"prompt": "a", "stop_token_ids": [260]}, "stop_token_ids", "outside"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of", "must equal n"),
        ("completions", {"prompt": "a", "min_tokens": 9, "max_tokens": 5}, "min_tokens", "more than the 5"),
        ("completions", {"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
        (
            "completions",
            {"prompt": "a", "stream": True, "stream_options": {"usage": 1}},
            "stream_options.usage",
            "known",
        ),
        ("completions", {"prompt": ""}, "prompt", "non-empty"),
        ("completions", {"prompt": []}, "prompt", "non-empty"),
        ("completions", {"prompt": [97, "a"]}, "prompt", "list of token ids"),
        ("completions", {"prompt": [97, -1]}, "prompt", "list of token ids"),
        ("completions", {"prompt": [97, 260]}, "prompt", "outside the model's 260"),
        ("completions", {"prompt": [[97], [10**40]]}, "prompt", "list of token ids"),
        ("completions", {"prompt": "a" * 8192}, "prompt", "no room"),
        ("completions", {"prompt": "a", "model": "gpt"}, "model", "no model 'gpt'"),
        ("completions", {"prompt": "a", "n": 128, "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("completions", {"prompt": ["a", "b", "c"], "n": 128}, "n", "at most 256"),
        ("completions", [], None, "JSON object"),
        ("completions", "text", None, "JSON object"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "its tag"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text only"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "text only",
        ),
        ("chat/completions", {"messages": [{**MESSAGES[0], "contnt": 1}]}, "messages.0.contnt", "`content`"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": 5}, "tool_choice", "must be"),
        (
            "chat/completions",
            {"messages": MESSAGES, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "not among",
        ),
        ("chat/completions", {"messages": MESSAGES, "reasoning_effort": "huge"}, "reasoning_effort", "must be"),
        ("chat/completions", {"messages": MESSAGES, "thinking_token_budget": -1}, "thinking_token_budget", "greater"),
        (
            "chat/completions",
            {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "set",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "no room"),
        ("chat/completions", {"messages": MESSAGES, "modalities": ["audio"]}, "modalities.0", "must be"),
        ("chat/completions", {"messages": MESSAGES, "guided_json": 5}, "guided_json", "JSON schema"),
    ],
)
def test_mistakes_are_named(server, client, path, body, param, words):
    reply = server.post(f"/v1/{path}", raw=json.dumps(body).encode())
    error = reply.json()["error"]
    assert reply.status_code == (404 if param == "model" else 400), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"
    context = "context is" in error["message"]
    assert (error["code"] == "context_length_exceeded") == context
    assert (error["code"] == "model_not_found") == (param == "model")
    assert not client.requests


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "line 1, column 2"),
        (b'{"prompt": "\xff"}', 400, "not UTF-8 (byte 12)"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "`temperature` must be a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "`temperature` must be a finite number"),
        (b'{"prompt": "a", "guided_json": {"minimum": -Infinity}}', 400, "`guided_json.minimum` must be"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "a number that is too long"),
        (b'{"metadata": ' + b"[" * 100000 + b"]" * 100000 + b"}", 400, "nested"),
        (b'{"prompt": "a", "metadata": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}", 400, "`metadata` is nested"),
    ],
)
def test_bodies_that_are_none(server, client, raw, status, words):
    reply = server.post("/v1/completions", raw=raw)
    assert reply.status_code == status and words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [0.5] * 100_000},
        {"prompt": "a", **{f"k{number}": 0 for number in range(100_000)}},
        {"messages": [{}] * 100_000},
        {"messages": [{"role": "user", "content": [{}] * 100_000}]},
    ],
    ids=["numbers", "fields", "messages", "parts"],
)
def test_many_mistakes_cost_no_more_than_one(body):
    """pydantic would describe each of them: gigabytes for a body of some megabytes."""
    raw = json.dumps(body).encode()
    tracemalloc.start()
    try:
        with pytest.raises(schemas.ApiError):
            schemas.parse(schemas.ChatRequest if "messages" in body else schemas.CompletionRequest, raw)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_lone_surrogate_is_a_replacement_character(server, client):
    reply = server.post("/v1/completions", raw=b'{"prompt": "a\\ud800", "stop": "\\udfff", "max_tokens": 1}')
    assert reply.status_code == 200
    assert bytes(client.requests[0].prompt).decode() == "a\ufffd"


def test_types_of_errors_for_the_client(server, client):
    with pytest.raises(openai.NotFoundError) as caught:
        server.complete(model="gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        server.complete(max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"


def test_paths_methods_and_media(server, client):
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt", 404, "model_not_found"),
        ("GET", "/static/../api.py", 404, "not_found"),
        ("GET", "/static/%2e%2e/api.py", 404, "not_found"),
        ("GET", "/static/%00", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
    ):
        reply = server.http.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert server.http.get("/v1/completions").headers["allow"] == "POST"
    plain = server.http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415 and "application/json" in plain.json()["error"]["message"]


def test_bodies_that_are_too_large():
    with Server(max_request_bytes=1000) as server:
        reply = server.post("/v1/completions", {"prompt": "a" * 2000})
        assert reply.status_code == 413 and "1000 bytes" in reply.json()["error"]["message"]

        def chunks():  # without a Content-Length
            yield b'{"prompt": "'
            for _ in range(20):
                yield b"a" * 100
            yield b'"}'

        reply = server.post("/v1/completions", raw=chunks())
        assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"
        assert server.post("/v1/completions", {"prompt": "a" * 900}).status_code == 200


def test_keys():
    with Server(api_keys=("secret", "other")) as server:
        assert server.complete(max_tokens=2).choices
        for key in ("secret", "other"):
            reply = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"bearer {key}"})
            assert reply.status_code == 200
        for path in ("/v1/models", "/v1/nothing", "/v1/", "/tokenize", "/detokenize", "/v1/chat/completions"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
                reply = httpx.post(f"{server.url}{path}", headers=headers)
                assert reply.status_code == 401, path
                assert reply.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/metrics", "/version", "/openapi.json"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        assert not server.client.aborted


def test_origins():
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with Server(allowed_origins=("http://page",), api_keys=("secret",)) as server:
        reply = httpx.options(f"{server.url}/v1/completions", headers=asked)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "http://page"
        reply = httpx.post(f"{server.url}/v1/completions", headers={"Origin": "http://page"})
        assert reply.status_code == 401 and reply.headers["access-control-allow-origin"] == "http://page"
        other = httpx.options(f"{server.url}/v1/completions", headers={**asked, "Origin": "http://other"})
        assert "access-control-allow-origin" not in other.headers
    with Server() as server:
        reply = server.http.options("/v1/completions", headers=asked)
        assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers


# -------------------------------------------------------------------------------------------- faults, queues, goodbyes


def held(**how):
    """An engine that gives one output and then waits."""
    client = FakeClient(**how)
    client.hold = asyncio.Event()
    return client


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_client_that_leaves_a_stream_ends_the_request(path):
    client = held()
    with Server(client) as server:
        body = {"stream": True, "n": 2} | ({"prompt": "a"} if path == "completions" else {"messages": MESSAGES})
        with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, timeout=SECONDS) as reply:
            assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
            lines = reply.iter_lines()  # kept: the connection ends with it
            next(lines)
            assert len(client.running) == 2
        until(lambda: not client.running)
        assert sorted(client.aborted) == sorted(request.id for request in client.requests)
        until(lambda: server.app.state.api.active == 0)


def test_a_client_that_leaves_before_the_answer_ends_the_request():
    client = held()
    with Server(client) as server:
        for stream in (False, True):
            client.hold_first = True
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": stream}, timeout=0.3)
            until(lambda: not client.running)
        assert len(client.aborted) == 2


def test_the_openai_client_can_leave():
    client = held()
    with Server(client) as server:
        stream = server.chat(stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: client.aborted)


def test_a_full_queue():
    client = held()
    with Server(client, max_queue=2) as server:
        streams = [server.complete(stream=True), server.complete(stream=True)]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            server.complete()
        assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            server.complete(stream=True)
        assert server.http.get("/health").status_code == 200
        server.release()
        for stream in streams:
            assert "".join(chunk.choices[0].text for chunk in stream) == PANGRAM[3:16], "the first three came before"
        assert server.complete().choices
        with pytest.raises(openai.BadRequestError, match="at most 2"):
            server.complete(n=3)


def test_timeouts():
    client = held()
    with Server(client, request_timeout=0.2) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            server.complete()
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        stream = server.complete(stream=True)
        with pytest.raises(openai.APIError, match=r"after 0\.2 seconds"):
            list(stream)
        client.hold_first = True
        with pytest.raises(openai.InternalServerError) as caught:
            server.complete(stream=True)
        assert caught.value.status_code == 504, "nothing was sent yet, so the status can tell"
        until(lambda: len(client.aborted) == 3)


def test_a_dead_engine():
    with Server() as server:
        server.client.fail_after = 0
        with pytest.raises(openai.InternalServerError) as caught:
            server.complete()
        assert caught.value.status_code == 503 and caught.value.code == "engine_dead"
        assert server.http.get("/health").status_code == 503
        for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": MESSAGES})):
            reply = server.post(f"/v1/{path}", {**body, "stream": True})
            assert reply.status_code == 503 and reply.json()["error"]["type"] == "server_error"
        assert server.http.get("/metrics").status_code == server.http.get("/v1/models").status_code == 200
        server.client.alive, server.client.fail_after = True, 2
        with pytest.raises(openai.APIError, match="the engine died"):
            list(server.complete(stream=True))
        server.client.alive, server.client.fail_after = True, 2
        with pytest.raises(openai.InternalServerError):
            server.chat(n=3)


def test_what_the_engine_refuses(server, client):
    client.refuse = "the prompt can never fit into memory"
    try:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="never fit"):
                server.complete(stream=stream)
    finally:
        client.refuse = None


def test_an_error_nobody_foresaw(server, client, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.app.state.api, "sampling_of", broken)
    reply = server.post("/v1/completions", {"prompt": "a"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error" and reply.headers["x-request-id"]
    assert "secret detail" in caplog.text


# ---------------------------------------------------------------------------------------------------------- the others


def test_models(server):
    (model,) = server.openai.models.list().data
    assert model.id == "tiny" and model.model_dump()["max_model_len"] == 8192
    assert server.openai.models.retrieve("tiny").id == "tiny"


def test_tokenize_and_back(server):
    reply = server.post("/tokenize", {"prompt": "hé<|im_end|>", "return_token_strs": True}).json()
    assert reply["tokens"] == [104, 0xC3, 0xA9, 259] and reply["count"] == 4 and reply["max_model_len"] == 8192
    assert reply["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    back = server.post("/detokenize", {"model": "tiny", "tokens": reply["tokens"]})
    assert back.json() == {"prompt": "hé<|im_end|>"}
    chat = server.post("/tokenize", {"messages": MESSAGES, "tools": TOOLS}).json()
    assert chat["tokens"][0] == 258 and chat["token_strs"] is None
    closed = server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert bytes(index for index in closed["tokens"] if index < 256) == b"user\nx\n"
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        reply = server.post(path, body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_health_version_metrics(server, client):
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/version").json()["version"]
    server.complete(max_tokens=9)
    text = server.http.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert float(found['nemo_lite:http_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(next(v for k, v in found.items() if k.startswith("vllm:time_to_first_token_seconds_count"))) >= 1
    assert float(next(v for k, v in found.items() if k.startswith("vllm:inter_token_latency_seconds_count"))) >= 6
    assert any(k.startswith("vllm:request_success_total") and float(v) for k, v in found.items())


def test_the_page(server):
    page = server.http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    script = server.http.get("/static/app.js")
    assert script.status_code == 200 and "javascript" in script.headers["content-type"]
    assert script.headers["x-content-type-options"] == "nosniff"


def test_request_ids(server):
    assert server.http.get("/health", headers={"X-Request-Id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    replaced = server.http.get("/health", headers={"X-Request-Id": 'evil" \\ id'}).headers["x-request-id"]
    assert len(replaced) == 32
    assert server.http.get("/v1/nothing").headers["x-request-id"]


def test_access_log(caplog):
    def lines():
        return [json.loads(record.message) for record in caplog.records if record.name == "nemo_lite.access"]

    with caplog.at_level(logging.INFO, logger="nemo_lite.access"):
        with Server() as server:
            server.complete(prompt="very private", max_tokens=3, n=2)
            list(server.chat(max_tokens=4, stream=True))
            server.http.get("/no/such/thing?private=1")
            server.post("/v1/completions", {"prompt": "very private", "top_p": 7})
            until(lambda: len(lines()) == 4)
        first, second, third, fourth = lines()
        assert (first["method"], first["route"], first["status"]) == ("POST", "/v1/completions", 200)
        assert (first["prompt_tokens"], first["new_tokens"], first["finish"]) == (12, 6, ["length", "length"])
        assert first["seconds"] >= 0 and first["request_id"]
        assert (second["route"], second["new_tokens"], second["finish"]) == ("/v1/chat/completions", 4, "length")
        assert (third["route"], third["status"]) == ("unmatched", 404)
        assert fourth["status"] == 400
        assert "private" not in caplog.text
        caplog.clear()
        with Server(log_prompts=True) as server:
            server.complete(prompt="not private", max_tokens=3)
            until(lines)
        assert lines()[0]["prompt"] == "not private"


def test_the_loop_is_free_while_a_long_prompt_is_read(monkeypatch):
    """A health probe is answered while a tokeniser works: the work is held by an event, not by a guess at its time."""
    with Server(FakeClient(max_model_len=1 << 20)) as server:
        started, go = threading.Event(), threading.Event()
        encode = server.app.state.api._encode

        def slow(*how):
            started.set()
            assert go.wait(SECONDS)
            return encode(*how)

        monkeypatch.setattr(server.app.state.api, "_encode", slow)
        thread = threading.Thread(target=lambda: server.complete(prompt="a" * 30_000, max_tokens=1))
        thread.start()
        try:
            assert started.wait(SECONDS)
            assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
        finally:
            go.set()
            thread.join(SECONDS)
        assert len(server.client.requests[0].prompt) == 30_000


def test_many_at_once(server, client):
    """Concurrent streams and plain requests do not mix up their answers."""

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as caller:

            async def one(number):
                size = 5 + number % 7
                if number % 2:
                    answer = await caller.completions.create(model="tiny", prompt="x", max_tokens=size)
                    return answer.choices[0].text == PANGRAM[:size]
                stream = await caller.completions.create(model="tiny", prompt="x", max_tokens=size, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream]) == PANGRAM[:size]

            return await asyncio.gather(*map(one, range(40)))

    assert all(asyncio.run(main()))
    assert len(client.requests) == 40


# ------------------------------------------------------------------------------------------------------- its document


def test_the_document():
    with Server(api_keys=("secret",)) as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "405", "413", "415", "429", "503", "504"}
    assert chat["security"] and "422" not in chat["responses"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert "security" not in document["paths"]["/health"]["get"]


# What a schema cannot say: how fields and the model go together.
BEYOND_SCHEMAS = {
    "context_length_exceeded",
    "invalid_combination",
    "invalid_prompt",
    "invalid_schema",
    "invalid_token_id",
    "not_supported",
}


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_schemathesis_finds_nothing(keys):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.engine import events, from_schema

    client = FakeClient("ok", max_model_len=2048, per_output=64)
    settings = ApiSettings(TINY, "tiny", max_queue=20_000, api_keys=keys)
    app = create_app(client, settings, Metrics("tiny"))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    config = schema.config
    config.seed = 1
    config.generation.max_examples = 10 if keys else 40
    config.generation.deterministic = True
    config.generation.database = "none"
    if keys:
        config.headers = {"Authorization": "Bearer secret"}
    config.checks.positive_data_acceptance.expected_statuses.append("400")  # looked at below instead
    cases, problems = 0, []
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            problems.append(str(vars(event)))
        if not isinstance(event, events.ScenarioFinished):
            continue
        for id, checks in event.recorder.checks.items():
            cases += 1
            case, found = event.recorder.cases[id].value, event.recorder.interactions.get(id)
            told = f"{case.as_curl_command()} -> {found.response.content[:500] if found and found.response else None}"
            problems += [f"{check.failure_info.failure}: {told}" for check in checks if check.failure_info]
            valid = case.meta is not None and case.meta.generation.mode.is_positive
            refused = valid and found and found.response and found.response.status_code == 400
            if refused and json.loads(found.response.content)["error"]["code"] not in BEYOND_SCHEMAS:
                problems.append(f"valid, and refused: {told}")
    assert not problems, "\n".join(problems[:5])
    assert cases > 500 and client.requests and not client.running
