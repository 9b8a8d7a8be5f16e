"""How far a converted model's scores are from the original's: the report."""

from __future__ import annotations

from dataclasses import dataclass

from conch.serving.manifest import ParitySummary

TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference of a score that passes, divided by max(1, |score|), by dtype of the served weights."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """max_error: largest difference divided by max(1, |score|); infinity if a score is missing or should be.

    problem: what is wrong, "" if nothing.
    """

    name: str
    samples: int
    max_error: float
    problem: str = ""

    def merged(self, other: CaseResult) -> CaseResult:
        """Both in one line: samples added, the larger error."""
        worse = max(self, other, key=lambda result: result.max_error)
        return CaseResult(self.name, self.samples + other.samples, worse.max_error, worse.problem)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Outcome of all cases."""

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

    def summary(self) -> ParitySummary:
        """The figures for the manifest."""
        samples = sum(result.samples for result in self.results)
        return ParitySummary(max_error=self.worst.max_error, tolerance=self.tolerance, samples=samples)

    def table(self) -> str:
        """One line a case, for people."""
        width = max(len(result.name) for result in self.results)
        lines = [f"{'case':<{width}}  samples  max error"]
        for result in self.results:
            mark = (
                f"  {result.problem or 'above tolerance'}" if not result.max_error <= self.tolerance else ""
            )
            lines.append(f"{result.name:<{width}}  {result.samples:>7}  {result.max_error:>9.2e}{mark}")
        verdict = "passed" if self.ok else "FAILED"
        lines.append(f"{verdict}: largest error {self.worst.max_error:.2e}, tolerance {self.tolerance:g}")
        return "\n".join(lines)
