"""Compare served scores with the original's, and with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from conch.converters.parity.inputs import Sample
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
    rounding: Mapping[Key, float] | None = None,
) -> ParityReport:
    """Compare the served scores with the expected ones, and with each other.

    replies: per case {"scores": ...} or {"error": ...}.
    dtype: precision of the served weights; decides the tolerance.
    batch_invariant: a sample's score alone and in a batch may not differ by a bit.
    rounding: of samples whose scores the original itself rounds badly, the difference of scores that is no
        error.
    """
    rounding = rounding or {}
    lines: dict[str, CaseResult] = {}
    for case, reply in zip(cases, replies, strict=True):
        for result in (
            _result(case, reply, expected, rounding),
            _steps_result(case, reply, expected, rounding),
        ):
            if result is not None:
                earlier = lines.get(result.name)
                lines[result.name] = result.merged(earlier) if earlier else result
    consistency = _batch_consistency(cases, replies, rounding)
    if consistency is not None:
        if batch_invariant and consistency.max_difference > 0:
            consistency = replace(consistency, max_error=math.inf, problem="not alike")
        lines[BATCH_CONSISTENCY] = consistency
    return ParityReport(tuple(lines.values()), TOLERANCES[dtype])


def samples_above_tolerance(
    cases: Sequence[ParityCase], replies: Sequence[dict[str, Any]], expected: ExpectedScores, dtype: str
) -> dict[Key, Sample]:
    """Samples whose served scores are finite and differ by more than the tolerance, by their keys."""
    found: dict[Key, Sample] = {}
    for case, reply in zip(cases, replies, strict=True):
        for place, sample in enumerate(case.samples):
            one = replace(case, samples=(sample,))
            answer = {name: [rows[place]] for name, rows in reply.items() if isinstance(rows, list)}
            results = (
                ()
                if "error" in reply
                else (_result(one, answer, expected), _steps_result(one, answer, expected))
            )
            worst = max((result.max_error for result in results if result is not None), default=0.0)
            if TOLERANCES[dtype] < worst < math.inf:
                found[sample.key] = sample
    return found


def compare_scores(
    name: str,
    served: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    allowed: Sequence[float] | None = None,
) -> CaseResult:
    """Compare rows of scores, [samples, rewards], in one line of the report.

    An error is infinite where a score is not finite.

    allowed: of each sample, the difference up to which there is no error.
    """
    differences, errors = [], []
    for served_row, expected_row, no_error in zip(
        served, expected, allowed or [0.0] * len(served), strict=True
    ):
        for score, reference in zip(served_row, expected_row, strict=True):
            difference = abs(score - reference)
            differences.append(difference if math.isfinite(difference) else math.inf)
            relative = differences[-1] / max(1.0, abs(reference))
            is_wrong = differences[-1] > no_error
            errors.append((relative if is_wrong else 0.0) if math.isfinite(reference) else math.inf)
    mean = sum(differences) / len(differences)
    return CaseResult(name, len(served), max(errors), max(differences), mean)


def _result(
    case: ParityCase,
    reply: dict[str, Any],
    expected: ExpectedScores,
    rounding: Mapping[Key, float] = MappingProxyType({}),
) -> CaseResult:
    if any(not sample.ids for sample in case.samples):
        if "error" in reply:
            return CaseResult(case.name, len(case.samples), 0.0)
        return _broken(case, "a sample without tokens was scored")
    if "error" in reply:
        return _broken(case, reply["error"])
    if case.only_ids:
        return _ids_result(case, reply["ids"])
    expected_rows = [expected.scores[sample.key] for sample in case.samples]
    return compare_scores(case.name, reply["scores"], expected_rows, _allowed(case, rounding))


def _allowed(case: ParityCase, rounding: Mapping[Key, float]) -> list[float]:
    return [rounding.get(sample.key, 0.0) for sample in case.samples]


def _ids_result(case: ParityCase, read: Sequence[Sequence[int]]) -> CaseResult:
    """Compare what the served model reads, token by token."""
    for ids, sample in zip(read, case.samples, strict=True):
        if tuple(ids) != sample.ids:
            pairs = enumerate(zip(ids, sample.ids, strict=False))
            place = next((place for place, (a, b) in pairs if a != b), min(len(ids), len(sample.ids)))
            return _broken(case, f"other tokens are read from place {place} of {len(sample.ids)} on")
    return CaseResult(case.name, len(case.samples), 0.0)


def _steps_result(
    case: ParityCase,
    reply: dict[str, Any],
    expected: ExpectedScores,
    rounding: Mapping[Key, float] = MappingProxyType({}),
) -> CaseResult | None:
    """Compare the scores of steps or tokens, in a line of their own; None where there are none."""
    if not expected.steps or case.only_ids or "error" in reply:  # an error has its line already
        return None
    name = f"{case.name}: each step"
    steps = [expected.steps[sample.key] for sample in case.samples]
    ends = [list(row) for row in reply["step_ends"]]
    if ends != [[end for end, _ in row] for row in steps]:
        return _broken(replace(case, name=name), "steps end elsewhere")
    rows = [[score for _, score in row] for row in steps]
    return compare_scores(name, reply["step_scores"], rows, _allowed(case, rounding))


def _batch_consistency(
    cases: Sequence[ParityCase], replies: Sequence[dict[str, Any]], rounding: Mapping[Key, float]
) -> CaseResult | None:
    """Compare each sample's score alone with its score in every batch that holds the sample."""
    alone: dict[Key, Sequence[float]] = {}
    for case, reply in zip(cases, replies, strict=True):
        if len(case.samples) == 1 and "scores" in reply:
            (alone[case.samples[0].key],) = _all_scores(reply)
    batched, single, allowed = [], [], []
    for case, reply in zip(cases, replies, strict=True):
        for sample, scores in zip(case.samples, _all_scores(reply), strict=False):
            # The lines of the steps report a wrong number of steps.
            if len(case.samples) > 1 and len(alone.get(sample.key, ())) == len(scores):
                batched.append(scores)
                single.append(alone[sample.key])
                allowed.append(rounding.get(sample.key, 0.0))
    return compare_scores(BATCH_CONSISTENCY, batched, single, allowed) if batched else None


def _all_scores(reply: dict[str, Any]) -> list[list[float]]:
    """Return for each sample its rewards, followed by the scores of its steps where there are any."""
    rewards = reply.get("scores", [])
    steps = reply.get("step_scores", [[]] * len(rewards))
    return [[*of_sample, *of_steps] for of_sample, of_steps in zip(rewards, steps, strict=True)]


def _broken(case: ParityCase, problem: str) -> CaseResult:
    return CaseResult(case.name, len(case.samples), math.inf, math.inf, math.inf, problem)
