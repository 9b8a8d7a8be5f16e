"""What accelerate and DeepSpeed take from the environment, from files and from a process's earlier trainers.

`accelerate launch` hands its configuration on in environment variables (ACCELERATE_*), a DeepSpeed JSON file
has keys of its own, and accelerate keeps one precision and one accumulation count for the whole process: all
of them win over a trainer's arguments without a word. Here a run's own settings are put in their place, and
what has no counterpart there is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from conch.config import TrainConfig
from conch.errors import ConfigError, DistributedError

_REFUSED_FLAGS = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
"""Variables that spread one row of a batch over several processes, where a trainer gives each its rows."""

_REFUSED_KEYS = {
    "optimizer": "the section `optimizer` of the run sets it",
    "scheduler": "the section `scheduler` of the run sets it",
    "amp": "`train.mixed_precision` sets the precision",
}


def check_environment() -> None:
    """Refuse what `accelerate launch` was told and no trainer can do, before accelerate is made.

    Raises:
        DistributedError: weights or rows would be spread in a way that a trainer does not know.
        ConfigError: a precision or a compiler that a trainer does not know.
    """
    for variable, what in _REFUSED_FLAGS.items():
        if os.environ.get(variable, "").lower() == "true":
            raise DistributedError(
                f"{variable}=true asks for {what}, which no trainer here knows: launch with one of the files "
                "in configs/accelerate"
            )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp8":
        raise ConfigError(
            "the launcher asks for mixed precision fp8 (ACCELERATE_MIXED_PRECISION): set `mixed_precision` "
            "to no, bf16 or fp16 in its configuration"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise ConfigError(
            f"the launcher asks for torch.compile (ACCELERATE_DYNAMO_BACKEND={backend}), which would compile "
            "anew for each length of a batch: leave `dynamo_config` out of its configuration"
        )


def wanted_precision(train: TrainConfig) -> str | None:
    """`train.mixed_precision`, else what the launcher was told; None leaves it to a DeepSpeed configuration.

    Asked for by name: else a trainer without a wish would get the precision of the process's first one.
    """
    if train.mixed_precision is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return train.mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def check_precision(accelerator: Accelerator, wanted: str | None) -> None:
    """Refuse a precision other than the one that was asked for, or that nothing computes in.

    Raises:
        ConfigError: says who decided instead, and what to do.
    """
    precision = accelerator.mixed_precision
    if wanted is not None and precision != wanted:
        is_deepspeed = accelerator.distributed_type is DistributedType.DEEPSPEED
        earlier = "an earlier trainer or Accelerator of this process"
        decided = "the DeepSpeed configuration" if is_deepspeed else earlier
        raise ConfigError(
            f"`train.mixed_precision` = {wanted}, but {decided} has set {precision}: make the two agree, or "
            "start this trainer in a process of its own"
        )
    is_plain = accelerator.distributed_type is not DistributedType.DEEPSPEED
    if precision == "fp16" and is_plain and accelerator.device.type == "cpu":
        raise ConfigError("`train.mixed_precision` = fp16 computes nothing in fp16 on a CPU: take bf16 or no")


def take_over_deepspeed(plugin: Any, train: TrainConfig, num_processes: int) -> None:
    """Put a run's settings into the configuration of DeepSpeed, whatever stands there.

    plugin: accelerate's `DeepSpeedPlugin`.

    Raises:
        ConfigError: the configuration brings an optimizer, a schedule or a precision of its own.
    """
    settings = plugin.deepspeed_config
    for key, remedy in _REFUSED_KEYS.items():
        if key in settings:
            raise ConfigError(f"the DeepSpeed configuration has a section `{key}`: remove it, {remedy}")
    steps = train.gradient_accumulation_steps
    settings["gradient_accumulation_steps"] = steps
    # accelerate reads this from a dataloader, which we have none of; only logging depends on it.
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["train_batch_size"] = steps * num_processes
    settings["gradient_clipping"] = train.max_grad_norm  # else accelerate says 1.0


def check_kind(kind: DistributedType) -> None:
    """Refuse what shards weights in a way that `TrainEngine.gathered_weights` cannot undo.

    Raises:
        DistributedError: says what to take instead.
    """
    # On CPUs accelerate passes over FSDP without a word, and the processes would train under DDP.
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        kind = DistributedType.FSDP
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise DistributedError(
            f"{kind.value} keeps no whole weights to sample from, to evaluate and to save: launch with "
            "configs/accelerate/zero3.yaml, or zero2-bf16.yaml where the weights fit a GPU"
        )


def check_operators_folder() -> None:
    """Refuse a folder in which DeepSpeed could not build its CPU operators: it would say so only after the
    models are loaded, and not what to do about it.

    Raises:
        ConfigError: names the folder and the variable that sets another.
    """
    setting = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    folder = Path(setting).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"DeepSpeed builds its CPU operators in {folder}, which this user cannot write: set "
            "TORCH_EXTENSIONS_DIR to a folder that is writable"
        )
