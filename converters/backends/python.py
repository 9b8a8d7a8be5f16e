"""The weights of the python back end, in the served precision.

Eight bits come through torchao, in a form that transformers loads by itself.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.converters import triton_models
from conch.converters.checkpoints.architectures import final_layer
from conch.converters.checkpoints.heads import LinearLayer
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.errors import ConversionError
from conch.log import progress
from conch.store.manifest import Manifest, ScoringRules

MODEL_PY = Path(triton_models.__file__).parent / "reward_model.py"
HEAD_FILE = "head.safetensors"

# Layers that give scores; they stay in float32.
_HEADS = ("score", "classifier")

# Bounds what is in memory while the precision of a file is changed.
_SHARD_SIZE = "500MB"


def layout_of(checkpoint: RewardCheckpoint) -> Literal["classifier", "trunk", "custom"]:
    """Return `classifier` or `custom` where the checkpoint's own class gives the served scores, else
    `trunk`."""
    rules = checkpoint.rules
    if checkpoint.kind is not None and checkpoint.kind.name == "custom":
        return "custom"
    reads_tokens = rules.pooling != "hf" or rules.granularity != "sample"
    return "trunk" if reads_tokens or (rules.folded and checkpoint.head is not None) else "classifier"


def write_weights(folder: Path, checkpoint: RewardCheckpoint, manifest: Manifest) -> None:
    """Write the model, and its head where that stands apart. Do not use the checkpoint's model afterwards.

    The model is written as it is stored, mapped from disk, and then each file cast: at no time are there two
    copies of the weights in memory.

    Raises:
        ConversionError: a weight does not fit into the served precision.
        OSError: the disk is full.
    """
    model = checkpoint.model
    if manifest.layout == "trunk":
        assert checkpoint.head is not None
        model = checkpoint.trunk
        save_file(_head_tensors(checkpoint.head.layers[0], checkpoint.rules), folder / HEAD_FILE)
    elif checkpoint.rules.folded:
        layer = final_layer(model)
        assert layer is not None  # or it would have been refused when it was read
        for name, tensor in _head_tensors(LinearLayer(layer.weight, layer.bias), checkpoint.rules).items():
            getattr(layer, name).data = tensor
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    _cast_files(folder, torch.float32 if manifest.dtype == "int8" else getattr(torch, manifest.dtype))
    if manifest.dtype == "int8":
        quantise(folder, type(model), trust_remote_code=manifest.trust_remote_code)


def _head_tensors(head: LinearLayer, rules: ScoringRules) -> dict[str, Tensor]:
    """Return the head in float32; its outputs are (raw - mean) / std where the rules fold these in."""
    weight = head.weight.detach().float().cpu().clone()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu().clone()
    if rules.folded:
        assert rules.mean is not None and rules.std is not None
        columns = list(range(len(weight)) if rules.columns is None else rules.columns)
        mean, std = torch.tensor(rules.mean), torch.tensor(rules.std)
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


def check_torchao() -> None:
    """Raise ConversionError unless torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConversionError(
            "dtype int8 needs torchao, here and in the server's Python: pip install 'conch[int8]'"
        )


def check_layers(model: PreTrainedModel) -> None:
    """Raise ConversionError unless the classifier or trunk has layers to quantise."""
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
