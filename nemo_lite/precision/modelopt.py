"""Weights in number formats inside a MODEL_DIR, in ModelOpt's layout, which vLLM reads.

    NVFP4   X.weight uint8 [out, in/2]        X.weight_scale float8_e4m3fn [out, in/16]   X.weight_scale_2 float32 []
    FP8     X.weight float8_e4m3fn [out, in]  X.weight_scale float32 []
    both    X.input_scale float32 []: the largest magnitude of a calibration's inputs over that of the format

config.json says so in `quantization_config`; what it lists under `ignore` is stored as it is. Reading needs none of it:
the dtype of X.weight and its scales tell the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from nemo_lite_kernels.quant import Quantized, Spec, dequantize, quantize_matrix
from torch import Tensor

FORMATS = {"nvfp4": "NVFP4", "fp8": "FP8"}
# Tensors that stand beside a quantised weight and are read with it, or that only activations and caches need.
BESIDE = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")
LARGEST = {"nvfp4": 6.0 * 448.0, "fp8": 448.0}  # what a tensor's largest magnitude is scaled to


def pack(name: str, weight: Tensor, format: str, square: bool = True, amax: float | None = None) -> dict[str, Tensor]:
    """The tensors that stand for X.weight [out, in], float32 or bfloat16; `amax`: its inputs' largest magnitude.

    square: NVFP4 scales of blocks of 16x16, as training had them, repeated over their rows.
    """
    stem = name.removesuffix(".weight")
    spec = Spec.of("nvfp4", (16, 16) if square else (1, 16)) if format == "nvfp4" else Spec.of("fp8")
    q = quantize_matrix(weight, spec)
    assert q.tensor_scale is not None
    found = {f"{stem}.weight": q.codes}
    if q.scales is not None:
        found |= {f"{stem}.weight_scale": q.scales, f"{stem}.weight_scale_2": q.tensor_scale.view(())}
    else:
        found[f"{stem}.weight_scale"] = q.tensor_scale.view(())
    if amax is not None:
        found[f"{stem}.input_scale"] = torch.tensor(amax / LARGEST[format], dtype=torch.float32)
    return found


def shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the weight that a stored tensor stands for."""
    return (*shape[:-1], 2 * shape[-1]) if dtype == torch.uint8 else shape


def unpack(name: str, stored: Tensor, other: Callable[[str], Tensor]) -> Tensor:
    """The weight in float32 that X.weight and its scales stand for; other(name) reads a tensor beside it."""
    stem = name.removesuffix(".weight")
    scale = other(f"{stem}.weight_scale")
    if stored.dtype == torch.uint8:
        spec, scales, per_tensor = Spec.of("nvfp4"), scale.view(torch.float8_e4m3fn), other(f"{stem}.weight_scale_2")
        whole = torch.Size((stored.shape[0], 2 * stored.shape[1]))
        return dequantize(Quantized(stored, scales, per_tensor.float().view(1), spec, whole))
    if scale.numel() == 1:
        return dequantize(Quantized(stored, None, scale.float().view(1), Spec.of("fp8"), stored.shape))
    if scale.dim() == 2 and scale.shape[1] == 1:  # a scale a row
        return stored.float() * scale.float()
    raise ValueError(
        f"{name}: weight_scale is {list(scale.shape)}; one scale for the tensor, or one a row, can be read"
    )


def config(format: str, ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    bits: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": 16} if format == "nvfp4" else {
        "num_bits": 8, "type": "float"
    }  # fmt: skip
    bits = {"dynamic": False, **bits}
    group = {"input_activations": bits, "weights": bits, "targets": ["Linear"]}
    return {
        "quant_method": "modelopt",
        "quant_algo": FORMATS[format],
        **({"group_size": 16} if format == "nvfp4" else {}),
        "kv_cache_quant_algo": None,
        "config_groups": {"group_0": group},
        "ignore": sorted(ignore),
    }


def amax_over_experts(amax: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The inputs' largest magnitudes by name; for an expert that no calibration token has reached, the largest of its
    layer's others."""

    def kind(name: str) -> str:
        return re.sub(r"\.experts\.\d+\.", ".experts.", name)

    most: dict[str, float] = {}
    for name, value in amax.items():
        most[kind(name)] = max(most.get(kind(name), 0.0), value)
    return {name: amax.get(name) or most[kind(name)] for name in names}
