"""Blocks, slots and snapshots: nothing is lost, nothing is held twice, and what a snapshot holds nobody overwrites."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nemo_lite_serving.blocks import Blocks

# Few tokens, so that prompts share prefixes and part again.
texts = st.lists(st.integers(0, 1), min_size=1, max_size=13)


class Running:
    """What a scheduler knows of a sequence: its tokens, blocks and slot."""

    def __init__(self, tokens, chain):
        self.tokens, self.chain = tokens, chain
        self.blocks, self.slot = [], None


class Machine(RuleBasedStateMachine):
    """Sequences come, grow, leave snapshots and end, as the scheduler lets them. `places` stands for keys and values,
    `states` for the Mamba states: a snapshot's must say its tokens for as long as it lives."""

    @initialize(size=st.sampled_from([1, 2, 4]), num_blocks=st.integers(4, 12), num_slots=st.integers(1, 5))
    def start(self, size, num_blocks, num_slots):
        self.blocks = Blocks(num_blocks, size, num_slots)
        self.places = [[None] * size for _ in range(num_blocks)]
        self.states = [None] * num_slots
        self.running = []

    def alive(self):
        return {self.tokens_of(s): s for s in self.blocks.snapshots.values()}

    def tokens_of(self, snapshot):
        size = self.blocks.block_size
        return tuple(self.places[snapshot.blocks[p // size]][p % size] for p in range(snapshot.length))

    def write(self, seq, start):
        for position in range(start, len(seq.tokens)):
            block = seq.blocks[position // self.blocks.block_size]
            self.places[block][position % self.blocks.block_size] = seq.tokens[position]
        self.states[seq.slot] = tuple(seq.tokens)

    @rule(tokens=texts)
    def admit(self, tokens):
        blocks, size = self.blocks, self.blocks.block_size
        seq = Running(tokens, blocks.digests(tokens))
        longest = max((n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in self.alive()), default=0)
        found = blocks.find(tokens, seq.chain)
        assert (found.length if found is not None else 0) == longest
        if found is not None:
            assert next(reversed(blocks.snapshots.values())) is found  # the most recently used
            found.pinned = True
        whole = longest // size
        seq.blocks = blocks.share(found.blocks[:whole]) if found is not None else []
        seq.slot = blocks.take_slot()
        more = blocks.take_blocks(blocks.blocks_for(len(tokens)) - whole) if seq.slot is not None else None
        if found is not None:
            found.pinned = False
        if more is None:
            blocks.release_blocks(seq.blocks)
            if seq.slot is not None:
                blocks.release_slot(seq.slot)
            return
        seq.blocks += more
        if found is not None:
            assert self.states[found.slot] == tuple(tokens[:longest])  # pinned: still there
            if longest % size:
                self.places[seq.blocks[whole]] = list(self.places[found.blocks[whole]])
        self.write(seq, longest)
        self.running.append(seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), new=texts)
    def grow(self, data, new):
        seq, blocks = data.draw(st.sampled_from(self.running)), self.blocks
        missing = blocks.blocks_for(len(seq.tokens) + len(new)) - len(seq.blocks)
        taken = blocks.take_blocks(missing)
        if taken is None:
            assert len(blocks.free_blocks) < missing
            return
        assert len(taken) == max(missing, 0) and all(blocks.references[block] == 1 for block in taken)
        before = len(seq.tokens)
        seq.blocks += taken
        seq.tokens = [*seq.tokens, *new]
        blocks.digests(seq.tokens, seq.chain)
        assert seq.chain == blocks.digests(seq.tokens)
        self.write(seq, before)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def keep(self, data):
        """A snapshot somewhere inside a sequence that goes on."""
        seq, blocks = data.draw(st.sampled_from(self.running)), self.blocks
        length = data.draw(st.integers(1, len(seq.tokens)))
        slot = blocks.take_slot()
        if slot is None:
            return
        self.states[slot] = tuple(seq.tokens[:length])
        there = tuple(seq.tokens[:length]) in self.alive()
        kept = blocks.keep(seq.tokens, length, seq.chain, seq.blocks, slot, length - 1, None)
        assert kept == (not there)
        if not kept:
            blocks.release_slot(slot)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data, keep):
        seq, blocks = data.draw(st.sampled_from(self.running)), self.blocks
        self.running.remove(seq)
        if keep:
            length = len(seq.tokens)
            if blocks.keep(seq.tokens, length, seq.chain, seq.blocks, seq.slot, length - 1, None):
                seq.slot = None
        blocks.release_blocks(seq.blocks)
        if seq.slot is not None:
            blocks.release_slot(seq.slot)

    @rule()
    def clear(self):
        self.blocks.clear()
        assert not self.blocks.snapshots

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "blocks"):
            return
        self.blocks.check([(seq.blocks, seq.slot) for seq in self.running])
        size = self.blocks.block_size
        for seq in self.running:
            held = [self.places[block][i] for block in seq.blocks for i in range(size)]
            assert held[: len(seq.tokens)] == seq.tokens and self.states[seq.slot] == tuple(seq.tokens)
        for snapshot in self.blocks.snapshots.values():
            tokens = self.tokens_of(snapshot)
            chain = self.blocks.digests(tokens)
            assert snapshot.prefix == (chain[-1] if chain else b"")
            assert snapshot.tail == tokens[len(chain) * size :] and self.states[snapshot.slot] == tokens
            assert not snapshot.pinned


TestBlocks = Machine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# ------------------------------------------------------------------------------------------------------- one at a time


def snapshot_of(blocks, tokens, others=()):
    """A snapshot of a sequence that has ended; its blocks are its own."""
    length = len(tokens)
    held = blocks.take_blocks(blocks.blocks_for(length))
    slot = blocks.take_slot() if blocks.stateful else None
    assert blocks.keep(tokens, length, blocks.digests(tokens), held, slot, length - 1, None)
    blocks.release_blocks(held)
    blocks.check(others)


def found(blocks, tokens):
    snapshot = blocks.find(tokens, blocks.digests(tokens))
    return 0 if snapshot is None else snapshot.length


def test_the_longest_prefix_is_found():
    blocks = Blocks(32, 4, 8)
    text = list(range(20))
    for length in (3, 4, 6, 7, 12):
        snapshot_of(blocks, text[:length])
    wanted = {2: 0, 3: 3, 4: 4, 5: 4, 6: 6, 7: 7, 8: 7, 11: 7, 12: 12, 20: 12}
    assert {n: found(blocks, text[:n]) for n in wanted} == wanted
    assert found(blocks, [*text[:5], 99, *text[6:]]) == 4  # a tail that is another's does not count
    assert found(blocks, [99, *text]) == 0
    assert found(blocks, [*text[:4], *text[:4]]) == 4  # the same tokens in another place are not the same block


def test_no_snapshot_of_nothing_and_none_without_a_cache():
    blocks = Blocks(4, 4, 2)
    assert not blocks.keep([1, 2], 0, [], [], None, 0, None)
    off = Blocks(4, 4, 2, caching=False)
    held = off.take_blocks(1)
    assert not off.keep([1, 2], 2, [], held, off.take_slot(), 1, None) and not off.snapshots


def test_a_digest_tells_apart_what_differs_anywhere():
    blocks = Blocks(1, 2, 1)
    chains = [blocks.digests(t) for t in ([1, 2, 3, 4], [1, 2, 3, 5], [2, 1, 3, 4], [1, 2], [0, 0], [0, 1])]
    assert [len(chain) for chain in chains] == [2, 2, 2, 1, 1, 1]
    assert chains[0][0] == chains[1][0] == chains[3][0]
    assert len({digest for chain in chains for digest in chain}) == 7
    assert blocks.digests([1 << 40, -1]) and blocks.digests([7]) == []


def test_where_prompts_part():
    blocks = Blocks(1, 4, 1)
    first = blocks.digests([1] * 14)
    assert blocks.parting(first) == 0
    assert blocks.parting(first) == 12
    assert blocks.parting(blocks.digests([1] * 9 + [2] * 9)) == 8
    assert blocks.parting(blocks.digests([1] * 9 + [2] * 7 + [3] * 9)) == 16
    assert blocks.parting(blocks.digests([3] * 9)) == 0 and blocks.parting([]) == 0
    blocks.SEEN = 3
    for token in range(10, 14):
        blocks.parting(blocks.digests([token] * 4))
    assert len(blocks._seen) == 3 and blocks.parting(first) == 0


def test_the_least_recently_used_goes_first():
    blocks = Blocks(8, 4, 8)
    for i in range(8):
        snapshot_of(blocks, [i] * 4)
    assert found(blocks, [0] * 5) == 4  # used again
    assert blocks.has(blocks.digests([2] * 4)[0], ())
    taken = blocks.take_blocks(3)
    assert taken is not None and len(taken) == 3 and blocks.evictions == 3
    alive = [i for i in range(8) if found(blocks, [i] * 4)]
    assert alive == [0, 2, 5, 6, 7]
    blocks.check([(taken, None)])


def test_a_slot_is_taken_from_the_oldest_snapshot_that_has_one():
    blocks = Blocks(8, 4, 2)
    for i in range(2):
        snapshot_of(blocks, [i] * 4)
    slot = blocks.take_slot()
    assert slot is not None and [found(blocks, [i] * 4) for i in range(2)] == [0, 4]
    other = blocks.take_slot()
    assert other is not None and other != slot and blocks.take_slot() is None
    blocks.check([([], slot), ([], other)])


def test_what_is_pinned_stays():
    blocks = Blocks(2, 4, 2)
    for i in range(2):
        snapshot_of(blocks, [i] * 4)
    pinned = blocks.find([0] * 4, blocks.digests([0] * 4))
    pinned.pinned = True
    assert len(blocks.take_blocks(1)) == 1 and blocks.take_blocks(1) is None
    assert list(blocks.snapshots.values()) == [pinned]
    pinned.pinned = False
    assert len(blocks.take_blocks(1)) == 1 and not blocks.snapshots


def test_snapshots_without_states_need_no_slot():
    blocks = Blocks(4, 4, 1, stateful=False)
    for i in range(3):
        snapshot_of(blocks, [i] * 4)
    slot = blocks.take_slot()
    assert slot is not None and len(blocks.snapshots) == 3 and blocks.take_slot() is None  # nothing to evict for one


def test_a_lookup_that_an_evicted_snapshot_would_have_served_is_regretted_once():
    blocks = Blocks(2, 4, 2)
    snapshot_of(blocks, [1] * 4)
    blocks.release_blocks(blocks.take_blocks(2))
    assert blocks.evictions == 1 and blocks.regretted == 0
    assert found(blocks, [2] * 8) == 0 and blocks.regretted == 0
    assert found(blocks, [1] * 8) == 0 and blocks.regretted == 1
    assert found(blocks, [1] * 8) == 0 and blocks.regretted == 1


def test_nothing_is_taken_when_not_all_can_be():
    blocks = Blocks(4, 4, 1)
    held = blocks.take_blocks(3)
    assert blocks.take_blocks(2) is None and len(blocks.free_blocks) == 1 and blocks.take_blocks(0) == []
    blocks.check([(held, None)])


def test_memory_that_cannot_be_had_costs_no_snapshot():
    blocks = Blocks(10, 4, 6)
    held = blocks.take_blocks(6)
    for i in range(3):
        snapshot_of(blocks, [i] * 4, others=[(held, None)])
    assert blocks.take_blocks(8) is None
    assert len(blocks.snapshots) == 3


def test_check_finds_what_is_wrong():
    blocks = Blocks(4, 4, 2)
    held, slot = blocks.take_blocks(2), blocks.take_slot()
    blocks.check([(held, slot)])
    for wrong in ([], [(held, None)], [(held[:1], slot)], [(held, slot), (held, None)]):
        with pytest.raises(AssertionError):
            blocks.check(wrong)
