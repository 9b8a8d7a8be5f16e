"""Which preset of an example to run: CONFIG_NAME says."""

from __future__ import annotations

import os
from collections.abc import Sequence

from conch.errors import ConfigError


def preset(example: str, trainer: str, sizes: Sequence[str], default: str) -> str:
    """Name of the configuration `<example>/<trainer>_<size>`, of the size that CONFIG_NAME asks for.

    Raises:
        ConfigError: there is no such size.
    """
    size = os.environ.get("CONFIG_NAME") or default
    if size not in sizes:
        raise ConfigError(f"CONFIG_NAME={size} is no preset: choose among {', '.join(sizes)}")
    return f"{example}/{trainer}_{size}"
