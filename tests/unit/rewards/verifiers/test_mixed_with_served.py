"""A verifier beside a served reward model: their weighted sum, figures of each part, and failures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from conch.config import RewardConfig, load
from conch.errors import RewardError
from conch.rewards import from_user
from conch.rewards.scorer import total_reward
from conch.triton.contract import RewardModelSpec
from conch.types import RewardStatus, Rollout
from tests.fakes.rollouts import rollouts
from tests.fakes.triton_server import FakeTriton, fail, reply
from tests.runs import grpo_trainer

RIGHT, WRONG, BARE = "<answer>3</answer>", "<answer>4</answer>", "3"
WEIGHTS = {"style": 0.01, "gsm8k/answer": 2.0, "gsm8k/format": 0.5}
ROWS = [{"prompt": "a", "answer": "#### 3"}, {"prompt": "c", "answer": "1 + 3\n#### 4"}]


@pytest.fixture
def served() -> Iterator[FakeTriton]:
    """Scores how long prompt and completion are."""
    with FakeTriton(RewardModelSpec("style"), lambda text: [float(len(text))]) as server:
        yield server


def settings(served: FakeTriton, **more: Any) -> dict[str, Any]:
    members = {"style": served.url, "gsm8k": "verifier:gsm8k"}
    return {"members": members, "gsm8k": {"version": "torchrl"}, "weights": WEIGHTS, **more}


def completions(*outputs: str, row: Mapping[str, Any] | None = None) -> list[Rollout]:
    """Of a prompt of one letter, whose answer is 3."""
    key = {"answer": "#### 3"} if row is None else row
    return [replace(each, prompt=replace(each.prompt, metadata=key)) for each in rollouts(*outputs)]


def test_the_reward_is_the_weighted_sum_of_both(served: FakeTriton) -> None:
    with from_user(None, load(RewardConfig, settings(served))) as reward:
        reward.check()
        right, wrong, bare = reward.submit(completions(RIGHT, WRONG, BARE)).result(60)
    length = float(len(RIGHT) + 1)
    assert right.scores == pytest.approx({"style": length, "gsm8k/answer": 0.9, "gsm8k/format": 0.1})
    assert wrong.scores == pytest.approx({"style": length, "gsm8k/answer": 0.0, "gsm8k/format": 0.1})
    assert bare.scores == {"style": 2.0, "gsm8k/answer": 0.0, "gsm8k/format": 0.0}
    totals = [total_reward(result, WEIGHTS) for result in (right, wrong, bare)]
    assert totals == pytest.approx([0.01 * length + 1.85, 0.01 * length + 0.05, 0.02])
    assert (right.facts["gsm8k/correct"], wrong.facts["gsm8k/correct"]) == (1.0, 0.0)


@pytest.mark.parametrize("part", ["not a number", "server away", "no answer key"])
def test_a_part_that_fails_is_a_status_and_no_sum_of_the_others(served: FakeTriton, part: str) -> None:
    client = {"request_timeout_s": 1.0, "deadline_s": 2.0}
    row = {"question": "?"} if part == "no answer key" else None
    with from_user(None, load(RewardConfig, settings(served, client=client))) as reward:
        reward.check()
        if part == "not a number":
            served.script.extend([reply([[math.nan]])] * 2)
        elif part == "server away":
            served.script.extend([fail(grpc.StatusCode.UNAVAILABLE, "gone")] * 1000)
        (result,) = reward.submit(completions(RIGHT, row=row)).result(60)
        served.script.clear()
    expected, member = {
        "not a number": (RewardStatus.INVALID, "style"),
        "server away": (RewardStatus.UNAVAILABLE, "style"),
        "no answer key": (RewardStatus.INVALID, "gsm8k"),
    }[part]
    assert (result.status, dict(result.scores)) == (expected, {})
    assert result.detail.startswith(f"member `{member}` gave no score: ")
    assert math.isnan(total_reward(result, WEIGHTS))


def test_a_step_tells_each_part_and_what_failed(served: FakeTriton, tmp_path: Path) -> None:
    """Samples that a part fails for are left out of the mean, and of the loss."""
    failure = {"policy": "drop", "max_fraction": 0.9}
    trainer = grpo_trainer(
        tmp_path / "run",
        reward_fn=None,
        prompts=ROWS,
        reward=settings(served, failure=failure, record=True),
    )
    served.score = lambda text: [math.nan if len(text) % 2 else float(len(text))]
    served.requests.clear()  # of the probe before the run
    metrics = trainer.step()
    trainer.close()
    lengths = [len(text) for rows in served.requests for text in rows]
    assert 0 < metrics["reward/failed_fraction"] < 1
    style = metrics["reward/mean/style"]
    assert min(lengths) <= style <= max(lengths)
    # Letters hold no <answer>, which `torchrl` pays for alone.
    assert metrics["reward/mean/gsm8k/answer"] == metrics["reward/mean/gsm8k/format"] == 0.0
    assert metrics["reward/mean"] == pytest.approx(0.01 * style)


def test_a_step_ends_the_run_where_a_part_fails_and_nothing_else_was_said(
    served: FakeTriton, tmp_path: Path
) -> None:
    trainer = grpo_trainer(tmp_path / "run", reward_fn=None, prompts=ROWS, reward=settings(served))
    served.score = lambda text: [math.nan]
    with pytest.raises(RewardError, match=r"member `style` gave no score: .*nan"):
        trainer.step()
    trainer.close()
