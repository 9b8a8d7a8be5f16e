"""Alarms and the rule by which a run stops, on evaluations written by hand."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.config import AlarmsConfig, StopRule, TrackingConfig
from conch.errors import ConfigError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.evaluation.watch import (
    ALARMS_FILE,
    Change,
    Evaluation,
    Watch,
    comparable,
    cut_evaluations,
    prompt_means,
    report,
    standard_error,
)
from conch.runs.tracking import Tracker

NAN = math.nan
ALARMS = AlarmsConfig()
GOLD_RULE = StopRule("eval/gold/reward", 2)


def evaluation(
    step: int,
    reward: Sequence[float],
    gold: Sequence[float],
    *,
    repeats: int = 1,
    lengths: Sequence[float] | None = None,
    variances: Sequence[float] | None = None,
    inputs: str = "prompt",
) -> Evaluation:
    """One of as many prompts as there are scores for, `repeats` completions each."""
    samples = tuple(
        EvaluatedSample(
            place // repeats,
            f"{inputs} {place // repeats}",
            f"output {place} of step {step}",
            3,
            {"reward": one, "gold": None if math.isnan(other) else other},
        )
        for place, (one, other) in enumerate(zip(reward, gold, strict=True))
    )
    columns = {
        "reward": reward,
        "gold/reward": gold,
        "length_mean": lengths or [3.0] * len(reward),
        **({"members_variance": variances} if variances else {}),
    }
    return Evaluation(EvaluationRecord(step, samples), columns)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def scores(one: Evaluation) -> dict[str, float]:
    there = [value for value in one.columns["gold/reward"] if math.isfinite(value)]
    return {"eval/gold/reward": sum(there) / len(there) if there else NAN}


# ------------------------------------------------------------------------------------------------- statistics


def test_standard_error_is_that_of_prompts_and_not_of_completions() -> None:
    """Two completions of each of four prompts: means 1, 2, 3, 6; their sample variance is 14/3."""
    means = prompt_means([0, 0, 1, 1, 2, 2, 3, 3], [0.0, 2.0, 2.0, 2.0, 1.0, 5.0, 6.0, 6.0])
    assert means == [1.0, 2.0, 3.0, 6.0]
    assert standard_error(means) == pytest.approx(math.sqrt(14 / 3 / 4), rel=1e-12)
    assert math.isnan(standard_error([1.0, NAN])) and math.isnan(standard_error([]))


def test_completions_in_any_order_give_the_same_means() -> None:
    pairs = [(place // 3, float(place**2)) for place in range(12)]
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert prompt_means(*zip(*shuffled, strict=True)) == pytest.approx(
        prompt_means(*zip(*pairs, strict=True)), rel=1e-15
    )


def test_a_prompt_keeps_the_mean_of_what_there_is() -> None:
    assert prompt_means([0, 0, 1], [1.0, NAN, NAN]) == [1.0, pytest.approx(NAN, nan_ok=True)]


def test_a_change_is_paired_and_leaves_out_prompts_without_a_pair() -> None:
    """Differences 1, 1, 4 of the three prompts that have both: their own spread of 100 is not in it."""
    change = Change.between([0.0, 100.0, 200.0, NAN], [1.0, 101.0, 204.0, 5.0])
    assert change.mean == 2.0
    assert change.standard_error == pytest.approx(1.0, rel=1e-12)
    assert change.of_each[:3] == (1.0, 1.0, 4.0) and math.isnan(change.of_each[3])


# ----------------------------------------------------------------------------------------------------- alarms


def judged(watch: Watch, *evaluations: Evaluation, config: AlarmsConfig = ALARMS) -> list[Any]:
    return [watch.judge(one, config) for one in evaluations]


BEST = evaluation(10, [0.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0])


@pytest.mark.parametrize(
    ("reward", "gold", "on"),
    [
        # differences -2, -2, -2, -3: mean -2.25, standard error 0.25: nine of them
        ([1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 5.0], True),
        ([0.0, 1.0, 2.0, 3.0], [3.0, 4.0, 5.0, 5.0], False),  # the reward stands still
        ([-1.0, 1.0, 2.0, 3.0], [3.0, 4.0, 5.0, 5.0], False),  # the reward falls as well
        ([1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 7.0, 10.0], False),  # -2, -2, 0, 2: within the noise
        ([1.0, 2.0, 3.0, 4.0], [4.0, 5.0, 6.0, 7.0], True),  # every prompt by 1: without any noise
        ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], False),  # a tie
        ([1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, NAN], True),  # one prompt without gold
    ],
)
def test_gold_falls_where_it_fell_by_more_than_noise_while_the_reward_rose(
    reward: list[float], gold: list[float], on: bool
) -> None:
    _, (metrics, begun) = judged(Watch(), BEST, evaluation(20, reward, gold))
    assert metrics["alarm/gold_falls"] == float(on)
    assert [alarm.name for alarm in begun] == ["gold_falls"] * on


def test_gold_is_compared_with_its_best_evaluation_and_says_the_figures() -> None:
    better = evaluation(20, [1.0, 2.0, 3.0, 4.0], [6.0, 7.0, 8.0, 9.0])
    now = evaluation(30, [2.0, 3.0, 4.0, 5.0], [4.0, 5.0, 6.0, 6.0])
    *_, (_, (alarm,)) = judged(Watch(), BEST, better, now)
    assert (alarm.step, alarm.then) == (30, 20)
    assert alarm.message == (
        "since step 20 gold has fallen by 2.25 (9 standard errors over 4 prompts) while the reward has risen "
        "by 1"
    )


def test_an_alarm_begins_once_until_it_has_ended() -> None:
    up = [1.0, 2.0, 3.0, 4.0]
    low, high = [3.0, 4.0, 5.0, 5.0], [4.9, 6.1, 6.9, 8.1]
    steps = [BEST, *(evaluation(20 + k, up, gold) for k, gold in enumerate((low, low, high, low)))]
    verdicts = judged(Watch(), *steps)
    assert [metrics["alarm/gold_falls"] for metrics, _ in verdicts] == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert [len(begun) for _, begun in verdicts] == [0, 1, 0, 0, 1]


def test_an_evaluation_without_gold_is_not_judged_and_ends_nothing() -> None:
    up, low = [1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 5.0]
    away = evaluation(30, up, [NAN, NAN, NAN, 50.0])
    verdicts = judged(Watch(), BEST, evaluation(20, up, low), away, evaluation(40, up, low))
    assert str([metrics["alarm/gold_falls"] for metrics, _ in verdicts]) == "[0.0, 1.0, nan, 1.0]"
    assert [len(begun) for _, begun in verdicts] == [0, 1, 0, 0]


@pytest.mark.parametrize(("factor", "on"), [(4.1, True), (4.0, False), (1.0, False), (0.1, False)])
def test_members_disagree_above_a_factor_of_the_start(factor: float, on: bool) -> None:
    start = evaluation(0, [0.0, 0.0], [NAN, NAN], variances=[0.5, 1.5])
    now = evaluation(5, [0.0, 0.0], [NAN, NAN], variances=[0.5 * factor, 1.5 * factor])
    _, (metrics, begun) = judged(Watch(), start, now)
    assert metrics["alarm/members_disagree"] == float(on) and len(begun) == on


@pytest.mark.parametrize(("length", "on"), [(20.1, True), (20.0, False), (5.0, False), (4.9, True)])
def test_length_drifts_either_way(length: float, on: bool) -> None:
    start = evaluation(0, [0.0, 0.0], [NAN, NAN], lengths=[5.0, 15.0])
    now = evaluation(5, [0.0, 0.0], [NAN, NAN], lengths=[length, length])
    _, (metrics, begun) = judged(Watch(), start, now)
    assert metrics["alarm/length_drift"] == float(on) and len(begun) == on


def test_an_alarm_that_is_not_wanted_is_not_there() -> None:
    off = AlarmsConfig(gold_falls=None, members_disagree=None, length_drift=None)
    ((metrics, begun),) = judged(Watch(), BEST, config=off)
    assert (metrics, begun) == ({}, [])


def test_other_prompts_are_compared_with_nothing() -> None:
    now = evaluation(20, [1.0] * 3, [0.0] * 3, lengths=[30.0] * 3, inputs="other")
    _, (metrics, _) = judged(Watch(), BEST, now)
    assert set(metrics.values()) == {0.0}


# --------------------------------------------------------------------------------------------------- stopping


def falls(rule: StopRule, *golds: Sequence[float]) -> list[int]:
    watch, counts = Watch(), []
    for step, gold in enumerate(golds):
        one = evaluation(step, [0.0] * len(gold), gold)
        watch.judge(one, ALARMS)
        watch.count_fall(step, scores(one), one, rule)
        counts.append(watch.falls)
    return counts


def test_a_row_counts_evaluations_below_the_best_and_ends_with_one_that_is_not() -> None:
    row = [[5.0, 5.0], [4.0, 5.0], [4.9, 5.0], [5.0, 5.0], [4.0, 4.0], [6.0, 5.0], [5.2, 5.2], [5.4, 5.4]]
    assert falls(GOLD_RULE, *row) == [0, 1, 2, 0, 1, 0, 1, 2]


def test_a_row_goes_on_behind_an_evaluation_without_gold() -> None:
    assert falls(GOLD_RULE, [5.0, 5.0], [4.0, 5.0], [NAN, NAN], [4.0, 5.0]) == [0, 1, 1, 2]


def test_what_is_left_of_gold_that_went_away_is_no_best_evaluation() -> None:
    """One of three prompts scores higher than before; the next evaluation is not compared with it."""
    row = [[5.0, 5.0, 5.0], [9.0, NAN, NAN], [5.0, 5.0, 5.0]]
    assert falls(GOLD_RULE, *row) == [0, 0, 0]


@pytest.mark.parametrize(("errors", "count"), [(None, 1), (2.4, 1), (2.5, 0)])
def test_a_margin_counts_standard_errors_of_the_paired_change(errors: float | None, count: int) -> None:
    """Changes 0, -1, -1, -2 after scores that lie far apart: mean -1, standard error 0.408; 2.449 of them."""
    rule = StopRule("eval/gold/reward", 2, errors)
    assert falls(rule, [0.0, 100.0, 200.0, 300.0], [0.0, 99.0, 199.0, 298.0]) == [0, count]


def test_a_single_prompt_falls_by_no_margin() -> None:
    assert falls(GOLD_RULE, [5.0], [4.0]) == [0, 1]
    assert falls(StopRule("eval/gold/reward", 2, 1.0), [5.0], [4.0]) == [0, 0]


def test_a_metric_without_samples_is_compared_by_its_value() -> None:
    watch, rule = Watch(), StopRule("eval/kl", 1)
    for step, kl in enumerate([0.3, 0.4, 0.39]):
        watch.count_fall(step, {"eval/kl": kl}, None, rule)
    assert watch.falls == 1
    assert watch.reason(rule) == "eval/kl was below that of step 1 for 1 evaluations"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (StopRule("eval/glod", 2), r"eval/glod, which is no evaluation metric; there are: eval/kl"),
        (GOLD_RULE, r"goes by gold, and nothing gives it: set `evaluation\.gold`"),
        (StopRule("eval/kl", 2, 1.0), "counts standard errors over prompts, which eval/kl has none of"),
    ],
)
def test_a_rule_by_what_is_not_evaluated_is_refused(rule: StopRule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Watch().count_fall(0, {"eval/kl": 1.0}, BEST, rule)


def test_gold_of_few_prompts_decides_no_checkpoint() -> None:
    def value(failed: float) -> float:
        return comparable({"eval/gold/reward": 3.0, "eval/gold/failed_fraction": failed}, "eval/gold/reward")

    assert value(0.5) == 3.0 and math.isnan(value(0.6))
    assert comparable({"eval/reward": 2.0, "eval/gold/failed_fraction": 1.0}, "eval/reward") == 2.0


# -------------------------------------------------------------------------------------------- state and files


def test_a_watch_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    generator = random.Random(1)

    def drawn(step: int) -> Evaluation:
        gold = [generator.gauss(-step, 1.0) for _ in range(8)]
        gold[step % 8] = NAN
        reward = [generator.gauss(step, 1.0) for _ in range(8)]
        return evaluation(step, reward, gold, lengths=[2.0 + step] * 8, variances=[1.0 + 2 * step] * 8)

    whole, parts, seen = Watch(), Watch(), []
    for step in range(8):
        one = drawn(step)
        found = []
        for watch in (whole, parts):
            found.append(watch.judge(one, ALARMS))
            watch.count_fall(step, scores(one), one, GOLD_RULE)
        assert repr(found[0]) == repr(found[1])
        seen += [alarm.name for alarm in found[0][1]]
        state = json.loads(json.dumps(parts.state_dict(), allow_nan=False))
        assert state == whole.state_dict()
        parts = Watch()
        parts.load_state_dict(state)
        assert parts.falls == whole.falls
    assert {"gold_falls", "members_disagree", "length_drift"} == set(seen)


def test_an_alarm_is_put_on_record_with_the_prompts_that_changed_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = evaluation(20, [1.0, 2.0, 3.0, 4.0], [4.5, 3.0, 6.0, 7.5])
    write_record(record_path(tmp_path, 10), BEST.record)
    _, (_, alarms) = judged(Watch(), BEST, now, config=AlarmsConfig(gold_falls=1.0))
    with Tracker(tmp_path, TrackingConfig(), total_steps=1, desc="x") as tracker:
        report(alarms, now, tracker)

    (line,) = (tmp_path / ALARMS_FILE).read_text().splitlines()
    assert json.loads(line)["name"] == "gold_falls" and json.loads(line)["step"] == 20
    assert json.loads(line)["message"] in caplog.text
    rows = table(tmp_path / "samples/alarm_gold_falls_000020.csv")
    assert [row["prompt"] for row in rows] == ["prompt 1", "prompt 2", "prompt 0", "prompt 3"]
    assert rows[0] == {
        "prompt": "prompt 1",
        "output_then": "output 1 of step 10",
        "output_now": "output 1 of step 20",
        **{"reward_then": "1.0", "reward_now": "2.0", "gold_then": "6.0", "gold_now": "3.0"},
        "change": "-3.0",
    }


def test_a_table_without_kept_evaluations_shows_what_there_is(tmp_path: Path) -> None:
    now = evaluation(20, [1.0, 2.0], [4.0, 5.0], lengths=[9.0, 12.0])
    _, (_, alarms) = judged(Watch(), evaluation(10, [0.0, 1.0], [4.0, 5.0]), now)
    with Tracker(tmp_path, TrackingConfig(), total_steps=1, desc="x") as tracker:
        report(alarms, now, tracker)
    rows = table(tmp_path / "samples/alarm_length_drift_000020.csv")
    assert [(row["prompt"], row["output_then"], row["change"]) for row in rows] == [
        ("prompt 1", "", "9.0"),
        ("prompt 0", "", "6.0"),
    ]


@pytest.mark.parametrize(("evaluated", "left"), [(True, [10, 20]), (False, [10])])
def test_a_resumed_run_deletes_what_it_writes_again(tmp_path: Path, evaluated: bool, left: list[int]) -> None:
    for step in (10, 20, 30):
        write_record(record_path(tmp_path, step), EvaluationRecord(step, ()))
        write_record(record_path(tmp_path, step, "@beta=1"), EvaluationRecord(step, (), variant="@beta=1"))
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / f"samples/alarm_gold_falls_{step:06d}.csv").touch()
    (tmp_path / "evaluations/.step_000010.jsonl.partial").touch()
    (tmp_path / "evaluations/mine.txt").touch()
    lines = [json.dumps({"step": step, "name": "length_drift"}) for step in (10, 20, 30)]
    (tmp_path / ALARMS_FILE).write_text("\n".join([*lines, '{"step": 4']))

    cut_evaluations(tmp_path, 20, evaluated=evaluated)

    names = {path.name for path in (tmp_path / "evaluations").iterdir()}
    assert names == {"mine.txt", *(f"step_{step:06d}{v}.jsonl" for step in left for v in ("", "@beta=1"))}
    assert [json.loads(line)["step"] for line in (tmp_path / ALARMS_FILE).read_text().splitlines()] == left
    assert len(list((tmp_path / "samples").iterdir())) == len(left)
