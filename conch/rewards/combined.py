"""Sources that stand on other sources.

Several as one: an ensemble's objective over their scores, or all their objectives side by side.

Coste et al. 2023 (arXiv:2310.02743) has the objectives of ensembles, which are those of a served one as well
(docs/ensembles.md):

    mean    mean(s)
    wco     min(s)                                          worst-case optimisation
    uwo     mean(s) - uwo_weight * sum (s_i - mean)^2 / k   uncertainty-weighted optimisation

With `variance=sample` the sum is divided by k - 1 instead, and the variance of a single score is 0.

The reward of a sample relative to a reference answer: score(prompt + output) - score(prompt + original).

What is left is what the policy does better than the answer it is compared with; how easy a prompt is cancels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from conch.config import EnsembleObjective, EnsembleVariance, OnMemberFailure
from conch.errors import ConchError, ConfigError, DataError, RewardInvalidError
from conch.log import get_logger
from conch.rewards.base import ClientStats, RewardSource, ServerTimes
from conch.types import DEFAULT_OBJECTIVE, Completion, Metrics, Prompt, RewardResult, RewardStatus, Rollout

ResultT = TypeVar("ResultT")

ORIGINAL = "original_output"

_log = get_logger(__name__)

_MemberResults = Mapping[str, RewardResult]
"""Member -> its result for one sample."""


class CompositeReward(RewardSource):
    """Checks and closes all of `sources` and sums their counts; a subclass adds `submit`.

    name: as in `RewardSource`.
    """

    def __init__(self, name: str, sources: Sequence[RewardSource]) -> None:
        self.name = name
        self.sources = tuple(sources)
        self.batched = any(source.batched for source in sources)
        self.measures_facts = any(source.measures_facts for source in sources)
        self.needs_groups = any(source.needs_groups for source in sources)
        self.deadline_s = max(
            (source.deadline_s for source in sources if source.deadline_s is not None), default=None
        )

    @property
    def digest(self) -> str:
        return " ".join(source.digest for source in self.sources if source.digest)

    def check(self) -> None:
        """Check each source in turn."""
        for source in self.sources:
            source.check()

    def is_ready(self) -> bool:
        return all(source.is_ready() for source in self.sources)

    def check_row(self, row: Mapping[str, Any]) -> None:
        for source in self.sources:
            source.check_row(row)

    def check_prompts(self, prompts: Sequence[Prompt], special_tokens: Iterable[str] = ()) -> None:
        for source in self.sources:
            source.check_prompts(prompts, special_tokens)

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def stats(self) -> ClientStats:
        """Sums over the sources; `most_in_flight` is no more than the sum."""
        counts = [each for source in self.sources if (each := source.stats()) is not None]
        reasons = {reason for each in counts for reason in each.retries_by}
        return ClientStats(
            requests=sum(each.requests for each in counts),
            retries=sum(each.retries for each in counts),
            retries_by={name: sum(each.retries_by.get(name, 0) for each in counts) for name in reasons},
            deduplicated=sum(each.deduplicated for each in counts),
            replica_faults=sum(each.replica_faults for each in counts),
            most_in_flight=sum(each.most_in_flight for each in counts),
            model_change=next((each.model_change for each in counts if each.model_change), ""),
        )

    def metrics(self) -> Metrics:
        columns = [source.metrics() for source in self.sources]
        names = dict.fromkeys(name for column in columns for name in column)
        return {name: sum(column.get(name, 0.0) for column in columns) for name in names}

    def costs(self) -> tuple[float, ...]:
        return tuple(cost for source in self.sources for cost in source.costs())

    def take_up_costs(self, costs: Sequence[float]) -> None:
        left = list(costs)
        for source in self.sources:
            number = len(source.costs())
            source.take_up_costs(left[:number])
            del left[:number]

    def server_statistics(self) -> Future[ServerTimes]:
        futures = [source.server_statistics() for source in self.sources]

        def total() -> ServerTimes:
            times = [future.result() for future in futures]
            return ServerTimes(
                sum(each.requests for each in times),
                sum(each.queue_s for each in times),
                sum(each.compute_s for each in times),
            )

        return when_all_done(futures, total)


def when_all_done(futures: Sequence[Future[Any]], make_result: Callable[[], ResultT]) -> Future[ResultT]:
    """Return a future of `make_result()`, which the thread that ends the last of `futures` calls.

    The same future may be given more than once.
    """
    distinct: Mapping[int, Future[Any]] = {id(future): future for future in futures}
    combined: Future[ResultT] = Future()
    lock, left = threading.Lock(), [len(distinct)]

    def finish() -> None:
        try:
            combined.set_result(make_result())
        except BaseException as error:  # a source that broke: the thread that waits must hear of it
            combined.set_exception(error)

    def count_down(_done: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            is_last = left[0] == 0
        if is_last:
            finish()

    for future in distinct.values():
        future.add_done_callback(count_down)
    if not distinct:
        finish()
    return combined


def submit_groups(
    source: RewardSource, rollouts: Sequence[Rollout], group_size: int
) -> Future[list[RewardResult]]:
    """Submit rollouts that are all there to a source as it wants them: together, or group by group.

    group_size: rollouts of a prompt, which stand together.
    """
    if not source.needs_groups:
        return source.submit(rollouts)
    firsts = range(0, len(rollouts), group_size)
    futures = [source.submit(rollouts[first : first + group_size]) for first in firsts]
    return when_all_done(futures, lambda: [result for future in futures for result in future.result()])


def refuse_groups(source: RewardSource, what: str) -> None:
    """Refuse a source that compares completions where each is scored by itself.

    what: that would ask it: "a reward server".

    Raises:
        ConfigError: it is one.
    """
    if source.needs_groups:
        raise ConfigError(
            f"{source.name} compares the completions of one prompt with each other, and {what} has each "
            "scored by itself: take a reward that scores single completions"
        )


class _NamedSources(CompositeReward):
    """Named sources that score the same samples.

    kind: of combination, for messages: "the sum".
    """

    def __init__(self, kind: str, members: Mapping[str, RewardSource]) -> None:
        super().__init__(f"{kind} of {', '.join(members)}", list(members.values()))
        self.members = dict(members)

    def check(self) -> None:
        """Check each member in turn; the message names the member."""
        for name, source in self.members.items():
            try:
                source.check()
            except ConchError as error:
                raise type(error)(f"reward member `{name}`: {error}") from error

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Check with each member in turn; the message names the member."""
        for name, source in self.members.items():
            try:
                source.check_row(row)
            except DataError as error:
                raise DataError(f"{error} (for reward member `{name}`)") from error

    def submit_to_members(
        self, rollouts: Sequence[Rollout], combine: Callable[[_MemberResults], RewardResult]
    ) -> Future[list[RewardResult]]:
        """Submit to all members at once; `combine` turns their results of a sample into one."""
        futures = {name: source.submit(rollouts) for name, source in self.members.items()}

        def results() -> list[RewardResult]:
            columns = {name: future.result() for name, future in futures.items()}
            for name, column in columns.items():
                if len(column) != len(rollouts):
                    wrong = f"{len(column)} results for {len(rollouts)} samples"
                    raise RewardInvalidError(f"reward member `{name}` gave {wrong}")
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            return [combine(row) for row in rows]

        return when_all_done(list(futures.values()), results)

    def success(
        self,
        row: _MemberResults,
        scores: Mapping[str, float],
        detail: str,
        members: Mapping[str, float | None],
        absent: tuple[str, ...] = (),
    ) -> RewardResult:
        """A sample's scores, with the slowest member's latency and all members' versions."""
        return RewardResult(
            RewardStatus.OK,
            scores=scores,
            model=self.name,
            version=",".join(each.version for each in row.values()),
            latency_s=max(each.latency_s for each in row.values()),
            detail=detail,
            members=members,
            absent=absent,
            facts={
                f"{member}/{name}": value
                for member, each in row.items()
                for name, value in each.facts.items()
            },
        )

    def failure(self, row: _MemberResults, status: RewardStatus, detail: str) -> RewardResult:
        """The result of a sample that gets no score."""
        latency_s = max(each.latency_s for each in row.values())
        return RewardResult(status, model=self.name, latency_s=latency_s, detail=detail)

    def member_failure(self, row: _MemberResults) -> RewardResult:
        """The failure that decides: bad data before infrastructure, since asking again does not cure it."""
        failed = {name: each for name, each in row.items() if not each.ok}
        name, worst = min(failed.items(), key=lambda pair: pair[1].status.is_infrastructure)
        return self.failure(row, worst.status, f"member `{name}` gave no score: {worst.detail}")


