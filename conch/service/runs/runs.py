"""All runs of a service: one at a time is under way."""

from __future__ import annotations

import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from conch.config import RolloutConfig
from conch.errors import CheckpointError, ConfigError
from conch.log import get_logger
from conch.service.protocol import StatusResponse, TrainingSettings
from conch.service.refusals import CONFLICT, NOT_FOUND, UNAVAILABLE, UNPROCESSABLE, RefusedError
from conch.service.runs.exchange import Exchange
from conch.service.runs.exports import Exports
from conch.service.runs.run import SaidOfRun, TrainingRun, check_change, ended_exchange, read_run, said_of
from conch.service.runs.settings import check_readable

if TYPE_CHECKING:
    from conch.service.runs.ranks import Leader

_log = get_logger(__name__)


class Runs:
    """The runs below a folder. Any thread may call.

    output_dir: of the service; runs are below `runs/`.
    models: that a run may start from; empty for any.
    idle_s: time without a request after which a run is stopped.
    stop_s: longest wait for a run to save and end.
    rollout: what samples; None takes the trainer's process.
    leader: of the other ranks that train runs; None where this process trains alone.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        models: tuple[str, ...] = (),
        idle_s: float,
        stop_s: float,
        rollout: RolloutConfig | None = None,
        leader: Leader | None = None,
    ) -> None:
        self._rollout = rollout
        self._leader = leader
        self._folder = output_dir / "runs"
        self._models = models
        self._idle_s = idle_s
        self._stop_s = stop_s
        self._lock = threading.Lock()
        self._current: TrainingRun | None = None
        self._ended: dict[str, Exchange] = {}

    def take_up(self) -> None:
        """Go on with the run that was under way when the service ended.

        Raises:
            CheckpointError: what a run's folder says of it cannot be read.
        """
        under_way = [
            (said.time, folder)
            for folder in self._folders()
            if (said := read_run(folder)) is not None and said.state == "running"
        ]
        if under_way:
            self.resume(max(under_way)[1].name)

    def start(self, settings: TrainingSettings) -> TrainingRun:
        """Begin a run.

        Raises:
            RefusedError: another is under way, or the model is none of those that may be trained or read.
        """
        if self._models and settings.model_id not in self._models:
            names = ", ".join(self._models)
            raise RefusedError(CONFLICT, f"`model_id` is none of those that this service trains: {names}")
        try:
            check_readable(settings.model_id)
        except ConfigError as error:
            raise RefusedError(UNPROCESSABLE, str(error)) from error
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        return self._begin(self._folder / f"{stamp}-{uuid.uuid4().hex[:12]}", settings)

    def resume(self, run_id: str, settings: TrainingSettings | None = None) -> TrainingRun:
        """Go on with a run.

        settings: from now on; None takes those that it had.

        Raises:
            RefusedError: there is none of this id, it has made its last update, another is under way, or the
                settings would have it learn otherwise.
        """
        folder = self._existing(run_id)
        said = said_of(folder)
        if settings is not None:
            check_change(said.settings, settings)
        settings = settings or said.settings
        if said.state == "finished" and settings.max_steps <= said.settings.max_steps:
            raise RefusedError(
                CONFLICT, f"run {run_id} has made all of its updates: resume it with a larger `max_steps`"
            )
        return self._begin(folder, settings)

    def check_current(self, run: TrainingRun, run_id: str | None) -> None:
        """See that a request is for this run.

        Raises:
            RefusedError: it is for another one, or for none that is there.
        """
        if run_id not in (None, run.run_id):
            self._existing(str(run_id))
            raise RefusedError(CONFLICT, f"run {run_id} is not under way; {run.run_id} was the last to be")

    def rewarded(self, run_id: str | None) -> Exchange:
        """Where rewards of a run go. One that has ended answers what it has taken, whenever that was.

        Raises:
            RefusedError: there is no such run.
            CheckpointError: what is on disk of it cannot be read.
        """
        current = self._current
        if current is not None and run_id in (None, current.run_id):
            return current.exchange
        folder = self._latest() if run_id is None else self._existing(run_id)
        with self._lock:
            if self._current is not None and self._current.folder == folder:
                return self._current.exchange
            if folder.name not in self._ended:
                self._ended = {folder.name: ended_exchange(folder)}  # the latest alone: it may be large
            return self._ended[folder.name]

    def find(self, run_id: str | None) -> TrainingRun:
        """The run that a request is for.

        Raises:
            RefusedError: it is not the one that is under way, or none is.
        """
        current = self._current
        if current is None:
            folder = self._latest() if run_id is None else self._existing(run_id)
            said = said_of(folder)
            behind = f": {said.reason}" if said.reason else ""
            raise RefusedError(CONFLICT, f"run {folder.name} is {said.ended}{behind}")
        self.check_current(current, run_id)
        return current

    def stop(self) -> TrainingRun:
        """Stop the run that is under way.

        Raises:
            RefusedError: none is.
        """
        run = self.find(None)
        if not run.is_alive:
            raise RefusedError(CONFLICT, f"run {run.run_id} is {run.exchange.state} already")
        run.stop("a client stopped it", self._stop_s)
        if run.is_alive:
            raise RefusedError(
                UNAVAILABLE, f"run {run.run_id} is still being saved: see /status", retry_after_s=5.0
            )
        return run

    def model(self, version: int | None, run_id: str | None, timeout_s: float) -> tuple[str, Path]:
        """Id of a run, and a zip file of its model; see `TrainingRun.model`. None takes the latest run.

        Raises:
            RefusedError: there is none of this id or version.
        """
        current = self._current
        if current is not None and run_id in (None, current.run_id):
            return current.run_id, current.model(version, timeout_s)
        folder = self._latest() if run_id is None else self._existing(run_id)
        return folder.name, Exports(folder).saved(version)

    def list(self) -> list[StatusResponse]:
        """All runs, the newest first."""
        current = self._current
        listed: list[StatusResponse] = []
        for folder in sorted(self._folders(), reverse=True):
            if current is not None and folder.name == current.run_id:
                listed.append(current.status().model_copy(update={"metrics": {}}))
                continue
            try:
                said = read_run(folder)
            except CheckpointError as error:
                _log.warning("%s", error)
                continue
            if said is not None:
                listed.append(_status_of(folder, said))
        return listed

    def status(self) -> StatusResponse:
        """Of the run that is under way, or that was the last to be, in this process or before it."""
        if self._current is not None:
            return self._current.status()
        folders = [each for each in self._folders() if read_run(each) is not None]
        if not folders:
            return StatusResponse()
        folder = max(folders)
        counts = self.rewarded(folder.name).counts()
        served = {
            "completion_requests_served": counts["requests_served"],
            "reward_requests_served": counts["posts_accepted"],
        }
        return _status_of(folder, said_of(folder)).model_copy(update={"counts": counts, **served})

    def close(self) -> None:
        """Save and end what is under way; the next service goes on with it."""
        if self._current is not None:
            self._current.stop("the service stops", self._stop_s, resumes=True)

    def end_waits(self) -> None:
        """Tell everybody who waits that the service stops, without a wait for that."""
        if self._current is not None:
            self._current.exchange.stop("the service stops", "running")

    def _begin(self, folder: Path, settings: TrainingSettings) -> TrainingRun:
        with self._lock:
            current = self._current
            if current is not None and current.has_ended:
                current.join(self._stop_s)
            if current is not None and current.is_alive:
                raise RefusedError(
                    CONFLICT,
                    f"run {current.run_id} is {current.exchange.state}: POST /stop first, one run at a time",
                )
            run = TrainingRun(
                folder, settings, idle_s=self._idle_s, rollout=self._rollout, leader=self._leader
            )
            run.start()
            self._current = run
            self._ended.pop(folder.name, None)
            return run

    def _folders(self) -> list[Path]:
        return [path for path in self._folder.iterdir()] if self._folder.is_dir() else []

    def _latest(self) -> Path:
        """Folder of the run that was begun last."""
        begun = [each for each in self._folders() if read_run(each) is not None]
        if not begun:
            raise RefusedError(CONFLICT, "no run was started: POST /start first")
        return max(begun)

    def _existing(self, run_id: str) -> Path:
        """Folder of a run. The id is compared with names that are there: it never becomes a path."""
        for folder in self._folders():
            if folder.name == run_id and read_run(folder) is not None:
                return folder
        raise RefusedError(NOT_FOUND, f"there is no run {run_id[:80]!r}; GET /runs lists them")


def _status_of(folder: Path, said: SaidOfRun) -> StatusResponse:
    """What is known of a run that is not under way."""
    return StatusResponse(
        training_settings=said.settings,
        run_id=folder.name,
        state=said.ended,
        error=said.reason if said.state == "failed" else "",
        model_version=(folder.name, said.version),
    )
