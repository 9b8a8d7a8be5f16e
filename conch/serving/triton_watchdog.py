"""Keeps one running server right: a golden sample when nothing else tells, and new versions on demand.

Triton says that a model is ready though its Python process is dead, and does not start another. Loading the
model again does, in a fraction of a second; where that does not help the server has to be restarted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tritonclient.utils import InferenceServerException

from conch.errors import ServerStartError, ServingError
from conch.log import get_logger
from conch.serving.members import read_with_members
from conch.serving.store import StoredModel, verify_files
from conch.serving.triton_channel import Access, open_client
from conch.serving.triton_health import check_golden

_log = get_logger(__name__)

_STATISTICS_TIMEOUT_S = 10.0


class Watchdog:
    """Looks after the models of one server. One thread at a time.

    heals: times that a model was loaded again because it did not score right.
    """

    def __init__(
        self, url: str, access: Access, models: Sequence[StoredModel], load_timeout_s: float
    ) -> None:
        self.heals = 0
        self._models = {model.name: model for model in models}
        self._load_timeout_s = load_timeout_s
        self._client = open_client(url, access)
        self._counts: dict[str, tuple[int, int]] = {}

    @property
    def versions(self) -> dict[str, int]:
        """Model -> the version that was loaded last."""
        return {name: model.version for name, model in self._models.items()}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def look(self) -> None:
        """Score a golden sample of every model that nobody else just used; load it again if that fails.

        Raises:
            ServerStartError: the model does not score right after it was loaded again either.
        """
        for model in self._models.values():
            if self._answers_others(model.name):
                continue
            try:
                check_golden(self._client, model, samples=1)
            except ServerStartError as error:
                _log.warning("%s; loading it again", error)
                self._load(model)
                check_golden(self._client, model, samples=1)
                self.heals += 1

    def swap(self, model_store: Path) -> list[str]:
        """Have the server load what is newer in the store; the old version answers until the new one can.

        Nothing is loaded unless everything that is new can be read and fits together.

        Returns:
            sentences about models that were swapped.

        Raises:
            ServingError: the store's latest is older than what is served, damaged, did not load, or scores
                wrong. What did not load leaves the old version serving.
        """
        found = read_with_members(model_store, list(self._models))
        newer = [model for model in found if self._is_newer(model)]
        for model in newer:
            verify_files(model)
        news = []
        for model in newer:
            news.append(f"{model.name}: version {self.versions.get(model.name, 'none')} -> {model.version}")
            self._load(model)
            self._models[model.name] = model
        for model in newer:
            check_golden(self._client, model)
        return news

    def _is_newer(self, stored: StoredModel) -> bool:
        running = self._models.get(stored.name)
        if running is None:  # an ensemble's new member
            return True
        if stored.version < running.version:
            raise ServingError(
                f"model {running.name}: the store's latest version is {stored.version}, but version "
                f"{running.version} is served and versions only move forward; convert the model again"
            )
        return stored.version > running.version

    def _load(self, model: StoredModel) -> None:
        try:
            self._client.load_model(model.name, client_timeout=self._load_timeout_s)
        except InferenceServerException as error:
            raise ServerStartError(
                f"version {model.version} of model {model.name} did not load: {error.message()}"
            ) from error

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
