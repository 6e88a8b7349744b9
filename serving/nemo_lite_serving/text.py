"""From generated token ids to the text a client may see: decoding, stop strings, log-probabilities.

Text leaves in whole tokens. A token is held back while its text may still turn out to begin a stop string, so that
never half a stop string is seen, however the engine groups its tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_lite.data.tokenizer import Tokenizer
from nemo_lite_serving.protocol import Output, TokenLogprobs

NO_TOKEN = -1  # text that belongs to a token which has been shown already
LEAST_LOGPROB = -9999.0  # for -inf, which JSON cannot hold; vLLM's number


class StopStrings:
    """Finds the first stop string to be completed in a text that comes in pieces.

    Of several that end at the same character the longest counts. What was found so depends on the text alone, not on
    where it was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        self._tail = ""  # the longest end of the text that begins a stop string

    @property
    def held(self) -> int:
        """Characters at the end of the text that may yet become a stop string."""
        return len(self._tail)

    def push(self, text: str) -> tuple[int, int] | None:
        """Where a stop string is, as (start, end) from the beginning of `text`; the start may lie before it (< 0)."""
        if not self._stops:
            return None
        known, text = len(self._tail), self._tail + text
        found: tuple[int, int] | None = None  # (end, start): the smallest wins
        for stop in self._stops:
            # A match ends in the new part: an earlier one would have been found when it was new.
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (found is None or (start + len(stop), start) < found):
                found = (start + len(stop), start)
        if found is not None:
            return found[1] - known, found[0] - known
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self._stops):
                self._tail = text[-length:]
                return None
        self._tail = ""
        return None


@dataclass(slots=True)
class Token:
    """One generated token that may be shown. `text` completes here: "" while a UTF-8 character is still open."""

    id: int
    text: str
    depth: int = 0
    logprob: TokenLogprobs | None = None


class TokenText:
    """The ids of one answer, as they come, to the tokens that may be shown; their texts join to the answer's text.

    stop_ids     end the answer; their text does not belong to it
    keep         special tokens that are shown although `skip_special` (reasoning and tool call markers)
    min_tokens   no stop string is looked for in the text of that many first tokens
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        stop_ids: Collection[int] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        keep: Collection[int] = (),
        min_tokens: int = 0,
    ):
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._search = StopStrings(stops)
        self._stop_ids, self._include_stop = frozenset(stop_ids), include_stop
        self._lengths = tokenizer.byte_lengths() if skip_special else None
        self._keep = frozenset(keep)
        self._min_tokens = min_tokens
        self._waiting: list[Token] = []
        self._open = 0  # last tokens whose character is not complete: they wait for it
        self.consumed = 0  # tokens, those of a stop string and the stop token included
        self.accepted_at: list[int] = []  # consumed tokens that were drafts, by depth
        self.stopped = False  # a stop string came: what the engine sends from now on is not looked at

    def push(self, output: Output) -> list[Token]:
        """The tokens that may be shown now."""
        shown: list[Token] = []
        for position, index in enumerate(output.tokens):
            if self.stopped:
                break
            depth = output.depths[position] if position < len(output.depths) else 0
            self._count(depth)
            last = output.finish_reason == "stop" and position == len(output.tokens) - 1
            if last and index in self._stop_ids and not self._include_stop:
                break
            logprob = output.logprobs[position] if position < len(output.logprobs) else None
            self._waiting.append(Token(index, self._text(index), depth, logprob))
            shown += self._released()
        if output.finish_reason is not None and not self.stopped:
            rest = self._stream.flush()  # half a character at the very end
            if rest:
                if not self._waiting:
                    self._waiting.append(shown.pop() if shown else Token(NO_TOKEN, ""))
                self._waiting[-1].text += rest
                shown += self._released(rest)
            if not self.stopped:
                shown += self._waiting
            self._waiting = []
        return shown

    def _count(self, depth: int) -> None:
        self.consumed += 1
        if depth > 0:
            self.accepted_at += [0] * (depth - len(self.accepted_at))
            self.accepted_at[depth - 1] += 1

    def _text(self, index: int) -> str:
        if not 0 <= index < self._tokenizer.vocab_size:  # a padded embedding has rows that the tokenizer does not know
            return ""
        if self._lengths is not None and self._lengths[index] == 0 and index not in self._keep:
            return ""
        text = self._stream.push(index)
        self._open = 0 if text else self._open + 1
        return text

    def _released(self, new: str | None = None) -> list[Token]:
        """Take from the waiting tokens those that no stop string can reach any more."""
        text = self._waiting[-1].text if new is None else new
        found = self._search.push(text) if self.consumed > self._min_tokens else None
        if found is not None:
            self.stopped = True
            keep = sum(len(token.text) for token in self._waiting) - len(text) + found[1 if self._include_stop else 0]
            shown = []
            for token in self._waiting:
                if keep <= 0:
                    break
                token.text = token.text[:keep]
                keep -= len(token.text)
                shown.append(token)
            self._waiting = []
            return shown
        held, count = self._search.held, len(self._waiting)
        if self._open and new is None:
            count = max(0, count - self._open)
        while held > 0 and count > 0:
            count -= 1
            held -= len(self._waiting[count].text)
        shown, self._waiting = self._waiting[:count], self._waiting[count:]
        return shown


def token_string(tokenizer: Tokenizer, index: int) -> tuple[str, bytes]:
    """One token by itself as OpenAI writes it (half a character as `bytes:\\xe2`), and its bytes."""
    if not 0 <= index < tokenizer.vocab_size:
        return "", b""
    raw = tokenizer.token_bytes(index)
    try:
        return raw.decode("utf-8"), raw
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB)


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token], top: int) -> list[dict[str, Any]]:
    """The entries of `choices[].logprobs.content` of a chat completion."""

    def entry(index: int, logprob: float) -> dict[str, Any]:
        text, raw = token_string(tokenizer, index)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    found = []
    for token in tokens:
        if token.logprob is None or token.id == NO_TOKEN:
            continue
        likeliest = [entry(index, value) for index, value in token.logprob.top[:top]]
        found.append({**entry(token.id, token.logprob.logprob), "top_logprobs": likeliest})
    return found


def completion_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token], top: int, offset: int = 0) -> dict[str, Any]:
    """The `choices[].logprobs` of a completion; `offset` characters of its text came before these tokens."""
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token in tokens:
        if token.id == NO_TOKEN:
            offset += len(token.text)
            continue
        name = token_string(tokenizer, token.id)[0]
        texts.append(name)
        offsets.append(offset)
        offset += len(token.text)
        if token.logprob is None:  # the first token of an echoed prompt
            values.append(None)
            tops.append(None)
            continue
        values.append(_finite(token.logprob.logprob))
        best = {token_string(tokenizer, index)[0]: _finite(value) for index, value in token.logprob.top[:top]}
        tops.append({**best, name: _finite(token.logprob.logprob)})
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops if top else None, "text_offset": offsets}


def prompt_tokens(
    tokenizer: Tokenizer, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None
) -> list[Token]:
    """An echoed prompt as tokens."""
    stream = tokenizer.stream()
    found = []
    for position, index in enumerate(prompt):
        known = 0 <= index < tokenizer.vocab_size
        logprob = logprobs[position] if logprobs is not None and position < len(logprobs) else None
        found.append(Token(index, stream.push(index) if known else "", 0, logprob))
    if found:
        found[-1].text += stream.flush()
    return found
