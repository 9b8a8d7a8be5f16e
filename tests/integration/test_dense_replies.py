"""Dense scores that do not fit together, from a server that misbehaves: none of them becomes a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from conch.config import RewardClientConfig, RewardConfig
from conch.errors import RewardInvalidError
from conch.rewards.served import TritonReward
from conch.triton.contract import RewardModelSpec
from conch.types import Completion, Prompt, RewardResult, Rollout
from tests.fakes.triton_server import Action, FakeTriton, Row, response

WAIT_S = 120.0
SPEC = RewardModelSpec("steps", granularity="step")
CONFIG = RewardConfig(dense=True, client=RewardClientConfig(request_timeout_s=30, deadline_s=100))
NAN = float("nan")


def decode(ids: Sequence[int]) -> str:
    """A letter a token."""
    return "".join("abc"[token] for token in ids)


# Two letters of prompt, three of response.
ROLLOUT = Rollout(Prompt("ab", (0, 1)), Completion("abc", (0, 1, 2), (0.0,) * 3, "length"), policy_version=0)


def reply_with(
    ends: Any, scores: Any, ends_type: str = "INT32", scores_type: str = "FP32", *, left_out: str = ""
) -> Action:
    """Answer with these steps and a right reward."""
    tensors = {"step_ends": (ends, ends_type), "step_rewards": (scores, scores_type)}
    types = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "FP64": np.float64}

    def act(rows: list[Row], context: grpc.ServicerContext) -> Any:
        message = response(np.zeros((len(rows), 1), dtype=np.float32))
        for name, (values, dtype) in tensors.items():
            if name != left_out:
                array = np.array(values, dtype=types[dtype])
                message.outputs.add(name=name, datatype=dtype, shape=array.shape)
                message.raw_output_contents.append(array.tobytes())
        return message

    return act


def server_of(spec: RewardModelSpec) -> FakeTriton:
    return FakeTriton(spec, lambda row: [0.0])


def scored(*actions: Action, config: RewardConfig = CONFIG) -> RewardResult:
    """What becomes of one rollout when the server answers so."""
    with (
        FakeTriton(SPEC, lambda row: [0.0]) as server,
        TritonReward(server.url, config, decode=decode) as reward,
    ):
        server.script.extend(actions)
        (result,) = reward.submit([ROLLOUT]).result(WAIT_S)
    return result


def test_a_right_reply_is_taken() -> None:
    result = scored(reply_with([[1, 4, 5, -1]], [[9.0, 0.25, 0.5, NAN]]))
    assert result.token_scores == (0.0, 0.25, 0.5)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (reply_with([[5]], [[0.5]], left_out="step_ends"), "no output `step_ends`"),
        (reply_with([[5]], [[0.5]], left_out="step_rewards"), "no output `step_rewards`"),
        (reply_with([[5]], [[0.5]], ends_type="INT64"), "dtype is INT64, expected INT32"),
        (reply_with([[5]], [[0.5]], scores_type="FP64"), "dtype is FP64, expected FP32"),
        (reply_with([[5], [5]], [[0.5], [0.5]]), "shape is [2, 1], expected [1, -1]"),
        (reply_with([5], [0.5]), "shape is [1], expected [1, -1]"),
        (reply_with([[4, 5]], [[0.5]]), "shape is [1, 1], expected [1, 2]"),
        (reply_with([[5, 4]], [[0.5, 0.5]]), "steps end at [5, 4] in a sample of length 5"),
        (reply_with([[4, 6]], [[0.5, 0.5]]), "steps end at [4, 6]"),
        (reply_with([[-1, 5]], [[NAN, 0.5]]), "steps end at"),
        (reply_with([[-1]], [[NAN]]), "steps end at []"),
        (reply_with([[4, 5]], [[0.5, NAN]]), "scores of steps are [0.5, nan]"),
        (reply_with([[1, 2]], [[0.5, 0.5]]), "no step of the model's reply ends in the response"),
    ],
)
def test_steps_that_do_not_fit_are_no_rewards(action: Action, says: str) -> None:
    result = scored(action, action)
    assert result.status.value == "invalid" and result.token_scores is None and not result.scores
    assert says in result.detail


def test_one_bad_row_does_not_take_its_request_with_it() -> None:
    other = Rollout(Prompt("a", (0,)), ROLLOUT.completion, policy_version=0)

    def by_row(rows: list[Row], context: grpc.ServicerContext) -> Any:
        ends = [[9] if row == "ababc" else [4] for row in rows]
        return reply_with(ends, [[0.5]] * len(rows))(rows, context)

    with (
        FakeTriton(SPEC, lambda row: [0.0]) as server,
        TritonReward(server.url, CONFIG, decode=decode) as reward,
    ):
        server.script.extend([by_row] * 4)
        results = reward.submit([ROLLOUT, other]).result(WAIT_S)
    assert [result.status.value for result in results] == ["invalid", "ok"]
    assert results[1].token_scores == (0.0, 0.0, 0.5)


def test_a_token_outside_the_range_is_no_score() -> None:
    config = CONFIG.model_copy(update={"score_range": (0.0, 1.0)})
    action = reply_with([[4, 5]], [[0.5, 1.5]])
    assert "outside reward.score_range" in scored(action, action, config=config).detail


def test_a_model_without_dense_scores_is_refused_before_long_work() -> None:
    refused = pytest.raises(
        RewardInvalidError, match=r"gives one score a sample, .* --granularity step or token"
    )
    with server_of(RewardModelSpec("plain")) as server, TritonReward(server.url, CONFIG) as reward, refused:
        reward.check()


def test_without_decode_a_text_model_is_refused_before_long_work() -> None:
    refused = pytest.raises(RewardInvalidError, match="unless `decode` is given")
    with server_of(SPEC) as server, TritonReward(server.url, CONFIG) as reward, refused:
        reward.check()
