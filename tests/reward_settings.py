"""Reward settings for tests: those of another test with a few of them changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conch.config import RewardConfig, load


def changed(config: RewardConfig, **sections: Mapping[str, Any]) -> RewardConfig:
    """`config` with some keys of its sections set: `changed(config, client={"batch_rows": 1})`."""
    values = config.model_dump()
    for name, settings in sections.items():
        values[name] |= settings
    return load(RewardConfig, values)
