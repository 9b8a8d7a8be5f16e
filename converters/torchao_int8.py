"""Weights in eight bits through torchao, in a form that transformers loads by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conch.errors import ConversionError

_HEADS = ("score", "classifier")


def check_torchao() -> None:
    """Raise ConversionError unless torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConversionError(
            "dtype int8 needs torchao, here and in the server's Python: pip install 'conch[int8]'"
        )


def check_layers(model: Any) -> None:
    """Raise ConversionError unless there are layers to quantise in a classifier or trunk."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not [name for name in names if name.partition(".")[0] not in _HEADS]:
        raise ConversionError(
            f"{type(model).__name__} has no nn.Linear layers (GPT-2 has layers of its own kind), "
            "so int8 would save nothing: choose bfloat16"
        )


def quantise(folder: Path, model_class: Any, *, trust_remote_code: bool) -> None:
    """Replace the weights of linear layers in a written folder by int8, one scale for each output channel.

    Embeddings, norms and the head that gives scores stay in float32.
    """
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    model = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(_HEADS)),
    )
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
