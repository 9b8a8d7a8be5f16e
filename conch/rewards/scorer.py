"""Scores requested as completions end, and one answer to failures on which all ranks agree."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from conch.config import RewardConfig
from conch.errors import ConfigError, RewardError, RewardInvalidError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.base import ReportsStats, RewardSource, WantsChunks
from conch.rewards.metrics import ScorerMetrics
from conch.rewards.outage import Agree, Outage, OutageHooks
from conch.types import Metrics, Prompt, RewardResult, RewardStatus, Rollout, RolloutEngine

_log = get_logger(__name__)


def _alone(value: int) -> int:
    return value


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request to the source. places: of its rollouts in the results."""

    places: list[int]
    rollouts: list[Rollout]
    future: Future[list[RewardResult]]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Results of all ranks: failures of the infrastructure, failures of the data, and all there are."""

    away: int
    bad: int
    total: int

    @property
    def failed(self) -> int:
        return self.away + self.bad


class RewardScorer:
    """Sends rollouts to a reward source as they come and applies `config.failure` when they are collected.

    agree: sums over ranks. What is decided depends on agreed numbers only, so all ranks raise together or
        none does, and every rank calls `agree` equally often: no rank is left waiting in a collective.
    """

    def __init__(self, source: RewardSource, config: RewardConfig, agree: Agree = _alone) -> None:
        self._source = source
        self._config = config
        self._agree = agree
        self._pending: list[_Asked] = []
        self._submitted = 0
        self._host: OutageHooks | None = None
        self._metrics: Metrics = {}
        self._weights_fit = False
        self._meter = ScorerMetrics(source)

    def attach(self, host: OutageHooks) -> None:
        """From now on `host` notes all results, and saves and leaves during outages; on all ranks."""
        self._host = host

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Request the rewards of finished rollouts, which stand behind those submitted before; returns at
        once."""
        first = self._submitted
        self._submitted += len(rollouts)
        self._ask(dict(enumerate(rollouts, first)))

    def submit_each(
        self, sampler: RolloutEngine, prompts: Sequence[Prompt], *, greedy: bool = False
    ) -> list[Rollout]:
        """Sample a completion per prompt and request its reward as soon as it has ended, or together with its
        chunk where the source wants that.

        Returns all rollouts in the order of their prompts, which is that of `gather`.
        """
        if isinstance(self._source, WantsChunks) and self._source.wants_chunks:
            chunks = list(self._submit_chunks(sampler.generate(prompts, greedy=greedy)))
        else:
            first = self._submitted
            self._submitted += len(prompts)

            def ask(finished: Mapping[int, Rollout]) -> None:
                self._ask({first + place: rollout for place, rollout in finished.items()})

            chunks = list(sampler.generate(prompts, greedy=greedy, on_finished=ask))
        return [rollout for chunk in chunks for rollout in chunk]

    def gather(self) -> list[RewardResult]:
        """Results of all that was submitted since the last gather, in its order.

        With `drop`, and only then, failures may be among them.

        Raises:
            RewardUnavailableError, RewardInvalidError: on every rank, as `failure.policy` says.
            ConfigError: likewise, where `weights` names an objective that the reward does not have.
            SystemExit: on every rank, where a host was told to leave while the server was away.
        """
        rollouts, results = self._collect_pending()
        counts = self._count(results)
        if self._config.failure.policy == "wait":
            counts = self._outlast(rollouts, results, counts)
        if self._host is not None:
            self._host.scored(rollouts, results)
        self._metrics = self._meter.measure(results)
        self._check_model()
        if counts.failed > self._tolerated(counts.total):
            raise self._error(results, counts)
        self._check_weights(results)
        return results

    def metrics(self) -> Metrics:
        """This rank's figures of the last gather; see `ScorerMetrics.measure`."""
        return dict(self._metrics)

    def _submit_chunks(self, chunks: Iterable[list[Rollout]]) -> Iterator[list[Rollout]]:
        for chunk in chunks:
            self.submit(chunk)
            yield chunk

    def _ask(self, rollouts: dict[int, Rollout]) -> None:
        """rollouts: by their places in the results."""
        if rollouts:
            self._pending.append(
                _Asked(list(rollouts), list(rollouts.values()), self._send(rollouts.values()))
            )

    def _send(self, rollouts: Iterable[Rollout]) -> Future[list[RewardResult]]:
        try:
            future = self._source.submit(list(rollouts))
        except Exception as error:  # raised by `_collect` instead, where it becomes results
            future = Future()
            future.set_exception(error)
        self._meter.sent(future)
        return future

    def _collect_pending(self) -> tuple[list[Rollout], list[RewardResult]]:
        """What was asked, and what came of it, both in the order of places."""
        pending, self._pending, self._submitted = self._pending, [], 0
        found: dict[int, tuple[Rollout, RewardResult]] = {}
        for asked in pending:
            results = self._collect(asked.rollouts, asked.future)
            found |= zip(asked.places, zip(asked.rollouts, results, strict=True), strict=True)
        rows = [found[place] for place in sorted(found)]
        return [rollout for rollout, _ in rows], [result for _, result in rows]

    def _collect(self, chunk: list[Rollout], future: Future[list[RewardResult]]) -> list[RewardResult]:
        started = time.monotonic()
        try:
            results = future.result()
        except Exception as error:  # against the protocol; still, all ranks have to leave together
            _log.exception("reward %s broke", self._source.name)
            results = _all_invalid(
                chunk, f"reward {self._source.name} broke: {type(error).__name__}: {error}"
            )
        finally:
            self._meter.overlap.block(time.monotonic() - started)
        if len(results) != len(chunk):
            wrong = f"reward {self._source.name} gave {len(results)} results for {len(chunk)} samples"
            return _all_invalid(chunk, wrong)
        return results

    def _check_model(self) -> None:
        """With `on_model_change=raise` a changed model ends the run, however many failures are tolerated."""
        change = self._source.model_change if isinstance(self._source, ReportsStats) else ""
        if self._agree(int(change != "")):
            raise RewardInvalidError(change or "the reward model has changed, as other ranks say")

    def _check_weights(self, results: Sequence[RewardResult]) -> None:
        """What objectives there are shows with the first results, perhaps on some ranks only."""
        if self._weights_fit:
            return
        problem: ConfigError | None = None
        try:
            for result in results:
                if result.ok and result.token_scores is None:
                    combine(result, self._config.weights)
        except ConfigError as error:
            problem = error
        if self._agree(int(problem is not None)):
            raise problem or ConfigError("reward.weights does not fit the reward, as other ranks say")
        self._weights_fit = True

    def _count(self, results: Sequence[RewardResult]) -> _Counts:
        away = sum(result.status.is_infrastructure for result in results)
        bad = sum(not result.ok for result in results) - away
        return _Counts(self._agree(away), self._agree(bad), self._agree(len(results)))

    def _tolerated(self, total: int) -> float:
        return self._config.failure.max_fraction * total if self._config.failure.policy == "drop" else 0.0

    def _outlast(self, rollouts: Sequence[Rollout], results: list[RewardResult], counts: _Counts) -> _Counts:
        """Ask again, in lock step on all ranks, until the server is back, data is bad or the budget spent."""
        if counts.away == 0 or counts.bad > 0:
            return counts
        outage = Outage(self._source.name, self._config.failure, self._agree, self._meter.overlap, self._host)
        while counts.away > 0 and counts.bad == 0 and outage.goes_on():
            self._ask_again(rollouts, results, outage)
            counts = self._count(results)
        if counts.failed == 0:
            outage.is_over()
        return counts

    def _ask_again(self, rollouts: Sequence[Rollout], results: list[RewardResult], outage: Outage) -> None:
        missing = [index for index, result in enumerate(results) if result.status.is_infrastructure]
        chunk = [rollouts[index] for index in missing]
        future = self._send(chunk) if chunk else None
        outage.wait_for(future)
        if future is not None:
            for index, result in zip(missing, self._collect(chunk, future), strict=True):
                results[index] = result

    def _error(self, results: Sequence[RewardResult], counts: _Counts) -> RewardError:
        # Bad data anywhere decides the kind: asking again would not help.
        kind = RewardInvalidError if counts.bad else RewardUnavailableError
        own = [result for result in results if not result.ok]
        summary = f"{counts.failed} of {counts.total} samples got no reward"
        if self._config.failure.policy == "drop":
            summary += f", more than reward.failure.max_fraction={self._config.failure.max_fraction:g} allows"
        if not own:
            return kind(f"{summary}; all of them on other ranks, whose messages say why")
        worst = next((result for result in own if not result.status.is_infrastructure), own[0])
        return kind(
            f"{summary}, {len(own)} of them on this rank; first: {worst.detail} ({worst.status.value})"
        )


def combine(result: RewardResult, weights: Mapping[str, float]) -> float:
    """The weighted sum of a scalar result's objectives; objectives without a weight weigh 1.

    Raises:
        ConfigError: `weights` names an objective that the reward does not have.
    """
    assert result.ok and result.token_scores is None, "only a scalar score can be combined"
    unknown = sorted(set(weights) - set(result.scores))
    if unknown:
        has = ", ".join(f"`{name}`" for name in result.scores)
        raise ConfigError(
            f"reward.weights names `{unknown[0]}`, but the objectives of {result.model} are {has}"
        )
    return sum(weights.get(name, 1.0) * score for name, score in result.scores.items())


def _all_invalid(chunk: Sequence[Rollout], detail: str) -> list[RewardResult]:
    return [RewardResult(RewardStatus.INVALID, detail=detail)] * len(chunk)


def total_reward(result: RewardResult, weights: Mapping[str, float]) -> float:
    """A sample's reward as one number: the weighted sum of its objectives, or the sum over its tokens.

    NaN where the reward failed.
    """
    if not result.ok:
        return math.nan
    if result.token_scores is not None:
        return float(sum(result.token_scores))
    return combine(result, weights)
