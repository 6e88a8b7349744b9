"""Megatron shards: the real megatron-core reads ours and we read its own; any number of workers, and a call that goes
on after a kill, write the same bytes; what does not fit is one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from nemo_lite import cli
from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.data import shards
from nemo_lite.data.packing import PackedLoader, validation_batches
from nemo_lite.data.shards import ShardWriter, dtype_for, read_index, read_manifest
from nemo_lite.data.sources import Part, ReadStats, cut, documents, open_source
from nemo_lite.data.tokenize import tokenize
from nemo_lite.data.tokenizer import load_tokenizer, train_bpe

BYTES = load_tokenizer("bytes")
ROOT = Path(__file__).parents[2]


def megatron():
    """Megatron-core's module of indexed data sets."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def data_of(path, tmp_path, **more) -> DataConfig:
    more = {"validation_fraction": 0.0, "seq_len": 16, **more}
    return DataConfig(blend=[SourceConfig(source=str(path))], cache_dir=str(tmp_path / "cache"), **more)


def opened(path, tmp_path, split="train", tokenizer=BYTES, **more):
    data = data_of(path, tmp_path, **more)
    return open_source(data.blend[0], data, tokenizer, split)


def texts(source, tokenizer=BYTES) -> list[str]:
    """The documents of a source as text, without their end tokens."""
    one = np.ones(1, np.int64)
    found = []
    for d, length in enumerate(source.lengths):
        ids = source.read(d * one, 0 * one, length * one)
        assert ids[-1] == tokenizer.eod_id
        found.append(tokenizer.decode(ids[:-1]))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


@pytest.fixture
def corpus(tmp_path) -> list[SourceConfig]:
    """A folder of code, a jsonl of several parts with bad lines, an archive, and a parquet file."""
    folder = tmp_path / "code"
    folder.mkdir()
    for i in range(30):
        (folder / f"f{i:02}.py").write_text(f"x = {i}\n" * (1 + i % 5))
    (folder / "latin.py").write_bytes(b"\xe9\xff")
    lines = [json.dumps({"text": f"line {i} é " * (1 + i % 4)}) for i in range(200)]
    lines[7], lines[80], lines[199], lines[150] = "{no json", json.dumps({"body": "x"}), '["list"]', ""
    lines[120] = json.dumps({"text": " \n"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    import gzip

    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:20]).encode()))
    return [SourceConfig(source=str(tmp_path / name)) for name in ("code", "a.jsonl", "b.jsonl.gz")]


# ------------------------------------------------------------------------------------------------------ megatron's own


@pytest.mark.parametrize("vocab_size", [260, 65499, 65500, 200_000])
def test_megatron_reads_ours(tmp_path, vocab_size):
    indexed = megatron()
    generator = np.random.default_rng(0)
    written = [generator.integers(0, vocab_size, n) for n in (1, 5, 300, 2)]
    writer = ShardWriter(tmp_path / "x", dtype_for(vocab_size))
    for ids in written:
        writer.add(ids)
    facts = writer.finish()
    assert facts["documents"] == 4 and facts["tokens"] == 308
    assert dtype_for(vocab_size) == indexed.DType.optimal_dtype(vocab_size)
    found = indexed.IndexedDataset(str(tmp_path / "x"), mmap=True)
    assert [each.tolist() for each in (found[i] for i in range(len(found)))] == [each.tolist() for each in written]
    assert found.document_indices.tolist() == [0, 1, 2, 3, 4] and found.index.dtype == dtype_for(vocab_size)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "y.bin"), dtype=dtype_for(vocab_size).type)
    for ids in written:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "y.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"x.{end}").read_bytes() == (tmp_path / f"y.{end}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_we_read_megatrons(tmp_path, dtype):
    """Documents of several sequences are whole, empty ones are left out."""
    indexed = megatron()
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_document(torch.arange(10), [4, 6])
    builder.add_item(torch.arange(3))
    builder.add_item(torch.arange(2))
    builder.end_document()
    builder.end_document()  # an empty document
    builder.add_document(torch.tensor([9]), [1])
    builder.finalize(str(tmp_path / "x.idx"))
    for name in ("x", "x.idx", "x.bin"):
        source = opened(tmp_path / name, tmp_path, append_eod=False)
        assert source.lengths.tolist() == [10, 5, 1]
        every = source.read(np.arange(3), np.zeros(3, np.int64), source.lengths)
        assert every.tolist() == [*range(10), 0, 1, 2, 0, 1, 9]
        some = source.read(np.array([2, 0]), np.array([0, 7]), np.array([1, 10]))
        assert some.tolist() == [9, 7, 8, 9]


# ---------------------------------------------------------------------------------------------------------- the command


