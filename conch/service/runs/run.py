"""One run of a service: its folder, and the thread that trains.

runs/<id>/run.json     settings and state
          journal/     what has happened since the checkpoints
          train/       the run folder of the trainer: metrics, checkpoints
          exports/     models that were asked for
"""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.errors import CheckpointError, ConchError, first_line
from conch.log import get_logger
from conch.service.leases.journal import Journal
from conch.service.protocol import RunState, StatusResponse, TrainingSettings
from conch.service.refusals import INTERNAL, NOT_FOUND, UNAVAILABLE, UNPROCESSABLE, RefusedError
from conch.service.runs.exchange import Exchange
from conch.service.runs.exports import Exports

_log = get_logger(__name__)

RUN_FILE = "run.json"


class TrainingRun:
    """A run that is under way, or that was in this process.

    folder: of the run, `runs/<id>`.
    idle_s: time without a request after which it is stopped.
    """

    def __init__(self, folder: Path, settings: TrainingSettings, *, idle_s: float) -> None:
        self.folder = folder
        self.run_id = folder.name
        self.settings = settings
        self._journal = Journal(folder / "journal")
        self.exchange = Exchange(self.run_id, settings, self._journal, idle_s=idle_s)
        self.loaded: Future[None] = Future()
        """Ends once clients may come, or with why they never will."""
        self._thread = threading.Thread(target=self._train, name=f"train-{self.run_id}", daemon=True)
        self._exports = Exports(folder)

    def start(self) -> None:
        """Begin to load the model, or to go on where a checkpoint stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note("running", "")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the trainer's thread runs."""
        return self._thread.is_alive()

    def stop(self, reason: str, timeout_s: float, *, resumes: bool = False) -> None:
        """Save a checkpoint and end, between two updates.

        resumes: True where the next start of the service goes on with it.
        timeout_s: longest wait for the end.
        """
        self.exchange.stop(reason, "running" if resumes else "stopped")
        self._thread.join(timeout_s)

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
        """Wait for the end of the thread."""
        self._thread.join(timeout_s)

    # --------------------------------------------------------------------------------------------- the thread

    def _train(self) -> None:
        state: RunState = "failed"
        reason, status = "", INTERNAL
        try:
            state, reason = self._fit()
        except ConchError as error:
            reason, status = str(error), UNPROCESSABLE
            _log.error("run %s failed: %s", self.run_id, reason)
        except BaseException as error:  # a bug, or no memory: whoever waits has to be told
            reason = f"{type(error).__name__}: {first_line(error)}"
            _log.exception("run %s failed", self.run_id)
        try:
            self._note(state, reason)
        except OSError as error:
            _log.error("the state of run %s cannot be written: %s", self.run_id, error)
        self.exchange.close("stopped" if state == "running" else state, reason)
        if not self.loaded.done():
            self.loaded.set_exception(RefusedError(status, f"run {self.run_id} could not start: {reason}"))

    def _fit(self) -> tuple[RunState, str]:
        """Train to the end, or until it is told to stop; returns the state behind that, and why."""
        # What takes seconds to load, in the thread that may take them.
        from conch.service.runs.settings import run_config
        from conch.service.runs.trainer import RemoteGRPOTrainer, StoppedError
        from conch.training.checkpointing import save_checkpoint

        config = run_config(self.settings, self.folder / "train")
        trainer = RemoteGRPOTrainer(config, self.exchange, self._journal)
        try:
            self.loaded.set_result(None)
            try:
                trainer.fit()
            except StoppedError as stopped:
                if trainer.run.saved != trainer.run.step:
                    save_checkpoint(trainer)
                return stopped.order.state, stopped.order.reason
            return "finished", f"all {self.settings.max_steps} updates are made"
        finally:
            trainer.close()

    def _note(self, state: RunState, reason: str) -> None:
        """Write settings and state down, for the next start of the service."""
        values = {
            "settings": self.settings.model_dump(mode="json"),
            "state": state,
            "reason": reason,
            "version": self.exchange.version,
            "time": time.time(),
        }
        replace_text(self.folder / RUN_FILE, json.dumps(values, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of it; None where it is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / RUN_FILE
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: null for what is no number."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
