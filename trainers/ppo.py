"""Proximal policy optimisation of a language model against a reward model.

For a prompt x and a sampled response y of n tokens (Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al.
2020, arXiv:2009.01325; Schulman et al. 2017, arXiv:1707.06347, 2016, arXiv:1506.02438):

    r_t   = -c * k(log pi_old(y_t) - log pi_ref(y_t)) + shaped reward of token t,   c the KL weight
    A_t   = sum_l (gamma * lambda)^l * delta_{t+l},   delta_t = r_t + gamma * V_{t+1} - V_t,   V_{n+1} = 0
    rho_t = pi(y_t) / pi_old(y_t)
    L_pi  = mean_t max(-A_t * rho_t, -A_t * clip(rho_t, 1 - eps, 1 + eps))
    L_V   = mean_t 1/2 * max((V_t - R_t)^2, (clip(V_t, V_old +- eps_V) - R_t)^2),   R_t = A_t + V_old

Where this differs from common code: means run over the tokens of all ranks at once; advantages are whitened
over the valid tokens of the whole rollout batch and all ranks; pi_old comes from the trainer's own forward
pass, not from the sampler; scores are shaped in the fixed order of `conch.training.reward_shaping`; a sample
whose reward failed is masked out, never scored 0. With `ppo.kl.placement=loss` the KL leaves r_t, and c times
its estimate joins the loss, with the gradient of k2 whatever the estimator (`conch.ops.kl_loss_terms`).

Legend: B rollouts, R response tokens, T prompt and response tokens.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("ppo")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.advantages import gae
from conch.config.algorithms.ppo import PPOConfig as PPOConfig
from conch.config.algorithms.ppo import PPORunConfig as PPORunConfig
from conch.data.rollout_batch import Sequences, take_rows
from conch.distributed.train_engine import UpdateReport
from conch.losses import policy_loss_terms, value_loss_terms
from conch.models.forward import BatchPacker
from conch.models.policy import PolicyWithValue
from conch.ops import kl_estimate, kl_loss_terms, masked_mean, masked_sum, whiten
from conch.training import train
from conch.training.kl import KLController, kl_of_each
from conch.training.logprobs import LogprobOutputs, pack
from conch.training.online import AnyReference, OnlineTrainer, run_online
from conch.training.reward_shaping import RewardShaper
from conch.training.setup import rows_per_process, save_on_main, with_gathered_weights
from conch.training.statistics import (
    explained_variance,
    log_rollouts,
    newest_rollouts,
    policy_metrics,
    timer,
    update_with_statistics,
    updates_over,
)
from conch.types import Metrics, RewardResult, Rollout


@dataclass(frozen=True)
class PPOBatch:
    """One step's samples, ready to train on. All but `sequences` are [B, R].

    loss_mask: True at response tokens of samples that have a reward.
    old_logprobs, old_values: of the policy that sampled.
    ref_logprobs: of the reference.
    advantages: whitened.
    returns: what values are regressed on.
    """

    sequences: Sequences
    loss_mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"]
    old_values: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"]
    kl_coef: float


# ---------------------------------------------------------------------------------------------------- trainer


class PPOTrainer(OnlineTrainer[PPORunConfig]):
    """PPO; see `OnlineTrainer` for what it is made from."""

    name = "ppo"

    def plan_batches(self) -> None:
        config, ranks = self.config, self.collectives
        self.stream = self.own_share()
        self._rows = rows_per_process(
            ranks,
            config.train,
            config.ppo.rollouts_per_step,
            "ppo.rollouts_per_step",
            config.ppo.minibatches,
        )
        self.forward_batch_size = config.ppo.forward_batch_size

    def setup(self) -> PolicyWithValue:
        """The policy with its value head."""
        config, engine = self.config, self.engine
        self.packer = BatchPacker(self.lm)
        self.kl_controller = KLController(config.ppo.kl)
        self.shaper = RewardShaper(config.shaping, config.reward.weights, self.collectives)
        self.stateful |= {"kl_controller": self.kl_controller, "shaper": self.shaper}
        value_layers = config.ppo.num_value_layers_unfrozen
        self.policy = PolicyWithValue(self.lm, num_value_layers=value_layers).to(engine.device)
        return self.policy

    @property
    def updates_per_step(self) -> int:
        return self.config.ppo.epochs * self.config.ppo.minibatches

    def make_reference(self) -> AnyReference:
        return self.starting_policy()

    # ----------------------------------------------------------------------------------------------- one step

    def step(self) -> Metrics:
        """One rollout with its updates."""
        seconds: dict[str, float] = {}
        with timer(seconds, "time/rollout_s"):
            rollouts = self.sample(self._rows)
        with timer(seconds, "time/logprobs_s"):
            outputs = self.compute_logprobs(rollouts)
        with timer(seconds, "time/score_s"):
            rewards = self.score(rollouts)
        with timer(seconds, "time/experience_s"):
            batch, metrics = self.make_batch(rollouts, rewards, outputs)
        if self.config.tracking.rollouts:
            kl = kl_of_each(batch.old_logprobs, batch.ref_logprobs, batch.sequences.response_mask)
            log_rollouts(self.collectives, self.run, rollouts, rewards, kl)
        with timer(seconds, "time/update_s"):
            metrics |= self.update(batch)
        tokens = self.config.ppo.rollouts_per_step * metrics["rollout/length_mean"]
        speed = tokens / sum(seconds.values())
        return {**metrics, **seconds, **outputs.waits, "time/tokens_per_s": speed}

    @torch.no_grad()
    def make_batch(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult], outputs: LogprobOutputs
    ) -> tuple[PPOBatch, Metrics]:
        """Token rewards and advantages, and the step's statistics.

        Moves the KL weight and the running moments of rewards.
        """
        config, reduce, sequences = self.config.ppo, self.collectives.all_reduce, outputs.sequences
        logprobs, ref_logprobs, values = outputs.logprobs, outputs.ref_logprobs, outputs.values
        assert logprobs is not None and ref_logprobs is not None and values is not None
        has_reward = torch.tensor([reward.ok for reward in rewards], device=self.engine.device)
        mask = sequences.response_mask & has_reward.unsqueeze(1)
        kl_coef = self.kl_controller.coef
        per_token = self.shaper.shape(rollouts, rewards, mask)
        if config.kl.placement == "reward":
            per_token = per_token - kl_coef * torch.where(
                mask, kl_estimate(logprobs, ref_logprobs, config.kl.estimator), torch.zeros_like(logprobs)
            )
        if config.whiten_rewards:
            per_token = whiten(per_token, mask, reduce, shift_mean=False)
        advantages, returns = gae(per_token, values, mask, config.gamma, config.lam)
        greatest = self.collectives.all_reduce_max
        newest = newest_rollouts(rollouts, self.policy_version, greatest, self.engine.device)
        metrics = {
            **self.sampling_metrics(rollouts, rewards, sequences, self.shaper.objectives),
            **policy_metrics(outputs, reduce, self.config.rollout.logprob_diff_alarm, newest),
            "policy/kl_coef": kl_coef,
            "value/mean": float(masked_mean(values, mask, reduce)),
            "value/explained_variance": explained_variance(values, returns, mask, reduce),
        }
        self.kl_controller.update(metrics["policy/kl"], config.rollouts_per_step)
        advantages = whiten(advantages, mask, reduce)
        batch = PPOBatch(sequences, mask, logprobs, ref_logprobs, values, advantages, returns, kl_coef)
        return batch, metrics

    def update(self, batch: PPOBatch) -> Metrics:
        """All epochs and minibatches over one step's samples."""
        config = self.config.ppo
        metrics = updates_over(
            self._rows,
            config.epochs,
            config.minibatches,
            lambda rows: self._update_minibatch(take_rows(batch, rows)),
        )
        self.policy_version += 1
        return metrics

    def _update_minibatch(self, batch: PPOBatch) -> tuple[Metrics, UpdateReport]:
        """One optimizer update; statistics are means over the minibatch's tokens on all ranks."""
        num_tokens = self.collectives.all_reduce(batch.loss_mask.sum()).clamp(min=1).float()
        return update_with_statistics(
            self.engine,
            len(batch.loss_mask),
            self.config.train.gradient_accumulation_steps,
            lambda rows: self._loss(take_rows(batch, rows), num_tokens),
        )

    def _loss(self, batch: PPOBatch, num_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of loss and statistics: sums over tokens / tokens of the minibatch."""
        config, mask, packed = self.config.ppo, batch.loss_mask, pack(self.packer, batch.sequences)
        output = self.engine.module(packed.inputs)
        logprobs = packed.logprobs(output.logits, self.config.generation.temperature)
        values = packed.unpack(output.values)
        per_token_loss, ratio, is_clipped = policy_loss_terms(
            logprobs, batch.old_logprobs, batch.advantages, config.clip_ratio, config.dual_clip
        )
        value_terms = value_loss_terms(values, batch.old_values, batch.returns, config.clip_value)

        def token_mean(per_token: Tensor) -> Tensor:
            return masked_sum(per_token, mask) / num_tokens

        policy_loss, value_loss = token_mean(per_token_loss), token_mean(value_terms)
        loss = policy_loss + config.value_coef * value_loss
        if config.kl.placement == "loss":
            kl = kl_loss_terms(logprobs, batch.ref_logprobs, config.kl.estimator)
            loss = loss + batch.kl_coef * token_mean(kl)
        approx_kl = kl_estimate(batch.old_logprobs, logprobs.detach(), "k3")
        return loss, {
            "train/loss": loss,
            "train/policy_loss": policy_loss,
            "train/value_loss": value_loss,
            "train/ratio": token_mean(ratio),
            "train/approx_kl": token_mean(approx_kl),
            "train/clip_fraction": token_mean(is_clipped.float()),
        }

    # ---------------------------------------------------------------------------------- evaluation and saving

    @with_gathered_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write the policy as a Hugging Face folder, the value head beside it. Call it on all ranks."""
        heads = self.policy.head_tensors()
        return save_on_main(self.collectives, folder, self.lm, self.tokenizer, self.config.model, heads=heads)


def run(config: PPORunConfig) -> None:
    """Train with prompts from `data.train`."""
    run_online(PPOTrainer, config)


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.ppo key=value ...`."""
    train("ppo", argv)
