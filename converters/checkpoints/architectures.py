"""The kinds of reward-model checkpoints. Each reader makes one `Network`.

classifier         AutoModelForSequenceClassification of any family; the scores are its logits
process reward     AutoModelForTokenClassification: a score at the end of every step
value head         `v_head.weight` beside a trunk, without configuration, as trlX saves them
adapter            LoRA weights beside one of the first two, merged into it

The networks inside checkpoints: loaded in the precision they are stored in, and found complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from conch.converters.checkpoints.files import HARMLESS, Source, find_source, some, tensors_in
from conch.errors import ConversionError, ModelError, first_line
from conch.models.adapter import ADAPTER_FILE, adapter_base, merge_saved_adapter
from conch.store.manifest import Pooling

_VALUE_HEAD = "v_head."
_ADAPTER_PREFIX = "base_model.model."


def read_network(source: Source, base_model: str | None, *, trust_remote_code: bool) -> Network:
    """The network of a checkpoint of any kind.

    Raises:
        ConversionError: it is of no kind, incomplete, or does not fit its base model.
    """
    if source.is_adapter:
        return _read_adapter(source, base_model, trust_remote_code)
    if any(name.startswith(_VALUE_HEAD) for name in source.tensor_names()):
        return _read_value_head(source, base_model)
    is_process_reward = _is_for_tokens(_config_of(source, trust_remote_code))
    auto_class = AutoModelForTokenClassification if is_process_reward else AutoModelForSequenceClassification
    model = load_network(auto_class, source, trust_remote_code=trust_remote_code)
    return _classifier(model, is_process_reward=is_process_reward, sha256=source.sha256())


def _classifier(
    model: Any, *, is_process_reward: bool, sha256: str, base_model: str | None = None
) -> Network:
    head = linear_head(model)
    if is_process_reward and head is None:
        raise ConversionError(
            f"{type(model).__name__}: its head is more than a linear layer, so steps cannot be scored by it"
        )
    pooling = "steps" if is_process_reward else "hf"
    return Network(model, head, pooling, labels_of(model.config), base_model, sha256)


def _is_for_tokens(config: Any) -> bool:
    return any(name.endswith("ForTokenClassification") for name in config.architectures or ())


def _config_of(source: Source, trust_remote_code: bool = False) -> Any:
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source.name} cannot be loaded, it has no configuration that transformers knows "
            f"({first_line(error)}); give a classifier's folder, or --base_model for a value head's weights"
        ) from error


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
    refuse_not_finite(source.name, {**model.state_dict(), "v_head.weight": head.weight})
    labels = tuple(f"reward_{index}" for index in range(len(head.weight)))
    labels = ("reward",) if len(labels) == 1 else labels
    return Network(model.eval(), head, "first_eos", labels, base_model, source.sha256())


def _value_head(source: Source, tensors: dict[str, torch.Tensor], config: Any) -> Head:
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
    return Head(weight, tensors.get("v_head.bias"))


def _trunk_from(source: Source, tensors: dict[str, torch.Tensor], config: Any, base: Source) -> Any:
    """The base model's trunk with the checkpoint's weights, which stand below `transformer.` or its own
    name."""
    model_class: Any = MODEL_MAPPING[type(config)]
    prefixes = ("transformer.", f"{model_class.base_model_prefix}.")
    renamed = {
        next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name): tensor
        for name, tensor in tensors.items()
    }
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=renamed,
            dtype=_one_dtype(tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source.name} does not load as the trunk of {base.name}: {first_line(error)}"
        ) from error
    remedy = f"; is {base.name} the --base_model that it was trained from?"
    refuse_tensors(source.name, info, what=f"complete trunk of {base.name}", remedy=remedy)
    return model


def _one_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


# --------------------------------------------------------------------------------------------------- adapters


def _read_adapter(source: Source, base_model: str | None, trust_remote_code: bool) -> Network:
    """Merged in float32: in half precision the sum of base and adapter would be rounded once more."""
    try:
        base = find_source(base_model or str(adapter_base(str(source.folder))))
    except ModelError as error:
        raise ConversionError(f"{error}, or give --base_model") from error
    for_tokens = _task(source) == "TOKEN_CLS"
    auto_class: Any = AutoModelForTokenClassification if for_tokens else AutoModelForSequenceClassification
    model = _base_with_head(auto_class, source, base, trust_remote_code)
    try:
        merged = merge_saved_adapter(model, str(source.folder))
    except ModelError as error:
        raise ConversionError(str(error)) from error
    refuse_not_finite(source.name, merged.state_dict())
    return _classifier(
        merged.eval(),
        is_process_reward=for_tokens,
        sha256=source.sha256() + base.sha256(),
        base_model=base.name,
    )


def _task(source: Source) -> str:
    settings = json.loads((source.folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if settings.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        raise ConversionError(
            f"{source.name} is an adapter for {settings.get('task_type')}, which gives no scores; "
            "an adapter of a reward model says SEQ_CLS or TOKEN_CLS"
        )
    return settings["task_type"]


def _base_with_head(auto_class: Any, source: Source, base: Source, trust_remote_code: bool) -> Any:
    """The base as a classifier whose head, where the base has none, is the adapter's."""
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
    try:
        model, info = auto_class.from_pretrained(
            base.folder,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{base.name}, the base model of {source.name}, cannot be loaded: {first_line(error)}"
        ) from error
    brought = {
        "missing_keys": {name for name in info["missing_keys"] if name not in saved},
        "mismatched_keys": {entry for entry in info["mismatched_keys"] if entry[0] not in saved},
        "unexpected_keys": info["unexpected_keys"],
    }
    refuse_tensors(f"{source.name} on {base.name}", brought, what="complete classifier")
    return model


