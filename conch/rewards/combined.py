"""Sources that stand on other sources.

Several as one: an ensemble's objective over their scores, or all their objectives side by side.

Coste et al. 2023 (arXiv:2310.02743) has the objectives of ensembles, which are those of a served one as well
(docs/ensembles.md):

    mean    mean(s)
    wco     min(s)                                          worst-case optimisation
    uwo     mean(s) - uwo_weight * sum (s_i - mean)^2 / k   uncertainty-weighted optimisation

The reward of a sample relative to a reference answer: score(prompt + output) - score(prompt + original).

What is left is what the policy does better than the answer it is compared with; how easy a prompt is cancels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from statistics import fmean
from types import TracebackType
from typing import Any, TypeVar

from conch.errors import ConchError, DataError, RewardInvalidError
from conch.log import get_logger
from conch.rewards.base import (
    ClientStats,
    CountsTraffic,
    ReportsStats,
    RewardSource,
    ServerTimes,
    WantsChunks,
)
from conch.triton.contract import Objective, OnMemberFailure
from conch.types import DEFAULT_OBJECTIVE, Completion, Prompt, RewardResult, RewardStatus, Rollout

MadeT = TypeVar("MadeT")
WrapperT = TypeVar("WrapperT", bound="CompositeReward")


class CompositeReward:
    """Checks, closes and counts for all of `sources`; `submit` is its heirs' own.

    name: as `RewardSource.name`.
    """

    def __init__(self, name: str, sources: Sequence[RewardSource]) -> None:
        self.name = name
        self.sources = tuple(sources)
        self.wants_chunks = any(isinstance(each, WantsChunks) and each.wants_chunks for each in sources)

    @property
    def requests(self) -> int:
        """Requests sent so far, retries among them."""
        return sum(each.requests for each in self.sources if isinstance(each, CountsTraffic))

    @property
    def retries(self) -> int:
        """Those of them that repeated an earlier one."""
        return sum(each.retries for each in self.sources if isinstance(each, CountsTraffic))

    @property
    def model_change(self) -> str:
        """The first change of a model among the sources; see `ReportsStats.model_change`."""
        changes = (each.model_change for each in self.sources if isinstance(each, ReportsStats))
        return next((change for change in changes if change), "")

    def traffic(self) -> ClientStats:
        """Sums over the sources; `most_in_flight` is no more than the sum."""
        found = [each.traffic() for each in self.sources if isinstance(each, ReportsStats)]
        reasons = {reason for each in found for reason in each.retries_by}
        return ClientStats(
            requests=self.requests,
            retries=self.retries,
            retries_by={name: sum(each.retries_by.get(name, 0) for each in found) for name in reasons},
            deduplicated=sum(each.deduplicated for each in found),
            replica_faults=sum(each.replica_faults for each in found),
            most_in_flight=sum(each.most_in_flight for each in found),
        )

    def server_times(self) -> Future[ServerTimes]:
        """Sums over the sources; see `ReportsStats.server_times`."""
        futures = [each.server_times() for each in self.sources if isinstance(each, ReportsStats)]

        def total() -> ServerTimes:
            found = [future.result() for future in futures]
            return ServerTimes(
                sum(each.requests for each in found),
                sum(each.queue_s for each in found),
                sum(each.compute_s for each in found),
            )

        return when_all_done(futures, total)

    def check(self) -> None:
        """See `RewardSource.check`: each source in turn."""
        for source in self.sources:
            source.check()

    def close(self) -> None:
        """See `RewardSource.close`."""
        for source in self.sources:
            source.close()

    def __enter__(self: WrapperT) -> WrapperT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def when_all_done(futures: Sequence[Future[Any]], make: Callable[[], MadeT]) -> Future[MadeT]:
    """A future of `make()`, called once all of `futures` are done, by whoever finishes last. The same future
    may be given more than once."""
    distinct: Mapping[int, Future[Any]] = {id(future): future for future in futures}
    made: Future[MadeT] = Future()
    lock, left = threading.Lock(), [len(distinct)]

    def finish() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # a source that broke: whoever waits must hear of it
            made.set_exception(error)

    def count(_done: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            is_last = left[0] == 0
        if is_last:
            finish()

    for future in distinct.values():
        future.add_done_callback(count)
    if not distinct:
        finish()
    return made


_log = get_logger(__name__)


_Row = Mapping[str, RewardResult]
"""What each member said of one sample."""


class _Members(CompositeReward):
    """Named sources that score the same samples."""

    def __init__(self, what: str, members: Mapping[str, RewardSource]) -> None:
        super().__init__(f"{what} of {', '.join(members)}", list(members.values()))
        self.members = dict(members)

    def check(self) -> None:
        """See `RewardSource.check`; the message names the member."""
        for name, source in self.members.items():
            try:
                source.check()
            except ConchError as error:
                raise type(error)(f"reward member `{name}`: {error}") from error

    def submit_rows(
        self, rollouts: Sequence[Rollout], make: Callable[[_Row], RewardResult]
    ) -> Future[list[RewardResult]]:
        """All members are asked at once; `make` turns what they say of a sample into its result."""
        asked = {name: source.submit(rollouts) for name, source in self.members.items()}

        def results() -> list[RewardResult]:
            columns = {name: future.result() for name, future in asked.items()}
            for name, column in columns.items():
                if len(column) != len(rollouts):
                    wrong = f"{len(column)} results for {len(rollouts)} samples"
                    raise RewardInvalidError(f"reward member `{name}` gave {wrong}")
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            return [make(row) for row in rows]

        return when_all_done(list(asked.values()), results)

    def result(
        self, row: _Row, scores: Mapping[str, float], detail: str, members: Mapping[str, float | None]
    ) -> RewardResult:
        """A sample's score, with the slowest member's latency and all their versions."""
        return RewardResult(
            RewardStatus.OK,
            scores=scores,
            model=self.name,
            version=",".join(each.version for each in row.values()),
            latency_s=max(each.latency_s for each in row.values()),
            detail=detail,
            members=members,
        )

    def failure(self, row: _Row, status: RewardStatus, detail: str) -> RewardResult:
        """A sample that gets no score."""
        latency_s = max(each.latency_s for each in row.values())
        return RewardResult(status, model=self.name, latency_s=latency_s, detail=detail)

    def failure_of_members(self, row: _Row) -> RewardResult:
        """The failure that decides: bad data before infrastructure, since asking again does not cure it."""
        failed = {name: each for name, each in row.items() if not each.ok}
        name, worst = min(failed.items(), key=lambda pair: pair[1].status.is_infrastructure)
        return self.failure(row, worst.status, f"member `{name}` gave no score: {worst.detail}")


class EnsembleReward(_Members):
    """The objective over its members' scores; each result holds every member's own.

    on_member_failure: `fail` gives a sample the failure of the member that did not score it; `renormalise`
        takes the objective over the others and says in `detail` how many there were.
    """

    def __init__(
        self,
        members: Mapping[str, RewardSource],
        objective: Objective,
        *,
        uwo_weight: float = 0.1,
        on_member_failure: OnMemberFailure = "fail",
    ) -> None:
        assert members, "an ensemble has members"
        super().__init__(f"the {objective}", members)
        self._objective = objective
        self._uwo_weight = uwo_weight
        self._on_member_failure = on_member_failure
        self._fewest = len(members)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """See `RewardSource.submit`."""
        return self.submit_rows(rollouts, self._combine)

    def _combine(self, row: _Row) -> RewardResult:
        given = {name: each for name, each in row.items() if each.ok}
        if not given or (len(given) < len(row) and self._on_member_failure == "fail"):
            return self.failure_of_members(row)
        objectives = {tuple(_single(each.scores)) for each in given.values()}
        if len(objectives) > 1 or objectives == {()}:
            wrong = "the members of an ensemble need one score per sample each, or the same objectives"
            return self.failure(row, RewardStatus.INVALID, wrong)
        names = objectives.pop()
        columns = {name: _single(each.scores) for name, each in given.items()}
        scores = {name: self._over([column[name] for column in columns.values()]) for name in names}
        own = {
            (member if len(names) == 1 else f"{member}/{name}"): columns.get(member, {}).get(name)
            for member in row
            for name in names
        }
        return self.result(row, scores, self._note(row, given), own)

    def _over(self, scores: Sequence[float]) -> float:
        if self._objective == "wco":
            return min(scores)
        mean = fmean(scores)
        if self._objective == "mean":
            return mean
        return mean - self._uwo_weight * fmean((score - mean) ** 2 for score in scores)

    def _note(self, row: _Row, given: _Row) -> str:
        """How many members scored a sample, where not all did; a log line as often as there are fewer."""
        if len(given) == len(row):
            return ""
        missing = next(name for name in row if name not in given)
        note = f"scored by {len(given)} of {len(row)} members"
        if len(given) < self._fewest:
            _log.warning("%s: samples are %s; `%s`: %s", self.name, note, missing, row[missing].detail)
        self._fewest = min(self._fewest, len(given))
        return note


class SumReward(_Members):
    """All objectives of its members side by side, to be summed with `reward.weights`.

    An objective is called like its member, or `member/objective` where the member has several. A sample that
    a member does not score gets no score at all: a sum without one of its parts is another reward.
    """

    def __init__(self, members: Mapping[str, RewardSource]) -> None:
        assert members, "a sum has members"
        super().__init__("the sum", members)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """See `RewardSource.submit`."""
        return self.submit_rows(rollouts, self._join)

    def _join(self, row: _Row) -> RewardResult:
        if not all(each.ok for each in row.values()):
            return self.failure_of_members(row)
        scores: dict[str, float] = {}
        for member, each in row.items():
            if not each.scores:
                wrong = f"member `{member}` scores each token, which cannot stand beside other rewards"
                return self.failure(row, RewardStatus.INVALID, wrong)
            many = len(each.scores) > 1
            scores |= {f"{member}/{name}" if many else member: score for name, score in each.scores.items()}
        notes = [f"`{member}` {each.detail}" for member, each in row.items() if each.detail]
        inner = {
            f"{member}/{name}": score for member, each in row.items() for name, score in each.members.items()
        }
        return self.result(row, scores, ", ".join(notes), inner)


def _single(scores: Mapping[str, float]) -> Mapping[str, float]:
    """A single objective may be called differently by each member."""
    return {DEFAULT_OBJECTIVE: next(iter(scores.values()))} if len(scores) == 1 else scores


ORIGINAL = "original_output"

_Request = tuple[Future[list[RewardResult]], int]
"""A request for baselines, and a baseline's place in it."""


