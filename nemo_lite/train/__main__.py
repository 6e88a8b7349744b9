"""`nemo-lite train RECIPE.yaml [key=value ...]`, and the same under `torchrun -m nemo_lite.train`."""

import sys


def main(argv: list[str]) -> int:
    """Train, or go on with the run that run_dir holds; 0 when the run is finished or was stopped by a signal."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="nemo-lite train",
        description="Train a recipe. An existing RUN_DIR is resumed. Several processes: "
        "torchrun --nproc-per-node N -m nemo_lite.train RECIPE.yaml [key=value ...]",
        epilog="Every key is listed in docs/recipes.md; `nemo-lite check` shows what a recipe needs.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=10 data.blend.0.weight=2")
    args = parser.parse_args(argv)
    import os

    from nemo_lite.config import check_world_size, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    check_world_size(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    from nemo_lite.train.loop import train

    train(recipe)
    return 0


if __name__ == "__main__":
    from nemo_lite.cli import guard

    sys.exit(guard(main, sys.argv[1:]))
