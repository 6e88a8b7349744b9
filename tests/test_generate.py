"""Decoding: speculation changes nothing but the speed, and sampled text is distributed as the model says."""

import itertools

import pytest
import torch
from rigged import rigged_model
from tiny import random_ids, tiny_config, tiny_model

from nemo_lite.config import UserError
from nemo_lite.generate import Sampling, accept, describe, draw, generate, probabilities

DOUBLE = torch.float64


def padded(config, lengths, seed=0, left=True):
    """Prompts of several lengths and their doc_ids."""
    ids, docs = (
        random_ids(config, len(lengths), max(lengths), seed=seed),
        torch.zeros(len(lengths), max(lengths), dtype=int),
    )
    for b, n in enumerate(lengths):
        docs[b, slice(0, max(lengths) - n) if left else slice(n, None)] = -1
    return ids, docs


def following(reference, prompt_lengths, shift=0, vocab=61):
    """A drafter that knows the reference's tokens and says these, or (shift) always something else."""

    def drafter(cache, next_B, K):
        rows = []
        for b, tokens in enumerate(reference):
            at = cache.lengths[b] - prompt_lengths[b] + 1
            rows.append([(t + shift) % vocab for t in (tokens + [0] * K)[at : at + K]] or [0] * K)
        return torch.tensor([row + [0] * (K - len(row)) for row in rows])

    return drafter


def random_drafter(vocab):
    generator = torch.Generator().manual_seed(4)
    return lambda cache, next_B, K: torch.randint(0, vocab, (len(next_B), K), generator=generator)


# --------------------------------------------------------------------------------------------------- greedy is exact


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern,mtp", [("MEM*E", "*E"), ("M-", "M*"), ("*", "E-")])
def test_greedy_speculation_is_greedy_decoding(K, pattern, mtp):
    """Identical ids in float64, whoever drafts, with padded prompts read in chunks."""
    lengths = [7, 1, 4]
    model = tiny_model(tiny_config(pattern, mtp), dtype=DOUBLE)
    ids, docs = padded(model.config, lengths)
    N = 4 * (K + 1) + 1  # the first token is the prefill's; then whole verify steps of the oracle
    plain = generate(model, ids, doc_ids=docs, max_tokens=N)
    assert [len(row) for row in plain.tokens] == [N] * 3 and plain.stats.verify_steps == 0
    options = {"doc_ids": docs, "max_tokens": N, "speculative": True, "draft_tokens": K, "prefill_chunk": 3}
    assert generate(model, ids, **options).tokens == plain.tokens
    longer = generate(model, ids, doc_ids=docs, max_tokens=N + K).tokens
    always_right = generate(model, ids, drafter=following(longer, lengths), **options)
    assert always_right.tokens == plain.tokens
    assert always_right.stats.acceptance_length == K + 1 and always_right.stats.verify_steps == 3 * 4
    assert always_right.stats.acceptance_by_position == [1.0] * K
    always_wrong = generate(model, ids, drafter=following(longer, lengths, shift=1), **options)
    assert always_wrong.tokens == plain.tokens
    assert always_wrong.stats.acceptance_length == 1 and always_wrong.stats.accepted == 0
    assert generate(model, ids, drafter=random_drafter(61), **options).tokens == plain.tokens


@pytest.mark.parametrize("acceptance", [0.0, 0.5])
def test_greedy_speculation_with_partial_acceptance(acceptance):
    model = rigged_model(acceptance).double()
    ids, docs = padded(model.config, [9, 3], left=False)
    plain = generate(model, ids, doc_ids=docs, max_tokens=40)
    for K in (1, 2, 4):
        out = generate(model, ids, doc_ids=docs, max_tokens=40, speculative=True, draft_tokens=K)
        assert out.tokens == plain.tokens
        assert acceptance == 0 or 0 < out.stats.accepted < out.stats.drafted


