"""The pages about remote training name the addresses, statuses, settings and files that are there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from conch.service.app import make_app
from conch.service.client import AsyncTrainingClient, TrainingClient
from conch.service.protocol import TrainingSettings, token_hash
from conch.service.runs.runs import Runs
from conch.service.service_config import ServiceConfig

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL, CLIENT, SERVICE = (
    (ROOT / "docs" / f"remote_{name}.md").read_text(encoding="utf-8")
    for name in ("training", "client", "service")
)
PAGES = {"training": PROTOCOL, "client": CLIENT, "service": SERVICE}


@pytest.fixture
def schema(tmp_path: Path) -> dict[str, Any]:
    return make_app(Runs(tmp_path, idle_s=1.0, stop_s=1.0), ServiceConfig()).openapi()


def test_protocol_has_every_address_and_no_other(schema: dict[str, Any]) -> None:
    told = {*re.findall(r"`((?:GET|POST) /[\w/]+)", PROTOCOL)} - {"GET /openapi", "GET /docs"}
    there = {f"{method.upper()} {path}" for path, each in schema["paths"].items() for method in each}
    assert told == there


def test_protocol_has_every_status_of_a_refusal(schema: dict[str, Any]) -> None:
    table = PROTOCOL.partition("| status |")[2].partition("\n\n")[0]
    told = {int(each) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for each in row.split(",")}
    statuses = {
        int(status)
        for operations in schema["paths"].values()
        for operation in operations.values()
        for status in operation["responses"]
    }
    assert told == statuses - {200, 206, 416}


def test_protocol_has_every_setting_of_a_run() -> None:
    missing = [name for name in TrainingSettings.model_fields if f"`{name}`" not in PROTOCOL]
    assert missing == []


def test_hash_of_the_protocol_is_right() -> None:
    match = re.search(r"of `\[([\d, ]+)\]` it is `(\w+)`", PROTOCOL)
    assert match is not None and token_hash([int(each) for each in match[1].split(",")]) == match[2]


def test_limits_of_the_service_are_its_defaults() -> None:
    table = SERVICE.partition("## Limits")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)`(?: \(of the run\))? \| ([\d.]+)", table, re.M))
    assert len(rows) == 7
    defaults = {**ServiceConfig().model_dump(), **TrainingSettings(model_id="m").model_dump()}
    defaults["max_groups"] = 4  # times an update's
    assert {name: float(value) for name, value in rows.items()} == {
        name: float(defaults[name]) for name in rows
    }


def test_settings_that_the_service_page_names_exist() -> None:
    named = {
        *re.findall(r"--(\w+)", SERVICE),
        *(
            name.lower()
            for name in re.findall(r"CONCH_SERVICE_([A-Z_]+)", SERVICE)
            if name not in ("KEY", "")
        ),
    }
    of_others = {"rm", "gpus", "target", "config_file", "num_processes", "max_restarts"}
    of_others |= {"start", "build", "exit"}  # of the example and of Docker Compose
    fields = {*ServiceConfig.model_fields, "api_key", "help", *of_others}
    assert {"models", "host", "tls_cert"} <= named
    assert named - fields == set()


def test_verbs_of_the_client_exist() -> None:
    verbs = {*re.findall(r"client\.(\w+)\(", CLIENT), *re.findall(r"`(get_\w+|submit_\w+)[`(]", CLIENT)}
    assert {"train", "get_model", "submit_rewards", "get_completions_batch"} <= verbs
    assert [verb for verb in verbs if not hasattr(TrainingClient, verb)] == []
    assert hasattr(AsyncTrainingClient, "train")


@pytest.mark.parametrize("client", [TrainingClient, AsyncTrainingClient])
def test_times_of_the_client_are_its_defaults(client: type[Any]) -> None:
    told = {name: float(seconds) for name, seconds in re.findall(r"`(\w+_s)` \((\d+) s\)", CLIENT)}
    parameters = inspect.signature(client).parameters
    assert told == {name: parameters[name].default for name in ("wait_s", "retry_s")}


@pytest.mark.parametrize("name", PAGES)
def test_blocks_of_python_can_be_read(name: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGES[name], re.S):
        compile(block, f"remote_{name}.md", "exec")


@pytest.mark.parametrize("name", PAGES)
def test_files_and_links_are_there(name: str) -> None:
    text = PAGES[name]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / "docs" / file).resolve()
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (
                target
            )
    for file in re.findall(r"`((?:tests|examples|conch)/[\w./]+\.py)`", text):
        assert (ROOT / file).exists(), file


def test_pages_are_listed_where_pages_are() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in PAGES:
        assert f"docs/remote_{name}.md" in readme
    assert "remote_service.md" in (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert {f"remote_{name}.md" for name in ("client", "service")} <= {
        *re.findall(r"remote_\w+\.md", PROTOCOL)
    }
