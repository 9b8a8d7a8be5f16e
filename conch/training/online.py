"""What trainers share that sample completions and learn from their rewards (PPO, GRPO, RFT).

An algorithm writes `setup`, `step` and what is its own; a step reads as

    rollouts = self.sample(n)                          rewards are requested as completions end
    outputs = self.compute_logprobs(rollouts)          while the last rewards are under way
    rewards = self.score(rollouts)                     waits; all ranks agree on failures
    batch, metrics = self.make_batch(rollouts, rewards, outputs)
    self.update(batch)

Legend: B rollouts, R response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import OnlineRunConfig
from conch.data.files import evaluation_rows, joined, training_rows
from conch.data.formats import listed, prompt_form
from conch.data.index_sampler import IndexStream, digest_of
from conch.data.rollout_batch import Sequences, collate
from conch.distributed.train_engine import TrainEngine
from conch.errors import CheckpointError
from conch.evaluation.evaluator import Evaluator, Variant, sampled_prompts
from conch.evaluation.metrics import MetricFn
from conch.evaluation.watch import Evaluation
from conch.log import get_logger
from conch.models.forward import BatchPacker
from conch.models.freezing import freeze_layers
from conch.models.reference import Reference, build_reference
from conch.reference.remote import RemoteReference
from conch.rewards.base import RewardSource, UserReward, sources_closed_on_failure
from conch.rewards.scorer import RewardScorer
from conch.rollouts.factory import RolloutEngineFactory, check_sampling
from conch.rollouts.prompts import tokenize_prompts
from conch.runs.tracking import Tracker
from conch.training.kl import mean_kl
from conch.training.logprobs import LogprobOutputs, logprob_outputs
from conch.training.loop import fit
from conch.training.resume import check_folders, start_run
from conch.training.reward_shaping import agreed_facts
from conch.training.served_reference import open_reference
from conch.training.setup import (
    check_deadlines,
    check_gold,
    check_prompts,
    check_vocabulary,
    check_watching,
    load_policy,
    open_reward,
    save_on_main,
    text_codec,
    try_policy,
    watching_sources,
    with_gathered_weights,
)
from conch.training.statistics import fact_metrics, reward_metrics, rollout_metrics
from conch.types import Metrics, Prompt, RewardResult, Rollout

if TYPE_CHECKING:
    from conch.rollouts.remote.stream import GroupStream

_log = get_logger(__name__)

AnyReference = Reference | RemoteReference
"""The starting policy, in this process or on servers."""

ConfigT = TypeVar("ConfigT", bound=OnlineRunConfig)


class Stateful(Protocol):
    """Something that a resumed run takes up."""

    def state_dict(self) -> Any:
        """JSON values, the same on all ranks."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Go on where `state_dict` was taken."""
        ...


@runtime_checkable
class SampleBuffer(Protocol):
    """What a step takes completions and their rewards from, where it does not sample them itself."""

    def sample(self, count: int) -> list[Rollout]:
        """The completions of the next `count` groups of this rank, those of a group together."""
        ...

    def score(self) -> list[RewardResult]:
        """The rewards of what `sample` returned last, in its order."""
        ...

    def present_weights(self) -> None:
        """Have what samples beside training hold the present weights."""
        ...

    def take_up_run(self) -> None:
        """Go on where a resumed run stood; from now on what waits here is saved with the run."""
        ...

    def close(self) -> None:
        """Stop what samples beside training."""
        ...


