"""The recipe: typed dataclasses <- YAML <- ``key=value`` overrides.

Every key is a dataclass field made with :func:`key`, which carries its meaning, unit and bounds; the loader, the error
sentences and docs/recipes.md are all derived from these fields.
"""

# ruff: noqa: RUF009  (key() returns a dataclass field)
from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from nemo_lite import pattern as patterns


class UserError(ValueError):
    """What a person can put right; commands print the message, one sentence, and exit 1 without a traceback."""


class RecipeError(UserError):
    """A recipe that cannot run; the message is one sentence naming file, key and what would be right."""


def key(default: Any = dataclasses.MISSING, doc: str = "", unit: str = "", **bounds: Any) -> Any:
    """A recipe key: default (or a factory), meaning, unit, and bounds ``ge``, ``gt``, ``le``, ``lt``."""
    metadata = {"doc": doc, "unit": unit, **bounds}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass
class MTPConfig:
    """Multi-token prediction: one shared-weight block, run `depth` times in training."""

    pattern: str = key("", "layers of the MTP block, such as `*E`; empty for no MTP")
    depth: int = key(2, "how many tokens beyond the next one are predicted in training", "tokens", ge=1)
    loss_weight: float = key(0.3, "weight of the mean MTP loss", ge=0)


@dataclass
class ModelConfig:
    """Sizes of a hybrid stack, under the names of the Hugging Face NemotronH config."""

    pattern: str = key("MEM*E", "one letter a layer: M Mamba-2, * attention, E MoE, - MLP; | cuts pipeline stages")
    vocab_size: int = key(260, "rows of the embedding and of the output head", "tokens", ge=1)
    hidden_size: int = key(64, "width of the residual stream", ge=1)
    layer_norm_epsilon: float = key(1e-5, "epsilon of every RMSNorm", gt=0)
    tie_word_embeddings: bool = key(False, "use the embedding matrix as output head")
    initializer_range: float = key(0.014, "standard deviation of the initial weights", gt=0)
    max_position_embeddings: int = key(8192, "context length written into the exported config", "tokens", ge=1)

    num_attention_heads: int = key(4, "query heads", ge=1)
    num_key_value_heads: int = key(2, "key/value heads; divides num_attention_heads", ge=1)
    head_dim: int = key(16, "size of an attention head", ge=1)

    mamba_num_heads: int = key(8, "Mamba-2 heads; inner size = heads x mamba_head_dim", ge=1)
    mamba_head_dim: int = key(16, "size of a Mamba-2 head", ge=1)
    ssm_state_size: int = key(16, "state size N of a Mamba-2 head", ge=1)
    n_groups: int = key(2, "groups of heads that share B and C; divides mamba_num_heads", ge=1)
    conv_kernel: int = key(4, "width of the causal convolution", "tokens", ge=2)
    chunk_size: int = key(128, "chunk of the SSD scan", "tokens", ge=1)
    time_step_min: float = key(0.001, "smallest dt at initialisation", gt=0)
    time_step_max: float = key(0.1, "largest dt at initialisation", gt=0)
    time_step_floor: float = key(1e-4, "floor of dt at initialisation", gt=0)
    time_step_limit: list[float] = key(lambda: [0.0, math.inf], "dt is clamped to this interval in forward")

    intermediate_size: int = key(128, "inner size of a dense MLP layer (-)", ge=1)

    n_routed_experts: int = key(8, "routed experts of an E layer", ge=1)
    num_experts_per_tok: int = key(2, "experts chosen for a token (top-k)", ge=1)
    moe_intermediate_size: int = key(64, "inner size of a routed expert", ge=1)
    moe_latent_size: int | None = key(None, "latent size the routed experts work in; null for plain MoE", ge=1)
    n_shared_experts: int = key(1, "shared experts (0 or 1)", ge=0, le=1)
    moe_shared_expert_intermediate_size: int = key(128, "inner size of the shared expert", ge=1)
    n_group: int = key(1, "router groups; the best topk_group of them stay eligible", ge=1)
    topk_group: int = key(1, "router groups that stay eligible", ge=1)
    norm_topk_prob: bool = key(True, "divide the chosen scores by their sum")
    routed_scaling_factor: float = key(1.0, "factor on the routed experts' weights", gt=0)
    router_aux_loss_coef: float = key(1e-4, "coefficient of the sequence-level balance loss", ge=0)
    router_bias_update_rate: float = key(1e-3, "step of the expert-bias update after each optimizer step", ge=0)

    mtp: MTPConfig = key(MTPConfig, "multi-token prediction")

    bos_token_id: int | None = key(None, "beginning-of-text id written into the exported config", ge=0)
    eos_token_id: int | None = key(None, "end-of-text id written into the exported config", ge=0)
    pad_token_id: int | None = key(None, "padding id written into the exported config", ge=0)

    # Derived sizes, so that no part computes them twice.
    @property
    def layers(self) -> str:
        """Layer letters of the trunk, without pipeline cuts."""
        return patterns.parse(self.pattern)

    @property
    def mtp_layers(self) -> str:
        """Layer letters of the MTP block; empty without MTP."""
        return patterns.parse(self.mtp.pattern) if self.mtp.pattern else ""

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_groups_state(self) -> int:
        """Channels of B (and of C)."""
        return self.n_groups * self.ssm_state_size

    @property
    def expert_size(self) -> int:
        """Width the routed experts read and write."""
        return self.moe_latent_size or self.hidden_size

    def problems(self) -> list[tuple[str, str]]:
        """Impossible values and illegal pairs as (key, sentence); empty when the model can be built."""
        found: list[tuple[str, str]] = []

        def refuse(condition: bool, name: str, sentence: str) -> None:
            if condition:
                found.append((name, sentence))

        for name, text in (("pattern", self.pattern), ("mtp.pattern", self.mtp.pattern)):
            try:
                if text or name == "pattern":
                    patterns.parse(text)
            except patterns.PatternError as error:
                found.append((name, str(error)))
        refuse("|" in self.mtp.pattern, "mtp.pattern", "the MTP block cannot be cut into pipeline stages; remove |")
        refuse(
            self.num_attention_heads % self.num_key_value_heads != 0,
            "num_key_value_heads",
            f"{self.num_key_value_heads} does not divide num_attention_heads = {self.num_attention_heads}",
        )
        refuse(
            self.mamba_num_heads % self.n_groups != 0,
            "n_groups",
            f"{self.n_groups} does not divide mamba_num_heads = {self.mamba_num_heads}",
        )
        refuse(
            self.num_experts_per_tok > self.n_routed_experts,
            "num_experts_per_tok",
            f"{self.num_experts_per_tok} experts cannot be chosen from n_routed_experts = {self.n_routed_experts}",
        )
        refuse(
            self.n_routed_experts % self.n_group != 0,
            "n_group",
            f"{self.n_group} does not divide n_routed_experts = {self.n_routed_experts}",
        )
        refuse(self.topk_group > self.n_group, "topk_group", f"{self.topk_group} exceeds n_group = {self.n_group}")
        if self.n_group > 1 and self.n_routed_experts % self.n_group == 0:
            group = self.n_routed_experts // self.n_group
            refuse(group < 2, "n_group", "a router group needs at least two experts, its score is a sum of two")
            refuse(
                self.num_experts_per_tok > group * min(self.topk_group, self.n_group),
                "num_experts_per_tok",
                f"{self.num_experts_per_tok} exceeds the {group * self.topk_group} experts of topk_group = "
                f"{self.topk_group} groups",
            )
        low_high = list(self.time_step_limit)
        refuse(
            len(low_high) != 2 or not 0 <= low_high[0] < low_high[-1],
            "time_step_limit",
            f"{low_high} is no interval [low, high] with 0 <= low < high",
        )
        refuse(
            self.time_step_min > self.time_step_max,
            "time_step_min",
            f"{self.time_step_min} exceeds time_step_max = {self.time_step_max}",
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            refuse(
                value is not None and value >= self.vocab_size,
                name,
                f"{value} is outside the vocabulary of {self.vocab_size}",
            )
        return found

    def validate(self, where: str = "model") -> ModelConfig:
        """Raise :class:`RecipeError` with the first problem; return self."""
        for name, sentence in self.problems():
            raise RecipeError(f"{where}.{name}: {sentence}")
        return self


# ------------------------------------------------------------------------------------------------- everything around it


@dataclass
class SourceConfig:
    """One source of text in a blend."""

    source: str = key(
        "stdlib",
        "`stdlib` (the Python standard library found here), a text/code file or folder, a .jsonl(.gz/.zst), a .parquet "
        "file, `hf:NAME` for a Hugging Face dataset, or Megatron shards: a folder of .bin/.idx files, or one's path",
    )
    weight: float = key(1.0, "share of tokens drawn from this source, relative to the other weights", gt=0)
    tokens: int | None = key(
        None, "in place of a weight: tokens drawn from this source until the next phase or the end", "tokens", ge=1
    )
    max_epochs: int | None = key(
        None, "passes over this source after which it is drawn from no more, and the others share its part", ge=1
    )
    include: list[str] = key(
        lambda: ["*.py", "*.md", "*.rst", "*.txt"], "file names read from a folder, as shell patterns"
    )
    text_key: str = key("text", "field that holds the text (jsonl, parquet, hf)")
    subset: str | None = key(None, "configuration name of a Hugging Face dataset")
    split: str = key("train", "split of a Hugging Face dataset")


@dataclass
class PhaseConfig:
    """Another blend from a point of the run on."""

    tokens: int = key(0, "the first step that begins at or after so many tokens of the run reads it", "tokens", gt=0)
    blend: list[SourceConfig] = key(list, "sources, as in data.blend; one that was read before goes on where it was")


@dataclass
class DataConfig:
    """What is read, how it is tokenised and packed."""

    tokenizer: str = key("bytes", "`bytes`, or a tokenizer.json, or a folder that holds one")
    seq_len: int = key(256, "length of a packed row", "tokens", ge=2)
    seq_len_cycle: list[int] = key(
        list,
        "row lengths of successive steps, in turn, such as [65536, 4096]; each divides seq_len, and a step has as many "
        "more rows",
    )
    blend: list[SourceConfig] = key(lambda: [SourceConfig()], "sources with weights, from the run's first token on")
    phases: list[PhaseConfig] = key(list, "blends that take the place of `blend` later in the run")
    validation_fraction: float = key(
        0.02, "share of documents held out, chosen by content hash; of a single text file its end", ge=0, lt=1
    )
    append_eod: bool = key(True, "end every document with the end-of-document token")
    train_on_eod: bool = key(True, "count the end-of-document token as a label")
    on_bad_line: Literal["skip", "fail"] = key("fail", "a jsonl line that is not JSON: skip and count it, or stop")
    shuffle: bool = key(True, "new document order every epoch, from the seed")
    cache_dir: str = key("~/.cache/nemo_lite/tokens", "where tokenised sources are kept, keyed by their content")
    prefetch: int = key(4, "global batches prepared ahead in the background", "batches", ge=0)

    @property
    def blends(self) -> list[tuple[str, int, list[SourceConfig]]]:
        """The blend of each phase: its key, the token of the run that it begins with, its sources."""
        later = [(f"data.phases[{i}].blend", phase.tokens, phase.blend) for i, phase in enumerate(self.phases)]
        return [("data.blend", 0, self.blend), *later]


@dataclass
class TrainConfig:
    """Batch, length, and what a step computes in."""

    steps: int = key(100, "optimizer steps", "steps", ge=1)
    stop_after: int | None = key(
        None, "end at this step with a checkpoint; schedules stay those of `steps`, and a run without it goes on",
        "steps", ge=1,
    )  # fmt: skip
    global_batch_size: int = key(8, "rows in one optimizer step, over all ranks", "rows", ge=1)
    micro_batch_size: int = key(8, "rows a rank computes at once", "rows", ge=1)
    dtype: Literal["float32", "bfloat16", "float64"] = key(
        "float32", "what activations and matrix products are computed in; master weights stay float32 (or float64)"
    )
    recompute: str = key(
        "none",
        "`full` keeps only each layer's input and recomputes the rest; letters such as `M*`, only of those kinds",
    )
    compile: bool = key(False, "torch.compile every layer; the first step takes minutes")
    loss_chunk: int = key(512, "tokens whose logits are held at once", "tokens", ge=1)
    max_nonfinite: int = key(5, "steps in a row with a non-finite loss or gradient before the run stops", "steps", ge=1)
    threads: int | None = key(None, "torch threads a process; null leaves torch's choice", ge=1)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "`auto` takes CUDA where there is one")
    deterministic: bool = key(False, "refuse operations whose result depends on their timing; CPUs have none")

    @property
    def recomputed(self) -> str:
        """Letters of the kinds of layers that are recomputed."""
        return {"none": "", "full": "M*E-"}.get(self.recompute, self.recompute)


