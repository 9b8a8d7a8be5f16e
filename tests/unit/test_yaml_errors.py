"""A file or a value that is no YAML is told in one sentence, which says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conch.config import JudgeConfig
from conch.errors import ConfigError, yaml_problem
from conch.reward_server.server_config import RewardServerConfig
from conch.rewards.goals.ranges import read_ranges
from conch.rewards.judge.source import read_judge
from conch.servers.settings import load_settings
from examples.overoptimisation.entries import read_settings
from examples.steerability.settings import load_settings as load_steerability

BROKEN = "model: judge\nrubric:\n  - {name: correct, question: Is it true?, weight: 3}\n"
"""A question mark before a comma begins a key in a flow mapping."""


def study(file: Path) -> object:
    file.rename(file.with_name("config_rl.yaml"))
    return read_settings(["--config_dir", str(file.parent), "--configs", "mine"])


@pytest.mark.parametrize(
    "read",
    [
        lambda file: read_judge(JudgeConfig(file=file)),
        read_ranges,
        lambda file: load_steerability(str(file), []),
        study,
        lambda file: load_settings(RewardServerConfig, [f"reward={file.read_text()}"]),
    ],
    ids=["judge", "ranges", "steerability", "study", "server"],
)
def test_text_that_is_no_yaml_is_told_in_one_line_with_its_place(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(BROKEN)
    with pytest.raises(ConfigError) as refused:
        read(file)
    first, _, rest = str(refused.value).replace(BROKEN, "").partition("\n")
    assert "line 3, column 41: " in first and rest == ""


def test_yaml_problem_without_a_place_is_the_text_on_one_line() -> None:
    assert yaml_problem(yaml.YAMLError("one\n  two")) == "one two"
    assert yaml_problem(yaml.YAMLError()) == "YAMLError"
