"""What the API and the engine say to each other. Plain data: it crosses a pipe between their processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_lite.generate import Sampling


@dataclass(frozen=True)
class Guide:
    """What the output must match: a JSON schema, any JSON object, a regular expression, or one of several texts.

    `value` is the schema or the pattern as text; for `choice` a JSON list of strings; for `json_object` empty.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    value: str = ""


@dataclass(frozen=True)
class Thinking:
    """`open`: the prompt ends inside the reasoning. After `budget` tokens of reasoning `end_ids` are forced."""

    end_ids: tuple[int, ...]
    open: bool = True
    budget: int | None = None


@dataclass
class Request:
    """One sequence to continue. `stop_ids` end it (the token is reported, its text is not the answer's)."""

    id: str
    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 16
    min_tokens: int = 0  # until then no stop id can be drawn
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # 0: of the chosen token; n: of the n likeliest too
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    thinking: Thinking | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the model's own distribution (before temperature, penalties and masks)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), likeliest first


@dataclass
class Counts:
    """What one request cost, told with its last output."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()  # by draft position
    verify_steps: int = 0
    preemptions: int = 0
    queued_seconds: float = 0.0  # until first scheduled
    first_token_seconds: float = 0.0  # since arrival in the engine


@dataclass
class Output:
    """New tokens of one request; the last one of a request has a finish_reason."""

    id: str
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)  # per token: 0 from the main model, k an accepted draft of depth k
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # per token, if asked
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # per prompt token (the first has none), if asked
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: str | None = None  # a sentence
    counts: Counts | None = None


@dataclass
class EngineStats:
    """A snapshot of the engine; counters since its start."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # share of the KV blocks that requests hold
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of them found
    prefix_evictions: int = 0  # snapshots
    drafts: int = 0  # verify steps of a request
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)


@dataclass
class EngineInfo:
    """What the engine tells when it is ready."""

    max_model_len: int
    vocab_size: int
    capacity: list[str]  # lines for a person: what fits in memory, and why
    speculative: str | None = None
    draft_tokens: str = "0"


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs; the names are vLLM's where it has one.

    quantization      int8 or int4: weights are packed as they are read
    kernels           backends of ops, as op=name[,op=name]
    memory_gib        for KV blocks and Mamba states; None takes what full use needs, at most half of what is free
    draft_tokens      drafts a step, or "auto": adapted to each request's acceptance and to the load
    mamba_cache_dtype of the SSM state: float32, bfloat16 or float16 (with stochastic rounding)
    """

    model_dir: str
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    quantization: str | None = None
    kernels: str | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    block_size: int = 16
    memory_gib: float | None = None
    prefix_caching: bool = True
    speculative: bool = False
    draft_tokens: int | Literal["auto"] = "auto"
    mamba_cache_dtype: str = "float32"
