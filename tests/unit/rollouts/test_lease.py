"""Nobody reads the policy's weights after the rollout that they were wanted for, and none waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from conch.errors import RolloutUnavailableError
from conch.rollouts.protocol import WeightUpdate, WeightVersion
from conch.rollouts.remote import pool as server_pool
from conch.rollouts.remote.lease import LeaseEndedError, WeightLease
from conch.rollouts.rendezvous import join
from conch.rollouts.weight_sync import BroadcastGroup, checkpoint_tensors
from tests.fakes.rollout_server import FakeRolloutServer
from tests.footprint import wait_until
from tests.served_sampling import (
    LONG_S,
    LORA,
    Sampling,
    adapted,
    fake_servers,
    look_often_and_write_to,
    prompts,
)
from tests.tiny import tiny_decoder

WEIGHTS = WeightVersion(source="run", version=3)


def test_end_waits_for_who_reads_and_nobody_reads_after_it() -> None:
    lease, order = WeightLease(WEIGHTS, lambda _part: {}), list[str]()
    inside, release = threading.Event(), threading.Event()

    def read() -> None:
        with lease.reading():
            inside.set()
            release.wait(LONG_S)
            order.append("read")

    def end() -> None:
        lease.end()
        order.append("ended")

    with ThreadPoolExecutor(2) as threads:
        threads.submit(read)
        assert inside.wait(LONG_S)
        ended = threads.submit(end)
        time.sleep(0.05)  # one that does not wait is through by then
        release.set()
        ended.result(LONG_S)
    assert order == ["read", "ended"] and lease.has_ended
    with pytest.raises(LeaseEndedError, match="the rollout ended before"), lease.reading():
        pass


def test_what_is_sent_is_a_copy_and_breaks_off_at_the_end() -> None:
    lease, weight = WeightLease(WEIGHTS, lambda _part: {}), torch.tensor([1.0, 2.0])
    with lease.reading():
        tensors = lease.register({"a": weight, "b": weight, "c": weight})
    copies = lease.copies(tensors)
    first, second = next(copies), next(copies)
    weight.zero_()
    assert first.tolist() == second.tolist() == [1.0, 2.0]
    assert list(tensors) == ["c"]
    lease.end()
    assert not tensors
    with pytest.raises(LeaseEndedError):
        next(copies)
    with pytest.raises(LeaseEndedError):  # nor does it look as if there had been nothing to send
        next(lease.copies(tensors))


# ------------------------------------------------------------------------------------ servers that come back


@pytest.fixture(autouse=True)
def _looks_often_and_writes_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_often_and_write_to(tmp_path, monkeypatch)


@pytest.fixture
def start() -> Iterator[Callable[..., FakeRolloutServer]]:
    with fake_servers() as make:
        yield make


@contextmanager
def away(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, the weights are where ZeRO-3 has them outside of a rollout: not here."""
    whole = {parameter: parameter.data for parameter in lm.parameters()}
    for parameter in whole:
        parameter.data = torch.empty(0)
    yield
    for parameter, data in whole.items():
        parameter.data = data


def come_back(living: FakeRolloutServer, late: FakeRolloutServer, again: Callable[[], Any]) -> None:
    """`late` is away when a rollout begins, and `again` starts it before the first completion is there. The
    next one waits, and the rollout with it, until `again` says that it was asked for something."""
    late.stop()
    asked: list[threading.Event] = []
    one_at_a_time = threading.Lock()

    def before_line(_number: int) -> None:
        with one_at_a_time:
            if not asked:
                asked.append(again())
        assert asked[0].wait(LONG_S)

    living.before_line = before_line


