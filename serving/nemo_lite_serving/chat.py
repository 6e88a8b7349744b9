"""Messages to a prompt, by the model's own chat template: Jinja in a sandbox, rendered as transformers renders it.

A template is code from whoever made the model. It sees plain data only, cannot reach Python's insides, and stops with a
sentence where it counts or writes without end. Whatever goes wrong in it is a :class:`UserError`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, ext, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nemo_lite.config import UserError

DEFAULT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
MAX_STEPS = 1_000_000  # turns of loops and calls in one rendering
MAX_CHARACTERS = 1 << 25  # of the prompt, and of any text or list the template builds
MAX_BITS = 1 << 16  # of a whole number
MAX_DEPTH = 100  # of nested lists and objects in messages, tools and variables

# What render() itself sets; a client's template variables cannot.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_THINKING_SWITCHES = ("enable_thinking", "thinking")
_LAST_WORD = "%%the-answer-goes-on-here%% "  # the trailing space tells whether the template trims


# ---------------------------------------------------------------------------------------------------------- the sandbox


class _Budget:
    """What one rendering may still do."""

    def __init__(self):
        self.steps = MAX_STEPS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


def _step() -> None:
    budget = _budget.get()
    if budget is not None:
        budget.step()


def _bounded(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it builds a text of more than {MAX_CHARACTERS} characters")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _weigh(value: Any) -> int:
    """Characters of a nested value's texts; each element is a step, as one list can be in it many times."""
    if isinstance(value, dict):
        return sum(_weigh(key) + _weigh(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_weigh, value))
    _step()
    return _size(value)


