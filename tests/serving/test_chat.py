"""Chat templates: transformers renders the same, history is converted, and nothing gets out of the sandbox."""

import json
import time
from datetime import datetime

import pytest
from nemo_lite_serving import chat
from nemo_lite_serving.chat import DEFAULT_TEMPLATE, ChatTemplate, normalize
from nemo_lite_serving.parsers import parse

from nemo_lite.config import UserError
from nemo_lite.data.tokenizer import load_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather <now> & later in a city, "quoted" é',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name", "enum": ["Oslo", "Roma"]},
                "days": {"type": ["integer", "null"], "minimum": 1},
            },
            "required": ["city"],
        },
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
CHATS = {
    "one": [{"role": "user", "content": "Hi <b> & 'you' é\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "They greet."},
        {"role": "user", "content": "Bye"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "reasoning": "I must look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_1", "content": "snow"},
        {"role": "assistant", "content": "Rain, then snow."},
    ],
}
# Shaped like published templates, with the features they use.
TEMPLATES = {
    "plain": """
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {% else %}
 {{ message.content }}{{ eos_token }}
    {% endif %}
{% endfor %}
""",
    "generation": """
{%- set kept = 'outside' -%}
{%- for message in messages -%}
  {%- if loop.index > 4 %}{% break %}{% endif -%}
  {%- if message.role == 'tool' %}{% continue %}{% endif -%}
  <|{{ message.role }}|>
  {%- if message.role == 'assistant' %}
    {% generation %}{% set kept = 'inside' %}{{ message.content or '' }}{{ kept }}{{ eos_token }}{% endgeneration %}

  {%- else %}{{ message.content }}{% endif -%}
  {{ kept }} {{ loop.revindex }} {{ loop.length }} {{ loop.last }} {{ loop.cycle('a', 'b') }}
{% else %}nothing{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
""",
    "tools": """
{%- macro arguments(values) -%}
  {%- for key, value in values.items() | sort %}{{ key }}={{ value | tojson }}{{ ', ' if not loop.last }}{% endfor -%}
{%- endmacro -%}
{%- set ns = namespace(tools=[], seen=0) -%}
{%- if tools is not none -%}
  {%- for tool in tools %}{{ tool | tojson(indent=4) }} {{ tool.function | tojson(separators=(',', ':')) }}
  {% endfor -%}
{%- endif -%}
{%- for message in messages | rejectattr('role', 'equalto', 'system') -%}
  {%- set ns.seen = ns.seen + 1 -%}
  {{- ns.seen ~ ': ' ~ message.role ~ '\n' -}}
  {%- if message.tool_calls is defined -%}
    {%- for call in message.tool_calls if call.function %}{{ call.function.name }}
    ({{ arguments(call.function.arguments) }})
    {% endfor -%}
  {%- endif -%}
  {%- if message.content is string %}{{ message.content.split('\n')[-1].upper() }}{% endif -%}
  {%- if message.thinking is defined %}[{{ message.thinking }}]{% endif -%}
{%- endfor -%}
{{ messages[::-1][0].role }} {{ dict(a=1, **{'b': 2}) | items | list }} {{ '%s-%d' % ('a', 3) }}
{{ '{:>5}'.format('x') }}
{{- ['a', 'b'] | join('/') }} {{ 'a b' | replace('a', 'c') }} {{ 'x' * 3 }} {{ [1] + [2] }} {{ 2 ** 5 }}
{{ documents is none }}
""",
    "thinking": """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}{% endif %}
{{- (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "recursive": """
{%- for item in [{'n': 1, 'c': [{'n': 2, 'c': []}, {'n': 3, 'c': []}]}] recursive %}{{ item.n }}
{%- if item.c %}({{ loop(item.c) }}){% endif %}{{ ',' if not loop.last }}{% endfor %}
{% for a, b in [(1, 2), (3, 4)] if a > 1 %}{{ a }}{{ b }}{{ loop.previtem | default('none') }}{% endfor %}
{% set block %}{% for message in messages %}{{ message.role }};{% endfor %}{% endset %}{{ block | length }}{{ block }}
{% for missing in nowhere %}x{% else %}empty{% endfor %}
{% macro wrap() %}<{{ caller(5) }}>{% endmacro %}{% call(x) wrap() %}{{ x }}{% endcall %}
{% filter upper %}loud{% endfilter %} {{ 'a' ~ 1 ~ none ~ true ~ missing ~ [1, 'b'] }} {{ range(3) | list }}
{{ messages | map(attribute='role') | unique | list }}
""",
    "default": DEFAULT_TEMPLATE.read_text(encoding="utf-8"),
}
NO_MESSAGE = "{{ 'x' }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory as far as chat needs one."""
    path = tmp_path_factory.mktemp("model")
    load_tokenizer("bytes").save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"bos_token": {"__type": "AddedToken", "content": "<|im_start|>"}, "image_token": "<image>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def reference(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def load(folder, template):
    return ChatTemplate.load(folder, template)


# ------------------------------------------------------------------------------------------- equality with transformers


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
def test_equal_to_transformers(folder, reference, template, messages):
    ours, source = load(folder, TEMPLATES[template]), TEMPLATES[template]
    for tools in (None, [WEATHER]):
        for add in (True, False):
            for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False}, {"low_effort": True}):
                expected = reference.apply_chat_template(
                    CHATS[messages],
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=add,
                    tokenize=False,
                    **variables,
                )
                assert ours.render(CHATS[messages], tools, add, variables=variables) == expected
                assert ours.render(CHATS[messages], tools, add, **variables) == expected


