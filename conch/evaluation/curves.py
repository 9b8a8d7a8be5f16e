"""Curves of proxy, gold and the members' variance, from the evaluations of a run or a folder of best-of-n.

A point of a run is one evaluation: its step, its KL from the starting policy, and means over its samples. A
point of best-of-n is one n. Both can be normalised to the starting policy: less the mean of its scores,
divided by their standard deviation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from conch.errors import DataError, missing_path
from conch.evaluation.best_of_n import BestOfN
from conch.evaluation.fits import Form
from conch.evaluation.metrics import mean_of_finite
from conch.evaluation.records import (
    GOLD,
    PROXY,
    EvaluationRecord,
    number_or_none,
    read_record,
    records_of,
    variants_of,
)

RESULTS = "results.json"
"""File of a folder of best-of-n."""
_FORMAT = 1
_KL = "eval/kl"
_VARIANCE = "eval/members_variance"


@dataclass(frozen=True)
class Start:
    """Scores of the starting policy. mean, std: over its samples."""

    mean: float
    std: float

    @classmethod
    def of(cls, scores: Any) -> Start:
        """Measure the scores that there are; NaN where there are none."""
        values = np.asarray(scores, dtype=float)
        values = values[np.isfinite(values)]
        if not len(values):
            return cls(math.nan, math.nan)
        return cls(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Curve:
    """One run, or one best-of-n.

    step: of the run; n for best-of-n.
    kl: nats per sample from the starting policy.
    proxy, gold: mean scores; NaN where there are none.
    variance: mean of the members' variance; NaN without an ensemble.
    form: which of the two it is.
    proxy_start, gold_start: scores of the starting policy, for `normalised`; None once that has been called.
    intervals: "proxy" and "gold" -> [2, points], lowest and highest at each point, as far as they are known.
    """

    label: str
    step: np.ndarray
    kl: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    variance: np.ndarray
    form: Form = "rl"
    proxy_start: Start | None = None
    gold_start: Start | None = None
    intervals: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def distance(self) -> np.ndarray:
        """sqrt(KL), 0 where an estimate near the start is negative."""
        return np.sqrt(np.maximum(self.kl, 0.0))

    def normalised(self) -> Curve:
        """The same as gains over the starting policy, in standard deviations of its scores.

        Raises:
            DataError: the starting policy's scores are all alike.
        """
        starts = {"proxy": self.proxy_start, "gold": self.gold_start}
        return replace(
            self,
            intervals={
                name: _gain(self.label, name, interval, starts[name])
                for name, interval in self.intervals.items()
            },
            proxy=_gain(self.label, "proxy", self.proxy, self.proxy_start),
            gold=_gain(self.label, "gold", self.gold, self.gold_start),
            variance=self.variance / (self.proxy_start.std**2 if self.proxy_start is not None else 1.0),
            proxy_start=None,
            gold_start=None,
        )


def _gain(label: str, name: str, scores: np.ndarray, start: Start | None) -> np.ndarray:
    if start is None or math.isnan(start.std):
        return scores
    if start.std == 0:
        raise DataError(
            f"{label}: the {name} scores of the starting policy are all alike, so that nothing can be "
            "normalised by their spread; evaluate on more samples, or look at the scorer"
        )
    return (scores - start.mean) / start.std


def curve_of(folder: Path, *, gold: str = GOLD, label: str = "", variant: str | None = None) -> Curve:
    """Read a run's folder or that of a best-of-n, whichever it is.

    gold: name of the score that watched a run.
    label: "" takes the folder's name.
    variant: of a run's evaluations, see `run_curve`.

    Raises:
        DataError: it is neither, or lacks something.
    """
    if (folder / RESULTS).is_file():
        return best_of_n_curve_of(folder, label=label)
    return run_curve(folder, gold=gold, label=label, variant=variant)


def run_curve(run_dir: Path, *, gold: str = GOLD, label: str = "", variant: str | None = None) -> Curve:
    """Read a run's evaluations.

    gold: name of the score that watched; one of another name than the default must be there.
    label: "" takes the folder's name.
    variant: suffix of a swept generation argument; None takes that of all samples, else the only one of a
        sweep that measured KL.

    Raises:
        DataError: the run kept no evaluations, none of the starting policy, none with its KL, or none with
            that gold; or a record is damaged.
    """
    records = [read_record(path) for path in _paths(run_dir, variant)]
    if records[0].step != 0:
        raise DataError(
            f"{run_dir} kept no evaluation of its starting policy: the first is of step {records[0].step}, "
            "and gains are measured from step 0"
        )
    kl = [_kl(record) for record in records]
    if not np.isfinite(kl).any():
        raise DataError(
            f"{run_dir} measured no KL in its evaluations: it needs a reference, and samples that are "
            "neither greedy nor cut by top-k or top-p"
        )
    names = dict.fromkeys(name for record in records for row in record.samples for name in row.scores)
    if gold != GOLD and gold not in names:
        raise DataError(
            f"{run_dir} has no scores `{gold}`, but {', '.join(names)}; "
            f"`conch gold-eval {run_dir} GOLD --name {gold}` adds some"
        )
    return Curve(
        label=label or run_dir.name,
        step=np.array([record.step for record in records], dtype=float),
        kl=np.array(kl),
        proxy=np.array([mean_of_finite(record.column(PROXY)) for record in records]),
        gold=np.array([mean_of_finite(record.column(gold)) for record in records]),
        variance=np.array([_variance(record) for record in records]),
        proxy_start=Start.of(records[0].column(PROXY)),
        gold_start=Start.of(records[0].column(gold)),
    )


def _paths(run_dir: Path, variant: str | None) -> list[Path]:
    variants = variants_of(run_dir)
    if not variants:
        where = "" if run_dir.exists() else missing_path(run_dir)
        raise DataError(
            f"{run_dir} holds no evaluations: give the folder of a run that kept some "
            f"(`evaluation.keep=true`), or one that `conch best-of-n` wrote{where}"
        )
    if variant is None:
        sampled = variants if len(variants) == 1 else [each for each in variants if _has_kl(run_dir, each)]
        variant = "" if "" in variants else sampled[0] if len(sampled) == 1 else None
    if variant not in variants:
        raise DataError(
            f"{run_dir} evaluated a sweep: choose one of its values with --variant, of "
            + ", ".join(f"`{each}`" for each in variants)
        )
    return records_of(run_dir, variant)


def _has_kl(run_dir: Path, variant: str) -> bool:
    return math.isfinite(_kl(read_record(records_of(run_dir, variant)[-1])))


def _kl(record: EvaluationRecord) -> float:
    value = record.metrics.get(_KL)
    return math.nan if value is None else value


def _variance(record: EvaluationRecord) -> float:
    """As it was measured, which for a sum of ensembles the samples do not tell; else of the samples."""
    measured = record.metrics.get(_VARIANCE)
    if measured is not None:
        return measured
    values = (sample.variance for sample in record.samples)
    return mean_of_finite([math.nan if value is None else value for value in values])


def results_json(
    result: BestOfN, starts: Mapping[str, Start], sources: Mapping[str, str], variance: str = ""
) -> dict[str, Any]:
    """What a folder of best-of-n holds as `results.json`.

    starts: of the columns "reward" and, where there is one, "gold".
    sources: name of a column -> what gave it.
    variance: name of the column of the members' variance; "" without an ensemble.
    """
    keys = {PROXY: "proxy", GOLD: "gold"}
    rows = []
    for k, n in enumerate(result.ns):
        row: dict[str, Any] = {"n": n, "kl": float(result.kl[k]), "sqrt_kl": math.sqrt(result.kl[k])}
        for column, key in keys.items():
            if column in result.mean:
                low, high = result.interval[column]
                row[f"{key}_score"] = float(result.mean[column][k])
                row[f"{key}_interval"] = [number_or_none(low[k]), number_or_none(high[k])]
        if variance:
            row["members_variance"] = float(result.mean[variance][k])
        rows.append(row)
    return {
        "conch_best_of_n": _FORMAT,
        "num_prompts": result.num_prompts,
        "num_samples": result.num_samples,
        "left_out_samples": result.left_out_samples,
        "left_out_prompts": result.left_out_prompts,
        "sources": dict(sources),
        "start": {name: {"mean": start.mean, "std": start.std} for name, start in starts.items()},
        "results": rows,
    }


def best_of_n_curve_of(folder: Path, *, label: str = "") -> Curve:
    """Read what `results_json` wrote.

    Raises:
        DataError: it is damaged or of another format.
    """
    path = folder / RESULTS
    try:
        content = json.loads(path.read_bytes())
        if content["conch_best_of_n"] != _FORMAT:
            raise DataError(f"{path} is of a format that this release of Conch does not read")
        rows = content["results"]
        columns = {
            key: np.array([row.get(key, math.nan) for row in rows], dtype=float)
            for key in ("n", "kl", "proxy_score", "gold_score", "members_variance")
        }
        starts = {name: Start(**start) for name, start in content["start"].items()}
        intervals = {name: _interval(rows, name) for name in ("proxy", "gold")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged or no result of best-of-n: {error}") from error
    return Curve(
        label=label or folder.name,
        step=columns["n"],
        kl=columns["kl"],
        proxy=columns["proxy_score"],
        gold=columns["gold_score"],
        variance=columns["members_variance"],
        form="best_of_n",
        proxy_start=starts.get(PROXY),
        gold_start=starts.get(GOLD),
        intervals={name: interval for name, interval in intervals.items() if np.isfinite(interval).any()},
    )


def _interval(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Lowest and highest at each n, [2, rows]; NaN where there are none."""
    edges = [row.get(f"{name}_interval") or (None, None) for row in rows]
    return np.array(edges, dtype=float).reshape(-1, 2).T
