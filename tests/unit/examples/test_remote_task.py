"""The containers of the remote example: their files can be read, and name what is there."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.servers.settings import load_settings, pairs_from_environment
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import SETTINGS_PREFIX, ServiceConfig
from singularity.prove_service_image import read_stage
from tests.launches import ROOT

FOLDER = ROOT / "examples" / "remote" / "task"
DOCKERFILES = (ROOT / "singularity" / "Dockerfile", FOLDER / "Dockerfile")
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_dockerfile_passes_hadolint(file: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ignored(source: str) -> bool:
    """Whether Docker is not even sent a file or folder of the checkout."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert not [pattern for pattern in patterns if pattern.startswith("!")]
    tops = [pattern for pattern in patterns if not pattern.startswith("**/")]
    return any(fnmatch.fnmatch(source.split("/")[0], pattern) for pattern in tops)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_dockerfile_copies_what_is_there_and_sent(file: Path) -> None:
    copied = re.findall(r"^COPY (.*) \S+$", file.read_text(encoding="utf-8"), re.M)
    sources = [source for line in copied for source in line.split()]
    assert "conch" in sources and ignored(".venv/bin") and ignored("outputs")
    assert [each for each in sources if ignored(each) or not (ROOT / each).exists()] == []


def test_compose_builds_from_files_that_are_there() -> None:
    assert COMPOSE["services"].keys() == {"service", "task"}
    for name, service in COMPOSE["services"].items():
        build = service["build"]
        context = (FOLDER / build["context"]).resolve()
        assert context == ROOT
        stage = read_stage((context / build["dockerfile"]).read_text(encoding="utf-8"), name)
        assert stage.entrypoint and stage.user == "1000", name
        assert build.get("args", {}).keys() <= stage.build.keys()
        volumes = [volume.rpartition(":")[0] for volume in service["volumes"] if not volume.startswith("$")]
        assert {*volumes} <= COMPOSE["volumes"].keys()


def test_service_of_compose_is_set_by_variables_that_are_settings_and_healthy_before_the_task() -> None:
    environment = COMPOSE["services"]["service"]["environment"]
    assert KEY_VARIABLE in environment
    pairs = pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, environment, others=(KEY_VARIABLE,))
    config = load_settings(ServiceConfig, pairs)
    task = COMPOSE["services"]["task"]
    assert config.models == (task["environment"]["MODEL"],)
    assert task["environment"]["SERVICE_URL"] == f"http://service:{config.port}"
    assert task["depends_on"] == {"service": {"condition": "service_healthy"}}
    stage = read_stage(DOCKERFILES[0].read_text(encoding="utf-8"), "service")
    assert stage.healthcheck == [*stage.entrypoint, "health"]


def test_task_reads_the_variables_that_it_is_given() -> None:
    code = (FOLDER / "task.py").read_text(encoding="utf-8")
    read = {*re.findall(r'os\.environ(?:\[|\.get\()"(\w+)"', code)}
    stage = read_stage((FOLDER / "Dockerfile").read_text(encoding="utf-8"), "task")
    given = {*COMPOSE["services"]["task"]["environment"], *stage.environment}
    assert read == {"SERVICE_URL", "MODEL", "STEPS", "RESULT"} and read <= given


def test_stage_with_a_step_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="the step SHELL is not known"):
        read_stage('FROM debian AS one\nSHELL ["bash"]\n', "one")


def test_task_needs_no_more_than_its_image_has() -> None:
    allowed = {"httpx2", "pydantic"}
    installed = re.search(r"constraints.txt ((?:\w+ ?)+)$", (FOLDER / "Dockerfile").read_text(), re.M)
    assert installed is not None and {*installed[1].split()} == allowed
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tokenizers', 'yaml', 'tqdm', 'numpy', 'hydra', 'fastapi'):\n"
        "    sys.modules[name] = None\n"
        "import examples.remote.task.task\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
