"""The megatron engine equals the native one: losses, gradients, weights and expert choices under every layout."""

import functools
import signal
import time
from pathlib import Path

import layouts
import pytest
import torch
from runs import ALONE, losses, wait_for

from nemo_lite import HybridLM, load_recipe, plan
from nemo_lite.export import export
from nemo_lite.merge import merge
from nemo_lite.model import hf
from nemo_lite.parallel.layout import layout_of
from nemo_lite.train import loop
from nemo_lite.train.checkpoint import checkpoints, load_tensors, newest_whole

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.megatron

# Ranks, and keys of `parallel`; what is not said is data parallel.
CASES = [
    (1, {}),
    (2, {}),
    (2, {"distributed_optimizer": False}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "sp": False}),
    (2, {"ep": 2}),
    (2, {"pp": 2}),
    (2, {"cp": 2}),
    (2, {"pp": 2, "tied": True}),
    (2, {"tp": 2, "pattern": "M-E*", "mtp": "", "latent": None, "sp": False}),
    (2, {"cp": 2, "recompute": "full"}),
    (2, {"tp": 2, "recompute": "M*", "rules": (("*.router.weight", 0.1, 1.0), ("embedding.*", 2.0, 0.0))}),
    (4, {"tp": 4}),  # more ranks than groups and KV heads: copies
    (4, {"tp": 4, "sp": False}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"cp": 2, "tp": 2}),
    (4, {"pp": 2, "ep": 2}),
    (2, {"pp": 2, "pattern": "M|E*|EM|*E"}),  # two stages a rank, interleaved
    (4, {"pp": 4, "pattern": "M|E|*|E|M|*|E|M", "tied": True}),
    (4, {"cp": 2, "tp": 2, "sp": False, "ep": 4}),
    (4, {"cp": 4}),
    (8, {"tp": 2, "ep": 2}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4}),
    (8, {"tp": 2, "pp": 2, "ep": 4, "pattern": "M|E*|EM|*E|E|M"}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4, "distributed_optimizer": False}),
]
STEPS, LONG = 5, 20


def name_of(case) -> str:
    ranks, options = case
    return f"{ranks} ranks " + " ".join(f"{key}={value}" for key, value in options.items())


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """(options of the model, steps) -> the file with the native engine's numbers."""
    folder = tmp_path_factory.mktemp("references")

    @functools.cache
    def of(steps: int, model: tuple) -> Path:
        path = folder / f"{abs(hash((steps, model)))}.pt"
        layouts.native_run(path, dict(model), steps)
        return path

    return lambda steps, options: of(steps, tuple(sorted(layouts.model_options(options).items())))


@pytest.fixture
def ranks(forks, tmp_path):
    """Run a function of layouts.py on so many ranks; what each found."""

    def run(count: int, function: str, *args) -> list[dict]:
        out = tmp_path / f"found_{function}_{forks.count}"
        children = forks.call(f"layouts:{function}", *args, str(out), ranks=count)
        codes = [child.wait() for child in children]
        assert codes == [0] * count, f"exit codes {codes}:\n" + "\n".join(child.output[-3000:] for child in children)
        return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(count)]

    return run


def worst(found: list[dict], kind: str) -> tuple[float, str]:
    return max(each[kind] for each in found if kind in each)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_layout_is_the_native_engine_in_float64(case, ranks, reference):
    count, options = case
    found = ranks(count, "train", options, str(reference(STEPS, options)))
    for kind in ("results", "gradient", "weight", "evaluation"):
        off, where = worst(found, kind)
        assert off < 1e-9, f"{kind}: {off:.1e} in {where}"
    assert all(each["same"] for each in found), "other experts were chosen"


@pytest.mark.parametrize("case", [(2, {"tp": 2}), (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4})], ids=name_of)
def test_float32_stays_near_over_20_steps(case, ranks, reference):
    count, options = case[0], case[1] | {"dtype": "float32"}
    found = ranks(count, "train", options, str(reference(LONG, options)))
    off, where = worst(found, "results")
    assert off < 1e-5, f"losses: {off:.1e} in {where}"
    off, where = worst(found, "gradient")
    assert off < 1e-4, f"gradients: {off:.1e} in {where}"


@pytest.mark.parametrize("more", [{}, {"precision": "nemotron3_super_nvfp4"}, {"reduce": "bfloat16"}], ids=str)
def test_bfloat16_and_number_formats_follow_the_native_engine(more, ranks, reference):
    options = {"tp": 2, "ep": 2, "dtype": "bfloat16"} | more
    found = ranks(2, "train", options, str(reference(STEPS, options)))
    off, where = worst(found, "results")
    assert off < 0.05, f"{off:.1e} in {where}"


# ---------------------------------------------------------------------------------------------------------- checkpoints

