"""Reference servers: over a model of this process, in a thread; and as users start them, in processes."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from conch.config import AuthConfig, ModelConfig
from conch.errors import ReferenceServerError, ReferenceUnavailableError
from conch.reference.server import ReferenceServer, make_app
from conch.reference.server_config import ReferenceServerConfig
from conch.servers.client import HttpClient
from conch.servers.listening import make_listener
from conch.training.setup import load_policy
from tests.footprint import wait_until
from tests.launches import ROOT, free_port

READY_S = 240.0
"""Of a process that imports torch, on a machine that may have much else to do."""


class ServedReference:
    """A server that answers at `address`, over a copy of a model that is prepared as a loaded one.

    requests: how many it was sent.
    """

    def __init__(self, lm: PreTrainedModel, config: ReferenceServerConfig) -> None:
        self.address = f"{config.host}:{config.port}"
        self.server = ReferenceServer(load_policy(copy.deepcopy(lm), ModelConfig(path="x"), "no"))
        self.requests = 0
        app = make_app(self.server)

        @app.middleware("http")
        async def count(request: Any, call_next: Any) -> Any:
            self.requests += request.url.path == "/logprobs"
            return await call_next(request)

        del count
        self.listener = make_listener(app, config)
        self._thread = threading.Thread(target=self.listener.run)
        self._thread.start()
        wait_until(lambda: self.listener.started, lambda: "the server does not listen")

    def stop(self) -> None:
        self.listener.should_exit = True
        self._thread.join(60)


@contextmanager
def served(lm: PreTrainedModel, **settings: Any) -> Iterator[ServedReference]:
    """A server with the settings of `conch reference-server`."""
    config = ReferenceServerConfig(**{"model": "x", "port": free_port(), **settings})
    server = ServedReference(lm, config)
    try:
        yield server
    finally:
        server.stop()


class ReferenceProcess:
    """`conch reference-server`, and what it started."""

    def __init__(self, model: Path, *settings: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        words = [f"model={model}", f"port={self.port}", "restart=false", *settings]
        self._command = [sys.executable, "-m", "conch", "reference-server", *words]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT)

    def wait(self) -> None:
        """Until it answers."""
        wait_until(self._answers, lambda: "the server did not become ready", READY_S)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        client = client_of(self.address)
        with contextlib.closing(client), contextlib.suppress(ReferenceUnavailableError):
            client.values("GET", "/health")
            return True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(60) == 0


def client_of(address: str, **auth: Any) -> HttpClient:
    """A client of a reference server."""
    return HttpClient(
        address,
        AuthConfig(**auth),
        section="reference",
        what="reference server",
        timeout_s=60.0,
        refused=ReferenceServerError,
        unavailable=ReferenceUnavailableError,
    )
