"""A run: its folder, its loop over steps, its checkpoints, and how it goes on after an interruption.

A resumed run is the run that was not interrupted, bit for bit on a CPU: the trainer is built as at first (the
reference of PPO is the policy of the very start), then takes up what the checkpoint holds.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from conch import __version__
from conch.checkpoint import (
    CHECKPOINTS,
    STATE_FOLDER,
    Checkpoint,
    check_space,
    checkpoint_bytes,
    delete_checkpoint,
    delete_leftovers,
    link_best,
    newest_checkpoint,
    partial_of,
    read_checkpoint,
    seal,
    steps_of,
)
from conch.cli import save_resolved
from conch.config import Section, TrainConfig
from conch.engine import Engine
from conch.errors import CheckpointError, ConfigError
from conch.log import get_logger
from conch.tracking import METRICS_FILE, Tracker, make_run_dir
from conch.types import Metrics

_log = get_logger(__name__)

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""143: what a shell reports for a process that SIGTERM ended; schedulers take it for a preemption."""

_FREE_KEYS = (
    *("train.resume", "train.run_dir", "train.output_dir", "train.total_steps", "train.num_processes"),
    *("train.eval_every", "train.eval_repeats", "train.save_every", "train.keep_last"),
    *("train.best_metric", "train.early_stopping", "tracking.", "reward.url", "reward.attempt_timeout"),
    *("reward.connect_timeout_s", "reward.on_model_change", "reward.headers_env"),
    *("reward.deadline_s", "reward.max_in_flight", "reward.on_failure", "reward.wait_budget_s"),
)
"""Settings (or beginnings of their names) that a resumed run may change: none touches what is learned, but
for the length of the run, which moves the end of the learning-rate schedule."""


@runtime_checkable
class Resumable(Protocol):
    """What a checkpoint restores."""

    config: Any
    engine: Engine

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `Trainer.state_dict` gave."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """What the loop drives; `Resumable`, too."""

    config: Any
    engine: Engine
    run: Run

    @property
    def default_best_metric(self) -> str:
        """The evaluation metric that decides which checkpoint is best, unless `train.best_metric` does."""
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


@dataclass
class Run:
    """Where a run stands.

    folder: the run's own. step: steps done. best, best_step: of the metric that decides, None before the
    first evaluation. worse: evaluations in a row that were not better. continued: True for a resumed run.
    """

    folder: Path
    step: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    continued: bool = False

    def note(self, step: int, metric: str, value: float) -> bool:
        """Compare an evaluation with the best so far; True where it is better. NaN never is."""
        sign = -1 if metric.endswith("loss") else 1
        better = value == value and (self.best is None or sign * value > sign * self.best)
        if better:
            self.best, self.best_step = value, step
        self.worse = 0 if better else self.worse + 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """Everything but the folder, which may be moved."""
        return {"step": self.step, "best": self.best, "best_step": self.best_step, "worse": self.worse}


# ------------------------------------------------------------------------------------------------------ start


def start_run(trainer: Resumable, module: nn.Module) -> Run:
    """Make the run's folder, or take up the run that `train.resume` names: the last thing a constructor does.

    module: what is trained, for an estimate of a checkpoint's size.

    Raises:
        ConfigError: the folder cannot be made or holds another run.
        CheckpointError: nothing to go on with, another model or configuration, or too little disk space.
    """
    engine, config = trainer.engine, trainer.config
    found: list[tuple[Path, Checkpoint | None]] = []
    engine.together(lambda: found.append(_find(config)) if engine.is_main else None)
    # Rank 0 has read and checked every byte: once is enough.
    folder, resumed = engine.broadcast(found[0] if found else (Path(), None))
    engine.together(lambda: check_space(folder, checkpoint_bytes(module)))
    run = Run(folder)
    if resumed is not None:
        engine.together(lambda: _take_up(trainer, run, resumed))
    return run


def _find(config: Any) -> tuple[Path, Checkpoint | None]:
    """The run's folder and the checkpoint to go on with, None for a new run. Rank 0 alone."""
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint is None:
        train: TrainConfig = config.train
        if train.resume == "auto" and train.run_dir is not None:
            # Interrupted before its first checkpoint: nothing there is worth more than a new start.
            (train.run_dir / METRICS_FILE).unlink(missing_ok=True)
        return make_run_dir(train), None
    _check_same(checkpoint, config)
    delete_leftovers(checkpoint.run_dir)
    return checkpoint.run_dir.resolve(), Checkpoint(checkpoint.folder.resolve(), checkpoint.state)


