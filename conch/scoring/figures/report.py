"""The report of a scoring: figures as a dict, and as a table for people."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conch.scoring.asking import ours_of
from conch.scoring.figures.agreement import AgreementReport
from conch.scoring.figures.pairs import PairReport

_NAMED = 6


class Report:
    """Gathers the lines of a scoring, and says what they amount to.

    objective: what pairs and differences are about, see `Lines`.
    """

    def __init__(self, objective: str | None = None) -> None:
        self.statuses: Counter[str] = Counter()
        """Status -> rows."""
        self._first_failure = ""
        self._columns: dict[str, array[float]] = {}
        self._pairs = PairReport()
        self._agreement = AgreementReport(objective)

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self.statuses.total()

    @property
    def failed(self) -> int:
        """Rows without a score so far."""
        return self.rows - self.statuses["ok"]

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a line of the output."""
        line = ours_of(line)
        self.statuses[line["status"]] += 1
        if line["status"] != "ok":
            self._first_failure = self._first_failure or f"row {line['index']}: {line.get('detail', '')}"
            return
        if "margin" in line and "chosen_score" in line:
            self._pairs.add(line)
        else:
            for name, score in line["scores"].items():
                self._columns.setdefault(name, array("d")).append(score)
        if "against" in line:
            self._agreement.add(line)

    def add_all(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take in lines of the output."""
        for line in lines:
            self.add(line)

    def result(self) -> dict[str, Any]:
        """Return the figures, as JSON can hold them.

        rows, failed: numbers of rows; statuses: of each status.
        first_failure: of the first row without a score: which, and what happened; "" where all have one.
        scores: of samples, objective -> count, mean, std, min, median, max.
        pairs, subsets, and the benchmarks' averages: see `PairReport.result`.
        against: see `AgreementReport.result`.
        """
        scores = {name: _moments(np.array(column)) for name, column in self._columns.items()}
        agreement = self._agreement.result()
        return _finite_or_none(
            {
                "rows": self.rows,
                "failed": self.failed,
                "statuses": dict(self.statuses),
                "first_failure": self._first_failure,
                **({"scores": scores} if scores else {}),
                **self._pairs.result(),
                **({"against": agreement} if agreement else {}),
            }
        )


def _moments(column: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(column),
        "mean": float(column.mean()),
        "std": float(column.std()),
        "min": float(column.min()),
        "median": float(np.median(column)),
        "max": float(column.max()),
    }


# ------------------------------------------------------------------------------------------------- for people


def as_text(report: Mapping[str, Any]) -> str:
    """Return the figures as tables."""
    parts = [_scores(report), _pairs(report), _subsets(report), _benchmarks(report), _against(report)]
    return "\n".join(line for part in parts if part for line in (*part, "")).rstrip("\n")


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of cells, the first one the head: names on the left, numbers on the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _scores(report: Mapping[str, Any]) -> list[str]:
    scores: Mapping[str, Mapping[str, Any]] = report.get("scores", {})
    if not scores:
        return []
    names = list(next(iter(scores.values())))
    return _table([["score", *names], *([name, *each.values()] for name, each in scores.items())])


def _pairs(report: Mapping[str, Any]) -> list[str]:
    pairs = report.get("pairs")
    if not pairs:
        return []
    quantiles = ", ".join(
        f"{_cell(value)} ({float(q):.0%})" for q, value in pairs["margin_quantiles"].items()
    )
    lines = [
        f"{pairs['count']:,} pairs: accuracy {_with_error(pairs)}, {pairs['ties']:,} ties "
        f"({_cell(pairs['strict_accuracy'])} with ties for wrong)",
        f"margin: mean {_cell(pairs['margin_mean'])}, std {_cell(pairs['margin_std'])}; {quantiles}",
        f"calibration error of sigmoid(margin): {_cell(pairs['calibration_error'])}",
        "",
    ]
    rows = [
        [f"{each['low']:.2f} to {each['high']:.2f}", each["count"], each["confidence"], each["right"]]
        for each in pairs["reliability"]
    ]
    return lines + _table([["confidence", "pairs", "mean", "right"], *rows])


def _with_error(figures: Mapping[str, Any]) -> str:
    error = figures["standard_error"]
    return _cell(figures["accuracy"]) + ("" if error is None else f" +- {_cell(error)}")


def _subsets(report: Mapping[str, Any]) -> list[str]:
    subsets: Mapping[str, Mapping[str, Any]] = report.get("subsets", {})
    if not subsets:
        return []
    head = ["subset", "pairs", "accuracy", "std. error", "ties", "strict", "margin"]
    names = ("count", "accuracy", "standard_error", "ties", "strict_accuracy", "margin_mean")
    return _table([head, *([name, *(each[key] for key in names)] for name, each in subsets.items())])


_TITLES = {"rewardbench": "RewardBench", "rewardbench2": "RewardBench 2", "rm_bench": "RM-Bench"}


def _benchmarks(report: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, title in _TITLES.items():
        averages: Mapping[str, Any] = report.get(key, {})
        if not averages:
            continue
        rows = [[name, value] for name, value in averages.items() if isinstance(value, float)]
        lines += _table([[title, "score"], *rows])
        if missing := averages.get("missing"):
            more = f" and {len(missing) - _NAMED} more subsets" if len(missing) > _NAMED else ""
            lines.append(f"no score as a whole: there are no rows of {', '.join(missing[:_NAMED])}{more}")
    return lines


def _against(report: Mapping[str, Any]) -> list[str]:
    against = report.get("against")
    if not against:
        return []
    lines = [
        f"{against['count']:,} scores of both: largest difference {against['max_difference']:.3g}, mean "
        f"{against['mean_absolute_difference']:.3g} (signed {against['mean_difference']:.3g})",
        f"rank correlation: {_cell(against['spearman'])} (Spearman), {_cell(against['kendall'])} (Kendall)",
    ]
    if "agreement" in against:
        lines.append(f"same answer ahead in {_cell(against['agreement'])} of {against['pairs']:,} pairs")
    named = ", ".join(f"row {each['index']} ({each['difference']:.3g})" for each in against["furthest"])
    return [*lines, f"furthest apart: {named}"]


def _finite_or_none(value: Any) -> Any:
    """A value as JSON can hold it: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {key: _finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
