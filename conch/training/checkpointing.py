"""Progress of a run and its checkpoints: after a step, or of the state before a step that waits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

from conch import __version__
from conch.config import TrainConfig
from conch.distributed.random_state import RandomState
from conch.distributed.train_engine import TrainEngine
from conch.errors import CheckpointError, ConchError
from conch.evaluation.watch import Evaluation, Watch
from conch.log import get_logger
from conch.machine.memory import available_memory
from conch.rewards.replay import append_lines, line_of
from conch.rewards.scorer import RewardScorer
from conch.runs.checkpoint import (
    CHECKPOINTS,
    STATE_FOLDER,
    check_space,
    checkpoint_bytes,
    delete_checkpoint,
    link_best,
    partial_of,
    save_rank_state,
    seal,
    snapshot_bytes,
    state_text,
    steps_of,
)
from conch.runs.tracking import Tracker
from conch.training.overlap.saving import BackgroundWrite, Target
from conch.training.overlap.snapshots import Snapshot
from conch.types import Metrics, RewardResult, Rollout

_log = get_logger(__name__)

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""143: what a shell reports for a process that SIGTERM ended; schedulers take it for a preemption."""


@runtime_checkable
class Trainer(Protocol):
    """Interface that the training loop drives; a `Resumable` as well."""

    config: Any
    engine: TrainEngine
    run: Run

    @property
    def scorer(self) -> RewardScorer | None:
        """None for a trainer that asks for no rewards; with one there is a `config.reward`."""
        ...

    @property
    def default_best_metric(self) -> str:
        """The evaluation metric that decides which checkpoint is best, unless `train.best_metric` does."""
        ...

    @property
    def evaluation(self) -> Evaluation | None:
        """What the latest `evaluate` measured, sample by sample; None where nothing is sampled."""
        ...

    def step(self) -> Metrics:
        """One step of training."""
        ...

    def evaluate(self, tracker: Tracker | None = None, step: int = 0) -> Metrics:
        """Measure on held-out data; may write tables to `tracker`."""
        ...

    def save_pretrained(self, folder: Path) -> Path:
        """Write the model; called on all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and random states: JSON values, the same on all
        ranks."""
        ...


@runtime_checkable
class RankState(Protocol):
    """Something of one rank's own that a resumed run takes up."""

    def capture(self) -> Callable[[], dict[str, Any]]:
        """Capture what stands at this moment; the result gives it as JSON values, whenever it is called."""
        ...


@dataclass
class Run:
    """Progress of a run.

    folder: of the run.
    step: steps done.
    best_metric: the metric that decides; "" before the first evaluation.
    best, best_step: its best value and the step; None before the first evaluation.
    worse: evaluations in a row that were not better.
    watch: what evaluations are compared with, for alarms and `train.stop_when`.
    measured: metrics of the last step while its evaluation is under way, {} before the first step, else None.
    saved: step of the latest checkpoint that is whole.
    pending: the checkpoint that is being written, the same on all ranks.
    checkpoint_times: of checkpoints since the last row of metrics, in seconds; see `take_times`.
    is_short_of_memory: whether this rank has told that training waits for checkpoints since memory is short.
    continued: True for a resumed run.
    own: what a rank has of its own to go on with, beside what is the same on all ranks; None where nothing
        is.
    on_saved: called on the main process with the folder of each checkpoint, once that is whole and those are
        deleted that nothing asks for any more. A CheckpointError of its own ends the run.
    """

    folder: Path
    step: int = 0
    best_metric: str = ""
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    watch: Watch = field(default_factory=Watch)
    measured: Metrics | None = None
    saved: int | None = None
    pending: BackgroundWrite | None = None
    checkpoint_times: Metrics = field(default_factory=dict)
    is_short_of_memory: bool = False
    continued: bool = False
    own: RankState | None = None
    on_saved: Callable[[Path], object] | None = None

    def note(self, step: int, metric: str, value: float) -> bool:
        """Compare an evaluation with the best so far; True where it is better. NaN never is.

        A metric says nothing of another one's best, as of a run that is resumed with gold beside it.
        """
        if self.best_metric not in ("", metric):
            self.best, self.worse = None, 0
        self.best_metric = metric
        sign = -1 if metric.endswith("loss") else 1
        better = value == value and (self.best is None or sign * value > sign * self.best)
        if better:
            self.best, self.best_step = value, step
        self.worse = 0 if better else self.worse + 1
        return better

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Inside, training waits for a checkpoint: the time counts as `time/checkpoint_s`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add_time("checkpoint", time.perf_counter() - started)

    def note_write(self, seconds: float) -> None:
        """Count how long the writing of a checkpoint took, beside training or not."""
        self._add_time("checkpoint_write", seconds)

    def take_times(self) -> Metrics:
        """Metrics of the checkpoints since the last call."""
        times, self.checkpoint_times = self.checkpoint_times, {}
        return times

    def _add_time(self, what: str, seconds: float) -> None:
        name = f"time/{what}_s"
        self.checkpoint_times[name] = self.checkpoint_times.get(name, 0.0) + seconds

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run takes up; not the folder, which may be moved."""
        names = ("step", "best_metric", "best", "best_step", "worse", "measured")
        return {**{name: getattr(self, name) for name in names}, "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; older checkpoints have no state of alarms."""
        for name, value in state.items():
            if name == "watch":
                self.watch.load_state_dict(value)
            else:
                setattr(self, name, value)


