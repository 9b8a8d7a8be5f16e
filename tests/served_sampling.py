"""An engine over fake rollout servers, as a trainer's rank has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import PreTrainedModel

from conch.config import GenerationConfig, RolloutConfig
from conch.models.adapter import add_adapter
from conch.rollouts import weight_sync
from conch.rollouts.remote import pool as server_pool
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.types import Prompt, Rollout
from tests.fakes.rollout_server import FakeRolloutServer
from tests.tiny import char_tokenizer, tiny_decoder

LONG_S = 120.0
LORA = {"rank": 8, "modules": ["q_proj", "v_proj"]}
"""Capacity for the adapter of `adapted`."""

_TOKENIZER = char_tokenizer("abcdefgh")
_LM = tiny_decoder("gpt2")


class Sampling:
    """Call it with prompts for rollouts of the policy's `version`."""

    def __init__(
        self,
        *servers: FakeRolloutServer,
        lm: PreTrainedModel = _LM,
        sends_weights: bool = True,
        deadline_s: float = LONG_S,
        weights: Literal["broadcast", "files"] = "files",
        **generation: Any,
    ) -> None:
        urls = ",".join(server.address for server in servers)
        config = RolloutConfig(engine="vllm", urls=urls, weights=weights, deadline_s=deadline_s)
        self.pool = ServerPool(config, lambda: lm, source="run", sends_weights=sends_weights)
        self.version = 0
        self.engine = RemoteEngine(
            self.pool,
            _TOKENIZER,
            GenerationConfig(**{"max_new_tokens": 4, "chunk_size": 3, **generation}),
            version=lambda: self.version,
            deadline_s=deadline_s,
        )

    def __call__(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        return [rollout for chunk in self.engine.generate(prompts) for rollout in chunk]


def prompts(count: int) -> list[Prompt]:
    """Of different ids, so that each is a request of its own."""
    return [Prompt("p", (place // 8, place % 8)) for place in range(count)]


def adapted() -> PreTrainedModel:
    """A policy with an adapter that can go by itself."""
    lm = tiny_decoder("llama")
    add_adapter(lm, {"r": 4, "target_modules": ["q_proj"]}, merged_when_saved=True)
    return lm


def look_often_and_write_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of twice a second, and to shared memory."""
    monkeypatch.setattr(server_pool, "_PROBE_PAUSE_S", 0.01)
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", folder)


@contextmanager
def fake_servers() -> Iterator[Callable[..., FakeRolloutServer]]:
    """Gives what starts them; stops those that still run."""
    running: list[FakeRolloutServer] = []

    def make(*args: Any, **settings: Any) -> FakeRolloutServer:
        running.append(FakeRolloutServer(*args, **settings))
        return running[-1]

    try:
        yield make
    finally:
        for server in running:
            server.stop()
