"""Rewards of steering by three copies of the goal-space server: real ones, of which one is killed."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.errors import RewardInvalidError
from conch.rewards.factory import from_user
from conch.rewards.goals import GoalSpace
from conch.types import Completion, Prompt, RewardResult, Rollout
from examples.steerability import texts
from examples.steerability.settings import CONFIGS
from tests.goalspace_servers import GoalspaceServer

GOALS = ["text_length", "reading_difficulty", "textual_diversity"]
ROW = {"target_text_length": 0.4, "target_reading_difficulty": 0.2, "steering_goals": GOALS[:2]}
STEERING = {"rewards": ["steerability_error"]}
WAIT_S = 240


def rollouts(number: int) -> list[Rollout]:
    rng = random.Random(0)
    outputs = [texts.text(rng.choice(texts.LEVELS), rng.choice(texts.LEVELS), rng) for _ in range(number)]
    return [Rollout(Prompt("p", (1,), ROW), Completion(text, (2,), (0.0,), "eos"), 0) for text in outputs]


@pytest.fixture
def servers(tmp_path: Path) -> Any:
    settings = {
        "GOAL_DIMENSIONS": ",".join(GOALS),
        "NORMALIZATION_PATH": str(CONFIGS / "ranges_tiny.yaml"),
    }
    with ExitStack() as stack:
        started = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            server = GoalspaceServer(tmp_path / str(number), settings, workers=1)
            started.append(stack.enter_context(server))
        for server in started:
            server.wait_until_ready()
        yield started


def test_one_of_three_real_servers_is_killed_in_mid_batch(servers: list[GoalspaceServer]) -> None:
    samples = rollouts(600)
    space = GoalSpace(GOALS, CONFIGS / "ranges_tiny.yaml")
    here = load(RewardConfig, {"url": "goals:" + ",".join(GOALS), "steering": STEERING})
    here = here.model_copy(
        update={"goals": here.goals.model_copy(update={"normalization": CONFIGS / "ranges_tiny.yaml"})}
    )
    asked = load(
        RewardConfig,
        {
            "url": ",".join(f"http://127.0.0.1:{server.port}/goalspace" for server in servers),
            "dialect": "goals",
            "steering": STEERING,
            "goal_server": {"names": GOALS, "golden_of_conch": True},
            "client": {"batch_rows": 8, "max_in_flight": 2, "deadline_s": 120.0},
        },
    )
    with from_user(None, here) as source:
        undisturbed: list[RewardResult] = source.submit(samples).result(WAIT_S)
    with from_user(None, asked) as source:
        source.check()
        before, end = _requests(source), time.monotonic() + WAIT_S
        future = source.submit(samples)
        while _requests(source) < before + 9 and time.monotonic() < end:
            time.sleep(0.001)
        servers[1].process.kill()
        assert not future.done()
        disturbed = future.result(WAIT_S)
    assert all(each.ok for each in [*undisturbed, *disturbed])
    for left, right in zip(disturbed, undisturbed, strict=True):
        assert left.scores == pytest.approx(right.scores) and left.facts == pytest.approx(right.facts)
    assert space.names == tuple(GOALS)


def _requests(source: Any) -> int:
    stats = source.stats()
    assert stats is not None
    return stats.requests


def test_a_server_without_the_goal_and_one_with_other_ranges_are_refused(
    servers: list[GoalspaceServer],
) -> None:
    url = f"http://127.0.0.1:{servers[0].port}/goalspace/"
    common = {"url": url, "dialect": "goals"}
    lacking = {**common, "goal_server": {"names": ["formality"]}}
    with (
        from_user(None, load(RewardConfig, lacking)) as source,
        pytest.raises(RewardInvalidError, match="does not measure `formality`; it has text_length, reading"),
    ):
        source.check()
    golden = {"text": "One two three four.", "goals": {"text_length": 0.0}, "tolerance": 1e-6}
    otherwise = {**common, "goal_server": {"golden": [golden]}}
    with (
        from_user(None, load(RewardConfig, otherwise)) as source,
        pytest.raises(RewardInvalidError, match=r"gives 0\.07\d* for `text_length` on a golden text"),
    ):
        source.check()
