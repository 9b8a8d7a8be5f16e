"""Put new weights into the model of a transformers sampler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from conch.errors import RolloutError
from conch.models.adapter import distinct_tensors
from conch.rollouts.protocol import WeightUpdate
from conch.rollouts.weight_sync import received_tensors


class ModelWeights:
    """The weights of a model, which stays the same object whatever they are.

    deadline_s: longest time for weights to arrive that are broadcast.
    """

    def __init__(self, lm: PreTrainedModel, deadline_s: float) -> None:
        self._lm = lm
        self._deadline_s = deadline_s

    def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None) -> None:
        """Load an update on the way that it names.

        tensors: those of an update that is handed over.

        Raises:
            RolloutError: the weights are of another model.
            RolloutUnavailableError: they do not arrive.
        """
        if update.handed:
            assert tensors is not None
            self._load_tensors({name: tuple(each.shape) for name, each in tensors.items()}, tensors.items())
        elif update.path is None:
            shapes = {spec.name: spec.shape for spec in update.tensors}
            self._load_tensors(shapes, received_tensors(update, 1, 2, self._deadline_s))
        else:
            with safe_open(update.path, framework="pt") as file:
                names = [*file.keys()]
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                self._load_tensors(shapes, ((name, file.get_tensor(name)) for name in names))

    @torch.no_grad()
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
            tensors = _converted(self._lm, dict(tensors))
        else:
            for name, shape in shapes.items():
                if tuple(own[name].shape) != tuple(shape):
                    raise RolloutError(
                        f"{name} has the shape {tuple(shape)}, here {tuple(own[name].shape)}: serve the "
                        "policy's own folder"
                    )
        for name, tensor in tensors:
            own[name].copy_(tensor)


def _converted(lm: PreTrainedModel, tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
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
        raise RolloutError(
            f"these are not the weights of a {type(lm).__name__} of this shape ({wrong[0]}): serve the "
            "policy's own folder"
        )
    return [(plain, tensor) for plain, _, tensor in distinct_tensors(model)]
