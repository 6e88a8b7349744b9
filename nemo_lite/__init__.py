"""nemo_lite: hybrid Mamba-Transformer MoE language models, from a recipe to a served checkpoint."""

from nemo_lite.config import ModelConfig, MTPConfig, Recipe, RecipeError

__version__ = "0.1.0"
__all__ = ["HybridLM", "MTPConfig", "ModelConfig", "Recipe", "RecipeError", "load_recipe"]


def __getattr__(name: str):
    # torch is imported when the model is first asked for, so that the command line answers at once.
    if name == "HybridLM":
        from nemo_lite.model.hybrid import HybridLM

        return HybridLM
    if name == "load_recipe":
        from nemo_lite.config import load_recipe

        return load_recipe
    raise AttributeError(f"module 'nemo_lite' has no attribute {name!r}")