@dataclass(frozen=True)
class StepStart:
    """Random and trainer state at the start of a step or an evaluation.

    A checkpoint saved while waiting for rewards holds it, so that the step can be repeated. Weights and
    optimizer are not part of it: nothing is learned before the rewards are there.
    """

    random: RandomState
    trainer: dict[str, Any]
    own: Callable[[], dict[str, Any]] | None


class RunOutageHooks:
    """Callbacks of the scorer during an outage; see `conch.rewards.outage.OutageHooks`.

    received: number of the signal to leave that this process got, SIGTERM or Ctrl-C's SIGINT; else 0.
    """

    def __init__(self, trainer: Trainer, received: Callable[[], int]) -> None:
        self._trainer = trainer
        self._received = received
        self._begun: StepStart | None = None

    def begin(self) -> None:
        """A step or an evaluation begins: `save` will go back to here."""
        if self._trainer.scorer is not None and self._trainer.config.reward.failure.policy == "wait":
            trainer = self._trainer
            own = trainer.run.own.capture() if trainer.run.own is not None else None
            self._begun = StepStart(RandomState.capture(), trainer.state_dict(), own)

    def save(self) -> None:
        """Save what stood at the last `begin`, unless a checkpoint of just that is there."""
        run = self._trainer.run
        settle_checkpoint(self._trainer)
        if run.saved == run.step and run.measured is None:
            _log.warning("the checkpoint of step %d in %s stands before this one", run.step, run.folder)
            return
        folder = save_checkpoint(self._trainer, self._begun)
        _log.warning("saved %s while the reward server is away: train.resume=%s", folder, run.folder)

    def leaving(self) -> bool:
        """True once this process was told to leave."""
        return self._received() > 0

    @property
    def signal_name(self) -> str:
        """What told this process to leave, or the rank that it leaves with."""
        return "Ctrl-C" if self._received() == signal.SIGINT else "SIGTERM"

    def leave(self) -> NoReturn:
        """Save and leave: see `end`."""
        self.save()
        folder = self._trainer.run.folder
        _log.warning(
            "%s: left while waiting for rewards; go on with train.resume=%s", self.signal_name, folder
        )
        self.end()

    def end(self) -> NoReturn:
        """End the program as the signal asks.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: code 143, after SIGTERM, of this process or of another rank's.
        """
        if self._received() == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(SIGTERM_EXIT_CODE)

    def scored(self, rollouts: Sequence[Rollout], results: Sequence[RewardResult]) -> None:
        """Write the rewards of all ranks to the run's record, where one is kept."""
        trainer = self._trainer
        if not trainer.config.reward.record:
            return
        ranks, run = trainer.engine.collectives, trainer.run
        where = {"step": run.step, "phase": "eval", "rank": ranks.rank}
        if run.measured is None:
            where |= {"step": run.step + 1, "phase": "train"}
        if trainer.scorer is not None and trainer.scorer.needs_groups:
            where["groups"] = True  # so that a replay deals prompts out to ranks as this run does
        pairs = zip(rollouts, results, strict=True)
        lines = ranks.all_gather([line_of(rollout, result, **where) for rollout, result in pairs])
        if ranks.is_main:
            append_lines(run.folder, lines)


