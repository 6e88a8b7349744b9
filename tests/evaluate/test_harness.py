"""lm-evaluation-harness: the adapter's log-likelihoods are the model's, and its tasks run offline on local data, in
process and through our server with the harness's own client, with equal results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from nemo_lite import HybridLM, cli
from nemo_lite.config import UserError
from nemo_lite.data import load_tokenizer
from nemo_lite.evaluate.harness import log_likelihoods, resolve, run

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "tests" / "fixtures" / "tiny_trained"
TASKS = [f"tests/fixtures/harness/{name}.yaml" for name in ("choice", "text", "write")]


@pytest.fixture(scope="module")
def model():
    return HybridLM.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL_DIR)


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """The harness, offline, with caches of its own; it is no part of the development set-up (380 MB with what it
    brings), so that these tests are skipped where nobody has installed the extra `eval`."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(ROOT)
    return pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "nemo-lite[eval]"')


@torch.no_grad()
def logp(model, context, continuation):
    rows = model(torch.tensor([context + continuation])).logits.log_softmax(-1)[0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    return float(rows.gather(-1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def test_log_likelihoods_are_those_of_single_forwards(model, tokenizer):
    texts = [
        ("def forward(self, ", "x):"),
        ("i", "mport os"),
        ("class A:\n    def", " f(self):\n        return 1\n" * 60),
    ]
    pairs = [tuple(tokenizer.encode(part) for part in pair) for pair in texts]
    for (context, continuation), (nats, greedy) in zip(pairs, log_likelihoods(model, pairs)):
        right, same = logp(model, context, continuation)
        assert nats == pytest.approx(right, abs=2e-3, rel=1e-5) and greedy == same
    following = model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax()
    assert log_likelihoods(model, [(pairs[0][0], [int(following)])])[0][1] is True


def test_without_the_package_it_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nemo-lite\[eval\]"):
        resolve(TASKS)
    with pytest.raises(UserError, match=r"x\.yaml: there is no such file"):
        resolve(["x.yaml"])


def test_three_tasks_on_local_data(lm_eval, model, tokenizer):
    found = run(model, tokenizer, resolve(TASKS))
    assert list(found) == ["nemo_lite_choice", "nemo_lite_text", "nemo_lite_write"]
    rows = [json.loads(line) for line in (ROOT / "tests/fixtures/harness/choice.jsonl").read_text().splitlines()]
    chosen = []
    for row in rows:
        tries = [logp(model, tokenizer.encode(row["question"]), tokenizer.encode(c))[0] for c in row["choices"]]
        chosen.append(max(range(2), key=tries.__getitem__) == row["answer"])
    assert found["nemo_lite_choice"]["score"] == found["nemo_lite_choice"]["acc"] == sum(chosen) / 4
    assert found["nemo_lite_choice"]["samples"] == 4
    rows = [json.loads(line)["text"] for line in (ROOT / "tests/fixtures/harness/text.jsonl").read_text().splitlines()]
    nats = sum(logp(model, [tokenizer.eod_id], tokenizer.encode(text))[0] for text in rows)
    bits = -nats / torch.tensor(2.0).log().item() / sum(map(len, rows))
    assert found["nemo_lite_text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert 0 <= found["nemo_lite_write"]["exact_match"] <= 1


def test_the_command_takes_tasks(lm_eval, capsys):
    words = ["evaluate", MODEL_DIR, "--source", ROOT / "tests/fixtures/text", "--validation-fraction", 0.2]
    words += ["--prompts", 0, "--ruler", 0, "--harness", TASKS[0]]
    assert cli.main([*map(str, words), "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["harness"]["nemo_lite_choice"]["samples"] == 4
    words[-1] = "no_such_task"
    assert cli.main(list(map(str, words))) == 1
    assert "no_such_task: lm-eval has no such task" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harnesss_own_client_gets_the_same_from_our_server(lm_eval, model, tokenizer):
    pytest.importorskip("tenacity", reason='lm-eval\'s client needs its extra api: pip install "nemo-lite[eval]"')
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager  # its client's requests are ours to answer: ids, echo and logprobs
    from serving.real import Server

    here = run(model, tokenizer, resolve(TASKS))
    with Server() as server:
        out = simple_evaluate(
            "local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(MODEL_DIR),
                "tokenizer_backend": "huggingface",
            },
            tasks=[str(ROOT / task) for task in TASKS],
            task_manager=TaskManager(),
            bootstrap_iters=10,
        )["results"]
    assert out["nemo_lite_choice"]["acc,none"] == here["nemo_lite_choice"]["acc"]
    assert out["nemo_lite_text"]["bits_per_byte,none"] == pytest.approx(
        here["nemo_lite_text"]["bits_per_byte"], rel=1e-4
    )
    assert out["nemo_lite_write"]["exact_match,none"] == here["nemo_lite_write"]["exact_match"]
