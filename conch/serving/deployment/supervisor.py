"""Keeps the servers of a deployment running: starts, watches, heals, swaps, restarts, stops.

One thread per server; the first start of all must succeed, later ones are tried again with growing pauses.

Keeps one running server right: a golden sample when nothing else tells, and new versions on demand.

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
from conch.serving.deployment.hot_swap import Swap, load
from conch.serving.deployment.state import Replica
from conch.serving.server.health import check_golden
from conch.serving.server.server import TritonServer
from conch.store.store import StoredModel, latest_version, read_with_members, verify_files
from conch.triton.channel import open_client

_log = get_logger(__name__)

_POLL_S = 0.2
_STORE_POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How hard to try.

    max_restarts: starts after a failure, in a row; a server that stayed up for `calm_s` seconds starts anew.
    first_pause_s, longest_pause_s: before a restart; doubled each time.
    watch_s: seconds between two looks of the watchdog.
    follow_store: take up new versions by itself.
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
    """Runs one thread per server. Use: `start`, then `wait` or `stop`.

    on_change: called, from any thread but one at a time, whenever `replicas` has changed.
    """

    def __init__(
        self,
        servers: Sequence[TritonServer],
        model_store: Path,
        policy: Policy,
        on_change: Callable[[], None],
    ) -> None:
        self.swaps = 0
        self._lock = threading.RLock()
        self._on_change = on_change
        self._stopping = threading.Event()
        self._keepers = [
            _Keeper(server, model_store, policy, self._stopping, self._tell) for server in servers
        ]
        self._threads = [
            threading.Thread(target=keeper.run, name=f"replica-{number}", daemon=True)
            for number, keeper in enumerate(self._keepers)
        ]

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """What is to be told about the servers."""
        return tuple(keeper.state for keeper in self._keepers)

    @property
    def is_running(self) -> bool:
        """Whether a server runs or is to run again."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the servers and return at once."""
        for thread in self._threads:
            thread.start()

    def swap(self) -> None:
        """Have all servers look for new versions in the store; returns at once."""
        for keeper in self._keepers:
            keeper.swap_asked.set()
        threading.Thread(target=self._count_swap, name="swap", daemon=True).start()

    def stop(self) -> None:
        """End all servers and wait for it."""
        self._stopping.set()
        for keeper in self._keepers:
            keeper.server.abort()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _count_swap(self) -> None:
        while any(k.swap_asked.is_set() for k in self._keepers) and not self._stopping.wait(_POLL_S):
            pass
        with self._lock:
            self.swaps += 1
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            try:
                self._on_change()
            except OSError as error:  # a full disk must not end what serves
                _log.warning("the state of the deployment cannot be noted down: %s", error)


class _Keeper:
    """What one server's thread does.

    swap_asked: set by others; cleared when done, or when there is nobody to do it.
    """

    def __init__(
        self,
        server: TritonServer,
        model_store: Path,
        policy: Policy,
        stopping: threading.Event,
        tell: Callable[[], None],
    ) -> None:
        assert server.log_file is not None
        self.server = server
        self.swap_asked = threading.Event()
        self.state = Replica(log=server.log_file.resolve(), gpu=server.options.gpu)
        self._model_store = model_store
        self._policy = policy
        self._stopping = stopping
        self._tell = tell
        self._tried: dict[str, int] = {}

    def run(self) -> None:
        """Until told to stop, or given up."""
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
        except Exception as error:  # a mistake of ours: tell before this thread ends
            self._set(phase="failed", problem=f"{type(error).__name__}: {error}", pid=0)
            raise
        finally:
            self.swap_asked.clear()

    def _serve_once(self) -> str:
        """Start the server and stay with it to its end; why it ended."""
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
        looked = store_read = time.monotonic()
        while not self._stopping.wait(_POLL_S):
            now = time.monotonic()
            if not self.server.is_running:
                code = self.server.wait()
                return f"tritonserver ended with code {code}; last lines:\n{self.server.log_tail()}"
            if self._policy.follow_store and now - store_read >= _STORE_POLL_S:
                store_read = now
                if self._store_has_news(watchdog):
                    self.swap_asked.set()
            if self.swap_asked.is_set():
                self._swap(watchdog)
            if now - looked >= self._policy.watch_s:
                looked = now
                heals = watchdog.heals
                watchdog.look()
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
            self.swap_asked.clear()

    def _store_has_news(self, watchdog: Watchdog) -> bool:
        """Whether a version is there that is newer than what is served and was not tried before."""
        try:
            latest = {name: latest_version(self._model_store, name) for name in watchdog.versions}
        except ConchError:  # the store is away for a moment; what is loaded keeps serving
            return False
        known = {name: max(version, self._tried.get(name, 0)) for name, version in watchdog.versions.items()}
        self._tried = latest
        return any(latest[name] > known[name] for name in known)

    def _set(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        self._tell()


def _pause_s(policy: Policy, failures: int) -> float:
    # Jitter: replicas that failed together should not load their models together.
    return min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** (failures - 1)) * random.uniform(0.75, 1)


