"""Loaders over sources that are numbers, and what tests compare of them."""

import json
from pathlib import Path

import numpy as np
import torch

from nemo_lite.data.packing import Batch
from nemo_lite.data.sources import TokenSource
from nemo_lite.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def fake_sources(lengths: list[list[int]]) -> list[TokenSource]:
    """Sources whose every token is a number of its own; the last of a document is its end."""
    found, first = [], 0
    for number, each in enumerate(lengths):
        offsets = np.concatenate([[0], np.cumsum(each)]).astype(np.int64)
        tokens = np.arange(first, first + offsets[-1], dtype=np.uint32)
        first += len(tokens)
        meta = {"fingerprint": json.dumps(each)}
        found.append(TokenSource(f"fake{number}", "train", Path(), tokens, offsets, meta))
    return found


def take(loader, count) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    tensors = ("input_ids", "doc_ids", "labels", "continued")
    return len(a) == len(b) and all(
        all(torch.equal(getattr(x, name), getattr(y, name)) for name in tensors)
        and x.rows == y.rows
        and x.sources == y.sources
        for x, y in zip(a, b, strict=True)
    )
