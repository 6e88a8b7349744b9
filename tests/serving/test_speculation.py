"""How many tokens are drafted: as many as pay, fewer under load, none where drafts are refused, and never too many."""

import collections
import random

import pytest
import torch
from nemo_lite_serving.engine import Engine
from nemo_lite_serving.protocol import EngineOptions, Request
from nemo_lite_serving.scheduler import Sequence, Span
from nemo_lite_serving.speculation import PATIENCE, DraftPolicy, StepTimes, Switch
from tiny import tiny_config, tiny_model

from nemo_lite.generate import Sampling

ANYTHING = lambda seq, positions: True  # noqa: E731


def decoding(max_tokens=10**6, new=1):
    """A sequence whose newest token is the only one that the trunk has not read."""
    seq = Sequence(Request("", [1], max_tokens=max_tokens), [1])
    seq.output = [1] * new
    seq.tokens, seq.computed = [1, *seq.output], new
    return seq


def spans_of(*seqs):
    return [Span(seq, seq.computed, 1) for seq in seqs]


def line(first, row):
    """A forward over n rows takes first + (n - 1) row."""
    return StepTimes([(rows, first + (rows - 1) * row) for rows in (1, 2, 3, 5, 8, 16, 32, 64, 128)])


def policy_for(most=4, *, row=0.1, block=0.1, block_row=0.02):
    """An adaptive policy on a machine where a forward over one row takes 1."""
    policy = DraftPolicy(most, adaptive=True)
    policy.verify, policy.block = line(1.0, row), line(block, block_row)
    return policy


def simulate(policy, acceptance, steps, *, count=1, seed=0, told=None, truth=None):
    """Decode so many steps, `count` sequences at once; each draft is kept with the probability acceptance(step), which
    the block knows (told: what it says instead); `truth` is what forwards take, if not what the policy believes.
    Returns tokens a second, and drafts a sequence of every step."""
    draw, seqs = random.Random(seed), [decoding() for _ in range(count)]
    seconds = tokens = 0.0
    widths = []
    for step in range(steps):
        p = acceptance(step) if callable(acceptance) else acceptance
        said = p if told is None else told
        most = policy.choose(spans_of(*seqs), ANYTHING)
        drafts, chances, cost = [0] * count, [1.0] * count, 0.0
        rows = [i for i in range(count) if most[i]]
        for seq, n in zip(seqs, most):
            seq.idle_steps = 0 if n else seq.idle_steps + 1
            seq.confidence = []
        drafting = list(rows)
        made = 0
        while rows:
            cost += policy.block(len(rows))
            made += 1
            for i in rows:
                drafts[i] += 1
                seqs[i].confidence.append(said)
                chances[i] *= policy.chance(said)
            further = policy.go_on(made, [chances[i] for i in rows])
            rows = [i for i, go in zip(rows, further) if go and drafts[i] < most[i]]
        for i in drafting:
            learning = seqs[i].retrying and drafts[i] == 1
            drafts[i] -= not learning and not policy.keep_last(drafts[i], chances[i])
        new = 0
        for i, (seq, n) in enumerate(zip(seqs, drafts)):
            kept = next((k for k in range(n) if draw.random() >= p), n)
            if i in drafting:  # one whose only draft was dropped again has learnt something too
                policy.observe(seq, n, kept)
            new += 1 + kept
        reading = (truth or policy.verify)(count + sum(drafts))
        policy.stepped(count + sum(drafts) if truth else 0, new, reading, cost + reading)
        cost += reading
        seconds, tokens = seconds + cost, tokens + new
        widths.append(sum(drafts) / count)
    return tokens / seconds, widths


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------------- step times


