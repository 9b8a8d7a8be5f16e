"""Where the requests of clients and the trainer's thread meet.

    clients    ask -> wait for a handout         reward -> an answer at once
    trainer    next_order -> sample these prompts | learn from these groups | save the model | stop

Whatever ends the trainer ends every wait, and every later request is told why.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conch.errors import CheckpointError
from conch.service.leases.journal import Journal
from conch.service.leases.ledger import Ledger
from conch.service.leases.records import Answer, Asker, Group, Handout, LedgerSettings, Post
from conch.service.protocol import RunState, TrainingSettings
from conch.service.refusals import CONFLICT, UNAVAILABLE, RefusedError
from conch.service.runs.events import EventLog
from conch.types import Completion, Metrics, Prompt

_SLICE_S = 1.0
"""Longest wait of the trainer's thread before it looks at leases again."""

_GATHER_S = 0.005
"""How long the first of several prompts waits for others, to be sampled together with them."""

_STARTING_S = 2.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt to sample.

    prompt: a text, or messages.
    key: name of a group that clients share; "" for none.
    """

    prompt: str | list[dict[str, Any]]
    asker: Asker
    key: str = ""


@dataclass(eq=False, slots=True)
class WaitingAsk:
    """A prompt until it is sampled.

    others: who share its group, each with the future that it waits for.
    """

    ask: Ask
    future: Future[Handout]
    others: list[tuple[Asker, Future[Handout]]] = field(default_factory=list)
    is_taken: bool = False

    @property
    def everybody(self) -> list[tuple[Asker, Future[Handout]]]:
        """All that wait, in the order in which they came."""
        return [(self.ask.asker, self.future), *self.others]

    @property
    def futures(self) -> list[Future[Handout]]:
        """What they wait for."""
        return [future for _, future in self.everybody]


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """What a sampler made of a prompt, by the weights of `version`."""

    prompt: Prompt
    completions: Sequence[Completion]
    version: int


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Sample these prompts, and deliver each in this order."""

    asks: list[WaitingAsk]


