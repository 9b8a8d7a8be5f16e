"""A judge asked over a real socket: what it is shown, what becomes of its answers, and what they cost."""

from __future__ import annotations

import email.utils
import json
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse, Response

from conch.config import JudgeConfig, RewardConfig, load
from conch.errors import ConfigError, DataError, RewardUnavailableError
from conch.interop.local import LocalReward
from conch.rewards.factory import from_user, shared_reward
from conch.rewards.judge.cache import AnswerCache
from conch.rewards.judge.endpoint import Answer
from conch.rewards.judge.limits import RateLimit, asked_pause_s, duration_s, exhausted_pause_s
from conch.rewards.judge.source import JudgeReward, read_judge
from conch.rewards.score import score
from conch.types import Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout
from tests.fakes.judge_server import Judge, judge_server, refuses, says, with_logprobs
from tests.fakes.rollouts import rollout, rollouts
from tests.launches import free_port


def judge(server: Judge | str, **settings: Any) -> JudgeReward:
    """A source, closed by the caller."""
    url = server if isinstance(server, str) else server.url
    keys = settings.pop("metadata_keys", None)
    config = load(JudgeConfig, {"url": url, "model": "judge", **settings})
    return JudgeReward(read_judge(config), metadata_keys=keys)


def scored(source: JudgeReward, samples: Sequence[Rollout]) -> list[RewardResult]:
    """Results, and the source closed behind them."""
    with closing(source):
        return source.submit(samples).result(60)


def scores(results: Sequence[RewardResult]) -> list[float]:
    assert all(result.ok for result in results), [result.detail for result in results]
    return [result.scores["reward"] for result in results]


def by_length(body: Mapping[str, Any]) -> str:
    """A judge that likes long answers: the number of letters between the lines of equals signs."""
    return str(len(body["messages"][-1]["content"].split("==========")[1].strip()))


# ---------------------------------------------------------------------------------------------- what is shown


def test_numbers_of_a_judge_become_scores_in_order() -> None:
    with judge_server(by_length) as server:
        results = scored(judge(server), rollouts("a", "bbbb", "cccccccccc"))
        assert scores(results) == [0.0, pytest.approx(1 / 3), 1.0]
        assert {result.model for result in results} == {"judge"}
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("judge", 0, 0, 1024)
        assert "logprobs" not in body and "authorization" not in server.headers[0]


