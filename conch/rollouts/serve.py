"""A vLLM server that trainers sample from.

    python -m conch.rollouts.serve model=outputs/sft/checkpoints/best port=8100

It builds the model from `model`'s configuration and tokenizer, without weights: those of the policy come from
the trainer (`rollout.urls=host:8100`), before each phase of sampling. Its log says when it is ready.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import yaml

from conch.cli import describe, run_main
from conch.config import load
from conch.errors import ConfigError
from conch.rollouts.vllm.restart import KEEPER, keep
from conch.rollouts.vllm.server_config import ServerConfig


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
    if config.restart and KEEPER not in os.environ:
        raise SystemExit(keep([sys.executable, "-m", "conch.rollouts.serve", *argv]))
    from conch.rollouts.vllm.server import serve

    serve(config)


if __name__ == "__main__":
    run_main(main)
