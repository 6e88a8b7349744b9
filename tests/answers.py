"""What models write: tools, reasoning and calls in good and in degraded forms, each with what is read there.

For tests of the parsers, ours and those that another server takes from us.
"""


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [
    tool("weather", city={"type": "string"}, days={"type": "integer"}),
    tool(
        "write",
        path={"type": "string"},
        text={"type": "string"},
        flag={"type": "boolean"},
        tags={"type": "array"},
        extra={"type": "object"},
        ratio={"type": "number"},
        nothing={"type": "null"},
        maybe={"type": ["string", "null"]},
        either={"anyOf": [{"type": "integer"}, {"type": "string"}]},
        choice={"enum": ["a", "b"]},
    ),
    tool("now"),
]


def xml(name, *pairs):
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


THINK = {"reasoning": True, "reasoning_open": True}
OSLO, ROMA = ("weather", {"city": "Oslo"}), ("weather", {"city": "Roma"})

# text, how it is read, its reasoning, its content
REASONING = [
    ("I think\nso.\n</think>\n\nYes.\n", THINK, "I think\nso.", "Yes.\n"),
    ("\n\nI think</think>  Yes", THINK, "I think", "  Yes"),
    ("<think>\nI think</think>Yes", {"reasoning": True}, "I think", "Yes"),
    ("\n <think>I think</think>Yes", {"reasoning": True}, "I think", "Yes"),
    ("<think>\nI think</think>Yes", THINK, "I think", "Yes"),  # opened again by the model
    ("Yes <think> and </think>", {"reasoning": True}, None, "Yes <think> and </think>"),
    ("</think>\n\nYes", {"reasoning": True}, None, "Yes"),  # closed again by the model
    ("a</think>\n</think>\n<think>b</think>c", THINK, "ab", "c"),
    ("</think>Yes", THINK, None, "Yes"),
    ("never closed\n\n", THINK, "never closed", None),
    ("a</thin", THINK, "a</thin", None),
    ("a</think", {}, None, "a</think"),
    ("<think>a</think>b", {}, None, "<think>a</think>b"),
    ("a</think>\n  \n", THINK, "a", None),
    ("  \n", {"reasoning": True}, None, "  \n"),
    ("  Yes", {"reasoning": True}, None, "  Yes"),
    ("", THINK, None, None),
    ("α<β\r\n</think>\r\n日本", THINK, "α<β", "日本"),
    ("a < b</b></think >c", THINK, "a < b</b></think >c", None),
    ("a</</think>b", THINK, "a</", "b"),
    ("a<<think></think>b", THINK, "a<<think>", "b"),
]

# text, its calls, its content
DEGRADED_XML = [
    (xml("now"), [("now", {})], None),
    ("<tool_call><function=now></function></tool_call>", [("now", {})], None),
    ("<function=weather><parameter=city>Oslo</parameter></function>", [OSLO], None),
    ("ok <function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>\n", [OSLO], "ok "),
    (xml("weather", ("city", "Oslo")) + "\n" + xml("weather", ("city", "Roma")), [OSLO, ROMA], None),
    (xml("weather", ("city", "Oslo")) + xml("weather", ("city", "Roma")), [OSLO, ROMA], None),
    # Two functions in one wrapper.
    (
        "<tool_call><function=now></function>\n<function=weather><parameter=city>Roma</parameter></function></tool_call>",
        [("now", {}), ROMA],
        None,
    ),
    # Missing </parameter>.
    ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</function>\n</tool_call>", [OSLO], None),
    ("<tool_call><function=weather><parameter=city>Oslo</function></tool_call>", [OSLO], None),
    (
        "<function=weather>\n<parameter=city>\nOslo\n<parameter=days>\n2\n</parameter>\n</function>",
        [("weather", {"city": "Oslo", "days": 2})],
        None,
    ),
    ("<tool_call>\n<function=weather>\n<parameter=days>\n2\n</tool_call>", [("weather", {"days": 2})], None),
    # Missing </function>.
    ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</tool_call>", [OSLO], None),
    (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n" + xml("now"),
        [OSLO, ("now", {})],
        None,
    ),
    # Missing everything up to the next call.
    (f"<function=weather>\n<parameter=city>\nOslo\n{xml('now')}", [OSLO, ("now", {})], None),
    # The end of the text in the middle.
    ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo", [OSLO], None),
    ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n", [OSLO], None),
    ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>", [OSLO], None),
    ("<tool_call>\n<function=weather>", [("weather", {})], None),
    # JSON inside the XML.
    ('<tool_call><function=weather>{"city": "Oslo"}</function></tool_call>', [OSLO], None),
    ("<function=weather>{not json}</function>", [("weather", {})], "{not json}"),
    # Text where none belongs.
    ("<function=weather>\nWell then\n<parameter=city>Oslo</parameter></function>", [OSLO], "\nWell then"),
    ("<function=now></function> Done.", [("now", {})], " Done."),
    ("<function=now><parameter=>x</function>", [("now", {})], "<parameter=>x"),
]