def _text(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        _bounded(_weigh(value))
    return str(value)


def _small(*values: Any) -> None:
    """Widths and counts that would make a text too long are refused before it is made."""
    for value in values:
        if isinstance(value, int):
            _bounded(value)


def _concat(parts: Iterable[str]) -> str:
    """The texts as one, if it is not too long."""
    parts = list(parts)
    _bounded(sum(map(len, parts)))
    return "".join(parts)


# The two filters below need the context only so that the compiler does not evaluate them ahead of time.


@pass_context
def _counted(_context: Any, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, each a step."""
    for item in items:
        _step()
        yield item


@pass_context
def _joined(_context: Any, parts: list[Any]) -> str:
    """What `~` does, with a bound."""
    return _concat(map(_text, parts))


class _Guard:
    """Rewrites a parsed template so that loops count their turns and `~` its characters."""

    def __init__(self, environment: ImmutableSandboxedEnvironment):
        self._environment = environment

    def _filter(self, node: nodes.Node, name: str) -> nodes.Filter:
        made = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        made.set_environment(self._environment)
        return made

    def apply(self, node: nodes.Node) -> None:
        for name, child in list(node.iter_fields()):
            if isinstance(child, list):
                for at, each in enumerate(child):
                    if isinstance(each, nodes.Node):
                        self.apply(each)
                        child[at] = self._guarded(each)
            elif isinstance(child, nodes.Node):
                self.apply(child)
                setattr(node, name, self._guarded(child))
        if isinstance(node, nodes.For):
            node.iter = self._filter(node.iter, "_counted")

    def _guarded(self, node: nodes.Node) -> nodes.Node:
        if not isinstance(node, nodes.Concat):
            return node
        parts = nodes.List(node.nodes, lineno=node.lineno)
        parts.set_environment(self._environment)
        return self._filter(parts, "_joined")


class _Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block rather than the bare body: variables set inside stay inside, as in transformers.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` for templates: the call and `fromkeys`, without the class behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that takes no underscored names, which would reach into the object itself."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        values = dict(*args, **kwargs)
        for name in values:
            _plain_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        super().__setitem__(name, value)


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


def _raise_exception(message: Any) -> NoReturn:
    raise _Refused(str(message))


class _Refused(TemplateError):
    """What `raise_exception` raises: the template's own words to the client."""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, unlike Jinja's own filter of that name."""
    _bounded(_weigh(value))
    if isinstance(indent, (int, str)):
        _bounded((indent if isinstance(indent, int) else len(indent)) * 1000)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _bounded(len(text))
    return text


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with transformers' names in it and bounds on what one rendering does."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    concat = staticmethod(_concat)  # what blocks and macros join their output with

    def __init__(self):
        extensions = [_Generation, ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_finalize)
        self.filters.update(tojson=_tojson, _counted=_counted, _joined=_joined)
        for name, check in _CHECKS.items():
            if name in self.filters:
                self.filters[name] = _checked(self.filters[name], check)
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        if isinstance(left, int) and isinstance(right, int):
            bits = {"**": left.bit_length() * right, "*": left.bit_length() + right.bit_length()}
            if bits.get(operator, 0) > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS} bits")
        elif operator == "*":
            for count, other in ((left, right), (right, left)):
                if isinstance(count, int):
                    _bounded(count * _size(other))
        elif operator == "+":
            _bounded(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, *(right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        _step()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            if name == "join" and args:
                args = ([*args[0]], *args[1:])
                _check_join(args[0], owner)
            else:
                _CHECKS.get(name, _check_numbers)(owner, *args, **kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        return wrapped and _checked(wrapped, lambda *args, **kwargs: _check_format(value.__self__, *args, **kwargs))


def _finalize(value: Any) -> Any:
    """Every printed value passes here."""
    return _text(value) if isinstance(value, (dict, list, tuple)) else value


def _check_numbers(_value: Any, *args: Any, **kwargs: Any) -> None:
    _small(*args, *kwargs.values())


def _check_format(form: Any, *args: Any, **kwargs: Any) -> None:
    form = str(form)
    _small(*(int(digits[:20]) for digits in re.findall(r"[0-9]{7,}", form)))
    if "*" in form or re.search(r"\{[^}]*\{", form):  # a width among the values
        _small(*args, *kwargs.values())


def _check_replace(text: Any, old: Any = "", new: Any = "", *_count: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _bounded(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_join(items: Any, separator: Any = "", *_attribute: Any, **_named: Any) -> None:
    if isinstance(items, (list, tuple)):
        _bounded(_weigh(items) + len(items) * _size(separator))


# Of filters and of the methods of texts, by name.
_CHECKS: dict[str, Any] = {
    "batch": _check_numbers,
    "center": _check_numbers,
    "format": _check_format,
    "indent": _check_numbers,
    "join": _check_join,
    "replace": _check_replace,
    "slice": _check_numbers,
}


def _checked(function: Any, check: Any) -> Any:
    """The function, its arguments checked first (without the context that Jinja hands to some filters)."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args[skip:], **kwargs)
        return function(*args, **kwargs)

    return checked


# --------------------------------------------------------------------------------------------------------- plain inputs


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON's types alone, so that no method of a richer one is in a template's reach."""
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where, depth + 1): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise UserError(f"{where}: a {type(value).__name__} is not JSON")


def _text_content(content: Any, where: str) -> str | None:
    """A message's content as one text: a text, None, or a list of text parts, which are joined by line breaks."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be a text, null or a list of parts, not a {type(content).__name__}")
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in ("text", "input_text", "output_text", "refusal"):
            raise UserError(f"{where}[{at}]: a part of type {kind} needs a text")
        else:
            name = f"type {kind}" if isinstance(kind, str) else "no type"
            raise UserError(f"{where}[{at}]: a part of {name[:100]} cannot be used, this model reads text only")
    return "\n".join(texts)


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """A past call's arguments as the object that templates iterate over; clients send them as JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON") from error
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where} must be a JSON object")
    return _plain(arguments, where)


def normalize(messages: Any, keep_developer: bool = True) -> list[dict[str, Any]]:
    """A copy of a request's messages as templates expect them.

    Content becomes one text, tool-call arguments become objects, empty lists of tool calls and None values go away,
    and unless `keep_developer` the role `developer` becomes `system`. :class:`UserError` names what is wrong where.
    """
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"messages must be a list, not a {type(messages).__name__}")
    if not messages:
        raise UserError("messages is empty, at least one message is needed")
    found = []
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} must be an object, not a {type(message).__name__}")
        message = {key: value for key, value in _plain(message, where).items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise UserError(f"{where}.role is missing or not a text")
        if message["role"] == "developer" and not keep_developer:
            message["role"] = "system"
        if "content" in message:
            message["content"] = _text_content(message["content"], f"{where}.content")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise UserError(f"{where}.tool_calls must be a list, not a {type(calls).__name__}")
        for index, call in enumerate(calls or []):
            spot = f"{where}.tool_calls[{index}]"
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise UserError(f"{spot} needs a function with a name")
            function["arguments"] = _arguments(function.get("arguments"), f"{spot}.function.arguments")
        if not calls:
            message.pop("tool_calls", None)
        found.append(message)
    return found


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The reasoning under each name that templates read it by, whichever one the client used."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


# --------------------------------------------------------------------------------------------------------- the template


def _one_sentence(text: object) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else text[:297] + "..."


class ChatTemplate:
    """A chat template and the special tokens it may name.

    template         Jinja source of the template
    with_tools       source of the one used when the request has tools, where the model has two
    special_tokens   `bos_token` and the like -> their text
    name             where it came from, for error sentences
    """

    def __init__(
        self,
        template: str,
        with_tools: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        name: str = "chat template",
    ):
        self.name = name
        self.special_tokens = dict(special_tokens or {})
        self.source, self.source_with_tools = template, with_tools
        self._environment = _Environment()
        self._default, plain_variables = self._compile(template)
        self._with_tools, tool_variables = (self._default, set()) if with_tools is None else self._compile(with_tools)
        self.variables = frozenset(plain_variables | tool_variables)  # names the template reads from outside

    @classmethod
    def load(cls, model_dir: str | Path, override: str | None = None) -> ChatTemplate:
        """The chat template of a model directory.

        In this order: `override` (a file, or the template itself), chat_template.jinja (with
        additional_chat_templates/tool_use.jinja beside it), "chat_template" of tokenizer_config.json, the default one.
        """
        folder = Path(model_dir)
        config = _read_json(folder / "tokenizer_config.json")
        tokens = _special_tokens(config, folder)
        if override is not None:
            if "{{" in override or "{%" in override:
                return cls(override, None, tokens, "the chat template given")
            return cls(_read_text(Path(override)), None, tokens, override)
        file = folder / "chat_template.jinja"
        if file.is_file():
            extra = folder / "additional_chat_templates" / "tool_use.jinja"
            return cls(_read_text(file), _read_text(extra) if extra.is_file() else None, tokens, str(file))
        found = config.get("chat_template")
        name = f"{folder / 'tokenizer_config.json'}: chat_template"
        if found is None:
            return cls(_read_text(DEFAULT_TEMPLATE), None, tokens, "the default chat template")
        if isinstance(found, str):
            return cls(found, None, tokens, name)
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
            raise UserError(f"{name} is neither a template nor a list of named templates")
        templates = {str(key): str(text) for key, text in found.items()}
        if "default" not in templates:
            raise UserError(f"{name} has no template named default, only {', '.join(templates) or 'none'}")
        return cls(templates["default"], templates.get("tool_use"), tokens, name)

    def _compile(self, source: str) -> tuple[Any, set[str]]:
        try:
            tree = self._environment.parse(source)
            variables = meta.find_undeclared_variables(self._environment.parse(source))
            _Guard(self._environment).apply(tree)
            return self._environment.from_string(tree), variables
        except TemplateSyntaxError as error:
            raise UserError(
                f"{self.name} is malformed in line {error.lineno}: {_one_sentence(error.message)}"
            ) from error
        except Exception as error:  # the compiler's own limits, such as nesting
            raise UserError(f"{self.name} cannot be compiled ({_one_sentence(error)})") from error

    # ---------------------------------------------------------------------------------------------------- what it knows

    @property
    def thinking(self) -> bool:
        """Whether thinking can be switched on and off."""
        return any(name in self.variables for name in _THINKING_SWITCHES)

    @property
    def supports_tools(self) -> bool:
        """Whether the template looks at a request's tools."""
        return self.source_with_tools is not None or "tools" in self.variables

    def thinking_variables(self, mode: Literal["on", "off", "low"]) -> dict[str, Any]:
        """The template variables that switch thinking; a template without the switch is a :class:`UserError`.

        `low` on a template that knows no low effort is `on`.
        """
        if not self.thinking:
            raise UserError("this model's chat template has no switch for thinking")
        found: dict[str, Any] = {name: mode != "off" for name in _THINKING_SWITCHES if name in self.variables}
        if mode == "low":
            found |= {
                name: value
                for name, value in (("low_effort", True), ("reasoning_effort", "low"))
                if name in self.variables
            }
        return found

    @staticmethod
    def reasoning_open(prompt: str, continued: bool = False) -> bool:
        """Whether what follows the prompt is reasoning: it ends with `<think>` and white space.

        With `continued` (the prompt ends amid the assistant's message) it is enough that the last `<think>` is open.
        """
        if continued:
            return prompt.rfind("<think>") > prompt.rfind("</think>")
        return prompt.rstrip().endswith("<think>")

    # ------------------------------------------------------------------------------------------------------- rendering

    def render(
        self,
        messages: Any,
        /,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation.

        `variables` (a client's; names that render() sets itself are refused) and `kwargs` (the caller's own) reach
        the template. `continue_final_message` leaves the last message open for the model to go on with.
        """
        for name in variables or {}:
            if not isinstance(name, str) or name in RESERVED:
                raise UserError(f"chat_template_kwargs: {_one_sentence(name)} cannot be set")
        if continue_final_message and add_generation_prompt:
            raise UserError("continue_final_message and add_generation_prompt exclude each other")
        source = self.source_with_tools if tools and self.source_with_tools is not None else self.source
        chat = [_with_reasoning(message) for message in normalize(messages, "developer" in source)]
        final = ""
        if continue_final_message:
            final = chat[-1].get("content")
            if not isinstance(final, str):
                raise UserError("continue_final_message needs a last message with content to go on with")
            chat[-1]["content"] = final + _LAST_WORD
        prompt = self._render(
            self._with_tools if tools else self._default,
            {
                **self.special_tokens,
                **_plain(kwargs, "chat template variables"),
                **_plain(variables or {}, "chat_template_kwargs"),
                "messages": chat,
                "tools": _plain(tools, "tools") or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut(prompt, final) if continue_final_message else prompt

    def _render(self, template: Any, variables: dict[str, Any]) -> str:
        token = _budget.set(_Budget())
        try:
            pieces, size = [], 0
            for piece in template.generate(variables):
                size += len(piece)
                _bounded(size)
                pieces.append(piece)
            return "".join(pieces)
        except _Refused as error:
            raise UserError(f"the chat template refuses these messages: {_one_sentence(error)}") from error
        except SecurityError as error:
            raise UserError(f"the chat template does what it may not: {_one_sentence(error)}") from error
        except RecursionError as error:
            raise UserError("the chat template calls itself without end") from error
        except Exception as error:  # it is foreign code: any error in it is the template's or the messages'
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise UserError(
                f"the chat template cannot render these messages ({_one_sentence(f'{kind}{error}')})"
            ) from error
        finally:
            _budget.reset(token)


def _cut(prompt: str, final: str) -> str:
    """The prompt up to where the last message's content ended."""
    mark = _LAST_WORD.strip()
    if mark not in prompt or final.strip() not in prompt:
        raise UserError("continue_final_message cannot be used: the chat template leaves the last message out")
    end = prompt.rindex(mark)
    # A template that trims has taken the mark's space away, and would have taken the message's.
    return prompt[:end] if prompt.startswith(_LAST_WORD, end) else prompt[:end].rstrip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: the chat template cannot be read ({reason})") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({_one_sentence(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return found


def _special_tokens(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on -> their text; the older special_tokens_map.json counts as in transformers."""
    found = dict(config)
    if "added_tokens_decoder" not in config:
        found |= _read_json(folder / "special_tokens_map.json")
    if isinstance(extra := found.get("extra_special_tokens"), dict):
        found |= extra
    texts = {key: one.get("content") if isinstance(one, dict) else one for key, one in found.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}