class OnlineTrainer(ABC, Generic[ConfigT]):
    """A policy, a sampler, a reward source and a data position; `fit` is the loop over `step`.

    config: the run config of the algorithm.
    reward: a function, an address, a source, or several by name; None takes what the config names.
    gold: one that scores evaluations and is never learned from; None takes `config.evaluation.gold`.
    prompts, eval_prompts: texts, or mappings with "prompt" whose other keys are metadata of the reward.
    metric_fn: further measures of evaluation completions.
    model: a loaded model with its tokenizer, instead of `config.model.path`.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    name: ClassVar[str]
    """Of the algorithm, as its config section is called."""

    reference: AnyReference | None
    """The policy as it was at the start; None where the algorithm keeps none."""

    module: nn.Module
    """What is trained: `setup` gives it."""

    digest: str
    """Hash of the prompts that are learned from, as they were given."""

    stream: IndexStream
    """Which prompts come next; made by `plan_batches`."""

    forward_batch_size: int
    """Rows per process of a forward pass without gradient; set by `plan_batches` where there are any."""

    packer: BatchPacker
    """Makes the rows that policy and reference read; set by `setup` where there are any."""

    @sources_closed_on_failure()
    def __init__(
        self,
        config: ConfigT,
        *,
        reward: UserReward | Mapping[str, UserReward] | None = None,
        prompts: Sequence[str | Mapping[str, Any]],
        eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
        gold: UserReward | None = None,
        metric_fn: MetricFn | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_sampling(config.rollout)
        self.config = config
        self.engine = engine = TrainEngine(config.train)
        self.collectives = self.engine.collectives
        check_deadlines(config, self.collectives.num_ranks)
        check_gold(config, reward, gold)
        self.collectives.run_on_all_ranks(lambda: check_folders(config) if self.collectives.is_main else None)
        if model is None:
            engine.check_weights(config.model)
        prompts = listed(prompts, "prompts", config.data)
        if eval_prompts is not None:
            eval_prompts = listed(eval_prompts, "evaluation prompts", config.data)
        all_prompts = joined({"prompt": prompts, "evaluation prompt": eval_prompts or []})
        self.source, self.tokenizer = open_reward(
            self.collectives, reward, config, all_prompts, tokenizer, self.group_size
        )
        self.scorer = RewardScorer(self.source, config.reward, self.collectives.all_reduce_int)
        watching = watching_sources(self.collectives, config, eval_prompts or prompts, gold)
        self.lm = lm = load_policy(model, config.model, engine.precision)
        check_vocabulary(lm, self.tokenizer)
        self.codec = text_codec(self.tokenizer, lm, config.tokenizer)
        sampled = sampled_prompts(config, self.codec, lm, prompts, eval_prompts)
        self.prompts, self.eval_prompts, self.variants = sampled.train, sampled.evaluation, sampled.variants
        check_prompts(self.collectives, self.source, [*self.prompts, *self.eval_prompts], self.tokenizer)
        check_watching(self.collectives, watching, self.eval_prompts, self.tokenizer)
        self._facts: list[str] = []
        self.policy_version = 0
        self.digest = digest_of(prompts)
        self.plan_batches()
        self.overlap = self.make_overlap()
        self.stateful: dict[str, Stateful] = {"stream": self.stream}
        freeze_layers(lm, config.model)
        lm.to(engine.device)  # pyright: ignore[reportArgumentType]
        try_policy(lm, self.codec, config.model, config.generation)
        self.module = self.setup()
        total_updates = config.train.total_steps * self.updates_per_step
        engine.prepare(self.module, config.optimizer, config.scheduler, total_updates=total_updates)
        with engine.gathered_weights():
            self.reference = self.make_reference()
        if self.reference is None and config.reference.urls is not None:
            _log.warning("`reference.urls` is not asked: this run measures no KL from its start")
        self._make_sampler = RolloutEngineFactory(
            config.rollout, engine, self.tokenizer, lambda: self.lm, lambda: self.policy_version
        )
        with ExitStack() as undone:  # what samples may have processes of its own
            undone.callback(self._make_sampler.close)
            self.sampler = self._make_sampler(config.generation)
            engine.seed_sampling()
            self.evaluator = self._make_evaluator(watching, metric_fn)
            self.run = start_run(self, self.checkpointed)
            self.run_dir = self.run.folder
            if self.overlap is not None:
                self.collectives.run_on_all_ranks(self.overlap.take_up_run)
            undone.pop_all()

    def _make_evaluator(self, watching: Mapping[str, RewardSource], metric_fn: MetricFn | None) -> Evaluator:
        return Evaluator(
            self.collectives,
            self.eval_prompts,
            self.variants,
            self._make_sampler,
            self.config.train,
            scorer=self.scorer,
            metric_fn=metric_fn,
            watching=watching,
            keep=self.config.evaluation.keep,
        )

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
        return self.module

    @property
    def computes_old_logprobs(self) -> bool:
        """Whether the policy's log-probs are computed before its update."""
        return True

    def make_reference(self) -> AnyReference | None:
        """The policy as it is now, where the algorithm wants one; the trained module is prepared by then."""
        return None

    def starting_policy(self) -> AnyReference:
        """The policy as it is now, on the servers of `reference.urls` or as the cheapest exact one here."""
        config = self.config
        if config.reference.urls is None:
            return build_reference(self.lm, config.model.num_layers_unfrozen)
        return open_reference(config.reference, config.model, self.engine, self.lm, self.packer)

    @property
    def samples_per_prompt(self) -> int:
        """Completions of a prompt in one step."""
        return 1

    @property
    def group_size(self) -> int:
        """Completions of a prompt in one step that a reward of groups gets together."""
        return self.samples_per_prompt

    def make_overlap(self) -> SampleBuffer | None:
        """What steps take their samples from, made once prompts and data position are there; None samples and
        trains in turn."""
        return None

    @abstractmethod
    def step(self) -> Metrics:
        """One step of training."""

    # ------------------------------------------------------------------------------------------- shared verbs

    def own_share(self) -> IndexStream:
        """This rank's walk over the prompts, which all ranks share out."""
        ranks, seed = self.collectives, self.config.train.seed
        return IndexStream(len(self.prompts), seed, ranks.rank, ranks.num_ranks, self.digest)

    def next_prompts(self, number: int) -> list[Prompt]:
        """The next prompts of this rank's share of the data."""
        return [self.prompts[row] for row in self.stream.draw(number)]

    def sample(self, number: int) -> list[Rollout]:
        """Completions of the next `number` prompts, those of a prompt together; their rewards are under way.

        Of the present policy, or with `overlap` the oldest in that buffer.
        """
        if self.overlap is not None:
            return self.overlap.sample(number)
        return self.rollout(self.next_prompts(number))

    @with_gathered_weights
    def rollout(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample `samples_per_prompt` completions per prompt, which stand together; each one's reward is
        requested as soon as it has ended."""
        repeated = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        return self.scorer.submit_each(self.sampler, repeated, group_size=self.group_size)

    def engine_stream(self, **settings: Any) -> GroupStream:
        """A stream over the samplers of `rollout`; see `RolloutEngineFactory.stream`."""
        return self._make_sampler.stream(self.config.generation, **settings)

    def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """Wait for the rewards of what `sample` or `rollout` returned last.

        Raises:
            RewardError, ConfigError: on all ranks together; see `RewardScorer.gather`.
        """
        results = self.scorer.gather() if self.overlap is None else self.overlap.score()
        assert len(results) == len(rollouts), "score() speaks of the last rollout() only"
        return results

    def sampling_metrics(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[RewardResult],
        sequences: Sequences,
        objectives: Sequence[str],
    ) -> Metrics:
        """Statistics of what was sampled and of its rewards, over all ranks.

        objectives: of the rewards; the same on all ranks.
        """
        reduce = self.collectives.all_reduce
        return {
            **self.scorer.metrics(),
            **reward_metrics(rewards, self.config.reward.weights, objectives, reduce),
            **self.fact_metrics(rewards),
            **rollout_metrics(rollouts, sequences, reduce, self.collectives.all_reduce_max),
        }

    def fact_metrics(self, rewards: Sequence[RewardResult]) -> Metrics:
        """Means of what was measured beside the rewards, over all ranks."""
        if self.source.measures_facts and not self._facts:
            self._facts = agreed_facts(rewards, self.collectives)
        return fact_metrics(rewards, self._facts, self.collectives.all_reduce)

    @with_gathered_weights
    def compute_logprobs(
        self, rollouts: Sequence[Rollout], *, temperature: float | None = None, policy_too: bool | None = None
    ) -> LogprobOutputs:
        """Run the policy and, where there is one, the reference over each rollout, without gradient.

        temperature: of both distributions; None takes the one that training samples at.
        policy_too: False asks the reference alone; None does as `computes_old_logprobs` says.
        """
        return logprob_outputs(
            self.engine,
            self.checkpointed,
            self.reference,
            self.packer,
            collate(rollouts, self.pad_id, self.engine.device),
            temperature=self.config.generation.temperature if temperature is None else temperature,
            batch_size=self.forward_batch_size,
            policy_too=self.computes_old_logprobs if policy_too is None else policy_too,
        )

    @with_gathered_weights
    @torch.no_grad()
    def kl_to_start(self, rollouts: Sequence[Rollout], *, temperature: float | None = None) -> float:
        """KL(policy || starting policy) in nats per sample, estimated on `rollouts` of the current policy.

        temperature: that `rollouts` were sampled at; None for that of training.
        """
        assert self.reference is not None, "this run keeps no reference"
        if not rollouts:  # a rank without prompts to evaluate; the others wait for its share of the mean
            nothing = torch.zeros(0, 1, device=self.engine.device)
            return mean_kl(nothing, nothing, nothing.bool(), self.collectives.all_reduce)
        outputs = self.compute_logprobs(rollouts, temperature=temperature, policy_too=True)
        assert outputs.logprobs is not None and outputs.ref_logprobs is not None
        mask = outputs.sequences.response_mask
        return mean_kl(outputs.logprobs, outputs.ref_logprobs, mask, self.collectives.all_reduce)

    @with_gathered_weights
    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics:
        """Sample `repeats` (or `train.eval_repeats`) completions per evaluation prompt.

        Returns the mean reward, means of the user's metrics, and, where there is a reference, the KL to the
        start in nats per sample, at the temperature of the evaluation; not of completions that no temperature
        gives (greedy ones, or of a cut distribution).
        """
        extra = None if self.reference is None else self._kl_of_evaluation
        if self.overlap is not None:
            self.overlap.present_weights()
        return self.evaluator.run(tracker, step, repeats=repeats, extra=extra)

    def _kl_of_evaluation(self, rollouts: Sequence[Rollout], variant: Variant[Any]) -> Metrics:
        if variant.greedy or variant.generation.cuts:
            return {}
        return {"eval/kl": self.kl_to_start(rollouts, temperature=variant.generation.temperature)}

    @with_gathered_weights
    def generate(self, prompts: Sequence[str], *, greedy: bool = False) -> list[str]:
        """Completions of the current policy."""
        config = self.config
        if self.overlap is not None:
            self.overlap.present_weights()
        tokenized = tokenize_prompts(prompts, self.codec, config.tokenizer, self.lm, config.generation)
        chunks = self.sampler.generate(tokenized, greedy=greedy)
        return [rollout.completion.text for chunk in chunks for rollout in chunk]

    @with_gathered_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write the policy as a Hugging Face folder. Call it on all ranks."""
        return save_on_main(self.collectives, folder, self.lm, self.tokenizer, self.config.model)

    # ----------------------------------------------------------------------------------------------- the loop

    @property
    def default_best_metric(self) -> str:
        """Gold where it is measured, else the first metric of the user's `metric_fn`, else the reward."""
        return self.evaluator.best_metric or "eval/reward"

    @property
    def evaluation(self) -> Evaluation | None:
        """What the latest evaluation measured, sample by sample."""
        return self.evaluator.latest

    def fit(self) -> Path:
        """Train for `train.total_steps` steps; returns the run folder."""
        try:
            return fit(self, self.name)
        finally:  # whoever keeps the trainer samples from it, and does not keep samplers busy
            if self.overlap is not None:
                self.overlap.close()

    def close(self) -> None:
        """Stop the reward client and the sampler, leave the reference servers and the process group."""
        if self.overlap is not None:
            self.overlap.close()
        self.source.close()
        self.evaluator.close()
        if isinstance(self.reference, RemoteReference):
            self.reference.close()
        self._make_sampler.close()
        self.engine.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and random states; see `Trainer`."""
        parts = {name: part.state_dict() for name, part in self.stateful.items()}
        digest = self.reference.digest if isinstance(self.reference, RemoteReference) else None
        costs = list(self.source.costs())
        if costs:
            costs = self.collectives.all_reduce(torch.tensor(costs, dtype=torch.float64)).tolist()
        return {
            **parts,
            "policy_version": self.policy_version,
            "reference": digest,
            "reward_costs": costs,
            "reward_digest": self.source.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            CheckpointError: the reference servers hold another model than the run started from, or files
                that the reward's settings name have changed.
        """
        self._check_start(state.get("reference"))
        before, now = state.get("reward_digest", ""), self.source.digest  # older checkpoints do not know it
        if before and now and before != now:
            raise CheckpointError(
                f"{self.source.name} scores otherwise than when this run was saved, though its settings name "
                "the same files: their content has changed (of `reward.judge.file`, `template_file` or "
                "`reward.goals.normalization`). Put the old one back, or start a new run from the checkpoint "
                "with `model.path`"
            )
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])
        self.policy_version = state["policy_version"]
        costs = state.get("reward_costs", [])  # older checkpoints do not know them
        if len(costs) == len(self.source.costs()):
            self.source.take_up_costs([cost / self.collectives.num_ranks for cost in costs])

    def _check_start(self, digest: str | None) -> None:
        """digest: of the policy that the run started from; None where it did not ask servers."""
        if isinstance(self.reference, RemoteReference) and digest not in (None, self.reference.digest):
            self.reference.close()
            raise CheckpointError(
                f"the reference servers and `model.path` hold weights {self.reference.digest[:12]}, but this "
                f"run started from {str(digest)[:12]}: put the model back that was there"
            )

    @property
    def pad_id(self) -> int:
        """Of the tokenizer."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]


def run_online(trainer_type: type[OnlineTrainer[ConfigT]], config: ConfigT) -> None:
    """Train with the prompts of `data.train`.

    Raises:
        ConchError: bad settings or data, before anything is loaded where that can be known.
        SystemExit: see `fit`.
    """
    prompts = training_rows(config.data, "prompts", form=prompt_form)
    evaluated = evaluation_rows(config.data, form=prompt_form)
    with closing(trainer_type(config, prompts=prompts, eval_prompts=evaluated)) as trainer:
        trainer.fit()
