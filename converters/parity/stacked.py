"""What an ensemble that holds its members must return: every member's own scores, and the formula of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conch.converters.parity.compare import compare_scores
from conch.converters.parity.ensemble import EnsembleReference
from conch.converters.parity.report import CaseResult, ParityReport
from conch.converters.parity.subprocess_model import Request
from conch.store.manifest import GoldenSample

# Rows of a request of several; no divisor of a usual number of members.
_ROWS = 7


@dataclass(frozen=True, slots=True)
class StackedReference:
    """The golden samples of all members.

    scores: per sample and member its own score, and the absolute error that it may have on a server.
    formula: the combination of these scores.
    device: where they were scored.
    """

    samples: Sequence[GoldenSample]
    scores: Sequence[Sequence[tuple[float, float]]]
    formula: EnsembleReference
    device: str

    def requests(self, *, in_one_pass: bool) -> list[Request]:
        """Return the samples one by one and several together, and then those of the formula."""
        parts = ([self.samples[number] for number in part] for part in self._parts())
        members = [{**_request(part), "in_one_pass": in_one_pass} for part in parts]
        return [*members, *(case.request for case in self.formula.cases)]

    def report(
        self,
        replies: Sequence[dict[str, Any]],
        members: Sequence[str],
        tolerance: float,
        *,
        in_one_pass: bool,
    ) -> ParityReport:
        """Compare the replies to `requests`: each member's scores with its own, and the formula.

        tolerance: of the members' scores. The formula's own is much lower: what exceeds that is infinitely
            off.
        """
        parts = self._parts()
        how = "in one pass" if in_one_pass else "one after another"
        lines = [self._line(number, f"{name}, {how}", replies) for number, name in enumerate(members)]
        formula = self.formula.report(replies[len(parts) :])
        if not formula.ok:
            lines.append(
                CaseResult(
                    formula.worst.name, 0, math.inf, math.inf, math.inf, "combined other than its formula"
                )
            )
        return ParityReport((*lines, *formula.results), tolerance)

    def _parts(self) -> list[Sequence[int]]:
        numbers = range(len(self.samples))
        alone = [[number] for number in numbers]
        return [*alone, *(numbers[start : start + _ROWS] for start in range(0, len(numbers), _ROWS))]

    def _line(self, member: int, name: str, replies: Sequence[dict[str, Any]]) -> CaseResult:
        served, expected = [], []
        for part, reply in zip(self._parts(), replies, strict=False):
            if "error" in reply:
                return CaseResult(name, len(part), math.inf, math.inf, math.inf, reply["error"])
            served += [[row[member]] for row in reply["member_scores"]]
            expected += [[self.scores[number][member][0]] for number in part]
        return compare_scores(name, served, expected)


def _request(samples: Sequence[GoldenSample]) -> Request:
    """Return several samples as one request; shorter rows of ids are filled up on the right, masked out."""
    if samples[0].text is not None:
        return {"texts": [sample.text for sample in samples]}
    rows = [list(sample.input_ids or ()) for sample in samples]
    longest = max(len(row) for row in rows)
    return {
        "input_ids": [row + [0] * (longest - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
    }
