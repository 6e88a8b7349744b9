"""Layouts: each rule says what is wrong and what would be right, stages are the best cut, groups cover every rank."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from nemo_lite.check import flops_per_token, layer_flops
from nemo_lite.config import ModelConfig, MTPConfig, load_recipe
from nemo_lite.parallel import layout as layouts
from nemo_lite.parallel.layout import GROUPS, Layout, group, problems, stages

PRETRAIN = Path(__file__).parents[2] / "recipes" / "pretrain"
SUPER = load_recipe(PRETRAIN / "nemotron3_super.yaml").model
SMALL = ModelConfig(pattern="MEM*E-", num_attention_heads=32, num_key_value_heads=4)


def ask(config=SMALL, world=8, seq_len=256, global_batch=64, micro_batch=1, **sizes):
    return problems(config, Layout(**sizes), world, seq_len, global_batch, micro_batch)


@pytest.mark.parametrize(
    "sizes", [{}, {"tp": 2}, {"tp": 4, "sp": True}, {"tp": 4, "cp": 2, "ep": 8}, {"pp": 4, "ep": 2}, {"cp": 8}]
)
def test_legal(sizes):
    assert ask(**sizes) == []


@pytest.mark.parametrize(
    "asked, sentences",
    [
        ({"tp": 0}, ["parallel.tp is 0, and must be at least 1"]),
        (
            {"tp": 3, "world": 12, "global_batch": 60},
            [
                "parallel.tp is 3, which does not divide the 260 rows of the embedding and the head (nearest: 2, 4)",
                "parallel.tp is 3, which does not divide the 32 query heads (nearest: 2, 4)",
                "parallel.tp is 3, which does not divide the 8 Mamba-2 heads (nearest: 2, 4)",
                "parallel.tp is 3, which does not divide the 128 columns of the shared expert (nearest: 2, 4)",
                "parallel.tp is 3, which does not divide the 128 columns of the MLP (nearest: 2, 4)",
                "parallel.tp is 3, which neither divides the 4 key/value heads nor is a multiple of it (nearest: 2, 4)",
                "parallel.tp is 3, which neither divides the 2 Mamba-2 groups nor is a multiple of it (nearest: 2, 4)",
                "parallel.tp is 3, which does not divide the 256 tokens of a micro batch, as experts need "
                "(nearest: 2, 4)",
            ],
        ),
        (
            {"tp": 2, "cp": 3, "seq_len": 258},
            [
                "parallel.tp x parallel.cp x parallel.pp is 2 x 3 x 1 = 6, which does not divide the 8 ranks "
                "(nearest: 4, 8)"
            ],
        ),
        (
            {"ep": 3, "world": 6, "global_batch": 6},
            ["parallel.ep is 3, which does not divide the 8 experts (nearest: 2)"],
        ),
        (
            {"ep": 8, "pp": 2},
            ["parallel.ep is 8, which does not divide the 4 ranks of a pipeline stage (nearest: 4)"],
        ),
        (
            {"ep": 2, "config": ModelConfig(pattern="M-")},
            ["parallel.ep is 2, and the pattern has no experts (nearest: 1)"],
        ),
        (
            {"pp": 8, "config": ModelConfig(pattern="M*M")},
            ["parallel.pp is 8, more than the 3 layers (nearest: 3)"],
        ),
        (
            {"pp": 2, "config": ModelConfig(pattern="M|*|E")},
            ["parallel.pp is 2, which does not divide the 3 stages of the pattern (nearest: 1, 3)"],
        ),
        (
            {"pp": 2, "config": ModelConfig(pattern="M|*|M|E"), "global_batch": 12},
            [
                "train.global_batch_size is 12, 3 micro batches for each data parallel rank, and interleaved stages "
                "take a multiple of parallel.pp = 2 (nearest: 8, 16)"
            ],
        ),
        ({"cp": 4, "seq_len": 100}, ["data.seq_len is 100, no multiple of 2 x parallel.cp = 8 (nearest: 96, 104)"]),
        (
            {"cp": 4, "seq_len": 16},
            ["data.seq_len is 16, and with parallel.cp = 4 each of a row's 8 pieces needs 4 tokens (nearest: 32)"],
        ),
        (
            {"tp": 4, "sp": True, "seq_len": 250},
            [
                "parallel.tp is 4, which does not divide the 250 tokens of a micro batch, as parallel.sp needs "
                "(nearest: 2, 5)"
            ],
        ),
        ({"sp": True}, ["parallel.sp is true, which needs parallel.tp above 1 (nearest: false)"]),
        (
            {"global_batch": 100, "micro_batch": 2},
            [
                "train.global_batch_size is 100, no multiple of the 16 rows of 8 data parallel ranks x "
                "train.micro_batch_size = 2 (nearest: 96, 112)"
            ],
        ),
    ],
)
def test_each_rule_is_a_sentence(asked, sentences):
    assert ask(**asked) == sentences


def test_published_layouts_of_super_are_legal():
    for sizes in ({"ep": 64}, {"tp": 2, "ep": 64, "sp": True}, {"pp": 2, "ep": 32}, {"tp": 8, "ep": 64, "sp": True}):
        assert problems(SUPER, Layout(**sizes), 64, 8192, 512, 1) == []
    assert problems(SUPER, Layout(tp=2, ep=64, cp=64, sp=True), 1024, 1 << 20, 16, 1) == []


def test_cuts_decide_stages():
    config = ModelConfig(pattern="ME|M*E|-")
    assert stages(config, Layout(pp=3), 256) == [range(0, 2), range(2, 5), range(5, 6)]
    assert stages(config, Layout(), 256) == [range(0, 6)]


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("mtp", ["", "*E"])
def test_balanced_stages_are_the_best_cut(pp, mtp):
    config = ModelConfig(pattern="MEM*E-M-", vocab_size=512, mtp=MTPConfig(pattern=mtp))
    costs = [layer_flops(config, kind, 256) for kind in config.layers]
    flops = flops_per_token(config, 256)
    last = flops["parts"]["head"] + flops["mtp"]

    def most(ends):
        parts = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, len(costs)))]
        return max(*parts[:-1], parts[-1] + last) if parts[:-1] else parts[-1] + last

    found = stages(config, Layout(pp=pp), 256)
    assert [layer for stage in found for layer in stage] == list(range(len(costs)))
    assert all(found) and len(found) == pp
    best = min(most(ends) for ends in itertools.combinations(range(1, len(costs)), pp - 1))
    assert most([stage.stop for stage in found[:-1]]) == best


def test_stages_of_super():
    found = stages(SUPER, Layout(pp=4), 8192)
    assert [len(stage) for stage in found] == [26, 26, 26, 10]  # the last has the head three times, and MTP


def test_groups():
    layout = Layout(tp=2, cp=2, pp=2, ep=4)
    world = 16  # dp = 2, edp = 2
    found = {kind: group(layout, world, kind, 5) for kind in GROUPS}
    assert found == {
        "tp": [4, 5], "cp": [5, 7], "dp": [1, 5], "dp_cp": [1, 3, 5, 7], "pp": [5, 13], "ep": [4, 5, 6, 7],
        "edp": [1, 5],
    }  # fmt: skip
    assert (layout.dp(world), layout.edp(world)) == (2, 2)


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_cover_every_rank_once(kind):
    layout, world = Layout(tp=2, cp=3, pp=2, ep=4), 48
    found = {tuple(group(layout, world, kind, rank)) for rank in range(world)}
    assert sorted(rank for ranks in found for rank in ranks) == list(range(world))
    assert all(rank in group(layout, world, kind, rank) for rank in range(world))


def test_layouts_are_values():
    assert Layout(tp=2) == dataclasses.replace(Layout(), tp=2)
    assert "torch" not in vars(layouts)