_LAST_LAYERS = ("score", "classifier", "out_proj")


@dataclass(frozen=True, slots=True)
class Head:
    """The linear layer that makes scores of states: weight [outputs, width], bias [outputs] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Network:
    """What a checkpoint computes with.

    model: the transformers model that the checkpoint is of: a classifier, or a trunk.
    head: what turns the trunk's last states into scores; None where more than a linear layer does.
    pooling: the rule that it was trained with. labels: one name per output.
    base_model: what it builds on, where that is another checkpoint. sha256: of all its weights.
    """

    model: Any
    head: Head | None
    pooling: Pooling
    labels: tuple[str, ...]
    base_model: str | None = None
    sha256: str = ""

    @property
    def trunk(self) -> Any:
        """The model below the head."""
        return self.model.base_model


def load_network(
    auto_class: Any, source: Source, *, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> Any:
    """A model with all its weights, on the CPU, in evaluation mode.

    dtype: None keeps the stored one.

    Raises:
        ConversionError: it cannot be loaded, or a tensor is missing, unknown, misshapen or not finite.
    """
    what = auto_class.__name__
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        model, info = auto_class.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype or source.stored_dtype(),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except ConversionError:
        raise
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source.name} cannot be loaded with {what}.from_pretrained: {first_line(error)}"
        ) from error
    refuse_tensors(source.name, info, what=f"complete {what}")
    refuse_not_finite(source.name, model.state_dict())
    return model.eval()


def refuse_tensors(name: str, info: dict[str, Any], *, what: str, remedy: str = "") -> None:
    """Raise ConversionError, naming the tensors, unless the weights are just those of the model.

    info: what `from_pretrained` says with `output_loading_info`.
    """
    misshapen = sorted(
        f"{key} is {list(there)} instead of {list(wanted)}" for key, there, wanted in info["mismatched_keys"]
    )
    extra = [key for key in info["unexpected_keys"] if not HARMLESS.search(key)]
    if misshapen:
        raise ConversionError(
            f"{name} is no {what}: tensors of another shape: {some(misshapen)}"
            f"{remedy or '; config.json and weights are of different models'}"
        )
    if info["missing_keys"]:
        raise ConversionError(
            f"{name} is no {what}: {some(info['missing_keys'])} missing, and would be random; "
            "train a reward model first, or give the checkpoint that has the head"
        )
    if extra:
        raise ConversionError(
            f"{name} is no {what}: it has tensors that the model does not know, {some(extra)}; "
            f"scores without them would be another model's{remedy}"
        )


def refuse_not_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise ConversionError, naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{name}: weight {key} holds NaN or infinity; the training diverged")


def linear_head(model: Any) -> Head | None:
    """The head of a classifier, if it is one linear layer right on the trunk's states."""
    own = [child for name, child in model.named_children() if name != model.base_model_prefix]
    layers = [child for child in own if next(child.parameters(), None) is not None]
    pooler = getattr(model.base_model, "pooler", None)
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or pooler is not None:
        return None
    return Head(layers[0].weight, layers[0].bias)


def final_layer(model: Any) -> nn.Linear | None:
    """The layer of a classifier whose outputs are its scores, if it has a bias as well."""
    layers = [
        module
        for name, module in model.named_modules()
        if name in ("classifier", "classifier.out_proj") and isinstance(module, nn.Linear)
    ]
    fits = len(layers) == 1 and layers[0].bias is not None
    return layers[0] if fits and layers[0].out_features == model.config.num_labels else None


def labels_of(config: Any) -> tuple[str, ...]:
    """Names of a classifier's outputs: `reward` where there is one."""
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return ("reward",) if len(names) == 1 else names


def numbered(names: Iterable[str]) -> str:
    """Names with their numbers, for messages."""
    return ", ".join(f"{index} {name}" for index, name in enumerate(names))
