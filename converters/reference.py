"""The original model as the measure: float32, one sample at a time, without padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from conch.converters.cases import Case
from conch.converters.checkpoint import Checkpoint
from conch.converters.parity import TOLERANCES, CaseResult, ParityReport
from conch.errors import ConversionError
from conch.serving.manifest import Golden, GoldenSample
from conch.serving.spec import Form

# What a server may differ by when it starts: it may run on another machine, whose kernels round differently.
_GOLDEN_TOLERANCES = {**TOLERANCES, "float32": 1e-4}
_GOLDEN_SAMPLES = 8


class Reference:
    """The original model, asked for one sample at a time."""

    def __init__(self, checkpoint: Checkpoint, *, normalise: bool) -> None:
        self._model = checkpoint.model
        self._statistics = (checkpoint.mean, checkpoint.std) if normalise else (None, None)
        self._known: dict[tuple[int, ...], tuple[float, ...]] = {}

    def scores(self, ids: tuple[int, ...]) -> tuple[float, ...]:
        """One score per reward."""
        if ids not in self._known:
            self._known[ids] = self._normalised(self._raw_scores(ids))
        return self._known[ids]

    @torch.inference_mode()
    def _raw_scores(self, ids: tuple[int, ...]) -> list[float]:
        row = torch.tensor([ids], device=self._model.device)
        try:
            return self._model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].double().tolist()
        except Exception as error:  # torch raises many kinds; a stack of its frames helps nobody
            raise ConversionError(
                f"the checkpoint itself fails on a sample of {len(ids)} tokens: {error}; "
                "if that is longer than its window, give a lower --max-length"
            ) from error

    def score_all(self, cases: Sequence[Case]) -> None:
        """Score every sample now; later questions need the model no more."""
        for case in cases:
            for sample in case.samples:
                if sample.ids:
                    self.scores(sample.ids)

    def _normalised(self, raw: list[float]) -> tuple[float, ...]:
        mean, std = self._statistics
        if mean is None or std is None:
            return tuple(raw)
        return tuple((score - m) / s for score, m, s in zip(raw, mean, std, strict=True))


def compare(
    cases: Sequence[Case], replies: Sequence[dict[str, Any]], reference: Reference, dtype: str
) -> ParityReport:
    """Hold the served scores against the reference."""
    lines: dict[str, CaseResult] = {}
    for case, reply in zip(cases, replies, strict=True):
        result = _result(case, reply, reference)
        lines[case.name] = result.merged(lines[case.name]) if case.name in lines else result
    return ParityReport(tuple(lines.values()), TOLERANCES[dtype])


def golden_of(cases: Sequence[Case], form: Form, reference: Reference, dtype: str) -> Golden:
    """Eight samples of the cases, with the reference's scores."""
    samples = list(dict.fromkeys(sample for case in cases for sample in case.samples if sample.ids))
    step = max(1, len(samples) // _GOLDEN_SAMPLES)
    chosen = samples[::step][:_GOLDEN_SAMPLES]
    return Golden(
        tolerance=_GOLDEN_TOLERANCES[dtype],
        samples=tuple(
            GoldenSample(text=sample.text, scores=reference.scores(sample.ids))
            if form == "text"
            else GoldenSample(input_ids=sample.ids, scores=reference.scores(sample.ids))
            for sample in chosen
        ),
    )


def _result(case: Case, reply: dict[str, Any], reference: Reference) -> CaseResult:
    if any(not sample.ids for sample in case.samples):
        refused = "error" in reply
        problem = "" if refused else "a sample without tokens was scored"
        return CaseResult(case.name, len(case.samples), 0.0 if refused else math.inf, problem)
    if "error" in reply:
        return CaseResult(case.name, len(case.samples), math.inf, reply["error"])
    errors = list(_errors(reply["scores"], [reference.scores(sample.ids) for sample in case.samples]))
    return CaseResult(case.name, len(case.samples), max(errors))


def _errors(served: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> Iterator[float]:
    for served_row, expected_row in zip(served, expected, strict=True):
        for score, right in zip(served_row, expected_row, strict=True):
            error = abs(score - right) / max(1.0, abs(right))
            yield error if math.isfinite(error) else math.inf