def _checkpoint_to_resume(config: Any) -> Checkpoint | None:
    train: TrainConfig = config.train
    if train.resume is None:
        return None
    if train.resume == "auto":
        runs = [train.run_dir] if train.run_dir is not None else _runs_below(train.output_dir)
        return next((found for run in runs if (found := newest_checkpoint(run)) is not None), None)
    folder = Path(train.resume)
    if not folder.is_dir():
        raise CheckpointError(f"`train.resume` = {folder}: there is no such folder")
    if steps_of(folder):
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(f"`train.resume` = {folder}: none of its checkpoints is whole")
        return checkpoint
    return read_checkpoint(folder.resolve())  # through `best`, which is a link


def _runs_below(output_dir: Path) -> list[Path]:
    """Folders of runs that saved something, newest first."""
    runs = {path.parent.parent for path in output_dir.glob(f"*/*/{CHECKPOINTS}/step_*")}
    return sorted(runs, reverse=True)


def _check_same(checkpoint: Checkpoint, config: Section) -> None:
    """Refuse a checkpoint of another algorithm or configuration.

    Raises:
        CheckpointError: names what differs.
    """
    state = checkpoint.state
    if state["algorithm"] != type(config).__name__:
        raise CheckpointError(
            f"the checkpoint {checkpoint.folder} is of a {state['algorithm']}, this run is a "
            f"{type(config).__name__}"
        )
    old, new = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not key.startswith(_FREE_KEYS)]
    if refused:
        named = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in refused[:5])
        raise CheckpointError(
            f"the checkpoint {checkpoint.folder} was made with another configuration: {named}. "
            "Go on with the old one, or start a new run from the checkpoint with `model.path`"
        )
    if "train.total_steps" in changed:
        _log.warning("train.total_steps was %s, is %s", old["train.total_steps"], new["train.total_steps"])


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as `section.key`."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _take_up(trainer: Resumable, run: Run, checkpoint: Checkpoint) -> None:
    state, engine = checkpoint.state, trainer.engine
    if state["num_processes"] != engine.num_ranks:
        raise CheckpointError(
            f"the checkpoint {checkpoint.folder} was saved by {state['num_processes']} processes, here run "
            f"{engine.num_ranks}: start as many, or start a new run from it with `model.path`"
        )
    trainer.load_state_dict(state["trainer"])
    engine.load_state_dict(state["engine"])
    engine.load_state(checkpoint.folder / STATE_FOLDER)
    for name, value in state["run"].items():
        setattr(run, name, value)
    run.continued = True
    _log.info("going on with %s after step %d", run.folder, run.step)


# ------------------------------------------------------------------------------------------------------- loop


def fit(trainer: Trainer, name: str) -> Path:
    """Run all steps that are left, with evaluations and checkpoints as `config.train` says.

    Returns the run folder.

    Raises:
        SystemExit: code 143, after SIGTERM: the step was finished and saved, and `train.resume` goes on.
    """
    run, train = trainer.run, trainer.config.train
    if trainer.engine.is_main:
        save_resolved(trainer.config, run.folder / "config.yaml")
    _log.info("run folder: %s", run.folder)
    done = run.step if run.continued else None
    tracker = Tracker(
        run.folder,
        trainer.config.tracking,
        total_steps=train.total_steps,
        desc=name,
        run_config=trainer.config,
        done_steps=done,
    )
    with tracker, _sigterm() as received:
        if train.eval_every and not run.continued:
            tracker.log(0, _evaluate(trainer, tracker)[0])
        while run.step < train.total_steps and not _is_hopeless(run, train):
            _advance(trainer, tracker, received)
    if _is_hopeless(run, train):
        _log.info("stopped early: no better than at step %d for %d evaluations", run.best_step, run.worse)
    return run.folder