def test_template_shows_columns_messages_and_a_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    dialogue = Dialogue(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))
    prompt = Prompt("<|user|>Hi", (1,), {"reference": "Hello!", "output": "a column"}, dialogue)
    sample = Rollout(prompt, Completion("Hey", (2,), (0.0,), "eos"), 0)
    template = (
        "{{ prompt }}|{{ output }}|{{ reference }}|{{ row.output }}|"
        "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    )
    with judge_server() as server:
        settings = {"template": template, "system": "Judge {{ reference }}", "key_env": "JUDGE_KEY"}
        extra = {"body": {"chat_template_kwargs": {"enable_thinking": False}}}
        scored(judge(server, **settings, **extra), [sample])
        system, user = server.bodies[0]["messages"]
        assert system == {"role": "system", "content": "Judge Hello!"}
        assert user["content"] == (
            "system: Be brief.\n\nuser: Hi|Hey|Hello!|a column|system:Be brief.;user:Hi;assistant:Hey;"
        )
        assert server.headers[0]["authorization"] == "Bearer sk-secret"
        assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_template_names_only_what_is_there() -> None:
    with judge_server() as server:
        source = judge(server, template="{{ output }} {{ referense }}", metadata_keys=["reference"])
        with closing(source), pytest.raises(ConfigError, match=r"`referense`.*did you mean reference"):
            source.check()
        with closing(judge(server, template="{{ output }} {{ row['key'] }} {{ row.other }}")) as source:
            source.check_row({"key": 1, "other": 2})
            with pytest.raises(DataError, match="has no `other`"):
                source.check_row({"key": 1})
        assert server.bodies == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "{{ output"}, "no template"),
        ({"template": "{{ prompt }}"}, "shows no answer"),
        ({"template": "Rate the output to: {{ prompt }}"}, "shows no answer"),
        (
            {
                "template": "{{ output }}",
                "parser": "rubric",
                "ask": "each",
                "rubric": [{"name": "a", "question": "Is it?"}],
            },
            "asks the same for each item",
        ),
        ({"parser": "ranking", "template": "{{ output }}"}, "shows no answer"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        ({"url": "ftp://h/v1"}, r"^judge.url `ftp://h/v1` is not of the form `http"),
        ({"url": "http://h/v1,http://h/v1"}, r"^judge.url `http://h/v1,http://h/v1` names a server twice"),
        (
            {"url": "http://me:secret@h/v1"},
            r"^judge.url `h/v1`: .*`judge.headers_env.authorization=VARIABLE`",
        ),
        ({"headers_env": {"grpc-x": "HOME"}}, r"^judge.headers_env: `grpc-x` cannot be a header"),
        ({"headers_env": {"x-key": "NOT_SET_ANYWHERE"}}, r"^judge.headers_env: environment variable NOT_SET"),
        ({"template_file": "/nowhere/t.j2"}, "cannot be read"),
        ({"model": None}, r"`judge.model`"),
    ],
)
def test_judge_that_cannot_work_is_refused_when_made(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        judge("http://127.0.0.1:1/v1", **settings)


def test_template_that_reaches_for_more_is_stopped_and_tells_nothing() -> None:
    with judge_server() as server:
        template = "{{ output.__class__.__mro__ }}"
        (result,) = scored(judge(server, template=template), rollouts("secret words"))
        assert result.status is RewardStatus.INVALID
        assert "SecurityError" in result.detail and "secret" not in result.detail
        assert server.bodies == []


def test_file_gives_keys_and_what_stands_beside_it_goes_before(tmp_path: Path) -> None:
    (tmp_path / "show.j2").write_text("Look: {{ output }}")
    with judge_server() as server:
        file = tmp_path / "judge.yaml"
        file.write_text(f"url: {server.url}\nmodel: judge\ntemplate_file: show.j2\nmax_tokens: 8\n")
        with from_user(f"judge:{file}", RewardConfig()) as source:
            assert scores(source.submit(rollouts("a")).result(60)) == [pytest.approx(6 / 9)]
        assert server.shown == ["Look: a"] and server.bodies[-1]["max_tokens"] == 8
        config = load(RewardConfig, {"judge": {"file": str(file), "max_tokens": 9, "temperature": 0.0}})
        with from_user(None, config) as source:
            source.submit(rollouts("b")).result(60)
        assert server.bodies[-1]["max_tokens"] == 9


def test_settings_beside_a_file_are_held_against_those_in_it(tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("url: http://h:1/v1\nmodel: judge\nprice_in: 1.0\nvotes: 3\ntemperature: 1.0\n")
    beside = load(RewardConfig, {"judge": {"file": str(file), "budget": 5.0, "min_votes": 3}}).judge
    read = read_judge(beside)
    assert (read.budget, read.price_in, read.min_votes, read.votes) == (5.0, 1.0, 3, 3)
    with pytest.raises(ConfigError, match=r"judge.yaml: (?s:.*)`min_votes` = 4 is more than `votes` = 3"):
        read_judge(load(JudgeConfig, {"file": str(file), "min_votes": 4}))


def test_rows_to_score_give_the_columns_that_a_template_names(tmp_path: Path) -> None:
    with judge_server() as server:
        file = tmp_path / "judge.yaml"
        file.write_text(f"url: {server.url}\nmodel: judge\ntemplate: '{{{{ output }}}} for {{{{ key }}}}'\n")
        rows = [{"prompt": "p", "completion": "a", "key": "b"}, {"prompt": "p", "completion": "c"}]
        first, lacking = score(rows, reward=f"judge:{file}")
        assert first.ok and server.shown[-1] == "a for b"
        assert lacking.status is RewardStatus.INVALID and "UndefinedError" in lacking.detail


def test_reward_of_another_trainer_takes_columns_as_its_rows_have_them(tmp_path: Path) -> None:
    with judge_server() as server:
        file = tmp_path / "judge.yaml"
        file.write_text(f"url: {server.url}\nmodel: judge\ntemplate: '{{{{ output }}}} for {{{{ key }}}}'\n")
        reward = LocalReward(f"judge:{file}", None)
        reward.check()
        reward.check([{"prompt": "p", "key": "b"}])
        with pytest.raises(ConfigError, match="`key`, which is neither"):
            reward.check([{"prompt": "p", "kei": "b"}])


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*judge.yaml"):
        (tmp_path / "judge.yaml").write_text("- a\n")
        from_user(f"judge:{tmp_path / 'juge.yaml'}", RewardConfig())
    with pytest.raises(ConfigError, match="keys and values"):
        from_user(f"judge:{tmp_path / 'judge.yaml'}", RewardConfig())
    (tmp_path / "judge.yaml").write_text("modell: m\n")
    with pytest.raises(ConfigError, match=r"(?s)judge.yaml: .*unknown key `modell`"):
        from_user(f"judge:{tmp_path / 'judge.yaml'}", RewardConfig())


def test_gold_that_asks_the_same_questions_is_the_reward(tmp_path: Path) -> None:
    for name, port, parser in (("a", 1, "number"), ("b", 2, "number"), ("c", 1, "ranking")):
        text = f"url: http://h:{port}/v1\nmodel: judge\nparser: {parser}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    names = [f"judge:{tmp_path / name}.yaml" for name in "abc"]
    shared = [shared_reward(name, RewardConfig(), names[0], RewardConfig()) for name in names]
    assert shared == ["", "", None]


# ------------------------------------------------------------------------------------------- what is answered


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda _: "I cannot say PRIVATE", "holds no number"),
        (lambda _: says("7", "length"), "cut"),
        (lambda _: says("7", "content_filter"), "content_filter"),
        (lambda _: says(None, refusal="PRIVATE"), "refusal"),
        (lambda _: says(None), "empty"),
        (lambda _: {"message": {"content": 7}}, "no chat completion"),
        (lambda _: refuses(400, code="context_length_exceeded"), "longer than the judge's context"),
        (lambda _: refuses(422), "HTTP 422"),
    ],
)
def test_answer_that_cannot_be_read_is_invalid_and_tells_nothing(rule: Any, words: str) -> None:
    with judge_server(rule) as server:
        (result,) = scored(judge(server), [rollout("secret", "words")])
        assert (result.status, dict(result.scores)) == (RewardStatus.INVALID, {})
        assert words in result.detail and "sample " in result.detail
        assert "PRIVATE" not in result.detail and "secret" not in result.detail
        assert len(server.bodies) == 1, "asking again would give the same"


