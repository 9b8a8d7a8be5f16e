"""The arithmetic of GRPO, by hand and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from conch.advantages import Advantage, group_advantages, has_spread
from conch.losses import (
    CorrectionLevel,
    LossForm,
    clipped_loss_terms,
    effective_sample_size,
    importance_weights,
    mask_weights,
    policy_ratio,
    token_weights,
    truncate_weights,
)
from conch.training.reward_shaping import overlong_penalties
from tests.runs import letters_rollout

ALL = torch.ones(4, dtype=torch.bool)
MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [False] * 4])


def advantages_of(
    *rewards: float, kind: Advantage = "group_std", valid: Tensor = ALL, group_size: int = 4
) -> list[float]:
    return group_advantages(torch.tensor(rewards), valid, group_size, kind).tolist()


def test_advantages_are_standard_deviations_from_the_mean_of_the_group() -> None:
    found = advantages_of(1.0, 2.0, 3.0, 6.0)
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert found == pytest.approx([-2 / std, -1 / std, 0.0, 3 / std])


def test_groups_do_not_see_each_other() -> None:
    found = group_advantages(torch.tensor([0.0, 1.0, 100.0, 300.0]), ALL, 2, "group_std")
    half = math.sqrt(0.5)  # of one standard deviation, over n - 1 = 1
    assert found.tolist() == pytest.approx([-half, half, -half, half])


def test_one_success_among_four_counts_one_and_a_half_deviations() -> None:
    """As TRL, verl and torchrl have it; by n it would be 1.732."""
    assert advantages_of(1.0, 0.0, 0.0, 0.0) == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_group_mean_divides_by_nothing() -> None:
    assert advantages_of(1.0, 2.0, 3.0, 6.0, kind="group_mean") == pytest.approx([-2.0, -1.0, 0.0, 3.0])


def test_leave_one_out_takes_the_mean_of_the_others_off() -> None:
    rewards = [1.0, 2.0, 3.0, 6.0]
    expected = [reward - (sum(rewards) - reward) / 3 for reward in rewards]
    assert advantages_of(*rewards, kind="leave_one_out") == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.0, 0.1, -7.3, 1e6])
def test_a_group_of_equal_rewards_teaches_nothing(kind: Advantage, reward: float) -> None:
    assert advantages_of(*[reward] * 4, kind=kind) == [0.0] * 4


def test_rounding_is_no_difference_to_learn_from() -> None:
    assert advantages_of(1.0, 1.0000001, 1.0, 1.0) == [0.0] * 4


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out"])
def test_a_failed_reward_is_left_out_of_its_group(kind: Advantage) -> None:
    valid = torch.tensor([True, False, True, True])
    without = group_advantages(torch.tensor([1.0, 2.0, 6.0]), ALL[:3], 3, kind).tolist()
    for value in (0.0, 1e9, math.nan):
        found = advantages_of(1.0, value, 2.0, 6.0, kind=kind, valid=valid)
        assert found == pytest.approx([without[0], 0.0, *without[1:]])


@pytest.mark.parametrize("unit", [1e-12, 1e-7, 1.0, 1e9])
def test_whether_rewards_differ_does_not_depend_on_their_unit(unit: float) -> None:
    found = advantages_of(unit, 0.0, 0.0, 0.0)
    assert found == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert has_spread([unit, 0.0]) and not has_spread([unit, unit * (1 + 1e-9)])
    assert advantages_of(unit, unit * (1 + 1e-7), unit, unit) == [0.0] * 4


def test_what_cancels_leaves_rounding_of_its_size() -> None:
    """A KL of nothing is a difference of log-probs, which round as what they are."""
    rewards, sizes = torch.tensor([1e-8, 0.0, -1e-8, 0.0]), torch.full((4,), 0.5)
    assert group_advantages(rewards, ALL, 4, "group_std", sizes).tolist() == [0.0] * 4
    assert group_advantages(100 * rewards, ALL, 4, "group_std", sizes).any()


def test_a_single_reward_teaches_nothing() -> None:
    valid = torch.tensor([False, True, False, False])
    assert advantages_of(1.0, 5.0, 1.0, 1.0, kind="leave_one_out", valid=valid) == [0.0] * 4


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("grpo", [1 / 8, 1 / 4]),
        ("gspo", [1 / 8, 1 / 4]),
        ("dapo", [1 / 6, 1 / 6]),
        ("dr_grpo", [1 / 20, 1 / 20]),
    ],
)
def test_token_weights_of_a_long_and_a_short_response(form: LossForm, expected: list[float]) -> None:
    """Of 4 and of 2 tokens, and one that has none; at most 10 may be sampled."""
    weights = token_weights(MASK, form, max_new_tokens=10)
    for row, weight in enumerate(expected):
        assert weights[row, MASK[row]].tolist() == pytest.approx([weight] * int(MASK[row].sum()))
    assert not weights[~MASK].any()


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_token_weights_count_over_all_ranks(form: LossForm) -> None:
    """Two ranks with the same rows: every weight is half of what it is alone."""
    alone = token_weights(MASK, form, 10)
    torch.testing.assert_close(token_weights(MASK, form, 10, lambda count: 2 * count), alone / 2)


def test_ratio_of_tokens_and_of_whole_responses() -> None:
    old = torch.zeros(2, 3)
    new = torch.tensor([[0.1, 0.3, 9.0], [-0.2, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(policy_ratio(new, old, mask, "grpo"), new.exp())
    whole = policy_ratio(new, old, mask, "gspo")
    torch.testing.assert_close(whole, torch.tensor([[0.2], [-0.2]]).exp().expand(2, 3))


def test_clip_bounds_differ_below_and_above() -> None:
    ratio = torch.tensor([[0.5, 0.9, 1.25, 1.5]])
    for advantage, expected, where in (
        (1.0, [-0.5, -0.9, -1.25, -1.3], [False, False, False, True]),
        (-1.0, [0.8, 0.9, 1.25, 1.5], [True, False, False, False]),
    ):
        terms, is_clipped = clipped_loss_terms(ratio, torch.tensor([advantage]), 0.2, 0.3)
        torch.testing.assert_close(terms, torch.tensor([expected]))
        assert is_clipped.tolist() == [where]


def test_sampler_weights_have_mean_one_and_are_cut_at_the_top() -> None:
    """Over the sampler's distribution the ratio of two distributions has mean 1."""
    torch.manual_seed(0)
    trainer, sampler = (torch.randn(50).log_softmax(0) for _ in range(2))
    everywhere = torch.ones(1, 50, dtype=torch.bool)
    weights = importance_weights(trainer[None], sampler[None], everywhere, "token")
    assert float((sampler.exp() * weights[0]).sum()) == pytest.approx(1.0, abs=1e-5)
    cut = truncate_weights(weights, 2.0)
    assert float(cut.max()) == 2.0 and float(cut.min()) == float(weights.min())


