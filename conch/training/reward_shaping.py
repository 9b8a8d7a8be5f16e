"""From what a reward source gave to the rewards that an algorithm learns from.

The order is fixed, and every statistic is over the valid samples of all ranks:

    1. objectives are combined: weighted sum; or each normalised, then summed; or summed, then normalised
    2. clipped to +-clip
    3. divided by a standard deviation: of all scores so far (running), or of the first step's (reference)
    4. less the penalty for a response that was cut by the limit

Per-token (dense) rewards are clipped token by token, and scaled by the spread of their sums. The mean is
never taken off by clipping and scaling: the sign of a reward keeps its meaning.

Legend: B rollouts, R response tokens, K objectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.advantages import has_spread
from conch.config.algorithms.shaping import ShapingConfig
from conch.distributed.collectives import Collectives
from conch.errors import ConfigError
from conch.ops import Reduce, masked_mean, masked_sum, only_this_rank, whiten
from conch.rewards.scorer import total_reward, weight_of
from conch.types import RewardResult, Rollout, RolloutGroup


class RunningMoments:
    """Mean and variance of all scores so far, over all ranks (parallel update of Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.sum_squares = 0.0, 0.0, 0.0

    def update(
        self, scores: Float[Tensor, " B"], valid: Bool[Tensor, " B"], reduce: Reduce = only_this_rank
    ) -> None:
        """Take in this step's scores where `valid` is True."""
        wide = scores.double()
        count = float(reduce(valid.sum().double()))
        if count == 0:
            return
        mean = float(masked_mean(wide, valid, reduce))
        squares = float(reduce(masked_sum((wide - mean) ** 2, valid)))
        delta, total = mean - self.mean, self.count + count
        self.sum_squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on from here."""
        return {"count": self.count, "mean": self.mean, "sum_squares": self.sum_squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where `state_dict` was taken."""
        self.count, self.mean, self.sum_squares = state["count"], state["mean"], state["sum_squares"]

    @property
    def std(self) -> float:
        """Biased standard deviation; 1 until there is any spread."""
        std = (self.sum_squares / self.count) ** 0.5 if self.count else 0.0
        return std if std > 1e-8 else 1.0


class RewardShaper:
    """Shapes the rewards of step after step; remembers the spread of what it has seen."""

    def __init__(self, config: ShapingConfig, weights: Mapping[str, float], collectives: Collectives) -> None:
        self._config = config
        self._weights = weights
        self._collectives = collectives
        self.objectives: list[str] = []
        """Names, the same on all ranks; empty before the first rewards."""
        self.moments = RunningMoments()

    def shape(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult], mask: Bool[Tensor, "B R"]
    ) -> Float[Tensor, "B R"]:
        """Rewards per response token: a scalar score at the last one, dense ones where they belong.

        mask: True at response tokens of samples that have a reward; the others get 0. A scalar score of an
        empty response has no token to go to and is lost.

        Raises:
            ConfigError: dense rewards with a `combine` that is about objectives.
        """
        valid = torch.tensor([reward.ok for reward in rewards], device=mask.device)
        scalar = self._clip(self._combined(rewards, mask.device))
        dense = self._clip(_dense(rewards, mask))
        scale = self._scale(scalar + dense.sum(dim=1), valid)
        scalar = scalar / scale - self._penalties(rollouts, mask.device)
        shaped = dense / scale + at_last_token(torch.where(valid, scalar, torch.zeros_like(scalar)), mask)
        return torch.where(mask, shaped, torch.zeros_like(shaped))

    def differ(self, group: RolloutGroup, penalties: Float[Tensor, " G"]) -> bool:
        """Whether completions of one prompt differ in what `shape` will give for them, less `penalties`.

        Told from the group alone, as of now: no statistic moves. Where objectives are normalised over a step,
        which this cannot foresee, the completions differ if they do in any objective.
        """
        learned = [bool(rollout.completion.token_ids) for rollout in group.rollouts]
        rows = [row for row, reward in enumerate(group.rewards) if reward.ok and learned[row]]
        off = penalties + self._penalties(group.rollouts, penalties.device)
        rewards, taken_off = [group.rewards[row] for row in rows], [float(off[row]) for row in rows]
        if self._config.combine != "sum":
            names = {name for reward in rewards for name in reward.scores if weight_of(name, self._weights)}
            columns = [[reward.scores[name] for reward in rewards if name in reward.scores] for name in names]
            # An objective that does not apply to one of them makes a difference, too.
            differently = len({frozenset(names & reward.scores.keys()) for reward in rewards}) > 1
            return differently or any(map(has_spread, [*columns, taken_off]))
        scale, bound = self._present_scale(), self._config.clip or math.inf
        totals: list[float] = []
        for reward in rewards:
            parts = reward.token_scores or [total_reward(reward, self._weights)]
            totals.append(sum(min(max(part, -bound), bound) for part in parts) / scale)
        return has_spread([total - less for total, less in zip(totals, taken_off, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {"moments": self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.moments.load_state_dict(state["moments"])

    def _combined(self, rewards: Sequence[RewardResult], device: torch.device) -> Float[Tensor, " B"]:
        """One score per sample; 0 for failures and dense rewards."""
        is_dense = any(reward.token_scores is not None for reward in rewards)
        if self._config.combine != "sum" and self._collectives.all_reduce_int(int(is_dense)):
            raise ConfigError(
                f"`shaping.combine`={self._config.combine} is about objectives, these rewards are per token:"
                " set it to `sum`"
            )
        self.objectives = self.objectives or agreed_objectives(rewards, self._collectives)
        names = self.objectives
        rows = [[reward.scores.get(name, float("nan")) for name in names] for reward in rewards]
        scores = torch.tensor(rows, device=device).reshape(len(rewards), len(names))
        return combine_objectives(
            scores,
            [weight_of(name, self._weights) for name in names],
            self._config.combine,
            self._collectives.all_reduce,
        )

    def _clip(self, values: Tensor) -> Tensor:
        bound = self._config.clip
        return values if bound is None else values.clamp(-bound, bound)

    def _scale(self, totals: Float[Tensor, " B"], valid: Bool[Tensor, " B"]) -> float:
        config = self._config
        measures_once = config.scaling == "reference" and config.reference_std is None
        if config.scaling == "running" or (measures_once and self.moments.count == 0):
            self.moments.update(totals, valid, self._collectives.all_reduce)
        return self._present_scale()

    def _present_scale(self) -> float:
        if self._config.scaling == "none":
            return 1.0
        return self._config.reference_std or self.moments.std

    def _penalties(self, rollouts: Sequence[Rollout], device: torch.device) -> Float[Tensor, " B"]:
        penalty = self._config.missing_eos_penalty or 0.0
        cut = [rollout.completion.finish_reason == "length" for rollout in rollouts]
        return penalty * torch.tensor(cut, device=device).float()


def combine_objectives(
    scores: Float[Tensor, "B K"],
    weights: Sequence[float],
    how: Literal["sum", "normalise_then_sum", "sum_then_normalise"],
    reduce: Reduce = only_this_rank,
) -> Float[Tensor, " B"]:
    """One score per sample from K objectives; NaN counts as absent and leaves no trace in any statistic.

    A sample without any objective gets 0.
    """
    present = ~scores.isnan()
    known = torch.where(present, scores, torch.zeros_like(scores))
    if how == "normalise_then_sum":
        columns = [whiten(known[:, k], present[:, k], reduce) for k in range(scores.shape[1])]
        known = torch.stack(columns, dim=1) if columns else known
    total = (known * torch.tensor(weights, device=scores.device)).sum(dim=1)
    return whiten(total, present.any(dim=1), reduce) if how == "sum_then_normalise" else total


def overlong_penalties(
    rollouts: Sequence[Rollout], max_new_tokens: int, buffer: int, penalty: float
) -> Float[Tensor, " B"]:
    """0 up to `max_new_tokens - buffer` tokens, then growing linearly to `penalty` at `max_new_tokens`."""
    lengths = torch.tensor([len(rollout.completion.token_ids) for rollout in rollouts]).float()
    if buffer == 0:
        return torch.zeros_like(lengths)
    return penalty * ((lengths - (max_new_tokens - buffer)) / buffer).clamp(min=0, max=1)


def at_last_token(scores: Float[Tensor, " B"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Each row's score at its last position where `mask` is True, 0 elsewhere."""
    placed = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
    lengths = mask.sum(dim=1)
    rows = torch.nonzero(lengths > 0).squeeze(-1)
    placed[rows, lengths[rows] - 1] = scores[rows]
    return placed


def _dense(rewards: Sequence[RewardResult], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Per-token rewards as they came; 0 for scalar ones."""
    dense = torch.zeros(mask.shape, device=mask.device)
    for row, reward in enumerate(rewards):
        if reward.token_scores is not None:
            dense[row, : len(reward.token_scores)] = torch.tensor(reward.token_scores, device=mask.device)
    return torch.where(mask, dense, torch.zeros_like(dense))


def agreed_objectives(rewards: Sequence[RewardResult], collectives: Collectives) -> list[str]:
    """Names of the objectives, the same on all ranks, also on one that has no reward to see them by."""
    return _agreed((name for reward in rewards for name in (*reward.scores, *reward.absent)), collectives)


def agreed_facts(rewards: Sequence[RewardResult], collectives: Collectives) -> list[str]:
    """Names of the facts in rewards, the same on all ranks."""
    return _agreed((name for reward in rewards for name in reward.facts), collectives)


def _agreed(names: Iterable[str], collectives: Collectives) -> list[str]:
    return sorted(set(collectives.all_gather(sorted(set(names)))))
