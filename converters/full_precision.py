"""Run a half-precision model in float32 with little more memory than it takes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from conch.errors import ModelError
from conch.models.loading import decoder_layers


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, the model computes what it would if it had been loaded in float32, to the last bit.

    Its layers are cast one at a time, while each runs; what stands outside of them stays cast meanwhile.
    Afterwards the model is as it was.
    """
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        yield
        return
    layers = _layers(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = _Cast([parameter for parameter in model.parameters() if id(parameter) not in inside])
    handles = []
    for layer in layers:
        cast = _Cast(list(layer.parameters()))
        handles.append(layer.register_forward_pre_hook(cast.up))
        handles.append(layer.register_forward_hook(cast.down, always_call=True))
    buffers = _replaced_buffers(model)
    outside.up()
    try:
        yield
    finally:
        outside.down()
        for handle in handles:
            handle.remove()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


class _Cast:
    """Casts parameters to float32 and puts back what was there."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._stored: list[Tensor] = []

    def up(self, *_: Any) -> None:
        """Cast."""
        self._stored = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.data.float()

    def down(self, *_: Any) -> None:
        """Put back."""
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            parameter.data = stored
        self._stored = []


def _layers(model: Any) -> list[nn.Module]:
    try:
        return list(decoder_layers(model))
    except ModelError:  # an unusual build: then the whole model is cast at once
        return []


def _replaced_buffers(model: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """Exchange the buffers for those of a float32 model, since a half-precision model may have computed its
    tables of positions in half precision. Returns the old ones."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32  # classes made by transformers' own generic ones build their trunk in it
    with init_empty_weights(include_buffers=False):
        fresh = dict(type(model)(config).named_buffers())
    old = []
    for path, buffer in model.named_buffers():
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        if name in module._non_persistent_buffers_set and path in fresh:
            old.append((module, name, buffer))
            module._buffers[name] = fresh[path].to(buffer.device)
    return old
