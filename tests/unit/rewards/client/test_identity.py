"""ModelIdentity, ScoreCache and secret headers: small parts of the client of a served model."""

from __future__ import annotations

import logging

import pytest

from conch.addresses import secret_headers
from conch.config import OnModelChange
from conch.errors import ConfigError
from conch.rewards.client.cache import ModelIdentity, ScoreCache
from conch.rewards.client.transport import ModelInfo, ScoringRow
from conch.types import RewardResult, RewardStatus

OLD, NEW = ModelInfo(reward_names=("help",), content="0" * 64), "1" * 64


def identity(policy: OnModelChange = "raise") -> ModelIdentity:
    model = ModelIdentity(policy)
    assert model.mismatch("model `m` at a", OLD, is_new=True) == ""
    return model


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (
            ModelInfo(takes_tokens=True, reward_names=("help",)),
            "`m` at b takes token ids, but model `m` at a",
        ),
        (ModelInfo(reward_names=("harm",)), "at b gives the rewards harm, but model `m` at a gives the rew"),
        (
            ModelInfo(reward_names=("help",), content=NEW),
            "at b serves content 111111111111, but model `m` at a 000000000000",
        ),
    ],
)
def test_replica_of_another_model_is_refused_naming_both(info: ModelInfo, words: str) -> None:
    mismatch = identity().mismatch("model `m` at b", info, is_new=True)
    assert words in mismatch
    assert "load the same version on all of them" in mismatch


def test_replica_that_does_not_state_its_content_is_taken() -> None:
    assert identity().mismatch("model `m` at b", ModelInfo(reward_names=("help",)), is_new=True) == ""


def test_replica_that_comes_back_changed_is_a_change_of_the_model() -> None:
    model = identity()
    assert model.mismatch("a", ModelInfo(reward_names=("help",), content=NEW), is_new=False) == ""
    assert model.record_reply("a", "2", NEW)
    assert "a now serves version 2, content 111111111111, another model" in model.change
    assert "reward.failure.on_model_change=accept" in model.change


def test_same_content_under_another_version_number_is_the_same_model() -> None:
    model = identity()
    assert not model.record_reply("a", "1", OLD.content)
    assert not model.record_reply("b", "7", OLD.content)
    assert model.change == ""


def test_without_a_hash_the_version_tells() -> None:
    model = ModelIdentity("raise")
    assert not model.record_reply("a", "1", "")
    assert not model.record_reply("a", "1", "")
    assert model.is_current("1", "")
    assert model.record_reply("a", "2", "")
    assert model.is_current("2", "") and not model.is_current("1", "")
    assert "a now serves version 2, another model" in model.change


@pytest.mark.parametrize(
    ("policy", "level"), [("warn", logging.WARNING), ("accept", logging.INFO), ("raise", logging.ERROR)]
)
def test_change_is_told_once_as_loud_as_configured(
    policy: OnModelChange, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "conch")
    model = identity(policy)
    assert [model.record_reply("a", "2", NEW) for _ in range(3)] == [True, False, False]
    assert not model.record_reply("a", "1", OLD.content)  # late answers of the old version
    assert model.is_current("2", NEW) and not model.is_current("1", OLD.content)
    assert [record.levelno for record in caplog.records] == [level]
    assert bool(model.change) is (policy == "raise")


def result(value: float) -> RewardResult:
    return RewardResult(RewardStatus.OK, {"reward": value}, latency_s=3.0)


def test_cache_keeps_the_rows_that_were_asked_for_last() -> None:
    cache = ScoreCache(2)
    cache.add(ScoringRow("a"), result(1.0))
    cache.add(ScoringRow("b"), result(2.0))
    found = cache.get(ScoringRow("a", position=9))
    assert found is not None and (found.scores["reward"], found.latency_s) == (1, 0.0)
    cache.add(ScoringRow("c"), result(3.0))
    assert cache.get(ScoringRow("b")) is None and cache.get(ScoringRow("a")) and len(cache) == 2
    cache.clear()
    assert cache.get(ScoringRow("a")) is None


def test_cache_tells_rows_apart_that_look_alike() -> None:
    cache = ScoreCache(9)
    cache.add(ScoringRow("a", (1, 23)), result(1.0))
    assert cache.get(ScoringRow("a", (12, 3))) is None
    assert cache.get(ScoringRow("a")) is None


def test_cache_of_size_0_holds_nothing() -> None:
    cache = ScoreCache(0)
    cache.add(ScoringRow("a"), result(1.0))
    assert cache.get(ScoringRow("a")) is None


def test_scores_of_tokens_are_kept_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.rewards.client.cache._MOST_NUMBERS", 100)
    cache = ScoreCache(50)
    dense = RewardResult(RewardStatus.OK, token_scores=(0.5,) * 30)
    for number in range(10):
        cache.add(ScoringRow(f"{number % 5}"), dense)
    cache.add(ScoringRow("a"), result(1.0))
    kept = [name for name in "01234a" if cache.get(ScoringRow(name)) is not None]
    assert kept == ["2", "3", "4", "a"]
    cache.clear()
    for name in "012":
        cache.add(ScoringRow(name), dense)
    assert len(cache) == 3


def test_headers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "Bearer abc=")
    assert secret_headers({"Authorization": "MY_TOKEN"}) == {"authorization": "Bearer abc="}


@pytest.mark.parametrize(
    ("header", "value", "words"),
    [
        ("authorization", None, "MY_TOKEN, which is to hold header `authorization`, is not set"),
        ("authorization", "", "is not set or empty"),
        ("authorization", "hunter2\nx-admin: 1", "cannot stand in a header"),
        ("authorization", "passwört", "cannot stand in a header"),
        ("bad header", "hunter2", "`bad header` cannot be a header of ours"),
        ("grpc-timeout", "hunter2", "`grpc-timeout` cannot be a header of ours"),
        ("token-bin", "hunter2", "`token-bin` cannot be a header of ours"),
    ],
)
def test_unfit_headers_are_refused_without_showing_the_value(
    header: str, value: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(ConfigError, match=words) as caught:
        secret_headers({header: "MY_TOKEN"})
    assert "hunter2" not in str(caught.value) and "passw" not in str(caught.value)
