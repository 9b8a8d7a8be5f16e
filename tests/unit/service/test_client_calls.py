"""What clients send, and what they make of answers."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from conch.errors import ServiceError, ServiceUnavailableError
from conch.service.client_calls import (
    Access,
    Attempts,
    Call,
    PromptRow,
    endless,
    goes_on,
    is_end,
    new_requests,
    parsed,
    reward_arguments,
    rewards_call,
    rewards_of,
    split_refusals,
)
from conch.service.protocol import (
    KEY_VARIABLE,
    CompletionsResponse,
    Refusal,
    RewardsRequest,
    RewardsResponse,
    StatusResponse,
    TrainingSettings,
    token_hash,
)
from conch.service.refusals import RefusedError

SETTINGS = TrainingSettings(model_id="m")


def access(retry_s: float = 60.0) -> Access:
    return Access.of("http://host:8000/", "key", "me", 5.0, retry_s)


def answer(status: int, body: Any = None, **headers: str) -> httpx2.Response:
    request = httpx2.Request("POST", "http://host:8000/x")
    return httpx2.Response(status, json=body, headers=headers, request=request)


def completions(prompt: str, *texts: str) -> CompletionsResponse:
    return CompletionsResponse(
        prompt=prompt,
        completions=[*texts],
        completion_tokens=[[1, number] for number in range(len(texts))],
        model_version=("run", 3),
        sample_ids=[f"run.0.{number}" for number in range(len(texts))],
        token_hashes=[token_hash([1, number]) for number in range(len(texts))],
    )


def test_key_comes_from_the_environment_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert Access.of("http://host", None, None, 1.0, 1.0).headers == {"api-key": "secret"}
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ServiceError, match="no key: pass `api_key`, or set the environment variable"):
        Access.of("http://host", None, None, 1.0, 1.0)


@pytest.mark.parametrize("status", [429, 503, 502, 408])
def test_answer_that_tells_to_come_again_is_waited_for(status: int) -> None:
    attempts = Attempts(access(), Call("POST", "/x"))
    assert 7 * 0.8 <= attempts.refused(answer(status, {"detail": "busy"}, **{"retry-after": "7"})) <= 7 * 1.2
    first, second = (attempts.refused(answer(status)) for _ in range(2))
    assert first < second
    with pytest.raises(ServiceUnavailableError, match="http://host:8000/x: busy"):
        Attempts(access(0.0), Call("POST", "/x")).refused(answer(status, {"detail": "busy"}))


@pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 422, 500])
def test_refusal_is_told_in_the_service_s_words(status: int) -> None:
    with pytest.raises(RefusedError, match="refuses: so it is") as refused:
        Attempts(access(), Call("POST", "/x")).refused(answer(status, {"detail": "so it is"}))
    assert refused.value.status == status


def test_request_that_may_have_come_through_is_repeated_only_where_that_is_safe() -> None:
    lost = httpx2.ReadError("reset")
    assert Attempts(access(), Call("POST", "/x")).broken(lost) > 0
    once = Attempts(access(), Call("POST", "/start", repeats=False))
    assert once.broken(httpx2.ConnectError("refused")) > 0
    with pytest.raises(ServiceUnavailableError, match="it may have done /start all the same"):
        once.broken(lost)


def test_answer_of_something_else_is_told() -> None:
    with pytest.raises(ServiceError, match=r"is no training service of this release: its RewardsResponse"):
        parsed(RewardsResponse, answer(200, {"hello": 1}))


def test_prompts_come_again_and_again_with_their_keys() -> None:
    messages = [{"role": "user", "content": "hi"}]
    rows = endless(["a", {"prompt": messages, "label": 4}])
    assert [next(rows) for _ in range(3)] == [
        PromptRow("a", {}),
        PromptRow(messages, {"label": 4}),
        PromptRow("a", {}),
    ]
    with pytest.raises(ServiceError, match="there are no prompts"):
        next(endless([]))


def test_requests_have_ids_of_their_own() -> None:
    first, second = new_requests([PromptRow("a", {}), PromptRow("a", {})], access())
    assert first.request_id != second.request_id
    assert (first.client_id, first.wait_s) == ("me", 5.0)


def test_reward_function_gets_a_list_entry_for_each_completion() -> None:
    rows = [PromptRow("a", {"label": 1}), PromptRow("b", {})]
    arguments = reward_arguments(rows, [completions("a", "x", "y"), completions("b", "z")])
    assert arguments == {
        "samples": ["ax", "ay", "bz"],
        "prompts": ["a", "a", "b"],
        "outputs": ["x", "y", "z"],
        "label": [1, 1, None],
    }


def test_rewards_become_a_post_for_each_group() -> None:
    given = [completions("a", "x", "y"), completions("b", "z")]
    posts = rewards_of((1, None, 2.5), given, access())
    assert [post.rewards for post in posts] == [[1.0, None], [2.5]]
    assert posts[0].sample_ids == ["run.0.0", "run.0.1"] and posts[0].token_hashes is not None
    assert (posts[0].client_id, posts[0].run_id) == ("me", "run")
    with pytest.raises(ServiceError, match="gave 2 rewards for 3 completions"):
        rewards_of([1, 2], given, access())


def test_missing_and_impossible_rewards_are_sent_as_what_they_are() -> None:
    request = RewardsRequest(rewards=[1.0, None, float("nan")], token_hashes=["a", "b", "c"])
    content = rewards_call([request]).content["content"]
    [sent] = json.loads(content)["requests"]
    assert sent["rewards"][:2] == [1.0, None] and sent["rewards"][2] != sent["rewards"][2]
    assert "sample_ids" not in sent


def test_post_of_a_service_of_the_first_kind_names_tokens() -> None:
    first = completions("a", "x").model_copy(update={"sample_ids": [], "token_hashes": []})
    assert RewardsRequest.from_completions(first, [1.0], "me").model_dump(exclude_defaults=True) == {
        "prompt": "a",
        "completions": ["x"],
        "completion_tokens": [[1, 0]],
        "rewards": [1.0],
    }


def test_rewards_are_given_the_time_that_the_longest_of_their_posts_waits() -> None:
    posts = [RewardsRequest(rewards=[1.0], wait_s=wait_s) for wait_s in (0.0, 120.0, 7.0)]
    call = rewards_call(posts)
    assert call.wait_s == 120.0
    assert access().timeout(call.wait_s).read == 150.0
    assert rewards_call(posts[:1]).wait_s == 0.0


def test_batch_is_split_into_answers_what_to_repeat_and_what_is_refused() -> None:
    busy, wrong = Refusal(status=429, detail="busy"), Refusal(status=422, detail="wrong")
    given = completions("a", "x")
    assert split_refusals([busy, given, wrong]) == ({1: given}, [0], [(2, wrong)])


def test_client_joins_the_run_with_its_settings_and_no_other() -> None:
    under_way = StatusResponse(state="running", run_id="r", training_settings=SETTINGS)
    assert goes_on(under_way, SETTINGS) and goes_on(under_way, None)
    assert not goes_on(StatusResponse(state="finished"), SETTINGS)
    modules = {"model": {"peft_config": {"target_modules": ("a", "b")}}}
    ours = TrainingSettings(model_id="m", overrides=modules)
    there = StatusResponse(
        state="running", training_settings=TrainingSettings.model_validate_json(ours.model_dump_json())
    )
    assert goes_on(there, ours)
    other = TrainingSettings(model_id="other")
    with pytest.raises(ServiceError, match="run r is under way with other settings"):
        goes_on(under_way, other)
    with pytest.raises(ServiceError, match=r"no run is under way: give `settings` to start one with$"):
        goes_on(StatusResponse(), None)
    with pytest.raises(ServiceError, match="start one with; run r, the last, is finished"):
        goes_on(StatusResponse(run_id="r", state="finished"), None)


def test_end_of_a_run_is_told_from_a_failure() -> None:
    assert is_end(StatusResponse(state="finished")) and not is_end(StatusResponse(state="running"))
    with pytest.raises(ServiceError, match="run r is failed: no memory"):
        is_end(StatusResponse(state="failed", run_id="r", error="no memory"))


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "localhost", "ftp://host", "http://host:port", "http://host:80000"]
)
def test_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ServiceError, match="is no address of a service: write http://HOST:PORT"):
        Access.of(url, "key", None, 1.0, 1.0)


@pytest.mark.parametrize("key", ["schlüssel", "secret-1\n", "two words"])
def test_key_that_no_header_can_carry_is_refused_at_once(key: str) -> None:
    with pytest.raises(ServiceError, match="holds is no key") as refused:
        Access.of("http://host", key, None, 1.0, 1.0)
    assert key.strip() not in str(refused.value)


def test_pause_ends_with_the_time_that_there_is() -> None:
    attempts = Attempts(access(3.0), Call("POST", "/x"))
    assert attempts.refused(answer(503, **{"retry-after": "60"})) <= 3.0


@pytest.mark.parametrize(
    ("values", "words"),
    [(None, "no list of numbers: 'NoneType'"), (["much"], "could not convert string"), ([[1.0]], "list")],
)
def test_reward_that_is_no_list_of_numbers_is_told(values: Any, words: str) -> None:
    with pytest.raises(ServiceError, match=words):
        rewards_of(values, [completions("p", "a")], access())


@pytest.mark.parametrize("row", [{"text": "a"}, "", [], {"prompt": 7}, {"prompt": ["a"]}])
def test_prompt_that_is_none_is_told(row: Any) -> None:
    with pytest.raises(ServiceError, match=r"a prompt (is a text or messages|that is a mapping has the key)"):
        PromptRow.of(row)
