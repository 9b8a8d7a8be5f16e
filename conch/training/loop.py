"""A run: its folder, its loop over steps, and how it goes on after an interruption.

A resumed run is the run that was not interrupted, bit for bit on the same type of CPU with the same threads
and torch: the trainer is built as at first (the reference of PPO is the policy of the very start), then takes
up what the checkpoint holds.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from conch.atomic_files import replace_text
from conch.cli import save_resolved
from conch.cli.sweeps.results import BEST_METRIC_FILE
from conch.config import GOLD_METRIC, TrainConfig
from conch.distributed.launcher import launched_processes
from conch.errors import ConfigError
from conch.evaluation.records import EVALUATIONS
from conch.evaluation.watch import comparable, cut_evaluations, report
from conch.log import get_logger, is_main_process
from conch.rewards.replay import cut_lines
from conch.runs.checkpoint import BEST_LINK, CHECKPOINTS, steps_of
from conch.runs.ending import Ending, ending_text
from conch.runs.state import noted_state
from conch.runs.tracking import Tracker
from conch.training.checkpointing import (
    Run,
    RunOutageHooks,
    Trainer,
    cancel_checkpoint,
    finish_checkpoint,
    is_due,
    look_after_checkpoint,
    save_checkpoint,
)
from conch.types import Metrics

_log = get_logger(__name__)

_CTRL_C = "Ctrl-C: finishing the step, to save it and leave; Ctrl-C again leaves at once, without saving"


def fit(trainer: Trainer, name: str) -> Path:
    """Run all steps that are left, with evaluations and checkpoints as `config.train` says.

    Returns the run folder.

    Raises:
        SystemExit: code 143, after SIGTERM: the step was finished and saved, and `train.resume` goes on.
        KeyboardInterrupt: the same after Ctrl-C.
    """
    run, train = trainer.run, trainer.config.train
    if trainer.engine.collectives.is_main:
        save_resolved(trainer.config, run.folder / "config.yaml")
    trainer.engine.collectives.watch(run.folder)
    _log.info("run folder: %s", run.folder)
    tracker = Tracker(
        run.folder,
        trainer.config.tracking,
        total_steps=train.total_steps,
        desc=name,
        run_config=trainer.config,
        done_steps=_logged_steps(run) if run.continued else None,
    )
    is_main = trainer.engine.collectives.is_main
    on_record = noted_state(run.folder, name, train.total_steps) if is_main else contextlib.nullcontext()
    try:
        # Signals first: what Ctrl-C interrupts must not be the opening of a display.
        with _noted_signals(tracker) as received, tracker, on_record:
            host = RunOutageHooks(trainer, received)
            if is_main:
                last_step = run.step if run.continued else -1
                cut_lines(run.folder, last_step, evaluated=run.measured is None)
                cut_evaluations(run.folder, last_step, evaluated=run.measured is None)
            if trainer.scorer is not None:
                trainer.scorer.attach(host)
            with _ended_checkpoint(trainer):
                _begin(trainer, tracker, host)
                while run.step < train.total_steps and not _is_hopeless(run, train):
                    _advance(trainer, tracker, host)
    except (SystemExit, KeyboardInterrupt):
        _tell_ending(trainer, name, tracker)
        raise
    _tell_early_end(run, train)
    _tell_ending(trainer, name, tracker)
    return run.folder


@contextmanager
def _ended_checkpoint(trainer: Trainer) -> Iterator[None]:
    """Behind it no checkpoint is being written any more. A run that fails lets one become whole; a second
    Ctrl-C, which leaves at once, does not wait for that."""
    try:
        yield
    except KeyboardInterrupt:
        cancel_checkpoint(trainer)
        raise
    except BaseException:
        finish_checkpoint(trainer)
        raise


def _tell_early_end(run: Run, train: TrainConfig) -> None:
    if run.best is not None and run.best_step == 0:
        _log.warning(
            "no evaluation was better than that of the start: there is no checkpoints/best, the last one is "
            "checkpoints/step_%d",
            run.step,
        )
    if train.stop_rule is not None and _has_fallen(run, train):
        _log.info("stopped early (train.stop_when): %s", run.watch.reason(train.stop_rule))
    elif _is_hopeless(run, train):
        _log.info("stopped early: no better than at step %d for %d evaluations", run.best_step, run.worse)


def _tell_ending(trainer: Trainer, name: str, tracker: Tracker) -> None:
    """Tell how the run stands at its end, and what comes next. Rank 0 alone does."""
    run, config, ranks = trainer.run, trainer.config, trainer.engine.collectives
    if not ranks.is_main:
        return
    best_link = run.folder / CHECKPOINTS / BEST_LINK
    newest = next(iter(steps_of(run.folder).values()), None)
    ending = Ending(
        folder=run.folder,
        algorithm=name,
        step=run.step,
        total_steps=config.train.total_steps,
        best=None if run.best is None else (run.best_metric, run.best, run.best_step),
        checkpoint=best_link if best_link.exists() else newest,
        from_files=config.data.train is not None,
        has_evaluations=(run.folder / EVALUATIONS).is_dir(),
        stopped_early=_is_hopeless(run, config.train),
        num_processes=ranks.num_ranks,
    )
    tracker.say(ending_text(ending))


def _logged_steps(run: Run) -> int:
    """The last step whose metrics are complete; -1 before those of the start are."""
    return run.step - (run.measured is not None)


def _begin(trainer: Trainer, tracker: Tracker, host: RunOutageHooks) -> None:
    """Evaluate what training starts from, or again what an interrupted run was evaluating."""
    run = trainer.run
    if run.measured:
        _conclude(trainer, tracker, host, run.measured)
    elif run.measured is not None or (trainer.config.train.eval_every and not run.continued):
        scores = _evaluate(trainer, tracker, host, {})[0]
        if not scores:
            _log.warning(
                "nothing is evaluated, though train.eval_every=%d: give data.eval, in Python evaluation "
                "samples or prompts",
                trainer.config.train.eval_every,
            )
        tracker.log(0, scores)


def _advance(trainer: Trainer, tracker: Tracker, host: RunOutageHooks) -> None:
    """One step with what is due after it."""
    host.begin()
    metrics = trainer.step()
    trainer.run.step += 1
    look_after_checkpoint(trainer)
    _conclude(trainer, tracker, host, metrics | trainer.run.take_times())


def _conclude(trainer: Trainer, tracker: Tracker, host: RunOutageHooks, metrics: Metrics) -> None:
    """What is due after a step that had these metrics."""
    run, train = trainer.run, trainer.config.train
    last = run.step == train.total_steps
    better = False
    if train.eval_every and (last or run.step % train.eval_every == 0):
        scores, better = _evaluate(trainer, tracker, host, metrics)
        metrics = metrics | scores
    tracker.log(run.step, metrics, is_best=better)
    # One rank may have got the signal before another finished this very step: all leave together.
    leaving = trainer.engine.collectives.all_reduce_int(int(host.leaving())) > 0
    is_end = last or leaving or _is_hopeless(run, train)
    if is_end or better or is_due(run.step, train):
        save_checkpoint(trainer, background=not is_end)
    if leaving and not last:
        _log.warning(
            "%s: saved step %d in %s; go on with train.resume=%s",
            *(host.signal_name, run.step, run.folder, run.folder),
        )
        host.end()


def _evaluate(
    trainer: Trainer, tracker: Tracker, host: RunOutageHooks, measured: Metrics
) -> tuple[Metrics, bool]:
    """Metrics of an evaluation, and whether it is the best so far.

    measured: what the step before it reported, {} before the first.

    Raises:
        ConfigError: `train.best_metric` or that of `train.stop_when` is not among them.
    """
    run, best_metric = trainer.run, trainer.config.train.best_metric
    run.measured = measured
    host.begin()
    scores = trainer.evaluate(tracker, run.step)
    run.measured = None
    metric = best_metric or trainer.default_best_metric
    alarms = _watch(trainer, tracker, scores)
    if metric not in scores:
        if best_metric:
            names = ", ".join(sorted(scores))
            raise ConfigError(
                f"`train.best_metric` = {best_metric} is no evaluation metric; there are: {names}"
            )
        return scores | alarms, False
    if trainer.engine.collectives.is_main:
        replace_text(run.folder / BEST_METRIC_FILE, f"{metric}\n")
    value = comparable(scores, metric)
    if metric == GOLD_METRIC and math.isnan(value):  # gold was away, which is no step towards an early end
        return scores | alarms, False
    better = run.note(run.step, metric, value)
    return scores | alarms, better and run.step > 0


def _watch(trainer: Trainer, tracker: Tracker, scores: Metrics) -> Metrics:
    """Compare an evaluation with those before it: the alarms' metrics; those that begin are put on record.

    Raises:
        ConfigError: `train.stop_when` goes by what is not evaluated.
    """
    run, evaluation, rule = trainer.run, trainer.evaluation, trainer.config.train.stop_rule
    metrics: Metrics = {}
    if evaluation is not None:
        metrics, begun = run.watch.judge(evaluation, trainer.config.evaluation.alarms)
        if trainer.engine.collectives.is_main:
            report(begun, evaluation, tracker)
    if rule is not None:
        run.watch.count_fall(run.step, scores, evaluation, rule)
    return metrics


def _has_fallen(run: Run, train: TrainConfig) -> bool:
    return train.stop_rule is not None and run.watch.has_fallen(train.stop_rule)


def _is_hopeless(run: Run, train: TrainConfig) -> bool:
    """Whether an early end is due."""
    return 0 < train.early_stopping <= run.worse or _has_fallen(run, train)


@contextmanager
def _noted_signals(tracker: Tracker) -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and the first Ctrl-C do no more than being noted; a second Ctrl-C interrupts.

    Gives the number of the signal that came first, 0 before one has. Python allows that in the main thread
    alone.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in noted and launched_processes() <= 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT and is_main_process():
            tracker.notice(_CTRL_C)
        noted.append(number)

    # What was started to ignore Ctrl-C, as a shell's scripts start programs with `&`, goes on ignoring it.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
