"""Several sources as one: an ensemble's objective over their scores, or all their objectives side by side.

Coste et al. 2023 (arXiv:2310.02743) has the objectives of ensembles, which are those of a served one as well
(docs/ensembles.md):

    mean    mean(s)
    wco     min(s)                                          worst-case optimisation
    uwo     mean(s) - uwo_weight * sum (s_i - mean)^2 / k   uncertainty-weighted optimisation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from statistics import fmean
from typing import Literal

from conch.errors import ConchError, RewardInvalidError
from conch.log import get_logger
from conch.rewards.source import RewardSource
from conch.rewards.wrapper import Wrapper, when_all_done
from conch.types import DEFAULT_OBJECTIVE, RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)

Objective = Literal["mean", "wco", "uwo"]
OnMemberFailure = Literal["fail", "renormalise"]

_Row = Mapping[str, RewardResult]
"""What each member said of one sample."""


class _Members(Wrapper):
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


class JointReward(_Members):
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
