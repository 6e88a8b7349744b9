"""MODEL_DIR: config.json in and out, sharded tensors, dtypes, and every way it can be wrong."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_config, tiny_model

from nemo_lite import HybridLM
from nemo_lite.config import ModelConfig, MTPConfig, UserError
from nemo_lite.model.hf import FLOAT32, TABLE, TensorFiles, config_from_hf, config_to_hf, rows


@pytest.fixture
def model_dir(tmp_path):
    tiny_model(tiny_config("ME*", mtp="*E", n_routed_experts=4)).save_pretrained(tmp_path, shard_bytes=20_000)
    return tmp_path


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- config


def test_config_round_trip():
    config = tiny_config(
        "M|E*|-", mtp="*E", depth=3, moe_latent_size=None, time_step_limit=[0.01, 0.5], bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, n_group=2, topk_group=1, norm_topk_prob=False, n_shared_experts=0,
        router_aux_loss_coef=0.003, max_position_embeddings=77,
    )  # fmt: skip
    config.mtp.loss_weight = 0.7
    raw = json.loads(json.dumps(config_to_hf(config, torch.bfloat16)))
    assert raw["dtype"] == "bfloat16" and raw["num_hidden_layers"] == 4
    back = config_from_hf(raw)
    config.pattern = "ME*-"  # the cuts are a recipe's
    config.router_bias_update_rate = back.router_bias_update_rate  # and so is this
    assert back == config


def test_an_infinite_limit_is_written_as_hugging_face_does():
    raw = config_to_hf(tiny_config(), torch.float32)
    assert raw["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    json.loads(json.dumps(raw, allow_nan=False))
    assert config_from_hf(raw).time_step_limit == [0.0, math.inf]
    for other in ([0.0, math.inf], [0, "inf"]):
        assert config_from_hf(raw | {"time_step_limit": other}).time_step_limit == [0.0, math.inf]


def test_physical_mtp_blocks():
    assert config_to_hf(tiny_config("M"), torch.float32)["num_nextn_predict_layers"] == 0
    raw = config_to_hf(tiny_config("M", mtp="*E", depth=3), torch.float32)
    assert raw["num_nextn_predict_layers"] == 1 and raw["mtp_training_depth"] == 3
    del raw["mtp_training_depth"]  # a publisher's config has no such key
    assert config_from_hf(raw).mtp == MTPConfig("*E", 2)
    assert "one shared MTP block" in refusal(config_from_hf, raw | {"num_nextn_predict_layers": 2})


def test_legacy_keys():
    raw = config_to_hf(tiny_config("ME*-", mtp="*E"), torch.float32)
    for name in ("layers_block_type", "mtp_layers_block_type"):
        del raw[name]
    raw |= {"hybrid_override_pattern": "ME*-", "mtp_hybrid_override_pattern": "*-"}
    config = config_from_hf(raw)
    assert config.pattern == "ME*-" and config.mtp.pattern == "*-"
    raw["mamba_n_groups"] = raw.pop("n_groups")
    assert config_from_hf(raw).n_groups == 2


@pytest.mark.parametrize(
    "change,words",
    [
        ({"use_bias": True}, "use_bias is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is True"),
        ({"use_conv_bias": False}, "use_conv_bias is False"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"layers_block_type": ["linear_attention", "rwkv"]}, "unknown layer type 'rwkv'"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"n_groups": 3}, "n_groups: 3 does not divide"),
    ],
)
def test_a_config_of_another_architecture_is_refused(change, words):
    raw = config_to_hf(tiny_config("ME*-"), torch.float32)
    assert words in refusal(config_from_hf, raw | change, "here/config.json")
    assert refusal(config_from_hf, raw | change, "here/config.json").startswith("here/config.json: ")


def test_no_directory_no_config_no_json(tmp_path):
    assert "no config.json" in refusal(HybridLM.from_pretrained, tmp_path / "nowhere")
    assert "no config.json" in refusal(HybridLM.from_pretrained, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(HybridLM.from_pretrained, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config("M"), torch.float32)))
    assert "has no .safetensors file" in refusal(HybridLM.from_pretrained, tmp_path)


# --------------------------------------------------------------------------------------------------------------- table


@pytest.mark.parametrize("sizes", [{}, {"moe_latent_size": None}, {"n_shared_experts": 0}, {"n_routed_experts": 1}])
def test_every_tensor_has_exactly_one_place(sizes):
    if sizes.get("n_routed_experts") == 1:
        sizes = sizes | {"num_experts_per_tok": 1}
    model = HybridLM(tiny_config("ME*-", mtp="*E-M", **sizes), device="meta")
    table = rows(model)
    theirs = [name for row in table for name in row.theirs]
    assert len(theirs) == len(set(theirs))
    assert {row.ours for row in table} == set(model.state_dict())


def test_no_row_of_the_table_is_dead():
    model = HybridLM(tiny_config("ME*-", mtp="*E"), device="meta")
    used = set()
    for row in rows(model):
        parts = row.ours.split(".")
        used.add(row.ours)
        for start in ("layers", "mtp.layers"):
            if row.ours.startswith(start + "."):
                used.add("{stack}.{i}." + ".".join(parts[len(start.split(".")) + 1 :]))
    assert {ours for ours, _ in TABLE} <= used


# --------------------------------------------------------------------------------------------------------------- files


def test_sharded_with_index(model_dir):
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(p.name for p in model_dir.glob("*.safetensors")) == files and not list(model_dir.glob("*.partial"))
    total = 0
    for file in files:
        tensors = load_file(model_dir / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        assert nbytes <= 20_000 or len(tensors) == 1
        total += nbytes
    assert index["metadata"]["total_size"] == total
    original = tiny_model(tiny_config("ME*", mtp="*E", n_routed_experts=4))
    for (name, a), b in zip(original.state_dict().items(), HybridLM.from_pretrained(model_dir).state_dict().values()):
        assert torch.equal(a, b), name
    pytest.importorskip("transformers").NemotronHForCausalLM.from_pretrained(model_dir)


def test_files_are_opened_anew_while_tensors_are_read(model_dir, monkeypatch):
    wanted = HybridLM.from_pretrained(model_dir).state_dict()
    monkeypatch.setattr(TensorFiles, "KEPT", 0)
    files, seen = TensorFiles(model_dir), []
    for name in sorted(files.names()):
        seen.append((files.get(name), load_file(files._file[name])[name]))
        assert len(files._opened) == 1 or len(seen) == 1
    assert len(seen) > 10 and all(torch.equal(a, b) for a, b in seen)
    for name, tensor in HybridLM.from_pretrained(model_dir).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_saving_over_an_older_save_leaves_nothing_stale(model_dir):
    HybridLM.from_pretrained(model_dir).save_pretrained(model_dir)
    assert [p.name for p in model_dir.glob("model*")] == ["model.safetensors"]
    HybridLM.from_pretrained(model_dir)


def test_a_missing_shard_is_named(model_dir):
    lost = sorted(model_dir.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"misses the shard {lost.name}" in refusal(HybridLM.from_pretrained, model_dir)


def test_a_damaged_shard_is_named(model_dir):
    broken = sorted(model_dir.glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    assert broken.name in refusal(HybridLM.from_pretrained, model_dir)


def test_an_index_that_promises_too_much(model_dir):
    index = model_dir / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["backbone.ghost"] = next(iter(raw["weight_map"].values()))
    index.write_text(json.dumps(raw))
    assert "no shard holds: backbone.ghost" in refusal(HybridLM.from_pretrained, model_dir)


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    tiny_model(tiny_config("M*", mtp="*")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["backbone.norm_f.weight"], tensors["backbone.layers.0.mixer.D"]
    tensors["backbone.layers.7.norm.weight"] = torch.ones(3)
    tensors["lm_head.weight"] = torch.zeros(5, 32)
    save_file(tensors, file)
    sentence = refusal(HybridLM.from_pretrained, tmp_path)
    for words in (
        "missing backbone.norm_f.weight",
        "missing backbone.layers.0.mixer.D",
        "unexpected backbone.layers.7.norm.weight",
        "lm_head.weight is [5, 32], not [61, 32]",
    ):
        assert words in sentence


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_opened_in_bfloat16_small_things_stay_float32(model_dir, dtype):
    model = HybridLM.from_pretrained(model_dir, dtype=dtype)
    assert model.dtype == torch.bfloat16
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == (torch.float32 if FLOAT32.search(name) else torch.bfloat16), name
    wide = {
        name.split(".")[-2] + "." + name.split(".")[-1] for name, p in model.named_parameters() if p.dtype.itemsize == 4
    }
    assert wide == {
        "norm.weight", "norm_f.weight", "enorm.weight", "hnorm.weight", "final_layernorm.weight", "router.weight",
        "mixer.A_log", "mixer.D", "mixer.dt_bias",
    }  # fmt: skip
    assert model(random_ids(model.config, 1, 5)).logits.dtype == torch.bfloat16


def test_stored_dtype_is_kept_and_can_be_changed(model_dir, tmp_path):
    model = HybridLM.from_pretrained(model_dir)
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    half = HybridLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and half.layers[0].mixer.A_log.dtype == torch.float32
    assert torch.equal(half.layers[0].mixer.A_log, model.layers[0].mixer.A_log)
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())
    assert HybridLM.from_pretrained(tmp_path / "half", dtype=torch.float64).head.weight.dtype == torch.float64
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_weights_stay_tied(tmp_path, caplog):
    """The head is written too, since transformers does not tie this architecture; others may have left it out."""
    model = tiny_model(tiny_config("M", tie_word_embeddings=True))
    ids = random_ids(model.config, 1, 6)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], model.embedding.weight)
    for change in ("as it is", "left out"):
        if change == "left out":
            del tensors["lm_head.weight"]
            save_file(tensors, tmp_path / "model.safetensors")
        again = HybridLM.from_pretrained(tmp_path)
        assert again.head.weight is again.embedding.weight and not caplog.text
        assert torch.equal(again(ids).logits, model(ids).logits)
    tensors["lm_head.weight"] = torch.ones(61, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    again = HybridLM.from_pretrained(tmp_path)
    assert "opened untied" in caplog.text and torch.equal(again.head.weight, tensors["lm_head.weight"])
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def test_generation_config_and_ids(tmp_path):
    tiny_model(ModelConfig(pattern="M", bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "generation_config.json").read_text())
    assert raw["bos_token_id"] == 1 and raw["eos_token_id"] == 2 and "pad_token_id" not in raw
