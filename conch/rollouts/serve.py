"""A vLLM server that trainers sample from.

    conch rollout-server model=outputs/sft/checkpoints/best port=8100

It builds the model from `model`'s configuration and tokenizer, without weights: those of the policy come from
the trainer (`rollout.urls=host:8100`), before each phase of sampling. Its log says when it is ready.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Literal

import yaml
from pydantic import Field, model_validator

from conch.cli import describe, run_main
from conch.config import RolloutConfig, Section, load
from conch.errors import ConfigError
from conch.rollouts.protocol import HIGHEST_RANK, LoraRoom
from conch.rollouts.vllm.restart import KEEPER, keep


class ServeConfig(Section):
    """A vLLM server that trainers sample from."""

    model: str
    """Folder or hub name of a model of the policy's shape, with its tokenizer."""

    port: int = Field(default=8100, ge=1, le=65535)
    """To listen on."""

    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it may sample and change the weights: let a firewall choose."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` takes the one that the model is stored in."""

    window: int | None = Field(default=None, ge=2)
    """Longest prompt and completion together, in tokens; None takes the model's."""

    memory_share: float = Field(default=0.9, gt=0, lt=1)
    """Part of a GPU's memory that may be taken."""

    kv_cache_gb: float | None = Field(default=None, gt=0)
    """GiB for keys and values, instead of what `memory_share` leaves; None takes 1 on a CPU."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Completions sampled at once."""

    eager: bool | None = None
    """True neither compiles nor records graphs; None is eager on a CPU alone."""

    lora_rank: int = Field(default=0, ge=0, le=HIGHEST_RANK)
    """Highest rank of an adapter that a trainer may hand over by itself, after its base; it sends all weights
    with the adapter merged in where its own is higher. 0 takes merged ones alone, and samples faster."""

    lora_modules: tuple[str, ...] = ()
    """Last parts of the names of the layers that adapters may be on, `[q_proj, v_proj]`; the fewer, the
    faster it samples. None named takes them on all."""

    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share the weights."""

    deadline_s: float = Field(default=600.0, gt=0)
    """Longest that a trainer may take to send its weights, in seconds."""

    restart: bool = True
    """Start the server again when it is killed or its vLLM has died; the trainer then gives it its weights
    before it samples. False leaves that to systemd, Slurm or Kubernetes."""

    @model_validator(mode="after")
    def _modules_have_a_rank(self) -> ServeConfig:
        if self.lora_modules and not self.lora_rank:
            raise ValueError(
                "`lora_modules` says where adapters may be: give their `lora_rank`, or leave it out"
            )
        return self

    def room(self) -> LoraRoom | None:
        """For adapters."""
        return LoraRoom(rank=self.lora_rank, modules=self.lora_modules) if self.lora_rank else None

    def engine(self) -> RolloutConfig:
        """The same as a trainer's settings have it, for what both engines share."""
        shared = {"window", "memory_share", "kv_cache_gb", "max_num_seqs", "eager"}
        return RolloutConfig(engine="vllm", sleep_level=0, **self.model_dump(include=shared))


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value ...`, or `--help` for the keys."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nkeys:\n{describe(ServeConfig)}")
        return
    pairs = [text.partition("=") for text in argv]
    for key, sign, _ in pairs:
        if not sign:
            raise ConfigError(f"`{key}` is no setting: write key=value; --help lists the keys")
    config = load(ServeConfig, {key: yaml.safe_load(value) for key, _, value in pairs})
    if config.restart and KEEPER not in os.environ:
        raise SystemExit(keep([sys.executable, "-m", "conch.rollouts.serve", *argv]))
    from conch.rollouts.vllm.server import serve

    serve(config)


if __name__ == "__main__":
    run_main(main)