class DeltaReward(CompositeReward):
    """Wraps a source; each prompt's `original_output` is scored once and remembered.

    encode: tokenises an original answer, for servers that read token ids.

    A baseline that failed fails the samples of its prompt with its own status, and is asked for again with
    the next of them.
    """

    def __init__(self, source: RewardSource, encode: Callable[[str], Sequence[int]]) -> None:
        super().__init__(f"{source.name} less the original's", [source])
        self._source = source
        self._encode = encode
        self._baselines: dict[tuple[str, str], _Request] = {}

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """See `RewardSource.submit`; scores are differences."""
        scored = self._source.submit(rollouts)
        self._ask_for_missing(rollouts)
        baselines = [self._baselines[_key(rollout.prompt)] for rollout in rollouts]
        return when_all_done(
            [scored, *(request for request, _ in baselines)],
            lambda: [
                _difference(result, request.result()[place])
                for result, (request, place) in zip(scored.result(), baselines, strict=True)
            ],
        )

    def _ask_for_missing(self, rollouts: Sequence[Rollout]) -> None:
        missing = {
            _key(rollout.prompt): self._original(rollout.prompt)
            for rollout in rollouts
            if not self._is_known(_key(rollout.prompt))
        }
        if not missing:
            return
        request = self._source.submit(list(missing.values()))
        for place, key in enumerate(missing):
            self._baselines[key] = (request, place)

    def _is_known(self, key: tuple[str, str]) -> bool:
        """True where a baseline is had or under way."""
        if key not in self._baselines:
            return False
        request, place = self._baselines[key]
        if not request.done():
            return True
        return request.exception() is None and request.result()[place].ok

    def _original(self, prompt: Prompt) -> Rollout:
        text = str(prompt.metadata[ORIGINAL])
        ids = tuple(self._encode(text))
        return Rollout(prompt, Completion(text, ids, (0.0,) * len(ids), "eos"), policy_version=0)


