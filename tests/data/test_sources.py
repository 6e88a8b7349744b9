import gzip
import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.data import sources
from nemo_lite.data.sources import ReadStats, documents, open_source
from nemo_lite.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")

DICE = random.Random(0)


def source(path, **more) -> SourceConfig:
    return SourceConfig(source=str(path), **more)


def write_jsonl(path, texts, key="text"):
    lines = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    if path.name.endswith(".gz"):
        lines = gzip.compress(lines)
    elif path.name.endswith(".zst"):
        lines = pytest.importorskip("zstandard").compress(lines)
    path.write_bytes(lines)
    return path


def texts_of(config, split="all", fraction=0.0, **more):
    return [each.text for each in documents(config, split, fraction, **more)]


# ------------------------------------------------------------------------------------------------------------ kinds


def test_stdlib_is_large_and_splits():
    train = list(documents(SourceConfig(), "train", 0.1))
    held = list(documents(SourceConfig(), "validation", 0.1))
    size = sum(len(each.text) for each in train + held)
    assert size > 4e6
    assert len(held) > 5
    assert not {each.text for each in train} & {each.text for each in held}
    names = [each.name for each in train + held]
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [name for name in names if skipped & set(name.split("/"))]
    assert "argparse.py" in names


def test_folder(tmp_path):
    for name, text in {"b.txt": "b", "a/x.py": "x", "a/skip.bin": "no", ".git/c.txt": "no", "e.txt": " \n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    write_jsonl(tmp_path / "z.jsonl", ["one", "two"])
    stats = ReadStats()
    found = list(documents(source(tmp_path, include=["*.txt", "*.py", "*.jsonl"]), stats=stats))
    assert [(each.name, each.text) for each in found] == [
        ("a/x.py", "x"),
        ("b.txt", "b"),
        ("z.jsonl:1", "one"),
        ("z.jsonl:2", "two"),
    ]
    assert stats == ReadStats(documents=4, undecodable=1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path, name):
    path = write_jsonl(tmp_path / name, ["eins", "zwei\n\u2028", "", "drei"], key="body")
    assert texts_of(source(path, text_key="body")) == ["eins", "zwei\n\u2028", "drei"]


def test_zst_of_several_frames(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = [f'{{"text": "line {i} {"x" * 3000}"}}\n'.encode() for i in range(200)]
    whole = b"".join(lines)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(whole[:1234]) + zstandard.compress(whole[1234:]))
    assert texts_of(source(path)) == [f"line {i} {'x' * 3000}" for i in range(200)]


@pytest.mark.parametrize("cut", [1, 10, 1000])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_archive_that_was_cut_off(tmp_path, name, cut):
    path = write_jsonl(tmp_path / name, [DICE.randbytes(50).hex() for _ in range(2000)])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="cannot be read beyond line"):
        texts_of(source(path))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert texts_of(source(path)) == ["one", "two"]
    with pytest.raises(UserError, match=r"no column `body` \(it has: text, n\)"):
        texts_of(source(path, text_key="body"))
    with pytest.raises(UserError, match="holds a int, not a text"):
        texts_of(source(path, text_key="n"))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        texts_of(source(path))


def test_hugging_face_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [f"row {i}" for i in range(50)])
    config = source(f"hf:{tmp_path / 'set'}")
    assert texts_of(config) == [f"row {i}" for i in range(50)]
    assert len(texts_of(config, "train", 0.3)) + len(texts_of(config, "validation", 0.3)) == 50
    data = DataConfig(cache_dir=str(tmp_path / "tokens"))
    said: list[str] = []
    for _ in range(2):
        assert open_source(config, data, BYTES, "all", progress=said.append).num_documents == 50
    assert len(said) == 2  # begin and end of the first time
    with pytest.raises(UserError, match="no column `body`"):
        texts_of(source(f"hf:{tmp_path / 'set'}", text_key="body"))
    with pytest.raises(UserError, match="could not load it"):
        texts_of(source(f"hf:{tmp_path / 'none'}"))


def test_text_file_is_cut_at_its_end(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"line {i}\r\n" for i in range(100))
    path.write_bytes(text.encode())
    (train,), (held,) = texts_of(source(path), "train", 0.1), texts_of(source(path), "validation", 0.1)
    assert train + held == text
    assert train.endswith("\n") and 0 < len(held) <= len(text) * 0.1
    assert texts_of(source(path)) == [text]
    assert texts_of(source(path), "validation", 0.0) == []
    path.write_text("one long line without a break")
    assert len(texts_of(source(path), "validation", 0.2)[0]) == 6


