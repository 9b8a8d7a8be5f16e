"""The report on how far a converted model's scores are from the original's. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from conch.store.manifest import ParitySummary

TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}
"""Largest error that passes, by dtype of the served weights. An error is the difference of two scores divided
by max(1, |score|): rounding grows with a score, and a score near zero is a sum of larger numbers."""

# What a server may differ by when it starts: it may run on another machine, whose kernels round differently.
GOLDEN_TOLERANCES = {**TOLERANCES, "float32": 1e-4}

BATCH_CONSISTENCY = "alone against in a batch"
"""Name of the line that compares served scores among themselves: a sample alone and in any batch."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One line of the report. The figures are infinity where a score is missing, not finite, or not allowed.

    samples: how many were compared.
    max_error: largest difference of two scores, divided by max(1, |score|).
    max_difference: largest difference of two scores.
    mean_difference: mean difference of two scores.
    problem: what is wrong, "" if nothing.
    """

    name: str
    samples: int
    max_error: float
    max_difference: float = 0.0
    mean_difference: float = 0.0
    problem: str = ""

    def merged(self, other: CaseResult) -> CaseResult:
        """Join two lines into one: samples are added, the larger error stays."""
        worse = max(self, other, key=lambda result: result.max_error)
        samples = self.samples + other.samples
        total = self.mean_difference * self.samples + other.mean_difference * other.samples
        return CaseResult(
            self.name,
            samples,
            worse.max_error,
            max(self.max_difference, other.max_difference),
            total / samples,
            worse.problem,
        )


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Result of all cases.

    tolerance: largest error that passes.
    """

    results: tuple[CaseResult, ...]
    tolerance: float

    @property
    def worst(self) -> CaseResult:
        """The case with the largest error."""
        return max(self.results, key=lambda result: result.max_error)

    @property
    def ok(self) -> bool:
        """Whether every case is within the tolerance."""
        return self.worst.max_error <= self.tolerance

    @property
    def total(self) -> CaseResult:
        """All comparisons with the original in one line."""
        first, *others = [result for result in self.results if result.name != BATCH_CONSISTENCY]
        for other in others:
            first = first.merged(other)
        return first

    def summary(self) -> ParitySummary:
        """Return the figures for the manifest."""
        total = self.total
        return ParitySummary(
            max_error=self.worst.max_error,
            max_difference=total.max_difference,
            mean_difference=total.mean_difference,
            tolerance=self.tolerance,
            samples=total.samples,
        )

    def table(self) -> str:
        """Write one line a case, for people."""
        width = max(len(result.name) for result in self.results)
        lines = [f"{'case':<{width}}  samples  max diff  mean diff  max error"]
        for result in self.results:
            above = not result.max_error <= self.tolerance
            mark = f"  {result.problem or 'above tolerance'}" if above else ""
            lines.append(
                f"{result.name:<{width}}  {result.samples:>7}  {result.max_difference:>8.2e}  "
                f"{result.mean_difference:>9.2e}  {result.max_error:>9.2e}{mark}"
            )
        verdict = "passed" if self.ok else "FAILED"
        lines.append(f"{verdict}: largest error {self.worst.max_error:.2e}, tolerance {self.tolerance:g}")
        return "\n".join(lines)
