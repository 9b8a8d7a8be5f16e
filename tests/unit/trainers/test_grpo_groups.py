"""What completions of a prompt are compared by: RLOO's recipe, rounding, and which groups are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from conch.losses import token_weights
from conch.types import Rollout, RolloutGroup
from tests.runs import batch_of, grpo_trainer, letters_rollout, policy, scored

ROLLOUTS = [
    *(letters_rollout("ab", text) for text in ("bcd", "e", "gh", "aaaa")),
    *(letters_rollout("h", text) for text in ("h", "abcd", "ed", "f")),
]
REWARDS = [1.0, -2.0, 0.5, 3.0, 0.0, 1.0, 4.0, -1.0]
LONGEST = 5  # generation.max_new_tokens of these trainers


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def logprob(lm: GPT2LMHeadModel, rollout: Rollout) -> Tensor:
    """Log-prob of a whole completion, read by itself."""
    prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
    table = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]).sum()


def rloo_gradient(lm: GPT2LMHeadModel) -> Tensor:
    """Ahmadian et al. 2024, section 3: each completion's log-prob, by its reward less the others' mean."""
    losses = []
    for row, rollout in enumerate(ROLLOUTS):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        baseline = sum(REWARDS[other] for other in group if other != row) / 3
        losses.append(-(REWARDS[row] - baseline) * logprob(lm, rollout))
    torch.stack(losses).mean().backward()
    return gradient_of(lm)


def gradient_of(lm: Any) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in lm.parameters()])


@pytest.mark.parametrize(("loss", "factor"), [("dr_grpo", LONGEST), ("grpo", None)])
def test_the_recipe_of_rloo_has_its_gradient(run_dir: Path, loss: Any, factor: float | None) -> None:
    """grpo's weights 1 / n_i give long completions less to say, which is another direction."""
    kl = {"coef": 0.0, "placement": "reward", "estimator": "k1"}
    trainer = grpo_trainer(run_dir, lm=policy(), grpo={"loss": loss, "advantage": "leave_one_out", "kl": kl})
    batch = batch_of(trainer, ROLLOUTS, scored(*REWARDS))
    weights = token_weights(batch.loss_mask, loss, LONGEST)
    trainer._loss(batch, weights, weights)[0].backward()
    found, expected = gradient_of(trainer.lm), rloo_gradient(policy())
    if factor is None:
        assert torch.cosine_similarity(found, expected, dim=0) < 0.95
    else:
        torch.testing.assert_close(factor * found, expected, rtol=0, atol=1e-6)  # float32 rewards


def test_a_kl_of_nothing_in_the_rewards_teaches_nothing(run_dir: Path) -> None:
    """In float32 policy and reference differ by rounding where they are read in other batches."""
    trainer = grpo_trainer(
        run_dir, lm=policy().float(), grpo={"kl": {"coef": 1.0, "placement": "reward", "estimator": "k1"}}
    )
    outputs = trainer.compute_logprobs(ROLLOUTS)
    assert outputs.ref_logprobs is not None
    noise = 1 + 2e-7 * torch.randn(outputs.ref_logprobs.shape, generator=torch.Generator().manual_seed(1))
    noisy = replace(outputs, ref_logprobs=outputs.ref_logprobs * noise)
    batch, metrics = trainer.make_batch(ROLLOUTS, scored(*[0.0] * 8), noisy)
    assert not batch.advantages.any() and metrics["grpo/frac_reward_zero_std"] == 1.0
    further = replace(outputs, ref_logprobs=outputs.ref_logprobs * noise**1000)
    batch, _ = trainer.make_batch(ROLLOUTS, scored(*[0.0] * 8), further)
    assert batch.advantages.any()


LONG, SHORT, EMPTY = (letters_rollout("a", text) for text in ("bcde", "b", ""))


@pytest.mark.parametrize(
    ("rollouts", "scores", "expected"),
    [
        ([SHORT] * 4, (2.0, 3.0, 5.0, 7.0), False),  # all clipped to 1
        ([SHORT] * 4, (2.0, 0.5, 5.0, 7.0), True),
        ([SHORT] * 4, (-2.0, 3.0, None, None), True),
        ([SHORT] * 4, (1.0, None, None, None), False),
        ([SHORT, LONG, SHORT, SHORT], (1.0, 1.0, 1.0, 1.0), True),  # a penalty for its length
        ([SHORT, LONG, SHORT, SHORT], (1.0, None, 1.0, 1.0), False),
        ([SHORT] * 4, (1e-9, 0.0, 0.0, 0.0), True),
    ],
)
def test_groups_are_replaced_by_what_is_learned_from(
    run_dir: Path, rollouts: list[Rollout], scores: Sequence[float | None], expected: bool
) -> None:
    """By rewards as they are clipped, less the penalties: just where their advantages would be 0."""
    trainer = grpo_trainer(run_dir, shaping={"clip": 1.0}, grpo={"overlong_buffer": 2, "max_resamples": 1})
    (group,) = RolloutGroup.split(rollouts, scored(*scores), 4)
    assert trainer.shaper.differ(group, trainer._overlong(rollouts)) is expected
    batch, _ = trainer.make_batch(rollouts, group.rewards, trainer.compute_logprobs(rollouts))
    assert bool(batch.advantages.any()) is expected


@pytest.mark.parametrize("combine", ["normalise_then_sum", "sum_then_normalise"])
def test_groups_that_differ_in_an_objective_stay_where_objectives_are_normalised(
    run_dir: Path, combine: str
) -> None:
    trainer = grpo_trainer(
        run_dir,
        shaping={"combine": combine, "clip": 0.1},
        reward={"weights": {"ignored": 0.0}},
    )

    def differ(**scores: Sequence[float]) -> bool:
        rewards = scored(*next(iter(scores.values())))
        rows = [
            replace(reward, scores={name: column[row] for name, column in scores.items()})
            for row, reward in enumerate(rewards)
        ]
        (group,) = RolloutGroup.split([SHORT] * 4, rows, 4)
        return trainer.shaper.differ(group, trainer._overlong(group.rollouts))

    assert differ(a=[5.0, 6.0, 5.0, 5.0], b=[6.0, 5.0, 6.0, 6.0])
    assert not differ(a=[5.0] * 4, b=[6.0] * 4, ignored=[1.0, 2.0, 3.0, 4.0])
