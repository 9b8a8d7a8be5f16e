"""Compare served scores with the original's, and with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conch.converters.parity.report import BATCH_CONSISTENCY, TOLERANCES, CaseResult, ParityReport
from conch.converters.parity.samples import ParityCase

Key = tuple[int, ...]
"""See `Sample.key`."""


@dataclass(frozen=True, slots=True)
class ExpectedScores:
    """The original's scores, by the `key` of a sample.

    scores: one per reward.
    steps: per step or token that has a score its end, see `Sample.ends`, and that score; empty where samples
        only are scored.
    """

    scores: dict[Key, tuple[float, ...]]
    steps: dict[Key, tuple[tuple[int, float], ...]] = field(default_factory=dict)


def compare(
    cases: Sequence[ParityCase],
    replies: Sequence[dict[str, Any]],
    expected: ExpectedScores,
    dtype: str,
    *,
    batch_invariant: bool = False,
) -> ParityReport:
    """Compare the served scores with the expected ones, and with each other.

    replies: per case {"scores": ...} or {"error": ...}.
    dtype: precision of the served weights; decides the tolerance.
    batch_invariant: a sample's score alone and in a batch may not differ by a bit.
    """
    lines: dict[str, CaseResult] = {}
    for case, reply in zip(cases, replies, strict=True):
        for result in (_result(case, reply, expected), _steps_result(case, reply, expected)):
            if result is not None:
                earlier = lines.get(result.name)
                lines[result.name] = result.merged(earlier) if earlier else result
    consistency = _batch_consistency(cases, replies)
    if consistency is not None:
        if batch_invariant and consistency.max_difference > 0:
            consistency = replace(consistency, max_error=math.inf, problem="not alike")
        lines[BATCH_CONSISTENCY] = consistency
    return ParityReport(tuple(lines.values()), TOLERANCES[dtype])


def compare_scores(
    name: str, served: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]
) -> CaseResult:
    """Compare rows of scores, [samples, rewards], in one line of the report.

    An error is infinite where a score is not finite.
    """
    differences, errors = [], []
    for served_row, expected_row in zip(served, expected, strict=True):
        for score, reference in zip(served_row, expected_row, strict=True):
            difference = abs(score - reference)
            differences.append(difference if math.isfinite(difference) else math.inf)
            relative = differences[-1] / max(1.0, abs(reference))
            errors.append(relative if math.isfinite(reference) else math.inf)
    mean = sum(differences) / len(differences)
    return CaseResult(name, len(served), max(errors), max(differences), mean)


def _result(case: ParityCase, reply: dict[str, Any], expected: ExpectedScores) -> CaseResult:
    if any(not sample.ids for sample in case.samples):
        if "error" in reply:
            return CaseResult(case.name, len(case.samples), 0.0)
        return _broken(case, "a sample without tokens was scored")
    if "error" in reply:
        return _broken(case, reply["error"])
    if case.only_ids:
        return _ids_result(case, reply["ids"])
    expected_rows = [expected.scores[sample.key] for sample in case.samples]
    return compare_scores(case.name, reply["scores"], expected_rows)


def _ids_result(case: ParityCase, read: Sequence[Sequence[int]]) -> CaseResult:
    """Compare what the served model reads, token by token."""
    for ids, sample in zip(read, case.samples, strict=True):
        if tuple(ids) != sample.ids:
            pairs = enumerate(zip(ids, sample.ids, strict=False))
            place = next((place for place, (a, b) in pairs if a != b), min(len(ids), len(sample.ids)))
            return _broken(case, f"other tokens are read from place {place} of {len(sample.ids)} on")
    return CaseResult(case.name, len(case.samples), 0.0)


def _steps_result(case: ParityCase, reply: dict[str, Any], expected: ExpectedScores) -> CaseResult | None:
    """Compare the scores of steps or tokens, in a line of their own; None where there are none."""
    if not expected.steps or case.only_ids or "error" in reply:  # an error has its line already
        return None
    name = f"{case.name}: each step"
    steps = [expected.steps[sample.key] for sample in case.samples]
    ends = [list(row) for row in reply["step_ends"]]
    if ends != [[end for end, _ in row] for row in steps]:
        return _broken(replace(case, name=name), "steps end elsewhere")
    return compare_scores(name, reply["step_scores"], [[score for _, score in row] for row in steps])


def _batch_consistency(cases: Sequence[ParityCase], replies: Sequence[dict[str, Any]]) -> CaseResult | None:
    """Compare each sample's score alone with its score in every batch that holds the sample."""
    alone: dict[Key, Sequence[float]] = {}
    for case, reply in zip(cases, replies, strict=True):
        if len(case.samples) == 1 and "scores" in reply:
            (alone[case.samples[0].key],) = _all_scores(reply)
    batched, single = [], []
    for case, reply in zip(cases, replies, strict=True):
        for sample, scores in zip(case.samples, _all_scores(reply), strict=False):
            # The lines of the steps report a wrong number of steps.
            if len(case.samples) > 1 and len(alone.get(sample.key, ())) == len(scores):
                batched.append(scores)
                single.append(alone[sample.key])
    return compare_scores(BATCH_CONSISTENCY, batched, single) if batched else None


def _all_scores(reply: dict[str, Any]) -> list[list[float]]:
    """Return for each sample its rewards, followed by the scores of its steps where there are any."""
    rewards = reply.get("scores", [])
    steps = reply.get("step_scores", [[]] * len(rewards))
    return [[*of_sample, *of_steps] for of_sample, of_steps in zip(rewards, steps, strict=True)]


def _broken(case: ParityCase, problem: str) -> CaseResult:
    return CaseResult(case.name, len(case.samples), math.inf, math.inf, math.inf, problem)