@pytest.mark.parametrize("dtype,gap_allowed", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_lower_precision_by_teacher_forcing(dtype, gap_allowed):
    """Where the tokens first differ, the model itself can hardly tell them apart; such ties are rare in float32."""
    model = rigged_model(0.5).to(dtype)
    prompts = random_ids(model.config, 16, 6)
    plain = generate(model, prompts, max_tokens=64).tokens
    spoken = generate(model, prompts, max_tokens=64, speculative=True, draft_tokens=3).tokens
    ties = 0
    for prompt, a, b in zip(prompts, plain, spoken):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is None:
            continue
        ties += 1
        logits = model(torch.tensor([prompt.tolist() + a[:at]])).logits[0, -1].double().log_softmax(-1)
        assert abs(float(logits[a[at]] - logits[b[at]])) < gap_allowed
    assert dtype != torch.float32 or ties <= 0.001 * 16 * 64


@torch.no_grad()
def test_greedy_tokens_are_the_argmax_of_the_uncached_model():
    model = tiny_model(tiny_config("M*E-"), dtype=DOUBLE)
    ids = random_ids(model.config, 2, 5)
    for _ in range(10):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids[:, :5], max_tokens=10), ids)


# --------------------------------------------------------------------------------------------------- the pure functions


def off_by(counts, expected):
    """Chi-square statistic in standard deviations above its mean; cells of little weight are merged."""
    counts, expected = (
        torch.as_tensor(counts, dtype=DOUBLE).flatten(),
        torch.as_tensor(expected, dtype=DOUBLE).flatten(),
    )
    n = counts.sum()
    assert float(counts[expected == 0].sum()) == 0, "something impossible was drawn"
    small = expected * n < 8
    c = torch.cat([counts[~small], counts[small].sum()[None]])
    e = torch.cat([expected[~small], expected[small].sum()[None]]) * n
    c, e = c[e > 0], e[e > 0]
    degrees = max(len(c) - 1, 1)
    return float((((c - e) ** 2 / e).sum() - degrees) / (2 * degrees) ** 0.5)


def some_distribution(generator, V, sampling, *shape):
    return probabilities(torch.randn((*shape, V), generator=generator, dtype=DOUBLE) * 1.5, sampling)


SAMPLINGS = [
    Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.5, top_p=0.7), Sampling(1.0, top_k=4, top_p=0.8),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_rejection_sampling_is_exact(sampling):
    """One draft from q, kept or replaced, is a draw from p: 20,000 times, for supports that overlap in part."""
    V, generator = 6, torch.Generator().manual_seed(1)
    p, q = some_distribution(generator, V, sampling, 2), some_distribution(generator, V, sampling, 1)
    counts, seconds, kept = torch.zeros(V), torch.zeros(V), 0
    for _ in range(20_000):
        drafted = draw(q[0], generator)
        n, token = accept([drafted], q, p, generator)
        counts[drafted if n else token] += 1
        if n:
            seconds[token] += 1
            kept += 1
    assert off_by(counts, p[0]) < 5
    assert off_by(seconds, p[1]) < 5
    agreement = float(torch.minimum(p[0], q[0]).sum())
    assert abs(kept / 20_000 - agreement) < 0.02  # as often as any exact method can keep


def test_rejection_sampling_of_two_drafts_is_exact_jointly():
    """The second distribution depends on the first token, as it does in a model."""
    V, generator = 4, torch.Generator().manual_seed(2)
    plain = Sampling(1.0)
    p1, q1 = some_distribution(generator, V, plain), some_distribution(generator, V, plain)
    p2, q2 = some_distribution(generator, V, plain, V), some_distribution(generator, V, plain, V)
    counts = torch.zeros(V, V)
    for _ in range(20_000):
        a = draw(q1, generator)
        b = draw(q2[a], generator)
        n, token = accept([a, b], torch.stack([q1, q2[a]]), torch.stack([p1, p2[a], p1]), generator)
        tokens = [*[a, b][:n], token]
        if len(tokens) == 1:
            tokens.append(draw(p2[tokens[0]], generator))
        counts[tokens[0], tokens[1]] += 1
    assert off_by(counts, p1[:, None] * p2) < 5


def test_draw_follows_its_distribution_and_never_takes_the_impossible():
    generator = torch.Generator().manual_seed(3)
    probs = torch.tensor([0.0, 0.2, 0.0, 1.0, 0.3, 0.0])
    counts = torch.zeros(6)
    for _ in range(20_000):
        counts[draw(probs, generator)] += 1
    assert off_by(counts, probs / probs.sum()) < 5


