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
from conch.converters.checkpoints.heads import Head, LinearLayer
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.errors import ConversionError, install_extra
from conch.log import progress
from conch.machine.imports import left_out
from conch.store.manifest import Manifest, ScoringRules

_MODELS = Path(triton_models.__file__).parent
RUNNER = tuple(_MODELS / name for name in ("reward_model.py", "network.py", "encoding.py"))
HEAD_FILE = "head.safetensors"

# Layers that give scores; they stay in float32.
_HEADS = ("score", "classifier")

# Bounds what is in memory while the precision of a file is changed.
_SHARD_SIZE = "500MB"


def layout_of(checkpoint: RewardCheckpoint) -> Literal["classifier", "trunk", "custom"]:
    """Return which part of the checkpoint is served, see `Manifest.layout`."""
    rules = checkpoint.rules
    if checkpoint.output is not None:
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
        save_file(_head_tensors(checkpoint.head, checkpoint.rules), folder / HEAD_FILE)
    elif checkpoint.rules.folded:
        layer = final_layer(model) if manifest.layout == "classifier" else None
        if layer is None:
            raise ConversionError(
                f"mean and std cannot be folded into {type(model).__name__}, whose own code makes its "
                "scores: use --normalise parameters"
            )
        layer.weight.data, layer.bias.data = _layer_tensors(
            LinearLayer(layer.weight, layer.bias), checkpoint.rules, is_last=True
        )
    with left_out("deepspeed"):  # transformers 5 would load it, seconds long, to see whether the model is its
        model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    if manifest.layout == "custom":
        _check_code(folder, type(model).__name__)
    _cast_files(folder, torch.float32 if manifest.dtype == "int8" else getattr(torch, manifest.dtype))
    if manifest.dtype == "int8":
        quantise(folder, type(model), trust_remote_code=manifest.trust_remote_code)


def _head_tensors(head: Head, rules: ScoringRules) -> dict[str, Tensor]:
    """Return the head's layers in float32, by number and name."""
    tensors = {}
    for number, layer in enumerate(head.layers):
        is_last = number == len(head.layers) - 1
        tensors[f"{number}.weight"], tensors[f"{number}.bias"] = _layer_tensors(layer, rules, is_last=is_last)
    return tensors


def _layer_tensors(layer: LinearLayer, rules: ScoringRules, *, is_last: bool) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float32; the last layer's give (raw - mean) / std where the rules fold these.

    Raises:
        ConversionError: a function stands between the layer and what would be normalised.
    """
    weight = layer.weight.detach().float().cpu().clone()
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu().clone()
    if rules.folded and is_last:
        if rules.function_to_apply != "none":
            raise ConversionError(
                f"mean and std cannot be folded into the head's weights, {rules.function_to_apply} is "
                "applied to its outputs: use --normalise parameters"
            )
        assert rules.mean is not None and rules.std is not None
        columns = list(range(len(weight)) if rules.columns is None else rules.columns)
        mean, std = torch.tensor(rules.mean), torch.tensor(rules.std)
        weight[columns] = weight[columns] / std.unsqueeze(1)
        bias[columns] = (bias[columns] - mean) / std
    return weight, bias


def _check_code(folder: Path, name: str) -> None:
    """Raise ConversionError unless the code that the written configuration names is there."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = {place.split("--")[-1].split(".")[0] for place in config.get("auto_map", {}).values()}
    absent = [f"{module}.py" for module in sorted(named) if not (folder / f"{module}.py").is_file()]
    if absent or not named:
        raise ConversionError(
            f"{name}: its code does not come along when it is saved ({', '.join(absent) or 'no auto_map'}): "
            "register the class with register_for_auto_class, and save the checkpoint again"
        )


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
            f"dtype int8 needs torchao, here and in the server's Python: {install_extra('int8')}"
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
    with left_out("deepspeed"):
        model.save_pretrained(folder)
