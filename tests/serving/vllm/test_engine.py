"""vLLM on this CPU with the mends of nemo_lite_serving.vllm: its tokens are those of the model, MTP off and on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rigged import rigged_model
from tiny import tiny_config, tiny_model, wider_heads

from nemo_lite import HybridLM

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
pytest.importorskip("vllm", reason="vLLM is not installed here (make vllm)")
from nemo_lite_serving.vllm import plugin

pytestmark = pytest.mark.vllm

NEW = 32
RANDOM = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(1, 240, (n,), generator=RANDOM).tolist() for n in (2, 135, 1, 40, 7, 64, 3, 90)]
ROOT = Path(__file__).parents[3]
DEMO = ROOT / "runs/demo/model"
TRAINED, RECIPE = ROOT / "tests/fixtures/tiny_trained", ROOT / "tests/recipes/resume.yaml"
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "head_dim": 32, "mamba_head_dim": 32, "ssm_state_size": 32,
    "moe_latent_size": 32, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Name -> MODEL_DIR: every parameter random, in float32, as their routers choose other experts in bfloat16; in
    bfloat16 one whose drafts are accepted about half the time, one trained on text, one with linears and experts in
    NVFP4."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "random": tiny_model(tiny_config("MEM*E", "*E", **SIZES)),
        "dense": tiny_model(tiny_config("M-M*-", "", **SIZES)),
        "wide": tiny_model(tiny_config("MEM*E", "*E", **SIZES | {"moe_latent_size": None})),
        "half": rigged_model(0.5, vocab=240, hidden_size=256).bfloat16(),
        "trained": wider_heads(HybridLM.from_pretrained(TRAINED)).bfloat16(),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    run = folder / "run"
    arguments = [
        f"run_dir={run}", "train.steps=3", "schedule.warmup_steps=1", "checkpoint.every=3", "train.dtype=bfloat16",
        "model.head_dim=32", "precision=nemotron3_super_nvfp4",
    ]  # fmt: skip
    for words in (
        ["train", str(RECIPE), *arguments],
        ["export", str(run), "--to", str(folder / "nvfp4"), "--format", "nvfp4"],
    ):
        subprocess.run([sys.executable, "-m", "nemo_lite", *words], cwd=ROOT, check=True, capture_output=True)
    return {name: str(folder / name) for name in (*made, "nvfp4")} | {"demo": str(DEMO)}


def answers(path, drafts=0, prompts=None, count=None, **options):
    """What vLLM answers, greedily or as `options` of sampling say: tokens of every answer, and what it counted."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    most = options.pop("max_num_batched_tokens", None)
    sampling = SamplingParams(
        **{"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False} | options
    )
    stored = json.loads((Path(path) / "config.json").read_text())["dtype"]
    llm = LLM(
        path, dtype=stored, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8, enforce_eager=True,
        enable_prefix_caching=False, kv_cache_memory_bytes=1 << 27, max_num_batched_tokens=most,
        disable_log_stats=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": drafts} if drafts else None,
    )  # fmt: skip
    try:
        found = llm.generate([{"prompt_token_ids": p} for p in prompts or PROMPTS], sampling, use_tqdm=False)
        counted = {m.name: m.value for m in llm.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    tokens = [list(each.token_ids) for one in found for each in one.outputs]
    return tokens, counted.get("vllm:spec_decode_num_accepted_tokens"), counted.get("vllm:spec_decode_num_draft_tokens")


def gaps(path, prompts, tokens):
    """For every answered token, by how much the log-probability of the model's most likely one is above it."""
    model, found = HybridLM.from_pretrained(path, dtype=torch.float32), []
    for prompt, answer in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        said = logits.log_softmax(-1)
        found.append(said.amax(-1) - said[torch.arange(len(answer)), answer])
    return torch.stack(found)


@pytest.mark.parametrize(
    "name,drafts,options",
    [
        ("random", 0, {}),
        ("random", 2, {}),
        ("dense", 0, {}),
        ("wide", 1, {}),
        ("half", 0, {"max_num_batched_tokens": 64}),
        ("half", 1, {}),
        ("half", 2, {"max_num_batched_tokens": 64}),  # prompts in pieces
        ("half", 3, {}),
        ("half", 4, {}),
        ("trained", 0, {}),
        ("trained", 3, {}),
        ("nvfp4", 2, {}),
        *(("demo", drafts, {}) for drafts in range(5)),
    ],
)
def test_greedy_tokens_are_the_model_s(models, name, drafts, options):
    """Eight requests at once. Within 0.1 in log-probability: products in bfloat16 tell closer ones apart by chance."""
    if not Path(models[name]).is_dir():
        pytest.skip("there is no runs/demo/model (make demo)")
    tokens, accepted, drafted = answers(models[name], drafts, **options)
    worst = gaps(models[name], PROMPTS, tokens).amax(1)
    assert worst.max() < 0.1, worst
    if drafts and name != "random":
        assert 0 < accepted < drafted


def test_the_plugin_is_for_one_version_and_for_cpus(monkeypatch):
    import vllm
    from vllm.platforms import current_platform

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"nemo_lite mends vLLM 0\.32\.0 on a CPU, and this is 0\.33\.0: install"):
        plugin.register()
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    plugin.register()


@pytest.mark.parametrize("op", ["causal_conv1d_update", "selective_state_update"])
def test_without_a_mend_drafts_spoil_the_answers(models, op, monkeypatch):
    """What is told in docs/vllm.md is seen here: when it no longer is, the mend can go."""
    from vllm.model_executor.layers.mamba import mamba_mixer2

    monkeypatch.setattr(mamba_mixer2, op, plugin.replaced[op])
    tokens, _, _ = answers(models["half"], 2)
    assert gaps(models["half"], PROMPTS, tokens).max() > 0.5


def misfit(path, drafts):
    """How far the second tokens of 512 answers at temperature 1 are from what the model says: chi-square over the
    twelve likeliest and the rest (12 degrees of freedom), and by how many standard errors their mean log-probability
    is off."""
    model, prompt = HybridLM.from_pretrained(path, dtype=torch.float32), PROMPTS[4]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        rows = torch.tensor([[*prompt, t] for t in range(len(first))])
        given = model(rows).logits[:, -1].double().softmax(-1)  # [first, second]
    second, surprise = first @ given, given.log().nan_to_num(neginf=0)
    often = second.topk(12).indices
    tokens, accepted, _ = answers(path, drafts, prompts=[prompt] * 64, n=8, temperature=1.0, max_tokens=3)
    pairs = torch.tensor([t[:2] for t in tokens])
    assert len(pairs) == 512 and (not drafts or accepted > 0)
    seen = torch.bincount(pairs[:, 1], minlength=len(second)).double()[often]
    seen, expected = (torch.cat([t, n - t.sum()[None]]) for t, n in ((seen, len(pairs)), (second[often], 1)))
    chi2 = float((seen - len(pairs) * expected).square().div(len(pairs) * expected).sum())
    mean = first @ (given * surprise).sum(1)
    deviation = (first @ (given * surprise.square()).sum(1) - mean.square()).sqrt()
    return chi2, float((surprise[*pairs.T].mean() - mean) / deviation * len(pairs) ** 0.5)


@pytest.mark.parametrize("drafts", [0, 3])
def test_sampled_tokens_are_distributed_as_the_model_says(models, drafts):
    chi2, errors = misfit(models["half"], drafts)
    assert chi2 < 38 and abs(errors) < 4  # by chance once in 7,000, in 16,000


def test_vllm_leaves_the_temperatures_of_drafts_as_they_were_in_memory():
    """What is told in docs/vllm.md. By chance that memory may hold the right ones, so no answer is looked at."""
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl
    from vllm.v1.sample import rejection_sampler

    plugin.register()
    asked, ends = torch.tensor([0.5, 0.0, 1.5]), torch.tensor([2, 5, 6], dtype=torch.int32)
    memory = torch.full((6,), 7.0)
    _expand_kernel_impl(memory, asked, ends, 0, 1)
    assert memory.tolist() == [7.0] * 6
    mended = rejection_sampler.expand_batch_to_tokens(asked, ends, 6, replace_from=0, replace_to=1)
    assert mended.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0, 1.5]
