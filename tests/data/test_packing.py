import dataclasses
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from data.loaders import BYTES, fake_sources, same, take
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.data import blend as blends
from nemo_lite.data import packing
from nemo_lite.data.blend import Blend, shuffled
from nemo_lite.data.packing import PackedLoader, prepare, validation_batches

EOD = 256
QUICK = settings(max_examples=60, deadline=None)

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)
blends_of = st.lists(st.tuples(lengths_of, st.floats(0.1, 10)), min_size=1, max_size=3)


def make(lengths, weights=None, *, seq_len=8, rows=4, seed=0, fakes=None, rank=0, world_size=1, **more) -> PackedLoader:
    weights = weights or [1.0] * len(lengths)
    data = DataConfig(
        seq_len=seq_len,
        blend=[SourceConfig(source=f"fake{i}", weight=w) for i, w in enumerate(weights)],
        **{"prefetch": 0, **more},
    )
    fakes = fakes or fake_sources(lengths)
    original, packing._open_all = packing._open_all, lambda *_: fakes
    try:
        return PackedLoader(data, BYTES, seed=seed, global_batch_size=rows, rank=rank, world_size=world_size)
    finally:
        packing._open_all = original


# --------------------------------------------------------------------------------------------------------- the blend


@QUICK
@given(blend=blends_of, takes=st.lists(st.integers(1, 90), min_size=1, max_size=8), lookahead=st.integers(1, 30))
def test_blend_is_a_stream_of_whole_documents(blend, takes, lookahead):
    """Pieces join to documents; each epoch of a source holds each of its documents once; any look-ahead is the same."""
    lengths, weights = [np.array(each) for each, _ in blend], [weight for _, weight in blend]

    def stream(ahead, amounts):
        old, blends.LOOKAHEAD = blends.LOOKAHEAD, ahead
        try:
            made = Blend(lengths, weights, seed=5)
            return [made.take(amount) for amount in amounts]
        finally:
            blends.LOOKAHEAD = old

    pieces = stream(lookahead, takes)
    assert [int(each.tokens.sum()) for each in pieces] == takes
    whole = stream(4096, [sum(takes)])[0]
    joined = []
    for piece in pieces:
        for s, d, a, b, n in zip(*(array.tolist() for array in vars(piece).values()), strict=True):
            assert 0 <= a < b <= n == lengths[s][d]
            if a:
                assert joined[-1] == [s, d, 0, a, n]
                joined[-1][3] = b
            else:
                assert not joined or joined[-1][3] == joined[-1][4]
                joined.append([s, d, a, b, n])
    assert joined == np.stack(list(vars(whole).values())).T.tolist()
    for number, each in enumerate(lengths):
        order = [d for s, d, *_ in joined if s == number]
        for start in range(0, len(order), len(each)):
            epoch = order[start : start + len(each)]
            expected = shuffled(len(each), 5, number, start // len(each))
            assert epoch == expected[: len(epoch)].tolist()


@QUICK
@given(blend=blends_of)
def test_blend_follows_its_weights_at_every_document(blend):
    lengths, weights = [np.array(each) for each, _ in blend], np.array([weight for _, weight in blend])
    spans = Blend(lengths, weights.tolist(), seed=1).take(3000)
    drawn, share, longest = np.zeros(len(weights)), weights / weights.sum(), max(int(each.max()) for each in lengths)
    for source, count in zip(spans.source, spans.tokens, strict=True):
        drawn[source] += count
        assert np.all(np.abs(drawn - share * drawn.sum()) <= longest * max(1, len(weights) - 1) + 1e-6)


def test_blend_shares():
    spans = Blend([np.full(50, 7), np.full(3, 100), np.full(9, 1)], [5, 3, 2]).take(100_000)
    shares = np.bincount(spans.source, spans.tokens) / 100_000
    assert np.allclose(shares, [0.5, 0.3, 0.2], atol=2e-3)


def test_shuffle_is_frozen():
    """The order is part of every checkpoint: these numbers must never change."""
    assert shuffled(10, 0, 0, 0).tolist() == FROZEN
    assert sorted(shuffled(1000, 1, 2, 3)) == list(range(1000))
    orders = {tuple(shuffled(50, *key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(orders) == 4


FROZEN = [2, 6, 3, 7, 1, 0, 8, 9, 4, 5]


@QUICK
@given(blend=blends_of, first=st.integers(1, 300), second=st.integers(1, 300))
def test_blend_resumes(blend, first, second):
    lengths, weights = [np.array(each) for each, _ in blend], [weight for _, weight in blend]
    one, two = Blend(lengths, weights, seed=3), Blend(lengths, weights, seed=3)
    one.take(first)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    a, b = one.take(second), two.take(second)
    assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert two.state_dict() == one.state_dict()


# -------------------------------------------------------------------------------------------------------------- rows


@QUICK
@given(blend=blends_of, seq_len=st.integers(2, 17), rows=st.integers(1, 4), eod=st.booleans())
def test_packing(blend, seq_len, rows, eod):
    """Every token once an epoch, in order within its document; ids, labels and marks agree with the spans."""
    lengths, weights = [each for each, _ in blend], [weight for _, weight in blend]
    lengths = [each if sum(each) >= seq_len else [*each, seq_len] for each in lengths]
    fakes = fake_sources(lengths)
    loader = make(lengths, weights, seq_len=seq_len, rows=rows, fakes=fakes, train_on_eod=eod)
    stream, row_number = [], 0
    for batch in take(loader, 5 + 3 * sum(map(sum, lengths)) // (rows * seq_len)):
        assert batch.input_ids.shape == batch.doc_ids.shape == batch.labels.shape == (rows, seq_len)
        assert batch.input_ids.dtype == batch.doc_ids.dtype == batch.labels.dtype == torch.int64
        for row in range(rows):
            assert batch.rows[row] == row_number
            row_number += 1
            ids, docs, labels = [], [], []
            for number, (s, d, a, b) in enumerate(batch.sources[row]):
                base = fakes[s].offsets[d]
                piece = fakes[s].tokens[base + a : base + b].tolist()
                ids += piece
                docs += [number] * len(piece)
                labels += piece
                if b == lengths[s][d] and not eod:
                    labels[-1] = -100
            assert batch.input_ids[row].tolist() == ids
            assert batch.doc_ids[row].tolist() == docs
            assert batch.labels[row].tolist() == labels
            assert bool(batch.continued[row]) == (batch.sources[row][0][2] > 0)
            stream += ids
    for source in fakes:
        own = [token for token in stream if source.tokens[0] <= token <= source.tokens[-1]]
        whole = len(own) // len(source.tokens)
        assert sorted(own[: whole * len(source.tokens)]) == sorted(source.tokens.tolist() * whole)


@QUICK
@given(blend=blends_of, seq_len=st.integers(2, 9), prefetch=st.sampled_from([0, 2]))
def test_world_size_does_not_matter(blend, seq_len, prefetch):
    lengths, weights = [[*each, seq_len] for each, _ in blend], [weight for _, weight in blend]
    whole = take(make(lengths, weights, seq_len=seq_len), 6)
    states = set()
    for world_size in (1, 2, 4):
        loaders = [
            make(lengths, weights, seq_len=seq_len, rank=rank, world_size=world_size, prefetch=prefetch)
            for rank in range(world_size)
        ]
        for expected in whole:
            parts = [next(loader) for loader in loaders]
            for name in ("input_ids", "doc_ids", "labels", "continued"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
            assert [row for part in parts for row in part.rows] == expected.rows
            assert [row for part in parts for row in part.sources] == expected.sources
        states |= {json.dumps(loader.state_dict()) for loader in loaders}
        for loader in loaders:
            loader.close()
    assert len(states) == 1


@QUICK
@given(
    blend=blends_of, seq_len=st.integers(2, 9), before=st.integers(0, 12), prefetch=st.sampled_from([0, 1, 3]),
    other_rows=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_resume(blend, seq_len, before, prefetch, other_rows):
    """Anywhere: within an epoch, within a document, over epochs; with another batch size and world size."""
    lengths, weights = [[*each, seq_len] for each, _ in blend], [weight for _, weight in blend]
    with make(lengths, weights, seq_len=seq_len, prefetch=prefetch) as one:
        take(one, before)
        if prefetch and before:
            time.sleep(0.002)  # let it run ahead: the state must not
        state = json.loads(json.dumps(one.state_dict()))
        rest = take(one, 4)
    with make(lengths, weights, seq_len=seq_len, prefetch=prefetch) as two:
        take(two, 2)
        two.load_state_dict(state)
        assert two.state_dict() == state
        assert same(take(two, 4), rest)
    with make(lengths, weights, seq_len=seq_len, rows=other_rows) as three:
        three.load_state_dict(state)
        ids = torch.cat([batch.input_ids for batch in take(three, 16 // other_rows)])
        assert torch.equal(ids, torch.cat([batch.input_ids for batch in rest]))


def test_state_is_small_and_simple():
    loader = make([[5] * 1000, [9] * 500])
    take(loader, 3)
    assert len(json.dumps(loader.state_dict())) < 8000
    assert loader.tokens_per_epoch == [5000, 4500]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 16}, r"data\.seq_len: the run was saved with 8 and cannot go on with 16"),
        ({"seed": 1}, "seed: the run was saved with 0"),
        ({"shuffle": False}, r"data\.shuffle"),
        ({"weights": [1.0, 2.0]}, r"data\.blend weights"),
        ({"lengths": [[5] * 10, [7] * 9, [3] * 9]}, r"data\.blend weights"),
        ({"lengths": [[5] * 10, [7] * 9]}, r"data\.blend\.1: the tokens of fake1 are not those"),
    ],
)
def test_state_of_another_run_is_refused(change, message):
    lengths = [[5] * 10, [7] * 10]
    state = make(lengths).state_dict()
    with pytest.raises(UserError, match=message):
        make(change.pop("lengths", lengths), **change).load_state_dict(state)
    with pytest.raises(UserError, match="another version"):
        make(lengths).load_state_dict({"format": 99})


def test_state_of_another_tokenizer_is_refused(corpus, tmp_path):
    from nemo_lite.data.tokenizer import train_bpe

    other = train_bpe(["document document"], 300)
    state = PackedLoader(corpus, BYTES, seed=0, global_batch_size=2).state_dict()
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        PackedLoader(corpus, other, seed=0, global_batch_size=2).load_state_dict(state)


def test_microbatches():
    batch = next(make([[5, 3, 9]], rows=5))
    parts = list(batch.split(2))
    assert [len(part.rows) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert [row for part in parts for row in part.sources] == batch.sources


# ------------------------------------------------------------------------------------------------------ the real thing


@pytest.fixture
def corpus(tmp_path) -> DataConfig:
    """120 documents in a folder and 80 in a jsonl."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.txt").write_text(f"document {i} é " * (1 + i % 7))
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} " * (1 + i % 5)}) + "\n" for i in range(80))
    )
    return DataConfig(
        seq_len=32,
        blend=[SourceConfig(source=str(folder), weight=3), SourceConfig(source=str(tmp_path / "b.jsonl"))],
        validation_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def test_batches_from_files(corpus):
    prepare(corpus, BYTES)
    with PackedLoader(corpus, BYTES, seed=0, global_batch_size=4) as loader:
        found = take(loader, 20)
    flat = torch.cat([batch.input_ids for batch in found]).flatten().tolist()
    for text in BYTES.decode(flat).split("<|endoftext|>")[:-1]:
        assert text.startswith(("document ", "line "))
    with PackedLoader(corpus, BYTES, seed=0, global_batch_size=4) as loader:
        assert same(take(loader, 20), found)
    with PackedLoader(corpus, BYTES, seed=1, global_batch_size=4) as loader:
        assert not same(take(loader, 20), found)
    shares = Counter(span[0] for batch in found for row in batch.sources for span in row)
    assert len(shares) == 2


def test_without_shuffle_and_eod(corpus):
    corpus = dataclasses.replace(corpus, shuffle=False, append_eod=False, validation_fraction=0.0)
    with PackedLoader(corpus, BYTES, seed=0, global_batch_size=4) as loader:
        batches = take(loader, 10)
    order = [span[1] for batch in batches for row in batch.sources for span in row if span[0] == 0 and span[2] == 0]
    assert order == sorted(order)
    assert all(int(batch.input_ids.max()) < 256 for batch in batches)


@pytest.mark.parametrize("world_size", [1, 2])
def test_validation(corpus, world_size):
    """All held-out tokens once, in order, then padding; never a training document."""

    def collect(count):
        ranks = [
            validation_batches(corpus, BYTES, rows_per_batch=4, num_batches=count, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        for number, parts in enumerate(zip(*ranks, strict=True)):
            assert number < count
            yield tuple(torch.cat([getattr(p, n) for p in parts]) for n in ("input_ids", "doc_ids", "labels"))

    found = list(collect(1000))
    sources = validation_batches(corpus, BYTES, rows_per_batch=4, num_batches=1, world_size=1).sources
    ids, docs, labels = (torch.cat(each).flatten() for each in zip(*found, strict=True))
    real = docs >= 0
    total = sum(source.num_tokens for source in sources)
    assert int(real.sum()) == total and bool(real[:total].all())
    assert torch.equal(labels[real], ids[real]) and bool((labels[~real] == -100).all())
    assert len(ids) - total < 4 * 32
    held = sorted(BYTES.decode(ids[real].tolist()).split("<|endoftext|>")[:-1])
    expected = sorted(
        BYTES.decode(source.tokens[a : b - 1]) for source in sources for a, b in zip(source.offsets, source.offsets[1:])
    )
    assert held == expected
    assert BYTES.num_bytes(labels[real]) == sum(len(text.encode()) for text in held)
    again = list(collect(2))
    assert len(again) == 2
    assert all(torch.equal(a, b) for x, y in zip(again, found) for a, b in zip(x, y, strict=True))


def test_validation_can_be_iterated_again(corpus):
    batches = validation_batches(corpus, BYTES, rows_per_batch=2, num_batches=3)
    assert same(list(batches), list(batches)) and len(batches) == 3


def test_prefetch_thread_ends(corpus):
    before = threading.active_count()
    loader = PackedLoader(corpus, BYTES, seed=0, global_batch_size=4)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_thread_reach_the_caller(prefetch, monkeypatch):
    expected = take(make([[5, 3, 9]]), 4)
    loader = make([[5, 3, 9]], prefetch=prefetch)
    original, calls = loader._make, []

    def broken():
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk gone")
        return original()

    monkeypatch.setattr(loader, "_make", broken)
    found = take(loader, 2)
    with pytest.raises(OSError, match="disk gone"):
        next(loader)
    found += take(loader, 2)  # going on loses nothing
    assert same(found, expected)
    loader.close()


def test_bad_input(corpus, tmp_path):
    with pytest.raises(UserError, match=r"data\.blend\.0: .* has \d+ tokens in its train split, .*seq_len = 100000"):
        PackedLoader(dataclasses.replace(corpus, seq_len=100_000), BYTES, seed=0, global_batch_size=1)
    with pytest.raises(UserError, match="5 rows cannot be shared equally by 2 ranks"):
        PackedLoader(corpus, BYTES, seed=0, global_batch_size=5, world_size=2)
    with pytest.raises(UserError, match="rank 2 is not one of 2"):
        PackedLoader(corpus, BYTES, seed=0, global_batch_size=4, rank=2, world_size=2)
    with pytest.raises(UserError, match="names no source"):
        PackedLoader(dataclasses.replace(corpus, blend=[]), BYTES, seed=0, global_batch_size=4)
    with pytest.raises(UserError, match="leaves no document of"):
        validation_batches(dataclasses.replace(corpus, validation_fraction=0.0), BYTES, rows_per_batch=2, num_batches=1)
