"""Which part of a whole parameter lies on this rank: for initial weights, gradient norms and checkpoints.

A parameter is cut along one dimension: into the share of each of its segments (heads, groups, columns, experts), or not
at all. The distributed optimizer cuts what is left, flattened, once more over the data-parallel ranks. `Part.pieces`
turns such a flat range back into rectangles of the whole, which is what a sharded checkpoint is made of: any layout
reads what any other wrote, and nobody gathers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from nemo_lite.parallel.layers import Segment


@dataclass(frozen=True)
class Run:
    """`rows` rows from `local` on here are those from `whole` on of the whole; so many ranks hold `copies` of them."""

    local: int
    whole: int
    rows: int
    copies: int


@dataclass(frozen=True)
class Piece:
    """A rectangle of the whole at `offsets` of `sizes`, which lies here at `start` of the flattened local tensor."""

    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Part:
    """The rows `runs` along `dim` of a parameter of `shape`; `whole` where every rank has all of it."""

    shape: tuple[int, ...]
    dim: int
    runs: tuple[Run, ...]
    whole: bool = False

    @classmethod
    def replicated(cls, shape: Sequence[int], ranks: int) -> Part:
        return cls(tuple(shape), 0, (Run(0, 0, shape[0], ranks),), True)

    @classmethod
    def cut(cls, segments: Sequence[Segment], rest: Sequence[int], rank: int, ranks: int, dim: int = 0) -> Part:
        """The share that `rank` of `ranks` has of each segment's units, along `dim`; `rest` are the other dimensions.

        Where a segment has fewer units than there are ranks, neighbours hold copies of one.
        """
        runs, local, whole = [], 0, 0
        for units, size in segments:
            if units >= ranks:
                rows, first, copies = units // ranks * size, rank * (units // ranks) * size, 1
            else:
                copies = ranks // units
                rows, first = size, rank // copies * size
            runs.append(Run(local, whole + first, rows, copies))
            local, whole = local + rows, whole + units * size
        shape = [*rest[:dim], whole, *rest[dim:]]
        return cls(tuple(shape), dim, tuple(runs))

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.dim] = sum(run.rows for run in self.runs)
        return tuple(shape)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        return torch.cat([whole.narrow(self.dim, run.whole, run.rows) for run in self.runs], self.dim)

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """The rectangles of the whole that elements start..end of the flattened local tensor are."""
        shape = self.local_shape
        for at, offsets, sizes in _rectangles(shape, start, end):
            for run in self.runs:
                first = max(offsets[self.dim], run.local)
                last = min(offsets[self.dim] + sizes[self.dim], run.local + run.rows)
                if first >= last:
                    continue
                # Of several runs each is whole rows of dim 0, so that it is one stretch of the flat range too.
                where, size = list(offsets), list(sizes)
                skipped = first - offsets[self.dim]
                where[self.dim], size[self.dim] = run.whole + first - run.local, last - first
                inner = math.prod(sizes[self.dim + 1 :])
                yield Piece(at + skipped * inner, tuple(where), tuple(size), run.copies)


def _rectangles(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[int, tuple, tuple]]:
    """(flat start, offsets, sizes) of the fewest rectangles that a flat range of a tensor is, in order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield start, (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # inside one row
        yield from _inside(shape, start, end, row)
        return
    yield from _inside(shape, start, first * row, row)
    if last > first:
        yield first * row, (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _inside(shape, last * row, end, row)


def _inside(shape: Sequence[int], start: int, end: int, row: int) -> Iterator[tuple[int, tuple, tuple]]:
    r = start // row
    for at, offsets, sizes in _rectangles(shape[1:], start - r * row, end - r * row):
        yield at + r * row, (r, *offsets), (1, *sizes)


class Pieces:
    """A whole tensor some of whose rectangles lie here, for torch.distributed.checkpoint with the planners below.

    Nothing is copied: writing reads the tensors, reading fills them in place.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[tuple[Piece, Tensor]]):
        """pieces: with the memory of each, as a view of the piece's sizes."""
        self.shape, self.pieces = torch.Size(shape), list(pieces)

    def size(self) -> torch.Size:
        return self.shape

    def map(self, change: Callable[[Tensor], Tensor]) -> Pieces:
        return Pieces(self.shape, [(piece, change(tensor)) for piece, tensor in self.pieces])

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(piece.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), self.shape),
            )
            for (piece, tensor), chunk in zip(self.pieces, self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p, _ in self.pieces]

    def at(self, index: MetadataIndex) -> Tensor:
        return next(tensor for piece, tensor in self.pieces if torch.Size(piece.offsets) == index.offset)


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict.get(index.fqn)
        return found.at(index) if isinstance(found, Pieces) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        # torch's looks for what it could allocate, and puts None where it finds something else.
        apart = {
            f"{section}.{name}": value
            for section, found in state_dict.items()
            for name, value in found.items()
            if isinstance(value, Pieces)
        }
        if apart:
            state_dict = {
                section: {name: value for name, value in found.items() if f"{section}.{name}" not in apart}
                for section, found in state_dict.items()
            }
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict.update(apart)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict.get(index.fqn)
        return found.at(index) if isinstance(found, Pieces) else super().lookup_tensor(index)
