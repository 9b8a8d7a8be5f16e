"""From a reward server's settings to what stands behind it, and to how requests are read for it."""

from __future__ import annotations

from contextlib import ExitStack, closing

import pytest

from conch.config import RewardConfig, load
from conch.errors import ConfigError
from conch.reward_server.server import open_front, open_reward, reader_of
from conch.reward_server.server_config import RewardServerConfig
from conch.rewards import from_user
from tests.fakes.group_rewards import ranked
from tests.fakes.json_rewards import endpoint, goals, lengths

CONFIG = load(RewardServerConfig, {"reward": "verifier:gsm8k"})


def test_judge_in_the_settings_is_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_HOST", raising=False)
    judge = {
        "url": "http://127.0.0.1:9/v1",
        "model": "m",
        "template": "Rate: {{ output }}",
        "parser": "number",
    }
    with ExitStack() as stack:
        front = open_front(load(RewardServerConfig, {"source": {"judge": judge}}), stack)
        assert list(front.rewards) == ["reward"]


def test_goals_of_an_endpoint_want_to_know_the_completion() -> None:
    for dialect, answer, needs in (("goals", goals, True), ("query", lengths, False)):
        with endpoint(answer) as server:
            source = from_user(server.url, load(RewardConfig, {"dialect": dialect}))
            with closing(source):
                source.check()
                assert reader_of(source, CONFIG).needs_completions is needs


def test_reward_that_compares_a_group_is_refused() -> None:
    with closing(from_user(ranked, RewardConfig())) as source:
        assert source.batched and source.needs_groups
        with pytest.raises(ConfigError, match="a reward server has each scored by itself"):
            open_reward("ranked", source, CONFIG)
