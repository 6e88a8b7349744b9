"""What /metrics tells Prometheus, under vLLM's names and labels, so that its dashboards and autoscalers work here.

vLLM's list: https://docs.vllm.ai/en/latest/usage/metrics/. Not told: vllm:iteration_tokens_total, which would need each
step's tokens, and what belongs to features that are not here (LoRA, multi-modal and external caches, sleep).
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from nemo_lite_serving.protocol import Counts, EngineStats

_GAUGES = {  # name -> (field of EngineStats, meaning)
    "vllm:num_requests_running": ("running", "Requests that are being computed."),
    "vllm:num_requests_waiting": ("waiting", "Requests that wait to be scheduled."),
    "vllm:kv_cache_usage_perc": ("kv_usage", "Share of the KV cache that requests hold; 1 is all of it."),
}
_COUNTERS = {  # the same; prometheus-client appends _total
    "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "nemo_lite:prefix_cache_evictions": ("prefix_evictions", "Snapshots the prefix cache gave up for newer ones."),
    "vllm:num_preemptions": ("preemptions", "Times that a running request had to give its memory to another."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens processed."),
    "vllm:generation_tokens": ("new_tokens", "Tokens generated."),
    "vllm:spec_decode_num_drafts": ("drafts", "Verify steps: sequences of drafts that the model checked."),
    "vllm:spec_decode_num_draft_tokens": ("draft_tokens", "Tokens drafted."),
    "vllm:spec_decode_num_accepted_tokens": ("accepted_tokens", "Drafted tokens accepted."),
    "nemo_lite:engine_steps": ("steps", "Steps of the engine."),
}
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# vLLM's begin at 0.01; a small model on a GPU is quicker, and more boundaries break no query.
_PER_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_SECONDS = {  # histogram -> (buckets, meaning)
    "vllm:time_to_first_token_seconds": (_FIRST_TOKEN, "From a request's arrival to its first token."),
    "vllm:inter_token_latency_seconds": (_PER_TOKEN, "Between tokens; those that came together share their time."),
    "vllm:request_time_per_output_token_seconds": (_PER_TOKEN, "A request's mean time per token after the first."),
    "vllm:e2e_request_latency_seconds": (_REQUEST, "From a request's arrival to its end."),
    "vllm:request_queue_time_seconds": (_REQUEST, "From arrival in the engine to being scheduled first."),
    "vllm:request_inference_time_seconds": (_REQUEST, "From being scheduled first to the end."),
    "vllm:request_prefill_time_seconds": (_REQUEST, "From being scheduled first to the first token."),
    "vllm:request_decode_time_seconds": (_REQUEST, "From the first token to the end."),
}
_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """All metrics of one server, in a registry of their own. Not for several threads."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, model_name: str, max_model_len: int = 131072):
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        names = tuple(self._labels)
        registry = self._registry

        def plain(kind, name: str, meaning: str):
            return kind(name, meaning, names, registry=registry).labels(**self._labels)

        def histogram(name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, meaning, names, buckets=buckets, registry=registry).labels(**self._labels)

        self._gauges = {field: plain(Gauge, name, meaning) for name, (field, meaning) in _GAUGES.items()}
        self._counters = {field: plain(Counter, name, meaning) for name, (field, meaning) in _COUNTERS.items()}
        self._accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by position of the draft.",
            (*names, "position"),
            registry=registry,
        )
        self._success = Counter(
            "vllm:request_success", "Requests that ended, by reason.", (*names, "finished_reason"), registry=registry
        )
        for reason in _REASONS:  # a series that starts at 0 has a rate from its first event on
            self._success.labels(**self._labels, finished_reason=reason)
        self._seconds = {name: histogram(name, meaning, buckets) for name, (buckets, meaning) in _SECONDS.items()}
        sizes = _one_two_five(max_model_len)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._new = histogram("vllm:request_generation_tokens", "Tokens generated for a request.", sizes)
        self._http = Counter(
            "nemo_lite:http_requests", "HTTP requests answered.", ("route", "status"), registry=registry
        )
        self._seen = EngineStats()

    def first_token(self, seconds: float) -> None:
        self._seconds["vllm:time_to_first_token_seconds"].observe(seconds)

    def inter_token(self, seconds: float, tokens: int = 1) -> None:
        """`tokens` came at once, `seconds` after those before."""
        for _ in range(tokens):
            self._seconds["vllm:inter_token_latency_seconds"].observe(seconds / tokens)

    def finished(self, counts: Counts | None, reason: str, seconds: float) -> None:
        """A request ended `seconds` after its arrival: stop, length, abort or error. Without counts it never ran."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._seconds["vllm:e2e_request_latency_seconds"].observe(seconds)
        if counts is None:
            return
        queued, first = counts.queued_seconds, counts.first_token_seconds
        self._prompt.observe(counts.prompt_tokens)
        self._new.observe(counts.new_tokens)
        self._seconds["vllm:request_queue_time_seconds"].observe(queued)
        self._seconds["vllm:request_inference_time_seconds"].observe(max(0.0, seconds - queued))
        if counts.new_tokens:
            decode = max(0.0, seconds - first)
            self._seconds["vllm:request_prefill_time_seconds"].observe(max(0.0, first - queued))
            self._seconds["vllm:request_decode_time_seconds"].observe(decode)
            if counts.new_tokens > 1:
                mean = decode / (counts.new_tokens - 1)
                self._seconds["vllm:request_time_per_output_token_seconds"].observe(mean)

    def http(self, route: str, status: int) -> None:
        self._http.labels(route=route, status=str(status)).inc()

    def render(self, stats: EngineStats) -> bytes:
        """The text of /metrics, with what the engine last told."""
        seen = self._seen
        # As Prometheus does: a counter that fell is of an engine that started afresh, and all of them count from 0.
        if any(getattr(stats, field) < getattr(seen, field) for field in self._counters):
            seen = EngineStats()
        for field, counter in self._counters.items():
            counter.inc(getattr(stats, field) - getattr(seen, field))
        for position, count in enumerate(stats.accepted_at):
            before = seen.accepted_at[position] if position < len(seen.accepted_at) else 0
            self._accepted_at.labels(**self._labels, position=str(position)).inc(max(0, count - before))
        for field, gauge in self._gauges.items():
            gauge.set(getattr(stats, field))
        self._seen = EngineStats(**{**vars(stats), "accepted_at": list(stats.accepted_at)})
        return generate_latest(self._registry)


def _one_two_five(largest: int) -> list[int]:
    """1, 2, 5, 10, ... up to the largest."""
    sizes = [mantissa * 10**exponent for exponent in range(len(str(largest))) for mantissa in (1, 2, 5)]
    return [size for size in sizes if size <= max(1, largest)]
