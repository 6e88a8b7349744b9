"""The ops of the hybrid model and the one table of their backends.

``OPS[op][name]`` is a backend: its functions, what it supports, and why it may be missing here. Every op has a plain
reference in torch, ``reference`` or ``recurrent``, and all its backends have the reference's signature. A row's order
is that of preference: ``auto`` takes the first that runs on the device. What has not been measured on a device yet
stands behind the plain ones, where only its name chooses it.

``select`` is called once, when a model is built, and says what it chose and why not the others. Calls that a chosen
backend does not support, such as float64 in a kernel for float32, go to the next one in the row that does; what goes
where is part of the record too.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_FLOATS = (torch.float32, torch.bfloat16)
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    functions  name of the op's function -> "module:function", imported when the backend is chosen
    devices    types of devices it runs on
    dtypes     of the first argument
    gradient   whether its outputs can be differentiated
    packed     whether documents may start inside a row (the `reset_BL` argument)
    state      whether a state can be carried in (`state_BHPN`, `window_BwC`)
    missing    () -> why it cannot be used on this machine, or None
    """

    functions: Mapping[str, str]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = FLOATS
    gradient: bool = True
    packed: bool = True
    state: bool = True
    missing: Callable[[], str | None] | None = None

    def refusal(self, device: str) -> str | None:
        """Why this backend cannot run on `device` here, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return self.missing() if self.missing is not None else None

    @property
    def limits(self) -> tuple[str, ...]:
        """What it does not take, in words."""
        names = [str(dtype).removeprefix("torch.") for dtype in FLOATS if dtype not in self.dtypes]
        flags = {"gradients": self.gradient, "packed documents": self.packed, "carried state": self.state}
        return (*names, *(name for name, able in flags.items() if not able))

    def takes(self, dtype: torch.dtype, gradient: bool = False, packed: bool = False, state: bool = False) -> bool:
        """Whether it supports a call whose first argument has this dtype."""
        return (
            dtype in self.dtypes
            and (self.gradient or not gradient)
            and (self.packed or not packed)
            and (self.state or not state)
        )


def _cpp() -> str | None:
    from nemo_lite_kernels import cpu

    return cpu.reason()


def _triton() -> str | None:
    from nemo_lite_kernels import triton

    return triton.reason()


def _library(name: str) -> str | None:
    from nemo_lite_kernels import libraries

    return libraries.reason(name)


def _cpu(dtypes: tuple[torch.dtype, ...] = KERNEL_FLOATS, **functions: str) -> Backend:
    return Backend(functions, ("cpu",), dtypes, missing=_cpp)


def _gpu(dtypes: tuple[torch.dtype, ...] = KERNEL_FLOATS, **functions: str) -> Backend:
    return Backend(functions, ("cuda",), dtypes, missing=_triton)


def _of(name: str, dtypes: tuple[torch.dtype, ...] = HALVES, **functions: str) -> Backend:
    """Of a library that is not ours, through libraries.py."""
    return Backend(functions, ("cuda",), dtypes, missing=functools.partial(_library, name))


_QUANT = {"quantize": "quant:quantize_matrix", "operand": "quant:operand", "quantized_values": "quant:values"}
OPS: Mapping[str, Mapping[str, Backend]] = MappingProxyType({
    "ssd": {
        "cpp": _cpu(ssd="cpu.ssd:ssd"),
        "chunked": Backend({"ssd": "ssd:ssd_chunked"}),
        "recurrent": Backend({"ssd": "ssd:ssd_recurrent"}),
        "triton": _gpu(
            ssd="triton.ssd:ssd", ssd_recurrent="triton.ssd:ssd", ssd_verify="triton.ssd:ssd_verify",
            ssd_advance="triton.ssd:ssd_advance",
        ),
        "mamba_ssm": _of("mamba_ssm", (torch.float32, *HALVES), ssd="libraries:ssd_mamba_ssm"),
    },
    "conv": {
        "cpp": _cpu(causal_conv="cpu.conv:causal_conv"),
        "lean": Backend({"causal_conv": "conv:causal_conv_lean"}),
        "reference": Backend({"causal_conv": "conv:causal_conv"}),
        "triton": _gpu(causal_conv="triton.conv:causal_conv"),
        "causal_conv1d": _of("causal_conv1d", (torch.float32, *HALVES), causal_conv="libraries:conv_causal_conv1d"),
    },
    "attention": {
        "sdpa": Backend({"attention": "attention:attention"}),
        "reference": Backend({"attention": "attention:attention_masked"}),
        "varlen": _of("varlen", attention="libraries:attention_varlen"),
        "flash_attn": _of("flash_attn", attention="libraries:attention_flash_attn"),
        "flex": _of("flex", (torch.float32, *HALVES), attention="libraries:attention_flex"),
        "triton": _gpu(
            (torch.float32, *HALVES), attention="attention:attention",
            attention_paged="triton.attention:attention_paged",
        ),
    },
    "experts": {
        "cpp": _cpu(experts="cpu.moe:experts"),
        "loop": Backend({"experts": "moe:experts_loop"}, devices=("cpu",)),
        "grouped_mm": Backend({"experts": "moe:experts_grouped_mm"}, dtypes=(torch.float32, *HALVES)),
        "reference": Backend({"experts": "moe:experts_reference"}),
        "triton": _gpu((torch.float32, *HALVES), experts="triton.moe:experts"),
    },
    "router": {
        "cpp": _cpu((torch.float32,), route="cpu.moe:route"),
        "reference": Backend({"route": "route:route"}),
        "triton": _gpu((torch.float32,), route="triton.moe:router"),
    },
    "norm": {
        "cpp": _cpu(rms_norm="cpu.norm:rms_norm", gated_norm="cpu.norm:gated_norm"),
        "lean": Backend({"rms_norm": "norm:rms_norm_lean", "gated_norm": "norm:gated_norm_lean"}),
        "reference": Backend({"rms_norm": "norm:rms_norm", "gated_norm": "norm:gated_norm"}),
        "triton": _gpu(rms_norm="triton.norm:rms_norm", gated_norm="triton.norm:gated_norm"),
    },
    "activation": {
        "cpp": _cpu(squared_relu="cpu.norm:squared_relu"),
        "reference": Backend({"squared_relu": "moe:squared_relu"}),
        "triton": _gpu(squared_relu="triton.norm:squared_relu"),
    },
    "linear": {
        "cpp": _cpu(linear="cpu.linear:linear", unpack="cpu.linear:unpack"),
        "reference": Backend({"linear": "linear:linear", "unpack": "linear:unpack"}),
    },
    "loss": {
        "cpp": _cpu(nll_and_gradient="cpu.loss:nll_and_gradient", weight_gradient="cpu.dense:weight_gradient"),
        "reference": Backend({"nll_and_gradient": "loss:nll_and_gradient", "weight_gradient": "loss:weight_gradient"}),
    },
    "quant": {
        "cpp": _cpu(
            quantize="cpu.quant:quantize_matrix", operand="cpu.quant:operand", quantized_values="cpu.quant:values"
        ),
        # Whole linears in its own formats (nemo_lite.precision.te); what it does not take is emulated. First although
        # not measured: where it is installed, nobody wants its formats emulated.
        "transformer_engine": _of("transformer_engine", (torch.float32, *HALVES), **_QUANT),
        "reference": Backend(_QUANT),
        "triton": _gpu(
            (torch.float32, *HALVES), quantize="triton.quant:quantize_matrix", operand="triton.quant:operand",
            quantized_values="triton.quant:values",
        ),
    },
    "step": {
        "cpp": Backend({"step": "cpu.step:Step"}, ("cpu",), KERNEL_FLOATS, gradient=False, packed=False, missing=_cpp),
        "layers": Backend({}),
    },
})  # fmt: skip


@dataclass(frozen=True)
class Ops:
    """The chosen functions, and a record of each choice: op, backend, reason, and why each other one was not taken.

    `step` is None where layers run one after the other.
    """

    ssd: Callable
    causal_conv: Callable
    attention: Callable
    experts: Callable
    route: Callable
    rms_norm: Callable
    gated_norm: Callable
    squared_relu: Callable
    linear: Callable
    unpack: Callable
    nll_and_gradient: Callable
    weight_gradient: Callable
    quantize: Callable
    operand: Callable
    quantized_values: Callable
    step: Callable | None
    ssd_recurrent: Callable
    ssd_verify: Callable
    ssd_advance: Callable
    attention_cached: Callable
    attention_paged: Callable
    choices: tuple[dict, ...]


# Functions of an op that only some backends have, and where the others' is.
SHARED = {
    "ssd_recurrent": "ssd:ssd_recurrent", "ssd_verify": "ssd:ssd_verify", "ssd_advance": "ssd:ssd_advance",
    "attention_cached": "attention:attention_cached", "attention_paged": "attention:attention_paged",
}  # fmt: skip


def select(device: str | torch.device = "cpu", wanted: Mapping[str, str] | None = None) -> Ops:
    """Choose a backend for every op. `wanted` maps op to a backend's name or ``auto``.

    Raises ValueError, one sentence, for an unknown name or a backend that cannot run on the device.
    """
    functions: dict[str, Callable | None] = {name: load(path) for name, path in SHARED.items()} | {"step": None}
    choices = []
    for op, backend, why, chain, others in chosen(device, wanted or {}):
        limits = OPS[op][backend].limits
        for function in OPS[op][backend].functions:
            functions[function] = _routed(function, [OPS[op][name] for name in chain])
        choice = {"op": op, "backend": backend, "why": why, "others": others}
        if limits:
            whole = next((name for name in chain if not OPS[op][name].limits), None)
            choice["except"] = f"{', '.join(limits)}: {whole}"
        choices.append(choice)
    return Ops(**functions, choices=tuple(choices))  # type: ignore[arg-type]


def chosen(
    device: str | torch.device, wanted: Mapping[str, str]
) -> Iterator[tuple[str, str, str, list[str], dict[str, str]]]:
    """For every op: its name, the backend, why, the backends its calls go through, and why each other was not taken."""
    kind = torch.device(device).type
    kind = "cpu" if kind == "meta" else kind
    wanted = {op: name for op, name in wanted.items() if name != "auto"}
    for op in wanted:
        if op not in OPS:
            raise ValueError(f"kernels.{op}: no such op; {_nearest(op, OPS)}")
    for op, backends in OPS.items():
        name = wanted.get(op)
        if name is not None and name not in backends:
            raise ValueError(f"kernels.{op}: no backend {name!r}; {_nearest(name, ['auto', *backends])}")
        refused = {other: reason for other, b in backends.items() if (reason := b.refusal(kind))}
        if name in refused:
            raise ValueError(f"kernels.{op}: {name!r} cannot be used on {kind}: {refused[name]}")
        why = "asked for by name"
        if name is None:
            name = next(other for other in backends if other not in refused)
            why = f"first in the table that runs on {kind}"
            # One call for all layers has ops of its own: it would pass over what was asked for.
            asked = ", ".join(f"{other}={backend}" for other, backend in wanted.items() if backend != name)
            if op == "step" and name != "layers" and asked:
                refused[name] = f"has ops of its own, and {asked} was asked for"
                name, why = "layers", f"{name} {refused[name]}"
        chain = [name, *(other for other in backends if other not in refused and other != name)]
        others = {other: refused.get(other, "not first") for other in backends if other != name}
        yield op, name, why, chain, others


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


@functools.cache
def load(path: str) -> Callable:
    """The function at "module:function" of this package."""
    module, function = path.split(":")
    return getattr(importlib.import_module(f"nemo_lite_kernels.{module}"), function)


def _routed(name: str, chain: list[Backend]) -> Callable:
    """The first backend's function; where it has limits, each call goes to the first in the chain that takes it."""
    first = load(chain[0].functions[name])
    # A class is a plan, and says itself what it takes; a packed weight has no dtype that could decide.
    if not chain[0].limits or isinstance(first, type) or name in ("unpack", "quantized_values"):
        return first
    paths = [(backend, backend.functions.get(name) or SHARED.get(name)) for backend in chain]
    names = list(inspect.signature(first).parameters)
    at = {role: names.index(role) - 1 for role in ("reset_BL", "state_BHPN", "window_BwC") if role in names}

    def given(role: str, args, options) -> bool:
        if role not in at:
            return False
        return (args[at[role]] if at[role] < len(args) else options.get(role)) is not None

    def call(x, *args, **options):
        packed = given("reset_BL", args, options)
        state = given("state_BHPN", args, options) or given("window_BwC", args, options)
        for backend, path in paths:
            if path is not None and backend.takes(x.dtype, torch.is_grad_enabled(), packed, state):
                return load(path)(x, *args, **options)
        raise TypeError(f"no backend of {name} takes {x.dtype}")

    call.__name__, call.__signature__ = name, inspect.signature(first)  # type: ignore[attr-defined]
    return call
