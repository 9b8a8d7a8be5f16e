"""What trainers share that sample completions and learn from their rewards (PPO, GRPO, RFT).

An algorithm writes `setup`, `step` and what is its own; a step reads as

    rollouts = self.rollout(self.next_prompts())       rewards are requested as completions end
    outputs = self.compute_logprobs(rollouts)          while the last rewards are under way
    rewards = self.score(rollouts)                     waits; all ranks agree on failures
    batch, metrics = self.make_batch(rollouts, rewards, outputs)
    self.update(batch)

Legend: B rollouts, R response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.data.index_sampler import IndexStream
from conch.distributed.train_engine import TrainEngine
from conch.evaluation.evaluator import Evaluator, sampled_prompts
from conch.evaluation.metrics import MetricFn
from conch.models.freezing import freeze_layers
from conch.models.reference import Reference
from conch.rewards.base import UserReward
from conch.rewards.scorer import RewardScorer
from conch.rollouts.factory import RolloutEngineFactory, check_sampling
from conch.rollouts.prompts import tokenize_prompts
from conch.runs.tracking import Tracker
from conch.training.kl import mean_kl
from conch.training.loop import fit
from conch.training.resume import start_run
from conch.training.setup import (
    check_vocabulary,
    load_policy,
    open_reward,
    save_on_main,
    with_whole_weights,
)
from conch.types import Metrics, Prompt, RewardResult, Rollout


class Stateful(Protocol):
    """Something that a resumed run takes up."""

    def state_dict(self) -> Any:
        """JSON values, the same on all ranks."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Go on where `state_dict` was taken."""
        ...


class OnlineTrainer(ABC):
    """A policy, a sampler, a reward source and a data position; `fit` is the loop over `step`.

    config: the run config of the algorithm.
    reward: a function, an address, a source, or several by name; None takes what the config names.
    prompts, eval_prompts: texts, or mappings with "prompt" whose other keys are metadata of the reward.
    metric_fn: further measures of evaluation completions.
    model: a loaded model with its tokenizer, instead of `config.model.path`.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    name: ClassVar[str]
    """Of the algorithm, as its config section is called."""

    reference: Reference | None
    """The policy as it was at the start; None where the algorithm keeps none."""

    stream: IndexStream
    """Which prompts come next; made by `plan_batches`."""

    def __init__(
        self,
        config: Any,
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
        self.engine = engine = TrainEngine(config.train)
        all_prompts = [*prompts, *(eval_prompts or [])]
        self.source, self.tokenizer = open_reward(engine, reward, config, all_prompts, tokenizer)
        self.scorer = RewardScorer(self.source, config.reward, engine.sum_int)
        self.lm = lm = load_policy(model, config.model, engine.precision)
        check_vocabulary(lm, self.tokenizer)
        found = sampled_prompts(config, self.tokenizer, lm, prompts, eval_prompts)
        self.prompts, self.eval_prompts, self.variants = found.train, found.evaluation, found.variants
        self.policy_version = 0
        self.plan_batches()
        self.stateful: dict[str, Stateful] = {"stream": self.stream}
        freeze_layers(lm, config.model)
        lm.to(engine.device)  # pyright: ignore[reportArgumentType]
        module = self.setup()
        total_updates = config.train.total_steps * self.updates_per_step
        engine.prepare(module, config.optimizer, config.scheduler, total_updates=total_updates)
        with engine.whole_weights():
            self.reference = self.make_reference()
        self._make_sampler = RolloutEngineFactory(
            config.rollout, engine, self.tokenizer, lambda: self.lm, lambda: self.policy_version
        )
        self.sampler = self._make_sampler(config.generation)
        engine.seed_sampling()
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
        self.run = start_run(self, self.checkpointed)
        self.run_dir = self.run.folder

    # ---------------------------------------------------------------------- what an algorithm says of itself

    @abstractmethod
    def plan_batches(self) -> None:
        """Set `stream` and the number of rows per process and minibatch.

        Raises:
            ConfigError: batches do not divide among processes.
        """

    @abstractmethod
    def setup(self) -> nn.Module:
        """Make the trained module around `lm`, which is on its device, and add to `stateful`."""

    @property
    @abstractmethod
    def updates_per_step(self) -> int:
        """Optimizer updates of one step."""

    @property
    def checkpointed(self) -> nn.Module:
        """The module whose weights a resumed run takes up."""
        return self.lm

    def make_reference(self) -> Reference | None:
        """The policy as it is now, where the algorithm wants one; the trained module is prepared by then."""
        return None

    @abstractmethod
    def step(self) -> Metrics:
        """One step of training."""

    # ------------------------------------------------------------------------------------------- shared verbs

    @with_whole_weights
    def rollout(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample a completion per prompt; each one's reward is requested as soon as it has ended."""
        return self.scorer.submit_each(self.sampler, prompts)

    def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """Wait for the rewards of what `rollout` returned last.

        Raises:
            RewardError, ConfigError: on all ranks together; see `RewardScorer.gather`.
        """
        results = self.scorer.gather()
        assert len(results) == len(rollouts), "score() speaks of the last rollout() only"
        return results

    def policy_and_reference(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"], Bool[Tensor, "B R"]]:
        """Log-probs of the current policy and of the reference, and the mask of response tokens."""
        raise NotImplementedError(f"{type(self).__name__} keeps no reference")

    @with_whole_weights
    @torch.no_grad()
    def kl_to_start(self, rollouts: Sequence[Rollout]) -> float:
        """KL(policy || starting policy) in nats per sample, estimated on `rollouts` of the current policy."""
        assert self.reference is not None, "this run keeps no reference"
        if not rollouts:  # a rank without prompts to evaluate; the others wait for its share of the mean
            nothing = torch.zeros(0, 1, device=self.engine.device)
            return mean_kl(nothing, nothing, nothing.bool(), self.engine.sum)
        return mean_kl(*self.policy_and_reference(rollouts), self.engine.sum)

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
    def generate(self, prompts: Sequence[str], *, greedy: bool = False) -> list[str]:
        """Completions of the current policy."""
        config = self.config
        tokenized = tokenize_prompts(prompts, self.tokenizer, config.tokenizer, self.lm, config.generation)
        chunks = self.sampler.generate(tokenized, greedy=greedy)
        return [rollout.completion.text for chunk in chunks for rollout in chunk]

    @with_whole_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write the policy as a Hugging Face folder. Call it on all ranks."""
        return save_on_main(self.engine, folder, self.lm, self.tokenizer, self.config.model)

    # ----------------------------------------------------------------------------------------------- the loop

    @property
    def default_best_metric(self) -> str:
        """The first metric of the user's `metric_fn`, else the reward."""
        return self.evaluator.gold_metric or "eval/reward"

    def fit(self) -> Path:
        """Train for `train.total_steps` steps; returns the run folder."""
        return fit(self, self.name)

    def close(self) -> None:
        """Stop the reward client and the sampler, and leave the process group."""
        self.source.close()
        self._make_sampler.close()
        self.engine.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and random states; see `Trainer`."""
        parts = {name: part.state_dict() for name, part in self.stateful.items()}
        return {**parts, "policy_version": self.policy_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])
        self.policy_version = state["policy_version"]

    @property
    def pad_id(self) -> int:
        """Of the tokenizer."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
