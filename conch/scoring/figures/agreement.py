"""How two rewards agree about the same samples: differences, ranks, and which answer of a pair is ahead."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from conch.evaluation.metrics import rank_correlation
from conch.scoring.figures.pairs import as_list

_NAMED = 5
_BLOCK = 512


class AgreementReport:
    """Gathers the lines that two rewards have scored.

    objective: what is compared where there are several; None compares the sum of all.
    """

    def __init__(self, objective: str | None = None) -> None:
        self._objective = objective
        self._own, self._others = array("d"), array("d")
        self._pairs = self._agreed = 0
        self._furthest: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._own)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a line with the scores of both."""
        other = line["against"]
        own, others = (_numbers(each, self._objective) for each in (line, other))
        if not own or not others:
            return
        self._own.extend(own)
        self._others.extend(others)
        furthest = max(abs(one - two) for one, two in zip(own, others, strict=True))
        heapq.heappush(self._furthest, (furthest, -line["index"]))
        if len(self._furthest) > _NAMED:
            heapq.heappop(self._furthest)
        if "margin" in line:
            self._pairs += 1
            self._agreed += bool(np.sign(line["margin"]) == np.sign(other["margin"]))

    def result(self) -> dict[str, Any]:
        """Return the figures; {} where nothing has both scores.

        count: scores that were compared, of pairs those of all answers.
        max_difference, mean_absolute_difference, mean_difference: of ours less the other's.
        spearman, kendall: rank correlations, the second one tau-b (Kendall 1945).
        furthest: index of the rows that differ most, with by how much.
        agreement: of pairs, how often both put the same answer ahead, or none.
        """
        if not len(self):
            return {}
        own, others = np.array(self._own), np.array(self._others)
        differences = own - others
        pairs = {"pairs": self._pairs, "agreement": self._agreed / self._pairs} if self._pairs else {}
        furthest = sorted(self._furthest, reverse=True)
        return {
            "count": len(own),
            "max_difference": float(np.abs(differences).max()),
            "mean_absolute_difference": float(np.abs(differences).mean()),
            "mean_difference": float(differences.mean()),
            "spearman": rank_correlation(own.tolist(), others.tolist()),
            "kendall": kendall(own, others),
            "furthest": [{"index": -index, "difference": far} for far, index in furthest],
            **pairs,
        }


def _numbers(line: Mapping[str, Any], objective: str | None) -> list[float]:
    """The score of a sample, none where the objective does not apply to it; or those of all answers of a
    pair."""
    if "margin" in line:
        return [*as_list(line["chosen_score"]), *as_list(line["rejected_score"])]
    scores = line["scores"]
    if objective is None:
        return [math.fsum(scores.values())]
    return [scores[objective]] if objective in scores else []


def kendall(left: np.ndarray, right: np.ndarray) -> float:
    """Kendall's tau-b of two columns, in O(n log n) (Knight 1966); 0 where one side does not vary."""
    order = np.lexsort((right, left))
    x, y = left[order], right[order]
    pairs = len(x) * (len(x) - 1) // 2
    tied_x, tied_y = _tied(x), _tied(y)
    tied_both = _tied(np.concatenate([[0], np.cumsum((np.diff(x) != 0) | (np.diff(y) != 0))]))
    discordant = _inversions(y)
    concordant = pairs - tied_x - tied_y + tied_both - discordant
    scale = math.sqrt(float(pairs - tied_x) * float(pairs - tied_y))
    return (concordant - discordant) / scale if scale else 0.0


def _tied(values: np.ndarray) -> int:
    """Pairs of equal values."""
    counts = np.unique(values, return_counts=True)[1].astype(object)
    return int((counts * (counts - 1) // 2).sum())


def _inversions(values: np.ndarray) -> int:
    """Pairs of which the later value is less, by merging blocks."""
    total = 0
    blocks = [values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK)]
    for block in blocks:
        total += int(np.triu(np.greater.outer(block, block), 1).sum())
    blocks = [np.sort(block) for block in blocks]
    while len(blocks) > 1:
        merged = []
        for one, other in zip(blocks[::2], [*blocks[1::2], values[:0]], strict=False):
            total += int((len(one) - np.searchsorted(one, other, side="right")).sum())
            merged.append(np.sort(np.concatenate([one, other]), kind="stable"))
        blocks = merged
    return total
