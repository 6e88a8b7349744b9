"""The engine's output is that of HybridLM.generate, whatever the schedule: chunks, neighbours, prefix hits, preemption,
speculation with drafts good, random and wrong. float64: identical ids (float32 by teacher forcing, further down)."""

import functools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemo_lite_serving.engine import Engine
from nemo_lite_serving.protocol import EngineOptions, Guide, Request, Thinking
from nemo_lite_serving.runner import Pool, forced_end
from rigged import rigged_model
from tiny import random_ids, tiny_config, tiny_model

from nemo_lite import HybridLM
from nemo_lite.config import UserError
from nemo_lite.data import load_tokenizer
from nemo_lite.generate import Sampling, generate
from nemo_lite.model.attention import Attention
from nemo_lite.model.mamba2 import Mamba2

DOUBLE = torch.float64
# Every letter alone and together; MTP blocks of attention, of Mamba, of both; and models whose drafts are mostly kept,
# sometimes kept, never kept.
MODELS = {
    "hybrid": lambda: tiny_model(tiny_config("MEM*E", "*E"), dtype=DOUBLE),
    "mamba": lambda: tiny_model(tiny_config("MM", "M"), dtype=DOUBLE),
    "attention": lambda: tiny_model(tiny_config("*-*", "*"), dtype=DOUBLE),
    "mamba mtp": lambda: tiny_model(tiny_config("M*M", "M*-"), dtype=DOUBLE),
    "kept": lambda: rigged_model(1.0).to(DOUBLE),
    "half kept": lambda: rigged_model(0.5).to(DOUBLE),
    "refused": lambda: rigged_model(0.0).to(DOUBLE),
}
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=12, top_p=0.9, min_p=0.01, seed=8),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    Sampling(temperature=1.2, repetition_penalty=1.2, logit_bias=((5, 3.0), (7, -100.0)), seed=1),
]


@functools.cache
def model_named(name):
    return MODELS[name]()


@functools.cache
def expected(name, prompt, sampling, max_tokens, stop_ids):
    options = {k: v for k, v in vars(sampling).items() if k != "seed"}
    ids, seed = torch.tensor([prompt]), sampling.seed
    return generate(model_named(name), ids, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed, **options).tokens[0]


