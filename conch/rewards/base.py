"""The reward source, its counts, and the types that a user may pass as a reward.

A source of your own is a class with two methods:

    class Brevity(RewardSource):
        name = "brevity"

        def check(self) -> None: ...

        def submit(self, rollouts):
            future = Future()
            scores = [-float(len(rollout.completion.text)) for rollout in rollouts]
            future.set_result([RewardResult(RewardStatus.OK, scores={"reward": score}) for score in scores])
            return future
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from conch.config import JudgeConfig
from conch.rewards.verifiers.base import Verifier
from conch.types import Metrics, Prompt, RewardResult, Rollout

SourceT = TypeVar("SourceT", bound="RewardSource")

_undone: ContextVar[ExitStack | None] = ContextVar("undone", default=None)


@dataclass(frozen=True, slots=True)
class ClientStats:
    """Counts of a source's requests since it was made, except the last two fields.

    requests: sent, including failed ones, retries and probes; of a function: calls.
    retries: requests that repeat an earlier one, and probes of a replica that failed.
    retries_by: reason -> number; the values sum to `retries`. `unavailable`, `timeout`: the same rows were
        sent again; `data`: a part of the rows, to find the bad one; `probe`: is the replica back?
    deduplicated: samples that needed no row of their own, since an equal one was under way or in the cache.
    replica_faults: requests that one replica refused and another scored in full.
    most_in_flight: most requests under way at once since the last snapshot.
    model_change: with `on_model_change=raise`, one sentence once the model has changed, else "". Every later
        result is then INVALID with the same sentence.
    """

    requests: int = 0
    retries: int = 0
    retries_by: Mapping[str, int] = field(default_factory=dict)
    deduplicated: int = 0
    replica_faults: int = 0
    most_in_flight: int = 0
    model_change: str = ""


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """A server's own sums over all its clients' requests since the model was loaded.

    requests: scored.
    queue_s: seconds that they waited in the server.
    compute_s: seconds in the model, each request counted with the whole of its batch.
    """

    requests: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0


class RewardSource(ABC):
    """Scores rollouts in the background. A source of your own needs `check` and `submit`.

    name: used in messages, for example "walks at 127.0.0.1:8001".
    measures_facts: whether its results hold `facts`.
    batched: True: `submit` gets a whole chunk at once, since what is scored together matters, in cost or in
        the scores. False: completions may be submitted one by one, as they end.
    needs_groups: True: each `submit` gets the completions of one prompt that a step or an evaluation has
        sampled, all of them, in order, and nothing else.
    deadline_s: longest time of one score, in seconds, for which other processes may have to wait; None where
        `reward.client.deadline_s` says it, or nothing.
    """

    name: str = "reward source"
    batched: bool = False
    measures_facts: bool = False
    needs_groups: bool = False
    deadline_s: float | None = None

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of its scores, once `check` has asked; empty where only the results tell."""
        return ()

    @property
    def digest(self) -> str:
        """Hash of settings that change its scores, of files that settings only name; "" where there are none.
        A run that is resumed must have the same."""
        return ""

    @abstractmethod
    def check(self) -> None:
        """Find out before long work starts whether scoring can work at all.

        Raises:
            RewardError, ConfigError: one sentence: what is wrong, where, and what to do.
        """

    def is_ready(self) -> bool:
        """Find out, after `check`, whether a score could be had now; takes some seconds at most.

        A source that asks nobody else always is.
        """
        return True

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Find out, after `check` and before long work, whether completions of this prompt can be scored.

        row: the prompt's extra keys, which are its metadata.

        Raises:
            DataError: a phrase about the row: "has no `answer`".
        """
        return

    def check_prompts(self, prompts: Sequence[Prompt], special_tokens: Iterable[str] = ()) -> None:
        """Find out, after `check` and before long work, whether these prompts can be scored.

        special_tokens: the policy's, which its chat template may have written into the prompts' texts.

        Raises:
            ConfigError: one sentence: which cannot, and what to do.
        """
        return

    @abstractmethod
    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once: one result per rollout, in order.

        A failed reward is a status in its result, never an exception of the future.
        """

    def close(self) -> None:
        """Cancel what is under way and release threads and connections. A second call does nothing."""
        return

    def stats(self) -> ClientStats | None:
        """Take a snapshot of the counts, which starts `most_in_flight` anew.

        None: the source counts nothing, and each `submit` is taken for one request.
        """
        return None

    def metrics(self) -> Metrics:
        """Further figures of this process since the last call, sums that those of several sources add up in;
        each is explained in docs/metrics.md."""
        return {}

    def costs(self) -> tuple[float, ...]:
        """What this process has spent on each budget of the source; empty where it has none to keep to."""
        return ()

    def take_up_costs(self, costs: Sequence[float]) -> None:
        """Count what this process's share of an earlier part of the run has spent, one number a budget."""
        return

    def server_statistics(self) -> Future[ServerTimes]:
        """Ask for the gain of the servers' own statistics since the last call, summed over the replicas.

        The future ends within `client.request_timeout_s`. A server that does not answer, or has no
        statistics, adds nothing. Requests of other clients are included.
        """
        future: Future[ServerTimes] = Future()
        future.set_result(ServerTimes())
        return future

    def __enter__(self: SourceT) -> SourceT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


UserReward = Callable[..., Any] | str | RewardSource | Verifier[Any] | JudgeConfig
"""Anything that a user may pass as a reward."""


@contextmanager
def sources_closed_on_failure() -> Iterator[None]:
    """Where the block (or the function it decorates) raises, sources that `from_user` made in it are closed.

    Sources that were passed in stay as they are: they are the caller's, who may try again with them.
    """
    with ExitStack() as undone:
        token = _undone.set(undone)
        try:
            yield
        finally:
            _undone.reset(token)
        undone.pop_all()


def note_opened(source: SourceT) -> SourceT:
    """Say that `source` was made here, so that what fails afterwards closes it."""
    undone = _undone.get()
    if undone is not None:
        undone.callback(source.close)
    return source
