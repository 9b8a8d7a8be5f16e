"""A run: its folder, its loop over steps, and how it goes on after an interruption.

A resumed run is the run that was not interrupted, bit for bit on the same type of CPU with the same threads
and torch: the trainer is built as at first (the reference of PPO is the policy of the very start), then takes
up what the checkpoint holds.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from conch.checkpoint import (
    CHECKPOINTS,
    STATE_FOLDER,
    Checkpoint,
    check_space,
    checkpoint_bytes,
    delete_leftovers,
    newest_checkpoint,
    read_checkpoint,
    steps_of,
)
from conch.cli import save_resolved
from conch.config import Section, TrainConfig
from conch.engine import Engine
from conch.errors import CheckpointError, ConfigError
from conch.log import get_logger
from conch.rewards.record import cut_lines
from conch.tracking import METRICS_FILE, Tracker, make_run_dir
from conch.trainers.saving import SIGTERM_EXIT_CODE, Run, RunHost, Trainer, is_due, save_checkpoint
from conch.types import Metrics

_log = get_logger(__name__)

_FREE_KEYS = (
    *("train.resume", "train.run_dir", "train.output_dir", "train.total_steps", "train.num_processes"),
    *("train.eval_every", "train.eval_repeats", "train.save_every", "train.keep_last"),
    *("train.best_metric", "train.early_stopping", "tracking.", "reward.url", "reward.attempt_timeout"),
    *("reward.connect_timeout_s", "reward.on_model_change", "reward.headers_env"),
    *("reward.deadline_s", "reward.max_in_flight", "reward.on_failure", "reward.wait_budget_s"),
    *("reward.members.", "reward.checkpoint_after_s", "reward.record", "reward.replay"),
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
    run.continued, run.saved = True, run.step
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
    tracker = Tracker(
        run.folder,
        trainer.config.tracking,
        total_steps=train.total_steps,
        desc=name,
        run_config=trainer.config,
        done_steps=_logged_steps(run) if run.continued else None,
    )
    with tracker, _sigterm() as received:
        host = RunHost(trainer, received)
        if trainer.engine.is_main:
            kept = run.step if run.continued else -1
            cut_lines(run.folder, kept, evaluated=run.measured is None)
        if trainer.scorer is not None:
            trainer.scorer.attach(host)
        _begin(trainer, tracker, host)
        while run.step < train.total_steps and not _is_hopeless(run, train):
            _advance(trainer, tracker, host)
    if _is_hopeless(run, train):
        _log.info("stopped early: no better than at step %d for %d evaluations", run.best_step, run.worse)
    return run.folder


def _logged_steps(run: Run) -> int:
    """The last step whose metrics are complete; -1 before those of the start are."""
    return run.step - (run.measured is not None)


def _begin(trainer: Trainer, tracker: Tracker, host: RunHost) -> None:
    """Evaluate what training starts from, or again what an interrupted run was evaluating."""
    run = trainer.run
    if run.measured:
        _conclude(trainer, tracker, host, run.measured)
    elif run.measured is not None or (trainer.config.train.eval_every and not run.continued):
        tracker.log(0, _evaluate(trainer, tracker, host, {})[0])


def _advance(trainer: Trainer, tracker: Tracker, host: RunHost) -> None:
    """One step with what is due after it."""
    host.begin()
    metrics = trainer.step()
    trainer.run.step += 1
    _conclude(trainer, tracker, host, metrics)


def _conclude(trainer: Trainer, tracker: Tracker, host: RunHost, metrics: Metrics) -> None:
    """What is due after a step that had these metrics."""
    run, train = trainer.run, trainer.config.train
    last = run.step == train.total_steps
    better = False
    if train.eval_every and (last or run.step % train.eval_every == 0):
        scores, better = _evaluate(trainer, tracker, host, metrics)
        metrics = metrics | scores
    tracker.log(run.step, metrics)
    # One rank may have got the signal before another finished this very step: all leave together.
    leaving = trainer.engine.sum_int(int(host.leaving())) > 0
    if last or leaving or better or is_due(run.step, train) or _is_hopeless(run, train):
        save_checkpoint(trainer)
    if leaving and not last:
        _log.warning(
            "SIGTERM: saved step %d in %s; go on with train.resume=%s", run.step, run.folder, run.folder
        )
        raise SystemExit(SIGTERM_EXIT_CODE)


def _evaluate(trainer: Trainer, tracker: Tracker, host: RunHost, measured: Metrics) -> tuple[Metrics, bool]:
    """Metrics of an evaluation, and whether it is the best so far.

    measured: what the step before it reported, {} before the first.

    Raises:
        ConfigError: `train.best_metric` is not among them.
    """
    run, wanted = trainer.run, trainer.config.train.best_metric
    run.measured = measured
    host.begin()
    scores = trainer.evaluate(tracker, run.step)
    run.measured = None
    metric = wanted or trainer.default_best_metric
    if metric not in scores:
        if wanted:
            names = ", ".join(sorted(scores))
            raise ConfigError(f"`train.best_metric` = {wanted} is no evaluation metric; there are: {names}")
        return scores, False
    return scores, run.note(run.step, metric, scores[metric]) and run.step > 0


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
