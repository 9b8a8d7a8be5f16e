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

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.advantages import gae
from conch.cli import load_run_config, run_main
from conch.config import (
    EvalGenerationConfig,
    GenerationConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
)
from conch.data.files import evaluation_rows, training_rows
from conch.data.formats import prompt_form
from conch.data.index_sampler import IndexStream
from conch.data.rollout_batch import Sequences, collate, take_rows
from conch.distributed.train_engine import Engine, UpdateReport
from conch.evaluation.evaluator import Evaluator, sampled_prompts
from conch.evaluation.metrics import MetricFn
from conch.losses import policy_loss_terms, value_loss_terms
from conch.models.forward import Layout, Rows
from conch.models.freezing import choose_trainable
from conch.models.policy import PolicyWithValue
from conch.models.reference import build_reference
from conch.ops import (
    entropy,
    kl_estimate,
    kl_loss_terms,
    masked_mean,
    masked_sum,
    whiten,
)
from conch.rewards.base import UserReward
from conch.rewards.scorer import Scorer
from conch.rollouts.factory import Samplers, check_sampling
from conch.rollouts.prompts import fitting_prompts
from conch.runs.tracking import Tracker
from conch.training.kl import KLConfig, KLController, kl_of_each, mean_kl
from conch.training.loop import fit
from conch.training.online import Ahead, known_or_computed
from conch.training.resume import start_run
from conch.training.reward_shaping import RewardShaper, ShapingConfig
from conch.training.setup import (
    check_vocabulary,
    evaluating,
    given_or_loaded_lm,
    opened_reward,
    rows_per_process,
    save_on_main,
    with_whole_weights,
)
from conch.training.statistics import (
    clocked,
    explained_variance,
    log_rollouts,
    logprob_gap,
    reward_metrics,
    rollout_metrics,
    update_with_statistics,
    updates_over,
)
from conch.types import Metrics, Prompt, RewardResult, Rollout


class PPOConfig(Section):
    """The algorithm's own settings."""

    rollouts_per_step: int = Field(default=128, ge=1)
    """Samples per step, over all processes."""

    epochs: int = Field(default=4, ge=1)
    """Passes over a step's samples."""

    minibatches: int = Field(default=2, ge=1)
    """Optimizer updates per pass."""

    forward_batch_size: int = Field(default=64, ge=1)
    """Samples per process in one forward pass without gradient; changes memory, not the result."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""

    clip_ratio: float = Field(default=0.2, gt=0)
    """eps of the policy loss."""

    clip_value: float | None = Field(default=0.2, gt=0)
    """eps_V of the value loss; None does not clip."""

    dual_clip: float | None = Field(default=None, gt=1)
    """Bounds the loss of a token with negative advantage whose probability has grown (Ye et al. 2020,
    arXiv:1912.09729, equation 5; they take 3); None does not."""

    value_coef: float = Field(default=1.0, ge=0)
    """Weight of the value loss."""

    num_value_layers_unfrozen: int = Field(default=0, ge=0)
    """Top blocks that the value function has for itself, copied from the policy's; 0 shares them all."""

    whiten_rewards: bool = False
    """Scale per-token rewards, KL included, to standard deviation 1 without moving their mean."""

    kl: KLConfig = KLConfig()
    """Distance to the reference."""

    @model_validator(mode="after")
    def _kl_weight_stays_positive(self) -> PPOConfig:
        if self.kl.target is not None and self.kl.horizon < self.rollouts_per_step:
            raise ValueError(
                f"`kl.horizon` = {self.kl.horizon} is shorter than `rollouts_per_step` = "
                f"{self.rollouts_per_step}: one step could turn the weight negative; raise the horizon"
            )
        return self


class PPORunConfig(RunConfig):
    """Everything a PPO run is made from."""

    generation: GenerationConfig = GenerationConfig()
    eval_generation: EvalGenerationConfig = EvalGenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    shaping: ShapingConfig = ShapingConfig()
    ppo: PPOConfig = PPOConfig()


@dataclass(frozen=True)
class PPOBatch:
    """One step's samples, ready to train on. All but `sequences` are [B, R].

    loss_mask: True at response tokens of samples that have a reward. old_logprobs, old_values: of the policy
    that sampled. ref_logprobs: of the reference. advantages: whitened. returns: what values are regressed on.
    """

    sequences: Sequences
    loss_mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"]
    old_values: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"]


@dataclass(frozen=True)
class _Passes:
    """What the models say of rollouts before any reward is known; all tensors are [B, R]."""

    sequences: Sequences
    logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"]
    entropy: Float[Tensor, "B R"]


