"""Long-range questions: a model that finds the needle gets 1.0, one that cannot gets a margin of zero."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rigged import rigged_model
from tiny import tiny_config, tiny_model

from nemo_lite.config import UserError
from nemo_lite.data import load_tokenizer
from nemo_lite.data.longrange import TASKS, counter, make
from nemo_lite.evaluate.ruler import CHANCE, ask, figures, mark, parse_lengths, summary

TOKENIZER = load_tokenizer("bytes")
COUNT = counter(TOKENIZER)


class Copier:
    """A stand-in for a model: it goes on as the text did after the longest earlier occurrence of its last tokens."""

    training, device = False, torch.device("cpu")

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def new_cache(self, batch):
        return SimpleNamespace(rows=[[] for _ in range(batch)], rollback=lambda: None)

    def __call__(self, ids, doc_ids, cache, tentative=False):
        logits = torch.zeros(*ids.shape, TOKENIZER.vocab_size)
        for b, row in enumerate(cache.rows):
            seen = list(row)
            for t, (token, doc) in enumerate(zip(ids[b].tolist(), doc_ids[b].tolist())):
                if doc < 0:
                    continue
                seen.append(token)
                if tentative:
                    logits[b, t] = 20.0 * F.one_hot(torch.tensor(self.following(seen)), TOKENIZER.vocab_size)
            if not tentative:
                cache.rows[b] = seen
        return SimpleNamespace(logits=logits)

    def following(self, seen):
        text, size = bytes(seen), 1
        found = 0
        while size < len(seen) and (at := text.rfind(text[-size:], 0, len(text) - 1)) >= 0:
            found, size = at + size, size + 1
        return seen[found] if found else 0


@pytest.mark.parametrize("task", ["single", "multikey"])
def test_a_model_that_finds_the_place_gets_everything(task):
    samples = [make(task, 700, COUNT, index=i) for i in range(4)]
    found = summary(mark(Copier(), TOKENIZER, samples))
    assert found["score"] == found["exact"] == found["likeliest"] == 1.0 and found["margin"] > 10


def test_a_model_that_copies_is_right_only_in_parts_where_it_must_put_together():
    samples = [make("multiquery", 900, COUNT, index=i) for i in range(4)]
    found = summary(mark(Copier(), TOKENIZER, samples))
    assert found["exact"] == 0.0 and found["score"] < 0.5


def test_a_rigged_model_that_knows_one_answer_by_heart():
    """A real HybridLM whose head is a table of successors, with an answer in which no digit comes twice."""
    sample = next(
        sample for i in range(50) if (sample := make("single", 300, COUNT, index=i)) and len(set(sample.answer)) == 6
    )
    model = rigged_model(1.0, vocab=TOKENIZER.vocab_size)
    chain = [ord("s"), *sample.answer.encode()]
    with torch.no_grad():
        for before, after in itertools.pairwise(chain):
            model.head.weight[:, before] = 0.0
            model.head.weight[after, before] = 1.0
    (found,) = mark(model, TOKENIZER, [sample])
    assert found.exact and found.score == 1.0 and found.likeliest and found.margin > 0


def test_a_model_that_knows_nothing_has_no_margin():
    model = tiny_model(tiny_config("M*", vocab_size=TOKENIZER.vocab_size))
    model.head.weight.data.zero_()
    samples = [make(task, 600, COUNT, index=i) for task in TASKS if task != "words" for i in range(2)]
    for found in mark(model, TOKENIZER, [s for s in samples if s.task in ("single", "multikey", "variables")]):
        assert found.margin == pytest.approx(0, abs=1e-3) and not found.exact


@torch.no_grad()
def test_marks_are_those_of_whole_forwards():
    """The shared, padded cache against one forward a text."""
    model = tiny_model(tiny_config("MEM*E", vocab_size=TOKENIZER.vocab_size), dtype=torch.float64)
    samples = [make(task, 520, COUNT, index=i) for task in ("single", "facts", "variables") for i in range(2)]
    marks = mark(model, TOKENIZER, samples)

    def logp(prompt, answer):
        ids = torch.tensor([[*prompt.encode(), *answer.encode()]])
        rows = model(ids).logits.log_softmax(-1)[0, len(prompt.encode()) - 1 : -1]
        return float(rows.gather(-1, torch.tensor(list(answer.encode()))[:, None]).sum())

    for sample, found in zip(samples, marks):
        others = [logp(sample.prompt, wrong) for wrong in sample.distractors]
        right = logp(sample.prompt, sample.answer)
        assert found.margin == pytest.approx(right - sum(others) / len(others), abs=1e-3)
        assert found.likeliest == (right > max(others))


def test_lengths_and_questions():
    assert parse_lengths("2k, 512,512") == [512, 2048] and parse_lengths("0") == []
    with pytest.raises(UserError, match="'4x' is no length"):
        parse_lengths("1k,4x")
    asked = ask([300, 600], 2, TOKENIZER)
    assert ("single" in {task for length, task in asked if length == 300}) and len(asked) > len(TASKS)
    assert asked == ask([300, 600], 2, TOKENIZER) != ask([300, 600], 2, TOKENIZER, seed=1)
    with pytest.raises(UserError, match="no task is as short"):
        ask([20], 2, TOKENIZER)
    marks = {key: mark(Copier(), TOKENIZER, samples[:1]) for key, samples in asked.items() if key[1] == "single"}
    table = figures(marks)
    assert table["300"]["single"] == table["300"]["all"] and table["600"]["all"]["exact"] == 1.0 > CHANCE
