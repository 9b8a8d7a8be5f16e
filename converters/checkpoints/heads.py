"""The head of a reward model: one or two linear layers that make scores of a trunk's states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from conch.store.manifest import HeadActivation


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """One linear layer.

    weight: [outputs, width].
    bias: [outputs], or None.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Head:
    """What makes scores [..., outputs] of states [..., width].

    layers: one or two, in the order in which they are applied.
    activation: what stands between two layers; None where there is one.
    """

    layers: tuple[LinearLayer, ...]
    activation: HeadActivation | None = None

    @property
    def outputs(self) -> int:
        """Number of scores."""
        return self.layers[-1].weight.shape[0]
