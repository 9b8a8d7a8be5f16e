from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from conch.config import GoalsConfig, RewardConfig
from conch.config.reward import source_in_short
from conch.errors import ConfigError, RewardError, RewardUnavailableError
from conch.rewards import from_user
from conch.rewards.combined import SumReward
from conch.rewards.goals import DEFAULT_GOALS, Failure, Goal, GoalSpace
from conch.rewards.goals import named as named_module
from conch.rewards.goals.base import MeasuredGoal, Value
from conch.rewards.goals.source import GoalsReward
from conch.types import RewardStatus
from tests.fakes.rollouts import rollout, rollouts

TEXT = "The quick brown fox jumps over the lazy dog."
SENTENCE = "The committee reported on Monday that nobody in the small room was happy."


def lengths(texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def picky(texts: Sequence[str]) -> list[float | None]:
    """Raises for a batch with an exclamation mark, has no value for a question."""
    if any("!" in text for text in texts):
        raise ValueError("cannot read " + " ".join(texts))
    return [None if "?" in text else 1.0 for text in texts]


class Away(Goal):
    """A goal whose server is away."""

    def __init__(self) -> None:
        self.name = "away"

    def start(self, texts: Sequence[str]) -> Callable[[], list[Value]]:
        return lambda: [Failure(RewardStatus.UNAVAILABLE, "goal `away`: no connection")] * len(texts)


def test_the_four_goals_are_measured_and_normalised() -> None:
    space = GoalSpace(",".join(DEFAULT_GOALS))
    assert space.names == ("reading_difficulty", "formality", "textual_diversity", "text_length")
    raw = space.measure([TEXT, ""], normalize=False)
    assert raw["text_length"] == [10.0, 0.0]
    assert raw["textual_diversity"][0] == pytest.approx(9 / (1 / 9 / 0.28))
    normal = space.measure([TEXT, ""])
    (grade,) = space.measure([SENTENCE], normalize=False)["reading_difficulty"]
    assert space.measure([SENTENCE])["reading_difficulty"] == [pytest.approx((grade - 2.8) / (12.9 - 2.8))]
    assert normal["text_length"] == [0.0, 0.0]  # below the range of 78 to 1509 words
    assert all(0 <= value <= 1 for values in normal.values() for value in values)
    assert space.measure([]) == {name: [] for name in space.names}


def test_a_goal_that_raises_fails_its_own_texts_alone() -> None:
    space = GoalSpace([MeasuredGoal("picky", picky), MeasuredGoal("long", lengths)])
    values = space.measure(["a", "b!", "c?", "dd"], normalize=False)
    assert values["long"] == [1.0, 2.0, 2.0, 2.0]
    assert [math.isnan(value) for value in values["picky"]] == [False, True, True, False]


def test_messages_repeat_nothing_of_a_text(caplog: pytest.LogCaptureFixture) -> None:
    space = GoalSpace([MeasuredGoal("picky", picky)])
    (failure,) = space.outcomes(["my secret!"], normalize=False)["picky"]
    assert isinstance(failure, Failure)
    assert failure == (RewardStatus.INVALID, "goal `picky` raised ValueError")
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ([1.0], "returned 1 values for 2 texts"),
        (3.0, "returned a float for 2 texts"),
        ("ab", "returned 2 values for 2 texts"),
        ([1.0, math.inf], "has no value for the text"),
        ([1.0, "2.0"], "has no value for the text"),
    ],
)
def test_what_is_not_one_number_for_each_text_is_no_value(reply: Any, told: str) -> None:
    space = GoalSpace([MeasuredGoal("odd", lambda texts: reply)])
    last = space.outcomes(["a", "b"], normalize=False)["odd"][-1]
    assert isinstance(last, Failure)
    assert told in last.detail


def test_a_model_that_is_away_is_an_error_and_not_a_text_without_value() -> None:
    space = GoalSpace([MeasuredGoal("long", lengths), Away()])
    with pytest.raises(RewardUnavailableError, match="no connection"):
        space.measure(["a"], normalize=False)


