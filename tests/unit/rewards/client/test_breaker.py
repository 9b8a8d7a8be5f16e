"""CircuitBreaker: when a replica is left alone, and for how long."""

from __future__ import annotations

import pytest

from conch.rewards.client.pool import IN_A_ROW, WINDOW, CircuitBreaker, backoff_s
from conch.rewards.client.transport import Failure
from conch.types import RewardStatus

PASSING = Failure(RewardStatus.UNAVAILABLE, "Server exiting", retryable=True)
DOWN = Failure(RewardStatus.UNAVAILABLE, "Connection refused", retryable=True, is_down=True)


def test_replica_that_is_down_is_left_alone_at_once() -> None:
    breaker = CircuitBreaker()
    breaker.record_failure(DOWN)
    assert not breaker.is_closed and breaker.cause is DOWN


def test_other_failures_open_it_only_in_a_row() -> None:
    breaker = CircuitBreaker()
    for _ in range(IN_A_ROW - 1):
        breaker.record_failure(PASSING)
    breaker.record_success()
    for _ in range(IN_A_ROW - 1):
        breaker.record_failure(PASSING)
    assert breaker.is_closed
    breaker.record_failure(PASSING)
    assert not breaker.is_closed


def test_half_of_many_requests_failing_opens_it_though_never_in_a_row() -> None:
    breaker = CircuitBreaker()
    for _ in range(WINDOW // 2 - 1):
        breaker.record_failure(PASSING)
        breaker.record_success()
    assert breaker.is_closed
    breaker.record_success()
    breaker.record_failure(PASSING)
    assert not breaker.is_closed


def test_one_failure_in_twenty_leaves_it_closed() -> None:
    breaker = CircuitBreaker()
    for number in range(10 * WINDOW):
        if number % 20 == 0:
            breaker.record_failure(PASSING)
        else:
            breaker.record_success()
        assert breaker.is_closed


def test_scored_probe_forgets_what_was() -> None:
    breaker = CircuitBreaker()
    breaker.record_failure(DOWN)
    breaker.record_probe_failure(DOWN)
    breaker.close()
    assert breaker.is_closed and breaker.cause is None and breaker.failures == 0
    assert 0.5 <= breaker.pause_s(urgent=False) <= 1.0


@pytest.mark.parametrize(
    ("urgent", "longest"),
    [(False, [1, 2, 4, 8, 16, 30, 30]), (True, [0.1, 0.2, 0.4, 0.8, 1.6, 2, 2])],
)
def test_pauses_double_up_to_a_limit_and_are_shortened_at_random(urgent: bool, longest: list[float]) -> None:
    breaker = CircuitBreaker()
    breaker.record_failure(DOWN)
    for upper in longest:
        pauses = {breaker.pause_s(urgent=urgent) for _ in range(50)}
        assert all(upper / 2 <= pause <= upper for pause in pauses) and len(pauses) > 1
        breaker.record_probe_failure(DOWN)


def test_pauses_stay_bounded_after_a_long_outage() -> None:
    breaker = CircuitBreaker()
    for _ in range(5000):
        breaker.record_probe_failure(DOWN)
    assert breaker.pause_s(urgent=False) <= 30


def test_backoff_is_anything_up_to_a_limit_that_doubles() -> None:
    for attempts, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0], start=1):
        pauses = [backoff_s(attempts) for _ in range(400)]
        assert 0 <= min(pauses) < longest / 4 and longest * 3 / 4 < max(pauses) <= longest
