"""Which models a server must load for those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conch.serving.store import StoredModel, read_model


def read_with_members(model_store: Path, names: Sequence[str]) -> list[StoredModel]:
    """The named models, each once.

    Raises:
        ModelStoreError: one is missing or damaged.
    """
    return [read_model(model_store, name) for name in dict.fromkeys(names)]