def run(sources, folder, workers=1, shard_bytes=1000, tokenizer="bytes", **more):
    said: list[str] = []
    return tokenize(sources, tokenizer, folder, workers=workers, shard_bytes=shard_bytes, say=said.append, **more), said


def test_tokenize(corpus, tmp_path):
    manifest, said = run(corpus, tmp_path / "out")
    assert manifest["complete"] and len(manifest["shards"]) > 5 and "shards: " in said[-1]
    expected = [each.text for source in corpus for each in documents(source, on_bad_line="skip")]
    source = opened(tmp_path / "out", tmp_path)
    assert texts(source) == expected
    assert manifest["documents"] == len(expected) and manifest["tokens"] == source.num_tokens
    assert manifest["tokenizer"]["fingerprint"] == BYTES.fingerprint and manifest["dtype"] == "uint16"
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(each["file"], each["line"]) for each in bad] == [
        ("latin.py", None), ("a.jsonl", 8), ("a.jsonl", 81), ("a.jsonl", 121), ("a.jsonl", 200),
        ("b.jsonl.gz", 8),
    ]  # fmt: skip
    assert (
        manifest["rejected"] == 6
        and bad[3]["reason"] == "no text"
        and "not JSON" in bad[1]["reason"]
        and "no key `text`" in bad[2]["reason"]
    )
    for shard in manifest["shards"]:
        for end, facts in shard["files"].items():
            path = tmp_path / "out" / f"{shard['name']}.{end}"
            assert path.stat().st_size == facts["bytes"] and shards.digest(path) == facts["blake2b"]
    assert len(files(tmp_path / "out")) == 3 * len(manifest["shards"]) + 1  # nothing is left over


def test_any_number_of_workers_writes_the_same(corpus, tmp_path):
    tokenizer = train_bpe(["line line x = "] * 10, 270)
    tokenizer.save(tmp_path / "t.json")
    one, _ = run(corpus, tmp_path / "one", tokenizer=str(tmp_path / "t.json"))
    two, _ = run(corpus, tmp_path / "two", workers=2, tokenizer=str(tmp_path / "t.json"))
    assert files(tmp_path / "one") == files(tmp_path / "two") and one == two


def test_goes_on_with_what_is_missing(corpus, tmp_path):
    folder = tmp_path / "out"
    manifest, _ = run(corpus, folder)
    whole = files(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard_*")}
    assert run(corpus, folder)[1] == []  # nothing to do
    (folder / "shard_00002.bin").unlink()
    (folder / "shard_00004.idx").write_bytes(b"cut")
    again, said = run(corpus, folder)
    assert "going on" in said[0] and again == manifest and files(folder) == whole
    after = {path: path.stat().st_mtime_ns for path in folder.glob("shard_*")}
    redone = {path.stem for path in after if after[path] != before[path]}
    assert redone == {"shard_00002", "shard_00004"}
    # The same text is the same, whenever it was written; one of the same size is not.
    text = Path(corpus[1].source)
    os.utime(text, (0, 0))
    assert run(corpus, folder)[0] == manifest
    text.write_text(text.read_text().replace("line 3 ", "line 4 "))
    with pytest.raises(UserError, match="of files that have changed"):
        run(corpus, folder)


def test_a_call_that_made_nothing_is_in_nobodys_way(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n')
    with pytest.raises(UserError, match="there is no document with text"):
        run([SourceConfig(source=str(tmp_path / "a.jsonl"))], tmp_path / "out", shard_bytes=1 << 20)
    manifest, _ = run([SourceConfig(source=str(tmp_path / "a.jsonl"), text_key="body")], tmp_path / "out")
    assert manifest["documents"] == 1 and manifest["rejected"] == 0
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pytest.importorskip("pyarrow").table({"body": ["some text"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column `text`"):
        run([SourceConfig(source=str(tmp_path / "a.parquet"))], tmp_path / "rows")
    manifest, _ = run([SourceConfig(source=str(tmp_path / "a.parquet"), text_key="body")], tmp_path / "rows")
    assert manifest["documents"] == 1


def test_killed_half_way(corpus, tmp_path):
    """kill -9 of the parent while workers write: they end, and the next call writes the same bytes."""
    lines = "".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(4000))
    (tmp_path / "long.jsonl").write_text(lines)
    command = [sys.executable, "-m", "nemo_lite", "data", "tokenize", str(tmp_path / "long.jsonl")]
    command += ["--tokenizer", "bytes", "--shard-mb", "0.1", "--workers", "2", "--to"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "out").glob("shard_*.bin"))) < 3:
        time.sleep(0.002)
        assert process.poll() is None
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "multiprocessing" in str(p.cmdline())]
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    found = read_manifest(tmp_path / "out")
    assert found is not None and not found["complete"] and len(found["shards"]) < found["parts"]
    with pytest.raises(UserError, match=r"\d+ of \d+ shards are made; the same `nemo-lite data tokenize` goes on"):
        opened(tmp_path / "out", tmp_path)
    source = [SourceConfig(source=str(tmp_path / "long.jsonl"))]
    run(source, tmp_path / "out", shard_bytes=100_000)
    run(source, tmp_path / "fresh", shard_bytes=100_000)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_parquet_in_parts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [f"row {i} " * 20 for i in range(300)]
    rows[4] = None
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=50, compression="none")
    source = SourceConfig(source=str(tmp_path / "a.parquet"))
    manifest, _ = run([source], tmp_path / "out", shard_bytes=10_000)
    assert len(manifest["shards"]) > 2
    assert texts(opened(tmp_path / "out", tmp_path)) == [row for row in rows if row]
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["line"], bad["reason"]) == (5, "no `text`")


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_parts_hold_each_line_once(tmp_path, size):
    """Wherever a file is cut: within a line, at its end, in a line longer than a part."""
    lines = [json.dumps({"text": "x" * n}) for n in (1, 30, 2, 90, 3, 4)]
    for end in ("", "\n"):
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + end)
        source = SourceConfig(source=str(tmp_path / "a.jsonl"))
        found = [len(each.text) for part in cut(source, size) for each in part.read(source, ReadStats())]
        assert found == [1, 30, 2, 90, 3, 4]
    assert cut(source, 1 << 20).__next__() == Part(((tmp_path / "a.jsonl", "a.jsonl"),))


