"""Save models so that they are whole or not there: written aside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.errors import CheckpointError

HEADS_FILE = "heads.safetensors"
"""Value heads and the like, beside the Hugging Face weights; `from_pretrained` does not look at it."""


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    heads: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a folder that `from_pretrained` and vLLM load; replaces an older one of that name at once.

    heads: tensors for `heads.safetensors`. extra: file name -> content of JSON files beside the weights.

    Raises:
        CheckpointError: no space, no permission, or another failure of the disk; nothing half-written stays,
            and an older checkpoint of that name is as it was.
    """
    check_space(folder.parent, model_bytes(model))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if heads:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.items()}
            save_file(on_cpu, partial / HEADS_FILE)
        for name, content in (extra or {}).items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        _replace(partial, folder)
    # safetensors reports a full disk as its own error type, which is no OSError
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint {folder} cannot be written: {error}") from error
    return folder


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes where they do not fit.

    Raises:
        CheckpointError: says how much there is, how much is needed, and where.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise CheckpointError(f"{existing} is a file, not a folder: choose another `train.output_dir`")
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{existing} is not writable: choose another `train.output_dir`")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"not enough disk space for a checkpoint in {folder}: {needed / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free; free some, or choose another `train.output_dir`"
        )


def model_bytes(model: nn.Module) -> int:
    """Size of the parameters, each counted once, with a tenth for the tokenizer and the rest."""
    parameters: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    return int(1.1 * sum(p.numel() * p.element_size() for p in parameters.values())) + 1_000_000


def _replace(new: Path, final: Path) -> None:
    """Put `new` in `final`'s place. A folder cannot be renamed over a full one: step aside first."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(new, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)