def test_split_is_by_content(tmp_path):
    texts = [f"text {i}" for i in range(400)]
    one = source(write_jsonl(tmp_path / "a.jsonl", texts))
    two = source(write_jsonl(tmp_path / "b.jsonl", texts[::-1]))
    held = texts_of(one, "validation", 0.1)
    assert set(held) == set(texts_of(two, "validation", 0.1))
    assert 15 < len(held) < 80
    assert set(held) | set(texts_of(one, "train", 0.1)) == set(texts)
    assert set(held) <= set(texts_of(one, "validation", 0.2))


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{oops", "not JSON"),
        ('{"text": "cut', "not JSON"),
        ("[1]", "a list where an object"),
        ('{"body": "x"}', "no key `text` .it has: body."),
        ('{"text": null}', "`text` holds a NoneType"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_line(tmp_path, caplog, line, why):
    path = tmp_path / "a.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "too"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{why}"):
        texts_of(source(path))
    stats = ReadStats()
    with caplog.at_level(logging.WARNING):
        assert texts_of(source(path), on_bad_line="skip", stats=stats) == ["good", "too"]
    assert stats.bad_lines == 1
    assert "1 lines skipped, the first: " in caplog.text and "a.jsonl:3" in caplog.text
    data = DataConfig(cache_dir=str(tmp_path / "c"), on_bad_line="skip")
    assert open_source(source(path), data, BYTES, "all").meta["bad_lines"] == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_archive(tmp_path, name):
    path = write_jsonl(tmp_path / name, [DICE.randbytes(50).hex() for _ in range(2000)])
    path.write_bytes(path.read_bytes()[:5000] + b"\0" * 100)
    with pytest.raises(UserError, match="cannot be read beyond line"):
        texts_of(source(path))


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        texts_of(source(tmp_path / "none"))
    with pytest.raises(UserError, match="no file in it matches"):
        texts_of(source(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match="is empty"):
            texts_of(source(path))
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"is empty: .*a\.jsonl:1: not JSON"):
        texts_of(source(tmp_path / "a.jsonl"), on_bad_line="skip")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        texts_of(source(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("module", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "hf:x")]
)
def test_missing_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    where = name if name.startswith("hf:") else tmp_path / name
    if not name.startswith("hf:"):
        where.write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{module}; install it with: pip install \"nemo-lite\[data\]\""):
        texts_of(source(where))


# ------------------------------------------------------------------------------------------------------------ cache


def cached(tmp_path, path, said=None, split="all", tokenizer=BYTES, **more):
    data = DataConfig(cache_dir=str(tmp_path / "cache"), **more)
    return open_source(source(path), data, tokenizer, split, progress=(said if said is not None else []).append)


def test_cache_holds_the_tokens(tmp_path):
    texts = ["one", "zwei é", "three\ud800"]
    found = cached(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts))
    assert found.tokens.dtype == np.uint16
    documents_ids = [found.tokens[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:])]
    assert documents_ids == [[*BYTES.encode(text), 256] for text in texts]
    assert found.lengths.tolist() == [4, 8, 9]
    without = cached(tmp_path, tmp_path / "a.jsonl", append_eod=False)
    assert without.lengths.tolist() == [3, 7, 8]
    assert without.fingerprint != found.fingerprint


def test_cache_is_used_and_follows_changes(tmp_path):
    path, said = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), []
    first = cached(tmp_path, path, said)
    assert len(said) == 2
    assert cached(tmp_path, path, said).folder == first.folder
    assert len(said) == 2
    os.utime(path, (1, 1))  # a new time: read again, the same tokens
    again = cached(tmp_path, path, said)
    assert len(said) == 4 and again.folder != first.folder and again.fingerprint == first.fingerprint
    write_jsonl(path, ["one", "three"])
    assert cached(tmp_path, path, said).fingerprint != first.fingerprint
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")]


@pytest.mark.parametrize("damage", ["tokens.bin", "offsets.npy", "meta.json"])
def test_damaged_cache_is_made_again(tmp_path, damage):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    first = cached(tmp_path, path)
    before = first.tokens.tolist()
    os.replace(first.folder / damage, tmp_path / "away")
    (first.folder / damage).write_bytes(b"\x01")
    assert cached(tmp_path, path).tokens.tolist() == before
    (first.folder / damage).unlink()
    assert cached(tmp_path, path).tokens.tolist() == before


def test_failed_work_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbad\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        cached(tmp_path, path)
    assert os.listdir(tmp_path / "cache") == []


def test_unwritable_cache(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir: .* cannot be written"):
        cached(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["one"]))


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        cached(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["one"]))
    assert os.listdir(tmp_path / "cache") == []


def test_no_end_of_document_token(tmp_path):
    import tokenizers

    plain = sources.Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, "?")), name="words")
    with pytest.raises(UserError, match="append_eod=false"):
        cached(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["a"]), tokenizer=plain)
    assert cached(tmp_path, tmp_path / "a.jsonl", tokenizer=plain, append_eod=False).tokens.tolist() == [0]


RACE = """
import pathlib, sys, time
from nemo_lite.config import DataConfig, SourceConfig
from nemo_lite.data import load_tokenizer, open_source
cache, path, go, number = sys.argv[1:]
pathlib.Path(go + number).touch()
while not pathlib.Path(go).exists():
    time.sleep(0.001)
found = open_source(SourceConfig(source=path), DataConfig(cache_dir=cache), load_tokenizer("bytes"), "all")
print(found.fingerprint, found.num_tokens, int(found.tokens.sum()))
"""


def test_two_processes_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * 20 for i in range(3000)])
    cache, go = tmp_path / "cache", tmp_path / "go"
    workers = [
        subprocess.Popen([sys.executable, "-c", RACE, cache, path, go, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    while not all(Path(f"{go}{n}").exists() for n in range(2)):
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    go.touch()
    found = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert found[0] == found[1] and len(found[0].split()) == 3
    assert len(os.listdir(cache)) == 1


def test_two_finish_at_once(tmp_path):
    """The second of two finished folders gives way to the first."""
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    found = cached(tmp_path, path)
    work = tmp_path / "cache" / ".work"
    work.mkdir()
    sources._put_in_place(work, found.folder)
    assert cached(tmp_path, path).num_documents == 1
