"""A MODEL_DIR that says what a test tells it to, so that real servers can be held against each other on tool calls and
reasoning. Its trunk is silent and its head a table of successors (see rigged.py); each piece is a token of its own."""

import itertools
from pathlib import Path

import torch
from rigged import rigged_model
from tokenizers import AddedToken

from nemo_lite.data import load_tokenizer
from nemo_lite.data.tokenizer import Tokenizer


@torch.no_grad()
def scripted_model(folder: Path, source: Path, scripts: dict[int, list[str]]) -> None:
    """Write a model that says scripts[t], piece by piece, after a prompt whose last token is t, and then ends.

    `source` has the tokenizer, of bytes; no piece may occur in a prompt.
    """
    backend = load_tokenizer(str(source)).backend
    pieces = [piece for script in scripts.values() for piece in script]
    start = backend.get_vocab_size()
    backend.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    tokenizer, vocab = Tokenizer(backend), start + len(pieces)
    following = torch.full((vocab,), tokenizer.eod_id)
    for first, script in scripts.items():
        chain = [first, *(start + pieces.index(piece) for piece in script), tokenizer.eod_id]
        for here, there in itertools.pairwise(chain):
            following[here] = there
    model = rigged_model(1.0, vocab=vocab, hidden_size=-(-(vocab + 16) // 32) * 32)
    model.head.weight.zero_()
    model.head.weight[following, torch.arange(vocab)] = 1.0
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eod_id, tokenizer.pad_id
    model.bfloat16().save_pretrained(folder, tokenizer=tokenizer)