_STATISTICS_TIMEOUT_S = 10.0


class Watchdog:
    """Looks after the models of one server. One thread at a time.

    heals: times that a model was loaded again because it did not score right.
    """

    def __init__(self, server: TritonServer, load_timeout_s: float) -> None:
        self.heals = 0
        self._server = server
        self._load_timeout_s = load_timeout_s
        self._client = open_client(server.url, server.access)
        self._counts: dict[str, tuple[int, int]] = {}

    @property
    def versions(self) -> dict[str, int]:
        """Model -> the version that is served."""
        return {model.name: model.version for model in self._server.stored}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def look(self) -> None:
        """Score a golden sample of every model that nobody else just used; load it again if that fails.

        Raises:
            ServerStartError: the model does not score right after it was loaded again either.
        """
        for model in self._server.stored:
            if self._answers_others(model.name):
                continue
            try:
                check_golden(self._client, model, samples=1)
            except ServerStartError as error:
                _log.warning("%s; loading it again", error)
                load(self._client, model, model.name, self._load_timeout_s)
                check_golden(self._client, model, samples=1)
                self.heals += 1

    def swap(self, model_store: Path) -> list[str]:
        """Have the server take up what is newer in the store; the old version answers until the new one can.

        Nothing changes unless everything that is new can be read, fits together, loads and scores right.

        Returns:
            sentences about models that were swapped.

        Raises:
            ServingError: the store's latest is older than what is served, damaged, did not load, or scores
                wrong. What was served before goes on serving.
        """
        assert self._server.repository is not None
        served = {model.name: model for model in self._server.stored}
        found = read_with_members(model_store, list(served))
        newer: list[StoredModel] = []
        for model in found:
            changed = {other.name for other in newer}
            if _is_newer(model, served) or changed & set(model.asks):
                newer.append(model)
        for model in newer:
            verify_files(model)
        try:
            Swap(self._client, self._server.repository, served, newer, self._load_timeout_s).run()
        except OSError as error:
            raise ServingError(f"the server's repository cannot be written: {error}") from error
        self._server.stored = tuple(found)
        return [
            f"{model.name}: version {served[model.name].version if model.name in served else 'none'} -> "
            f"{model.version}"
            for model in newer
        ]

    def _answers_others(self, name: str) -> bool:
        """Whether since the last look requests succeeded and none failed."""
        try:
            reply: Any = self._client.get_inference_statistics(name, client_timeout=_STATISTICS_TIMEOUT_S)
        except InferenceServerException:
            return False
        stats = [entry.inference_stats for entry in reply.model_stats]
        now = (sum(entry.success.count for entry in stats), sum(entry.fail.count for entry in stats))
        before = self._counts.get(name, now)
        self._counts[name] = now
        return now[0] > before[0] and now[1] == before[1]


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
