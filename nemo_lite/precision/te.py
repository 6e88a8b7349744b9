"""Native products by Transformer Engine: the same recipe on chips that have the number formats.

NVFP4 runs on compute capability 10.0 and 10.3 (Blackwell), MXFP8 on 10.x and 11.x, FP8 on 8.9 and above. Where the
library is not installed or does not import, the table of backends says why; where the chip lacks a format, `refusal`
does; products are then emulated (linear.py). Nothing here has been run on a Blackwell chip yet: tests/gpu compares both
where there is one.

Transformer Engine quantises inside its own modules and for all three products of a linear at once, so a linear whose
products have formats of their own is emulated, and so are experts.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nemo_lite.precision.linear import Emulated
from nemo_lite.precision.recipe import Gemms

# Format -> its recipe's class, and the compute capabilities that have it.
RECIPES = {
    "nvfp4": ("NVFP4BlockScaling", lambda chip: chip in ((10, 0), (10, 3))),
    "mxfp8": ("MXFP8BlockScaling", lambda chip: (10, 0) <= chip < (12, 0)),
    "fp8": ("Float8CurrentScaling", lambda chip: chip >= (8, 9)),
}


def refusal(gemms: Gemms, n_in: int, n_out: int) -> str | None:
    """Why a linear of these formats and sizes is emulated, or None."""
    format = gemms.fprop
    if (gemms.dgrad, gemms.wgrad) != (format, format):
        return "its products have different formats"
    if format not in RECIPES:
        return f"has no {format}"
    chip = torch.cuda.get_device_capability()
    if not RECIPES[format][1](chip):
        return f"no {format} on compute capability {chip[0]}.{chip[1]}"
    if n_in % 32 or n_out % 32:
        return f"takes sizes that are multiples of 32, not {n_in} to {n_out}"
    return None


def recipe_of(gemms: Gemms) -> Any:
    """Transformer Engine's recipe object for a linear's formats."""
    recipes = importlib.import_module("transformer_engine.common.recipe")
    make = getattr(recipes, RECIPES[gemms.fprop][0])
    if gemms.fprop != "nvfp4":
        return make()
    return make(
        disable_rht=not gemms.hadamard, disable_stochastic_rounding=not gemms.stochastic,
        disable_2d_quantization=not gemms.square,
    )  # fmt: skip


class Native:
    """The products of one linear by Transformer Engine, called as an emulated one is: x [.., in], weight [out, in].

    Its module is made at the first call and given the weight each time, which stays the model's own parameter.
    `emulated` takes what the library does not: NVFP4 with the Hadamard transform of other inputs than bfloat16.
    """

    def __init__(self, emulated: Emulated):
        self.emulated, self.gemms, self.numerics = emulated, emulated.gemms, emulated.numerics
        self._module: Any = None
        self._recipe: Any = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        narrow = self.gemms.fprop == "nvfp4" and self.gemms.hadamard and x.dtype != torch.bfloat16
        if not self.numerics.on or narrow:
            return self.emulated(x, weight)
        te = importlib.import_module("transformer_engine.pytorch")
        if self._module is None:
            n_out, n_in = weight.shape
            self._module = te.Linear(n_in, n_out, bias=False, params_dtype=x.dtype, device="meta")
            self._recipe = recipe_of(self.gemms)
            del self._module.weight
        # A tensor, not a parameter: its gradient goes on to the master weight through this cast.
        self._module.weight = weight.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        rows = len(flat)
        flat = torch.nn.functional.pad(flat, (0, 0, 0, -rows % 32))  # token counts are multiples of 32 there
        with te.autocast(enabled=True, recipe=self._recipe):
            y = self._module(flat)
        del self._module.weight  # which would keep the step's graph alive
        return y[:rows].view(*x.shape[:-1], weight.shape[0])
