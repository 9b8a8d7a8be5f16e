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

from conch.cli import save_resolved
from conch.config import TrainConfig
from conch.errors import ConfigError
from conch.log import get_logger
from conch.rewards.replay import cut_lines
from conch.runs.tracking import Tracker
from conch.training.checkpointing import (
    SIGTERM_EXIT_CODE,
    Run,
    RunOutageHooks,
    Trainer,
    is_due,
    save_checkpoint,
)
from conch.types import Metrics

_log = get_logger(__name__)


def fit(trainer: Trainer, name: str) -> Path:
    """Run all steps that are left, with evaluations and checkpoints as `config.train` says.

    Returns the run folder.

    Raises:
        SystemExit: code 143, after SIGTERM: the step was finished and saved, and `train.resume` goes on.
    """
    run, train = trainer.run, trainer.config.train
    if trainer.engine.collectives.is_main:
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
        host = RunOutageHooks(trainer, received)
        if trainer.engine.collectives.is_main:
            last_step = run.step if run.continued else -1
            cut_lines(run.folder, last_step, evaluated=run.measured is None)
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


def _begin(trainer: Trainer, tracker: Tracker, host: RunOutageHooks) -> None:
    """Evaluate what training starts from, or again what an interrupted run was evaluating."""
    run = trainer.run
    if run.measured:
        _conclude(trainer, tracker, host, run.measured)
    elif run.measured is not None or (trainer.config.train.eval_every and not run.continued):
        tracker.log(0, _evaluate(trainer, tracker, host, {})[0])


def _advance(trainer: Trainer, tracker: Tracker, host: RunOutageHooks) -> None:
    """One step with what is due after it."""
    host.begin()
    metrics = trainer.step()
    trainer.run.step += 1
    _conclude(trainer, tracker, host, metrics)


def _conclude(trainer: Trainer, tracker: Tracker, host: RunOutageHooks, metrics: Metrics) -> None:
    """What is due after a step that had these metrics."""
    run, train = trainer.run, trainer.config.train
    last = run.step == train.total_steps
    better = False
    if train.eval_every and (last or run.step % train.eval_every == 0):
        scores, better = _evaluate(trainer, tracker, host, metrics)
        metrics = metrics | scores
    tracker.log(run.step, metrics)
    # One rank may have got the signal before another finished this very step: all leave together.
    leaving = trainer.engine.collectives.all_reduce_int(int(host.leaving())) > 0
    if last or leaving or better or is_due(run.step, train) or _is_hopeless(run, train):
        save_checkpoint(trainer)
    if leaving and not last:
        _log.warning(
            "SIGTERM: saved step %d in %s; go on with train.resume=%s", run.step, run.folder, run.folder
        )
        raise SystemExit(SIGTERM_EXIT_CODE)


def _evaluate(
    trainer: Trainer, tracker: Tracker, host: RunOutageHooks, measured: Metrics
) -> tuple[Metrics, bool]:
    """Metrics of an evaluation, and whether it is the best so far.

    measured: what the step before it reported, {} before the first.

    Raises:
        ConfigError: `train.best_metric` is not among them.
    """
    run, best_metric = trainer.run, trainer.config.train.best_metric
    run.measured = measured
    host.begin()
    scores = trainer.evaluate(tracker, run.step)
    run.measured = None
    metric = best_metric or trainer.default_best_metric
    if metric not in scores:
        if best_metric:
            names = ", ".join(sorted(scores))
            raise ConfigError(
                f"`train.best_metric` = {best_metric} is no evaluation metric; there are: {names}"
            )
        return scores, False
    return scores, run.note(run.step, metric, scores[metric]) and run.step > 0


def _is_hopeless(run: Run, train: TrainConfig) -> bool:
    return 0 < train.early_stopping <= run.worse


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does no more than being noted. Python allows that in the main thread alone."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _frame: signals.append(number))
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGTERM, before)
