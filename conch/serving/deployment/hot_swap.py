"""Hot swap: load new versions into a running server, first beside the old ones, then in their place.

No caller's request goes to a version before its golden samples have scored right in this very server. For
that a version is first loaded under a candidate name (`conch/serving/server/repository.py`), and loaded again
under its own; Triton lets the old version answer until the new one can, so that no request waits or is lost.

An ensemble whose members change too would for a moment combine old and new ones. It is therefore loaded
first, with its members under their candidate names, and turned to their own names once those serve.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conch.errors import ServerStartError
from conch.log import get_logger
from conch.serving.server.health import check_golden
from conch.serving.server.repository import Repository, candidate
from conch.store.store import StoredModel

_log = get_logger(__name__)

_POLL_S = 0.05
_CALL_TIMEOUT_S = 10.0
_UNLOAD_TIMEOUT_S = 60.0
# Requests that an ensemble has sent to candidates must be answered before these are unloaded.
_DRAIN_S = 5.0


def load(client: triton.InferenceServerClient, model: StoredModel, name: str, timeout_s: float) -> None:
    """Load a model under `name`, again if it is loaded already.

    timeout_s: seconds to load.

    Raises:
        ServerStartError: it did not load; the version loaded before goes on serving.
    """
    try:
        client.load_model(name, client_timeout=timeout_s)
    except InferenceServerException as error:
        raise ServerStartError(
            f"version {model.version} of model {model.name} did not load: {error.message()}"
        ) from error


class HotSwap:
    """One change of versions, to be `run` once.

    served: models that are served now, by name.
    new: versions that replace or join them; members stand before ensembles.
    load_timeout_s: seconds that a model may take to load.
    """

    def __init__(
        self,
        client: triton.InferenceServerClient,
        repository: Repository,
        served: Mapping[str, StoredModel],
        new: Sequence[StoredModel],
        load_timeout_s: float,
    ) -> None:
        self._client = client
        self._repository = repository
        self._served = served
        self._new = new
        self._load_timeout_s = load_timeout_s
        self._aliases = {part.name: candidate(part.name) for model in new for part in model.folders}
        self._candidates: list[str] = []
        self._loaded: list[StoredModel] = []
        submodels = {name for model in new for name in model.submodels}
        self._members = [name for name in self._aliases if name in submodels]
        self._ensembles = [model for model in new if self._aliases.keys() & set(model.submodels)]

    def run(self) -> None:
        """Serve the new versions, or leave everything as it was.

        Raises:
            ServerStartError: a version did not load or scores wrong; says which one, and which serve now.
        """
        try:
            self._load_candidates()
            # One copy less in memory while the same weights are loaded for good.
            self._remove(name for name in list(self._candidates) if name not in self._members)
            self._replace()
        except ServerStartError as error:
            self._roll_back()
            raise ServerStartError(f"{error}; {self._serving_versions()}") from error
        finally:
            self._remove(list(self._candidates))

    def _load_candidates(self) -> None:
        for model in self._new:
            self._candidates += [part.name for part in model.folders]
            self._repository.place(model, self._aliases)
            self._load(model, self._aliases[model.name])
        for model in self._new:
            check_golden(self._client, model, served_name=self._aliases[model.name])

    def _replace(self) -> None:
        for model in self._ensembles:
            members = {name: alias for name, alias in self._aliases.items() if name != model.name}
            self._repository.redirect(model, members)
            self._load(model, model.name)
            self._loaded.append(model)
        for model in self._new:  # members first, and then the ensembles, now for good
            self._repository.place(model)
            for part in model.folders:
                self._load(model, part.name)
            self._loaded.append(model)
        for model in self._new:
            check_golden(self._client, model)
        if self._ensembles:
            time.sleep(_DRAIN_S)

    def _roll_back(self) -> None:
        changed = {model.name for model in self._loaded}
        for model in self._new:
            old = self._served.get(model.name)
            if old is None:
                self._unload(model.name)
                self._repository.remove(model.name)
                continue
            self._repository.place(old)
            if model.name in changed:
                for part in old.folders:
                    self._load(old, part.name)

    def _serving_versions(self) -> str:
        old = [self._served[model.name] for model in self._new if model.name in self._served]
        return " and ".join(f"version {model.version} of {model.name}" for model in old) + " goes on serving"

    def _load(self, model: StoredModel, name: str) -> None:
        load(self._client, model, name, self._load_timeout_s)

    def _remove(self, names: Iterable[str]) -> None:
        """Unload the candidates of these models, and wait until their memory is free."""
        models = list(names)
        aliases = [self._aliases[name] for name in models]
        for alias in aliases:
            self._unload(alias)
        deadline = time.monotonic() + _UNLOAD_TIMEOUT_S
        while self._is_loaded(aliases) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for name in models:
            self._repository.remove(self._aliases[name])
            self._candidates.remove(name)

    def _unload(self, name: str) -> None:
        with contextlib.suppress(InferenceServerException):  # it never loaded, or the server is gone
            self._client.unload_model(name, client_timeout=_CALL_TIMEOUT_S)

    def _is_loaded(self, names: Sequence[str]) -> bool:
        try:
            index: Any = self._client.get_model_repository_index(client_timeout=_CALL_TIMEOUT_S)
        except InferenceServerException:
            return False
        return any(entry.name in names and entry.state not in ("UNAVAILABLE", "") for entry in index.models)
