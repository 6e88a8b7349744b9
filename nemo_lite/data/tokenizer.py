"""Text to token ids and back, through the `tokenizers` library.

`load_tokenizer` opens one (`bytes`, a tokenizer.json, a folder that holds one), `train_bpe` makes one, and
:class:`Tokenizer` is what the rest of the project sees. The byte-level tokenizers made here are lossless: any text
comes back exactly as it went in.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nemo_lite.config import UserError

if TYPE_CHECKING:
    import tokenizers

EOD, PAD = "<|endoftext|>", "<|pad|>"
# The two chat markers are reserved from the start, so that post-training needs no new rows in the embedding.
SPECIAL_TOKENS = (EOD, PAD, "<|im_start|>", "<|im_end|>")
# What other tokenizers call the end of a document, best first. `<|im_end|>` ends a chat turn, hence late.
EOD_NAMES = (EOD, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
# Longer documents are encoded in pieces cut after a line break: the library needs about 100 bytes a token for a text.
PIECE_CHARACTERS = 1 << 20

_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def _byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in a byte-level vocabulary (the GPT-2 convention)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}


def _encodable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold (JSON's \\ud800 makes them), replaced by U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pieces(text: str, size: int) -> list[str]:
    """The text cut after line breaks into pieces of about `size` characters; joined they are the text."""
    pieces, start = [], 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1
        cut = cut if cut > start else start + size
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    return pieces


class Tokenizer:
    """A `tokenizers.Tokenizer` with what training and serving need around it.

    `folder` is where it came from, if it came from a folder: `save_pretrained` then keeps that folder's own
    configuration and chat template.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str = "tokenizer", folder: Path | None = None):
        # A tokenizer.json may carry padding or truncation of its training set-up; here they would lose tokens.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.name = name
        self.folder = folder
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        self._tokens: dict[int, str] = {index: token for token, index in backend.get_vocab(True).items()}
        self._added = {entry["id"]: entry for entry in self._spec.get("added_tokens", [])}
        self._special = {index for index, entry in self._added.items() if entry["special"]}
        if not self._tokens:
            raise UserError(f"{name}: the tokenizer holds no tokens")

    # -------------------------------------------------------------------------------------------------- what it is

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the largest id plus one."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(self._tokens) + 1

    @cached_property
    def eod_id(self) -> int | None:
        """Id of the end-of-document token, or None where the tokenizer has none under a known name."""
        return self._first(EOD_NAMES)

    @cached_property
    def pad_id(self) -> int | None:
        """Id of the padding token, or None."""
        return self._first(PAD_NAMES)

    def special_id(self, name: str) -> int | None:
        """Id of the special token of this name, or None."""
        index = self.backend.token_to_id(name)
        return index if index in self._special else None

    def _first(self, names: Iterable[str]) -> int | None:
        ids = (self.backend.token_to_id(name) for name in names)
        return next((index for index in ids if index is not None), None)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids; equal for equal tokenizers whatever their file's layout."""
        parts = {k: self._spec.get(k) for k in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are strings over the 256-byte alphabet."""
        decoder = self._spec.get("decoder") or {}
        return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", [decoder]))

    @cached_property
    def _plain_bytes(self) -> bool:
        """Whether ordinary text encodes to its UTF-8 bytes, id = byte value: then no library is needed to encode."""
        model = self._spec["model"]
        return (
            self.byte_level
            and model.get("type") == "BPE"
            and not model.get("merges")
            and self._spec.get("normalizer") is None
            and model["vocab"] == {char: byte for byte, char in _BYTE_TO_CHAR.items()}
            and len(self._special) == len(self._added)
        )

    @cached_property
    def _documents(self) -> tokenizers.Tokenizer:
        """A second backend that does not look for special tokens in the text."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    # ---------------------------------------------------------------------------------------------- text to tokens

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text.

        `special=True` does what transformers does: special tokens spelled in the text become their ids, and those of
        the tokenizer's own template are added. `special=False` is for documents: text is only text.
        A lone surrogate becomes U+FFFD.
        """
        if not special:
            return self.encode_batch([text], special=False)[0].tolist()
        return self.backend.encode(_encodable(text)).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[np.ndarray]:
        """Ids of several texts, each an int64 array [T]; `special` as in :meth:`encode`.

        With `special=False` a byte-level tokenizer takes texts beyond about a million characters in pieces.
        """
        texts = [_encodable(text) for text in texts]
        if special:
            return [np.array(found.ids, dtype=np.int64) for found in self.backend.encode_batch_fast(texts)]
        if self._plain_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        if not self.byte_level:  # these may add something at the start of a text, so that pieces would not join
            found = self._documents.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(each.ids, dtype=np.int64) for each in found]
        pieces, counts = [], []
        for text in texts:
            cut = _pieces(text, PIECE_CHARACTERS)
            pieces += cut
            counts.append(len(cut))
        encoded = self._documents.encode_batch_fast(pieces, add_special_tokens=False)
        arrays = [np.array(each.ids, dtype=np.int64) for each in encoded]
        if len(pieces) == len(texts):
            return arrays
        ends = np.cumsum(counts)
        return [np.concatenate(arrays[end - count : end]) for end, count in zip(ends, counts, strict=True)]

    # ---------------------------------------------------------------------------------------------- tokens to text

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """The text of ids; half a UTF-8 character becomes U+FFFD, an id outside the vocabulary is an error."""
        ids = [int(index) for index in ids]
        self._check(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def _check(self, ids: Iterable[int]) -> None:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise UserError(f"token id {index} is outside the tokenizer's {self.vocab_size} ids")

    def token_bytes(self, index: int) -> bytes:
        """The bytes one token stands for; a special token's are those of its name, a hole in the ids has none."""
        self._check([index])
        token = self._tokens.get(index, "")
        if self.byte_level:
            try:
                return bytes(_CHAR_TO_BYTE[char] for char in token)
            except KeyError:  # an added token that is plain text
                return token.encode("utf-8")
        if index in self._added:
            return token.encode("utf-8")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback of SentencePiece
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for index in self._tokens:
            if index not in self._special:
                lengths[index] = len(self.token_bytes(index))
        lengths.setflags(write=False)
        return lengths

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each id, int64 [vocab_size], read-only; 0 for special tokens. Exact for byte-level ones."""
        return self._byte_lengths

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes of the ordinary tokens among `ids`: the denominator of bits per byte."""
        return int(self._byte_lengths[np.asarray(ids, dtype=np.int64)].sum())

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """A decoder fed one id at a time; its pieces and the final flush join to `decode` of all ids."""
        return TextStream(self, skip_special)

    # ------------------------------------------------------------------------------------------------------ saving

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json to `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(path))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json and its configuration so that transformers' AutoTokenizer opens the folder."""
        directory = Path(directory)
        self.save(directory / "tokenizer.json")
        if self.folder is not None and (self.folder / "tokenizer_config.json").is_file():
            for name in _COMPANIONS:
                if (self.folder / name).is_file() and self.folder.resolve() != directory.resolve():
                    shutil.copyfile(self.folder / name, directory / name)
            return
        roles = {"eos_token": self.eod_id, "pad_token": self.pad_id}
        named = {role: self._tokens[index] for role, index in roles.items() if index is not None}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # else transformers' decode would drop spaces before punctuation
            "model_max_length": 1 << 30,
            **named,
        }
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", named)):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class TextStream:
    """Streaming decoder: `push(id)` gives the text that is certain so far, `flush()` the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Without a byte-level vocabulary the text of a token depends on its neighbours: decode a short window twice,
        # without and with what is new, and emit the difference.
        self._window: list[int] = []
        self._shown = 0

    def push(self, index: int) -> str:
        """Text completed by this id; empty while a UTF-8 character is still open."""
        tokenizer, index = self._tokenizer, int(index)
        if tokenizer.byte_level:
            if self._skip and index in tokenizer._special:
                return ""
            return self._utf8.decode(tokenizer.token_bytes(index))
        self._window.append(index)
        before, after = self._texts()
        if after.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._window[self._shown :], len(self._window) - self._shown
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD. The stream is then as new."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        before, after = self._texts()
        self._window, self._shown = [], 0
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._window[: self._shown], skip_special=self._skip)
        return before, decode(self._window, skip_special=self._skip)


# ------------------------------------------------------------------------------------------------------ making them


def _special(names: Iterable[str]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(name, special=True, normalized=False) for name in names]


def bytes_tokenizer() -> Tokenizer:
    """The fallback that needs no file: id = byte for 0..255, then the four special tokens; 260 ids, lossless."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {char: byte for byte, char in _BYTE_TO_CHAR.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_special(SPECIAL_TOKENS))
    return Tokenizer(backend, name="bytes")


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids, special tokens (`special` after our own) and the 256 bytes
    included.

    Lossless, and deterministic: the same texts in the same order give the same tokenizer. A corpus too small for that
    many merges gives fewer ids.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    names = list(dict.fromkeys((*SPECIAL_TOKENS, *special)))
    least = 256 + len(names)
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: it needs {least} ids for the 256 bytes and the special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special(names),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def checked() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield from _pieces(_encodable(text), PIECE_CHARACTERS)

    backend.train_from_iterator(checked(), trainer)
    if not seen:
        raise UserError("there is no text to train a tokenizer on")
    return Tokenizer(backend, name=f"bpe-{vocab_size}")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Open a tokenizer: `bytes`, the path of a tokenizer.json, or a folder that holds one.

    Raises :class:`UserError` naming what is missing or unreadable.
    """
    import tokenizers

    if str(spec) == "bytes":
        return bytes_tokenizer()
    path = Path(spec).expanduser()
    folder = path if path.is_dir() else None
    file = path / "tokenizer.json" if folder else path
    if not file.is_file():
        what = f"the folder {path} holds no tokenizer.json" if folder else f"there is no file {path}"
        raise UserError(f"tokenizer: {what}; give `bytes`, a tokenizer.json or a folder that holds one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise UserError(f"tokenizer: {file} is not a tokenizer.json that `tokenizers` can read ({error})") from error
    return Tokenizer(backend, name=str(spec), folder=folder)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise :class:`UserError` if the tokenizer has ids that the model's embedding has no row for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"model.vocab_size: {model_vocab_size} is too small for the tokenizer {tokenizer.name}, "
            f"whose ids reach {tokenizer.vocab_size - 1}; set it to {tokenizer.vocab_size} or more"
        )


# ------------------------------------------------------------------------------------------------------ the command


def _parser() -> argparse.ArgumentParser:
    from nemo_lite.config import DataConfig

    parser = argparse.ArgumentParser(prog="nemo-lite tokenizer", description="Train a tokenizer, or look into one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a byte-level BPE on the training split of a source")
    train.add_argument("--source", default="stdlib", help="as data.blend.N.source in a recipe (default: stdlib)")
    train.add_argument("--text-key", default="text", help="field that holds the text (jsonl, parquet, hf)")
    train.add_argument(
        "--include", action="append", metavar="PATTERN", help="file names read from a folder; may be repeated"
    )
    train.add_argument("--vocab-size", type=int, default=4096, help="ids, special tokens included (default: 4096)")
    train.add_argument(
        "--validation-fraction",
        type=float,
        default=DataConfig().validation_fraction,
        help="share held out, as data.validation_fraction of the recipe that will use it (default: %(default)s)",
    )
    train.add_argument("--on-bad-line", choices=["fail", "skip"], default="fail", help="a jsonl line that is not JSON")
    train.add_argument(
        "--special", action="append", default=[], metavar="NAME", help="another special token; may be repeated"
    )
    train.add_argument("--out", required=True, help="tokenizer.json to write, or a folder for it and its configuration")
    train.add_argument("--json", action="store_true", help="print one JSON object")
    train.set_defaults(run=_train)
    show = commands.add_parser("show", help="print how a text is cut into tokens")
    show.add_argument("tokenizer", metavar="FILE", help="`bytes`, a tokenizer.json, or a folder that holds one")
    show.add_argument("--text", required=True, help="the text; - reads standard input")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(run=_show)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`nemo-lite tokenizer train|show`; returns the exit status, raises :class:`UserError` on bad input."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from nemo_lite.config import SourceConfig
    from nemo_lite.data.sources import documents

    source = SourceConfig(source=arguments.source, text_key=arguments.text_key)
    if arguments.include:
        source.include = arguments.include
    held_out = arguments.validation_fraction
    if not 0 <= held_out < 1:
        raise UserError(f"--validation-fraction {held_out} is not between 0 and 1")
    started, counts = time.perf_counter(), {"documents": 0, "bytes": 0}

    def texts(split: Literal["train", "validation"]) -> Iterator[str]:
        for document in documents(source, split, held_out, arguments.on_bad_line):
            if split == "train":
                counts["documents"] += 1
                counts["bytes"] += len(document.text.encode("utf-8", "replace"))
            yield document.text

    tokenizer = train_bpe(texts("train"), arguments.vocab_size, arguments.special)
    seconds = time.perf_counter() - started
    out = Path(arguments.out)
    try:
        if out.suffix == ".json":
            tokenizer.save(out)
        else:
            tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error})") from error
    sample = list(texts("validation"))
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(sample, special=False))
    size = sum(len(text.encode("utf-8", "replace")) for text in sample)
    facts = {
        "out": str(out),
        "source": arguments.source,
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        "vocab_size": tokenizer.vocab_size,
        "seconds": round(seconds, 2),
        "held_out_bytes_per_token": round(size / tokens, 3) if tokens else None,
    }
    if arguments.json:
        print(json.dumps(facts))
        return 0
    print(
        f"{tokenizer.vocab_size} ids from {counts['bytes'] / 1e6:.1f} MB in {counts['documents']} documents "
        f"of {arguments.source}, {seconds:.1f} s"
    )
    if tokenizer.vocab_size < arguments.vocab_size:
        print(f"the text allows no more merges: {tokenizer.vocab_size} ids instead of {arguments.vocab_size}")
    if tokens:
        print(f"held-out text: {size / tokens:.2f} bytes per token over {size / 1e6:.2f} MB")
    print(f"written to {out}")
    return 0


def _readable(piece: bytes) -> str:
    """A token's text between quotes, or its bytes where it is half a character."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)


def _show(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments.tokenizer)
    ids = tokenizer.encode(sys.stdin.read() if arguments.text == "-" else arguments.text)
    pieces = [_readable(tokenizer.token_bytes(index)) for index in ids]
    facts = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "ids": ids,
        "pieces": pieces,
        "bytes": tokenizer.num_bytes(ids),
    }
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    print(f"{tokenizer.name}: {tokenizer.vocab_size} ids, end of document {tokenizer.eod_id}")
    for index, piece in zip(ids, pieces, strict=True):
        print(f"{index:>8}  {piece}")
    print(f"{len(ids)} tokens, {facts['bytes']} bytes")
    return 0
