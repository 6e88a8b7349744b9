import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_lite.config import UserError
from nemo_lite.data import tokenizer as tk

CORPUS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x: int = 0\n    y: int = 0\n",
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox runs on.\n" * 4,
    "Grüße aus Köln, 東京からこんにちは, 🙂🙃 and   many    spaces\t\ttabs\r\n",
]
ODD = [
    "",
    " ",
    "\n\n",
    "a",
    "naïve ÿ",
    "🙂",
    "👩‍👩‍👧 x",
    "\x00\x7f\x80",
    "<|endoftext|>",
    "a<|pad|>b",
    "\u00a0\u3000",
    "x" * 999,
]
TEXTS = st.one_of(st.text(), st.text(alphabet="ab \n\t<|endoftx>🙂é"), st.sampled_from(ODD + CORPUS))
RELAXED = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bpe():
    return tk.train_bpe(CORPUS * 3, 320)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else tk.load_tokenizer("bytes")


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer that is not byte-level: words with ▁, byte fallback for the rest."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁he", "llo", "▁wor", "ld", "é"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tk.Tokenizer(backend, name="spaced")


def test_bytes_ids_are_byte_values():
    tokenizer = tk.load_tokenizer("bytes")
    assert tokenizer.vocab_size == 260
    assert tokenizer.eod_id == 256 and tokenizer.pad_id == 257
    assert tokenizer.encode("Aé\n") == [65, 0xC3, 0xA9, 10]
    assert all(tokenizer.token_bytes(byte) == bytes([byte]) for byte in range(256))


@RELAXED
@given(text=TEXTS)
def test_round_trip(tokenizer, text):
    for special in (True, False):
        ids = tokenizer.encode(text, special=special)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(tokenizer.encode(text, special=False)) == len(text.encode())


@RELAXED
@given(text=TEXTS)
def test_documents_hold_no_special_tokens(tokenizer, text):
    ids = tokenizer.encode_batch([text, "x" + text], special=False)
    assert not set(np.concatenate(ids).tolist()) & tokenizer._special
    assert ids[0].dtype == np.int64


def test_special_tokens_in_a_prompt(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert ids.count(tokenizer.eod_id) == 1
    assert tokenizer.num_bytes(ids) == 2
    assert tokenizer.decode(ids, skip_special=True) == "ab"


def test_plain_bytes_shortcut_equals_the_library(monkeypatch):
    tokenizer = tk.load_tokenizer("bytes")
    assert tokenizer._plain_bytes
    fast = tokenizer.encode_batch(ODD + CORPUS, special=False)
    monkeypatch.setitem(tokenizer.__dict__, "_plain_bytes", False)
    slow = tokenizer.encode_batch(ODD + CORPUS, special=False)
    assert all(np.array_equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_a_bpe_is_not_taken_for_bytes(bpe):
    assert not bpe._plain_bytes


def test_long_documents_are_encoded_in_pieces(bpe, monkeypatch):
    texts = ["line one\nline two\n" * 9, "", "no break at all " * 9, "short"]
    monkeypatch.setattr(tk, "PIECE_CHARACTERS", 20)
    ids = bpe.encode_batch(texts, special=False)
    assert [bpe.decode(each) for each in ids] == texts


@given(text=st.text(max_size=50), size=st.integers(1, 9))
def test_pieces_join(text, size):
    pieces = tk._pieces(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)


def test_lone_surrogate_becomes_a_replacement_character(tokenizer):
    for special in (True, False):
        assert tokenizer.decode(tokenizer.encode("a\ud800b", special=special)) == "a\ufffdb"


@RELAXED
@given(data=st.data())
def test_stream_equals_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip in (False, True):
        stream = tokenizer.stream(skip_special=skip)
        pieces = [stream.push(index) for index in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


@RELAXED
@given(text=st.text(alphabet="aé東🙂 "))
def test_stream_never_shows_half_a_character(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


@pytest.mark.parametrize("text", [" hello world", "é🙂 hello", "", "🙂"])
def test_tokenizer_that_is_not_byte_level(spaced, text):
    ids = spaced.encode(text)
    assert spaced.decode(ids) == text
    assert spaced.num_bytes(ids) == len(text.encode())
    stream = spaced.stream()
    pieces = [stream.push(index) for index in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text
    assert spaced.eod_id == 2


def test_byte_lengths(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eod_id] == 0
    assert all(len(tokenizer.token_bytes(i)) == n for i, n in enumerate(lengths) if i not in tokenizer._special)


def test_training_is_deterministic(bpe):
    assert tk.train_bpe(CORPUS * 3, 320).fingerprint == bpe.fingerprint
    assert tk.train_bpe(CORPUS, 300).fingerprint != bpe.fingerprint
    assert bpe.vocab_size == 320
    assert len(bpe.encode("    return")) < len("    return")


def test_small_corpus_gives_fewer_ids():
    assert tk.train_bpe(["ab ab"], 4096).vocab_size < 270


def test_transformers_opens_and_agrees(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*ODD, *CORPUS, "a<|endoftext|> b .", "it 's , fine ."]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eod_id
    assert theirs.pad_token_id == tokenizer.pad_id


def test_transformers_opens_it_inside_a_model_directory(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]})
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ODD + CORPUS:
        assert theirs.encode(text) == bpe.encode(text)
        assert theirs.decode(theirs.encode(text)) == text


def test_saving_keeps_the_folders_own_configuration(bpe, tmp_path):
    bpe.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    found = tk.load_tokenizer(tmp_path / "a")
    found.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "im_end" in (tmp_path / "b" / "tokenizer_config.json").read_text()
    assert tk.load_tokenizer(str(tmp_path / "b" / "tokenizer.json")).fingerprint == bpe.fingerprint


def test_padding_and_truncation_of_a_file_are_switched_off(bpe, tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = tk.load_tokenizer(tmp_path)
    assert found.decode(found.encode(CORPUS[0])) == CORPUS[0]


def test_bad_input(tmp_path, bpe):
    with pytest.raises(UserError, match="no file"):
        tk.load_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        tk.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="needs 260 ids"):
        tk.train_bpe(["a"], 100)
    with pytest.raises(UserError, match="no text"):
        tk.train_bpe([], 300)
    with pytest.raises(UserError, match="outside"):
        bpe.decode([bpe.vocab_size])
    with pytest.raises(UserError, match="outside"):
        bpe.stream().push(-1)


def test_vocabulary_check(bpe):
    tk.check_vocabulary(bpe, 320)
    with pytest.raises(UserError, match=r"model\.vocab_size: 319 is too small .* set it to 320"):
        tk.check_vocabulary(bpe, 319)


def test_command(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"file {number} says hello hello hello\n" * 5)
    out = tmp_path / "made" / "tokenizer.json"
    common = ["train", "--source", str(folder), "--vocab-size", "300", "--validation-fraction", "0.3"]
    assert tk.main([*common, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vocab_size"] <= 300 and 0 < facts["documents"] < 30 and facts["held_out_bytes_per_token"] > 1
    assert tk.main([*common, "--out", str(tmp_path / "folder")]) == 0
    assert "written to" in capsys.readouterr().out
    assert (tmp_path / "folder" / "tokenizer_config.json").is_file()
    assert tk.main(["show", str(out), "--text", "hello é", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == 8 and facts["vocab_size"] <= 300
    assert tk.main(["show", "bytes", "--text", "é"]) == 0
    assert "2 tokens, 2 bytes" in capsys.readouterr().out
    with pytest.raises(UserError, match="--validation-fraction"):
        tk.main(["train", "--out", str(out), "--validation-fraction", "2"])
