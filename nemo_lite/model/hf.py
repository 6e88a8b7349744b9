"""MODEL_DIR: the Hugging Face NemotronH form of a model, and THE table of names.

One row of the table is one kind of tensor of ours and where it stands in a checkpoint. Every tensor is matched exactly
once in each direction, or all that are not are named in one error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_lite import pattern as patterns
from nemo_lite.config import ModelConfig, MTPConfig, UserError
from nemo_lite.parallel.native import copy_whole
from nemo_lite.precision import modelopt

# ------------------------------------------------------------------------------------------------------------- names

# ours -> theirs; {i} is a layer, {e} an expert, {last} the MTP block's last layer. Rows are tried from the top.
TABLE: list[tuple[str, str]] = [
    ("embedding.weight", "backbone.embeddings.weight"),
    ("norm_f.weight", "backbone.norm_f.weight"),
    ("head.weight", "lm_head.weight"),
    ("mtp.enorm.weight", "mtp.layers.0.enorm.weight"),
    ("mtp.hnorm.weight", "mtp.layers.0.hnorm.weight"),
    ("mtp.eh_proj.weight", "mtp.layers.0.eh_proj.weight"),
    ("mtp.final_layernorm.weight", "mtp.layers.{last}.final_layernorm.weight"),
    # The layers of the trunk and of the MTP block: {stack} is `layers` | `mtp.layers` here, `backbone.layers` there.
    ("{stack}.{i}.norm.weight", "{stack}.{i}.norm.weight"),
    ("{stack}.{i}.mixer.in_proj.weight", "{stack}.{i}.mixer.in_proj.weight"),
    ("{stack}.{i}.mixer.conv1d.weight", "{stack}.{i}.mixer.conv1d.weight"),  # [C, W] here, [C, 1, W] there
    ("{stack}.{i}.mixer.conv1d.bias", "{stack}.{i}.mixer.conv1d.bias"),
    ("{stack}.{i}.mixer.dt_bias", "{stack}.{i}.mixer.dt_bias"),
    ("{stack}.{i}.mixer.A_log", "{stack}.{i}.mixer.A_log"),
    ("{stack}.{i}.mixer.D", "{stack}.{i}.mixer.D"),
    ("{stack}.{i}.mixer.norm.weight", "{stack}.{i}.mixer.norm.weight"),
    ("{stack}.{i}.mixer.out_proj.weight", "{stack}.{i}.mixer.out_proj.weight"),
    ("{stack}.{i}.mixer.q_proj.weight", "{stack}.{i}.mixer.q_proj.weight"),
    ("{stack}.{i}.mixer.k_proj.weight", "{stack}.{i}.mixer.k_proj.weight"),
    ("{stack}.{i}.mixer.v_proj.weight", "{stack}.{i}.mixer.v_proj.weight"),
    ("{stack}.{i}.mixer.o_proj.weight", "{stack}.{i}.mixer.o_proj.weight"),
    ("{stack}.{i}.mixer.router.weight", "{stack}.{i}.mixer.gate.weight"),
    ("{stack}.{i}.mixer.router.bias", "{stack}.{i}.mixer.gate.e_score_correction_bias"),
    ("{stack}.{i}.mixer.fc1_latent.weight", "{stack}.{i}.mixer.fc1_latent_proj.weight"),
    ("{stack}.{i}.mixer.fc2_latent.weight", "{stack}.{i}.mixer.fc2_latent_proj.weight"),
    ("{stack}.{i}.mixer.experts.up", "{stack}.{i}.mixer.experts.{e}.up_proj.weight"),  # [E, F, L] here
    ("{stack}.{i}.mixer.experts.down", "{stack}.{i}.mixer.experts.{e}.down_proj.weight"),  # [E, L, F] here
    ("{stack}.{i}.mixer.shared.up.weight", "{stack}.{i}.mixer.shared_experts.up_proj.weight"),
    ("{stack}.{i}.mixer.shared.down.weight", "{stack}.{i}.mixer.shared_experts.down_proj.weight"),
    ("{stack}.{i}.mixer.up.weight", "{stack}.{i}.mixer.up_proj.weight"),
    ("{stack}.{i}.mixer.down.weight", "{stack}.{i}.mixer.down_proj.weight"),
]

_EMBEDDING, _HEAD = "backbone.embeddings.weight", "lm_head.weight"

# Kept in float32 in memory and in files, whatever the dtype asked for: small, and what the numbers hang on.
FLOAT32 = re.compile(r"(A_log|\.D|dt_bias|router\.weight|router\.bias|norm\w*\.weight)$")


@dataclass(frozen=True)
class Row:
    """One tensor of ours and the tensors of a checkpoint that hold it (several for stacked experts)."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of each of theirs


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; a tied head under its own name too, as transformers never ties this one's."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _whole(tensor: Tensor) -> torch.Size:
    """The shape of the whole parameter that a tensor may be a part of."""
    part = getattr(tensor, "part", None)
    return torch.Size(tensor.shape if part is None else part.shape)


