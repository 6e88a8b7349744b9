"""Held-out text: what is summed is what the model says, by document, source and position; experts, drafts, speed."""

import json
import math

import pytest
import torch
from rigged import rigged_model
from tiny import tiny_config, tiny_model

from nemo_lite.config import DataConfig, SourceConfig
from nemo_lite.data import load_tokenizer
from nemo_lite.evaluate import evaluate
from nemo_lite.evaluate.text import Reading, collapse, load, read, specialisation, speed

TOKENIZER = load_tokenizer("bytes")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "home", "again"]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Two files of documents of different lengths, most of them held out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, sizes in (("a", (3, 40)), ("b", (1, 12))):
        rows = []
        for i in range(12):
            count = int(torch.randint(*sizes, (), generator=generator))
            picked = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
            rows.append(json.dumps({"text": " ".join(WORDS[w] for w in picked) + f" {name}{i}"}))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows), encoding="utf-8")
        made.append(SourceConfig(source=str(path)))
    return made


def data_of(sources, seq_len=32):
    return DataConfig(tokenizer="bytes", seq_len=seq_len, blend=sources, validation_fraction=0.9)


@pytest.fixture
def model():
    return tiny_model(tiny_config("MEM*E", mtp="*E", vocab_size=TOKENIZER.vocab_size))


def test_a_uniform_model_needs_log2_v_bits_a_token(sources, model):
    model.head.weight.data.zero_()
    found = read(model, data_of(sources), TOKENIZER, drafts=2)
    figures = found.figures()
    assert figures["loss"] == pytest.approx(math.log(TOKENIZER.vocab_size), abs=1e-5)
    assert figures["bits_per_byte"] * figures["bytes"] == pytest.approx(
        figures["tokens"] * math.log2(TOKENIZER.vocab_size), rel=1e-6
    )
    for each in figures["loss_by_position"]:
        assert each["loss"] == pytest.approx(each["cumulative"], abs=1e-5)
    assert figures["mtp"]["loss_by_depth"] == pytest.approx([figures["loss"]] * 2, abs=1e-5)


@torch.no_grad()
def test_sums_by_document_and_position_are_the_models_own(sources, model):
    """Against a plain loop over the rows."""
    data = data_of(sources)
    found = read(model, data, TOKENIZER, drafts=2, rows=3)
    from nemo_lite.data import validation_batches

    nats, tokens, size = torch.zeros(5), torch.zeros(5), 0
    by_document: dict = {}
    for batch in validation_batches(data, TOKENIZER, rows_per_batch=1, num_batches=999):
        ids, docs = batch.input_ids, batch.doc_ids
        logp = model(ids, doc_ids=docs).logits.log_softmax(-1)[0]
        begin = 0
        for t in range(1, ids.shape[1]):
            if docs[0, t] != docs[0, t - 1]:
                begin = t
            elif docs[0, t] >= 0:
                bin = int(math.log2(t - begin))
                loss = -float(logp[t - 1, ids[0, t]])
                nats[bin] += loss
                tokens[bin] += 1
                size += int(TOKENIZER.byte_lengths()[ids[0, t]])
                key = batch.sources[0][int(docs[0, t])][:2]
                by_document[key] = by_document.get(key, 0.0) + loss
    there = tokens > 0
    assert found.tokens_DP.sum(0)[: len(tokens)][there].tolist() == tokens[there].tolist()
    assert found.nats_DP.sum(0)[: len(nats)][there].tolist() == pytest.approx(nats[there].tolist(), rel=1e-5)
    assert found.bytes_D.sum() == size
    assert sorted(n for n in found.nats_DP.sum(1) if n) == pytest.approx(sorted(by_document.values()), rel=1e-5)
    bins = found.by_position()
    assert bins[0]["from"] == bins[0]["to"] == 1 and bins[-1]["cumulative"] == pytest.approx(found.figures()["loss"])


