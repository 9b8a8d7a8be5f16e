"""The reference where servers hold it, as a trainer's rank asks for it.

Log-probs of all micro-batches are requested at once, in threads, while the policy's own forward passes run.
Servers take turns; what one of them does not answer goes to the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from conch.addresses import parse_servers
from conch.config import ReferenceConfig
from conch.data.rollout_batch import Sequences
from conch.errors import DataError, ReferenceServerError, ReferenceUnavailableError
from conch.log import get_logger
from conch.reference.protocol import (
    MEDIA_TYPE,
    LogprobReply,
    LogprobRequest,
    ReferenceHealth,
    decode,
    encode,
)
from conch.servers.client import CONNECT_S, HttpClient

_log = get_logger(__name__)

_PAUSE_S = 0.5
"""Pause between two rounds of all servers, and the time in which one that was away is not asked again while
another is there."""

_REQUESTS_PER_SERVER = 2
"""Micro-batches of one rank that are on their way to a server: one is computed while the next one travels."""

_BINARY = {"content-type": MEDIA_TYPE}


@dataclass(eq=False)
class _Server:
    """A server.

    away_until_s: when it may be asked again after it was found away (monotonic clock); 0 while it answers.
    """

    client: HttpClient
    away_until_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def mark_away(self, error: ReferenceUnavailableError) -> None:
        """Leave it alone for a moment."""
        with self.lock:
            if not self.away_until_s:
                _log.warning("reference server lost, its work goes to others: %s", error)
            self.away_until_s = time.monotonic() + _PAUSE_S

    def mark_back(self) -> None:
        """It has answered."""
        with self.lock:
            if self.away_until_s:
                _log.info("reference server %s is back", self.client.address)
            self.away_until_s = 0.0


class RemoteReference:
    """The starting policy on the servers of `config.urls`.

    rank: of this process; ranks begin with different servers.
    trained_layers: blocks that the trainer trains, see `LogprobRequest`.

    digest: of the weights that every answer must be of; set by `expect`.

    Raises:
        ConfigError: from the constructor: addresses, certificates or the secret's variable will not do.
    """

    needs_policy_forward = False

    def __init__(self, config: ReferenceConfig, *, rank: int, trained_layers: int) -> None:
        assert config.urls is not None
        self._config = config
        self._trained_layers = trained_layers
        self.digest = ""
        self._servers = [
            _Server(
                HttpClient(
                    url,
                    config.auth,
                    section="reference",
                    what="reference server",
                    timeout_s=config.request_timeout_s,
                    refused=ReferenceServerError,
                    unavailable=ReferenceUnavailableError,
                )
            )
            for url in parse_servers(config.urls, "reference.urls")
        ]
        self._next = rank
        self._is_closed = threading.Event()
        workers = _REQUESTS_PER_SERVER * len(self._servers)
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="reference")

    def healths(self) -> dict[str, ReferenceHealth]:
        """Address -> state, of the servers that answer.

        Raises:
            ReferenceUnavailableError: none does.
            ReferenceServerError: one lets us not in, or is no reference server.
        """
        found: dict[str, ReferenceHealth] = {}
        reasons: list[str] = []
        for server in self._servers:
            client = server.client
            try:
                values = client.values("GET", "/health", timeout=CONNECT_S)
            except ReferenceUnavailableError as error:
                reasons.append(str(error))
                continue
            found[client.address] = client.parse(ReferenceHealth, values)
        if not found:
            raise ReferenceUnavailableError(
                f"no server of `reference.urls` answers: {'; '.join(reasons)}; start one with "
                "`conch reference-server model=...`"
            )
        return found

    def expect(self, digest: str) -> None:
        """Take answers of these weights only."""
        self.digest = digest

    def request(self, batches: Sequence[Sequences], temperature: float) -> PendingLogprobs:
        """Ask for the log-probs of these micro-batches, which come while the caller does other work.

        The precision is that of the autocast which is on in the calling thread.
        """
        futures = []
        for batch in batches:
            message = LogprobRequest(
                num_response=batch.num_response,
                temperature=temperature,
                autocast=_autocast_dtype(batch.input_ids.device),
                trained_layers=self._trained_layers,
            )
            rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            futures.append(self._threads.submit(self._ask, encode(message, rows), self._next))
            self._next += 1
        return PendingLogprobs(futures)

    def _ask(self, content: bytes, turn: int) -> Float[Tensor, "B R"]:
        """In a thread: the first answer that any server gives."""
        end = time.monotonic() + self._config.deadline_s
        error: ReferenceUnavailableError | None = None
        while True:
            for server in self._in_turn(turn):
                if self._is_closed.is_set():
                    raise ReferenceUnavailableError("the trainer has left its reference servers")
                try:
                    return self._answer_of(server, content)
                except ReferenceUnavailableError as failure:
                    server.mark_away(failure)
                    error = failure
            if time.monotonic() > end:
                raise ReferenceUnavailableError(
                    "no server of `reference.urls` gave log-probs within `reference.deadline_s` = "
                    f"{self._config.deadline_s:g}: {error}"
                )
            self._is_closed.wait(_PAUSE_S)

    def _in_turn(self, turn: int) -> list[_Server]:
        """The servers from this one on, without those that were away a moment ago, unless all were."""
        count, now = len(self._servers), time.monotonic()
        servers = [self._servers[(turn + offset) % count] for offset in range(count)]
        return [server for server in servers if server.away_until_s <= now] or servers

    def _answer_of(self, server: _Server, content: bytes) -> Float[Tensor, "B R"]:
        client = server.client
        reply = client.ask("POST", "/logprobs", content=content, headers=_BINARY)
        try:
            message, tensors = decode(LogprobReply, reply.content)
            logprobs = tensors["logprobs"]
        except (DataError, KeyError) as error:
            raise ReferenceServerError(
                f"{client.address} is no reference server of this release: {error}"
            ) from error
        if message.digest != self.digest:
            raise ReferenceServerError(
                f"{client.address} holds another model than the policy that this run started from (weights "
                f"{message.digest[:12]}, not {self.digest[:12]}): serve that one"
            )
        server.mark_back()
        return logprobs

    def close(self) -> None:
        """Ask no further, and close the connections; the servers run on."""
        self._is_closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for server in self._servers:
            server.client.close()


class PendingLogprobs:
    """Log-probs that were asked for.

    wait_s: seconds that `result` has waited for them.
    """

    def __init__(self, futures: Sequence[Future[Tensor]]) -> None:
        self._futures = futures
        self.wait_s = 0.0

    def result(self, number: int) -> Float[Tensor, "B R"]:
        """Those of a micro-batch, on the CPU.

        Raises:
            ReferenceUnavailableError: no server answered before the deadline.
            ReferenceServerError: a server refuses, or holds another model.
        """
        started = time.perf_counter()
        try:
            return self._futures[number].result()
        finally:
            self.wait_s += time.perf_counter() - started

    def cancel(self) -> None:
        """Wait for none of them any more."""
        for future in self._futures:
            future.cancel()


def _autocast_dtype(device: torch.device) -> Literal["bfloat16", "float16"] | None:
    """What forward passes on this device are cast to; None where they are not."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return "bfloat16" if torch.get_autocast_dtype(device.type) == torch.bfloat16 else "float16"
