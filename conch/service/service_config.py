"""Settings of `python -m conch.service`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from conch.config import RolloutConfig
from conch.servers.settings import ListenSettings
from conch.service.protocol import KEY_VARIABLE

SETTINGS_PREFIX = "CONCH_SERVICE_"
"""Of environment variables that are settings: `CONCH_SERVICE_PORT=9000`."""


class ServiceConfig(ListenSettings):
    """Settings of a service that trains on what clients ask for and reward."""

    output_dir: Path = Path("outputs/service")
    """Folder of all runs. A service that starts on it goes on with the run that was under way."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    secret_env: str | None = KEY_VARIABLE
    """Environment variable with the key that clients must send. None asks for none, on loopback alone."""

    models: tuple[str, ...] = ()
    """Models that clients may train, as they name them in `model_id`: one, or a list. Empty allows any folder
    of this machine and any hub id."""

    rollout: RolloutConfig = RolloutConfig()
    """What samples the completions of all runs: the trainer's process with transformers or vLLM, actors of
    Ray, or servers (`rollout.urls`). Of a client's settings none chooses that."""

    deadline_s: float = Field(default=120.0, gt=0)
    """Longest wait of one request, in seconds, where it names no `wait_s`: for completions, a model to load
    or to be saved."""

    max_waiting: int = Field(default=1024, ge=1)
    """Most requests that may wait at once, all clients together; more are told to come again (429)."""

    idle_s: float = Field(default=86400.0, gt=0)
    """A run that no client has asked anything of for so long is saved and stopped, in seconds."""

    stop_s: float = Field(default=300.0, gt=0)
    """Longest wait for the update under way and for a checkpoint, when a run is stopped, in seconds."""

    max_request_mb: float = Field(default=64.0, gt=0)
    """Largest request, in millions of bytes."""

    @field_validator("models", mode="before")
    @classmethod
    def _list_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def harm(self) -> str:
        """What whoever is let in can do."""
        return "trains models and downloads them"