@dataclass
class EvalConfig:
    """Validation on the held-out documents."""

    every: int = key(0, "steps between validations; 0 for none", "steps", ge=0)
    batches: int = key(4, "global batches in one validation", "batches", ge=1)


@dataclass
class OptimRule:
    """What differs for the parameters whose names a pattern matches."""

    match: str = key("", "names, as a shell pattern, such as `embedding.*`, `*.router.weight` or `mtp.*`")
    lr_scale: float = key(1.0, "times the learning rate", ge=0)
    weight_decay_scale: float = key(1.0, "times the weight decay, where there is one", ge=0)


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = key(1e-3, "peak learning rate", gt=0)
    betas: list[float] = key(lambda: [0.9, 0.95], "decay rates of the two moments")
    eps: float = key(1e-8, "epsilon", gt=0)
    weight_decay: float = key(0.1, "weight decay; never on norms, biases, A_log, D, dt_bias", ge=0)
    clip_grad: float = key(1.0, "largest global gradient norm; 0 for no clipping", ge=0)
    rules: list[OptimRule] = key(list, "exceptions; the first that matches a parameter's name decides")


@dataclass
class ScheduleConfig:
    """Learning rate over the run."""

    kind: Literal["wsd", "cosine", "constant"] = key("wsd", "warmup-stable-decay, warmup-cosine, or warmup-constant")
    warmup_steps: int = key(0, "linear warmup", "steps", ge=0)
    decay_steps: int = key(0, "last steps of `wsd` that decay", "steps", ge=0)
    decay_shape: Literal["minus_sqrt", "linear", "cosine"] = key("minus_sqrt", "shape of the decay of `wsd`")
    min_lr: float = key(0.0, "learning rate at the end of a decay", ge=0)