def rows(model: nn.Module) -> list[Row]:
    """The table filled in for a model: every parameter and buffer, each exactly once."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    found = []
    for name, tensor in _tensors(model).items():
        match = re.fullmatch(r"(?:(mtp\.layers|layers)\.(\d+)\.)?(.+)", name)
        assert match is not None
        stack, i, _ = match.groups()
        template = name if stack is None else f"{{stack}}.{{i}}.{match[3]}"
        theirs = dict(TABLE).get(template)
        if theirs is None:
            raise KeyError(f"the conversion table has no row for {name}")
        theirs = theirs.replace("{stack}", "mtp.layers" if stack == "mtp.layers" else "backbone.layers")
        theirs = theirs.replace("{i}", i or "").replace("{last}", str(len(config.mtp_layers) - 1))
        shape = tuple(_whole(tensor))
        if "{e}" in theirs:
            found.append(Row(name, tuple(theirs.replace("{e}", str(e)) for e in range(shape[0])), shape[1:]))
        elif name.endswith("conv1d.weight"):
            found.append(Row(name, (theirs,), (shape[0], 1, shape[1])))
        else:
            found.append(Row(name, (theirs,), shape))
    return found


def to_hf(row: Row, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of ours as the checkpoint's tensors."""
    parts = tensor.unbind(0) if len(row.theirs) > 1 or tensor.dim() == 3 else [tensor]
    for name, part in zip(row.theirs, parts):
        yield name, part.reshape(row.shape)


def from_hf(row: Row, parts: list[Tensor], shape: torch.Size) -> Tensor:
    """The checkpoint's tensors as one of ours."""
    return (torch.stack(parts) if len(parts) > 1 else parts[0]).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ config

