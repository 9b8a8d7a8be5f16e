"""Rollout servers: which of them are alive, which weights they hold, and how much each has to sample."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol, get_args, runtime_checkable

from transformers import PreTrainedModel

from conch.addresses import parse_servers
from conch.config import RolloutConfig
from conch.errors import RolloutError, RolloutUnavailableError
from conch.log import get_logger
from conch.rollouts.protocol import (
    CompletionReply,
    GenerateRequest,
    Health,
    Part,
    WeightUpdate,
    WeightVersion,
)
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.remote.lease import LeaseEndedError, WeightLease
from conch.rollouts.remote.snapshot import SnapshotBuffers, WeightSnapshot
from conch.rollouts.rendezvous import address_towards, open_store, wait_for_members
from conch.rollouts.weight_sync import (
    BroadcastGroup,
    SharedFile,
    WeightSource,
    tensor_specs,
)

_log = get_logger(__name__)

_PROBE_PAUSE_S = 0.5
"""Pause between two probes of a server that is away or holds other weights."""

_JOIN_S = 60.0
"""Longest wait for a server to join the group in which weights are broadcast."""


@runtime_checkable
class SamplerClient(Protocol):
    """Speaks with one server; several threads may use it at once. `ServerClient` says what the members mean.

    Where `takes_handed` is True, `update_weights` has the tensors as its second argument.
    """

    takes_handed: ClassVar[bool]
    requests_per_server: ClassVar[int]
    address: str

    @property
    def update_weights(self) -> Callable[..., Health]: ...
    def health(self) -> Health: ...
    def completions(self, request: GenerateRequest) -> Iterator[CompletionReply]: ...
    def stacks(self) -> str: ...
    def close(self) -> None: ...


@dataclass(eq=False)
class ServerState:
    """What the pool knows of one server.

    client: speaks with it.
    health: its latest answer; None while it is away.
    pending_tokens: most tokens that its requests under way can come to.
    pending_completions: completions that its requests under way ask for.
    probe: the latest probe, in a thread.
    lease: the weights that the probe was for.
    probed_s: when that probe began, on the monotonic clock.
    takes: what it is sent, as it was last seen: all weights, or an adapter after its base; None before it
        first answered.
    """

    client: SamplerClient
    health: Health | None = None
    pending_tokens: int = 0
    pending_completions: int = 0
    probe: Future[None] | None = field(default=None, repr=False)
    lease: WeightLease | None = field(default=None, repr=False)
    probed_s: float = -math.inf
    takes: Part | None = None

    def holds(self, weights: WeightVersion) -> bool:
        """True where the server is alive and holds these weights."""
        return self.health is not None and self.health.weights == weights


class ServerPool:
    """The servers of `config.urls`, or `actors`, and the weights that they are sent.

    lm: gives the policy; called within a lease, whenever weights are sent.
    source: name of this run, the same on all of its ranks.
    sends_weights: True on the one rank that sends weights; the other ranks wait until the servers hold them.
    actors: servers that have no URL, instead of `config.urls`.

    requests_per_server: see `ServerClient`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        lm: Callable[[], PreTrainedModel],
        *,
        source: str,
        sends_weights: bool,
        actors: Sequence[SamplerClient] = (),
    ) -> None:
        self._config = config
        self._weights = WeightSource(lm, merge=config.merge_adapter is True)
        self._source = source
        self.sends_weights = sends_weights
        if not actors and sends_weights and config.weights == "broadcast" and config.auth.tls.ca is not None:
            _log.warning(
                "rollout servers are asked over TLS, but weights that are broadcast travel in plain text; "
                "keep the network between trainer and servers to yourself, docs/security.md"
            )
        self.servers = [ServerState(client) for client in actors or _clients_of_urls(config)]
        self.requests_per_server = self.servers[0].client.requests_per_server
        self._recover_lock = threading.Lock()
        self._buffers = SnapshotBuffers()
        self._files: dict[Part, SharedFile] = {
            part: SharedFile(f"{source}-{part}") for part in get_args(Part)
        }
        self.threads = ThreadPoolExecutor(max_workers=16 * len(self.servers), thread_name_prefix="rollouts")

    def check(self) -> None:
        """Probe every server once.

        Raises:
            RolloutUnavailableError: none answers.
        """
        reasons = [reason for server in self.servers if (reason := self._read_health(server))]
        if len(reasons) == len(self.servers):
            raise RolloutUnavailableError(
                f"no server of `rollout.urls` answers: {'; '.join(reasons)}; start one with "
                "`conch rollout-server model=...`"
            )

    def weight_version(self, version: int) -> WeightVersion:
        """This run's weights after `version` updates."""
        return WeightVersion(source=self._source, version=version)

    @contextmanager
    def lease(self, version: int) -> Iterator[WeightLease]:
        """Allow the weights to be read inside, where they must not change.

        Threads that still send weights to a slow server afterwards read no more of them.
        """
        lease = WeightLease(self.weight_version(version), self._weights.tensors)
        try:
            yield lease
        finally:
            lease.end()

    def snapshot(self, version: int, *, goes_on: bool) -> WeightSnapshot:
        """Copy what servers are going to be sent of the weights, which may change afterwards.

        ZeRO-3 must have gathered them. Reads no weights on a rank that sends none.
        """
        wanted: set[Part] = (
            {server.takes or "whole" for server in self.servers} if self.sends_weights else set()
        )
        if self.sends_weights and None in {server.takes for server in self.servers}:
            wanted |= set() if self._weights.required_lora() is None else {"adapter"}
        if "adapter" in wanted:
            wanted.add("base")
        return self._buffers.snapshot(
            self.weight_version(version),
            {part: partial(self._weights.tensors, part) for part in get_args(Part) if part in wanted},
            goes_on=goes_on,
            base_stays=self._weights.base_stays(),
        )

    @property
    def max_model_len(self) -> int | None:
        """The smallest `max_model_len` of the live servers, in tokens; None where no server is alive."""
        return min((server.health.max_model_len for server in self.servers if server.health), default=None)

    def push_weights(self, lease: WeightLease) -> list[ServerState]:
        """Send these weights to every live server, and return the servers that hold them: at least one.

        Raises:
            RolloutUnavailableError: no server holds them before the deadline.
        """
        end = time.monotonic() + self._config.deadline_s
        while True:
            for server in self.servers:
                self.recover(server, lease)
            for server in self.servers:
                if server.probe is not None and server.lease is lease:
                    server.probe.result()
            able = [server for server in self.servers if server.holds(lease.weights)]
            if able:
                return able
            if time.monotonic() > end:
                raise RolloutUnavailableError(
                    f"no server came to hold version {lease.weights.version} of the weights within "
                    f"`rollout.deadline_s` = {self._config.deadline_s:g}: "
                    f"{', '.join(server.client.address for server in self.servers)}"
                )
            time.sleep(_PROBE_PAUSE_S)

    def recover(
        self, server: ServerState, lease: WeightLease, *, look_s: float = math.inf
    ) -> Future[None] | None:
        """Start a probe in a thread where a server is away or holds other weights; it is sent these, too.

        Does nothing while a probe is under way, or shortly after one for the same weights. Returns the probe
        that it has started.

        look_s: pause after which a server that seems to hold these weights is probed, too: one that has been
            started anew in between holds none.

        Raises:
            RolloutError: the server said, in an earlier probe, that it can never load such weights.
        """
        with self._recover_lock:  # a stream does so in its thread, an evaluation in the main one
            if server.probe is not None:
                if not server.probe.done():
                    return None
                server.probe.result()
            now_s = time.monotonic()
            pause_s = look_s if server.holds(lease.weights) else _PROBE_PAUSE_S
            if now_s < server.probed_s + pause_s and (server.lease is lease or pause_s is look_s):
                return None
            server.probed_s = now_s
            server.lease = lease
            server.probe = self.threads.submit(self._probe, server, lease)
            return server.probe

    def _probe(self, server: ServerState, lease: WeightLease) -> None:
        was_away, weights = server.health is None, lease.weights
        if self._read_health(server) is not None or server.holds(weights) or not self.sends_weights:
            return
        try:
            with lease.sending():
                server.health = self._update_weights(server, lease)
        except LeaseEndedError:
            return  # newer weights come with the next probe, or this server's with the next hand-over
        except RolloutError as error:
            server.health = None
            if lease.has_ended:  # the next rollout probes again
                return
            if not isinstance(error, RolloutUnavailableError):
                raise
            _log.warning("a rollout server did not take its weights: %s", error)
            return
        if was_away and weights.version:
            _log.info("rollout server %s is back, and has version %d", server.client.address, weights.version)

    def _read_health(self, server: ServerState) -> str | None:
        """Why the server cannot be used; None where it answers."""
        try:
            server.health = server.client.health()
        except RolloutUnavailableError as error:
            server.health = None
            return str(error)
        if self.sends_weights:
            server.takes = "adapter" if self._weights.sends_adapter_alone(server.health.lora) else "whole"
        return None

    def mark_lost(self, server: ServerState, error: Exception) -> None:
        """Request nothing of a server that broke off until it answers again and has the weights."""
        if server.health is not None:
            _log.warning("rollout server lost, its work goes to others: %s", error)
        server.health = None

    def _update_weights(self, server: ServerState, lease: WeightLease) -> Health:
        """Send a live server what it lacks: all weights, or base and adapter, or the adapter alone."""
        health = server.health  # another thread may find it lost meanwhile
        if health is None:
            raise RolloutUnavailableError(f"{server.client.address} was lost")
        if server.takes != "adapter":
            return self._send(server, health, lease, "whole")
        if health.base != lease.weights.source:
            self._send(server, health, lease, "base")
        return self._send(server, health, lease, "adapter")

    def _send(self, server: ServerState, health: Health, lease: WeightLease, part: Part) -> Health:
        if server.client.takes_handed:
            with lease.reading():
                tensors = lease.register(lease.tensors(part))
            update = WeightUpdate(weights=lease.weights, part=part, goes_on=lease.goes_on, handed=True)
            names = [*tensors]
            return server.client.update_weights(update, dict(zip(names, lease.copies(tensors), strict=True)))
        if self._config.weights == "broadcast":
            return self._broadcast(server, health, lease, part)
        version = 0 if part == "base" else lease.weights.version  # a base is written once
        with lease.reading():
            path = self._files[part].path(version, lambda: lease.tensors(part))
        update = WeightUpdate(weights=lease.weights, part=part, goes_on=lease.goes_on, path=str(path))
        return server.client.update_weights(update)

    def _broadcast(self, server: ServerState, health: Health, lease: WeightLease, part: Part) -> Health:
        """Broadcast to this server alone, so that a server that dies stops no other's weights."""
        assert isinstance(server.client, ServerClient)
        with lease.reading():
            tensors = lease.register(lease.tensors(part))
            specs, are_on_gpu = tensor_specs(tensors), next(iter(tensors.values())).is_cuda
        backend = "nccl" if health.device == "cuda" and are_on_gpu else "gloo"
        address = address_towards(server.client.host, server.client.port)
        store = open_store(address, _JOIN_S)
        update = WeightUpdate(
            weights=lease.weights,
            part=part,
            goes_on=lease.goes_on,
            host=address,
            port=store.port,
            token=store.token,
            backend=backend,
            tensors=specs,
        )
        reply = self.threads.submit(server.client.update_weights, update)
        workers = health.workers
        if not wait_for_members(store, workers, reply.done, _JOIN_S):
            if reply.done():
                reply.result()  # raises what the server refused, or why it is gone
            raise RolloutUnavailableError(f"{server.client.address} did not come for its weights")
        deadline_s = self._config.deadline_s
        group = BroadcastGroup(store, 0, 1 + workers, backend, address=address, timeout_s=deadline_s)
        with closing(group):
            group.send(lease.copies(tensors))
            return reply.result()

    def close(self) -> None:
        """Close the connections and delete the files; the servers run on."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for server in self.servers:
            server.client.close()
        if self.sends_weights:
            for file in self._files.values():
                file.close()


def _clients_of_urls(config: RolloutConfig) -> list[ServerClient]:
    assert config.urls is not None
    urls = parse_servers(config.urls, "rollout.urls")
    return [ServerClient(url, config.deadline_s, config.auth) for url in urls]


def least_busy(servers: Sequence[ServerState], num_completions: int) -> ServerState | None:
    """The server with the fewest pending tokens among those with room for `num_completions` more; None where
    all are full or away.

    A server without work always has room.
    """
    able = [
        server
        for server in servers
        if server.health is not None
        and (
            not server.pending_completions
            or server.pending_completions + num_completions <= server.health.max_num_seqs
        )
    ]
    return min(able, key=lambda server: server.pending_tokens, default=None)
