"""The table of backends: what is chosen, why, and what is refused."""

import inspect

import pytest
import torch
from kernels.interpreter import kernels
from nemo_lite_kernels import OPS, SHARED, Backend, cpu, libraries, load, select, triton

from nemo_lite.config import KernelsConfig

COMPILED = OPS["ssd"]["cpp"].refusal("cpu") is None
PLAIN = {
    "ssd": "chunked", "conv": "lean", "attention": "sdpa", "experts": "loop", "router": "reference", "norm": "lean",
    "activation": "reference", "linear": "reference", "loss": "reference", "step": "layers",
    "quant": "reference",
}  # fmt: skip
NEEDS_COMPILER = pytest.mark.skipif(not COMPILED, reason=f"no C++ kernels: {OPS['ssd']['cpp'].refusal('cpu')}")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "reason", lambda: "no C++ compiler (c++, g++, clang++)")


def chosen(ops):
    return {choice["op"]: choice["backend"] for choice in ops.choices}


def test_auto_takes_the_first_that_runs_and_records_the_others():
    ops = select("cpu")
    assert chosen(ops) == {op: "cpp" if COMPILED and "cpp" in OPS[op] else plain for op, plain in PLAIN.items()}
    for choice in ops.choices:
        assert "first in the table" in choice["why"]
        assert set(choice["others"]) == set(OPS[choice["op"]]) - {choice["backend"]}
        assert all(choice["others"].values())
    assert select("meta").choices == ops.choices


def test_without_a_compiler_torch_runs_and_the_record_says_why(no_compiler):
    ops = select("cpu")
    assert chosen(ops) == PLAIN and ops.step is None
    assert ops.choices[0]["others"]["cpp"] == "no C++ compiler (c++, g++, clang++)"
    with pytest.raises(ValueError) as caught:
        select("cpu", {"norm": "cpp"})
    assert str(caught.value) == "kernels.norm: 'cpp' cannot be used on cpu: no C++ compiler (c++, g++, clang++)"


@NEEDS_COMPILER
def test_limits_are_part_of_the_record():
    choices = {choice["op"]: choice for choice in select("cpu").choices}
    assert choices["ssd"]["except"] == "float16, float64: chunked"
    assert choices["step"]["except"] == "float16, float64, gradients, packed documents: layers"
    assert "except" not in choices["attention"]


def test_on_cuda_auto_takes_what_has_been_run(monkeypatch):
    """Where all libraries are there, too: unmeasured backends are for those who name them."""
    monkeypatch.setattr(triton, "reason", lambda: None)
    monkeypatch.setattr(libraries, "reason", lambda name: None)
    # Number formats are the exception: whoever has a library for them on a chip for them does not want them emulated.
    assert chosen(select("cuda")) == PLAIN | {"experts": "grouped_mm", "quant": "transformer_engine"}
    choice = next(c for c in select("cuda").choices if c["op"] == "experts")
    assert choice["others"]["loop"] == "runs on cpu only" and choice["except"] == "float64: reference"


def test_by_name():
    ops = select("cpu", {"ssd": "recurrent", "norm": "auto"})
    assert ops.ssd is load("ssd:ssd_recurrent")
    assert next(c for c in ops.choices if c["op"] == "ssd")["why"] == "asked for by name"


@NEEDS_COMPILER
def test_the_fused_step_does_not_pass_over_what_was_asked_for():
    ops = select("cpu", {"ssd": "chunked", "norm": "cpp"})
    assert ops.step is None
    assert ops.choices[-1]["why"] == "cpp has ops of its own, and ssd=chunked was asked for"
    assert select("cpu", {"norm": "cpp"}).step is not None
    assert select("cpu", {"ssd": "chunked", "step": "cpp"}).step is not None
    assert select("cpu", {"step": "layers"}).step is None


@pytest.mark.parametrize(
    "device,wanted,sentence",
    [
        ("cpu", {"ssd": "chunkd"}, "kernels.ssd: no backend 'chunkd'; did you mean chunked?"),
        ("cpu", {"linear": "xyz"}, "kernels.linear: no backend 'xyz'; there are auto, cpp, reference"),
        ("cuda", {"experts": "loop"}, "kernels.experts: 'loop' cannot be used on cuda: runs on cpu only"),
        ("cpu", {"conv": "causal_conv1d"}, "kernels.conv: 'causal_conv1d' cannot be used on cpu: runs on cuda only"),
        ("cpu", {"expert": "auto", "nrom": "lean"}, "kernels.nrom: no such op; did you mean norm?"),
    ],
)
def test_refusals(device, wanted, sentence):
    with pytest.raises(ValueError) as caught:
        select(device, wanted)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("op", [op for op in OPS if op != "step"])
def test_backends_of_an_op_take_the_same_arguments(op):
    def positional(path):
        parameters = inspect.signature(load(path)).parameters.values()
        return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

    plain = {f: path for b in OPS[op].values() if b.missing is None for f, path in b.functions.items()}
    for name, backend in OPS[op].items():
        for function, path in backend.functions.items():
            if name == "triton":
                kernels(path.split(":")[0].removeprefix("triton."))  # or skip
            assert positional(path) == positional((SHARED | plain)[function]), name


def test_every_op_has_a_plain_backend_for_every_device():
    for backends in OPS.values():
        for device in ("cpu", "cuda"):
            assert any(b.missing is None and b.refusal(device) is None and not b.limits for b in backends.values())
    assert Backend({}, ("cpu",)).refusal(torch.device("cuda").type) == "runs on cpu only"


def test_a_recipe_has_a_key_for_every_op():
    assert set(vars(KernelsConfig())) == set(OPS)
