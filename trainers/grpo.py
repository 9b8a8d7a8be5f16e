"""Group-relative policy optimisation: a completion is compared with the others of its prompt.

For the G completions y_1..y_G of a prompt, with rewards r_i, n_i tokens and rho_it = pi(y_it) / pi_old(y_it):

    A_i = (r_i - mean(r)) / std(r)        over the group's completions that have a reward; std by n - 1
    L   = -sum_i sum_t w_it * min(rho_it * A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) * A_i)

    grpo      w_it = 1 / (N * n_i), N completions       Shao et al. 2024, arXiv:2402.03300, equation 3
    dapo      w_it = 1 / (number of tokens)             Yu et al. 2025, arXiv:2503.14476, equation 8
    dr_grpo   w_it = 1 / (N * max_new_tokens), and A_i is not divided by std(r)
                                                        Liu et al. 2025, arXiv:2503.20783, section 3.2
    gspo      as grpo, with the whole response's ratio: rho_it = (pi(y_i) / pi_old(y_i))^(1 / n_i)
                                                        Zheng et al. 2025, arXiv:2507.18071, equation 5

`advantage=leave_one_out` takes the mean of the other completions off instead and divides by nothing; with
`loss=dr_grpo`, which weighs all tokens alike, this is RLOO with its gradient divided by max_new_tokens
(Ahmadian et al. 2024, arXiv:2402.14740, section 3).

`correction` multiplies a token's term by v_it, pi_old over the sampler's probability, cut or masked: what
makes up for samples of older weights or of other kernels (`conch/training/overlap/correction.py`).

Where this differs from common code: all sums and counts run over the minibatch of all ranks; pi_old comes
from the trainer's own forward pass (where nothing asks for it before a step's one update, from that update's,
and the ratio is 1); a group whose rewards are all alike teaches nothing (its advantages are 0, never noise
divided by noise); a completion whose reward failed is left out of its group, never scored 0. The KL to the
reference stands in the loss (with the gradient of k2 whatever the estimator), or in the rewards before they
are compared; with `kl.coef=0` there is no reference at all.

Legend: B rollouts (those of a prompt together), G rollouts a prompt, R response tokens.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("grpo")

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.advantages import group_advantages
from conch.config.algorithms.grpo import GRPOConfig as GRPOConfig
from conch.config.algorithms.grpo import GRPORunConfig as GRPORunConfig
from conch.data.rollout_batch import Sequences, take_rows
from conch.distributed.train_engine import UpdateReport
from conch.losses import (
    clipped_loss_terms,
    effective_sample_size,
    policy_ratio,
    token_weights,
)
from conch.models.forward import BatchPacker
from conch.models.policy import Policy
from conch.ops import entropy, kl_estimate, kl_loss_terms, masked_mean
from conch.training import train
from conch.training.dynamic_sampling import SampledGroups, sample_groups_with_spread
from conch.training.kl import KLController, kl_before_update, kl_of_each, kl_penalties
from conch.training.logprobs import LogprobOutputs, pack
from conch.training.online import AnyReference, OnlineTrainer, run_online
from conch.training.overlap.correction import correction_weights, importance_metrics
from conch.training.reward_shaping import RewardShaper, overlong_penalties
from conch.training.setup import rows_of_rank, rows_per_process
from conch.training.statistics import (
    NewestRollouts,
    log_rollouts,
    newest_rollouts,
    policy_metrics,
    timer,
    update_with_statistics,
    updates_over,
    warn_of_logprob_diff,
)
from conch.types import Metrics, RewardResult, Rollout, RolloutGroup


@dataclass(frozen=True)
class GRPOBatch:
    """One step's samples, ready to train on. All [B, R] but `sequences` and what is marked.

    loss_mask: True at response tokens of samples that have a reward.
    old_logprobs: of the policy that sampled; None where a step's one update finds them by itself.
    ref_logprobs: of the reference, where there is one.
    advantages [B]: of samples against their group.
    correction: weights that make up for the sampler's distance from the trainer, where they are on.
    kl_coef: weight of the KL.
    newest [B]: True at samples of the newest weights.
    age: updates that the policy has seen since those.
    """

    sequences: Sequences
    loss_mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"] | None
    ref_logprobs: Float[Tensor, "B R"] | None
    advantages: Float[Tensor, " B"]
    correction: Float[Tensor, "B R"] | None
    kl_coef: float
    newest: Bool[Tensor, " B"]
    age: int


class GRPOTrainer(OnlineTrainer[GRPORunConfig]):
    """GRPO; see `OnlineTrainer` for what it is made from."""

    name = "grpo"

    def plan_batches(self) -> None:
        config, grpo, ranks = self.config, self.config.grpo, self.collectives
        self.stream = self.own_share()
        self._num_prompts = rows_of_rank(
            grpo.prompts_per_step, "grpo.prompts_per_step", ranks.num_ranks, 1, 1
        )
        name = "grpo.prompts_per_step * group_size"
        self._rows = rows_per_process(ranks, config.train, grpo.samples_per_step, name, grpo.minibatches)
        self.forward_batch_size = grpo.forward_batch_size

    def setup(self) -> Policy:
        """The policy alone."""
        config = self.config
        self.packer = BatchPacker(self.lm)
        self.kl_controller = KLController(config.grpo.kl)
        self.shaper = RewardShaper(config.shaping, config.reward.weights, self.collectives)
        self.stateful |= {"kl_controller": self.kl_controller, "shaper": self.shaper}
        self.policy = Policy(self.lm)
        return self.policy

    @property
    def samples_per_prompt(self) -> int:
        return self.config.grpo.group_size

    @property
    def updates_per_step(self) -> int:
        return self.config.grpo.epochs * self.config.grpo.minibatches

    def make_reference(self) -> AnyReference | None:
        return None if self.config.grpo.kl.coef == 0 else self.starting_policy()

    @property
    def computes_old_logprobs(self) -> bool:
        """Whether the policy's log-probs are computed before the update.

        Else those that the step's one update computes anyway serve as the old ones: the ratio is 1.
        """
        grpo, reference = self.config.grpo, self.reference
        in_reward = grpo.kl.placement == "reward"
        return (
            (reference is not None and (reference.needs_policy_forward or in_reward))
            or self.updates_per_step > 1
            or grpo.correction.is_on
            or not self.config.model.disable_dropout
        )

    # ----------------------------------------------------------------------------------------------- one step

    def step(self) -> Metrics:
        """One rollout with its updates."""
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        rewards, resamples = None, 0
        if self.config.grpo.max_resamples:  # which groups are learned from is known from their rewards
            rollouts, rewards, resamples = self._sample_groups(seconds)
        else:
            with timer(seconds, "time/rollout_s"):
                rollouts = self.sample(self._num_prompts)
        with timer(seconds, "time/logprobs_s"):
            outputs = self.compute_logprobs(rollouts)
        if rewards is None:
            with timer(seconds, "time/score_s"):
                rewards = self.score(rollouts)
        with timer(seconds, "time/experience_s"):
            batch, metrics = self.make_batch(rollouts, rewards, outputs)
        if self.config.tracking.rollouts:
            cuts = self.config.generation.cuts
            kl = kl_before_update(batch.old_logprobs, batch.ref_logprobs, batch.sequences, cuts=cuts)
            log_rollouts(self.collectives, self.run, rollouts, rewards, kl)
        with timer(seconds, "time/update_s"):
            metrics |= self.update(batch)
        tokens = self.config.grpo.samples_per_step * metrics["rollout/length_mean"]
        speed = tokens / (time.perf_counter() - started)
        metrics |= {"grpo/resamples": float(resamples), "time/tokens_per_s": speed}
        return {**metrics, **seconds, **outputs.waits}

    def _sample_groups(self, seconds: dict[str, float]) -> SampledGroups:
        """A step's groups, those without spread replaced."""
        config = self.config.grpo

        def sample() -> list[RolloutGroup]:
            with timer(seconds, "time/rollout_s"):
                rollouts = self.sample(self._num_prompts)
            with timer(seconds, "time/score_s"):
                return RolloutGroup.split(rollouts, self.score(rollouts), config.group_size)

        return sample_groups_with_spread(
            sample,
            self._num_prompts,
            max_resamples=config.max_resamples,
            differ=lambda group: self.shaper.differ(group, self._overlong(group.rollouts)),
            all_reduce_int=self.collectives.all_reduce_int,
        )

    def _overlong(self, rollouts: Sequence[Rollout]) -> Float[Tensor, " B"]:
        grpo, longest = self.config.grpo, self.config.generation.max_new_tokens
        penalties = overlong_penalties(rollouts, longest, grpo.overlong_buffer, grpo.overlong_penalty)
        return penalties.to(self.engine.device)

    @torch.no_grad()
    def make_batch(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult], outputs: LogprobOutputs
    ) -> tuple[GRPOBatch, Metrics]:
        """Advantages of whole groups, as `rollout` returns them, and the step's statistics.

        Moves the running moments of rewards, and the KL weight where the KL is known before the update.
        """
        config, sequences = self.config.grpo, outputs.sequences
        is_scored = torch.tensor([reward.ok for reward in rewards], device=self.engine.device)
        # An empty response has no token to learn from, nor one that its reward could stand at.
        valid = is_scored & sequences.response_mask.any(dim=1)
        mask = sequences.response_mask & valid.unsqueeze(1)
        kl_coef = self.kl_controller.coef
        totals, sizes = self._totals(rollouts, rewards, outputs, mask, kl_coef)
        advantages = group_advantages(totals, valid, config.group_size, config.advantage_kind, sizes)
        old, greatest = outputs.logprobs, self.collectives.all_reduce_max
        correction = None if old is None else correction_weights(config.correction, old, sequences)
        newest = newest_rollouts(rollouts, self.policy_version, greatest, self.engine.device)
        policies = (old, outputs.ref_logprobs)
        batch = GRPOBatch(
            sequences, mask, *policies, advantages, correction, kl_coef, newest.rows, newest.age
        )
        sampled = self.sampling_metrics(rollouts, rewards, sequences, self.shaper.objectives)
        return batch, {**sampled, **self._statistics(batch, outputs, valid)}

    def update(self, batch: GRPOBatch) -> Metrics:
        """All epochs and minibatches over one step's samples, once: a batch without old log-probs takes those
        of the policy that it meets."""
        config = self.config.grpo
        metrics = updates_over(
            self._rows,
            config.epochs,
            config.minibatches,
            lambda rows: self._update_minibatch(take_rows(batch, rows)),
        )
        if batch.old_logprobs is None:
            gap, share = metrics.pop("newest/logprob_diff"), metrics.pop("newest/share")
            if share:
                warn_of_logprob_diff(gap / share, self.config.rollout.logprob_diff_alarm, batch.age)
            metrics = self._adapt_kl_coef(metrics, batch.kl_coef)
        self.policy_version += 1
        return metrics

    def _totals(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[RewardResult],
        outputs: LogprobOutputs,
        mask: Bool[Tensor, "B R"],
        kl_coef: float,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """What completions are compared by: shaped rewards less penalties, 0 where there is none; and the
        size of what these are sums of."""
        shaped, penalties = self.shaper.shape(rollouts, rewards, mask), self._overlong(rollouts)
        totals, sizes = shaped.sum(dim=1) - penalties, shaped.abs().sum(dim=1) + penalties
        if outputs.ref_logprobs is None or self.config.grpo.kl.placement == "loss":
            return totals, sizes
        assert outputs.logprobs is not None
        config, logprobs = self.config.grpo.kl, outputs.logprobs
        kl, kl_sizes = kl_penalties(logprobs, outputs.ref_logprobs, mask, config, kl_coef)
        return totals - kl, sizes + kl_sizes

    def _statistics(self, batch: GRPOBatch, outputs: LogprobOutputs, valid: Bool[Tensor, " B"]) -> Metrics:
        """Of advantages, distances and weights, over all ranks."""
        config, ranks, cuts = self.config.grpo, self.collectives, self.config.generation.cuts
        reduce, newest = ranks.all_reduce, NewestRollouts(batch.newest, batch.age)
        zero_std = ~(batch.advantages != 0).reshape(-1, config.group_size).any(dim=1)
        all_groups = torch.ones_like(zero_std)
        metrics = {
            "grpo/advantage_std": float(masked_mean(batch.advantages**2, valid, reduce)) ** 0.5,
            "grpo/frac_reward_zero_std": float(masked_mean(zero_std.float(), all_groups, reduce)),
            **policy_metrics(outputs, reduce, self.config.rollout.logprob_diff_alarm, newest),
        }
        metrics = self._adapt_kl_coef(metrics, batch.kl_coef)
        if outputs.logprobs is not None and not cuts:
            of = (outputs.logprobs, batch.sequences, config.correction)
            metrics |= importance_metrics(*of, reduce, ranks.all_reduce_max)
        return metrics

    def _adapt_kl_coef(self, metrics: Metrics, kl_coef: float) -> Metrics:
        """Steer the KL weight by "policy/kl", where it was measured; report the one that held so far."""
        if "policy/kl" not in metrics:
            return metrics
        self.kl_controller.update(metrics["policy/kl"], self.config.grpo.samples_per_step)
        return {**metrics, "policy/kl_coef": kl_coef}

    def _update_minibatch(self, batch: GRPOBatch) -> tuple[Metrics, UpdateReport]:
        """One optimizer update; statistics are means over the minibatch's tokens on all ranks."""
        config, reduce = self.config, self.collectives.all_reduce
        weights = token_weights(batch.loss_mask, config.grpo.loss, config.generation.max_new_tokens, reduce)
        shares = batch.loss_mask.float() / reduce(batch.loss_mask.sum()).clamp(min=1)
        means, report = update_with_statistics(
            self.engine,
            len(batch.loss_mask),
            config.train.gradient_accumulation_steps,
            lambda rows: self._loss(take_rows(batch, rows), weights[rows], shares[rows]),
        )
        squares = means.pop("train/ratio_squared")
        return {
            **means,
            "train/effective_sample_size": effective_sample_size(means["train/ratio"], squares),
        }, report

    def _loss(self, batch: GRPOBatch, weights: Tensor, shares: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss, and its parts of means over tokens."""
        config, temperature, mask = self.config.grpo, self.config.generation.temperature, batch.loss_mask
        packed = pack(self.packer, batch.sequences)
        logits = self.engine.module(packed.inputs).logits
        logprobs = packed.logprobs(logits, temperature)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        ratio = policy_ratio(logprobs, old_logprobs, mask, config.loss)
        per_token_loss, is_clipped = clipped_loss_terms(
            ratio, batch.advantages, config.clip_low, config.clip_high
        )
        if batch.correction is not None:
            per_token_loss = per_token_loss * batch.correction

        def weighted_sum(values: Tensor, by: Tensor) -> Tensor:
            return torch.where(mask, values * by, torch.zeros_like(values)).sum()

        loss = weighted_sum(per_token_loss, weights)
        columns = {"train/policy_loss": loss}
        if batch.ref_logprobs is not None and config.kl.placement == "loss":
            kl = weighted_sum(kl_loss_terms(logprobs, batch.ref_logprobs, config.kl.estimator), weights)
            loss = loss + batch.kl_coef * kl
            columns["train/kl_loss"] = kl
        if batch.old_logprobs is None:
            gap = (logprobs.detach() - batch.sequences.sampling_logprobs).abs()
            entropies = packed.unpack(entropy(logits.detach(), temperature))
            columns["policy/entropy"] = weighted_sum(entropies, shares)
            columns["rollout/logprob_diff"] = weighted_sum(gap, shares)
            of_newest = shares * batch.newest.unsqueeze(1)
            columns["newest/logprob_diff"] = weighted_sum(gap, of_newest)
            columns["newest/share"] = weighted_sum(torch.ones_like(gap), of_newest)
            if batch.ref_logprobs is not None:
                of_samples = kl_of_each(logprobs.detach(), batch.ref_logprobs, batch.sequences.response_mask)
                columns["policy/kl"] = of_samples.sum() / config.samples_per_step
        approx_kl = kl_estimate(old_logprobs, logprobs.detach(), "k3")
        return loss, {
            "train/loss": loss,
            **columns,
            "train/ratio": weighted_sum(ratio, shares),
            "train/ratio_squared": weighted_sum(ratio**2, shares),
            "train/approx_kl": weighted_sum(approx_kl, shares),
            "train/clip_fraction": weighted_sum(is_clipped.to(ratio.dtype), shares),
        }


def run(config: GRPORunConfig) -> None:
    """Train with prompts from `data.train`."""
    run_online(GRPOTrainer, config)


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.grpo key=value ...`."""
    train("grpo", argv)
