"""The reference of an ensemble: its members' own scores, and the formula on them, written a second time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conch.converters.options import EnsembleOptions
from conch.converters.parity.compare import compare_scores
from conch.converters.parity.report import CaseResult, ParityReport
from conch.converters.parity.subprocess_model import Request, SubprocessModel
from conch.errors import ConversionError
from conch.store.manifest import EnsembleMember, Golden, GoldenSample
from conch.store.store import StoredModel

# Error of the combination alone, which is float64 up to the last step: the members' own errors are not in it.
_TOLERANCE = 1e-6
_GOLDEN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class EnsembleCase:
    """The samples of one request.

    name: line of the report.
    scores: per sample and member, None where a member gives none.
    expected: per sample the combined reward.
    """

    name: str
    scores: list[list[float | None]]
    expected: list[float]

    @property
    def request(self) -> Request:
        """What the ensemble's `model.py` reads, see its `main`."""
        return {"member_rewards": self.scores}

    def result(self, reply: dict[str, Any]) -> CaseResult:
        """Compare the reply with the expected rewards."""
        return compare_scores(self.name, reply["scores"], [[reward] for reward in self.expected])


@dataclass(frozen=True, slots=True)
class EnsembleReference:
    """What an ensemble is asked, and what it must return."""

    cases: list[EnsembleCase]
    golden: Golden

    def report(self, replies: Sequence[dict[str, Any]]) -> ParityReport:
        """Compare the replies to the requests of `cases`."""
        pairs = zip(self.cases, replies, strict=True)
        return ParityReport(tuple(case.result(reply) for case, reply in pairs), _TOLERANCE)


def member_scores(
    stored: Sequence[StoredModel], members: Sequence[EnsembleMember], device: str
) -> tuple[list[GoldenSample], list[list[tuple[float, float]]]]:
    """Score all members' golden samples by every member, each in a fresh process.

    Returns:
        the samples; per sample and member its score and the absolute error that it may have on a server.

    Raises:
        ConversionError: a member fails, or no longer scores its own golden samples right.
    """
    limit = min(model.spec.max_length for model in stored)
    reads_dialogues = stored[0].spec.reads == "dialogues"
    samples = [
        sample
        for model in stored
        for sample in model.golden.samples
        if sample.input_ids is None or len(sample.input_ids) <= limit
    ]
    distinct = list({(sample.text, sample.input_ids): sample for sample in samples}.values())
    columns = []
    for model, member in zip(stored, members, strict=True):
        rows = _served_scores(model, distinct, device, may_refuse=reads_dialogues)
        _check_own_golden(model, distinct, rows)
        tolerance = model.golden.tolerance
        scores = [row[member.column] if row else None for row in rows]
        columns.append(
            [None if score is None else (score, tolerance * max(1.0, abs(score))) for score in scores]
        )
    common = [
        (sample, [score for score in row if score is not None])
        for sample, *row in zip(distinct, *columns, strict=True)
        if None not in row
    ]
    if not common:
        raise ConversionError(
            f"of the golden samples of {', '.join(model.name for model in stored)} there is none that all of "
            "their chat templates take: combine them in the trainer, with reward.members and reward.combine"
        )
    return [sample for sample, _ in common], [row for _, row in common]


def ensemble_reference(
    samples: Sequence[GoldenSample], scores: Sequence[Sequence[tuple[float, float]]], options: EnsembleOptions
) -> EnsembleReference:
    """Build the cases that a written ensemble is compared on, and its golden samples.

    scores: per sample and member its score and the absolute error that it may have on a server.
    """
    whole: list[list[float | None]] = [[score for score, _ in row] for row in scores]
    cases = [_case("all members", whole, options)]
    for absent in range(len(whole[0])):
        without = [[None if index == absent else score for index, score in enumerate(row)] for row in whole]
        cases.append(_case(f"without member {absent + 1}", without, options))
    rewards = cases[0].expected
    tolerances = (
        _error_bound(row, options) / max(1.0, abs(reward))
        for row, reward in zip(scores, rewards, strict=True)
    )
    golden = tuple(
        sample.model_copy(update={"scores": (reward,)})
        for sample, reward in zip(samples, rewards, strict=True)
    )
    step = -(-len(golden) // _GOLDEN_SAMPLES)
    return EnsembleReference(cases, Golden(tolerance=max(tolerances), samples=golden[::step]))


def _case(name: str, scores: list[list[float | None]], options: EnsembleOptions) -> EnsembleCase:
    return EnsembleCase(
        name, scores, [_combined([s for s in row if s is not None], options) for row in scores]
    )


def _combined(scores: Sequence[float], options: EnsembleOptions) -> float:
    if options.objective == "wco":
        return min(scores)
    if options.objective == "mean":
        return statistics.fmean(scores)
    if options.variance == "population" or len(scores) == 1:
        variance = statistics.pvariance(scores)
    else:
        variance = statistics.variance(scores)
    return statistics.fmean(scores) - options.uwo_weight * variance


def _error_bound(row: Sequence[tuple[float, float]], options: EnsembleOptions) -> float:
    """Return how far the reward may be off when each score is off by its own error; to first order."""
    errors = [error for _, error in row]
    if options.objective == "wco":
        return max(errors)
    mean = statistics.fmean(score for score, _ in row)
    # d variance = 2/k * sum (score - mean) d score; or 2/(k - 1) * ...
    weights = len(row) - (options.variance == "sample")
    slope = 2 / max(1, weights) * sum(abs(score - mean) * error for score, error in row)
    return statistics.fmean(errors) + (options.uwo_weight * slope if options.objective == "uwo" else 0.0)


def _served_scores(
    model: StoredModel, samples: Sequence[GoldenSample], device: str, *, may_refuse: bool
) -> list[list[float]]:
    """Return the member's scores of each sample.

    may_refuse: another member's dialogue, with a system message say, may be none for this one's chat
        template; its scores are [] then.
    """
    with SubprocessModel(model.path) as served:
        replies = served.score([sample.request() for sample in samples], device)
    own = {sample.text for sample in model.golden.samples}
    for sample, reply in zip(samples, replies, strict=True):
        is_others = (
            may_refuse and sample.text not in own and "chat template refuses" in reply.get("error", "")
        )
        if "error" in reply and not is_others:
            raise ConversionError(f"member {model.name} does not score {_shown(sample)}: {reply['error']}")
    return [reply["scores"][0] if "scores" in reply else [] for reply in replies]


def _check_own_golden(
    model: StoredModel, samples: Sequence[GoldenSample], rows: Sequence[Sequence[float]]
) -> None:
    scores = {(s.text, s.input_ids): row for s, row in zip(samples, rows, strict=True)}
    for sample in model.golden.samples:
        row = scores.get((sample.text, sample.input_ids))
        for score, expected in zip(row or (), sample.scores if row else (), strict=True):
            tolerance = model.golden.tolerance * max(1.0, abs(expected))
            if not abs(score - expected) <= tolerance:  # so that NaN fails
                raise ConversionError(
                    f"member {model.name} scores {score} on {_shown(sample)}, expected {expected}: "
                    "the libraries are not those of its conversion; convert it again"
                )


def _shown(sample: GoldenSample, longest: int = 40) -> str:
    shown = repr(sample.text) if sample.text is not None else f"ids {list(sample.input_ids or ())}"
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
