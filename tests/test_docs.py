"""Generated pages are current, and show what the result files say. (docs/recipes.md: tests/test_check.py.)"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "commit": "abc1234",
    "dirty": True,
}  # fmt: skip


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate():
    return load("docs/generate.py")


def peer_row(work, dtype, threads, speedup, **more):
    def side(speed):
        return {"tokens_per_second": speed, "best": speed, "peak_mb": 1000, "other_cpu": [0.0, 0.01]}

    return {
        "work": work, "config": "bench_small", "dtype": dtype, "threads": threads, "batch": 4, "length": 512,
        "nemo_lite": side(1000.0 * speedup), "transformers": side(1000.0), "speedup": speedup,
        "speedup_by_round": [speedup - 0.1, speedup, speedup + 0.1], "memory_ratio": 0.5, "noisy": work == "decode",
    } | more  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """A folder of results as the benchmarks write them."""
    peers = [peer_row("train", "fp32", 2, 1.5), peer_row("train", "fp32", 1, 1.25)]
    peers.append(peer_row("decode", "bf16", 2, 3.0, batch=1, length=64, new_tokens=32))
    peers[-1]["transformers"]["setting"] = "float32 eager"
    peers.append({"work": "verify", "config": "bench_small", "dtype": "bf16", "threads": 2, "verify_over_step": 1.5})
    body = {"command": "python benchmarks/peers.py all", "machine": MACHINE, "rows": peers}
    (tmp_path / "peers_all_bench_small.json").write_text(json.dumps(body))
    evaluation = {
        "bits_per_byte": 1.4567, "bytes": 10, "gzip9_bits_per_byte": 2.0123,
        "experts": {"layers.1": {"min_over_mean": 0.5, "max_over_mean": 1.5}},
        "teacher_forced": {"acceptance_length": 2.1, "by_position": [0.7, 0.4]},
        "free_running": {
            "prompts": 200, "new_tokens": 128, "acceptance_length": 2.4, "by_position": [0.8, 0.6],
            "repeated_8grams": 0.1,
        },
    }  # fmt: skip
    demo = {
        "command": "make demo", "machine": MACHINE | {"dirty": False}, "evaluation": evaluation,
        "seconds": {"tokenizer": 3.2, "train": 400.0, "total": 480.0},
        "parameters": {"total": 4_754_022, "active": 3_426_918, "mtp": {"total": 950_224}},
    }  # fmt: skip
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    common = {"model": "demo", "dtype": "fp32", "threads": 2, "noisy": False, "by_round": [1.0]}
    spread = {"mean": 2.0, "p50": 1.5, "p90": 3.0, "p99": 4.0, "max": 5.0}
    serve = {
        "step": common | {"batch": 8, "bare_ms": 2.0, "engine_ms": 2.1, "tokens_per_second": 3809.5, "floor_ms": 0.5,
                          "ratio": 0.95},
        "mtp": common | {"draft_tokens": "auto", "off_tokens_per_second": 400.0, "on_tokens_per_second": 500.0,
                         "ratio": 1.25, "acceptance_length": 2.3, "tokens_per_step": 2.2, "repeated_8grams": 0.5},
        "transformers": common | {"batch": 1, "speculative": True, "tokens_per_second": 400.0,
                                  "transformers_tokens_per_second": 200.0, "ratio": 2.0},
        "load": {"model": "demo", "concurrency": 8, "speculative": False,
                 "report": {"requests_per_second": 20.0, "output_tokens_per_second": 1280.0, "ttft_ms": spread,
                            "itl_ms": spread, "health_ms": spread}},
    }  # fmt: skip
    served = serve["load"]["report"] | {"acceptance_length": 1.75}
    serve["engines"] = serve["load"] | {"engine": "vllm", "speculative": True, "report": served}
    arm = {"label": "BF16", "precision": "{preset: bf16}", "val_loss": [2.0, 2.1], "val_loss_50": [4.0, 4.0],
           "differences": {"400": {"mean": 0.0, "half_width": 0.0}}, "flushed": {}}  # fmt: skip
    other = arm | {"label": "the recipe", "precision": "{preset: nvfp4}", "val_loss": [2.02, 2.12],
                   "differences": {"400": {"mean": 0.01, "half_width": 0.002}},
                   "flushed": {"out_proj": {"fprop x": 0.125}}}  # fmt: skip
    cost = {"machine": MACHINE, "presets": {"nvfp4": {"seconds": 1.5, "over_bf16": 1.7, "kept_mb": 151.0}}}
    precision = {
        "command": "python benchmarks/precision.py", "machine": MACHINE, "steps": 400, "tokens": 614400,
        "seeds": [0, 1], "minutes": 50.0, "arms": {"bf16": arm, "super": other}, "cost": cost,
    }  # fmt: skip
    (tmp_path / "precision.json").write_text(json.dumps(precision))
    arms = {
        name: {"label": name, "changes": [f"model.x={name}"], "active": 1000, "total": 4000, "val_loss": [2.0, 2.1]}
        for name in ("latent", "plain")
    }  # fmt: skip
    pays = {"arm": "latent", "over": "plain", "mean": -0.02, "half_width": 0.01}
    ablations = {
        "command": "python benchmarks/ablations.py", "machine": MACHINE, "steps": 400, "tokens": 819_200, "window": 100,
        "seeds": [0, 1], "minutes": 30.0, "arms": arms,
        "differences": [pays, pays | {"mean": 0.02}, pays | {"mean": 0.005}],
    }  # fmt: skip
    (tmp_path / "ablations.json").write_text(json.dumps(ablations))
    long = {"seq_len": 65_536, "recompute": "full", "peak_gib": 2.346, "seconds": 300.0, "losses": [8.0, 7.0]}
    curve = {"mean": -0.125, "half_width": 0.02}
    stage = {
        "command": "python benchmarks/long_context.py stage", "machine": MACHINE, "seeds": [0, 1], "documents": 8,
        "steps": 12, "tokens": 786_432, "started_from_tokens": 4_915_200, "minutes": 12.0, "edges": [0, 64, 65_536],
        "cumulative": {arm: [2.5, 1.25] for arm in ("short", "control", "long")},
        "at_the_end": {arm: [1.5, 1.75] for arm in ("short", "control", "long")},
        "differences": {"long over control": curve, "long over short": curve | {"mean": 0.5}},
    }  # fmt: skip
    memory = {"command": "python benchmarks/long_context.py memory", "machine": MACHINE, "rows": [long]}
    (tmp_path / "long_context.json").write_text(json.dumps({"memory": memory, "stage": stage}))
    native = {"ranks": 1, "parallel": {"engine": "native"}, "seconds": 2.0, "memory_gb": 1.0, "sent": {}}
    cut = {
        "ranks": 2,
        "parallel": {"engine": "megatron", "tp": 2},
        "seconds": 5.0,
        "memory_gb": 0.5,
        "sent": {"tp": 7e6},
    }
    layouts = {"command": "python benchmarks/megatron.py", "machine": MACHINE, "rows": [native, cut]}
    (tmp_path / "megatron.json").write_text(json.dumps(layouts))
    read = {"tokens": 100_000_000, "seconds": 10.0, "tokens_per_second": 1e7, "growth_mb": 55.4, "rounds": [9, 10, 11]}
    swept = {"documents": 700, "seconds": 5.0, "megabytes_per_second": 2.5, "rounds": [5]}
    rows = [{"work": "shards", **read}, {"work": "clean", **swept}]
    data = {"command": "python benchmarks/data.py", "machine": MACHINE, "rows": rows}
    (tmp_path / "data.json").write_text(json.dumps(data))
    for work, row in serve.items():
        body = {"command": f"python benchmarks/serve.py {work}", "machine": MACHINE, "rows": [{"work": work} | row]}
        (tmp_path / f"serve_{work}.json").write_text(json.dumps(body))
    return tmp_path


@pytest.mark.parametrize("name", ["docs/results.md", "README.md"])
def test_generated_pages_are_current(generate, name):
    pages = {str(path.relative_to(ROOT)): text for path, text in generate.pages().items()}
    assert (ROOT / name).read_text(encoding="utf-8") == pages[name], "run: python docs/generate.py"


def test_results_show_what_was_measured(generate, measured):
    page = generate.results_page(measured)
    train = "| bench_small | train | fp32 | 2 | 4 x 512 | 1,500 | transformers | 1,000 |"
    assert f"{train} **1.50x** | 1.40 to 1.60 | 1,000 | 1,000 | no |" in page
    decode = "| bench_small | decode | bf16 | 2 | 1 x 64 + 32 | 3,000 | transformers in fp32 | 1,000 |"
    assert f"{decode} **3.00x** | 2.90 to 3.10 | 1,000 | 1,000 | yes |" in page
    assert "keeping them, in decode steps: 1.50 (bench_small, bf16, 2 threads)." in page
    assert "`python benchmarks/peers.py all`" in page and "commit abc1234 with uncommitted changes." in page
    assert "| held-out bits per byte | 1.457 |" in page and "| gzip -9 on the same files | 2.012 |" in page
    assert "| acceptance length along the text | 2.10 (kept: 70%, 40%) |" in page
    assert "| parameters | 4.75 M, 3.43 M active; MTP 0.95 M more |" in page
    assert "| total | 480 s |" in page and generate.NOT_MEASURED not in page
    assert "| demo | fp32, 2 | 8 | 2.00 | 2.10 | **0.95** | 3,810 | 0.50 | no |" in page
    assert "| auto | fp32, 2 | 400 | 500 | **1.25x** | 2.30 | 2.20 | 50% | no |" in page
    assert "| demo | fp32, 2 | 1 | yes | 400 | 200 | **2.00x** | no |" in page
    assert "| no |  | 8 | 20.0 | 1,280 | 1.5 | 4.0 | 1.5 | 4.0 | 4.0 |" in page
    assert "| vllm | yes | 8 | 20.0 | 1,280 | 1.75 | 1.5 | 1.5 | 4.0 |" in page
    assert "| the recipe | `preset: nvfp4` | 2.0200, 2.1200 | +1.00 % ± 0.20 |" in page
    assert "BF16 ends 50%, 48% below its loss at step 50." in page and "| out_proj |  | 12.5% |" in page
    assert "| nvfp4 |  | 1.50 | **1.70x** | 151 |" in page
    verdicts = ("-2.00 % ± 1.00 | lower", "+2.00 % ± 1.00 | higher", "+0.50 % ± 1.00 | no difference shown")
    assert all(f"| latent | plain | {verdict} |" in page for verdict in verdicts)
    assert "| plain | `model.x=plain` | 1,000 | 4,000 | 2.0000, 2.1000 |" in page
    assert "| 65,536 | full | 2.35 | 300 |" in page
    assert "at -12.50 % ± 2.00 of its control and at +50.00 % ± 2.00 of the model" in page
    assert "| rows of 65,536 |  | 2.500 | 1.250 | 1.5000, 1.7500 |" in page
    assert "| 100.0 M tokens | 10.0 | 10.00 M tokens/s | 9.00 to 11.00 | 55 |" in page
    assert "| 700 documents | 5.0 | 2.50 MB/s | 5.00 to 5.00 |  |" in page


def test_the_readme_shows_the_most_threads(generate, measured):
    block = generate.numbers(measured)
    assert "| bench_small, train 4 x 512 | fp32 | 1,500 | **1.50x** transformers | 0.50x |" in block
    assert "1.25x" not in block  # one thread
    assert "**3.00x** transformers in fp32 (noisy)" in block and "8.0 min" in block
    assert "| 2 threads | format | Some CPU: tok/s | speedup | memory |" in block
    assert "| demo | fp32, 2 threads | 3,810 | 95% to 95% |" in block


def test_what_is_missing_is_said(generate, tmp_path):
    assert generate.results_page(tmp_path).count(generate.NOT_MEASURED) == 12
    assert generate.numbers(tmp_path).count("not measured yet") == 2


def test_a_readme_is_replaced_between_its_marks_only(generate, tmp_path):
    text = f"before\n{generate.BEGIN}\nold\n{generate.END}\nafter\n"
    once = generate.readme(text, tmp_path)
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert generate.readme(once, tmp_path) == once


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_demo_is_timed_by_the_lines_it_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    demo = load("benchmarks/demo.py")
    sys.modules.pop("peers", None)
    script = (ROOT / "recipes" / "demo.sh").read_text(encoding="utf-8")
    headings = [line.split('"')[1] for line in script.splitlines() if line.startswith("step ")]
    steps = [demo.step_of(f"== {heading}\n") for heading in headings]
    assert steps == ["tokenizer", "train", "export", "evaluate", "generate", "generate"]

    ticks = iter(range(100))
    lines = ["== training: two processes\n", "step 1\n", "== export: a directory\n", "== a completion\n", "text\n"]
    lines.append("== the same completion\n")
    assert demo.timed(lines, lambda: float(next(ticks))) == {"train": 1.0, "export": 1.0, "generate": 2.0, "total": 5.0}
    assert capsys.readouterr().out == "".join(lines)