@dataclass
class ParallelConfig:
    """Which engine places the weights, and how. The sizes are of the megatron engine; data-parallel ranks follow."""

    engine: Literal["native", "auto", "megatron"] = key(
        "native", "`native` is FSDP2 under torchrun; `megatron` Megatron-core; `auto` that where the sizes ask for it"
    )
    reshard_after_forward: bool = key(True, "native: free a layer's gathered weights after its forward (FSDP2)")
    tp: int = key(1, "tensor parallel: ranks that share heads and inner sizes", "ranks", ge=1)
    pp: int = key(1, "pipeline parallel: stages, cut by `|` (n pp: interleaved) or balanced by FLOPs", "ranks", ge=1)
    ep: int = key(1, "expert parallel: ranks that share a layer's experts, over tp, cp and dp", "ranks", ge=1)
    cp: int = key(1, "context parallel: ranks that share the tokens of a row", "ranks", ge=1)
    sp: bool = key(True, "sequence parallel: share tokens between blocks over the tp ranks")
    distributed_optimizer: bool = key(True, "share optimizer states over the data-parallel ranks")

    @property
    def uses_megatron(self) -> bool:
        return self.engine == "megatron" or (self.engine == "auto" and self.tp * self.pp * self.ep * self.cp > 1)


NumberFormat = Literal["bf16", "fp8", "fp8_block", "mxfp8", "nvfp4"]


