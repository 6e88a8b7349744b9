"""The kernels' benchmark: its formulas against tensors and counted products, one tiny run, and the picture."""

import importlib.util
import json
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from nemo_lite_kernels.conv import causal_conv
from nemo_lite_kernels.linear import PackedWeight
from nemo_lite_kernels.moe import experts_reference
from nemo_lite_kernels.quant import Quantized
from nemo_lite_kernels.ssd import ssd_chunked
from torch.utils.flop_counter import FlopCounterMode

from nemo_lite import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    """A module of kernels/bench, which is not installed."""
    path = ROOT / "kernels" / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"kernels_bench_{name.strip('_')}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main, cases = load("__main__"), load("cases")
TINY = list(cases.cases("tiny"))


def nbytes(values) -> float:
    return sum(v.nbytes for v in values if isinstance(v, (torch.Tensor, PackedWeight, Quantized)))


def results(function, inputs):
    found = function(*inputs.arguments)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("case", TINY, ids=lambda c: f"{c.function}-{c.mode}-{c.dtype}-{c.B}x{c.L}")
def test_bytes_are_those_of_inputs_outputs_and_gradients(case):
    inputs = cases.inputs(case, "cpu")
    function = dict(main.functions(case, "cpu"))
    name = next(n for n in reversed(function) if n != "cpp")  # a plain one
    outputs = results(function[name], inputs)
    expected = nbytes(inputs.arguments) + nbytes(outputs)
    if inputs.leaves:
        gradients = inputs.call(function[name])()
        assert all(g is not None for g in gradients)
        expected += nbytes(inputs.arguments) + nbytes(outputs[i] for i in inputs.differentiated) + nbytes(gradients)
    if case.op == "experts":  # those that no token chose are not read
        idle = case.sizes.E - len(case.experts.unique())
        expected -= (2 if case.train else 1) * idle * sum(w[0].nbytes for w in inputs.arguments[3:])
    assert cases.cost(case).bytes == expected


