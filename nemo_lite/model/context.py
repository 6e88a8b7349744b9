"""What all layers of one forward share: the shape of the batch, its documents, and the cache they continue; and what it
reads and predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_lite.train.loss import IGNORE, shift_left, shifted_labels

if TYPE_CHECKING:
    from nemo_lite.model.cache import Stream


@dataclass(frozen=True)
class Context:
    """Shapes and documents of the tokens in one forward; T = batch x length, row after row.

    A forward may also be ragged: `parts` of different shapes, one after the other in T. Most layers work on all T
    tokens at once and never notice; those that mix positions go through `over_parts`.

    valid_BL   False on padding, or None when there is none.
    reset_BL   True where a document starts and carried state must not enter, or None when no state could.
    lengths    tokens of each run of one document (padding counts as a run), in token order; they sum to T.
    count_BL   the positions that a router counts for its balance (bias update and auxiliary loss), or None for all.
    stream     the cache that this forward continues, with its per-layer states, or None.
    starts     per row, the slot of its first token in the cache.
    counts     per row, its valid tokens (they come first; padding is on the right).
    tentative  the cache must be able to keep any number of this forward's first tokens.
    parts      the pieces of a ragged forward, or empty: then this context is the only one.
    """

    batch: int
    length: int
    valid_BL: Tensor | None = None
    reset_BL: Tensor | None = None
    lengths: list[int] | None = None
    count_BL: Tensor | None = None
    stream: Stream | None = None
    starts: list[int] | None = None
    counts: list[int] | None = None
    tentative: bool = False
    parts: tuple[Context, ...] = ()

    @property
    def uniform(self) -> bool:
        """Every row continues the same slot with tokens only: the case of plain prefill and decode."""
        return self.valid_BL is None and self.starts is not None and len(set(self.starts)) == 1

    def over_parts(self, mix: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """mix(part, tokens of each tensor [t, ...]) -> [t, ...] for every part, in the order of the tokens."""
        if not self.parts:
            return mix(self, *tensors)
        sizes = [part.batch * part.length for part in self.parts]
        pieces = zip(*(tensor.split(sizes) for tensor in tensors))
        return torch.cat([mix(part, *piece) for part, piece in zip(self.parts, pieces)])

    def counting(self, count_BL: Tensor | None) -> Context:
        """The same forward, with other positions counted by the routers."""
        return replace(self, count_BL=count_BL)


def packed_context(input_ids: Tensor, doc_ids_BL: Tensor | None) -> Context:
    """The context of a forward without cache. Document ids change where a document starts; -1 is padding."""
    B, L = input_ids.shape
    if doc_ids_BL is None:
        return Context(B, L, lengths=[L] * B)
    starts_BL = torch.ones_like(doc_ids_BL, dtype=torch.bool)
    starts_BL[:, 1:] = doc_ids_BL[:, 1:] != doc_ids_BL[:, :-1]
    begins = starts_BL.flatten().nonzero().squeeze(-1).tolist()
    ends = [*begins[1:], B * L]
    valid_BL = doc_ids_BL >= 0
    padded = not bool(valid_BL.all())
    return Context(
        B,
        L,
        valid_BL=valid_BL if padded else None,
        # A row that is one document needs no reset: nothing is carried into it.
        reset_BL=starts_BL if len(begins) > B else None,
        lengths=[end - begin for begin, end in zip(begins, ends)],
        count_BL=valid_BL if padded else None,
    )


@dataclass
class Tokens:
    """What one forward without cache reads and predicts, by depth k = 0 (the trunk), 1 .. K (MTP): at position t it
    reads ids[k] = token t+k, and predicts labels[k] = token t+k+1 where there is one (-100: none); all [B, L]."""

    ids: list[Tensor]
    labels: list[Tensor]
    contexts: list[Context]

    @classmethod
    def of(cls, input_ids: Tensor, doc_ids: Tensor | None, labels: Tensor, depth: int) -> Tokens:
        """labels: as Hugging Face has them, not shifted."""
        trunk, depths = packed_context(input_ids, doc_ids), range(depth + 1)
        shifted = [shifted_labels(labels, doc_ids, k + 1) for k in depths]
        # A position whose own label is not there is a position only others of its kind see: causal attention.
        ahead = [trunk.counting(shifted[k] != IGNORE) for k in depths[1:]]
        return cls([shift_left(input_ids, k, 0) for k in depths], shifted, [trunk, *ahead])

    @property
    def depth(self) -> int:
        return len(self.ids) - 1

    def label_counts(self) -> Tensor:
        """[1 + K] int64: how many labels each depth has."""
        return torch.stack([(labels != IGNORE).sum() for labels in self.labels])
