"""`nemo-lite plan`: parameters and bytes by hand, the sums of a step, published runs, what is said and refused."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nemo_lite import cli
from nemo_lite import plan as planner
from nemo_lite.check import flops_per_token, parameter_counts
from nemo_lite.config import ModelConfig, MTPConfig, Recipe, load_recipe
from nemo_lite.parallel.layout import Layout
from nemo_lite.plan import GPUS, estimate

ROOT = Path(__file__).resolve().parents[1]
SUPER = str(ROOT / "recipes" / "pretrain" / "nemotron3_super.yaml")
BENCH = str(ROOT / "recipes" / "pretrain" / "bench_small.yaml")
ONE_ROW = ("train.dtype=bfloat16", "train.micro_batch_size=1", "train.global_batch_size=8")
MILLION = ("data.seq_len=1048576", "train.global_batch_size=8")
H100 = GPUS["H100"]


def recipe(pattern="M", mtp="", micro=2, batch=64, seq_len=256, recompute="none", **model) -> Recipe:
    found = Recipe(model=ModelConfig(pattern=pattern, mtp=MTPConfig(pattern=mtp), **model))
    found.data.seq_len, found.train.dtype, found.train.recompute = seq_len, "bfloat16", recompute
    found.train.micro_batch_size, found.train.global_batch_size = micro, batch
    return found


def sent(found: Recipe, world: int, **sizes) -> dict[str, float]:
    return estimate(found, Layout(**sizes), world, H100).sent


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("model", [{}, {"pattern": "M*-", "tie_word_embeddings": True}, {"pattern": "ME", "mtp": "*E"}])
def test_one_rank_has_every_parameter(model):
    found = recipe(**{"pattern": "MEM*E-"} | model)
    counts = parameter_counts(found.model)
    memory = estimate(found, Layout(), 1, H100).memory
    assert memory["weights"] == 2 * counts["total_with_mtp"]
    assert memory["gradients"] == 4 * counts["total_with_mtp"]
    assert memory["optimizer"] == 12 * counts["total_with_mtp"]


def test_ranks_have_their_share():
    found, layout = recipe("MEM*E-", mtp="*E", moe_latent_size=32), Layout(tp=2, pp=2, ep=4, sp=True)
    model = planner._Model(planner._Recipe(found), layout, 8, H100)
    first, last = model.stages
    counts, config = parameter_counts(found.model), found.model
    experts = config.n_routed_experts * 2 * 32 * config.moe_intermediate_size
    assert (first.experts + last.experts) * 4 == 3 * experts  # two layers and the MTP block's
    whole = 3 * (config.n_routed_experts * config.hidden_size + 2 * config.hidden_size * 32) + 2 * config.hidden_size**2
    assert first.whole + last.whole == whole
    assert last.copy and not first.copy  # MTP embeds tokens on the last stage
    rest = counts["total_with_mtp"] - 3 * experts - whole
    cut = first.dense + last.dense - whole - first.table  # without the copy
    assert cut == pytest.approx(rest / 2, rel=0.02)  # norms and convolutions are counted whole
    memory = estimate(found, layout, 8, H100).memory
    most = max((first, last), key=lambda stage: stage.dense + stage.experts)
    assert memory["optimizer"] == round(12 * (most.dense / 2 + most.experts / 1))


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_tensor_parallel_bytes():
    found = recipe("M-")  # 512 tokens x 64 x 2 bytes, half of it to the other rank; 16 micro batches on 2 of 4 ranks
    unit, batches, H = 512 * 64 * 2 / 2, 16, 64
    pairs, head = 2, 1
    assert sent(found, 4, tp=2)["tp"] == batches * unit * (pairs * (2 + 2) + 2 + 2 * head)
    assert sent(found, 4, tp=2, sp=True)["tp"] == batches * unit * (pairs * (2 + 3) + (1 + 1) + 3 * head)
    again = recipe("M-", recompute="full")
    assert sent(again, 4, tp=2)["tp"] == batches * unit * (pairs * (4 + 2) + 2 + 2 * head)
    mixed = recipe("E", n_shared_experts=0)  # no pair of linears: the router's gradient once a step
    router = 2 * 8 * H * 4 / 2
    assert sent(mixed, 4, tp=2, sp=True)["tp"] == batches * unit * (2 + 3 * head) + router
    gathered = 2 * batches * unit  # without sp the experts' sums are gathered
    assert sent(mixed, 4, tp=2)["tp"] == batches * unit * (2 + 2 * head) + gathered


def test_expert_parallel_bytes():
    found = recipe("E", moe_latent_size=32)
    copies, batches = 512 * 2, 8  # top-2 of 512 tokens; 8 micro batches on each of 4 ranks
    both = 2 * (copies * (32 * 2 + 4) + copies * 32 * 2)
    assert sent(found, 4, ep=4)["ep"] == batches * both * 3 / 4
    assert sent(found, 4, ep=4, tp=2, sp=True)["ep"] == 2 * batches * both / 2 * 3 / 4
    assert sent(found, 4)["ep"] == 0


def test_context_parallel_bytes():
    attention = recipe("*")  # 2 key/value heads of 16
    tokens, batches = 512, 32
    assert sent(attention, 2, cp=2)["cp"] == batches * 2 * (tokens * 2 * 2 * 16 * 2) / 2
    mamba = recipe("M")
    state, halo = 8 * 16 * 16 * 4, 3 * (8 * 16 + 2 * 2 * 16) * 2
    assert sent(mamba, 2, cp=2)["cp"] == batches * 2 * 2 * (state + halo)  # to the one neighbour, and gradients back
    assert sent(mamba, 4, cp=4)["cp"] == batches * 2 * 2 * 2 * (state + halo)


def test_pipeline_and_data_parallel_bytes():
    found = recipe("M*M*")
    batches = 16
    assert sent(found, 8, pp=4)["pp"] == batches * 2 * 512 * 64 * 2  # inside: on to the next, back to the one before
    assert sent(found, 8, pp=4, tp=2, sp=True)["pp"] == 2 * batches * 512 / 2 * 64 * 2 * 2
    count = parameter_counts(found.model)["total"]
    assert sent(found, 4)["dp"] == (4 + 2) * count * 3 / 4
    found.precision.reduce_dtype = "bfloat16"
    assert sent(found, 4)["dp"] == (2 + 2) * count * 3 / 4
    experts = recipe("E")
    mine = experts.model.n_routed_experts * 2 * 64 * 64
    dense = parameter_counts(experts.model)["total"] - mine
    assert sent(experts, 4, ep=2)["dp"] == 6 * (dense * 3 / 4 + mine / 2 / 2)


def test_a_token_crosses_once():
    links = planner._Links(H100, planner.EFFICIENCY, Layout(ep=16), 16)
    size, seconds = links.once("ep", 100, 1, 64)  # 15 of 16 leave, half far
    assert size == pytest.approx(100 * 64 * (15 / 16 + 1 / 2))
    assert seconds == pytest.approx(100 * 64 / 2 / (H100.network * planner.EFFICIENCY.network))
    copies, waiting = links.exchange("ep", 100 * 64)
    assert copies == 100 * 64 * 15 / 16 and waiting == pytest.approx(seconds)


def test_links_of_a_group():
    reach = planner._Links(H100, planner.EFFICIENCY, Layout(tp=4, ep=8), 32)
    assert reach.groups["tp"] == (4, 4) and reach.groups["ep"] == (8, 8)
    assert reach.groups["dp_cp"] == (8, 2) and reach.groups["edp"] == (4, 1)
    slow, fast = reach.gather("edp", 1e9)[1], reach.gather("tp", 1e9)[1]
    assert slow == pytest.approx(0.75e9 / (50e9 * planner.EFFICIENCY.network))
    assert fast == pytest.approx(0.75e9 / (450e9 * planner.EFFICIENCY.nvlink))
    assert GPUS["GB200"].island == 64 and GPUS["B200"].island == 8


# ------------------------------------------------------------------------------------------------------ time and memory


def test_the_parts_of_a_step_add_up():
    found = estimate(recipe("MEM*E-", mtp="*E"), Layout(tp=2, pp=2, cp=2, ep=4, sp=True), 16, H100)
    assert sum(found.seconds.values()) == pytest.approx(found.step)
    assert found.tokens_per_second == pytest.approx(64 * 256 / found.step / 16)
    assert set(found.seconds) == {"products", "memory", "bubble", "optimizer", *planner.KINDS}
    assert all(seconds >= 0 for seconds in found.seconds.values()) and found.seconds["bubble"] > 0


def test_the_bubble_of_equal_stages():
    found = recipe("M" * 8, vocab_size=8, micro=1, batch=16)
    one, four = (estimate(found, Layout(pp=pp), 4, H100) for pp in (1, 4))
    pipeline = four.step - four.seconds["optimizer"] - four.seconds["dp"]
    m, pp = 16, 4
    assert four.seconds["bubble"] / pipeline == pytest.approx((pp - 1) / (m + pp - 1), rel=0.15)
    assert one.seconds["bubble"] == 0


def test_recomputation_takes_time_and_spares_memory():
    kept, again = (estimate(recipe("MEM*E-", recompute=r), Layout(ep=2), 2, H100) for r in ("none", "full"))
    assert again.seconds["products"] > 1.2 * kept.seconds["products"]
    assert again.memory["activations"] < 0.5 * kept.memory["activations"]


def test_context_parallel_ranks_keep_the_keys_and_values_of_whole_rows():
    one, two = (estimate(recipe("*"), Layout(cp=cp), cp, H100).memory["activations"] for cp in (1, 2))
    assert two == one / 2 + 256 * 2 * 2 * 16 * 2  # the other rank's: 2 heads of 16, keys and values in bf16


def test_rows_of_a_million_tokens():
    """The published layout of the long stage is legal and fits, and says what it sends."""
    found, published = load_recipe(SUPER, MILLION), Layout(tp=2, cp=64, ep=64, sp=True)
    assert published in planner.layouts(found, 128)
    cost = estimate(found, published, 128, H100)
    assert cost.total_memory < H100.memory
    assert all(cost.sent[kind] > 0 for kind in ("tp", "ep", "cp", "dp"))


def test_micro_batches_under_way():
    found = recipe("M" * 8, micro=1, batch=64)
    first, second = (estimate(found, Layout(pp=pp), pp, H100).memory["activations"] for pp in (2, 4))
    assert first == pytest.approx(second, rel=0.05)  # half the layers, twice the micro batches


def test_a_lower_format_is_faster():
    found = load_recipe(SUPER, ["train.global_batch_size=512", "train.recompute=none"])
    speeds = []
    for preset in ("bf16", "mxfp8", "nvfp4"):
        found.precision.preset = preset
        speeds.append(estimate(found, Layout(ep=64), 64, GPUS["GB300"]).seconds["products"])
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > 1.5 * speeds[1]


# ------------------------------------------------------------------------------------------------------- published runs


def test_efficiencies_and_predictions_are_those_of_the_result_file(runs):
    stored = json.loads(runs.RESULT.read_text())
    assert dataclasses.asdict(planner.EFFICIENCY) == stored["efficiency"]
    predict = runs.Predictor(runs.RUNS)
    assert len(stored["rows"]) == len(runs.RUNS)
    for run, row in zip(runs.RUNS, stored["rows"]):
        guess = predict(run, planner.EFFICIENCY).tokens_per_second
        assert row["tokens"] == run.tokens and row["predicted"] == round(guess)
        assert row["error"]["fitted"] == pytest.approx(guess / run.tokens - 1, abs=1e-4)
    balanced = [row["error"] for row in stored["rows"] if row["balanced"]]
    assert max(abs(error[way]) for error in balanced for way in ("fitted", "left_out")) < 0.25


@pytest.mark.parametrize(
    "name, published", [("nemotron3_super.yaml", 831 / 9856), ("nemotron3_nano.yaml", 901 / 39936)]
)
def test_flops_are_the_published_ones_by_their_convention(runs, name, published):
    config = load_recipe(ROOT / "recipes" / "pretrain" / name).model
    published *= 1e12
    assert runs.published_flops(config, 8192) == pytest.approx(published, rel=0.015)
    ours = flops_per_token(config, 8192)["train"]
    # Ours count Mamba-2's true width, and the router, convolution and MTP's projection besides.
    assert ours == pytest.approx(runs.published_flops(config, 8192, config.mamba_inner), rel=0.011)
    if config.mamba_inner == 2 * config.hidden_size:
        assert ours == pytest.approx(published, rel=0.05)


# -------------------------------------------------------------------------------------------------------------- command


def run_plan(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["plan", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_tables_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run_plan(
        capsys, SUPER, "train.global_batch_size=512", "--gpus", "16", "--gpu", "GB300", "--top", "3"
    )
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out
    assert lines[0].endswith("legal layouts fit on 16 GB300; tok/s of one GPU")
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]


def test_json_is_sorted_and_complete(capsys):
    code, out, _ = run_plan(capsys, BENCH, *ONE_ROW, "--gpus", "4", "--json", "--top", "100")
    found = json.loads(out)
    assert code == 0 and found["gpus"] == 4 and found["gpu"] == "H100" and found["memory_limit"] == 80e9
    assert len(found["layouts"]) == found["legal"]
    speeds = [each["tokens_per_second"] for each in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True) and all(each["fits"] for each in found["layouts"])
    first = found["layouts"][0]
    assert first["total_memory"] == sum(first["memory"].values())
    assert {(each["tp"], each["pp"], each["ep"], each["cp"], each["sp"]) for each in found["layouts"]} >= {
        (1, 1, 1, 1, False),
        (1, 1, 4, 1, False),
    }


def test_nothing_fits(capsys):
    code, out, err = run_plan(
        capsys, SUPER, "train.global_batch_size=512", "--gpus", "8", "--memory", "20", "--top", "1"
    )
    assert code == 1 and out.startswith("0 of ")
    assert err.startswith("nemo-lite: error: no legal layout fits into 20.0 GiB; the closest, above, needs ")
    assert err.endswith("; more GPUs would help\n")


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([BENCH, "--gpus", "8"], "train.dtype: float32 is not planned for; set train.dtype=bfloat16"),
        ([SUPER, "--gpus", "0"], "--gpus is 0, and must be above 0"),
        ([SUPER, "--gpus", "8", "--memory", "-1"], "--memory is -1.0, and must be above 0"),
        (
            [SUPER, "precision=nvfp4", "--gpus", "8"],
            "H100 does not multiply in nvfp4, which precision asks for; it does in bf16, fp8, fp8_block",
        ),
        (
            [SUPER, "model.pattern=ME", "--gpus", "5"],
            "no layout of 5 GPUs is legal: train.global_batch_size is 3072, no multiple of the 5 rows",
        ),
    ],
)
def test_refusals_are_one_sentence(argv, sentence, capsys):
    code, out, err = run_plan(capsys, *argv)
    assert code == 1 and out == "" and err.count("\n") == 1 and sentence in err
