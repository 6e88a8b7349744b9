"""`nemo-lite bench serve` against a fake server: what it sends, what it counts, what it says."""

import asyncio
import json
import math

import pytest
from nemo_lite_serving.load import MALFORMED, Load, quantiles, read_counters, read_prompts, run_async, run_load
from serving.fake_server import ANSWER, FakeServer

from nemo_lite import cli
from nemo_lite.config import UserError

TEXT = "".join(text for text, _ in ANSWER)


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def test_numbers_of_a_plain_load(server):
    out = run_load(server.url, requests=20, concurrency=4, input_len=10, output_len=8, keep_answers=True)
    assert (out["ok"], out["failures"], out["disconnected"]) == (20, {}, 0)
    assert out["model"] == "tiny" and out["server_version"] == "0.0-fake"
    assert {result.text for result in out["results"]} == {TEXT}
    assert out["output_tokens"] == 20 * 8 and out["prompt_tokens"] == 20 * 10
    assert out["peak_concurrency"] == 4 and server.most_running <= 4
    # 5 of 8 tokens are accepted drafts, over 2 verify steps; half of each prompt is found in the cache.
    assert out["server"]["acceptance_length"] == 1 + 5 / 2
    assert out["server"]["prefix_hit_rate"] == 0.5
    assert out["finish_reasons"] == {"stop": 20}
    first, whole = out["ttft_ms"], out["e2e_ms"]
    assert 0 < first["p50"] <= whole["p50"] <= whole["p99"] <= whole["max"]
    assert out["health_ms"]["max"] > 0 and out["health_failures"] == {}
    # Connections are kept: one a place, and one for each health probe.
    assert server.connections <= 4 + out["health_probes"] + 1
    json.dumps({name: value for name, value in out.items() if name != "results"}, allow_nan=False)


def test_streams_are_clocked():
    with FakeServer(delay=0.02) as server:
        out = run_load(server.url, requests=4, output_len=8, endpoint="chat", warmup=0, keep_answers=True)
    assert out["ok"] == 4
    for result in out["results"]:
        assert result.text == TEXT and len(result.gaps) == 7
    # The role comes first, without text: it is no first token.
    assert out["ttft_ms"]["p50"] >= 20
    assert out["itl_ms"]["p50"] >= 20
    assert out["tpot_ms"]["p50"] == pytest.approx(out["itl_ms"]["mean"], rel=1)


def test_text_is_not_parsed_and_counts_agree(server):
    light = run_load(server.url, requests=5, output_len=30, ignore_eos=True)
    assert light["output_tokens"] == 150 and light["finish_reasons"] == {"length": 5}


