"""Write docs/recipes.md from the recipe's dataclasses: ``python docs/generate.py``; a test asserts that it is."""

from pathlib import Path

from nemo_lite.config import Recipe, recipe_keys

INTRO = """\
# Recipes

<!-- Written by docs/generate.py from nemo_lite/config.py; edit those. -->

A recipe is a YAML file that says everything about a training run. Keys left out keep the defaults below.

```
nemo-lite check recipes/pretrain/tiny.yaml                        # resolve it; count parameters, FLOPs, memory
nemo-lite train recipes/pretrain/tiny.yaml                        # one process
torchrun --nproc-per-node 2 -m nemo_lite.train recipes/pretrain/tiny.yaml train.steps=50    # two, the same program
```

**Overrides.** `key=value` after the file sets a key by its full path, an element of a list by its number:
`optim.lr=3e-4`, `data.blend.0.weight=2`, `data.blend='[{source: notes}, {source: stdlib}]'`. Text is taken as typed, so
that `model.pattern='M*E'` needs quotes for the shell only; `null` empties a key that may be null.

**Inheritance.** `base: other.yaml` at the top of a file, relative to that file, takes everything from there; the file's
own keys replace the base's one by one, a list replaces the whole list. A base has no base of its own.

**References.** `${train.steps}` stands for the value of another key.

**Paths** in a recipe are relative to the folder the command runs in.

**Mistakes** stop a run before anything is allocated, with one sentence:
`recipes/x.yaml:3: model.hiden_size: no such key; did you mean hidden_size?`

**Starting from a model.** With `init_from: MODEL_DIR` the architecture is the directory's. Of `model` only
`mtp.depth`, `mtp.loss_weight`, `router_aux_loss_coef` and `router_bias_update_rate` can be set beside it.

RUN_DIR keeps the resolved recipe as `recipe.yaml`; it is a recipe like any other.
"""


def recipes_page() -> str:
    """The text of docs/recipes.md."""
    sections = {name: item.metadata["doc"] for name, item in Recipe.__dataclass_fields__.items()}
    lines, current = [INTRO, "## Top level", ""], None
    header = ["| key | type | default | unit | bounds | meaning |", "|---|---|---|---|---|---|"]
    lines += header
    for key in recipe_keys():
        section = key.path.split(".")[0] if "." in key.path else None
        if section != current:
            current = section
            lines += ["", f"## {section}: {sections[section]}", "", *header]
        cells = [f"`{key.path}`", key.type, f"`{key.default}`", key.unit, key.bounds, key.doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("recipes.md").write_text(recipes_page(), encoding="utf-8")