_SAME = [
    "vocab_size", "hidden_size", "layer_norm_epsilon", "tie_word_embeddings", "initializer_range",
    "max_position_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim", "mamba_num_heads",
    "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size", "time_step_min", "time_step_max",
    "time_step_floor", "intermediate_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_latent_size", "n_shared_experts", "moe_shared_expert_intermediate_size", "n_group", "topk_group",
    "norm_topk_prob", "routed_scaling_factor", "bos_token_id", "eos_token_id", "pad_token_id",
]  # fmt: skip
_OLD_NAMES = {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_chunk_size": "chunk_size"}
# What this architecture does not have: key -> the only value it can take.
_FIXED = {
    "attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False, "use_conv_bias": True,
    "sliding_window": None, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu",
}  # fmt: skip


def config_to_hf(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for `config`: what transformers' NemotronHConfig and vLLM read. Pipeline cuts are left out."""
    low, high = config.time_step_limit
    infinite: Any = {"__float__": "Infinity"}
    out: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": str(dtype).removeprefix("torch."),
        "layers_block_type": patterns.to_hf(config.layers),
        "num_hidden_layers": len(config.layers),
        "num_nextn_predict_layers": 1 if config.mtp_layers else 0,
        "time_step_limit": [low, infinite if math.isinf(high) else high],
        "mamba_ssm_cache_dtype": "float32",
        "residual_in_fp32": False,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        **_FIXED,
        **{name: getattr(config, name) for name in _SAME},
    }
    if config.mtp_layers:
        out["mtp_layers_block_type"] = patterns.to_hf(config.mtp_layers)
        out["mtp_training_depth"] = config.mtp.depth  # ours; other readers ignore these two
        out["mtp_loss_weight"] = config.mtp.loss_weight
    return out


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a config.json describes; UserError for one this architecture is not."""
    raw = dict(raw)
    if raw.get("model_type") != "nemotron_h":
        raise UserError(f"{where}: model_type is {raw.get('model_type')!r}, and only 'nemotron_h' can be opened")
    for name, only in _FIXED.items():
        if raw.get(name, only) != only:
            raise UserError(f"{where}: {name} is {raw[name]!r}; this model has {only!r} only")
    for old, new in _OLD_NAMES.items():
        if old in raw:
            raw.setdefault(new, raw[old])
    try:
        if "layers_block_type" in raw or "layer_types" in raw:
            layers = patterns.from_hf(raw.get("layers_block_type") or raw["layer_types"])
        elif "hybrid_override_pattern" in raw:
            layers = patterns.parse(raw["hybrid_override_pattern"])
        else:
            raise UserError(f"{where}: neither layers_block_type nor hybrid_override_pattern is there")
        physical = int(raw.get("num_nextn_predict_layers") or 0)
        mtp = ""
        if physical:
            if raw.get("mtp_layers_block_type"):
                mtp = patterns.from_hf(raw["mtp_layers_block_type"])
            else:
                mtp = patterns.parse(raw.get("mtp_hybrid_override_pattern") or "*E")
    except patterns.PatternError as error:
        raise UserError(f"{where}: {error}") from None
    if physical > 1:
        raise UserError(f"{where}: num_nextn_predict_layers is {physical}; one shared MTP block is all there can be")
    known = {name: raw[name] for name in _SAME if name in raw}
    for name in ("moe_latent_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        known[name] = raw.get(name)
        if isinstance(known[name], list):
            known[name] = known[name][0]
    limit = raw.get("time_step_limit", [0.0, math.inf])
    known["time_step_limit"] = [float(v["__float__"]) if isinstance(v, Mapping) else float(v) for v in limit]
    if "router_aux_loss_coef" in raw:
        known["router_aux_loss_coef"] = raw["router_aux_loss_coef"]
    depth, weight = raw.get("mtp_training_depth") or 2, raw.get("mtp_loss_weight", 0.3)
    config = ModelConfig(pattern=layers, mtp=MTPConfig(mtp, depth, weight), **known)
    for name, sentence in config.problems():
        raise UserError(f"{where}: {name}: {sentence}")
    return config


def load_config(model_dir: str | Path) -> ModelConfig:
    """The ModelConfig of a MODEL_DIR.

    transformers keeps the MTP keys of a config but drops the MTP tensors when it saves, and ignores
    tie_word_embeddings; what such a directory holds is what is opened, with a warning.
    """
    path = Path(model_dir) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        run = (Path(model_dir) / "checkpoints").is_dir()
        advice = f"; it is a RUN_DIR: nemo-lite export {model_dir} --to MODEL_DIR makes one" if run else ""
        raise UserError(f"{model_dir} is no MODEL_DIR: it has no config.json{advice}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    config = config_from_hf(raw, str(path))
    if not (config.mtp_layers or config.tie_word_embeddings):
        return config
    files = TensorFiles(Path(model_dir))
    if config.mtp_layers and not any(name.startswith("mtp.") for name in files.names()):
        logging.getLogger(__name__).warning(
            "%s describes an MTP block but holds no mtp.* tensor (transformers drops them when saving): opened without",
            model_dir,
        )
        config.mtp.pattern = ""
    both = {_HEAD, _EMBEDDING} <= files.names()
    if config.tie_word_embeddings and both and not torch.equal(files.get(_HEAD), files.get(_EMBEDDING)):
        logging.getLogger(__name__).warning(
            "%s says tie_word_embeddings but holds an lm_head.weight of its own (transformers does not tie this "
            "architecture): opened untied",
            model_dir,
        )
        config.tie_word_embeddings = False
    return config


def vllm_problems(config: ModelConfig) -> list[str]:
    """What keeps vLLM (0.32) from serving a model, a sentence each."""
    found = []
    if wrong := sorted(set(config.mtp_layers) - {patterns.ATTENTION, patterns.MOE}):
        found.append(f"its MTP block {config.mtp_layers} has {', '.join(wrong)}, and vLLM has * and E there only")
    if patterns.MAMBA not in config.layers:
        found.append(f"its pattern {config.layers} has no Mamba-2 layer, without which vLLM does not start")
    if config.tie_word_embeddings:
        found.append("its head is tied to its embedding, and vLLM reads a head of its own")
    return found


# ------------------------------------------------------------------------------------------------------------- files


class TensorFiles:
    """The safetensors of a MODEL_DIR, read tensor by tensor.

    A file is mapped, and what was read of it stays in memory as long as it is open: it is opened anew every `KEPT`
    bytes, so that a model is not there twice while it is loaded.
    """

    KEPT = 1 << 24

    def __init__(self, model_dir: Path):
        index = model_dir / "model.safetensors.index.json"
        if index.exists():
            where = json.loads(index.read_text())["weight_map"]
            missing = sorted({name for name in where.values() if not (model_dir / name).exists()})
            if missing:
                raise UserError(f"{model_dir} misses the shard {', '.join(missing)} that its index names")
            names = sorted(set(where.values()))
        else:
            names = sorted(path.name for path in model_dir.glob("*.safetensors"))
            if not names:
                raise UserError(f"{model_dir} has no .safetensors file")
        self._file: dict[str, Path] = {}  # of a tensor
        self._opened, self._read = {}, 0
        for name in names:
            self._file |= dict.fromkeys(self._open(model_dir / name).keys(), model_dir / name)
        if index.exists():
            lost = sorted(set(where) - set(self._file))
            if lost:
                raise UserError(f"{model_dir}: the index names tensors that no shard holds: {', '.join(lost[:8])}")

    def _open(self, path: Path):
        from safetensors import SafetensorError, safe_open

        if path not in self._opened:
            try:
                self._opened[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None
        return self._opened[path]

    def names(self) -> set[str]:
        """All tensors but the scales of a quantised weight, which is read with them, as the weight it stands for."""
        return {name for name in self._file if not name.endswith(modelopt.BESIDE)}

    def everything(self) -> set[str]:
        """All tensors, scales too."""
        return set(self._file)

    @property
    def quantised(self) -> bool:
        """Whether weights are stored as codes."""
        return any(name.endswith(modelopt.BESIDE[0]) for name in self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = tuple(self._open(self._file[name]).get_slice(name).get_shape())
        return modelopt.shape(stored, self.dtype(name)) if name.endswith(".weight") and stored else stored

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored: uint8 for NVFP4."""
        part = self._open(self._file[name]).get_slice(name)
        return part[:0].dtype if part.get_shape() else self.stored(name).dtype

    def get(self, name: str) -> Tensor:
        """A tensor; of a quantised weight what it stands for, in float32."""
        tensor = self.stored(name)
        if tensor.dtype not in (torch.uint8, torch.float8_e4m3fn):
            return tensor
        try:
            return modelopt.unpack(name, tensor, self.stored)
        except (KeyError, ValueError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{name} is quantised, and {what}") from None

    def stored(self, name: str) -> Tensor:
        """A tensor as it is in the file."""
        if self._read > self.KEPT:
            self._opened.clear()
            self._read = 0
        tensor = self._open(self._file[name]).get_tensor(name)
        self._read += tensor.nbytes
        return tensor


def check_tensors(table: list[Row], files: TensorFiles, where: str, tied: bool) -> None:
    """UserError that lists every tensor missing, unexpected, or of a wrong shape. A tied head may be left out."""
    expected = {name: row.shape for row in table for name in row.theirs}
    have = files.names()
    problems = [f"missing {name}" for name in expected if name not in have and not (tied and name == _HEAD)]
    problems += [f"unexpected {name}" for name in sorted(have - set(expected))]
    for name in expected:
        if name in have and files.shape(name) != expected[name]:
            problems.append(f"{name} is {list(files.shape(name))}, not {list(expected[name])}")
    if problems:
        raise UserError(f"{where} does not fit its config.json: {'; '.join(problems)}")


class Stored:
    """The weights of a MODEL_DIR by our names, one at a time: nobody holds the model."""

    def __init__(self, model_dir: Path):
        from nemo_lite.model.hybrid import HybridLM

        self.folder, self.config = model_dir, load_config(model_dir)
        model, self.files = HybridLM(self.config, device="meta"), TensorFiles(model_dir)
        table, tied = rows(model), self.config.tie_word_embeddings
        check_tensors(table, self.files, str(model_dir), tied)
        self.shapes = {name: tensor.shape for name, tensor in _tensors(model).items()}
        self._rows = {row.ours: row for row in table}
        if tied:
            self._rows["head.weight"] = self._rows["embedding.weight"]
        # Weights in codes are float32 numbers that no narrower dtype holds.
        self.dtype = torch.float32 if self.files.quantised else self.files.dtype(table[0].theirs[0])

    def __call__(self, name: str, like: Tensor | None = None) -> Tensor:
        """A weight in the dtype it is stored in, whatever `like` is."""
        row = self._rows[name]
        return from_hf(row, [self.files.get(theirs) for theirs in row.theirs], self.shapes[name])


@torch.no_grad()
def load_weights(model: nn.Module, model_dir: Path, packed=None, whole: nn.Module | None = None) -> None:
    """Copy a MODEL_DIR's tensors into a model, one at a time; a rank that holds a part keeps only its part. Those that
    are on the meta device are given whole to packed(name, tensor). `whole` is the model that this is a pipeline stage
    of, if it is one."""
    files, table, tied = TensorFiles(model_dir), rows(model), model.config.tie_word_embeddings
    check_tensors(table if whole is None else rows(whole), files, str(model_dir), tied)
    tensors = _tensors(model)
    for row in table:
        if tied and row.theirs == (_HEAD,):
            continue  # load_config has seen that it is the embedding's
        target = tensors[row.ours]
        value = from_hf(row, [files.get(name) for name in row.theirs], _whole(target))
        if packed is not None and target.is_meta:
            packed(row.ours, value)
        else:
            copy_whole(target, value)


def load_model(cls, model_dir: Path, *, dtype=None, device="cpu", kernels=None, quantization=None):
    """See HybridLM.from_pretrained."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    config = load_config(model_dir)
    model = cls(config, device="meta", kernels=kernels)
    if dtype is None:
        files = TensorFiles(model_dir)
        table = rows(model)
        check_tensors(table, files, str(model_dir), config.tie_word_embeddings)
        # Weights in codes are float32 numbers that no narrower dtype holds.
        dtype = torch.float32 if files.quantised else files.dtype(table[0].theirs[0])
    # A weight to be packed is never there in full beside the others; a tied head is the embedding's until the end.
    later = (
        {n for n in model.packable() if not (config.tie_word_embeddings and n == "head.weight")} if quantization else ()
    )
    materialise(model, dtype, device, later)
    model.dtype = dtype
    load_weights(model, model_dir, lambda name, weight: model.pack_weight(name, weight.to(device), quantization))
    if quantization:
        model.quantize_weights(quantization)
    return model.eval()


def materialise(model: nn.Module, dtype: torch.dtype, device: str | torch.device, later: Container[str] = ()) -> None:
    """Allocate a meta model's tensors, but those named in `later`: `dtype`, but float32 for what always stays so
    (float64 where dtype is)."""
    wide = torch.promote_types(dtype, torch.float32)
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or f"{prefix}.{leaf}" in later:
                continue
            if id(parameter) not in done:  # a tied head stays tied
                kind = wide if FLOAT32.search(f"{prefix}.{leaf}") else dtype
                done[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kind, device=device))
            module._parameters[leaf] = done[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = torch.zeros(buffer.shape, dtype=wide, device=device)


@torch.no_grad()
def save_model(
    model: nn.Module, model_dir: Path, *, dtype: torch.dtype | None = None, tokenizer=None,
    shard_bytes: int = 5 * 10**9, pack: Callable[[str, Tensor], dict[str, Tensor] | None] | None = None,
    quantization_config: dict[str, Any] | None = None, read: Callable[[str, Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """Write config.json, generation_config.json, sharded safetensors with their index, and the tokenizer if given.

    dtype None keeps the weights' own; what FLOAT32 names stays float32. Shards are written as they fill, so that no
    second copy of the model is held. pack(name in the checkpoint, tensor) may give other tensors to write in its place;
    read(our name, the parameter) gives the values of a model that has none, one tensor at a time.
    """
    from safetensors.torch import save_file

    model_dir.mkdir(parents=True, exist_ok=True)
    for stale in model_dir.glob("model*.safetensors*"):
        stale.unlink()
    config: ModelConfig = model.config  # type: ignore[assignment]
    tensors = _tensors(model)
    stored = dtype or tensors["embedding.weight"].dtype
    shards: list[dict[str, str]] = []  # names -> file, filled in when the number of shards is known
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            save_file(shard, model_dir / f"model-{len(shards) + 1:05d}.partial", metadata={"format": "pt"})
            shards.append(dict.fromkeys(shard, ""))
            shard, size = {}, 0

    for row in rows(model):
        tensor = tensors[row.ours].detach()
        if read is not None:
            tensor = read(row.ours, tensor)
        kind = tensor.dtype if dtype is None else dtype
        if dtype is not None and FLOAT32.search(row.ours):
            kind = torch.promote_types(dtype, torch.float32)
        for name, part in to_hf(row, tensor.cpu()):
            found = (pack(name, part) if pack is not None else None) or {name: part.to(kind)}
            nbytes = sum(t.nbytes for t in found.values())
            if size + nbytes > shard_bytes:
                flush()
            # A file's tensors must not share memory.
            copied = len(row.theirs) > 1 or (config.tie_word_embeddings and name == _HEAD)
            shard |= {n: t.contiguous().clone() if copied else t.contiguous() for n, t in found.items()}
            size, total = size + nbytes, total + nbytes
    flush()
    weight_map = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (model_dir / f"model-{number:05d}.partial").rename(model_dir / file)
        (model_dir / file).chmod(0o644)  # safetensors leaves it readable by its owner only
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    written = config_to_hf(config, stored)
    if quantization_config is not None:
        written["quantization_config"] = quantization_config
    (model_dir / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    ids = {k: v for k in ("bos_token_id", "eos_token_id", "pad_token_id") if (v := getattr(config, k)) is not None}
    (model_dir / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(model_dir)