def test_expected_value_over_choices_by_log_probabilities() -> None:
    def rule(body: Mapping[str, Any]) -> Any:
        assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 1
        share = {"x": 0.8, "y": 0.4}["x" if "x" in body["messages"][-1]["content"].split("=====")[2] else "y"]
        places = {" Yes": math.log(share / 2), "yes": math.log(share / 2), "No": math.log(0.9 - share)}
        return with_logprobs(" Yes", places, finish_reason="length")

    settings = {"parser": "logprobs", "choices": {"yes": 1, "no": 0}, "max_tokens": 1}
    with judge_server(rule) as server:
        results = scored(judge(server, **settings), rollouts("x", "z"))
        assert scores(results) == [pytest.approx(0.8 / 0.9), pytest.approx(0.4 / 0.9)]


def test_log_probability_that_is_no_number_is_no_certainty() -> None:
    def rule(_: Mapping[str, Any]) -> Any:
        choice = with_logprobs("A", {"A": math.nan, "B": math.log(0.9)})
        return Response(json.dumps({"model": "judge", "choices": [choice]}), media_type="application/json")

    settings = {"parser": "logprobs", "choices": {"A": 1, "B": 0}, "max_tokens": 1}
    with judge_server(rule) as server:
        (result,) = scored(judge(server, **settings), rollouts("a"))
    assert result.status is RewardStatus.INVALID and "no chat completion" in result.detail


def test_comparison_is_asked_both_ways_so_that_a_liking_for_a_place_cancels() -> None:
    def rule(body: Mapping[str, Any]) -> str:
        first, second = body["messages"][-1]["content"].split("|")
        return "1" if len(first) >= len(second) - 2 else "2"  # the first, unless it is much shorter

    settings = {"parser": "choice", "choices": {"1": 1, "2": 0}, "against": "chosen"}
    samples = [rollout("p", output, chosen="aaaa") for output in ("aaaa", "a", "aaaaaaaa")]
    with judge_server(rule) as server:
        results = scored(judge(server, template="{{ first }}|{{ second }}", **settings), samples)
        assert scores(results) == [0.5, 0.0, 1.0]
        assert len(server.bodies) == 5, "of two equal answers both ways are one question"


RUBRIC = {
    "parser": "rubric",
    "rubric": [
        {"name": "true", "question": "Is it true?", "weight": 3},
        {"name": "style", "question": "How well is it written?", "scores": [1, 5]},
    ],
}


