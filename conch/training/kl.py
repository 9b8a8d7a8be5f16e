"""The distance to the reference: its settings, its adaptive weight, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.config.algorithms.kl import KLConfig
from conch.data.rollout_batch import Sequences
from conch.ops import Reduce, kl_estimate, masked_mean


class KLController:
    """Weight of the KL penalty: fixed, or steered to a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, config: KLConfig) -> None:
        self._config = config
        self.coef = config.coef

    def update(self, kl: float, num_samples: int) -> None:
        """Adapt the weight to a measured KL, where there is a target.

        kl: measured, in nats per sample.
        num_samples: samples of all ranks that it was measured on.
        """
        if self._config.target is None:
            return
        error = min(max(kl / self._config.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_samples / self._config.horizon

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on from here."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where `state_dict` was taken."""
        self.coef = state["coef"]


def kl_of_each(
    logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float[Tensor, " B"]:
    """KL(policy || reference) of each sample in nats: k1 summed over its response.

    mask: True at response tokens.
    """
    return torch.where(mask, kl_estimate(logprobs, reference_logprobs), torch.zeros_like(logprobs)).sum(dim=1)


def mean_kl(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    reduce: Reduce,
) -> float:
    """KL(policy || reference) in nats per sample: the mean of `kl_of_each` over all ranks."""
    per_sample = kl_of_each(logprobs, reference_logprobs, mask)
    return float(masked_mean(per_sample, torch.ones_like(per_sample, dtype=torch.bool), reduce))


def kl_penalties(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    config: KLConfig,
    coef: float,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """What the KL takes off the reward of each sample; and the size of the log-probs that this is made of,
    against which its rounding is judged.

    mask: True at response tokens.
    coef: weight of the KL.
    """
    kl = kl_estimate(logprobs, reference_logprobs, config.estimator)
    sizes = logprobs.abs() + reference_logprobs.abs()
    penalties, sizes = (torch.where(mask, each, torch.zeros_like(each)).sum(dim=1) for each in (kl, sizes))
    return coef * penalties, coef * sizes


def kl_before_update(
    logprobs: Float[Tensor, "B R"] | None,
    reference_logprobs: Float[Tensor, "B R"] | None,
    sequences: Sequences,
    *,
    cuts: bool,
) -> Float[Tensor, " B"] | None:
    """KL(policy || reference) of each sample in nats; None without a reference.

    logprobs: of the policy; None where a step makes no pass of it before its update. The log-probs under
        which the samples were drawn then serve, and None comes back where these are not the policy's.
    cuts: whether top-k or top-p cut what the samples were drawn from.
    """
    if reference_logprobs is None or (logprobs is None and cuts):
        return None
    logprobs = sequences.sampling_logprobs if logprobs is None else logprobs
    return kl_of_each(logprobs, reference_logprobs, sequences.response_mask)
