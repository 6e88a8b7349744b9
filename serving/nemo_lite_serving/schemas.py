"""What a client may send and what it gets: the models of requests and answers, and refusals in OpenAI's shape.

Reading is strict: an unknown field, a number as text or a NaN is refused with a sentence that names the field.
Imported by the server only, when it starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemo_lite_serving.protocol import Guide

NESTING = 100
FIELDS = 4096  # of one JSON object

# ------------------------------------------------------------------------------------------------------------- errors


class ApiError(Exception):
    """A refusal in OpenAI's shape. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


# ---------------------------------------------------------------------------------------------- what requests look like


class Strict(BaseModel):
    """No unknown field, no "5" for 5, no NaN. A field that is null counts as not given, as clients send it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


V = TypeVar("V")
Several = Annotated[list[V], Field(fail_fast=True)]  # a million wrong elements are one error, not gigabytes of them
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[Several[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
# What a union of types takes, for a better sentence than one per type.
EXPECTED = {
    "prompt": "must be a non-empty string, a list of such strings, a list of token ids, or a list of such lists",
    "stop": "must be a string or a list of up to 16 strings, each of 1 to 256 characters",
    "content": 'must be a string or a list of {"type": "text", "text": ...} parts; this model reads text only',
    "suffix": "is not supported: this model does not fill in the middle",
    "tool_choice": 'must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}',
    "guided_json": "must be a JSON schema as an object or a string",
    "json": "must be a JSON schema as an object or a string",
}


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="accepted and ignored")


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's: one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[Several[Text], Field(min_length=1)] | None = None
    json_object: bool | None = None


class Common(Strict):
    """What completions and chat completions share."""

    model: str | None = Field(default=None, description="The served model's name; this server has one.")
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31, description="-1 and 0 both mean off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[Several[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[Several[TokenId], Field(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    # Token ids as text, since JSON's keys are.
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    min_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = Field(default=None, description="accepted and ignored")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="With stream only.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[Several[Text], Field(min_length=1)] | None = None
    token_origins: bool | None = Field(
        None, description="Adds `nemo_lite`: each token's text with the draft depth it came from, and the counts."
    )
    user: str | None = Field(default=None, description="accepted and ignored")
    metadata: dict[str, Any] | None = Field(default=None, description="accepted and ignored")
    store: bool | None = Field(default=None, description="accepted and ignored")
    service_tier: str | None = Field(default=None, description="accepted and ignored")
    safety_identifier: str | None = Field(default=None, description="accepted and ignored")
    prompt_cache_key: str | None = Field(default=None, description="accepted and ignored")


class CompletionRequest(Common):
    prompt: (
        Text
        | Tokens
        | Annotated[Several[Text], Field(min_length=1, max_length=128)]
        | Annotated[Several[Tokens], Field(min_length=1, max_length=128)]
    )
    max_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=128, description="Must equal n: there is no ranking of answers.")
    suffix: None = Field(default=None, description="Not supported: there is no filling in the middle.")
    add_special_tokens: bool | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


class CalledFunction(Strict):
    name: str
    arguments: str


class CalledTool(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class SystemMessage(Strict):
    role: Literal["system"]
    content: str | Several[TextPart]
    name: str | None = None


class DeveloperMessage(SystemMessage):
    role: Literal["developer"]  # type: ignore[assignment]


class UserMessage(SystemMessage):
    role: Literal["user"]  # type: ignore[assignment]


class ToolMessage(SystemMessage):
    role: Literal["tool"]  # type: ignore[assignment]
    tool_call_id: str | None = None


class AssistantMessage(Strict):
    """Also as a response's message comes back from a client: the fields that are null there are taken."""

    role: Literal["assistant"]
    content: str | Several[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: Several[CalledTool] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Several[Any] | None = None
    audio: None = None
    function_call: None = None


ChatMessage = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | ToolMessage | AssistantMessage, Field(discriminator="role")
]


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Common):
    messages: Annotated[Several[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=1 << 31, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="With logprobs only.")
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0, lt=1 << 31)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Several[Literal["text"]] | None = None
    verbosity: str | None = Field(default=None, description="accepted and ignored")


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(Strict):
    """Messages as a chat completion renders them."""

    model: str | None = None
    messages: Annotated[Several[ChatMessage], Field(min_length=1)]
    tools: Several[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Several[TokenId]


# ---------------------------------------------------------------------------------------------- what answers look like
# These only describe: the answers are plain dicts.


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    nemo_lite: dict[str, Any] | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: Several[CalledTool] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    nemo_lite: dict[str, Any] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"]


class Version(BaseModel):
    version: str


# ------------------------------------------------------------------------------------------------- reading a request


class _Malformed(ValueError):
    def __init__(self, path: str, problem: str):
        super().__init__(problem)
        self.path = path


def _clean(value: Any, path: str = "", depth: int = 0) -> Any:
    """JSON's value with lone surrogates (\\ud800) as U+FFFD; NaN, infinities and deep nesting are refused."""
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _Malformed(path, "must be a finite number")
        return int(value) if value.is_integer() and abs(value) < 1 << 53 else value  # to JSON, 1.0 is an integer
    if isinstance(value, dict | list) and depth == NESTING:
        raise _Malformed(path.partition(".")[0], f"is nested more than {NESTING} deep")
    if isinstance(value, dict):
        if len(value) > FIELDS:
            raise _Malformed(path, f"has more than {FIELDS} fields")
        start = path and path + "."
        return {_clean(key): _clean(item, f"{start}{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [
            item if type(item) is int else _clean(item, f"{path}.{index}", depth + 1)
            for index, item in enumerate(value)
        ]
    return value


def _names(model: type[BaseModel]) -> list[str]:
    return [known.alias or name for name, known in model.model_fields.items()]


def _every_name() -> set[str]:
    kinds, names = [Strict], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        names.update(_names(kind))
    return names


def _refusal(model: type[BaseModel], body: Any, error: ValidationError) -> ApiError:
    """The first thing that is wrong, as a sentence that names the field."""
    found = error.errors(include_url=False, include_context=True, include_input=False)
    # A part of another kind than text has fields of its own: its kind is what is wrong.
    kind = next((each for each in found if each["type"] == "literal_error" and each["loc"][-1] == "type"), None)
    first = kind or next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    path: list[str] = []
    cursor: Any = body
    for part in first["loc"]:  # between the fields it names pydantic's choice of a union, which is no field
        if isinstance(cursor, dict):
            known = part in cursor
        else:
            known = isinstance(cursor, list) and isinstance(part, int) and part < len(cursor)
        if known:
            path.append(str(part))
            cursor = cursor[part]  # type: ignore[index]
    if first["type"] == "missing":
        path.append(str(first["loc"][-1]))
    elif first["type"] == "union_tag_not_found":
        path.append(first.get("ctx", {}).get("discriminator", "").strip("'"))
    param = ".".join(path)
    if not param:
        return ApiError(400, "the request's body must be a JSON object")
    if first["type"] == "extra_forbidden":
        names = _names(model) if len(path) == 1 else _every_name()
        near = get_close_matches(path[-1], names, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return ApiError(400, f"`{param[:200]}` is not a known field{hint}", param=param[:200], code="unknown_field")
    if first["type"] in ("missing", "union_tag_not_found"):
        return ApiError(400, f"`{param}` is missing", param=param, code="missing_field")
    field_name = next((part for part in reversed(path) if part in EXPECTED), None)
    if field_name is not None:
        param = ".".join(path[: len(path) - path[::-1].index(field_name)])
        return ApiError(400, f"`{param}` {EXPECTED[field_name]}", param=param, code="invalid_value")
    message = first["msg"].replace("Input should be", "must be").replace("Input tag", "its tag")
    return ApiError(400, f"`{param}`: {message}", param=param, code="invalid_value")


M = TypeVar("M", bound=Strict)


def parse(model: type[M], raw: bytes, other: type[M] | None = None) -> M:
    """A request's body, checked; ApiError with the field's name otherwise. `other` is for bodies with messages."""
    try:
        body = _clean(json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request's body is not UTF-8 (byte {error.start})", code="invalid_utf8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the request's body is not JSON: {error.msg} at {where}", code="invalid_json") from None
    except _Malformed as error:
        what = f"`{error.path}` {error}" if error.path else f"the request's body {error}"
        raise ApiError(400, what, param=error.path or None, code="invalid_value") from None
    except RecursionError:
        message = f"the request's body is nested more than {NESTING} deep"
        raise ApiError(400, message, code="invalid_value") from None
    except ValueError:  # Python refuses to read an integer of thousands of digits
        raise ApiError(400, "the request's body holds a number that is too long", code="invalid_json") from None
    if other is not None and isinstance(body, dict) and "messages" in body:
        model = other
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _refusal(model, body, error) from None


# ---------------------------------------------------------------------------------------------------- guided decoding


def guide_of(body: Common) -> tuple[Guide | None, str]:
    """What the output must match, and the name of the field that says so."""
    found: list[tuple[Guide, str]] = []

    def schema(name: str, value: dict[str, Any] | str | None) -> None:
        if value is not None:
            found.append((Guide("json_schema", value if isinstance(value, str) else json.dumps(value)), name))

    if isinstance(body.response_format, JsonObjectFormat):
        found.append((Guide("json_object"), "response_format"))
    elif isinstance(body.response_format, JsonSchemaFormat):
        schema("response_format", body.response_format.json_schema.schema_)
    other = body.structured_outputs or StructuredOutputs()
    for prefix, json_schema, regex, choice in (
        ("guided_", body.guided_json, body.guided_regex, body.guided_choice),
        ("structured_outputs.", other.json_, other.regex, other.choice),
    ):
        schema(f"{prefix}json", json_schema)
        if regex is not None:
            found.append((Guide("regex", regex), f"{prefix}regex"))
        if choice is not None:
            found.append((Guide("choice", json.dumps(choice)), f"{prefix}choice"))
    if other.json_object:
        found.append((Guide("json_object"), "structured_outputs.json_object"))
    if len(found) > 1:
        names = " and ".join(name for _, name in found)
        message = f"the output can be guided in one way only, not by {names}"
        raise ApiError(400, message, param=found[1][1], code="invalid_combination")
    return found[0] if found else (None, "")


def calls_schema(tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
    """A schema for a list of calls of these tools: what `tool_choice: required` guides the output by."""
    definitions: dict[str, dict[str, Any]] = {}
    items = []
    for tool in tools:
        parameters = dict(tool.function.parameters or {"type": "object"})
        for key in ("$defs", "definitions"):  # references start at the root, so these move there
            moved = parameters.pop(key, None)
            for name, value in (moved if isinstance(moved, dict) else {}).items():
                if definitions.setdefault(key, {}).setdefault(name, value) != value:
                    message = f"`tools` define {name} in two ways, which tool_choice cannot combine"
                    raise ApiError(400, message, param="tools", code="invalid_schema")
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {
        "type": "array",
        "minItems": 1,
        **({} if parallel else {"maxItems": 1}),
        "items": {"anyOf": items},
        **definitions,
    }