class EnsembleReward(_NamedSources):
    """The objective over its members' scores; each result holds every member's own.

    objective: `mean`, `wco` or `uwo`, see above.
    uwo_weight: cost of a variance of 1.
    variance: of the `population` (over k) or of the `sample` (over k - 1).
    on_member_failure: `fail` gives a sample the failure of the member that did not score it; `renormalise`
        takes the objective over the others and says in `detail` how many there were.
    """

    def __init__(
        self,
        members: Mapping[str, RewardSource],
        objective: EnsembleObjective,
        *,
        uwo_weight: float = 0.1,
        variance: EnsembleVariance = "population",
        on_member_failure: OnMemberFailure = "fail",
    ) -> None:
        assert members, "an ensemble has members"
        super().__init__(f"the {objective}", members)
        self._objective = objective
        self._uwo_weight = uwo_weight
        self._variance: EnsembleVariance = variance
        self._on_member_failure = on_member_failure
        self._fewest = len(members)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        return self.submit_to_members(rollouts, self._combine)

    def _combine(self, row: _MemberResults) -> RewardResult:
        scored = {name: each for name, each in row.items() if each.ok}
        if not scored or (len(scored) < len(row) and self._on_member_failure == "fail"):
            return self.member_failure(row)
        objectives = {tuple(_by_common_name(each.scores)) for each in scored.values()}
        if len(objectives) > 1 or objectives == {()}:
            return self.failure(row, RewardStatus.INVALID, _misfit(scored))
        names = objectives.pop()
        columns = {name: _by_common_name(each.scores) for name, each in scored.items()}
        scores = {name: self._value([column[name] for column in columns.values()]) for name in names}
        members = {
            (member if len(names) == 1 else f"{member}/{name}"): columns.get(member, {}).get(name)
            for member in row
            for name in names
        }
        return self.success(row, scores, self._note(row, scored), members)

    def _value(self, scores: Sequence[float]) -> float:
        """The objective of one sample's scores."""
        if self._objective == "wco":
            return min(scores)
        mean = fmean(scores)
        if self._objective == "mean":
            return mean
        return mean - self._uwo_weight * members_variance(scores, self._variance)

    def _note(self, row: _MemberResults, scored: _MemberResults) -> str:
        """How many members scored a sample, where not all did; logged when there are fewer than before."""
        if len(scored) == len(row):
            return ""
        missing = next(name for name in row if name not in scored)
        note = f"scored by {len(scored)} of {len(row)} members"
        if len(scored) < self._fewest:
            _log.warning("%s: samples are %s; `%s`: %s", self.name, note, missing, row[missing].detail)
        self._fewest = min(self._fewest, len(scored))
        return note


