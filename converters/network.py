"""The networks inside checkpoints: loaded in the precision they are stored in, and found complete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from conch.converters.source import HARMLESS, Source, some
from conch.errors import ConversionError
from conch.serving.manifest import Pooling


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


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