@pytest.mark.parametrize("template", ["plain", "thinking", "default", "generation"])
@pytest.mark.parametrize("final", ["Well", "Well \n", "  "])
def test_continuing_is_equal_to_transformers(folder, reference, template, final):
    messages = [*CHATS["system"], {"role": "assistant", "content": final}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = reference.apply_chat_template(messages, chat_template=TEMPLATES[template], tokenize=False, **options)
    assert load(folder, TEMPLATES[template]).render(messages, **options) == expected


def test_files_equal_to_transformers(folder, tmp_path):
    """Where the template comes from, and which of several is taken."""
    transformers = pytest.importorskip("transformers")

    def check():
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), ChatTemplate.load(tmp_path)
        for tools in (None, [WEATHER]):
            expected = theirs.apply_chat_template(CHATS["one"], tools=tools, tokenize=False)
            assert ours.render(CHATS["one"], tools, False) == expected

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config | {"chat_template": "config {{ eos_token }} {{ bos_token }} {{ image_token }}"}))
    check()
    two = [{"name": "default", "template": "no tools"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    path.write_text(json.dumps(config | {"chat_template": two}))
    check()
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].role }}{{ pad_token }}\n")
    check()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file with tools")
    check()


def test_strftime_now(folder):
    assert load(folder, "{{ strftime_now('%Y') }}").render(CHATS["one"]) == str(datetime.now().year)


# -------------------------------------------------------------------------------------------------------------- loading


def test_override(folder, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("own {{ messages[0].content }}")
    assert ChatTemplate.load(folder, str(file)).render([{"role": "user", "content": "x"}]) == "own x"
    with pytest.raises(UserError, match=r"missing\.jinja: the chat template cannot be read"):
        ChatTemplate.load(folder, str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"chat_template": 5}', "neither a template nor a list"),
        ('{"chat_template": [{"name": "a"}]}', "neither a template nor a list"),
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', "no template named default, only rag"),
        ('{"chat_template": "{% if %}"}', "is malformed in line 1"),
        ('{"chat_template": "a\\n{% for x in %}"}', "is malformed in line 2"),
        ('{"chat_template": "{{ x | nofilter }}"}', "is malformed in line 1: No filter named 'nofilter'"),
        ('{"chat_template": "{% include \'x\' %}"}', None),
    ],
)
def test_malformed_templates(tmp_path, config, message):
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        ChatTemplate.load(tmp_path).render(CHATS["one"])


def test_default_without_any_config(tmp_path):
    template = ChatTemplate.load(tmp_path)
    assert template.thinking and template.supports_tools
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert template.render([{"role": "user", "content": "Hi"}]) == expected


# --------------------------------------------------------------------------------------------------------- the messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be a list"),
        ([], "messages is empty"),
        (["x"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\]\.role is missing"),
        ([{"role": 5}], r"messages\[0\]\.role is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: content must be a text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\]: a part of type image_url",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: a part of type text needs a text"),
        ([{"role": "user", "content": [5]}], r"content\[0\]: a part of no type"),
        ([{"role": "assistant", "tool_calls": 5}], r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] needs a function with a name"),
        ([{"role": "user", "content": "x", "y": object()}], r"messages\[0\]: a object is not JSON"),
    ],
)
def test_wrong_messages(folder, messages, message):
    with pytest.raises(UserError, match=message):
        load(folder, "{{ messages }}").render(messages)


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", 5, [1], "[" * 100_000])
def test_wrong_arguments(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UserError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments"):
        normalize([{"role": "assistant", "tool_calls": [call]}])


def test_history_is_converted():
    def call(arguments):
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call('{"x": [1]}'), call(""), call(None), call({"y": 2})],
        },
        {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None},
    ]
    kept = json.dumps(messages)
    first, second, third = normalize(messages, keep_developer=False)
    assert first == {"role": "system", "content": "a\nb\nc"}
    assert [one["function"]["arguments"] for one in second["tool_calls"]] == [{"x": [1]}, {}, {}, {"y": 2}]
    assert "content" not in second
    assert third == {"role": "assistant", "content": "x"}
    assert json.dumps(messages) == kept
    assert normalize(messages)[0]["role"] == "developer"


