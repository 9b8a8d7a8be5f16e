"""Hold served scores against the original's, and against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conch.converters.parity.report import COMPANY, TOLERANCES, CaseResult, ParityReport
from conch.converters.parity.samples import Case

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the original says of each sample, by its token ids.

    scores: one per reward. steps: per step or token that has a score where it ends, see `Sample.ends`, and
    that score; empty where samples only are scored.
    """

    scores: dict[Ids, tuple[float, ...]]
    steps: dict[Ids, tuple[tuple[int, float], ...]] = field(default_factory=dict)


def compare(
    cases: Sequence[Case],
    replies: Sequence[dict[str, Any]],
    expected: Expected,
    dtype: str,
    *,
    batch_invariant: bool = False,
) -> ParityReport:
    """Hold the served scores against the expected ones, and against each other.

    batch_invariant: a sample's score alone and in company may not differ by a bit.
    """
    lines: dict[str, CaseResult] = {}
    for case, reply in zip(cases, replies, strict=True):
        for result in (_result(case, reply, expected), _steps_result(case, reply, expected)):
            if result is not None:
                earlier = lines.get(result.name)
                lines[result.name] = result.merged(earlier) if earlier else result
    company = _company(cases, replies)
    if company is not None:
        differs = batch_invariant and company.max_difference > 0
        lines[COMPANY] = replace(company, max_error=math.inf, problem="not alike") if differs else company
    return ParityReport(tuple(lines.values()), TOLERANCES[dtype])


def _result(case: Case, reply: dict[str, Any], expected: Expected) -> CaseResult:
    if any(not sample.ids for sample in case.samples):
        if "error" in reply:
            return CaseResult(case.name, len(case.samples), 0.0)
        return _broken(case, "a sample without tokens was scored")
    if "error" in reply:
        return _broken(case, reply["error"])
    right = [expected.scores[sample.ids] for sample in case.samples]
    return _compared(case.name, reply["scores"], right)


def _steps_result(case: Case, reply: dict[str, Any], expected: Expected) -> CaseResult | None:
    """The same for steps or tokens, in a line of their own; None where they have no scores."""
    if not expected.steps or "error" in reply:  # an error has its line already
        return None
    name = f"{case.name}: each step"
    right = [expected.steps[sample.ids] for sample in case.samples]
    ends = [list(row) for row in reply["step_ends"]]
    if ends != [[end for end, _ in row] for row in right]:
        return _broken(replace(case, name=name), "steps end elsewhere")
    return _compared(name, reply["step_scores"], [[score for _, score in row] for row in right])


def _company(cases: Sequence[Case], replies: Sequence[dict[str, Any]]) -> CaseResult | None:
    """Each sample's score alone against its score in every batch it is part of."""
    alone: dict[tuple[int, ...], Sequence[float]] = {}
    for case, reply in zip(cases, replies, strict=True):
        if len(case.samples) == 1 and "scores" in reply:
            (alone[case.samples[0].ids],) = _all_scores(reply)
    served, single = [], []
    for case, reply in zip(cases, replies, strict=True):
        for sample, scores in zip(case.samples, _all_scores(reply), strict=False):
            # Other numbers of steps are told by the lines of the steps.
            if len(case.samples) > 1 and len(alone.get(sample.ids, ())) == len(scores):
                served.append(scores)
                single.append(alone[sample.ids])
    return _compared(COMPANY, served, single) if served else None


def _all_scores(reply: dict[str, Any]) -> list[list[float]]:
    """Of each sample its rewards, and the scores of its steps where there are any."""
    rewards = reply.get("scores", [])
    steps = reply.get("step_scores", [[]] * len(rewards))
    return [[*of_sample, *of_steps] for of_sample, of_steps in zip(rewards, steps, strict=True)]


def _compared(
    name: str, served: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]
) -> CaseResult:
    differences, errors = [], []
    for served_row, expected_row in zip(served, expected, strict=True):
        for score, right in zip(served_row, expected_row, strict=True):
            difference = abs(score - right)
            differences.append(difference if math.isfinite(difference) else math.inf)
            errors.append(differences[-1] / max(1.0, abs(right)) if math.isfinite(right) else math.inf)
    mean = sum(differences) / len(differences)
    return CaseResult(name, len(served), max(errors), max(differences), mean)


def _broken(case: Case, problem: str) -> CaseResult:
    return CaseResult(case.name, len(case.samples), math.inf, math.inf, math.inf, problem)
