"""Group-relative policy optimisation: a completion is compared with the others of its prompt.

For the G completions y_1..y_G of a prompt, with rewards r_i, n_i tokens and rho_it = pi(y_it) / pi_old(y_it):

    A_i = (r_i - mean(r)) / std(r)                 over the group's completions that have a reward
    L   = -sum_i sum_t w_it * min(rho_it * A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) * A_i)

    grpo      w_it = 1 / (N * n_i), N completions       Shao et al. 2024, arXiv:2402.03300, equation 3
    dapo      w_it = 1 / (number of tokens)             Yu et al. 2025, arXiv:2503.14476, equation 8
    dr_grpo   w_it = 1 / (N * max_new_tokens), and A_i is not divided by std(r)
                                                        Liu et al. 2025, arXiv:2503.20783, section 3.2
    gspo      as grpo, with the whole response's ratio: rho_it = (pi(y_i) / pi_old(y_i))^(1 / n_i)
                                                        Zheng et al. 2025, arXiv:2507.18071, equation 5

`advantage=leave_one_out` takes the mean of the other completions off instead and divides by nothing (RLOO,
Ahmadian et al. 2024, arXiv:2402.14740, section 3).

Where this differs from common code: all sums and counts run over the minibatch of all ranks; pi_old comes
from the trainer's own forward pass (where nothing asks for it before a step's one update, from that update's,
and the ratio is 1); a group whose rewards are all alike teaches nothing (its advantages are
0, never noise divided by noise); a completion whose reward failed is left out of its group, never scored 0.
The KL to the reference stands in the loss (with the gradient of k2 whatever the estimator), or in the rewards
before they are compared; with `kl.coef=0` there is no reference at all.

Legend: B rollouts (those of a prompt together), G rollouts a prompt, R response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from conch.advantages import SMALLEST_SPREAD, Advantage, group_advantages
from conch.cli import load_run_config, run_main
from conch.config import (
    GenerationConfig,
    OnlineRunConfig,
    Section,
)
from conch.data.files import evaluation_rows, training_rows
from conch.data.formats import prompt_form
from conch.data.index_sampler import IndexStream
from conch.data.rollout_batch import Sequences, collate, take_rows
from conch.distributed.train_engine import UpdateReport
from conch.losses import (
    LossForm,
    clipped_loss_terms,
    effective_sample_size,
    policy_ratio,
    token_weights,
    truncated_importance_weights,
)
from conch.models.forward import BatchPacker, ForwardBatch
from conch.models.policy import Policy
from conch.models.reference import Reference, build_reference
from conch.ops import (
    KLEstimator,
    entropy,
    kl_estimate,
    kl_loss_terms,
    masked_mean,
)
from conch.rewards.scorer import total_reward
from conch.training.kl import KLConfig, KLController, kl_of_each, mean_kl
from conch.training.online import OnlineTrainer
from conch.training.reward_shaping import RewardShaper, ShapingConfig, overlong_penalties
from conch.training.setup import (
    eval_mode,
    rows_of_rank,
    rows_per_process,
    with_whole_weights,
)
from conch.training.statistics import (
    log_rollouts,
    logprob_diff,
    reward_metrics,
    rollout_metrics,
    timer,
    update_with_statistics,
    updates_over,
    warn_of_logprob_diff,
)
from conch.types import Metrics, Prompt, RewardResult, Rollout, RolloutGroup


class GRPOKLConfig(KLConfig):
    """The penalty for leaving the reference, where GRPO has it: in the loss."""

    coef: float = Field(default=0.04, ge=0)
    """Weight of the KL; 0 does without a reference."""

    estimator: KLEstimator = "k3"
    """Per-token estimate; see `conch.ops.kl_estimate`."""

    placement: Literal["reward", "loss"] = "loss"
    """Whether the KL is added to the loss, or taken off the rewards before they are compared."""


class GRPOConfig(Section):
    """The algorithm's own settings."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per step, over all processes."""

    group_size: int = 8
    """G, completions per prompt."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a step's samples."""

    minibatches: int = Field(default=2, ge=1)
    """Optimizer updates per pass."""

    forward_batch_size: int = Field(default=64, ge=1)
    """Samples per process in one forward pass without gradient; changes memory, not the result."""

    loss: LossForm = "grpo"
    """How tokens are weighed, and what the ratio is of; see the head of `trainers/grpo.py`."""

    advantage: Advantage | None = None
    """What a reward is compared with: its group's mean, in standard deviations (`group_std`) or not
    (`group_mean`), or the mean of the others (`leave_one_out`). None takes `group_mean` with dr_grpo, else
    `group_std`."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """eps_low: how far a token's probability may fall in one step before its gradient ends."""

    clip_high: float = Field(default=0.2, gt=0)
    """eps_high: how far it may rise; more than `clip_low` leaves room for rare tokens (DAPO takes 0.28).
    gspo's ratios are means over a response, and want 3e-4 and 4e-4 or so."""

    sampler_correction: float | None = Field(default=None, gt=0)
    """Weigh each token by pi_old of the trainer over that of the sampler, at most this much: for samplers
    with other kernels than the trainer's (truncated importance sampling; 2 is usual). None does not."""

    max_draws: int = Field(default=1, ge=1)
    """Rollouts per step, at most, to replace groups whose rewards are all alike by groups of other prompts
    (dynamic sampling, DAPO section 3.2). 1 replaces none."""

    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before `max_new_tokens` over which a penalty for length grows from 0 (DAPO, equation 13)."""

    overlong_penalty: float = Field(default=1.0, ge=0)
    """That penalty at `max_new_tokens`."""

    kl: GRPOKLConfig = GRPOKLConfig()
    """Distance to the reference."""

    @model_validator(mode="after")
    def _a_group_has_others(self) -> GRPOConfig:
        if self.group_size < 2:
            raise ValueError(
                f"`group_size` = {self.group_size} leaves nothing to compare with: take at least 2"
            )
        if self.advantage == "group_std" and self.loss == "dr_grpo":
            raise ValueError("`loss: dr_grpo` divides by no standard deviation: leave `advantage` out")
        return self

    @property
    def advantage_kind(self) -> Advantage:
        """`advantage`, or what goes with the loss."""
        return self.advantage or ("group_mean" if self.loss == "dr_grpo" else "group_std")


class GRPORunConfig(OnlineRunConfig):
    """Everything a GRPO run is made from."""

    shaping: ShapingConfig = ShapingConfig()
    grpo: GRPOConfig = GRPOConfig()

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> GRPORunConfig:
        generation, grpo = self.generation, self.grpo
        if grpo.sampler_correction is not None and generation.cuts:
            raise ValueError(
                "`grpo.sampler_correction` compares whole distributions, but `generation.top_k` or `top_p` "
                "cuts the sampler's: leave one of them out"
            )
        if grpo.overlong_buffer > generation.max_new_tokens:
            raise ValueError(
                f"`grpo.overlong_buffer` = {grpo.overlong_buffer} is longer than "
                f"`generation.max_new_tokens` = {generation.max_new_tokens}"
            )
        return self


@dataclass(frozen=True)
class GRPOBatch:
    """One step's samples, ready to train on. All [B, R] but `sequences` and `advantages` [B].

    loss_mask: True at response tokens of samples that have a reward. old_logprobs: of the policy that
    sampled; None where a step's one update finds them by itself. ref_logprobs: of the reference, where there
    is one. correction: weights that make up for the sampler's distance from the trainer, where they are on.
    kl_coef: weight of the KL.
    """

    sequences: Sequences
    loss_mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"] | None
    ref_logprobs: Float[Tensor, "B R"] | None
    advantages: Float[Tensor, " B"]
    correction: Float[Tensor, "B R"] | None
    kl_coef: float


@dataclass(frozen=True)
class GRPOOutputs:
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


def has_spread(rewards: Sequence[RewardResult], weights: Mapping[str, float]) -> bool:
    """Whether a group teaches anything: two of its rewards differ."""
    values = [total_reward(reward, weights) for reward in rewards if reward.ok]
    return len(values) > 1 and max(values) - min(values) > SMALLEST_SPREAD * (1 + max(map(abs, values)))


def groups_of(rollouts: Sequence[Rollout], rewards: Sequence[RewardResult], size: int) -> list[RolloutGroup]:
    """The groups that stand one after the other."""
    cuts = [slice(first, first + size) for first in range(0, len(rollouts), size)]
    return [
        RolloutGroup(rollouts[cut.start].prompt, tuple(rollouts[cut]), tuple(rewards[cut])) for cut in cuts
    ]


class GRPOTrainer(OnlineTrainer):
    """GRPO; see `OnlineTrainer` for what it is made from."""

    name = "grpo"
    config: GRPORunConfig

    def plan_batches(self) -> None:
        config, engine, grpo = self.config, self.engine, self.config.grpo
        self.stream = IndexStream(len(self.prompts), config.train.seed, engine.rank, engine.num_ranks)
        self._num_prompts = rows_of_rank(
            grpo.prompts_per_step, "grpo.prompts_per_step", engine.num_ranks, 1, 1
        )
        total = grpo.prompts_per_step * grpo.group_size
        name = "grpo.prompts_per_step * group_size"
        self._rows = rows_per_process(engine, config.train, total, name, grpo.minibatches)

    def setup(self) -> Policy:
        """The policy alone."""
        config, engine = self.config, self.engine
        self.packer = BatchPacker(self.lm)
        self.kl_controller = KLController(config.grpo.kl)
        self.shaper = RewardShaper(config.shaping, config.reward.weights, engine)
        self.stateful |= {"kl_controller": self.kl_controller, "shaper": self.shaper}
        self.policy = Policy(self.lm)
        return self.policy

    @property
    def updates_per_step(self) -> int:
        return self.config.grpo.epochs * self.config.grpo.minibatches

    @property
    def checkpointed(self) -> Policy:
        return self.policy

    def make_reference(self) -> Reference | None:
        if self.config.grpo.kl.coef == 0:
            return None
        return build_reference(self.lm, self.config.model.num_layers_unfrozen)

    @cached_property
    def computes_old_logprobs(self) -> bool:
        """Whether the policy's log-probs are computed before the update.

        Else those that the step's one update computes anyway serve as the old ones: the ratio is 1.
        """
        grpo, reference = self.config.grpo, self.reference
        needs_policy = reference is not None and (
            reference.needs_policy_forward or grpo.kl.placement == "reward"
        )
        return (
            needs_policy
            or self.updates_per_step > 1
            or grpo.sampler_correction is not None
            or not self.config.model.disable_dropout
        )

    # ----------------------------------------------------------------------------------------------- one step

    def step(self) -> Metrics:
        """One rollout with its updates."""
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        if self.config.grpo.max_draws == 1:
            with timer(seconds, "time/rollout_s"):
                rollouts = self.rollout(self.next_prompts())
            with timer(seconds, "time/logprobs_s"):
                outputs = self.compute_logprobs(rollouts)
            with timer(seconds, "time/score_s"):
                rewards = self.score(rollouts)
            draws = 1
        else:
            rollouts, rewards, draws = self._sample_groups(seconds)
            with timer(seconds, "time/logprobs_s"):
                outputs = self.compute_logprobs(rollouts)
        with timer(seconds, "time/experience_s"):
            batch, metrics = self.make_batch(rollouts, rewards, outputs)
        if self.config.tracking.rollouts:
            log_rollouts(self.engine, self.run, rollouts, rewards, kl_to_show(batch, self.config.generation))
        with timer(seconds, "time/update_s"):
            metrics |= self.update(batch)
        config = self.config.grpo
        tokens = config.prompts_per_step * config.group_size * metrics["rollout/length_mean"]
        speed = tokens / (time.perf_counter() - started)
        return {**metrics, **seconds, "grpo/draws": float(draws), "time/tokens_per_s": speed}

    def next_prompts(self) -> list[Prompt]:
        """This rank's prompts of the next step."""
        return [self.prompts[row] for row in self.stream.draw(self._num_prompts)]

    def rollout(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample `group_size` completions per prompt, which stand together; each one's reward is requested as
        soon as it has ended."""
        return super().rollout([prompt for prompt in prompts for _ in range(self.config.grpo.group_size)])

    def _sample_groups(self, seconds: dict[str, float]) -> tuple[list[Rollout], list[RewardResult], int]:
        """A step's groups, those without spread replaced as far as `max_draws` allows; and the draws it took.

        All ranks draw equally often, and each keeps the groups that it sampled.
        """
        kept: list[RolloutGroup] = []
        flat: list[RolloutGroup] = []
        draws = 0
        while draws < self.config.grpo.max_draws:
            draws += 1
            with timer(seconds, "time/rollout_s"):
                rollouts = self.rollout(self.next_prompts())
            with timer(seconds, "time/score_s"):
                rewards = self.score(rollouts)
            for group in groups_of(rollouts, rewards, self.config.grpo.group_size):
                (kept if has_spread(group.rewards, self.config.reward.weights) else flat).append(group)
            if not self.engine.sum_int(max(0, self._num_prompts - len(kept))):
                break
        chosen = [*kept, *flat][: self._num_prompts]
        rollouts = [rollout for group in chosen for rollout in group.rollouts]
        return rollouts, [reward for group in chosen for reward in group.rewards], draws

    @with_whole_weights
    @torch.no_grad()
    def compute_logprobs(self, rollouts: Sequence[Rollout], *, policy_too: bool | None = None) -> GRPOOutputs:
        """Forward passes of policy and reference over each rollout, where the algorithm needs them.

        policy_too: whether the policy is asked; None leaves it to `computes_old_logprobs`.
        """
        policy_too = self.computes_old_logprobs if policy_too is None else policy_too
        sequences = collate(rollouts, self.pad_id, self.engine.device)
        if not policy_too and self.reference is None:
            return GRPOOutputs(sequences)
        columns: list[tuple[Tensor | None, ...]] = []
        for rows in torch.arange(len(sequences.input_ids)).split(self.config.grpo.forward_batch_size):
            with eval_mode(self.policy), self.engine.autocast():
                columns.append(self._forward(take_rows(sequences, rows), policy_too))
        return GRPOOutputs(sequences, *(joined(column) for column in zip(*columns, strict=True)))

    def _forward(
        self, part: Sequences, policy_too: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs of policy and reference, and entropies."""
        packed, ref_logprobs = self._packed(part), None
        if not policy_too:
            assert self.reference is not None
            return None, self._logprobs(self.reference.logits(packed.inputs), packed), None
        with nullcontext() if self.reference is None else self.reference.recording():
            logits = self.engine.module(packed.inputs)
        if self.reference is not None:
            ref_logprobs = self._logprobs(self.reference.logits(packed.inputs), packed)
        return self._logprobs(logits, packed), ref_logprobs, self._entropy(logits, packed)

    def _packed(self, part: Sequences) -> ForwardBatch:
        return self.packer.pack(part.input_ids, part.attention_mask, part.num_response)

    def _logprobs(self, logits: Tensor, packed: ForwardBatch) -> Tensor:
        return packed.logprobs(logits, self.config.generation.temperature)

    @torch.no_grad()
    def _entropy(self, logits: Tensor, packed: ForwardBatch) -> Tensor:
        return packed.unpack(entropy(logits, self.config.generation.temperature))

    @torch.no_grad()
    def make_batch(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult], outputs: GRPOOutputs
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
        totals = self._totals(rollouts, rewards, outputs, mask, kl_coef)
        advantages = group_advantages(totals, valid, config.group_size, config.advantage_kind)
        correction = None
        if config.sampler_correction is not None:
            assert outputs.logprobs is not None
            correction = truncated_importance_weights(
                outputs.logprobs, sequences.sampling_logprobs, config.sampler_correction
            )
        batch = GRPOBatch(
            sequences, mask, outputs.logprobs, outputs.ref_logprobs, advantages, correction, kl_coef
        )
        return batch, {
            **self.scorer.metrics(),
            **reward_metrics(rewards, self.config.reward.weights, self.shaper.objectives, self.engine.sum),
            **rollout_metrics(rollouts, sequences, self.engine.sum),
            **self._statistics(batch, outputs, valid),
        }

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
            warn_of_logprob_diff(metrics["rollout/logprob_diff"], self.config.rollout.logprob_diff_alarm)
            if "policy/kl" in metrics:
                self._note_kl(metrics["policy/kl"])
                metrics["policy/kl_coef"] = batch.kl_coef
        self.policy_version += 1
        return metrics

    def _totals(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[RewardResult],
        outputs: GRPOOutputs,
        mask: Bool[Tensor, "B R"],
        kl_coef: float,
    ) -> Float[Tensor, " B"]:
        """What completions are compared by: shaped rewards less penalties, 0 where there is none."""
        config, longest = self.config.grpo, self.config.generation.max_new_tokens
        totals = self.shaper.shape(rollouts, rewards, mask).sum(dim=1)
        penalties = overlong_penalties(rollouts, longest, config.overlong_buffer, config.overlong_penalty)
        totals = totals - penalties.to(totals.device)
        if outputs.ref_logprobs is None or config.kl.placement == "loss":
            return totals
        assert outputs.logprobs is not None
        kl = kl_estimate(outputs.logprobs, outputs.ref_logprobs, config.kl.estimator)
        return totals - kl_coef * torch.where(mask, kl, torch.zeros_like(kl)).sum(dim=1)

    def _statistics(self, batch: GRPOBatch, outputs: GRPOOutputs, valid: Bool[Tensor, " B"]) -> Metrics:
        """Of advantages, distances and weights, over all ranks."""
        config, reduce, mask = self.config.grpo, self.engine.sum, outputs.sequences.response_mask
        is_flat = ~(batch.advantages != 0).reshape(-1, config.group_size).any(dim=1)
        metrics = {
            "grpo/advantage_std": float(masked_mean(batch.advantages**2, valid, reduce)) ** 0.5,
            "grpo/flat_fraction": float(masked_mean(is_flat.float(), torch.ones_like(is_flat), reduce)),
        }
        if outputs.logprobs is None or outputs.entropy is None:
            return metrics
        alarm = self.config.rollout.logprob_diff_alarm
        metrics |= {
            "policy/entropy": float(masked_mean(outputs.entropy, mask, reduce)),
            "rollout/logprob_diff": logprob_diff(outputs.logprobs, outputs.sequences, reduce, alarm),
        }
        if outputs.ref_logprobs is not None:
            measured = mean_kl(outputs.logprobs, outputs.ref_logprobs, mask, reduce)
            self._note_kl(measured)
            metrics |= {"policy/kl": measured, "policy/kl_coef": batch.kl_coef}
        if batch.correction is not None and config.sampler_correction is not None:
            metrics |= self._correction_metrics(batch.correction, config.sampler_correction, mask)
        return metrics

    def _note_kl(self, measured: float) -> None:
        self.kl_controller.update(measured, self.config.grpo.prompts_per_step * self.config.grpo.group_size)

    def _correction_metrics(self, weights: Tensor, most: float, mask: Tensor) -> Metrics:
        moments = [float(masked_mean(each, mask, self.engine.sum)) for each in (weights, weights**2)]
        clipped = masked_mean((weights >= most).float(), mask, self.engine.sum)
        return {
            "rollout/correction_mean": moments[0],
            "rollout/correction_clipped_fraction": float(clipped),
            "rollout/effective_share": effective_sample_size(*moments),
        }

    def _update_minibatch(self, batch: GRPOBatch) -> tuple[Metrics, UpdateReport]:
        """One optimizer update; statistics are means over the minibatch's tokens on all ranks."""
        config, reduce = self.config, self.engine.sum
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
            "train/effective_share": effective_sample_size(means["train/ratio"], squares),
        }, report

    def _loss(self, batch: GRPOBatch, weights: Tensor, shares: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss, and its parts of means over tokens."""
        config, mask, packed = self.config.grpo, batch.loss_mask, self._packed(batch.sequences)
        logits = self.engine.module(packed.inputs)
        logprobs = self._logprobs(logits, packed)
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
            columns["policy/entropy"] = weighted_sum(self._entropy(logits, packed), shares)
            columns["rollout/logprob_diff"] = weighted_sum(gap, shares)
            if batch.ref_logprobs is not None:
                of_each = kl_of_samples(batch, logprobs.detach())
                columns["policy/kl"] = of_each.sum() / (config.prompts_per_step * config.group_size)
        approx_kl = kl_estimate(old_logprobs, logprobs.detach(), "k3")
        return loss, {
            "train/loss": loss,
            **columns,
            "train/ratio": weighted_sum(ratio, shares),
            "train/ratio_squared": weighted_sum(ratio**2, shares),
            "train/approx_kl": weighted_sum(approx_kl, shares),
            "train/clip_fraction": weighted_sum(is_clipped.float(), shares),
        }

    def policy_and_reference(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.compute_logprobs(rollouts, policy_too=True)
        assert outputs.logprobs is not None and outputs.ref_logprobs is not None
        return outputs.logprobs, outputs.ref_logprobs, outputs.sequences.response_mask


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.grpo key=value ...` with prompts from `data.train`."""
    config = load_run_config(GRPORunConfig, argv, default_name="grpo")
    prompts = training_rows(config.data, "prompts", form=prompt_form)
    evaluated = evaluation_rows(config.data, form=prompt_form)
    with closing(GRPOTrainer(config, prompts=prompts, eval_prompts=evaluated)) as trainer:
        trainer.fit()


if __name__ == "__main__":
    run_main(main)
