"""A placement that splits every weight over two ranks gives the whole model's numbers; model/ knows nothing of it."""

import pytest
import torch
from fake_layers import FakeGroup, split_model
from tiny import assert_close, random_ids, tiny_config, tiny_model

SIZES = {"vocab_size": 62, "n_groups": 4}
OPTIONS = [
    {}, {"split_experts": True}, {"sequence_parallel": True}, {"sequence_parallel": True, "split_experts": True},
]  # fmt: skip


def whole_model(**sizes):
    return tiny_model(tiny_config("MEM*-E", "*E", **(SIZES | sizes)), dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "sizes", [{}, {"moe_latent_size": None, "n_group": 4, "topk_group": 2}], ids=["latent", "plain"]
)
@torch.no_grad()
def test_two_ranks_reproduce_logits_loss_and_router_statistics(options, sizes):
    model = whole_model(router_aux_loss_coef=0.5, **sizes)
    ids = random_ids(model.config, 2, 18)
    docs = torch.tensor([[0] * 7 + [1] * 11, [-1] * 3 + [0] * 12 + [-1] * 3])
    group = FakeGroup()

    def work(rank):
        part = split_model(model, group, rank, **options)
        cache = part.new_cache(2, speculative=True)
        cached = [part(ids[:, s], cache=cache).logits for s in (slice(0, 5), slice(5, 6), slice(6, 10))]
        drafts = part.draft(cache, ids[:, 10], 3, lambda logits: logits.argmax(-1))
        plain, packed = part(ids, mtp=True), part.train()(ids, doc_ids=docs, labels=ids)
        # Logits are a collective of their own here: every rank reads them.
        return plain.logits, plain.mtp_logits, torch.cat(cached, dim=1), drafts, packed

    plain = model(ids, mtp=True)
    cache = model.new_cache(2, speculative=True)
    model(ids[:, :10], cache=cache)
    expected_drafts = model.draft(cache, ids[:, 10], 3, lambda logits: logits.argmax(-1))
    packed = model.train()(ids, doc_ids=docs, labels=ids)
    for logits, mtp_logits, cached, drafts, out in group.run(work):
        assert_close(logits, plain.logits, 1e-10)
        for got, want in zip(mtp_logits, plain.mtp_logits):
            assert_close(got, want, 1e-10)
        assert_close(cached, plain.logits[:, :10], 1e-10)
        assert torch.equal(drafts, expected_drafts)
        assert_close(out.loss, packed.loss, 1e-10)
        assert_close(out.losses, packed.losses, 1e-10)
        assert_close(out.aux_loss, packed.aux_loss, 1e-10)
        assert set(out.expert_counts) == set(packed.expert_counts)
        for name, counts in packed.expert_counts.items():
            assert torch.equal(out.expert_counts[name], counts)


def test_every_weight_that_can_be_split_is():
    model = whole_model()
    group = FakeGroup()
    part = group.run(lambda rank: split_model(model, group, rank))[0]
    shared = {n.rsplit(".", 1)[0].split(".")[-1] for n, p in part.named_parameters() if not hasattr(p, "share")}
    assert shared == {
        "norm", "norm_f", "enorm", "hnorm", "final_layernorm", "eh_proj", "router", "fc1_latent", "fc2_latent",
    }  # fmt: skip
    for (name, whole), p in zip(model.named_parameters(), part.parameters()):
        assert p.numel() * (2 if hasattr(p, "share") else 1) == whole.numel(), name


def test_sizes_that_do_not_divide_are_refused_when_the_model_is_built():
    model = whole_model(vocab_size=61)
    group = FakeGroup()
    with pytest.raises(AssertionError, match="61 does not divide over 2"):
        group.run(lambda rank: split_model(model, group, rank))