def test_command(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["data", "tokenize", *(s.source for s in corpus), "--tokenizer", "bytes", "--to", str(out)]) == 0
    shown = capsys.readouterr()
    assert "tokens/s" in shown.err and f"6 bad documents left out, listed in {out / 'quarantine.jsonl'}" in shown.out
    assert cli.main(["data", "tokenize", corpus[0].source, "--tokenizer", "bytes", "--to", str(out)]) == 1
    assert "holds shards that this call would not make: of other sources" in capsys.readouterr().err
    other = tmp_path / "no_eod"
    arguments = ["data", "tokenize", corpus[0].source, "--tokenizer", "bytes", "--to", str(other), "--no-eod", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 30
    with pytest.raises(UserError, match=r"documents do not end with .* set data\.append_eod=false"):
        opened(other, tmp_path)
    with pytest.raises(UserError, match=r"documents end with .* set data\.append_eod=true"):
        opened(out, tmp_path, append_eod=False)
    assert opened(other, tmp_path, append_eod=False).num_documents == 30


# --------------------------------------------------------------------------------------------------------- in a blend


def test_shards_train_like_the_text_they_are_of(corpus, tmp_path):
    """The same documents in the same order give the same batches."""
    run(corpus[:1], tmp_path / "out")
    text = data_of(corpus[0].source, tmp_path)
    same = data_of(tmp_path / "out", tmp_path)
    with (
        PackedLoader(text, BYTES, seed=3, global_batch_size=4) as a,
        PackedLoader(same, BYTES, seed=3, global_batch_size=4) as b,
    ):
        for _ in range(30):
            x, y = next(a), next(b)
            assert torch.equal(x.input_ids, y.input_ids) and torch.equal(x.doc_ids, y.doc_ids)
            assert x.sources == y.sources
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the text's; shards are not tokenised again


@pytest.mark.parametrize("with_manifest", [True, False])
def test_validation_split(corpus, tmp_path, with_manifest):
    """Every document on one side: that of its text; without a manifest, one that its ids decide."""
    run(corpus, tmp_path / "out", shard_bytes=1000)
    run(corpus, tmp_path / "large", shard_bytes=1 << 20)
    if not with_manifest:
        (tmp_path / "out" / "manifest.json").unlink()
        for path in (tmp_path / "out").glob("*.hash"):
            path.unlink()
    sides = {split: texts(opened(tmp_path / "out", tmp_path, split, validation_fraction=0.3)) for split in
             ("train", "validation", "all")}  # fmt: skip
    assert sorted(sides["train"] + sides["validation"]) == sorted(sides["all"])
    assert not set(sides["train"]) & set(sides["validation"])
    assert 0.1 < len(sides["validation"]) / len(sides["all"]) < 0.5
    large = texts(opened(tmp_path / "large", tmp_path, "validation", validation_fraction=0.3))
    assert (large == sides["validation"]) == with_manifest
    if with_manifest:
        of_text = [d.text for source in corpus for d in documents(source, "validation", 0.3, "skip")]
        assert sorted(large) == sorted(of_text)
    assert opened(tmp_path / "out", tmp_path, "validation").num_documents == 0
    data = data_of(tmp_path / "out", tmp_path, validation_fraction=0.3)
    assert len(validation_batches(data, BYTES, rows_per_batch=4, num_batches=2)) == 2
    kept = list((tmp_path / "cache").glob("*.hash"))
    assert bool(kept) != with_manifest
    for path in kept:  # the second time they are read, not made
        path.write_bytes(bytes(path.stat().st_size))
    if kept:
        assert opened(tmp_path / "out", tmp_path, "train", validation_fraction=0.3).num_documents == 0


def test_fingerprint_follows_the_content(corpus, tmp_path):
    run(corpus, tmp_path / "a")
    run(corpus, tmp_path / "b", workers=2)
    a, b = (opened(tmp_path / name, tmp_path) for name in "ab")
    assert a.fingerprint == b.fingerprint
    assert opened(tmp_path / "a", tmp_path, validation_fraction=0.5).fingerprint != a.fingerprint
    (tmp_path / "a" / "manifest.json").unlink()
    plain = opened(tmp_path / "a", tmp_path).fingerprint
    path = tmp_path / "a" / "shard_00001.bin"
    changed = bytearray(path.read_bytes())
    changed[0] ^= 1
    path.write_bytes(changed)
    assert opened(tmp_path / "a", tmp_path).fingerprint != plain


def test_another_tokenizer_is_refused(corpus, tmp_path):
    run(corpus[:1], tmp_path / "out")
    other = train_bpe(["document document"], 300)
    with pytest.raises(UserError, match="its tokens are of the tokenizer bytes, not of bpe-300"):
        opened(tmp_path / "out", tmp_path, tokenizer=other)
    with pytest.raises(UserError, match="its tokens are of the tokenizer bytes"):
        opened(tmp_path / "out" / "shard_00000", tmp_path, tokenizer=other)


def test_ids_beyond_the_tokenizer_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "x", np.dtype("<i4"))
    writer.add(np.array([1, 70_000, 256]))
    writer.finish()
    source = opened(tmp_path / "x", tmp_path)
    with pytest.raises(UserError, match="it holds the id 70000, and the tokenizer has 260"):
        source.read(np.array([0]), np.array([0]), np.array([3]))


