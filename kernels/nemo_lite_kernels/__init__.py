"""The ops of the hybrid model and the one table of their backends.

``OPS[op][name]`` is a backend; the first one that supports the device is the choice of ``auto``. Every op has a plain
reference, and every faster backend has the reference's signature. ``select`` is called once, when a model is built, and
says what it chose and why not the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from nemo_lite_kernels import attention as _attention
from nemo_lite_kernels import conv as _conv
from nemo_lite_kernels import moe as _moe
from nemo_lite_kernels import norm as _norm
from nemo_lite_kernels import ssd as _ssd


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: its functions, and the device types it runs on."""

    functions: Mapping[str, Callable]
    devices: tuple[str, ...] = ("cpu", "cuda")

    def refusal(self, device: str) -> str | None:
        """Why this backend cannot run on `device`, or None."""
        return None if device in self.devices else f"runs on {' and '.join(self.devices)} only"


OPS: dict[str, dict[str, Backend]] = {
    "ssd": {
        "chunked": Backend({"ssd": _ssd.ssd_chunked}),
        "recurrent": Backend({"ssd": _ssd.ssd_recurrent}),
    },
    "conv": {
        "lean": Backend({"causal_conv": _conv.causal_conv_lean}),
        "reference": Backend({"causal_conv": _conv.causal_conv}),
    },
    "attention": {
        "sdpa": Backend({"attention": _attention.attention}),
        "reference": Backend({"attention": _attention.attention_masked}),
    },
    "experts": {
        "loop": Backend({"experts": _moe.experts_loop}, devices=("cpu",)),
        "grouped_mm": Backend({"experts": _moe.experts_grouped_mm}),
        "reference": Backend({"experts": _moe.experts_reference}),
    },
    "norm": {
        "lean": Backend({"rms_norm": _norm.rms_norm_lean, "gated_norm": _norm.gated_norm_lean}),
        "reference": Backend({"rms_norm": _norm.rms_norm, "gated_norm": _norm.gated_norm}),
    },
}


@dataclass(frozen=True)
class Ops:
    """The chosen functions, and a record of each choice: op, backend, reason, and why each other one was not taken."""

    ssd: Callable
    causal_conv: Callable
    attention: Callable
    experts: Callable
    rms_norm: Callable
    gated_norm: Callable
    choices: tuple[dict, ...]
    ssd_recurrent: Callable = field(default=_ssd.ssd_recurrent)
    ssd_verify: Callable = field(default=_ssd.ssd_verify)
    attention_cached: Callable = field(default=_attention.attention_cached)
    squared_relu: Callable = field(default=_moe.squared_relu)


def select(device: str | torch.device = "cpu", wanted: Mapping[str, str] | None = None) -> Ops:
    """Choose a backend for every op. `wanted` maps op to a backend's name or ``auto``.

    Raises ValueError, one sentence, for an unknown name or a backend that cannot run on the device.
    """
    kind = torch.device(device).type
    kind = "cpu" if kind == "meta" else kind
    for op in wanted or {}:
        if op not in OPS:
            raise ValueError(f"kernels.{op}: no such op; there are {', '.join(OPS)}")
    functions: dict[str, Callable] = {}
    choices = []
    for op, backends in OPS.items():
        name = (wanted or {}).get(op, "auto")
        if name != "auto" and name not in backends:
            raise ValueError(f"kernels.{op}: no backend {name!r}; there are auto, {', '.join(backends)}")
        refused = {other: reason for other, b in backends.items() if (reason := b.refusal(kind))}
        if name in refused:
            raise ValueError(f"kernels.{op}: {name!r} {refused[name]}, and this is {kind}")
        why = "asked for by name"
        if name == "auto":
            name = next(other for other in backends if other not in refused)
            why = f"first in the table that runs on {kind}"
        others = {other: refused.get(other, "not first") for other in backends if other != name}
        functions |= backends[name].functions
        choices.append({"op": op, "backend": name, "why": why, "others": others})
    return Ops(**functions, choices=tuple(choices))
