"""The page about a programme: right about tokens and mixtures, whole, escaped, and readable in a browser."""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from serving.test_page import Browser, needs_chromium
from train.test_report import check, make

from nemo_lite.programme import record as records
from nemo_lite.programme import report
from nemo_lite.programme.stages import load_programme

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "fixtures" / "tiny_trained"


def stage(name, **sections):
    Path("prog").mkdir(exist_ok=True)
    Path("prog", f"{name}.yaml").write_text(json.dumps({"stage": {}, **sections}))


def command(name, text, inputs, output):
    stage(name, stage={"command": text, "inputs": inputs, "outputs": [output]})


def done(name, seconds=65.0):
    """Note a stage's outputs as its own."""
    found = next(one for one in load_programme(Path("prog")) if one.name == name)
    outputs = {path: records.content(path) for path in found.outputs}
    inputs = records.inputs_now(found, None)
    made = records.Record("done", records.recipe_keys(found), records.version(found), inputs, outputs, seconds=seconds)
    records.write(found, made)


def history(name, steps, start=0, sources=()):
    """A run of `steps` steps of 1,000 tokens, that counts on from step `start`."""

    def change(_, record):
        record["step"] += start
        record["tokens"] += 1000 * start
        record["sources"] = [{"source": s, "tokens": at + n * record["step"], "epochs": 0.1} for s, at, n in sources]

    folder = Path("runs", "prog", name)
    make(folder, count=steps // 10, change=change, validate=0)
    step, loss = start + steps, 2.25
    with open(folder / "metrics.jsonl", "a") as file:
        line = {"step": step, "tokens": 1000 * step, "val_loss": loss, "val_mtp_loss": [], "val_bits_per_byte": 1.5}
        file.write(json.dumps(line) + "\n")
    (folder / "checkpoints" / f"step_{step}").mkdir(parents=True)


@pytest.fixture
def programme(tmp_path, monkeypatch):
    """first -> second (goes on) -> merge (a model) -> long (from the model) -> scores -> page."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text\n")
    data = {"blend": [{"source": "text.txt"}]}
    stage("first", data=data, train={"steps": 600, "stop_after": 400})
    stage("second", data=data, train={"steps": 600}, resume_from="runs/prog/first")
    command("merge", "nemo-lite merge runs/prog/second --to out/merged", ["second"], "out/merged")
    stage("long", data=data, train={"steps": 100}, init_from="out/merged")
    command("scores", "nemo-lite evaluate out/merged --to out/scores", ["merge", "long"], "out/scores")
    command("page", "nemo-lite report prog", ["scores"], "runs/prog/report.html")
    history("first", 400, sources=[("data/diverse", 0, 800), ("data/quality", 0, 200)])
    history("second", 200, start=400, sources=[("data/diverse", 240_000, 200), ("data/quality", -240_000, 800)])
    history("long", 100, sources=[("data/long.jsonl", 0, 1000)])
    shutil.copytree(MODEL, "out/merged")
    Path("out/scores").mkdir()
    body = {
        "model": "out/merged",
        "ruler": {"copying": {"score": 0.5}, "recall <far>": {"score": 0, "likeliest": 0.25}},
    }
    body["against"] = {"model": "out/long", "figures": {"ruler": {"copying": {"score": 0.75}}}}
    Path("out/scores/evaluation.json").write_text(json.dumps(body))
    for name in ("first", "second", "merge", "long", "scores"):
        done(name)
    return Path("prog")


def test_the_page_of_a_programme(programme):
    html, text = check(report.write_programme_report(programme))
    for expected in (
        "nemo_lite programme", "all stages done", "this page", "Loss over all stages", "Learning rate",
        "What each stage read",
        "Expert load, first", "Expert load, second", "Expert load, long", "Scores, scores", "recall <far>", "75%",
        "The same prompt, stage by stage", "train to step 400", "train to step 600", "from first", "from merged",
        "nemo-lite merge runs/prog/second", "700k", "1m05s", "1.500",
    ):  # fmt: skip
        assert expected in text, expected
    assert report.complete(Path("out/merged"), report.PROMPT).strip()[:20] in text
    assert html.count("<svg") == 6 + 2 + 3  # a stage, a chart, a heat map each


def test_the_page_is_the_same_whoever_asks_for_it(programme):
    page = report.write_programme_report(programme).read_bytes()
    done("page", seconds=3.0)
    assert report.write_programme_report(programme).read_bytes() == page
    assert records.verdicts(load_programme(programme))["page"].state == "done"


def test_scores_are_those_of_both_models(programme):
    (body,) = report.read_page(programme, "def").evaluations.values()
    assert report.scores(body) == {
        "ruler copying": {"merged": 0.5, "long": 0.75},
        "ruler recall <far>": {"merged": 0.25},
    }


def test_stages_lie_on_one_axis_of_tokens(programme):
    page = report.read_page(programme, "def")
    assert [(one.stage.name, one.offset, one.end) for one in page.trained] == [
        ("first", 0, 400_000), ("second", 0, 600_000), ("long", 600_000, 700_000),
    ]  # fmt: skip
    long = page.trained[2]
    assert long.points("loss", long.run.train)[0][0] == 610_000


def test_a_stage_that_goes_on_read_only_its_own_part(programme):
    assert report.mixtures(report.read_page(programme, "def")) == {
        "first": {"data/diverse": 320_000, "data/quality": 80_000},
        "second": {"data/diverse": 40_000, "data/quality": 160_000},
        "long": {"data/long.jsonl": 100_000},
    }


def test_a_programme_that_has_not_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("one", "sh -c '<script>alert(1)</script>'", [], "out/one")
    html, text = check(report.write_programme_report(Path("prog")))
    assert "0 of 1 stages done" in text and "Nothing logged yet" in text and "<script>alert" not in html


def test_checkpoints_complete_the_prompt_too(tmp_path, monkeypatch):
    """A real run, exported for the page and forgotten."""
    from nemo_lite.train.__main__ import main as train

    monkeypatch.chdir(tmp_path)
    base, text = ROOT / "tests" / "recipes" / "golden_mem.yaml", ROOT / "tests" / "fixtures" / "text"
    data = {"blend": [{"source": str(text)}], "cache_dir": "cache"}
    stage("short", base=str(base), data=data, train={"steps": 2}, schedule={"kind": "constant", "warmup_steps": 0},
          eval={"every": 0})  # fmt: skip
    train(["prog/short.yaml"])
    done("short")
    before = sorted(Path("runs/prog/short").rglob("*"))
    _, shown = check(report.write_programme_report(Path("prog")))
    assert "The same prompt" in shown and "all stages done" in shown
    assert sorted(Path("runs/prog/short").rglob("*")) == before


# -------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(programme, browser, width, dark):
    path = report.write_programme_report(programme)
    browser.screen(width, 1000, dark=dark)
    browser.call("Page.navigate", url=path.absolute().as_uri())
    browser.until("document.readyState == 'complete' && !!document.querySelector('.stages li')")
    assert browser["document.documentElement.scrollWidth <= innerWidth"]
    assert browser["document.querySelectorAll('.stages li').length"] == 6
    # Every line of the graph is as high as its row, so that the ways meet.
    assert browser[
        "[...document.querySelectorAll('.stages li')].every(row => Math.abs(row.clientHeight - "
        "row.querySelector('svg').getBoundingClientRect().height) < 1)"
    ]
    color = browser["getComputedStyle(document.body).backgroundColor"]
    assert (sum(map(int, color.removeprefix("rgb(").rstrip(")").split(","))) < 200) is dark
    browser[
        "(() => { const plot = document.querySelector('[data-chart]'), box = plot.getBoundingClientRect();"
        "plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 3, clientY: box.top + 9}))"
        "})()"
    ]
    shown = browser["document.querySelector('.tip').innerText"]
    assert shown.startswith("tokens") and "first" in shown
    assert browser.problems == []
    if folder := os.environ.get("NEMO_LITE_PICTURES"):
        tall = browser["document.documentElement.scrollHeight"]
        browser.screen(width, tall, dark=dark)
        data = browser.call("Page.captureScreenshot", format="png")["data"]
        Path(folder, f"programme-{width}-{'dark' if dark else 'light'}.png").write_bytes(base64.b64decode(data))
