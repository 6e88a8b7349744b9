"""The model's text, as it streams, into reasoning, content and tool calls.

:class:`OutputParser` is one state machine for reasoning (`<think>...</think>`) and for tool calls in three formats:

    <tool_call>                             <tool_call>{"name": "f", "arguments": {"key": 1}}</tool_call>
    <function=f>
    <parameter=key>                         <TOOLCALL>[{"name": "f", "arguments": {"key": 1}}]</TOOLCALL>
    1
    </parameter>
    </function>
    </tool_call>

Rules:
- However the text is cut into pieces, the events join to the same result. So each decision waits until more text cannot
  change it; only what may still become a tag (or a line break before one) is held back.
- Fail-open: nothing raises, and what turns out not to be a call (an unknown function, broken JSON, a lone tag) is text.
- A call counts only if it names one of the request's functions. Such a call ends the reasoning, `</think>` or not.
- Line breaks at the start of the reasoning, before and after `</think>` belong to the tags and are dropped, so that a
  template which writes them again gives the same prompt. Text that is only white space after the reasoning or beside a
  call is dropped. All other text is kept to the letter.
- XML arguments stream: strings as they come, other values when complete. A JSON call is one unit: all of it, or text.

Only the standard library is used, so that the file serves as a plugin elsewhere.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

ToolFormat = Literal["qwen3_coder", "json", "auto"]


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; its arguments follow as :class:`ToolCallDelta` of the same index."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of the call's arguments: the fragments of one index join to a JSON object."""

    index: int
    arguments: str


Event = Reasoning | Content | ToolCallStart | ToolCallDelta


@dataclass
class ToolCall:
    """A whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Parsed:
    """All events of one answer, joined; None where there was no such text."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def join(events: Iterable[Event]) -> Parsed:
    """Events -> the message they make."""
    reasoning, content, calls, arguments = [], [], [], []
    for event in events:
        if isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, ToolCallStart):
            calls.append(ToolCall(event.id, event.name))
            arguments.append([])
        else:
            arguments[event.index].append(event.arguments)
    for call, parts in zip(calls, arguments):
        call.arguments = "".join(parts)
    return Parsed("".join(reasoning) or None, "".join(content) or None, calls)


# --------------------------------------------------------------------------------------------------------- JSON values

_ATOM = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_MAX_DEPTH = 100