def test_step_times_are_lines_between_points_and_beyond():
    times = StepTimes([(1, 1.0), (3, 2.0), (7, 4.0)])
    assert [times(rows) for rows in (1, 2, 3, 5, 7, 9)] == [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
    assert times(0.5) <= 1.0 and StepTimes([(1, 0.5)])(99) == 0.5


def test_more_rows_never_take_less_time():
    times = StepTimes([(1, 1.0), (2, 0.8), (4, 1.5), (8, 1.4)])
    assert [times(rows) for rows in (1, 2, 3, 4, 8, 16)] == [1.0, 1.0, 1.25, 1.5, 1.5, 1.5]


def test_step_times_follow_what_is_seen_near_a_point():
    times = StepTimes([(1, 1.0), (4, 2.0), (32, 8.0)])
    for _ in range(200):
        times.learn(4, 1.5)
    assert times(4) == pytest.approx(1.5) and times(1) == 1.0 and times(32) == pytest.approx(6.0)  # in proportion
    times.learn(12, 100.0)  # near no point
    assert times(4) == pytest.approx(1.5) and times(32) == pytest.approx(6.0)
    times.learn(32, 800.0)  # a busy moment hardly counts
    assert 8.0 < times(32) < 60
    for _ in range(200):
        times.learn(32, 10.0)
    assert times(32) == pytest.approx(10.0, rel=0.01)


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("adaptive", [False, True])
def test_who_may_draft(adaptive):
    policy = policy_for(3) if adaptive else DraftPolicy(3, adaptive=False)
    reading, first, over = decoding(), decoding(new=0), decoding()
    reading.tokens = [1] * 5
    over.finish_reason = "stop"
    assert policy.choose(spans_of(decoding(), reading, first, over, decoding()), ANYTHING) == [3, 0, 0, 0, 3]
    assert policy.choose([], ANYTHING) == []


@pytest.mark.parametrize("left", range(1, 7))
def test_never_beyond_max_tokens(left):
    """With k drafts a step makes up to k + 1 tokens."""
    policy = DraftPolicy(4, adaptive=False)
    assert policy.choose(spans_of(decoding(max_tokens=10 + left, new=10)), ANYTHING) == [min(4, left - 1)]


@pytest.mark.parametrize("room", range(6))
def test_never_beyond_the_blocks_there_are(room):
    policy, seq, asked = DraftPolicy(4, adaptive=False), decoding(new=10), []

    def has_room(of, positions):
        asked.append(positions)
        assert of is seq
        return positions <= seq.computed + 2 + room

    assert policy.choose(spans_of(seq), has_room) == [min(room, 4)]
    assert asked == [seq.computed + 2 + k for k in range(4, max(min(room, 4), 1) - 1, -1)]


def test_a_fixed_number_is_drafted_whatever_comes_of_it():
    policy = DraftPolicy(2, adaptive=False)
    policy.verify = line(1.0, 9.0)
    _, widths = simulate(policy, 0.0, 50)
    assert widths == [2] * 50


# --------------------------------------------------------------------------------------------------------- adaptation


def test_drafts_that_are_refused_are_no_longer_made():
    policy = policy_for()
    rate, widths = simulate(policy, 0.0, 600)
    assert mean(widths[200:]) < 0.1 and rate > 0.95


def test_drafts_that_cost_more_than_they_bring_are_not_made():
    policy = policy_for(row=1.5, block=0.5)
    _, widths = simulate(policy, 0.9, 600)
    assert mean(widths[200:]) < 0.1


def test_good_cheap_drafts_are_made_as_many_as_may_be():
    policy = policy_for(row=0.02, block=0.02)
    _, widths = simulate(policy, 0.95, 300)
    assert mean(widths[100:]) > 3.9


def test_the_likelier_the_more():
    widths = [mean(simulate(policy_for(), a, 500)[1][100:]) for a in (0.1, 0.4, 0.7, 0.95)]
    assert widths == sorted(widths) and widths[0] < 0.3 and widths[-1] > 2.5


def test_under_load_fewer():
    """Rows are free until the machine is full; then each draft is at the cost of somebody's token."""
    full = [(1, 1.0), (8, 1.05), (16, 2.0), (32, 4.0), (64, 8.0), (128, 16.0)]
    widths = []
    for count in (1, 4, 32):
        policy = policy_for()
        policy.verify = StepTimes(full)
        widths.append(mean(simulate(policy, 0.6, 300, count=count)[1][100:]))
    assert widths[0] > widths[1] > widths[2] and widths[0] > 1.5 and widths[2] < 0.2


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8, 0.95])
def test_nearly_as_fast_as_the_best_fixed_number(acceptance):
    """Over many sequences of 200 steps, lucky and unlucky ones."""

    def fixed(k):
        tokens = sum(acceptance**i for i in range(k + 1))
        return tokens / (1.0 + 0.1 * k + 0.1 * k)

    policy = policy_for()
    simulate(policy, acceptance, 100)
    rates = [simulate(policy, acceptance, 200, seed=seed)[0] for seed in range(1, 16)]
    best = max(fixed(k) for k in range(5))
    assert mean(rates) > 0.9 * best and min(rates) > 0.75 * best


