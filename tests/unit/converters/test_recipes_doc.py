"""The table of public reward models in docs/converting.md: every replica, every recipe and right commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conch.converters import to_triton
from conch.converters.recipes import recipe_table
from tests.integration.reward_models.chats import CHATS
from tests.integration.reward_models.heads import HEADS
from tests.integration.reward_models.processes import PROCESSES
from tests.integration.reward_models.replica import Replica

DOCUMENT = Path(__file__).resolve().parents[3] / "docs/converting.md"
REPLICAS = (*CHATS, *HEADS, *PROCESSES)
COMMAND = "conch convert "


@dataclass(frozen=True)
class Row:
    """A row of the table: a command or the reason of a refusal, and the tests."""

    text: str
    tests: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """Return what the command sets, parsed as the command line is."""
        (command,) = re.findall(rf"`{COMMAND}(.+?)`", self.text)
        words = shlex.split(command.replace("\\|", "|"))
        return vars(to_triton._parser().parse_args([_with_dashes(word) for word in words]))


def _with_dashes(word: str) -> str:
    return word.replace("_", "-") if word.startswith("--") else word


@cache
def rows() -> tuple[Row, ...]:
    section = DOCUMENT.read_text().split("\n## Public reward models\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert [line for line in lines if len(line) > 200] == []
    found = [Row(line, tuple(re.findall(r"`\[(.+?)\]`", line))) for line in lines]
    return tuple(row for row in found if row.tests)


def row_of(replica: Replica) -> Row:
    named = [row for row in rows() if replica.name in row.tests]
    assert len(named) == 1, f"{replica.name} stands in {len(named)} rows of {DOCUMENT.name}"
    return named[0]


def test_every_test_that_a_row_names_is_there() -> None:
    assert {name for row in rows() for name in row.tests} == {replica.name for replica in REPLICAS}


@pytest.mark.parametrize(
    "replica", [each for each in REPLICAS if not each.refused], ids=lambda each: each.name
)
def test_a_command_sets_what_the_replica_is_converted_with(replica: Replica) -> None:
    told = row_of(replica).settings()
    checkpoint = told.pop("checkpoint")
    told = {name: value for name, value in told.items() if value not in (None, False)}
    replicas = dict(replica.settings)
    recipe = recipe_table().recipes.get(replica.settings.get("recipe", ""))
    if recipe and "base_model" in recipe.options:  # that of the replica is a folder
        assert replicas.pop("base_model") and "base_model" not in told
    if "base_model" in replicas and told.get("base_model"):  # the command names a placeholder
        told["base_model"] = replicas["base_model"]
    assert {name: _plain(value) for name, value in told.items()} == {
        name: _plain(value) for name, value in replicas.items()
    }
    if recipe and checkpoint != "FOLDER":
        assert checkpoint in recipe.models


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("replica", [each for each in REPLICAS if each.refused], ids=lambda each: each.name)
def test_a_refused_model_stands_in_the_table_without_a_command(replica: Replica) -> None:
    assert COMMAND not in row_of(replica).text


def test_every_recipe_is_named_by_a_command() -> None:
    told = {row.settings().get("recipe") for row in rows() if COMMAND in row.text}
    assert told - {None} == set(recipe_table().recipes)


@pytest.mark.parametrize(
    "replica", [each for each in REPLICAS if "recipe" in each.settings], ids=lambda each: each.name
)
def test_a_recipe_notes_what_must_be_given_beside_it(replica: Replica) -> None:
    recipe = recipe_table().recipes[replica.settings["recipe"]]
    beside = replica.settings.keys() - {"recipe"}
    assert {name for name in beside if f"--{name}" not in recipe.note} == set()


@pytest.mark.parametrize("name", ["gptj-rm-static", "alpaca-farm", "beaver"])
def test_a_source_says_what_was_inferred(name: str) -> None:
    assert "(inferred)" in recipe_table().recipes[name].source
