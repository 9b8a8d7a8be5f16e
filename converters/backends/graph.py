"""The version folders of the back ends onnx and torchscript: graph, tokenizer, and the runner `model.py`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from conch.converters import triton_models
from conch.converters.backends import python as python_form
from conch.converters.backends.onnx import check_onnx_installed, export_onnx
from conch.converters.backends.torchscript import export_torchscript
from conch.converters.checkpoints.reader import Checkpoint
from conch.converters.options import ConversionOptions
from conch.converters.triton_models.reward_model import load_model
from conch.errors import ConversionError
from conch.store.manifest import MANIFEST, Manifest

GRAPH_PY = Path(triton_models.__file__).parent / "graph_model.py"


def check_options(options: ConversionOptions) -> None:
    """Raise ConversionError for what no graph can be, before long work."""
    if options.form == "text" and options.backend == "torchscript":
        raise ConversionError(
            "--backend torchscript serves token ids: add --form token, or take --backend onnx or python"
        )
    if options.reading.template == "chat":
        raise ConversionError(f"--backend {options.backend} has no chat template: take --backend python")
    if options.dtype not in ("float32", "float16"):
        raise ConversionError(
            f"--backend {options.backend} takes --dtype float32 or float16, not {options.dtype}; "
            "use --backend python for it"
        )
    if options.reading.granularity != "sample":
        raise ConversionError(
            f"--backend {options.backend} gives one score a sample: --granularity "
            f"{options.reading.granularity} needs --backend python"
        )
    if options.reading.trust_remote_code:
        raise ConversionError(f"--backend {options.backend} holds no Python: it takes no --trust_remote_code")
    traced_for = "gpu" if options.reading.device.startswith("cuda") else "cpu"
    if options.backend == "torchscript" and options.instance_kind != traced_for:
        raise ConversionError(
            f"TorchScript runs where it was traced, which is --device {options.reading.device}: "
            f"add --instance_kind {traced_for}, or trace on the other device"
        )
    if options.backend == "onnx":
        check_onnx_installed()


def write_onnx(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Write `model.onnx` with its weights in `model.onnx.data`, and what the runner needs.

    Raises:
        ConversionError: the architecture cannot be exported, or the folder cannot be written.
    """
    _write(folder, checkpoint, manifest, export_onnx)


def write_torchscript(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Write `model.pt`, and what the runner needs.

    Raises:
        ConversionError: the architecture cannot be traced, or the folder cannot be written.
    """
    _write(folder, checkpoint, manifest, export_torchscript)


def _write(folder: Path, checkpoint: Checkpoint, manifest: Manifest, export: Callable[..., None]) -> None:
    try:
        # By way of the python form, so that pooling, columns, precision and normalising are the same code.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            python_form.write_version(Path(scratch), checkpoint, manifest)
            model = load_model(Path(scratch), manifest.model_dump())
            export(
                model.to(checkpoint.model.device) if manifest.backend == "torchscript" else model,
                folder,
                vocab_size=manifest.vocab_size,
                max_length=manifest.max_length,
                pad_token_id=manifest.pad_token_id,
            )
        shutil.copyfile(GRAPH_PY, folder / "model.py")
        checkpoint.tokenizer.save_pretrained(folder)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"could not write the model below {folder.parents[1]}: {error}") from error
