"""One run of a service: its folder, and the thread that trains.

runs/<id>/run.json     settings and state
          journal/     what has happened since the checkpoints
          train/       the run folder of the trainer: metrics, checkpoints
          exports/     models that were asked for
"""

from __future__ import annotations

import math
import threading
import time
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from conch.atomic_files import replace_text
from conch.config import RolloutConfig
from conch.errors import CheckpointError, ConchError, DistributedError, first_line
from conch.log import get_logger
from conch.service.leases.journal import Journal
from conch.service.protocol import RunState, StatusResponse, TrainingSettings
from conch.service.refusals import (
    CONFLICT,
    INTERNAL,
    NOT_FOUND,
    UNAVAILABLE,
    UNPROCESSABLE,
    RefusedError,
)
from conch.service.runs.exchange import Exchange
from conch.service.runs.exports import Exports

if TYPE_CHECKING:
    from conch.service.runs.ranks import Leader

_log = get_logger(__name__)

RUN_FILE = "run.json"
TRAIN = "train"


class TrainingRun:
    """A run that is under way, or that was in this process.

    folder: of the run, `runs/<id>`.
    idle_s: time without a request after which it is stopped.
    rollout: what samples; None takes the trainer's process.
    leader: of the other ranks that train it; None where this process trains alone.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainingSettings,
        *,
        idle_s: float,
        rollout: RolloutConfig | None = None,
        leader: Leader | None = None,
    ) -> None:
        self.folder = folder
        self.run_id = folder.name
        self.settings = settings
        self._rollout = rollout
        self._journal = Journal(folder / "journal")
        self.exchange = Exchange(self.run_id, settings, self._journal, idle_s=idle_s)
        self.loaded: Future[None] = Future()
        """Ends once clients may come, or with why they never will."""
        self._leader = leader
        self._is_begun = False
        self._ended = threading.Event()
        self._exports = Exports(folder)

    def start(self) -> None:
        """Begin to load the model, or to go on where a checkpoint stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note("running", "")
        self._is_begun = True
        if self._leader is not None:
            # Loads torch, which a run of this process alone does in its thread.
            from conch.service.runs.ranks import RunStart

            self._leader.start(RunStart(self.settings, self.folder / TRAIN), self._train)
        else:
            threading.Thread(target=self._train, name=f"train-{self.run_id}", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether the trainer is at work."""
        return self._is_begun and not self._ended.is_set()

    def stop(self, reason: str, timeout_s: float, *, resumes: bool = False) -> None:
        """Save a checkpoint and end, between two updates.

        resumes: True where the next start of the service goes on with it.
        timeout_s: longest wait for the end.
        """
        self.exchange.stop(reason, "running" if resumes else "stopped")
        self.join(timeout_s)

    def status(self) -> StatusResponse:
        """State, counts and the latest metrics."""
        exchange = self.exchange
        counts = exchange.counts()
        return StatusResponse(
            training_settings=self.settings,
            completion_requests_served=counts["requests_served"],
            reward_requests_served=counts["posts_accepted"],
            run_id=self.run_id,
            state=exchange.state,
            error=exchange.reason if exchange.state == "failed" else "",
            model_version=(self.run_id, exchange.version),
            counts=counts,
            metrics=finite(exchange.metrics),
        )

    def model(self, version: int | None, timeout_s: float) -> Path:
        """A zip file of the model, whole.

        version: of the model; one that was not asked for before is there only while the model is of it.
        timeout_s: longest wait for an update to end, which the model is saved behind.

        Raises:
            RefusedError: there is no such version, or the update takes longer.
        """
        if self.exchange.state not in ("running", "starting"):
            return self._exports.saved(version)
        present = self.exchange.version
        if (known := self._exports.known(present if version is None else version)) is not None:
            return known
        if version not in (None, present):
            raise RefusedError(
                NOT_FOUND,
                f"version {version} of run {self.run_id} is not kept; the model is of version {present}",
            )
        try:
            return self._exports.zipped(self.exchange.save_model().result(timeout_s))
        except futures.TimeoutError:
            raise RefusedError(
                UNAVAILABLE, "an update is being made: ask for the model again", retry_after_s=1.0
            ) from None
        except RefusedError:
            if self.exchange.state != "finished":
                raise
            return self._exports.saved(version)  # the last update was made meanwhile

    @property
    def has_ended(self) -> bool:
        """Whether nothing is to be expected of the trainer any more."""
        return self.exchange.state in ("stopped", "finished", "failed")

    def join(self, timeout_s: float) -> None:
        """Wait until the trainer has ended."""
        if self._is_begun:
            self._ended.wait(timeout_s)

    # --------------------------------------------------------------------------------------------- the thread

    def _train(self) -> None:
        """Train to the end, and write down what came of it.

        Raises:
            DistributedError: other ranks are lost. The next start of the service goes on with the run.
        """
        state: RunState = "failed"
        reason, status = "", INTERNAL
        lost: DistributedError | None = None
        try:
            failure: ConchError | None = None
            try:
                state, reason = self._fit()
            except ConchError as error:
                failure = error
            failed = "" if failure is None else str(failure)
            if self._leader is not None:
                failed = self._leader.agree(failure)
            if failed:
                state, reason, status = "failed", failed, UNPROCESSABLE
                _log.error("run %s failed: %s", self.run_id, reason)
        except DistributedError as error:
            lost, state, reason, status = error, "running", str(error), UNAVAILABLE
            _log.error("run %s has lost its ranks: %s", self.run_id, reason)
            self.exchange.stop("the service has lost processes", "running")
        except BaseException as error:  # a bug, or no memory: whoever waits has to be told
            reason = f"{type(error).__name__}: {first_line(error)}"
            _log.exception("run %s failed", self.run_id)
            if self._leader is not None:  # the other ranks may be anywhere
                lost = DistributedError(f"rank 0 failed: {reason}")
        try:
            self._note(state, reason)
        except OSError as error:
            _log.error("the state of run %s cannot be written: %s", self.run_id, error)
        self.exchange.close("stopped" if state == "running" else state, reason)
        if not self.loaded.done():
            self.loaded.set_exception(RefusedError(status, f"run {self.run_id} could not start: {reason}"))
        self._ended.set()
        if lost is not None:
            raise lost

    def _fit(self) -> tuple[RunState, str]:
        """Train to the end, or until it is told to stop; returns the state behind that, and why."""
        # What takes seconds to load, in the thread that may take them.
        from conch.service.runs.trainer import train_run

        stopped = train_run(
            self.settings,
            self.folder / TRAIN,
            self._rollout,
            exchange=self.exchange,
            journal=self._journal,
            on_loaded=lambda: self.loaded.set_result(None),
        )
        if stopped is not None:
            return stopped.state, stopped.reason
        return "finished", f"all {self.settings.max_steps} updates are made"

    def _note(self, state: RunState, reason: str) -> None:
        """Write settings and state down, for the next start of the service."""
        said = SaidOfRun(
            settings=self.settings,
            state=state,
            reason=reason,
            version=self.exchange.version,
            time=time.time(),
        )
        replace_text(self.folder / RUN_FILE, said.model_dump_json(indent=2) + "\n")


class SaidOfRun(BaseModel):
    """What `run.json` says of a run.

    state: `running` while it is under way, and of one whose service ended meanwhile.
    reason: why it failed, or was stopped.
    version: updates that the model has seen.
    time: of writing, in seconds since 1970.
    """

    settings: TrainingSettings
    state: RunState
    reason: str
    version: int
    time: float

    @property
    def ended(self) -> RunState:
        """State of a run that is not under way."""
        return "stopped" if self.state == "running" else self.state


def read_run(folder: Path) -> SaidOfRun | None:
    """What a run's folder says of it; None where it is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / RUN_FILE
    if not file.exists():
        return None
    try:
        return SaidOfRun.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error


def said_of(folder: Path) -> SaidOfRun:
    """The same, of a folder that is a run's."""
    said = read_run(folder)
    assert said is not None, f"{folder} holds no run"
    return said


_MAY_CHANGE = ("max_steps", "lease_s", "max_staleness", "max_groups", "save_every", "logging_steps")


def check_change(before: TrainingSettings, now: TrainingSettings) -> None:
    """See that a run may go on with other settings than it had.

    Raises:
        RefusedError: it would learn otherwise, or break what it has answered.
    """
    old, new = before.model_dump(), now.model_dump()
    changed = [name for name in old if old[name] != new[name] and name not in _MAY_CHANGE]
    if changed:
        named = "; ".join(f"`{name}` was {old[name]!r}, is {new[name]!r}" for name in changed)
        raise RefusedError(
            CONFLICT,
            f"a run goes on with the settings that it learned with: {named}. These may change: "
            f"{', '.join(_MAY_CHANGE)}",
        )
    if now.max_steps < before.max_steps:
        raise RefusedError(
            CONFLICT,
            f"`max_steps` was {before.max_steps}: groups were promised updates up to that, so it may not be "
            f"less, as {now.max_steps} is",
        )


def ended_exchange(folder: Path) -> Exchange:
    """The exchange of a run that has ended, with its ledger as it was then.

    Raises:
        CheckpointError: checkpoint or journal cannot be read.
    """
    # What reads checkpoints loads torch.
    from conch.runs.checkpoint import read_rank_state, steps_of

    said = said_of(folder)
    exchange = Exchange(folder.name, said.settings, Journal(folder / "journal"), idle_s=math.inf)
    newest = next(iter(steps_of(folder / TRAIN).values()), None)
    snapshot = None if newest is None else read_rank_state(newest, 0)
    exchange.open_ended(snapshot, said.ended, said.reason)
    return exchange


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: null for what is no number."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
