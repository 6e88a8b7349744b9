"""Reasoning and tool calls out of streamed text: golden transcripts, degraded forms, any cut."""

import ast
import json
import random
import re
import sys
from pathlib import Path

import answers
import pytest
from answers import NOT_CALLS, SCRAPS, THINK, TOOLS, xml
from hypothesis import example, given
from hypothesis import strategies as st
from nemo_lite_serving import parsers
from nemo_lite_serving.parsers import Content, OutputParser, Reasoning, ToolCallDelta, ToolCallStart, join


def make(**options):
    options = {"tools": TOOLS, "make_id": lambda index: f"id{index}", **options}
    return OutputParser(**options)


def run(pieces, truncated=False, **options):
    parser = make(**options)
    events = [event for piece in pieces for event in parser.push(piece)]
    return join(events + parser.flush(truncated)), parser


def parse(text, truncated=False, **options):
    """The whole text at once, and checked against one character at a time."""
    whole, _ = run([text], truncated, **options)
    assert run(text, truncated, **options)[0] == whole
    return whole


def calls(parsed):
    return [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls]


# ------------------------------------------------------------------------------------------------------------ reasoning


@pytest.mark.parametrize(
    ("text", "options", "reasoning", "content"),
    answers.REASONING,
)
def test_reasoning(text, options, reasoning, content):
    parsed = parse(text, **options)
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (reasoning, content, [])


def test_a_tool_call_ends_the_reasoning():
    for call in (
        xml("weather", ("city", "Oslo")),
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
        '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo"}}]</TOOLCALL>',
        "<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>",
    ):
        for rest in ("", "\n</think>\n"):
            parsed = parse(f"I must look.\n{call}{rest}", **THINK)
            assert (parsed.reasoning, parsed.content) == ("I must look.", None)
            assert calls(parsed) == [("weather", {"city": "Oslo"})]


def test_thinking_about_a_call_is_no_call():
    for text in (
        "Use <function=weather> now",
        "Write <tool_call> first",
        "<tool_call>\n<function=nope>",
        "<TOOLCALL>?",
    ):
        parsed = parse(text + "\n</think>\nok", **THINK)
        assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (text, "ok", [])


# ----------------------------------------------------------------------------------------------------------- XML calls


def test_xml_golden():
    text = "Let me see.\n\n" + xml("weather", ("city", 'São <Paulo> & "co"\\\n2'), ("days", "3")) + "\n"
    parsed = parse(text)
    assert parsed.content == "Let me see.\n\n"
    (call,) = parsed.tool_calls
    assert (call.id, call.name) == ("id0", "weather")
    assert call.arguments == '{"city": "São <Paulo> & \\"co\\"\\\\\\n2", "days": 3}'


def test_events_stream():
    parser, seen = make(), []
    for char in "Hi" + xml("weather", ("city", "Oslo"), ("days", "3")):
        seen += parser.push(char)
    assert parser.flush() == []
    assert seen[:3] == [Content("H"), Content("i"), ToolCallStart(0, "id0", "weather")]
    fragments = [event.arguments for event in seen[3:] if isinstance(event, ToolCallDelta)]
    assert fragments == ["{", '"city": "', "O", "s", "l", "o", '"', ', "days": ', "3", "}"]
    assert parser.tool_calls == 1


def test_state():
    parser = make(**THINK)
    states = []
    for piece in ("hm", "</think>", "so", "<tool_call>", "<function=now>", "</function>"):
        parser.push(piece)
        states.append(parser.state)
    assert states == ["reasoning", "content", "content", "content", "tool_call", "content"]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("text", "", ""),
        ("text", "  two\n  lines  ", "  two\n  lines  "),
        ("text", "\nkept\n", "\nkept\n"),
        ("text", "tab\there\x00\x1f\r\n", "tab\there\x00\x1f\r\n"),
        ("text", "😀 \u2028 é", "😀 \u2028 é"),
        ("text", "<b>x</b> </param <parameter", "<b>x</b> </param <parameter"),
        ("text", "a </function> b </tool_call> <parameter=x> c", "a </function> b </tool_call> <parameter=x> c"),
        ("unknown", "7", "7"),
        ("choice", "1", "1"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "maybe", "maybe"),
        ("ratio", "1e-3", 0.001),
        ("ratio", "NaN", "NaN"),
        ("ratio", "1e999", "1e999"),
        ("tags", '["a", 1, null]', ["a", 1, None]),
        ("tags", '["a\nb"]', ["a\nb"]),
        ("tags", "a, b", "a, b"),
        ("tags", "[" * 100_000, "[" * 100_000),
        ("extra", '{"k": {"é": [1.5]}}', {"k": {"é": [1.5]}}),
        ("nothing", "None", None),
        ("nothing", "", ""),
        ("maybe", "null", None),
        ("maybe", "5", "5"),
        ("maybe", '"x"', '"x"'),
        ("either", "5", 5),
        ("either", "five", "five"),
    ],
)
def test_typed_values(key, text, value):
    parsed = run([xml("write", (key, text))])[0] if len(text) > 1000 else parse(xml("write", (key, text)))
    assert calls(parsed) == [("write", {key: value})]


