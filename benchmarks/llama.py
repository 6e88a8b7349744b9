"""llama.cpp on a MODEL_DIR of ours: its GGUF files, its logits, its prefill and decode.

    python benchmarks/llama.py gguf MODEL_DIR OUT.gguf --dtype bf16        f32 or bf16; MTP tensors are left out
    python benchmarks/llama.py quantise F32.gguf OUT.gguf --dtype q4_0     q8_0 or q4_0, by llama.cpp's own quantiser
    python benchmarks/llama.py logits FILE.gguf IDS.npy OUT.npy            rows of token ids -> float32 logits
    python benchmarks/llama.py decode FILE.gguf --batch 8 --threads 2      or prefill: one measurement, a line of JSON

It needs the packages of constraints/llama.txt and neither torch nor nemo_lite, so that it can run in an environment of
its own and its peak memory is llama.cpp's. The files have no vocabulary: token ids go in and come out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import Memory, OtherCPU

KINDS = {"linear_attention": "M", "full_attention": "*", "moe": "E"}
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}

# The tensors of a layer: llama.cpp's name -> the checkpoint's. Those of `WIDE` stay in float32, as ours do.
LAYER = {
    "M": {
        "ssm_in.weight": "in_proj.weight", "ssm_conv1d.weight": "conv1d.weight", "ssm_conv1d.bias": "conv1d.bias",
        "ssm_dt.bias": "dt_bias", "ssm_a": "A_log", "ssm_d": "D", "ssm_norm.weight": "norm.weight",
        "ssm_out.weight": "out_proj.weight",
    },
    "*": {
        "attn_q.weight": "q_proj.weight", "attn_k.weight": "k_proj.weight", "attn_v.weight": "v_proj.weight",
        "attn_output.weight": "o_proj.weight",
    },
    "E": {
        "ffn_gate_inp.weight": "gate.weight", "exp_probs_b.bias": "gate.e_score_correction_bias",
        "ffn_latent_down.weight": "fc1_latent_proj.weight", "ffn_latent_up.weight": "fc2_latent_proj.weight",
        "ffn_up_exps.weight": "experts.{e}.up_proj.weight", "ffn_down_exps.weight": "experts.{e}.down_proj.weight",
        "ffn_up_shexp.weight": "shared_experts.up_proj.weight",
        "ffn_down_shexp.weight": "shared_experts.down_proj.weight",
    },
}  # fmt: skip
WIDE = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight", "ffn_gate_inp.weight")


# ------------------------------------------------------------------------------------------------------------- files


class Checkpoint:
    """The safetensors of a MODEL_DIR as float32 arrays, read one at a time (numpy knows no bfloat16)."""

    def __init__(self, folder: Path):
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    self._where[name] = (path, 8 + size, entry)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> np.ndarray:
        path, base, entry = self._where[name]
        start, end = entry["data_offsets"]
        raw = np.fromfile(path, np.uint8, end - start, offset=base + start)
        if entry["dtype"] == "BF16":
            array = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = raw.view(DTYPES[entry["dtype"]]).astype(np.float32)
        return array.reshape(entry["shape"])


def write_gguf(model_dir: Path, out: Path, dtype: str) -> None:
    """Write a MODEL_DIR as a GGUF of llama.cpp's architecture nemotron_h_moe, in f32 or bf16."""
    import gguf

    config, tensors = json.loads((model_dir / "config.json").read_text()), Checkpoint(model_dir)
    unknown = sorted(set(config["layers_block_type"]) - set(KINDS))
    if unknown or config.get("n_group", 1) != 1:
        raise SystemExit(f"{model_dir}: {', '.join(unknown) or 'groups of experts'}: nemotron_h_moe has no such thing")
    kinds = [KINDS[kind] for kind in config["layers_block_type"]]
    writer = gguf.GGUFWriter(out, "nemotron_h_moe")
    writer.add_name(model_dir.name)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(len(kinds))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([config["num_key_value_heads"] if kind == "*" else 0 for kind in kinds])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_scaling_finetuned(False)
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["ssm_state_size"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_ssm_inner_size(config["mamba_num_heads"] * config["mamba_head_dim"])
    writer.add_ssm_time_step_rank(config["mamba_num_heads"])
    writer.add_feed_forward_length([config["moe_intermediate_size"] if kind == "E" else 0 for kind in kinds])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_group_count(1)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config.get("moe_latent_size"):
        writer.add_moe_latent_size(config["moe_latent_size"])
    kind_of_file = gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_BF16
    writer.add_file_type(kind_of_file)

    def add(name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        if dtype == "bf16" and array.ndim > 1 and not name.endswith(WIDE):
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(array, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(name, array)

    add("token_embd.weight", tensors["backbone.embeddings.weight"])
    if "lm_head.weight" in tensors:  # else llama.cpp takes the embedding
        add("output.weight", tensors["lm_head.weight"])
    add("output_norm.weight", tensors["backbone.norm_f.weight"])
    for i, kind in enumerate(kinds):
        add(f"blk.{i}.attn_norm.weight", tensors[f"backbone.layers.{i}.norm.weight"])
        for name, theirs in LAYER[kind].items():
            source = f"backbone.layers.{i}.mixer.{theirs}"
            if "{e}" in source:
                experts = [source.replace("{e}", str(e)) for e in range(config["n_routed_experts"])]
                array = np.stack([tensors[expert] for expert in experts])
            elif name.startswith("ffn_latent") and source not in tensors:
                continue
            else:
                array = tensors[source]
            if name == "ssm_conv1d.weight":
                array = array.reshape(len(array), -1)
            elif name == "ssm_a":
                array = -np.exp(array)[:, None]
            elif name == "ssm_d":
                array = array[:, None]
            elif name == "ssm_norm.weight":
                array = array.reshape(config["n_groups"], -1)
            add(f"blk.{i}.{name}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, out: Path, dtype: str, threads: int) -> None:
    """llama.cpp's own quantiser with its default mixture."""
    lib = _library()
    options = lib.llama_model_quantize_default_params()
    options.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{dtype.upper()}")
    options.nthread = threads
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp could not quantise {source} to {dtype}")


# ----------------------------------------------------------------------------------------------------------- running


def _library():
    """llama_cpp, silent but for its errors."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level, text, _):
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            import sys

            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    _library.log = log  # ctypes does not hold it
    return llama_cpp


class Model:
    """An open GGUF and one context for `rows` sequences of `tokens` tokens each."""

    def __init__(self, path: Path, rows: int, tokens: int, threads: int, repack: bool = True):
        self.lib = lib = _library()
        options = lib.llama_model_default_params()
        options.load_mode = lib.LLAMA_LOAD_MODE_NONE  # read into memory of its own, as we do; no mapped file
        options.use_extra_bufts = repack  # weights laid out for the CPU's matrix instructions while they are read
        self.model = lib.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot open {path}")
        self.width = max(tokens, rows)
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_seq_max = rows * (tokens + 8), rows
        context.n_batch, context.n_ubatch = self.width, min(self.width, 512)  # 512 is its default and was fastest
        context.n_threads = context.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context for {rows} rows of {tokens} tokens of {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(self.width, 0, 1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def read(self, tokens: list[int], positions: list[int], rows: list[int], every: bool) -> None:
        """One llama_decode; logits of every token or of the last one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(zip(tokens, positions, rows)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = every or i == len(tokens) - 1
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")

    def prompt(self, tokens: list[int], row: int = 0, every: bool = False) -> None:
        self.read(tokens, list(range(len(tokens))), [row] * len(tokens), every)

    def logits(self, i: int) -> np.ndarray:
        """Logits of token i of the last read; valid until the next one."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), shape=(self.vocabulary,))


def logits(path: Path, ids: np.ndarray, threads: int, one_by_one: bool = False) -> np.ndarray:
    """Logits [rows, length, vocabulary] of rows of token ids, each row for itself, whole or token by token."""
    rows, length = ids.shape
    model = Model(path, 1, length, threads, repack=False)
    out = np.empty((rows, length, model.vocabulary), np.float32)
    for row, tokens in enumerate(ids.tolist()):
        model.clear()
        if not one_by_one:
            model.prompt(tokens, every=True)
        for i, token in enumerate(tokens):
            if one_by_one:
                model.read([token], [i], [0], every=True)
            out[row, i] = model.logits(0 if one_by_one else i)
    return out


def measure(args) -> dict[str, Any]:
    """One measurement, as `measure` of peers.py makes it."""
    decode = args.work == "decode"
    batch, length, new = args.batch, args.length, args.new_tokens if decode else 0
    model = Model(args.file, batch, length + new, args.threads, not args.as_stored)
    prompts = np.random.default_rng(0).integers(0, model.vocabulary, (batch, length)).tolist()

    def step() -> float:
        model.clear()
        start, following = time.perf_counter(), []
        for row, tokens in enumerate(prompts):
            model.prompt(tokens, row)
            following.append(int(model.logits(length - 1).argmax()))
        if decode:
            start = time.perf_counter()
            for n in range(new):
                model.read(following, [length + n] * batch, list(range(batch)), every=True)
                following = [int(model.logits(row).argmax()) for row in range(batch)]
        return time.perf_counter() - start

    with Memory() as memory:
        step()
        with OtherCPU() as others:
            seconds = [step() for _ in range(args.repeats)]
    units = batch * (new or length)
    return {
        "tokens_per_second": units / statistics.median(seconds),
        "best": units / min(seconds),
        "peak_mb": memory.peak_mb,
        "use_mb": memory.use_mb,
        "other_cpu": others.share,
    }


def versions() -> dict[str, str]:
    lib = _library()
    features = lib.llama_print_system_info().decode().split("|")
    return {
        "llama_cpp_python": lib.__version__,
        "built_for": " ".join(part.split("=")[0].split(":")[-1].strip() for part in features if "= 1" in part),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="work", required=True)
    threads = argparse.ArgumentParser(add_help=False)
    threads.add_argument("--threads", type=int, default=2)

    command = commands.add_parser("gguf", help="MODEL_DIR -> GGUF")
    command.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    command.add_argument("out", type=Path, metavar="OUT.gguf")
    command.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    command = commands.add_parser("quantise", parents=[threads], help="f32 GGUF -> quantised GGUF")
    command.add_argument("file", type=Path, metavar="F32.gguf")
    command.add_argument("out", type=Path, metavar="OUT.gguf")
    command.add_argument("--dtype", choices=["q8_0", "q4_0"], default="q8_0")
    command = commands.add_parser("logits", parents=[threads], help="logits of rows of token ids")
    command.add_argument("file", type=Path, metavar="FILE.gguf")
    command.add_argument("ids", type=Path, metavar="IDS.npy", help="integers [rows, length]")
    command.add_argument("out", type=Path, metavar="OUT.npy")
    command.add_argument("--one-by-one", action="store_true", help="read token by token, as decoding does")
    for work in ("prefill", "decode"):
        command = commands.add_parser(work, parents=[threads], help=f"measure {work}: one line of JSON")
        command.add_argument("file", type=Path, metavar="FILE.gguf")
        command.add_argument("--batch", type=int, default=1, help="rows")
        command.add_argument("--length", type=int, default=64 if work == "decode" else 512, help="tokens of prompt")
        command.add_argument("--new-tokens", type=int, default=64, help="decoded tokens a row")
        command.add_argument("--repeats", type=int, default=4)
        command.add_argument("--as-stored", action="store_true", help="do not lay weights out anew for the CPU")
    commands.add_parser("versions", help="of llama-cpp-python, and the CPU features it was built for")
    args = parser.parse_args()
    if args.work == "gguf":
        write_gguf(args.model_dir, args.out, args.dtype)
    elif args.work == "quantise":
        quantise(args.file, args.out, args.dtype, args.threads)
    elif args.work == "logits":
        np.save(args.out, logits(args.file, np.load(args.ids), args.threads, args.one_by_one))
    elif args.work == "versions":
        print(json.dumps(versions()))
    else:
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
