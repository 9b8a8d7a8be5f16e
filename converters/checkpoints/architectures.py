"""The kinds of reward-model checkpoints. Each reader makes one `Network`.

classifier         AutoModelForSequenceClassification of any family; the scores are its logits
process reward     AutoModelForTokenClassification: a score at the end of every step
value head         `v_head.weight` beside a trunk, without configuration, as trlX saves them
adapter            LoRA weights beside one of the first two, merged into it

Networks are loaded in the precision they are stored in, and refused unless complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from conch.converters.checkpoints.files import HARMLESS, Source, base_model_of, find_source, some, tensors_in
from conch.converters.checkpoints.heads import Head, LinearLayer
from conch.errors import ConversionError, ModelError, first_line
from conch.models.adapter import ADAPTER_FILE, merge_saved_adapter
from conch.store.manifest import Pooling

_VALUE_HEAD = "v_head."
_ADAPTER_PREFIX = "base_model.model."
_LAST_LAYERS = ("score", "classifier", "out_proj")


@dataclass(frozen=True, slots=True)
class Network:
    """The model inside a checkpoint.

    model: a classifier, or the trunk of a value head.
    head: makes scores of the trunk's last states; None where only the model's own class can.
    pooling: the rule that the checkpoint was trained with.
    labels: one name per output.
    base_model: the checkpoint that this one builds on; None where it stands alone.
    sha256: hash of all weights.
    """

    model: PreTrainedModel
    head: Head | None
    pooling: Pooling
    labels: tuple[str, ...]
    base_model: str | None = None
    sha256: str = ""


def read_network(source: Source, base_model: str | None, *, trust_remote_code: bool) -> Network:
    """Load the network of a checkpoint of any kind, on the CPU, in evaluation mode.

    base_model: what a value head or an adapter builds on; None takes what the checkpoint names.

    Raises:
        ConversionError: the checkpoint is of no kind, incomplete, not finite, or does not fit its base model.
    """
    if source.is_adapter:
        return _read_adapter(source, base_model, trust_remote_code)
    if any(name.startswith(_VALUE_HEAD) for name in source.tensor_names()):
        return _read_value_head(source, base_model)
    config = _config_of(source, trust_remote_code)
    is_process_reward = any(name.endswith("ForTokenClassification") for name in config.architectures or ())
    auto_class = AutoModelForTokenClassification if is_process_reward else AutoModelForSequenceClassification
    model, info = _from_pretrained(
        auto_class,
        source.folder,
        f"{source.name} cannot be loaded with {auto_class.__name__}.from_pretrained",
        config=config,
        dtype=source.stored_dtype(),
        trust_remote_code=trust_remote_code,
    )
    _refuse_tensors(source.name, info, expected=f"complete {auto_class.__name__}")
    _refuse_not_finite(source.name, model.state_dict())
    return _classifier(model.eval(), is_process_reward=is_process_reward, sha256=source.sha256())


def final_layer(model: PreTrainedModel) -> nn.Linear | None:
    """Return the layer of a classifier whose outputs are its scores, if the layer has a bias as well."""
    layers = [
        module
        for name, module in model.named_modules()
        if name in ("classifier", "classifier.out_proj") and isinstance(module, nn.Linear)
    ]
    fits = len(layers) == 1 and layers[0].bias is not None
    return layers[0] if fits and layers[0].out_features == model.config.num_labels else None


# ------------------------------------------------------------------------------------------------ classifiers


def _classifier(
    model: Any, *, is_process_reward: bool, sha256: str, base_model: str | None = None
) -> Network:
    head = _linear_head(model)
    if is_process_reward and head is None:
        raise ConversionError(
            f"{type(model).__name__}: its head is more than a linear layer, so steps cannot be scored by it"
        )
    pooling = "steps" if is_process_reward else "hf"
    labels = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    return Network(model, head, pooling, _output_names(labels), base_model, sha256)


def _linear_head(model: Any) -> Head | None:
    """Return the head of a classifier, if the head is one linear layer right on the trunk's states."""
    own = [child for name, child in model.named_children() if name != model.base_model_prefix]
    layers = [child for child in own if next(child.parameters(), None) is not None]
    pooler = getattr(model.base_model, "pooler", None)
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or pooler is not None:
        return None
    return Head((LinearLayer(layers[0].weight, layers[0].bias),))


def _output_names(labels: list[str]) -> tuple[str, ...]:
    """Return one name per output: the labels, or `reward` where there is one output."""
    return ("reward",) if len(labels) == 1 else tuple(labels)


# ------------------------------------------------------------------------------------------------ value heads


def _read_value_head(source: Source, base_model: str | None) -> Network:
    if base_model is None and not (source.folder / "config.json").is_file():
        raise ConversionError(
            f"{source.name} holds weights with a value head and no config.json: "
            "say with --base_model which model it was trained from"
        )
    base = find_source(base_model, weights=False) if base_model is not None else source
    config = _config_of(base)
    tensors = source.tensors()
    head = _value_head(source, tensors, config)
    trunk = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(_VALUE_HEAD) and not HARMLESS.search(name)
    }
    model = _trunk_from(source, trunk, config, base)
    _refuse_not_finite(source.name, {**model.state_dict(), "v_head.weight": head.layers[0].weight})
    labels = _output_names([f"reward_{index}" for index in range(head.outputs)])
    return Network(model.eval(), head, "first_eos", labels, base_model, source.sha256())


