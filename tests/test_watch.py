"""nemo-lite watch: another process's run is followed to its end, and told from one that died."""

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from runs import ROOT, Forks, wait_for

from nemo_lite import cli, process
from nemo_lite.programme import watch


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"), tmp_path_factory.mktemp("tokens"))
    yield forks
    forks.close()


def started(forks, run_dir, *overrides):
    (child,) = forks.start("resume", run_dir, *overrides)
    wait_for((run_dir / process.PROCESS_FILE).exists)
    return child


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "serving")])}


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_is_followed_to_its_end(forks, tmp_path, capsys):
    child = started(forks, tmp_path / "r")
    assert watch.main([str(tmp_path / "r")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown[:-1]] == [f"{step}/10" for step in range(1, 11)]
    assert shown[-1] == f"{tmp_path / 'r'}: finished, 10 steps"
    assert child.wait() == 0 and not (tmp_path / "r" / process.PROCESS_FILE).exists()


def test_a_finished_run_is_shown_and_left(forks, tmp_path, capsys):
    forks.train("resume", tmp_path / "r")
    assert watch.main([str(tmp_path / "r")]) == 0
    assert capsys.readouterr().out.endswith("finished, 10 steps\n")


def test_a_death_is_told_from_a_stop(forks, tmp_path, capsys):
    for number, code, words in ((signal.SIGKILL, 1, "died after step"), (signal.SIGTERM, 0, "stopped at step")):
        run_dir = tmp_path / str(number)
        child = started(forks, run_dir, "train.steps=5000", "checkpoint.every=20")
        wait_for(lambda run_dir=run_dir: (run_dir / "checkpoints" / "step_20").exists())
        child.kill(number)
        child.wait()
        assert watch.main([str(run_dir)]) == code
        last = capsys.readouterr().out.splitlines()[-1]
        assert words in last and "of 5000" in last and "checkpoint step_" in last


def test_records_are_read_as_they_come(tmp_path):
    def write(text, mode="a"):
        with open(tmp_path / "metrics.jsonl", mode) as file:
            file.write(text)

    run = watch.Run(tmp_path)
    assert run.poll() == [] and run.state == "waiting"
    write('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert [r["step"] for r in run.poll()] == [1]
    write('ss": 2.0}\n')
    assert [r["step"] for r in run.poll()] == [2] and run.poll() == []
    (tmp_path / "new").write_text('{"step": 1, "loss": 3.0}\nbroken\n')
    os.replace(tmp_path / "new", tmp_path / "metrics.jsonl")
    run.poll()
    assert [r["step"] for r in run.records] == [1]


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert cli.main(["watch", str(tmp_path)]) == 1
    assert "is neither a RUN_DIR (it has no recipe.yaml) nor a folder of stages" in capsys.readouterr().err


def test_a_process_is_told_from_another_of_its_number():
    mine = process.facts()
    assert process.alive(mine) is True
    assert process.alive(mine | {"started": mine["started"] - 60}) is False
    assert process.alive(mine | {"boot": "before the last one"}) is False
    assert process.alive(mine | {"machine": "another"}) is None
    assert process.alive({}) is False
    child = subprocess.Popen([sys.executable, "-c", ""])
    theirs = process.facts(child.pid)
    child.wait()
    assert process.alive(theirs) is False


# ----------------------------------------------------------------------------------------------------------- the screen


def test_curves_are_drawn_to_scale():
    lines = watch.braille([(0, 0.0), (1, 1.0)], 4, 2, 0.0, 1.0)
    assert len(lines) == 2 and all(len(line) == 4 for line in lines)
    assert lines[0][0] == lines[1][-1] == "\u2800" and "\u2800" not in (lines[1][0], lines[0][-1])
    assert watch.braille([(5, 2.0)], 3, 1, 2.0, 2.0)[0].count("\u2800") == 2


@pytest.mark.parametrize(("width", "height"), [(120, 40), (60, 24), (40, 12)])
def test_the_view_fits_its_terminal(forks, tmp_path, width, height):
    from rich.console import Console

    forks.train("resume", tmp_path / "r")
    run = watch.Run(tmp_path / "r")
    run.poll()
    console = Console(width=width, height=height, force_terminal=True, record=True, file=io.StringIO())
    console.print(watch.view(run, width, height - 1))
    shown = console.export_text().splitlines()
    assert len(shown) <= height and max(map(len, shown)) <= width
    assert "step 10 of 10" in shown[0] and "loss" in shown[2]
    assert any(0x2800 < ord(letter) < 0x28FF for line in shown for letter in line)


def test_a_terminal_gets_a_screen_and_a_last_word(forks, tmp_path):
    child = started(forks, tmp_path / "r", "train.steps=100")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    watching = subprocess.Popen(
        [sys.executable, "-m", "nemo_lite", "watch", str(tmp_path / "r")], stdout=theirs, stderr=theirs,
        env=environment() | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    assert watching.wait() == 0 and child.wait() == 0
    text = shown.decode()
    assert "\x1b[?1049h" in text and "learning rate" in text and text.rstrip().endswith("finished, 100 steps")


# ---------------------------------------------------------------------------------------------------------- a programme


def stage(name, command, inputs=()):
    Path("prog").mkdir(exist_ok=True)
    body = {"command": command, "inputs": list(inputs), "outputs": [f"out/{name}"]}
    Path("prog", f"{name}.yaml").write_text(json.dumps({"stage": body}))


@pytest.mark.parametrize("fails", [False, True])
def test_a_programme_is_followed_stage_by_stage(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    stage("a", "sh -c 'sleep 2; echo > out/a'")
    stage("b", f"sh -c 'sleep 2; echo > out/b; exit {int(fails)}'", ["a"])
    command = [sys.executable, "-m", "nemo_lite", "pipeline", "prog"]
    pipeline = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(Path("out/a.stage.json").exists)
    assert watch.main(["prog"]) == int(fails) == pipeline.wait()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("a  running: since") and any(line.startswith("a  done in 2s") for line in shown)
    assert any(line.startswith("b  running: since") for line in shown)
    last = "b failed with exit code 1; log out/b.stage.log" if fails else "all 2 stages are up to date"
    assert shown[-1] == f"prog: {last}"


def test_a_programme_that_nobody_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage("a", "true")
    assert watch.main(["prog"]) == 0
    assert "nothing is running, 1 of 1 stages are due" in capsys.readouterr().out