def engine_for(name, *, tight=None, **options):
    """An engine whose memory holds `tight` times one full context (None: plenty)."""
    model = model_named(name) if isinstance(name, str) else name
    defaults = {
        "max_model_len": 96,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "draft_tokens": 2,
    }
    options = EngineOptions("", **(defaults | options))
    if tight is not None:
        dtype = model.embedding.weight.dtype
        states = torch.promote_types(dtype, torch.float32)
        block, slot = Pool.sizes(model.config, options.block_size, dtype, states, options.speculative)
        blocks = -(-(options.max_model_len + 8) // options.block_size)
        bytes_ = max(blocks * block * tight + slot * options.max_num_seqs * 3, slot * options.max_num_seqs * 2.5)
        options = EngineOptions(**(vars(options) | {"memory_gib": bytes_ / 2**30}))
    return Engine(model, options)


def draft_at_random(engine, seed):
    """Whatever the MTP block says, draft something else: the worst a drafter can do."""
    draft, generator = engine.runner.draft, random.Random(seed)

    def at_random(spans, wanted):
        draft(spans, wanted)
        for span in spans:
            seq = span.seq
            seq.drafts = [generator.randrange(engine.config.vocab_size) for _ in seq.drafts]
            seq.draft_probs = None

    engine.runner.draft = at_random


def run(engine, requests, order=None, aborts=()):
    """Drive the engine to the end, adding requests when `order` says so; tokens by id."""
    tokens, step, queue = {}, 0, list(requests)
    while queue or engine.has_work:
        while queue and (order is None or order[len(requests) - len(queue)] <= step):
            request = queue.pop(0)
            engine.add(request)
            tokens[request.id] = []
        for when, id in aborts:
            if when == step and id in tokens:
                engine.abort(id)
        for output in engine.step() if engine.has_work else []:
            assert output.error is None
            assert len(output.depths) == len(output.tokens)
            tokens[output.id] += output.tokens
        engine.check()
        step += 1
        assert step < 2000, "the engine makes no progress"
    return tokens


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_any_schedule_gives_the_tokens_of_generate(seed):
    draw = random.Random(seed)
    name = draw.choice(list(MODELS))
    model = model_named(name)
    stems = [random_ids(model.config, n, seed=draw.randrange(3)).tolist() for n in (1, 3, 9, 17, 30)]
    requests, wanted = [], {}
    for i in range(draw.randint(1, 7)):
        prompt = tuple(draw.choice(stems) + random_ids(model.config, draw.choice([0, 0, 1, 2, 6]), seed=i).tolist())
        if draw.random() < 0.3 and wanted:  # a second turn: an earlier prompt with its answer, and more
            j = draw.randrange(len(requests))
            prompt = (*requests[j].prompt, *wanted[str(j)], *prompt)[:60]
        sampling, n = draw.choice(SAMPLINGS), draw.randint(1, 24)
        stop = (draw.randrange(model.config.vocab_size),) if draw.random() < 0.3 else ()
        requests.append(Request(str(i), list(prompt), sampling, n, stop_ids=stop))
        wanted[str(i)] = expected(name, prompt, sampling, n, stop)
    engine = engine_for(
        name,
        tight=draw.choice([None, 1, 1.6]),
        speculative=draw.random() < 0.75,
        draft_tokens=draw.choice([1, 2, 3, 5, "auto"]),
        block_size=draw.choice([1, 4, 16]),
        max_num_seqs=draw.choice([1, 2, 4]),
        max_num_batched_tokens=draw.choice([4, 5, 7, 16, 64]),
        prefix_caching=draw.random() < 0.7,
    )
    if engine.drafts and draw.random() < 0.25:
        draft_at_random(engine, seed)
    order = sorted(draw.randrange(12) for _ in requests)
    dropped = [str(i) for i in range(len(requests)) if draw.random() < 0.1]
    tokens = run(engine, requests, order, [(draw.randrange(20), id) for id in dropped])
    for id, new in tokens.items():
        if id in dropped:
            assert new == wanted[id][: len(new)]
        else:
            assert new == wanted[id], (name, id)
    engine.blocks.clear()
    engine.check()
    assert len(engine.blocks.free_blocks) == engine.blocks.num_blocks
    assert len(engine.blocks.free_slots) == engine.blocks.num_slots


# --------------------------------------------------------------------------------------------- float32: up to ties

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny_trained"


@functools.cache
def trained(dtype):
    return HybridLM.from_pretrained(FIXTURE, dtype=dtype)


def ties(model, prompt, tokens, tolerance):
    """How many greedy tokens are not the model's own argmax; each may miss it by less than `tolerance`."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    logprobs = logits.log_softmax(-1)
    best = logprobs.max(-1).values
    gaps = best - logprobs[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert float(gaps.max()) < tolerance
    return int((gaps > 0).sum())


@pytest.mark.parametrize(("dtype", "tolerance", "share"), [(torch.float32, 1e-4, 0.001), (torch.bfloat16, 0.1, 1.0)])
def test_lower_precision_differs_only_where_tokens_tie(dtype, tolerance, share):
    model, draw = trained(dtype), random.Random(5)
    text = (FIXTURE.parent / "text").glob("*.txt")
    ids = load_tokenizer(FIXTURE).encode("\n".join(p.read_text() for p in sorted(text))[:4000], special=False)
    count = total = 0
    for speculative, tight in ((False, 1.2), (True, 1.2), (True, None)):
        engine = engine_for(
            model, tight=tight, speculative=speculative, max_num_seqs=8, max_num_batched_tokens=32, draft_tokens=3
        )
        prompts = [ids[(start := draw.randrange(len(ids) - 40)) : start + draw.randint(1, 40)] for _ in range(20)]
        requests = [Request(str(i), p, max_tokens=50) for i, p in enumerate(prompts)]
        tokens = run(engine, requests, sorted(draw.randrange(60) for _ in prompts))
        for i, prompt in enumerate(prompts):
            assert len(tokens[str(i)]) == 50
            count += ties(model, prompt, tokens[str(i)], tolerance)
            total += 50
    assert count <= share * total


# ---------------------------------------------------------------- few tokens in one call of the CPU kernels (step.cpp)


@pytest.fixture
def fused(monkeypatch):
    """The tokens of every fused step."""
    from nemo_lite_kernels import cpu

    if cpu.reason() is not None:
        pytest.skip(str(cpu.reason()))
    from nemo_lite_kernels.cpu.step import Step

    seen, run_step = [], Step.run

    def counted(self, x_TH, *args):
        seen.append(len(x_TH))
        return run_step(self, x_TH, *args)

    monkeypatch.setattr(Step, "run", counted)
    return seen


WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "moe_latent_size": 32}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, "int8", "int4"], ids=str)
@pytest.mark.parametrize("pattern", [("MEM*E", "*E"), ("MM", "M"), ("M*-", "M*")], ids=str)
def test_fused_steps_give_the_tokens_of_generate(weights, pattern, fused):
    """All tokens go through fused steps, whose bits do not depend on the schedule: no ties, in no precision."""
    packed = isinstance(weights, str)
    model = tiny_model(tiny_config(*pattern, **WIDE), dtype=torch.float32 if packed else weights)
    if packed:
        model.quantize_weights(weights)
    draw, wanted, requests = random.Random(1), {}, []
    for i in range(8):
        prompt = random_ids(model.config, draw.randint(1, 30), seed=i % 5).tolist()
        sampling = SAMPLINGS[i % len(SAMPLINGS)]
        options = {k: v for k, v in vars(sampling).items() if k != "seed"}
        requests.append(Request(str(i), prompt, sampling, 20))
        found = generate(model, torch.tensor([prompt]), max_tokens=20, seed=sampling.seed, **options)
        wanted[str(i)] = found.tokens[0]
    for block_size, batched, tight in ((16, 32, None), (4, 5, 1.2), (1, 16, None)):
        for speculative in (False, True):
            fused.clear()
            options = {"block_size": block_size, "max_num_batched_tokens": batched, "speculative": speculative}
            # Where a snapshot is kept, the layers run one after the other.
            engine = engine_for(model, tight=tight, prefix_caching=False, **options)
            tokens = run(engine, requests, sorted(draw.randrange(12) for _ in requests))
            assert fused and max(fused) <= 32
            assert tokens == wanted, (block_size, speculative)


@pytest.mark.parametrize("block_size", [16, 4])
def test_fused_steps_behind_long_prompts(block_size, fused):
    """Over the pieces of 256 keys that attention takes at a time, and over blocks that lie apart."""
    model = tiny_model(tiny_config("M*E*", "*"))
    plain = HybridLM(model.config, kernels={"step": "layers"}).eval()
    plain.load_state_dict(model.state_dict())
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (250, 509, 3)]
    requests = [Request(str(i), p, max_tokens=24) for i, p in enumerate(prompts)]
    engine = engine_for(model, block_size=block_size, max_model_len=560, max_num_batched_tokens=64, speculative=True)
    tokens = run(engine, requests)
    assert fused
    for i, prompt in enumerate(prompts):
        assert len(tokens[str(i)]) == 24
        ties(plain, prompt, tokens[str(i)], 1e-4)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16"])
def test_narrow_states_do_not_take_the_fused_step(state, fused):
    model = tiny_model(tiny_config("M*M", "M"))
    plain = HybridLM(model.config, kernels={"step": "layers"}).eval()
    plain.load_state_dict(model.state_dict())
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (3, 9, 20)]
    requests = [Request(str(i), p, max_tokens=12) for i, p in enumerate(prompts)]
    found = [run(engine_for(m, mamba_cache_dtype=state, speculative=True), requests) for m in (model, plain)]
    assert bool(fused) == (state == "float32")
    assert found[0] == found[1]


def test_the_kernels_for_gpus_in_the_runner():
    """Paged attention, verification and what is kept of it, in Triton: the tokens of the plain ops."""
    from kernels.interpreter import DEVICE, kernels

    model = rigged_model(0.5).to(DEVICE)
    attention, scan, calls = kernels("attention"), kernels("ssd"), []

    def counted(name, function):
        return lambda *args, **options: calls.append(name) or function(*args, **options)

    ops = replace(model.ops, attention_paged=counted("paged", attention.attention_paged))
    for module in model.modules():
        if isinstance(module, Attention):
            module.ops = ops
        elif isinstance(module, Mamba2):
            module.ssd_verify = counted("verify", scan.ssd_verify)
            module.ssd_advance = counted("advance", scan.ssd_advance)
    model._step = lambda *_: None  # the layers, one after the other
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (3, 9, 70)]
    requests = [Request(str(i), prompt, max_tokens=6) for i, prompt in enumerate(prompts)]
    tokens = run(engine_for(model, speculative=True), requests)
    assert set(calls) == {"paged", "verify", "advance"}
    for i, prompt in enumerate(prompts):
        assert len(tokens[str(i)]) == 6
        ties(rigged_model(0.5), prompt, tokens[str(i)], 1e-4)


# ------------------------------------------------------------------------------------------------------- prefix cache


def finish(engine, *requests):
    """Run requests to their end; their last outputs' counts, by id, and tokens."""
    counts, tokens = {}, {}
    for request in requests:
        engine.add(request)
        tokens[request.id] = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.tokens
            if output.finish_reason:
                counts[output.id] = output.counts
        engine.check()
    return counts, tokens


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", ["hybrid", "mamba mtp", "attention"])
def test_a_prefix_is_read_once(name, speculative):
    """The same prompt again costs no forward; a second turn continues; a third branch hits where the others parted."""
    engine = engine_for(name, speculative=speculative)
    prompt = random_ids(model_named(name).config, 21, seed=1).tolist()
    reads = []
    trunk = model_named(name).trunk
    engine.runner.model = type("Model", (), {"__getattr__": lambda _, key: getattr(model_named(name), key)})()
    engine.runner.model.trunk = lambda ids, ctx: reads.append(len(ids)) or trunk(ids, ctx)
    counts, first = finish(engine, Request("a", prompt, max_tokens=6))
    assert counts["a"].cached_tokens == 0 and sum(reads) >= 21
    reads.clear()
    counts, again = finish(engine, Request("b", prompt, max_tokens=1))
    assert counts["b"].cached_tokens == 21 and reads == [] and again["b"] == first["a"][:1]
    turn = [*prompt, *first["a"], 3, 1, 2]
    counts, _ = finish(engine, Request("c", turn, max_tokens=1))
    turn_hit = counts["c"].cached_tokens
    assert turn_hit >= 21 + 5  # the last token of an answer need not have been read
    # Parting inside the prompt: nothing was kept there. The second time it is known that prompts part here.
    branch = prompt[:9]
    for id, tail, hit in (("d", [1, 1, 1], 0), ("e", [2, 2, 2], 8)):
        counts, tokens = finish(engine, Request(id, branch + tail, max_tokens=4))
        assert counts[id].cached_tokens == hit
        assert tokens[id] == expected(name, tuple(branch + tail), Sampling(), 4, ())
    stats = engine.stats()
    assert stats.prefix_hits == 21 + turn_hit + 8 and stats.prefix_evictions == 0


def test_two_continuations_share_a_snapshot():
    """A last block that is only partly the prefix's is copied, so neither sees the other's tokens."""
    engine = engine_for("hybrid", speculative=True, block_size=16)
    stem = random_ids(model_named("hybrid").config, 21, seed=2).tolist()
    finish(engine, Request("stem", stem, max_tokens=1))
    requests = [Request(str(i), [*stem, i, i + 1], max_tokens=12) for i in range(4)]
    counts, tokens = finish(engine, *requests)
    for i, request in enumerate(requests):
        assert counts[str(i)].cached_tokens == 21
        assert tokens[str(i)] == expected("hybrid", tuple(request.prompt), Sampling(), 12, ())


def test_snapshots_go_when_memory_is_needed_and_it_is_said_once(capsys):
    engine = engine_for("hybrid", tight=1, max_num_seqs=1)
    prompts = [random_ids(model_named("hybrid").config, 60, seed=i).tolist() for i in range(4)]
    for again in range(2):
        for i, prompt in enumerate(prompts):
            finish(engine, Request(f"{again}{i}", prompt, max_tokens=2))
    assert engine.stats().prefix_evictions > 0
    assert capsys.readouterr().out.count("evicted") == 1


# ---------------------------------------------------------------------------------------------------- memory and ends


def test_preemption_changes_no_token():
    engine = engine_for("hybrid", tight=1, speculative=True, prefix_caching=False)
    prompts = [tuple(random_ids(model_named("hybrid").config, 20, seed=i).tolist()) for i in range(4)]
    counts, tokens = finish(engine, *(Request(str(i), list(p), max_tokens=40) for i, p in enumerate(prompts)))
    assert engine.stats().preemptions > 0 and sum(c.preemptions for c in counts.values()) > 0
    for i, prompt in enumerate(prompts):
        assert tokens[str(i)] == expected("hybrid", prompt, Sampling(), 40, ())


def test_a_snapshot_in_the_way_is_given_up():
    """One context fits, and the prompt's own prefix holds one block too many: it must do without, not wait for ever."""
    engine = engine_for("hybrid", tight=1, speculative=True, max_num_seqs=1, block_size=16, max_model_len=91)
    prompt = random_ids(model_named("hybrid").config, 89, seed=6).tolist()
    finish(engine, Request("a", prompt[:40], max_tokens=1))
    _, tokens = finish(engine, Request("b", prompt, max_tokens=2))
    assert tokens["b"] == expected("hybrid", tuple(prompt), Sampling(), 2, ())


def test_drafts_starve_nobody():
    """Every running sequence gets a token a step, whatever the others draft."""
    engine = engine_for("kept", speculative=True, draft_tokens=5, max_num_batched_tokens=6)
    for i in range(4):
        engine.add(Request(str(i), [1 + i], max_tokens=40))
    engine.step()
    for _ in range(6):
        assert {output.id for output in engine.step() if output.tokens} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("speculative", [False, True])
def test_what_is_not_a_number_stays_with_its_request(speculative):
    model = tiny_model(tiny_config("MEM*E", "*E"), dtype=DOUBLE)
    model.embedding.weight.data[7] = float("nan")
    good = {"a": [1, 2, 3, 4, 5, 6], "b": [1, 2, 3]}
    wanted = {id: generate(model, torch.tensor([p]), max_tokens=8).tokens[0] for id, p in good.items()}
    assert all(7 not in new for new in wanted.values())
    for caching in (False, True):
        engine = engine_for(model, speculative=speculative, prefix_caching=caching)
        bad = Request("bad", [7] * 9, max_tokens=3)
        together = [Request(f"{id} beside", prompt, max_tokens=8) for id, prompt in good.items()]
        _, tokens = finish(engine, bad, *together)
        assert tokens == {"bad": []} | {f"{id} beside": new for id, new in wanted.items()}
        counts, tokens = finish(engine, *(Request(id, p, max_tokens=8) for id, p in good.items()))
        assert tokens == wanted  # in the memory that it has left
        counts, _ = finish(engine, Request("again", [7], max_tokens=3), Request("bad", [7] * 9, max_tokens=3))
        assert counts["bad"].cached_tokens == counts["again"].cached_tokens == 0


def test_abort_frees_everything_at_once():
    engine = engine_for("half kept", speculative=True)
    for i in range(6):
        engine.add(Request(str(i), [1, 2, 3 + i], max_tokens=50))
    for _ in range(4):
        engine.step()
    for i in range(6):
        engine.abort(str(i))
        engine.abort(str(i))
    assert not engine.has_work and engine.stats().running == engine.stats().waiting == 0
    engine.check()
    engine.blocks.clear()
    assert len(engine.blocks.free_blocks) == engine.blocks.num_blocks


def test_ends():
    engine = engine_for("kept", speculative=True, draft_tokens=4)
    _, plain = finish(engine, Request("0", [1, 2], max_tokens=12))
    stop = plain["0"][5]
    _, tokens = finish(engine, Request("1", [1, 2], max_tokens=12, stop_ids=(stop,)))
    assert tokens["1"] == plain["0"][: plain["0"].index(stop) + 1]
    _, tokens = finish(engine, Request("2", [1, 2], max_tokens=12, stop_ids=(stop,), min_tokens=9))
    assert stop not in tokens["2"][:9] and tokens["2"][:5] == plain["0"][:5]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request("x", [], max_tokens=1), "the prompt is empty"),
        (Request("x", [1, 61], max_tokens=1), "token id 61 is outside the model's 61 ids"),
        (Request("x", [1], max_tokens=0), "max_tokens must be 1 or more"),
        (Request("x", [1] * 90, max_tokens=7), "exceed the context of 96"),
        (Request("x", [1], Sampling(logit_bias=((99, 1.0),)), 1), "token id 99"),
    ],
)
def test_refused_requests(request_, sentence):
    engine = engine_for("hybrid")
    with pytest.raises(UserError, match=sentence):
        engine.add(request_)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be 1 or more"),
        ({"max_num_batched_tokens": 3}, "every running sequence reads a token a step"),
        ({"speculative": True, "draft_tokens": 0}, "draft_tokens must be 1 or more"),
        ({"memory_gib": 1e-6}, "Mamba states take"),
        ({"memory_gib": 5e-5, "max_model_len": 4000}, "hold a context of"),
        ({"mamba_cache_dtype": "int8"}, "mamba_cache_dtype must be"),
    ],
)
def test_refused_options(options, sentence):
    with pytest.raises(UserError, match=sentence):
        engine_for("hybrid", **options)


