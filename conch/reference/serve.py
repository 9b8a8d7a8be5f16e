"""A server that holds the starting policy for trainers: the reference of PPO and GRPO, on devices of its own.

    conch reference-server model=outputs/sft/checkpoints/best port=8200

It answers the log-probs of response tokens (`reference.urls=host:8200` in the trainer), so that trainers keep
no copy of the policy. The log says when the server is ready.
"""

from __future__ import annotations

from collections.abc import Sequence

from conch.cli import run_main
from conch.reference.server_config import ReferenceServerConfig
from conch.servers.command import run_server


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value ...`, or `--help` for the keys."""
    run_server(ReferenceServerConfig, _serve, module="conch.reference.serve", about=__doc__, argv=argv)


def _serve(config: ReferenceServerConfig) -> None:
    from conch.reference.server import serve  # torch, which `--help` and the parent process can do without

    serve(config)


if __name__ == "__main__":
    run_main(main)
