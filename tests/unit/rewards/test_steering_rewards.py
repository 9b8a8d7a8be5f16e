"""Rewards for reaching targets in goal space: formulas by hand, rows that are refused, what a missing value
becomes."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conch.config import RewardConfig, SteeringConfig, load
from conch.errors import ConfigError, DataError
from conch.rewards.base import RewardSource
from conch.rewards.factory import from_user
from conch.rewards.steering import SteeringReward, formulas
from conch.rewards.steering.rows import Target, read_targets
from conch.rewards.steering.source import is_in_latin_script
from conch.types import RewardResult, RewardStatus, Rollout
from tests.fakes.goal_server import goal_server
from tests.fakes.rollouts import rollout

WAIT_S = 60
ALL = ["steerability_error", "miscalibration", "orthogonality"]


def config(**settings: Any) -> SteeringConfig:
    return load(SteeringConfig, {"rewards": ["steerability_error"], "goals": ["x", "y"], **settings})


class Measures(RewardSource):
    """Goals by a table: output -> goal -> value; None has none, an output that is not there fails."""

    name = "table"

    def __init__(self, table: Mapping[str, Mapping[str, float | None]], knows: Sequence[str] = ()) -> None:
        self.table, self.knows, self.texts = table, tuple(knows), list[str]()

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.knows

    def check(self) -> None: ...

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        self.texts += [each.completion.text for each in rollouts]
        future.set_result([self._result(each.completion.text) for each in rollouts])
        return future

    def _result(self, text: str) -> RewardResult:
        if text not in self.table:
            return RewardResult(RewardStatus.TIMEOUT, detail="late")
        values = self.table[text]
        return RewardResult(
            RewardStatus.OK,
            scores={name: value for name, value in values.items() if value is not None},
            absent=tuple(name for name, value in values.items() if value is None),
            model="table",
        )


ROW = {"source_x": 0.2, "target_x": 0.8, "source_y": 0.5, "target_y": 0.5}


def reward_of(
    values: Mapping[str, float | None], row: Mapping[str, Any] = ROW, **settings: Any
) -> RewardResult:
    source = SteeringReward(Measures({"a": values}), config(**settings))
    (result,) = source.submit([rollout("p", "a", **row)]).result(WAIT_S)
    return result


# ------------------------------------------------------------------------------------------------- formulas


def test_errors_by_hand() -> None:
    # z0 = (0.2, 0.5), z* = (0.8, 0.5), z = (0.5, 0.9): left (0.3, -0.4), asked (0.6, 0), moved (0.3, 0.4)
    result = reward_of({"x": 0.5, "y": 0.9}, rewards=ALL)
    assert result.scores == pytest.approx(
        {"steerability_error": -0.5, "miscalibration": -0.3, "orthogonality": -0.4}
    )
    shares = reward_of({"x": 0.5, "y": 0.9}, rewards=ALL, normalize_miscal=True, normalize_ortho=True)
    assert shares.scores["miscalibration"] == pytest.approx(-0.3 / 0.6)
    assert shares.scores["orthogonality"] == pytest.approx(-0.4 / 0.5)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_errors_are_those_of_linear_algebra(dims: int) -> None:
    """The reference projects by the matrix of the direction, not by dot products."""
    rng = random.Random(dims)
    for _ in range(50):
        start, goal, end = (np.array([rng.random() for _ in range(dims)]) for _ in range(3))
        onto = np.outer(goal - start, goal - start) / ((goal - start) @ (goal - start))
        along = np.linalg.norm(onto @ (goal - end))
        beside = np.linalg.norm((np.eye(dims) - onto) @ (goal - end))
        left, asked, moved = (goal - end).tolist(), (goal - start).tolist(), (end - start).tolist()
        assert formulas.steerability(left, config()) == pytest.approx(-np.linalg.norm(left), abs=1e-12)
        assert formulas.miscalibration(left, asked, normalize=False) == pytest.approx(-along, abs=1e-9)
        assert formulas.miscalibration(left, asked, normalize=True) == pytest.approx(
            -along / np.linalg.norm(asked), abs=1e-9
        )
        assert formulas.orthogonality(left, asked, moved, normalize=False) == pytest.approx(-beside, abs=1e-9)
        assert formulas.orthogonality(left, asked, moved, normalize=True) == pytest.approx(
            -min(1.0, beside / np.linalg.norm(moved)), abs=1e-9
        )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, -0.5),
        ({"square_rewards": True}, -0.25),
        ({"rescale_norm": True}, 1 - math.sqrt(0.25 / 2)),
        ({"rescale_norm": True, "square_rewards": True}, 1 - 0.125),
        ({"good_enough_threshold": 0.35}, -math.hypot(0.35, 0.4)),
        ({"too_bad_threshold": 0.35}, -math.hypot(0.3, 0.35)),
        ({"good_enough_threshold": 0.35, "too_bad_threshold": 0.36}, -math.hypot(0.35, 0.36)),
        ({"decile": True}, -0.5),
    ],
)
def test_options_of_the_steerability_error(settings: dict[str, Any], expected: float) -> None:
    # 0.8 - 0.5 is 0.30000000000000004, which is still the third tenth
    assert reward_of({"x": 0.5, "y": 0.9}, **settings).scores["steerability_error"] == pytest.approx(expected)


def test_deciles_round_up_and_end_at_one() -> None:
    result = reward_of({"x": 0.79, "y": 2.5}, decile=True)
    assert result.scores["steerability_error"] == pytest.approx(-math.hypot(0.1, 1.0))


def test_a_target_that_is_reached_is_the_best_one_and_nothing_else_is() -> None:
    assert reward_of({"x": 0.8, "y": 0.5}).scores["steerability_error"] == 0.0
    assert reward_of({"x": 0.8, "y": 0.6}).scores["steerability_error"] < 0.0


def test_a_range_is_reached_anywhere_in_it() -> None:
    row = {"source_x": 0.2, "target_x": [0.6, 0.8], "source_y": 0.5, "target_y": None}
    assert reward_of({"x": 0.7, "y": 0.5}, row, rewards=ALL).scores == {
        "steerability_error": 0.0,
        "miscalibration": 0.0,
        "orthogonality": 0.0,
    }
    assert reward_of({"x": 0.9, "y": 0.5}, row).scores["steerability_error"] == pytest.approx(-0.1)
    assert reward_of({"x": 0.5, "y": 0.5}, row).scores["steerability_error"] == pytest.approx(-0.1)


def test_a_goal_without_a_target_shall_stay_where_it_is() -> None:
    row = {**ROW, "target_y": None}
    assert reward_of({"x": 0.8, "y": 0.9}, row).scores["steerability_error"] == pytest.approx(-0.4)


def test_miscalibration_says_nothing_where_no_move_was_asked_for() -> None:
    row = {**ROW, "target_x": 0.2}
    result = reward_of({"x": 0.2, "y": 0.9}, row, rewards=ALL, normalize_ortho=True)
    assert result.absent == ("miscalibration",) and "miscalibration" not in result.scores
    assert result.scores["orthogonality"] == -1.0, "all of its move is a side effect"
    assert math.isnan(result.facts["steering/miscalibration"])


def test_side_effects_in_goals_that_nobody_wanted_changed() -> None:
    row = {**ROW, "source_z": 0.1, "steering_goals": ["x"]}
    values = {"x": 0.8, "y": 0.5, "z": 0.4}
    narrow = reward_of(values, row, rewards=["orthogonality"])
    wide = reward_of(values, row, rewards=["orthogonality"], space="measured")
    assert narrow.scores["orthogonality"] == pytest.approx(0.0)
    assert wide.scores["orthogonality"] == pytest.approx(-0.3)


def test_facts_are_what_is_measured_and_no_reward() -> None:
    result = reward_of({"x": 0.5, "y": 0.9}, eval_rewards=["orthogonality", "x_error"], square_rewards=True)
    assert result.scores == {"steerability_error": pytest.approx(-0.25)}
    assert result.facts == pytest.approx(
        {
            "steering/steerability_error": -0.25,
            "steering/orthogonality": -0.4,
            "steering/x_error": -0.3,
            "steering/error": 0.5,
            "steering/error/x": 0.3,
            "steering/error/y": 0.4,
            "steering/value/x": 0.5,
            "steering/value/y": 0.9,
        }
    )


# ------------------------------------------------------------------------- what is missing is a status


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"x": 0.5, "y": None}, "gave no value for the goal `y` of row 0"),
        ({"x": 0.5}, "gave nothing (it measures x) for the goal `y`"),
        ({"detail": 1.0}, "gave nothing (it measures detail) for the goal `x`"),
    ],
)
def test_a_goal_without_a_value_is_never_the_best_reward(values: dict[str, float | None], says: str) -> None:
    result = reward_of(values)
    assert result.status is RewardStatus.INVALID and says in result.detail
    assert not result.scores


def test_a_goal_that_a_row_does_not_need_may_be_missing() -> None:
    row = {**ROW, "steering_goals": "x"}
    assert reward_of({"x": 0.5, "y": None}, row).scores == {"steerability_error": pytest.approx(-0.3)}


def test_a_failure_stays_what_it_is() -> None:
    source = SteeringReward(Measures({}), config())
    (result,) = source.submit([rollout("p", "a", **ROW)]).result(WAIT_S)
    assert result.status is RewardStatus.TIMEOUT and result.detail == "late"


def test_a_missing_goal_of_a_reward_that_only_watches_leaves_the_reward() -> None:
    result = reward_of({"x": 0.5, "y": None}, rewards=["x_error"], eval_rewards=["steerability_error"])
    assert result.scores == {"x_error": pytest.approx(-0.3)}
    assert math.isnan(result.facts["steering/steerability_error"])


# ---------------------------------------------------------------------------------------- rows and settings


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"source_x": 0.1, "source_y": 0.1}, "has no `target_x`"),
        ({**ROW, "target_y": "high"}, "`target_y` = 'high', which is no number"),
        ({**ROW, "target_y": True}, "no number"),
        ({**ROW, "target_y": math.inf}, "no number"),
        ({**ROW, "target_y": 10**400}, "no number"),
        ({**ROW, "target_y": [0.8, 0.2]}, r"`target_y` = [0.8, 0.2], which is upside down"),
        ({**ROW, "target_y": [0.8]}, "a range is [lowest, highest]"),
        ({"target_x": 0.1, "target_y": None, "source_x": 0.1}, "neither `target_y` nor a `source_y`"),
        ({**ROW, "steering_goals": ["joy"]}, "has no `target_joy`"),
        ({**ROW, "target_joy": 0.4, "steering_goals": ["joy"]}, "`joy`, which table does not measure"),
        ({**ROW, "steering_goals": []}, "name each goal once"),
        ({**ROW, "steering_goals": ["x", "x"]}, "name each goal once"),
        ({**ROW, "steering_goals": 3}, "is no list of goals"),
    ],
)
def test_rows_that_nobody_could_be_rewarded_for_are_refused(row: dict[str, Any], says: str) -> None:
    source = SteeringReward(Measures({}, knows=["x", "y"]), config())
    with pytest.raises(DataError, match=re.escape(says)):
        source.check_row(row)


def test_rows_that_are_good_pass() -> None:
    source = SteeringReward(Measures({}, knows=["x", "y"]), config(rewards=ALL))
    for goals in (None, "", "x,y", '["x", "y"]', ["x"], ("y", "x"), math.nan):
        row = {**ROW, "target_y": 0.6}
        source.check_row(row if goals is None else {**row, "steering_goals": goals})


def test_columns_that_are_no_goals_may_be_called_as_if_they_were() -> None:
    row = {**ROW, "target_language": "de", "source_url": "https://h/text"}
    source = SteeringReward(Measures({"a": {"x": 0.8, "y": 0.5}}, knows=["x", "y"]), config())
    source.check_row(row)
    (result,) = source.submit([rollout("p", "a", **row)]).result(WAIT_S)
    assert result.scores == {"steerability_error": 0.0}
    with pytest.raises(DataError, match="`target_language` = 'de', which is no number"):
        SteeringReward(Measures({}), config()).check_row(row)


def test_a_row_without_steering_goals_needs_them_in_the_settings() -> None:
    source = SteeringReward(Measures({}), config(goals=[]))
    with pytest.raises(DataError, match=r"has no `steering_goals`, and `reward\.steering\.goals`"):
        source.check_row(ROW)


def test_where_a_text_came_from_is_needed_by_what_starts_there() -> None:
    row = {"target_x": 0.1, "target_y": 0.2}
    SteeringReward(Measures({}), config()).check_row(row)
    with pytest.raises(DataError, match="has no `source_x`, which miscalibration start"):
        SteeringReward(Measures({}), config(eval_rewards=["miscalibration"])).check_row(row)


def test_a_row_that_asks_for_no_move_needs_a_reward_that_applies() -> None:
    row = {**ROW, "target_x": None, "target_y": None}
    SteeringReward(Measures({}), config()).check_row(row)
    with pytest.raises(DataError, match="asks for no move"):
        SteeringReward(Measures({}), config(rewards=["miscalibration"])).check_row(row)


def test_a_goal_in_the_settings_that_nobody_measures_is_refused() -> None:
    for settings in ({"goals": ["x", "joy"]}, {"eval_rewards": ["joy_error"]}):
        with pytest.raises(ConfigError, match="does not measure `joy`: it has x, y"):
            SteeringReward(Measures({}, knows=["x", "y"]), config(**settings)).check()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rewards": ["steerability"]}, "no reward of steering"),
        ({"rewards": ["_error"]}, "names no goal"),
        ({"rewards": [], "eval_rewards": ["miscalibration"]}, "`eval_rewards` without `rewards`"),
        ({"rewards": [], "goals": [], "square_rewards": True}, "`square_rewards` without `rewards`"),
        ({"rewards": [], "goals": [], "space": "measured"}, "`space` without `rewards`"),
        ({"eval_rewards": ["steerability_error"]}, "take it out of one"),
        ({"good_enough_threshold": 0.5, "too_bad_threshold": 0.2}, "is not below `too_bad_threshold`"),
        ({"goals": ["x", "x"]}, "stands twice"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"delta": True}, "leave `delta` out"),
        ({"combine": "uwo"}, "leave `combine` out"),
        ({"weights": {"orthogonality": 0.5}}, "`weights` names `orthogonality`, which is not in"),
    ],
)
def test_settings_of_other_rewards_do_not_go_with_steering(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(RewardConfig, {"steering": {"rewards": ["steerability_error"]}, **settings})


# ------------------------------------------------------------------------------------- texts and the factory


def test_think_format_and_english() -> None:
    table = {"a": {"x": 0.8, "y": 0.5}}
    texts = {"<think>so</think>Yes": (1.0, 1.0), "<think>so": (0.0, 1.0), "Так <think>so</think>": (0.0, 0.0)}
    rewards = ["think_format", "english_only"]
    source = SteeringReward(Measures({text: table["a"] for text in texts}), config(rewards=rewards))
    results = source.submit([_saying(text) for text in texts]).result(WAIT_S)
    assert [tuple(each.scores.values()) for each in results] == list(texts.values())


def test_thoughts_are_not_measured_where_they_are_stripped() -> None:
    measures = Measures({"Yes": {"x": 0.8, "y": 0.5}})
    source = SteeringReward(measures, config(rewards=["think_format"], strip_thinking=True))
    (result,) = source.submit([_saying("<think>so</think>\n\nYes")]).result(WAIT_S)
    assert measures.texts == ["Yes"] and result.scores == {"think_format": 1.0}


def _saying(text: str) -> Rollout:
    base = rollout("p", "a", **ROW)
    return replace(base, completion=replace(base.completion, text=text))


@pytest.mark.parametrize(
    ("text", "latin"),
    [
        ("Plain words, 3.5 % of them.", True),
        ("naïve café Ærøskøbing Ünsal", True),
        ("an angle β of 2π and ﬁve µm", True),
        ("это", False),
        ("这个 answer", False),
        ("answerです", False),
        ("λόγος", False),
        ("", True),
    ],
)
def test_letters_of_other_scripts_are_seen(text: str, latin: bool) -> None:
    assert is_in_latin_script(text) is latin


def test_steering_stands_on_whatever_measures() -> None:
    def measure(outputs: list[str], **_: Any) -> dict[str, list[float]]:
        return {"x": [float(len(text)) for text in outputs], "y": [0.5] * len(outputs)}

    section = load(RewardConfig, {"steering": {"rewards": ["steerability_error"], "goals": ["x", "y"]}})
    with from_user(measure, section, metadata_keys=ROW) as source:
        assert isinstance(source, SteeringReward) and source.measures_facts
        (result,) = source.submit([rollout("p", "abc", **ROW)]).result(WAIT_S)
    assert result.scores == {"steerability_error": pytest.approx(-2.2)}


def test_a_server_that_has_no_value_for_one_text_fails_those_that_need_it() -> None:
    goals = {"x": lambda text: 1.0, "y": lambda text: math.nan if "a" in text else 0.5}
    section = {"dialect": "goals", "steering": {"rewards": ["steerability_error"], "goals": ["x", "y"]}}
    with goal_server(goals=goals) as served, from_user(served.url, load(RewardConfig, section)) as source:
        source.check()
        rows = [("a", ROW), ("b", ROW), ("a", {**ROW, "steering_goals": ["x"]})]
        found = source.submit([rollout("p", text, **row) for text, row in rows]).result(WAIT_S)
        with pytest.raises(DataError, match=r"does not measure \(it has x, y\)"):
            source.check_row({**ROW, "target_joy": 0.2, "steering_goals": "joy"})
    assert [each.status.value for each in found] == ["invalid", "ok", "ok"]
    assert "`y`" in found[0].detail


def test_targets_are_read_as_they_stand() -> None:
    targets = read_targets({**ROW, "target_y": [0, 1], "other": 3}, config())
    assert targets.goals == {"x": Target(0.8, 0.8, 0.2), "y": Target(0.0, 1.0, 0.5)}