@dataclass
class PrecisionRule:
    """The number format of the linears whose names a pattern matches."""

    match: str = key("", "names, as a shell pattern, such as `*.out_proj`, `layers.3.mixer.experts` or `mtp.*`")
    format: NumberFormat = key("bf16", "of all three products; `bf16` is train.dtype")
    fprop: NumberFormat | None = key(None, "of the forward product, if another one")
    dgrad: NumberFormat | None = key(None, "of the gradient of the input, if another one")
    wgrad: NumberFormat | None = key(None, "of the gradient of the weight, if another one")


@dataclass
class PrecisionConfig:
    """Number formats that linears multiply in. `precision: NAME` stands for `precision.preset: NAME`."""

    preset: Literal["bf16", "fp8", "fp8_block", "mxfp8", "nvfp4", "nemotron3_super_nvfp4"] = key(
        "bf16", "`bf16` is train.dtype everywhere; `nemotron3_super_nvfp4` the published recipe; others: every linear"
    )
    rules: list[PrecisionRule] = key(list, "exceptions from the preset; the first that matches a name decides")
    tail: float | None = key(
        None, "share of the trunk's last layers that stays in train.dtype; null for the preset's", ge=0, le=1
    )
    bf16_last_steps: int = key(0, "last steps of the run with every linear in train.dtype", "steps", ge=0)
    hadamard: bool = key(True, "NVFP4: random Hadamard transform of both operands of the weight's gradient")
    stochastic_rounding: bool = key(True, "NVFP4: round gradients stochastically")
    square_weight_blocks: bool = key(True, "NVFP4: weights in blocks of 16x16, not 1x16")
    statistics_every: int = key(
        0, "steps between measurements of what is flushed to zero, saturated and lost, by layer; 0 for none", "steps",
        ge=0,
    )  # fmt: skip
    reduce_dtype: Literal["float32", "bfloat16"] = key("float32", "what gradients are summed over ranks in")


@dataclass
class KernelsConfig:
    """Backend of each op: `auto`, or one by name; `nemo-lite kernels` prints the table."""

    ssd: str = key("auto", "chunked SSD scan")
    conv: str = key("auto", "causal convolution")
    attention: str = key("auto", "causal attention over packed documents")
    experts: str = key("auto", "routed experts")
    router: str = key("auto", "choice of experts")
    norm: str = key("auto", "RMSNorm and gated group RMSNorm")
    activation: str = key("auto", "squared ReLU")
    linear: str = key("auto", "products of linears")
    loss: str = key("auto", "cross-entropy of a chunk of logits, with its gradient")
    step: str = key("auto", "a few tokens through all layers at once: decoding, verifying drafts")
    quant: str = key("auto", "number formats: quantised operands")


@dataclass
class CheckpointConfig:
    """Sharded, asynchronous, atomic checkpoints in RUN_DIR/checkpoints."""

    every: int = key(0, "steps between checkpoints; the last step always saves; 0 for only the last", "steps", ge=0)
    keep: int = key(3, "checkpoints kept; 0 keeps all", ge=0)
    asynchronous: bool = key(True, "write in the background while training goes on")


@dataclass
class LogConfig:
    """What is written while training; metrics.jsonl and report.html always are."""

    every: int = key(10, "steps between log lines", "steps", ge=1)
    tensorboard: bool = key(False, "write TensorBoard events to RUN_DIR/tensorboard")
    wandb: str | None = key(None, "Weights & Biases project")
    mlflow: str | None = key(None, "MLflow experiment")


@dataclass
class StageConfig:
    """What makes a recipe a stage of a programme (docs/programme.md). A training stage needs none of these keys."""

    command: str | None = key(None, "what is run, such as `nemo-lite merge ...`; null trains this recipe")
    inputs: list[str] = key(
        list, "names of stages, files and folders that it reads; a training stage's data, init_from and resume_from go "
        "without saying",
    )  # fmt: skip
    outputs: list[str] = key(list, "files and folders that the command writes; of a training stage its last checkpoint")
    nodes: int = key(1, "machines of a training stage's Slurm job", "machines", ge=1)


