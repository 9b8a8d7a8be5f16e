"""Headers whose values are secrets: they stand in environment variables, and in no message or log."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from conch.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def secret_headers(headers_env: Mapping[str, str]) -> dict[str, str]:
    """Lower-case header -> value, from header -> environment variable.

    Raises:
        ConfigError: a header has no proper name, or a variable is not set or holds what no header can carry.
    """
    return {_name(header): _value(header, variable) for header, variable in headers_env.items()}


def _name(header: str) -> str:
    name = header.lower()
    if not _NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
        raise ConfigError(
            f"reward.headers_env: `{header}` cannot be a header of ours; take letters, digits and dashes, "
            "without `grpc-` before or `-bin` behind"
        )
    return name


def _value(header: str, variable: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"reward.headers_env: environment variable {variable}, which is to hold header `{header}`, is "
            "not set or empty"
        )
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"reward.headers_env: what environment variable {variable} holds cannot stand in a header: only "
            "printable ASCII can"
        )
    return value
