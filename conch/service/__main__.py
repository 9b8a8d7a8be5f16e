"""A service that trains a model for clients who ask for completions and send back rewards, over HTTP.

    export CONCH_SERVICE_KEY=$(openssl rand -hex 32)
    conch service --output_dir /data/runs

    conch service --api_key KEY --output_dir /data/runs                the key stands in the process table
    accelerate launch --config_file configs/accelerate/zero2-bf16.yaml --num_processes 8 \\
        -m conch service --output_dir /data/runs                       trains on eight GPUs
    conch service health           0 where the service that these settings start answers, for containers

`key=value` may be written `--key value`, or stand in the environment, as containers have it:
`CONCH_SERVICE_PORT=9000` is `port=9000`. The command line wins. docs/remote_service.md has more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from conch.cli import run_main
from conch.distributed.launcher import launched_processes
from conch.errors import ConfigError, install_extra
from conch.servers.command import HELP, pairs_of, run_server
from conch.servers.settings import load_settings, pairs_from_environment
from conch.service.health import ask_health
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import SETTINGS_PREFIX, ServiceConfig

_PACKAGES = ("fastapi", "uvicorn")
_KEY, _HEALTH = "api_key", "health"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `key=value ...` or `--key value ...`, or `--help` for the keys; `health` before them asks
    the service that they start."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    if given[:1] == [_HEALTH]:
        print(ask_health(load_settings(ServiceConfig, with_environment(taking_key(pairs_of(given[1:]))))))
        return
    words = with_environment(taking_key(pairs_of(given)))
    if launched_processes() > 1 and not {*HELP} & {*words}:
        words.append("restart=false")  # a launcher starts all ranks again, or none
    run_server(ServiceConfig, _serve, module="conch.service", about=__doc__, argv=words)


def with_environment(pairs: Sequence[str]) -> list[str]:
    """Settings of the environment, and behind them those of the command line, which win.

    Raises:
        ConfigError: a variable `CONCH_SERVICE_...` is no setting.
    """
    if {*HELP} & {*pairs}:  # the keys are shown whatever the environment says
        return [*pairs]
    return [
        *pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, os.environ, others=(KEY_VARIABLE,)),
        *pairs,
    ]


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
            f"the training service needs the package {error.name}: {install_extra('service')}"
        ) from None
    serve(config)


if __name__ == "__main__":
    run_main(main)
