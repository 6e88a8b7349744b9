"""Phases, budgets, caps and cycles of row lengths: what was announced is read, and a run that stops anywhere goes on
with exactly the same rows."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from data.loaders import BYTES, fake_sources, same, take
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lite.config import DataConfig, PhaseConfig, SourceConfig, UserError
from nemo_lite.data import packing
from nemo_lite.data.blend import Blend
from nemo_lite.data.mixture import budget_warnings, expected, mixture_of, refuse_short, table, warnings
from nemo_lite.data.packing import PackedLoader

QUICK = settings(max_examples=60, deadline=None)


def blend(*entries) -> list[SourceConfig]:
    """(name, weight or keys) pairs."""
    return [
        SourceConfig(source=name, **(how if isinstance(how, dict) else {"weight": float(how)})) for name, how in entries
    ]


def loader(data: DataConfig, lengths: dict[str, list[int]], rows=4, rank=0, world_size=1, run_tokens=None):
    """A loader over sources of these document lengths, by name."""
    every = dict(zip(lengths, fake_sources(list(lengths.values())), strict=True))
    named = [every[source.source] for source in packing.unique_sources(data)]
    original, packing._open_all = packing._open_all, lambda *_: named
    try:
        return PackedLoader(
            data, BYTES, seed=1, global_batch_size=rows, rank=rank, world_size=world_size, run_tokens=run_tokens
        )
    finally:
        packing._open_all = original


LENGTHS = {"a": [5, 9, 2, 7] * 6, "b": [3] * 40, "c": [30, 1, 8] * 3}


def config(first, *phases, seq_len=8, **more) -> DataConfig:
    later = [PhaseConfig(tokens=tokens, blend=each) for tokens, each in phases]
    return DataConfig(seq_len=seq_len, blend=first, phases=later, **{"prefetch": 0, **more})


# -------------------------------------------------------------------------------------------------------------- phases


def sources_of(batch) -> set[int]:
    return {span[0] for row in batch.sources for span in row}


def test_phases_begin_at_a_step():
    """32 tokens a step: a phase from token 80 on begins with the step at 96, after the document that was begun."""
    data = config(blend(("a", 1)), (80, blend(("b", 1))), (160, blend(("a", 1), ("c", 2))))
    made = loader(data, LENGTHS)
    found = [sources_of(batch) for batch in take(made, 7)]
    assert found[:3] == [{0}] * 3 and found[3] <= {0, 1} and found[4] == {1} and found[5] <= {0, 1, 2}
    assert sum(each["tokens"] for each in made.realised()) == 7 * 32


def test_a_source_goes_on_over_phases():
    """Nothing is read twice before everything was read once, whoever else is read in between."""
    data = config(blend(("a", 1)), (64, blend(("b", 1))), (96, blend(("b", 1), ("a", 3))))
    rows = [span for batch in take(loader(data, LENGTHS), 6) for row in batch.sources for span in row]
    begun = [document for source, document, start, _ in rows if source == 0 and start == 0]
    assert len(begun) > 15 and len(set(begun)) == len(begun)


entry = st.tuples(st.sampled_from("abc"), st.floats(0.2, 5), st.sampled_from([None, 1, 2, 50]))
weighted = st.lists(entry, min_size=1, max_size=3, unique_by=lambda found: found[0])


@QUICK
@given(
    blends=st.lists(weighted, min_size=1, max_size=4), gaps=st.lists(st.integers(1, 200), min_size=3, max_size=3),
    cycle=st.sampled_from([[], [8, 4], [4, 8, 2]]), before=st.integers(0, 9), prefetch=st.sampled_from([0, 2]),
)  # fmt: skip
def test_resume_across_phases_caps_and_cycles(blends, gaps, cycle, before, prefetch):
    """Stopping after any step and going on, on another number of ranks, gives the same rows to the last token."""
    made = [
        [SourceConfig(source=n, weight=w, max_epochs=cap) for n, w, cap in entries]
        + [SourceConfig(source="c", weight=0.1, text_key="endless")]
        for entries in blends
    ]
    starts = np.cumsum(gaps).tolist()
    data = config(made[0], *zip(starts, made[1:], strict=False), seq_len_cycle=cycle, prefetch=prefetch)
    with loader(data, LENGTHS) as one:
        take(one, before)
        state = json.loads(json.dumps(one.state_dict()))
        rest = take(one, 12)
        end = one.state_dict()
    with loader(data, LENGTHS) as two:
        take(two, 3)
        two.load_state_dict(state)
        assert two.state_dict() == state
        assert same(take(two, 12), rest) and two.state_dict() == end
    ranks = [loader(data, LENGTHS, rank=rank, world_size=2) for rank in range(2)]
    for each in ranks:
        each.load_state_dict(state)
    for expected_batch in rest:
        parts = [next(each) for each in ranks]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), expected_batch.input_ids)
    for each in ranks:
        each.close()


def test_phases_to_come_may_change():
    first, second = blend(("a", 1), ("b", 1)), blend(("b", 2), ("c", 1))
    made = loader(config(first, (64, second)), LENGTHS)
    state = made.state_dict()
    take(made, 2)
    early = made.state_dict()  # the phase at 64 is next
    take(made, 1)
    late = made.state_dict()
    loader(config(first), LENGTHS).load_state_dict(early)
    loader(config(first, (64, blend(("c", 1)))), LENGTHS).load_state_dict(early)
    longer = loader(config(first, (64, second), (128, blend(("c", 1)))), LENGTHS)
    longer.load_state_dict(late)
    assert same(take(longer, 1), take(made, 1))
    changes = [
        ([], r"data\.phases tokens: the run was saved with \[0, 64\]"),
        ([(96, second)], r"data\.phases tokens"),
        ([(64, blend(("b", 1), ("c", 1)))], r"data\.blend weights"),
        ([(64, blend(("b", 2), ("c", {"max_epochs": 3})))], r"data\.blend max_epochs"),
        ([(32, second), (64, second)], r"data\.phases tokens"),
    ]
    for changed, message in changes:
        with pytest.raises(UserError, match=message):
            loader(config(first, *changed), LENGTHS).load_state_dict(late)
    with pytest.raises(UserError, match=r"data\.seq_len_cycle: the run was saved with \[\]"):
        loader(config(first, (64, second), seq_len_cycle=[4]), LENGTHS).load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------- caps


def test_a_cap_ends_a_source():
    """Each of its documents so many times, then never again; the others go on by their weights."""
    data = config(blend(("a", {"max_epochs": 2, "weight": 4}), ("b", 1), ("c", 2)))
    made = loader(data, LENGTHS)
    rows = [span for batch in take(made, 60) for row in batch.sources for span in row]
    begun = [document for source, document, start, _ in rows if source == 0 and start == 0]
    assert sorted(begun) == sorted([*range(24), *range(24)])
    assert made.realised()[0] == {"source": "fake0", "tokens": 276, "epochs": 2.0}
    after = next(i for i in reversed(range(len(rows))) if rows[i][0] == 0)
    counts = [sum(stop - start for s, _, start, stop in rows[after + 1 :] if s == number) for number in (1, 2)]
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.1)


def test_caps_that_leave_nothing_are_refused_before_the_run():
    data = config(blend(("a", {"max_epochs": 2}), ("b", {"max_epochs": 1})))
    planned = expected(mixture_of(data), [138, 120], 1000)
    with pytest.raises(UserError, match="max_epochs leaves 396 of the 1,000 tokens that are to be read"):
        refuse_short(planned)
    refuse_short(expected(mixture_of(data), [138, 120], 396))
    refuse_short(expected(mixture_of(data), [138, None], 1000))  # not known yet
    made = loader(data, LENGTHS)
    take(made, 12)
    with pytest.raises(UserError, match="every source has reached its max_epochs"):
        next(made)


@QUICK
@given(
    blends=st.lists(weighted, min_size=1, max_size=3), gaps=st.lists(st.integers(300, 900), min_size=2, max_size=2),
)  # fmt: skip
def test_what_was_announced_is_read(blends, gaps):
    """Tokens of every source, over phases and caps: as expected, up to a document a source and phase."""
    made = [[SourceConfig(source=n, weight=w, max_epochs=cap) for n, w, cap in entries] for entries in blends]
    for each in made:
        each.append(SourceConfig(source="b", weight=0.5, text_key="endless"))
    lengths = {name: each * 3 for name, each in LENGTHS.items()}
    starts = [8 * int(n) for n in np.cumsum(gaps) // 8]
    data = config(made[0], *zip(starts, made[1:], strict=False), seq_len=8)
    run_tokens = 8 * (sum(gaps) // 8 + 60)
    one = loader(data, lengths, rows=1, run_tokens=run_tokens)
    holds = one.tokens_per_epoch
    planned = expected(one.mixture, holds, run_tokens)
    assert sum(share.tokens for phase in planned for share in phase.shares) == pytest.approx(run_tokens)
    take(one, run_tokens // 8)
    numbers = [source.source + source.text_key for source in one.mixture.sources]
    announced = np.zeros(len(numbers))
    for phase, spec in zip(planned, one.mixture.phases, strict=True):
        for share, number in zip(phase.shares, np.flatnonzero(spec.weights), strict=True):
            announced[number] += share.tokens
    read = np.array([each["tokens"] for each in one.realised()])
    assert np.all(np.abs(read - announced) <= 30 * len(numbers) * len(planned) + 1)


def test_warnings_have_the_numbers():
    data = config(blend(("a", {"max_epochs": 2}), ("b", 1)), (400, blend(("b", 1))), (5000, blend(("c", 1))))
    planned = expected(mixture_of(data), [50, 1000, None], 1000)
    found = warnings(planned)
    assert found == [
        "data.blend: a would be read 4.00 times in 400 tokens and is capped at max_epochs = 2: from token 200 of the "
        "run on the others share its part",
        "data.phases[1] never begins: the run ends before",
    ]
    assert [share.tokens for share in planned[0].shares] == [100, 300]
    assert [share.epochs for share in planned[1].shares] == [0.9]
    rows = table(planned)
    assert rows[1] == ["0", "a", "50.0%", "100", "50", "2.00", "2"]
    assert rows[-1] == ["5,000", "c", "100.0%", "0", "unknown", "", ""]
    large = expected(mixture_of(config(blend(("a", 1)))), [25_000_000], 3_000_000_000_000)
    assert table(large)[1] == ["0", "a", "100.0%", "3 T", "25 M", "120000.00", ""]


def test_caps_reset_no_counts():
    """A cap counts passes since the start of the run, over phases."""
    made = Blend([np.full(4, 5), np.full(50, 5)], [1, 0], seed=0)
    made.take(30)  # one and a half epochs of the first
    made.reweigh([1, 1], [2, None])
    spans = made.take(100)
    assert int(spans.tokens[spans.source == 0].sum()) == 10
    made.reweigh([1, 1], [1, None])
    assert not np.any(made.take(50).source == 0)


# -------------------------------------------------------------------------------------------------------------- budgets


def test_budgets():
    only = mixture_of(config(blend(("a", {"tokens": 300}), ("b", {"tokens": 100}))))
    assert only.phases[0].weights == [300, 100]
    mixed = config(blend(("a", {"tokens": 300}), ("b", 1), ("c", 3)), (1000, blend(("c", {"tokens": 10}), ("b", 1))))
    found = mixture_of(mixed, 1500)
    assert found.phases[0].weights == [300, 175, 525]
    assert found.phases[1].weights == [0, 490, 10]
    planned = expected(found, [None] * 3, 1500)
    assert [share.tokens for share in planned[0].shares] == pytest.approx([300, 175, 525])
    with pytest.raises(UserError, match="need a run, or a phase, that is longer"):
        mixture_of(mixed)
    made = loader(mixed, LENGTHS, run_tokens=1500)
    take(made, 30)
    assert made.realised()[0]["tokens"] == pytest.approx(300, abs=20)


def test_budgets_that_are_scaled_are_told():
    data = config(blend(("a", {"tokens": 300}), ("b", {"tokens": 100})))
    (found,) = budget_warnings(data, 1000)
    assert found == "data.blend: the budgets are 400 tokens, 1,000 are read: each is scaled by 2.500"
    assert budget_warnings(data, 400) == []


# --------------------------------------------------------------------------------------------------------------- cycles


def test_cycle_of_row_lengths():
    """Rows of the listed lengths in turn, as many tokens a step, and the same stream as without."""
    plain = loader(config(blend(("a", 1), ("b", 2)), seq_len=16), LENGTHS)
    made = loader(config(blend(("a", 1), ("b", 2)), seq_len=16, seq_len_cycle=[16, 4, 8]), LENGTHS)
    batches = take(made, 6)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(4, 16), (16, 4), (8, 8)] * 2
    for a, b in zip(batches, take(plain, 6), strict=True):
        assert torch.equal(a.input_ids.flatten(), b.input_ids.flatten())
        assert torch.equal(a.labels.flatten(), b.labels.flatten())
    rows = [row for batch in batches for row in batch.rows]
    assert all(b == a + 1 for a, b in pairwise(rows))
    for batch in batches:
        for row, spans in enumerate(batch.sources):
            assert sum(stop - start for *_, start, stop in spans) == batch.input_ids.shape[1]
            assert bool(batch.continued[row]) == (spans[0][2] > 0)
