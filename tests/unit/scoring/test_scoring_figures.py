"""Figures of pairs and of two rewards, held against hand calculations and slow definitions."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from conch.evaluation.metrics import calibration_error, pair_metrics, reliability
from conch.scoring.figures.agreement import AgreementReport, kendall
from conch.scoring.figures.pairs import PairReport
from conch.scoring.figures.report import Report, as_text


def pair(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    ones, others = (each if isinstance(each, list) else [each] for each in (chosen, rejected))
    margin = min(ones) - max(others)
    correct = 1 / (1 + others.count(min(ones))) if margin == 0 else float(margin > 0)
    scores = {"chosen_score": chosen, "rejected_score": rejected}
    return {"index": 0, "status": "ok", **scores, "margin": margin, "correct": correct, **more}


def of_pairs(*lines: dict[str, Any]) -> dict[str, Any]:
    report = PairReport()
    for line in lines:
        report.add(line)
    return report.result()


def test_accuracy_margins_and_ties_are_those_of_a_hand_calculation() -> None:
    report = of_pairs(
        pair(2.0, 1.0, subset="a"), pair(1.0, 1.0, subset="a"), pair(0.0, 2.0, subset="b"), pair(5.0, 0.0)
    )
    pairs = report["pairs"]
    assert (pairs["count"], pairs["accuracy"], pairs["ties"], pairs["strict_accuracy"]) == (4, 0.625, 1, 0.5)
    assert pairs["margin_mean"] == 1.0 and pairs["margin_quantiles"]["0.5"] == 0.5
    # Right 1, 1/2, 0, 1: variance (9 + 1 + 25 + 9) / 64 / 3.
    assert pairs["standard_error"] == pytest.approx(math.sqrt(44 / 64 / 3 / 4), abs=1e-12)
    assert {name: each["count"] for name, each in report["subsets"].items()} == {"(none)": 1, "a": 2, "b": 1}
    assert report["subsets"]["a"]["accuracy"] == 0.75 and report["subsets"]["b"]["standard_error"] is None


def test_accuracy_and_calibration_are_those_of_the_trainer() -> None:
    draw = random.Random(0)
    scores = [(draw.gauss(1, 2), draw.gauss(0, 2)) for _ in range(500)] + [(1.0, 1.0)] * 7
    figures = of_pairs(*(pair(*each) for each in scores))["pairs"]
    own = pair_metrics(scores, [0] * len(scores), ["reward"])
    assert figures["accuracy"] == pytest.approx(own["eval/accuracy"], abs=1e-12)
    assert figures["calibration_error"] == pytest.approx(own["eval/calibration_error"], abs=1e-12)


def test_calibration_error_is_the_mean_gap_of_the_reliability_table() -> None:
    # sigmoid(2) = 0.8808 in the bin from 0.85: right in 3 of 4; sigmoid(0) = 0.5: a tie.
    ahead = np.array([2.0, 2.0, -2.0, 2.0, 0.0])
    low, high = reliability(ahead)
    assert (low.count, low.confidence, low.right) == (1, 0.5, 0.5)
    assert (high.low, high.count, high.right) == (pytest.approx(0.85), 4, 0.75)
    assert high.confidence == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-12)
    gap = abs(0.75 - 1 / (1 + math.exp(-2)))
    assert calibration_error(ahead) == pytest.approx(4 * gap / 5, abs=1e-12)


def test_the_worst_chosen_answer_stands_against_the_best_rejected_one() -> None:
    figures = of_pairs(pair([3.0, 2.0], [1.0, 2.0, 2.0]), pair([3.0], [1.0, 2.0]), pair([1.0], [0.0, 2.0]))
    assert figures["pairs"]["accuracy"] == pytest.approx((1 / 3 + 1 + 0) / 3, abs=1e-12)
    assert figures["pairs"]["ties"] == 1
    assert sum(each["count"] for each in figures["pairs"]["reliability"]) == 2 * 3 + 2 + 2


def test_rewardbench_sections_weigh_subsets_by_their_size() -> None:
    lines = [
        *(pair(float(right), 0.5, subset="math-prm") for right in (1, 1, 0, 0)),
        *(pair(float(right), 0.5, subset="hep-go") for right in (1, 1, 1, 0)),
        pair(0.5, 0.5, subset="donotanswer"),
    ]
    report = of_pairs(*lines)["rewardbench"]
    assert report["Reasoning"] == pytest.approx((984 * 0.5 + 164 * 0.75) / (984 + 164), abs=1e-12)
    assert report["Safety"] == 0.0 and report["score"] is None  # a tie is wrong there
    assert "hep-rust" in report["missing"] and "Chat" not in report
    assert "rewardbench" not in of_pairs(pair(1.0, 0.0, subset="math-prm"), pair(1.0, 0.0, subset="mine"))


def test_rewardbench_weighs_refusals_as_its_code_does_since_release_0_1_3() -> None:
    right, wrong = (1.0, 0.0), (0.0, 1.0)
    safety = ("refusals-dangerous", "refusals-offensive", "donotanswer", "xstest-should-respond")
    lines = [pair(*(wrong if subset == safety[-1] else right), subset=subset) for subset in safety]
    lines.append(pair(*right, subset="xstest-should-refuse"))
    report = of_pairs(*lines)["rewardbench"]
    assert report["Safety"] == pytest.approx(490 / 740)


def test_rewardbench_2_scores_ties_by_gap_and_spread() -> None:
    lines = [
        pair([1.0], [0.0, 0.0, 0.0], subset=name) for name in ("Factuality", "Precise IF", "Math", "Safety")
    ]
    lines += [pair([1.0], [1.0, 0.0, 0.0], subset="Focus")]
    lines += [
        # Spread 0.5, gap 2, alone 3: all of it right.
        pair([3.0, 2.5], [0.5], subset="Ties", id="tied:0"), pair([3.0], [0.0], subset="Ties", id="ref:0"),
        # Spread 2, gap 1: right, and not by more than the spread.
        pair([4.0, 2.0], [1.0], subset="Ties", id="tied:1"), pair([1.0], [2.0], subset="Ties", id="ref:1"),
    ]  # fmt: skip
    report = of_pairs(*lines)["rewardbench2"]
    by_how_much = (math.tanh(2 / 0.5 - 1) + math.tanh(-1 / 2 - 1)) / 2
    ties = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * by_how_much
    assert report["Ties"] == pytest.approx(ties, abs=1e-12) and report["Focus"] == 0.5
    assert report["score"] == pytest.approx((4 + 0.5 + ties) / 6, abs=1e-12)


def test_rm_bench_compares_styles() -> None:
    lines = [
        pair([1.0, 2.0, 3.0], [0.0, 1.5, 2.5], subset="chat"),
        pair([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], subset="math"),
    ]
    report = of_pairs(*lines)["rm_bench"]
    chat, math_ = report["domains"]["chat"], report["domains"]["math"]
    assert (chat["hard"], chat["normal"], chat["easy"]) == (0.0, 1.0, 1.0)
    assert (math_["hard"], math_["normal"], math_["easy"]) == (0.0, 0.0, 1.0)
    assert report["score"] == pytest.approx((0 + 0.5 + 1) / 3, abs=1e-12)


def slow_tau_b(x: list[float], y: list[float]) -> float:
    """Kendall's tau-b by its definition."""
    pairs = np.triu_indices(len(x), k=1)
    a, b = (np.sign(np.subtract.outer(values, values)[pairs]) for values in (x, y))
    return float((a * b).sum()) / math.sqrt(float((a != 0).sum()) * float((b != 0).sum()))


