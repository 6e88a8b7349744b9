"""Transformer Engine beside the emulation: when it is taken, what it is told, and that a broken install is a reason."""

import sys
import types

import pytest
import torch
from nemo_lite_kernels import libraries, select

from nemo_lite.precision import te
from nemo_lite.precision.linear import Emulated, Numerics
from nemo_lite.precision.recipe import Gemms


class Recipe:
    def __init__(self, **options):
        self.options = options


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for the library: its Linear multiplies plainly and remembers what it was given."""
    common, recipes, pytorch = (types.ModuleType(f"transformer_engine.{n}") for n in ("common", "recipe", "pytorch"))
    calls = []
    for name in ("NVFP4BlockScaling", "MXFP8BlockScaling", "Float8CurrentScaling"):
        setattr(recipes, name, type(name, (Recipe,), {}))

    class Linear(torch.nn.Module):
        def __init__(self, n_in, n_out, bias, params_dtype, device):
            super().__init__()
            assert not bias and device == "meta"
            self.weight = torch.nn.Parameter(torch.empty(n_out, n_in, dtype=params_dtype, device=device))

        def forward(self, x):
            calls.append(tuple(x.shape))
            return x @ self.weight.T

    class autocast:
        def __init__(self, enabled, recipe):
            calls.append(recipe)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    pytorch.Linear, pytorch.autocast = Linear, autocast
    root = types.ModuleType("transformer_engine")
    for name, module in {"": root, ".common": common, ".common.recipe": recipes, ".pytorch": pytorch}.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    return calls


def test_a_missing_or_broken_library_is_a_reason(monkeypatch):
    assert libraries.reason("transformer_engine") == "is not installed"
    real = libraries.importlib.import_module

    def broken(name):
        if name.startswith("transformer_engine"):
            raise RuntimeError("cudnn shared object not found.")
        return real(name)

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    reason = libraries.reason("transformer_engine")
    assert reason == "cannot be imported: RuntimeError: cudnn shared object not found."
    ops = select("cpu")
    choice = next(choice for choice in ops.choices if choice["op"] == "quant")
    assert "transformer_engine" in choice["others"] and choice["backend"] != "transformer_engine"


@pytest.mark.parametrize("chip,format,why", [
    ((9, 0), "nvfp4", "no nvfp4 on compute capability 9.0"), ((12, 0), "nvfp4", "no nvfp4 on compute capability 12.0"),
    ((10, 0), "nvfp4", None), ((10, 3), "nvfp4", None), ((9, 0), "mxfp8", "no mxfp8 on compute capability 9.0"),
    ((10, 0), "mxfp8", None), ((12, 0), "mxfp8", "no mxfp8 on compute capability 12.0"), ((9, 0), "fp8", None),
    ((8, 0), "fp8", "no fp8 on compute capability 8.0"),
    ((10, 0), "fp8_block", "has no fp8_block"),
])  # fmt: skip
def test_which_chip_has_which_format(monkeypatch, chip, format, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: chip)
    assert te.refusal(Gemms(format, format, format), 64, 128) == why


def test_what_it_cannot_do_is_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert te.refusal(Gemms("nvfp4", "bf16", "nvfp4"), 64, 64) == "its products have different formats"
    assert te.refusal(Gemms("nvfp4", "nvfp4", "nvfp4"), 48, 64) == "takes sizes that are multiples of 32, not 48 to 64"


def test_it_is_told_the_recipe_and_gives_gradients_to_the_master_weight(engine):
    gemms = Gemms("nvfp4", "nvfp4", "nvfp4", hadamard=False, stochastic=True, square=False)
    native = te.Native(Emulated("a", gemms, Numerics(), select("cpu")))
    weight = torch.randn(32, 64, requires_grad=True)
    for rows in (5, 32):
        x = torch.randn(rows, 64).bfloat16().requires_grad_()
        y = native(x, weight)
        assert y.shape == (rows, 32) and y.dtype == torch.bfloat16
        y.sum().backward()
        assert x.grad is not None and weight.grad is not None and weight.grad.dtype == torch.float32
    recipe, shape = engine[0], engine[1]
    assert type(recipe).__name__ == "NVFP4BlockScaling" and shape == (32, 64)
    assert recipe.options == {
        "disable_rht": True, "disable_stochastic_rounding": False, "disable_2d_quantization": True,
    }  # fmt: skip
    assert type(te.recipe_of(Gemms("mxfp8", "mxfp8", "mxfp8"))).__name__ == "MXFP8BlockScaling"
    native.numerics.on = False
    before = len(engine)
    native(torch.randn(5, 64), weight)
    assert len(engine) == before
