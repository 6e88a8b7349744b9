"""`nemo-lite evaluate`: what it prints, writes and refuses; the page; two models beside each other."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from train.test_report import check

from nemo_lite import HybridLM, cli
from nemo_lite.data import load_tokenizer
from nemo_lite.evaluate import report

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL_DIR = FIXTURES / "tiny_trained"


def run(capsys, *words):
    code = cli.main(["evaluate", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources of the same files, split by what they are about; a model a little worse than the trained one."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, pattern in (("library", "nemo_lite.*.txt"), ("kernels", "nemo_lite_kernels.*.txt")):
        rows = []
        for path in sorted((FIXTURES / "text").glob(pattern)):
            text = path.read_text(encoding="utf-8")
            rows += [json.dumps({"text": text[i : i + 700]}) for i in range(0, len(text), 700)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    worse = HybridLM.from_pretrained(MODEL_DIR)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        worse.head.weight += 0.02 * torch.randn(worse.head.weight.shape, generator=generator)
    worse.save_pretrained(folder / "worse", tokenizer=load_tokenizer(MODEL_DIR))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def words(folder):
    sources = [word for name in ("library", "kernels") for word in ("--source", folder / f"{name}.jsonl")]
    return [*sources, "--validation-fraction", 0.2, "--seq-len", 128, "--ruler", "400,600", "--questions", 2]


@pytest.fixture
def measured(capsys, folder, words, tmp_path):
    code, out, err = run(
        capsys, MODEL_DIR, *words, "--prompts", 4, "--max-tokens", 8, "--against", folder / "worse", "--to", tmp_path
    )
    assert code == 0 and not err, err
    return out, json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")), tmp_path


def test_everything_at_once(measured, folder):
    out, figures, _ = measured
    for words in ("bits/byte", "gzip -9", "acceptance length, text", "tokens of context", "long-range questions"):
        assert words in out
    assert "tells sources apart" in out and f"beside {folder / 'worse'}" in out and "evaluation.html" in out
    assert max(map(len, out.splitlines())) <= 150
    assert set(figures["sources"]) == {str(folder / f"{name}.jsonl") for name in ("library", "kernels")}
    assert set(figures["ruler"]) == {"400", "600"} and 0 <= figures["ruler"]["600"]["single"]["score"] <= 1
    differences = figures["against"]["differences"]
    for each in differences["bits_per_byte"].values():
        assert each["difference"] == pytest.approx(each["a"] - each["b"])
        assert each["low"] <= each["difference"] <= each["high"] < 0  # noise in the head costs bits on every document
    assert figures["bits_per_byte"] < figures["against"]["figures"]["bits_per_byte"]
    assert len(differences["loss_by_position"]) == len(figures["loss_by_position"])
    assert set(differences["ruler"]) == {"400", "600"}
    assert "better" in out


def test_the_page_is_whole_and_needs_nothing(measured):
    _, figures, to = measured
    html, text = check(to / "evaluation.html")
    for words in ("Loss by position", "By source", "Long-range questions", "Routers", "Beside", "Expert load"):
        assert words in text
    assert f"{figures['bits_per_byte']:.3f}" in text and "at step" not in text
    assert "prefers-color-scheme:dark" in html
    marked = copy.deepcopy(figures)
    marked["model"] = "a/<script>x</script>"
    marked["warnings"] = ["<b>&"]
    assert "<script>x" not in report.page(marked) and "&lt;b&gt;&amp;" in report.page(marked)


def test_without_mtp_experts_questions_or_long_documents(capsys, tmp_path):
    from tiny import tiny_config, tiny_model

    model_dir, to = tmp_path / "model", tmp_path / "out"
    tokenizer = load_tokenizer("bytes")
    tiny_model(tiny_config("M-*", vocab_size=tokenizer.vocab_size)).save_pretrained(model_dir, tokenizer=tokenizer)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"a short line {i}"}) for i in range(20)), encoding="utf-8")
    code, out, err = run(
        capsys, model_dir, "--source", text, "--validation-fraction", 0.5, "--ruler", 0, "--to", to, "--json"
    )
    assert code == 0, err
    figures = json.loads(out)
    assert figures["experts"] == {} and figures["teacher_forced"] is None is figures["ruler"] is figures["speed"]
    check(to / "evaluation.html")
    assert "bits/byte" in report.describe(figures)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ruler", "1x"], "'1x' is no length in tokens"),
        (["--ruler", "16"], "no task is as short"),
        (["--source", "stdlib", "--source", "stdlib"], "--source stdlib is given twice"),
        (["--source", "/nothing/here"], "there is no such file or folder"),
        (["--validation-fraction", "1.5"], "--validation-fraction must be above 0 and at most 1"),
        (["--questions", "0"], "--questions must be 1 or more"),
        (["--against", "/nothing/here"], "/nothing/here"),
        (["--harness", "x.yaml"], "x.yaml"),
    ],
)
def test_bad_input_is_one_sentence(capsys, folder, words, sentence):
    text = [] if "--source" in words else ["--source", folder / "library.jsonl"]
    quick = ["--prompts", 0, *([] if "--ruler" in words else ["--ruler", 0])]
    code, _, err = run(capsys, MODEL_DIR, *text, *quick, "--seq-len", 64, *words)
    assert code == 1 and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_model_against_itself_differs_nowhere(capsys, folder, words):
    code, out, _ = run(capsys, MODEL_DIR, *words, "--prompts", 0, "--against", MODEL_DIR, "--json")
    found = json.loads(out)["against"]["differences"]
    assert code == 0 and all(each["low"] == each["high"] == 0 for each in found["bits_per_byte"].values())
    assert all(each["difference"] == 0 for by in found["ruler"].values() for each in by.values())
    assert not re.search("better|worse", report.describe(json.loads(out)))
