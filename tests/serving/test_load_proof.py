"""Ten thousand short requests, clients that leave and clients that err: every answer is right, and nothing is left."""

import asyncio
import functools
import random

import pytest
from nemo_lite_serving.load import Load, run_async
from runs import wait_for
from serving.real import SECONDS, Server, ids_of, ties

REQUESTS = 10_000
CONCURRENCY = 64
PROMPTS = 200


def prompts() -> list[dict]:
    """Completions of short prompts, many of which begin alike."""
    rng = random.Random(0)
    stems = ["", "import torch\n", "class Layer(nn.Module):\n    def forward(self, x):\n        ", "# The model's "]
    words = "def class return self. torch. for if x = ( [ import the and not".split()  # noqa: SIM905
    found: dict[str, dict] = {}
    while len(found) < PROMPTS:
        text = rng.choice(stems) + " ".join(rng.choices(words, k=rng.randint(1, 5)))
        found[text] = {"prompt": text, "max_tokens": rng.randint(4, 12)}
    return list(found.values())


@functools.cache
def differing(prompt: str, text: str, finish: str, max_tokens: int) -> int:
    return ties(ids_of(prompt), text, finish, max_tokens)


def load(server: Server, seed: int, requests: int) -> dict:
    """Put one load on the server; what came of it, and its right and wrong answers."""
    out = asyncio.run(
        run_async(
            Load(
                server.url, requests=requests, concurrency=CONCURRENCY, prompts=prompts(), seed=seed, warmup=0,
                disconnect_fraction=0.2, malformed_fraction=0.1, health_every=0.1, keep_answers=True,
            )
        )
    )  # fmt: skip
    out["ties"] = 0
    for result in out.pop("results"):
        if result.kind == "ok":
            asked = result.body["prompt"], result.text, result.finish_reason, result.body["max_tokens"]
            out["ties"] += differing(*asked)
    return out


@pytest.mark.load
def test_a_load_leaves_nothing_behind_and_every_answer_is_right(capsys):
    with Server("--max-num-seqs", CONCURRENCY // 2, "--max-queue", 4 * CONCURRENCY) as server:
        load(server, 0, REQUESTS // 10)  # allocators and caches take what they need
        wait_for(lambda: server.check()["in_flight"] == 0, SECONDS)
        books, halves, told = [server.check()], [], []
        for half in (1, 2):
            halves.append(load(server, half, REQUESTS // 2))
            wait_for(lambda: server.check()["in_flight"] == 0, SECONDS)
            wait_for(lambda: server.check()["tasks"] <= books[0]["tasks"], SECONDS)
            books.append(server.check())
        for out in halves:
            assert out["failures"] == {}, out["failure_examples"]
            assert out["health_failures"] == {}
            assert out["ok"] + out["disconnected"] + out["malformed_refused"] == out["requests"]
            assert out["disconnected"] > out["requests"] / 10 and out["malformed_refused"] > out["requests"] / 20
        assert sum(out["ties"] for out in halves) < 1e-3 * sum(out["output_tokens"] for out in halves)
        for each in books:
            assert each["ok"], each["error"]
            assert each["running"] == each["waiting"] == each["in_flight"] == each["active"] == 0
            # What is not free is a prefix's snapshot, and each of them has one slot.
            assert each["num_slots"] - each["free_slots"] == each["snapshots"]
        for name in ("rss", "api_rss"):
            assert books[2][name] < 1.05 * books[1][name] + (20 << 20), name
        server.process.terminate()
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.errors)
    for half, out in enumerate(halves):
        told.append(f"{out['seconds']:.0f} s, {out['requests_per_second']:.0f} requests/s, {out['ties']} ties")
        for name in ("ttft_ms", "e2e_ms", "health_ms"):
            told.append(f"{name} " + " ".join(f"{key} {value:.1f}" for key, value in out[name].items()))
        told.append(f"engine {books[half + 1]['rss'] >> 20} MiB, API {books[half + 1]['api_rss'] >> 20} MiB")
    with capsys.disabled():
        print("", *told, sep="\n")
