"""Reward servers in a thread of this process, and a source whose results are told by the texts it gets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import httpx2

from conch.config import load
from conch.reward_server.app import RewardFront
from conch.reward_server.metrics import Meter
from conch.reward_server.server import listen, listener_of, open_reward
from conch.reward_server.server_config import RewardServerConfig
from conch.rewards.base import RewardSource
from conch.types import RewardResult, RewardStatus, Rollout
from tests.footprint import wait_until
from tests.launches import free_port

_SIGNS = {
    "[invalid]": RewardStatus.INVALID,
    "[down]": RewardStatus.UNAVAILABLE,
    "[late]": RewardStatus.TIMEOUT,
}


def length(text: str) -> RewardResult:
    """The length of a completion; what `_SIGNS` has in it gets no score."""
    for sign, status in _SIGNS.items():
        if sign in text:
            return RewardResult(status, detail=f"a sample is {status.value}")
    return RewardResult(RewardStatus.OK, {"reward": float(len(text))})


class Lengths(RewardSource):
    """Scores completions at once, by `score`; those with [hold] in them once `release` is called.

    asked: the rollouts of each call.
    problem: raised by `check`.
    """

    name = "lengths"

    def __init__(self, score: Callable[[str], RewardResult] = length, *, batched: bool = False) -> None:
        self.batched = batched
        self.asked: list[list[Rollout]] = []
        self.problem: Exception | None = None
        self.ready = True
        self.closed = False
        self._score = score
        self._held: list[Callable[[], None]] = []

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def is_ready(self) -> bool:
        return self.ready

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        self.asked.append(list(rollouts))
        future: Future[list[RewardResult]] = Future()
        results = [self._score(each.completion.text) for each in rollouts]

        def answer() -> None:
            future.set_result(results)

        if any("[hold]" in each.completion.text for each in rollouts):
            self._held.append(answer)
        else:
            answer()
        return future

    def release(self) -> None:
        """Answer what is held."""
        while self._held:
            self._held.pop()()

    def close(self) -> None:
        self.closed = True


class Served:
    """A running server.

    url: without a slash at the end.
    errors: what it ended by.
    """

    def __init__(self, sources: dict[str, RewardSource], settings: dict[str, Any]) -> None:
        config = load(RewardServerConfig, {"port": free_port(), "probe_s": 0.05, **settings})
        self.front = RewardFront([open_reward(*pair, config) for pair in sources.items()], Meter())
        self.listener = listener_of(self.front, config)
        self.errors: list[Exception] = []
        self.url = f"{'https' if config.tls_cert else 'http'}://127.0.0.1:{config.port}"

        def close() -> None:
            for source in sources.values():
                source.close()

        def run() -> None:
            try:
                asyncio.run(listen(self.listener, self.front, close))
            except Exception as error:
                self.errors.append(error)

        self.thread = threading.Thread(target=run)
        self.thread.start()
        wait_until(
            lambda: self.listener.started or not self.thread.is_alive(), lambda: "the server does not listen"
        )

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        reply = self.ask("POST", path, json=body, headers=headers)
        return reply.status_code, reply.json()

    def ask(self, method: str, path: str, **settings: Any) -> httpx2.Response:
        """The answer, to anybody."""
        with httpx2.Client(trust_env=False, verify=False, timeout=60) as client:
            return client.request(method, self.url + path, **settings)

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.ask("GET", "/ready").is_success, lambda: "the server is not ready")

    def stop(self) -> None:
        """Stop, once what is under way is answered."""
        self.listener.should_exit = True
        self.thread.join(60)


@contextmanager
def served(*sources: RewardSource, is_ready: bool = True, **settings: Any) -> Iterator[Served]:
    """A server of these sources, which are called like their names."""
    server = Served({source.name: source for source in sources}, settings)
    try:
        if is_ready:
            server.wait_until_ready()
        yield server
    finally:
        server.stop()