def test_rubric_in_one_request_has_items_as_facts_or_objectives() -> None:
    with judge_server(lambda _: '{"true": true, "style": 3}') as server:
        source = judge(server, **RUBRIC)
        assert source.measures_facts
        (result,) = scored(source, rollouts("a"))
        assert (result.scores, result.facts) == ({"reward": 0.875}, {"true": 1.0, "style": 0.5})
        assert '"true": Is it true? (true or false)' in server.shown[0]
        assert '"style": How well is it written? (a number from 1.0 to 5.0)' in server.shown[0]
        (result,) = scored(judge(server, **RUBRIC, items="objectives"), rollouts("a"))
        assert (result.scores, result.facts) == ({"true": 0.75, "style": 0.125}, {})


def test_rubric_item_by_item_needs_every_answer() -> None:
    answers = {"Is it true?": "no", "How well": "5"}

    def rule(body: Mapping[str, Any]) -> str:
        return next(answer for start, answer in answers.items() if start in body["messages"][-1]["content"])

    with judge_server(rule) as server:
        (result,) = scored(judge(server, **RUBRIC, ask="each"), rollouts("a"))
        assert (result.scores, result.facts) == ({"reward": 0.25}, {"true": 0.0, "style": 1.0})
        answers["How well"] = "cannot say"
        (result,) = scored(judge(server, **RUBRIC, ask="each"), rollouts("b"))
        assert result.status is RewardStatus.INVALID


def test_votes_have_seeds_of_their_own_and_most_of_them_must_be_read() -> None:
    answers = {0: "4", 1: "7", 2: "nothing"}
    settings = {"votes": 3, "temperature": 1.0, "scaled_to": None}
    with judge_server(lambda body: answers[body["seed"]]) as server:
        (result,) = scored(judge(server, **settings), rollouts("a"))
        assert (result.scores["reward"], result.detail) == (5.5, "scored by 2 of 3 votes")
        (result,) = scored(judge(server, **settings, min_votes=3), rollouts("b"))
        assert result.status is RewardStatus.INVALID and "2 of 3 votes" in result.detail
        answers[2] = "10"
        (result,) = scored(judge(server, **settings, combine="median"), rollouts("c"))
        assert (result.scores["reward"], result.detail) == (7.0, "")


def test_judges_with_the_next_seed_share_no_vote() -> None:
    asked: list[int] = []
    with judge_server(lambda body: asked.append(body["seed"]) or "4") as server:
        for seed in (0, 1, 2):
            settings = {"votes": 3, "temperature": 1.0, "scaled_to": None, "seed": seed}
            scored(judge(server, **settings), rollouts("a"))
    assert len(asked) == len(set(asked)) == 9


def test_votes_without_seeds_are_asked_for_each() -> None:
    numbers = iter("468")
    with judge_server(lambda body: next(numbers) if "seed" not in body else "") as server:
        settings = {"votes": 3, "temperature": 1.0, "scaled_to": None, "seed": None}
        assert scores(scored(judge(server, **settings), rollouts("a"))) == [6.0]


# ---------------------------------------------------------------------------------------------------- retries


def test_server_that_is_busy_is_asked_again_when_it_says() -> None:
    moments: list[float] = []

    def rule(_: Mapping[str, Any]) -> Any:
        moments.append(time.monotonic())
        return refuses(429, retry_after="0.5") if len(moments) == 1 else "7"

    with judge_server(rule) as server:
        source = judge(server)
        with closing(source):
            assert scores(source.submit(rollouts("a")).result(60)) == [pytest.approx(6 / 9)]
            stats = source.stats()
        assert moments[1] - moments[0] >= 0.5
        assert (stats.requests, stats.retries, dict(stats.retries_by)) == (2, 1, {"unavailable": 1})


def test_another_server_gets_what_a_busy_one_does_not_take() -> None:
    with judge_server(lambda _: refuses(429, retry_after="30")) as busy, judge_server() as free:
        urls = f"{busy.url},{free.url}"
        started = time.monotonic()
        results = scored(judge(urls, max_in_flight=2), rollouts(*"abcdefgh"))
        assert len(scores(results)) == 8
        assert time.monotonic() - started < 20
        assert len(busy.bodies) <= 2 and len(free.bodies) == 8


def test_busy_server_is_left_alone_by_requests_that_wait_for_their_turn() -> None:
    answers = iter([refuses(429, retry_after="1")])
    with judge_server(lambda _: next(answers, "7")) as server:
        results = scored(judge(server, requests_per_minute=600), rollouts(*"abcd"))
        assert len(scores(results)) == 4
        assert server.times[1] - server.times[0] >= 0.95