def test_accept_where_the_distributions_agree_keeps_all():
    generator = torch.Generator().manual_seed(5)
    p = some_distribution(generator, 8, Sampling(1.0), 4)
    for _ in range(200):
        drafts = [draw(row, generator) for row in p[:3]]
        assert accept(drafts, p[:3], p, generator)[0] == 3


def test_accept_never_keeps_what_the_model_excludes():
    p = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    q = torch.tensor([[1.0, 0.0, 0.0]])
    assert accept([0], q, p, torch.Generator()) == (0, 1)


def test_greedy_draws_no_random_numbers():
    generator = torch.Generator().manual_seed(6)
    before = generator.get_state()
    one_hot = torch.eye(5)
    assert draw(one_hot[3], generator) == 3
    assert accept([1, 2], one_hot[[1, 2]], one_hot[[1, 2, 4]], generator) == (2, 4)
    assert accept([1, 2], one_hot[[1, 2]], one_hot[[1, 3, 4]], generator) == (1, 3)
    assert accept([0, 2], one_hot[[0, 2]], one_hot[[1, 2, 4]], generator) == (0, 1)
    assert torch.equal(generator.get_state(), before)


def test_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert probabilities(logits, Sampling()).tolist() == [1, 0, 0, 0]
    assert torch.allclose(probabilities(logits, Sampling(2.0)), (logits / 2).softmax(-1))
    assert (probabilities(logits, Sampling(1.0, top_k=2)) > 0).tolist() == [True, True, False, False]
    full = logits.softmax(-1)
    nucleus = probabilities(logits, Sampling(1.0, top_p=float(full[0]) + 0.01))  # the token that crosses it stays
    assert torch.allclose(nucleus, torch.cat([full[:2] / full[:2].sum(), torch.zeros(2)]))
    assert probabilities(logits, Sampling(1.0, top_p=1e-6)).tolist() == [1, 0, 0, 0]
    assert torch.allclose(probabilities(logits, Sampling(1.0, top_k=99)), full)
    assert probabilities(logits.bfloat16(), Sampling(1.0)).dtype == torch.float32
    batch = torch.stack([logits, logits.flip(0)])
    assert torch.equal(
        probabilities(batch, Sampling(1.0, 3, 0.9))[1], probabilities(logits, Sampling(1.0, 3, 0.9)).flip(0)
    )


@pytest.mark.parametrize("speculative", [False, True])
@torch.no_grad()
def test_sampled_text_is_distributed_as_the_model_says(speculative):
    """All 64 continuations of three tokens, against their exact probabilities."""
    V, N = 4, 3
    config = tiny_config("M*", "*", vocab_size=V, initializer_range=0.3)
    model = tiny_model(config, dtype=DOUBLE)
    sampling = {"temperature": 1.2, "top_p": 0.95}
    prompt = random_ids(config, 1, 5)
    expected = torch.ones(V, V, V, dtype=DOUBLE)
    for tokens in itertools.product(range(V), repeat=N):
        rows = model(torch.cat([prompt, torch.tensor([tokens])], dim=1)).logits[0, 4:-1]
        p = probabilities(rows, Sampling(**sampling))
        expected[tokens] = torch.stack([p[i, t] for i, t in enumerate(tokens)]).prod()
    counts, accepted = torch.zeros(V, V, V), 0
    for round in range(12):
        out = generate(
            model, prompt.expand(400, -1), max_tokens=N, seed=1000 * round, speculative=speculative, draft_tokens=2,
            **sampling,
        )  # fmt: skip
        accepted += out.stats.accepted
        for tokens in out.tokens:
            counts[tuple(tokens)] += 1
    assert off_by(counts, expected) < 5
    assert not speculative or 500 < accepted < 9_600, "both ways of getting a token must have been taken"


# ------------------------------------------------------------------------------------------------------ a row's own end


