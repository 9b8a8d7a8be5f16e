"""Trace a model over padded token ids into `model.pt`, for servers that take nothing newer."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from conch.converters.backends.padded_graph import Graph, example_rows
from conch.errors import ConversionError, first_line
from conch.log import get_logger

TORCHSCRIPT_FILE = "model.pt"

_log = get_logger(__name__)


def export_torchscript(
    model: nn.Module, folder: Path, *, vocab_size: int, max_length: int, pad_token_id: int
) -> None:
    """Write `model.pt`. The device is traced in: it runs where the model is now.

    model: as `Graph` takes it, in evaluation mode.

    Raises:
        ConversionError: torch cannot trace the architecture; says why and what to do instead.
    """
    _log.warning(
        "TorchScript is deprecated: torch may drop it, and Triton's pytorch back end moves to other formats; "
        "prefer --backend onnx, or --backend python"
    )
    graph = Graph(model, pad_token_id).eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = tuple(rows.to(device) for rows in example_rows(vocab_size, max_length, pad_token_id))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # said above, once
            traced = torch.jit.trace(graph, example, strict=False)
            assert isinstance(traced, torch.jit.ScriptModule)
            traced.save(str(folder / TORCHSCRIPT_FILE))
    except OSError as error:
        raise ConversionError(f"could not write {folder / TORCHSCRIPT_FILE}: {error}") from error
    except Exception as error:  # tracing raises many kinds
        raise ConversionError(
            f"{type(model).__name__} cannot be traced ({first_line(error)}); use --backend python"
        ) from error