def test_several_sources_are_told_apart_and_joined(sources, model):
    figures, kept = evaluate(model, TOKENIZER, data_of(sources, 128), prompts=4, new_tokens=6)
    names = [source.source for source in sources]
    assert list(figures["sources"]) == names == list(kept.readings)
    for key in ("bytes", "tokens"):
        assert figures[key] == sum(figures["sources"][name][key] for name in names)
    bits = [figures["sources"][name]["bits_per_byte"] for name in names]
    assert min(bits) <= figures["bits_per_byte"] <= max(bits)
    assert set(figures["specialisation"]) == set(figures["experts"])
    assert all(0 <= each["share"] <= 1 for each in figures["specialisation"].values())
    # Only one source has documents long enough for a prompt; the other is said, and costs nothing.
    assert figures["sources"][names[0]]["free_running"]["prompts"] == 2 == figures["free_running"]["prompts"]
    assert figures["sources"][names[1]]["free_running"] is None
    assert any(names[1] in warning and "64 tokens" in warning for warning in figures["warnings"])
    assert figures["ruler"] is None and figures["speed"]["prompt_tokens"] == 64
    json.dumps(figures)


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_drafts_that_are_always_or_never_right(sources, acceptance):
    model = rigged_model(acceptance, vocab=TOKENIZER.vocab_size)
    found = read(model, data_of(sources), TOKENIZER, drafts=2).figures()
    assert found["teacher_forced"]["by_position"] == [acceptance] * 2
    assert found["teacher_forced"]["acceptance_length"] == 1 + 2 * acceptance


def test_depth_accuracy_is_about_the_text_not_about_the_model(sources):
    """A model and an MTP block that always say the same byte, and it is right as often as it comes."""
    model = rigged_model(1.0, vocab=TOKENIZER.vocab_size)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[ord(" "), TOKENIZER.vocab_size] = 1.0  # the coordinate that all tokens share
    found = read(model, data_of(sources), TOKENIZER, drafts=2).figures()
    assert found["teacher_forced"]["by_position"] == [1.0, 1.0]
    assert 0.05 < found["mtp"]["accuracy_by_depth"][0] < 0.4
    assert found["next_token_accuracy"] == pytest.approx(found["mtp"]["accuracy_by_depth"][0], abs=0.1)


def test_load_and_what_counts_as_collapse():
    even = load(torch.tensor([10, 10, 10, 10]))
    assert even["effective"] == pytest.approx(4) and even["entropy_bits"] == pytest.approx(2) and not even["dead"]
    one = load(torch.tensor([0, 40, 0, 0]))
    assert one["effective"] == pytest.approx(1) and one["dead"] == 3 and one["max_over_mean"] == 4
    assert collapse({"layers.1": even}) == []
    (said,) = collapse({"layers.1": even, "layers.4": one})
    assert "layers.4 has collapsed" in said and "3 of 4 experts took no token" in said


def test_specialisation_is_the_mutual_information_of_expert_and_source():
    apart = {"a": {"x": torch.tensor([30, 10, 0, 0])}, "b": {"x": torch.tensor([0, 0, 1, 3])}}
    assert specialisation(apart)["x"] == pytest.approx({"bits": 1.0, "share": 1.0})
    alike = {"a": {"x": torch.tensor([30, 10])}, "b": {"x": torch.tensor([3, 1])}}
    assert specialisation(alike)["x"] == pytest.approx({"bits": 0.0, "share": 0.0}, abs=1e-12)
    half = {"a": {"x": torch.tensor([1, 1])}, "b": {"x": torch.tensor([1, 0])}}
    assert specialisation(half)["x"]["bits"] == pytest.approx(0.8113 - 0.5, abs=1e-4)  # H(3/4) - 1/2 H(1/2)
    assert specialisation({"a": {"x": torch.tensor([1, 2])}}) is None


def test_speed_times_what_generate_does(model):
    found = speed(model, torch.arange(20), drafts=2, new_tokens=8, rounds=1)
    assert found["prompt_tokens"] == 20 and found["time_to_first_token"] > 0
    assert found["tokens_per_second"] > 0 and found["speculative_tokens_per_second"] > 0
    assert speed(model, torch.arange(5), drafts=0, new_tokens=4, rounds=1)["speculative_tokens_per_second"] is None


def test_readings_join_in_any_number(sources, model):
    parts = [read(model, data_of([source]), TOKENIZER, drafts=1) for source in sources]
    assert Reading.joined(parts[:1]).figures() == parts[0].figures()
    whole = Reading.joined(parts)
    assert len(whole.bytes_D) == sum(len(part.bytes_D) for part in parts)
    for name, counts in whole.experts.items():
        assert torch.equal(counts, sum(part.experts[name] for part in parts))
