"""The version folder of the python back end: weights in the served precision, tokenizer, `model.py`.

Weights in eight bits through torchao, in a form that transformers loads by itself.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conch.converters import triton_models
from conch.converters.checkpoints.architectures import Head, final_layer
from conch.converters.checkpoints.reader import Checkpoint
from conch.errors import ConversionError
from conch.log import progress
from conch.store.manifest import MANIFEST, Manifest

MODEL_PY = Path(triton_models.__file__).parent / "reward_model.py"
HEAD_FILE = "head.safetensors"

# Bounds what is in memory while the precision of a file is changed.
_SHARD_SIZE = "500MB"


def layout_of(checkpoint: Checkpoint) -> Literal["classifier", "trunk"]:
    """`classifier` where the checkpoint's own class gives the served scores, else `trunk`."""
    folds_into_head = checkpoint.normalise == "fold" and checkpoint.head is not None
    reads_tokens = checkpoint.pooling != "hf" or checkpoint.granularity != "sample"
    return "trunk" if reads_tokens or folds_into_head else "classifier"


def write_version(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Write all that the python back end needs. The checkpoint's model is not fit for use afterwards.

    The model is written as it is stored, mapped from disk, and then each file cast: at no time are there two
    copies of the weights in memory.

    Raises:
        ConversionError: the disk is full, or a weight does not fit into the served precision.
    """
    try:
        shutil.copyfile(MODEL_PY, folder / "model.py")
        _write_weights(folder, checkpoint, manifest)
        checkpoint.tokenizer.save_pretrained(folder)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"could not write the model below {folder.parents[1]}: {error}") from error


def _write_weights(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    model = checkpoint.model
    if manifest.layout == "trunk":
        assert checkpoint.head is not None
        model = checkpoint.trunk
        save_file(_folded(checkpoint, checkpoint.head), folder / HEAD_FILE)
    elif checkpoint.normalise == "fold":
        layer = final_layer(model)
        assert layer is not None  # or it would have been refused when it was read
        for name, tensor in _folded(checkpoint, Head(layer.weight, layer.bias)).items():
            getattr(layer, name).data = tensor
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    _cast_files(folder, torch.float32 if manifest.dtype == "int8" else getattr(torch, manifest.dtype))
    if manifest.dtype == "int8":
        quantise(folder, type(model), trust_remote_code=manifest.trust_remote_code)


def _folded(checkpoint: Checkpoint, head: Head) -> dict[str, Tensor]:
    """The head in float32, whose outputs are (raw - mean) / std where the checkpoint folds them in."""
    weight = head.weight.detach().float().cpu().clone()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu().clone()
    if checkpoint.normalise == "fold":
        assert checkpoint.mean is not None and checkpoint.std is not None
        columns = list(range(len(weight)) if checkpoint.columns is None else checkpoint.columns)
        mean, std = torch.tensor(checkpoint.mean), torch.tensor(checkpoint.std)
        weight[columns] = weight[columns] / std.unsqueeze(1)
        bias[columns] = (bias[columns] - mean) / std
    return {"weight": weight, "bias": bias}


def _cast_files(folder: Path, dtype: torch.dtype) -> None:
    for path in progress(sorted(folder.glob("model*.safetensors")), desc=f"casting to {dtype}"):
        tensors = load_file(path)
        if all(tensor.dtype == dtype for tensor in tensors.values() if tensor.is_floating_point()):
            continue
        cast = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        for name, tensor in cast.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ConversionError(f"weight {name} does not fit into {dtype}: choose bfloat16 or float32")
        fresh = path.with_suffix(".cast")
        save_file(cast, fresh, metadata={"format": "pt"})
        fresh.replace(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


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
