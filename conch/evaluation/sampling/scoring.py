"""Scores of kept completions: asked once of each source, and combined anew as often as wanted.

A column of a record is what one source gave, under the name "reward" or "gold" for the first of its kind and
under the source's own name for others; `EvaluationRecord.sources` says whose it is. An ensemble's members
have columns each, so that another objective over them asks nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from conch.config import RewardConfig
from conch.config.reward import VERIFIER
from conch.errors import ConchError, ConfigError, RewardError
from conch.evaluation.records import PROXY, EvaluatedSample, EvaluationRecord
from conch.rewards.base import RewardSource, sources_closed_on_failure
from conch.rewards.combined import refuse_groups
from conch.rewards.factory import from_user
from conch.rewards.outage import AllReduceInt
from conch.rewards.scorer import RewardScorer, total_reward
from conch.types import RewardResult, RewardStatus, Rollout


@dataclass(frozen=True)
class Asked:
    """One source and the column that it fills.

    default_name: of the column, unless another source's has it.
    description: what tells its column from others'.
    member: name in the ensemble that it is a member of; "" for a source of its own.
    """

    source: RewardSource
    config: RewardConfig
    default_name: str
    description: str
    member: str = ""


@sources_closed_on_failure()
def sources_of(config: RewardConfig, default_name: str, metadata_keys: Sequence[str]) -> list[Asked]:
    """The sources that a section names: one, or each member.

    Raises:
        ConfigError: see `from_user`.
    """
    if not config.members:
        source = from_user(None, config, metadata_keys=metadata_keys)
        refuse_groups(source, "best-of-n")
        return [Asked(source, config, default_name, _description(source, config))]
    asked: list[Asked] = []
    for member, reward in config.members.items():
        source = from_user(reward, config, metadata_keys=metadata_keys)
        refuse_groups(source, "best-of-n")
        asked.append(Asked(source, config, "", _description(source, config, reward), member))
    return asked


def _description(source: RewardSource, config: RewardConfig, member: str = "") -> str:
    """The source with all settings that change its scores. member: what names it in an ensemble."""
    checked = member.removeprefix(VERIFIER) if member.startswith(VERIFIER) else config.verifier
    if checked is not None and (member.startswith(VERIFIER) or not member):
        settings = (config.gsm8k if checked == "gsm8k" else config.ifeval).model_dump(exclude_defaults=True)
        return f"{VERIFIER}{checked} {settings}" if settings else f"{VERIFIER}{checked}"
    # The name of a function says nothing of its file.
    name = config.function if config.function is not None and not member else source.name
    if source.digest:  # a judge's questions are no part of its name
        name = f"{name} {source.digest}"
    return f"{name} {dict(config.weights)}" if config.weights and not member else name


def column_of(record: EvaluationRecord, asked: Asked) -> str:
    """Name of the source's column, or of the one that it would get."""
    for name, source in record.sources.items():
        if source == asked.description:
            return name
    default = asked.default_name
    return default if default and default not in record.sources else asked.description


def unscored(record: EvaluationRecord, asked: Asked) -> list[int]:
    """Places of the samples that the source has given no score."""
    if asked.description not in record.sources.values():
        return [*range(len(record.samples))]
    scores = record.column(column_of(record, asked))
    return [place for place, score in enumerate(scores) if math.isnan(score)]