@dataclass(frozen=True, slots=True)
class LearnOrder:
    """Learn from these groups."""

    groups: list[Group]


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save the model as it is."""

    future: Future[Path]


@dataclass(frozen=True, slots=True)
class StopOrder:
    """Save a checkpoint, and end. state: of the run behind that."""

    state: RunState
    reason: str


Order = SampleOrder | LearnOrder | SaveOrder | StopOrder


class Exchange:
    """One run's requests, from any thread.

    run_id: in the ids of its samples.
    idle_s: time without a request after which the run is stopped.
    clock: seconds, of this process.
    """

    def __init__(
        self,
        run_id: str,
        settings: TrainingSettings,
        journal: Journal,
        *,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_id = run_id
        self.settings = settings
        self.events = EventLog()
        self.metrics: Metrics = {}
        self._journal = journal
        self._ledger = Ledger(_ledger_settings(settings), journal.append)
        self._idle_s = idle_s
        self._clock = clock
        self._offset = -clock()
        self._changed = threading.Condition()
        self._state: RunState = "starting"
        self._reason = ""
        self._stop: StopOrder | None = None
        self._asks: list[WaitingAsk] = []
        self._saves: list[SaveOrder] = []
        self._versions: list[tuple[int, Future[int]]] = []
        self._heard_at = clock()

    # ------------------------------------------------------------------------------------------- for clients

    @property
    def state(self) -> RunState:
        """Of the run."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the run failed, or was stopped."""
        return self._reason

    @property
    def version(self) -> int:
        """Updates that the model has seen."""
        return self._ledger.step

    def counts(self) -> dict[str, int]:
        """Of groups and samples, by what became of them."""
        with self._changed:
            waiting = len(self._asks)
            return {
                **self._ledger.counts,
                "groups_under_way": self._ledger.under_way,
                "prompts_waiting": waiting,
            }

    def ask(self, ask: Ask) -> Future[Handout]:
        """Have a prompt sampled, or get what was handed out for this very request before.

        The future ends with a `RefusedError` where the run does.

        Raises:
            RefusedError: the run does not take prompts, there are too many, or the request was another one.
        """
        [future] = self.ask_all([ask])
        if isinstance(future, RefusedError):
            raise future
        return future

    def ask_all(self, asks: Sequence[Ask]) -> list[Future[Handout] | RefusedError]:
        """Have several prompts sampled together, in their order; what is refused stands in its place."""
        futures: list[Future[Handout] | RefusedError] = []
        with self._changed:
            for ask in asks:
                try:
                    futures.append(self._ask(ask))
                except RefusedError as refusal:
                    futures.append(refusal)
            self._sync()
            self._changed.notify_all()
        return futures

    def _ask(self, ask: Ask) -> Future[Handout]:
        self._hear()
        ready: Future[Handout] = Future()
        handout = self._ledger.repeated(ask.asker)
        if handout is not None:
            ready.set_result(handout)
            return ready
        if (known := self._waiting_for(ask.asker)) is not None:
            return known
        if ask.key and self._ledger.shared(ask.key):
            ready.set_result(self._ledger.hand_out_shared(ask.key, ask.asker, self._now()))
            return ready
        sharing = next((each for each in self._asks if ask.key and each.ask.key == ask.key), None)
        if sharing is not None:
            sharing.others.append((ask.asker, ready))
            return ready
        self._ledger.admit(1, waiting=len(self._asks))
        self._asks.append(WaitingAsk(ask, ready))
        return ready

    def abandon(self, future: Future[Handout]) -> None:
        """Note that nobody waits for a prompt any more; one that can be asked for again is sampled still."""
        with self._changed:
            for each in self._asks:
                for asker, other in each.everybody:
                    if other is future and not asker.request:
                        future.cancel()

    def reward(self, post: Post) -> Answer:
        """Note rewards; see `Ledger.reward`.

        Raises:
            RefusedError: they cannot be taken, or the run has ended.
        """
        [answer] = self.reward_all([post])
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    def reward_all(self, posts: Sequence[Post]) -> list[Answer | RefusedError]:
        """Note several posts of rewards, in their order; what is refused stands in place of its answer.

        A run that has ended still answers what it has taken.
        """
        answers: list[Answer | RefusedError] = []
        with self._changed:
            self._heard_at = self._clock()
            for post in posts:
                try:
                    answers.append(self._reward(post))
                except RefusedError as refusal:
                    answers.append(refusal)
            self._sync()
            self._changed.notify_all()
        return answers

    def _reward(self, post: Post) -> Answer:
        if self._state == "running":
            return self._ledger.reward(post, self._now())
        known = None if self._state == "starting" else self._ledger.answered(post)
        if known is None:
            raise self._refusal()
        return known

    def lease_left_s(self, handout: Handout) -> float:
        """Seconds until the first lease of a handout ends."""
        with self._changed:
            until = min(handout.group.samples[place].lease_until for place in handout.places)
            return max(0.0, until - self._now())

    def when_version(self, version: int) -> Future[int]:
        """A future that ends with the version once the model has seen so many updates, or with the run."""
        future: Future[int] = Future()
        with self._changed:
            if self.version >= version:
                future.set_result(self.version)
            elif self._state not in ("starting", "running"):
                future.set_exception(self._refusal())
            else:
                self._versions = [each for each in self._versions if not each[1].cancelled()]
                self._versions.append((version, future))
        return future

    def save_model(self) -> Future[Path]:
        """Have the trainer write the model as it is between two updates; the future ends with its folder. Who
        asks meanwhile gets the same one.

        Raises:
            RefusedError: the run does not run.
        """
        with self._changed:
            self._hear()
            if self._saves:
                return self._saves[0].future
            order = SaveOrder(Future())
            self._saves.append(order)
            self._changed.notify_all()
            return order.future

    def stop(self, reason: str, state: RunState = "stopped") -> None:
        """Have the trainer save and end; whoever waits is told the reason, at once.

        state: of the run behind that.
        """
        with self._changed:
            if self._stop is not None or self._state not in ("starting", "running"):
                return
            self._stop = StopOrder(state, reason)
            self._end("stopping", reason)

    # ----------------------------------------------------------------------------------- for the trainer

    def open(self, snapshot: Mapping[str, Any] | None) -> None:
        """Take up a checkpoint's ledger, or begin a new one, with what happened since; then clients may come.

        Raises:
            CheckpointError: the journal is damaged, or cannot be written.
        """
        with self._changed:
            self._take_up(snapshot)
            # What was settled before stays as it was, whatever is gone by from now on.
            self._ledger.go_by(_ledger_settings(self.settings), self._now())
            self._sync()
            if self._state == "starting":
                self._set_state("running", "")

    def open_ended(self, snapshot: Mapping[str, Any] | None, state: RunState, reason: str) -> None:
        """Take up the ledger of a run that has ended, for what it still answers: posts that are repeated.

        Raises:
            CheckpointError: the journal is damaged.
        """
        with self._changed:
            self._take_up(snapshot)
            self._set_state(state, reason)

    def _take_up(self, snapshot: Mapping[str, Any] | None) -> None:
        if snapshot is not None:
            self._ledger.load_state_dict(snapshot)
        self._ledger.replay(self._journal.read())
        self._offset = self._ledger.clock - self._clock()
        self._heard_at = self._clock()

    def next_order(self, timeout_s: float | None = None) -> Order | None:
        """Wait for something to do. To learn comes before to sample: what is sampled is then younger.

        timeout_s: None is returned after so long without anything; None waits as long as it takes.
        """
        until = math.inf if timeout_s is None else self._clock() + timeout_s
        with self._changed:
            while True:
                if self._stop is not None:
                    return self._stop
                if self._saves:
                    return self._saves.pop(0)
                self._ledger.expire(self._now())
                groups = self._ledger.next_groups()
                if groups is not None:
                    return LearnOrder(groups)
                if waiting := sum(not each.is_taken for each in self._asks):
                    if waiting < max(2, self.settings.prompts_per_step):  # a whole update's came together
                        self._changed.wait(_GATHER_S)
                    return self._take_asks()
                if self._clock() - self._heard_at > self._idle_s:
                    self.stop(f"no client has asked for anything in {self._idle_s:g} s")
                    continue
                left_s = until - self._clock()
                if left_s <= 0:
                    return None
                self._changed.wait(min(self._wait_s(), left_s))

    @property
    def next_number(self) -> int:
        """Number that the next group gets: what its samples are drawn by."""
        return self._ledger.next_number

    def deliver(self, outcomes: Sequence[tuple[WaitingAsk, SampledGroup | RefusedError]]) -> None:
        """Hand out what was sampled for prompts, or why one cannot be."""
        with self._changed:
            done = [waiting for waiting, _ in outcomes]
            self._asks = [each for each in self._asks if each not in done]
            if self._state != "running":
                return
            handouts = [each for pair in outcomes for each in self._handouts(*pair)]
            self._sync()
            for future, handout in handouts:
                if isinstance(handout, RefusedError):
                    _fail_all([future], handout)
                else:
                    _resolve(future, handout)

    def learned(self, metrics: Metrics) -> None:
        """Note that the update of the latest `LearnOrder` was made."""
        with self._changed:
            self._ledger.learned()
            self.metrics = metrics
            if self.version % self.settings.logging_steps == 0:
                self.events.add("metrics", {"model_version": [self.run_id, self.version], "metrics": metrics})
            reached = [future for version, future in self._versions if version <= self.version]
            self._versions = [each for each in self._versions if each[0] > self.version]
            for future in reached:
                _resolve(future, self.version)

    def capture(self) -> dict[str, Any]:
        """The ledger as JSON values; what happens from now on stands in another segment of the journal."""
        with self._changed:
            self._journal.begin_segment()
            return self._ledger.state_dict()

    def close(self, state: RunState, reason: str) -> None:
        """End with a state: everybody who waits is told the reason, and so is who comes later."""
        with self._changed:
            self._end(state, reason)
            self._journal.close()

    # ------------------------------------------------------------------------------------------------- parts

    def _now(self) -> float:
        return self._clock() + self._offset

    def _hear(self) -> None:
        """Refuse a request where the run's state forbids it."""
        if self._state != "running":
            raise self._refusal()
        self._heard_at = self._clock()

    def _refusal(self) -> RefusedError:
        if self._state == "starting":
            return RefusedError(UNAVAILABLE, f"run {self.run_id} is being loaded", retry_after_s=_STARTING_S)
        if self._stop is not None and self._stop.state == "running":  # the next service goes on with it
            return RefusedError(UNAVAILABLE, f"{self._stop.reason}: come again", retry_after_s=_STARTING_S)
        behind = f": {self._reason}" if self._reason else ""
        return RefusedError(CONFLICT, f"run {self.run_id} is {self._state}{behind}")

    def _waiting_for(self, asker: Asker) -> Future[Handout] | None:
        """What a request waits for that was sent before and is repeated.

        Raises:
            RefusedError: it asked for something else.
        """
        if not asker.request:
            return None
        for each in self._asks:
            for other, future in each.everybody:
                if (other.client, other.request) == (asker.client, asker.request):
                    if other.digest != asker.digest:
                        raise RefusedError(
                            CONFLICT, f"`request_id` {asker.request!r} waits already, for something else"
                        )
                    return future
        return None

    def _take_asks(self) -> SampleOrder:
        self._asks = [each for each in self._asks if not _is_given_up(each)]
        asks = [each for each in self._asks if not each.is_taken]
        for each in asks:
            each.is_taken = True
        return SampleOrder(asks)

    def _wait_s(self) -> float:
        """Until something may be due."""
        lapse = self._ledger.next_lapse()
        return _SLICE_S if lapse is None else min(_SLICE_S, max(0.01, lapse - self._now()))

    def _handouts(
        self, waiting: WaitingAsk, outcome: SampledGroup | RefusedError
    ) -> list[tuple[Future[Handout], Handout | RefusedError]]:
        """What each of those gets who wait for a prompt."""
        if isinstance(outcome, RefusedError):
            return [(future, outcome) for future in waiting.futures]
        # Of who has gone and cannot come again the samples lapse.
        there = [(asker, future) for asker, future in waiting.everybody if not future.cancelled()]
        handouts = self._ledger.issue(
            outcome.prompt,
            outcome.completions,
            outcome.version,
            waiting.ask.key,
            [asker for asker, _ in there],
            self._now(),
        )
        return [*zip([future for _, future in there], handouts, strict=True)]

    def _sync(self) -> None:
        """Have the disk take all that has happened, before anybody is told.

        Raises:
            CheckpointError: it does not, and what is in memory is more than a next service would know: the
                run ends.
        """
        try:
            self._journal.sync()
        except CheckpointError as error:
            self.stop(str(error), "failed")
            raise

    def _set_state(self, state: RunState, reason: str) -> None:
        self._state, self._reason = state, reason
        self.events.add("state", {"run_id": self.run_id, "state": state, "reason": reason})

    def _end(self, state: RunState, reason: str) -> None:
        """Tell everybody who waits that the run takes nothing more."""
        self._set_state(state, reason)
        refusal = self._refusal()
        _fail_all([future for each in self._asks for future in each.futures], refusal)
        _fail_all([future for _, future in self._versions], refusal)
        _fail_all([order.future for order in self._saves], refusal)
        self._asks, self._versions, self._saves = [], [], []
        self._changed.notify_all()


def _ledger_settings(settings: TrainingSettings) -> LedgerSettings:
    return LedgerSettings(
        group_size=settings.num_completions_per_prompt,
        groups_per_step=settings.prompts_per_step,
        total_steps=settings.max_steps,
        lease_s=settings.lease_s,
        max_staleness=settings.max_staleness,
        max_groups=settings.most_groups,
    )


def _is_given_up(waiting: WaitingAsk) -> bool:
    return not waiting.is_taken and all(future.cancelled() for future in waiting.futures)


def _resolve(future: Future[Any], value: Any) -> None:
    with suppress(InvalidStateError):  # whoever waited has gone
        future.set_result(value)


def _fail_all(futures: Sequence[Future[Any]], error: Exception) -> None:
    for future in futures:
        with suppress(InvalidStateError):
            future.set_exception(error)
