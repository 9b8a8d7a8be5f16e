"""Keeps one running server right: a golden sample when nothing else tells, and new versions on demand.

Triton says that a model is ready though its Python process is dead, and does not start another. Loading the
model again does, in a fraction of a second; where that does not help the server has to be restarted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonclient.utils import InferenceServerException

from conch.errors import ServerStartError, ServingError
from conch.log import get_logger
from conch.serving.launcher import TritonServer
from conch.serving.members import read_with_members
from conch.serving.store import StoredModel, verify_files
from conch.serving.triton_channel import open_client
from conch.serving.triton_health import check_golden
from conch.serving.triton_swap import Swap, load

_log = get_logger(__name__)

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
