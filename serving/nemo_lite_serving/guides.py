"""Guided output: which tokens may come next, by llguidance (an extra: its wheel has no dependencies)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence as Tokens

import torch
from torch import Tensor

from nemo_lite.config import UserError
from nemo_lite_serving.protocol import Guide


def available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("llguidance") is not None


KINDS = {
    "json_schema": "this JSON schema",
    "json_object": "a JSON object",
    "regex": "this regular expression",
    "choice": "this choice",
}


def check(guide: Guide, tokenizer=None) -> str:
    """The guide as a grammar. Raises UserError if the library is missing or the guide is not valid; with llguidance's
    tokenizer also if it names a special token that the model does not have."""
    if not available():
        raise UserError('guided output needs the package llguidance: pip install "nemo-lite[guided]"')
    from llguidance import LLMatcher

    try:
        grammar = _grammar(guide)
        error = LLMatcher.validate_grammar(grammar, tokenizer)
    except (ValueError, RecursionError) as refused:
        error = str(refused)
    if error:
        raise UserError(f"{KINDS[guide.kind]} is not usable as a guide ({_sentence(error)})")
    return grammar


def _sentence(error: str) -> str:
    return " ".join(error.split())[:200]


def _grammar(guide: Guide) -> str:
    from llguidance import LLMatcher

    compact = {"whitespace_flexible": False}  # a model free to write spaces may write nothing else
    if guide.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=compact)
    if guide.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(guide.value, overrides=compact)
    if guide.kind == "choice":
        options = "|".join(json.dumps(text) for text in json.loads(guide.value))
        return LLMatcher.grammar_from_lark(f"start: {options}")
    return LLMatcher.grammar_from_regex(guide.value)


class Guides:
    """Compiles guides for one tokenizer; what is costly is made when the first guide comes."""

    def __init__(self, tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._shared = None

    def matcher(self, guide: Guide, stop_ids: Tokens[int]) -> Matcher:
        """A fresh matcher. Raises UserError if the library is missing or the guide is not valid."""
        if self.tokenizer is None:
            raise UserError("guided output needs the model's tokenizer")
        eod = self.tokenizer.eod_id
        if self._shared is None and available():
            from llguidance import LLTokenizer

            self._shared = LLTokenizer(
                self.tokenizer.backend.to_str(), n_vocab=self.vocab_size, eos_token=eod if eod is not None else 0
            )
        grammar = check(guide, self._shared)
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._shared, grammar), self.vocab_size, stop_ids, eod)


class Matcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher, vocab_size: int, stop_ids: Tokens[int], eod: int | None):
        self._matcher, self.vocab_size = matcher, vocab_size
        self._stop_ids, self._eod = list(stop_ids), eod
        self.finished = False

    def mask(self, logits_KV: Tensor, drafts: Tokens[int]) -> Tensor:
        """-inf where a token cannot come; row k stands behind the first k drafts. Rows behind a draft that cannot come
        are left as they are: it will be refused."""
        import llguidance.numpy

        rows = logits_KV.shape[0]
        logits = logits_KV.clone()
        consumed = 0
        for k in range(rows):
            bits = llguidance.numpy.allocate_token_bitmask(1, self.vocab_size)
            llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, 0)
            words = torch.from_numpy(bits[0].copy())
            allowed = (words[:, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[: self.vocab_size].bool()
            if self._matcher.is_accepting():
                # The grammar may end here: any stop id says so.
                allowed[self._stop_ids] = True
            elif self._eod is not None:
                allowed[self._eod] = False
            if not bool(allowed.any()):
                break
            logits[k].masked_fill_(~allowed.to(logits.device), -torch.inf)
            if k + 1 < rows:
                if not bool(allowed[drafts[k]]) or not self._matcher.try_consume_tokens([drafts[k]]):
                    break
                consumed += 1
        if consumed:
            self._matcher.rollback(consumed)
        return logits

    def advance(self, tokens: Tokens[int]) -> int:
        """The output goes on by these tokens; how many of them until the guide is at its end.

        Raises UserError when the library's limits are reached.
        """
        for count, token in enumerate(tokens):
            if token in self._stop_ids:
                self.finished = True
            else:
                self._matcher.consume_token(token)
                if self._matcher.is_error():
                    why = _sentence(self._matcher.get_error())
                    raise UserError(f"the guide cannot be followed further ({why})")
                self.finished = self._matcher.is_stopped()
            if self.finished:
                return count + 1
        return len(tokens)