def _value_head(source: Source, tensors: dict[str, Tensor], config: Any) -> Head:
    unknown = [
        name
        for name in tensors
        if name.startswith(_VALUE_HEAD) and name not in ("v_head.weight", "v_head.bias")
    ]
    if unknown:
        raise ConversionError(
            f"{source.name}: its value head is more than one linear layer ({some(unknown)}), "
            "which only the code that trained it can run"
        )
    weight = tensors["v_head.weight"]
    width = config.get_text_config().hidden_size
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ConversionError(
            f"{source.name}: v_head.weight is {list(weight.shape)}, but the base model's states are {width} "
            "wide; give the --base_model that the checkpoint was trained from"
        )
    return Head((LinearLayer(weight, tensors.get("v_head.bias")),))


def _trunk_from(source: Source, tensors: dict[str, Tensor], config: Any, base: Source) -> Any:
    """Build the base model's trunk of the checkpoint's weights.

    tensors: their names begin with `transformer.`, with the base model's own prefix, or with neither.
    """
    model_class: Any = MODEL_MAPPING[type(config)]
    prefixes = ("transformer.", f"{model_class.base_model_prefix}.")
    renamed = {
        next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name): tensor
        for name, tensor in tensors.items()
    }
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    model, info = _from_pretrained(
        model_class,
        None,
        f"{source.name} does not load as the trunk of {base.name}",
        config=config,
        state_dict=renamed,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )
    remedy = f"; is {base.name} the --base_model that it was trained from?"
    _refuse_tensors(source.name, info, expected=f"complete trunk of {base.name}", remedy=remedy)
    return model


# --------------------------------------------------------------------------------------------------- adapters


def _read_adapter(source: Source, base_model: str | None, trust_remote_code: bool) -> Network:
    """Merge an adapter in float32; in half precision the sum of base and adapter would be rounded again."""
    base = find_source(base_model_of(source, base_model))
    settings = json.loads((source.folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if settings.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        raise ConversionError(
            f"{source.name} is an adapter for {settings.get('task_type')}, which gives no scores; "
            "an adapter of a reward model says SEQ_CLS or TOKEN_CLS"
        )
    is_process_reward = settings["task_type"] == "TOKEN_CLS"
    auto_class = AutoModelForTokenClassification if is_process_reward else AutoModelForSequenceClassification
    model = _base_with_head(auto_class, source, base, trust_remote_code)
    try:
        merged = merge_saved_adapter(model, str(source.folder))
    except ModelError as error:
        raise ConversionError(str(error)) from error
    _refuse_not_finite(source.name, merged.state_dict())
    return _classifier(
        merged.eval(),
        is_process_reward=is_process_reward,
        sha256=source.sha256() + base.sha256(),
        base_model=base.name,
    )


def _base_with_head(auto_class: Any, source: Source, base: Source, trust_remote_code: bool) -> Any:
    """Load the base as a classifier; where the base has no head, the adapter must bring one."""
    saved = {
        name.removeprefix(_ADAPTER_PREFIX): tensor
        for path in source.weights
        for name, tensor in tensors_in(path).items()
        if name.startswith(_ADAPTER_PREFIX) and "lora_" not in name
    }
    config = _config_of(base, trust_remote_code)
    outputs = {tensor.shape[0] for name, tensor in saved.items() if name.split(".")[-2] in _LAST_LAYERS}
    if len(outputs) == 1:
        config.num_labels = outputs.pop()
    model, info = _from_pretrained(
        auto_class,
        base.folder,
        f"{base.name}, the base model of {source.name}, cannot be loaded",
        config=config,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
    )
    without_saved = {
        "missing_keys": {name for name in info["missing_keys"] if name not in saved},
        "mismatched_keys": {entry for entry in info["mismatched_keys"] if entry[0] not in saved},
        "unexpected_keys": info["unexpected_keys"],
    }
    _refuse_tensors(f"{source.name} on {base.name}", without_saved, expected="complete classifier")
    return model


# ---------------------------------------------------------------------------------------------- all the kinds


def _config_of(source: Source, trust_remote_code: bool = False) -> Any:
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source.name} cannot be loaded, it has no configuration that transformers knows "
            f"({first_line(error)}); give a classifier's folder, or --base_model for a value head's weights"
        ) from error


def _from_pretrained(
    model_class: Any, folder: Path | None, failure: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model, and the report on its tensors that `_refuse_tensors` reads.

    failure: begins the message of the ConversionError that is raised where transformers fails.
    settings: further arguments of `from_pretrained`.
    """
    try:
        return model_class.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name, in `_refuse_tensors`
            **settings,
        )
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(f"{failure}: {first_line(error)}") from error


def _refuse_tensors(name: str, info: dict[str, Any], *, expected: str, remedy: str = "") -> None:
    """Raise ConversionError, naming the tensors, unless the weights are just those of the model.

    info: the report of `from_pretrained` with `output_loading_info`.
    expected: what the weights should be, for the message.
    """
    misshapen = sorted(
        f"{key} is {list(shape)} instead of {list(expected_shape)}"
        for key, shape, expected_shape in info["mismatched_keys"]
    )
    unknown = [key for key in info["unexpected_keys"] if not HARMLESS.search(key)]
    if misshapen:
        raise ConversionError(
            f"{name} is no {expected}: tensors of another shape: {some(misshapen)}"
            f"{remedy or '; config.json and weights are of different models'}"
        )
    if info["missing_keys"]:
        raise ConversionError(
            f"{name} is no {expected}: {some(info['missing_keys'])} missing, and would be random; "
            "train a reward model first, or give the checkpoint that has the head"
        )
    if unknown:
        raise ConversionError(
            f"{name} is no {expected}: it has tensors that the model does not know, {some(unknown)}; "
            f"scores without them would be another model's{remedy}"
        )


def _refuse_not_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise ConversionError, naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{name}: weight {key} holds NaN or infinity; the training diverged")