def test_deep_messages_and_variables(folder):
    deep = []
    for _ in range(5000):
        deep = [deep]
    for given in ({"messages": [{"role": "user", "x": deep}]}, {"variables": {"x": deep}}, {"tools": [{"x": deep}]}):
        messages = given.pop("messages", CHATS["one"])
        with pytest.raises(UserError, match="nested more than 100 deep"):
            load(folder, NO_MESSAGE).render(messages, **given)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "documents"])
def test_reserved_variables(folder, name):
    with pytest.raises(UserError, match=f"chat_template_kwargs: {name} cannot be set"):
        load(folder, NO_MESSAGE).render(CHATS["one"], variables={name: 1})


def test_continuing_needs_content(folder):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(UserError, match="needs a last message with content"):
        load(folder, NO_MESSAGE).render([{"role": "assistant"}], **options)
    with pytest.raises(UserError, match="leaves the last message out"):
        load(folder, NO_MESSAGE).render(CHATS["one"], **options)
    with pytest.raises(UserError, match="exclude each other"):
        load(folder, NO_MESSAGE).render(CHATS["one"], continue_final_message=True)


# ---------------------------------------------------------------------------------------------------------- the sandbox


def test_raise_exception(folder):
    with pytest.raises(UserError, match=r"refuses these messages: roles must alternate, twice$"):
        load(folder, "{{ raise_exception('roles must alternate,\n twice') }}").render(CHATS["one"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ [].__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{{ dict.__call__.__func__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ ('{0.__class__}' | attr('format'))(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].clear() }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ ['{0.__class__}'] | map('format', 1) | first }}{{ (1).__class__.x }}",
    ],
)
def test_sandbox(folder, source):
    """An escape fails, or finds nothing there."""
    try:
        text = load(folder, source).render(CHATS["one"])
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert text in ("", "{0.__class__}")


NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
BIG = "{% set s = 'aaaaaaaaaa' * 1000000 %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(1000000) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ ['a'] * 10000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        NESTED + "{{ ns.x }}",
        NESTED + "{{ ns.x | tojson }}",
        NESTED + "{{ '' ~ ns.x }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a\nb' | indent(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10000000000) }}",
        "{{ [1] | batch(10000000000, 0) | list }}",
        "{{ [1] | tojson(indent=10000000000) }}",
        BIG + "{% for i in range(50) %}{{ s }}{% endfor %}",
        BIG + "{% set x %}{% for i in range(50) %}{{ s }}{% endfor %}{% endset %}",
        BIG + "{{ s.replace('a', s) }}",
        BIG + "{{ s | replace('a', s) }}",
        BIG + "{{ ''.join([s] * 1000) }}",
        BIG + "{{ [s] * 1000 | join }}",
        BIG + "{{ ([s] * 1000) | join }}",
    ],
)
def test_without_end(folder, source, monkeypatch):
    monkeypatch.setattr(chat, "MAX_STEPS", 200_000)
    started = time.monotonic()
    with pytest.raises(UserError):
        load(folder, source).render(CHATS["one"])
    assert time.monotonic() - started < 10  # not a measurement: without the bounds these never come back


def test_a_budget_is_for_one_rendering(folder, monkeypatch):
    monkeypatch.setattr(chat, "MAX_STEPS", 100)
    template = load(folder, "{% for i in range(60) %}x{% endfor %}")
    for _ in range(3):
        assert template.render(CHATS["one"]) == "x" * 60


# ------------------------------------------------------------------------------------------------------------- thinking


def test_thinking_switch(folder):
    assert not load(folder, TEMPLATES["plain"]).thinking
    with pytest.raises(UserError, match="no switch for thinking"):
        load(folder, TEMPLATES["plain"]).thinking_variables("on")
    other = load(folder, "{% if thinking %}<think>{% endif %}")
    assert other.thinking and not other.supports_tools
    assert other.thinking_variables("low") == {"thinking": True}
    qwen = load(folder, TEMPLATES["thinking"])
    assert qwen.thinking_variables("off") == {"enable_thinking": False}
    shadowed = load(folder, "{% set enable_thinking = enable_thinking if enable_thinking is defined else true %}")
    assert shadowed.thinking
    assert not load(folder, "{% set enable_thinking = true %}{{ enable_thinking }}").thinking


