"""The policy's weights, as an engine that loads Hugging Face checkpoints wants them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_ADAPTER = "default"


@torch.no_grad()
def checkpoint_tensors(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Names and weights as in the model's checkpoint: tied ones once, an adapter merged in.

    Nothing is copied but what an adapter changes, or what a checkpoint stores in another shape.
    """
    return revert_weight_conversion(lm, dict(_distinct(lm)))


def _distinct(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the first of its names, which is that of the embeddings where the head is tied."""
    unsaved = {f"{prefix}.{name}".lstrip(".") for prefix, name in _unsaved_buffers(lm)}
    seen: set[int] = set()
    for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
        plain = _plain_name(name)
        if plain is None or name in unsaved or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield plain, _with_adapter(lm, name, tensor.detach())


def _unsaved_buffers(lm: nn.Module) -> Iterator[tuple[str, str]]:
    for prefix, module in lm.named_modules():
        yield from ((prefix, name) for name in module._non_persistent_buffers_set)


def _plain_name(name: str) -> str | None:
    """The name that a tensor has without peft's layers around it; None for what is peft's own."""
    if any(part.startswith("lora_") for part in name.split(".")) or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{_ADAPTER}.", ".")


def _with_adapter(lm: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor` plus what the adapter adds to it."""
    owner, _, kind = name.rpartition(".")
    if kind != "weight" or not owner.endswith(".base_layer"):
        return tensor
    layer = lm.get_submodule(owner.removesuffix(".base_layer"))
    assert isinstance(layer, BaseTunerLayer)
    return tensor + layer.get_delta_weight(_ADAPTER).to(tensor.dtype)  # pyright: ignore[reportCallIssue]
