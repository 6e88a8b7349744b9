"""Cleaning: each step drops what it is for, says so, and leaves the rest as it was; what is rearranged for fill-in-the-
middle becomes special tokens, and only that."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from nemo_lite import cli
from nemo_lite.config import DataConfig, SourceConfig, UserError
from nemo_lite.data import clean as cleaning
from nemo_lite.data.clean import FIM_TOKENS, Words, clean, dropped_file, fim_tokens, ngrams, rearrange, repetitive
from nemo_lite.data.sources import Document, documents, open_source
from nemo_lite.data.tokenize import tokenize
from nemo_lite.data.tokenizer import load_tokenizer, train_bpe

DICE = random.Random(3)
VOCABULARY = ["".join(DICE.choices("abcdefghijklmnopqrstuvwxyz", k=DICE.randint(2, 9))) for _ in range(4000)]


def prose(count: int, seed: int) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(VOCABULARY) for _ in range(count))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(source=str(path))


def run(tmp_path, texts, **more):
    """(kept texts, [(document, step, reason)], report)."""
    out = tmp_path / "out.jsonl"
    report = clean([write(tmp_path / "in.jsonl", texts)], out, say=lambda _: None, **more)
    kept = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    dropped = [json.loads(line) for line in dropped_file(out).read_text().splitlines()]
    out.unlink(), dropped_file(out).unlink()
    return kept, [(each["document"], each["step"], each["reason"]) for each in dropped], report


def test_ordinary_text_passes(tmp_path):
    texts = [prose(120, seed) for seed in range(20)]
    kept, dropped, report = run(tmp_path, texts, skip=("near",))
    assert kept == texts and dropped == [] and report.kept == 20


def test_length(tmp_path):
    texts = [prose(9, 1), prose(10, 2), prose(30, 3), prose(31, 4)]
    kept, dropped, report = run(tmp_path, texts, skip=("near", "repetition"), words=(10, 30))
    assert kept == texts[1:3]
    assert dropped == [
        ("in.jsonl:1", "length", "too few words: 9, under 10"),
        ("in.jsonl:4", "length", "too many words: 31, over 30"),
    ]
    assert report.plain()["steps"]["length"]["reasons"] == {"too few words": 1, "too many words": 1}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n".join([prose(8, 1)] * 4 + [prose(8, seed) for seed in range(2, 5)]), "repeated lines: 43%, over 30%"),
        ("\n".join([prose(60, 1)] * 2 + [prose(3, s) for s in range(2, 20)]), "characters in repeated lines"),
        ("\n\n".join(a + "\n" + b for a, b in [(prose(9, 1), prose(9, 2))] * 2), "repeated lines"),
        (" ".join([*prose(30, 1).split(), *["buy now"] * 20]), "characters in the top 2-gram"),
        (" ".join(prose(n, s) for n, s in [(12, 1), (60, 2), (12, 1), (9, 3), (12, 1)]), "characters in repeated 5-"),
    ],
)  # fmt: skip
def test_repetition(text, kind):
    found = repetitive(text, Words())
    assert found is not None and ": ".join(found).startswith(kind)


def test_repeated_ngrams_against_the_definition():
    """As it is published: from the left, an n-gram seen before counts, and none of its words twice."""

    def plain(words, n):
        seen, i, found = set(), 0, 0
        while i + n <= len(words):
            gram = tuple(words[i : i + n])
            if gram in seen:
                found += sum(map(len, gram))
                i += n
            else:
                seen.add(gram)
                i += 1
        return found

    dice, hashed = random.Random(0), Words()
    for _ in range(200):
        words = [dice.choice(["a", "bb", "ccc"]) for _ in range(dice.randint(1, 40))]
        lengths = np.array([len(word) for word in words])
        for n in (2, 5):
            assert cleaning._repeated(ngrams(hashed(words), n), lengths, n) == plain(words, n)


def test_exact_duplicates(tmp_path):
    a, b = prose(60, 1), prose(60, 2)
    kept, dropped, _ = run(tmp_path, [a, b, f"  {a}\n", a, b + "."], skip=("near",))
    assert kept == [a, b, b + "."]
    assert dropped == [(f"in.jsonl:{n}", "exact", "duplicate: of in.jsonl:1") for n in (3, 4)]


def test_near_duplicates(tmp_path):
    """Those of nine tenths the same words go, those of half stay; the first of a kind is kept, every time the same."""
    pytest.importorskip("datasketch")
    base = prose(400, 1).split()
    alike = [*base[:380], *prose(20, 5).split()]
    half = [*base[:200], *prose(200, 6).split()]
    texts = [" ".join(words) for words in (base, half, alike)] + [prose(400, 7), "?!" * 60]
    kept, dropped, report = run(tmp_path, texts, words=(1, 1000), skip=("repetition",))
    assert kept == [*texts[:2], *texts[3:]]
    ((name, step, reason),) = dropped
    assert (name, step) == ("in.jsonl:3", "near") and reason.endswith("like in.jsonl:1")
    assert float(reason.split()[2]) == pytest.approx(376 / 416, abs=0.08)  # 5-grams in both, over those in one
    assert run(tmp_path, texts, words=(1, 1000), skip=("repetition",))[1] == dropped
    strict = run(tmp_path, texts, words=(1, 1000), skip=("repetition",), near=0.99)
    assert strict[0] == texts and report.kept == 4


def test_near_duplicates_are_found_at_scale(tmp_path):
    """300 documents and a changed copy of each: nearly all copies go, no original does."""
    pytest.importorskip("datasketch")
    texts = [prose(200, seed) for seed in range(300)]
    copies = [" ".join([*text.split()[:-6], *prose(6, 1000 + i).split()]) for i, text in enumerate(texts)]
    _, dropped, _ = run(tmp_path, texts + copies)
    numbers = [int(name.split(":")[1]) for name, *_ in dropped]
    assert min(numbers) > 300 and len(numbers) >= 295


def test_without_datasketch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(UserError, match="needs the package datasketch"):
        run(tmp_path, [prose(60, 1)])


def test_decontamination(tmp_path):
    """13 words in a row, whatever their case and punctuation; short items whole; too short ones are not looked for."""
    question, short = prose(40, 50).split(), prose(9, 51).split()
    (tmp_path / "eval.jsonl").write_text(
        json.dumps({"question": " ".join(question), "choices": ["yes", " ".join(short)], "n": 3}) + "\n"
    )
    (tmp_path / "eval.txt").write_text(prose(30, 52))

    def around(words):
        return " ".join([*prose(50, 1).split(), *words, *prose(50, 2).split()])

    texts = [
        around(question[5:18]), around(question[5:17]), around([w.upper() + "," for w in question[20:33]]),
        around(short), around(short[:8]), around(["yes"]), around(prose(30, 52).split()[10:23]),
    ]  # fmt: skip
    against = [tmp_path / "eval.jsonl", tmp_path / "eval.txt"]
    kept, dropped, _ = run(tmp_path, texts, against=against, skip=("near", "exact"))
    assert kept == [texts[1], texts[4], texts[5]]
    assert [(name, reason) for name, _, reason in dropped] == [
        ("in.jsonl:1", "in an evaluation set: 13 words in a row of eval.jsonl:1"),
        ("in.jsonl:3", "in an evaluation set: 13 words in a row of eval.jsonl:1"),
        ("in.jsonl:4", "in an evaluation set: 9 words in a row of eval.jsonl:1"),
        ("in.jsonl:7", "in an evaluation set: 13 words in a row of eval.txt"),
    ]
    # Of two that are nearly alike the one without evaluation text stays.
    changed = texts[0].split()
    changed[56] = "another"
    kept, dropped, _ = run(tmp_path, [texts[0], " ".join(changed)], against=against, near=0.5)
    assert kept == [" ".join(changed)] and dropped[0][1] == "against"
    (tmp_path / "eval.txt").write_text("only four words here")
    with pytest.raises(UserError, match="no text in it has 8 words or more"):
        run(tmp_path, texts, against=against[1:], skip=("near",))
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, texts, against=[tmp_path / "none.jsonl"], skip=("near",))


def test_nothing_is_lost(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": prose(60, 1)}) + "\n{broken\n")
    out = tmp_path / "out.jsonl"
    report = clean([SourceConfig(source=str(source))], out, skip=("near",), say=lambda _: None)
    assert report.read == 2 and report.kept == 1
    (bad,) = [json.loads(line) for line in dropped_file(out).read_text().splitlines()]
    assert bad["document"] == "in.jsonl:2" and bad["step"] == "unreadable" and "not JSON" in bad["reason"]
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"out\.jsonl exists; move it away"):
        clean([SourceConfig(source=str(source))], out, skip=("near",))
    with pytest.raises(UserError, match="no such file"):
        clean([SourceConfig(source=str(tmp_path / "none"))], tmp_path / "other.jsonl", skip=("near",))
    with pytest.raises(UserError, match=r"end its name with \.jsonl"):
        clean([SourceConfig(source=str(source))], tmp_path / "other.txt", skip=("near",))
    assert out.read_bytes() == before
    out.unlink()  # as who wants it again does: the list of what was dropped is nobody's work
    clean([SourceConfig(source=str(source))], out, skip=("near",), say=lambda _: None)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.dropped.jsonl", "out.jsonl"]


# ------------------------------------------------------------------------------------------------------------------ FIM

NAMES = FIM_TOKENS[0]


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """A tokenizer with fill-in-the-middle tokens, and its path."""
    tokenizer = train_bpe(["def f(x):\n    return x\n"] * 20, 300, NAMES)
    path = tmp_path_factory.mktemp("coder") / "tokenizer.json"
    tokenizer.save(path)
    return tokenizer, path


def test_fim_rearranges_and_loses_nothing():
    changed = 0
    for seed in range(400):
        text = prose(20, seed)
        found = rearrange(Document(text, "x"), 0.5, NAMES)
        assert rearrange(Document(text, "x"), 0.5, NAMES) == found
        if found.fim:
            changed += 1
            prefix, suffix, middle = found.pieces()
            assert found.text == f"{NAMES[0]}{prefix}{NAMES[1]}{suffix}{NAMES[2]}{middle}"
            assert prefix + middle + suffix == text
        else:
            assert found.text == text
    assert 150 < changed < 250
    spelled = Document(f"about {NAMES[1]} and more", "x")
    assert rearrange(spelled, 1.0, NAMES) is spelled


def test_fim_becomes_special_tokens(tmp_path, coder):
    """In the token cache and in shards: the three ids once each, and the text between them as without."""
    tokenizer, path = coder
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(30)] + [
        f"text that spells {NAMES[0]} itself " * 9
    ]
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", texts)
    report = clean(
        [source], out, skip=("length", "repetition", "near"), fim=0.6, fim_names=fim_tokens(tokenizer, None),
        say=lambda _: None,
    )  # fmt: skip
    assert 5 < report.rearranged < 30 and report.kept == 31
    marks = [tokenizer.backend.token_to_id(name) for name in NAMES]
    cleaned = SourceConfig(source=str(out))
    data = DataConfig(blend=[cleaned], validation_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    tokenize([cleaned], str(path), tmp_path / "shards", workers=1, say=lambda _: None)
    stored = SourceConfig(source=str(tmp_path / "shards"))
    one = np.ones(1, np.int64)
    for kind in (cleaned, stored):
        found = open_source(kind, data, tokenizer, "train")
        assert found.num_documents == 31
        for d, (document, original) in enumerate(zip(documents(cleaned), texts, strict=True)):
            ids = found.read(one * d, one * 0, one * found.lengths[d])[:-1]
            if not document.fim:
                assert not set(ids.tolist()) & set(marks)
                assert tokenizer.decode(ids) == original
                continue
            places = [np.flatnonzero(ids == mark).tolist() for mark in marks]
            assert places[0] == [0] and [len(each) for each in places] == [1, 1, 1]
            cut = [0, places[1][0], places[2][0], len(ids)]
            parts = [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(cut)]
            assert parts[0] + parts[2] + parts[1] == original
    with pytest.raises(UserError, match=r"the tokenizer bytes has no special token <\|fim_prefix\|>"):
        open_source(cleaned, data, load_tokenizer("bytes"), "train")


def test_other_peoples_fim_key_is_left_alone(tmp_path):
    records = [{"text": "a b c", "fim": ["x"]}, {"text": "a b", "fim": ["b", "a"]}, {"text": "a", "fim": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert all(not each.fim for each in documents(SourceConfig(source=str(tmp_path / "a.jsonl"))))


def test_fim_tokens_by_name(coder):
    tokenizer, _ = coder
    assert fim_tokens(tokenizer, None) == NAMES and fim_tokens(tokenizer, NAMES[::-1]) == NAMES[::-1]
    with pytest.raises(UserError, match="has no fill-in-the-middle tokens of a known name"):
        fim_tokens(load_tokenizer("bytes"), None)
    with pytest.raises(UserError, match="has no special tokens a b c"):
        fim_tokens(tokenizer, ["a", "b", "c"])


def test_command(tmp_path, coder, capsys):
    write(tmp_path / "in.jsonl", [prose(60, 1), prose(60, 1), prose(3, 2)])
    arguments = ["data", "clean", str(tmp_path / "in.jsonl"), "--skip", "near", "--to"]
    assert cli.main([*arguments, str(tmp_path / "out.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "exact       dropped" in shown and "- too few words" in shown and "out.dropped.jsonl" in shown
    assert cli.main([*arguments, str(tmp_path / "b.jsonl"), "--json", "--fim", "1", "--tokenizer", str(coder[1])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["read"], found["kept"], found["rearranged"]) == (3, 1, 1)
    assert found["steps"]["exact"] == {"dropped": 1, "characters": len(prose(60, 1)), "reasons": {"duplicate": 1}}
    for wrong, message in {
        ("--fim", "1"): "--fim needs --tokenizer", ("--fim", "2"): "shares between 0 and 1",
        ("--min-words", "9", "--max-words", "3"): "--min-words exceeds",
        ("--fim", "1", "--tokenizer", "bytes"): "has no fill-in-the-middle tokens",
    }.items():  # fmt: skip
        assert cli.main([*arguments, str(tmp_path / "c.jsonl"), *wrong]) == 1
        assert message in capsys.readouterr().err
