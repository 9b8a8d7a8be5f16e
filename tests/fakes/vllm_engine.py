"""vLLM's `AsyncLLM` as far as a rollout server asks it without sampling, and a server over it.

It loads weights as vLLM's workers do: from a file, or as a member of the trainer's broadcast.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from safetensors.torch import load_file
from torch import Tensor

from conch.rollouts.app import make_app
from conch.rollouts.protocol import LoraCapacity, WeightUpdate
from conch.rollouts.rendezvous import address_towards, join
from conch.rollouts.server import RolloutServer
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.vllm.server import VLLMSampler
from conch.rollouts.weight_sync import BroadcastGroup
from conch.servers.listening import make_listener
from tests.footprint import wait_until
from tests.launches import free_port
from tests.tiny import char_tokenizer

VOCABULARY = 10


class FakeVLLM:
    """tensors: the weights that it was given last. seconds_in_rpc: its processes take as long for a call."""

    def __init__(self) -> None:
        self.errored = False
        self.tensors: dict[str, Tensor] = {}
        self.paused = 0
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64, get_vocab_size=lambda: VOCABULARY),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            parallel_config=SimpleNamespace(world_size=1),
            device_config=SimpleNamespace(device_type="cpu"),
        )

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.paused += 1

    async def resume_generation(self) -> None:
        self.paused -= 1

    async def reset_prefix_cache(self) -> None:
        pass

    async def update_weight_version(self, version: str) -> None:
        pass

    async def collective_rpc(self, method: str, timeout: float, args: tuple[Any, ...]) -> None:
        await asyncio.get_running_loop().run_in_executor(None, getattr(self, method), *args)

    def load_file(self, update: dict[str, Any]) -> None:
        self.tensors = load_file(update["path"])

    def receive_broadcast(self, update: dict[str, Any], timeout_s: float) -> None:
        message = WeightUpdate.model_validate(update)
        store = join(message.host, message.port, message.token, rank=1, timeout_s=timeout_s)
        address = address_towards(message.host, message.port)
        group = BroadcastGroup(store, 1, 2, message.backend, address=address, timeout_s=timeout_s)
        self.tensors = dict(group.receive(message.tensors))


class ServedVLLM:
    """A rollout server that answers at `address`."""

    def __init__(self, config: ServerConfig, lora: LoraCapacity | None) -> None:
        self.engine = FakeVLLM()
        tokenizer = char_tokenizer("abcdefgh")
        self.sampler = VLLMSampler(self.engine, tokenizer, config.deadline_s, lora)
        self.server = RolloutServer(self.sampler, tokenizer, config.weights_dir)
        self.address = f"{config.host}:{config.port}"
        self.listener: uvicorn.Server = make_listener(make_app(self.server), config)
        self._thread = threading.Thread(target=self.listener.run)

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self.listener.started, lambda: "the server does not listen")

    def stop(self) -> None:
        self.listener.should_exit = True
        self._thread.join(60)


@contextmanager
def served(
    weights_dir: Path, *, lora: LoraCapacity | None = None, host: str = "127.0.0.1", **settings: Any
) -> Iterator[ServedVLLM]:
    """A server with the settings of `conch rollout-server`."""
    config = ServerConfig(model="x", port=free_port(), host=host, weights_dir=weights_dir, **settings)
    server = ServedVLLM(config, lora)
    server.start()
    try:
        yield server
    finally:
        server.stop()