@pytest.mark.parametrize("key", ["ya29.a0-b_c", "a/b+c==", "name:secret"])
def test_keys_of_any_provider_are_sent_as_they_are(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with judge_server() as server:
        scored(judge(server, key_env="JUDGE_KEY"), rollouts("a"))
        assert server.headers[0]["authorization"] == f"Bearer {key}"
    monkeypatch.setenv("JUDGE_KEY", "two words")
    with pytest.raises(ConfigError, match="JUDGE_KEY: what this") as refused:
        judge("http://h:1/v1", key_env="JUDGE_KEY")
    assert "two" not in str(refused.value)


def test_headers_that_say_that_nothing_is_left_hold_the_next_request_back() -> None:
    with judge_server() as server:
        server.sent_headers |= {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
        scored(judge(server, max_in_flight=1), rollouts("a", "b"))
        assert server.times[1] - server.times[0] >= 0.35


@pytest.mark.parametrize("headers", [{"retry_after": "1"}, {"retry_after_ms": "1000"}])
def test_failure_that_passes_holds_the_next_request_back_for_as_long_as_it_says(
    headers: dict[str, str],
) -> None:
    answers = iter([refuses(503, **headers)])
    with judge_server(lambda _: next(answers, "7")) as server:
        results = scored(judge(server, max_in_flight=1), rollouts("a", "b"))
        assert len(scores(results)) == 2
        assert server.times[1] - server.times[0] >= 0.95


@pytest.mark.parametrize("reason", ["stop", "eos", "EOS_TOKEN", "end_turn", "COMPLETE", "", None])
def test_answers_are_whole_by_the_words_of_any_server(reason: Any) -> None:
    with judge_server(lambda _: says("7", reason)) as server:
        assert scores(scored(judge(server), rollouts("a"))) == [pytest.approx(6 / 9)]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("length", "was cut at `judge.max_tokens`"),
        ("MAX_TOKENS", "was cut at `judge.max_tokens`"),
        ("content_filter", "ended by `content_filter`"),
        ("tool_calls", "ended by `tool_calls`"),
        ("some_new_word", "ended by `some_new_word`"),
    ],
)
def test_answers_that_are_not_whole_are_no_scores(reason: str, words: str) -> None:
    with judge_server(lambda _: says("7", reason)) as server:
        (result,) = scored(judge(server), rollouts("a"))
        assert result.status is RewardStatus.INVALID and words in result.detail
        assert len(server.bodies) == 1


@pytest.mark.parametrize("reason", ["abort", "error", "insufficient_system_resource"])
def test_answer_that_the_server_broke_off_is_asked_for_again(reason: str) -> None:
    answers = iter([says("7", reason), "8"])
    with judge_server(lambda _: next(answers)) as server:
        assert scores(scored(judge(server), rollouts("a"))) == [pytest.approx(7 / 9)]
    with judge_server(lambda _: says("7", reason)) as server:
        (result,) = scored(judge(server, deadline_s=0.5), rollouts("a"))
        assert (
            result.status is RewardStatus.UNAVAILABLE
            and f"broke its answer off (`{reason}`)" in result.detail
        )


@pytest.mark.parametrize("status", [500, 502, 503, 408])
def test_failures_that_pass_are_retried(status: int) -> None:
    answers = iter([refuses(status), "7"])
    with judge_server(lambda _: next(answers)) as server:
        assert scores(scored(judge(server), rollouts("a"))) == [pytest.approx(6 / 9)]


def test_server_that_answers_too_late_is_a_timeout_within_the_deadline() -> None:
    waited = threading.Event()
    with judge_server(lambda _: (waited.wait(10), "7")[1]) as server:
        started = time.monotonic()
        (result,) = scored(judge(server, request_timeout_s=0.2, deadline_s=1.0), rollouts("a"))
        waited.set()
        assert result.status is RewardStatus.TIMEOUT and "attempts" in result.detail
        assert time.monotonic() - started < 8


def test_server_that_is_away_is_unavailable_and_found_again() -> None:
    port = free_port()
    with closing(judge(f"http://127.0.0.1:{port}/v1", deadline_s=1.0)) as source:
        (result,) = source.submit(rollouts("a")).result(60)
        assert result.status is RewardStatus.UNAVAILABLE
        with judge_server(port=port):
            assert scores(source.submit(rollouts("a")).result(60)) == [pytest.approx(6 / 9)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: refuses(401), "judge.key_env"),
        (lambda: refuses(429, code="insufficient_quota"), "no quota left"),
    ],
)
def test_failure_that_lasts_is_not_asked_again(answer: Any, words: str) -> None:
    with judge_server(lambda _: answer()) as server:
        (result,) = scored(judge(server, deadline_s=30.0), rollouts("a"))
        assert result.status is RewardStatus.UNAVAILABLE and words in result.detail
        assert len(server.bodies) == 1