def is_due(step: int, train: TrainConfig) -> bool:
    """True where `train.save_every` asks for a checkpoint after this step."""
    return bool(train.save_every) and step % train.save_every == 0


def save_checkpoint(trainer: Trainer, begun: StepStart | None = None, *, background: bool = False) -> Path:
    """Write the whole state after `run.step` steps; called on all ranks.

    begun: for a checkpoint within a step or an evaluation: what stood at its beginning.
    background: return once the state is copied, where `train.save_in_background` and the memory allow that:
        `run.pending` is then being written, and `settle_checkpoint` says what has become of it.

    Raises:
        CheckpointError: on all ranks, of this checkpoint or the one that was being written; older ones are as
            they were.
    """
    settle_checkpoint(trainer)
    ranks, run = trainer.engine.collectives, trainer.run
    folder = run.folder / CHECKPOINTS / f"step_{run.step}"
    target = Target(partial_of(folder), folder, run.step, run.best_step)
    started = time.perf_counter()
    with run.standing_still(), ExitStack() as undo:
        module = trainer.engine.unwrapped
        ranks.run_on_all_ranks(lambda: check_space(run.folder, checkpoint_bytes(module)))
        snapshot = Snapshot() if background and _has_room_for_copies(trainer) else None
        if snapshot is not None:
            undo.callback(snapshot.close)
        with nullcontext() if snapshot is None else snapshot.take():
            state = _write_state(trainer, target.partial, begun)
        if snapshot is not None:
            undo.pop_all()
            run.pending = BackgroundWrite(target, snapshot, state, rank=ranks.rank, num_ranks=ranks.num_ranks)
            return folder

        def finish() -> None:
            if ranks.is_main:
                seal(target.partial, folder, state)
                _take_into_account(run, trainer.config.train, target)

        ranks.run_on_all_ranks(finish)
    run.note_write(time.perf_counter() - started)
    run.saved = run.step
    return folder


