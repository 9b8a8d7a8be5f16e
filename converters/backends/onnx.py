"""Export a model over padded token ids to `model.onnx`, any number of rows and any length."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from conch.converters.backends.padded_graph import Graph, example_rows
from conch.errors import ConversionError, first_line, install_extra

ONNX_FILE = "model.onnx"

_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_MOST_ROWS = 2**16


def check_onnx_installed() -> None:
    """Raise ConversionError unless the libraries of the extra `onnx` are installed."""
    absent = [name for name in _LIBRARIES if find_spec(name) is None]
    if absent:
        raise ConversionError(
            f"--backend onnx needs {', '.join(absent)}; install the extra: {install_extra('onnx')}"
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
        with _quiet_exporter(), torch.no_grad():
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
            f"{type(model).__name__} cannot be exported to ONNX ({_cause(error)}); use --backend python"
        ) from error


def _cause(error: Exception) -> str:
    """Return the first line of the innermost cause; the outer messages are about the exporter."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter, which prints and logs its progress and warns of its own libraries' futures."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(null):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
