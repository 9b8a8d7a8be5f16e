"""A vLLM server that trainers sample from.

    conch rollout-server model=outputs/sft/checkpoints/best port=8100

It builds the model from the configuration and tokenizer of `model`, without weights: the trainer
(`rollout.urls=host:8100`) sends those of the policy before each phase of sampling. The log says when the
server is ready.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import yaml

from conch.cli import describe, run_main
from conch.config import load
from conch.errors import ConfigError
from conch.rollouts.server_config import ServerConfig
from conch.servers.restart import PARENT_PID_VARIABLE, run_and_restart


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value ...`, or `--help` for the keys."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nkeys:\n{describe(ServerConfig)}")
        return
    pairs = [text.partition("=") for text in argv]
    for key, sign, _ in pairs:
        if not sign:
            raise ConfigError(f"`{key}` is no setting: write key=value; --help lists the keys")
    config = load(ServerConfig, {key: yaml.safe_load(value) for key, _, value in pairs})
    if config.restart and PARENT_PID_VARIABLE not in os.environ:
        raise SystemExit(run_and_restart([sys.executable, "-m", "conch.rollouts.serve", *argv]))
    from conch.rollouts.vllm.server import serve

    serve(config)


if __name__ == "__main__":
    run_main(main)
