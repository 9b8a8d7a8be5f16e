"""What docs/remote_client.md shows runs, against a service with a tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conch.service.protocol import KEY_VARIABLE
from tests.launches import ROOT
from tests.services import KEY, Service, service, tiny_model

BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "remote_client.md").read_text(encoding="utf-8"), re.S
)
_CLIENTS = [block for block in BLOCKS if "TrainingClient(" in block]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("service") / "runs") as each:
        yield each


@pytest.mark.parametrize("number", range(len(_CLIENTS)))
def test_recipe_trains_a_run_to_its_end(
    number: int, running: Service, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.chdir(tmp_path)
    recipe = _CLIENTS[number].replace("http://127.0.0.1:8000", running.url)
    # Fewer updates, and letters of the model's own.
    shorter = "" if "max_steps" in recipe else ", max_steps=3"
    recipe = recipe.replace('"models/start"', f'"{model}"{shorter}')
    names = {"__name__": "recipe"}
    if "import" not in recipe:
        exec("from conch.service.client import TrainingClient, TrainingSettings", names)
    exec(recipe, names)
    status = running.wait_for("finished")
    assert status["model_version"][1] == (3 if shorter else 2)
    if "model.zip" in recipe:
        exec(next(block for block in BLOCKS if "extractall" in block), names)
        assert names["model"] is not None


def test_recipes_are_found() -> None:
    assert len(_CLIENTS) == 3
