"""What runs in float32 whatever the model's dtype: routers, dt, A, D, norms, convolutions, scans. Linears do not."""

import pytest
import torch
from tiny import Watch, random_ids, tiny_config, tiny_model

HALF = torch.bfloat16
CONFIG = {
    "pattern": "ME*-",
    "mtp": "*E",
    "n_routed_experts": 7,
    "mamba_num_heads": 6,
    "n_groups": 2,
}  # 7 and 6: found by shape


def variants(name):
    model = tiny_model(tiny_config(**CONFIG))
    if name == "dtype=bfloat16":
        model.dtype = HALF
    elif name == "model.to(bfloat16)":
        model.to(HALF)
    return model, torch.autocast("cpu", HALF, enabled=name == "autocast")


def check(watch, few_rows=False):
    products = watch.named("mm", "mv", "addmm", "linear")
    router = [call for call in products if call[2][0].shape[-1] == 7]
    assert router and all(t.dtype == torch.float32 for _, args, results in router for t in (*args, *results))
    others = [call for call in products if call[2][0].shape[-1] != 7 and 7 not in call[1][0].shape]
    assert len(others) > 8
    # Decoding casts small weights: that takes less time than starting a bfloat16 product does.
    assert few_rows or all(t.dtype == HALF for _, args, results in others for t in (*args, *results))
    scans = [call for call in watch.named("bmm") if call[1][0].shape[0] != 7]  # seven experts
    assert scans and all(t.dtype == torch.float32 for _, args, _ in scans for t in args)
    for name in ("exp", "softplus", "rsqrt", "rsqrt_", "sigmoid", "silu", "cumsum", "silu_backward"):
        for _, args, _ in watch.named(name):
            if args[0].is_floating_point():
                assert args[0].dtype == torch.float32, name
    heads = [args[0] for _, args, _ in watch.named("exp") if args[0].shape == (6,)]
    assert heads, "A = -exp(A_log) was not seen"
    assert watch.named("softplus") and watch.named("rsqrt", "rsqrt_") and watch.named("silu")


@pytest.mark.parametrize("name", ["dtype=bfloat16", "model.to(bfloat16)", "autocast"])
def test_training_step(name):
    model, autocast = variants(name)
    model.train()
    ids = random_ids(model.config, 2, 21)
    with Watch() as watch, autocast:
        out = model(ids, labels=ids)
    check(watch)
    assert out.hidden.dtype == HALF and out.loss.dtype == torch.float32
    out.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, parameter_name
        assert bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("name", ["dtype=bfloat16", "model.to(bfloat16)", "autocast"])
@torch.no_grad()
def test_prefill_and_decode(name):
    model, autocast = variants(name)
    ids = random_ids(model.config, 2, 43)
    cache = model.new_cache(2, speculative=True)
    with autocast:
        for part in (slice(0, 40), slice(40, 41)):
            with Watch() as watch:
                logits = model(ids[:, part], cache=cache).logits
            check(watch, few_rows=part.start > 0)
            assert logits.dtype == HALF
        assert cache.trunk.states[0].state.dtype == torch.float32
        assert cache.trunk.states[0].window.dtype == HALF and cache.trunk.states[2].k.dtype == HALF
        model.draft(cache, ids[:, 41], 2, lambda x: x.argmax(-1))


@pytest.mark.parametrize("name", ["dtype=bfloat16", "model.to(bfloat16)", "autocast"])
@torch.no_grad()
def test_bfloat16_is_near_float32(name):
    exact, _ = variants("float32")
    ids = random_ids(exact.config, 2, 40)
    model, autocast = variants(name)
    with autocast:
        logits = model(ids).logits
    error = (logits.float() - exact(ids).logits).std() / exact(ids).logits.std()
    assert error < 0.1


def test_float64_is_float64_throughout():
    model = tiny_model(tiny_config(**CONFIG), dtype=torch.float64).train()
    ids = random_ids(model.config, 1, 9)
    with Watch() as watch:
        model(ids, labels=ids).loss.backward()
    for name, args, results in watch.calls:
        for tensor in (*args, *results):
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64, name
