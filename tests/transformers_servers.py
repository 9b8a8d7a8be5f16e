"""Rollout servers that sample with transformers: over a model in a thread of this process, and in others."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.errors import RolloutUnavailableError
from conch.rollouts.app import make_app
from conch.rollouts.hf.server import TransformersSampler
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.server import RolloutServer
from conch.rollouts.server_config import ServerConfig
from conch.servers.listening import make_listener
from tests.footprint import wait_until
from tests.launches import ROOT, free_port

READY_S = 240.0
"""Of a process that imports torch, on a machine that may have much else to do."""


class ServedTransformers:
    """A server that answers at `address`, over a copy of a model."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ServerConfig) -> None:
        self.address = f"{config.host}:{config.port}"
        self.sampler = TransformersSampler(
            copy.deepcopy(lm),
            tokenizer,
            max_model_len=config.max_model_len,
            slots=config.slots,
            deadline_s=config.deadline_s,
        )
        self.server = RolloutServer(self.sampler, tokenizer, config.weights_dir)
        self.listener = make_listener(make_app(self.server), config)
        self._thread = threading.Thread(target=self.listener.run)
        self._thread.start()
        wait_until(lambda: self.listener.started, lambda: "the server does not listen")

    def stop(self) -> None:
        self.listener.should_exit = True
        self._thread.join(60)


@contextmanager
def served(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Iterator[ServedTransformers]:
    """A server with the settings of `conch rollout-server engine=transformers`."""
    values = {"model": "x", "engine": "transformers", "port": free_port(), **settings}
    server = ServedTransformers(lm, tokenizer, ServerConfig(**values))
    try:
        yield server
    finally:
        server.stop()


class TransformersProcess:
    """`conch rollout-server engine=transformers`, and what it started."""

    def __init__(self, model: Path, *settings: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        words = [f"model={model}", f"port={self.port}", "engine=transformers", "restart=false", *settings]
        self._command = [sys.executable, "-m", "conch", "rollout-server", *words]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT)

    def wait(self) -> None:
        """Until it answers."""
        wait_until(self._answers, lambda: "the server did not become ready", READY_S)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        with closing(ServerClient(self.address, 60.0)) as client, suppress(RolloutUnavailableError):
            client.health()
            return True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(60) == 0
