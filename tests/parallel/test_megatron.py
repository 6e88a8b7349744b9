"""The megatron engine equals the native one: losses, gradients, weights and expert choices under every layout."""

import functools
from pathlib import Path

import layouts
import pytest
import torch

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
    (2, {"cp": 2, "recompute": "full"}),
    (4, {"tp": 4}),  # more ranks than groups and KV heads: copies
    (4, {"tp": 4, "sp": False}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"cp": 2, "tp": 2}),
    (4, {"pp": 2, "ep": 2}),
    (4, {"cp": 2, "tp": 2, "sp": False, "ep": 4}),
    (4, {"cp": 4}),
    (8, {"tp": 2, "ep": 2}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4}),
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


@pytest.mark.parametrize("precision", ["bf16", "nemotron3_super_nvfp4"])
def test_bfloat16_and_number_formats_follow_the_native_engine(precision, ranks, reference):
    options = {"tp": 2, "ep": 2, "dtype": "bfloat16", "precision": precision}
    found = ranks(2, "train", options, str(reference(STEPS, options)))
    off, where = worst(found, "results")
    assert off < 0.05, f"{off:.1e} in {where}"


# ---------------------------------------------------------------------------------------------------------- checkpoints

SAVED = {
    "tp": (2, {"tp": 2}),
    "pp": (2, {"pp": 2}),
    "ep": (2, {"ep": 2}),
    "cp, copies": (4, {"tp": 4}),
    "plain": (2, {"distributed_optimizer": False}),
    "all": (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 4}),
}
READERS = {  # the axes that each of these changes are all there are
    "tp": ["pp", "ep", "all"],
    "pp": ["tp", "plain", "cp, copies"],
    "ep": ["all", "pp", "plain"],
    "cp, copies": ["tp", "ep", "all"],
    "plain": ["all", "cp, copies", "tp"],
    "all": ["pp", "ep", "cp, copies"],
}


@pytest.mark.parametrize("saved", SAVED)
def test_any_layout_reads_what_any_other_wrote(saved, ranks, tmp_path):
    count, options = SAVED[saved]
    before = tmp_path / "before"
    ranks_found = ranks(count, "save", options, str(tmp_path / "run"), 2)
    assert ranks_found
    torch.save(layouts.native_state(tmp_path / "run", options), tmp_path / "state.pt")
    for reader in READERS[saved]:
        n, other = SAVED[reader]
        found = ranks(n, "load", other, str(tmp_path / "run"), str(tmp_path / "state.pt"))
        for kind in ("state", "model"):
            assert worst(found, kind)[0] == 0, f"{reader}: {worst(found, kind)}"
    for rank, each in enumerate(ranks_found):
        torch.save(each, f"{before}.{rank}")
    found = ranks(count, "resume", options, str(tmp_path / "run"), 2, str(before))
    assert worst(found, "resumed")[0] == 0, worst(found, "resumed")


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
