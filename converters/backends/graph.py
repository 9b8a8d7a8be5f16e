"""The weights of the back ends onnx and torchscript: one graph over padded token ids."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from conch.converters import triton_models
from conch.converters.backends.onnx import export_onnx
from conch.converters.backends.python import write_weights
from conch.converters.backends.torchscript import export_torchscript
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.triton_models.reward_model import load_model
from conch.store.manifest import Manifest

GRAPH_PY = Path(triton_models.__file__).parent / "graph_model.py"


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


def _write(
    folder: Path, checkpoint: RewardCheckpoint, manifest: Manifest, export: Callable[..., None]
) -> None:
    # By way of the python form, so that pooling, columns, precision and normalising are the same code.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        write_weights(Path(scratch), checkpoint, manifest)
        model = load_model(Path(scratch), manifest.model_dump())
        export(
            model.to(checkpoint.model.device) if manifest.backend == "torchscript" else model,
            folder,
            vocab_size=manifest.vocab_size,
            max_length=manifest.max_length,
            pad_token_id=manifest.pad_token_id,
        )
