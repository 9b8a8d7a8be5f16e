"""docs/renamed.md names settings that exist, in place of ones that do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conch.cli import describe
from conch.config import OnlineRunConfig, Section, load
from conch.config.base import nested_section
from conch.config.other_names import OTHER_NAMES, RENAMED
from conch.errors import ConfigError
from conch.rollouts.server_config import ServerConfig
from conch.trainers.grpo import GRPORunConfig
from conch.trainers.ilql import ILQLRunConfig
from conch.trainers.ppo import PPORunConfig
from conch.trainers.reward_model import RewardModelRunConfig
from conch.trainers.rft import RFTRunConfig
from conch.trainers.sft import SFTRunConfig

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


def test_the_page_and_the_messages_know_the_same_old_names() -> None:
    listed = set(FULL_KEY.findall("".join(old for old, _ in ROWS)))
    assert {old for old in RENAMED if "." in old} <= listed
    for old, new in RENAMED.items():
        program = GRPORunConfig if "." in old else ServerConfig
        section, _, key = old.rpartition(".")
        with pytest.raises(ConfigError, match=f"unknown key `{old}`; did you mean `{new}`"):
            values = {section: {key: 1}} if section else {key: 1}
            load(program, {"model": {"path": "m"} if section else "m", **values})


@pytest.mark.parametrize(("other", "names"), OTHER_NAMES.items())
def test_other_programs_names_lead_to_settings_that_exist(other: str, names: tuple[str, ...]) -> None:
    def has(section: type[Section], key: str) -> bool:
        owner: type[Section] | None = section
        *parents, name = key.split(".")
        for parent in parents:
            field = owner.model_fields.get(parent) if owner else None
            owner = nested_section(field.annotation) if field else None
        return owner is not None and name in owner.model_fields

    programs = (PPORunConfig, GRPORunConfig, RFTRunConfig, SFTRunConfig, ILQLRunConfig, RewardModelRunConfig)
    assert [name for name in names if not any(has(program, name) for program in programs)] == []
