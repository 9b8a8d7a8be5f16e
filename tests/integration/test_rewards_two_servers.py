"""TritonReward against two real servers of one model: killed, frozen, swapped."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conch.config import RewardClientConfig, RewardConfig
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.triton.channel import Access, open_client
from conch.types import RewardResult, RewardStatus
from tests.deployments import conch, detach
from tests.fakes.rollouts import rollouts
from tests.reward_settings import changed
from tests.stores import LENGTH_MODEL, store_model

WAIT_S = 120.0
MODEL = "lengths"
CONFIG = RewardConfig(client=RewardClientConfig(request_timeout_s=30, deadline_s=100, batch_rows=4))
OUTPUTS = ["a" * count for count in range(1, 200)]
SCORES = [count + 1.0 for count in range(1, 200)]  # the prompt is one letter


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[TritonServer]]:
    store_model(tmp_path / "store", MODEL)
    with ExitStack() as stack:
        yield [stack.enter_context(TritonServer(tmp_path / "store", [MODEL])) for _ in range(2)]


def url(*servers: TritonServer) -> str:
    return ",".join(server.url for server in servers) + f"/{MODEL}"


def values(results: list[RewardResult]) -> list[float]:
    return [result.scores["reward"] for result in results]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def answered(server: TritonServer) -> int:
    """Requests that the server says it answered."""
    with open_client(server.url, Access()) as client:
        stats = client.get_inference_statistics(MODEL)
    return stats.model_stats[0].inference_stats.success.count  # pyright: ignore


def test_killed_and_frozen_servers_lose_no_reward_and_are_used_again(
    servers: list[TritonServer], tmp_path: Path
) -> None:
    """One story for several faults, because each start takes seconds."""
    a, b = servers
    config = changed(CONFIG, client={"cache_size": 0})
    earliest = answered(a) + answered(b)
    with TritonReward(url(a, b), config) as reward:
        reward.check()
        before = answered(a), answered(b)
        assert values(reward.submit(rollouts(*OUTPUTS)).result(WAIT_S)) == SCORES
        assert min(answered(a) - before[0], answered(b) - before[1]) > 1  # both took part
        least = answered(a) + answered(b) - sum(before)
        gained = reward.server_statistics().result(WAIT_S)
        # A probe may be answered between two readings.
        assert least <= gained.requests <= answered(a) + answered(b) - earliest and gained.compute_s > 0

        future = reward.submit(rollouts(*OUTPUTS))
        os.kill(a.pid, signal.SIGKILL)
        assert values(future.result(WAIT_S)) == SCORES
        a.wait(WAIT_S)
        port = int(a.url.rpartition(":")[2])
        a.stop()
        with TritonServer(tmp_path / "store", [MODEL], grpc_port=port) as successor:
            until(lambda: answered(successor) > 1)  # more than its golden sample: it was probed
            before = reward.stats().requests
            assert values(reward.submit(rollouts(*OUTPUTS)).result(WAIT_S)) == SCORES
            assert answered(successor) > 3 and reward.stats().requests > before

            hasty = changed(config, client={"request_timeout_s": 1.0})
            with TritonReward(url(successor, b), hasty) as other:
                other.check()
                os.kill(b.pid, signal.SIGSTOP)
                try:
                    assert values(other.submit(rollouts(*OUTPUTS)).result(WAIT_S)) == SCORES
                finally:
                    os.kill(b.pid, signal.SIGCONT)
                assert other.stats().retries_by["timeout"] > 0


def test_swap_under_way_is_noticed_and_scores_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store_model(store, MODEL)
    running = detach(store, "mine", "--replicas", "2")
    address = ",".join(replica.url for replica in running.replicas) + f"/{MODEL}"
    accepting = changed(CONFIG, failure={"on_model_change": "accept"})
    try:
        with TritonReward(address, CONFIG) as strict, TritonReward(address, accepting) as lax:
            for reward in (strict, lax):
                reward.check()
                assert values(reward.submit(rollouts(*OUTPUTS)).result(WAIT_S)) == SCORES
            double = LENGTH_MODEL.replace("len(text)", "len(text) * 2")
            store_model(store, MODEL, model_py=double, golden_score=4.0)
            swap = threading.Thread(target=conch, args=("swap", "mine"))
            swap.start()
            results = [result for batch in ask_until_changed(strict) for result in batch]
            swap.join(WAIT_S)
            check_strict(strict, results)
            assert lax.submit(rollouts("x" * 10)).result(WAIT_S)[0].scores == {"reward": 22.0}
            # Nothing of the old model is remembered.
            late = lax.submit(rollouts(*OUTPUTS)).result(WAIT_S)
            assert values(late) == [2 * score for score in SCORES] and {one.version for one in late} == {"2"}
            assert lax.stats().model_change == ""
    finally:
        conch("down", "mine")


def ask_until_changed(reward: TritonReward) -> Iterator[list[RewardResult]]:
    """Score new samples, all of 11 letters, without a pause."""
    deadline = time.monotonic() + WAIT_S
    for number in itertools.count():
        assert time.monotonic() < deadline, "the change was not noticed"
        outputs = [f"{8 * number + place:010d}" for place in range(8)]
        yield reward.submit(rollouts(*outputs)).result(WAIT_S)
        if reward.stats().model_change:
            return


def check_strict(reward: TritonReward, results: list[RewardResult]) -> None:
    """Only the old model has scored, and whatever else was asked says why it did not."""
    assert "now serves version 2, content" in reward.stats().model_change
    scored = [result for result in results if result.ok]
    assert {(result.version, result.scores["reward"]) for result in scored} == {("1", 11.0)}
    refused = [result for result in results if not result.ok]
    assert {(result.status, result.detail) for result in refused} <= {
        (RewardStatus.INVALID, reward.stats().model_change)
    }
    assert len(scored) >= 8