class SumReward(_NamedSources):
    """All objectives of its members side by side, to be summed with `reward.weights`.

    An objective is called like its member, or `member/objective` where the member has several. A sample that
    a member fails to score gets no score at all: a sum without one of its parts is another reward. What does
    not apply to the sample (None) adds nothing, as long as something does.
    """

    def __init__(self, members: Mapping[str, RewardSource]) -> None:
        assert members, "a sum has members"
        super().__init__("the sum", members)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Known where those of all members are."""
        own = {name: source.objectives for name, source in self.members.items()}
        if not all(own.values()):
            return ()
        return tuple(
            f"{name}/{each}" if len(names) > 1 else name for name, names in own.items() for each in names
        )

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        return self.submit_to_members(rollouts, self._join)

    def _join(self, row: _MemberResults) -> RewardResult:
        applies = {member: each for member, each in row.items() if each.ok or not each.absent}
        if not applies or not all(each.ok for each in applies.values()):
            return self.member_failure(applies or row)
        scores: dict[str, float] = {}
        absent: list[str] = []
        for member, each in row.items():
            if member not in applies:
                many = len(each.absent) > 1
                absent += [f"{member}/{name}" for name in each.absent] if many else [member]
                continue
            if not each.scores:
                wrong = f"member `{member}` scores each token, which cannot stand beside other rewards"
                return self.failure(row, RewardStatus.INVALID, wrong)
            many = len(each.scores) + len(each.absent) > 1
            absent += [f"{member}/{name}" for name in each.absent]
            scores |= {f"{member}/{name}" if many else member: score for name, score in each.scores.items()}
        notes = [f"`{member}` {each.detail}" for member, each in row.items() if each.detail]
        inner = {
            f"{member}/{name}": score for member, each in row.items() for name, score in each.members.items()
        }
        return self.success(row, scores, ", ".join(notes), inner, tuple(absent))


def _misfit(scored: _MemberResults) -> str:
    """Say which members give other scores than the first, or none for the sample as a whole."""

    def gives(result: RewardResult) -> str:
        if result.token_scores is not None:
            return "a score for each token"
        return "one score" if len(result.scores) == 1 else f"the objectives {', '.join(result.scores)}"

    (first, given), *others = ((name, gives(each)) for name, each in scored.items())
    other, what = next(((name, each) for name, each in others if each != given), (first, given))
    pair = f"`{first}` gives {given}" + (f", `{other}` {what}" if other != first else "")
    return f"the members of an ensemble need one score per sample each, or the same objectives: {pair}"


def disagreement(result: RewardResult) -> float | None:
    """Return the population variance of the scores that a sample's members gave; None without members.

    Of several objectives the mean of their variances.
    """
    names = result.scores if len(result.scores) > 1 else [""]
    groups = [
        [score for member, score in result.members.items() if score is not None and _is_of(member, name)]
        for name in names
    ]
    variances = [members_variance(group) for group in groups if group]
    return fmean(variances) if variances else None


def _is_of(member: str, objective: str) -> bool:
    """Whether a member's score belongs to an objective: `member/objective` of an ensemble of several, or
    `objective/member` of a sum of ensembles; "" has all."""
    return not objective or member.endswith(f"/{objective}") or member.startswith(f"{objective}/")


def members_variance(scores: Sequence[float], kind: EnsembleVariance = "population") -> float:
    """Return the variance of one sample's scores; 0 for a single one."""
    mean, unbiased = fmean(scores), kind == "sample"
    return math.fsum((score - mean) ** 2 for score in scores) / max(1, len(scores) - unbiased)


