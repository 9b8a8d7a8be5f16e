"""Implicit language Q-learning: learn from rewarded samples what each token is worth, and decode by it.

A sample has actions a_1 .. a_n, the tokens of its outputs, chosen in states s_1 .. s_n, all tokens before
them; r_t = 0 but for r_n, the sample's reward (Snell et al. 2022, arXiv:2206.11871, section 4; expectile
regression from Kostrikov et al. 2021, arXiv:2110.06169, equation 5):

    Qhat(s, a) = min_i Qhat_i(s, a),   Qhat_i <- (1 - alpha) Qhat_i + alpha Q_i   every k updates
    L_Q    = sum_i mean_t (r_t + gamma * V(s_{t+1}) - Q_i(s_t, a_t))^2,   V(s_{n+1}) = 0
    L_V    = mean_t |tau - 1[u_t < 0]| * u_t^2,   u_t = Qhat(s_t, a_t) - V(s_t)
    L_CQL  = sum_i mean_t (log sum_a exp Q_i(s_t, a) - Q_i(s_t, a_t))
    L_AWAC = - mean_t exp(eta * u_t) * log pi(a_t | s_t),   behaviour cloning with eta = 0
    L      = c_Q * L_Q + c_V * L_V + c_CQL * L_CQL + c_AWAC * L_AWAC
    decode: softmax over a of log pi(a | s) + beta * (Qhat(s, a) - V(s))

No gradient flows through r_t + gamma * V(s_{t+1}), Qhat and exp(eta * u_t); that of all terms flows into the
one trunk which pi, Q and V share. Where this differs from the paper and from common code: pi is the language
model of that same trunk, not a second network; s_{t+1} is the state of the next action, so that an output's
last token is followed by the state after the next prompt; means run over the actions of all ranks at once;
heads start at zero, where decoding at any beta is that of the language model; exp(eta * u_t) is bounded by
100, as Kostrikov et al. do.

Legend: B samples, R response tokens, V vocabulary.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("ilql")

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import (
    load,
)
from conch.config.algorithms.ilql import ILQLConfig as ILQLConfig
from conch.config.algorithms.ilql import ILQLEvalGenerationConfig as ILQLEvalGenerationConfig
from conch.config.algorithms.ilql import ILQLGenerationConfig as ILQLGenerationConfig
from conch.config.algorithms.ilql import ILQLRunConfig as ILQLRunConfig
from conch.data.files import Rows, evaluation_rows, like_rows, rows_at, training_rows
from conch.data.formats import fitting, listed, prompt_form, rewarded_form
from conch.data.index_sampler import IndexStream, digest_of
from conch.data.multi_turn import cut_turns, tokenize_turns
from conch.data.rollout_batch import take_rows
from conch.data.samples import TokenBatch, TokenizedSample, collate
from conch.distributed.train_engine import TrainEngine
from conch.errors import DataError
from conch.evaluation.evaluator import Evaluator, eval_variants, longest_generation
from conch.evaluation.metrics import MetricFn
from conch.evaluation.watch import Evaluation
from conch.models.freezing import freeze_layers
from conch.models.ilql import DECODING_FILE, ILQLOutput, ILQLPolicy
from conch.models.loading import context_window
from conch.ops import logprobs_of_labels, masked_sum
from conch.rewards.base import UserReward, sources_closed_on_failure
from conch.rewards.scorer import RewardScorer
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.prompts import tokenize_prompts
from conch.rollouts.stopping import StopCondition, with_end_ids
from conch.runs.tracking import Tracker
from conch.training import train
from conch.training.loop import fit
from conch.training.resume import start_run
from conch.training.setup import (
    check_gold,
    check_prompts,
    check_vocabulary,
    check_watching,
    eval_source,
    load_policy,
    load_policy_tokenizer,
    rows_per_process,
    save_on_main,
    text_codec,
    try_policy,
    watching_sources,
    with_gathered_weights,
)
from conch.training.statistics import update_metrics, update_with_statistics
from conch.types import Metrics

Sample = str | Sequence[str]

_LARGEST_WEIGHT = 100.0
"""Bound of exp(eta * u_t)."""


@dataclass(frozen=True)
class ILQLBatch:
    """One batch of dialogues with their rewards.

    turns: samples.
    rewards: [B], each earned by its sample's last action.
    """

    turns: TokenBatch
    rewards: Float[Tensor, " B"]


# --------------------------------------------------------------------------------------------- pure functions


def q_targets(
    values: Float[Tensor, "B R"], rewards: Float[Tensor, " B"], mask: Bool[Tensor, "B R"], gamma: float
) -> Float[Tensor, "B R"]:
    """What Q is regressed on at actions: gamma times the value at the next action of the row, and at its last
    action the reward. Without gradient.

    mask: True at actions; at least one in each row.
    """
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    beyond = torch.full_like(columns, mask.shape[1])
    at_or_after = torch.where(mask, columns, beyond).flip(1).cummin(dim=1).values.flip(1)
    following = torch.cat([at_or_after[:, 1:], beyond[:, :1]], dim=1)
    padded = torch.cat([values.detach(), torch.zeros_like(values[:, :1])], dim=1)
    is_last = mask & (following == mask.shape[1])
    return gamma * padded.gather(1, following) + is_last * rewards.unsqueeze(1)


def expectile_terms(difference: Float[Tensor, "B R"], tau: float) -> Float[Tensor, "B R"]:
    """Squared differences, those below 0 weighted by 1 - tau and the others by tau."""
    weight = (tau - (difference < 0).to(difference.dtype)).abs()
    return weight * difference**2


def ilql_loss_terms(
    output: ILQLOutput,
    actions: Int[Tensor, "B R"],
    rewards: Float[Tensor, " B"],
    mask: Bool[Tensor, "B R"],
    config: ILQLConfig,
) -> dict[str, Float[Tensor, "B R"]]:
    """Per-token q_loss, v_loss, cql_loss and awac_loss, not weighted; what stands outside of `mask` means
    nothing. See the equations above."""
    targets = q_targets(output.values, rewards, mask, config.gamma)
    chosen = [q.gather(-1, actions.unsqueeze(-1)).squeeze(-1) for q in output.qs]
    advantages = output.target_q - output.values
    weight = (config.awac_beta * advantages.detach()).exp().clamp(max=_LARGEST_WEIGHT)
    return {
        "q_loss": torch.stack([(targets - q) ** 2 for q in chosen]).sum(dim=0),
        "v_loss": expectile_terms(advantages, config.tau),
        # log sum exp Q - Q(a) is the cross-entropy of Q taken for logits
        "cql_loss": -torch.stack([logprobs_of_labels(q, actions) for q in output.qs]).sum(dim=0),
        "awac_loss": -weight * logprobs_of_labels(output.logits, actions),
    }


def checked_rewards(rewards: Sequence[Any], num_samples: int, *, normalise: bool) -> list[float]:
    """One finite number per sample; with `normalise` their mean is 0 and their standard deviation (biased) 1.

    Rewards that are all equal become 0.

    Raises:
        DataError: there are more or fewer than samples, or one is no finite number.
    """
    if len(rewards) != num_samples:
        raise DataError(f"{len(rewards)} rewards for {num_samples} samples: give one reward per sample")
    try:
        values = np.asarray([float(reward) for reward in rewards])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"`rewards` holds something that is no number ({error}): give one per sample"
        ) from None
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise DataError(f"the reward of sample {broken[0]} is {values[broken[0]]}, not a finite number")
    if not normalise:
        return values.tolist()
    centred = values - values.mean()
    return (centred / max(float(centred.std()), 1e-8)).tolist()


# ---------------------------------------------------------------------------------------------------- trainer


class ILQLTrainer:
    """ILQL with the verbs `experience` (samples and rewards to a batch) and `update`.

    samples: strings (all tokens after the first are actions) or lists of turns [prompt, output, prompt, ...]
        (the outputs' tokens are).
    rewards: one per sample.
    eval_prompts: completed and measured in evaluations, by `metric_fn`, `reward` and `gold` where they are
        given.
    model: a loaded model with its tokenizer, instead of `config.model.path`.
    logit_mask: [V, V], True at [i, j] forbids token j right after token i in decoding.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    @sources_closed_on_failure()
    def __init__(
        self,
        config: ILQLRunConfig,
        *,
        samples: Sequence[Sample],
        rewards: Sequence[float],
        eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
        reward: UserReward | Mapping[str, UserReward] | None = None,
        gold: UserReward | None = None,
        metric_fn: MetricFn | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        logit_mask: Bool[Tensor, "V V"] | None = None,
    ) -> None:
        self.config = config
        self.engine = engine = TrainEngine(config.train)
        self.collectives = self.engine.collectives
        check_gold(config, reward, gold)
        if model is None:
            engine.check_weights(config.model)
        eval_prompts = listed(eval_prompts or [], "evaluation prompts", config.data)
        self.source = eval_source(self.collectives, reward, config.reward, eval_prompts, config.train)
        self.watching = watching_sources(self.collectives, config, eval_prompts, gold)
        self.tokenizer = load_policy_tokenizer(tokenizer, config.tokenizer, config.model.path)
        lm = load_policy(model, config.model, engine.precision)
        check_vocabulary(lm, self.tokenizer)
        self.codec = text_codec(self.tokenizer, lm, config.tokenizer)
        self._init_data(lm, samples, rewards)
        self.variants = eval_variants(config.generation, config.eval_generation)
        longest = longest_generation(self.variants)
        self.eval_prompts = (
            tokenize_prompts(eval_prompts, self.codec, config.tokenizer, lm, longest) if eval_prompts else []
        )
        check_prompts(self.collectives, self.source, self.eval_prompts, self.tokenizer)
        check_watching(self.collectives, self.watching, self.eval_prompts, self.tokenizer)
        self._init_policy(lm, logit_mask)
        agree = self.collectives.all_reduce_int
        self.scorer = RewardScorer(self.source, config.reward, agree) if self.source else None
        self.evaluator = Evaluator(
            self.collectives,
            self.eval_prompts,
            self.variants,
            self._make_sampler,
            config.train,
            scorer=self.scorer,
            metric_fn=metric_fn,
            watching=self.watching,
            keep=config.evaluation.keep,
        )
        self.run = start_run(self, self.policy)
        self.run_dir = self.run.folder

    def _init_data(self, lm: PreTrainedModel, samples: Any, rewards: Any) -> None:
        config, ranks = self.config, self.collectives
        side, window = config.tokenizer.truncation_side, context_window(lm.config)
        samples = listed(samples, "samples")
        tokenized, taken = tokenize_turns(samples, self.codec)
        checked = checked_rewards(rewards, len(samples), normalise=False)
        checked = [checked[row] for row in taken]
        fits = fitting([len(sample.token_ids) for sample in tokenized], config.data, "samples")
        self.samples, left = [tokenized[row] for row in fits], [checked[row] for row in fits]
        if window is not None:
            named = like_rows(rows_at(samples, [taken[row] for row in fits], "sample"), self.samples)
            self.samples, kept = cut_turns(named, window, side)
            left = [left[row] for row in kept]
        self.rewards = checked_rewards(left, len(left), normalise=config.ilql.normalise_rewards)
        digest = digest_of(samples, checked)
        self.stream = IndexStream(len(self.samples), config.train.seed, ranks.rank, ranks.num_ranks, digest)
        self._rows = rows_per_process(ranks, config.train, config.ilql.batch_size, "ilql.batch_size")

    def _init_policy(self, lm: PreTrainedModel, logit_mask: Tensor | None) -> None:
        config, engine = self.config, self.engine
        freeze_layers(lm, config.model)
        ends = StopCondition(self.tokenizer, with_end_ids(config.generation, lm, self.tokenizer))
        lm.to(engine.device)  # pyright: ignore[reportArgumentType]
        try_policy(lm, self.codec, config.model, config.generation)
        self.policy = ILQLPolicy(
            lm,
            num_q_heads=config.ilql.num_q_heads,
            logit_mask=logit_mask,
            decoding={
                **config.generation.model_dump(include={"beta", *_DECODING}),
                "eos_token_id": sorted(ends.end_ids),
                "pad_token_id": self.tokenizer.pad_token_id,
            },
        ).to(engine.device)
        engine.prepare(
            self.policy, config.optimizer, config.scheduler, total_updates=config.train.total_steps
        )
        engine.seed_sampling()
        self.policy_version = 0

    def _make_sampler(self, generation: ILQLGenerationConfig) -> HFEngine:
        return HFEngine(
            lambda: self.policy.lm,
            self.tokenizer,
            generation,
            version=lambda: self.policy_version,
            autocast=self.engine.autocast,
            processors=partial(self.policy.shaping, generation.beta),
        )

    # ------------------------------------------------------------------------------------------ the two verbs

    def experience(self, samples: Sequence[TokenizedSample], rewards: Sequence[float]) -> ILQLBatch:
        """Pad samples into a batch with their rewards, as `self.samples` and `self.rewards` hold them."""
        pad_id = int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        device = self.engine.device
        return ILQLBatch(collate(samples, pad_id, device), torch.tensor(rewards, device=device))

    def update(self, batch: ILQLBatch) -> Metrics:
        """One optimizer update, and a move of the targets where it is due; statistics are means over the
        actions of all ranks."""
        config = self.config.ilql
        num_actions = self.collectives.all_reduce(batch.turns.loss_mask.sum()).clamp(min=1).float()
        means, report = update_with_statistics(
            self.engine,
            len(batch.rewards),
            self.config.train.gradient_accumulation_steps,
            lambda rows: self._loss(take_rows(batch, rows), num_actions),
        )
        self.policy_version += 1
        if self.policy_version % config.steps_for_target_q_sync == 0:
            with self.engine.writable_weights(self.policy.q_heads, self.policy.target_q_heads):
                self.policy.sync_targets(config.alpha)
        return {
            "train/loss": report.loss,
            **{f"train/{name}": mean for name, mean in means.items()},
            **update_metrics([report]),
            "train/epoch": self.stream.epoch,
        }

    def _loss(self, batch: ILQLBatch, num_actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of loss and statistics: sums over actions / actions of the batch."""
        config, turns = self.config.ilql, batch.turns
        output = self.engine.module(turns.input_ids, turns.attention_mask, turns.num_response)
        actions, mask = turns.response_ids, turns.loss_mask

        def share(per_token: Tensor) -> Tensor:
            return masked_sum(per_token, mask) / num_actions

        terms = ilql_loss_terms(output, actions, batch.rewards, mask, config)
        parts = {name: share(term) for name, term in terms.items()}
        # A weight of 0 still multiplies: DDP wants every parameter in the graph.
        loss = config.q_coef * parts["q_loss"] + config.v_coef * parts["v_loss"]
        loss = loss + config.cql_scale * parts["cql_loss"] + config.awac_scale * parts["awac_loss"]
        mean_q = torch.stack(output.qs).detach().mean(dim=0).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return loss, {
            **parts,
            "q_mean": share(mean_q),
            "v_mean": share(output.values),
            "advantage": share(output.target_q - output.values),
        }

    # ----------------------------------------------------------------------------------------------- the loop

    def step(self) -> Metrics:
        """Draw a batch and train on it."""
        rows = self.stream.draw(self._rows)
        return self.update(
            self.experience([self.samples[row] for row in rows], [self.rewards[row] for row in rows])
        )

    @with_gathered_weights
    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics:
        """Sample `repeats` (or `train.eval_repeats`) completions per evaluation prompt, for each value of a
        swept generation argument; nothing without prompts.

        Returns the means of the reward and of the user's metrics.
        """
        return self.evaluator.run(tracker, step, repeats=repeats) if self.eval_prompts else {}

    @property
    def default_best_metric(self) -> str:
        """Gold where it is measured, else the first metric of the user's `metric_fn`, else the reward."""
        return self.evaluator.best_metric or "eval/reward"

    @property
    def evaluation(self) -> Evaluation | None:
        """What the latest evaluation measured, sample by sample; None without prompts to evaluate on."""
        return self.evaluator.latest

    def fit(self) -> Path:
        """Train for `train.total_steps` optimizer updates; returns the run folder."""
        return fit(self, "ilql")

    @with_gathered_weights
    def generate(
        self, prompts: Sequence[str], *, greedy: bool = False, beta: float | None = None
    ) -> list[str]:
        """Completions of the current policy. beta: None takes that of `generation`."""
        generation = self.config.generation
        if beta is not None:
            generation = load(ILQLGenerationConfig, {**generation.model_dump(), "beta": beta})
        tokenized = tokenize_prompts(prompts, self.codec, self.config.tokenizer, self.policy.lm, generation)
        chunks = self._make_sampler(generation).generate(tokenized, greedy=greedy)
        return [rollout.completion.text for chunk in chunks for rollout in chunk]

    @with_gathered_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write a Hugging Face folder with the heads beside it, for `ILQLPolicy.from_pretrained`. Call it on
        all ranks."""
        return save_on_main(
            self.collectives,
            folder,
            self.policy.lm,
            self.tokenizer,
            self.config.model,
            heads=self.policy.head_tensors(),
            extra={DECODING_FILE: self.policy.settings()},
        )

    def state_dict(self) -> dict[str, Any]:
        """See `conch.training.loop.Trainer`."""
        return {"stream": self.stream.state_dict(), "policy_version": self.policy_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])
        self.policy_version = state["policy_version"]

    def close(self) -> None:
        """Stop the reward client and leave the process group."""
        if self.source is not None:
            self.source.close()
        self.evaluator.close()
        self.engine.close()


_DECODING = ("max_new_tokens", "temperature", "top_k", "top_p")
"""Settings of `generation` that are saved with the model, beside `beta`."""


def run(config: ILQLRunConfig) -> None:
    """Train with rewarded samples or preferences from `data.train`, and prompts from `data.eval`."""
    rows = training_rows(config.data, "samples", form=rewarded_form)
    pairs = [pair for row in rows for pair in row]
    places = [place for row, place in zip(rows, rows.places, strict=True) for _ in row]
    with closing(
        ILQLTrainer(
            config,
            samples=Rows([sample for sample, _ in pairs], places),
            rewards=[reward for _, reward in pairs],
            eval_prompts=evaluation_rows(config.data, form=prompt_form),
        )
    ) as trainer:
        trainer.fit()


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.ilql key=value ...`."""
    train("ilql", argv)
