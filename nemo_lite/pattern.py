"""The layer-pattern string: one parser for the model, FLOPs, the Hugging Face config, pipeline cuts and caches.

``MEM*E`` is the architecture: one letter is one layer, and a layer is ``x = x + mixer(norm(x))``.

| letter | mixer                        | Hugging Face name  |
|--------|------------------------------|--------------------|
| M      | Mamba-2                      | linear_attention   |
| *      | grouped-query attention      | full_attention     |
| E      | LatentMoE (or plain MoE)     | moe                |
| -      | dense squared-ReLU MLP       | mlp                |
| |      | a pipeline cut, not a layer  | (not written)      |
"""

MAMBA, ATTENTION, MOE, MLP, CUT = "M", "*", "E", "-", "|"

HF_NAMES = {MAMBA: "linear_attention", ATTENTION: "full_attention", MOE: "moe", MLP: "mlp"}
_FROM_HF = {name: letter for letter, name in HF_NAMES.items()}
# Spellings that published configs of the family have used for the same layers.
_FROM_HF |= {"mamba": MAMBA, "attention": ATTENTION}


class PatternError(ValueError):
    """A pattern string that names no architecture; the message is one sentence."""


def parse(pattern: str) -> str:
    """Check ``pattern`` and return its layer letters without pipeline cuts, e.g. ``"ME|M*" -> "MEM*"``."""
    for position, letter in enumerate(pattern):
        if letter not in HF_NAMES and letter != CUT:
            raise PatternError(
                f"unknown letter {letter!r} at position {position} of pattern {pattern!r}; "
                "use M (Mamba-2), * (attention), E (MoE), - (dense MLP) and | (pipeline cut)"
            )
    stages = pattern.split(CUT)
    if any(not stage for stage in stages):
        where = "is empty" if not pattern.replace(CUT, "") else "has an empty pipeline stage"
        raise PatternError(f"pattern {pattern!r} {where}; every stage needs at least one layer")
    return "".join(stages)


def stages(pattern: str) -> list[str]:
    """Layer letters of each pipeline stage, e.g. ``"ME|M*" -> ["ME", "M*"]``."""
    parse(pattern)
    return pattern.split(CUT)


def to_hf(pattern: str) -> list[str]:
    """Hugging Face's ``layers_block_type`` for ``pattern``."""
    return [HF_NAMES[letter] for letter in parse(pattern)]


def from_hf(names: list[str]) -> str:
    """The pattern string for Hugging Face's ``layers_block_type``."""
    unknown = [name for name in names if name not in _FROM_HF]
    if unknown:
        raise PatternError(f"unknown layer type {unknown[0]!r}; known are {', '.join(sorted(_FROM_HF))}")
    return "".join(_FROM_HF[name] for name in names)