def test_default_thinking(tmp_path):
    template, messages = ChatTemplate.load(tmp_path), CHATS["turns"]
    start = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>Hello<|im_end|>\n<|im_start|>user\nBye"
    )
    off, on = (
        f"{start}<|im_end|>\n<|im_start|>assistant\n<think></think>",
        f"{start}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    )
    low = f"{start}\n\n{{reasoning effort: low}}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for mode, expected in (("off", off), ("on", on), ("low", low)):
        assert template.render(messages, variables=template.thinking_variables(mode)) == expected
        assert template.reasoning_open(expected) is (mode != "off")
    assert template.render(messages) == off
    for effort, expected in (("none", off), ("low", low), ("minimal", low), ("medium", on), ("high", on)):
        assert template.render(messages, reasoning_effort=effort) == expected
    assert template.render(messages, low_effort=True, enable_thinking=False) == off
    whole = template.render(messages, truncate_history_thinking=False)
    assert "<think>\nThey greet.\n</think>\nHello<|im_end|>" in whole


def test_reasoning_open():
    for prompt, expected in (
        ("<think>", True),
        ("<think>\n \n", True),
        ("<think></think>", False),
        ("<think>a", False),
    ):
        assert ChatTemplate.reasoning_open(prompt) is expected
    assert ChatTemplate.reasoning_open("<think>\na", continued=True)
    assert not ChatTemplate.reasoning_open("<think>\na</think>b", continued=True)
    assert not ChatTemplate.reasoning_open("a", continued=True)


# ------------------------------------------------------------------------------------------------- the default template


def test_default_golden(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, *CHATS["tools"][:-1]]
    expected = """<|im_start|>system
Be brief.

# Tools

These functions can be called:

<tools>
<function>
<name>weather</name>
<description>The weather <now> & later in a city, "quoted" é</description>
<parameters>
<parameter>
<name>city</name>
<type>string</type>
<description>Its name</description>
<enum>["Oslo", "Roma"]</enum>
</parameter>
<parameter>
<name>days</name>
<type>["integer", "null"]</type>
<minimum>1</minimum>
</parameter>
<required>["city"]</required>
</parameters>
</function>
</tools>

A call is written like this, with one parameter block for each argument:

<tool_call>
<function=NAME>
<parameter=ARGUMENT>
VALUE
</parameter>
</function>
</tool_call>

Text stands in VALUE as it is, everything else as JSON; required arguments are always given. \
Explanations come before the first call and nothing after the last. \
If no function helps, answer without a call.<|im_end|>
<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
<think>
I must look.
</think>
<tool_call>
<function=weather>
<parameter=city>
Oslo
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>
<tool_call>
<function=weather>
<parameter=city>
Oslo
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain
</tool_response>
<tool_response>
snow
</tool_response><|im_end|>
<|im_start|>assistant
<think>
"""
    assert ChatTemplate.load(tmp_path).render(messages, [WEATHER], enable_thinking=True) == expected


def test_default_roles(tmp_path):
    template = ChatTemplate.load(tmp_path)
    text = template.render([{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}], None, False)
    assert text == "<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    with pytest.raises(UserError, match="has the role critic, which is none of"):
        template.render([{"role": "critic", "content": "x"}])
    text = template.render([{"role": "assistant", "content": "<think>\na\n</think>\n\nb"}, *CHATS["one"]], None, False)
    assert text.startswith("<|im_start|>assistant\n<think></think>b<|im_end|>")
    tools = [{"type": "function", "name": "flat"}, {"type": "function", "function": {"name": "bare", "parameters": {}}}]
    assert "<name>flat</name>\n<parameters>\n</parameters>" in template.render(CHATS["one"], tools)


def test_what_the_template_writes_the_parser_reads(tmp_path):
    """An answer parsed, put into the history and rendered gives the prompt and the answer again, to the letter."""
    template = ChatTemplate.load(tmp_path)
    prompt = template.render(CHATS["one"], [WEATHER], enable_thinking=True)
    answer = (
        "Let me think.\n</think>\nI look.\n<tool_call>\n<function=weather>\n<parameter=city>\n a <b>\n\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    )
    parsed = parse(answer, tools=[WEATHER], reasoning=True, reasoning_open=template.reasoning_open(prompt))
    (call,) = parsed.tool_calls
    message = {
        "role": "assistant",
        "content": (parsed.content or "").rstrip("\n"),
        "reasoning_content": parsed.reasoning,
        "tool_calls": [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}}],
    }
    again = template.render([*CHATS["one"], message], [WEATHER], False, enable_thinking=True)
    assert again == prompt + answer + "<|im_end|>\n"
