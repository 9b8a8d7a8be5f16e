"""Servers that sample: which of them live, which weights they hold, and how much each has to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import get_args

from transformers import PreTrainedModel

from conch.addresses import parse_servers
from conch.config import RolloutConfig
from conch.errors import RolloutError, RolloutUnavailableError
from conch.log import get_logger
from conch.rollouts.protocol import Health, Part, WeightUpdate, WeightVersion
from conch.rollouts.remote.client import ServerLink
from conch.rollouts.remote.lease import WeightLease
from conch.rollouts.weight_sync import (
    Group,
    Handover,
    SharedFile,
    address_towards,
    open_store,
    specs_of,
    wait_for_members,
)

_log = get_logger(__name__)

_LOOK_S = 0.5
"""Between two looks at servers that are away or hold other weights."""

_JOIN_S = 60.0
"""Longest for a server to join the group in which weights are broadcast."""


@dataclass(eq=False)
class Server:
    """One server.

    health: None where it is away. tokens, rows: asked for and not here yet. probe: the latest look at it,
    and lease: the rollout that it was for. next_look: when the next may be, in seconds of the monotonic
    clock.
    """

    link: ServerLink
    health: Health | None = None
    tokens: int = 0
    rows: int = 0
    probe: Future[None] | None = field(default=None, repr=False)
    lease: WeightLease | None = field(default=None, repr=False)
    next_look: float = 0.0

    def holds(self, stamp: WeightVersion) -> bool:
        """True where it lives and has these weights."""
        return self.health is not None and self.health.stamp == stamp


class ServerPool:
    """The servers of `config.urls`.

    lm: called when weights are handed over, within a lease. source: names this run, the same on all of its
        ranks. sends: True on the one rank that gives servers their weights; the others wait until they have
        them.
    """

    def __init__(
        self,
        config: RolloutConfig,
        lm: Callable[[], PreTrainedModel],
        *,
        source: str,
        sends: bool,
    ) -> None:
        assert config.urls is not None
        self._config = config
        self._handover = Handover(lm, merge=config.merge_adapter is True)
        self._source = source
        self._sends = sends
        addresses = parse_servers(config.urls, "rollout.urls")
        self.servers = [Server(ServerLink(address, config.deadline_s)) for address in addresses]
        self._files: dict[Part, SharedFile] = {
            part: SharedFile(f"{source}-{part}") for part in get_args(Part)
        }
        self.threads = ThreadPoolExecutor(max_workers=16 * len(self.servers), thread_name_prefix="rollouts")

    def check(self) -> None:
        """Look at all servers once.

        Raises:
            RolloutUnavailableError: none of them answers.
        """
        reasons = [reason for server in self.servers if (reason := self._look(server))]
        if len(reasons) == len(self.servers):
            raise RolloutUnavailableError(
                f"no server of `rollout.urls` answers: {'; '.join(reasons)}; start one with "
                "`python -m conch.rollouts.serve`"
            )

    def stamp(self, version: int) -> WeightVersion:
        """Which weights of this run."""
        return WeightVersion(source=self._source, version=version)

    @contextmanager
    def lease(self, version: int) -> Iterator[WeightLease]:
        """A rollout with these weights: inside, they may be read and are not to change. What is under way
        afterwards, with servers that are slow or back late, reads them no more."""
        lease = WeightLease(self.stamp(version))
        try:
            yield lease
        finally:
            lease.end()

    @property
    def window(self) -> int | None:
        """The shortest window of the servers that live, in tokens."""
        return min((server.health.window for server in self.servers if server.health), default=None)

    def ready(self, lease: WeightLease) -> list[Server]:
        """All servers that hold these weights, one at least; those that live get them first.

        Raises:
            RolloutUnavailableError: none came to hold them before the deadline.
        """
        end = time.monotonic() + self._config.deadline_s
        while True:
            for server in self.servers:
                self.revive(server, lease)
            for server in self.servers:
                if server.probe is not None and server.lease is lease:
                    server.probe.result()
            able = [server for server in self.servers if server.holds(lease.stamp)]
            if able:
                return able
            if time.monotonic() > end:
                raise RolloutUnavailableError(
                    f"no server came to hold version {lease.stamp.version} of the weights within "
                    f"`rollout.deadline_s` = {self._config.deadline_s:g}: "
                    f"{', '.join(each.link.address for each in self.servers)}"
                )
            time.sleep(_LOOK_S)

    def revive(self, server: Server, lease: WeightLease) -> None:
        """Look at a server that is away or astray, and give it these weights: in a thread, now and then.

        Raises:
            RolloutError: it said that it can never take them.
        """
        if server.probe is not None:
            if not server.probe.done():
                return
            server.probe.result()
        is_early = server.lease is lease and time.monotonic() < server.next_look
        if is_early or server.holds(lease.stamp):
            return
        server.next_look = time.monotonic() + _LOOK_S
        server.lease = lease
        server.probe = self.threads.submit(self._revive, server, lease)

    def _revive(self, server: Server, lease: WeightLease) -> None:
        was_away, stamp = server.health is None, lease.stamp
        if self._look(server) is not None or server.holds(stamp) or not self._sends:
            return
        try:
            server.health = self._refit(server, lease)
        except RolloutError as error:
            server.health = None
            if lease.is_over:  # the next rollout looks again
                return
            if not isinstance(error, RolloutUnavailableError):
                raise
            _log.warning("a rollout server did not take its weights: %s", error)
            return
        if was_away and stamp.version:
            _log.info("rollout server %s is back, and has version %d", server.link.address, stamp.version)

    def _look(self, server: Server) -> str | None:
        """Why it cannot be asked; None where it can."""
        try:
            server.health = server.link.health()
        except RolloutUnavailableError as error:
            server.health = None
            return str(error)
        return None

    def lost(self, server: Server, error: Exception) -> None:
        """It broke off: nothing is asked of it until it answers again and has been given its weights."""
        if server.health is not None:
            _log.warning("rollout server lost, its work goes to others: %s", error)
        server.health = None

    def _refit(self, server: Server, lease: WeightLease) -> Health:
        assert server.health is not None
        if not self._handover.adapter_alone(server.health.lora):
            return self._give(server, lease, "whole")
        if server.health.base != lease.stamp.source:
            self._give(server, lease, "base")
        return self._give(server, lease, "adapter")

    def _give(self, server: Server, lease: WeightLease, part: Part) -> Health:
        if self._config.weights == "broadcast":
            return self._broadcast(server, lease, part)
        version = 0 if part == "base" else lease.stamp.version  # a base is written once
        with lease.reading():
            path = self._files[part].path(version, lambda: self._handover.tensors(part))
        return server.link.refit(WeightUpdate(stamp=lease.stamp, part=part, path=str(path)))

    def _broadcast(self, server: Server, lease: WeightLease, part: Part) -> Health:
        """In a group with this server alone: one that dies then takes no other's weights along."""
        assert server.health is not None
        with lease.reading():
            tensors = lease.lend(self._handover.tensors(part))
            specs, are_on_gpu = specs_of(tensors), next(iter(tensors.values())).is_cuda
        backend = "nccl" if server.health.device == "cuda" and are_on_gpu else "gloo"
        address = address_towards(server.link.host, server.link.port)
        store = open_store(address, _JOIN_S)
        given = WeightUpdate(
            stamp=lease.stamp, part=part, host=address, port=store.port, backend=backend, tensors=specs
        )
        taken = self.threads.submit(server.link.refit, given)
        workers = server.health.workers
        if not wait_for_members(store, workers, taken.done, _JOIN_S):
            if taken.done():
                taken.result()  # raises what the server refused, or why it is gone
            raise RolloutUnavailableError(f"{server.link.address} did not come for its weights")
        group = Group(store, 0, 1 + workers, backend, address=address, timeout_s=self._config.deadline_s)
        with closing(group):
            group.send(lease.copies(tensors))
            return taken.result()

    def close(self) -> None:
        """Let go of the servers, which live on."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for server in self.servers:
            server.link.close()
        if self._sends:
            for file in self._files.values():
                file.close()


def least_busy(servers: Sequence[Server], rows: int) -> Server | None:
    """Who has the fewest tokens to sample, of those that have room for `rows` more; None where all are full.

    A server without work always has room.
    """
    able = [
        server
        for server in servers
        if server.health is not None and (not server.rows or server.rows + rows <= server.health.max_num_seqs)
    ]
    return min(able, key=lambda server: server.tokens, default=None)
