"""Put new weights into the model of a transformers sampler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.errors import RolloutError
from conch.models.adapter import distinct_tensors
from conch.rollouts.protocol import MAX_LORA_RANK, LoraCapacity, WeightUpdate
from conch.rollouts.weight_sync import received_tensors


class ModelWeights:
    """The weights of a model, which stays the same object whatever they are.

    An adapter that comes by itself is merged into the layers that it is on, of whose base weights a copy is
    kept from the first adapter on: the model samples as fast as without one.

    deadline_s: longest time for weights to arrive that are broadcast.
    """

    def __init__(self, lm: PreTrainedModel, deadline_s: float) -> None:
        self._lm = lm
        self._deadline_s = deadline_s
        self._adapted: dict[str, Tensor] = {}

    def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None) -> None:
        """Load an update on the way that it names.

        tensors: those of an update that is handed over.

        Raises:
            RolloutError: the weights are of another model.
            RolloutUnavailableError: they do not arrive.
        """
        if update.handed:
            assert tensors is not None
            self._put(update, {name: tuple(each.shape) for name, each in tensors.items()}, tensors.items())
        elif update.path is None:
            shapes = {spec.name: spec.shape for spec in update.tensors}
            self._put(update, shapes, received_tensors(update, 1, 2, self._deadline_s))
        else:
            with safe_open(update.path, framework="pt") as file:
                names = [*file.keys()]
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                self._put(update, shapes, ((name, file.get_tensor(name)) for name in names))

    @torch.no_grad()
    def _put(
        self,
        update: WeightUpdate,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterable[tuple[str, Tensor]],
    ) -> None:
        if update.part == "adapter":
            self._merge_adapter(dict(tensors))
            return
        self._adapted.clear()
        self._load_tensors(shapes, tensors)

    def _merge_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the adapter in the model by that of `conch.rollouts.weight_sync.adapter_tensors`.

        Raises:
            RolloutError: it is of another model.
        """
        modules, factors = dict(self._lm.named_modules()), dict[str, tuple[Tensor, Tensor]]()
        for key in tensors:
            name, _, factor = key.rpartition(".lora_")
            down, up = (tensors.get(f"{name}.lora_{each}.weight") for each in "AB")
            layer = modules.get(name)
            if (
                factor not in ("A.weight", "B.weight")
                or type(layer) is not nn.Linear
                or down is None
                or up is None
                or down.shape != (up.shape[1], layer.in_features)
                or len(up) != layer.out_features
            ):
                raise RolloutError(
                    f"the adapter's {key} fits no layer of this {type(self._lm).__name__}: serve the "
                    "policy's own folder"
                )
            factors[name] = down, up
        for name in self._adapted.keys() - factors.keys():
            self._lm.get_parameter(f"{name}.weight").copy_(self._adapted.pop(name))
        for name, (down, up) in factors.items():
            weight = self._lm.get_parameter(f"{name}.weight")
            if name not in self._adapted:
                self._adapted[name] = weight.clone()
            base = self._adapted[name]
            weight.copy_(base + _product(up.to(weight.device), down.to(weight.device)).to(weight.dtype))

    def _load_tensors(
        self, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Copy weights, under the names of a checkpoint, into the model.

        shapes: of all of `tensors`, by name.

        Raises:
            RolloutError: they are of another model.
        """
        own = {plain: tensor for plain, _, tensor in distinct_tensors(self._lm)}
        if own.keys() != shapes.keys():
            converted = _converted(self._lm, dict(tensors))
            foreign = own.keys() ^ converted.keys()  # where embeddings and head share no weight, for one
            if foreign:
                raise _another_model(self._lm, min(foreign))
            tensors = converted.items()
        else:
            for name, shape in shapes.items():
                if tuple(own[name].shape) != tuple(shape):
                    raise RolloutError(
                        f"{name} has the shape {tuple(shape)}, here {tuple(own[name].shape)}: serve the "
                        "policy's own folder"
                    )
        for name, tensor in tensors:
            own[name].copy_(tensor)


def lora_capacity(lm: PreTrainedModel) -> LoraCapacity | None:
    """Adapters that can be merged into a model: on its plain linear layers, where a name means no others.

    None where it has no such layers.
    """
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    tied = {id(getattr(end, "weight", None)) for end in ends} if lm.config.tie_word_embeddings else set[int]()
    plain, special = set[str](), set[str]()
    for name, module in lm.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            kind = plain if type(module) is nn.Linear and id(weight) not in tied else special
            kind.add(name.rpartition(".")[2])
    modules = tuple(sorted(plain - special))
    return LoraCapacity(rank=MAX_LORA_RANK, modules=modules) if modules else None


def _product(up: Tensor, down: Tensor) -> Tensor:
    """What the factors add to a layer, rounded as peft's merging rounds it."""
    if up.is_cpu and up.dtype in (torch.float16, torch.bfloat16):
        return (up.float() @ down.float()).to(up.dtype)
    return up @ down


def _another_model(lm: PreTrainedModel, name: str) -> RolloutError:
    return RolloutError(
        f"these are not the weights of a {type(lm).__name__} of this shape ({name}): serve the policy's own "
        "folder"
    )


def _converted(lm: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a model of this kind holds them, of those that a checkpoint holds in another shape (experts
    one by one, say).

    Raises:
        RolloutError: weights are missing, or of another model.
    """
    loaded: Any = type(lm).from_pretrained(
        None,
        config=lm.config,
        state_dict=tensors,
        dtype=lm.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with a tensor named
    )
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    wrong += sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise _another_model(lm, wrong[0])
    return {plain: tensor for plain, _, tensor in distinct_tensors(model)}