class RecordScorer:
    """Fills a source's column of records, with the response to failures that its section names.

    all_reduce: sums over ranks, which all score a record, or nothing, at the same time.
    """

    def __init__(self, asked: Asked, all_reduce: AllReduceInt) -> None:
        self.asked = asked
        self._hooks = _Results()
        self.scorer = RewardScorer(asked.source, asked.config, all_reduce)
        self.scorer.attach(self._hooks)

    def fill(
        self, record: EvaluationRecord, places: Sequence[int]
    ) -> tuple[EvaluationRecord, ConchError | None]:
        """The record with the results of what was submitted, and the error that ends the run, if any.

        places: of the samples that were submitted, in order.
        """
        problem: ConchError | None = None
        self._hooks.results = []
        try:
            self.scorer.gather()
        except ConchError as error:
            problem = error
        name = column_of(record, self.asked)
        known = record.column(name)
        samples = [*record.samples]
        # There are no results where the ranks lost each other before.
        for place, result in zip(places, self._hooks.results, strict=False):
            if not result.ok:
                continue
            try:
                known[place] = self._number(result)
            except ConchError as error:
                problem = problem or error
                break
            samples[place] = replace(samples[place], members={**samples[place].members, **result.members})
        filled = replace(record, samples=tuple(samples))
        return filled.with_scores(name, known, self.asked.description), problem

    def _number(self, result: RewardResult) -> float:
        if self.asked.member and len(result.scores) != 1:
            raise ConfigError(
                f"reward member `{self.asked.member}` gives {len(result.scores)} scores for a sample: "
                "best-of-n combines members that give one each"
            )
        return total_reward(result, {} if self.asked.member else self.asked.config.weights)


class _Results:
    """`OutageHooks` that keep the results of a gather that ends in an error."""

    def __init__(self) -> None:
        self.results: list[RewardResult] = []

    def save(self) -> None:
        return

    def leaving(self) -> bool:
        return False

    def leave(self) -> NoReturn:
        raise AssertionError("nobody tells this program to leave")

    def scored(self, rollouts: Sequence[Rollout], results: Sequence[RewardResult]) -> None:
        self.results = [*results]


@dataclass(frozen=True)
class Scores:
    """Of all samples of a record: total scores, and the members' variance; NaN where there is none."""

    totals: list[float]
    variances: list[float]


def scores_of(
    record: EvaluationRecord, asked: Sequence[Asked], config: RewardConfig, rollouts: Sequence[Rollout]
) -> Scores:
    """Read a source's column, or combine the members' as the section says."""
    if not config.members:
        ((only),) = asked
        variances = [_nan_for_none(sample.variance) for sample in record.samples]
        return Scores(record.column(column_of(record, only)), variances)
    columns: dict[str, RewardSource] = {
        each.member: _KeptScores(each.member, record.column(column_of(record, each))) for each in asked
    }
    with from_user(dict(columns), config) as source:
        results = source.submit(rollouts).result()
    members = [_with_members(sample, result) for sample, result in zip(record.samples, results, strict=True)]
    return Scores(
        [total_reward(result, config.weights) for result in results],
        [_nan_for_none(sample.variance) for sample in members],
    )


def _with_members(sample: EvaluatedSample, result: RewardResult) -> EvaluatedSample:
    return replace(sample, members=result.members)


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value


class _KeptScores(RewardSource):
    """A member whose scores of all rollouts are known."""

    def __init__(self, name: str, scores: Sequence[float]) -> None:
        self.name = name
        self._scores = scores

    def check(self) -> None:
        return

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        future.set_result([self._result(score) for score in self._scores])
        return future

    def _result(self, score: float) -> RewardResult:
        if math.isnan(score):
            return RewardResult(RewardStatus.INVALID, detail="it gave this sample none")
        return RewardResult(RewardStatus.OK, scores={PROXY: score})


def check_can_read_texts(asked: Asked) -> None:
    """Refuse to score kept texts by what reads token ids, which are not kept.

    Raises:
        RewardError: with what to do.
    """
    reads: Any = getattr(asked.source, "reads", "texts")
    if reads == "tokens":
        raise RewardError(
            f"{asked.source.name} reads token ids, and samples are kept as texts: convert it again with "
            "--form text, or sample anew into another folder"
        )


def named_sources(asked: Mapping[str, Sequence[Asked]], config: Mapping[str, RewardConfig]) -> dict[str, str]:
    """Column of the results -> what gave it, for people."""
    names: dict[str, str] = {}
    for kind, sources in asked.items():
        section = config[kind]
        objective = f"{section.combine} of " if section.members else ""
        if section.members and section.combine == "uwo":
            objective = f"uwo ({section.uwo_weight:g}) of "
        names[kind] = objective + ", ".join(each.description for each in sources)
    return names