def test_look_that_comes_through_after_the_rollout_touches_no_weight(
    start: Callable[..., FakeRolloutServer],
) -> None:
    living, late = start(), start(lora=LORA)  # the base is for the late one alone
    looked, release = threading.Event(), threading.Event()
    again: list[FakeRolloutServer] = []

    def hang() -> None:
        looked.set()
        release.wait(LONG_S)

    def start_again() -> threading.Event:
        again.append(start(late.port, lora=LORA, before_look=hang))
        return looked

    come_back(living, late, start_again)
    lm = adapted()
    sampling = Sampling(living, late, lm=lm)
    assert len(sampling(prompts(4))) == 4
    probe = sampling.pool.servers[1].probe
    assert probe is not None and not probe.done()  # nobody has waited for it
    with away(lm):
        release.set()
        probe.result(LONG_S)
    assert not again[0].events
    sampling.version = 1
    wait_until(
        lambda: bool(sampling(prompts(4))) and "adapter 1" in again[0].events, lambda: "no new weights"
    )
    assert again[0].events[:2] == ["base 1", "adapter 1"]
    sent, expected = load_file(again[0].files[0]), checkpoint_tensors(lm, merged=False)
    assert sent.keys() == expected.keys() and all(torch.equal(sent[name], expected[name]) for name in sent)


def take_broadcast(
    server: FakeRolloutServer, taken: Callable[[int], object]
) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """Instead of files. taken: called after each tensor, with their number so far."""

    def take(body: dict[str, Any]) -> tuple[int, Any]:
        update = WeightUpdate.model_validate(body)
        store = join(update.host, update.port, update.token, rank=1, timeout_s=LONG_S)
        group = BroadcastGroup(store, 1, 2, "gloo", address="127.0.0.1", timeout_s=LONG_S)
        try:
            for number, _ in enumerate(group.receive(update.tensors), 1):
                taken(number)
        except RolloutUnavailableError:
            server.events.append("broken off")
            return 500, {"detail": "the weights did not come"}
        return FakeRolloutServer.take_weights(server, body)

    return take


def test_server_that_hangs_among_its_weights_holds_no_step_up_and_gets_no_more_of_them(
    start: Callable[..., FakeRolloutServer],
) -> None:
    living, late = start(), start()
    taking, release = threading.Event(), threading.Event()
    again: list[FakeRolloutServer] = []

    def hang(number: int) -> None:
        if number == 2:
            taking.set()
            release.wait(LONG_S)

    def start_again() -> threading.Event:
        again.append(start(late.port))
        again[0].take_weights = take_broadcast(again[0], hang)  # pyright: ignore[reportAttributeAccessIssue]
        return taking

    living.take_weights = take_broadcast(living, lambda _number: None)  # pyright: ignore[reportAttributeAccessIssue]
    come_back(living, late, start_again)
    lm = tiny_decoder("gpt2")
    sampling = Sampling(living, late, lm=lm, weights="broadcast")
    assert len(sampling(prompts(4))) == 4
    with away(lm):
        assert not again[0].events  # it hangs, and nobody has waited for it
    sampling.version = 1
    assert len(sampling(prompts(4))) == 4 and "weights 1" in living.events
    assert not again[0].events  # nor did the next rollout wait
    release.set()
    wait_until(lambda: bool(again[0].events), lambda: "it got all of the weights of the first rollout")
    assert again[0].events[0] == "broken off"
    wait_until(
        lambda: bool(sampling(prompts(4))) and "weights 1" in again[0].events, lambda: "no new weights"
    )


def test_refusal_of_weights_that_are_wanted_no_more_ends_no_run(
    start: Callable[..., FakeRolloutServer],
) -> None:
    living, late = start(), start()
    taking, release = threading.Event(), threading.Event()

    def refuse(_body: dict[str, Any]) -> tuple[int, Any]:
        taking.set()
        release.wait(LONG_S)
        return 400, {"detail": "no such file"}  # the next version stands in its place

    def start_again() -> threading.Event:
        start(late.port).take_weights = refuse
        return taking

    come_back(living, late, start_again)
    sampling = Sampling(living, late)
    sampling(prompts(4))
    probe = sampling.pool.servers[1].probe
    assert probe is not None
    release.set()
    probe.result(LONG_S)


def test_new_rollout_looks_at_once(
    start: Callable[..., FakeRolloutServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_pool, "_PROBE_PAUSE_S", LONG_S)
    server = start()
    sampling = Sampling(server)
    with ThreadPoolExecutor(1) as thread:
        for sampling.version in range(3):
            thread.submit(sampling, prompts(1)).result(LONG_S / 2)
    assert server.events == [f"{what} {version}" for version in range(3) for what in ("weights", "generate")]