# --------------------------------------------------------------------------------------------- pure functions


# ---------------------------------------------------------------------------------------------------- trainer


class PPOTrainer:
    """PPO with the four verbs `rollout`, `score`, `experience`, `update`; `fit` is the loop over them.

    model: a loaded decoder with its tokenizer, instead of `config.model.path`.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    def __init__(
        self,
        config: PPORunConfig,
        *,
        reward: UserReward | Mapping[str, UserReward] | None = None,
        prompts: Sequence[str | Mapping[str, Any]],
        eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
        metric_fn: MetricFn | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_sampling(config.rollout)
        self.config = config
        self.engine = engine = Engine(config.train)
        all_prompts = [*prompts, *(eval_prompts or [])]
        self.source, self.tokenizer = opened_reward(engine, reward, config, all_prompts, tokenizer)
        self.scorer = Scorer(self.source, config.reward, engine.sum_int)
        lm = given_or_loaded_lm(model, config.model, engine.precision)
        check_vocabulary(lm, self.tokenizer)
        self._init_data(lm, prompts, eval_prompts)
        self.kl_controller = KLController(config.ppo.kl)
        self.shaper = RewardShaper(config.shaping, config.reward.weights, engine)
        self.policy_version = 0
        self._ahead: Ahead[_Passes] | None = None
        self._init_policy(lm)
        self.evaluator = Evaluator(
            engine,
            self.eval_prompts,
            self.variants,
            self._make_sampler,
            scorer=self.scorer,
            weights=config.reward.weights,
            metric_fn=metric_fn,
            default_repeats=config.train.eval_repeats,
        )
        self.run = start_run(self, self.policy)
        self.run_dir = self.run.folder

    def _init_data(self, lm: PreTrainedModel, prompts: Any, eval_prompts: Any) -> None:
        config, engine = self.config, self.engine
        made = sampled_prompts(config, self.tokenizer, lm, prompts, eval_prompts)
        self.prompts, self.eval_prompts, self.variants = made.train, made.evaluation, made.variants
        self.stream = IndexStream(len(self.prompts), config.train.seed, engine.rank, engine.num_ranks)
        total = config.ppo.rollouts_per_step
        self._rows = rows_per_process(
            engine, config.train, total, "ppo.rollouts_per_step", config.ppo.minibatches
        )

    def _init_policy(self, lm: PreTrainedModel) -> None:
        config, engine = self.config, self.engine
        choose_trainable(lm, config.model)
        lm.to(engine.device)  # pyright: ignore[reportArgumentType]
        self.layout = Layout(lm)
        value_layers = config.ppo.num_value_layers_unfrozen
        self.policy = PolicyWithValue(lm, num_value_layers=value_layers).to(engine.device)
        engine.prepare(
            self.policy,
            config.optimizer,
            config.scheduler,
            total_updates=config.train.total_steps * config.ppo.epochs * config.ppo.minibatches,
        )
        with engine.whole_weights():
            self.reference = build_reference(lm, config.model.num_layers_unfrozen)
        self._make_sampler = Samplers(
            config.rollout, engine, self.tokenizer, lambda: self.policy.lm, lambda: self.policy_version
        )
        self.sampler = self._make_sampler(config.generation)
        engine.seed_sampling()

    # ----------------------------------------------------------------------------------------- the four verbs

    @with_whole_weights
    def rollout(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample a completion per prompt; each one's reward is requested as soon as it has ended."""
        return self.scorer.submit_each(self.sampler, prompts)

    def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """Rewards of what `rollout` returned last.

        The last ones are still under way, so the passes that `experience` needs are made before waiting.

        Raises:
            RewardError, ConfigError: on all ranks together; see `Scorer.gather`.
        """
        self._ahead = Ahead(list(rollouts), self.policy_version, self._passes(rollouts))
        results = self.scorer.gather()
        assert len(results) == len(rollouts), "score() speaks of the last rollout() only"
        return results

    @with_whole_weights
    @torch.no_grad()
    def experience(self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]) -> PPOBatch:
        """Log-probs, values, token rewards and advantages; leaves statistics in `self.experience_metrics`."""
        config, reduce = self.config.ppo, self.engine.sum
        ahead, self._ahead = self._ahead, None
        passes = known_or_computed(ahead, rollouts, self.policy_version, self._passes)
        sequences, logprobs, ref_logprobs = passes.sequences, passes.logprobs, passes.ref_logprobs
        values, spread = passes.values, passes.entropy
        has_reward = torch.tensor([reward.ok for reward in rewards], device=self.engine.device)
        mask = sequences.response_mask & has_reward.unsqueeze(1)
        self._kl_coef = self.kl_controller.coef
        per_token = self.shaper.shape(rollouts, rewards, mask)
        if config.kl.placement == "reward":
            per_token = per_token - self._kl_coef * torch.where(
                mask, kl_estimate(logprobs, ref_logprobs, config.kl.estimator), torch.zeros_like(logprobs)
            )
        if config.whiten_rewards:
            per_token = whiten(per_token, mask, reduce, shift_mean=False)
        advantages, returns = gae(per_token, values, mask, config.gamma, config.lam)
        measured = mean_kl(logprobs, ref_logprobs, sequences.response_mask, reduce)
        alarm = self.config.rollout.logprob_gap_alarm
        self.experience_metrics = {
            **self.scorer.metrics(),
            **reward_metrics(rewards, self.config.reward.weights, self.shaper.objectives, reduce),
            **rollout_metrics(rollouts, sequences, reduce),
            "rollout/logprob_gap": logprob_gap(logprobs, sequences, reduce, alarm),
            "policy/entropy": float(masked_mean(spread, sequences.response_mask, reduce)),
            "policy/kl": measured,
            "policy/kl_coef": self._kl_coef,
            "value/mean": float(masked_mean(values, mask, reduce)),
            "value/explained_variance": explained_variance(values, returns, mask, reduce),
        }
        self.kl_controller.update(measured, config.rollouts_per_step)
        advantages = whiten(advantages, mask, reduce)
        return PPOBatch(sequences, mask, logprobs, ref_logprobs, values, advantages, returns)

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

    # ---------------------------------------------------------------------------------- parts of `experience`

    @with_whole_weights
    @torch.no_grad()
    def _passes(self, rollouts: Sequence[Rollout]) -> _Passes:
        sequences = collate(rollouts, self._pad_id, self.engine.device)
        return _Passes(sequences, *self._forward(sequences))

    def _forward(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs of policy and reference, values and entropies, each [B, R]."""
        columns: list[tuple[Tensor, ...]] = []
        size = self.config.ppo.forward_batch_size
        for rows in torch.arange(len(sequences.input_ids)).split(size):
            laid_out = self._laid_out(take_rows(sequences, rows))
            with evaluating(self.policy), self.engine.autocast():
                with self.reference.recording():
                    output = self.engine.module(*laid_out.inputs)
                reference_logits = self.reference.logits(*laid_out.inputs)
            ours, theirs = (self._logprobs(each, laid_out) for each in (output.logits, reference_logits))
            spread = entropy(output.logits, self.config.generation.temperature)
            columns.append((ours, theirs, *map(laid_out.of_samples, (output.values, spread))))
        logprobs, reference, values, spread = (torch.cat(column) for column in zip(*columns, strict=True))
        return logprobs, reference, values, spread

    def _laid_out(self, part: Sequences) -> Rows:
        return self.layout.rows(part.input_ids, part.attention_mask, part.num_response)

    def _logprobs(self, logits: Tensor, rows: Rows) -> Tensor:
        return rows.logprobs(logits, self.config.generation.temperature)

    # -------------------------------------------------------------------------------------- parts of `update`

    def _update_minibatch(self, batch: PPOBatch) -> tuple[Metrics, UpdateReport]:
        """One optimizer update; statistics are means over the minibatch's tokens on all ranks."""
        num_tokens = self.engine.sum(batch.loss_mask.sum()).clamp(min=1).float()
        return update_with_statistics(
            self.engine,
            len(batch.loss_mask),
            self.config.train.gradient_accumulation_steps,
            lambda rows: self._loss(take_rows(batch, rows), num_tokens),
        )

    def _loss(self, batch: PPOBatch, num_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of loss and statistics: sums over tokens / tokens of the minibatch."""
        config, mask, rows = self.config.ppo, batch.loss_mask, self._laid_out(batch.sequences)
        output = self.engine.module(*rows.inputs)
        logprobs, values = self._logprobs(output.logits, rows), rows.of_samples(output.values)
        terms, ratio, is_clipped = policy_loss_terms(
            logprobs, batch.old_logprobs, batch.advantages, config.clip_ratio, config.dual_clip
        )
        value_terms = value_loss_terms(values, batch.old_values, batch.returns, config.clip_value)

        def share(per_token: Tensor) -> Tensor:
            return masked_sum(per_token, mask) / num_tokens

        policy_loss, value_loss = share(terms), share(value_terms)
        loss = policy_loss + config.value_coef * value_loss
        if config.kl.placement == "loss":
            kl = kl_loss_terms(logprobs, batch.ref_logprobs, config.kl.estimator)
            loss = loss + self._kl_coef * share(kl)
        approx_kl = kl_estimate(batch.old_logprobs, logprobs.detach(), "k3")
        return loss, {
            "train/loss": loss,
            "train/policy_loss": policy_loss,
            "train/value_loss": value_loss,
            "train/ratio": share(ratio),
            "train/approx_kl": share(approx_kl),
            "train/clip_fraction": share(is_clipped.float()),
        }

    # ----------------------------------------------------------------------------------------------- the loop

    @property
    def default_best_metric(self) -> str:
        """The first metric of the user's `metric_fn`, else the reward."""
        return self.evaluator.gold_metric or "eval/reward"

    def state_dict(self) -> dict[str, Any]:
        """See `conch.training.loop.Trainer`."""
        return {
            "stream": self.stream.state_dict(),
            "kl_controller": self.kl_controller.state_dict(),
            "shaper": self.shaper.state_dict(),
            "policy_version": self.policy_version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.shaper.load_state_dict(state["shaper"])
        self.policy_version = state["policy_version"]

    def fit(self) -> Path:
        """Train for `train.total_steps` steps; returns the run folder."""
        return fit(self, "ppo")

    def step(self) -> Metrics:
        """One rollout with its updates."""
        seconds: dict[str, float] = {}
        prompts = [self.prompts[row] for row in self.stream.draw(self._rows)]
        with clocked(seconds, "time/rollout_s"):
            rollouts = self.rollout(prompts)
        with clocked(seconds, "time/score_s"):
            rewards = self.score(rollouts)
        with clocked(seconds, "time/experience_s"):
            batch = self.experience(rollouts, rewards)
        with clocked(seconds, "time/update_s"):
            if self.config.tracking.rollouts:
                mask = batch.sequences.response_mask
                kl = kl_of_each(batch.old_logprobs, batch.ref_logprobs, mask)
                log_rollouts(self.engine, self.run, rollouts, rewards, kl)
            metrics = {**self.experience_metrics, **self.update(batch)}
        tokens = self.config.ppo.rollouts_per_step * metrics["rollout/length_mean"]
        return {**metrics, **seconds, "time/tokens_per_s": tokens / sum(seconds.values())}

    @with_whole_weights
    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics:
        """Sample `repeats` (or `train.eval_repeats`) completions per evaluation prompt.

        Returns the mean reward, means of the user's metrics, and the KL to the start in nats per sample.
        """
        return self.evaluator.run(
            tracker, step, repeats=repeats, extra=lambda rollouts: {"eval/kl": self.kl_to_start(rollouts)}
        )

    @with_whole_weights
    @torch.no_grad()
    def kl_to_start(self, rollouts: Sequence[Rollout]) -> float:
        """KL(policy || starting policy) in nats per sample, estimated on `rollouts` of the current policy."""
        if not rollouts:  # a rank without prompts to evaluate; the others wait for its share of the mean
            nothing = torch.zeros(0, 1, device=self.engine.device)
            return mean_kl(nothing, nothing, nothing.bool(), self.engine.sum)
        passes = self._passes(rollouts)
        mask = passes.sequences.response_mask
        return mean_kl(passes.logprobs, passes.ref_logprobs, mask, self.engine.sum)

    @with_whole_weights
    def generate(self, prompts: Sequence[str], *, greedy: bool = False) -> list[str]:
        """Completions of the current policy."""
        config = self.config
        made = fitting_prompts(prompts, self.tokenizer, config.tokenizer, self.policy.lm, config.generation)
        chunks = self.sampler.generate(made, greedy=greedy)
        return [rollout.completion.text for chunk in chunks for rollout in chunk]

    @with_whole_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write the policy as a Hugging Face folder, the value head beside it. Call it on all ranks."""
        heads = self.policy.head_tensors()
        return save_on_main(
            self.engine, folder, self.policy.lm, self.tokenizer, self.config.model, heads=heads
        )

    def close(self) -> None:
        """Stop the reward client and the sampler, and leave the process group."""
        self.source.close()
        self._make_sampler.close()
        self.engine.close()

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.ppo key=value ...` with prompts from `data.train`."""
    config = load_run_config(PPORunConfig, argv, default_name="ppo")
    prompts = training_rows(config.data, "prompts", form=prompt_form)
    evaluated = evaluation_rows(config.data, form=prompt_form)
    with closing(PPOTrainer(config, prompts=prompts, eval_prompts=evaluated)) as trainer:
        trainer.fit()


if __name__ == "__main__":
    run_main(main)
