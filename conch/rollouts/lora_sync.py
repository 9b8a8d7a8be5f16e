"""A policy's LoRA adapter handed over by itself, on a base that whoever samples was given once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.log import get_logger
from conch.models.adapter import ADAPTER_NAME, has_adapter
from conch.rollouts.weight_sync import checkpoint_names, checkpoint_tensors
from conch.rollouts.wire import HIGHEST_RANK, LoraRoom, Part

_log = get_logger(__name__)

_BY_CHOICE = "`rollout.merge_adapter` is true, or left out in a process on a CPU"


class Handover:
    """What a policy hands over: all of its weights, or its adapter on a base that is there already.

    lm: asked for whenever it is used; the first time here, where its adapter must be on. merge: True never
        gives an adapter by itself.
    """

    def __init__(self, lm: Callable[[], PreTrainedModel], *, merge: bool = False) -> None:
        self._lm = lm
        self._never = _BY_CHOICE if merge else why_never_alone(lm())
        self._reasons: dict[LoraRoom | None, str | None] = {}
        self._lock = threading.Lock()

    def room_wanted(self) -> LoraRoom | None:
        """For an adapter that could go alone; None where the policy has none."""
        if self._never is not None:
            return None
        lm = self._lm()
        modules = {name.rpartition(".")[2] for name, _ in _lora_layers(lm)}
        return LoraRoom(rank=_rank(lm), modules=tuple(sorted(modules)))

    def adapter_alone(self, room: LoraRoom | None) -> bool:
        """True where the adapter goes alone into this room of vLLM's. Where it does not, the log says once
        why. The answer stays what it was first."""
        with self._lock:  # servers are given their weights in threads
            if room not in self._reasons:
                lm = self._lm()
                reason = self._reasons[room] = self._never or why_no_room(lm, room)
                if reason is not None and has_adapter(lm):
                    _log.info("vLLM gets the policy's weights whole, with the adapter merged in: %s", reason)
            return self._reasons[room] is None

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Names and weights, as `vllm_worker` takes them. They must be whole."""
        lm = self._lm()
        return adapter_tensors(lm) if part == "adapter" else checkpoint_tensors(lm, merged=part == "whole")


@torch.no_grad()
def adapter_tensors(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Both factors of each layer, as peft names them. What scales their product is in the second already, so
    that nobody needs to know of alpha, of ranks by pattern or of rsLoRA."""
    found: dict[str, Tensor] = {}
    for name, layer in _lora_layers(lm):
        assert isinstance(layer, LoraLinear)
        first, second = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        found[f"{name}.lora_A.weight"] = first.detach()
        found[f"{name}.lora_B.weight"] = second.detach() * layer.scaling[ADAPTER_NAME]
    return found


def adapter_rank(tensors: Mapping[str, Tensor]) -> int:
    """The highest rank among `adapter_tensors`."""
    return max(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))


def why_never_alone(lm: PreTrainedModel) -> str | None:
    """Why the adapter can go alone into no vLLM, in words that end a sentence; None where it can. Reads no
    weight. Of what is more than B A x beside a plain linear layer, vLLM would know nothing."""
    if not has_adapter(lm):
        return "it has none"
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name} is trained beside it"
    for name, layer in _lora_layers(lm):
        reason = _why_special_layer(layer)
        if reason is not None:
            return f"{name} {reason}"
    if _rank(lm) > HIGHEST_RANK:
        return f"its rank of {_rank(lm)} is above {HIGHEST_RANK}, the highest that vLLM makes room for"
    stored = checkpoint_names(lm)
    for name, _ in _lora_layers(lm):
        if f"{name}.weight" not in stored:
            return f"checkpoints have another name for {name}"
    return None


def _why_special_layer(layer: BaseTunerLayer) -> str | None:
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or type(base) is not nn.Linear:
        return f"is a {type(base).__name__}, no plain linear layer"
    if ADAPTER_NAME in layer.lora_variant:
        return f"adds more than a product ({type(layer.lora_variant[ADAPTER_NAME]).__name__})"
    if layer.lora_bias[ADAPTER_NAME]:
        return "has a bias in its adapter"
    if layer.merged or layer.disable_adapters or layer.active_adapters != [ADAPTER_NAME]:
        return "has its adapter merged, switched off, or others beside it"
    return None


def why_no_room(lm: PreTrainedModel, room: LoraRoom | None) -> str | None:
    """Why the adapter does not go into this room of vLLM's; None where it does."""
    if room is None:
        return f"vLLM has no LoRA for a {type(lm).__name__}, or its server was started with `lora_rank` = 0"
    if _rank(lm) > room.rank:
        return f"its rank of {_rank(lm)} is above the server's `lora_rank` of {room.rank}"
    for name, _ in _lora_layers(lm):
        if name.rpartition(".")[2] not in room.modules:
            return f"vLLM has no LoRA for {name} of a {type(lm).__name__}"
    return None


def _rank(lm: nn.Module) -> int:
    return max(layer.r[ADAPTER_NAME] for _, layer in _lora_layers(lm) if isinstance(layer, LoraLinear))


def _lora_layers(lm: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in lm.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
