"""The frozen starting policy that PPO measures its distance from.

Until the first update its logits equal the policy's bit for bit, on any processor: both run the same
operations on tensors of the same shapes, and the copies keep each weight's `requires_grad`, though nothing
here computes a gradient. torch multiplies differently by a frozen weight (`should_fold` in ATen's
LinearAlgebra.cpp, 2.13): the rows that `logits_to_keep` leaves are not contiguous, and meet a weight that
learns in one `mm`, a frozen one in a `bmm`. The two may round apart, and the first KL would not be 0.

Three kinds with one interface: a full copy, a shared trunk, and the trained model with its adapter off. The
shared trunk costs the memory and the time of the top blocks only, see `conch.models.shared_trunk`; the
adapter's reference costs no memory, and the time of a whole forward pass.

Legend: B sequences, T tokens, R response positions (the last R of T), V vocabulary.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from conch.models.adapter import adapter_off, has_adapter
from conch.models.forward import ForwardInputs
from conch.models.loading import decoder_layers
from conch.models.policy import response_logits
from conch.models.shared_trunk import Trunk


@runtime_checkable
class Reference(Protocol):
    """Gives the logits of the policy as it was at the start.

    needs_policy_forward: True where `logits` reads what a forward pass of the policy over the same batch has
        left behind, see `recording`.
    """

    @property
    def needs_policy_forward(self) -> bool: ...

    def recording(self) -> AbstractContextManager[None]:
        """Run the trained model's forward pass inside; `logits` then speaks of that very batch."""
        ...

    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """Logits of the response tokens; see `conch.models.policy.response_logits`."""
        ...


def build_reference(lm: PreTrainedModel, num_layers_unfrozen: int) -> Reference:
    """The cheapest reference that is exact: the model without its adapter where it has one, a shared trunk
    where the bottom is frozen, else a full copy.

    Call it after `freeze_layers` and before the first update, with `lm` already on its device.
    """
    if has_adapter(lm):
        return AdapterOffReference(lm)
    if num_layers_unfrozen == -1 or num_layers_unfrozen == len(decoder_layers(lm)):
        return FullCopyReference(lm)
    return SharedTrunkReference(lm, num_layers_unfrozen)


class FullCopyReference:
    """A frozen copy of the whole model."""

    needs_policy_forward = False

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = copy.deepcopy(lm).eval()

    def recording(self) -> AbstractContextManager[None]:
        """Nothing to record: the copy runs on its own."""
        return nullcontext()

    @torch.no_grad()
    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """See `Reference.logits`."""
        return response_logits(self._lm, inputs)


class AdapterOffReference:
    """The trained model itself, run with its adapter off: no second copy of any weight."""

    needs_policy_forward = False

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = lm

    def recording(self) -> AbstractContextManager[None]:
        """Nothing to record: the adapter enters into every block."""
        return nullcontext()

    @torch.no_grad()
    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """See `Reference.logits`. The adapter is on again afterwards."""
        was_training = self._lm.training
        self._lm.eval()
        try:
            with adapter_off(self._lm):
                return response_logits(self._lm, inputs)
        finally:
            self._lm.train(was_training)


class SharedTrunkReference:
    """Frozen copies of the top blocks over the trained model's own frozen trunk."""

    needs_policy_forward = True

    def __init__(self, lm: PreTrainedModel, num_layers_unfrozen: int) -> None:
        self._trunk = Trunk(lm, num_layers_unfrozen)
        frozen = [p for p in lm.parameters() if not p.requires_grad]
        self._lm = self._trunk.copy_top([*frozen, *lm.buffers()]).eval()

    def recording(self) -> AbstractContextManager[None]:
        """Remember what the trunk puts out."""
        return self._trunk.recording()

    @torch.no_grad()
    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """See `Reference.logits`. Must follow a forward pass of the same batch under `recording`."""
        assert self._trunk.is_recorded, "no forward pass was recorded for this batch"
        logits = response_logits(self._lm, inputs)
        self._trunk.forget()
        return logits
