"""A second top on one trunk: copies of a model's upper blocks, fed with the outputs of its lower blocks.

The copy is the same transformers model with `ReplayedBlock`s in the place of its lower blocks: they give the
outputs of the model's own blocks in the latest forward pass. Embeddings, masks, norms and head run through
the architecture's own code, so any decoder works, and so does an encoder-decoder, whose encoder is replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.models.loading import decoder_layers


class RecordedOutput:
    """Latest output of one module: a tensor, a tuple or more, as the architecture has it."""

    output: Any = None

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the module's output inside."""
        handle = self._module.register_forward_hook(self._record)
        try:
            yield
        finally:
            handle.remove()

    def _record(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.output = output


class ReplayedBlock(nn.Module):
    """Takes a module's place in a copy: gives the recorded output, or runs the module where none is recorded.

    Models read attributes of their blocks (an attention type, say), which are those of the real block. It is
    no submodule, so that nothing moves, trains or counts it twice.

    recorded: the output to give, whatever the arguments; None runs the module.
    """

    def __init__(self, module: nn.Module, recorded: RecordedOutput | None = None) -> None:
        super().__init__()
        self.__dict__["_real"] = module
        self.__dict__["_recorded"] = recorded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The recorded output, or that of the module."""
        recorded = self.__dict__["_recorded"]
        return self.__dict__["_real"](*args, **kwargs) if recorded is None else recorded.output


class Trunk:
    """The part of `lm` below its top `num_top` blocks, encoder included: run once, replayed in copies."""

    def __init__(self, lm: PreTrainedModel, num_top: int) -> None:
        layers = decoder_layers(lm)
        self._lm = lm
        self._blocks = list(layers)[: len(layers) - num_top]
        self._last = RecordedOutput(self._blocks[-1]) if self._blocks else None
        self._encoder = RecordedOutput(lm.get_encoder()) if lm.config.is_encoder_decoder else None
        self._recorded = [each for each in (self._last, self._encoder) if each is not None]

    @property
    def modules(self) -> list[nn.Module]:
        """Modules that copies share."""
        encoder = [self._lm.get_encoder()] if self._encoder is not None else []
        return [*self._blocks, *encoder]

    def copy_top(self, shared: Iterable[Tensor]) -> PreTrainedModel:
        """A copy of the model in which the trunk is replayed.

        shared: tensors of the model that the copy shares instead of copying them.
        """
        copied = copy.deepcopy(self._lm, {id(tensor): tensor for tensor in shared})
        layers = decoder_layers(copied)
        for index, block in enumerate(self._blocks):
            layers[index] = ReplayedBlock(block, self._last)
        if self._encoder is not None:
            encoder = self._lm.get_encoder()
            copied.set_submodule(name_of(self._lm, encoder), ReplayedBlock(encoder, self._encoder))
        return copied

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the model's forward pass, to be run inside; copies continue from it until `forget`."""
        with ExitStack() as stack:
            for each in self._recorded:
                stack.enter_context(each.recording())
            yield

    @property
    def is_recorded(self) -> bool:
        """True where a forward pass can be replayed."""
        return all(each.output is not None for each in self._recorded)

    def forget(self) -> None:
        """Free the recorded outputs."""
        for each in self._recorded:
            each.output = None


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Name of a module in `model`."""
    return next(name for name, each in model.named_modules() if each is module)
