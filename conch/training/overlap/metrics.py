"""What is watched of asynchronous training: how old tokens are, whether long responses get lost, and whether
devices are shared out well."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from conch.ops import Reduce
from conch.types import Metrics, Rollout


def staleness_metrics(rollouts: Sequence[Rollout], version: int, reduce: Reduce, greatest: Reduce) -> Metrics:
    """Mean and maximum over the response tokens of all ranks of the updates that the policy has seen since
    the weights that sampled a token; NaN without tokens.

    version: updates that the policy has seen.
    greatest: takes the maximum over all ranks.
    """
    runs = [
        (version - sampled_by, tokens)
        for rollout in rollouts
        for sampled_by, tokens in rollout.versions
        if tokens
    ]
    sums = [sum(age * tokens for age, tokens in runs), sum(tokens for _, tokens in runs)]
    total, count = reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    oldest = float(greatest(torch.tensor(max((age for age, _ in runs), default=0), dtype=torch.float64)))
    return {
        "staleness/mean": total / count if count else math.nan,
        "staleness/max": oldest if count else math.nan,
    }


class LengthAudit:
    """Compares the lengths of all responses sampled so far with those of all trained on.

    Methods that throw late samples away, or train on what ends first, train on shorter responses than are
    sampled. Here both lengths must have the same distribution, but for the groups under way.

    longest: of a response, in tokens.
    """

    def __init__(self, longest: int) -> None:
        self._sampled = torch.zeros(longest + 1, dtype=torch.float64)
        self._trained = torch.zeros(longest + 1, dtype=torch.float64)
        self._lock = threading.Lock()

    def note_sampled(self, length: int) -> None:
        """Count a response that has ended. From any thread."""
        with self._lock:
            self._sampled[length] += 1

    def note_trained(self, length: int) -> None:
        """Count a response that is trained on."""
        with self._lock:
            self._trained[length] += 1

    def metrics(self, reduce: Reduce) -> Metrics:
        """Mean lengths over all ranks, and the distance of the two distributions; NaN where there is nothing
        to compare."""
        with self._lock:
            counts = torch.stack([self._sampled, self._trained])
        sampled, trained = reduce(counts).cpu()
        return {
            "async/length_sampled_mean": _mean_length(sampled),
            "async/length_trained_mean": _mean_length(trained),
            "async/length_distance": kolmogorov_smirnov(sampled, trained),
        }

    def state_dict(self) -> dict[str, Any]:
        """What this rank trained on, for `load_state_dict`: JSON values."""
        with self._lock:
            return {"trained": self._trained.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where `state_dict` was taken, whatever the longest response was then.

        All of these were sampled; what waited to be trained then is to be noted again as sampled.
        """
        with self._lock:
            missing = len(self._trained) - len(state["trained"])
            self._trained = torch.tensor(state["trained"] + [0.0] * missing, dtype=torch.float64)
            self._sampled = self._trained.clone()


def _mean_length(counts: Float[Tensor, " L"]) -> float:
    total = float(counts.sum())
    return float(counts @ torch.arange(len(counts), dtype=counts.dtype)) / total if total else math.nan


def kolmogorov_smirnov(counts: Float[Tensor, " L"], others: Float[Tensor, " L"]) -> float:
    """Distance of two samples by their counts of each value: the greatest difference of their cumulative
    shares, from 0 to 1; NaN where one is empty."""
    if not counts.any() or not others.any():
        return math.nan
    shares = [each.cumsum(0) / each.sum() for each in (counts, others)]
    return float((shares[0] - shares[1]).abs().max())


_WORTH_SAYING = 0.05
"""Share of a step's time that another split must save to be named: less is within what measures vary by."""

_BUSY = 0.8
"""Share of the time that the busier side works, below which both wait for each other."""


@dataclass(frozen=True)
class Split:
    """Devices to train on and to sample on.

    gain: share of a step's time that is saved against the split that was measured.
    """

    num_train: int
    num_inference: int
    gain: float


def better_split(
    num_train: int, num_inference: int, trainer_idle: float, sampler_idle: float
) -> Split | None:
    """Find the split of the same devices with the shortest step; None where none saves 5 % at least.

    A side that works the share b of the time on n devices has b * n device-steps to do, and a step takes as
    long as the longer side: max(b_train * n_train / m_train, b_inference * n_inference / m_inference) with m
    devices. This takes work to divide among devices and batches to divide among ranks; with both the gain is
    an upper bound.

    trainer_idle, sampler_idle: shares of the time, 0 to 1.
    """
    devices = num_train + num_inference
    work = ((1 - trainer_idle) * num_train, (1 - sampler_idle) * num_inference)
    now = max(1 - trainer_idle, 1 - sampler_idle)
    if now <= 0 or not math.isfinite(now):
        return None
    # Of equal steps the split nearest to the present one.
    splits = sorted(range(1, devices), key=lambda trainers: abs(trainers - num_train))
    best = min(splits, key=lambda trainers: _step(work, trainers, devices - trainers))
    gain = 1 - _step(work, best, devices - best) / now
    return Split(best, devices - best, gain) if gain >= _WORTH_SAYING else None


def _step(work: tuple[float, float], trainers: int, samplers: int) -> float:
    return max(work[0] / trainers, work[1] / samplers)


def split_advice(
    num_train: int,
    num_inference: int,
    trainer_idle: float,
    sampler_idle: float,
    *,
    settings: tuple[str, str],
) -> str:
    """Say in a sentence which split of the devices would shorten the step, or where the next device belongs.

    trainer_idle, sampler_idle: shares of the time, 0 to 1.
    settings: that give the devices to train on and to sample on.
    """
    train, inference = settings
    if math.isnan(trainer_idle) or math.isnan(sampler_idle):
        return "no step was measured, so nothing is said of how devices are shared out"
    measured = f"the trainer was idle {trainer_idle:.0%} of the time, the samplers {sampler_idle:.0%}"
    present, busiest = f"{num_train} + {num_inference}", max(1 - trainer_idle, 1 - sampler_idle)
    better = better_split(num_train, num_inference, trainer_idle, sampler_idle)
    if better is not None:
        return (
            f"{measured}: `{train}={better.num_train} {inference}={better.num_inference}` would take up to "
            f"{better.gain:.0%} less time a step than {present}"
        )
    if busiest < _BUSY:
        return (
            f"{measured}: no other split than {present} helps, since both waited for each other; a larger "
            "`max_staleness`, or weights handed over less often, lets them overlap more"
        )
    best = f"{measured}: of {num_train + num_inference} devices the split {present} is best"
    work = ((1 - trainer_idle) * num_train, (1 - sampler_idle) * num_inference)
    saved = {
        f"{train}={num_train + 1}": 1 - _step(work, num_train + 1, num_inference) / busiest,
        f"{inference}={num_inference + 1}": 1 - _step(work, num_train, num_inference + 1) / busiest,
    }
    where = max(saved, key=lambda setting: saved[setting])
    if saved[where] < _WORTH_SAYING:
        return f"{best}, and one more on either side alone would save nothing"
    return f"{best}; with one more, `{where}` would save up to {saved[where]:.0%} of a step"