def test_damage_is_named(tmp_path):
    writer = ShardWriter(tmp_path / "x", np.dtype("<u2"))
    writer.add(np.array([1, 256]))
    writer.finish()
    whole, ids = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    for content, message in {
        b"nothing": "is no Megatron index",
        whole[:-1]: "is damaged: its length",
        whole[:9] + b"\x02" + whole[10:]: "version 2 with ids of type 8 cannot be read",
        whole[:17] + b"\x06" + whole[18:]: "version 1 with ids of type 6 cannot be read",
        whole + b"\x00": "multimodal",
        whole[:38] + b"\x02" + whole[39:]: "do not follow each other",
    }.items():
        (tmp_path / "x.idx").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / "x.idx")
    (tmp_path / "x.idx").write_bytes(whole)
    (tmp_path / "x.bin").write_bytes(ids[:-1])
    with pytest.raises(UserError, match="is damaged: it has 3 bytes, not 4"):
        read_index(tmp_path / "x.idx")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"x\.bin: cannot be read"):
        read_index(tmp_path / "x.idx")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_text_is_not_asked_of_tokens(corpus, tmp_path):
    run(corpus[:1], tmp_path / "out")
    source = SourceConfig(source=str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds tokens, and text is asked for"):
        next(documents(source))
    with pytest.raises(UserError, match="tokens already"):
        next(cut(source, 1))
    with pytest.raises(UserError, match="no document with text"):
        (tmp_path / "empty.jsonl").write_text("\n\n{bad\n")
        run([SourceConfig(source=str(tmp_path / "empty.jsonl"))], tmp_path / "empty")


def test_pages_are_given_back(tmp_path, monkeypatch):
    """Memory of a mapped file does not grow with what was read; what is read stays right."""
    from nemo_lite.data import sources

    monkeypatch.setattr(sources, "KEEP_BYTES", 1 << 20)
    writer = ShardWriter(tmp_path / "x", np.dtype("<i4"))
    for i in range(2000):
        writer.add(np.append(np.full(5000, i % 256), 256))
    writer.finish()
    source = opened(tmp_path / "x", tmp_path)

    def mapped_kb() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssFile")))

    before = mapped_kb()
    for d in range(2000):
        ids = source.read(np.array([d]), np.array([0]), np.array([5001]))
        assert ids[0] == d % 256 and ids[-1] == 256
    assert mapped_kb() - before < 10_000  # the file has 40 MB
