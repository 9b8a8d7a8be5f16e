"""Files of a run beside Conch's own: `checkpoints/checkpoint_<step>.pt` and `.hydra/`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from conch.atomic_files import replace_text, sync
from conch.cli.run_config import to_yaml
from conch.errors import CheckpointError
from conch.runs.checkpoint import CHECKPOINTS, STATE_FOLDER, read_checkpoint, steps_of
from examples.grpo.async_settings import AsyncExampleConfig
from examples.grpo.settings import ExampleConfig

_WRAPPER = "lm."
"""What stands before a name of the model's in the state of the module that trains it."""


def write_hydra_files(run_dir: Path, config: ExampleConfig, argv: Sequence[str], config_name: str) -> None:
    """Write `.hydra/{config,overrides,hydra}.yaml`: settings, words of the command line, where it ran."""
    folder, words = run_dir / ".hydra", overrides_in(argv)
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "name": "grpo-async" if isinstance(config, AsyncExampleConfig) else "grpo",
        "config_name": config_name,
        "chdir": False,
    }
    about = {
        "hydra": {
            "run": {"dir": str(run_dir)},
            "overrides": {"hydra": [], "task": words},
            "job": job,
            "runtime": {"cwd": str(Path.cwd()), "output_dir": str(run_dir)},
        }
    }
    replace_text(folder / "config.yaml", to_yaml(config))
    replace_text(folder / "overrides.yaml", yaml.safe_dump(words))
    replace_text(folder / "hydra.yaml", yaml.safe_dump(about, sort_keys=False))


def overrides_in(argv: Sequence[str]) -> list[str]:
    """The words of a command line that are `key=value` or `~key`."""
    with_value, words = ("--config-name", "--config-dir"), []
    for before, word in zip(["", *argv], argv, strict=False):
        if not word.startswith("-") and before not in with_value:
            words.append(word)
    return words


def write_torch_checkpoint(folder: Path) -> Path:
    """Write `checkpoint_<step>.pt` beside a whole checkpoint `step_<step>`, and delete those without one.

    It holds `model` and `optimizer` state, the gradient `scaler`'s (None unless fp16 was computed in), the
    `config` of the run, and `step`; `torch.load(..., weights_only=True)` reads it. Of DeepSpeed's sharded
    optimizer nothing is in it: `optimizer` is then None, and `step_<step>/state` has the shards.

    Returns its path.

    Raises:
        CheckpointError: the folder is damaged, or the file cannot be written.
    """
    checkpoint = read_checkpoint(folder)
    state = folder / STATE_FOLDER
    path = folder.parent / f"checkpoint_{checkpoint.step}.pt"
    content = {
        "step": checkpoint.step,
        "model": _model_state(folder),
        "optimizer": _loaded(state / "optimizer.bin"),
        "scaler": _loaded(state / "scaler.pt"),
        "config": checkpoint.state["config"],
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        torch.save(content, partial)
        sync(partial)
        os.replace(partial, path)
    # torch reports a full disk as a RuntimeError
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"the checkpoint {path} cannot be written: {error}") from error
    _prune(checkpoint.run_dir)
    return path


def complete_torch_checkpoints(run_dir: Path) -> None:
    """Write the files that a run which was killed has not come to write: call it before the run goes on.

    Raises:
        CheckpointError: see `write_torch_checkpoint`.
    """
    folder = run_dir / CHECKPOINTS
    for step in steps_of(run_dir):
        if not (folder / f"checkpoint_{step}.pt").exists():
            write_torch_checkpoint(folder / f"step_{step}")


def _model_state(folder: Path) -> dict[str, Any]:
    """The trained module's weights under the model's names; under DeepSpeed those that are saved for use."""
    whole = folder / STATE_FOLDER / "model.safetensors"
    if whole.is_file():
        return {name.removeprefix(_WRAPPER): tensor for name, tensor in load_file(whole).items()}
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _loaded(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


def _prune(run_dir: Path) -> None:
    kept = steps_of(run_dir)
    for path in (run_dir / CHECKPOINTS).glob("checkpoint_*.pt"):
        number = re.fullmatch(r"checkpoint_(\d+)\.pt", path.name)
        if number and int(number[1]) not in kept:
            path.unlink()
    for leftover in (run_dir / CHECKPOINTS).glob(".checkpoint_*.pt.partial"):
        leftover.unlink()