def test_lengths_and_the_shared_prefix(server):
    run_load(server.url, requests=30, input_len=20, output_len=10, range_ratio=0.5, shared_prefix=7, warmup=0)
    prompts = [request["prompt"] for request in server.requests]
    assert all(isinstance(token, int) for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 1
    lengths = {len(prompt) - 7 for prompt in prompts}
    assert min(lengths) >= 10 and max(lengths) <= 30 and len(lengths) > 5
    assert len({request["max_tokens"] for request in server.requests}) > 3
    again = FakeServer()
    with again:
        run_load(again.url, requests=30, input_len=20, output_len=10, range_ratio=0.5, shared_prefix=7, warmup=0)
    key = lambda request: json.dumps(request, sort_keys=True)  # noqa: E731
    assert sorted(server.requests, key=key) == sorted(again.requests, key=key)  # the seed decides all of it


def test_chat_prompts_are_words_of_about_that_length(server):
    run_load(server.url, requests=3, input_len=50, endpoint="chat", warmup=0, model="tiny")
    for request in server.requests:
        assert len(request["messages"][0]["content"].split()) == 50


def test_prompts_from_a_file(server, tmp_path):
    lines = ['"plain"', '{"prompt": "one", "max_tokens": 3}', '{"text": "two", "id": 5}']
    lines.append('{"messages": [{"role": "user", "content": "three"}]}')
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "p.txt").write_text("first line\n\nsecond line\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["first line", "second line"]
    prompts = read_prompts(tmp_path / "p.jsonl")
    run_load(server.url, requests=4, concurrency=1, prompts=prompts, endpoint="chat", output_len=9, warmup=0)
    said = [(request["messages"][-1]["content"], request["max_tokens"]) for request in server.requests]
    assert said == [("plain", 9), ("one", 3), ("two", 9), ("three", 9)]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"promt": "y"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        read_prompts(tmp_path / "bad.jsonl")


def test_requests_come_at_the_rate(server):
    out = run_load(server.url, requests=40, request_rate=100, input_len=4, output_len=2)
    assert 0.2 < out["seconds"] < 1.0  # 40 at 100 a second; the seed is fixed
    assert out["settings"]["request_rate"] == 100


def test_disconnects_and_malformed_requests():
    with FakeServer(delay=0.005) as server:
        out = run_load(
            server.url,
            requests=60,
            concurrency=8,
            output_len=8,
            disconnect_fraction=0.3,
            malformed_fraction=0.4,
            seed=3,
        )
        assert out["failures"] == {}
        assert out["ok"] + out["disconnected"] + out["malformed_refused"] == 60
        assert out["disconnected"] >= 8 and out["malformed_refused"] >= 2 * len(MALFORMED)
        assert server.dropped > 0


@pytest.mark.parametrize(
    ("prompt", "kind", "detail"),
    [
        ("wrong", "status 400", "600 tokens"),
        ("busy", "status 429", "queue is full"),
        ("break", "error in the stream", "The engine ended"),
        ("cut", "connection lost", ""),
    ],
)
def test_failures_by_kind(server, prompt, kind, detail):
    out = run_load(server.url, requests=3, prompts=[prompt, "fine", "fine too"], warmup=0)
    assert out["ok"] == 2 and out["failures"] == {kind: 1}
    assert detail in out["failure_examples"][kind]


def test_timeout(server):
    out = run_load(server.url, requests=2, prompts=["slow"], output_len=50, timeout=0.3, warmup=0)
    assert out["failures"] == {"timeout": 2} and out["seconds"] < 2


def test_a_server_without_extras_or_metrics():
    """/tokenize, /metrics and the like may be missing: the usage of one request tells how long words are."""

    class Bare(FakeServer):
        async def _answer(self, writer, method, path, headers, body):
            if path in ("/tokenize", "/version", "/health", "/metrics"):
                return self._error(writer, 404, "There is no such thing.")
            return await super()._answer(writer, method, path, headers, body)

    with Bare(extension=False) as server:
        out = run_load(server.url + "/v1", requests=3, input_len=30)
    assert out["ok"] == 3 and out["prompt_tokens"] == 90
    assert out["server"] == {"counters": {}} and out["health_ms"] is None and out["server_version"] is None


def test_quantiles_and_counters():
    assert quantiles([]) is None
    assert quantiles([i / 1000 for i in range(1, 101)]) == pytest.approx(
        {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    )
    page = """# HELP vllm:prefix_cache_hits_total x
vllm:prefix_cache_hits_total{engine="0",model_name="a b"} 12.0
vllm:prefix_cache_hits_total{engine="1",model_name="a b"} 3.0
vllm:prefix_cache_hits_created{engine="0"} 1.7e9
vllm:spec_decode_num_drafts_total 7
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 5.0
"""
    assert read_counters(page) == {"prefix_hits": 15.0, "drafts": 7.0}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"concurrency": 0}, "concurrency"),
        ({"request_rate": math.nan}, "request_rate"),
        ({"range_ratio": 1.5}, "range_ratio"),
        ({"disconnect_fraction": 0.7, "malformed_fraction": 0.7}, "more than all"),
        ({"prompts": []}, "prompts is empty"),
        ({"url": "ftp://x"}, "address of a server"),
        ({"url": "http://127.0.0.1:9"}, "does not answer"),
    ],
)
def test_what_cannot_be_is_a_sentence(settings, told):
    with pytest.raises(UserError, match=told):
        asyncio.run(run_async(Load(**({"url": "http://127.0.0.1:1"} | settings))))


def test_a_first_request_that_fails_ends_it(server):
    with pytest.raises(UserError, match=r"first request failed \(status 400\): .*no such is not served"):
        run_load(server.url, model="no such")


def test_the_command(tmp_path, capsys):
    from nemo_lite_serving import load

    report = tmp_path / "out.json"
    with FakeServer(key="secret") as server:
        argv = [
            "serve",
            server.url,
            "--requests",
            "4",
            "--output-len",
            "4",
            "--api-key",
            "secret",
            "--json",
            str(report),
        ]
        assert load.main(argv) == 0
        shown = capsys.readouterr().out
        assert "4 of 4 answered" in shown and "to the first token" in shown and "acceptance length" in shown
        body = json.loads(report.read_text(encoding="utf-8"))
        assert body["command"].startswith("nemo-lite bench serve http://") and "secret" not in report.read_text()
        assert body["machine"]["cores"] and body["version"] and body["ttft_ms"]["p99"] > 0
        assert cli.guard(load.main, ["serve", server.url]) == 1
        assert "status 401" in capsys.readouterr().err
    assert load.main([]) == 2
    assert load.main(["serv"]) == 2 and "there is only `serve`" in capsys.readouterr().err
