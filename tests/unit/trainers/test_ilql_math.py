"""The losses of ILQL against numbers by hand and against a slow loop over single tokens, written from the
equations of Snell et al. 2022."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conch.config import load
from conch.errors import ConfigError, DataError
from conch.evaluation.evaluator import eval_variants
from conch.models.ilql import ILQLOutput
from conch.trainers.ilql import (
    ILQLConfig,
    ILQLEvalGenerationConfig,
    ILQLGenerationConfig,
    checked_rewards,
    expectile_terms,
    ilql_loss_terms,
    q_targets,
)

MASK = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0]], dtype=torch.bool)


def test_q_targets_are_the_next_actions_value_and_the_reward_at_the_last() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]] * 3)
    targets = q_targets(values, torch.tensor([10.0, 20.0, 30.0]), MASK, gamma=0.5)
    # Row 0: actions 0, 1, 4, 5, 6. The value at 4, behind the second prompt, follows action 1.
    assert targets[0][MASK[0]].tolist() == [1.0, 2.5, 3.0, 3.5, 10.0]
    assert targets[1][MASK[1]].tolist() == [20.0]
    assert targets[2][MASK[2]].tolist() == [1.0, 1.5, 2.5, 30.0]


def test_q_targets_carry_no_gradient() -> None:
    values = torch.zeros(3, 7, requires_grad=True)
    assert not q_targets(values, torch.ones(3), MASK, gamma=1.0).requires_grad


def test_expectile_weighs_positive_differences_by_tau() -> None:
    terms = expectile_terms(torch.tensor([[2.0, -2.0, 0.0]]), tau=0.75)
    assert terms.tolist() == [[3.0, 1.0, 0.0]]


def test_expectile_of_one_half_is_half_the_squared_error() -> None:
    assert expectile_terms(torch.tensor([[3.0, -3.0]]), tau=0.5).tolist() == [[4.5, 4.5]]


def random_output(seed: int, num_heads: int = 2, vocabulary: int = 6) -> tuple[ILQLOutput, torch.Tensor]:
    """What a policy might give for MASK's batch, in float64, and the actions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = tuple(MASK.shape)
    output = ILQLOutput(
        logits=2 * normal(*shape, vocabulary),
        qs=tuple(normal(*shape, vocabulary) for _ in range(num_heads)),
        target_q=normal(*shape),
        values=normal(*shape),
    )
    return output, torch.randint(0, vocabulary, shape, generator=generator)


def paper_losses(
    output: ILQLOutput, actions: torch.Tensor, rewards: torch.Tensor, gamma: float, tau: float, eta: float
) -> dict[str, float]:
    """Sums over all actions, one action at a time, in Python's floats."""
    sums = dict.fromkeys(("q_loss", "v_loss", "cql_loss", "awac_loss"), 0.0)
    for row in range(len(MASK)):
        steps = [column for column in range(MASK.shape[1]) if MASK[row, column]]
        for number, now in enumerate(steps):
            action, value = int(actions[row, now]), float(output.values[row, now])
            if number + 1 < len(steps):
                target = gamma * float(output.values[row, steps[number + 1]])
            else:
                target = float(rewards[row])
            for q in output.qs:
                scores = q[row, now].tolist()
                sums["q_loss"] += (target - scores[action]) ** 2
                sums["cql_loss"] += math.log(sum(math.exp(score) for score in scores)) - scores[action]
            advantage = float(output.target_q[row, now]) - value
            sums["v_loss"] += (tau if advantage >= 0 else 1 - tau) * advantage**2
            logits = output.logits[row, now].tolist()
            log_pi = logits[action] - math.log(sum(math.exp(logit) for logit in logits))
            sums["awac_loss"] -= min(math.exp(eta * advantage), 100.0) * log_pi
    return sums


@pytest.mark.parametrize("eta", [0.0, 0.7, 9.0])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_losses_are_those_of_a_slow_loop(num_heads: int, eta: float) -> None:
    output, actions = random_output(seed=num_heads, num_heads=num_heads)
    rewards = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    config = ILQLConfig(gamma=0.9, tau=0.8, awac_beta=eta)
    terms = ilql_loss_terms(output, actions, rewards, MASK, config)
    sums = {name: float(term[MASK].sum()) for name, term in terms.items()}
    assert sums == pytest.approx(paper_losses(output, actions, rewards, 0.9, 0.8, eta), rel=1e-12)


def test_gradients_reach_each_head_through_its_own_losses_alone() -> None:
    output, actions = random_output(seed=5)
    leaves = {"logits": output.logits, "q": output.qs[0], "values": output.values}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    config = ILQLConfig(awac_beta=1.0)
    terms = ilql_loss_terms(output, actions, torch.ones(3, dtype=torch.float64), MASK, config)
    reached = {
        name: {
            leaf_name
            for leaf_name, leaf in leaves.items()
            if torch.autograd.grad(term.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None
        }
        for name, term in terms.items()
    }
    assert reached == {"q_loss": {"q"}, "v_loss": {"values"}, "cql_loss": {"q"}, "awac_loss": {"logits"}}


def test_normalised_rewards_have_mean_0_and_deviation_1() -> None:
    assert checked_rewards([1, 2.0, 3, 6], 4, normalise=True) == pytest.approx(
        [(x - 3) / math.sqrt(3.5) for x in (1, 2, 3, 6)]
    )
    assert checked_rewards([1, 2.0, 3, 6], 4, normalise=False) == [1, 2, 3, 6]
    assert checked_rewards([5.0, 5.0], 2, normalise=True) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "1 rewards for 3 samples"),
        ([1.0] * 4, "4 rewards for 3 samples"),
        ([1.0, math.nan, 2.0], "reward of sample 1 is nan"),
        ([1.0, 2.0, math.inf], "reward of sample 2 is inf"),
        ([1.0, None, 2.0], "no number"),
        ([1.0, "high", 2.0], "no number"),
    ],
)
def test_rewards_that_do_not_fit_the_samples_are_refused(rewards: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_rewards(rewards, 3, normalise=True)


def test_a_list_of_betas_is_for_evaluation_alone() -> None:
    with pytest.raises(ConfigError, match=r"`beta`.*number"):
        load(ILQLGenerationConfig, {"beta": [0, 1, 100]})
    swept = eval_variants(ILQLGenerationConfig(), ILQLEvalGenerationConfig(beta=[0, 1, 100]))
    assert [(variant.suffix, variant.generation.beta) for variant in swept] == [
        ("@beta=0", 0.0),
        ("@beta=1", 1.0),
        ("@beta=100", 100.0),
    ]


def test_only_one_key_may_be_swept() -> None:
    with pytest.raises(ConfigError, match="only one key may be a list"):
        load(ILQLEvalGenerationConfig, {"beta": [0, 1], "top_k": [1, 2]})
