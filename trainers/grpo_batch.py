"""What a GRPO step knows of its samples: from the models, and then from their rewards.

Legend: B rollouts (those of a prompt together), R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.config import GenerationConfig
from conch.data.rollout_batch import Sequences
from conch.training.kl import kl_of_each


@dataclass(frozen=True)
class GRPOBatch:
    """One step's samples, ready to train on. All [B, R] but `sequences` and `advantages` [B].

    loss_mask: True at response tokens of samples that have a reward. old_logprobs: of the policy that
    sampled; None where a step's one update finds them by itself. ref_logprobs: of the reference, where there
    is one. correction: weights that make up for the sampler's distance from the trainer, where they are on.
    """

    sequences: Sequences
    loss_mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"] | None
    ref_logprobs: Float[Tensor, "B R"] | None
    advantages: Float[Tensor, " B"]
    correction: Float[Tensor, "B R"] | None


@dataclass(frozen=True)
class Passes:
    """What the models say of rollouts before any reward is known; None where they were not asked, or where
    there is no reference."""

    sequences: Sequences
    logprobs: Float[Tensor, "B R"] | None = None
    ref_logprobs: Float[Tensor, "B R"] | None = None
    entropy: Float[Tensor, "B R"] | None = None


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor; None where there is none to join."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def kl_of_samples(batch: GRPOBatch, logprobs: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """From the policy with these log-probs to the reference, in nats of each sample."""
    assert batch.ref_logprobs is not None, "without a reference there is no KL"
    return kl_of_each(logprobs, batch.ref_logprobs, batch.sequences.response_mask)


def kl_to_show(batch: GRPOBatch, generation: GenerationConfig) -> Float[Tensor, " B"] | None:
    """The same before the update; None where there is no reference.

    A step that makes no pass of the policy before its update takes the log-probs under which the samples were
    drawn, and None where top-k or top-p cut what they were drawn from: those are not the policy's.
    """
    if batch.ref_logprobs is None or (batch.old_logprobs is None and generation.cuts):
        return None
    known = batch.sequences.sampling_logprobs if batch.old_logprobs is None else batch.old_logprobs
    return kl_of_samples(batch, known)
