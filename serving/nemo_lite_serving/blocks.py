"""Which memory belongs to whom: KV blocks, Mamba state slots, and the prefix cache that shares both.

A sequence holds one slot (its convolution windows and SSM states) and as many blocks of `block_size` positions as it
has positions. Keys and values of a prefix can be shared block by block, but a recurrent state exists only where
somebody kept it. So the unit of the prefix cache is a *snapshot*: a slot with the states after its first n tokens, the
blocks that hold these tokens, and the trunk output at the boundary (the next token's logits, and what the MTP block
reads next). A prompt that begins with a snapshot's tokens continues from there; full blocks are shared, a last block
that is only partly the prefix's is copied. Snapshots go, least recently used first, when a sequence needs the memory.

Where to keep one follows Marconi (arXiv 2411.19379): at the end of a prompt and of an answer, at the last whole block
before the prompt's end, and where a prompt parts from one seen before.

Plain bookkeeping, no tensors but the opaque boundary outputs.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Snapshot:
    """State after the first `length` tokens. `mtp_length` of them the MTP block has read; `hidden` [n, H] are the trunk
    outputs of the positions it has not."""

    prefix: bytes  # digest of the whole blocks
    tail: tuple[int, ...]  # the tokens behind them
    length: int
    blocks: list[int]
    slot: int | None
    mtp_length: int
    hidden: Any
    pinned: bool = False  # being copied from


class Blocks:
    """The one owner of blocks and slots. `stateful`: the model has Mamba layers, so a snapshot needs a slot."""

    SEEN = 1 << 16  # digests of prompt blocks remembered to find where prompts part

    def __init__(
        self, num_blocks: int, block_size: int, num_slots: int, *, caching: bool = True, stateful: bool = True
    ):
        self.num_blocks, self.block_size, self.num_slots = num_blocks, block_size, num_slots
        self.caching, self.stateful = caching, stateful
        # Heaps: the lowest free number first keeps neighbours together, so that views can replace gathers.
        self.free_blocks, self.free_slots = list(range(num_blocks)), list(range(num_slots))
        self.references = [0] * num_blocks
        self.snapshots: OrderedDict[tuple[bytes, tuple[int, ...]], Snapshot] = OrderedDict()
        self._by_prefix: dict[bytes, list[Snapshot]] = {}
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._lost: OrderedDict[bytes, None] = OrderedDict()  # prefixes of evicted snapshots
        self.evictions = 0
        self.regretted = 0  # lookups that an evicted snapshot would have served

    # ------------------------------------------------------------------------------------------------ blocks and slots

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def take_blocks(self, count: int) -> list[int] | None:
        """Free blocks, at the price of old snapshots; None (and nothing taken) if there are not that many."""
        if len(self.free_blocks) < count and self._obtainable() < count:
            return None
        while len(self.free_blocks) < count and (oldest := self._oldest()) is not None:
            self.evict(oldest)
        taken = [heapq.heappop(self.free_blocks) for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def _obtainable(self) -> int:
        """Blocks that are free, or held by snapshots only."""
        held = Counter(block for s in self.snapshots.values() if not s.pinned for block in s.blocks)
        return len(self.free_blocks) + sum(self.references[block] == count for block, count in held.items())

    def share(self, blocks: Tokens[int]) -> list[int]:
        for block in blocks:
            self.references[block] += 1
        return list(blocks)

    def release_blocks(self, blocks: Tokens[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                heapq.heappush(self.free_blocks, block)

    def take_slot(self) -> int | None:
        """A free slot, at the price of the oldest snapshot that has one."""
        if not self.free_slots:
            oldest = self._oldest(with_slot=True)
            if oldest is None:
                return None
            self.evict(oldest)
        return heapq.heappop(self.free_slots)

    def _oldest(self, with_slot: bool = False) -> Snapshot | None:
        fitting = (s for s in self.snapshots.values() if not s.pinned and (s.slot is not None or not with_slot))
        return next(fitting, None)

    def release_slot(self, slot: int) -> None:
        heapq.heappush(self.free_slots, slot)

    # --------------------------------------------------------------------------------------------------- prefix cache

    def digests(self, tokens: Tokens[int], known: list[bytes] | None = None) -> list[bytes]:
        """Digest of the first 1, 2, ... whole blocks; `known` is continued in place."""
        chain = known if known is not None else []
        for i in range(len(chain), len(tokens) // self.block_size):
            part = array("q", tokens[i * self.block_size : (i + 1) * self.block_size]).tobytes()
            chain.append(hashlib.blake2b((chain[-1] if chain else b"") + part, digest_size=16).digest())
        return chain

    def find(self, tokens: Tokens[int], chain: list[bytes]) -> Snapshot | None:
        """The longest snapshot that begins these tokens; it becomes the most recently used."""
        for i in range(len(tokens) // self.block_size, -1, -1):
            prefix = chain[i - 1] if i else b""
            fitting = [
                s
                for s in self._by_prefix.get(prefix, ())
                if s.length <= len(tokens) and s.tail == tuple(tokens[i * self.block_size : s.length])
            ]
            if fitting:
                best = max(fitting, key=lambda s: s.length)
                self.snapshots.move_to_end((best.prefix, best.tail))
                return best
            if prefix and prefix in self._lost:
                self._lost.pop(prefix)
                self.regretted += 1
        return None

    def parting(self, chain: list[bytes]) -> int:
        """Tokens of the longest run of whole blocks seen in an earlier prompt; this prompt is remembered too."""
        shared = 0
        for i, digest in enumerate(chain):
            if digest in self._seen:
                self._seen.move_to_end(digest)
                shared = i + 1
            else:
                self._seen[digest] = None
        while len(self._seen) > self.SEEN:
            self._seen.popitem(last=False)
        return shared * self.block_size

    def keep(
        self, tokens: Tokens[int], length: int, chain: list[bytes], blocks: Tokens[int], slot: int | None,
        mtp_length: int, hidden: Any,
    ) -> bool:  # fmt: skip
        """Keep a snapshot of the first `length` tokens. It takes the slot over and shares the blocks; False: there is
        one already, and nothing was taken."""
        whole = length // self.block_size
        prefix = chain[whole - 1] if whole else b""
        tail = tuple(tokens[whole * self.block_size : length])
        if not self.caching or length == 0 or self.has(prefix, tail):
            return False
        held = self.share(blocks[: self.blocks_for(length)])
        snapshot = Snapshot(prefix, tail, length, held, slot, mtp_length, hidden)
        self.snapshots[prefix, tail] = snapshot
        self._by_prefix.setdefault(prefix, []).append(snapshot)
        return True

    def has(self, prefix: bytes, tail: tuple[int, ...]) -> bool:
        """Whether there is such a snapshot; it becomes the most recently used."""
        found = (prefix, tail) in self.snapshots
        if found:
            self.snapshots.move_to_end((prefix, tail))
        return found

    def evict(self, snapshot: Snapshot) -> None:
        """Give a snapshot's memory back."""
        del self.snapshots[snapshot.prefix, snapshot.tail]
        same = self._by_prefix[snapshot.prefix]
        same.remove(snapshot)
        if not same:
            del self._by_prefix[snapshot.prefix]
        self.release_blocks(snapshot.blocks)
        if snapshot.slot is not None:
            self.release_slot(snapshot.slot)
        self.evictions += 1
        self._lost[snapshot.prefix] = None
        while len(self._lost) > self.SEEN:
            self._lost.popitem(last=False)

    def clear(self) -> None:
        """Forget every snapshot."""
        for snapshot in list(self.snapshots.values()):
            self.evict(snapshot)

    # -------------------------------------------------------------------------------------------------------- checking

    def check(self, holders: Tokens[tuple[Tokens[int], int | None]] = ()) -> None:
        """Raise AssertionError unless every block and slot is free or held by exactly who should hold it.

        `holders` are the (blocks, slot) of the sequences that run.
        """
        counts = [0] * self.num_blocks
        slots = []
        everyone = [*holders, *((s.blocks, s.slot) for s in self.snapshots.values())]
        for blocks, slot in everyone:
            for block in blocks:
                counts[block] += 1
            if slot is not None:
                slots.append(slot)
        assert counts == self.references, "block references are not the number of holders"
        free = sorted(self.free_blocks)
        assert free == [b for b, n in enumerate(counts) if n == 0], "free blocks are not those nobody holds"
        assert sorted([*slots, *self.free_slots]) == list(range(self.num_slots)), "slots are lost or held twice"
        assert sum(map(len, self._by_prefix.values())) == len(self.snapshots)
