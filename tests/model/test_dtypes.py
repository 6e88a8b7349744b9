"""What runs in float32 whatever the model's dtype: routers, dt, A, D, norms, convolutions, scans. Linears do not.

Torch's operators are watched, so kernels are torch's here; those in C++ must keep the same dtypes outside, and be no
further from float32.
"""

import pytest
import torch
from nemo_lite_kernels import OPS, common, cpu
from tiny import Watch, random_ids, tiny_config, tiny_model

from nemo_lite.model.hybrid import HybridLM

HALF = torch.bfloat16
CONFIG = {
    "pattern": "ME*-",
    "mtp": "*E",
    "n_routed_experts": 7,
    "mamba_num_heads": 6,
    "n_groups": 2,
}  # 7 and 6: found by shape


# The first backend of every op that is there on every machine.
TORCH = {
    op: next(name for name, b in backends.items() if b.missing is None and "cpu" in b.devices)
    for op, backends in OPS.items()
}
KERNELS = [
    pytest.param(TORCH, id="torch"),
    pytest.param(None, id="cpp", marks=pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))),
]


@pytest.fixture(autouse=True)
def products(request, monkeypatch):
    """Whether this CPU's torch multiplies bfloat16: it does, wherever the test does not say otherwise."""
    monkeypatch.setattr(common, "multiplies_bfloat16", lambda: getattr(request, "param", True))


def variants(name, kernels=TORCH):
    model = HybridLM(tiny_config(**CONFIG), kernels=kernels).eval()
    model.load_state_dict(tiny_model(model.config).state_dict())
    if name == "dtype=bfloat16":
        model.dtype = HALF
    elif name == "model.to(bfloat16)":
        model.to(HALF)
    return model, torch.autocast("cpu", HALF, enabled=name == "autocast")


def check(watch):
    products = watch.named("mm", "mv", "addmm", "linear")
    router = [call for call in products if call[2][0].shape[-1] == 7]
    assert router and all(t.dtype == torch.float32 for _, args, results in router for t in (*args, *results))
    others = [call for call in products if call[2][0].shape[-1] != 7 and 7 not in call[1][0].shape]
    assert len(others) > 8
    assert all(t.dtype == HALF for _, args, results in others for t in (*args, *results))
    scans = [call for call in watch.named("bmm") if call[1][0].shape[0] != 7]  # seven experts
    assert scans and all(t.dtype == torch.float32 for _, args, _ in scans for t in args)
    for name in ("exp", "softplus", "rsqrt", "rsqrt_", "sigmoid", "silu", "cumsum", "silu_backward"):
        for _, args, _ in watch.named(name):
            if args[0].is_floating_point():
                assert args[0].dtype == torch.float32, name
    heads = [args[0] for _, args, _ in watch.named("exp") if args[0].shape == (6,)]
    assert heads, "A = -exp(A_log) was not seen"
    assert watch.named("softplus") and watch.named("rsqrt", "rsqrt_") and watch.named("silu")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["dtype=bfloat16", "model.to(bfloat16)", "autocast"])
def test_training_step(name, kernels):
    model, autocast = variants(name, kernels)
    model.train()
    ids = random_ids(model.config, 2, 21)
    with Watch() as watch, autocast:
        out = model(ids, labels=ids)
    if kernels is TORCH:
        check(watch)
    assert out.hidden.dtype == HALF and out.loss.dtype == torch.float32
    out.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, parameter_name
        assert bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["dtype=bfloat16", "model.to(bfloat16)", "autocast"])
@torch.no_grad()
def test_prefill_and_decode(name, kernels):
    model, autocast = variants(name, kernels)
    ids = random_ids(model.config, 2, 43)
    cache = model.new_cache(2, speculative=True)
    with autocast:
        for part in (slice(0, 40), slice(40, 41)):
            with Watch() as watch:
                logits = model(ids[:, part], cache=cache).logits
            if kernels is TORCH:
                check(watch)
            assert logits.dtype == HALF
        assert cache.trunk.states[0].state.dtype == torch.float32
        assert cache.trunk.states[0].window.dtype == HALF and cache.trunk.states[2].k.dtype == HALF
        model.draft(cache, ids[:, 41], 2, lambda x: x.argmax(-1))


def error(model, autocast, ids, exact, decoded):
    """Of the logits, beside their spread; of `decoded` tokens one by one after the others."""
    cache, n = model.new_cache(len(ids)), ids.shape[1] - decoded
    with autocast:
        parts = [
            model(ids[:, :n], cache=cache),
            *(model(ids[:, i : i + 1], cache=cache) for i in range(n, ids.shape[1])),
        ]
        logits = torch.cat([out.logits for out in parts], 1)
    return float((logits.float() - exact).std() / exact.std())


@pytest.mark.parametrize("products", [False], indirect=True)
@pytest.mark.parametrize("kernels", KERNELS)
def test_products_widened_where_the_cpu_has_none(products, kernels, monkeypatch):
    model, _ = variants("dtype=bfloat16", kernels)
    ids = random_ids(model.config, 2, 90)  # long enough for the paths of many rows

    def run():
        model.zero_grad()
        with Watch() as watch:
            out = model(ids, labels=ids)
            out.loss.backward()
        return watch, out, {name: p.grad.float() for name, p in model.named_parameters()}

    watch, out, gradients = run()
    for _, args, _ in watch.named("mm", "addmm", "linear", "bmm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert all(t.dtype == torch.float32 for t in args if t.dim() >= 2)
    assert out.logits.dtype == out.hidden.dtype == HALF
    monkeypatch.setattr(common, "multiplies_bfloat16", lambda: True)
    _, narrow, wanted = run()
    assert abs(out.loss.item() - narrow.loss.item()) < 0.01
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) < 0.1 * float(wanted[name].norm()) + 1e-6, name


@pytest.mark.parametrize("decoded", [0, 36])
@pytest.mark.parametrize("name", ["dtype=bfloat16", "model.to(bfloat16)", "autocast"])
@torch.no_grad()
def test_bfloat16_is_near_float32(name, decoded):
    ids = random_ids(tiny_config(**CONFIG), 2, 40)
    exact = variants("float32")[0](ids).logits
    torch_error = error(*variants(name), ids, exact, decoded)
    assert torch_error < 0.1
    if cpu.reason() is None:
        assert error(*variants(name, None), ids, exact, decoded) < 1.25 * torch_error


@pytest.mark.parametrize("kernels", KERNELS)
def test_float64_is_float64_throughout(kernels):
    model = HybridLM(tiny_config(**CONFIG), kernels=kernels).double().train()
    ids = random_ids(model.config, 1, 9)
    with Watch() as watch:
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            cache = model.eval().new_cache(1)
            for _ in range(2):
                model(ids[:, :4], cache=cache)
    for name, args, results in watch.calls:
        for tensor in (*args, *results):
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64, name
