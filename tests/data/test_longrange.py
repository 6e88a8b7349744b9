"""The long-range tasks: what is asked is in the context, lengths hold, and training never sees an evaluation prompt."""

import json
import re

import pytest

from nemo_lite.config import UserError
from nemo_lite.data import load_tokenizer
from nemo_lite.data.longrange import DISTRACTORS, TASKS, counter, documents, main, make

COUNT = counter(load_tokenizer("bytes"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [500, 3000])
def test_a_sample_is_as_long_as_asked_and_answers_differ(task, length):
    for index in range(5):
        sample = make(task, length, COUNT, index=index)
        assert sample is not None and 0.85 * length < COUNT([sample.text])[0] <= length
        assert sample == make(task, length, COUNT, index=index)
        assert sample.text.startswith(sample.prompt + sample.answer) and sample.answer == "".join(sample.parts)
        assert all(part.strip(", ") in sample.context for part in sample.parts)
        assert len({sample.answer, *sample.distractors}) == 1 + DISTRACTORS
        for wrong in sample.distractors:
            assert re.sub(r"\w+", "", wrong) == re.sub(r"\w+", "", sample.answer), "not of the same form"


def fact(pattern, text):
    return re.findall(pattern, text)


def solve(sample):
    """The answer, found in the context by reading it."""
    text, question = sample.context, sample.question
    key = r"(\w+ \w+)"
    if sample.task in ("single", "multikey", "multivalue", "multiquery"):
        asked = fact(key, re.search(r"for (.*?)(?:, in .*| is)$", question)[1].replace(" and ", ", "))
        found = {name: fact(rf"The number for {name} is (\d+)", text) for name in asked}
        return [value for name in asked for value in found[name]]
    if sample.task == "variables":
        held = {re.search(r"\d+", question)[0]}
        right = []
        for name, value in fact(r"(\w+) = (\w+)\.", text):
            if value in held:
                held.add(name)
                right.append(name)
        return right
    if sample.task == "words":
        words = text.split("\n", 1)[1].split()
        return sorted(set(words), key=words.count, reverse=True)[:3]
    name = re.match(r"\n(\w+ \w+)", question)[1]
    verb = r"was born in (\w+)" if "born" in question else r"works as a (\w+)"
    return fact(rf"^{name} .*?{verb}", "\n".join(line for line in text.split("\n") if line.startswith(name)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [520, 6000])
def test_the_answer_follows_from_the_context(task, length):
    for index in range(10):
        sample = make(task, length, COUNT, seed=3, index=index)
        assert [part.strip(", ") for part in sample.parts] == solve(sample)


def test_needles_fall_anywhere():
    places = []
    for index in range(60):
        sample = make("single", 2000, COUNT, index=index)
        places.append(sample.context.index("The number for") / len(sample.context))
    assert min(places) < 0.15 and max(places) > 0.85 and 0.35 < sum(places) / 60 < 0.65


def test_what_does_not_fit_is_none_and_an_unknown_task_is_said():
    assert make("multiquery", 100, COUNT) is None
    with pytest.raises(UserError, match="no such long-range task"):
        make("needle", 1000, COUNT)


def test_training_and_evaluation_share_no_prompt():
    train = {make(t, 600, COUNT, index=i, purpose="train").prompt for t in TASKS for i in range(20)}
    asked = {make(t, 600, COUNT, index=i).prompt for t in TASKS for i in range(20)}
    assert len(train) == len(asked) == 140 and not train & asked
    assert all(a.split("\n", 1)[1] not in t for a in asked for t in train)


def test_documents_take_the_tasks_in_turn_until_there_are_enough():
    made = list(documents(["single", "facts"], 1000, 20_000, COUNT, seed=1))
    lengths = [count for _, count in made]
    assert 20_000 <= sum(lengths) < 21_000 and max(lengths) <= 1000 and min(lengths) < 300
    assert {sample.task for sample, _ in made} == {"single", "facts"}
    with pytest.raises(UserError, match="use more tokens"):
        next(documents(["multikey"], 50, 1000, COUNT))


def test_the_command_writes_jsonl(tmp_path, capsys):
    out = tmp_path / "new" / "long.jsonl"
    words = ["--to", str(out), "--tokens", "5000", "--length", "800", "--tasks", "single,words", "--seed", "7"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert said["documents"] == len(rows) and said["tokens"] == sum(row["tokens"] for row in rows) >= 5000
    assert all(len(row["text"].encode()) == row["tokens"] for row in rows)
    first = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == first and [p.name for p in out.parent.iterdir()] == [out.name]
    assert "documents" in capsys.readouterr().out
    with pytest.raises(UserError, match="--tasks needle: no such task"):
        main(["--to", str(out), "--tokens", "1", "--length", "1", "--tasks", "needle"])
    with pytest.raises(UserError, match="--tokens must be 1 or more"):
        main(["--to", str(out), "--tokens", "0", "--length", "1"])
    with pytest.raises(UserError, match="cannot be written"):
        main(["--to", str(tmp_path / "new" / "long.jsonl" / "x"), "--tokens", "9", "--length", "900"])
    assert out.read_bytes() == first
