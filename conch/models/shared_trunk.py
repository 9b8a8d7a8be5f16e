"""A second top on one trunk: copies of a model's upper blocks that go on from what its lower ones put out.

The copy is the same transformers model whose lower blocks are stand-ins: they replay what the model's own
blocks put out in the forward pass just done. Embeddings, masks, norms and head run through the architecture's
own code, so any decoder works, and the decoder of an encoder-decoder, whose encoder is replayed, too.
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
    """What one module put out last: a tensor, a tuple or more, as the architecture has it."""

    output: Any = None

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the module's output is kept."""
        handle = self._module.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.output = output


class ReplayedBlock(nn.Module):
    """Takes a module's place in a copy: replays what was recorded, or runs the module where nothing is.

    Models read attributes of their blocks (an attention type, say): they reach the real block, which is kept
    out of the module tree so that nobody moves, trains or counts it twice.
    """

    def __init__(self, module: nn.Module, recording: RecordedOutput | None = None) -> None:
        super().__init__()
        self.__dict__["_real"] = module
        self.__dict__["_recording"] = recording

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The recorded output, whatever the arguments."""
        recording = self.__dict__["_recording"]
        return self.__dict__["_real"](*args, **kwargs) if recording is None else recording.output


class Trunk:
    """The part of `lm` below its top `num_top` blocks, the encoder included: run once, replayed in copies."""

    def __init__(self, lm: PreTrainedModel, num_top: int) -> None:
        layers = decoder_layers(lm)
        self._lm = lm
        self._blocks = list(layers)[: len(layers) - num_top]
        self._last = RecordedOutput(self._blocks[-1]) if self._blocks else None
        self._encoder = RecordedOutput(lm.get_encoder()) if lm.config.is_encoder_decoder else None
        self._recordings = [recording for recording in (self._last, self._encoder) if recording is not None]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that copies share."""
        encoder = [self._lm.get_encoder()] if self._encoder is not None else []
        return [*self._blocks, *encoder]

    def copy_top(self, shared: Iterable[Tensor]) -> PreTrainedModel:
        """A copy of the model with stand-ins in the trunk's place.

        shared: tensors of the model that the copy takes as they are.
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
        """Run the model's forward pass inside; copies go on from it until `forget`."""
        with ExitStack() as stack:
            for recording in self._recordings:
                stack.enter_context(recording.on())
            yield

    @property
    def is_recorded(self) -> bool:
        """True where a forward pass can be replayed."""
        return all(recording.output is not None for recording in self._recordings)

    def forget(self) -> None:
        """Free what was recorded."""
        for recording in self._recordings:
            recording.output = None


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Where in `model` a module stands."""
    return next(name for name, found in model.named_modules() if found is module)
