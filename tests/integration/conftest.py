"""One converted model of each form and one server, shared by all integration tests that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conch.converters.options import Conversion
from conch.converters.to_triton import to_triton
from conch.serving.server.flags import LOOPBACK
from conch.serving.server.server import TritonServer, free_port
from tests.faults import MODEL as HASH
from tests.faults import hash_store, kept_running
from tests.forks import conversions_fork
from tests.tiny import reward_checkpoint

TEXT_MODEL = "walks"
TOKEN_MODEL = "walks-token"


@dataclass(frozen=True)
class RewardModel:
    """A tiny reward model, converted in both forms.

    checkpoint: the Hugging Face folder; one letter a token, window of 16 tokens, max_length 12.
    text, token: the conversions, in one store.
    """

    checkpoint: Path
    model_store: Path
    text: Conversion
    token: Conversion


@pytest.fixture(scope="session", autouse=True)
def _conversions_fork() -> Iterator[None]:
    """But in `test_reward_model_served.py`."""
    with conversions_fork():
        yield


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    root = tmp_path_factory.mktemp("reward-model")
    checkpoint = reward_checkpoint(root / "checkpoint", reward_model={"max_length": 12})
    store = root / "store"
    text = to_triton(checkpoint, name=TEXT_MODEL, model_store=store)
    token = to_triton(checkpoint, name=TOKEN_MODEL, model_store=store, form="token")
    return RewardModel(checkpoint, store, text, token)


@pytest.fixture(scope="session")
def reward_server(reward_model: RewardModel) -> Iterator[TritonServer]:
    """A running server with both models; `reward_server.endpoint(TEXT_MODEL)`. Do not stop or kill it."""
    with TritonServer(reward_model.model_store, [TEXT_MODEL, TOKEN_MODEL]) as server:
        yield server


@pytest.fixture(scope="session")
def hash_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A running server whose scores are the same in any batch, see `tests/faults.py`. Do not harm it."""
    store, port = hash_store(tmp_path_factory.mktemp("hash-store")), free_port(LOOPBACK)
    with TritonServer(store, [HASH], grpc_port=port) as server, kept_running(server):
        yield server


@pytest.fixture(scope="session")
def walks_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the randomwalks examples: the policy they start from is trained once."""
    return tmp_path_factory.mktemp("walks")
