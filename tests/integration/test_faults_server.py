"""A server that is killed and comes back, on its old port or on another one: no reward is lost or changed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conch.rewards.scorer import RewardScorer
from conch.serving.server.server import TritonServer
from tests.fakes.faulty_proxy import Fault, FaultyProxy
from tests.faults import (
    HASTY,
    MODEL,
    TIRELESS,
    WAIT_S,
    WAITING,
    assert_exact,
    fresh,
    hash_store,
    open_source,
    score_exactly,
    statuses_of,
)
from tests.footprint import nothing_is_left, wait_until


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hash_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def server(store: Path) -> Iterator[TritonServer]:
    """A server of this test's own, with a source beside the test's: what gRPC keeps for any is no leak."""
    with TritonServer(store, [MODEL]) as running, open_source(running.url) as source:
        source.check()
        yield running


def kill(server: TritonServer) -> int:
    """Kill -9, wait for the end, and tell the port that is free now."""
    port = int(server.url.rsplit(":", 1)[1])
    os.kill(server.pid, signal.SIGKILL)
    server.wait(WAIT_S)
    server.stop()
    return port


def test_killed_server_is_unavailable_within_the_deadline(server: TritonServer) -> None:
    with nothing_is_left(), open_source(server.url, HASTY) as source:
        source.check()
        kill(server)
        assert statuses_of(source.submit(fresh())) == {"unavailable"}


@pytest.mark.parametrize("away_s", [1.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_server_killed_under_load_and_started_again_loses_nothing(
    server: TritonServer, store: Path, away_s: float
) -> None:
    with nothing_is_left(), FaultyProxy(server.url) as proxy, open_source(proxy.url, TIRELESS) as source:
        source.check()
        proxy.fault = Fault(delay_s=0.1)  # so that the kill meets requests on their way
        batches = [fresh() for _ in range(4)]
        futures = [source.submit(batch) for batch in batches]
        port = kill(server)
        proxy.fault = Fault()
        wait_until(lambda: source.stats().retries > 0, lambda: "nothing was asked again")
        time.sleep(away_s)
        with TritonServer(store, [MODEL], grpc_port=port):
            for batch, future in zip(batches, futures, strict=True):
                assert_exact(batch, future.result(WAIT_S))
            score_exactly(source)


def test_server_that_moved_behind_its_address_is_found(server: TritonServer, store: Path) -> None:
    with FaultyProxy(server.url) as proxy, open_source(proxy.url, TIRELESS) as source:
        score_exactly(source)
        kill(server)
        batch = fresh()
        future = source.submit(batch)
        with TritonServer(store, [MODEL]) as elsewhere:
            proxy.target = elsewhere.url
            assert_exact(batch, future.result(WAIT_S))


def test_scorer_waits_for_a_killed_server_with_the_same_rewards(server: TritonServer, store: Path) -> None:
    batch = fresh()
    with nothing_is_left(), open_source(server.url, WAITING) as source:
        source.check()
        scorer = RewardScorer(source, WAITING)
        port = kill(server)
        scorer.submit(batch)
        wait_until(lambda: source.stats().requests > 4, lambda: "nothing was asked")
        with TritonServer(store, [MODEL], grpc_port=port):
            assert_exact(batch, scorer.gather())