def test_numbers_keep_their_digits():
    digits = "123456789012345678901234567890.10000000000000000001"
    assert parse(xml("write", ("ratio", digits))).tool_calls[0].arguments == f'{{"ratio": {digits}}}'
    assert calls(parse(xml("weather", ("days", "9" * 5000)))) == [("weather", {"days": "9" * 5000})]  # beyond int()


def test_schema_references():
    schema = {
        "properties": {
            "size": {"$ref": "#/$defs/Size"},
            "loop": {"$ref": "#/$defs/Loop"},
            "odd": {"$ref": "#/nowhere", "type": 3},
            "level": {"enum": [1, 2]},
            "free": {},
            "wrong": 5,
        },
        "$defs": {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
    tools = [{"type": "function", "name": "f", "parameters": schema}]  # the flat form of the Responses API
    text = xml("f", *((key, "1") for key in schema["properties"]))
    expected = {"size": 1, "loop": "1", "odd": "1", "level": 1, "free": "1", "wrong": "1"}
    assert calls(parse(text, tools=tools)) == [("f", expected)]


@pytest.mark.parametrize("parameters", [None, 5, [], {"properties": None}, {"properties": {"a": None}}])
def test_odd_schemas(parameters):
    tools = [{"function": {"name": "f", "parameters": parameters}}, {"function": None}, None, {"function": {"name": 3}}]
    assert calls(parse(xml("f", ("a", "1")), tools=tools)) == [("f", {"a": "1"})]


@pytest.mark.parametrize(
    ("text", "expected", "content"),
    answers.DEGRADED_XML,
)
def test_degraded_xml(text, expected, content):
    parsed = parse(text)
    assert (calls(parsed), parsed.content) == (expected, content)


@pytest.mark.parametrize("text", NOT_CALLS)
def test_what_is_no_call_is_text(text):
    parsed = parse(text)
    assert (parsed.content, parsed.tool_calls, parsed.reasoning) == (text, [], None)
    parsed = parse("So:\n" + text + "\nThat.")
    assert (parsed.content, parsed.tool_calls) == ("So:\n" + text + "\nThat.", [])


def test_a_call_after_broken_json():
    bad = '<tool_call>{"name": oops}</tool_call>'
    parsed = parse(f"{bad}\n{xml('now')}")
    assert (parsed.content, calls(parsed)) == (bad + "\n", [("now", {})])


def test_without_tools_markup_is_text():
    text = "a\n" + xml("weather", ("city", "Oslo")) + "\n"
    for options in ({"tools": None}, {"tools": []}, {"tool_format": None}):
        assert parse(text, **options) == parsers.Parsed(None, text, [])


def test_formats_exclude_each_other():
    written = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert parse(xml("now"), tool_format="json").content == xml("now")
    assert parse(written, tool_format="qwen3_coder").content == written
    assert parse(f"<TOOLCALL>{written}", tool_format="qwen3_coder").content == f"<TOOLCALL>{written}"
    assert calls(parse(written, tool_format="json")) == [("now", {})]
    assert calls(parse(xml("now"), tool_format="qwen3_coder")) == [("now", {})]


def test_cut_off_arguments_stay_open():
    start = "<tool_call>\n<function=weather>\n<parameter=city>\nrm -r /tmp"
    (call,) = parse(start, truncated=True).tool_calls
    assert call.arguments == '{"city": "rm -r /tmp'
    (call,) = parse("<function=weather><parameter=days>12", truncated=True).tool_calls
    assert call.arguments == '{"days": '
    (call,) = parse("<function=weather>", truncated=True).tool_calls
    assert call.arguments == "{"
    (call,) = parse(xml("now"), truncated=True).tool_calls
    assert call.arguments == "{}"


# ---------------------------------------------------------------------------------------------------------- JSON calls


@pytest.mark.parametrize(
    ("text", "expected", "content"),
    answers.JSON_CALLS,
)
def test_json_calls(text, expected, content):
    parsed = parse(text)
    assert (calls(parsed), parsed.content) == (expected, content)


def test_broken_json_is_given_back_at_once():
    parser = make()
    assert parser.push('<tool_call>{"name" oops') == [Content('<tool_call>{"name" oops')]


def test_only_what_may_become_a_tag_is_held_back():
    parser = make(**THINK)
    assert parser.push("a <") == [Reasoning("a ")]
    assert parser.push("b\n") == [Reasoning("<b")]
    assert parser.push("c</think>d <tool_cat> <tool_") == [Reasoning("\nc"), Content("d <tool_cat> ")]
    assert parser.push("x") == [Content("<tool_x")]


def test_random_ids_differ():
    parser = OutputParser(tools=TOOLS)
    starts = [event for event in parser.push(xml("now") * 3) if isinstance(event, ToolCallStart)]
    assert [start.index for start in starts] == [0, 1, 2]
    assert len({start.id for start in starts}) == 3


def test_parse_helper():
    parsed = parsers.parse("x</think>y" + xml("now"), reasoning=True, reasoning_open=True, tools=TOOLS)
    assert (parsed.reasoning, parsed.content, calls(parsed)) == ("x", "y", [("now", {})])


# ------------------------------------------------------------------------------------------------------------ any split

TEXTS = st.lists(st.sampled_from(SCRAPS), max_size=14).map("".join) | st.sampled_from(NOT_CALLS)
OPTIONS = st.fixed_dictionaries(
    {
        "reasoning": st.booleans(),
        "reasoning_open": st.booleans(),
        "tools": st.sampled_from([TOOLS, TOOLS, TOOLS, None]),
        "tool_format": st.sampled_from(["auto", "auto", "qwen3_coder", "json", None]),
    }
)


@given(TEXTS, OPTIONS, st.booleans(), st.randoms(use_true_random=False))
@example(
    "<tool_call>\n<function=weather>\n<parameter=text>\r\r\n</parameter>", {"tools": TOOLS}, False, random.Random(0)
)
def test_any_split_gives_the_same(text, options, truncated, rng):
    whole, _ = run([text], truncated, **options)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, truncated, **options)[0] == whole
    assert run(text, truncated, **options)[0] == whole
    if not truncated:
        for call in whole.tool_calls:
            assert isinstance(json.loads(call.arguments), dict)
            call.arguments.encode()


@given(TEXTS, st.booleans())
def test_nothing_is_lost_without_tools(text, opened):
    assert run(text, tools=None)[0].content == (text or None)
    parsed, _ = run(text, tools=None, reasoning=True, reasoning_open=opened)
    letters = text.replace("<think>", "").replace("</think>", "")
    kept = ((parsed.reasoning or "") + (parsed.content or "")).replace("<think>", "").replace("</think>", "")
    assert "".join(kept.split()) == "".join(letters.split())


@given(
    st.lists(
        st.tuples(st.sampled_from(["text", "path", "unknown"]), st.text()), max_size=4, unique_by=lambda pair: pair[0]
    ),
    st.text(),
    st.randoms(use_true_random=False),
)
def test_written_calls_are_read_back(pairs, before, rng):
    """Any value survives the way through the XML form, unless a line of it begins like the call's own next tag."""
    tags = re.compile(r"</parameter>|^(</function>|</tool_call>|<parameter=|<function=|<tool_call>)", re.MULTILINE)
    pairs = [(key, value) for key, value in pairs if not tags.search(value) and not value.endswith("\r")]
    text = before + "." + xml("write", *pairs)
    if "<" in before:
        return
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(5))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parsed, _ = run(pieces)
    assert (parsed.content, calls(parsed)) == (before + ".", [("write", dict(pairs))])


# ---------------------------------------------------------------------------------------------------------------- other


def test_long_values_take_linear_time():
    value = "x = '<a>'\n" * 20_000
    (call,) = run([xml("write", ("text", value))])[0].tool_calls
    assert json.loads(call.arguments) == {"text": value}
    written = json.dumps({"name": "write", "arguments": {"text": value[:50_000]}})
    (call,) = run(f"<tool_call>{written}</tool_call>")[0].tool_calls
    assert json.loads(call.arguments) == {"text": value[:50_000]}
    assert run(["<" * 100_000])[0].content == "<" * 100_000


def test_only_the_standard_library():
    tree = ast.parse(Path(parsers.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