@dataclass
class Recipe:
    """A training run."""

    run_dir: str | None = key(
        None, "where the run lives; null for runs/NAME-OF-RECIPE, for a stage runs/NAME-OF-FOLDER/NAME-OF-RECIPE"
    )  # fmt: skip
    seed: int = key(0, "seed of initial weights and data order", ge=0)
    init_from: str | None = key(None, "MODEL_DIR to start from; its config replaces `model`")
    resume_from: str | None = key(
        None, "another run that this one goes on from: weights, optimizer and step of its newest checkpoint, and its "
        "place in the data where those are the same",
    )  # fmt: skip
    model: ModelConfig = key(ModelConfig, "the architecture")
    data: DataConfig = key(DataConfig, "text in")
    train: TrainConfig = key(TrainConfig, "batch and length")
    eval: EvalConfig = key(EvalConfig, "validation")
    optim: OptimConfig = key(OptimConfig, "optimizer")
    schedule: ScheduleConfig = key(ScheduleConfig, "learning rate")
    parallel: ParallelConfig = key(ParallelConfig, "engine")
    precision: PrecisionConfig = key(PrecisionConfig, "number formats")
    kernels: KernelsConfig = key(KernelsConfig, "op backends")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "saving")
    log: LogConfig = key(LogConfig, "logging")
    stage: StageConfig = key(StageConfig, "its place in a programme")

    def problems(self) -> list[tuple[str, str]]:
        """Impossible values and illegal pairs as (full key, sentence); empty when the run can start.

        The number of ranks is not known here: see :func:`check_world_size`.
        """
        found = [(f"model.{name}", sentence) for name, sentence in self.model.problems()]
        if found:  # the checks below read the parsed pattern
            return found

        def refuse(condition: bool, name: str, sentence: str) -> None:
            if condition:
                found.append((name, sentence))

        model, data, train, optim, schedule = self.model, self.data, self.train, self.optim, self.schedule
        if "E" in model.layers + model.mtp_layers:
            # The grouped GEMM wants rows of 16 bytes; in bfloat16 that is 8 numbers.
            latent = "hidden_size" if model.moe_latent_size is None else "moe_latent_size"
            for name in (latent, "moe_intermediate_size"):
                size = getattr(model, name)
                sentence = f"the experts' grouped GEMM takes multiples of 8, and {size} is none; {_multiples(size, 8)}"
                refuse(size % 8 != 0, f"model.{name}", sentence)
        refuse(
            (not train.recomputed and train.recompute != "none") or bool(set(train.recomputed) - set("M*E-")),
            "train.recompute",
            f"needs none, full or letters of M*E-, got {train.recompute!r}",
        )
        refuse(not data.blend, "data.blend", "is empty; name at least one source, such as [{source: stdlib}]")
        for name, length in [("data.seq_len", data.seq_len), *(("data.seq_len_cycle", n) for n in data.seq_len_cycle)]:
            refuse(
                bool(model.mtp_layers) and length <= model.mtp.depth + 1,
                name,
                f"{length} leaves no label for model.mtp.depth = {model.mtp.depth}; {model.mtp.depth + 2} would",
            )
            refuse(
                length < 2 or data.seq_len % length != 0,
                name,
                f"{length} does not divide data.seq_len = {data.seq_len}, so that steps could not have as many tokens "
                "each",
            )
        found += self._phase_problems()
        refuse(
            (train.stop_after or 0) > train.steps,
            "train.stop_after",
            f"{train.stop_after} exceeds train.steps = {train.steps}",
        )
        refuse(
            train.global_batch_size % train.micro_batch_size != 0,
            "train.global_batch_size",
            f"{train.global_batch_size} is no multiple of train.micro_batch_size = {train.micro_batch_size}; "
            f"{_multiples(train.global_batch_size, train.micro_batch_size)}",
        )
        decay = schedule.decay_steps if schedule.kind == "wsd" else 0
        refuse(
            schedule.warmup_steps + decay > train.steps,
            "schedule.warmup_steps",
            f"warmup_steps = {schedule.warmup_steps}"
            + (f" and decay_steps = {decay} do" if decay else " does")
            + f" not fit into train.steps = {train.steps}",
        )
        refuse(
            schedule.min_lr > optim.lr, "schedule.min_lr", f"{schedule.min_lr} exceeds the peak, optim.lr = {optim.lr}"
        )
        refuse(
            len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas),
            "optim.betas",
            f"{optim.betas} are not two numbers in [0, 1)",
        )
        refuse(
            self.precision.reduce_dtype == "bfloat16" and train.dtype == "float64",
            "precision.reduce_dtype",
            "bfloat16 would undo train.dtype = float64; use float32, which then means float64",
        )
        from nemo_lite.precision.recipe import problems as precision_problems

        found += precision_problems(model, self.precision, train.dtype)
        refuse(
            self.precision.bf16_last_steps > train.steps,
            "precision.bf16_last_steps",
            f"{self.precision.bf16_last_steps} exceeds train.steps = {train.steps}",
        )
        refuse(
            self.init_from is not None and self.resume_from is not None,
            "resume_from",
            "brings the weights of a run, and init_from those of a MODEL_DIR; leave one out",
        )
        stage = self.stage
        refuse(
            stage.command is not None and not stage.outputs,
            "stage.outputs",
            "is empty; name what the command writes, by which it is told whether the stage is done",
        )
        refuse(
            stage.command is None and bool(stage.outputs),
            "stage.outputs",
            "a training stage's output is its last checkpoint; leave it out, or set stage.command",
        )
        refuse(
            self.eval.every > 0 and data.validation_fraction == 0,
            "eval.every",
            "there is nothing to validate on with data.validation_fraction = 0; set it above 0, or eval.every to 0",
        )
        parallel = self.parallel
        sizes = [f"parallel.{name}" for name in ("tp", "pp", "ep", "cp") if getattr(parallel, name) != 1]
        refuse(
            parallel.engine == "native" and bool(sizes),
            sizes[0] if sizes else "",
            "the native engine shards over all ranks alike; set parallel.engine to megatron, or leave it at 1",
        )
        asked = {op: backend for op, backend in vars(self.kernels).items() if backend != "auto"}
        if asked:  # the table imports torch, so that it is read only when a backend is named
            import nemo_lite_kernels

            for op, backend in asked.items():
                known = getattr(nemo_lite_kernels, "OPS", {}).get(op)
                if known is not None:
                    refuse(backend not in known, f"kernels.{op}", _not_one_of(backend, ["auto", *known]))
        return found

    def _phase_problems(self) -> list[tuple[str, str]]:
        """What is wrong with the data's phases and token budgets."""
        found, data, before = [], self.data, 0
        for i, phase in enumerate(data.phases):
            name = f"data.phases[{i}]"
            if not phase.blend:
                found.append((f"{name}.blend", "is empty; name at least one source, such as [{source: stdlib}]"))
            if phase.tokens <= before:
                found.append((f"{name}.tokens", f"{phase.tokens} is not after the phase before, from {before} on"))
            before = phase.tokens
        ends = [*(start for _, start, _ in data.blends[1:]), self.run_tokens]
        for (name, start, blend), end in zip(data.blends, ends, strict=True):
            for j, source in enumerate(blend):
                if source.tokens is not None and source.weight != 1:
                    found.append((f"{name}[{j}].weight", "cannot stand beside a budget in `tokens`; leave one out"))
            budgets = sum(source.tokens or 0 for source in blend)
            room = end - start
            if budgets >= room > 0 and any(source.tokens is None for source in blend):
                found.append(
                    (name, f"the budgets of {budgets:,} tokens leave nothing of {room:,} to sources by weight")
                )
        return found

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.seq_len

    @property
    def run_tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.train.steps * self.tokens_per_step


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Raise :class:`RecipeError` when the recipe's layout or global batch cannot be shared by ``world_size`` ranks."""
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if world_size < 1:
        raise RecipeError(f"{world_size} ranks cannot train; use at least 1")
    if recipe.parallel.uses_megatron:
        from nemo_lite.parallel.layout import layout_of, problems

        for length in dict.fromkeys([recipe.data.seq_len, *recipe.data.seq_len_cycle]):
            more = recipe.data.seq_len // length
            found = problems(recipe.model, layout_of(recipe), world_size, length, batch * more, micro * more)
            if found:
                where = "" if more == 1 else f"data.seq_len_cycle: with rows of {length} tokens "
                raise RecipeError(where + "; ".join(found))
        return
    if batch % (micro * world_size):
        shares = batch // micro
        legal = [n for n in range(1, shares + 1) if shares % n == 0]
        ranks = [n for n in legal if n < world_size][-1:] + [n for n in legal if n > world_size][:1]
        raise RecipeError(
            f"train.global_batch_size: {batch} rows cannot be shared by {world_size} ranks in micro batches of "
            f"{micro}; {_multiples(batch, micro * world_size)}, or use {' or '.join(map(str, ranks))} ranks"
        )


