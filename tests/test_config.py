"""The recipe: what loads, and what is refused in which words."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_lite.config import (
    ModelConfig,
    MTPConfig,
    Recipe,
    RecipeError,
    UserError,
    check_world_size,
    load_recipe,
    recipe_keys,
    recipe_to_yaml,
)

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe next to the others and return its name, relative as a person would type it."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="x.yaml"):
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def refusal(*arguments, **keywords):
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments, **keywords)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ----------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_round_trips(path, tmp_path):
    recipe = load_recipe(path)
    programme = f"{path.parent.name}/" if path.parent.name.startswith("super") else ""
    assert recipe.run_dir == f"runs/{programme}{path.stem}"
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe_to_yaml(recipe))
    assert load_recipe(copy) == recipe


def test_types_and_defaults(write):
    name = write(
        "model: {pattern: 'M*', time_step_limit: [0, .inf]}\noptim: {lr: 3e-4, betas: [0, 0.5]}\ntrain: {threads: 2}\n"
    )
    recipe = load_recipe(name)
    assert (
        isinstance(recipe, Recipe) and isinstance(recipe.model, ModelConfig) and isinstance(recipe.model.mtp, MTPConfig)
    )
    assert recipe.optim.lr == 3e-4 and recipe.optim.betas == [0.0, 0.5]
    assert all(type(beta) is float for beta in recipe.optim.betas)
    assert recipe.model.time_step_limit == [0.0, math.inf] and recipe.train.threads == 2
    assert recipe.data == Recipe().data


def test_round_trip_of_awkward_text(write, tmp_path):
    recipe = Recipe(run_dir="3e-4")
    recipe.data.blend[0].source, recipe.data.blend[0].subset, recipe.data.blend[0].split = "null", "1.0", "yes"
    recipe.data.tokenizer, recipe.log.wandb = "a: b #c", "*E"
    recipe.model.mtp.pattern = "*E"
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


def test_references_to_other_keys(write):
    name = write("train: {steps: 7}\nschedule: {kind: wsd, warmup_steps: '${train.steps}'}\n")
    assert load_recipe(name).schedule.warmup_steps == 7
    assert "Interpolation key 'nope' not found" in refusal(write("train: {steps: '${nope}'}\n"))
    assert "train.steps: needs a whole number, got 'stdlib'" in refusal(
        write("train: {steps: '${data.blend[0].source}'}\n")
    )


def test_base_is_overlaid_key_by_key_and_lists_replace(write):
    Path("sub").mkdir()
    write("data:\n  seq_len: 99\n  blend: [{source: a, weight: 2}, {source: b}]\ntrain: {steps: 3}\n", "sub/base.yaml")
    name = write("base: base.yaml\ndata:\n  blend:\n  - source: c\ntrain: {dtype: bfloat16}\n", "sub/child.yaml")
    recipe = load_recipe(name)
    assert [(source.source, source.weight) for source in recipe.data.blend] == [("c", 1.0)]
    assert (recipe.data.seq_len, recipe.train.steps, recipe.train.dtype) == (99, 3, "bfloat16")
    assert recipe.run_dir == "runs/child"


def test_overrides(write):
    name = write("data: {blend: [{source: a}, {source: b}]}\n")
    recipe = load_recipe(
        name,
        [
            "data.blend.0.weight=2",
            "data.blend[1].source=c d",
            "optim.lr=3e-4",
            "optim.betas.1=0.99",
            "model.mtp.pattern=*E",
            "model.pattern=-",
            "model.mtp={depth: 1}",
            "log.wandb=2024",
            "data.tokenizer='quoted'",
            "train.threads=null",
            "train.compile=true",
            "run_dir=runs/a=b",
        ],
    )
    assert [(source.source, source.weight) for source in recipe.data.blend] == [("a", 2.0), ("c d", 1.0)]
    assert recipe.optim.lr == 3e-4 and recipe.optim.betas == [0.9, 0.99]
    assert recipe.model.mtp == MTPConfig(pattern="*E", depth=1) and recipe.model.pattern == "-"
    assert recipe.log.wandb == "2024" and recipe.data.tokenizer == "quoted" and recipe.train.compile is True
    assert recipe.run_dir == "runs/a=b"
    blend = load_recipe(name, ["data.blend=[{source: z}]", "data.blend.0.weight=3"]).data.blend
    assert [(source.source, source.weight) for source in blend] == [("z", 3.0)]


# ----------------------------------------------------------------------------------------------------- what is refused

IN_FILE = {
    "typo in the top level": ("trian: {steps: 1}", "x.yaml:1: trian: no such key; did you mean train?"),
    "typo in a section": (
        "model:\n  hiden_size: 3",
        "x.yaml:2: model.hiden_size: no such key; did you mean hidden_size?",
    ),
    "typo two deep": ("model:\n  mtp:\n    deph: 3", "x.yaml:3: model.mtp.deph: no such key; did you mean depth?"),
    "typo in a list": (
        "data:\n  blend:\n  - source: a\n  - source: b\n    wieght: 2",
        "x.yaml:5: data.blend[1].wieght: no such key; did you mean weight?",
    ),
    "key of another section": ("lr: 1", "x.yaml:1: lr: no such key; did you mean optim.lr?"),
    "key of several sections": ("every: 1", "did you mean eval.every or checkpoint.every or log.every?"),
    "nothing near": ("eval: {zzzz: 1}", "x.yaml:1: eval.zzzz: no such key; the keys here are every, batches"),
    "number as key": ("1: 2", "x.yaml:1: 1: no such key; the keys here are"),
    "text for int": ("train: {steps: '3'}", "x.yaml:1: train.steps: needs a whole number, got '3'"),
    "bool for int": ("train: {steps: true}", "train.steps: needs a whole number, got true"),
    "float for int": ("train: {steps: 1.0}", "train.steps: needs a whole number, got 1.0"),
    "null for int": ("train:\n  steps:", "x.yaml:2: train.steps: needs a whole number, got null"),
    "int for bool": ("train: {compile: 1}", "train.compile: needs true or false, got 1"),
    "text for float": ("optim: {lr: fast}", "optim.lr: needs a number, got 'fast'"),
    "bool for float": ("optim: {lr: true}", "optim.lr: needs a number, got true"),
    "nan": ("optim: {lr: .nan}", "optim.lr: needs a finite number, got nan"),
    "infinite": ("optim: {lr: .inf}", "optim.lr: needs a finite number, got inf"),
    "bool for text": ("data: {tokenizer: yes}", "data.tokenizer: needs text, got true; put it in quotes"),
    "mapping for text": ("data: {tokenizer: {a: 1}}", "data.tokenizer: needs text, got a mapping"),
    "text for optional int": ("train: {threads: many}", "train.threads: needs a whole number, got 'many'"),
    "scalar for list": ("data: {blend: stdlib}", "data.blend: needs a list, got 'stdlib'"),
    "scalar in a list": ("data: {blend: [stdlib]}", "data.blend[0]: is a section with keys of its own, got 'stdlib'"),
    "text in a list of numbers": ("optim: {betas: [0.9, x]}", "optim.betas[1]: needs a number, got 'x'"),
    "scalar for a section": ("model: 3", "x.yaml:1: model: is a section with keys of its own, got 3"),
    "empty section": ("model:", "x.yaml:1: model: is a section with keys of its own, got null"),
    "choice": (
        "train: {dtype: bfloat17}",
        "train.dtype: 'bfloat17' is not one of float32, bfloat16, float64; did you mean bfloat16?",
    ),
    "list for a choice": ("train: {dtype: [float32]}", "train.dtype: a list is not one of float32, bfloat16, float64"),
    "bound": ("train: {steps: 0}", "x.yaml:1: train.steps: must be >= 1, got 0"),
    "open bound": ("optim: {lr: 0}", "optim.lr: must be > 0, got 0"),
    "upper bound": ("data: {validation_fraction: 1}", "data.validation_fraction: must be < 1, got 1"),
    "bound in a list": ("data: {blend: [{weight: -1}]}", "data.blend[0].weight: must be > 0, got -1"),
    "not given": ("run_dir: ???", "x.yaml:1: run_dir: needs a value, got ???"),
    "empty file": ("", "x.yaml: is empty"),
    "comments only": ("# nothing\n", "x.yaml: is empty"),
    "list at the top": ("- model", "x.yaml: is no mapping of keys to values"),
    "text at the top": ("model", "x.yaml: is no mapping of keys to values"),
    "unclosed": ("model: [1\n", "x.yaml:2: broken YAML: "),
    "bare star": ("model:\n  pattern: *E\n", "x.yaml:2: broken YAML: found undefined alias"),
    "tab": ("model:\n\tpattern: M\n", "x.yaml:2: broken YAML: "),
    "twice": ("seed: 1\nseed: 2\n", "x.yaml:2: broken YAML: found duplicate key seed"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "x.yaml:2: broken YAML: "),
    "wrong tag": ("seed: !!int x\n", "x.yaml: broken YAML: invalid literal for int()"),
    "python tag": ("seed: !!python/object:os.system x\n", "x.yaml:1: broken YAML: could not determine a constructor"),
    "broken reference": ("run_dir: ${a", "x.yaml: run_dir: "),
    # pairs
    "pattern letter": ("model: {pattern: MX}", "x.yaml:1: model.pattern: unknown letter 'X' at position 1"),
    "kv heads": (
        "model: {num_key_value_heads: 3}",
        "model.num_key_value_heads: 3 does not divide num_attention_heads = 4",
    ),
    "top-k": ("model: {num_experts_per_tok: 9}", "model.num_experts_per_tok: 9 experts cannot be chosen from"),
    "latent": (
        "model: {moe_latent_size: 36}",
        "model.moe_latent_size: the experts' grouped GEMM takes multiples of 8, and 36 is none; "
        "32 and 40 are the nearest",
    ),
    "expert size": (
        "model: {moe_intermediate_size: 4}",
        "model.moe_intermediate_size: the experts' grouped GEMM takes",
    ),
    "no latent": ("model: {hidden_size: 100}", "model.hidden_size: the experts' grouped GEMM takes multiples of 8"),
    "latent in MTP": (
        "model: {pattern: M, moe_latent_size: 36, mtp: {pattern: E}}",
        "model.moe_latent_size: the experts'",
    ),
    "batch": (
        "train: {global_batch_size: 8, micro_batch_size: 3}",
        "train.global_batch_size: 8 is no multiple of train.micro_batch_size = 3; 6 and 9 are the nearest",
    ),
    "warmup": (
        "train: {steps: 10}\nschedule: {warmup_steps: 6, decay_steps: 5}",
        "x.yaml:2: schedule.warmup_steps: warmup_steps = 6 and decay_steps = 5 do not fit into train.steps = 10",
    ),
    "warmup of cosine": (
        "train: {steps: 10}\nschedule: {kind: cosine, warmup_steps: 11}",
        "schedule.warmup_steps: warmup_steps = 11 does not fit into train.steps = 10",
    ),
    "betas": ("optim: {betas: [0.9]}", "optim.betas: [0.9] are not two numbers in [0, 1)"),
    "beta of one": ("optim: {betas: [0.9, 1]}", "optim.betas: [0.9, 1.0] are not two numbers in [0, 1)"),
    "min_lr": ("schedule: {min_lr: 1}", "schedule.min_lr: 1.0 exceeds the peak, optim.lr = 0.001"),
    "short rows": (
        "model: {mtp: {pattern: E, depth: 3}}\ndata: {seq_len: 4}",
        "x.yaml:2: data.seq_len: 4 leaves no label for model.mtp.depth = 3; 5 would",
    ),
    "no source": ("data: {blend: []}", "x.yaml:1: data.blend: is empty"),
    "no source in a phase": ("data: {phases: [{tokens: 5}]}", "x.yaml:1: data.phases[0].blend: is empty"),
    "a phase from nowhere": ("data: {phases: [{blend: [{source: a}]}]}", "data.phases[0].tokens: must be > 0, got 0"),
    "phases in disorder": (
        "data: {phases: [{tokens: 9, blend: [{source: a}]}, {tokens: 9, blend: [{source: a}]}]}",
        "x.yaml:1: data.phases[1].tokens: 9 is not after the phase before, from 9 on",
    ),
    "weight and budget": (
        "data: {blend: [{source: a, tokens: 5, weight: 2}]}",
        "data.blend[0].weight: cannot stand beside a budget in `tokens`",
    ),
    "budgets that leave nothing": (
        "train: {steps: 2}\ndata: {blend: [{source: a, tokens: 5000}, {source: b}]}",
        "x.yaml:2: data.blend: the budgets of 5,000 tokens leave nothing of 4,096 to sources by weight",
    ),
    "row lengths": (
        "data: {seq_len: 64, seq_len_cycle: [64, 48]}",
        "x.yaml:1: data.seq_len_cycle: 48 does not divide data.seq_len = 64",
    ),
    "short rows in turn": (
        "model: {mtp: {pattern: E, depth: 3}}\ndata: {seq_len: 64, seq_len_cycle: [4]}",
        "x.yaml:2: data.seq_len_cycle: 4 leaves no label for model.mtp.depth = 3; 5 would",
    ),
    "stop": ("train: {steps: 5, stop_after: 6}", "x.yaml:1: train.stop_after: 6 exceeds train.steps = 5"),
    "reduce": (
        "train: {dtype: float64}\nprecision: {reduce_dtype: bfloat16}",
        "x.yaml:2: precision.reduce_dtype: bfloat16 would undo train.dtype = float64",
    ),
    "nothing to validate": (
        "eval: {every: 5}\ndata: {validation_fraction: 0}",
        "x.yaml:1: eval.every: there is nothing",
    ),
    "native sizes": ("parallel: {tp: 2}", "x.yaml:1: parallel.tp: the native engine shards over all ranks alike"),
    "recomputed kinds": ("train: {recompute: MX}", "x.yaml:1: train.recompute: needs none, full or letters of M*E-"),
    "kernel": ("kernels: {ssd: chunkd}", "kernels.ssd: 'chunkd' is not one of auto, "),
}


@pytest.mark.parametrize("text, sentence", IN_FILE.values(), ids=IN_FILE)
def test_refused_in_a_file(write, text, sentence):
    said = refusal(write(text))
    assert sentence in said and said.startswith("x.yaml:")


ON_COMMAND_LINE = {
    "model.hiden_size=3": "command line: model.hiden_size: no such key; did you mean hidden_size?",
    "steps=3": "command line: steps: no such key; did you mean train.steps?",
    "data.blend.0.wieght=2": "command line: data.blend[0].wieght: no such key; did you mean weight?",
    "data.blend.5.weight=2": "command line: data.blend[5]: no such element; data.blend has 1 elements, counted from 0",
    "data.blend.first.weight=2": "command line: data.blend[first]: no such element",
    "data.blend=[{sauce: x}]": "command line: data.blend[0].sauce: no such key; did you mean source?",
    "seed.a=1": "command line: seed.a: no such key; seed is a single value",
    "train.steps='3'": "command line: train.steps: needs a whole number, got '3'",
    "train.steps=": "command line: train.steps: needs a whole number, got null",
    "train.steps=many": "command line: train.steps: needs a whole number, got 'many'",
    "train.steps=[1": "command line: train.steps: '[1' is broken YAML",
    "train.compile=1": "command line: train.compile: needs true or false, got 1",
    "train.dtype=fp32": "command line: train.dtype: 'fp32' is not one of float32, bfloat16, float64",
    "train.steps=-1": "command line: train.steps: must be >= 1, got -1",
    "model.pattern=MXE": "command line: model.pattern: unknown letter 'X'",
    "model.mtp={deph: 1}": "command line: model.mtp.deph: no such key; did you mean depth?",
    "model=3": "command line: model: is a section with keys of its own, got 3",
    "train.global_batch_size=9": "command line: train.global_batch_size: 9 is no multiple",
    "base=other.yaml": "command line: base: can only be set in the recipe file",
    "train.steps": "command line: 'train.steps' is no override; write KEY=VALUE",
    "=3": "command line: '=3' is no override",
    "--fast": "command line: '--fast' is no override",
}


@pytest.mark.parametrize("override, sentence", ON_COMMAND_LINE.items(), ids=ON_COMMAND_LINE)
def test_refused_on_the_command_line(write, override, sentence):
    assert refusal(write("seed: 1"), [override]).startswith(sentence)


def test_refused_files(write, tmp_path):
    assert refusal("nowhere.yaml") == "nowhere.yaml: no such file"
    assert refusal(tmp_path).endswith(": cannot be read: is a directory")
    Path("x.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal("x.yaml") == "x.yaml: is not a text file in UTF-8"


def test_refused_bases(write):
    write("base: c.yaml\nseed: 1", "b.yaml")
    write("seed: 1\nmodel: {hiden_size: 3}", "typo.yaml")
    assert refusal(write("base: b.yaml")).startswith("b.yaml:1: base: a base cannot have a base itself")
    assert refusal(write("seed: 1\nbase: gone.yaml")) == "x.yaml:2: base: gone.yaml: no such file"
    assert refusal(write("base: 3")) == "x.yaml:1: base: needs the path of a recipe, got 3"
    assert refusal(write("base: typo.yaml")).startswith("typo.yaml:2: model.hiden_size: no such key")
    # A pair is blamed on where its key was written.
    write("seed: 1\noptim: {betas: [1, 1]}", "c.yaml")
    assert refusal(write("base: c.yaml")).startswith("c.yaml:2: optim.betas: ")


def test_errors_are_user_errors():
    assert issubclass(RecipeError, UserError) and issubclass(UserError, ValueError)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_world_size():
    recipe = Recipe()
    recipe.train.global_batch_size, recipe.train.micro_batch_size = 12, 2
    for legal in (1, 2, 3, 6):
        check_world_size(recipe, legal)
    with pytest.raises(RecipeError) as caught:
        check_world_size(recipe, 4)
    assert str(caught.value) == (
        "train.global_batch_size: 12 rows cannot be shared by 4 ranks in micro batches of 2; "
        "8 and 16 are the nearest, or use 3 or 6 ranks"
    )
    with pytest.raises(RecipeError, match="0 ranks"):
        check_world_size(recipe, 0)


@pytest.fixture
def init_from(monkeypatch):
    """A stand-in for the reader of a MODEL_DIR's config."""
    import types

    module = types.ModuleType("nemo_lite.model.hf")
    there = ModelConfig(pattern="M*", hidden_size=128, mtp=MTPConfig(pattern="*", depth=2))

    def load_config(folder):
        if folder == "gone":
            raise FileNotFoundError("gone: no such directory")
        return dataclasses.replace(there, mtp=dataclasses.replace(there.mtp))

    module.load_config = load_config
    monkeypatch.setitem(sys.modules, "nemo_lite.model.hf", module)
    return there


