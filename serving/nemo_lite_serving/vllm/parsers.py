"""Reasoning and tool parsers for vLLM's server, by the native engine's state machine. Imports vLLM.

    vllm serve MODEL_DIR --enable-auto-tool-choice \\
        --reasoning-parser-plugin nemo_lite_serving.vllm.parsers --reasoning-parser nemo_lite \\
        --tool-parser-plugin nemo_lite_serving.vllm.parsers --tool-call-parser nemo_lite

    nemo_lite                the reasoning parser, and the tool parser that tells the two formats apart
    nemo_lite_qwen3_coder    tool parser: XML calls only
    nemo_lite_json           tool parser: JSON calls only

This file's path serves as well as its module name. Reasoning parser or tool parser may be left out; beside another
project's they are refused.

vLLM gives an answer first to the reasoning parser and what that leaves to the tool parser. But a call may end the
reasoning without `</think>`, so whoever reads reasoning must know the request's tools; and whether reasoning is open
stands in the prompt, which vLLM does not show a reasoning parser for a whole answer. So the two registered classes only
say what is to be read, and :class:`AnswerParser` reads it: vLLM's ParserManager is made to compose that from them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from openai.types.responses import ToolChoiceCustom, ToolChoiceFunction
from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall, FunctionCall
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import DelegatingParser
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.abstract_tool_parser import ToolParser

from nemo_lite_serving.chat import ChatTemplate
from nemo_lite_serving.parsers import MARKERS, Content, Event, OutputParser, Reasoning, ToolCallStart, ToolFormat, join

NAMED = (ChatCompletionNamedToolChoiceParam, ToolChoiceFunction, ToolChoiceCustom)
THINK, END_THINK = "<think>", "</think>"
TAIL = 32  # tokens that hold a tag and the white space after it, even where a token is a byte


def _show_markers(request: Any, tokenizer: Any) -> Any:
    """The request, its special tokens shown if some of them are markers that the parser must see."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if special & set(MARKERS):
        request.skip_special_tokens = False
    return request


