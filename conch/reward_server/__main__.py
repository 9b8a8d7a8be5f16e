"""A server that gives rewards to other trainers over HTTP, in the forms that their clients send.

    conch reward-server reward=host:8001/model

    conch reward-server --reward verifier:gsm8k --port 8300

OpenRLHF asks http://HOST:8300/get_reward, slime http://HOST:8300/slime, verl HOST:8300; docs/reward_server.md
has a recipe for each. `key=value` may be written `--key value`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conch.cli import run_main
from conch.errors import ConfigError, install_extra
from conch.reward_server.server_config import RewardServerConfig
from conch.servers.command import pairs_of, run_server

_PACKAGES = ("fastapi", "httptools", "prometheus_client", "uvicorn", "uvloop")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `key=value ...` or `--key value ...`, or `--help` for the keys."""
    words = pairs_of(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "conch.reward_server", *words]
    run_server(
        RewardServerConfig,
        lambda config: _serve(config, command),
        module="conch.reward_server",
        about=__doc__,
        argv=words,
    )


def _serve(config: RewardServerConfig, command: Sequence[str]) -> None:
    try:
        from conch.reward_server.server import serve  # what listens, which `--help` can do without
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ConfigError(
            f"the reward server needs the package {error.name}: {install_extra('reward-server')}"
        ) from None
    serve(config, command)


if __name__ == "__main__":
    run_main(main)