def test_init_from(write, init_from):
    name = write("init_from: m\nmodel: {router_aux_loss_coef: 0.5, mtp: {depth: 3}}\n")
    recipe = load_recipe(name, ["model.mtp.loss_weight=0.1"])
    expected = dataclasses.replace(
        init_from, router_aux_loss_coef=0.5, mtp=MTPConfig(pattern="*", depth=3, loss_weight=0.1)
    )
    assert recipe.model == expected
    # The resolved recipe repeats the directory's sizes, and is a recipe again, also when the directory is gone.
    copy = write(recipe_to_yaml(recipe), "copy.yaml")
    assert load_recipe(copy).model == expected
    assert load_recipe(copy, ["init_from=gone"], resolved=True).model == expected
    assert refusal(write("init_from: gone", "gone.yaml")) == "gone.yaml:1: init_from: gone: no such directory"
    assert refusal(name, ["model.hidden_size=64"]).startswith(
        "command line: model.hidden_size: 64 contradicts init_from = m, where it is 128; with init_from only mtp.depth"
    )
    other = write("init_from: m\nmodel:\n  pattern: ME", "y.yaml")
    assert refusal(other).startswith("y.yaml:3: model.pattern: 'ME' contradicts")
    assert refusal(name, ["model.mtp={pattern: E}"]).startswith("command line: model.mtp.pattern: 'E' contradicts")


def test_every_key_is_documented():
    keys = {key.path: key for key in recipe_keys()}
    assert all(key.doc and key.type for key in keys.values())
    assert keys["train.steps"].type == "int" and keys["train.steps"].bounds == ">= 1" and keys["train.steps"].unit
    assert keys["data.blend[].weight"].default == "1.0" and keys["data.blend"].default == "[{source: stdlib}]"
    assert keys["model.moe_latent_size"].type == "int or null" and keys["model.moe_latent_size"].default == "null"
    assert keys["model.time_step_limit"].default == "[0.0, .inf]" and keys["model.mtp.pattern"].default == '""'
    assert keys["train.dtype"].type == "float32 or bfloat16 or float64"
    assert keys["data.validation_fraction"].bounds == ">= 0, < 1"


def test_import_and_load_without_torch():
    code = (
        "import sys; from nemo_lite.config import load_recipe; load_recipe(sys.argv[1]); print('torch' in sys.modules)"
    )
    path = str(ROOT / "recipes" / "pretrain" / "tiny.yaml")
    shown = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "False", shown
