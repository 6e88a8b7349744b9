"""The fused step: a few tokens through the whole stack in one call, against the layers one after the other in torch, at
every level of this machine. And its promises: a token's result is the same bits whatever is computed beside it, and a
tentative forward with `commit(n)` is plain decoding."""

import copy

import pytest
import torch
from kernels.levels import compiled_for
from nemo_lite_kernels import cpu
from nemo_lite_kernels.cpu.moe import use_amx
from nemo_lite_kernels.cpu.step import FEW_TOKENS, Step
from nemo_lite_kernels.linear import PackedWeight
from tiny import TOLERANCE, assert_close, distance, random_ids, tiny_config, tiny_model

from nemo_lite.model.cache import KVState, MambaState
from nemo_lite.model.hybrid import HybridLM
from nemo_lite.parallel.layers import Layers

PLAIN = {
    "ssd": "recurrent", "conv": "reference", "attention": "reference", "experts": "reference", "router": "reference",
    "norm": "reference", "activation": "reference", "linear": "reference", "step": "layers",
}  # fmt: skip
ODD = {
    "hidden_size": 33, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 5, "mamba_num_heads": 6,
    "mamba_head_dim": 7, "ssm_state_size": 11, "n_groups": 3, "intermediate_size": 37, "moe_intermediate_size": 21,
    "moe_latent_size": 19, "moe_shared_expert_intermediate_size": 35, "conv_kernel": 3, "n_routed_experts": 7,
}  # fmt: skip
EVEN = {
    "hidden_size": 64, "head_dim": 32, "mamba_head_dim": 16, "ssm_state_size": 32, "intermediate_size": 96,
    "moe_intermediate_size": 32, "moe_latent_size": 32, "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip
CONFIGS = {
    "every letter": ("M-E*M", "*E", {}),
    "odd sizes": ("ME*-", "M*-E", ODD),
    "whole tiles": ("M*E-M", "*E", EVEN),
    "plain groups": ("EME", "E", {"moe_latent_size": None, "n_group": 4, "topk_group": 2}),
    "no shared expert": ("EM", "", {"n_shared_experts": 0, "norm_topk_prob": False}),
    "plain, nothing shared": ("E*", "", {"n_shared_experts": 0, "moe_latent_size": None}),
    "mamba": ("MM", "M", {"time_step_limit": [0.02, 0.4], "conv_kernel": 2, "n_groups": 1}),
    "attention": ("*-*", "*", {"num_key_value_heads": 1}),
    "dense": ("-", "-", {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=["amx", *cpu.LEVELS], autouse=True)
def level(request):
    name = "avx512_bf16" if request.param == "amx" else request.param
    with compiled_for(name):
        use_amx(request.param == "amx")  # without the tiles the machine may lack, this level runs twice
        yield request.param
        use_amx(True)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def calls(monkeypatch):
    """The tokens of every fused step that runs."""
    seen, run = [], Step.run

    def counted(self, x_TH, *args):
        seen.append(len(x_TH))
        return run(self, x_TH, *args)

    monkeypatch.setattr(Step, "run", counted)
    return seen


def config_named(name):
    pattern, mtp, sizes = CONFIGS[name]
    return tiny_config(pattern, mtp, **sizes)


def twins(config, dtype=None, plain_dtype=None):
    """The same weights with the fused step, and with layers in plain torch."""
    fused = tiny_model(config, dtype=dtype)
    plain = HybridLM(config, kernels=PLAIN).eval()
    plain.load_state_dict(tiny_model(config).state_dict())
    return fused, plain.to(plain_dtype or dtype or torch.float32)


def with_threads(n, function):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def story(model, ids, speculative):
    """Everything that can happen to a cache; the hidden states, and the drafts' logits. [B, 30] ids."""
    cache = model.new_cache(len(ids), speculative)
    out, at = [], 0

    def take(n, **options):
        out.append(model(ids[:, at : at + n], cache=cache, **options).hidden)

    def draft(n):
        if speculative:
            model.draft(cache, ids[:, at], n, lambda x: out.append(x) or x.argmax(-1))

    take(1)  # shorter than the convolution
    at += 1
    take(6)
    at += 6
    draft(2)
    for keep in (4, 0, 1, 3, 2):
        take(4, tentative=True)
        cache.commit(keep)
        at += keep
        if keep:
            draft(1)
    take(3, tentative=True)
    cache.rollback()
    take(2, tentative=True)  # not committed: all stay
    at += 2
    saved = cache.snapshot()
    take(3)
    take(2, tentative=True)
    cache.commit(1)
    cache.restore(saved)
    for _ in range(3):
        take(1)
        at += 1
    keep = [b % 3 for b in range(len(ids))]  # rows of different lengths from here on
    take(2, tentative=True)
    cache.commit([min(n, 2) for n in keep])
    out.append(model(ids[:, :1], cache=cache).hidden)
    return out, cache


def same_state(a, b, tolerance=None):
    for mine, other in zip(a.states, b.states):
        if isinstance(mine, MambaState):
            pairs = [(mine.window, other.window), (mine.state, other.state)]
        elif isinstance(mine, KVState):
            pairs = [
                (getattr(mine, name)[row, :n], getattr(other, name)[row, :n])
                for name in ("k", "v") for row, n in enumerate(a.lengths)
            ]  # fmt: skip
        else:
            continue
        for x, y in pairs:
            if tolerance is None:
                assert torch.equal(x, y)
            else:
                assert_close(x, y, tolerance)
    assert a.lengths == b.lengths


# --------------------------------------------------------------------------------------------------- against the layers


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_the_layers(name, calls):
    fused, plain = twins(config_named(name))
    ids = random_ids(fused.config, 3, 30)
    speculative = bool(fused.config.mtp_layers)
    got, cache = story(fused, ids, speculative)
    assert len(calls) > 14 and max(calls) == 18
    want, plain_cache = story(plain, ids, speculative)
    assert len(calls) < 60 and all(step is None for step in plain._steps.values())
    assert len(got) == len(want)
    for i, (x, y) in enumerate(zip(got, want)):
        assert_close(x, y, TOLERANCE[torch.float32], f"{i}")
    same_state(cache.trunk, plain_cache.trunk, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["every letter", "odd sizes", "whole tiles"])
@pytest.mark.parametrize("way", ["model.to", "dtype", "autocast"])
def test_bfloat16(name, way, calls):
    """No further from float32 with the same weights than the layers are in bfloat16."""
    config = config_named(name)
    if way == "model.to":
        fused, exact = twins(config, torch.bfloat16, torch.float32)
        exact.load_state_dict(fused.state_dict())
    else:
        fused, exact = twins(config)
        fused.dtype = torch.bfloat16 if way == "dtype" else None
    ids = random_ids(config, 3, 30)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        got, cache = story(fused, ids, True)
    want, _ = story(exact, ids, True)
    assert calls
    # A router may choose another expert where two are as good: the typical difference counts.
    for i, (x, y) in enumerate(zip(got, want)):
        assert x.dtype == torch.bfloat16
        assert float((x.float() - y).abs().median() / y.std()) < 0.03, i
    for state in cache.trunk.states:
        if isinstance(state, MambaState):
            assert state.state.dtype == torch.float32 and state.window.dtype == torch.bfloat16


def test_how_many_tokens(calls):
    fused, plain = twins(config_named("every letter"))
    for B, L in ((1, FEW_TOKENS), (FEW_TOKENS, 1), (1, FEW_TOKENS + 1), (3, 11), (2, 16)):
        calls.clear()
        ids = random_ids(fused.config, B, L + 1)
        got, want = [], []
        for model, out in ((fused, got), (plain, want)):
            cache = model.new_cache(B)
            out += [model(ids[:, :L], cache=cache).hidden, model(ids[:, L:], cache=cache).hidden]
        assert calls == [n for n in (B * L, B) if n <= FEW_TOKENS]
        for x, y in zip(got, want):
            assert_close(x, y, TOLERANCE[torch.float32])


@pytest.mark.parametrize("prompt", [250, 509])
def test_long_contexts(prompt, calls):
    """Over the pieces of 256 keys that attention takes at a time."""
    fused, plain = twins(tiny_config("*M", "*", **(EVEN | {"num_attention_heads": 2, "num_key_value_heads": 1})))
    ids = random_ids(fused.config, 2, prompt + 13)
    found = []
    for model in (fused, plain):
        cache = model.new_cache(2, speculative=True)
        out = [model(ids[:, :prompt], cache=cache).hidden]
        for at in range(prompt, prompt + 12, 4):
            model(ids[:, at : at + 4], cache=cache, tentative=True)
            cache.commit([1, 3])
            out.append(model(ids[:, at : at + 1], cache=cache).hidden)
            model.draft(cache, ids[:, at + 4], 2, lambda x, out=out: out.append(x) or x.argmax(-1))
        found.append(out)
    assert calls
    for x, y in zip(*found):
        assert_close(x, y, TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------------------------------------ same bits


def last(model, ids, sizes, tentative=(), rows=slice(None)):
    """The hidden states of these pieces, and the cache; a tentative piece is given with tokens that do not stay."""
    ids = ids[rows]
    cache, out, at = model.new_cache(len(ids)), [], 0
    for i, size in enumerate(sizes):
        if i in tentative:
            wrong = (ids[:, at + size : at + size + 3] + 1) % model.config.vocab_size
            hidden = model(torch.cat([ids[:, at : at + size], wrong], 1), cache=cache, tentative=True).hidden[:, :size]
            cache.commit(size)
        else:
            hidden = model(ids[:, at : at + size], cache=cache).hidden
        out.append(hidden)
        at += size
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_neighbours_do_not_matter(name, dtype, calls):
    model = tiny_model(config_named(name), dtype=dtype)
    ids = random_ids(model.config, 5, 21)
    sizes = [4, 1, 2, 1, 3, 6, 1]
    hidden, cache = last(model, ids, sizes)
    assert min(calls) == 5 and len(calls) == 7
    for row in range(5):
        alone, single = last(model, ids, sizes, rows=slice(row, row + 1))
        assert torch.equal(alone[0], hidden[row])
        for mine, other in zip(single.trunk.states, cache.trunk.states):
            if isinstance(mine, MambaState):
                assert torch.equal(mine.state[0], other.state[row]) and torch.equal(mine.window[0], other.window[row])
    # Nor how a row's tokens come in, one by one or many, for good or tentative; nor the threads.
    for sizes, tentative in (
        ([1] * 18, ()),
        ([5, 1, 6, 6], ()),
        ([3] * 6, range(6)),
        ([1, 2, 3, 3, 3, 3, 3], (1, 3, 5)),
    ):
        other, other_cache = last(model, ids, sizes, tentative)
        assert torch.equal(other, hidden), sizes
        same_state(other_cache.trunk, cache.trunk)
    other, other_cache = with_threads(2, lambda: last(model, ids, [3] * 6, range(6)))
    assert torch.equal(other, hidden)
    same_state(other_cache.trunk, cache.trunk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts_have_the_same_bits(dtype):
    """Where a piece of keys ends inside a verified row."""
    model = tiny_model(tiny_config("*M", **(EVEN | {"num_attention_heads": 2})), dtype=dtype)
    ids = random_ids(model.config, 2, 280)
    start = [32] * 7 + [16]  # 240 tokens, a row at a time
    base, base_cache = last(model, ids, start + [1] * 34, rows=slice(1))
    for sizes, tentative in (([3] * 11 + [1], ()), ([2] * 17, range(8, 25)), ([17, 17], ())):
        other, cache = last(model, ids, start + sizes, tentative, rows=slice(1))
        assert torch.equal(other, base)
        same_state(cache.trunk, base_cache.trunk)
    other, _ = with_threads(2, lambda: last(model, ids, [*start, 31, 3], rows=slice(1)))
    assert torch.equal(other, base)


@pytest.mark.parametrize("name", ["every letter", "odd sizes", "whole tiles", "plain groups"])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_repetition(name, threads):
    """Nothing is left over from one call for the next, and no thread reads what another has not written yet."""
    model = tiny_model(config_named(name))
    ids = random_ids(model.config, 3, 30)
    first, _ = story(model, ids, True)
    for _ in range(3):
        last(tiny_model(tiny_config("M*E-", **ODD), seed=2), ids, [7, 1])
        again, _ = with_threads(threads, lambda: story(model, ids, True))
        for x, y in zip(first, again):
            assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------------------- packed weights


def unpacked_twin(model, dtype):
    """The same model with its packed weights as plain ones, in plain torch."""
    plain = HybridLM(model.config, kernels=PLAIN).eval()
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        stored = found[name] if name in found else getattr(model.get_submodule(owner), leaf)
        tensor.copy_(stored.dequantize() if isinstance(stored, PackedWeight) else stored)
    return plain.to(dtype)


@pytest.mark.parametrize("name", ["whole tiles", "every letter", "plain groups", "odd sizes"])
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights(name, format, dtype, calls):
    model = tiny_model(config_named(name), dtype=dtype).quantize_weights(format, 64 if name == "whole tiles" else 32)
    plain = unpacked_twin(model, torch.float32)
    ids = random_ids(model.config, 3, 30)
    got, _ = story(model, ids, True)
    assert len(calls) > 14
    want, _ = story(plain, ids, True)
    for i, (x, y) in enumerate(zip(got, want)):
        assert bool(x.isfinite().all())
        assert float((x.float() - y).abs().median() / y.std()) < 0.04, i
    # Long prompts go through the layers, and what follows has the same weights.
    long = random_ids(model.config, 1, 60)
    hidden, exact = model(long).hidden, plain(long).hidden
    assert float((hidden.float() - exact).abs().median() / exact.std()) < (0.03 if dtype == torch.bfloat16 else 1e-5)
    cached = last(model, long, [50, 1, 1, 3, 5])[0]
    assert float((cached.float() - exact[:, :60]).abs().median() / exact.std()) < 0.04
    # The promises hold here as well.
    base, cache = last(model, ids, [4, 1, 2, 1, 3, 6, 1])
    other, other_cache = with_threads(2, lambda: last(model, ids, [3] * 6, range(6)))
    assert torch.equal(other, base)
    same_state(other_cache.trunk, cache.trunk)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_generate_on_packed_weights(format, calls):
    config = tiny_config("M*E-M", "*E", **EVEN)
    model = tiny_model(config).quantize_weights(format)
    ids = random_ids(config, 2, 9)
    tokens = model.generate(ids, max_tokens=20)
    assert tokens.shape == (2, 29) and calls
    assert torch.equal(model.generate(ids, max_tokens=20, speculative=True), tokens)
    with pytest.raises(ValueError, match="int8 or int4"):
        model.quantize_weights("int3")
    # Packing once more finds nothing to pack, and changes nothing.
    assert torch.equal(model.quantize_weights(format).generate(ids, max_tokens=20), tokens)


# --------------------------------------------------------------------------------------------- what is fused, and when


def decode(model, L=3):
    ids = random_ids(model.config, 2, L)
    return model(ids, cache=model.new_cache(2)).hidden


def test_what_does_not_take_the_step(calls):
    config = config_named("every letter")
    decode(tiny_model(config))
    assert calls.pop()
    decode(tiny_model(config, dtype=torch.float64))
    decode(tiny_model(config, dtype=torch.float16))
    decode(tiny_model(config).train())
    with torch.inference_mode(False), torch.enable_grad():
        model = tiny_model(config)
        decode(model).sum().backward()
    assert model.layers[0].mixer.in_proj.weight.grad is not None
    model = tiny_model(config)
    model(random_ids(config, 2, 5))  # without a cache
    cache = model.new_cache(2)
    model(random_ids(config, 2, 5), doc_ids=torch.tensor([[0] * 5, [-1] + [0] * 4]), cache=cache)  # padding
    for kernels in ({"step": "layers"}, {"ssd": "chunked"}, {"linear": "reference"}):
        decode(HybridLM(config, kernels=kernels).eval())

    def noisy(x, weight):
        return torch.nn.functional.linear(x, weight) + 1

    for only in ("layers.0.mixer.in_proj", "layers.2.mixer.shared_experts.up_proj"):
        custom = Layers()
        custom.matmul_for = lambda name, *sizes, only=only, layers=custom: noisy if name == only else layers.ops.linear
        decode(HybridLM(config, layers=custom).eval())
    decode(HybridLM(config, layers=type("Placement", (Layers,), {})()).eval())
    model = tiny_model(config)
    model.layers[1].mixer.register_forward_hook(lambda module, inputs, output: seen.append(1))
    seen = []
    decode(model)
    assert not calls and seen
    model = tiny_model(config)
    weight = model.layers[1].mixer.up.weight
    weight.data = weight.data.T.contiguous().T
    decode(model)
    assert not calls
    with pytest.raises(ValueError, match="fp8_step"):
        HybridLM(config, kernels={"step": "fp8_step"})


def test_changed_weights_are_seen(calls):
    model = tiny_model(config_named("every letter"))
    before = decode(model)
    other = tiny_model(model.config, seed=3)
    want = decode(other)
    assert distance(before, want) > 0.1
    cache = model.new_cache(2)
    ids = random_ids(model.config, 2, 3)
    model(ids, cache=cache)
    for mine, theirs in zip([*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()]):
        mine.data = theirs.data.clone()  # other memory
    model(ids[:, :1], cache=cache)  # a cache from before: old or new weights, but nobody's freed memory
    assert torch.equal(decode(model), want)
    for p in model.parameters():
        p.mul_(0.5)  # in place
    for p in other.parameters():
        p.mul_(0.5)
    assert torch.equal(decode(model), decode(other))
    model.load_state_dict(tiny_model(model.config).state_dict(), assign=True)
    assert torch.equal(decode(model), before)
    half = decode(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and 0 < distance(half, before) < 0.2
    assert torch.equal(half, decode(tiny_model(model.config, dtype=torch.bfloat16)))
    assert min(calls) > 0


def test_a_copied_model_plans_anew(calls):
    with torch.inference_mode(False), torch.no_grad():
        model = tiny_model(config_named("every letter"))
        before = decode(model)
        twin = copy.deepcopy(model)
        for p in model.parameters():
            p.zero_()
        calls.clear()
        assert torch.equal(decode(twin), before) and calls
        assert not torch.equal(decode(model), before)


def test_a_cache_that_was_begun_in_another_dtype(calls):
    """Its memory is not read as what it is not."""
    model = tiny_model(config_named("every letter"))
    ids = random_ids(model.config, 2, 4)
    cache = model.new_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, cache=cache)
    calls.clear()
    try:
        hidden = model(ids[:, :1], cache=cache).hidden
        assert bool(hidden.isfinite().all())
    except RuntimeError:  # torch need not take it either
        pass
    assert not calls


def test_states_are_written_to_new_tensors():
    """What somebody holds of a cache does not change, and neither does a snapshot."""
    model = tiny_model(config_named("mamba"))
    ids = random_ids(model.config, 2, 8)
    cache = model.new_cache(2)
    model(ids[:, :3], cache=cache)
    window, state = cache.trunk.states[0].window, cache.trunk.states[0].state
    before = window.clone(), state.clone()
    saved = cache.snapshot()
    model(ids[:, 3:4], cache=cache)
    model(ids[:, 4:7], cache=cache, tentative=True)
    cache.commit([0, 3])
    assert torch.equal(window, before[0]) and torch.equal(state, before[1])
    assert not torch.equal(cache.trunk.states[0].state, state)
    cache.restore(saved)
    assert torch.equal(cache.trunk.states[0].state, state)


def test_what_is_no_number_stays_in_its_row():
    model = tiny_model(config_named("whole tiles"))
    model.embedding.weight[5] = torch.nan
    ids = torch.tensor([[1, 2, 3], [1, 5, 3], [4, 4, 4]])
    for packed in (False, True):
        if packed:
            model.quantize_weights("int8")
        hidden = model(ids, cache=model.new_cache(3)).hidden
        assert bool(hidden[[0, 2]].isfinite().all()) and not bool(hidden[1, 1:].isfinite().any())
