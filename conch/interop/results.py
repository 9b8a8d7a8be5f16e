"""Results of a reward as the numbers that other trainers take, and a count of those that there are not."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from conch.errors import ConfigError, RewardError, RewardInvalidError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.results import token_scores_fault
from conch.rewards.scorer import combine
from conch.types import RewardResult

_log = get_logger(__name__)


class Tally:
    """How many samples were scored and how many failed, with a warning each time that the failures double.

    name: of the reward, in messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._warn_at = 1
        self.samples = 0
        self.failed = 0

    def count(self, results: Sequence[RewardResult]) -> None:
        """Count the results of one call."""
        failures = [result for result in results if is_failure(result)]
        with self._lock:
            self.samples += len(results)
            self.failed += len(failures)
            samples, failed, warns = self.samples, self.failed, self.failed >= self._warn_at and failures
            if warns:
                self._warn_at = 2 * failed
        if warns:
            _log.warning(
                "reward %s: %d of %d samples have no reward so far; the last: %s (%s)",
                *(self._name, failed, samples, failures[-1].detail, failures[-1].status.value),
            )


def is_failure(result: RewardResult) -> bool:
    """Whether a sample should have a reward and has none; None of a function means that none applies."""
    return not result.ok and not result.absent


def reward_of(result: RewardResult, weights: Mapping[str, float], objective: str | None) -> float | None:
    """Return a sample's reward: one objective, or their weighted sum; None where there is none.

    Raises:
        ConfigError: there is no such objective, or `weights` names one that there is not; or the reward gives
            scores for tokens.
    """
    if not result.ok:
        return None
    if fault := token_scores_fault(result):
        raise ConfigError(fault)
    if objective is None:
        return combine(result, weights)
    if objective not in result.scores and objective not in result.absent:
        known = ", ".join(f"`{name}`" for name in sorted({*result.scores, *result.absent}))
        raise ConfigError(f"`objective` = {objective}, but the objectives of {result.model} are {known}")
    return result.scores.get(objective)


def error_of(name: str, results: Sequence[RewardResult], remedy: str = "") -> RewardError:
    """Return what to raise for results of which some failed.

    name: of the reward.
    remedy: what is to be done about it.
    """
    failures = [result for result in results if is_failure(result)]
    bad = [result for result in failures if not result.status.is_infrastructure]
    worst = (bad or failures)[0]
    kind = RewardInvalidError if bad else RewardUnavailableError
    return kind(
        f"reward {name}: {len(failures)} of {len(results)} samples got no reward; first: {worst.detail} "
        f"({worst.status.value}){remedy}"
    )