def test_stop_ids_and_max_tokens():
    model = rigged_model(0.5).double()
    ids = random_ids(model.config, 3, 4, seed=8)
    free = generate(model, ids, max_tokens=30).tokens
    stop = free[0][7]
    plain = generate(model, ids, max_tokens=30, stop_ids=[stop])
    for row, whole in zip(plain.tokens, free):
        end = whole.index(stop) + 1 if stop in whole else 30
        assert row == whole[:end]
    for K in (1, 3):
        out = generate(model, ids, max_tokens=30, stop_ids=[stop], speculative=True, draft_tokens=K)
        assert out.tokens == plain.tokens
    assert plain.sequences.shape == (3, 4 + max(len(row) for row in plain.tokens))
    assert plain.stats.new_tokens == sum(len(row) for row in plain.tokens)
    for n in (1, 2, 5):
        assert [len(r) for r in generate(model, ids, max_tokens=n, speculative=True, draft_tokens=4).tokens] == [n] * 3


@pytest.mark.parametrize("speculative", [False, True])
def test_streaming(speculative):
    model = rigged_model(0.5).double()
    ids = random_ids(model.config, 2, 4)
    calls = []
    out = generate(
        model, ids, max_tokens=20, speculative=speculative, draft_tokens=3, stop_ids=[5],
        on_tokens=lambda row, tokens: calls.append((row, list(tokens))),
    )  # fmt: skip
    assert all(tokens for _, tokens in calls)
    for b in range(2):
        assert [t for row, tokens in calls if row == b for t in tokens] == out.tokens[b]
    assert [row for row, _ in calls[:2]] == [0, 1]  # each row's first token comes before anybody's second
    assert not speculative or any(len(tokens) > 1 for _, tokens in calls)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_neighbours_change_nothing(speculative, temperature):
    model = rigged_model(0.5).double()
    lengths = [3, 8, 5]
    ids, docs = padded(model.config, lengths)
    options = {"max_tokens": 25, "temperature": temperature, "speculative": speculative, "draft_tokens": 2}
    together = generate(model, ids, doc_ids=docs, seed=40, **options).tokens
    for b in range(3):
        assert generate(model, ids[b : b + 1, docs[b] == 0], seed=40 + b, **options).tokens[0] == together[b]


def test_sampling_repeats_with_its_seed():
    model = rigged_model(0.5)
    ids = random_ids(model.config, 1, 4)
    runs = [generate(model, ids, max_tokens=30, temperature=1.0, seed=s).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_generation_leaves_the_model_as_it_was():
    model = tiny_model(tiny_config("ME")).train()
    generate(model, random_ids(model.config, 1, 3), max_tokens=3)
    assert model.training
    with pytest.raises(RuntimeError, match="told to stop"):
        generate(model, random_ids(model.config, 1, 3), max_tokens=3, on_tokens=_stop)
    assert model.training


def _stop(row, tokens):
    raise RuntimeError("told to stop")


def test_statistics_read_well():
    model = rigged_model(1.0)
    stats = generate(model, random_ids(model.config, 2, 4), max_tokens=9, speculative=True, draft_tokens=3).stats
    assert stats.prompt_tokens == 8 and stats.acceptance_length == 4 and stats.tokens_per_second > 0
    assert "acceptance length 4.00" in describe(stats) and "100%, 100%, 100%" in describe(stats)
    assert stats.as_dict()["acceptance_length"] == 4
    plain = generate(model, random_ids(model.config, 2, 4), max_tokens=1).stats
    assert plain.acceptance_length == 1 and plain.tokens_per_second == 0 and "acceptance" not in describe(plain)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"temperature": float("inf")}, "temperature must be 0 or more"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"prefill_chunk": 0}, "prefill_chunk must be 1 or more"),
        ({"speculative": True, "draft_tokens": 0}, "draft_tokens must be 1 or more"),
        ({"doc_ids": torch.tensor([[0, 0], [-1, -1]])}, "the prompt is empty"),
    ],
)
def test_bad_options(options, words):
    model = tiny_model(tiny_config("M", "*"))
    with pytest.raises(UserError, match=words):
        generate(model, random_ids(model.config, 2, 2), **options)


def test_more_bad_input():
    model = tiny_model(tiny_config("M"))
    with pytest.raises(UserError, match="no MTP block"):
        generate(model, random_ids(model.config, 1, 2), speculative=True)
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(model, torch.empty(1, 0, dtype=torch.int64))