def test_another_model_behind_the_same_name_ends_the_run() -> None:
    with judge_server() as server, closing(judge(server)) as source:
        source.submit(rollouts("a")).result(60)
        server.model, server.rule = "other", lambda _: "7"
        server.answer = lambda body, answer=server.answer: answer({**body, "model": "other"})  # pyright: ignore
        (result,) = source.submit(rollouts("b")).result(60)
        assert result.status is RewardStatus.INVALID
        assert "another model" in source.stats().model_change


# ------------------------------------------------------------------------------------------------------ check


def test_check_asks_once_and_names_the_models_that_are_there() -> None:
    with judge_server() as server:
        with closing(judge(server, metadata_keys=[])) as source:
            source.check()
        assert len(server.bodies) == 1
        server.model = "larger"
        with closing(judge(server)) as source, pytest.raises(ConfigError, match="no such model, but larger"):
            source.check()


def test_check_wants_log_probabilities_where_they_are_read() -> None:
    with judge_server(lambda _: "A") as server:
        settings = {"parser": "logprobs", "choices": {"A": 1, "B": 0}}
        with closing(judge(server, **settings)) as source, pytest.raises(ConfigError, match="logprobs"):
            source.check()


def test_check_of_a_server_without_tls_names_the_settings_of_the_judge() -> None:
    with judge_server() as server:
        url = server.url.replace("http://", "https://")
        with (
            closing(judge(url)) as source,
            pytest.raises(RewardUnavailableError, match=r"check `judge\.tls`"),
        ):
            source.check()


def test_check_of_a_server_that_is_away_is_an_error_and_of_one_of_two_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = f"http://127.0.0.1:{free_port()}/v1"
    with closing(judge(away)) as source, pytest.raises(RewardUnavailableError, match="no connection"):
        source.check()
    with judge_server() as server, closing(judge(f"{away},{server.url}")) as source:
        with caplog.at_level(logging.WARNING, "conch"):
            source.check()
        assert "one of 2 servers cannot be used yet" in caplog.text


# ------------------------------------------------------------------------------------ limits, costs and cache


def test_no_more_requests_are_under_way_than_allowed() -> None:
    def slow(_: Mapping[str, Any]) -> str:
        time.sleep(0.05)
        return "7"

    with judge_server(slow) as server:
        scored(judge(server, max_in_flight=3), rollouts(*"abcdefghijkl"))
        assert server.most_under_way == 3


def test_requests_keep_to_the_rate() -> None:
    with judge_server() as server:
        source, started = judge(server, requests_per_minute=600), time.monotonic()
        scored(source, rollouts(*"abcdefghijklmnopqrst"))
        # 10 a second behind a burst of one second's: the last of 20 is sent 0.9 s after the first, or later.
        assert max(server.times) - started >= 0.85


def test_rate_counts_what_requests_turned_out_to_use() -> None:
    limit = RateLimit(60_000.0)  # a thousand a second
    assert limit.take(500.0) == 0.0
    limit.correct(1500.0)
    assert limit.take(1.0) > 0.5
    assert RateLimit(None).take(1e9) == 0.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("1.5s", 1.5),
        ("1h2m3s", 3723.0),
        ("7", 7.0),
        ("soon", None),
        (None, None),
    ],
)
def test_durations_are_read(text: str | None, seconds: float | None) -> None:
    assert duration_s(text) == seconds


