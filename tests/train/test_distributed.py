"""Two ranks (gloo, FSDP2) equal one, in numbers, in number formats and in what is communicated."""

import pytest
import torch
from runs import RECIPES

TINY = ("model.initializer_range=0.1", "model.router_aux_loss_coef=0.01", "train.micro_batch_size=4")


@pytest.fixture(scope="module")
def rank_case(forks, tmp_path_factory):
    """Run a function of cases.py on some ranks; what rank 0 measured."""
    folder, done = tmp_path_factory.mktemp("ranks"), {}

    def run(function: str, ranks: int, overrides: tuple, *args, recipe: str = "golden_mem"):
        key = (function, ranks, overrides, args, recipe)
        if key not in done:
            out = folder / f"{len(done)}.pt"
            settings = [*TINY, f"data.cache_dir={forks.cache}", *overrides]
            children = forks.call(
                f"cases:{function}", str(RECIPES / f"{recipe}.yaml"), settings, str(out), *args, ranks=ranks
            )
            codes = [child.wait() for child in children]
            assert codes == [0] * ranks, "".join(child.output for child in children)
            done[key] = torch.load(out, weights_only=False)
        return done[key]

    return run


def furthest(a: dict, b: dict) -> tuple[float, str]:
    """The largest difference of two dicts of tensors, each relative to that tensor's maximum, and its name."""
    assert a.keys() == b.keys()
    return max((float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-30)), name) for name in b)


def equal(two: dict, one: dict, tolerance: float) -> None:
    assert torch.allclose(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=tolerance, atol=0)
    assert two["norms"] == pytest.approx(one["norms"], rel=tolerance)
    for step, (a, b) in enumerate(zip(two["gradients"], one["gradients"], strict=True)):
        worst, name = furthest(a, b)
        assert worst <= tolerance, f"gradient of {name} in step {step}: {worst:.2e}"
    worst, name = furthest(two["weights"], one["weights"])
    assert worst <= tolerance, f"{name}: {worst:.2e}"


VARIANTS = {
    "plain": (),
    "accumulation": ("train.micro_batch_size=1",),
    "kept gathered, recomputed": ("parallel.reshard_after_forward=false", "train.recompute=full"),
    "tied": ("model.tie_word_embeddings=true", "train.micro_batch_size=2"),
    "plain MoE, groups": ("model.moe_latent_size=null", "model.n_group=2", "model.mtp.depth=1"),
    "dense, no MTP": ("model.pattern=M-*", "model.mtp.pattern="),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_two_ranks_equal_one(rank_case, variant):
    overrides = ("train.dtype=float64", *VARIANTS[variant])
    two, one = rank_case("steps", 2, overrides, 5), rank_case("steps", 1, overrides, 5)
    assert {name.rsplit(".", 2)[-1] for name in two["sharded"]} <= {"weight", "up", "down"} and not one["sharded"]
    assert len(two["sharded"]) >= 5 and two["tied"] == one["tied"] == (variant == "tied")
    equal(two, one, 1e-9)
    for a, b in zip(two["counts"], one["counts"]):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_float32_losses_over_20_steps(rank_case):
    two, one = rank_case("steps", 2, (), 20, False), rank_case("steps", 1, (), 20, False)
    assert (torch.tensor(two["losses"]) - torch.tensor(one["losses"])).abs().max() < 1e-5
    assert one["losses"][-1][0] < one["losses"][0][0] - 0.5


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_bfloat16_two_ranks_are_near_one(rank_case, reduce):
    overrides = ("train.dtype=bfloat16", f"precision.reduce_dtype={reduce}", "train.micro_batch_size=2")
    two, one = rank_case("steps", 2, overrides, 5), rank_case("steps", 1, overrides, 5)
    assert torch.allclose(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=2e-2, atol=0)
    assert two["norms"] == pytest.approx(one["norms"], rel=5e-2)
    assert {t.dtype for t in two["weights"].values()} == {torch.float32}


def test_what_stays_in_float32_under_mixed_precision(rank_case):
    """FSDP2's policy would cast every parameter of its groups, so these are none of theirs."""
    for ranks in (1, 2):
        found = rank_case("dtypes", ranks, ("train.dtype=bfloat16",))
        seen, f32, b16 = found["seen"], {torch.float32}, {torch.bfloat16}
        exact = (
            "Router.weight", "Router.bias", "scores", "Norm.weight", "GatedNorm.weight", "Mamba2.A_log", "Mamba2.D",
            "Mamba2.dt_bias", "conv1d.weight", "conv1d.bias",
        )  # fmt: skip
        for name in exact:
            assert seen[name] == f32, f"{name}: {seen[name]}"
        cast = ("Linear.weight", "Experts.up", "Experts.down", "Embedding.weight", "Head.weight")
        for name in cast:  # with one rank the matmul casts, with two the gather has done so
            assert seen[name] == (b16 if ranks == 2 else f32), f"{name}: {seen[name]}"
        assert {*seen} - {*exact, *cast} == {name for name in seen if name.endswith(" input")}
        for name in ("Linear input", "Experts input", "Head input"):
            assert seen[name] == b16, f"{name}: {seen[name]}"
        assert found["masters"] == found["moments"] == f32


def test_each_weight_is_gathered_as_designed(rank_case):
    """Head and embedding once a microbatch, although every MTP depth reads them; a layer of the trunk once forward and
    once backward, the MTP block's so for each depth. Gradients are accumulated before they are reduced."""

    def counts(kind: str, *overrides: str) -> dict[str, set]:
        found = rank_case("gathers", 2, overrides)
        assert set(found["reduced"]) == set(found["gathered"])
        by_part: dict[str, set] = {}
        for name, n in found[kind].items():
            by_part.setdefault(name.split(".")[0], set()).add(n)
        return by_part

    one, two = "train.micro_batch_size=4", "train.micro_batch_size=2"  # microbatches of each rank
    assert counts("gathered", one) == {"embedding": {1}, "layers": {2}, "mtp": {4}, "head": {1}}
    assert counts("reduced", one) == {"embedding": {1}, "layers": {1}, "mtp": {1}, "head": {1}}
    assert counts("gathered", two) == {"embedding": {2}, "layers": {4}, "mtp": {8}, "head": {2}}
    # FSDP2 reduces what the MTP block has accumulated when its deepest use is done, and the last one's own after it.
    assert counts("reduced", two) == {"embedding": {1}, "layers": {1}, "mtp": {2}, "head": {1}}
    kept = counts("gathered", one, "parallel.reshard_after_forward=false")
    assert kept == {"embedding": {1}, "layers": {1}, "mtp": {2}, "head": {1}}  # a use's backward frees what it used