def test_a_response_is_weighed_by_the_product_or_the_geometric_mean_of_its_tokens() -> None:
    trainer = torch.tensor([[2.0, 8.0, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]]).log()
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    sampler = torch.zeros_like(trainer)
    of = (trainer, sampler, mask)
    tokens, products, means = (importance_weights(*of, each) for each in ("token", "sequence", "geometric"))
    torch.testing.assert_close(tokens, torch.tensor([[2.0, 8.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(products, torch.tensor([[16.0], [0.5], [1.0]]).expand(3, 3))
    torch.testing.assert_close(means, torch.tensor([[4.0], [0.5], [1.0]]).expand(3, 3))


def test_weights_outside_the_band_are_zero_and_those_within_stay() -> None:
    weights = torch.tensor([[0.1, 0.5, 1.7, 5.0, 5.1]])
    kept = mask_weights(weights, 0.5, 5.0)
    torch.testing.assert_close(kept, torch.tensor([[0.0, 0.5, 1.7, 5.0, 0.0]]))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_no_weight_is_infinite_or_no_number(level: CorrectionLevel) -> None:
    """Of tokens that the trainer holds for impossible, or far likelier than the sampler did, thousands in a
    row."""
    trainer = torch.tensor([[-math.inf] * 4000, [-0.1] * 4000, [math.nan] * 4000])
    mask = torch.tensor([[True] * 4000, [True] * 4000, [False] * 4000])
    sampler = torch.tensor([[-1.0], [-50.0], [-math.inf]]).expand(3, 4000)
    weights = importance_weights(trainer, sampler, mask, level)
    ends = torch.tensor([[-20.0], [20.0], [0.0]]).exp().expand(3, 4000)
    torch.testing.assert_close(weights, ends, rtol=1e-4, atol=0)


def test_effective_share_is_that_of_the_weights() -> None:
    def share(weights: Float[Tensor, " N"]) -> float:
        return effective_sample_size(float(weights.mean()), float((weights**2).mean()))

    assert share(torch.full((7,), 0.3)) == pytest.approx(1.0)
    assert share(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert math.isnan(effective_sample_size(0.0, 0.0))


def test_overlong_penalty_grows_over_the_buffer() -> None:
    rollouts = [letters_rollout("a", "b" * length, "length") for length in (0, 6, 7, 8, 10)]
    found = overlong_penalties(rollouts, max_new_tokens=10, buffer=4, penalty=2.0)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 2.0])
    assert not overlong_penalties(rollouts, 10, 0, 2.0).any()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0 + 1e-9], False),
        ([0.1 + 0.2, 0.3], False),
        ([1.0, 2.0], True),
        ([1.0, None], False),
        ([None, None], False),
        ([1.0, None, 0.0], True),
    ],
)
def test_a_group_has_spread_if_two_of_its_rewards_differ(scores: list[float | None], expected: bool) -> None:
    assert has_spread([score for score in scores if score is not None]) is expected
