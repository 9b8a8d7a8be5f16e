"""GRPO whose prompts and rewards come from clients: the step of `trainers/grpo.py`, its first line replaced
by "take groups that clients have rewarded", and what is to be sampled meanwhile is sampled there.

A group is as old as its clients are slow; the loss weighs by the policy at the beginning of the step over the
one that sampled (`conch/training/overlap/correction.py`), and what is older than `max_staleness` is dropped.

Completions are drawn by seeds of their own, of the run's seed, the group's number and the place in it, so
that they do not depend on which prompts were sampled together, or on how many ranks.

With several ranks, rank 0 alone knows of clients: it tells the others what to do next, each samples its share
of the prompts and learns from its share of the groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from conch.config import RolloutConfig
from conch.data.prompts import make_prompts
from conch.data.text import decode, special_tokens
from conch.distributed.train_engine import forget_precision
from conch.errors import ConchError, ConfigError, DataError, DistributedError, ModelError, first_line
from conch.rewards.base import RewardSource
from conch.rewards.scorer import RewardRequest
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.prompts import longest_prompt
from conch.rollouts.remote.engine import RemoteEngine
from conch.runs.checkpoint import CHECKPOINTS, read_rank_state, steps_of
from conch.runs.state import RunStoppedError
from conch.service.leases.journal import Journal
from conch.service.leases.records import Group, Sample
from conch.service.protocol import TrainingSettings
from conch.service.refusals import UNPROCESSABLE, RefusedError
from conch.service.runs.exchange import (
    Exchange,
    LearnOrder,
    Order,
    SampledGroup,
    SampleOrder,
    SaveOrder,
    StopOrder,
    WaitingAsk,
)
from conch.service.runs.exports import EXPORTS
from conch.service.runs.ranks import HEARTBEAT_S
from conch.service.runs.settings import RemoteRunConfig, run_config
from conch.trainers.grpo import GRPOTrainer
from conch.training.checkpointing import save_checkpoint
from conch.training.overlap.metrics import staleness_metrics
from conch.training.setup import load_policy_tokenizer, with_gathered_weights
from conch.types import Metrics, Prompt, RewardResult, RewardStatus, Rollout

_SEEDS = 2**31


class StoppedError(RunStoppedError):
    """The run was told to stop between two steps."""

    def __init__(self, order: StopOrder) -> None:
        super().__init__(order.reason)
        self.order = order


@dataclass(frozen=True, slots=True)
class LearnTask:
    """Learn from these groups, each rank from its share."""

    groups: list[Group]


@dataclass(frozen=True, slots=True)
class SampleTask:
    """Sample these prompts, each rank its share. first_number: of the first one's group."""

    prompts: list[Prompt]
    first_number: int


@dataclass(frozen=True, slots=True)
class SaveTask:
    """Write the model for who downloads it."""

    folder: Path


@dataclass(frozen=True, slots=True)
class Failure:
    """Rank 0 cannot go on. reason: why."""

    reason: str


Task = LearnTask | SampleTask | SaveTask | StopOrder | Failure | None
"""What all ranks do next; None where there is nothing to do yet."""


def train_run(
    settings: TrainingSettings,
    train_dir: Path,
    rollout: RolloutConfig | None,
    *,
    exchange: Exchange | None = None,
    journal: Journal | None = None,
    on_loaded: Callable[[], object] = lambda: None,
) -> StopOrder | None:
    """Train a run until its last update, or until it is told to stop and is saved: returns by whom.

    train_dir: of the run's checkpoints and metrics, which it goes on with.
    exchange, journal: with the clients, of rank 0; other ranks have none.
    on_loaded: called once clients may come.

    Raises:
        ConchError: the model cannot be loaded, or training fails.
    """
    config = run_config(settings, train_dir, rollout)
    forget_precision(config.train)
    trainer = RemoteGRPOTrainer(config, exchange, journal)
    trainer.engine.keeps_group = trainer.collectives.num_ranks > 1  # for what rank 0 says next
    try:
        on_loaded()
        try:
            trainer.fit()
        except StoppedError as stopped:
            if trainer.run.saved != trainer.run.step:
                save_checkpoint(trainer)
            return stopped.order
        return None
    finally:
        trainer.close()