def test_pause_is_what_the_headers_say() -> None:
    assert asked_pause_s({"retry-after": "3", "retry-after-ms": "250"}) == 0.25
    assert asked_pause_s({"retry-after": "3"}) == 3.0
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 15 < asked_pause_s({"retry-after": date}) < 21
    assert asked_pause_s({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2s"}) == 2.0
    assert asked_pause_s({}) == 1.0
    assert asked_pause_s({"retry-after": "9999999"}) == 600.0
    assert exhausted_pause_s({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "2s"}) == 0.0


def test_costs_are_counted_and_a_budget_ends_them() -> None:
    with judge_server(usage=(1000, 100)) as server:
        prices = {"price_in": 1.0, "price_out": 10.0, "max_tokens": 100}
        with closing(judge(server, **prices, max_in_flight=1)) as source:
            source.submit(rollouts("a", "b", "b")).result(60)
            metrics = source.metrics()
            assert metrics["judge/cost"] == metrics["judge/cost_total"] == pytest.approx(0.004)
            assert (metrics["judge/tokens_in"], metrics["judge/tokens_out"]) == (2000, 200)
            source.submit(rollouts("a", "c")).result(60)
            metrics = source.metrics()
            assert metrics["judge/cost"] == pytest.approx(0.002)
            assert (metrics["judge/cost_total"], metrics["judge/known_answers"]) == (pytest.approx(0.006), 1)
            assert source.stats().deduplicated == 2
        with closing(judge(server, **prices, budget=0.005)) as source:
            results = [source.submit(rollouts(letter)).result(60)[0] for letter in "defg"]
        assert [result.status.value for result in results] == ["ok", "ok", "skipped", "skipped"]
        assert "budget" in results[2].detail


def test_known_answers_outlive_the_process_and_stay_within_bounds(tmp_path: Path) -> None:
    settings = {"cache_file": tmp_path / "answers.sqlite", "cache_size": 3}
    with judge_server(by_length) as server:
        first = scores(scored(judge(server, **settings), rollouts("a", "bb", "ccc", "dddd")))
        assert scores(scored(judge(server, **settings), rollouts("dddd", "ccc"))) == first[:1:-1]
        assert len(server.bodies) == 4
        scored(judge(server, **settings, temperature=0.5), rollouts("dddd"))
        scored(judge(server, **settings, system="Be strict."), rollouts("dddd"))
        assert len(server.bodies) == 6, "other settings are other questions"
    assert (tmp_path / "answers.sqlite").stat().st_mode & 0o077 == 0
    rows = sqlite3.connect(tmp_path / "answers.sqlite").execute("SELECT answer FROM answers").fetchall()
    assert len(rows) >= 1 and not any("dddd" in row[0] for row in rows)


def test_answers_of_another_version_of_the_model_are_not_known(tmp_path: Path) -> None:
    settings = {"cache_file": tmp_path / "answers.sqlite", "cache_as": "the judge"}

    def served_as(version: str) -> int:
        with judge_server() as server, closing(judge(server, **settings, metadata_keys=[])) as source:
            ask = server.answer
            server.answer = lambda body: renamed(ask(body), version)  # pyright: ignore
            source.check()
            source.submit(rollouts("a")).result(60)
            return len(server.bodies)

    assert [served_as(version) for version in ("v1", "v1", "v2", "v2")] == [2, 1, 2, 1]


def renamed(reply: Any, version: str) -> Any:
    """A reply in which the model has another name than it was asked by."""
    return JSONResponse({**json.loads(reply.body), "model": version})


def test_two_processes_share_a_cache_file(tmp_path: Path) -> None:
    settings = {"cache_file": tmp_path / "answers.sqlite"}
    samples = rollouts(*(f"{number}" for number in range(40)))
    with judge_server(by_length) as server:
        sources = [judge(server, **settings) for _ in range(2)]
        futures = [source.submit(samples) for source in sources]
        assert scores(futures[0].result(60)) == scores(futures[1].result(60))
        for source in sources:
            source.close()
        before = len(server.bodies)
        scored(judge(server, **settings), samples)
        assert len(server.bodies) == before


def test_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 40)
    with pytest.raises(ConfigError, match="cache_file"):
        judge("http://h:1/v1", cache_file=tmp_path / "text")


def test_file_that_can_be_written_no_more_costs_the_file_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with judge_server(by_length) as server, closing(judge(server, cache_file=tmp_path / "answers")) as source:
        with closing(sqlite3.connect(tmp_path / "answers")) as file:
            file.execute("CREATE TRIGGER full BEFORE INSERT ON answers BEGIN SELECT RAISE(FAIL, 'full'); END")
            file.commit()
        with caplog.at_level(logging.WARNING, "conch"):
            assert scores(source.submit(rollouts("a", "bb")).result(60)) == [0.0, pytest.approx(1 / 9)]
            source.submit(rollouts("a", "bb")).result(60)
        assert len(server.bodies) == 2 and "kept in memory from now on" in caplog.text


def test_cache_forgets_the_oldest_in_memory_and_in_its_file(tmp_path: Path) -> None:
    def known(cache: AnswerCache) -> list[int]:
        return [number for number in range(101) if cache.get(f"{number}") is not None]

    for path in (None, tmp_path / "answers"):
        with closing(AnswerCache(3, path)) as cache:
            for number in range(101):
                cache.add(f"{number}", Answer("7", "stop"))
            assert known(cache) == [98, 99, 100]
    with closing(AnswerCache(3, tmp_path / "answers")) as cache:
        assert known(cache) == [98, 99, 100], "of the file alone"


def test_cache_in_memory_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.rewards.judge.cache._MOST_BYTES", 10_000)
    with closing(AnswerCache(100, None)) as cache:
        for number in range(20):
            cache.add(f"{number % 10}", Answer("7" * 2000, "stop"))
        assert [number for number in range(10) if cache.get(f"{number}")] == [6, 7, 8, 9]
        cache.add("large", Answer("7" * 20_000, "stop"))
        assert cache.get("large") is None and cache.get("9") is None
        cache.add("small", Answer("7", "stop"))
        assert cache.get("small") == Answer("7", "stop", is_known=True)


def test_unreadable_answers_are_not_kept() -> None:
    answers = iter(["nothing", "7"])
    with judge_server(lambda _: next(answers)) as server, closing(judge(server)) as source:
        assert source.submit(rollouts("a")).result(60)[0].status is RewardStatus.INVALID
        assert scores(source.submit(rollouts("a")).result(60)) == [pytest.approx(6 / 9)]
        assert source.metrics()["judge/unread_answers"] == 1


# ----------------------------------------------------------------------------------------------------- groups


def rank_by_length(body: Mapping[str, Any]) -> str:
    """A ranking of the answers that are shown, the longest first."""
    parts = body["messages"][-1]["content"].split("==========")[1::2]
    order = sorted(range(len(parts)), key=lambda place: -len(parts[place].strip()))
    return " > ".join(str(place + 1) for place in order)


def test_group_is_ranked_in_one_request_whatever_the_order_it_is_shown_in() -> None:
    with judge_server(rank_by_length) as server:
        source = judge(server, parser="ranking")
        assert source.needs_groups
        with closing(source):
            source.check()
            results = source.submit(rollouts("bb", "dddd", "a", "ccc", "dddd")).result(60)
        assert scores(results) == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3, 1.0])
        assert len(server.bodies) == 2, "the trial and one for the group"
        shown = [part.strip() for part in server.shown[1].split("==========")[1::2]]
        assert sorted(shown) == ["a", "bb", "ccc", "dddd"], "equal answers are shown once"


