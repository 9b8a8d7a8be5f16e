"""What a harmed network does to `TritonReward`: a proxy harms the bytes between it and a real server.

Every test holds three things: rewards that come are right to the last bit, a source that cannot get them says
so within its deadline, and no thread or socket is left of a source that was closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from conch.errors import RewardUnavailableError
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from tests.fakes.faulty_proxy import Fault, FaultyProxy
from tests.faults import (
    HASTY,
    PATIENT,
    TIRELESS,
    WAIT_S,
    assert_exact,
    fresh,
    open_source,
    score_exactly,
    statuses_of,
)
from tests.footprint import nothing_is_left, wait_until


@pytest.fixture(scope="module")
def server(hash_server: TritonServer) -> Iterator[TritonServer]:
    """With a source beside the test's own: what gRPC keeps as long as there is any is no leak."""
    with FaultyProxy(hash_server.url) as proxy, open_source(proxy.url) as source:
        source.check()
        yield hash_server


@pytest.fixture
def proxy(server: TritonServer) -> Iterator[FaultyProxy]:
    """Sound until a test says otherwise; whatever the test opened must be closed again after it."""
    with nothing_is_left(), FaultyProxy(server.url) as between:
        yield between


def heal_after(proxy: FaultyProxy, condition: Callable[[], bool]) -> None:
    """End the fault once the client has felt it."""
    wait_until(condition, lambda: f"the fault was not felt: {proxy.accepted} connections, {proxy.cuts} cuts")
    proxy.fault = Fault()


def assert_recovers(source: TritonReward) -> None:
    """It scores again, though the first few samples may still be late."""
    batch = fresh()
    wait_until(lambda: statuses_of(source.submit(batch)) == {"ok"}, lambda: "no score is given any more")
    score_exactly(source)


@pytest.mark.parametrize(
    "fault", [Fault(delay_s=0.05), Fault(drip_bytes=32, delay_s=0.002)], ids=["delay", "drip"]
)
def test_slow_network_changes_no_score(proxy: FaultyProxy, fault: Fault) -> None:
    with open_source(proxy.url) as source:
        proxy.fault = fault
        score_exactly(source)
        assert source.stats().retries == 0


def test_reset_in_the_middle_of_a_reply_is_asked_again(proxy: FaultyProxy) -> None:
    with open_source(proxy.url) as source:
        score_exactly(source)
        proxy.fault = Fault(cut_chance=1.0)
        batch = fresh()
        future = source.submit(batch)
        heal_after(proxy, lambda: proxy.cuts >= 2)
        assert_exact(batch, future.result(WAIT_S))
        assert source.stats().retries > 0


@pytest.mark.parametrize("seed", [2, 6, 13])
def test_one_reply_in_twenty_cut_off_loses_nothing(server: TritonServer, seed: int) -> None:
    with nothing_is_left(), FaultyProxy(server.url, seed) as proxy, open_source(proxy.url) as source:
        proxy.fault = Fault(cut_chance=0.05)
        for _ in range(40):
            score_exactly(source)
        assert proxy.cuts > 0 and source.stats().retries > 0


def test_reset_of_all_connections_is_asked_again(proxy: FaultyProxy) -> None:
    with open_source(proxy.url) as source:
        source.check()
        proxy.fault = Fault(delay_s=0.2)
        batch = fresh()
        future = source.submit(batch)
        asked = source.stats().requests
        wait_until(lambda: source.stats().requests > asked, lambda: "nothing was asked")
        proxy.fault = Fault()
        proxy.reset()
        assert_exact(batch, future.result(WAIT_S))
        assert proxy.accepted > 1


def test_drip_slower_than_the_deadline_is_a_timeout_and_no_lasting_harm(proxy: FaultyProxy) -> None:
    with open_source(proxy.url, HASTY) as source:
        source.check()
        proxy.fault = Fault(drip_bytes=1, delay_s=1.0)
        assert statuses_of(source.submit(fresh())) <= {"timeout", "unavailable"}
        proxy.fault = Fault()
        assert_recovers(source)


def test_half_open_connection_is_given_up_for_a_new_one(proxy: FaultyProxy) -> None:
    with open_source(proxy.url, HASTY) as source:
        source.check()
        proxy.fault = Fault(swallow=True)
        assert statuses_of(source.submit(fresh())) <= {"timeout", "unavailable"}
        proxy.fault = Fault()
        assert_recovers(source)


def test_half_open_connection_is_replaced_within_one_call(proxy: FaultyProxy) -> None:
    with open_source(proxy.url, TIRELESS) as source:
        source.check()
        proxy.fault = Fault(swallow=True)
        batch = fresh()
        future = source.submit(batch)
        heal_after(proxy, lambda: source.stats().retries > 0)
        assert_exact(batch, future.result(WAIT_S))


def test_server_that_swallows_everything_is_told_before_the_run(proxy: FaultyProxy) -> None:
    proxy.fault = Fault(swallow=True)
    with (
        open_source(proxy.url, HASTY) as source,
        pytest.raises(RewardUnavailableError, match="did not answer"),
    ):
        source.check()


def test_closing_a_source_does_not_wait_for_a_dead_server(proxy: FaultyProxy) -> None:
    with open_source(proxy.url, PATIENT) as source:
        source.check()
        proxy.fault = Fault(swallow=True)
        future = source.submit(fresh())
    assert future.cancelled() or statuses_of(future) <= {"timeout", "unavailable"}


def test_refused_connection_is_unavailable_until_the_port_opens_again(proxy: FaultyProxy) -> None:
    with open_source(proxy.url, HASTY) as source:
        source.check()
        proxy.refuse()
        assert statuses_of(source.submit(fresh())) == {"unavailable"}
        proxy.listen()
        with open_source(proxy.url) as patient:
            score_exactly(patient)
        assert_recovers(source)


def test_port_that_opens_again_within_the_deadline_is_no_failure(proxy: FaultyProxy) -> None:
    with open_source(proxy.url, TIRELESS) as source:
        source.check()
        proxy.refuse()
        batch = fresh()
        future = source.submit(batch)
        wait_until(lambda: source.stats().retries > 0, lambda: "nothing was asked again")
        proxy.listen()
        assert_exact(batch, future.result(WAIT_S))