class ClientRewards(RewardSource):
    """Stands where a trainer has its reward source; results come with the groups."""

    name = "the clients' rewards"

    def check(self) -> None:
        return

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        nobody = RewardResult(RewardStatus.INVALID, detail="clients reward what was handed out to them only")
        future.set_result([nobody] * len(rollouts))
        return future


class RemoteGRPOTrainer(GRPOTrainer):
    """GRPO on what clients ask for and reward.

    exchange: with the clients; None on other ranks than 0.
    journal: what the exchange writes its events to.
    """

    name = "remote_grpo"
    config: RemoteRunConfig
    overlap: ClientGroups

    def __init__(
        self, config: RemoteRunConfig, exchange: Exchange | None, journal: Journal | None, **given: Any
    ) -> None:
        self._exchange = exchange
        self._journal = journal
        tokenizer = load_policy_tokenizer(given.get("tokenizer"), config.tokenizer, config.model.path)
        prompts = [readable_text(tokenizer)]
        super().__init__(config, reward=ClientRewards(), prompts=prompts, **given)

    def make_overlap(self) -> ClientGroups:
        return ClientGroups(self, self._exchange, self._journal)

    def step(self) -> Metrics:
        """One step of GRPO on the oldest groups that are whole."""
        metrics = super().step()
        return self.overlap.finish_step(metrics)

    def prompt_of(self, prompt: str | list[dict[str, Any]]) -> Prompt:
        """A client's prompt as token ids.

        Raises:
            RefusedError: it cannot be read, or leaves no room for a completion.
        """
        config, rows = self.config, [{"prompt": prompt}]
        try:
            window = config.rollout.max_model_len if config.rollout.engine != "hf" else None
            longest = longest_prompt(self.lm, config.generation, window)
            cut = longest if config.tokenizer.truncate_prompts else None
            [made] = make_prompts(rows, self.codec, config.tokenizer, max_tokens=cut)
        except DataError as error:
            raise RefusedError(UNPROCESSABLE, f"the prompt cannot be sampled: {first_line(error)}") from None
        if longest is not None and len(made.token_ids) > longest:
            raise RefusedError(
                UNPROCESSABLE,
                f"the prompt has {len(made.token_ids)} tokens, and the model's window leaves {longest} "
                f"beside `max_completion_length` = {config.generation.max_new_tokens}",
            )
        return made

    @with_gathered_weights
    def sample_groups(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[list[Rollout]]:
        """A group of completions for each prompt. numbers: of the groups."""
        if not prompts:
            return []
        size = self.samples_per_prompt
        repeated = [prompt for prompt in prompts for _ in range(size)]
        seeds = [
            sample_seed(self.config.train.seed, number, place) for number in numbers for place in range(size)
        ]
        if isinstance(self.sampler, HFEngine | RemoteEngine):
            chunks = [*self.sampler.generate(repeated, seeds=seeds)]
        else:  # which draws seeds by itself
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeds[0])
                chunks = [*self.sampler.generate(repeated)]
        rollouts = [rollout for chunk in chunks for rollout in chunk]
        return [rollouts[first : first + size] for first in range(0, len(rollouts), size)]


