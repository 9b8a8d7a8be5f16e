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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.advantages import SMALLEST_SPREAD, group_advantages
from conch.cli import load_run_config, run_main
from conch.data.files import evaluation_rows, training_rows
from conch.data.formats import prompt_form
from conch.data.index_sampler import IndexStream
from conch.data.rollout_batch import Sequences, collate, take_rows
from conch.distributed.train_engine import Engine, UpdateReport
from conch.evaluation.evaluator import Evaluator, sampled_prompts
from conch.evaluation.metrics import MetricFn
from conch.losses import clipped_loss_terms, effective_share, policy_ratio, sampler_weights, token_weights
from conch.models.forward import Layout, Rows
from conch.models.freezing import choose_trainable
from conch.models.policy import Policy
from conch.models.reference import Reference, build_reference
from conch.ops import (
    entropy,
    kl_estimate,
    kl_loss_terms,
    masked_mean,
)
from conch.rewards.base import UserReward
from conch.rewards.scorer import Scorer, total_reward
from conch.rollouts.factory import Samplers, check_sampling
from conch.rollouts.prompts import fitting_prompts
from conch.runs.tracking import Tracker
from conch.trainers.grpo_batch import GRPOBatch, Passes, joined, kl_of_samples, kl_to_show
from conch.trainers.grpo_config import GRPORunConfig
from conch.training.kl import KLController, mean_kl
from conch.training.loop import fit
from conch.training.online import Ahead, known_or_computed
from conch.training.resume import start_run
from conch.training.reward_shaping import RewardShaper
from conch.training.setup import (
    check_vocabulary,
    evaluating,
    given_or_loaded_lm,
    opened_reward,
    rows_of_rank,
    rows_per_process,
    save_on_main,
    with_whole_weights,
)
from conch.training.statistics import (
    clocked,
    log_rollouts,
    logprob_gap,
    reward_metrics,
    rollout_metrics,
    update_with_statistics,
    updates_over,
    warn_of_gap,
)
from conch.types import Metrics, Prompt, RewardResult, Rollout


def overlong_penalties(
    rollouts: Sequence[Rollout], max_new_tokens: int, buffer: int, penalty: float
) -> Float[Tensor, " B"]:
    """0 up to `max_new_tokens - buffer` tokens, then growing linearly to `penalty` at `max_new_tokens`."""
    lengths = torch.tensor([len(rollout.completion.token_ids) for rollout in rollouts]).float()
    if buffer == 0:
        return torch.zeros_like(lengths)
    return penalty * ((lengths - (max_new_tokens - buffer)) / buffer).clamp(min=0, max=1)


def has_spread(rewards: Sequence[RewardResult], weights: Mapping[str, float]) -> bool:
    """Whether a group teaches anything: two of its rewards differ."""
    values = [total_reward(reward, weights) for reward in rewards if reward.ok]
    return len(values) > 1 and max(values) - min(values) > SMALLEST_SPREAD * (1 + max(map(abs, values)))


