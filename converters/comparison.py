"""Hold served scores against the original's, and against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conch.converters.cases import Case
from conch.converters.parity import COMPANY, TOLERANCES, CaseResult, ParityReport


def compare(
    cases: Sequence[Case],
    replies: Sequence[dict[str, Any]],
    expected: Mapping[tuple[int, ...], tuple[float, ...]],
    dtype: str,
) -> ParityReport:
    """Hold the served scores against the expected ones, and against each other."""
    lines: dict[str, CaseResult] = {}
    for case, reply in zip(cases, replies, strict=True):
        result = _result(case, reply, expected)
        lines[case.name] = result.merged(lines[case.name]) if case.name in lines else result
    company = _company(cases, replies)
    if company is not None:
        lines[COMPANY] = company
    return ParityReport(tuple(lines.values()), TOLERANCES[dtype])


def _result(
    case: Case, reply: dict[str, Any], expected: Mapping[tuple[int, ...], tuple[float, ...]]
) -> CaseResult:
    if any(not sample.ids for sample in case.samples):
        if "error" in reply:
            return CaseResult(case.name, len(case.samples), 0.0)
        return _broken(case, "a sample without tokens was scored")
    if "error" in reply:
        return _broken(case, reply["error"])
    right = [expected[sample.ids] for sample in case.samples]
    return _compared(case.name, reply["scores"], right)


def _company(cases: Sequence[Case], replies: Sequence[dict[str, Any]]) -> CaseResult | None:
    """Each sample's score alone against its score in every batch it is part of."""
    alone: dict[tuple[int, ...], Sequence[float]] = {}
    for case, reply in zip(cases, replies, strict=True):
        if len(case.samples) == 1 and "scores" in reply:
            alone[case.samples[0].ids] = reply["scores"][0]
    served, single = [], []
    for case, reply in zip(cases, replies, strict=True):
        for sample, scores in zip(case.samples, reply.get("scores", ()), strict=False):
            if len(case.samples) > 1 and sample.ids in alone:
                served.append(scores)
                single.append(alone[sample.ids])
    return _compared(COMPANY, served, single) if served else None


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
