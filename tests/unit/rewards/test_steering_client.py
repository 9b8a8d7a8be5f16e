"""The dialect `goals`: forms, names, readiness, several copies, and what a missing value becomes."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.errors import ConfigError, RewardError, RewardInvalidError
from conch.rewards.client.transport import FIRST_TEXT
from conch.rewards.served import HttpReward
from conch.types import RewardResult
from tests.fakes.goal_server import GOALS, goal_server
from tests.fakes.json_rewards import endpoint
from tests.fakes.json_rewards import goals as two_goals
from tests.fakes.rollouts import rollouts

WAIT_S = 60
QUICK = {"dialect": "goals", "client": {"deadline_s": 20.0, "request_timeout_s": 10.0}}


def source(url: str, **settings: Any) -> HttpReward:
    return HttpReward(url, load(RewardConfig, {**QUICK, **settings}))


def score(url: str, *outputs: str, **settings: Any) -> list[RewardResult]:
    """Results of outputs to the prompt `p`."""
    with source(url, **settings) as reward:
        reward.check()
        return reward.submit(rollouts(*outputs)).result(WAIT_S)


@pytest.mark.parametrize("forms", [("texts",), ("list",), ("texts", "list")])
def test_a_server_is_asked_in_the_form_that_it_takes(forms: tuple[str, ...]) -> None:
    with goal_server(forms=forms) as served:
        found = score(served.url, "a", "bb!")
    assert [each.scores for each in found] == [{"length": 1.0, "calls": 0.0}, {"length": 3.0, "calls": 1.0}]
    last = served.asked[-1]
    expected = ["a", "bb!"] if forms == ("list",) else {"texts": ["a", "bb!"], "normalize": True}
    assert last == expected


def test_a_form_that_is_set_is_the_only_one() -> None:
    with goal_server(forms=("list",)) as served, source(served.url, goal_server={"form": "texts"}) as reward:
        with pytest.raises(RewardInvalidError, match=r"HTTP 422 to .*goal_server.form=auto"):
            reward.check()
        assert all(isinstance(body, dict) for body in served.asked)


@pytest.mark.parametrize("settings", [{"normalize": False}, {"golden_of_conch": True}])
def test_a_server_that_takes_a_list_alone_is_not_asked_for_values_without_ranges(
    settings: dict[str, Any],
) -> None:
    with (
        goal_server(forms=("list",)) as served,
        source(served.url, goal_server=settings) as reward,
        pytest.raises(RewardInvalidError, match="cannot ask for values without ranges"),
    ):
        reward.check()
    with pytest.raises(ConfigError, match="`normalize` = false cannot be said"):
        load(RewardConfig, {"goal_server": {"form": "list", "normalize": False}})


@pytest.mark.parametrize("dialect", ["query", "messages"])
def test_settings_of_goal_servers_are_refused_with_other_dialects(dialect: str) -> None:
    whole = load(RewardConfig, {"dialect": dialect}).model_dump()  # as it is saved, with every key
    words = f"`goal_server.send` acts with `dialect` = goals only, not with {dialect}"
    with pytest.raises(ConfigError, match=words):
        load(RewardConfig, {**whole, "goal_server": {"send": "sample"}})
    load(RewardConfig, whole)


def test_a_server_of_neither_form_is_told_from_a_bad_text() -> None:
    with (
        goal_server(forms=()) as served,
        source(served.url) as reward,
        pytest.raises(RewardInvalidError, match=r"HTTP 422 to .* and to \[text") as refused,
    ):
        reward.check()
    assert "secret text" not in str(refused.value)


@pytest.mark.parametrize(("send", "length"), [("output", 2.0), ("sample", 3.0)])
def test_the_output_alone_is_measured_unless_a_key_says_otherwise(send: str, length: float) -> None:
    with goal_server() as served:
        (found,) = score(served.url, "bb", goal_server={"send": send, "normalize": False})
    assert found.scores["length"] == length
    assert served.asked[-1]["normalize"] is False


def test_goals_that_are_named_are_taken_and_others_left() -> None:
    with goal_server() as served:
        (found,) = score(served.url, "bb!", goal_server={"names": ["calls"]})
    assert found.scores == {"calls": 1.0}


@pytest.mark.parametrize("lists", [True, False])
def test_a_server_without_a_goal_is_refused_with_what_it_has(lists: bool) -> None:
    settings = {"goal_server": {"names": ["length", "joy"]}}
    with (
        goal_server(lists=lists) as served,
        source(served.url, **settings) as reward,
        pytest.raises(RewardInvalidError, match=r"does not measure `joy`; it has length, calls"),
    ):
        reward.check()


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_goal_without_a_value_fails_its_sample_and_no_other(value: float | None) -> None:
    measures = {**GOALS, "calls": lambda text: value if "x" in text else 1.0}
    with goal_server(goals=measures) as served:
        named = score(served.url, "a", "x", "bb", goal_server={"names": ["length", "calls"]})
    assert [each.status.value for each in named] == ["ok", "invalid", "ok"]
    assert "`calls`" in named[1].detail and "row 1" in named[1].detail
    assert named[2].scores == {"length": 2.0, "calls": 1.0}


def test_null_of_goals_that_nobody_named_says_that_they_do_not_apply() -> None:
    measures = {**GOALS, "calls": lambda text: None if "x" in text else 1.0}
    with goal_server(goals=measures) as served:
        found = score(served.url, "x", "bb")
    assert found[0].scores == {"length": 1.0} and found[0].absent == ("calls",)
    assert found[1].scores == {"length": 2.0, "calls": 1.0}


@pytest.mark.parametrize(("path", "target"), [("/goalspace", "/goalspace/"), ("/goalspace/", "/goalspace")])
def test_a_redirect_by_a_slash_is_followed(path: str, target: str) -> None:
    with goal_server(path=path, redirect=target) as served:
        found = score(served.url, "bb")
    assert found[0].scores["length"] == 2.0


@pytest.mark.parametrize(
    ("target", "says"), [("/elsewhere", "to /elsewhere, which is not"), ("http://h:1/x", "to another server")]
)
def test_other_redirects_are_explained(target: str, says: str) -> None:
    with (
        goal_server(redirect=target) as served,
        source(served.url) as reward,
        pytest.raises(RewardError, match=f"HTTP 307 Temporary Redirect {says}"),
    ):
        reward.check()


def golden(**goals: float) -> dict[str, Any]:
    return {"goal_server": {"golden": [{"text": "Oh no!", "goals": goals, "tolerance": 0.01}]}}


def test_a_server_that_measures_golden_texts_right_is_used() -> None:
    with goal_server() as served:
        assert score(served.url, "bb", **golden(length=6.0, calls=1.005))[0].ok


@pytest.mark.parametrize(
    ("goals", "says"),
    [
        ({"length": 7.0}, "gives 6 for `length` on a golden text, expected 7 within 0.01"),
        ({"joy": 0.1}, "gives no value for `joy`"),
    ],
)
def test_a_server_that_measures_golden_texts_otherwise_is_refused(goals: dict[str, float], says: str) -> None:
    with (
        goal_server() as served,
        source(served.url, **golden(**goals)) as reward,
        pytest.raises(RewardInvalidError, match=re.escape(says)),
    ):
        reward.check()


def test_one_of_two_copies_that_measures_otherwise_is_refused() -> None:
    wrong = {**GOALS, "length": lambda text: 0.0}
    with (
        goal_server() as good,
        goal_server(goals=wrong) as bad,
        source(f"{good.url},{bad.url}", **golden(length=6.0)) as reward,
        pytest.raises(RewardInvalidError, match="golden"),
    ):
        reward.check()


def test_three_copies_one_killed_in_mid_batch_give_the_same_results() -> None:
    outputs = ["a" * (1 + n % 17) + "!" * (n % 3) + chr(97 + n % 26) for n in range(400)]
    settings = {"client": {"batch_rows": 8, "deadline_s": 40.0, "max_in_flight": 2}}
    with ExitStack() as stack:
        copies = [stack.enter_context(goal_server(delay_s=0.005)) for _ in range(3)]
        url = ",".join(each.url for each in copies)
        undisturbed = score(url, *outputs, **settings)
    with ExitStack() as stack:
        copies = [
            stack.enter_context(goal_server(delay_s=0.005, die_at=6 if number == 1 else None))
            for number in range(3)
        ]
        disturbed = score(",".join(each.url for each in copies), *outputs, **settings)
        assert copies[1].dead.is_set() and len(copies[1].asked) >= 6
    assert [each.scores for each in disturbed] == [each.scores for each in undisturbed]
    assert all(each.ok for each in disturbed)


def test_bisection_finds_the_text_that_breaks_the_server() -> None:
    def answer(samples: list[str]) -> tuple[int, bytes]:
        if any("x" in sample for sample in samples):
            return 500, b"secret text"
        return two_goals(samples)

    with endpoint(answer) as served:
        found = score(served.url, "a", "x", "bb", "ccc", goal_server={"form": "list"})
    assert [each.ok for each in found] == [True, False, True, True]


def test_a_busy_server_is_left_alone_for_as_long_as_it_says() -> None:
    with goal_server() as served, source(served.url, client={"max_in_flight": 4, "batch_rows": 1}) as reward:
        reward.check()
        served.busy, served.retry_after = 1, "1"
        before = len(served.times)
        found = reward.submit(rollouts("a")).result(WAIT_S)
        first, second = served.times[before : before + 2]
        assert found[0].ok and second - first >= 0.99
        assert reward.stats().retries_by.get("unavailable") == 1


def test_a_busy_server_may_name_a_date_and_another_copy_takes_over() -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=300), usegmt=True)
    with goal_server() as busy, goal_server() as free, source(f"{busy.url},{free.url}") as reward:
        reward.check()
        busy.busy, busy.retry_after = 10**6, date
        found = reward.submit(rollouts(*("a" * n for n in range(1, 40)))).result(WAIT_S)
        asked = len(busy.asked)
        more = reward.submit(rollouts(*("b" * n for n in range(1, 40)))).result(WAIT_S)
        assert all(each.ok for each in [*found, *more])
        assert len(busy.asked) == asked, "it was to be left alone"


def test_a_probe_is_a_text_with_words() -> None:
    with goal_server() as served:
        score(served.url, "bb")
    sent = {text for body in served.asked for text in body["texts"]}
    assert sent == {FIRST_TEXT, "bb"}


def test_golden_texts_need_finite_values() -> None:
    with pytest.raises(ConfigError, match="finite"):
        load(RewardConfig, golden(length=math.nan))
