"""Scores requested as completions end, and one response to failures on which all ranks agree."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass

from conch.config import RewardConfig
from conch.errors import ConfigError, RewardError, RewardInvalidError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.base import ClientStats, RewardSource
from conch.rewards.combined import when_all_done
from conch.rewards.metrics import ScorerMetrics
from conch.rewards.outage import AllReduceInt, Outage, OutageHooks
from conch.types import Metrics, Prompt, RewardResult, RewardStatus, Rollout, RolloutEngine

_log = get_logger(__name__)


def _single_rank(value: int) -> int:
    return value


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """Rewards that were asked for ahead of the gather that they belong to: see `RewardScorer.request`."""

    rollouts: list[Rollout]
    future: Future[list[RewardResult]]


@dataclass(frozen=True, slots=True)
class _Submission:
    """One request to the source.

    positions: of its rollouts among the results of `gather`.
    """

    positions: list[int]
    rollouts: list[Rollout]
    future: Future[list[RewardResult]]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Results of all ranks.

    away: failures of the infrastructure.
    bad: failures of the data.
    total: all results.
    """

    away: int
    bad: int
    total: int

    @property
    def failed(self) -> int:
        return self.away + self.bad


class RewardScorer:
    """Submits rollouts to a reward source as they end, and applies `config.failure` when it gathers results.

    all_reduce: sums over ranks. Decisions depend on summed numbers only, so all ranks raise together or none
        does, and every rank calls `all_reduce` equally often: no rank is left waiting in a collective.
    """

    def __init__(
        self, source: RewardSource, config: RewardConfig, all_reduce: AllReduceInt = _single_rank
    ) -> None:
        self._source = source
        self._config = config
        self._all_reduce = all_reduce
        self._pending: list[_Submission] = []
        self._submitted = 0
        self._hooks: OutageHooks | None = None
        self._metrics: Metrics = {}
        self._weights_fit = False
        self._meter = ScorerMetrics(source)

    @property
    def source(self) -> RewardSource:
        """What gives the rewards."""
        return self._source

    @property
    def source_name(self) -> str:
        """What gives the rewards, as messages name it."""
        return self._source.name

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the reward's objectives."""
        return self._config.weights

    @property
    def measures_facts(self) -> bool:
        """Whether results hold facts."""
        return self._source.measures_facts

    def attach(self, hooks: OutageHooks) -> None:
        """Tell `hooks` all results from now on, and let it save and leave during outages; on all ranks."""
        self._hooks = hooks

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Request the rewards of finished rollouts and return at once.

        Their results stand behind those of rollouts submitted before.
        """
        first = self._submitted
        self._submitted += len(rollouts)
        self._submit_at(dict(enumerate(rollouts, first)))

    def submit_each(
        self,
        sampler: RolloutEngine,
        prompts: Sequence[Prompt],
        *,
        greedy: bool = False,
        group_size: int = 1,
    ) -> list[Rollout]:
        """Sample a completion per prompt and request its reward as soon as it has ended, or together with its
        chunk if the source is `batched`, or with its group if it wants groups.

        group_size: how often each prompt stands in `prompts`, one time behind the other.

        Returns all rollouts in the order of their prompts, which is that of `gather`.
        """
        if self._source.needs_groups:
            assert len(prompts) % group_size == 0, "groups are whole"
            first = self._submitted
            self._submitted += len(prompts)
            groups = _EndingGroups(group_size, in_order=self._source.batched)

            def submit_groups(finished: Mapping[int, Rollout]) -> None:
                for number, group in groups.ended(finished):
                    self._submit_at(dict(enumerate(group, first + number * group_size)))

            chunks = list(sampler.generate(prompts, greedy=greedy, on_finished=submit_groups))
        elif self._source.batched:
            chunks = list(self._submit_chunks(sampler.generate(prompts, greedy=greedy)))
        else:
            first = self._submitted
            self._submitted += len(prompts)

            def submit_finished(finished: Mapping[int, Rollout]) -> None:
                self._submit_at({first + index: rollout for index, rollout in finished.items()})

            chunks = list(sampler.generate(prompts, greedy=greedy, on_finished=submit_finished))
        return [rollout for chunk in chunks for rollout in chunk]

    @property
    def batched(self) -> bool:
        """Whether what is scored together matters; see `RewardSource.batched`."""
        return self._source.batched

    @property
    def needs_groups(self) -> bool:
        """Whether the source scores whole groups; see `RewardSource.needs_groups`."""
        return self._source.needs_groups

    def request(self, rollouts: Sequence[Rollout]) -> RewardRequest:
        """Request the rewards of finished rollouts ahead of the step that learns from them; from any thread.

        rollouts: of a source that wants groups, one of them.

        No `gather` speaks of them before `adopt` was called.
        """
        return RewardRequest([*rollouts], self._submit_to_source([*rollouts]))

    def adopt(self, requests: Iterable[tuple[Sequence[int], RewardRequest]]) -> None:
        """Have the next `gather` wait for requests that were made ahead.

        requests: each behind the positions of its rollouts among what is adopted here, which stands behind
            what was submitted before.
        """
        first = self._submitted
        for positions, request in requests:
            self._submitted += len(positions)
            placed = [first + position for position in positions]
            self._pending.append(_Submission(placed, request.rollouts, request.future))

    def wait(self, timeout_s: float) -> bool:
        """Wait so many seconds for the first results of all that was submitted since the last gather.

        Returns whether they are there, on this rank: `gather` then waits for nothing but an outage.
        """
        started = time.monotonic()
        _, missing = wait_for_futures([submission.future for submission in self._pending], timeout_s)
        self._meter.overlap.block(time.monotonic() - started)
        return not missing

    def gather(self) -> list[RewardResult]:
        """Wait for the results of all that was submitted since the last gather, in its order.

        With the policy `drop`, and only then, failures may be among them.

        Raises:
            RewardUnavailableError, RewardInvalidError: on every rank, as `failure.policy` says.
            ConfigError: likewise, where `weights` names an objective that the reward does not have.
            SystemExit: on every rank, where a hook was told to leave while the server was away.
        """
        rollouts, results, groups = self._collect_pending()
        counts = self._count(results)
        if self._config.failure.policy == "wait":
            counts = self._wait_out_outage(rollouts, results, groups, counts)
        if self._hooks is not None:
            self._hooks.scored(rollouts, results)
        stats = self._meter.stats()
        self._metrics = self._meter.measure(results, stats)
        self._check_model(stats)
        if counts.failed > self._most_failures(counts.total):
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

    def _submit_at(self, rollouts: dict[int, Rollout]) -> None:
        """rollouts: by their positions in the results."""
        if rollouts:
            future = self._submit_to_source(list(rollouts.values()))
            self._pending.append(_Submission(list(rollouts), list(rollouts.values()), future))

    def _submit_to_source(self, rollouts: list[Rollout]) -> Future[list[RewardResult]]:
        try:
            future = self._source.submit(rollouts)
        except Exception as error:  # raised by `_wait_for_results` instead, where it becomes results
            future = Future()
            future.set_exception(error)
        self._meter.record_submit(future)
        return future

    def _collect_pending(self) -> tuple[list[Rollout], list[RewardResult], list[list[int]]]:
        """All submitted rollouts and their results, both in the order of positions; and the indices of those
        that were submitted together."""
        pending, self._pending, self._submitted = self._pending, [], 0
        rows: dict[int, tuple[Rollout, RewardResult]] = {}
        for submission in pending:
            results = self._wait_for_results(submission.rollouts, submission.future)
            rows |= zip(submission.positions, zip(submission.rollouts, results, strict=True), strict=True)
        index_of = {position: index for index, position in enumerate(sorted(rows))}
        ordered = [rows[position] for position in index_of]
        together = [[index_of[position] for position in each.positions] for each in pending]
        return [rollout for rollout, _ in ordered], [result for _, result in ordered], together

    def _wait_for_results(
        self, rollouts: list[Rollout], future: Future[list[RewardResult]]
    ) -> list[RewardResult]:
        name, started = self._source.name, time.monotonic()
        try:
            results = future.result()
        except Exception as error:  # against the protocol; still, all ranks have to leave together
            _log.exception("reward %s broke", name)
            return _all_invalid(rollouts, f"reward {name} broke: {type(error).__name__}: {error}")
        finally:
            self._meter.overlap.block(time.monotonic() - started)
        if len(results) != len(rollouts):
            return _all_invalid(
                rollouts, f"reward {name} gave {len(results)} results for {len(rollouts)} samples"
            )
        return results

    def _check_model(self, stats: ClientStats) -> None:
        """With `on_model_change=raise` a changed model ends the run, however many failures are tolerated."""
        change = stats.model_change
        if self._all_reduce(int(change != "")):
            raise RewardInvalidError(change or "the reward model has changed, as other ranks say")

    def _check_weights(self, results: Sequence[RewardResult]) -> None:
        """Which objectives there are shows with the first results, perhaps on some ranks only."""
        if self._weights_fit:
            return
        problem: ConfigError | None = None
        try:
            for result in results:
                if result.ok and result.token_scores is None:
                    combine(result, self._config.weights)
        except ConfigError as error:
            problem = error
        if self._all_reduce(int(problem is not None)):
            raise problem or ConfigError("reward.weights does not fit the reward, as other ranks say")
        self._weights_fit = True

    def _count(self, results: Sequence[RewardResult]) -> _Counts:
        away = sum(result.status.is_infrastructure for result in results)
        bad = sum(not result.ok for result in results) - away
        return _Counts(self._all_reduce(away), self._all_reduce(bad), self._all_reduce(len(results)))

    def _most_failures(self, total: int) -> float:
        failure = self._config.failure
        return failure.max_fraction * total if failure.policy == "drop" else 0.0

    def _wait_out_outage(
        self,
        rollouts: Sequence[Rollout],
        results: list[RewardResult],
        together: Sequence[Sequence[int]],
        counts: _Counts,
    ) -> _Counts:
        """Submit again, in lock step on all ranks, until the server is back, data is bad or the budget spent.

        results: gets the new results in place of the failures.
        together: indices of what was submitted together, which a source that wants groups gets so again.
        """
        if counts.away == 0 or counts.bad > 0:
            return counts
        outage = Outage(
            self._source.name, self._config.failure, self._all_reduce, self._meter.overlap, self._hooks
        )
        while counts.away > 0 and counts.bad == 0 and outage.pause():
            failed = [index for index, result in enumerate(results) if result.status.is_infrastructure]
            parts = [failed] if failed else []
            if self._source.needs_groups:
                parts = [[*group] for group in together if not set(group).isdisjoint(failed)]
            requests = [(part, [rollouts[index] for index in part]) for part in parts]
            futures = [self._submit_to_source(missing) for _, missing in requests]
            outage.wait_for(when_all_done(futures, lambda: None) if futures else None)
            for (part, missing), future in zip(requests, futures, strict=True):
                for index, result in zip(part, self._wait_for_results(missing, future), strict=True):
                    results[index] = result
            counts = self._count(results)
        if counts.failed == 0:
            outage.log_end()
        return counts

    def _error(self, results: Sequence[RewardResult], counts: _Counts) -> RewardError:
        # Bad data anywhere decides the kind: asking again would not help.
        kind = RewardInvalidError if counts.bad else RewardUnavailableError
        own = [result for result in results if not result.ok]
        summary = f"{counts.failed} of {counts.total} samples got no reward"
        failure = self._config.failure
        if failure.policy == "drop":
            summary += f", more than reward.failure.max_fraction={failure.max_fraction:g} allows"
        if not own:
            return kind(f"{summary}; all of them on other ranks, whose messages say why")
        worst = next((result for result in own if not result.status.is_infrastructure), own[0])
        # Whoever gives None for a sample without a score means this; a function that fails is to be mended.
        remedy = ""
        if counts.failed == counts.total and worst.absent:
            remedy = (
                "; None says that a sample has no score, and here none has one: return a number for each "
                "sample that has"
            )
        elif failure.policy == "raise" and counts.failed < counts.total:
            remedy = "; reward.failure.policy=drop goes on without such samples"
        reason = f"first: {worst.detail} ({worst.status.value}){remedy}"
        return kind(f"{summary}, {len(own)} of them on this rank; {reason}")


class _EndingGroups:
    """Completions that end one by one, until their groups are whole.

    in_order: a group waits for those before it, for sources of which the order of calls matters.
    """

    def __init__(self, size: int, *, in_order: bool) -> None:
        self._size = size
        self._in_order = in_order
        self._parts: dict[int, dict[int, Rollout]] = {}
        self._next = 0

    def ended(self, finished: Mapping[int, Rollout]) -> list[tuple[int, list[Rollout]]]:
        """Take in completions by their places; returns the groups that are to be scored now, by number."""
        for index, rollout in finished.items():
            self._parts.setdefault(index // self._size, {})[index] = rollout
        whole = sorted(number for number, part in self._parts.items() if len(part) == self._size)
        if self._in_order:
            whole = [number for ahead, number in enumerate(whole) if number == self._next + ahead]
            self._next += len(whole)
        groups = [(number, self._parts.pop(number)) for number in whole]
        return [(number, [part[index] for index in sorted(part)]) for number, part in groups]


def combine(result: RewardResult, weights: Mapping[str, float]) -> float:
    """Return the weighted sum of a scalar result's objectives; see `weight_of`.

    What does not apply to the sample adds nothing.

    Raises:
        ConfigError: `weights` names an objective that the reward does not have.
    """
    assert result.ok and result.token_scores is None, "only a scalar score can be combined"
    known = {*result.scores, *result.absent}
    unknown = sorted(set(weights) - known - {name.partition("/")[0] for name in known})
    if unknown:
        objectives = ", ".join(f"`{name}`" for name in sorted(known))
        raise ConfigError(
            f"reward.weights names `{unknown[0]}`, but the objectives of {result.model} are {objectives}"
        )
    return sum(weight_of(name, weights) * score for name, score in result.scores.items())


def weight_of(objective: str, weights: Mapping[str, float]) -> float:
    """Return the weight of an objective: its own, of `member/objective` else that of its member, else 1."""
    return weights.get(objective, weights.get(objective.partition("/")[0], 1.0))


def total_reward(result: RewardResult, weights: Mapping[str, float]) -> float:
    """Return a sample's reward as one number: the weighted sum of its objectives, or the sum over its tokens.

    NaN where the reward failed.
    """
    if not result.ok:
        return math.nan
    if result.token_scores is not None:
        return float(sum(result.token_scores))
    return combine(result, weights)


def _all_invalid(rollouts: Sequence[Rollout], detail: str) -> list[RewardResult]:
    return [RewardResult(RewardStatus.INVALID, detail=detail)] * len(rollouts)
