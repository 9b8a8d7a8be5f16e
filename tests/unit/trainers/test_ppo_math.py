"""The pure parts of PPO: by hand, or against loops over single tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from conch.advantages import gae
from conch.config import load
from conch.data.rollout_batch import collate, take_rows
from conch.errors import ConfigError, DataError
from conch.evaluation.metrics import mean_of_finite, metric_columns
from conch.losses import policy_loss_terms, value_loss_terms
from conch.ops import only_this_rank
from conch.rewards.scorer import total_reward
from conch.trainers.ppo import PPOConfig, PPORunConfig
from conch.training.kl import KLConfig, KLController, mean_kl
from conch.training.reward_shaping import RunningMoments, at_last_token
from conch.training.statistics import explained_variance, logprob_diff, reward_metrics, rollout_metrics
from conch.types import RewardResult, RewardStatus
from tests.runs import EOS, PAD, letters_rollout, scored

NAN = float("nan")
LENGTHS = [5, 1, 0, 3]
MASK = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)


def random_rows(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


def valid_positions() -> Iterator[tuple[int, int]]:
    return ((row, t) for row, length in enumerate(LENGTHS) for t in range(length))


# ------------------------------------------------------------------------------------------ rewards per token


def test_scores_stand_at_the_last_token_of_their_response() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    placed = at_last_token(torch.tensor([10.0, 20.0]), mask)
    assert placed.tolist() == [[0.0, 0.0, 10.0, 0.0], [20.0, 0.0, 0.0, 0.0]]


def test_score_of_an_empty_response_has_no_place() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    assert at_last_token(torch.tensor([7.0, 1.0]), mask).tolist() == [[0, 0], [0, 1]]


# ------------------------------------------------------------------------------------------------- advantages


def reference_advantage(rewards: Tensor, values: Tensor, row: int, t: int, gamma: float, lam: float) -> float:
    """The double sum of its definition; the value after the last token is 0."""
    length = LENGTHS[row]
    total = 0.0
    for step in range(t, length):
        following = float(values[row, step + 1]) if step + 1 < length else 0.0
        delta = float(rewards[row, step]) + gamma * following - float(values[row, step])
        total += (gamma * lam) ** (step - t) * delta
    return total


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_discounted_sum_of_errors(gamma: float, lam: float) -> None:
    rewards, values = random_rows(0), random_rows(1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, t in valid_positions():
        expected = reference_advantage(rewards, values, row, t, gamma, lam)
        assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-5)
        assert float(returns[row, t]) == pytest.approx(expected + float(values[row, t]), abs=1e-5)
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_gae_ignores_what_stands_in_the_padding() -> None:
    rewards, values = random_rows(0), random_rows(1)
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.95)
    rewards[~MASK], values[~MASK] = NAN, 1e9
    again = gae(rewards, values, MASK, 1.0, 0.95)
    assert torch.equal(again[0], advantages) and torch.equal(again[1], returns)


def test_gae_without_discount_returns_the_rewards_to_come() -> None:
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    _, returns = gae(rewards, torch.tensor([[0.3, -2.0, 9.0]]), mask, 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))


# ----------------------------------------------------------------------------------------------------- losses


def test_policy_loss_matches_a_loop_over_tokens() -> None:
    new, old, advantages = random_rows(0) / 2, random_rows(1) / 2, random_rows(2)
    terms, ratio, is_clipped = policy_loss_terms(new, old, advantages, 0.2)
    for index in np.ndindex(4, 5):
        rho = math.exp(float(new[index]) - float(old[index]))
        advantage = float(advantages[index])
        expected = -min(rho * advantage, min(max(rho, 0.8), 1.2) * advantage)
        assert float(ratio[index]) == pytest.approx(rho, rel=1e-5)
        assert float(terms[index]) == pytest.approx(expected, rel=1e-5)
        leaves = (advantage > 0 and rho > 1.2) or (advantage < 0 and rho < 0.8)
        assert bool(is_clipped[index]) is leaves
    assert is_clipped.any() and not is_clipped.all()


def test_policy_loss_stops_the_gradient_only_where_it_is_clipped() -> None:
    new = torch.tensor([[0.5, 0.5, -0.5, -0.5, 0.1]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    terms, ratio, _ = policy_loss_terms(new, torch.zeros(1, 5), advantages, 0.2)
    (gradient,) = torch.autograd.grad(terms.sum(), new)
    torch.testing.assert_close(gradient, -advantages * ratio.detach() * torch.tensor([[0.0, 1, 1, 0, 1]]))


def test_value_loss_matches_a_loop_over_tokens() -> None:
    values, old, returns = random_rows(0), random_rows(1), random_rows(2)
    terms = value_loss_terms(values, old, returns, 0.2)
    for index in np.ndindex(4, 5):
        value, before, target = float(values[index]), float(old[index]), float(returns[index])
        near = min(max(value, before - 0.2), before + 0.2)
        assert float(terms[index]) == pytest.approx(
            max((value - target) ** 2, (near - target) ** 2) / 2, rel=1e-4, abs=1e-6
        )


# ---------------------------------------------------------------------------------------------- KL controller


def test_adaptive_controller_replays_in_closed_form() -> None:
    controller = KLController(KLConfig(coef=0.1, target=6.0, horizon=1000))
    seen = []
    for kl in (12.0, 6.6, 0.0, 6.0, -3.0):
        controller.update(kl, num_samples=50)
        seen.append(controller.coef)
    # Errors 1, 0.1, -1, 0, -1.5, cut to +-0.2, times 50 / 1000.
    factors = [1.01, 1.005, 0.99, 1.0, 0.99]
    assert seen == pytest.approx(list(0.1 * np.cumprod(factors)), rel=1e-12)


def test_fixed_controller_stays() -> None:
    controller = KLController(KLConfig(coef=0.1))
    controller.update(1e9, num_samples=10_000)
    assert controller.coef == 0.1


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [
        (-1.0, 10.0, 3.0),  # would be 10: bounded
        (-1.0, 2.0, 2.0),  # below the bound
        (1.0, 10.0, -1.2),  # positive: the ordinary clip alone
        (1.0, 0.1, -0.1),
    ],
)
def test_dual_clip_bounds_negative_advantages_alone(advantage: float, ratio: float, expected: float) -> None:
    new, old = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
    losses, _, _ = policy_loss_terms(new, old, torch.tensor([[advantage]]), 0.2, dual_clip=3.0)
    assert float(losses) == pytest.approx(expected)


def test_values_without_a_clip_are_a_plain_squared_error() -> None:
    terms = value_loss_terms(torch.tensor([[3.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), None)
    assert terms.item() == 2.0


# -------------------------------------------------------------------------------------------- running moments


def test_running_moments_equal_those_of_all_valid_scores_at_once() -> None:
    moments, kept = RunningMoments(), []
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 0, 20):
        scores = 3 + 2 * torch.randn(size, generator=generator)
        valid = torch.rand(size, generator=generator) < 0.7
        scores[~valid] = NAN
        moments.update(scores, valid)
        kept += scores[valid].tolist()
    assert moments.count == len(kept)
    assert moments.mean == pytest.approx(np.mean(kept), rel=1e-9)
    assert moments.std == pytest.approx(np.std(kept), rel=1e-9)


def test_running_moments_survive_a_large_mean() -> None:
    moments = RunningMoments()
    for scores in ([1e6, 1e6 + 1], [1e6 + 2, 1e6 + 3]):
        moments.update(torch.tensor(scores, dtype=torch.float64), torch.tensor([True, True]))
    assert moments.std == pytest.approx(math.sqrt(1.25), rel=1e-9)


def test_running_moments_scale_by_one_until_scores_differ() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.full((4,), 0.7), torch.ones(4, dtype=torch.bool))
    assert moments.std == 1.0


# ------------------------------------------------------------------------------------------- rewards, numbers

TWO_OBJECTIVES = RewardResult(RewardStatus.OK, scores={"helpful": 2.0, "harmless": -1.0}, model="judge")


def test_total_reward_weighs_objectives() -> None:
    assert total_reward(TWO_OBJECTIVES, {}) == 1.0
    assert total_reward(TWO_OBJECTIVES, {"harmless": 3.0}) == -1.0
    assert total_reward(RewardResult(RewardStatus.OK, token_scores=(0.5, -1.5, 3.0)), {}) == 2.0
    assert math.isnan(total_reward(*scored(None), {}))


def test_total_reward_refuses_a_weight_for_no_objective() -> None:
    with pytest.raises(ConfigError, match=r"`helpfull`.*`harmless`, `helpful`"):
        total_reward(TWO_OBJECTIVES, {"helpfull": 1.0})


def test_reward_metrics_leave_failures_out() -> None:
    metrics = reward_metrics(scored(1.0, None, 4.0, None), {}, ["reward"], only_this_rank)
    assert metrics == {"reward/mean": 2.5, "reward/std": 1.5, "reward/failed_fraction": 0.5}


def test_reward_metrics_have_the_members_variance_where_there_are_members() -> None:
    def of_members(*scores: float | None) -> RewardResult:
        members = {f"m{place}": score for place, score in enumerate(scores)}
        return RewardResult(RewardStatus.OK, scores={"reward": 1.0}, members=members)

    rewards = [of_members(1.0, 3.0), of_members(2.0, None), *scored(5.0, None)]
    found = reward_metrics(rewards, {}, ["reward"], only_this_rank)
    assert found["reward/members_variance"] == 0.5  # of 1 and 0; the others have no members
    assert "reward/members_variance" not in reward_metrics(scored(1.0, None), {}, [], only_this_rank)


def test_reward_metrics_of_failures_alone_are_no_zero() -> None:
    metrics = reward_metrics(scored(None, None), {}, [], only_this_rank)
    assert math.isnan(metrics["reward/mean"]) and math.isnan(metrics["reward/std"])
    assert metrics["reward/failed_fraction"] == 1.0


def test_reward_metrics_name_the_objectives_where_there_are_several() -> None:
    both = RewardResult(RewardStatus.OK, scores={"truth": 2.0, "style": 3.0})
    one = RewardResult(RewardStatus.OK, scores={"truth": 4.0, "style": 0.0})
    metrics = reward_metrics([both, one], {"style": 0.5}, ["style", "truth"], only_this_rank)
    assert metrics["reward/mean/truth"] == 3.0 and metrics["reward/mean/style"] == 1.5
    assert metrics["reward/mean"] == (3.5 + 4.0) / 2


def test_rollout_metrics_count_truncated_and_mask_padding() -> None:
    rollouts = [
        letters_rollout("a", "bcd", "length", logprob=-1.0),
        letters_rollout("abc", "b", "eos", logprob=-2.0),
        letters_rollout("a", "", "stop"),
        letters_rollout("a", "", "eos", logprob=-3.0),
    ]
    sequences = collate(rollouts, PAD)
    trainers_own = torch.where(sequences.response_mask, sequences.sampling_logprobs - 0.25, 1e9)
    metrics = rollout_metrics(rollouts, sequences, only_this_rank, only_this_rank)
    assert metrics["rollout/length_mean"] == 6 / 4 and metrics["rollout/length_max"] == 3.0
    assert metrics["rollout/truncated_fraction"] == 1 / 4
    assert logprob_diff(trainers_own, sequences, only_this_rank) == pytest.approx(0.25)


def test_mean_kl_sums_over_a_response_and_averages_over_samples() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, NAN], [-1.0, NAN, NAN], [NAN, NAN, NAN]])
    reference = torch.tensor([[-2.0, -1.5, 0.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert mean_kl(logprobs, reference, mask, only_this_rank) == pytest.approx((0.5 + 3.0 + 0.0) / 3)


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([[0.0, 2.0, 77.0]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask, only_this_rank) == 1.0
    assert explained_variance(torch.ones(1, 3), returns, mask, only_this_rank) == 0.0
    # Errors 0 and 1, which vary by 1/4, against returns that vary by 1.
    found = explained_variance(torch.tensor([[0.0, 1.0, 5.0]]), returns, mask, only_this_rank)
    assert found == pytest.approx(0.75)
    assert explained_variance(returns + 9.0, returns, mask, only_this_rank) == 1.0, "off by a constant"
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask, only_this_rank))


def test_mean_of_finite_skips_what_is_no_number() -> None:
    assert mean_of_finite([1.0, NAN, 3.0, math.inf]) == 2.0
    assert math.isnan(mean_of_finite([NAN]))


def test_metric_columns_take_lists_and_single_numbers() -> None:
    rollouts = [letters_rollout("a", "bc", "eos", answer="b"), letters_rollout("b", "d", "eos")]

    def metric(
        samples: list[str], prompts: list[str], outputs: list[str], answer: list[str | None]
    ) -> dict[str, list[int] | float]:
        assert (samples, prompts, answer) == (["abc", "bd"], ["a", "b"], ["b", None])
        return {"length": [len(output) for output in outputs], "constant": 0.5}

    assert metric_columns(metric, rollouts) == {"length": [2.0, 1.0], "constant": [0.5, 0.5]}
    assert metric_columns(None, rollouts) == {}


def test_metric_columns_take_arrays_and_refuse_a_wrong_count() -> None:
    rollouts = [letters_rollout("a", "bc", "eos"), letters_rollout("b", "d", "eos")]
    columns = metric_columns(lambda **_: {"array": np.array([1, 2]), "one": np.float32(3)}, rollouts)
    assert columns == {"array": [1.0, 2.0], "one": [3.0, 3.0]}
    with pytest.raises(DataError, match="3 values of `length` for 2 samples"):
        metric_columns(lambda **_: {"length": [1, 2, 3]}, rollouts)


def test_horizon_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`kl.horizon` = 100 is shorter than `rollouts_per_step` = 128"):
        load(PPOConfig, {"rollouts_per_step": 128, "kl": {"target": 1.0, "horizon": 100}})
    assert load(PPOConfig, {"rollouts_per_step": 128, "kl": {"horizon": 100}}).kl.target is None


def test_a_weight_that_could_not_move_or_is_steered_by_no_kl_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`ppo.kl`: `target` steers `coef` by factors, and from 0 it never"
    ):
        load(PPORunConfig, {"model": {"path": "gpt2"}, "ppo": {"kl": {"coef": 0.0, "target": 1.0}}})
    steered = {"model": {"path": "gpt2"}, "ppo": {"kl": {"target": 1.0}}}
    with pytest.raises(
        ConfigError, match=r"`ppo.kl.target` steers by the KL .* `generation.top_k` or `top_p`"
    ):
        load(PPORunConfig, {**steered, "generation": {"top_p": 0.9}})
    assert load(PPORunConfig, {**steered, "generation": {"temperature": 0.7}}).ppo.kl.target == 1.0


# ---------------------------------------------------------------------------------------------------- batches


def test_collate_pads_prompts_left_and_responses_right() -> None:
    rollouts = [letters_rollout("abc", "d", "length"), letters_rollout("e", "f", "eos")]
    sequences = collate(rollouts, PAD)
    assert sequences.input_ids.tolist() == [[0, 1, 2, 3, PAD], [PAD, PAD, 4, 5, EOS]]
    assert sequences.attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert sequences.response_ids.tolist() == [[3, PAD], [5, EOS]]
    assert sequences.response_mask.int().tolist() == [[1, 0], [1, 1]]
    assert sequences.sampling_logprobs.tolist() == [[-1, 0], [-1, -1]]


def test_collate_masks_by_length_not_by_token_id() -> None:
    # Where pad and eos are one token, the sampled one counts.
    sequences = collate([letters_rollout("a", "b"), letters_rollout("a", "bcd")], pad_token_id=EOS)
    assert sequences.response_mask.sum(dim=1).tolist() == [2, 4]


def test_collate_of_empty_responses_has_a_column_of_padding() -> None:
    sequences = collate([letters_rollout("ab", "", "stop")], PAD)
    assert sequences.num_response == 1 and not sequences.response_mask.any()


def test_take_rows_cuts_nested_tensors_alike() -> None:
    sequences = collate(
        [letters_rollout("a", "b"), letters_rollout("cd", "e"), letters_rollout("f", "g")], PAD
    )
    taken = take_rows(sequences, torch.tensor([2, 0]))
    assert taken.response_ids[:, 0].tolist() == [6, 1]
    assert taken.attention_mask.tolist() == sequences.attention_mask[[2, 0]].tolist()
