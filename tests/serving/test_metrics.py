"""/metrics: vLLM's names, the right arithmetic, and counters that never fall, whatever the engine does."""

import pytest
from nemo_lite_serving.metrics import Metrics
from nemo_lite_serving.protocol import Counts, EngineStats
from prometheus_client.parser import text_string_to_metric_families

# What vLLM's own Grafana dashboards, and autoscalers made for it, ask for.
NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "nemo_lite:prefix_cache_evictions_total",
    "nemo_lite:engine_steps_total",
]


def samples(metrics, stats=None):
    text = metrics.render(stats or EngineStats()).decode()
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k not in ("model_name", "engine"))): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found, name, **labels):
    return found[name, frozenset(labels.items())].value


def test_names_and_labels():
    found = samples(Metrics("tiny"))
    names = {name for name, _ in found}
    assert names >= set(NAMES)
    for sample in found.values():
        assert sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0"
    for reason in ("stop", "length", "abort", "error"):
        assert value(found, "vllm:request_success_total", finished_reason=reason) == 0
    assert Metrics.content_type.startswith("text/plain; version=0.0.4")


def test_a_request_is_counted():
    metrics = Metrics("tiny", max_model_len=2000)
    metrics.first_token(0.03)
    metrics.inter_token(0.06, tokens=3)
    metrics.inter_token(0.01)
    counts = Counts(prompt_tokens=100, new_tokens=5, queued_seconds=0.5, first_token_seconds=1.0)
    metrics.finished(counts, "stop", 3.0)
    metrics.finished(None, "abort", 0.25)
    metrics.finished(Counts(prompt_tokens=7, queued_seconds=0.5), "abort", 1.0)
    metrics.http("/v1/completions", 200)
    metrics.http("/v1/completions", 200)
    found = samples(metrics)
    assert value(found, "vllm:time_to_first_token_seconds_sum") == 0.03
    assert value(found, "vllm:inter_token_latency_seconds_count") == 4
    assert value(found, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.07)
    assert value(found, "vllm:inter_token_latency_seconds_bucket", le="0.025") == 4
    assert value(found, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(found, "vllm:request_success_total", finished_reason="abort") == 2
    assert value(found, "vllm:e2e_request_latency_seconds_sum") == 4.25
    assert value(found, "vllm:request_queue_time_seconds_sum") == 1.0
    assert value(found, "vllm:request_prefill_time_seconds_sum") == 0.5
    assert value(found, "vllm:request_decode_time_seconds_sum") == 2.0
    assert value(found, "vllm:request_decode_time_seconds_count") == 1
    assert value(found, "vllm:request_time_per_output_token_seconds_sum") == 0.5
    assert value(found, "vllm:request_prompt_tokens_sum") == 107
    assert value(found, "vllm:request_prompt_tokens_bucket", le="1000.0") == 2
    assert ("vllm:request_prompt_tokens_bucket", frozenset({("le", "5000.0")})) not in found
    assert value(found, "nemo_lite:http_requests_total", route="/v1/completions", status="200") == 2


def test_counters_go_on_when_the_engine_starts_afresh():
    metrics = Metrics("tiny")
    engines = [
        [EngineStats(), EngineStats(steps=5, prompt_tokens=40, new_tokens=9, accepted_at=[3, 1], drafts=4)],
        [EngineStats(steps=2, prompt_tokens=50, new_tokens=1, running=2, kv_usage=0.5, accepted_at=[1])],
        [EngineStats(), EngineStats(steps=1), EngineStats(steps=4, new_tokens=6, accepted_at=[1, 1, 1])],
    ]
    last = {}
    for stats in (stats for engine in engines for stats in engine):
        for _ in range(2):  # asking twice counts nothing twice
            found = {key: sample.value for key, sample in samples(metrics, stats).items() if "_total" in key[0]}
            assert all(found[key] >= before for key, before in last.items())
            last = found
    assert last["nemo_lite:engine_steps_total", frozenset()] == 5 + 2 + 4
    assert last["vllm:prompt_tokens_total", frozenset()] == 40 + 50
    assert last["vllm:generation_tokens_total", frozenset()] == 9 + 1 + 6
    assert last["vllm:spec_decode_num_drafts_total", frozenset()] == 4
    per_position = [
        last["vllm:spec_decode_num_accepted_tokens_per_pos_total", frozenset({("position", str(k))})] for k in range(3)
    ]
    assert per_position == [5, 2, 1]


def test_gauges_follow_the_engine():
    metrics = Metrics("tiny")
    samples(metrics, EngineStats(running=3, waiting=9, kv_usage=0.75))
    found = samples(metrics, EngineStats(running=1, kv_usage=0.25))
    assert value(found, "vllm:num_requests_running") == 1
    assert value(found, "vllm:num_requests_waiting") == 0
    assert value(found, "vllm:kv_cache_usage_perc") == 0.25


def test_servers_do_not_share_a_registry():
    one, two = Metrics("one"), Metrics("two")
    one.first_token(1.0)
    assert value(samples(two), "vllm:time_to_first_token_seconds_count") == 0
