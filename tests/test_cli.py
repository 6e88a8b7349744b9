"""The command table: help, version, exit codes, and errors as sentences."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from nemo_lite import __version__, cli
from nemo_lite.config import RecipeError, UserError


def run(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nemo_lite", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], []])
def test_help_names_every_command(argv, capsys):
    assert cli.main(argv) == (0 if argv else 2)
    text = capsys.readouterr().out
    for name, (_, line) in cli.COMMANDS.items():
        assert name in text and line in text
    assert max(map(len, text.splitlines())) <= 88


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"nemo-lite {__version__}"


def test_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["chekc"]) == 2
    assert "chekc: no such command; did you mean check?" in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "the commands are train, check" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RecipeError, UserError])
def test_user_errors_are_sentences(error, capsys):
    def target(argv):
        raise error("x.yaml: model.pattern: no.")

    assert cli.guard(target, []) == 1
    assert capsys.readouterr().err == "nemo-lite: error: x.yaml: model.pattern: no.\n"


def test_a_recipe_error_is_said_by_one_rank(capsys, monkeypatch):
    def target(argv):
        raise RecipeError("once")

    monkeypatch.setenv("RANK", "1")
    assert cli.guard(target, []) == 1
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback():
    def target(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.guard(target, [])


def test_interrupt_and_exit_code():
    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.guard(interrupted, []) == 130
    assert cli.guard(lambda argv: 3, []) == 3
    assert cli.guard(lambda argv: None, []) == 0


def test_a_broken_pipe_elsewhere_is_not_hidden():
    def target(argv):
        raise BrokenPipeError("a worker")

    with pytest.raises(BrokenPipeError):
        cli.guard(target, [])


def test_third_party_command(monkeypatch, capsys):
    point = importlib.metadata.EntryPoint("extra", "nemo_lite.cli:help_text", "nemo_lite.commands")
    shadow = importlib.metadata.EntryPoint("check", "nowhere:main", "nemo_lite.commands")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (point, shadow))
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: lambda argv: print("ran", argv))
    assert cli.main(["extra", "a"]) == 0
    assert capsys.readouterr().out == "ran ['a']\n"
    assert "extra" in cli.help_text()
    assert list(cli._plugins()) == ["extra"]


def test_module_and_quiet_pipe():
    wrong = run("check", "nowhere.yaml")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr == "nemo-lite: error: nowhere.yaml: no such file\n"
    recipe = "recipes/pretrain/tiny.yaml"
    pipe = subprocess.run(
        f"{sys.executable} -m nemo_lite check {recipe} --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert pipe.stdout == "{" and pipe.stderr == ""


def test_command_help():
    shown = run("check", "--help")
    assert shown.returncode == 0
    assert "--world-size N" in shown.stdout and "key=value" in shown.stdout


def test_importing_the_cli_stays_light():
    heavy = "('torch', 'omegaconf', 'rich')"
    code = f"import sys, nemo_lite.cli, nemo_lite.config; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "[]", shown