class ClientGroups:
    """The buffer that steps take from; see `conch.training.online.SampleBuffer`.

    exchange, journal: of rank 0; None on the others, which do what it says.
    """

    def __init__(
        self, trainer: RemoteGRPOTrainer, exchange: Exchange | None, journal: Journal | None
    ) -> None:
        self._trainer = trainer
        self._exchange = exchange
        self._journal = journal
        self._taken: list[Rollout] = []

    def sample(self, count: int) -> list[Rollout]:
        """Do what clients ask for until an update's groups are whole; returns the completions of this rank's
        `count` groups.

        Raises:
            StoppedError: the run is to end here.
            ConchError: rank 0 cannot go on, or another rank is gone.
        """
        ranks = self._trainer.collectives
        failure: ConchError | None = None
        while True:
            order, asks = None, []
            task: Task = None
            if self._exchange is not None and failure is None:
                try:
                    order = self._exchange.next_order(HEARTBEAT_S if ranks.num_ranks > 1 else None)
                    task, asks = self._task_of(self._exchange, order)
                except ConchError as error:
                    failure = error
            task = ranks.broadcast(task if failure is None else Failure(first_line(failure)))
            if failure is not None:
                raise failure
            if isinstance(task, Failure):
                raise DistributedError(f"rank 0 cannot go on: {task.reason}")
            if isinstance(task, StopOrder):
                raise StoppedError(task)
            if isinstance(task, LearnTask):
                assert len(task.groups) == count * ranks.num_ranks
                return self._adopt(task.groups[ranks.rank * count :][:count])
            if isinstance(task, SaveTask):
                self._save(task, order)
            elif isinstance(task, SampleTask):
                sampled = self._sample(task)
                if self._exchange is not None:
                    try:
                        self._exchange.deliver([*zip(asks, sampled, strict=True)])
                    except ConchError as error:
                        failure = error

    def _task_of(self, exchange: Exchange, order: Order | None) -> tuple[Task, list[WaitingAsk]]:
        """What all ranks do for an order, and those who wait for the prompts of it, in the prompts' order."""
        if isinstance(order, LearnOrder):
            return LearnTask(order.groups), []
        if isinstance(order, SaveOrder):
            folder = self._trainer.run.folder.parent / EXPORTS / f"version_{exchange.version}"
            if not folder.is_dir():
                return SaveTask(folder), []
            order.future.set_result(folder)  # this version was written before
            return None, []
        if not isinstance(order, SampleOrder):
            return order, []
        asks: list[WaitingAsk] = []
        prompts: list[Prompt] = []
        refused: list[tuple[WaitingAsk, RefusedError]] = []
        for waiting in order.asks:
            try:
                prompts.append(self._trainer.prompt_of(waiting.ask.prompt))
                asks.append(waiting)
            except RefusedError as refusal:
                refused.append((waiting, refusal))
        if refused:
            exchange.deliver(refused)
        return (SampleTask(prompts, exchange.next_number) if prompts else None), asks

    def score(self) -> list[RewardResult]:
        return self._trainer.scorer.gather()

    def present_weights(self) -> None:
        return

    def close(self) -> None:
        return

    def finish_step(self, metrics: Metrics) -> Metrics:
        """Tell clients of the new version; returns the metrics with the ages of what was learned from."""
        trainer, ranks = self._trainer, self._trainer.collectives
        version = trainer.policy_version - 1  # the step's update is in it
        ages = staleness_metrics(self._taken, version, ranks.all_reduce, ranks.all_reduce_max)
        metrics = metrics | ages
        self._taken = []
        exchange = self._exchange
        ranks.run_on_all_ranks(lambda: exchange.learned(metrics) if exchange is not None else None)
        return metrics

    def take_up_run(self) -> None:
        run = self._trainer.run
        run.own, run.on_saved = self, self._forget
        if self._exchange is None:
            return
        snapshot = None
        if run.continued:
            snapshot = read_rank_state(run.folder / CHECKPOINTS / f"step_{run.step}", 0)
        self._exchange.open(snapshot)

    def capture(self) -> Callable[[], dict[str, Any]]:
        """The ledger as it stands, which rank 0 has; its journal goes on behind it."""
        state: dict[str, Any] = {}
        if self._exchange is not None:
            state = self._exchange.capture()
        return lambda: state

    def _forget(self, folder: Path) -> None:
        """Delete of the journal what no checkpoint needs. folder: of the newest checkpoint."""
        assert self._journal is not None, "rank 0 alone is told of checkpoints"
        oldest = min(steps_of(folder.parent.parent).items())[1]
        self._journal.forget(read_rank_state(oldest, 0)["sequence"] + 1)

    def _adopt(self, groups: Sequence[Group]) -> list[Rollout]:
        rollouts: list[Rollout] = []
        results: list[RewardResult] = []
        for group in groups:
            rollouts += group.rollouts
            results += map(_result_of, group.samples)
        future: Future[list[RewardResult]] = Future()
        future.set_result(results)
        self._trainer.scorer.adopt([(range(len(rollouts)), RewardRequest(rollouts, future))])
        self._taken = rollouts
        return rollouts

    def _sample(self, task: SampleTask) -> list[SampledGroup | RefusedError]:
        """Sample this rank's share of the prompts; returns what became of each, on all ranks.

        Raises:
            ConchError: on all ranks: samplers are gone, here or on another rank.
        """
        ranks = self._trainer.collectives
        places = ranks.shard(range(len(task.prompts)))
        numbers = [task.first_number + place for place in places]
        groups: list[SampledGroup | RefusedError] = []
        failure: ConchError | None = None
        try:
            prompts = [task.prompts[place] for place in places]
            groups = [_sampled_group(each) for each in self._trainer.sample_groups(prompts, numbers)]
        except ConfigError as error:  # a prompt that servers have less room for than the model has
            reason = f"the samplers refuse a prompt: {first_line(error)}"
            groups = [RefusedError(UNPROCESSABLE, reason) for _ in places]
        except ConchError as error:
            failure = error
        failed = ranks.all_gather([] if failure is None else [first_line(failure)])
        if failure is not None:
            raise failure
        if failed:
            raise DistributedError(f"another rank cannot sample: {failed[0]}")
        of_place = dict(ranks.all_gather([*zip(places, groups, strict=True)]))
        return [of_place[place] for place in range(len(task.prompts))]

    def _save(self, task: SaveTask, order: Order | None) -> None:
        """Write the model for who downloads it. order: of those who wait for it, on rank 0."""
        future = order.future if isinstance(order, SaveOrder) else None
        try:
            self._trainer.save_pretrained(task.folder)
        except ConchError as error:  # a full disk, say, which is no reason to end the run
            if future is not None:
                future.set_exception(error)
        else:
            if future is not None:
                future.set_result(task.folder)


