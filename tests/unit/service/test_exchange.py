"""Requests of clients and the orders of a trainer, whose part the test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from conch.service.leases.journal import Journal
from conch.service.leases.records import Answer, Asker, Handout, Post
from conch.service.protocol import TrainingSettings
from conch.service.refusals import RefusedError
from conch.service.runs.exchange import (
    Ask,
    Exchange,
    LearnOrder,
    SampledGroup,
    SampleOrder,
    SaveOrder,
    StopOrder,
)
from conch.types import Completion, Prompt

_JOURNALS: list[Journal] = []


@pytest.fixture(autouse=True)
def _closed_journals() -> Iterator[None]:
    yield
    while _JOURNALS:
        _JOURNALS.pop().close()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def exchange_in(
    folder: Path, clock: Clock | None = None, *, is_open: bool = True, **settings: Any
) -> Exchange:
    values = {"model_id": "m", "num_completions_per_prompt": 2, "max_steps": 9, "lease_s": 50.0, **settings}
    _JOURNALS.append(Journal(folder / "journal"))
    clock = clock or Clock()
    made = Exchange("run", TrainingSettings(**values), _JOURNALS[-1], idle_s=500.0, clock=clock)
    if is_open:
        made.open(None)
    return made


def ask(prompt: str = "p", request: str = "", key: str = "", count: int = 2, client: str = "") -> Ask:
    return Ask(prompt, Asker(client, request, f"{prompt}{key}{count}", count), key)


def sample(exchange: Exchange) -> list[str]:
    """Do the order that is next, which must be to sample; returns its prompts."""
    order = exchange.next_order()
    assert isinstance(order, SampleOrder)
    exchange.deliver([(each, sampled(str(each.ask.prompt), exchange.version)) for each in order.asks])
    return [str(each.ask.prompt) for each in order.asks]


def sampled(prompt: str, version: int = 0) -> SampledGroup:
    completions = [Completion(f"{prompt}{i}", (i,), (-1.0,), "eos") for i in range(2)]
    return SampledGroup(Prompt(prompt, (7,)), completions, version)


def handed(future: Future[Handout]) -> Handout:
    return future.result(0)


def post(handout: Handout, *rewards: float, client: str = "") -> Post:
    samples = tuple((handout.group.number, place) for place in handout.places)
    hashes = tuple(handout.group.samples[place].hash for place in handout.places)
    return Post(client, samples, hashes, rewards)


def test_prompts_that_wait_are_sampled_together_and_learned_from_when_rewarded(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    futures = [exchange.ask(ask(prompt)) for prompt in "ab"]
    assert sample(exchange) == ["a", "b"]
    assert [handed(each).group.prompt.text for each in futures] == ["a", "b"]
    later = exchange.when_version(1)
    assert exchange.reward(post(handed(futures[1]), 1.0, 2.0)) == Answer("whole", 1)
    order = exchange.next_order()
    assert isinstance(order, LearnOrder) and [group.prompt.text for group in order.groups] == ["b"]
    assert not later.done()
    exchange.learned({"policy/entropy": 0.5})
    assert (later.result(0), exchange.version, exchange._versions) == (1, 1, [])
    assert exchange.events.after(0)[-1].data["metrics"] == {"policy/entropy": 0.5}


def test_to_learn_comes_before_to_sample(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    future = exchange.ask(ask("a"))
    sample(exchange)
    exchange.reward(post(handed(future), 1.0, 2.0))
    exchange.ask(ask("b"))
    assert isinstance(exchange.next_order(), LearnOrder)


def test_nothing_is_told_where_nothing_comes_in_time(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    assert exchange.next_order(0.0) is None
    exchange.ask(ask("a"))
    assert isinstance(exchange.next_order(0.0), SampleOrder)


def test_request_that_is_repeated_is_sampled_once(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    first, second = exchange.ask(ask("a", "r")), exchange.ask(ask("a", "r"))
    assert first is second
    with pytest.raises(RefusedError, match="waits already, for something else"):
        exchange.ask(ask("b", "r"))
    assert sample(exchange) == ["a"]
    again = exchange.ask(ask("a", "r"))
    assert handed(again).group is handed(first).group


def test_clients_that_share_a_group_get_their_parts_whenever_they_ask(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    first = exchange.ask(ask("a", key="k", count=1, client="one"))
    second = exchange.ask(ask("a", key="k", count=1, client="two"))
    third = exchange.ask(ask("a", key="k", count=1, client="three"))
    assert sample(exchange) == ["a"]
    assert (handed(first).places, handed(second).places) == ((0,), (1,))
    with pytest.raises(RefusedError, match="has 0 of 2 completions that nobody has"):
        handed(third)
    assert exchange.reward(post(handed(first), 1.0, client="one")).outcome == "waiting"
    assert exchange.reward(post(handed(second), 1.0, client="two")).outcome == "whole"


def test_samples_of_a_shared_group_go_to_those_who_still_wait(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    gone = exchange.ask(ask("a", key="k", count=1, client="one"))
    there = exchange.ask(ask("a", key="k", count=2, client="two"))
    order = exchange.next_order()
    assert isinstance(order, SampleOrder)
    exchange.abandon(gone)
    exchange.deliver([(order.asks[0], sampled("a"))])
    assert handed(there).places == (0, 1)


@pytest.mark.parametrize(("request_id", "is_sampled"), [("", False), ("r", True)])
def test_prompt_that_nobody_can_come_for_is_not_sampled(
    tmp_path: Path, request_id: str, is_sampled: bool
) -> None:
    exchange = exchange_in(tmp_path)
    exchange.abandon(exchange.ask(ask("a", request_id)))
    exchange.ask(ask("b"))
    assert sample(exchange) == (["a", "b"] if is_sampled else ["b"])


def test_prompts_beyond_the_bound_are_refused(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path, max_groups=2)
    exchange.ask(ask("a"))
    sample(exchange)
    exchange.ask(ask("b"))
    with pytest.raises(RefusedError, match="2 groups are under way") as refused:
        exchange.ask(ask("c"))
    assert refused.value.status == 429


def test_prompt_that_cannot_be_sampled_is_refused_alone(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    future = exchange.ask(ask("a"))
    order = exchange.next_order()
    assert isinstance(order, SampleOrder)
    exchange.deliver([(order.asks[0], RefusedError(422, "too long"))])
    with pytest.raises(RefusedError, match="too long"):
        handed(future)
    assert exchange.state == "running" and exchange.counts()["prompts_waiting"] == 0


@pytest.mark.parametrize("ending", ["stopped", "failed", "finished"])
def test_whoever_waits_and_whoever_comes_later_is_told_how_the_run_ended(tmp_path: Path, ending: Any) -> None:
    exchange = exchange_in(tmp_path)
    waiting: list[Future[Any]] = [exchange.ask(ask()), exchange.when_version(5), exchange.save_model()]
    exchange.close(ending, "the disk is full")
    reason = f"run run is {ending}: the disk is full"
    for future in waiting:
        with pytest.raises(RefusedError, match=reason):
            future.result(0)
    with pytest.raises(RefusedError, match=reason) as refused:
        exchange.ask(ask())
    assert refused.value.status == 409
    with pytest.raises(RefusedError, match=reason):
        exchange.when_version(1).result(0)


def test_run_that_has_ended_answers_what_it_has_taken_and_takes_nothing(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path, max_steps=1)
    futures = [exchange.ask(ask(prompt)) for prompt in "ab"]
    sample(exchange)
    first, second = map(handed, futures)
    answer = exchange.reward(post(first, 1.0, 2.0))
    exchange.next_order()
    exchange.learned({})
    exchange.close("finished", "done")
    assert exchange.reward(post(first, 1.0, 2.0)) == answer
    with pytest.raises(RefusedError, match="run run is finished: done") as refused:
        exchange.reward(post(second, 1.0, 2.0))
    assert refused.value.status == 409
    with pytest.raises(RefusedError, match=r"was rewarded with 2\.0 before"):
        exchange.reward(post(first, 1.0, 3.0))


def test_answers_hold_though_a_run_goes_on_with_other_settings(tmp_path: Path) -> None:
    first = exchange_in(tmp_path, max_steps=1)
    futures = [first.ask(ask(prompt)) for prompt in "abc"]
    sample(first)
    a, b, c = map(handed, futures)
    answers = [first.reward(post(each, 1.0, 2.0)) for each in (a, b)]
    assert [answer.outcome for answer in answers] == ["whole", "dropped"]
    for max_steps in (3, 5):  # killed and started anew, without a checkpoint
        longer = exchange_in(tmp_path, max_steps=max_steps)
        assert [longer.reward(post(each, 1.0, 2.0)) for each in (a, b)] == answers
    assert longer.reward(post(c, 1.0, 2.0)) == Answer("whole", 2)


def test_run_that_ended_in_an_earlier_process_answers_what_it_has_taken(tmp_path: Path) -> None:
    first = exchange_in(tmp_path)
    future = first.ask(ask("a"))
    sample(first)
    handout = handed(future)
    answer = first.reward(post(handout, 1.0, 2.0))
    first.close("finished", "done")
    later = exchange_in(tmp_path, is_open=False)
    later.open_ended(None, "finished", "done")
    assert (later.state, later.reward(post(handout, 1.0, 2.0))) == ("finished", answer)
    with pytest.raises(RefusedError, match="was rewarded with"):
        later.reward(post(handout, 1.0, 3.0))
    with pytest.raises(RefusedError, match="run run is finished: done"):
        later.ask(ask("b"))


def test_service_that_stops_tells_to_come_again(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    future = exchange.ask(ask())
    exchange.stop("the service stops", "running")
    exchange.close("stopped", "the service stops")
    with pytest.raises(RefusedError, match="the service stops: come again"):
        future.result(0)
    with pytest.raises(RefusedError) as refused:
        exchange.ask(ask())
    assert (refused.value.status, refused.value.retry_after_s) == (503, 2.0)


def test_stop_ends_waits_at_once_and_the_trainer_between_two_updates(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    future = exchange.ask(ask())
    order = exchange.next_order()
    assert isinstance(order, SampleOrder)
    exchange.stop("enough")
    with pytest.raises(RefusedError, match="run run is stopping: enough"):
        future.result(0)
    exchange.deliver([(order.asks[0], sampled("p"))])  # it was being sampled
    assert exchange.counts()["groups_sampled"] == 0
    assert exchange.next_order() == StopOrder("stopped", "enough")


def test_posts_of_a_batch_are_taken_in_order_and_refused_one_by_one(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    futures = [exchange.ask(ask(prompt)) for prompt in "ab"]
    sample(exchange)
    first, second = map(handed, futures)
    wrong = post(first, float("nan"), 1.0)
    answers = exchange.reward_all([post(second, 1.0, 2.0), wrong, post(first, 1.0, 2.0)])
    assert isinstance(answers[1], RefusedError)
    assert [answers[0], answers[2]] == [Answer("whole", 1), Answer("whole", 2)]


def test_stop_wakes_a_trainer_that_waits(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    orders: list[Any] = []
    thread = threading.Thread(target=lambda: orders.append(exchange.next_order()))
    thread.start()
    exchange.stop("enough")
    thread.join(30)
    assert orders == [StopOrder("stopped", "enough")]


def test_run_that_nobody_asks_anything_of_is_stopped(tmp_path: Path) -> None:
    clock = Clock()
    exchange = exchange_in(tmp_path, clock)
    clock.now += 501.0
    order = exchange.next_order()
    assert isinstance(order, StopOrder) and "no client has asked for anything in 500 s" in order.reason


def test_prompts_of_a_batch_are_sampled_in_its_order_and_refused_one_by_one(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path, max_groups=2)
    futures = exchange.ask_all([ask("b", "r"), ask("x", "r"), ask("a"), ask("c")])
    refused = [str(each) for each in futures if isinstance(each, RefusedError)]
    assert ["waits already, for something else" in refused[0], "2 groups are under way" in refused[1]] == [
        True,
        True,
    ]
    assert sample(exchange) == ["b", "a"]


def test_who_asks_for_the_model_while_it_is_asked_for_gets_the_same(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    assert exchange.save_model() is exchange.save_model()


def test_wait_for_an_update_that_was_given_up_is_forgotten(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    for _ in range(3):
        exchange.when_version(5).cancel()
    exchange.when_version(5)
    assert len(exchange._versions) == 1


def test_model_is_saved_between_two_updates(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path)
    future = exchange.save_model()
    order = exchange.next_order()
    assert isinstance(order, SaveOrder)
    order.future.set_result(tmp_path)
    assert future.result(0) == tmp_path


def test_run_that_is_loading_tells_to_come_again(tmp_path: Path) -> None:
    exchange = exchange_in(tmp_path, is_open=False)
    with pytest.raises(RefusedError, match="is being loaded") as refused:
        exchange.ask(ask())
    assert (refused.value.status, refused.value.retry_after_s) == (503, 2.0)


def test_lease_lapses_while_the_trainer_waits(tmp_path: Path) -> None:
    clock = Clock()
    exchange = exchange_in(tmp_path, clock)
    future = exchange.ask(ask())
    sample(exchange)
    assert exchange.lease_left_s(handed(future)) == 50.0
    clock.now += 51.0
    exchange.ask(ask("b"))
    sample(exchange)
    assert exchange.counts()["samples_lapsed"] == 2


def test_exchange_goes_on_where_one_was_killed_with_leases_as_they_were(tmp_path: Path) -> None:
    clock = Clock()
    first = exchange_in(tmp_path, clock)
    futures = [first.ask(ask(prompt, f"r{prompt}")) for prompt in "abc"]
    sample(first)
    a, b, c = map(handed, futures)
    answer = first.reward(post(a, 1.0, 2.0))
    first.next_order()
    first.learned({})
    snapshot = first.capture()
    clock.now += 30.0
    first.reward(post(b, 3.0, 4.0))
    first.next_order()
    first.learned({})  # an update that no checkpoint has: it is lost with the process
    assert first.version == 2

    clock.now += 7000.0  # nothing runs meanwhile
    second = exchange_in(tmp_path, clock, is_open=False)
    second.open(snapshot)
    assert second.version == 1
    assert second.reward(post(a, 1.0, 2.0)) == answer
    assert second.lease_left_s(c) == 20.0
    order = second.next_order()
    assert isinstance(order, LearnOrder) and [group.number for group in order.groups] == [b.group.number]
    second.learned({})
    again = handed(second.ask(ask("c", "rc")))
    assert (again.group.number, again.places) == (c.group.number, c.places)
    assert second.reward(post(c, 5.0, 6.0)) == Answer("whole", 3)


@pytest.mark.parametrize(("prompts", "waits"), [(1, True), (2, True), (3, False), (4, False)])
def test_prompts_of_a_whole_update_are_not_kept_waiting_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: int, waits: bool
) -> None:
    monkeypatch.setattr("conch.service.runs.exchange._GATHER_S", 0.3)
    exchange = exchange_in(tmp_path, training_batch_size=3)
    exchange.ask_all([ask(f"p{number}") for number in range(prompts)])
    started = time.monotonic()
    assert len(sample(exchange)) == prompts
    assert (time.monotonic() - started >= 0.3) == waits
