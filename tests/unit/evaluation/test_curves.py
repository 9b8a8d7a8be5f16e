"""Curves from the records of a run and from results of best-of-n; what is normalised by what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch.errors import DataError
from conch.evaluation.best_of_n import best_of_n, best_of_n_kl
from conch.evaluation.curves import RESULTS, Start, curve_of, results_json, run_curve
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record


def keep(
    run_dir: Path, step: int, scores: list[dict[str, float | None]], kl: float | None, **own: Any
) -> None:
    samples = tuple(
        EvaluatedSample(number, "prompt", "output", 3, row, own.get("members", {}))
        for number, row in enumerate(scores)
    )
    record = EvaluationRecord(step, samples, {"eval/kl": kl}, own.get("variant", ""))
    write_record(record_path(run_dir, step, own.get("variant", "")), record)


def test_run_is_read_by_step_with_the_means_that_there_are(tmp_path: Path) -> None:
    keep(tmp_path, 200, [{"reward": 9.0, "gold": 2.0}, {"reward": 7.0, "gold": None}], 4.0)
    keep(tmp_path, 0, [{"reward": 1.0, "gold": 4.0}, {"reward": 3.0, "gold": 8.0}], -0.001)
    keep(tmp_path, 100, [{"reward": 5.0}, {"reward": 5.0}], 1.0, members={"a": 1.0, "b": 3.0})
    keep(tmp_path, 100, [{"reward": 99.0}], 1.0, variant="@beta=1")

    curve = curve_of(tmp_path)

    assert (curve.form, curve.label) == ("rl", tmp_path.name)
    assert curve.step.tolist() == [0, 100, 200]
    assert curve.distance.tolist() == [0.0, 1.0, 2.0]
    assert curve.proxy.tolist() == [2.0, 5.0, 8.0]
    assert curve.gold == pytest.approx([6.0, math.nan, 2.0], nan_ok=True)
    assert curve.variance == pytest.approx([math.nan, 1.0, math.nan], nan_ok=True)


def test_gains_are_in_spreads_of_the_starting_policy(tmp_path: Path) -> None:
    keep(tmp_path, 0, [{"reward": 1.0, "gold": 4.0}, {"reward": 3.0, "gold": 8.0}], 0.0)
    keep(tmp_path, 9, [{"reward": 4.0, "gold": 2.0}], 1.0, members={"a": 1.0, "b": 3.0})

    gains = run_curve(tmp_path).normalised()

    assert gains.proxy == pytest.approx([0.0, (4 - 2) / math.sqrt(2)])
    assert gains.gold == pytest.approx([0.0, (2 - 6) / math.sqrt(8)])
    assert gains.variance[1] == pytest.approx(1.0 / 2.0)


def test_another_gold_is_read_by_its_name(tmp_path: Path) -> None:
    keep(tmp_path, 0, [{"reward": 1.0, "gold": 4.0, "human": 7.0}], 0.0)

    assert run_curve(tmp_path, gold="human").gold.tolist() == [7.0]


def test_equal_scores_at_the_start_cannot_normalise(tmp_path: Path) -> None:
    keep(tmp_path, 0, [{"reward": 1.0, "gold": 4.0}, {"reward": 2.0, "gold": 4.0}], 0.0)

    with pytest.raises(DataError, match="the gold scores of the starting policy are all alike"):
        run_curve(tmp_path).normalised()


@pytest.mark.parametrize(
    ("steps", "kl", "sentence"),
    [
        ([], None, "holds no evaluations"),
        ([100], 1.0, "kept no evaluation of its starting policy: the first is of step 100"),
        ([0, 100], None, "measured no KL"),
    ],
)
def test_folder_without_what_a_curve_needs_is_refused(
    tmp_path: Path, steps: list[int], kl: float | None, sentence: str
) -> None:
    for step in steps:
        keep(tmp_path, step, [{"reward": 1.0}], kl)

    with pytest.raises(DataError, match=sentence):
        curve_of(tmp_path)


def test_results_of_best_of_n_come_back_as_they_were_written(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    prompts = [{name: draws.normal(size=50) for name in ("reward", "gold", "variance")} for _ in range(3)]
    result = best_of_n(prompts, [1, 5, 50], proxy="reward")
    starts = {name: Start.of(np.stack([each[name] for each in prompts])) for name in ("reward", "gold")}
    content = results_json(result, starts, {"reward": "rm", "gold": "gold rm"}, "variance")
    (tmp_path / RESULTS).write_text(json.dumps(content))

    curve = curve_of(tmp_path, label="single")

    assert (curve.form, curve.label) == ("best_of_n", "single")
    assert curve.step.tolist() == [1, 5, 50]
    assert curve.kl == pytest.approx([best_of_n_kl(n) for n in (1, 5, 50)])
    assert curve.gold.tolist() == result.mean["gold"].tolist()
    assert curve.normalised().gold[0] == pytest.approx(0.0)
    assert curve.variance.tolist() == result.mean["variance"].tolist()
    assert {"n", "proxy_score", "gold_score"} <= content["results"][0].keys()


def test_results_without_gold_or_of_one_prompt_are_valid_json_and_read(tmp_path: Path) -> None:
    result = best_of_n([{"reward": np.arange(4.0)}], [1, 4], proxy="reward")
    content = results_json(result, {"reward": Start.of(np.arange(4.0))}, {"reward": "rm"})
    (tmp_path / RESULTS).write_text(json.dumps(content, allow_nan=False))

    assert np.isnan(curve_of(tmp_path).normalised().gold).all()


@pytest.mark.parametrize("content", ["{", "[]", '{"conch_best_of_n": 2}', '{"conch_best_of_n": 1}'])
def test_damaged_results_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULTS).write_text(content)

    with pytest.raises(DataError, match=r"results\.json"):
        curve_of(tmp_path)
