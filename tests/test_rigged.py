"""The rigged model keeps its promises."""

import itertools

import pytest
import torch
from rigged import rigged_model

from nemo_lite import HybridLM
from nemo_lite.generate import generate


def measured(model, draft_tokens=1, rows=8, tokens=60, **options):
    prompts = torch.randint(1, model.config.vocab_size, (rows, 5), generator=torch.Generator().manual_seed(11))
    return generate(model, prompts, max_tokens=tokens, speculative=True, draft_tokens=draft_tokens, **options)


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_acceptance_is_what_was_asked_for(acceptance):
    model = rigged_model(acceptance)
    stats = measured(model).stats
    share = stats.accepted / stats.drafted
    assert stats.drafted > 200
    if acceptance in (0, 1):
        assert share == acceptance
    else:
        assert abs(share - acceptance) < 0.1
    later = measured(model, draft_tokens=3).stats.acceptance_by_position
    assert all(a >= b for a, b in itertools.pairwise(later))


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_tokens_are_those_without_speculation(acceptance):
    model = rigged_model(acceptance).double()
    prompts = torch.randint(1, 64, (3, 6), generator=torch.Generator().manual_seed(2))
    plain = generate(model, prompts, max_tokens=40).tokens
    assert generate(model, prompts, max_tokens=40, speculative=True, draft_tokens=3).tokens == plain


@torch.no_grad()
def test_the_past_matters_where_drafts_are_refused():
    """Otherwise a cache that was rolled back wrongly would go unseen."""
    ids = torch.randint(1, 64, (64, 12), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, :-3] = ids.roll(1, 0)[:, :-3]  # the same last three tokens after another past
    for acceptance in (0.0, 0.5):
        model = rigged_model(acceptance)
        differ = (model(ids).logits[:, -1].argmax(-1) != model(other).logits[:, -1].argmax(-1)).double().mean()
        assert differ > 0.1
    assert (rigged_model(1.0)(ids).logits[:, -1] != rigged_model(1.0)(other).logits[:, -1]).any()


def test_it_is_deterministic_other_sizes_work_and_it_saves(tmp_path):
    a, b = rigged_model(0.5), rigged_model(0.5)
    assert a is not b and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    small = rigged_model(0.6, vocab=24, seed=4, hidden_size=40, pattern="M*")
    stats = measured(small).stats
    assert abs(stats.accepted / stats.drafted - 0.6) < 0.1
    a.save_pretrained(tmp_path)
    again = measured(HybridLM.from_pretrained(tmp_path))
    assert again.tokens == measured(a).tokens
    with pytest.raises(ValueError, match="between 0 and 1"):
        rigged_model(1.5)
