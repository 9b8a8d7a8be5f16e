"""How scores become rewards: golden values by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from conch.config import TrainConfig, load
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConfigError
from conch.training.reward_shaping import RewardShaper, ShapingConfig, combine_objectives
from conch.types import RewardResult, RewardStatus
from tests.runs import letters_rollout, scored

NAN = float("nan")
# Truth varies by 1 around 2, style by 10 around 20.
TWO = torch.tensor([[1.0, 10.0], [3.0, 10.0], [1.0, 30.0], [3.0, 30.0]])


def shaper(weights: dict[str, float] | None = None, **config: Any) -> RewardShaper:
    return RewardShaper(load(ShapingConfig, config), weights or {}, TrainEngine(TrainConfig()).collectives)


def several(*rows: dict[str, float]) -> list[RewardResult]:
    return [RewardResult(RewardStatus.OK, scores=row) for row in rows]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [6.0, 8.0, 16.0, 18.0]),
        # Each is +-1 after normalisation; style weighs one half.
        ("normalise_then_sum", [-1.5, 0.5, -0.5, 1.5]),
        # 6, 8, 16, 18: mean 12, deviations 6, 4, 4, 6, variance 26.
        ("sum_then_normalise", [value / math.sqrt(26) for value in (-6.0, -4.0, 4.0, 6.0)]),
    ],
)
def test_objectives_are_combined_as_named(
    how: Literal["sum", "normalise_then_sum", "sum_then_normalise"], expected: list[float]
) -> None:
    assert combine_objectives(TWO, [1.0, 0.5], how).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", ["sum", "normalise_then_sum", "sum_then_normalise"])
def test_failed_samples_leave_no_trace_in_the_combination(how: Any) -> None:
    with_failure = torch.cat([TWO[:2], torch.full((1, 2), NAN), TWO[2:]])
    combined = combine_objectives(with_failure, [1.0, 0.5], how)
    kept = [*combined[:2].tolist(), *combined[3:].tolist()]
    assert kept == pytest.approx(combine_objectives(TWO, [1.0, 0.5], how).tolist())
    assert combined[2] == 0.0


def test_moments_of_all_ranks_normalise_each_objective() -> None:
    # A second rank that holds the same numbers with the other sign: the global mean is 0.
    sums = iter([torch.tensor([0.0, 8.0]), torch.tensor([40.0, 8.0])])
    found = combine_objectives(
        torch.tensor([[1.0], [3.0], [1.0], [3.0]]), [1.0], "normalise_then_sum", lambda _: next(sums)
    )
    assert found.tolist() == pytest.approx([value / math.sqrt(5) for value in (1.0, 3.0, 1.0, 3.0)])


def test_shaping_happens_in_its_documented_order() -> None:
    made = shaper({"style": 2.0}, clip=3.0, scaling="reference", reference_std=2.0, missing_eos_penalty=1.0)
    rollouts = [letters_rollout("a", "bc"), letters_rollout("a", "b", "length"), letters_rollout("a", "b")]
    rewards = [*several({"truth": 5.0, "style": 1.0}, {"truth": -1.0, "style": 1.0}), *scored(None)]
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    # 5 + 2 = 7, clipped to 3, halved; -1 + 2 = 1, halved, less the penalty.
    assert made.shape(rollouts, rewards, mask).tolist() == [[0.0, 0.0, 1.5], [-0.5, 0.0, 0.0], [0.0] * 3]


def test_dense_rewards_are_clipped_by_token_and_scaled_by_their_sums() -> None:
    made = shaper(clip=2.0, scaling="running")
    rollouts = [letters_rollout("a", "bc", "stop"), letters_rollout("a", "b", "stop")]
    rewards = [
        RewardResult(RewardStatus.OK, token_scores=(5.0, 1.0)),
        RewardResult(RewardStatus.OK, token_scores=(-1.0,)),
    ]
    mask = torch.tensor([[True, True], [True, False]])
    # Clipped 2, 1 and -1: sums 3 and -1, standard deviation 2.
    assert made.shape(rollouts, rewards, mask).tolist() == [[1.0, 0.5], [-0.5, 0.0]]


def test_dense_rewards_cannot_be_normalised_by_objective() -> None:
    rewards = [RewardResult(RewardStatus.OK, token_scores=(5.0,))]
    mask = torch.tensor([[True]])
    with pytest.raises(ConfigError, match=r"`shaping.combine`=sum_then_normalise.*per token.*`sum`"):
        shaper(combine="sum_then_normalise").shape([letters_rollout("a", "b", "stop")], rewards, mask)


def test_state_restores_what_scaling_has_seen(tmp_path: Path) -> None:
    rollouts, mask = [letters_rollout("a", "", "eos")] * 2, torch.tensor([[True], [True]])
    first, second = shaper(scaling="running"), shaper(scaling="running")
    first.shape(rollouts, scored(1.0, 5.0), mask)
    second.load_state_dict(first.state_dict())
    again = first.shape(rollouts, scored(2.0, 8.0), mask)
    assert torch.equal(second.shape(rollouts, scored(2.0, 8.0), mask), again)
    assert not torch.equal(shaper(scaling="running").shape(rollouts, scored(2.0, 8.0), mask), again)


def test_an_objective_that_first_applies_later_counts_from_then_on() -> None:
    """Which objectives there are shows with the first samples, of which none need have this one."""
    first = RewardResult(RewardStatus.OK, scores={"math": 1.0}, absent=("code",))
    second = RewardResult(RewardStatus.OK, scores={"code": 3.0}, absent=("math",))
    shape = shaper({"code": 2.0})
    assert shape._combined([first], torch.device("cpu")).tolist() == [1.0]
    assert shape._combined([first, second], torch.device("cpu")).tolist() == [1.0, 6.0]
