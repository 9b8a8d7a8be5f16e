"""docs/renamed.md names settings that exist, in place of ones that do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conch.cli import describe
from conch.config import OnlineRunConfig, load
from conch.errors import ConfigError
from conch.rollouts.vllm.server_config import ServerConfig
from conch.trainers.grpo import GRPORunConfig

PAGE = (Path(__file__).parents[2] / "docs/renamed.md").read_text(encoding="utf-8")
KEYS = set(re.findall(r"^  ([\w.]+): ", describe(GRPORunConfig), re.MULTILINE))
SETTINGS = PAGE.partition("## Settings")[2].partition("## Metrics")[0]
ROWS = [row.split("|")[1:3] for row in SETTINGS.splitlines() if row.startswith("| `")]
FULL_KEY = re.compile(r"`((?:reward|rollout|grpo)\.[\w.]+\w)`")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_a_renamed_setting_is_gone_and_its_new_name_exists(row: list[str]) -> None:
    old, new = row
    assert not set(FULL_KEY.findall(old)) & KEYS
    assert set(FULL_KEY.findall(new)) <= KEYS
    assert FULL_KEY.findall(old)


def test_a_rollout_servers_new_names_exist() -> None:
    row = next(row for row in SETTINGS.splitlines() if "`tensor_parallel`" in row)
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) <= set(ServerConfig.model_fields)


@pytest.mark.parametrize(
    ("section", "key", "new"),
    [
        ("reward", "deadline_s", "reward.client.deadline_s"),
        ("reward", "max_in_flight", "reward.client.max_in_flight"),
        ("reward", "secret_env", "reward.auth.secret_env"),
        ("rollout", "logprob_gap_alarm", "rollout.logprob_diff_alarm"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(section: str, key: str, new: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(new)):
        load(OnlineRunConfig, {"model": {"path": "m"}, section: {key: 1}})
