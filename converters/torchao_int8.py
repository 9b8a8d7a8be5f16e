"""Weights in eight bits through torchao, in a form that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from conch.errors import ConversionError

_HEADS = ("score", "classifier")


def check_torchao() -> None:
    """Raise ConversionError unless torchao is installed."""
    try:
        import torchao  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConversionError(
            "dtype int8 needs torchao, here and in the server's Python: pip install 'conch[int8]'"
        ) from error


def quantise(folder: Path, model_class: Any, *, trust_remote_code: bool) -> None:
    """Replace the weights of linear layers in a written folder by int8, one scale for each output channel.

    Embeddings, norms and the head that gives scores stay in float32.

    Raises:
        ConversionError: the model has no linear layers that could be quantised.
    """
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    model = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(_HEADS)),
    )
    quantised = [
        m for m in model.modules() if isinstance(m, nn.Linear) and type(m.weight.data) is not torch.Tensor
    ]
    if not quantised:
        raise ConversionError(
            f"{model_class.__name__} has no nn.Linear layers (GPT-2 has layers of its own kind), "
            "so int8 would save nothing: choose bfloat16"
        )
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
