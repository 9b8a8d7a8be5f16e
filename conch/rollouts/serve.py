"""A server that trainers sample from, with vLLM or with transformers.

    conch rollout-server model=outputs/sft/checkpoints/best port=8100

    conch rollout-server model=outputs/sft/checkpoints/best port=8100 engine=transformers

It builds the model from the configuration and tokenizer of `model`: the trainer (`rollout.urls=host:8100`)
sends the weights of the policy before each phase of sampling. The log says when the server is ready.
"""

from __future__ import annotations

from collections.abc import Sequence

from conch.cli import run_main
from conch.rollouts.server_config import ServerConfig
from conch.servers.command import run_server


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value ...`, or `--help` for the keys."""
    run_server(ServerConfig, _serve, module="conch.rollouts.serve", about=__doc__, argv=argv)


def _serve(config: ServerConfig) -> None:
    if config.engine == "transformers":
        from conch.rollouts.hf.server import serve
    else:
        from conch.rollouts.vllm.server import serve
    serve(config)


if __name__ == "__main__":
    run_main(main)
