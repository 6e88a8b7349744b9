"""Imports run one way: nemo_lite_serving -> nemo_lite -> nemo_lite_kernels -> torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS, MODEL = ROOT / "kernels" / "nemo_lite_kernels", ROOT / "nemo_lite"
OPTIONAL = {
    "transformers",
    "datasets",
    "vllm",
    "megatron",
    "fastapi",
    "llguidance",
    "prometheus_client",
    "pydantic",
    "uvicorn",
    "wandb",
    "mlflow",
    "tensorboard",
    "pyarrow",
}


def imports(file):
    """Top-level names of everything a file imports, with whether it is imported when the file is."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; say the full name, it is what this test reads"
            names = [node.module or ""]
        for name in names:
            yield name.split(".")[0], node not in inside and node not in typing_only


def all_of(folder):
    return {name for file in folder.rglob("*.py") for name, _ in imports(file)}


def test_kernels_know_nothing_above_them():
    assert KERNELS.is_dir()
    assert not all_of(KERNELS) & {"nemo_lite", "nemo_lite_serving", "transformers"}


def test_the_model_does_not_know_the_server():
    assert "nemo_lite_serving" not in all_of(MODEL)


OPS_FILES = sorted(file for file in KERNELS.glob("*.py") if file.name != "libraries.py")  # that one imports when called


@pytest.mark.parametrize("file", OPS_FILES, ids=lambda file: file.name)
def test_reference_ops_import_torch_only(file):
    standard = sys.stdlib_module_names
    assert {name for name, _ in imports(file) if name not in standard} <= {"torch", "nemo_lite_kernels"}


def test_optional_packages_are_imported_where_they_are_used():
    for folder in (MODEL, KERNELS):
        for file in folder.rglob("*.py"):
            at_the_top = {name for name, when_imported in imports(file) if when_imported}
            if file != MODEL / "parallel" / "megatron.py":  # imported by train/loop.py when a recipe asks for it
                assert not at_the_top & OPTIONAL, file


def test_vllm_is_imported_in_its_folder_alone():
    serving = ROOT / "serving" / "nemo_lite_serving"
    for file in (*MODEL.rglob("*.py"), *KERNELS.rglob("*.py"), *serving.rglob("*.py")):
        names = {name for name, _ in imports(file)}
        assert "vllm" not in names or file.parent == serving / "vllm", file
    assert "vllm" not in {name for name, _ in imports(serving / "vllm" / "launch.py")}, "the launcher needs no vLLM"


def test_the_model_reads_no_recipe_engine():
    """model/ is below training, data and evaluation; of train/ it knows the loss."""
    for file in (MODEL / "model").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        for module in modules:
            if module.startswith("nemo_lite."):
                known = ("nemo_lite.model", "nemo_lite.parallel", "nemo_lite.config", "nemo_lite.pattern")
                below = module.startswith((*known, "nemo_lite.train.loss", "nemo_lite.precision"))
                assert below or module == "nemo_lite.generate", f"{file.name} imports {module}"


@pytest.mark.parametrize("statement", ["import nemo_lite", "from nemo_lite import HybridLM, ModelConfig, load_recipe"])
def test_importing_brings_nothing_optional(statement):
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & OPTIONAL
    if statement == "import nemo_lite":
        assert "torch" not in done.stdout.split(), "the command line must answer before torch is there"


def test_cuts_and_commands_are_strings():
    """The table of commands names modules as text, so that it is no arrow."""
    names = {name for name, when_imported in imports(MODEL / "cli.py") if when_imported}
    assert not names & {"torch", "nemo_lite_serving"}
