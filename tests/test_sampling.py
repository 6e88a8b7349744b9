"""Penalties, filters and draws of generate.py against slow references: every way to a token gives the same law, and a
seeded one the same token."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_lite.config import UserError
from nemo_lite.generate import Draws, Sampling, adjust, probabilities

DOUBLE = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rows_of(K, V, seed):
    return torch.randn(K, V, dtype=DOUBLE, generator=generator(seed)) * 2


# ----------------------------------------------------------------------------------------------------------- penalties


def adjusted_slowly(logits_V, sampling, prompt, output):
    """One row and one token at a time, as the definitions say."""
    result = []
    for token, logit in enumerate(logits_V.tolist()):
        times = output.count(token)
        if times or token in prompt:
            r = sampling.repetition_penalty
            logit = logit / r if logit > 0 else logit * r
        logit -= sampling.frequency_penalty * times + (sampling.presence_penalty if times else 0.0)
        for biased, bias in sampling.logit_bias:
            if biased == token:
                logit += bias
        result.append(logit)
    return torch.tensor(result, dtype=DOUBLE)


@given(
    seed=st.integers(0, 2**32),
    presence=st.sampled_from([0.0, 0.7, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -1.1]),
    repetition=st.sampled_from([1.0, 1.3, 0.6]),
    bias=st.lists(st.tuples(st.integers(0, 6), st.floats(-100, 100)), max_size=3),
    prompt=st.lists(st.integers(0, 6), max_size=5),
    output=st.lists(st.integers(0, 6), max_size=5),
    drafts=st.lists(st.integers(0, 6), max_size=4),
)
def test_adjust_is_the_definition_row_by_row(seed, presence, frequency, repetition, bias, prompt, output, drafts):
    """Row k has seen the first k drafts."""
    sampling = Sampling(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias=tuple(bias)
    )
    logits = rows_of(len(drafts) + 1, 7, seed)
    before = logits.clone()
    got = adjust(logits, sampling, prompt, output, drafts)
    assert torch.equal(logits, before)  # others still read them
    for k, row in enumerate(logits):
        torch.testing.assert_close(got[k], adjusted_slowly(row, sampling, prompt, [*output, *drafts[:k]]))
    if prompt:
        assert torch.equal(got, adjust(logits, sampling, torch.tensor(prompt), output, drafts))


def test_adjust_works_in_float32_and_leaves_what_needs_nothing():
    logits = rows_of(2, 5, 0).bfloat16()
    assert adjust(logits, Sampling(), [1], [2], [3]) is logits
    got = adjust(logits, Sampling(presence_penalty=0.001), [1], [2], [3])
    assert got.dtype == torch.float32
    assert got[0, 2] == logits[0, 2].float() - 0.001 and got[0, 3] == logits[0, 3] and got[1, 3] != logits[1, 3]


# ------------------------------------------------------------------------------------------------------------- filters


def filtered_slowly(logits_V, sampling):
    """Temperature, then top-k, top-p and min-p, token by token."""
    logits = [x / sampling.temperature for x in logits_V.tolist()]
    if sampling.top_k:
        least = sorted(logits, reverse=True)[: sampling.top_k][-1]
        logits = [x if x >= least else -math.inf for x in logits]
    weights = [math.exp(x - max(logits)) for x in logits]
    p = [w / sum(weights) for w in weights]
    if sampling.top_p < 1:
        kept, total = set(), 0.0
        for token in sorted(range(len(p)), key=lambda t: -p[t]):
            if total >= sampling.top_p:
                break
            kept.add(token)
            total += p[token]
        p = [x if token in kept else 0.0 for token, x in enumerate(p)]
    p = [x if x >= sampling.min_p * max(p) else 0.0 for x in p]
    return torch.tensor([x / sum(p) for x in p], dtype=DOUBLE)


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 9, 99]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_filters_are_their_definitions(seed, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = rows_of(3, 9, seed)
    got = probabilities(logits, sampling)
    for row, p in zip(logits, got):
        torch.testing.assert_close(p, filtered_slowly(row, sampling))


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=DOUBLE).log()
    kept = {0.0: 4, 0.05: 4, 0.2: 3, 0.45: 2, 0.51: 1, 1.0: 1}
    assert {m: int((probabilities(logits, Sampling(temperature=1, min_p=m)) > 0).sum()) for m in kept} == kept
    hot = probabilities(logits, Sampling(temperature=1, min_p=0.45))
    torch.testing.assert_close(hot, torch.tensor([2 / 3, 1 / 3, 0, 0], dtype=DOUBLE))


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e300])
def test_extreme_temperatures_stay_distributions(temperature):
    p = probabilities(rows_of(4, 9, 3), Sampling(temperature=temperature))
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=DOUBLE))
    assert bool((p.max(-1).values == 1).all()) == (temperature < 1)


@pytest.mark.parametrize(
    "options", [{"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan}, {"temperature": math.nan},
                {"presence_penalty": 2.5}, {"frequency_penalty": math.nan}, {"repetition_penalty": 0.0},
                {"repetition_penalty": math.inf}, {"logit_bias": ((-1, 0.0),)}, {"logit_bias": ((1, math.nan),)},
                {"top_k": -1}, {"top_p": 0.0}]
)  # fmt: skip
def test_refused_in_a_sentence(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


# --------------------------------------------------------------------------------------------------------------- draws


def off_by(counts, expected):
    """Chi-square statistic in standard deviations above its mean."""
    counts, expected = counts.double().flatten(), expected.flatten() * counts.sum()
    assert float(counts[expected == 0].sum()) == 0, "something impossible was drawn"
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5
    degrees = len(expected) - 1
    return (float(((counts - expected).square() / expected).sum()) - degrees) / (2 * degrees) ** 0.5


P = torch.tensor([0.4, 0.0, 0.3, 0.15, 0.1, 0.05], dtype=DOUBLE)
DRAWS = 6000


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, 2**64 - 3])
def test_a_seeded_choice_is_distributed_as_p_over_positions(seed):
    draws = Draws(seed)
    tokens = torch.tensor([draws.choose(P, i) for i in range(DRAWS)])
    assert off_by(tokens.bincount(minlength=6), P) < 4
    # A token and the next one have nothing in common.
    pairs = (tokens[:-1] * 6 + tokens[1:]).bincount(minlength=36)
    assert off_by(pairs, P[:, None] * P) < 4


def test_a_seeded_choice_is_distributed_as_p_over_seeds():
    draws = [Draws(seed) for seed in range(3000)]
    tokens = torch.tensor([[d.choose(P, i) for d in draws] for i in (0, 1)])
    assert off_by(tokens.flatten().bincount(minlength=6), P) < 4
    assert off_by((tokens[0] * 6 + tokens[1]).bincount(minlength=36), P[:, None] * P) < 4
    neighbours = tokens[0, :-1] * 6 + tokens[0, 1:]
    assert off_by(neighbours.bincount(minlength=36), P[:, None] * P) < 4
    # Seed s at position i is not seed s + 1 at position i - 1, or the like.
    assert off_by((tokens[0, 1:] * 6 + tokens[1, :-1]).bincount(minlength=36), P[:, None] * P) < 4


def test_a_seeded_choice_depends_on_seed_and_position_alone():
    first, second = Draws(5), Draws(5)
    forward = [first.choose(P, i) for i in range(40)]
    assert [second.choose(P, i) for i in reversed(range(40))] == forward[::-1]
    assert [Draws(6).choose(P, i) for i in range(40)] != forward
    assert [Draws(5 + 2**64).choose(P, i) for i in range(40)] == forward  # seeds count modulo 2^64
    for seed in (-1, 2**64 - 1):
        assert [Draws(seed).choose(P, i) for i in range(40)] == [Draws(-1).choose(P, i) for i in range(40)]
    assert [Draws(2**63).choose(P, i) for i in range(40)] != [Draws(0).choose(P, i) for i in range(40)]


def test_a_likelier_token_stays_chosen():
    """The race is monotone: what makes the chosen token likelier does not unseat it. So drafts agree with tokens."""
    for i in range(200):
        token = Draws(3).choose(P, i)
        p = P.clone()
        p[token] *= 2
        assert Draws(3).choose(p / p.sum(), i) == token
    sure = torch.zeros(6, dtype=DOUBLE)
    sure[4] = 1.0
    assert {Draws(3).choose(sure, i) for i in range(50)} == {4}


@pytest.mark.parametrize("seed", [0, 11, -9])
def test_seeded_verification_gives_the_tokens_of_no_speculation(seed):
    """Whatever is drafted, by whom, and however many at once."""
    choice, K, V, N = random.Random(seed), 4, 7, 60
    p_NV = probabilities(rows_of(N + K + 1, V, 1), Sampling(temperature=1.0, top_k=5))
    q_NV = probabilities(rows_of(N + K + 1, V, 2) + p_NV.clamp(min=1e-9).log(), Sampling(temperature=1.0))
    plain = [Draws(seed).choose(p, i) for i, p in enumerate(p_NV)]
    for drafter in ("own", "right", "random"):
        tokens, kept_in_all, draws = [], 0, Draws(seed)
        while len(tokens) < N:
            at, k = len(tokens), choice.randint(0, K)
            drafts = {
                "own": [draws.choose(q, at + i) for i, q in enumerate(q_NV[at : at + k])],
                "right": plain[at : at + k],
                "random": [choice.randrange(V) for _ in range(k)],
            }[drafter]
            kept, token = draws.verify(drafts, q_NV[at : at + k], p_NV[at : at + k + 1], at)
            assert kept == k or drafter != "right"
            tokens += [*drafts[:kept], token]
            kept_in_all += kept
        assert tokens == plain[: len(tokens)] and kept_in_all > 0


@pytest.mark.parametrize("certain", [False, True])
def test_unseeded_verification_is_exact(certain):
    """The first two tokens that come out are distributed as p, whether drafts were drawn from q or simply said."""
    V, n = 4, 6000
    p_KV = probabilities(rows_of(3, V, 5), Sampling(temperature=4.0))
    q_KV = probabilities(rows_of(2, V, 6), Sampling(temperature=4.0))
    if certain:
        q_KV = torch.eye(V, dtype=DOUBLE)[[0, 2]]
    draws = Draws(None)
    draws.generator.manual_seed(0)
    first, second, lengths = torch.zeros(V), torch.zeros(V), []
    for _ in range(n):
        drafts = [draws.choose(q, 0) for q in q_KV]
        kept, token = draws.verify(drafts, q_KV, p_KV, 0)
        new = [*drafts[:kept], token]
        lengths.append(kept)
        first[new[0]] += 1
        if len(new) > 1:  # given that the first was kept, the second is p's, whatever it is
            second[new[1]] += 1
    assert off_by(first, p_KV[0]) < 4 and off_by(second, p_KV[1]) < 4
    # A draft is kept as often as the two distributions overlap.
    overlap = float(torch.minimum(p_KV[0], q_KV[0]).sum())
    share = sum(k > 0 for k in lengths) / n
    assert abs(share - overlap) < 4 * (overlap * (1 - overlap) / n) ** 0.5


def test_without_a_seed_every_draw_is_fresh():
    flat = torch.full((1000,), 1e-3, dtype=DOUBLE)
    assert [Draws(None).choose(flat, 0) for _ in range(6)] != [Draws(None).choose(flat, 0) for _ in range(6)]