def _advance(trainer: Trainer, tracker: Tracker, received: Callable[[], bool]) -> None:
    """One step with what is due after it."""
    run, train = trainer.run, trainer.config.train
    metrics = trainer.step()
    run.step += 1
    last = run.step == train.total_steps
    better = False
    if train.eval_every and (last or run.step % train.eval_every == 0):
        scores, better = _evaluate(trainer, tracker)
        metrics |= scores
    tracker.log(run.step, metrics)
    # One rank may have got the signal before another finished this very step: all leave together.
    leaving = trainer.engine.sum_int(int(received())) > 0
    if last or leaving or better or _is_due(run.step, train) or _is_hopeless(run, train):
        save_checkpoint(trainer)
    if leaving and not last:
        _log.warning(
            "SIGTERM: saved step %d in %s; go on with train.resume=%s", run.step, run.folder, run.folder
        )
        raise SystemExit(SIGTERM_EXIT_CODE)


def _evaluate(trainer: Trainer, tracker: Tracker) -> tuple[Metrics, bool]:
    """Metrics of an evaluation, and whether it is the best so far.

    Raises:
        ConfigError: `train.best_metric` is not among them.
    """
    run, wanted = trainer.run, trainer.config.train.best_metric
    scores = trainer.evaluate(tracker, run.step)
    metric = wanted or trainer.default_best_metric
    if metric not in scores:
        if wanted:
            names = ", ".join(sorted(scores))
            raise ConfigError(f"`train.best_metric` = {wanted} is no evaluation metric; there are: {names}")
        return scores, False
    return scores, run.note(run.step, metric, scores[metric]) and run.step > 0


def _is_due(step: int, train: TrainConfig) -> bool:
    return bool(train.save_every) and step % train.save_every == 0


def _is_hopeless(run: Run, train: TrainConfig) -> bool:
    return 0 < train.early_stopping <= run.worse


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does no more than being noted. Python allows that in the main thread alone."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _frame: got.append(number))
    try:
        yield lambda: bool(got)
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------- save


def save_checkpoint(trainer: Trainer) -> Path:
    """Write the whole state after `run.step` steps; called on all ranks.

    Raises:
        CheckpointError: on all ranks; older checkpoints are as they were.
    """
    engine, run = trainer.engine, trainer.run
    folder = run.folder / CHECKPOINTS / f"step_{run.step}"
    partial = partial_of(folder)
    engine.together(lambda: check_space(run.folder, checkpoint_bytes(engine.unwrapped)))
    trainer.save_pretrained(partial)
    engine.together(lambda: engine.save_state(partial / STATE_FOLDER))
    state = {
        "step": run.step,
        "algorithm": type(trainer.config).__name__,
        "num_processes": engine.num_ranks,
        "run": run.state_dict(),
        "trainer": trainer.state_dict(),
        "engine": engine.state_dict(),
        "config": trainer.config.model_dump(mode="json"),
        "versions": {"conch": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }

    def finish() -> None:
        if engine.is_main:
            seal(partial, folder, state)
            _tidy(run, trainer.config.train)

    engine.together(finish)
    return folder


def _tidy(run: Run, train: TrainConfig) -> None:
    """Point to the best checkpoint, and delete those that nothing asks for."""
    saved = steps_of(run.folder)
    if run.best_step in saved:
        link_best(saved[run.best_step])
    # A former best one that was not due has no claim left.
    regular = [step for step in saved if step == run.step or _is_due(step, train)]
    kept = {*(regular[: train.keep_last] if train.keep_last else regular), run.best_step}
    for step, path in saved.items():
        if step not in kept:
            delete_checkpoint(path)