class NemoLiteReasoningParser(ReasoningParser):
    """Says where reasoning begins and ends, by token ids: what vLLM asks to guide only the answer after it."""

    reasoning_start_str = THINK
    reasoning_end_str = END_THINK

    def __init__(self, tokenizer, *args, chat_template_kwargs: dict[str, Any] | None = None, **options):
        super().__init__(tokenizer, *args, **options)
        self._continued = bool((chat_template_kwargs or {}).get("continue_final_message"))

    @property
    def known(self) -> bool:
        """Whether the model has reasoning at all."""
        return END_THINK in self.vocab or END_THINK in str(getattr(self.model_tokenizer, "chat_template", ""))

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether what follows this prompt is no reasoning."""
        ids = list(input_ids)
        text = self.model_tokenizer.decode(ids if self._continued else ids[-TAIL:])
        return not ChatTemplate.reasoning_open(text, self._continued)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether `</think>` came with the last tokens, `delta_ids`."""
        text = self.model_tokenizer.decode(list(input_ids[-len(list(delta_ids)) - TAIL :]))
        return text.rfind(END_THINK) > text.rfind(THINK)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return input_ids[self.count_reasoning_tokens(input_ids) :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many tokens of an answer reach to the end of its `</think>`; all of them where there is none."""
        ids = list(token_ids)
        if (end := self.vocab.get(END_THINK)) is not None:
            return ids.index(end) + 1 if end in ids else len(ids)
        before = bisect_left(
            range(1, len(ids) + 1), True, key=lambda count: END_THINK in self.model_tokenizer.decode(ids[:count])
        )
        return min(before + 1, len(ids))

    def adjust_request(self, request):
        return _show_markers(request, self.model_tokenizer)


class NemoLiteToolParser(ToolParser):
    """Says which tool calls are read. vLLM itself guides and reads the JSON of a forced call."""

    tool_format: ToolFormat = "auto"

    def adjust_request(self, request):
        return super().adjust_request(_show_markers(request, self.model_tokenizer))


class NemoLiteXmlToolParser(NemoLiteToolParser):
    tool_format = "qwen3_coder"


class NemoLiteJsonToolParser(NemoLiteToolParser):
    tool_format = "json"


class AnswerParser(DelegatingParser):
    """One answer, by one state machine for its reasoning and its calls."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._prompt: Sequence[int] = ()
        self._machine: OutputParser | None = None  # of the answer that streams
        self._last: Sequence[int] = ()  # its last token
        self._reasoned = False

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        self._prompt = prompt_token_ids

    def parse(self, model_output, request, enable_auto_tools=False, model_output_token_ids=()):
        machine = self._start(request)
        events = machine.push(model_output) + machine.flush(self._truncated(model_output_token_ids, request))
        parsed = join(events)
        self._reasoned = parsed.reasoning is not None
        if self._forced(request):
            calls, content = self._extract_tool_calls(parsed.content, request, enable_auto_tools)
            return parsed.reasoning, content, calls
        calls = [FunctionCall(id=call.id, name=call.name, arguments=call.arguments) for call in parsed.tool_calls]
        return parsed.reasoning, parsed.content, calls

    def parse_delta(self, delta_text, delta_token_ids, request, prompt_token_ids=None, *, finished):
        if self._machine is None:
            self._prompt = prompt_token_ids or self._prompt
            self._machine = self._start(request)
        self._last = delta_token_ids or self._last
        events = self._machine.push(delta_text)
        if finished:
            events += self._machine.flush(self._truncated(self._last, request))
        return self._delta(events, request)

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return super().count_reasoning_tokens(token_ids) if self._reasoned else 0

    def _forced(self, request: Any) -> bool:
        """Whether the answer is guided to be one call's arguments, or a list of calls, as JSON."""
        return self._tool_parser is not None and (
            request.tool_choice == "required" or isinstance(request.tool_choice, NAMED)
        )

    def _start(self, request: Any) -> OutputParser:
        reasoner, caller = self._reasoning_parser, self._tool_parser
        opened = reasoner is not None and not reasoner.is_reasoning_end(self._prompt)
        tools = None
        if caller is not None and request.tool_choice != "none" and not self._forced(request):
            tools = [tool.model_dump(exclude_none=True) for tool in caller.tools]
        return OutputParser(
            reasoning=opened or (reasoner is not None and reasoner.known),
            reasoning_open=opened,
            tools=tools,
            tool_format=caller.tool_format if caller is not None else None,
        )

    def _truncated(self, ids: Sequence[int], request: Any) -> bool:
        """Whether an answer that ended in these tokens was cut off; vLLM keeps the reason to itself.

        One that ended by itself did so in a stop token, which is an added token but no marker.
        """
        if not len(ids):
            return False
        added = self.model_tokenizer.get_added_vocab()
        ends = {added[text] for text in added.keys() - set(MARKERS)} | {self.model_tokenizer.eos_token_id}
        return ids[-1] not in ends | set(getattr(request, "stop_token_ids", None) or ())

    def _delta(self, events: Iterable[Event], request: Any) -> DeltaMessage | None:
        """Events -> a message with only the fields they fill, as vLLM sends each that was set; None for no events."""
        fields: dict[str, Any] = {}
        calls: dict[int, DeltaToolCall] = {}
        for event in events:
            if isinstance(event, Reasoning):
                fields["reasoning"] = fields.get("reasoning", "") + event.text
            elif isinstance(event, Content):
                fields["content"] = fields.get("content", "") + event.text
            elif isinstance(event, ToolCallStart):
                function = DeltaFunctionCall(name=event.name, arguments="")
                calls[event.index] = DeltaToolCall(index=event.index, id=event.id, type="function", function=function)
            else:
                more = DeltaToolCall(index=event.index, function=DeltaFunctionCall(arguments=""))
                calls.setdefault(event.index, more).function.arguments += event.arguments
        if calls:
            fields["tool_calls"] = list(calls.values())
        elif "content" in fields and self._forced(request) and (found := self._guided(fields.pop("content"), request)):
            fields["tool_calls"] = found
        self._reasoned |= "reasoning" in fields
        if not request.include_reasoning:
            fields.pop("reasoning", None)
        return DeltaMessage(**fields) if fields else None

    def _guided(self, text: str, request: Any) -> list[DeltaToolCall]:
        """More of a forced call's JSON -> more of what vLLM reads there."""
        state = self._stream_state
        before, state.previous_text = state.previous_text, state.previous_text + text
        message, state.function_name_returned = self._extract_tool_calls_streaming(
            before, state.previous_text, text, (), (), (), request,
            tool_call_idx=0, function_name_returned=state.function_name_returned,
        )  # fmt: skip
        return message.tool_calls if message is not None else []


def _compose(pair: type[DelegatingParser]) -> type[DelegatingParser]:
    """What vLLM made of a reasoning and a tool parser -> the same with one state machine, where they are ours."""
    chosen = [one for one in (pair.reasoning_parser_cls, pair.tool_parser_cls) if one is not None]
    ours = [issubclass(one, (NemoLiteReasoningParser, NemoLiteToolParser)) for one in chosen]
    if not any(ours):
        return pair
    if not all(ours):
        raise TypeError(
            f"--reasoning-parser and --tool-call-parser are {' and '.join(one.__name__ for one in chosen)}: those of "
            "nemo_lite read an answer together, so give both of them or leave one out"
        )
    return type("_AnswerParser", (AnswerParser, pair), {})


def _register() -> None:
    ReasoningParserManager.register_module("nemo_lite", module=NemoLiteReasoningParser)
    ToolParserManager.register_module("nemo_lite", module=NemoLiteToolParser)
    ToolParserManager.register_module("nemo_lite_qwen3_coder", module=NemoLiteXmlToolParser)
    ToolParserManager.register_module("nemo_lite_json", module=NemoLiteJsonToolParser)
    get_parser = ParserManager.get_parser

    def composed(*args, **options):
        pair = get_parser(*args, **options)
        return pair and _compose(pair)

    ParserManager.get_parser = staticmethod(composed)


_register()
