"""A service that trains a model for clients who ask for completions and send back rewards, over HTTP.

    export CONCH_SERVICE_KEY=$(openssl rand -hex 32)
    python -m conch.service --output_dir /data/runs

    python -m conch.service --api_key KEY --output_dir /data/runs      the key stands in the process table

`key=value` may be written `--key value`. docs/remote_training.md shows the other side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from conch.cli import run_main
from conch.errors import ConfigError
from conch.servers.command import pairs_of, run_server
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import ServiceConfig

_PACKAGES = ("fastapi", "uvicorn")
_KEY = "api_key"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `key=value ...` or `--key value ...`, or `--help` for the keys."""
    words = taking_key(pairs_of(sys.argv[1:] if argv is None else argv))
    run_server(ServiceConfig, _serve, module="conch.service", about=__doc__, argv=words)


def taking_key(pairs: Sequence[str]) -> list[str]:
    """Put `api_key=KEY` into the environment, where the key is looked for; returns the other settings."""
    rest: list[str] = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key == _KEY:
            os.environ[KEY_VARIABLE] = value
        else:
            rest.append(pair)
    return rest


def _serve(config: ServiceConfig) -> None:
    try:
        from conch.service.server import serve  # what listens, which `--help` can do without
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ConfigError(
            f"the training service needs the package {error.name}: pip install 'conch[service]'"
        ) from None
    serve(config)


if __name__ == "__main__":
    run_main(main)