JSON_CALLS = [
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', [OSLO], None),
    ('<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}', [OSLO], None),
    ('Hm. <tool_call>{"name": "weather", "parameters": {"city": "Oslo"}}</tool_call>', [OSLO], "Hm. "),
    ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', [OSLO], None),
    ('<tool_call>{"name": "now"}</tool_call>bye', [("now", {})], "bye"),
    (
        '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now"}]</TOOLCALL>',
        [OSLO, ("now", {})],
        None,
    ),
    ('<TOOLCALL>{"name": "now", "arguments": {}}</TOOLCALL>', [("now", {})], None),
    (
        '<tool_call>{"name": "now"}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {"city": "Roma"}}</tool_call>',
        [("now", {}), ROMA],
        None,
    ),
    (
        '<tool_call>{"name": "write", "arguments": {"text": "a\nb \\"}\\u00e9 </tool_call>", "ratio": -1.5e3}}',
        [("write", {"text": 'a\nb "}é </tool_call>', "ratio": -1500.0})],
        None,
    ),
    (
        '<tool_call>{"name": "write", "arguments": {"tags": [[], {}, true, null], "text": "\\ud83d"}}</tool_call>',
        [("write", {"tags": [[], {}, True, None], "text": "\ufffd"})],
        None,
    ),
]

NOT_CALLS = [
    "<tool_call>",
    "<tool_call>\n\n",
    "<tool_call>\nhello</tool_call>",
    "<tool_call>\n<function=unknown>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "<function=weather",
    "<function=weather2></function>",
    "a < b and <tool_call and </tool_call> and <parameter=x>",
    "<tool_call>" + " " * 1000 + "<function=unknown>",
    "<tool_call>" * 5,
    "<TOOLCALL>\n",
    "<TOOLCALL>[]</TOOLCALL>",
    '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo"',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": "nope"}</tool_call>',
    '<tool_call>{"name": "weather" "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": "\\q"}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": "\\uZZZZ"}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": 01}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": 1e999}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": ' + "[" * 500,
    '<tool_call>{"name": 5}</tool_call>',
    "<tool_call>{]</tool_call>",
    "<tool_call>[1,]</tool_call>",
    '<TOOLCALL>[{"name": "now", "arguments": {}}, {"name": "unknown"}]</TOOLCALL>',
]

# Pieces of which property tests make texts.
SCRAPS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>", "<function=weather>",
    "<function=write>", "<function=nope>", "</function>", "<parameter=city>", "<parameter=text>", "<parameter=days>",
    "<parameter=extra>", "</parameter>", '{"name": "now", "arguments": {}}',
    '{"name": "weather", "arguments": {"city":', '"Oslo"}}', "[", "]", "{", "}", ",", '"', "\\", "\n", "\r\n", " ",
    "<", "</", "3", "true", "a", "é😀", "Hello there", xml("weather", ("city", "Oslo"), ("days", "2")), "\n\n",
    "<tool_", "<par", ">",
]  # fmt: skip