def test_memory_is_told():
    lines = "\n".join(engine_for("hybrid", speculative=True).info.capacity)
    for part in ("half of", "96 tokens a sequence; at most 4 sequences", "blocks of 4 tokens", "16 for snapshots"):
        assert part in lines
    tight = engine_for("hybrid", tight=1)
    assert "all that memory allows" in "\n".join(tight.info.capacity)


# -------------------------------------------------------------------------------------------------- what a request asks


def test_logprobs_are_the_models():
    model = model_named("hybrid")
    prompt = random_ids(model.config, 12, seed=4).tolist()
    for speculative in (False, True):
        engine = engine_for("hybrid", speculative=speculative, max_num_batched_tokens=5)
        engine.add(Request("a", prompt, Sampling(repetition_penalty=1.5), 8, logprobs=3, prompt_logprobs=2))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        tokens = [t for o in outputs for t in o.tokens]
        mine = [entry for o in outputs for entry in o.logprobs]
        of_prompt = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        assert len(of_prompt) == 1 and of_prompt[0][0] is None and len(of_prompt[0]) == len(prompt)
        for position, entry in enumerate([*of_prompt[0][1:], *mine], 1):
            row = logprobs[position - 1]
            token = [*prompt, *tokens][position]
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-9)
            assert [t for t, _ in entry.top] == row.topk(len(entry.top)).indices.tolist()


