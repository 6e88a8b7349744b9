"""README keeps its word: commands exist, the example runs, the tree is the tree."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from serving.fake_server import FakeServer
from tiny import tiny_config, tiny_model

from nemo_lite import cli
from nemo_lite.config import load_recipe
from nemo_lite.data import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / page for page in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/data.md", "docs/serving.md")
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = [
    (page.name if page.parent == ROOT else f"{page.parent.name}/{page.name}", line)
    for page in PAGES
    for block in blocks("sh", page.read_text(encoding="utf-8"))
    for line in block.splitlines()
    if line.strip()
]


def help_of(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert not end.value.code
    return capsys.readouterr().out


def check_recipe(words: list[str]) -> None:
    recipe = next(word for word in words if word.endswith(".yaml"))
    load_recipe(ROOT / recipe, [word for word in words if re.match(r"[a-z_.0-9]+=", word)])


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_real(page, line, capsys):
    program, *words = shlex.split(line, comments=True)
    if program == "nemo-lite":
        assert words[0] in cli.COMMANDS
        parts = words[:2] if words[0] in ("tokenizer", "bench", "data") else words[:1]
        shown = help_of(parts, capsys)
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", shown), f"{' '.join(parts)} has no {option}"
        if words[0] in ("train", "check"):
            check_recipe(words)
    elif program == "torchrun":
        assert words[words.index("-m") + 1] == "nemo_lite.train"
        check_recipe(words)
    elif program == "curl":
        from nemo_lite_serving.schemas import CompletionRequest

        assert words[0] == "127.0.0.1:8000/v1/completions"
        CompletionRequest.model_validate(json.loads(words[words.index("-d") + 1]))
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "python" and words[0] != "-m":
        assert (ROOT / words[0]).exists()
    elif program == "python":
        assert words[1] in ("pytest", "timeit")
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    else:
        assert (ROOT / program).exists(), f"{page}: {line}"


def test_every_command_is_shown():
    assert {line.split()[1] for page, line in COMMANDS if page == "README.md" and line.startswith("nemo-lite ")} == set(
        cli.COMMANDS
    )


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example, _ = blocks("python")
    tokenizer = load_tokenizer("bytes")
    config = tiny_config("MEM*E", mtp="*E", vocab_size=tokenizer.vocab_size)
    tiny_model(config).save_pretrained(tmp_path / "runs" / "demo" / "model", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].losses.shape == (3,) and names["model"].embedding.weight.grad is not None
    assert names["tokens"].shape[1] <= len(names["first"]) + 32
    assert "def add" in capsys.readouterr().out


def test_the_example_of_the_client_runs(capsys):
    pytest.importorskip("openai")
    _, example = blocks("python")
    with FakeServer() as server:
        example = example.replace("http://127.0.0.1:8000", server.url).replace("runs/demo/model", "tiny")
        exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "The quick brown fox jumps over the dog\n"
    assert server.requests[0]["prompt"] == "def main():"


def shown_tree() -> dict[str, str]:
    """path -> caption of README's tree; folders end in a slash."""
    (text,) = blocks("text")
    found, above = {}, []
    for line in text.splitlines():
        match = re.fullmatch(r"( *)(\S+) {2,}(\S.*)", line)
        assert match, f"no caption: {line!r}"
        depth, name = len(match[1]) // 2, match[2]
        above[depth:] = [name]
        found["".join(above)] = match[3]
    return found


def test_the_tree_is_the_tree():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    tree = shown_tree()
    folders = {path for path in tree if path.endswith("/")}
    # The contents of every folder that shows any; a folder's __init__.py goes without saying.
    for folder in folders:
        shown = {path for path in tree if path != folder and path.startswith(folder)}
        inside = {name.removeprefix(folder) for name in files if name.startswith(folder)}
        assert inside, f"{folder} is empty or does not exist"
        if not shown:
            continue
        real = {folder + re.sub(r"/.*", "/", name) for name in inside if name != "__init__.py"}
        direct = {path for path in shown if "/" not in path.removeprefix(folder).rstrip("/")}
        assert direct == real, f"README's tree and {folder} differ"
    top = {name.split("/")[0] + "/" for name in files if "/" in name and not name.startswith(".")}
    assert {folder for folder in folders if folder.count("/") == 1} == top


def test_no_hosts_and_no_machine_of_ours():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!127\.0\.0\.1\b)|\b[\w-]+\.(?:org|com|io|net|dev)\b", text), (
            f"{page.name} names a host"
        )
        assert not re.search(r"(?:^|[\s`\"'(=])/[a-z]+/", text), f"{page.name} has an absolute path"


def test_the_pictures_are_small():
    names = re.findall(r"!\[[^]]+\]\((\S+)\)", README)
    assert len(names) == 2
    for picture in (ROOT / name for name in names):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 300_000