def test_drafting_is_tried_again():
    """Text that was hard becomes easy: a sequence that drafts nothing looks again after a while."""
    policy = policy_for()
    _, widths = simulate(policy, lambda step: 0.0 if step < 400 else 0.95, 1200)
    tries = [i for i, width in enumerate(widths) if width and 200 <= i < 400]
    assert len(tries) <= 400 // PATIENCE[0] + Switch.TRY
    assert mean(widths[900:]) > 2.0


def test_a_block_that_promises_too_much_is_found_out():
    policy = policy_for()
    assert policy.chance(0.95) > 0.8
    simulate(policy, 0.1, 2000, told=0.95)
    assert policy.chance(0.95) < 0.3 and policy.chance(0.5) == pytest.approx(0.55)
    assert all(0 < policy.chance(c) < 1 for c in (0.0, 0.3, 1.0))


def test_a_busy_moment_when_the_engine_started_is_forgotten():
    policy, truth = policy_for(row=0.4, block=0.05, block_row=0.0), line(1.0, 0.4)
    policy.verify = StepTimes([(rows, 2 * truth(rows)) for rows in truth.rows])
    _, widths = simulate(policy, 0.9, 2000, truth=truth)
    assert mean(widths[1500:]) > 0.9


def test_nothing_measured_nothing_decided():
    policy = DraftPolicy(2, adaptive=True)
    assert policy.choose(spans_of(decoding()), ANYTHING) == [2] and policy.go_on(1, [0.1, 0.9]) == [True, True]


# ---------------------------------------------------------------------------------------------------------- exactness


def test_what_is_drafted_when_does_not_change_the_distribution():
    """Without a seed, tokens are distributed as the model says also where unlikely drafts are not worth their rows."""
    model = tiny_model(tiny_config("M*", "*", vocab_size=6), dtype=torch.float64)
    options = EngineOptions(
        "", speculative=True, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=16, prefix_caching=False
    )
    engine = Engine(model, options)
    policy = engine.policy
    policy.most, policy.verify, policy.block, policy.token_seconds = 1, line(0.3, 0.3), line(0.0, 0.0), 1.0
    policy.stepped = policy.verify.learn = policy.block.learn = lambda *measured: None
    for i in range(1500):
        engine.add(Request(str(i), [1, 2, 3], Sampling(temperature=1.0), max_tokens=3))
    tokens, n = collections.defaultdict(list), 0
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.tokens
    assert engine.stats().draft_tokens > 0
    pairs, statistic = collections.Counter(tuple(new[:2]) for new in tokens.values()), 0.0
    for first in range(6):
        with torch.inference_mode():
            p_V = model(torch.tensor([[1, 2, 3, first]])).logits[0, -1].softmax(-1).tolist()
        count = sum(pairs[first, second] for second in range(6))
        statistic += sum((pairs[first, b] - count * p) ** 2 / (count * p) for b, p in enumerate(p_V))
        n += 5
    assert (statistic - n) / (2 * n) ** 0.5 < 5