@pytest.mark.parametrize("speculative", [False, True])
def test_the_end_of_thinking_is_forced(speculative):
    engine = engine_for("half kept", speculative=speculative, draft_tokens=3)
    thinking = Thinking(end_ids=(7, 9), budget=5)
    _, tokens = finish(
        engine,
        Request("a", [1, 2], max_tokens=14, thinking=thinking),
        Request("b", [1, 2], max_tokens=14, thinking=Thinking(end_ids=(7, 9), budget=0)),
        Request("c", [1, 2], max_tokens=14),
    )
    assert tokens["a"][:5] == tokens["c"][:5] and tokens["a"][5:7] == [7, 9] and tokens["b"][:2] == [7, 9]
    assert len(tokens["a"]) == 14
    assert forced_end((7, 9), []) == 7 and forced_end((7, 9), [7]) == 9 and forced_end((7, 9), [7, 9]) is None


@pytest.mark.parametrize("speculative", [False, True])
def test_guided_output(speculative):
    pytest.importorskip("llguidance")
    tokenizer = load_tokenizer(FIXTURE)
    engine = Engine(
        trained(torch.float64), EngineOptions("", speculative=speculative, max_model_len=256, draft_tokens=3), tokenizer
    )
    schema = {"type": "object", "properties": {"name": {"enum": ["x", "yy"]}, "n": {"type": "integer"}},
              "required": ["name", "n"], "additionalProperties": False}  # fmt: skip
    prompt, eod = tokenizer.encode("def f(x):\n    "), tokenizer.eod_id
    hot = Sampling(temperature=1.0, seed=1)
    _, tokens = finish(
        engine,
        Request("schema", prompt, hot, 120, stop_ids=(eod,), guide=Guide("json_schema", json.dumps(schema))),
        Request("regex", prompt, hot, 60, stop_ids=(eod,), guide=Guide("regex", "[ab]{3}-[0-9]+z")),
        Request("choice", prompt, hot, 60, stop_ids=(eod,), guide=Guide("choice", '["maybe", "may"]')),
        Request("free", prompt, hot, 20),
    )
    text = {id: tokenizer.decode([t for t in new if t != eod]) for id, new in tokens.items()}
    assert json.loads(text["schema"]).keys() == {"name", "n"}
    assert re.fullmatch("[ab]{3}-[0-9]+z", text["regex"]) or len(tokens["regex"]) == 60
    assert text["choice"] in ("maybe", "may")
    assert (
        tokens["free"]
        == generate(engine.model, torch.tensor([prompt]), max_tokens=20, temperature=1.0, seed=1).tokens[0]
    )
    thinking = Thinking((255,), budget=4)  # the guide begins behind the reasoning, whose end is forced here
    _, tokens = finish(
        engine,
        Request("t", prompt, hot, 60, stop_ids=(eod,), guide=Guide("choice", '["maybe", "may"]'), thinking=thinking),
    )
    assert tokens["t"][4] == 255 and tokenizer.decode([t for t in tokens["t"][5:] if t != eod]) in ("maybe", "may")
    for bad in (Guide("json_schema", "{"), Guide("json_schema", '{"type": "nonsense"}'), Guide("regex", "(")):
        with pytest.raises(UserError, match="not usable as a guide"):
            engine.add(Request("bad", prompt, guide=bad))


