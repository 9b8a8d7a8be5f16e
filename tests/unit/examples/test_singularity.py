"""The scripts of `singularity/` say what is missing, and call Apptainer as their README shows.

A stand-in for Apptainer, a program of its own on PATH, prints how it was called.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conch.servers.settings import load_settings, pairs_from_environment
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import SETTINGS_PREFIX, ServiceConfig

FOLDER = Path(__file__).resolve().parents[3] / "singularity"
# Where the scripts' own tools (bash, realpath, od, ...) are; no container tool may be found there.
TOOLS = ("bash", "cat", "dirname", "realpath", "od", "tr", "debootstrap", "env")
SHELL_PARTS = ("setup", "pre", "post", "test", "environment", "runscript", "startscript")
STAND_IN = """#!/bin/bash
echo "$APPTAINERENV_CUDA_VISIBLE_DEVICES|$SINGULARITYENV_CUDA_VISIBLE_DEVICES|$PWD"
printf '%s\\n' "$@"
"""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A PATH with what the scripts call, and without Apptainer; debootstrap does nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        real = next((path for path in (Path("/usr/bin", name), Path("/bin", name)) if path.exists()), None)
        (folder / name).symlink_to(real or "/bin/true")
    return folder


@pytest.fixture
def apptainer(bin_folder: Path) -> Path:
    """The stand-in, on PATH."""
    path = bin_folder / "apptainer"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model store with the model `walks`, and an image beside it."""
    (tmp_path / "model_store" / "walks").mkdir(parents=True)
    (tmp_path / "model_store" / "walks" / "config.pbtxt").touch()
    for image in ("tritonserver-pyt.sif", "tritonserver-cpu.sif"):
        (tmp_path / image).touch()
    return tmp_path / "model_store"