def _sampled_group(rollouts: Sequence[Rollout]) -> SampledGroup:
    completions = [rollout.completion for rollout in rollouts]
    return SampledGroup(rollouts[0].prompt, completions, rollouts[0].policy_version)


def readable_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text of one token or more: what a trainer is built with as its data. Clients bring the prompts that
    are sampled.

    Raises:
        ModelError: the tokenizer reads nothing.
    """
    special = {*special_tokens(tokenizer).values()}
    ordinary = (number for number in range(len(tokenizer)) if number not in special)
    for text in chain(["a"], (decode(tokenizer, [number]) for number in ordinary)):
        # Some tokenizers refuse letters that they do not know, with an error type of their library.
        with suppress(Exception):
            if text and tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
                return text
    raise ModelError("the tokenizer reads no text: it has special tokens alone")


def sample_seed(seed: int, number: int, place: int) -> int:
    """What a completion is drawn by. number: of its group."""
    digest = hashlib.sha256(f"{seed}/{number}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SEEDS


def _result_of(sample: Sample) -> RewardResult:
    if sample.reward is not None:
        return RewardResult(RewardStatus.OK, scores={"reward": sample.reward}, model="client")
    if sample.status == "failed":
        return RewardResult(RewardStatus.INVALID, detail="the client has no reward for it")
    return RewardResult(RewardStatus.TIMEOUT, detail="no reward came within its lease")
