"""The frozen starting policy that PPO measures its distance from.

Two kinds with one interface: a full copy, and a shared trunk. The shared trunk costs the memory and the time
of the top blocks only: it is the same transformers model, whose frozen bottom blocks are replaced by
stand-ins that replay what the trained model's own bottom blocks put out in the forward pass just done.
Embeddings, masks, norms and head run through the architecture's own code, so any decoder works.

Legend: B sequences, T tokens, R response positions (the last R of T), V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.models.loading import decoder_layers
from conch.models.policy import response_logits


@runtime_checkable
class Reference(Protocol):
    """Gives the logits of the policy as it was at the start."""

    def recording(self) -> AbstractContextManager[None]:
        """Run the trained model's forward pass inside; `logits` then speaks of that very batch."""
        ...

    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> Float[Tensor, "B R V"]:
        """Logits of the last `num_response` tokens; see `conch.models.policy.response_logits`."""
        ...


def build_reference(lm: PreTrainedModel, num_layers_unfrozen: int) -> Reference:
    """The cheapest reference that is exact: shared trunk where the bottom is frozen, else a full copy.

    Call it after `freeze_trunk` and before the first update, with `lm` already on its device.
    """
    if num_layers_unfrozen == -1 or num_layers_unfrozen == len(decoder_layers(lm)):
        return FullCopyReference(lm)
    return SharedTrunkReference(lm, num_layers_unfrozen)


class FullCopyReference:
    """A frozen copy of the whole model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = copy.deepcopy(lm).eval().requires_grad_(False)

    def recording(self) -> AbstractContextManager[None]:
        """Nothing to record: the copy runs on its own."""
        return nullcontext()

    @torch.no_grad()
    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> Float[Tensor, "B R V"]:
        """See `Reference.logits`."""
        return response_logits(self._lm, input_ids, attention_mask, num_response)


class SharedTrunkReference:
    """Frozen copies of the top blocks over the trained model's own frozen trunk."""

    def __init__(self, lm: PreTrainedModel, num_layers_unfrozen: int) -> None:
        layers = decoder_layers(lm)
        num_shared = len(layers) - num_layers_unfrozen
        self._last_shared = layers[num_shared - 1]
        self._replayed = _Replayed()
        self._lm = _copy_trainable(lm)
        copied = decoder_layers(self._lm)
        for index in range(num_shared):
            copied[index] = _StandIn(layers[index], self._replayed)
        self._lm.eval().requires_grad_(False)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what the last shared block puts out."""
        handle = self._last_shared.register_forward_hook(self._remember)
        try:
            yield
        finally:
            handle.remove()

    def _remember(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._replayed.output = output

    @torch.no_grad()
    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> Float[Tensor, "B R V"]:
        """See `Reference.logits`. Must follow a forward pass of the same batch under `recording`."""
        assert self._replayed.output is not None, "no forward pass was recorded for this batch"
        logits = response_logits(self._lm, input_ids, attention_mask, num_response)
        self._replayed.output = None
        return logits


class _Replayed:
    """What the last shared block put out: a tensor or a tuple, as the architecture has it."""

    output: Any = None


class _StandIn(nn.Module):
    """Takes a shared block's place. Models read attributes of their blocks (an attention type, say): they
    reach the real block, which is kept out of the module tree so that nobody moves or counts it twice."""

    def __init__(self, block: nn.Module, replayed: _Replayed) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_source"] = replayed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.__dict__["_source"].output


def _copy_trainable(lm: PreTrainedModel) -> PreTrainedModel:
    """Copy the module tree; copy the trainable parameters, share the frozen ones and the buffers."""
    frozen = [p for p in lm.parameters() if not p.requires_grad]
    memo = {id(tensor): tensor for tensor in [*frozen, *lm.buffers()]}
    return copy.deepcopy(lm, memo)
