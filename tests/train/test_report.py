"""report.html: well-formed, self-contained, escaped, and right about the numbers, for full and for poor histories."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from nemo_lite.config import UserError
from nemo_lite.train import report
from nemo_lite.train.metrics import load_summary

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Checker(HTMLParser):
    """Fails on a tag left open or closed out of turn; collects text, ids and references."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.ids, self.used = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.used += values.get("aria-labelledby", "").split()
        self.used += [values[name] for name in ("data-chart", "data-heat") if name in values]
        assert not {"src", "href"} & values.keys(), f"<{tag}> refers to something outside"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


def check(path):
    """Parse the page, check what holds for every page, return (html, visible text)."""
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids)) and set(checker.used) <= set(checker.ids)
    assert not re.search(r"(https?:)?//[a-z]", html.replace("http://www.w3.org/2000/svg", "")), "a reference to the net"
    assert "@import" not in html and "url(" not in html
    shown = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    for bad in ("nan", "NaN", "inf", "None", "undefined"):
        assert not re.search(rf"[\"'\s>:,(MLhv]{bad}[\"'\s<,;)%]", shown), bad
    for data in re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', html):
        json.loads(data)
    return html, " ".join(" ".join(checker.text).split())


def make(folder, count=60, every=10, depths=2, layers=2, experts=8, validate=100, change=None, **recipe):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for index in range(1, count + 1):
        number = index * every
        loss = 2 + 5 * math.exp(-index / 8)
        record = {
            "step": number,
            "tokens": number * 1000,
            "loss": loss,
            "mtp_loss": [loss + 0.3 * depth for depth in range(1, depths + 1)],
            "lr": 1e-3,
            "grad_norm": 0.5,
            "tokens_per_second": 12000,
            "mfu": 0.31,
            "memory_gb": 1.5,
            "elapsed_seconds": number * 2.0,
        }
        counts = {
            f"layers.{layer}.mixer": torch.randint(1, 9, (experts,), generator=generator) for layer in range(layers)
        }
        record |= load_summary(counts)
        if change:
            change(index, record)
        lines.append(record)
        if validate and number % validate == 0:
            lines.append(
                {"step": number, "val_loss": loss + 0.1, "val_mtp_loss": [loss] * depths, "val_bits_per_byte": loss / 2}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = recipe.pop("steps", count * every)
    text = f"seed: 3\nmodel:\n  pattern: MEM*E-|M\n  mtp: {{pattern: '*E', depth: 2}}\ntrain: {{steps: {steps}}}\n"
    (folder / "recipe.yaml").write_text(text + recipe.pop("more", ""))
    env = {
        "machine": {"cpu": "A CPU", "cores": 2, "gpus": []},
        "world_size": 2,
        "parameters": {"total": 5_400_000, "active": 2_100_000},
        "peak_flops": {"per_process": 1e11, "source": "measured at start"},
        "kernels": [{"op": "ssd", "backend": "torch", "why": "reference"}],
        "git": {"commit": "abcdef0123456789", "dirty": True},
    }
    (folder / "env.json").write_text(json.dumps(env))
    return folder


def test_the_numbers_of_a_run(tmp_path):
    html, text = check(report.write_report(make(tmp_path / "my-run")))
    for expected in (
        "my-run", "finished, 600 steps", "A CPU, 2 cores · 2 ranks · seed 3 · commit abcdef0123 + changes",
        "600k", "12.0k", "31% of the machine's peak", "20m00s", "1.5 GB memory", "5.40M", "2.10M active per token",
        "MTP 1", "MTP 2", "bits per byte", "best", "Learning rate", "Gradient norm", "Tokens per second",
        "Share of the machine's peak", "Expert load", "Busiest expert over the mean", "Resolved recipe",
        "pattern: MEM*E-|M", "Kernels", "reference",
    ):  # fmt: skip
        assert expected in text, expected
    assert html.count("<svg") == html.count("<desc") == 7
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html


def test_a_run_that_goes_on(tmp_path):
    _, text = check(report.write_report(make(tmp_path / "r", steps=5000)))
    assert "at step 600 of 5,000" in text and "finished" not in text


def test_everything_is_escaped(tmp_path):
    evil = "</script><b>&\"'x"

    def change(_, record):
        record["expert_load"] = {f"<i>{name}": shares for name, shares in record["expert_load"].items()}
        record["expert_load_by_layer"] = {evil + name: value for name, value in record["expert_load_by_layer"].items()}

    folder = make(tmp_path / "a<b>&'\"c", change=change, more="note: '</pre><script>alert(1)</script>'\n")
    (folder / "env.json").write_text(json.dumps({evil: evil, "kernels": [{evil: evil}], "device": "<u>"}))
    html, text = check(report.write_report(folder))
    assert "a<b>&'\"c" in text and evil in text and "</pre><script>alert(1)</script>" in text
    assert "<b>&" not in html and "alert(1)</script>" not in html and "<u>" not in html and "<i>layers" not in html


def test_no_mtp_no_experts_no_validation(tmp_path):
    folder = make(tmp_path / "r", depths=0, layers=0, validate=0)
    (folder / "env.json").unlink()
    (folder / "recipe.yaml").unlink()
    html, text = check(report.write_report(folder))
    assert "at step 600" in text and html.count("<svg") == 5
    assert not any(word in text for word in ("MTP", "Expert", "Validation", "validation"))


@pytest.mark.parametrize("content", ["", "\n", '{"step":1,"loss":', '{"loss": 1.0}\n[1]\n', '{"step":1,"loss":null}\n'])
def test_a_history_without_numbers(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    _, text = check(report.write_report(tmp_path))
    assert "Nothing logged yet" in text


def test_one_point_is_drawn(tmp_path):
    html, text = check(report.write_report(make(tmp_path / "r", count=1, validate=0)))
    assert "finished, 10 steps" in text and 'class="dots"' in html


def test_gaps_break_the_line(tmp_path):
    def change(index, record):
        if index in (20, 21, 40):
            record.update(loss=None, mtp_loss=[None, 1.0], grad_norm=None, mfu=None)

    html, _ = check(report.write_report(make(tmp_path / "r", change=change)))
    faint = re.search(r'class="faint" style="stroke:var\(--train\)" d="([^"]*)"', html)
    assert faint and faint[1].count("M") == 3


def test_all_null_but_the_step(tmp_path):
    def change(_, record):
        for name in set(record) - {"step"}:
            record[name] = None

    _, text = check(report.write_report(make(tmp_path / "r", change=change, validate=0)))
    assert "Nothing logged yet" in text


def test_forty_layers_of_512_experts_stay_small(tmp_path):
    html, text = check(report.write_report(make(tmp_path / "r", count=12, layers=40, experts=512)))
    assert len(html) < 1_000_000 and "40 layers" in html and "layer 39" in text


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path):
    def change(index, record):
        for name in [name for name in record if name.startswith(("expert", "dead"))]:
            del record[name]
        if index == 3210:
            record["loss"] = 3.5

    html, _ = check(report.write_report(make(tmp_path / "r", count=5000, layers=1, validate=50, change=change)))
    assert len(html) < 400_000 and "of 1000 validations shown" in html
    points = report.thin([(x, 9.0 if x == 3210 else 0.0) for x in range(5000)])
    assert len(points) <= report.MAX_POINTS + 2 and (3210, 9.0) in points and points[-1][0] == 4999


def quantised(**values):
    """A record's change that adds what was measured of two operands of one linear, one of another."""
    one = {"flushed": 0.25, "saturated": 0.034, "error": 0.112, "scales": [0.25, 0.5, *[0.0] * 13, 0.25]} | values
    alone = one | {"scales": [1.0, *[0.0] * 15]}
    measured = {"layers.0.<a>": {"fprop x": one, "wgrad dy": alone}, "layers.0.b": {"fprop x": alone}}
    return lambda _, record: record.update(quantisation=measured)


def test_number_formats(tmp_path):
    html, text = check(report.write_report(make(tmp_path / "r", change=quantised())))
    head, body = html.split('<div class="scroll formats">')[1].split("</tbody>")[0].split("<tbody>")
    titles, products, names = (re.findall(r'scope="col\w*">([^<]*)', row) for row in head.split("</tr>")[:3])
    assert titles == ["flushed to zero, %", "saturated, %", "relative error, %", "block scales"]
    assert products == ["fprop", "wgrad"] * 4 and names == ["Linear", *["x", "dy"] * 4]
    first, second = (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>")[:2])
    assert "layers.<wbr>0.<wbr>&lt;a&gt;" in body
    assert first[:6] == ["25", "25", "3.4", "3.4", "11", "11"] and second[:6] == ["25", "", "3.4", "", "11", ""]
    assert "<title>2^0: 25.0%, 2^-1: 50.0%, 2^-15: 25.0%</title>" in first[6]
    assert 'd="M0 16v-8h1V16zM1 16v-16h1V16zM15 16v-8h1V16z"' in first[6]
    assert "<title>2^0: 100.0%</title>" in first[7] and "<title>2^0: 100.0%</title>" in second[6] and second[7] == ""
    assert "At step 600. Flushed and saturated are" in text and "Block scales: the largest on the left" in text


def test_number_formats_shows_only_what_is_there(tmp_path):
    without = quantised(error=None, scales=[1.0, *[0.0] * 15])
    _, text = check(report.write_report(make(tmp_path / "r", change=without)))
    assert "flushed to zero" in text and "saturated, %" in text
    assert "relative error" not in text and "lock scales" not in text


def test_torn_lines_are_counted(tmp_path):
    folder = make(tmp_path / "r")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6')
    assert "1 unreadable line in metrics.jsonl left out" in check(report.write_report(folder))[1]


def test_the_page_is_replaced_at_once(tmp_path):
    folder = make(tmp_path / "r")
    (folder / "report.html").write_text("old")
    assert report.write_report(folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["env.json", "metrics.jsonl", "recipe.yaml", "report.html"]


def test_command(tmp_path, capsys):
    folder = make(tmp_path / "r")
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    with pytest.raises(UserError, match="is no folder"):
        report.main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        report.main([str(tmp_path)])
    (folder / "env.json").write_text("{")
    with pytest.raises(UserError, match=r"env\.json is no JSON"):
        report.main([str(folder)])


# ------------------------------------------------------------------------------------------------------- small parts


def test_smoothing_follows_a_steep_start_and_steps_over_gaps():
    assert report.smooth([(1, 5.0), (2, None), (3, 5.0)], 10) == [(1, 5.0), (2, None), (3, 5.0)]
    falling = [(x, 10.0 * math.exp(-x / 10)) for x in range(100)]
    trail = max(smoothed - raw for (_, smoothed), (_, raw) in zip(report.smooth(falling, 20), falling))
    assert trail < 1.5
    noisy = report.smooth([(x, float(x % 2)) for x in range(400)], 20)
    assert all(abs(y - 0.5) < 0.05 for _, y in noisy[300:] if y is not None)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (1.4, 5, [2, 3, 4, 5]), (0, 1200, None), (3, 3, [3])]
)
def test_ticks_are_round(low, high, expected):
    found = report.ticks(low, high)
    assert all(low <= tick <= high for tick in found) and 1 <= len(found) <= 8
    assert expected is None or found == expected


def test_tick_labels():
    assert report.tick_labels([0, 5e-4, 1e-3]) == ["0", "5e-4", "1e-3"]
    assert report.tick_labels([0, 5000, 10000]) == ["0", "5k", "10k"]
    assert report.tick_labels([1, 1.5, 2]) == ["1", "1.5", "2"]
    assert report.log_ticks(0.3, 30) == [0.5, 1, 2, 5, 10, 20]


def test_heat_levels():
    assert [report.heat_level(ratio) for ratio in (1, 2, 4, 99, 0.5, 0.25, 0.01, 0)] == [0, 4, 8, 8, -4, -8, -8, -9]


def test_short_names():
    assert report.short_names(["layers.1.mixer", "layers.4.mixer", "mtp.layers.1.mixer"]) == ["1", "4", "MTP 1"]
    assert report.short_names(["a", "b"]) == ["a", "b"]
    assert report.short_names(["x.1", "y.1"]) == ["x.1", "y.1"]
