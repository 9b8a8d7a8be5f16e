"""Keep the servers of a deployment running: start, watch, heal, swap, restart and stop them.

A `Supervisor` runs one thread for each server. The first start of all must succeed, later ones are tried
again with growing pauses. A `Watchdog` scores golden samples where no requests tell that a model works, and
loads new versions.

Triton says that a model is ready though its Python process is dead, and does not start another. Loading the
model again does, in a fraction of a second; where that does not help the server has to be restarted.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.utils import InferenceServerException

from conch.errors import ConchError, ServerStartError, ServingError
from conch.log import get_logger
from conch.serving.deployment.hot_swap import HotSwap, load
from conch.serving.deployment.state import Replica
from conch.serving.server.health import check_golden
from conch.serving.server.server import TritonServer
from conch.store.store import StoredModel, latest_version, read_with_members, verify_files
from conch.triton.channel import open_client

_log = get_logger(__name__)

_POLL_S = 0.2
_STORE_POLL_S = 2.0
_STATISTICS_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Rules for restarts, watching and new versions.

    max_restarts: restarts in a row; a server that stayed up for `calm_s` seconds counts from 0 again.
    first_pause_s, longest_pause_s: seconds before a restart; doubled each time.
    watch_s: seconds between two checks of the watchdog.
    follow_store: load new versions as soon as they are in the store.
    load_timeout_s: seconds that a model may take to load.
    """

    max_restarts: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    calm_s: float = 600.0
    watch_s: float = 30.0
    follow_store: bool = False
    load_timeout_s: float = 600.0


class Supervisor:
    """Runs one thread for each server, from `start` to `stop`.

    swaps: number of searches for new versions that are over.
    on_change: called whenever `replicas` or `swaps` has changed, from any thread but one at a time.
    """

    def __init__(
        self,
        servers: Sequence[TritonServer],
        model_store: Path,
        policy: RestartPolicy,
        on_change: Callable[[], None],
    ) -> None:
        self.swaps = 0
        self._lock = threading.RLock()
        self._on_change = on_change
        self._stopping = threading.Event()
        self._runners = [
            _ReplicaRunner(server, model_store, policy, self._stopping, self._report) for server in servers
        ]
        self._threads = [
            threading.Thread(target=runner.run, name=f"replica-{number}", daemon=True)
            for number, runner in enumerate(self._runners)
        ]

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """State of each server."""
        return tuple(runner.state for runner in self._runners)

    @property
    def is_running(self) -> bool:
        """Whether a server runs or is to run again."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the servers and return at once."""
        for thread in self._threads:
            thread.start()

    def swap(self) -> None:
        """Have all servers load new versions from the store; returns at once."""
        for runner in self._runners:
            runner.swap_request.set()
        threading.Thread(target=self._count_swap, name="swap", daemon=True).start()

    def stop(self) -> None:
        """End all servers and wait for it."""
        self._stopping.set()
        for runner in self._runners:
            runner.server.abort()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _count_swap(self) -> None:
        requests = [runner.swap_request for runner in self._runners]
        while any(request.is_set() for request in requests) and not self._stopping.wait(_POLL_S):
            pass
        with self._lock:
            self.swaps += 1
        self._report()

    def _report(self) -> None:
        with self._lock:
            try:
                self._on_change()
            except OSError as error:  # a full disk must not end servers
                _log.warning("the state of the deployment cannot be written: %s", error)