def _write_state(trainer: Trainer, partial: Path, begun: StepStart | None) -> str:
    """Save what a checkpoint holds, but for the file that completes it, whose content is returned."""
    engine, ranks, run = trainer.engine, trainer.engine.collectives, trainer.run
    trainer.save_pretrained(partial)
    with begun.random.restored() if begun else nullcontext():
        ranks.run_on_all_ranks(lambda: engine.save_state(partial / STATE_FOLDER))
    own = begun.own if begun else run.own.capture() if run.own is not None else None
    if own is not None:
        ranks.run_on_all_ranks(lambda: save_rank_state(partial, ranks.rank, own()))
    state = {
        "step": run.step,
        "algorithm": type(trainer.config).__name__,
        "num_processes": ranks.num_ranks,
        "run": run.state_dict(),
        "trainer": begun.trainer if begun else trainer.state_dict(),
        "engine": engine.state_dict(),
        "config": trainer.config.model_dump(mode="json"),
        "versions": {"conch": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    return state_text(state)


def _has_room_for_copies(trainer: Trainer) -> bool:
    """Whether every machine has twice the memory that copies of a checkpoint take; the same on all ranks."""
    if not trainer.config.train.save_in_background:
        return False
    engine, ranks = trainer.engine, trainer.engine.collectives
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.num_ranks)
    needed = snapshot_bytes(
        engine.unwrapped,
        sharded=engine.shards_optimizer,
        num_ranks=ranks.num_ranks,
        local_ranks=min(local_ranks, ranks.num_ranks),
    )
    available = available_memory()
    has_room = available is None or 2 * needed <= available
    if ranks.all_reduce_int(int(not has_room)) == 0:
        return True
    if not has_room and not trainer.run.is_short_of_memory:
        trainer.run.is_short_of_memory = True
        _log.warning(
            "training waits for the checkpoint of step %d: to write it beside training takes a copy of %s MB"
            ", which is more than half of the %s MB of memory that are free",
            *(trainer.run.step, f"{needed / 1e6:,.0f}", f"{(available or 0) / 1e6:,.0f}"),
        )
    return False


def look_after_checkpoint(trainer: Trainer) -> None:
    """Take a checkpoint into account once all ranks have written it; called on all ranks, between steps.

    Raises:
        CheckpointError: on all ranks: it cannot be written.
    """
    run, ranks = trainer.run, trainer.engine.collectives
    if run.pending is not None and ranks.all_reduce_int(int(run.pending.is_done)) == ranks.num_ranks:
        settle_checkpoint(trainer)


def settle_checkpoint(trainer: Trainer) -> None:
    """Wait for the checkpoint that is being written, and take it into account; called on all ranks.

    Raises:
        CheckpointError: on all ranks: it cannot be written; older checkpoints are as they were.
    """
    run, ranks = trainer.run, trainer.engine.collectives
    pending = run.pending
    if pending is None:
        return
    with run.standing_still():
        try:
            # First the shares: a rank that is gone is noticed here, and rank 0 would wait for its mark.
            ranks.run_on_all_ranks(pending.wait_for_share)
            ranks.run_on_all_ranks(pending.wait)
        except ConchError:  # of this rank or another
            if pending.has_failed:
                _give_up(run, is_main=ranks.is_main)
            raise
        run.pending = None
        ranks.run_on_all_ranks(
            lambda: _take_into_account(run, trainer.config.train, pending.target) if ranks.is_main else None
        )
    run.note_write(pending.seconds)
    run.saved = pending.target.step


def finish_checkpoint(trainer: Trainer) -> None:
    """Let a checkpoint that is being written become whole where the run fails, without the other ranks, which
    may be gone or busy. A failure of its own is told, and does not stand in for that of the run."""
    run, is_main = trainer.run, trainer.engine.collectives.is_main
    if run.pending is None:
        return
    try:
        run.pending.wait_alone()
        if is_main:
            _take_into_account(run, trainer.config.train, run.pending.target)
    except CheckpointError as error:
        _log.error("%s", error)
        _give_up(run, is_main=is_main)


def cancel_checkpoint(trainer: Trainer) -> None:
    """Leave a checkpoint that is being written unfinished: older ones are as they were."""
    _give_up(trainer.run, is_main=trainer.engine.collectives.is_main)


def _give_up(run: Run, *, is_main: bool) -> None:
    pending, run.pending = run.pending, None
    if pending is not None:
        pending.cancel()
        if is_main:
            pending.discard()


def _take_into_account(run: Run, train: TrainConfig, target: Target) -> None:
    """Point to the best checkpoint, delete those that nothing asks for, and tell of the new one."""
    _tidy(run, train, target)
    if run.on_saved is not None:
        run.on_saved(target.folder)


def _tidy(run: Run, train: TrainConfig, target: Target) -> None:
    saved = steps_of(run.folder)
    if target.best_step in saved:
        link_best(saved[target.best_step])
    # A former best one that was not due has no claim left.
    regular = [step for step in saved if step == target.step or is_due(step, train)]
    wanted_steps = {*(regular[: train.keep_last] if train.keep_last else regular), target.best_step}
    for step, path in saved.items():
        if step not in wanted_steps:
            delete_checkpoint(path)
