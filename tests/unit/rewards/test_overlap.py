"""Overlap: the arithmetic of hidden and blocked time, on a clock of the test's own."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from conch.rewards import metrics as overlap_module
from conch.rewards.metrics import OverlapTimer


class Clock:
    """Stands still unless told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(overlap_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def request(overlap: OverlapTimer) -> Future[Any]:
    future: Future[Any] = Future()
    overlap.track(future)
    return future


def test_time_under_way_counts_once_and_pauses_between_not_at_all(clock: Clock) -> None:
    overlap = OverlapTimer()
    first = request(overlap)
    clock.now += 1
    second = request(overlap)
    clock.now += 2
    first.set_result(None)
    clock.now += 1
    second.set_result(None)  # 4 s so far
    clock.now += 50
    third = request(overlap)
    clock.now += 1
    third.set_result(None)
    overlap.block(1.25)

    assert overlap.read() == (1.25, pytest.approx(1 - 1.25 / 5))


def test_an_outages_pauses_hide_nothing(clock: Clock) -> None:
    overlap = OverlapTimer()
    future = request(overlap)
    clock.now += 2
    future.set_result(None)
    overlap.block(30.0, idle=True)

    assert overlap.read() == (30, pytest.approx(2 / 32))


def test_what_took_no_time_is_hidden(clock: Clock) -> None:
    assert OverlapTimer().read() == (0.0, 1.0)


def test_every_read_starts_anew_also_with_something_under_way(clock: Clock) -> None:
    overlap = OverlapTimer()
    future = request(overlap)
    clock.now += 4
    overlap.block(1.0)
    assert overlap.read() == (1, pytest.approx(0.75))
    clock.now += 2
    overlap.block(2.0)
    future.set_result(None)
    assert overlap.read() == (2, 0.0)
    assert overlap.read() == (0.0, 1.0)
