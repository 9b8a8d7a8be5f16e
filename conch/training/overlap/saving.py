"""A checkpoint that is written while training goes on.

The trainer waits while its state is copied (`snapshots.py`). Then a thread of each rank writes the rank's
files into the folder aside and leaves a mark there; rank 0's waits for all marks, completes the folder and
gives it its name (`conch.runs.checkpoint.seal`), so that a kill at any instant leaves the checkpoint before.
The threads use no collectives, whose order is training's. The ranks' main threads agree at the ends of steps
on what has become of the checkpoint.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from conch.errors import CheckpointError
from conch.runs.checkpoint import seal
from conch.training.overlap.snapshots import Snapshot, WriteCancelledError

GRACE_S = 20.0
"""Longest wait of rank 0 for the others' marks, in seconds, once a run has failed: they may be gone."""

_POLL_S = 0.05


@dataclass(frozen=True)
class Target:
    """Where a checkpoint comes to stand.

    partial: folder in which it is written.
    folder: its name once it is whole.
    step: steps done.
    best_step: step of the best checkpoint, as it was then.
    """

    partial: Path
    folder: Path
    step: int
    best_step: int


class BackgroundWrite:
    """One rank's share in the writing of a checkpoint. Its methods are for the main thread.

    state: content of `trainer_state.json`, see `conch.runs.checkpoint.state_text`.
    """

    def __init__(self, target: Target, snapshot: Snapshot, state: str, *, rank: int, num_ranks: int) -> None:
        self.target = target
        self.seconds = 0.0
        """From the start to this rank's end; for rank 0 the whole checkpoint's."""
        self._snapshot, self._state = snapshot, state
        self._rank, self._num_ranks = rank, num_ranks
        self._failure: CheckpointError | None = None
        self._share_ended, self._all_ended, self._given_up = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name=f"checkpoint of step {target.step}")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank has ended, well or not; rank 0 ends last."""
        return not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the checkpoint does not become whole."""
        return self._failure is not None

    def wait_for_share(self) -> None:
        """Wait until this rank's files are written.

        Raises:
            CheckpointError: they cannot be.
        """
        self._share_ended.wait()
        self._raise_failure()

    def wait(self) -> None:
        """Wait until the checkpoint is whole; on other ranks than 0 until their files are written.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._thread.join()
        self._raise_failure()

    def wait_alone(self, grace_s: float = GRACE_S) -> None:
        """The same for a run that has failed, whose other ranks may be gone.

        grace_s: longest wait for the marks of the others, in seconds.

        Raises:
            CheckpointError: it cannot be written, or another rank has not written its files.
        """
        self._share_ended.wait()
        if not self._all_ended.wait(grace_s):
            self._given_up.set()
        self.wait()

    def cancel(self) -> None:
        """End the write soon, whatever it has come to."""
        self._snapshot.cancel()
        self._given_up.set()
        self._thread.join()

    def discard(self) -> None:
        """Delete what was written of a checkpoint that did not become whole."""
        shutil.rmtree(self.target.partial, ignore_errors=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._write_share()
            if self._rank == 0 and self._failure is None:
                self._complete()
        except CheckpointError as error:
            self._failure = error
        finally:
            self.seconds = time.perf_counter() - started
            self._share_ended.set()
            self._all_ended.set()

    def _write_share(self) -> None:
        try:
            self._snapshot.write()
            self._mark(self._rank).touch()
        # A full disk surfaces as OSError or RuntimeError; nothing may end the thread without a word.
        except Exception as error:
            reason = "it was given up" if isinstance(error, WriteCancelledError) else error
            self._failure = CheckpointError(
                f"the checkpoint {self.target.folder} cannot be written: {reason}"
            )
            self._mark(self._rank, "failed").touch()
        finally:
            self._share_ended.set()

    def _complete(self) -> None:
        """Rank 0's: wait for the others, then make the folder a checkpoint."""
        others = range(1, self._num_ranks)
        while not all(self._mark(rank).exists() for rank in others):
            if self._given_up.wait(_POLL_S) or any(self._mark(rank, "failed").exists() for rank in others):
                raise CheckpointError(
                    f"the checkpoint {self.target.folder} is not whole: another process has not written its "
                    "part of it"
                )
        self._all_ended.set()
        for rank in range(self._num_ranks):
            self._mark(rank).unlink()
        seal(self.target.partial, self.target.folder, self._state)

    def _mark(self, rank: int, what: str = "written") -> Path:
        return self.target.partial / f".rank_{rank}.{what}"