class _ReplicaRunner:
    """Work of one server's thread.

    server: the server that this thread starts, watches and stops.
    state: the server's published state; replaced whenever it changes.

    swap_request: set by other threads; cleared after the swap, and when this thread ends.
    """

    def __init__(
        self,
        server: TritonServer,
        model_store: Path,
        policy: RestartPolicy,
        stopping: threading.Event,
        report: Callable[[], None],
    ) -> None:
        assert server.log_file is not None
        self.server = server
        self.swap_request = threading.Event()
        self.state = Replica(log=server.log_file.resolve(), gpu=server.options.gpu)
        self._model_store = model_store
        self._policy = policy
        self._stopping = stopping
        self._report = report
        self._attempted: dict[str, int] = {}

    def run(self) -> None:
        """Serve and restart until `Supervisor.stop`, or until the restarts are used up."""
        failures = 0
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                problem = self._serve_once()
                if self._stopping.is_set():
                    break
                if time.monotonic() - began > self._policy.calm_s:
                    failures = 0
                never_ready = not self.state.versions
                if never_ready or failures >= self._policy.max_restarts:
                    self._set(phase="failed", problem=problem, pid=0)
                    return
                failures += 1
                self._set(phase="restarting", problem=problem, pid=0)
                _log.warning("%s; restart %d of %d", problem, failures, self._policy.max_restarts)
                self._stopping.wait(_pause_s(self._policy, failures))
                self._set(restarts=self.state.restarts + 1)
            self._set(phase="stopped", pid=0)
        except Exception as error:  # a bug: report it before this thread ends
            self._set(phase="failed", problem=f"{type(error).__name__}: {error}", pid=0)
            raise
        finally:
            self.swap_request.clear()

    def _serve_once(self) -> str:
        """Start the server and watch it until it ends; returns why it ended."""
        watchdog = None
        try:
            self.server.start(again=self.state.restarts > 0)
            watchdog = Watchdog(self.server, self._policy.load_timeout_s)
            self._set(
                phase="ready",
                problem="",
                url=self.server.url,
                http_url=self.server.http_url,
                metrics_url=self.server.metrics_url,
                pid=self.server.pid,
                versions=watchdog.versions,
            )
            return self._watch(watchdog)
        except ConchError as error:
            return str(error)
        finally:
            if watchdog is not None:
                watchdog.close()
            self.server.stop()

    def _watch(self, watchdog: Watchdog) -> str:
        last_check = last_store_read = time.monotonic()
        while not self._stopping.wait(_POLL_S):
            now = time.monotonic()
            if not self.server.is_running:
                code = self.server.wait()
                return f"tritonserver ended with code {code}; last lines:\n{self.server.log_tail()}"
            if self._policy.follow_store and now - last_store_read >= _STORE_POLL_S:
                last_store_read = now
                if self._store_has_news(watchdog):
                    self.swap_request.set()
            if self.swap_request.is_set():
                self._swap(watchdog)
            if now - last_check >= self._policy.watch_s:
                last_check = now
                heals = watchdog.heals
                watchdog.check()
                if watchdog.heals > heals:
                    self._set(heals=self.state.heals + watchdog.heals - heals)
        return "told to stop"

    def _swap(self, watchdog: Watchdog) -> None:
        try:
            for sentence in watchdog.swap(self._model_store):
                _log.info("%s", sentence)
            self._set(problem="", versions=watchdog.versions)
        except ConchError as error:
            _log.warning("%s", error)
            self._set(problem=f"swap failed: {error}", versions=watchdog.versions)
        finally:
            self.swap_request.clear()

    def _store_has_news(self, watchdog: Watchdog) -> bool:
        """Whether the store has a newer version than the one served, that was not attempted before."""
        try:
            latest = {name: latest_version(self._model_store, name) for name in watchdog.versions}
        except ConchError:  # the store is away for a moment; loaded models keep serving
            return False
        served, attempted = watchdog.versions, self._attempted
        self._attempted = latest
        return any(latest[name] > max(served[name], attempted.get(name, 0)) for name in served)

    def _set(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        self._report()


def _pause_s(policy: RestartPolicy, failures: int) -> float:
    # Jitter: replicas that failed together should not load their models together.
    return min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** (failures - 1)) * random.uniform(0.75, 1)


class Watchdog:
    """Checks and swaps the models of one server. One thread at a time.

    heals: times that a model was loaded again because it did not score right.
    load_timeout_s: seconds that a model may take to load.
    """

    def __init__(self, server: TritonServer, load_timeout_s: float) -> None:
        self.heals = 0
        self._server = server
        self._load_timeout_s = load_timeout_s
        self._client = open_client(server.url, server.access)
        self._counts: dict[str, tuple[int, int]] = {}

    @property
    def versions(self) -> dict[str, int]:
        """Model -> version that is served."""
        return {model.name: model.version for model in self._server.stored}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def check(self) -> None:
        """Score a golden sample of every model without successful requests of others; heal those that fail.

        Raises:
            ServerStartError: a model does not score right even after it was loaded again.
        """
        for model in self._server.stored:
            if self._has_new_successes(model.name):
                continue
            try:
                check_golden(self._client, model, samples=1)
            except ServerStartError as error:
                _log.warning("%s; loading it again", error)
                load(self._client, model, model.name, self._load_timeout_s)
                check_golden(self._client, model, samples=1)
                self.heals += 1

    def swap(self, model_store: Path) -> list[str]:
        """Have the server load newer versions from the store; an old one answers until its new one can.

        Nothing changes unless all new versions can be read, fit together, load and score right.

        Returns:
            a sentence about each model that was swapped.

        Raises:
            ServingError: the store's latest version is older than the one served, damaged, did not load, or
                scores wrong. The versions served before go on serving.
        """
        assert self._server.repository is not None
        served = {model.name: model for model in self._server.stored}
        latest = read_with_members(model_store, list(served))
        new: list[StoredModel] = []
        for model in latest:
            changed = {other.name for other in new}
            if _is_newer(model, served) or changed & set(model.submodels):
                new.append(model)
        for model in new:
            verify_files(model)
        try:
            HotSwap(self._client, self._server.repository, served, new, self._load_timeout_s).run()
        except OSError as error:
            raise ServingError(f"the server's repository cannot be written: {error}") from error
        self._server.stored = tuple(latest)
        return [
            f"{model.name}: version {served[model.name].version if model.name in served else 'none'} -> "
            f"{model.version}"
            for model in new
        ]

    def _has_new_successes(self, name: str) -> bool:
        """Whether since the last check requests succeeded and none failed."""
        try:
            reply: Any = self._client.get_inference_statistics(name, client_timeout=_STATISTICS_TIMEOUT_S)
        except InferenceServerException:
            return False
        stats = [entry.inference_stats for entry in reply.model_stats]
        successes, failures = sum(s.success.count for s in stats), sum(s.fail.count for s in stats)
        old_successes, old_failures = self._counts.get(name, (successes, failures))
        self._counts[name] = successes, failures
        return successes > old_successes and failures == old_failures


def _is_newer(stored: StoredModel, served: dict[str, StoredModel]) -> bool:
    running = served.get(stored.name)
    if running is None:  # an ensemble's new member
        return True
    if stored.version < running.version:
        raise ServingError(
            f"model {running.name}: the store's latest version is {stored.version}, but version "
            f"{running.version} is served and versions only move forward; convert the model again"
        )
    return stored.version > running.version