def _by_common_name(scores: Mapping[str, float]) -> Mapping[str, float]:
    """Scores with a single one renamed, which each member may call differently."""
    return {DEFAULT_OBJECTIVE: next(iter(scores.values()))} if len(scores) == 1 else scores


_BaselineRequest = tuple[Future[list[RewardResult]], int]
"""A request for baselines, and a baseline's index in it."""


class DeltaReward(CompositeReward):
    """Subtracts the score of each prompt's `original_output` (its baseline), which is scored once.

    A baseline that failed fails the samples of its prompt with its own status, and is asked for again with
    the next of them.

    encode: tokenises an original answer behind its prompt, for servers that read token ids.
    """

    def __init__(self, source: RewardSource, encode: Callable[[Prompt, str], Sequence[int]]) -> None:
        super().__init__(f"{source.name} less the original's", [source])
        self._source = source
        self._encode = encode
        self._baselines: dict[tuple[str, ...], _BaselineRequest] = {}

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        scored = self._source.submit(rollouts)
        self._submit_baselines(rollouts)
        baselines = [self._baselines[_key(rollout.prompt)] for rollout in rollouts]
        return when_all_done(
            [scored, *(request for request, _ in baselines)],
            lambda: [
                _difference(result, request.result()[index])
                for result, (request, index) in zip(scored.result(), baselines, strict=True)
            ],
        )

    def _submit_baselines(self, rollouts: Sequence[Rollout]) -> None:
        """Request the baselines that are neither known nor under way."""
        missing = {
            _key(rollout.prompt): self._original(rollout.prompt)
            for rollout in rollouts
            if not self._is_known(_key(rollout.prompt))
        }
        if not missing:
            return
        request = self._source.submit(list(missing.values()))
        for index, key in enumerate(missing):
            self._baselines[key] = (request, index)

    def _is_known(self, key: tuple[str, ...]) -> bool:
        """Whether a baseline is known or under way."""
        if key not in self._baselines:
            return False
        request, index = self._baselines[key]
        if not request.done():
            return True
        return request.exception() is None and request.result()[index].ok

    def _original(self, prompt: Prompt) -> Rollout:
        text = str(prompt.metadata[ORIGINAL])
        ids = tuple(self._encode(prompt, text))
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


def _key(prompt: Prompt) -> tuple[str, ...]:
    # Dialogues of one rendering may differ, and a model with a template of its own sees how.
    dialogue = "" if prompt.dialogue is None else repr(prompt.dialogue)
    return prompt.text, dialogue, str(prompt.metadata[ORIGINAL])


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
