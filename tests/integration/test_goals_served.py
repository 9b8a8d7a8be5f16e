"""A model that Triton serves as a goal."""

from __future__ import annotations

import pytest

from conch.config import RewardClientConfig, RewardConfig
from conch.errors import RewardUnavailableError
from conch.rewards.goals import GoalSpace
from conch.rewards.goals.source import GoalsReward
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.types import RewardStatus
from tests.fakes.rollouts import rollout
from tests.integration.conftest import TEXT_MODEL
from tests.launches import free_port


def test_a_served_model_is_a_goal_of_the_output_alone(reward_server: TritonServer) -> None:
    address = reward_server.endpoint(TEXT_MODEL)
    with TritonReward(str(address), RewardConfig()) as alone:
        expected = [
            each.scores["reward"] for each in alone.submit([rollout("", "abc"), rollout("", "kb")]).result()
        ]
    space = GoalSpace([f"walk={address}", "text_length"], {"walk": None, "text_length": (0, 2)})
    space.check()
    assert space.measure(["abc", "kb"]) == {"walk": pytest.approx(expected), "text_length": [0.5, 0.5]}
    with GoalsReward(space) as source:
        (result,) = source.submit([rollout("a prompt", "abc")]).result()
    assert result.scores == {"walk": pytest.approx(expected[0]), "text_length": 0.5}


def test_a_model_that_is_away_is_unavailable() -> None:
    config = RewardConfig(client=RewardClientConfig(deadline_s=1.0, connect_timeout_s=0.5))
    space = GoalSpace([f"127.0.0.1:{free_port()}/walk", "text_length"], config=config)
    assert space.names == ("walk", "text_length")
    with pytest.raises(RewardUnavailableError):
        space.measure(["abc"], normalize=False)
    with GoalsReward(space, normalize=False) as source:
        (result,) = source.submit([rollout("p", "abc")]).result()
    assert result.status in (RewardStatus.UNAVAILABLE, RewardStatus.TIMEOUT)
    assert "goal `walk`" in result.detail