def counted(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode,B,L", [("forward", 1, 16), ("train", 2, 16)])
def test_products_of_experts_are_what_torch_counts(mode, B, L):
    case = cases.Case("experts", "experts", "tiny", mode, "float32", B, L)
    assert cases.cost(case).products == counted(cases.inputs(case, "cpu").call(experts_reference))


def test_products_of_linear_are_what_torch_counts():
    case = cases.Case("linear", "linear", "tiny", "forward", "float32", 1, 16)
    assert cases.cost(case).products == counted(cases.inputs(case, "cpu").call(torch.nn.functional.linear))


@pytest.mark.parametrize("L", [16, 64])
def test_products_of_the_scan_are_those_of_its_chunked_form(L):
    """torch counts whole squares where the formula counts their lower triangles."""
    case = cases.Case("ssd", "ssd", "tiny", "forward", "float32", 1, L)
    z = case.sizes
    squares = L * 2 * (z.G * z.N + z.H * z.P) * (L - (L + 1) / 2)
    assert cases.cost(case).products + squares == counted(cases.inputs(case, "cpu").call(ssd_chunked))


def test_products_of_attention_are_those_of_visible_pairs():
    case = cases.Case("attention", "attention", "tiny", "train", "float32", 2, 3)
    visible = 2 * (1 + 2 + 3)
    assert cases.cost(case).products == 3 * visible * case.sizes.A * 2 * (2 * case.sizes.D)
    one = cases.Case("attention", "attention_cached", "tiny", "decode", "float32", 2, 1, 16)
    assert cases.cost(one).products == 2 * 16 * one.sizes.A * 4 * one.sizes.D


def test_operations_of_the_convolution_by_hand():
    case = cases.Case("conv", "causal_conv", "tiny", "forward", "float32", 1, 3)
    outputs = math.prod(results(causal_conv, cases.inputs(case, "cpu"))[0].shape)
    assert cases.cost(case) == cases.Cost(0, outputs * (4 + 4 + 4), 2 * 4 * outputs + 4 * 5 * case.sizes.conv_channels)


@pytest.mark.parametrize("config", [name for name in cases.SIZES if name != "tiny"])
def test_sizes_are_those_of_the_recipes(config):
    model = load_recipe(ROOT / "recipes" / "pretrain" / f"{config}.yaml").model
    expected = cases.Sizes(
        model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim, model.mamba_num_heads,
        model.mamba_head_dim, model.ssm_state_size, model.n_groups, model.n_routed_experts, model.num_experts_per_tok,
        model.expert_size, model.moe_intermediate_size, model.moe_shared_expert_intermediate_size,
        model.vocab_size, model.conv_kernel,
    )  # fmt: skip
    assert cases.SIZES[config] == expected


def test_every_op_but_the_whole_step_is_measured():
    assert set(cases.FUNCTIONS) == set(main.OPS) - {"step"}
    functions = {name for op in cases.FUNCTIONS for b in main.OPS[op].values() for name in b.functions}
    # ssd for one token; and what the server does on a GPU, which benchmarks/gpu_decode.py measures.
    functions -= {"ssd_recurrent", "ssd_advance", "attention_paged"}
    assert functions <= {case.function for case in TINY}


def test_the_floor_is_the_slowest_limit():
    limits = {"gemm_gflops": {"float32": 1.0, "bfloat16": 10.0}, "reading_gbs": {"1000": 4.0, "100000": 2.0}}
    assert [main.reading_rate(limits, n) for n in (1, 1000, 10_000, 10**6)] == [4.0, 4.0, 3.0, 2.0]
    case = cases.Case("linear", "linear", "tiny", "forward", "float32", 1, 16)
    needed = cases.cost(case)
    assert main.floor(case, limits) == (needed.products / 1e9, "products")
    limits["gemm_gflops"]["float32"] = 1e9
    rate = main.reading_rate(limits, needed.bytes)
    assert main.floor(case, limits) == (pytest.approx(needed.bytes / rate / 1e9), "bytes")


def test_of_two_measured_limits_the_faster_one_counts():
    one = {"gemm_gflops": {"float32": 1.0}, "reading_gbs": {"10": 5.0, "100": 4.0}, "call_us": 2.0, "other_cpu": 0.5}
    two = {"gemm_gflops": {"float32": 3.0}, "reading_gbs": {"10": 1.0, "100": 6.0}, "call_us": 1.0, "other_cpu": 0.1}
    expected = {
        "gemm_gflops": {"float32": 3.0},
        "reading_gbs": {"10": 6.0, "100": 6.0},
        "call_us": 1.0,
        "other_cpu": 0.1,
    }
    assert main.faster(one, two) == expected


def test_a_tiny_run_writes_rows_and_a_picture(tmp_path, monkeypatch, capsys):
    limits = {
        "threads": 1, "gemm_gflops": {"float32": 50.0, "bfloat16": 50.0, "int8": 50.0}, "call_us": 1.0,
        "reading_gbs": {"1048576": 20.0, "4194304": 10.0}, "other_cpu": 0.0,
    }  # fmt: skip
    monkeypatch.setattr(main, "measure_limits", lambda device, quick: limits)
    monkeypatch.setattr(main, "QUICK", main.Effort(1e-5, 1e-4, 1.0, 1))
    out, plot = tmp_path / "run.json", tmp_path / "run.svg"
    words = ["--quick", "--configs", "tiny", "--ops", "linear,norm", "--out", str(out), "--plot", str(plot)]
    main.main(words)
    result = json.loads(out.read_text())
    assert result["limits"] == limits and {row["op"] for row in result["rows"]} == {"linear", "norm"}
    assert not result["left_out"] and "linear" in capsys.readouterr().out
    for row in result["rows"]:
        assert row["ms"] > 0 and row["share"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-2)
    assert {r["dtype"] for r in result["rows"] if r["op"] == "linear"} == {"float32", "bfloat16", "int8", "int4"}
    svg = ET.parse(plot).getroot()
    assert svg.tag.endswith("svg")
    written = " ".join(svg.itertext())
    assert all(words in written for words in ("linear", "norm", "reference", "unpack", "int4", "gated 2×16 grad"))
    again = tmp_path / "again.svg"
    main.main(["--draw", str(out), "--plot", str(again)])
    assert again.read_text() == plot.read_text()


def test_what_takes_too_much_memory_is_left_out_and_said(monkeypatch):
    limits = {"gemm_gflops": {"float32": 50.0}, "reading_gbs": {"1048576": 20.0}, "call_us": 1.0}
    run = main.Run("cpu", main.QUICK, limits)
    monkeypatch.setattr(main, "available", lambda device: 1.0)
    assert run.case(TINY[0]) == [] and "GB" in run.left_out[0]["reason"]


def test_an_unknown_op_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        main.parse(["--ops", "ssd,sdd"])
    assert "no sdd; there are ssd" in capsys.readouterr().err