SAVED = {
    "tp": (2, {"tp": 2}),
    "pp": (2, {"pp": 2}),
    "ep": (2, {"ep": 2}),
    "cp": (2, {"cp": 2}),
    "copies": (4, {"tp": 4}),
    "plain": (2, {"distributed_optimizer": False}),
    "interleaved": (2, {"pp": 2, "pattern": "M|E*E|M*|E"}),
    "all": (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4}),
}
READERS = {  # --every-pair reads all
    "tp": ["pp", "ep", "all"],
    "pp": ["tp", "plain", "copies"],
    "ep": ["all", "pp", "plain"],
    "cp": ["all", "tp", "plain"],
    "copies": ["tp", "ep", "all"],
    "plain": ["all", "copies", "tp"],
    "interleaved": ["pp", "all"],
    "all": ["interleaved", "ep", "copies"],
}


@pytest.mark.parametrize("saved", SAVED)
def test_any_layout_reads_what_any_other_wrote(saved, ranks, tmp_path, request):
    count, options = SAVED[saved]
    before = tmp_path / "before"
    ranks_found = ranks(count, "save", options, str(tmp_path / "run"), 2)
    assert ranks_found
    torch.save(layouts.native_state(tmp_path / "run", options), tmp_path / "state.pt")
    for reader in SAVED if request.config.getoption("--every-pair") else READERS[saved]:
        n, other = SAVED[reader]
        found = ranks(n, "load", other, str(tmp_path / "run"), str(tmp_path / "state.pt"))
        for kind in ("state", "model"):
            assert worst(found, kind)[0] == 0, f"{reader}: {worst(found, kind)}"
    for rank, each in enumerate(ranks_found):
        torch.save(each, f"{before}.{rank}")
    found = ranks(count, "resume", options, str(tmp_path / "run"), 2, str(before))
    assert worst(found, "resumed")[0] == 0, worst(found, "resumed")


def test_training_starts_from_a_model_dir(ranks, tmp_path):
    model = HybridLM(layouts.recipe_for("native", {}).model, seed=3)
    model.save_pretrained(tmp_path / "model")
    torch.save(layouts.whole_weights(model), tmp_path / "weights.pt")
    options = SAVED["all"][1] | {"init_from": str(tmp_path / "model"), "dtype": "bfloat16"}
    assert worst(ranks(8, "started", options, str(tmp_path / "weights.pt")), "started")[0] == 0


def test_a_native_checkpoint_goes_on_under_megatron(ranks, tmp_path):
    layouts.native_save(tmp_path / "run", {}, 2)
    torch.save(layouts.native_state(tmp_path / "run", {}), tmp_path / "state.pt")
    found = ranks(8, "load", SAVED["all"][1], str(tmp_path / "run"), str(tmp_path / "state.pt"))
    assert worst(found, "state")[0] == worst(found, "model")[0] == 0


def test_bfloat16_keeps_its_masters(ranks, tmp_path):
    options = {"tp": 2, "dtype": "bfloat16"}
    ranks(2, "save", options, str(tmp_path / "run"), 2)
    state = layouts.native_state(tmp_path / "run", options)
    weight = state["layers.0.mixer.in_proj.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    torch.save(state, tmp_path / "state.pt")
    found = ranks(2, "load", {"pp": 2, "dtype": "bfloat16"}, str(tmp_path / "run"), str(tmp_path / "state.pt"))
    assert worst(found, "state")[0] == worst(found, "model")[0] == 0


# -------------------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    "case",
    [
        (2, {}),
        (2, {"tp": 2}),
        (2, {"tp": 2, "sp": False}),
        (2, {"ep": 2}),
        (2, {"pp": 2}),
        (2, {"pp": 2, "pattern": "M|E*|EM|*E"}),
        (4, {"cp": 4}),
        (4, {"tp": 2, "ep": 4}),
        (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4}),
    ],
    ids=name_of,
)
def test_a_step_sends_what_the_planner_counts(case, ranks):
    """Bytes of the busiest rank; the planner leaves out what does not grow with the model (counts, losses, norms)."""
    count, options = case[0], case[1] | {"dtype": "bfloat16"}
    sent = max(sum(each["traffic"].values()) for each in ranks(count, "traffic", options))
    recipe = layouts.recipe_for("megatron", options)
    planned = sum(plan.estimate(recipe, layout_of(recipe), count, plan.GPUS["H100"]).sent.values())
    assert 0.93 < sent / planned < 1.07, f"{sent:,.0f} bytes sent, {planned:,.0f} planned"


def test_tokens_go_to_experts_in_latent_space(ranks):
    """Of 16 numbers instead of 32: half the bytes, but for a weight of 4 bytes each way."""
    sent = [
        sum(
            each["traffic"]["ep all-to-all"]
            for each in ranks(2, "traffic", {"ep": 2, "latent": latent, "dtype": "bfloat16"})
        )
        for latent in (16, None)
    ]
    assert sent[0] / sent[1] == pytest.approx((4 * 16 * 2 + 8) / (4 * 32 * 2 + 8), rel=0.1)


# -------------------------------------------------------------------------------------------------------- whole runs