@pytest.mark.parametrize("count", [2, 7, 700, 1300])
def test_kendall_is_that_of_the_definition(count: int) -> None:
    draw = random.Random(count)
    x = [float(draw.randrange(max(2, count // 3))) for _ in range(count)]
    y = [one + float(draw.randrange(max(2, count // 2))) for one in x]
    x[0], y[0], x[-1], y[-1] = -1.0, -1.0, -2.0, 99.0
    assert kendall(np.array(x), np.array(y)) == pytest.approx(slow_tau_b(x, y), abs=1e-12)
    assert kendall(np.array(x), np.array(x)) == 1.0
    assert kendall(np.ones(3), np.arange(3.0)) == 0.0


def both(index: int, own: float, other: float) -> dict[str, Any]:
    return {"index": index, "scores": {"a": own, "b": 1.0}, "against": {"scores": {"a": other, "b": 1.0}}}


def test_agreement_names_the_rows_that_differ_most() -> None:
    report = AgreementReport()
    for index, (own, other) in enumerate([(1.0, 1.5), (2.0, 2.0), (4.0, 3.0)]):
        report.add(both(index, own, other))
    figures = report.result()
    assert figures["max_difference"] == 1.0 and figures["mean_difference"] == pytest.approx(0.5 / 3)
    assert figures["mean_absolute_difference"] == 0.5 and figures["spearman"] == pytest.approx(1.0)
    assert [each["index"] for each in figures["furthest"]] == [2, 0, 1]
    named = AgreementReport("b")
    named.add(both(0, 1.0, 9.0))
    assert named.result()["max_difference"] == 0.0


def test_agreement_counts_the_pairs_with_the_same_answer_ahead() -> None:
    report = AgreementReport()
    for own, other in [((1.0, 0.0), (3.0, 0.0)), ((1.0, 0.0), (0.0, 1.0)), ((1.0, 1.0), (2.0, 2.0))]:
        report.add(pair(*own, against=pair(*other)))
    assert (report.result()["pairs"], report.result()["agreement"]) == (3, pytest.approx(2 / 3))


def test_a_report_counts_failures_and_shows_tables() -> None:
    report = Report()
    lines = [{"index": 0, "status": "ok", "scores": {"reward": 2.0}}, pair(1.0, 0.0, subset="s")]
    report.add_all([*lines, {"index": 2, "status": "timeout", "detail": "late"}])
    result = report.result()
    assert (result["rows"], result["failed"], result["first_failure"]) == (3, 1, "row 2: late")
    assert result["statuses"] == {"ok": 2, "timeout": 1}
    text = as_text(result)
    assert "accuracy 1.0000" in text and "reward" in text and "std. error" in text
    assert as_text(Report().result()) == ""


def test_columns_of_the_input_do_not_hide_ours() -> None:
    report = Report()
    line = {"margin": 7, "status": "draft", "conch_margin": 1.0, "conch_status": "ok", "index": 0}
    report.add({**pair(1.0, 0.0), **line})
    assert report.result()["pairs"]["margin_mean"] == 1.0


def test_columns_of_an_input_that_is_an_output_do_not_hide_ours() -> None:
    report = Report()
    line = {"conch_status": "late", "status": "draft", "conch_conch_status": "ok", "index": 0}
    report.add({**pair(1.0, 0.0), **line})
    assert report.result()["statuses"] == {"ok": 1}