# ---------------------------------------------------------------------------------------------------- reading a recipe
# OmegaConf merges, resolves ${interpolations} and builds the dataclasses. It accepts "3" for an int, names only the
# leaf inside lists and knows no lines, so every file and every override is first checked against the types here.

COMMAND_LINE = "command line"
# With init_from the architecture is the directory's; these are choices of a run and stay free.
FREE_WITH_INIT_FROM = (
    "mtp.depth", "mtp.loss_weight", "router_aux_loss_coef", "router_bias_update_rate", "max_position_embeddings",
)  # fmt: skip

Say = Callable[[str, str], NoReturn]


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = (), *, resolved: bool = False) -> Recipe:
    """The validated recipe of a YAML file (over its ``base:``, if any) with ``key=value`` overrides on top.

    Lists replace each other between base and file; an override may name an element (``data.blend.0.weight=2``).
    ``resolved`` reads a RUN_DIR's recipe.yaml, whose model is complete: ``init_from`` is then not opened again.
    Raises :class:`RecipeError`: one sentence naming file and line (or the command line), the key, and what is right.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    origins: dict[str, str] = {}

    def say(name: str, sentence: str) -> NoReturn:
        inner = name
        while inner and inner not in origins:
            inner = re.sub(r"\.?[^.\[\]]+$|\[\d+\]$", "", inner)
        raise RecipeError(f"{origins.get(inner, path)}: {name}: {sentence}")

    layers, (tree, lines) = [], _read(path)
    base = tree.pop("base", None)
    origins.update(lines)
    if base is not None:
        if not isinstance(base, str):
            say("base", f"needs the path of a recipe, got {_show(base)}")
        below, origins_below = _read(path.parent / base, asked_by=f"{lines['base']}: base: ")
        if "base" in below:
            raise RecipeError(
                f"{origins_below['base']}: base: a base cannot have a base itself ({path} inherits from this file)"
            )
        origins = origins_below
        _check(below, Recipe, "", say)
        layers.append(below)
        origins = origins_below | lines
    _check(tree, Recipe, "", say)
    layers.append(tree)
    staged = "stage" in tree
    try:
        tree = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Recipe), *layers))
        for text in overrides:
            _override(tree, text, origins, say)
            # Once more under the dataclasses, so that a new list's elements get their defaults.
            tree = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Recipe), tree))
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        _check(tree, Recipe, "", say, final=True)
        # What a stage starts from may be made by a stage before it; until then the recipe's own model stands for it.
        early = staged and not Path(tree["init_from"] or "").exists()
        if tree["init_from"] and not resolved and not early:
            tree["model"] = _model_of(tree["init_from"], tree["model"], origins, say)
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), tree))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        say(str(getattr(error, "full_key", None) or "?"), str(error).splitlines()[0])
    recipe.run_dir = recipe.run_dir or f"runs/{path.resolve().parent.name + '/' if staged else ''}{path.stem}"
    for name, sentence in recipe.problems():
        say(name, sentence)
    return recipe


def model_with(config: ModelConfig, overrides: Sequence[str]) -> tuple[ModelConfig, set[str]]:
    """A copy of `config` with ``key=value`` overrides of its keys (``pattern=MEM*E``), and which keys they name.

    Raises :class:`RecipeError` as :func:`load_recipe` does; what the values mean together is not judged here.
    """

    def say(name: str, sentence: str) -> NoReturn:
        raise RecipeError(f"{COMMAND_LINE}: {name}: {sentence}")

    tree, origins = {"model": dataclasses.asdict(config)}, {}
    for text in overrides:
        _override(tree, text if text.startswith("model.") else f"model.{text}", origins, say)
    model = {**tree["model"], "mtp": MTPConfig(**tree["model"]["mtp"])}
    return ModelConfig(**model), {name.removeprefix("model.") for name in origins}


def recipe_to_yaml(recipe: Recipe) -> str:
    """Every key of ``recipe`` as YAML; :func:`load_recipe` reads back an equal recipe."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read(path: Path, asked_by: str = "") -> tuple[dict, dict[str, str]]:
    """One YAML file as a plain tree, and ``file:line`` of every key path in it."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def lines(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
        if isinstance(node, yaml.MappingNode):
            for inner, value in node.value:
                yield (full := _join(name, inner.value)), f"{path}:{inner.start_mark.line + 1}"
                yield from lines(value, full)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                yield f"{name}[{i}]", f"{path}:{value.start_mark.line + 1}"
                yield from lines(value, f"{name}[{i}]")

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode):
            tree, origins = OmegaConf.to_container(OmegaConf.create(text)), dict(lines(root))
            if isinstance(tree.get("precision"), str):
                tree["precision"] = {"preset": tree["precision"]}
                origins["precision.preset"] = origins["precision"]
            return tree, origins
    except FileNotFoundError:
        raise RecipeError(f"{asked_by}{path}: no such file") from None
    except OSError as error:
        raise RecipeError(f"{asked_by}{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not a text file in UTF-8") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {getattr(error, 'full_key', '?')}: {str(error).splitlines()[0]}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag such as !!int on what is none
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        hint = "; put a pattern that begins with * in quotes" if "alias" in reason else ""
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: broken YAML: {' '.join(reason.split())}{hint}") from None
    what = "is empty" if root is None else "is no mapping of keys to values"
    raise RecipeError(f"{path}: {what}; a recipe holds sections such as model, data and train")


def sections_of(path: str | os.PathLike) -> set[str]:
    """The top-level keys that a recipe file itself sets, ``base`` among them."""
    return set(_read(Path(path))[0])


def _check(value: Any, hint: Any, name: str, say: Say, bounds: Any = None, final: bool = False) -> None:
    """Call ``say`` unless plain ``value`` has exactly the type ``hint`` and keeps the field's bounds.

    An interpolation can only be judged when all is merged and resolved (``final``).
    """
    if value == "???":  # OmegaConf would read it as no value
        say(name, "needs a value, got ???")
    if isinstance(value, str) and "${" in value and not final:
        return
    if _optional(hint):
        if value is None:
            return
        hint = hint.__args__[0]
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            say(name, f"is a section with keys of its own, got {_show(value)}")
        for inner, inner_value in value.items():
            full = _join(name, str(inner))
            if inner not in _hints(hint):
                say(full, _no_such_key(hint, str(inner)))
            _check(inner_value, _hints(hint)[inner], full, say, hint.__dataclass_fields__[inner].metadata, final)
    elif typing.get_origin(hint) is list:
        if not isinstance(value, list):
            say(name, f"needs a list, got {_show(value)}")
        for i, inner_value in enumerate(value):
            _check(inner_value, typing.get_args(hint)[0], f"{name}[{i}]", say, None, final)
    elif typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            say(name, _not_one_of(value, typing.get_args(hint)))
    elif type(value) is not hint and not (hint is float and type(value) is int):
        quote = "; put it in quotes" if hint is str and not isinstance(value, (dict, list, type(None))) else ""
        say(name, f"needs {_KINDS[hint]}, got {_show(value)}{quote}")
    elif hint is float and (math.isnan(float(value)) or (math.isinf(float(value)) and bounds is not None)):
        say(name, f"needs a finite number, got {value}")
    for sign, limit in _bounds(bounds or {}):
        if not _COMPARE[sign](value, limit):
            say(name, f"must be {sign} {limit}, got {value}")


def _override(tree: dict, text: str, origins: dict[str, str], say: Say) -> None:
    """Apply one ``a.b.0.c=value`` to the merged plain tree, in place."""
    import yaml
    from omegaconf import OmegaConf

    key_text, equals, raw = text.partition("=")
    steps = re.findall(r"[^.\[\]\s]+", key_text)
    if not equals or not steps:
        raise RecipeError(f"{COMMAND_LINE}: {text!r} is no override; write KEY=VALUE, such as train.steps=100")
    if steps == ["base"]:
        raise RecipeError(f"{COMMAND_LINE}: base: can only be set in the recipe file")
    if steps == ["precision"] and not raw.lstrip().startswith("{"):
        steps.append("preset")
    node: Any = tree
    hint, name, bounds, parent, last = Recipe, "", None, tree, steps[0]
    for step in steps:
        parent, last = node, step
        if dataclasses.is_dataclass(hint) and isinstance(node, dict):
            full = _join(name, step)
            if step not in _hints(hint):
                raise RecipeError(f"{COMMAND_LINE}: {full}: {_no_such_key(hint, step)}")
            bounds, hint = hint.__dataclass_fields__[step].metadata, _hints(hint)[step]
        elif typing.get_origin(hint) is list and isinstance(node, list):
            full = f"{name}[{step}]"
            if not step.isdecimal() or int(step) >= len(node):
                count = f"has {len(node)} elements, counted from 0" if node else "is empty"
                raise RecipeError(f"{COMMAND_LINE}: {full}: no such element; {name} {count}")
            bounds, hint, last = None, typing.get_args(hint)[0], int(step)
        else:
            raise RecipeError(f"{COMMAND_LINE}: {_join(name, step)}: no such key; {name} is a single value")
        name, node = full, parent[last]
    origins[name] = COMMAND_LINE
    optional = _optional(hint)
    kind = hint.__args__[0] if optional else hint
    if kind is str or typing.get_origin(kind) is Literal:
        # Taken as typed: a pattern such as *E or a name such as 2024 is not YAML here.
        quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\""
        value = None if optional and raw == "null" else raw[1:-1] if quoted else raw
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={raw}"]))["v"]
        except (yaml.YAMLError, ValueError):
            raise RecipeError(f"{COMMAND_LINE}: {name}: {raw!r} is broken YAML") from None
    _check(value, hint, name, say, bounds)
    if isinstance(value, dict):  # a whole section: merged, as between files
        origins.update({_join(name, inner): COMMAND_LINE for inner in value})
        value = OmegaConf.to_container(OmegaConf.merge(node, value))
    parent[last] = value


def _model_of(folder: str, asked: dict, origins: dict[str, str], say: Say) -> dict:
    """The model section of MODEL_DIR ``folder``; ``asked`` may differ from it only where a run is free to choose."""
    from nemo_lite.model.hf import load_config

    try:
        model = dataclasses.asdict(load_config(folder))
    except (OSError, ValueError) as error:
        say("init_from", str(error))
    for name in dict.fromkeys(name.split("[")[0] for name in origins if name.startswith("model.")):
        *sections, leaf = name.split(".")[1:]
        there, here = model, asked
        for section in sections:
            there, here = there[section], here[section]
        if name.removeprefix("model.") in FREE_WITH_INIT_FROM:
            there[leaf] = here[leaf]
        elif not isinstance(here[leaf], dict) and here[leaf] != there[leaf]:
            say(
                name,
                f"{_show(here[leaf])} contradicts init_from = {folder}, where it is {_show(there[leaf])}; with "
                f"init_from only {', '.join(FREE_WITH_INIT_FROM)} of the model can be set",
            )
    return model


# ------------------------------------------------------------------------------------------------- the keys themselves


@dataclass(frozen=True)
class RecipeKey:
    """One key as docs and errors show it; lists of sections appear as ``data.blend[].source``."""

    path: str
    type: str
    default: str
    unit: str
    bounds: str
    doc: str


def recipe_keys(section: Any = Recipe, prefix: str = "", listed: set | None = None) -> list[RecipeKey]:
    """Every key of a recipe, in the order of the dataclasses; those of a list's elements where it is met first."""
    keys: list[RecipeKey] = []
    listed = set() if listed is None else listed
    for item in dataclasses.fields(section):
        hint, path = _hints(section)[item.name], _join(prefix, item.name)
        if dataclasses.is_dataclass(hint):
            keys += recipe_keys(hint, path, listed)
            continue
        factory = item.default_factory
        default = _plain(item.default if factory is dataclasses.MISSING else factory())
        bounds = ", ".join(f"{sign} {limit}" for sign, limit in _bounds(item.metadata))
        keys.append(RecipeKey(path, _type_name(hint), default, item.metadata["unit"], bounds, item.metadata["doc"]))
        element = typing.get_args(hint)[0] if typing.get_origin(hint) is list else None
        if dataclasses.is_dataclass(element) and element not in listed:
            listed.add(element)
            keys += recipe_keys(element, f"{path}[]", listed)
    return keys


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_hints = functools.cache(typing.get_type_hints)


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner


