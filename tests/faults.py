"""What the tests of faults share: a served model whose scores are exact, sources, samples, and the truth."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from conch.config import RewardClientConfig, RewardConfig, RewardFailureConfig
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.types import RewardResult, Rollout
from tests.fakes.rollouts import rollouts
from tests.stores import HASH_MODEL, hash_score, store_model

MODEL = "hash"
WAIT_S = 150.0
PATIENT = RewardConfig(client=RewardClientConfig(request_timeout_s=30, deadline_s=120, batch_rows=8))
# A check gives each of its questions a quarter of the deadline; less than a second is too little where
# others keep the processors busy.
HASTY = RewardConfig(client=RewardClientConfig(request_timeout_s=1, deadline_s=4, batch_rows=8))
TIRELESS = RewardConfig(client=RewardClientConfig(request_timeout_s=0.5, deadline_s=120, batch_rows=8))
WAITING = RewardConfig(
    client=RewardClientConfig(request_timeout_s=1, deadline_s=4, batch_rows=8),
    failure=RewardFailureConfig(policy="wait", wait_budget_s=WAIT_S),
)

_numbers = itertools.count()


def hash_store(folder: Path) -> Path:
    """A store whose model scores a text the same in any batch, to the last bit."""
    store_model(folder, MODEL, model_py=HASH_MODEL, golden_score=hash_score("ab"))
    return folder


@contextmanager
def kept_running(server: TritonServer) -> Iterator[TritonServer]:
    """A started server that is started again at its port should it die, as `conch.serving up` would do.

    Once in many thousand replies that a client breaks off, Triton's gRPC threads crash by themselves (a
    mutex of a request that is gone): what is tested here is the client, which must outlast that, too.
    """
    over = threading.Event()

    def keep() -> None:
        while not over.wait(0.1):
            if not server.is_running:
                logging.getLogger(__name__).warning("Triton has died: %s", server.log_tail(12))
                server.stop()
                server.start(again=True)

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield server
    finally:
        over.set()
        keeper.join()


def open_source(url: str, config: RewardConfig = PATIENT) -> TritonReward:
    """A client of the model at `host:port`."""
    return TritonReward(f"{url}/{MODEL}", config)


def fresh(count: int = 64) -> list[Rollout]:
    """Samples of many lengths that nobody has seen before, so that no score of them is remembered."""
    return rollouts(*(f"word-{next(_numbers)} {'x' * (7 * place % 50)}" for place in range(count)))


def is_exact(rollout: Rollout, result: RewardResult) -> bool:
    """Whether this is the score that an undisturbed server gives, to the last bit."""
    return result.ok and result.scores == {"reward": hash_score(rollout.sample)}


def assert_exact(batch: Sequence[Rollout], results: Sequence[RewardResult]) -> None:
    """Every sample has its score, to the last bit."""
    assert [result.detail for result in results if not result.ok] == []
    assert all(is_exact(*pair) for pair in zip(batch, results, strict=True))


def score_exactly(source: TritonReward) -> None:
    """Score new samples and hold the scores against the truth."""
    batch = fresh()
    assert_exact(batch, source.submit(batch).result(WAIT_S))


def statuses_of(future: Future[list[RewardResult]]) -> set[str]:
    """Of a future that must end by itself."""
    return {result.status.value for result in future.result(WAIT_S)}