NATIVE = ("parallel.tp=1", "parallel.pp=1", "parallel.ep=1")
LAYOUT = ("parallel.engine=megatron", "parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "train.global_batch_size=4")


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    """The losses of tests/recipes/resume.yaml on four ranks, and of the native engine."""
    run = tmp_path_factory.mktemp("undisturbed")
    forks.train("resume", run / "megatron", *LAYOUT, ranks=4)
    forks.train("resume", run / "native", LAYOUT[-1])
    return losses(run / "megatron"), losses(run / "native"), run


def test_a_run_logs_what_the_native_engine_logs(undisturbed):
    megatron, native, _ = undisturbed
    assert list(megatron) == list(native)
    for step, values in native.items():
        assert megatron[step] == pytest.approx(values, rel=1e-4), step


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on_exactly(forks, tmp_path, undisturbed):
    saved = "checkpoint.asynchronous=false"  # step 5's is whole when a rank dies in step 8
    patch = f"die_at:8:1:{tmp_path / 'died'}"
    children = forks.start("resume", tmp_path / "run", *LAYOUT, saved, ranks=4, patch=patch)
    assert children[1].wait() == -signal.SIGKILL
    died = time.monotonic()
    assert all(child.wait() != 0 for child in children if child is not children[1])
    assert time.monotonic() - died < 60
    assert "resuming" in forks.train("resume", tmp_path / "run", *LAYOUT, ranks=4)
    assert losses(tmp_path / "run") == undisturbed[0]


def test_a_rank_that_dies_while_saving_loses_nothing(forks, tmp_path, undisturbed):
    children = forks.start("resume", tmp_path / "run", *LAYOUT, ranks=4, patch="slow_saving:0.3")
    wait_for((tmp_path / "run/checkpoints/step_10.partial").exists)
    children[2].kill(signal.SIGKILL)
    assert all(child.wait() != 0 for child in children)
    said: list[str] = []
    assert newest_whole(tmp_path / "run", said.append) == tmp_path / "run/checkpoints/step_5" and not said
    forks.train("resume", tmp_path / "run", *LAYOUT, ranks=4)
    assert losses(tmp_path / "run") == undisturbed[0]


def test_a_run_moves_to_the_native_engine_and_back(forks, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    forks.train("resume", run_dir, *LAYOUT, "train.steps=4", ranks=4)
    forks.train("resume", run_dir, LAYOUT[-1], "train.steps=7")
    forks.train("resume", run_dir, *LAYOUT, ranks=4)
    for step, values in undisturbed[1].items():
        assert losses(run_dir)[step] == pytest.approx(values, rel=1e-4), step


def test_export_writes_the_checkpoint_s_weights_without_the_model(undisturbed, tmp_path, monkeypatch):
    run = undisturbed[2] / "megatron"
    model = loop.build_model(load_recipe(run / "recipe.yaml", ["parallel.engine=native", *NATIVE]), ALONE, fresh=False)
    load_tensors(checkpoints(run)[-1], model, None, None)
    monkeypatch.setattr(hf, "materialise", None)  # what would allocate all of it
    export(run, tmp_path / "model")
    monkeypatch.undo()
    written = dict(HybridLM.from_pretrained(tmp_path / "model").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name], parameter), name


def test_a_merge_averages_what_the_ranks_wrote(undisturbed, tmp_path):
    """Of steps 5 and 10, read from the layout's files; the native engine's reader gives what is expected."""
    run = undisturbed[2] / "megatron"
    recipe = load_recipe(run / "recipe.yaml", ["parallel.engine=native", *NATIVE])
    saved = [loop.build_model(recipe, ALONE, fresh=False) for _ in range(2)]
    for path, model in zip(checkpoints(run), saved, strict=True):
        load_tensors(path, model, None, None)
    merge([run], tmp_path / "merged", window=5 * recipe.tokens_per_step)
    written = dict(HybridLM.from_pretrained(tmp_path / "merged").named_parameters())
    for (name, first), last in zip(saved[0].named_parameters(), saved[1].parameters(), strict=True):
        assert torch.allclose(written[name], (first + last) / 2, rtol=1e-6, atol=1e-8), name


def test_rows_of_alternating_lengths(forks, tmp_path):
    """Pipeline and context parallel ranks see two lengths in turn, and as many tokens."""
    cycle = ("data.seq_len_cycle=[64,32]", "train.global_batch_size=4", "train.steps=4")
    layout = ("parallel.engine=megatron", "parallel.pp=2", "parallel.cp=2")
    forks.train("resume", tmp_path / "megatron", *layout, *cycle, ranks=4)
    forks.train("resume", tmp_path / "native", *cycle)
    native, megatron = losses(tmp_path / "native"), losses(tmp_path / "megatron")
    assert list(megatron) == list(native) and len(native) >= 4
    for step, values in native.items():
        assert megatron[step] == pytest.approx(values, rel=1e-4), step


def test_an_illegal_layout_is_a_sentence_before_any_group(forks, tmp_path):
    output = forks.train("resume", tmp_path / "run", *LAYOUT[:1], "parallel.tp=3", ranks=1, code=1)
    assert "parallel.tp is 3, which does not divide" in output and "nearest" in output
    assert not (tmp_path / "run").exists()
