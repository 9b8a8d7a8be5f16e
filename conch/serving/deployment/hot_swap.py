"""Change the versions that a running server serves: tried out beside the old ones, then taken up.

No caller's request goes to a version before its golden samples have scored right in this very server. For
that a version is first loaded under another name (`triton_repository.py`), and loaded again under its own;
Triton lets the old version answer until the new one can, so that no request waits or is lost.

An ensemble whose members change too would for a moment combine old and new ones. It is therefore taken up
first, asking its members under the names that they are tried out by, and turned to their own names once those
serve.
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
# What an ensemble had begun to ask of members that were tried out must be answered before those go.
_DRAIN_S = 5.0


def load(client: triton.InferenceServerClient, model: StoredModel, name: str, timeout_s: float) -> None:
    """Load a model or, if it is loaded, load it again.

    Raises:
        ServerStartError: it did not load; what was loaded before goes on serving.
    """
    try:
        client.load_model(name, client_timeout=timeout_s)
    except InferenceServerException as error:
        raise ServerStartError(
            f"version {model.version} of model {model.name} did not load: {error.message()}"
        ) from error


class Swap:
    """One change, to be `run` once.

    served: the models of today by name. newer: what replaces or joins them; members stand before ensembles.
    """

    def __init__(
        self,
        client: triton.InferenceServerClient,
        repository: Repository,
        served: Mapping[str, StoredModel],
        newer: Sequence[StoredModel],
        load_timeout_s: float,
    ) -> None:
        self._client = client
        self._repository = repository
        self._served = served
        self._newer = newer
        self._load_timeout_s = load_timeout_s
        self._called = {part.name: candidate(part.name) for model in newer for part in model.folders}
        self._tried: list[str] = []
        self._loaded: list[StoredModel] = []
        asked = {name for model in newer for name in model.asks}
        self._members = [name for name in self._called if name in asked]
        self._ensembles = [model for model in newer if self._called.keys() & set(model.asks)]

    def run(self) -> None:
        """Take up what is newer, or leave everything as it was.

        Raises:
            ServerStartError: a version did not load or scores wrong; says which, and what serves now.
        """
        try:
            self._try_out()
            # One copy less in memory while the same weights are loaded for good.
            self._remove(name for name in list(self._tried) if name not in self._members)
            self._take_up()
        except ServerStartError as error:
            self._go_back()
            raise ServerStartError(f"{error}; {self._what_serves()}") from error
        finally:
            self._remove(list(self._tried))

    def _try_out(self) -> None:
        for model in self._newer:
            self._tried += [part.name for part in model.folders]
            self._repository.place(model, self._called)
            self._load(model, self._called[model.name])
        for model in self._newer:
            check_golden(self._client, model, called=self._called[model.name])

    def _take_up(self) -> None:
        for model in self._ensembles:
            members = {name: other for name, other in self._called.items() if name != model.name}
            self._repository.redirect(model, members)
            self._load(model, model.name)
            self._loaded.append(model)
        for model in self._newer:  # members first, and then the ensembles, now for good
            self._repository.place(model)
            for part in model.folders:
                self._load(model, part.name)
            self._loaded.append(model)
        for model in self._newer:
            check_golden(self._client, model)
        if self._ensembles:
            time.sleep(_DRAIN_S)

    def _go_back(self) -> None:
        changed = {model.name for model in self._loaded}
        for model in self._newer:
            old = self._served.get(model.name)
            if old is None:
                self._unload(model.name)
                self._repository.remove(model.name)
                continue
            self._repository.place(old)
            if model.name in changed:
                for part in old.folders:
                    self._load(old, part.name)

    def _what_serves(self) -> str:
        old = [self._served[model.name] for model in self._newer if model.name in self._served]
        return " and ".join(f"version {model.version} of {model.name}" for model in old) + " goes on serving"

    def _load(self, model: StoredModel, name: str) -> None:
        load(self._client, model, name, self._load_timeout_s)

    def _remove(self, names: Iterable[str]) -> None:
        """End what was tried out, and wait until its memory is free."""
        ended = list(names)
        for name in ended:
            self._unload(self._called[name])
        deadline = time.monotonic() + _UNLOAD_TIMEOUT_S
        while self._still_loaded({self._called[name] for name in ended}) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for name in ended:
            self._repository.remove(self._called[name])
            self._tried.remove(name)

    def _unload(self, name: str) -> None:
        with contextlib.suppress(InferenceServerException):  # it never loaded, or the server is gone
            self._client.unload_model(name, client_timeout=_CALL_TIMEOUT_S)

    def _still_loaded(self, names: set[str]) -> bool:
        try:
            index: Any = self._client.get_model_repository_index(client_timeout=_CALL_TIMEOUT_S)
        except InferenceServerException:
            return False
        return any(entry.name in names and entry.state not in ("UNAVAILABLE", "") for entry in index.models)
