"""The weights of the back ends onnx and torchscript: one graph over padded token ids."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from conch.converters import triton_models
from conch.converters.backends.onnx import export_onnx
from conch.converters.backends.padded_graph import StepScores
from conch.converters.backends.python import write_weights
from conch.converters.backends.torchscript import export_torchscript
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.triton_models.network import load_model
from conch.errors import ConversionError
from conch.store.manifest import Backend, Manifest

RUNNER = (Path(triton_models.__file__).parent / "graph_model.py",)


def write_onnx(folder: Path, checkpoint: RewardCheckpoint, manifest: Manifest) -> None:
    """Write `model.onnx` and its weights, `model.onnx.data`.

    Raises:
        ConversionError: the architecture cannot be exported.
        OSError: the disk is full.
    """
    _write(folder, checkpoint, manifest, export_onnx)


def write_torchscript(folder: Path, checkpoint: RewardCheckpoint, manifest: Manifest) -> None:
    """Write `model.pt`.

    Raises:
        ConversionError: the architecture cannot be traced.
        OSError: the disk is full.
    """
    _write(folder, checkpoint, manifest, export_torchscript)


def check_graph(checkpoint: RewardCheckpoint, backend: Backend) -> None:
    """Raise ConversionError for what no graph over token ids and a mask can hold."""
    reason = ""
    if checkpoint.output is not None:
        reason = f"holds no Python, and {checkpoint.source} is scored by code of its own"
    elif checkpoint.rules.steps_apart and backend == "torchscript":
        reason = "tokenises nothing, and steps are to be encoded apart"
    elif _overlaps(checkpoint.rules.separator_ids):
        reason = "finds no separator whose end is its beginning again"
    if reason:
        raise ConversionError(f"--backend {backend} {reason}: take --backend python")


def _overlaps(separator: tuple[int, ...]) -> bool:
    """Return whether a separator of several tokens can begin before an earlier one has ended."""
    return any(separator[:size] == separator[-size:] for size in range(1, len(separator)))


def _write(
    folder: Path, checkpoint: RewardCheckpoint, manifest: Manifest, export: Callable[..., None]
) -> None:
    check_graph(checkpoint, manifest.backend)
    # By way of the python form, so that pooling, columns, precision and normalising are the same code.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        write_weights(Path(scratch), checkpoint, manifest)
        model: nn.Module = load_model(Path(scratch), manifest.model_dump())
        if manifest.pooling == "steps":
            model = StepScores(model, checkpoint.tokenizer, manifest)
        export(
            model.to(checkpoint.model.device) if manifest.backend == "torchscript" else model,
            folder,
            vocab_size=manifest.vocab_size,
            max_length=manifest.max_length,
            pad_token_id=manifest.pad_token_id,
        )