class _JsonScanner:
    """Finds the end of one JSON array or object in growing text, or the first character that makes it none.

    Line breaks inside strings are let through, as models write them.
    """

    def __init__(self, at: int):
        self.at = at  # next character to look at
        self._expect = "value"
        self._closers: list[str] = []
        self._atom = ""

    def scan(self, text: str) -> bool | None:
        """True: complete, it ends before `at`. False: not JSON. None: more text is needed."""
        while self.at < len(text):
            char = text[self.at]
            self.at += 1
            if not self._step(char):
                return False
            if not self._closers:
                return True
        return None

    def _step(self, char: str) -> bool:
        expect = self._expect
        if expect in ("string", "key string"):
            if char == "\\":
                self._expect = expect + " escape"
            elif char == '"':
                self._expect = "comma" if expect == "string" else "colon"
            return True
        if expect.endswith("escape"):  # the digits of \uXXXX are checked when the whole is parsed
            self._expect = expect.removesuffix(" escape")
            return char in '"\\/bfnrtu'
        if expect == "atom":
            if char not in " \t\r\n,]}":
                self._atom += char
                return len(self._atom) < 1000
            if not _ATOM.fullmatch(self._atom):
                return False
            self._expect = expect = "comma"
        if char in " \t\r\n":
            return True
        if char in "]}" and expect in ("comma", "value or end", "key or end"):
            self._expect = "comma"
            return bool(self._closers) and self._closers.pop() == char
        if expect in ("key", "key or end"):
            self._expect = "key string"
            return char == '"'
        if expect == "colon":
            self._expect = "value"
            return char == ":"
        if expect == "comma":
            self._expect = "key" if self._closers[-1] == "}" else "value"
            return char == ","
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._expect = "key or end" if char == "{" else "value or end"
            return len(self._closers) <= _MAX_DEPTH
        if not self._closers:
            return False  # only arrays and objects
        self._expect, self._atom = ("string", "") if char == '"' else ("atom", char)
        return char in '"-0123456789tfn'


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _load(text: str, strict: bool = True) -> Any:
    """The JSON value of a text; ValueError for anything that is none (NaN and 1e999 included)."""
    try:
        return json.loads(text, strict=strict, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _dump(value: Any) -> str:
    """JSON text that UTF-8 can hold: half a surrogate pair, which JSON can spell, becomes U+FFFD."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --------------------------------------------------------------------------------------------------- a function's types

_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


def _types(schema: Any, root: Any, depth: int = 0) -> set[str]:
    """Names of the JSON types a schema allows; empty where it does not say."""
    if not isinstance(schema, dict) or depth > 8:
        return set()
    named = schema.get("type")
    if isinstance(named, (str, list)):
        return {name for name in ([named] if isinstance(named, str) else named) if isinstance(name, str)}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target = root
        for part in reference[2:].split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        return _types(target, root, depth + 1)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return {_TYPE_NAMES.get(type(value), "null") for value in values}
    choices = [one for key in ("anyOf", "oneOf", "allOf") for one in schema.get(key) or [] if isinstance(one, dict)]
    return {name for choice in choices for name in _types(choice, root, depth + 1)}


class _Function:
    """What the parser needs to know of one tool: which of its parameters are text."""

    def __init__(self, parameters: Any):
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        properties = properties if isinstance(properties, dict) else {}
        self._types = {key: _types(schema, parameters) for key, schema in properties.items()}

    def is_text(self, key: str) -> bool:
        """Whether a value is text for certain; a parameter the schema does not describe is."""
        return not self._types.get(key, set()) - {"string"}

    def value(self, key: str, text: str) -> str:
        """The JSON of a value that may not be text; text where it cannot be parsed, or only parses as another type."""
        types, bare = self._types.get(key, set()), text.strip()
        # Templates that print values with Python's spelling teach it to models.
        bare = {"True": "true", "False": "false", "None": "null"}.get(bare, bare)
        try:
            value = _load(bare, strict=False)
        except ValueError:
            return _dump(text)
        if "string" in types:
            found = _TYPE_NAMES.get(type(value), "null")
            if found == "string" or not (found in types or (found == "integer" and "number" in types)):
                return _dump(text)
        try:
            _load(bare)
            return bare  # as it was written: no digit of a number is lost
        except ValueError:  # line breaks within strings
            return _dump(value)


def _functions(tools: Iterable[Any] | None) -> dict[str, _Function]:
    """Name -> function, of tools as chat completions ({"function": {...}}) or responses (flat) write them."""
    found = {}
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name:
            found[name] = _Function(function.get("parameters") if isinstance(function, dict) else None)
    return found


# ---------------------------------------------------------------------------------------------------------- the parser

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _LIST = "<tool_call>", "<TOOLCALL>"
_END_PARAMETER, _END_FUNCTION, _END_CALL, _END_LIST = "</parameter>", "</function>", "</tool_call>", "</TOOLCALL>"
_CLOSERS = (_END_CALL, _END_LIST, _END_FUNCTION, _END_PARAMETER)
_PARAMETER = "<parameter="
# Where these are special tokens, detokenisation must not leave them out.
MARKERS = (_THINK, _END_THINK, _CALL, _END_CALL, _LIST, _END_LIST)

_SPACE = re.compile(r"\s*")
_BREAKS = re.compile(r"[\r\n]*")
_BREAK_OR_TAG = re.compile(r"[\r\n<]")
_WORD = re.compile(r"[^\s<]*")
_MAX_GAP = 256  # white space between a tag and what makes it a call
_MAX_KEY = 256


class _More:
    """The text so far is the beginning of a tag, perhaps."""


_MORE = _More()


class OutputParser:
    """Text deltas in, events out; one instance an answer.

    reasoning       whether `<think>` and `</think>` mean something
    reasoning_open  the prompt ended inside `<think>`, so the answer begins as reasoning
    tools           the request's tools; without any, tool markup is content
    tool_format     `qwen3_coder`, `json`, `auto` (told apart by what follows the tag), or None for no tool calls
    make_id         call's index -> its id; random ids by default
    """

    def __init__(
        self,
        reasoning: bool = False,
        reasoning_open: bool = False,
        tools: Iterable[Any] | None = None,
        tool_format: ToolFormat | None = "auto",
        make_id: Callable[[int], str] | None = None,
    ):
        self._functions = _functions(tools) if tool_format else {}
        self._make_id = make_id or (lambda index: f"call_{uuid.uuid4().hex}")
        self._think = (_THINK, _END_THINK) if reasoning else ()
        self._xml = {f"<function={name}>": name for name in self._functions} if tool_format != "json" else {}
        self._openers = tuple(self._xml)
        if self._functions:
            self._openers += (_CALL,) if tool_format == "qwen3_coder" else (_CALL, _LIST)
        self._json = tool_format != "qwen3_coder"
        self._states = {
            "gap": self._in_gap,
            "reasoning": self._in_reasoning,
            "content": self._in_content,
            "function": self._in_function,
            "value": self._in_value,
        }
        self._text, self._at, self._final = "", 0, False
        self._before = "\n"  # the character before `_text`
        self._events: list[Event] = []
        self._scanner: _JsonScanner | None = None  # of the JSON call that begins at the next character
        self._calls = 0
        self._name = ""  # of the open XML call
        self._keys = 0  # its parameters so far
        self._key, self._value = "", []  # the open parameter; its text where that is needed whole
        self._lines = 0  # line breaks in its text so far
        # `gap` is where an answer's text may begin: "start", after "think" or after a "call".
        self._after = "start"
        self._fresh = False  # nothing yet in this reasoning, call or value
        self._state = "gap"
        if reasoning and reasoning_open:
            self._start_reasoning()

    @property
    def state(self) -> Literal["reasoning", "content", "tool_call"]:
        """Where the text that comes next would go, as far as is known."""
        if self._state == "reasoning":
            return "reasoning"
        return "tool_call" if self._state in ("function", "value") else "content"

    @property
    def tool_calls(self) -> int:
        """Calls begun so far."""
        return self._calls

    def push(self, text: str) -> list[Event]:
        """More text -> what is certain by now."""
        self._text += text
        return self._run()

    def flush(self, truncated: bool = False) -> list[Event]:
        """The end of the text -> what was held back.

        An open call is closed as if its end tags had come, unless the text was cut off (`truncated`, by max_tokens
        say): then its JSON stays open, as half a value must not pass for a whole one.
        """
        self._final = True
        events = self._run()
        if self._state in ("value", "function"):
            if not truncated:
                if self._state == "value":
                    self._end_value()
                self._end_function()
            events += self._take()
        return events

    def _run(self) -> list[Event]:
        while self._at < len(self._text) and self._states[self._state]():
            pass
        if self._at:
            self._before = self._text[self._at - 1]
            if self._scanner:
                self._scanner.at -= self._at
            self._text, self._at = self._text[self._at :], 0
        return self._take()

    def _take(self) -> list[Event]:
        """The events so far, neighbours of one kind joined."""
        events: list[Event] = []
        for event in self._events:
            last = events[-1] if events else None
            if isinstance(event, Reasoning) and isinstance(last, Reasoning):
                events[-1] = Reasoning(last.text + event.text)
            elif isinstance(event, Content) and isinstance(last, Content):
                events[-1] = Content(last.text + event.text)
            elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and last.index == event.index:
                events[-1] = ToolCallDelta(event.index, last.arguments + event.arguments)
            else:
                events.append(event)
        self._events = []
        return events

    # -------------------------------------------------------------------------------------------- looking at the text

    def _tag(self, at: int, tags: Iterable[str]) -> str | _More | None:
        """The tag that begins at `at`, `_MORE` if one may, or None."""
        partial = None
        for tag in tags:
            if self._text.startswith(tag, at):
                return tag
            if not self._final and len(self._text) - at < len(tag) and tag.startswith(self._text[at:]):
                partial = _MORE
        return partial

    def _call(self, at: int) -> tuple[str, int] | _More | None:
        """The call that begins at `at`: its tag (an XML call's is `<function=...>`) and where that tag ends."""
        tag = self._tag(at, self._openers)
        if tag is None or isinstance(tag, _More):
            return tag
        end = at + len(tag)
        if tag in self._xml:
            return tag, end
        inner = self._skip(_SPACE, end)
        if inner - end > _MAX_GAP:
            return None
        if inner == len(self._text):
            return None if self._final else _MORE
        if self._text[inner] in "{[":
            return (tag, inner) if self._json else None
        if tag == _LIST:
            return None
        tag = self._tag(inner, self._xml)
        return (tag, inner + len(tag)) if isinstance(tag, str) else tag

    def _parameter(self, at: int) -> tuple[str, int] | _More | None:
        """The `<parameter=KEY>` that begins at `at`: its key and where it ends."""
        tag = self._tag(at, (_PARAMETER,))
        if tag is None or isinstance(tag, _More):
            return tag
        start = at + len(tag)
        for end in range(start, min(len(self._text), start + _MAX_KEY)):
            char = self._text[end]
            if char == ">":
                key = self._text[start:end].strip()
                return (key, end + 1) if key else None
            if char in "<\n":
                return None
        return None if self._final or len(self._text) - start >= _MAX_KEY else _MORE

    def _skip(self, what: re.Pattern[str], at: int) -> int:
        found = what.match(self._text, at)
        return found.end() if found else at

    def _starts_line(self, at: int) -> bool:
        return (self._text[at - 1] if at else self._before) == "\n"

    # ------------------------------------------------------------------------- the states: False where more is needed

    def _in_gap(self) -> bool:
        """Before any text of an answer: only white space since the start, the reasoning or a call."""
        at = self._skip(_SPACE, self._at)
        if at == len(self._text):
            if not self._final:
                return False
            if self._after == "start":
                self._emit(Content, at)
            self._at = at
            return False
        if self._text[at] == "<":
            tag = self._tag(at, self._think + (_CLOSERS if self._after == "call" else ()))
            if isinstance(tag, str):
                self._at = at + len(tag)
                if tag == _THINK:
                    self._start_reasoning()
                elif tag == _END_THINK:
                    self._after = "think"
                return True
            call = self._call(at)
            if isinstance(tag, _More) or isinstance(call, _More):
                return False
            if call:
                if (done := self._start_call(at, *call)) is not False:
                    return bool(done)
                at += 1  # a tag that opens no call: text
        if self._after == "think":
            self._at = self._skip(_BREAKS, self._at)
        self._emit(Content, at)
        self._state = "content"
        return True

    def _start_reasoning(self) -> None:
        self._state, self._fresh = "reasoning", True

    def _in_reasoning(self) -> bool:
        if self._fresh:
            at = self._skip(_BREAKS, self._at)
            tag = self._tag(at, self._think[:1])
            if at == len(self._text) or isinstance(tag, _More):
                return False
            self._at, self._fresh = at + len(tag or ""), bool(tag)
            return True
        found = _BREAK_OR_TAG.search(self._text, self._at)
        if found is None:
            self._emit(Reasoning, len(self._text))
            return True
        self._emit(Reasoning, found.start())
        at = self._skip(_BREAKS, self._at)
        if at == len(self._text):
            if self._final:
                self._at = at
            return False
        if self._text[at] == "<":
            tag = self._tag(at, self._think[1:])
            if isinstance(tag, str):
                self._state, self._after, self._at = "gap", "think", at + len(tag)
                return True
            call = self._call(at)
            if isinstance(tag, _More) or isinstance(call, _More):
                return False
            # Thinking aloud about `<function=f>` is no call: without its wrapper it must stand at a line's start.
            if call and (self._text.startswith((_CALL, _LIST), at) or self._starts_line(at)):
                done = self._start_call(at, *call)
                if done is not False:
                    return bool(done)
            at += 1
        self._emit(Reasoning, at)
        return True

    def _in_content(self) -> bool:
        at = self._text.find("<", self._at) if self._openers else -1
        if at < 0:
            self._emit(Content, len(self._text))
            return True
        self._emit(Content, at)
        call = self._call(at)
        if isinstance(call, _More):
            return False
        if call:
            done = self._start_call(at, *call)
            if done is not False:
                return bool(done)
        self._emit(Content, at + 1)
        return True

    def _start_call(self, at: int, tag: str, end: int) -> bool | None:
        """Begin the call at `at`. True: done. False: it is none. None: more text is needed."""
        if tag in self._xml:
            self._at, self._state = end, "function"
            self._name, self._keys, self._fresh = self._xml[tag], 0, True
            self._begin(self._name)
            self._arguments("{")
            return True
        calls = self._json_calls(end)
        if calls is None or calls is False:
            return calls
        for name, arguments in calls:
            self._begin(name)
            self._arguments(_dump(arguments))
        self._state, self._after = "gap", "call"
        return True

    def _json_calls(self, at: int) -> list[tuple[str, dict]] | Literal[False] | None:
        """The calls of the JSON that begins at `at`, which is then consumed; None: more is needed, False: none."""
        scanner = self._scanner = self._scanner or _JsonScanner(at)
        done = scanner.scan(self._text)
        if done is None and not self._final:
            return None
        self._scanner = None
        if not done:
            return False
        try:
            value = _load(self._text[at : scanner.at], strict=False)
        except ValueError:
            return False
        found = [self._json_call(one) for one in (value if isinstance(value, list) else [value])]
        calls = [one for one in found if one]
        if not calls or len(calls) < len(found):
            return False
        self._at = scanner.at
        return calls

    def _json_call(self, value: Any) -> tuple[str, dict] | None:
        """{"name": ..., "arguments": {...}} -> name and arguments, if it is that and the function is known."""
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # JSON once more, as the OpenAI API itself writes it
            try:
                arguments = _load(arguments, strict=False)
            except ValueError:
                return None
        if not isinstance(name, str) or name not in self._functions or not isinstance(arguments, dict):
            return None
        return name, arguments

    def _in_function(self) -> bool:
        """Between the parameters of an XML call."""
        at = self._skip(_SPACE, self._at)
        if at == len(self._text):
            self._at = at if self._final else self._at
            return False
        char = self._text[at]
        if char == "{" and self._fresh:  # arguments as JSON inside the XML
            done = self._json_body(at)
            if done is None:
                return False
            self._fresh = False
            if done:
                return True
        if char != "<":
            self._fresh = False
            self._emit(Content, self._skip(_WORD, at))
            return True
        tag = self._tag(at, (_END_FUNCTION, _END_CALL, _END_PARAMETER))
        parameter, call = self._parameter(at), self._call(at)
        if isinstance(tag, str):
            self._at = at + len(tag)
            if tag != _END_PARAMETER:
                self._end_function()
        elif isinstance(parameter, tuple):
            self._key, self._at = parameter
            self._start_value()
        elif isinstance(tag, _More) or isinstance(parameter, _More) or isinstance(call, _More):
            return False
        elif call:  # the next call, without this one's end
            self._end_function()
            self._at = at
        else:
            self._fresh = False
            self._emit(Content, at + 1)
        return True

    def _json_body(self, at: int) -> bool | None:
        """Take `{...}` at `at` as the call's arguments. True: done. False: it is not JSON. None: more is needed."""
        scanner = self._scanner = self._scanner or _JsonScanner(at)
        done = scanner.scan(self._text)
        if done is None and not self._final:
            return None
        self._scanner = None
        try:
            value = _load(self._text[at : scanner.at], strict=False) if done else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            return False
        self._arguments(_dump(value)[1:-1])
        self._keys += len(value)
        self._at = scanner.at
        return True

    def _start_value(self) -> None:
        self._arguments(f"{', ' if self._keys else ''}{_dump(self._key)}: ")
        self._keys += 1
        self._value, self._lines, self._state = [], 0, "value"
        self._fresh = True  # the line break after the tag is not part of the value
        if self._functions[self._name].is_text(self._key):
            self._arguments('"')

    def _in_value(self) -> bool:
        if self._fresh:
            self._fresh = False
            if self._text[self._at] == "\n":
                self._at += 1
                self._lines = 1
            return True
        found = _BREAK_OR_TAG.search(self._text, self._at)
        at = found.start() if found else len(self._text)
        if at > self._at:
            self._value_text(at)
            return True
        # At a line break (which belongs to an end tag that follows it) or at a `<`.
        while at < len(self._text) and self._text[at] == "\r":
            at += 1
        at += self._text.startswith("\n", at)
        if at == len(self._text):
            self._at = at if self._final else self._at  # the last line break
            return False
        end = self._value_end(at) if self._text[at] == "<" else None
        if isinstance(end, _More):
            return False
        if end is None:
            self._value_text(max(at, self._at + 1))
            return True
        # Of the carriage returns only the one of the line break itself is not the value's.
        if at > self._at and (breaks := self._text[self._at : at]) not in ("\n", "\r\n"):
            self._value_text(at - (2 if breaks.endswith("\r\n") else breaks.endswith("\n")))
        self._end_value()
        self._at = at + end
        return True

    def _value_end(self, at: int) -> int | _More | None:
        """How much of the tag at `at` ends the value and goes with it, or None if it does not end it.

        Where `</parameter>` was forgotten the next tag ends the value, but only at the start of a line or on the
        value's only line, so that a value may hold such tags as text.
        """
        tag = self._tag(at, (_END_PARAMETER,))
        if isinstance(tag, str):
            return len(tag)
        other = None
        if self._starts_line(at) or not self._lines:
            call = self._call(at)
            if isinstance(call, tuple) and call[0] not in self._xml:
                call = None  # JSON: not before it is whole would it be known to be a call
            others = (self._tag(at, (_END_FUNCTION, _END_CALL)), self._parameter(at), call)
            if any(isinstance(one, (str, tuple)) for one in others):
                return 0
            other = next((one for one in others if isinstance(one, _More)), None)
        return tag or other

    def _value_text(self, end: int) -> None:
        text = self._text[self._at : end]
        self._at = end
        self._lines += text.count("\n")
        if self._functions[self._name].is_text(self._key):
            self._arguments(_dump(text)[1:-1])
        else:
            self._value.append(text)

    def _end_value(self) -> None:
        function = self._functions[self._name]
        text = function.is_text(self._key)
        self._arguments('"' if text else function.value(self._key, "".join(self._value)))
        self._state, self._fresh = "function", False

    def _end_function(self) -> None:
        self._arguments("}")
        self._state, self._after = "gap", "call"

    # ------------------------------------------------------------------------------------------------------- emitting

    def _emit(self, kind: type[Reasoning] | type[Content], end: int) -> None:
        """The text up to `end` is of that kind."""
        if end > self._at:
            self._events.append(kind(self._text[self._at : end]))
            self._at = end

    def _begin(self, name: str) -> None:
        self._events.append(ToolCallStart(self._calls, self._make_id(self._calls), name))
        self._calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(ToolCallDelta(self._calls - 1, text))


def parse(text: str, truncated: bool = False, **options: Any) -> Parsed:
    """A whole answer at once; `options` are those of :class:`OutputParser`."""
    parser = OutputParser(**options)
    return join(parser.push(text) + parser.flush(truncated))