# ------------------------------------------------------------------------------------------------- 16-bit SSM states


@pytest.mark.parametrize("states", ["bfloat16", "float16"])
def test_states_in_16_bits(states):
    """Close to float32's logits; a request's rounding depends on nothing but itself."""
    model, tokenizer = trained(torch.float32), load_tokenizer(FIXTURE)
    prompts = [tokenizer.encode(text) for text in ("def forward(self, x):", "import os\n", "class A:\n    def")]

    def tokens_of(*requests, **options):
        options = {"max_model_len": 256, "mamba_cache_dtype": states} | options
        return finish(Engine(model, EngineOptions("", **options)), *requests)[1]

    alone = tokens_of(Request("0", prompts[0], max_tokens=60))["0"]
    together = tokens_of(*(Request(str(i), p, max_tokens=60) for i, p in enumerate(prompts)))["0"]
    exact = tokens_of(Request("0", prompts[0], max_tokens=60), mamba_cache_dtype="float32")["0"]
    assert alone == together
    assert ties(model, prompts[0], alone, 0.1) <= 3 and exact[:8] == alone[:8]


def test_a_model_that_fails_ends_its_request_only():
    """Not-a-number logits of one row are that row's error."""
    engine = engine_for("hybrid")
    head = model_named("hybrid").head

    class Broken:
        def __getattr__(self, name):
            return getattr(model_named("hybrid"), name)

        def head(self, h_TH):
            logits = head(h_TH)
            logits[:1] = float("nan")
            return logits

    engine.runner.model = Broken()
    for i in range(2):
        engine.add(Request(str(i), [1, 2 + i], max_tokens=3))
    outputs = engine.step()
    assert outputs[0].finish_reason == "error" and "not a number" in outputs[0].error
    assert outputs[1].finish_reason is None
    engine.check()
