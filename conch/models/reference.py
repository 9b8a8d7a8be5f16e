"""The reference: the frozen starting policy from which the KL divergence is measured.

Until the first update its logits equal the policy's bit for bit, on any processor: both run the same
operations on tensors of the same shapes, and copies keep each weight's `requires_grad`, though no gradient is
computed. torch multiplies differently by a frozen weight (`should_fold` in ATen's LinearAlgebra.cpp, 2.13):
the rows that `logits_to_keep` leaves are not contiguous, and are multiplied by a trained weight in one `mm`,
by a frozen one in a `bmm`. The two may round differently, and the first KL would not be 0.

Three kinds have one interface: a full copy, a shared trunk, and the trained model with its adapter off. The
shared trunk costs the memory and the time of the top blocks only, see `conch.models.shared_trunk`; the
adapter's reference costs no memory, and the time of a whole forward pass.

Legend: see `conch.models.policy`.
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

    needs_policy_forward: True where `logits` continues from a forward pass of the policy over the same batch,
        run inside `recording`.
    """

    @property
    def needs_policy_forward(self) -> bool: ...

    def recording(self) -> AbstractContextManager[None]:
        """Record the policy's forward pass, to be run inside, for the next call of `logits`."""
        ...

    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """Logits of the response tokens, without gradient; see `conch.models.policy.response_logits`."""
        ...


def build_reference(lm: PreTrainedModel, num_layers_unfrozen: int) -> Reference:
    """Build the cheapest exact reference.

    It is the model with its adapter off where there is an adapter, a shared trunk where the bottom blocks are
    frozen, else a full copy. Call it after `freeze_layers` and before the first update, with `lm` already on
    its device.

    num_layers_unfrozen: top blocks that train; -1 for all.
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
        """Record nothing: the copy runs on its own."""
        return nullcontext()

    @torch.no_grad()
    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        return response_logits(self._lm, inputs)


class AdapterOffReference:
    """The trained model itself, run with its adapter off: no second copy of any weight."""

    needs_policy_forward = False

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = lm

    def recording(self) -> AbstractContextManager[None]:
        """Record nothing: the adapter changes every block."""
        return nullcontext()

    @torch.no_grad()
    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """See `Reference.logits`. Switches the adapter off and on again."""
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
        """Record the outputs of the trunk."""
        return self._trunk.recording()

    @torch.no_grad()
    def logits(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """See `Reference.logits`. Call it once after each forward pass inside `recording`."""
        assert self._trunk.is_recorded, "no forward pass was recorded for this batch"
        logits = response_logits(self._lm, inputs)
        self._trunk.forget()
        return logits
