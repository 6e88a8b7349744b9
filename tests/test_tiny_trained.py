"""The trained model that ships for tests, and the commands that make, read and judge a MODEL_DIR."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_lite import HybridLM, cli
from nemo_lite.config import DataConfig, SourceConfig
from nemo_lite.data import load_tokenizer
from nemo_lite.evaluate.text import free_running, read
from nemo_lite.generate import generate

FIXTURES = Path(__file__).parent / "fixtures"
MODEL_DIR = FIXTURES / "tiny_trained"
PROMPT = 'def forward(self, x):\n    """The '


@pytest.fixture(scope="module")
def model():
    return HybridLM.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def data():
    text = SourceConfig(source=str(FIXTURES / "text"), include=["*.txt"])
    return DataConfig(tokenizer=str(MODEL_DIR), seq_len=128, blend=[text], validation_fraction=0.2)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Token caches of tests stay out of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


def test_it_is_small():
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 2e6


def test_acceptance_is_where_tests_need_it(model, data):
    """Some drafts are kept and some refused; the same for drafts beyond the training depth."""
    tokenizer = load_tokenizer(str(MODEL_DIR))
    figures = read(model, data, tokenizer, drafts=2).figures()
    assert 1.5 <= figures["teacher_forced"]["acceptance_length"] <= 2.5
    assert figures["bits_per_byte"] < 3.2
    assert min(layer["min_over_mean"] for layer in figures["experts"].values()) > 0.1
    free = free_running(model, data, tokenizer, 3, prompts=4, prompt_tokens=32, new_tokens=24)
    assert 1.0 < free["acceptance_length"] < 4.0 and 0 <= free["repeated_8grams"] <= 1
    assert not model.training and model.config.mtp.depth == 2


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_speculation_changes_no_token(model, drafts):
    """Exact in float64; float32 may differ where two tokens are equally likely, which other tests measure."""
    exact = HybridLM.from_pretrained(MODEL_DIR, dtype=torch.float64)
    ids = torch.tensor([load_tokenizer(str(MODEL_DIR)).encode(PROMPT)])
    plain = generate(exact, ids, max_tokens=64)
    drafted = generate(exact, ids, max_tokens=64, speculative=True, draft_tokens=drafts)
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.stats.accepted < drafted.stats.drafted


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_streams_the_prompt_and_its_continuation(capsys):
    code, out, err = run(capsys, "generate", MODEL_DIR, "--prompt", PROMPT, "--max-tokens", 24, "--stats")
    assert code == 0 and out.startswith(PROMPT) and "tokens/s" in err
    code, spoken, err = run(
        capsys, "generate", MODEL_DIR, "--prompt", PROMPT, "--max-tokens", 24, "--speculative", "mtp", "--stats"
    )
    assert code == 0 and spoken == out and "acceptance length" in err
    code, body, _ = run(capsys, "generate", MODEL_DIR, "--prompt", PROMPT, "--max-tokens", 24, "--json")
    assert code == 0 and PROMPT + json.loads(body)["text"] == out.removesuffix("\n")


def test_evaluate_prints_and_writes_json(capsys):
    text = ["--source", FIXTURES / "text", "--validation-fraction", 0.2, "--prompts", 0, "--seq-len", 128, "--ruler", 0]
    code, out, _ = run(capsys, "evaluate", MODEL_DIR, *text)
    assert code == 0 and "gzip -9" in out and "acceptance length, text" in out
    code, out, _ = run(capsys, "evaluate", MODEL_DIR, *text, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["bits_per_byte"] > 0


@pytest.mark.parametrize(
    "spoil, arguments, sentence",
    [
        (lambda d: shutil.rmtree(d), [], "no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), [], "has no .safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 64), [], "cannot be read"),
        (lambda d: (d / "config.json").write_text("{"), [], "is not JSON"),
        (lambda d: (d / "tokenizer.json").unlink(), [], "tokenizer"),
        (lambda d: None, ["--max-tokens", 0], "max_tokens must be 1 or more"),
        (lambda d: None, ["--temperature", -1], "temperature must be 0 or more"),
        (lambda d: None, ["--top-p", 0], "top_p must be above 0"),
        (lambda d: None, ["--speculative", "mtp", "--draft-tokens", 0], "draft_tokens must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, spoil, arguments, sentence):
    model_dir = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model_dir)
    spoil(model_dir)
    code, _, err = run(capsys, "generate", model_dir, "--prompt", "x", *arguments)
    assert code == 1 and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_export_refuses_what_it_cannot_read_or_would_overwrite(capsys, tmp_path):
    code, _, err = run(capsys, "export", tmp_path / "nothing", "--to", tmp_path / "model")
    assert code == 1 and "neither a RUN_DIR" in err
    code, _, err = run(capsys, "export", tmp_path / "checkpoints" / "step_3", "--to", tmp_path / "model")
    assert code == 1 and "does not exist" in err
