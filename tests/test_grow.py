"""Growth: where layers come from, what preserves the function and what does not, ties of routers, training on."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from nemo_lite_kernels import OPS, select
from runs import ALONE, ROOT, recipe_of
from tiny import random_ids, tiny_config, tiny_model

from nemo_lite import HybridLM, cli
from nemo_lite.config import UserError, load_recipe
from nemo_lite.data import load_tokenizer
from nemo_lite.grow import Growth, align, grow
from nemo_lite.train.loop import build_model, train
from nemo_lite.train.optim import update_router_biases

# ---------------------------------------------------------------------------------------------------------------- depth


def spelled(old: str, new: str) -> str:
    """The origins of a pattern's layers: the old layer's number, `+` before an added one, `?` for a fresh one."""
    return " ".join(("" if o.kept else "+") + ("?" if o.layer is None else str(o.layer)) for o in align(old, new))


@pytest.mark.parametrize(
    ("old", "new", "origins"),
    [
        ("MEM*E", "MEM*E", "0 1 2 3 4"),
        ("M*E", "MM**EE", "0 +0 1 +1 2 +2"),  # the earliest of two places that are as near
        ("ME", "MEME", "0 +1 +0 1"),  # the ends stay the ends
        ("ME*E", "ME*EME*E", "0 +1 +2 1 +0 +1 2 3"),
        ("M-M-", "MEME", "0 1 2 3"),  # converted
        ("M-", "M-E", "0 1 +?"),  # - stays - where it can
        ("M-", "M*E", "0 +? 1"),
        ("M-M-", "MEM-", "0 1 2 3"),
        ("E", "*ME", "+? +? 0"),
    ],
)
def test_where_layers_come_from(old, new, origins):
    assert spelled(old, new) == origins


@given(st.text("M*E-", min_size=1, max_size=8), st.lists(st.tuples(st.integers(0, 8), st.sampled_from("M*E-"))))
def test_every_old_layer_has_one_place_in_order(old, added):
    new = list(old)
    for at, letter in added:
        new.insert(min(at, len(new)), letter)
    found = align(old, "".join(new))
    assert [o.layer for o in found if o.kept] == list(range(len(old)))
    for letter, origin in zip(new, found):
        if origin.layer is not None:
            assert old[origin.layer] == letter or (old[origin.layer], letter) == ("-", "E")
        else:
            assert not origin.kept and letter not in [n for n, o in zip(new, found) if o.kept]


@pytest.mark.parametrize(("old", "new", "layer"), [("MEM*E", "MEME", "layer 3 (*)"), ("ME", "EM", "layer 1 (E)")])
def test_a_layer_without_a_place_is_named(old, new, layer):
    with pytest.raises(UserError, match="has no place") as error:
        align(old, new)
    assert layer in str(error.value)


# ------------------------------------------------------------------------------------------------------------- function

PLAIN = {"moe_latent_size": None}
DENSE = {"intermediate_size": 48, "routed_scaling_factor": 2.5}
SIX = {"moe_intermediate_size": 8, "n_routed_experts": 12, "num_experts_per_tok": 6}  # 6 parts of 8

PRESERVED = [
    ("MEM*E", "*E", {}, ["pattern=MEMEM**EE"]),
    ("MEM*E", "*E", {}, ["mtp.pattern=*E*E"]),
    ("MEM*E", "", {}, ["mtp.pattern=*E"]),
    ("M*-", "", {}, ["pattern=M*-ME*-", "intermediate_size=80"]),
    ("ME*-", "*E", PLAIN, ["pattern=ME*-E*-M", "intermediate_size=96", "moe_intermediate_size=40"]),
    ("ME", "", {}, ["moe_latent_size=24"]),
    ("ME", "E", {}, ["moe_latent_size=null"]),
    ("ME", "", PLAIN, ["moe_latent_size=32"]),
    ("ME", "", PLAIN, ["moe_latent_size=40"]),
    ("ME", "", {}, ["moe_shared_expert_intermediate_size=64"]),
    ("ME", "", {"n_shared_experts": 0}, ["n_shared_experts=1", "moe_shared_expert_intermediate_size=16"]),
    # divided experts: parts that fit exactly, that leave room, that are uneven; with and without normalisation
    ("ME*E", "E", {}, ["n_routed_experts=16", "num_experts_per_tok=6", "moe_intermediate_size=12"]),
    ("ME*E", "", {}, ["n_routed_experts=24", "num_experts_per_tok=9"]),
    ("ME", "", PLAIN, ["n_routed_experts=40", "num_experts_per_tok=15", "moe_intermediate_size=8"]),
    ("ME", "", {"norm_topk_prob": False}, ["n_routed_experts=16", "num_experts_per_tok=6", "moe_intermediate_size=16"]),
    ("ME", "", {}, ["n_routed_experts=16", "num_experts_per_tok=6", "routed_scaling_factor=1.0"]),
    ("ME", "", {}, ["n_routed_experts=16", "num_experts_per_tok=6", "moe_latent_size=20", "pattern=MEME"]),
    # sleeping copies
    ("ME*E", "E", {}, ["n_routed_experts=16"]),
    ("ME", "", {"n_group": 4, "topk_group": 2}, ["n_routed_experts=20", "moe_intermediate_size=32"]),
    ("ME", "", {"norm_topk_prob": False}, ["n_routed_experts=11"]),
    # router groups
    ("ME", "", {}, ["n_routed_experts=24", "n_group=3"]),
    # experts in the place of a dense MLP
    ("M-*-", "", PLAIN | DENSE | SIX | {"n_shared_experts": 0}, ["pattern=ME*E"]),
    ("M-*-", "", PLAIN | DENSE | SIX, ["pattern=ME*-", "moe_shared_expert_intermediate_size=10"]),
    ("M-", "", DENSE | SIX | {"moe_latent_size": 40, "n_shared_experts": 0}, ["pattern=ME"]),
    ("M-", "", DENSE | SIX | {"moe_latent_size": 16, "intermediate_size": 50}, ["pattern=ME"]),  # 40 shared, 10 routed
    ("M-", "", DENSE | {"moe_latent_size": 8}, ["pattern=ME", "moe_shared_expert_intermediate_size=48"]),
    ("M-", "", PLAIN | DENSE | {"norm_topk_prob": False}, ["pattern=ME", "moe_shared_expert_intermediate_size=56"]),
    ("M-", "", PLAIN | DENSE | SIX | {"n_shared_experts": 0, "n_group": 2}, ["pattern=ME", "topk_group=2"]),
    # both
    ("ME-", "", PLAIN | DENSE, ["pattern=MEE", "n_routed_experts=24", "num_experts_per_tok=9",
                                "moe_shared_expert_intermediate_size=44", "moe_intermediate_size=8"]),
]  # fmt: skip

CHANGED = [
    ("ME", "", {}, ["num_experts_per_tok=4"], "4 experts are chosen for a token, which were 3"),
    ("ME", "", PLAIN, ["moe_latent_size=16"], "experts of hidden size 32 work in 16 latent dimensions"),
    ("M-", "", DENSE | SIX | {"moe_latent_size": 16, "n_shared_experts": 0}, ["pattern=ME"],
     "a dense MLP of 48 units works in 16 latent dimensions"),
    ("M-", "", PLAIN | DENSE | SIX | {"n_shared_experts": 0, "norm_topk_prob": False}, ["pattern=ME"],
     "norm_topk_prob is off"),
    ("ME", "", {"n_group": 4, "topk_group": 2}, ["n_routed_experts=16", "num_experts_per_tok=6"],
     "a router group's score is the sum of its two largest"),
]  # fmt: skip


def saved(folder, pattern, mtp, sizes, seed=0, dtype=torch.float64):
    config = tiny_config(pattern, mtp=mtp, **sizes)
    tiny_model(config, seed=seed, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("pattern", "mtp", "sizes", "keys"), PRESERVED)
def test_what_is_said_to_preserve_the_function_does(tmp_path, pattern, mtp, sizes, keys):
    """To 1e-12 in float64, MTP included, on 192 tokens; and every weight moves within two steps of training."""
    old = saved(tmp_path / "old", pattern, mtp, sizes)
    facts = grow(old, tmp_path / "new", keys, tokens=192)
    assert facts["preserved"] and not facts["changes"]
    measured = facts["measured"]
    assert measured["largest_difference"] < 1e-12 * max(1, measured["largest_logit"])
    model = HybridLM.from_pretrained(tmp_path / "new").train()
    ids = random_ids(model.config, 4, 40, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * (p.grad if p.grad is not None else 0)
                p.grad = None
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize(("pattern", "mtp", "sizes", "keys", "why"), CHANGED)
def test_what_changes_the_function_is_said_and_measured(tmp_path, pattern, mtp, sizes, keys, why):
    facts = grow(saved(tmp_path / "old", pattern, mtp, sizes), tmp_path / "new", keys)
    assert not facts["preserved"] and why in "; ".join(facts["changes"])
    assert facts["measured"]["largest_difference"] > 1e-4


def test_the_kept_directions_lose_the_least(tmp_path):
    """Plain experts of low rank in a latent space of that rank: preserved in fact, though it cannot be promised."""
    model = tiny_model(tiny_config("ME", **PLAIN), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    experts = model.layers[1].mixer.experts
    with torch.no_grad():
        basis = torch.randn(32, 12, dtype=torch.float64, generator=generator) / 6
        experts.up.copy_(torch.randn(8, 24, 12, dtype=torch.float64, generator=generator) @ basis.T / 3)
        experts.down.copy_(basis @ torch.randn(8, 12, 24, dtype=torch.float64, generator=generator) / 3)
    model.save_pretrained(tmp_path / "old")
    off = [grow(tmp_path / "old", tmp_path / "new", [f"moe_latent_size={n}"]) for n in (8, 10, 12, 16)]
    off = [facts["measured"]["largest_difference"] for facts in off]
    assert off[0] > off[1] > 1e-3 and max(off[2:]) < 1e-11


def test_weights_are_stored_as_they_were(tmp_path):
    """bfloat16 stays bfloat16, what is float32 stays so; copies and powers of two lose nothing."""
    old = saved(tmp_path / "old", "ME*E", "", {}, dtype=torch.bfloat16)
    keys = ["n_routed_experts=16", "num_experts_per_tok=6", "moe_intermediate_size=12", "routed_scaling_factor=2.5"]
    facts = grow(old, tmp_path / "new", [*keys, "pattern=MEME*E"])
    assert facts["measured"]["largest_difference"] < 1e-12 and not facts["notes"]
    new = HybridLM.from_pretrained(tmp_path / "new")
    assert new.layers[1].mixer.experts.up.dtype == torch.bfloat16
    assert new.layers[1].mixer.router.weight.dtype == torch.float32
    facts = grow(old, tmp_path / "new", ["n_routed_experts=24", "num_experts_per_tok=9", "routed_scaling_factor=2.5"])
    assert facts["notes"] == ["weights that are multiplied are rounded to bfloat16"]
    assert 1e-6 < facts["measured"]["largest_difference"] < 0.1


# ----------------------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("backend", [b for b in OPS["router"] if b in ("reference", "cpp")])
@pytest.mark.parametrize(("r", "normalise"), [(2, True), (3, True), (4, False)])
def test_parts_of_an_expert_are_chosen_together(backend, r, normalise):
    """Equal scores of the parts of an expert: top-k takes all of them or none, and their weights are equal."""
    route = select("cpu", {"router": backend}).route
    logits_TE = torch.randn(500, 8, generator=torch.Generator().manual_seed(r))
    bias_E = torch.randn(8, generator=torch.Generator().manual_seed(9)) / 10
    whole, weight, *_ = route(logits_TE, bias_E, 3, 2.5, normalise, 1, 1)
    parts, weight_r, *_ = route(
        logits_TE.repeat_interleave(r, 1), bias_E.repeat_interleave(r), 3 * r, 2.5, normalise, 1, 1
    )
    expected = torch.zeros(500, 8).scatter_(1, whole, weight)
    found = torch.zeros(500, 8 * r).scatter_(1, parts, weight_r).unflatten(1, (8, r))
    factor = r if normalise else 1
    torch.testing.assert_close(found * factor, expected[..., None].expand(-1, -1, r), rtol=1e-5, atol=1e-6)


def test_a_tie_of_two_experts_takes_parts_of_both(tmp_path):
    """Where two old experts tie for the last place, the old model takes one of them; the new one takes as many parts,
    of whichever. Both are a choice among equals, and the weights sum to the same."""
    from nemo_lite_kernels.route import route

    logits_TE = torch.tensor([[2.0, 1.0, 1.0, -3.0]])
    experts, weights, *_ = route(logits_TE, torch.zeros(4), 2, 1.0, True, 1, 1)
    assert set(experts[0].tolist()) in ({0, 1}, {0, 2})
    parts, weights_r, *_ = route(logits_TE.repeat_interleave(2, 1), torch.zeros(8), 4, 2.0, True, 1, 1)
    assert {0, 1} <= set(parts[0].tolist()) <= {0, 1, 2, 3, 4, 5}
    assert float(weights_r.sum()) == pytest.approx(2 * float(weights.sum()))


def test_sleeping_experts_are_not_chosen_until_balance_wakes_them(tmp_path):
    grow(saved(tmp_path / "old", "ME", "", {}), tmp_path / "new", ["n_routed_experts=16"])
    model = HybridLM.from_pretrained(tmp_path / "new").train()
    model.config.router_bias_update_rate = 0.05
    ids, chosen = random_ids(model.config, 8, 40), []
    for _ in range(40):
        with torch.no_grad():
            counts = model(ids, labels=ids).expert_counts
        chosen.append(int(counts["layers.1"][8:].sum()))
        update_router_biases(model, counts)
    assert chosen[0] == 0 and chosen[-1] > 0.3 * 8 * 40 * 3


# -------------------------------------------------------------------------------------------------------------- command


def refused(capsys, *argv) -> str:
    code = cli.main(["grow", *map(str, argv)])
    err = capsys.readouterr().err
    assert code == 1 and "Traceback" not in err and len(err.strip().splitlines()) == 1
    return err


def test_a_dry_run_says_all_and_writes_nothing(tmp_path, capsys):
    old = saved(tmp_path / "old", "ME*E", "E", {})
    keys = ["pattern=MME*EE", "n_routed_experts=16", "num_experts_per_tok=6", "moe_intermediate_size=12"]
    assert cli.main(["grow", str(old), *keys, "--dry-run", "--to", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    for line in (
        "layers.0 M <- layers.0 M",
        "layers.1 M <- layers.0 M, added with output zero\n    mixer.out_proj.weight    zero",
        "layers.2 E <- layers.1 E\n    mixer.router.weight      rows of the inner units of each expert dealt to 2",
        "    mixer.experts.up         the inner units of each expert dealt to 2",
        "    mixer.fc2_latent.weight  zero",
        "mtp.layers.0 E <- mtp.layers.0 E",
        "The function is preserved.",
    ):
        assert line in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_the_whole_way_from_a_run_to_training_on(tmp_path, capsys, monkeypatch):
    """A trained dense model: upcycled and deepened by the command, completed, and trained on, from the same loss."""
    monkeypatch.chdir(ROOT)
    cache = f"data.cache_dir={tmp_path}"
    dense = ["model.pattern=M-*-", "model.mtp.pattern=", "model.intermediate_size=64", "checkpoint.every=0",
             "eval.every=100", "eval.batches=1"]  # fmt: skip
    train(recipe_of("resume", f"run_dir={tmp_path / 'run'}", cache, *dense))
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "old")]) == 0
    keys = ["pattern=MEM*E", "moe_latent_size=null", "moe_intermediate_size=16", "n_routed_experts=16",
            "num_experts_per_tok=4", "moe_shared_expert_intermediate_size=16", "routed_scaling_factor=4"]  # fmt: skip
    capsys.readouterr()
    assert cli.main(["grow", str(tmp_path / "old"), "--to", str(tmp_path / "new"), *keys]) == 0
    said = capsys.readouterr().out
    assert "layers.1 E <- layers.1 -" in said and "The function is preserved." in said
    facts = json.loads((tmp_path / "new/grow.json").read_text())
    assert facts["keys"] == keys and facts["measured"]["largest_difference"] < 1e-12
    assert f"{facts['measured']['largest_difference']:.3g}" in said
    assert cli.main(["generate", str(tmp_path / "new"), "--prompt", "def ", "--max-tokens", "4", "--json"]) == 0
    capsys.readouterr()
    losses, on = {}, tmp_path / "on.yaml"
    on.write_text(
        "data: {tokenizer: bytes, seq_len: 64, blend: [{source: tests/fixtures/text}]}\n"
        "train: {steps: 30, threads: 1}\noptim: {lr: 3.0e-3}\nlog: {every: 1}\n"
    )
    for folder in ("old", "new"):
        recipe = load_recipe(on, [f"run_dir={tmp_path / ('on_' + folder)}", cache, f"init_from={tmp_path / folder}"])
        model = build_model(recipe, ALONE)
        assert model.config.layers == {"old": "M-*-", "new": "MEM*E"}[folder]
        train(recipe)
        lines = [json.loads(line) for line in (tmp_path / f"on_{folder}/metrics.jsonl").read_text().splitlines()]
        losses[folder] = [line["loss"] for line in lines if "loss" in line]
    assert losses["new"][0] == pytest.approx(losses["old"][0], rel=1e-5)
    assert losses["new"][-1] < 0.9 * losses["new"][0]


@pytest.mark.parametrize(
    ("pattern", "sizes", "keys", "sentence"),
    [
        ("ME", {}, ["hiden_size=64"], "did you mean hidden_size"),
        ("ME", {}, ["hidden_size=64"], "does not grow; the keys that do are pattern"),
        ("ME", {}, ["pattern=MX"], "unknown letter 'X'"),
        ("ME", {}, ["pattern=MM"], "layer 1 (E) of ME has no place"),
        ("ME", {}, ["n_routed_experts=4"], "4 is less than 8"),
        ("ME", {}, ["num_experts_per_tok=9"], "9 experts cannot be chosen"),
        ("ME", {}, ["moe_intermediate_size=16"], "such as 16 and 6"),
        ("ME", {}, ["moe_latent_size=8"], "8 is less than 16"),
        ("ME", {}, ["moe_shared_expert_intermediate_size=8"], "8 is less than 40"),
        ("M-", {}, ["intermediate_size=8"], "8 is less than 48"),
        ("ME", {}, ["n_routed_experts=16", "num_experts_per_tok=6", "moe_intermediate_size=8"], "; 12 would"),
        ("ME", {}, ["n_group=2"], "n_routed_experts = 16, n_group = 2, topk_group = 1"),
        ("M-", {"n_shared_experts": 0}, ["pattern=ME", "moe_intermediate_size=15"], "1 parts of 15 do not hold 48; 48"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, capsys, pattern, sizes, keys, sentence):
    old = saved(tmp_path / "old", pattern, "", sizes)
    assert sentence in refused(capsys, old, "--to", tmp_path / "new", *keys)
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_left(tmp_path, capsys):
    old = saved(tmp_path / "old", "ME", "", {})
    assert "write to another folder" in refused(capsys, old, "--to", old, "pattern=MEME")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    assert "is left as it is" in refused(capsys, old, "--to", tmp_path / "other", "pattern=MEME")
    assert "is no MODEL_DIR" in refused(capsys, tmp_path / "none", "--to", tmp_path / "new", "pattern=MEME")
    HybridLM.from_pretrained(old)
    with pytest.raises(SystemExit):
        cli.main(["grow", str(old), "pattern=MEME"])


def test_a_tokenizer_goes_along(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tiny_model(tiny_config("ME", vocab_size=260)).save_pretrained(tmp_path / "old", tokenizer=tokenizer)
    grow(tmp_path / "old", tmp_path / "new", ["pattern=MEME"], tokens=0)
    assert load_tokenizer(tmp_path / "new").encode("abc") == tokenizer.encode("abc")
    assert "measured" not in json.loads((tmp_path / "new/grow.json").read_text())


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    old = saved(tmp_path / "old", "ME-", "E", {})
    from nemo_lite.model.hf import Stored

    monkeypatch.setattr(Stored, "__call__", None)
    Growth(old, ["pattern=MEE", "moe_intermediate_size=48"])
