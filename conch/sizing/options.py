"""Options of `conch size`, which need no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from conch.cli import CommandParser, written_with
from conch.errors import ConfigError

Precision = Literal["float32", "bf16", "fp16"]
ReferenceKind = Literal["none", "full", "trunk", "adapter"]


@dataclass(frozen=True)
class Setup:
    """What memory depends on, beside the model.

    zero_stage: 0 is DDP.
    rows: of one forward and backward pass on one GPU.
    generation_rows: sampled at once on one GPU. Lengths in tokens.
    gpu_memory: GiB, None where it is not to be compared.
    reference: None takes that of PPO.
    """

    precision: Precision = "bf16"
    zero_stage: Literal[0, 2, 3] = 2
    gpus: int = 1
    rows: int = 8
    prompt_length: int = 512
    response_length: int = 128
    generation_rows: int = 32
    reference: ReferenceKind | None = None
    num_layers_unfrozen: int = -1
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    offload: bool = False
    gpu_memory: float | None = None

    @property
    def bytes_per_weight(self) -> int:
        """DDP keeps float32 weights and casts as it computes; DeepSpeed casts the module itself."""
        return 4 if self.precision == "float32" or self.zero_stage == 0 else 2

    @property
    def reference_kind(self) -> ReferenceKind:
        """The cheapest that is exact, as `conch.models.reference.build_reference` chooses."""
        if self.reference is not None:
            return self.reference
        if self.lora_rank is not None:
            return "adapter"
        return "full" if self.num_layers_unfrozen == -1 else "trunk"


def read_options(argv: Sequence[str]) -> tuple[str, Setup, bool]:
    """Return the model, what its memory depends on, and whether JSON is asked for.

    Raises:
        ConfigError: options that contradict each other.
    """
    options = vars(_parser().parse_args(written_with("-", argv)))
    model, as_json = options.pop("model"), options.pop("json")
    setup = Setup(**options)
    _check(setup)
    return model, setup, as_json


def _check(setup: Setup) -> None:
    if setup.offload and setup.zero_stage == 0:
        raise ConfigError("`--offload` is DeepSpeed's: take `--zero-stage` 2 or 3")
    if setup.reference == "trunk" and setup.num_layers_unfrozen == -1:
        raise ConfigError("`--reference trunk` shares frozen layers: give `--num-layers-unfrozen`")
    if setup.reference == "adapter" and setup.lora_rank is None:
        raise ConfigError("`--reference adapter` is the model without its adapter: give `--lora-rank`")
    if setup.lora_rank is not None and setup.num_layers_unfrozen != -1:
        raise ConfigError("give one of `--lora-rank` and `--num-layers-unfrozen`")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="conch size",
        description="Memory of a run, for each GPU.",
        epilog="Underscores will do for dashes.",
    )
    default = Setup()
    parser.add_argument("--model", required=True, help="folder, config.json, or name on the hub")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), default=default.precision)
    parser.add_argument("--zero-stage", type=int, choices=(0, 2, 3), default=2, help="0 is DDP (default: 2)")
    parser.add_argument(
        "--offload", action="store_true", help="optimizer, and with ZeRO-3 shards, on the host"
    )
    _add_counts(parser, default)
    parser.add_argument(
        "--reference",
        choices=("none", "full", "trunk", "adapter"),
        help="default: the one that PPO would take",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--gpu-memory", type=float, help="GiB of one GPU: says whether it fits, else what to change"
    )
    parser.add_argument("--json", action="store_true", help="bytes, as JSON")
    return parser


def _add_counts(parser: argparse.ArgumentParser, default: Setup) -> None:
    counts = {
        "gpus": "GPUs that train",
        "rows": "rows of one forward and backward pass on one GPU",
        "prompt_length": "tokens",
        "response_length": "tokens",
        "generation_rows": "completions sampled at once on one GPU (generation.chunk_size)",
    }
    for name, text in counts.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_positive, default=value, help=f"{text} (default: {value})"
        )
    parser.add_argument("--lora-rank", type=_positive, help="train an adapter of this rank")
    parser.add_argument(
        "--num-layers-unfrozen", type=_positive, default=-1, help="top blocks to train (default: all)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number
