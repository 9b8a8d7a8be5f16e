"""Export a model over padded token ids to `model.onnx`, any number of rows and any length.

The text form of an ONNX model: a tokenizer before the token-form model, joined by a Triton ensemble.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conch.converters import triton_models
from conch.converters.backends.padded_graph import Graph, example_rows
from conch.converters.checkpoints.reader import Checkpoint
from conch.converters.parity.subprocess_model import Request, ServedForm
from conch.errors import ConversionError, first_line
from conch.store.manifest import MANIFEST, Manifest

ONNX_FILE = "model.onnx"

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_MOST_ROWS = 2**16


def check_onnx_installed() -> None:
    """Raise ConversionError unless the libraries of the extra `onnx` are there."""
    absent = [name for name in _NEEDED if find_spec(name) is None]
    if absent:
        raise ConversionError(
            f"--backend onnx needs {', '.join(absent)}; install the extra: pip install 'conch[onnx]'"
        )


def export_onnx(
    model: nn.Module, folder: Path, *, vocab_size: int, max_length: int, pad_token_id: int
) -> None:
    """Write `model.onnx` and, beside it, its weights: `model.onnx.data`.

    model: as `Graph` takes it, in evaluation mode on the CPU.

    Raises:
        ConversionError: torch cannot export the architecture; says why and what to do instead.
    """
    graph = Graph(model, pad_token_id).eval()
    rows = torch.export.Dim("rows", min=1, max=_MOST_ROWS)
    shape = {0: rows} if max_length == 1 else {0: rows, 1: torch.export.Dim("length", min=1, max=max_length)}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                example_rows(vocab_size, max_length, pad_token_id),
                input_names=["input_ids", "attention_mask"],
                output_names=["rewards"],
                dynamic_shapes={"input_ids": shape, "attention_mask": shape},
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # None only where torch writes the file itself
            program.save(str(folder / ONNX_FILE), external_data=True)
    except OSError as error:
        raise ConversionError(f"could not write {folder / ONNX_FILE}: {error}") from error
    except Exception as error:  # the exporter raises many kinds
        raise ConversionError(
            f"{type(model).__name__} cannot be exported to ONNX ({_why(error)}); use --backend python"
        ) from error


def _why(error: Exception) -> str:
    """The innermost cause's first line; the outer messages are about the exporter."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and logs its progress, and warns of its own libraries' futures."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nowhere):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


TOKENIZER_PY = Path(triton_models.__file__).parent / "tokenizer_model.py"


def write_tokenizer(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Fill the version folder of the tokenizer.

    Raises:
        ConversionError: the template is a chat template, or the folder cannot be written.
    """
    if manifest.template == "chat":
        raise ConversionError("--backend onnx has no chat template: take --backend python")
    try:
        folder.mkdir()
        shutil.copyfile(TOKENIZER_PY, folder / "model.py")
        checkpoint.tokenizer.save_pretrained(folder)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"could not write the tokenizer below {folder.parent}: {error}") from error


def score_texts(
    tokenizer: Path, model: Path, requests: Sequence[Request], device: str
) -> list[dict[str, Any]]:
    """Send requests of texts through both written parts, each in a fresh process, as the ensemble does.

    Raises:
        ConversionError: a process failed.
    """
    with ServedForm(tokenizer) as process:
        encoded = process.score(list(requests), device)
    with ServedForm(model) as process:
        scored = iter(process.score([reply for reply in encoded if "error" not in reply], device))
    return [reply if "error" in reply else next(scored) for reply in encoded]