class GRPOTrainer:
    """GRPO with the four verbs `rollout`, `score`, `experience`, `update`; `fit` is the loop over them.

    model: a loaded decoder with its tokenizer, instead of `config.model.path`.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    def __init__(
        self,
        config: GRPORunConfig,
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
        self.kl_controller = KLController(config.grpo.kl)
        self.shaper = RewardShaper(config.shaping, config.reward.weights, engine)
        self.policy_version = 0
        self._ahead: Ahead[Passes] | None = None
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
        config, engine, grpo = self.config, self.engine, self.config.grpo
        made = sampled_prompts(config, self.tokenizer, lm, prompts, eval_prompts)
        self.prompts, self.eval_prompts, self.variants = made.train, made.evaluation, made.variants
        self.stream = IndexStream(len(self.prompts), config.train.seed, engine.rank, engine.num_ranks)
        self._num_prompts = rows_of_rank(
            grpo.prompts_per_step, "grpo.prompts_per_step", engine.num_ranks, 1, 1
        )
        total = grpo.prompts_per_step * grpo.group_size
        name = "grpo.prompts_per_step * group_size"
        self._rows = rows_per_process(engine, config.train, total, name, grpo.minibatches)

    def _init_policy(self, lm: PreTrainedModel) -> None:
        config, engine = self.config, self.engine
        choose_trainable(lm, config.model)
        lm.to(engine.device)  # pyright: ignore[reportArgumentType]
        self.layout = Layout(lm)
        self.policy = Policy(lm)
        engine.prepare(
            self.policy,
            config.optimizer,
            config.scheduler,
            total_updates=config.train.total_steps * config.grpo.epochs * config.grpo.minibatches,
        )
        self.reference: Reference | None = None
        if config.grpo.kl.coef > 0:
            with engine.whole_weights():
                self.reference = build_reference(lm, config.model.num_layers_unfrozen)
        # Without all of these the log-probs of the one update's own forward pass serve as the old ones, too.
        self._passes_first = (
            (
                self.reference is not None
                and (not self.reference.stands_alone or config.grpo.kl.placement == "reward")
            )
            or config.grpo.epochs * config.grpo.minibatches > 1
            or config.grpo.sampler_correction is not None
            or not config.model.disable_dropout
        )
        self._make_sampler = Samplers(
            config.rollout, engine, self.tokenizer, lambda: self.policy.lm, lambda: self.policy_version
        )
        self.sampler = self._make_sampler(config.generation)
        engine.seed_sampling()

    # ----------------------------------------------------------------------------------------- the four verbs

    @with_whole_weights
    def rollout(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample `group_size` completions per prompt, which stand together; each one's reward is requested as
        soon as it has ended."""
        repeated = [prompt for prompt in prompts for _ in range(self.config.grpo.group_size)]
        return self.scorer.submit_each(self.sampler, repeated)

    def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """Rewards of what `rollout` returned last.

        The last ones are still under way, so the passes that `experience` needs are made before waiting;
        unless some of the rollouts may be replaced.

        Raises:
            RewardError, ConfigError: on all ranks together; see `Scorer.gather`.
        """
        if self.config.grpo.max_draws == 1:
            self._ahead = Ahead(list(rollouts), self.policy_version, self._passes(rollouts))
        results = self.scorer.gather()
        assert len(results) == len(rollouts), "score() speaks of the last rollout() only"
        return results

    @with_whole_weights
    @torch.no_grad()
    def experience(self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]) -> GRPOBatch:
        """Log-probs and advantages; leaves statistics in `self.experience_metrics`.

        rollouts: whole groups, as `rollout` returns them.
        """
        config = self.config.grpo
        ahead, self._ahead = self._ahead, None
        passes = known_or_computed(ahead, rollouts, self.policy_version, self._passes)
        sequences = passes.sequences
        is_scored = torch.tensor([reward.ok for reward in rewards], device=self.engine.device)
        # An empty response has no token to learn from, nor one that its reward could stand at.
        valid = is_scored & sequences.response_mask.any(dim=1)
        mask = sequences.response_mask & valid.unsqueeze(1)
        self._kl_coef = self.kl_controller.coef
        totals = self._totals(rollouts, rewards, passes, mask)
        advantages = group_advantages(totals, valid, config.group_size, config.advantage_kind)
        correction = None
        if config.sampler_correction is not None:
            assert passes.logprobs is not None
            correction = sampler_weights(
                passes.logprobs, sequences.sampling_logprobs, config.sampler_correction
            )
        batch = GRPOBatch(sequences, mask, passes.logprobs, passes.ref_logprobs, advantages, correction)
        self.experience_metrics = {
            **self.scorer.metrics(),
            **reward_metrics(rewards, self.config.reward.weights, self.shaper.objectives, self.engine.sum),
            **rollout_metrics(rollouts, sequences, self.engine.sum),
            **self._statistics(batch, passes, valid),
        }
        return batch

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
            warn_of_gap(metrics["rollout/logprob_gap"], self.config.rollout.logprob_gap_alarm)
            if "policy/kl" in metrics:
                self._note_kl(metrics["policy/kl"])
                metrics["policy/kl_coef"] = self._kl_coef
        self.policy_version += 1
        return metrics

    # ---------------------------------------------------------------------------------- parts of `experience`

    @with_whole_weights
    @torch.no_grad()
    def _passes(self, rollouts: Sequence[Rollout]) -> Passes:
        return self._asked(rollouts, policy_too=self._passes_first)

    def _asked(self, rollouts: Sequence[Rollout], *, policy_too: bool) -> Passes:
        sequences = collate(rollouts, self._pad_id, self.engine.device)
        if not policy_too and self.reference is None:
            return Passes(sequences)
        columns: list[tuple[Tensor | None, ...]] = []
        for rows in torch.arange(len(sequences.input_ids)).split(self.config.grpo.forward_batch_size):
            with evaluating(self.policy), self.engine.autocast():
                columns.append(self._forward(take_rows(sequences, rows), policy_too))
        return Passes(sequences, *(joined(column) for column in zip(*columns, strict=True)))

    def _forward(
        self, part: Sequences, policy_too: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs of policy and reference, and entropies."""
        rows, theirs = self._laid_out(part), None
        if not policy_too:
            assert self.reference is not None
            return None, self._logprobs(self.reference.logits(*rows.inputs), rows), None
        with nullcontext() if self.reference is None else self.reference.recording():
            logits = self.engine.module(*rows.inputs)
        if self.reference is not None:
            theirs = self._logprobs(self.reference.logits(*rows.inputs), rows)
        return self._logprobs(logits, rows), theirs, self._entropy(logits, rows)

    def _laid_out(self, part: Sequences) -> Rows:
        return self.layout.rows(part.input_ids, part.attention_mask, part.num_response)

    def _logprobs(self, logits: Tensor, rows: Rows) -> Tensor:
        return rows.logprobs(logits, self.config.generation.temperature)

    @torch.no_grad()
    def _entropy(self, logits: Tensor, rows: Rows) -> Tensor:
        return rows.of_samples(entropy(logits, self.config.generation.temperature))

    def _totals(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[RewardResult],
        passes: Passes,
        mask: Bool[Tensor, "B R"],
    ) -> Float[Tensor, " B"]:
        """What completions are compared by: shaped rewards less penalties, 0 where there is none."""
        config, longest = self.config.grpo, self.config.generation.max_new_tokens
        totals = self.shaper.shape(rollouts, rewards, mask).sum(dim=1)
        penalties = overlong_penalties(rollouts, longest, config.overlong_buffer, config.overlong_penalty)
        totals = totals - penalties.to(totals.device)
        if passes.ref_logprobs is None or config.kl.placement == "loss":
            return totals
        assert passes.logprobs is not None
        kl = kl_estimate(passes.logprobs, passes.ref_logprobs, config.kl.estimator)
        return totals - self._kl_coef * torch.where(mask, kl, torch.zeros_like(kl)).sum(dim=1)

    def _statistics(self, batch: GRPOBatch, passes: Passes, valid: Bool[Tensor, " B"]) -> Metrics:
        """Of advantages, distances and weights, over all ranks."""
        config, reduce, mask = self.config.grpo, self.engine.sum, passes.sequences.response_mask
        is_flat = ~(batch.advantages != 0).reshape(-1, config.group_size).any(dim=1)
        metrics = {
            "grpo/advantage_std": float(masked_mean(batch.advantages**2, valid, reduce)) ** 0.5,
            "grpo/flat_fraction": float(masked_mean(is_flat.float(), torch.ones_like(is_flat), reduce)),
        }
        if passes.logprobs is None or passes.entropy is None:
            return metrics
        alarm = self.config.rollout.logprob_gap_alarm
        metrics |= {
            "policy/entropy": float(masked_mean(passes.entropy, mask, reduce)),
            "rollout/logprob_gap": logprob_gap(passes.logprobs, passes.sequences, reduce, alarm),
        }
        if passes.ref_logprobs is not None:
            measured = mean_kl(passes.logprobs, passes.ref_logprobs, mask, reduce)
            self._note_kl(measured)
            metrics |= {"policy/kl": measured, "policy/kl_coef": self._kl_coef}
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
            "rollout/effective_share": effective_share(*moments),
        }

    # -------------------------------------------------------------------------------------- parts of `update`

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
        return {**means, "train/effective_share": effective_share(means["train/ratio"], squares)}, report

    def _loss(self, batch: GRPOBatch, weights: Tensor, shares: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss, and its parts of means over tokens."""
        config, mask, rows = self.config.grpo, batch.loss_mask, self._laid_out(batch.sequences)
        logits = self.engine.module(*rows.inputs)
        logprobs = self._logprobs(logits, rows)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        ratio = policy_ratio(logprobs, old_logprobs, mask, config.loss)
        terms, is_clipped = clipped_loss_terms(ratio, batch.advantages, config.clip_low, config.clip_high)

        def weighed(values: Tensor, by: Tensor) -> Tensor:
            return torch.where(mask, values * by, torch.zeros_like(values)).sum()

        loss = weighed(terms if batch.correction is None else terms * batch.correction, weights)
        columns = {"train/policy_loss": loss}
        if batch.ref_logprobs is not None and config.kl.placement == "loss":
            kl = weighed(kl_loss_terms(logprobs, batch.ref_logprobs, config.kl.estimator), weights)
            loss = loss + self._kl_coef * kl
            columns["train/kl_loss"] = kl
        if batch.old_logprobs is None:
            gap = (logprobs.detach() - batch.sequences.sampling_logprobs).abs()
            columns["policy/entropy"] = weighed(self._entropy(logits, rows), shares)
            columns["rollout/logprob_gap"] = weighed(gap, shares)
            if batch.ref_logprobs is not None:
                of_each = kl_of_samples(batch, logprobs.detach())
                columns["policy/kl"] = of_each.sum() / (config.prompts_per_step * config.group_size)
        approx_kl = kl_estimate(old_logprobs, logprobs.detach(), "k3")
        return loss, {
            "train/loss": loss,
            **columns,
            "train/ratio": weighed(ratio, shares),
            "train/ratio_squared": weighed(ratio**2, shares),
            "train/approx_kl": weighed(approx_kl, shares),
            "train/clip_fraction": weighed(is_clipped.float(), shares),
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
        return fit(self, "grpo")

    def step(self) -> Metrics:
        """One rollout with its updates."""
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        rollouts, rewards, draws = self._draw(seconds)
        with clocked(seconds, "time/experience_s"):
            batch = self.experience(rollouts, rewards)
        if self.config.tracking.rollouts:
            log_rollouts(self.engine, self.run, rollouts, rewards, kl_to_show(batch, self.config.generation))
        with clocked(seconds, "time/update_s"):
            metrics = {**self.experience_metrics, **self.update(batch), "grpo/draws": float(draws)}
        config = self.config.grpo
        tokens = config.prompts_per_step * config.group_size * metrics["rollout/length_mean"]
        return {**metrics, **seconds, "time/tokens_per_s": tokens / (time.perf_counter() - started)}

    def _draw(self, seconds: dict[str, float]) -> tuple[list[Rollout], list[RewardResult], int]:
        """A step's groups, those without spread replaced as far as `max_draws` allows; and the draws it took.

        All ranks draw equally often, and each keeps the groups that it sampled.
        """
        kept: list[tuple[list[Rollout], list[RewardResult]]] = []
        flat: list[tuple[list[Rollout], list[RewardResult]]] = []
        draws = 0
        while draws < self.config.grpo.max_draws:
            draws += 1
            prompts = [self.prompts[row] for row in self.stream.draw(self._num_prompts)]
            with clocked(seconds, "time/rollout_s"):
                rollouts = self.rollout(prompts)
            with clocked(seconds, "time/score_s"):
                rewards = self.score(rollouts)
            if self.config.grpo.max_draws == 1:
                return rollouts, rewards, draws
            for group in self._groups(rollouts, rewards):
                (kept if has_spread(group[1], self.config.reward.weights) else flat).append(group)
            if not self.engine.sum_int(max(0, self._num_prompts - len(kept))):
                break
        chosen = [*kept, *flat][: self._num_prompts]
        rollouts = [rollout for group, _ in chosen for rollout in group]
        return rollouts, [reward for _, group in chosen for reward in group], draws

    def _groups(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]
    ) -> Iterator[tuple[list[Rollout], list[RewardResult]]]:
        size = self.config.grpo.group_size
        for first in range(0, len(rollouts), size):
            yield list(rollouts[first : first + size]), list(rewards[first : first + size])

    @with_whole_weights
    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics:
        """Sample `repeats` (or `train.eval_repeats`) completions per evaluation prompt.

        Returns the mean reward, means of the user's metrics, and, where there is a reference, the KL to the
        start in nats per sample.
        """
        extra = None if self.reference is None else lambda rollouts: {"eval/kl": self.kl_to_start(rollouts)}
        return self.evaluator.run(tracker, step, repeats=repeats, extra=extra)

    @with_whole_weights
    @torch.no_grad()
    def kl_to_start(self, rollouts: Sequence[Rollout]) -> float:
        """KL(policy || starting policy) in nats per sample, estimated on `rollouts` of the current policy."""
        assert self.reference is not None, "`kl.coef=0` keeps no reference"
        if not rollouts:  # a rank without prompts to evaluate; the others wait for its share of the mean
            nothing = torch.zeros(0, 1, device=self.engine.device)
            return mean_kl(nothing, nothing, nothing.bool(), self.engine.sum)
        passes = self._asked(rollouts, policy_too=True)
        assert passes.logprobs is not None and passes.ref_logprobs is not None
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
        """Write the policy as a Hugging Face folder. Call it on all ranks."""
        return save_on_main(self.engine, folder, self.policy.lm, self.tokenizer, self.config.model)

    def close(self) -> None:
        """Stop the reward client and the sampler, and leave the process group."""
        self.source.close()
        self._make_sampler.close()
        self.engine.close()

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.grpo key=value ...` with prompts from `data.train`."""
    config = load_run_config(GRPORunConfig, argv, default_name="grpo")
    prompts = training_rows(config.data, "prompts", form=prompt_form)
    evaluated = evaluation_rows(config.data, form=prompt_form)
    with closing(GRPOTrainer(config, prompts=prompts, eval_prompts=evaluated)) as trainer:
        trainer.fit()


if __name__ == "__main__":
    run_main(main)
