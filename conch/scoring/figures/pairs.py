"""What scores of pairs say about a reward: accuracy, margins and calibration, as a whole and by subset.

Of a row with several chosen or rejected answers, the margin is that of the worst chosen one over the best
rejected one; calibration is about each chosen one against each rejected one. Accuracy and calibration error
are those of the reward model trainer, `conch.evaluation.metrics`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from conch.evaluation.metrics import calibration_error, reliability
from conch.scoring.figures.benchmarks import Benchmarks

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class PairReport:
    """Gathers the lines of pairs; of each a few numbers are kept."""

    def __init__(self) -> None:
        self._margins, self._correct = array("d"), array("d")
        self._differences = array("d")
        self._subsets: dict[str, int] = {}
        self._subset_of = array("l")
        self._benchmarks = Benchmarks()

    def __len__(self) -> int:
        return len(self._margins)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a line with the scores of a pair."""
        subset = str(line.get("subset", ""))
        chosen, rejected = (as_list(line[name]) for name in ("chosen_score", "rejected_score"))
        self._margins.append(line["margin"])
        self._correct.append(line["correct"])
        self._differences.extend(one - other for one in chosen for other in rejected)
        self._subset_of.append(self._subsets.setdefault(subset, len(self._subsets)))
        self._benchmarks.add(subset, line.get("id"), chosen, rejected)

    def result(self) -> dict[str, Any]:
        """Return the figures, of {} where there are no pairs.

        pairs: of all.
        subsets: name -> of those of the subset; where rows name subsets.
        rewardbench, rewardbench2, rm_bench: where subsets or answers are those of the benchmark.
        """
        if not len(self):
            return {}
        margins, correct = np.array(self._margins), np.array(self._correct)
        differences = np.array(self._differences)
        quantiles = np.quantile(margins, _QUANTILES)
        report: dict[str, Any] = {
            "pairs": {
                **figures(margins, correct),
                "margin_std": float(margins.std()),
                "margin_quantiles": {
                    f"{q:g}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)
                },
                "calibration_error": calibration_error(differences),
                "reliability": [asdict(each) for each in reliability(differences)],
            }
        }
        if set(self._subsets) != {""}:
            subset_of = np.array(self._subset_of)
            report["subsets"] = {
                name or "(none)": figures(margins[subset_of == number], correct[subset_of == number])
                for name, number in sorted(self._subsets.items())
            }
        strict = {name: float(each["strict_accuracy"]) for name, each in report.get("subsets", {}).items()}
        accuracies = {name: float(each["accuracy"]) for name, each in report.get("subsets", {}).items()}
        return report | self._benchmarks.result(strict, accuracies)


def figures(margins: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Figures of some pairs.

    count: pairs.
    accuracy: share of pairs whose chosen text is ahead; of n texts that score alike, each by 1 / n.
    standard_error: of the accuracy, from the spread over pairs; None of a single one.
    ties: pairs whose chosen text scores as the rejected one.
    strict_accuracy: the same, with ties for wrong.
    margin_mean: score of the chosen text less that of the rejected one.
    """
    count = len(margins)
    error = float(correct.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return {
        "count": count,
        "accuracy": float(correct.mean()),
        "standard_error": error,
        "ties": int((margins == 0).sum()),
        "strict_accuracy": float((margins > 0).mean()),
        "margin_mean": float(margins.mean()),
    }


def as_list(value: Any) -> Sequence[float]:
    """One score or several."""
    return value if isinstance(value, list) else [value]