def call(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [cwd / "bin" / "bash", FOLDER / script, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": str(cwd / "bin")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "there is no image 'nope'; choose tritonserver, tritonserver-cpu, train or service"),
        (["train", "a.sif", "b.sif"], "too many names: b.sif"),
        (["train", "--pip", "."], "--pip needs a folder that holds pip.conf; '.' does not"),
        (["train", "--set", "IMAGE"], "--set needs NAME=VALUE, not 'IMAGE'"),
        (["train", "--quick"], "unknown option --quick"),
        (["train", "tritonserver-pyt.sif"], "exists; give --force to replace it"),
        (["train", "nowhere/a.sif"], "nowhere does not exist"),
    ],
)
def test_build_refuses_in_one_sentence(apptainer, store, tmp_path: Path, arguments, message: str) -> None:
    done = call("build.sh", *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_build_calls_apptainer_in_the_root_of_the_checkout(apptainer, tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.conf").touch()
    done = call("build.sh", "tritonserver-cpu", "--pip", "pip", "--set", "MIRROR=http://here", cwd=tmp_path)

    where, *arguments = done.stdout.splitlines()
    assert where.endswith(f"|{FOLDER.parent}")
    assert arguments == [
        "build", "--bind", f"{tmp_path}/pip:/mnt", "--build-arg", "MIRROR=http://here",
        f"{tmp_path}/tritonserver-cpu.sif", "singularity/tritonserver-cpu.def",
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["build.sh", "serve.sh"])
def test_without_apptainer_the_message_says_what_to_install(bin_folder, store, tmp_path, script: str) -> None:
    done = call(script, "train", "out.sif", cwd=tmp_path)

    assert done.returncode == 1
    assert "neither apptainer nor singularity is installed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the models to serve; model store model_store has: walks"),
        (["walk"], "model 'walk' is not in model store model_store, which has: walks"),
        (["../model_store/walks"], "model '../model_store/walks' is not in model store"),
        (["walks", "--store", "nowhere"], "model store nowhere is not a folder"),
        (["walks", "--image", "no.sif"], "build it: singularity/build.sh tritonserver no.sif"),
        (["walks", "--port"], "--port needs a value"),
        (["walks", "--gpus", "7"], "unknown option --gpus"),
        (["walks", "--host", "0.0.0.0"], "give --secret-env or --allow-anyone"),
        (["walks", "--host", "127.example.com"], "give --secret-env or --allow-anyone"),
        (["walks", "--host", "10.0.0.7"], "give --secret-env or --allow-anyone"),
        (["walks", "--host", "0.0.0.0", "--secret-env", "NO_SUCH"], "variable NO_SUCH must hold a secret"),
    ],
)
def test_serve_refuses_in_one_sentence(apptainer, store, tmp_path: Path, arguments, message: str) -> None:
    done = call("serve.sh", *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_serve_shows_the_chosen_gpu_and_stays_on_loopback(apptainer, store, tmp_path: Path) -> None:
    done = call("serve.sh", "walks", "--gpu", "6", "--", "--log-verbose=1", cwd=tmp_path)

    variables, *arguments = done.stdout.splitlines()
    assert variables.startswith("6|6|")
    assert arguments[:6] == [
        "run", "--cleanenv", "--bind", "model_store:/model_store:ro", "--nv", "tritonserver-pyt.sif",
    ]  # fmt: skip
    assert {"--grpc-address=127.0.0.1", "--load-model=walks"} <= set(arguments)
    assert arguments[-1] == "--log-verbose=1"
    assert not any("restricted" in argument for argument in arguments)
    assert "export TRITON_HOST=127.0.0.1:8001/walks" in done.stderr


def test_serve_on_the_network_asks_for_the_secret(
    apptainer, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_SECRET", "abc-123")
    done = call("serve.sh", "--host", "10.0.0.7", "--secret-env", "REWARD_SECRET", "walks", cwd=tmp_path)

    user = "--grpc-restricted-protocol=health,metadata,inference,model-config,statistics:conch=abc-123"
    assert user in done.stdout.splitlines() and ":admin=" in done.stdout


def test_serve_on_the_network_keeps_model_loading_behind_a_secret(apptainer, store, tmp_path: Path) -> None:
    arguments = ("--cpu", "--host", "0.0.0.0", "--allow-anyone", "walks")
    calls = [call("serve.sh", *arguments, cwd=tmp_path) for _ in range(2)]

    secrets = [
        line.partition("model-repository,shared-memory,trace,logging:admin=")[2]
        for done in calls
        for line in done.stdout.splitlines()
        if "restricted" in line
    ]
    assert [len(secret) for secret in secrets] == [32, 32] and secrets[0] != secrets[1]
    assert "--nv" not in calls[0].stdout and "tritonserver-cpu.sif" in calls[0].stdout


@pytest.mark.parametrize("definition", sorted(FOLDER.glob("*.def")), ids=lambda path: path.name)
def test_definition_takes_files_that_exist(definition: Path) -> None:
    section = definition.read_text().partition("%files\n")[2].partition("\n\n")[0]
    sources = [line.split()[0] for line in section.splitlines()]

    assert sources
    assert [source for source in sources if not list(FOLDER.parent.glob(source))] == []


def test_dockerfile_takes_files_that_exist_and_installs_with_scripts_that_do() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    scripts = re.findall(r"/opt/conch/install/([\w-]+\.sh)", "\n".join(lines))

    assert {"conch", "constraints.txt"} <= {*sources} and "service.sh" in scripts
    assert [source for source in sources if not (FOLDER.parent / source).exists()] == []
    assert [script for script in scripts if not (FOLDER / "install" / script).exists()] == []


@pytest.mark.parametrize("name", ["Dockerfile", "service.def"])
def test_image_of_the_service_sets_variables_that_are_settings(name: str) -> None:
    text = (FOLDER / name).read_text()
    variables = {key: value for key, value in re.findall(r"\b(CONCH_SERVICE_\w+)=([^\s$]+)", text)}
    if name == "service.def":  # one that the user sets is kept
        variables |= {"CONCH_SERVICE_OUTPUT_DIR": text.partition(":-")[2].partition("}")[0]}
        del variables["CONCH_SERVICE_PORT"]  # of the help
    pairs = pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, variables)
    config = load_settings(ServiceConfig, pairs)

    assert config.output_dir == Path("/data")
    assert config.host == ("0.0.0.0" if name == "Dockerfile" else "127.0.0.1")
    assert config.secret_env == KEY_VARIABLE


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("*.def")))
def test_shell_parts_of_a_definition_pass_shellcheck(name: str) -> None:
    """`make check` looks at the scripts, and hadolint at the Dockerfile's; nothing else reads these."""
    parts = re.split(r"^%(\w+).*\n", (FOLDER / name).read_text(), flags=re.MULTILINE)
    shell = {part: text for part, text in zip(parts[1::2], parts[2::2], strict=True) if part in SHELL_PARTS}
    assert {"post", "environment"} <= shell.keys()
    for part, text in shell.items():
        checked = subprocess.run(
            [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "-"],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert checked.returncode == 0, f"%{part}: {checked.stdout}"