def check_originals(prompts: Sequence[str | Mapping[str, Any]]) -> None:
    """Refuse prompts without a reference answer.

    Raises:
        DataError: names the first.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Mapping) or not isinstance(prompt.get(ORIGINAL), str):
            raise DataError(
                f"`reward.delta` compares with a reference answer, and prompt {index} has none: give each "
                f'prompt as a dict with "prompt" and "{ORIGINAL}"'
            )


def _key(prompt: Prompt) -> tuple[str, str]:
    return prompt.text, str(prompt.metadata[ORIGINAL])


def _difference(result: RewardResult, baseline: RewardResult) -> RewardResult:
    if not result.ok:
        return result
    if not baseline.ok:
        return replace(result, status=baseline.status, scores={}, detail=f"its baseline: {baseline.detail}")
    if result.token_scores is not None or result.scores.keys() != baseline.scores.keys():
        wrong = "`reward.delta` needs one score per objective, the same for a sample and for its original"
        return replace(result, status=RewardStatus.INVALID, scores={}, token_scores=None, detail=wrong)
    scores = {name: score - baseline.scores[name] for name, score in result.scores.items()}
    members = {
        name: None if score is None or (base := baseline.members.get(name)) is None else score - base
        for name, score in result.members.items()
    }
    return replace(result, scores=scores, members=members, detail=result.detail or baseline.detail)