def test_votes_on_a_group_see_it_in_orders_of_their_own() -> None:
    with judge_server(rank_by_length) as server:
        results = scored(judge(server, parser="ranking", votes=4), rollouts(*"bcdefgha"))
        assert len(set(server.shown)) == 4
        assert all(0 <= score <= 1 for score in scores(results))
        assert sum(scores(results)) == pytest.approx(4.0)


def test_best_and_worst_of_a_group() -> None:
    def rule(body: Mapping[str, Any]) -> str:
        order = rank_by_length(body).split(" > ")
        return f'{{"best": {order[0]}, "worst": {order[-1]}}}'

    with judge_server(rule) as server:
        results = scored(
            judge(server, parser="best-worst", scaled_to=[-1, 1]), rollouts("bb", "a", "cccc", "ddd")
        )
        assert scores(results) == [0.0, -1.0, 1.0, 0.0]


def test_failure_of_a_group_is_that_of_all_its_samples() -> None:
    with judge_server(lambda _: "1 > 1") as server:
        results = scored(judge(server, parser="ranking"), rollouts("a", "b", "c"))
        assert {result.status for result in results} == {RewardStatus.INVALID} and len(results) == 3


def test_samples_of_several_prompts_are_no_group() -> None:
    with judge_server() as server:
        mixed = [rollout("p", "a"), rollout("q", "b")]
        assert {result.status for result in scored(judge(server, parser="ranking"), mixed)} == {
            RewardStatus.INVALID
        }
        (alone,) = scored(judge(server, parser="ranking"), rollouts("a"))
        assert alone.status is RewardStatus.INVALID and server.bodies == []


def test_group_of_equal_answers_needs_no_judge() -> None:
    with judge_server() as server:
        assert scores(scored(judge(server, parser="ranking"), rollouts("a", "a"))) == [0.5, 0.5]
        around_zero = judge(server, parser="ranking", scaled_to=[-1, 1])
        assert scores(scored(around_zero, rollouts("a", "a"))) == [0.0, 0.0]
        assert server.bodies == []