def test_goals_come_from_files_rules_and_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my_goals_of_a_test.py"
    file.write_text(
        "def vowels(texts):\n    return [sum(text.count(v) for v in 'aeiou') for text in texts]\n"
    )
    point = EntryPoint(
        "installed", "tests.unit.rewards.goals.test_goals_space:lengths", named_module.ENTRY_POINTS
    )
    monkeypatch.setattr(named_module, "entry_points", lambda group: [point])
    goals = [f"{file}:vowels", f"v={file}:vowels", "installed", "marks=count:!", "asks=rate:\\?"]
    space = GoalSpace(goals)
    assert space.names == ("vowels", "v", "installed", "marks", "asks")
    assert space.measure(["One two? No!!"], normalize=False) == {
        "vowels": [3.0],
        "v": [3.0],
        "installed": [13.0],
        "marks": [2.0],
        "asks": [pytest.approx(100 / 3)],
    }
    assert math.isnan(space.measure([""], normalize=False)["asks"][0])


@pytest.mark.parametrize(
    ("goals", "told"),
    [
        ("text_lenght", "did you mean text_length?"),
        ("text_length,,formality", "with a comma between"),
        ("text_length,text_length", "named twice"),
        ("nowhere.py:f", "there is no such file"),
        ("count:a", "needs a name"),
        ("broken=count:(", "no regular expression"),
        ([], "at least one goal"),
    ],
)
def test_goals_that_are_none_are_told(goals: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        GoalSpace(goals, setting="GOAL_DIMENSIONS")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("long: {min: 5, max: 3}", "upside down"),
        ("long: {min: 5, max: 5}", "upside down or empty"),
        ("long: {min: 5}", "needs two numbers"),
        ("long: {min: a, max: 3}", "needs two numbers"),
        ("long: {min: .nan, max: 3}", "needs two numbers"),
        ("long: {min: 1, max: 3, mean: 2}", "has the key `mean`"),
        ("- long", "goal: {min"),
        ("long: [", "neither YAML nor JSON"),
    ],
)
def test_ranges_that_are_none_are_told(content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "ranges.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        GoalSpace([MeasuredGoal("long", lengths)], file)
    assert told in str(error.value)
    assert str(file) in str(error.value) or "write one" in str(error.value)


def test_a_goal_without_a_range_is_refused_before_texts_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    file.write_text('{"lang": {"min": 0, "max": 2}}')
    for space in (
        GoalSpace([MeasuredGoal("long", lengths)]),
        GoalSpace([MeasuredGoal("long", lengths)], file),
    ):
        with pytest.raises(ConfigError, match=r"goal `long` has no range .*\(`goals.normalization`"):
            space.check()
        with pytest.raises(ConfigError, match="goal `long` has no range"):
            space.measure(["a"])
        space.check(normalize=False)
    with pytest.raises(ConfigError, match="did you mean the `lang` there"):
        GoalSpace([MeasuredGoal("long", lengths)], file).check()


def test_ranges_clip_and_null_takes_values_as_they_are() -> None:
    ranges: Mapping[str, Any] = {"long": {"min": 1, "max": 3}, "raw": None}
    space = GoalSpace([MeasuredGoal("long", lengths), MeasuredGoal("raw", lengths)], ranges)
    values = space.measure(["", "aa", "aaaaa"])
    assert values == {"long": [0.0, 0.5, 1.0], "raw": [0.0, 2.0, 5.0]}


class Shelf:
    """Keeps values in a dict, and notes what was asked for."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}

    def get(self, goal: str, texts: Sequence[str]) -> list[float | None]:
        return [self.values.get((goal, text)) for text in texts]

    def put(self, goal: str, values: Mapping[str, float]) -> None:
        self.values |= {(goal, text): value for text, value in values.items()}


def test_values_are_kept_by_goal_and_version_as_they_are_before_ranges() -> None:
    shelf, measured = Shelf(), list[str]()

    def counted(texts: Sequence[str]) -> list[float]:
        measured.extend(texts)
        return lengths(texts)

    first = GoalSpace([MeasuredGoal("long", counted, "1")], {"long": (0, 4)}, store=shelf)
    assert first.measure(["a", "bb"]) == {"long": [0.25, 0.5]}
    assert first.measure(["bb", "ccc", "bb"]) == {"long": [0.5, 0.75, 0.5]}
    assert measured == ["a", "bb", "ccc"]
    other_range = GoalSpace([MeasuredGoal("long", counted, "1")], {"long": (0, 2)}, store=shelf)
    assert other_range.measure(["a"]) == {"long": [0.5]}
    assert len(measured) == 3
    for other in (MeasuredGoal("long", counted, "2"), MeasuredGoal("broad", counted, "1")):
        GoalSpace([other], store=shelf).measure(["a"], normalize=False)
    GoalSpace([MeasuredGoal("long", counted)], store=shelf).measure(["a"], normalize=False)
    assert measured[3:] == ["a", "a", "a"]


def test_texts_without_a_value_are_not_kept() -> None:
    shelf = Shelf()
    space = GoalSpace([MeasuredGoal("picky", picky, "1")], store=shelf)
    space.measure(["a", "b!", "c?"], normalize=False)
    assert shelf.values == {("picky@1", "a"): 1.0}


def test_threads_may_share_a_space() -> None:
    space, texts = GoalSpace(",".join(DEFAULT_GOALS)), [f"{TEXT} {TEXT[:n]}" for n in range(40)]
    expected = space.measure(texts)
    found: list[dict[str, list[float]]] = []
    threads = [threading.Thread(target=lambda: found.append(space.measure(texts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_goals_as_a_reward_score_the_output_alone() -> None:
    config = RewardConfig(goals=GoalsConfig(normalize=False))
    with from_user("goals:text_length,marks=count:!", config) as source:
        source.check()
        results = source.submit([rollout("a long prompt! it is", "two!")]).result()
    assert results[0].scores == {"text_length": 2.0, "marks": 1.0}
    assert source.name == "goals text_length, marks"


def test_a_text_without_a_value_is_an_invalid_sample_that_names_the_goal() -> None:
    space = GoalSpace([MeasuredGoal("picky", picky), MeasuredGoal("long", lengths)])
    with GoalsReward(space, normalize=False) as source:
        fine, without = source.submit([rollout("p", "a"), rollout("p", "b?")]).result()
    assert fine.scores == {"picky": 1.0, "long": 1.0}
    assert (without.status, without.detail) == (
        RewardStatus.INVALID,
        "goal `picky` has no value for the text",
    )
    assert not without.scores


def test_a_model_that_is_away_leaves_samples_unavailable() -> None:
    with GoalsReward(GoalSpace([MeasuredGoal("long", lengths), Away()]), normalize=False) as source:
        (result,) = source.submit(rollouts("a")).result()
    assert (result.status, result.detail) == (RewardStatus.UNAVAILABLE, "goal `away`: no connection")


def test_goals_stand_where_an_address_may() -> None:
    assert source_in_short("goals:v=goals.py:vowels") == {"url": "goals:v=goals.py:vowels"}
    with from_user(None, RewardConfig(url="goals:text_length")) as source:
        source.check()
    with pytest.raises(ConfigError, match="did you mean formality"):
        from_user("goals:formalty", RewardConfig())
    with pytest.raises(ConfigError, match=r"reward\.dense"):
        from_user("goals:text_length", RewardConfig(dense=True))


def test_a_goal_without_a_value_for_plain_texts_is_told_before_the_run() -> None:
    def broken(texts: Sequence[str]) -> list[float]:
        raise KeyError("x")

    with pytest.raises(RewardError, match="goal `broken` raised KeyError"):
        GoalSpace([MeasuredGoal("broken", broken)]).check(normalize=False)


def test_digest_of_a_reward_is_that_of_its_ranges() -> None:
    def digest(high: float, **settings: Any) -> str:
        ranges = {"text_length": (0.0, high), "other": None}
        with (
            GoalsReward(GoalSpace("text_length", ranges), **settings) as source,
            SumReward({"a": source}) as both,
        ):
            assert both.digest == source.digest
            return source.digest

    assert digest(10.0) == digest(10.0) != digest(20.0) and digest(10.0)
    assert digest(10.0, normalize=False) == "", "ranges change nothing"