def _bounds(metadata: Any) -> list[tuple[str, float]]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return [(sign, metadata[name]) for name, sign in signs.items() if name in metadata]


def _multiples(size: int, of: int) -> str:
    low = size // of * of
    return f"{low} and {low + of} are the nearest" if low else f"{of} is the smallest"


def _plain(value: Any) -> str:
    """A default as one would write it in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if isinstance(value, SourceConfig):
        return f"{{source: {value.source}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {"": '""', "inf": ".inf"}.get(str(value), str(value))


def _show(value: Any) -> str:
    """What was found, for a sentence."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, str) else _plain(value)


def _optional(hint: Any) -> bool:
    """Whether a hint is X | None (of a Literal, Python before 3.14 makes a Union of its own)."""
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _type_name(hint: Any) -> str:
    if _optional(hint):
        return f"{_type_name(hint.__args__[0])} or null"
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if typing.get_origin(hint) is list:
        element = typing.get_args(hint)[0]
        sections = {
            SourceConfig: "sources",
            PhaseConfig: "phases",
            PrecisionRule: "precision.rules",
            OptimRule: "optim.rules",
        }
        return f"list of {sections.get(element) or _type_name(element)}"
    return hint.__name__


def _not_one_of(value: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, 1)
    return f"{_show(value)} is not one of {', '.join(allowed)}" + (f"; did you mean {near[0]}?" if near else "")


def _no_such_key(section: Any, name: str) -> str:
    """What to say of an unknown key: a sibling that looks like it, else that name elsewhere, else the list."""
    siblings = list(_hints(section))
    near = difflib.get_close_matches(name, siblings, 1, cutoff=0.7)
    near = near or [key.path for key in recipe_keys() if key.path.split(".")[-1] == name][:3]
    near = near or difflib.get_close_matches(name, siblings, 1)
    if near:
        return f"no such key; did you mean {' or '.join(near)}?"
    return f"no such key; the keys here are {', '.join(siblings)}"
