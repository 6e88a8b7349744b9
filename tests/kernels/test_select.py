"""The table of backends: what is chosen, why, and what is refused."""

import inspect

import pytest
import torch
from nemo_lite_kernels import OPS, Backend, select


def test_auto_takes_the_first_that_runs_and_records_the_others():
    ops = select("cpu")
    assert {c["op"]: c["backend"] for c in ops.choices} == {
        "ssd": "chunked", "conv": "lean", "attention": "sdpa", "experts": "loop", "norm": "lean",
    }  # fmt: skip
    for choice in ops.choices:
        assert "first in the table" in choice["why"]
        assert set(choice["others"]) == set(OPS[choice["op"]]) - {choice["backend"]}
        assert all(choice["others"].values())
    assert select("meta").choices == ops.choices


def test_cuda_does_not_take_the_loop():
    choice = next(c for c in select("cuda").choices if c["op"] == "experts")
    assert choice["backend"] == "grouped_mm" and choice["others"]["loop"] == "runs on cpu only"


def test_by_name():
    ops = select("cpu", {"ssd": "recurrent", "norm": "auto"})
    assert ops.ssd is OPS["ssd"]["recurrent"].functions["ssd"]
    assert next(c for c in ops.choices if c["op"] == "ssd")["why"] == "asked for by name"


@pytest.mark.parametrize(
    "device,wanted,sentence",
    [
        ("cpu", {"ssd": "fast"}, "kernels.ssd: no backend 'fast'; there are auto, chunked, recurrent"),
        ("cuda", {"experts": "loop"}, "kernels.experts: 'loop' runs on cpu only, and this is cuda"),
    ],
)
def test_refusals(device, wanted, sentence):
    with pytest.raises(ValueError) as caught:
        select(device, wanted)
    assert str(caught.value) == sentence


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="no such op"):
        select("cpu", {"scan": "auto"})


@pytest.mark.parametrize("op", OPS)
def test_backends_of_an_op_take_the_same_arguments(op):
    def positional(function):
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]

    backends = list(OPS[op].values())
    for name, function in backends[0].functions.items():
        for other in backends[1:]:
            assert positional(other.functions[name]) == positional(function)


def test_every_op_has_a_backend_for_every_device():
    for backends in OPS.values():
        for device in ("cpu", "cuda"):
            assert any(b.refusal(device) is None for b in backends.values())
    assert Backend({}, ("cpu",)).refusal(torch.device("cuda").type) == "runs on cpu only"
