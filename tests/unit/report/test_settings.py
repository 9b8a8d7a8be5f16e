"""Configurations of runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conch.cli.run_config import save_resolved
from conch.config import load
from conch.config.algorithms.grpo import GRPORunConfig
from conch.config.algorithms.ppo import PPORunConfig
from conch.report.settings import ABSENT, REQUIRED, compare
from conch.runs.listing import defaults_of, flat


def rows_by_key(result: dict) -> dict[str, dict]:
    return {row["key"]: row for row in result["rows"]}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "async_grpo", "rft", "ilql", "sft", "reward_model"])
def test_every_algorithm_has_its_defaults(algorithm: str) -> None:
    defaults = defaults_of(algorithm)

    assert defaults["train.seed"] == 0 and defaults["tokenizer.path"] is None
    assert len(defaults) > 50


def test_unknown_algorithm_has_no_defaults() -> None:
    assert defaults_of("") == {}


def test_a_resolved_configuration_differs_where_it_was_set(tmp_path: Path) -> None:
    config = load(
        PPORunConfig, {"model": {"path": "gpt2"}, "train": {"seed": 3}, "generation": {"stop": ["x"]}}
    )
    save_resolved(config, tmp_path / "config.yaml")
    settings = dict(flat(yaml.safe_load((tmp_path / "config.yaml").read_text())))
    result = compare([settings], [defaults_of("ppo")])

    changed = {row["key"]: (row["values"], row["defaults"]) for row in result["rows"] if row["changed"]}
    assert changed == {
        "model.path": (["gpt2"], ["null"]),
        "train.seed": (["3"], ["0"]),
        "generation.stop": (["['x']"], ["[]"]),
    }


def test_runs_of_two_algorithms_lack_each_other_s_keys() -> None:
    settings = [
        dict(flat(load(kind, {"model": {"path": "m"}}).model_dump(mode="json")))
        for kind in (PPORunConfig, GRPORunConfig)
    ]
    rows = rows_by_key(compare(settings, [defaults_of("ppo"), defaults_of("grpo")]))

    assert rows["grpo.group_size"]["values"][0] == ABSENT and rows["grpo.group_size"]["differs"]
    assert not rows["grpo.group_size"]["changed"] and not rows["model.path"]["differs"]


def test_places_are_marked_for_they_change_nothing() -> None:
    rows = rows_by_key(compare([{"train.run_dir": "a"}, {"train.run_dir": "b"}], [{}, {}]))

    assert rows["train.run_dir"]["place"] and rows["train.run_dir"]["differs"]


def test_flat_keeps_lists_and_empty_mappings() -> None:
    assert dict(flat({"a": {"b": [1], "c": {}}, "d": None})) == {"a.b": [1], "a.c": {}, "d": None}


def test_key_without_a_default_is_a_required_one() -> None:
    [row] = compare([{"a": 1}], [{"b": 2}])["rows"][:1]

    assert (row["key"], row["defaults"], row["changed"]) == ("a", [REQUIRED], True)
