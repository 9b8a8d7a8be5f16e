"""The sweep's parent process: it plans, starts jobs, watches them, and says what they came to.

It never trains, loads no torch and holds no GPU. Everything that it knows stands in the sweep's folder, so it
may be killed at any instant and started again.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import yaml

from conch.atomic_files import replace_text
from conch.cli.sweeps import launch, pictures, report, search
from conch.cli.sweeps.grammar import Axis, split_settings
from conch.cli.sweeps.launch import Program
from conch.cli.sweeps.plan import (
    Request,
    checked_digest,
    own_words,
    plan_axes,
    plan_jobs,
    print_plan,
)
from conch.cli.sweeps.processes import FolderLock, JobProcess, Jobs
from conch.cli.sweeps.record import Job, Record, make_folder, read_record, write_hydra_files
from conch.cli.sweeps.results import (
    Curve,
    direction_of,
    falls_behind,
    last_error,
    objective,
    read_curve,
    read_rows,
)
from conch.cli.sweeps.settings import SweepConfig
from conch.errors import ConfigError

_POLL_S = 0.1
_READ_EVERY_S = 1.0


def run_sweep(request: Request) -> int:
    """Run the sweep; returns the exit code: 0, 1 where a job failed, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: something is wrong that can be known before the first job starts; or a file of the sweep
            cannot be written, on a full disk say, which ends its jobs.
    """
    launch.refuse_launched(os.environ)
    settings, words = split_settings(request.overrides)
    program = launch.find_program(request.words)
    program.command(settings.launcher, ())
    axes = plan_axes(request, settings, words)
    if request.print_only:
        print_plan(request, settings, axes)
        return 0
    slots = launch.slots_of(settings, launch.visible_devices(os.environ))
    if settings.trials is not None:
        search.check_installed()
    folder = make_folder(settings.dir)
    try:
        return _run_in(folder, request, settings, axes, program, slots)
    except OSError as error:
        raise ConfigError(
            f"the sweep cannot go on: {error.filename or folder}: {error.strerror}; once that is mended, the "
            f"same command with sweep.dir={folder} goes on with it"
        ) from error


def _run_in(
    folder: Path,
    request: Request,
    settings: SweepConfig,
    axes: Sequence[Axis],
    program: Program,
    slots: Sequence[tuple[str, ...] | None],
) -> int:
    with ExitStack() as stack:
        stack.enter_context(FolderLock(folder))
        record = read_record(folder, request.section.__name__)
        plan_jobs(record, request, settings, axes)
        record.save()
        _write_command(record, settings, request, program)
        jobs = stack.enter_context(Jobs(folder, settings.grace_s))
        sweep = Sweep(record, request, settings, axes, program, jobs, list(slots))
        sweep.wait_for_leftovers()
        with _noted_signals() as received:
            sweep.run(received)
        return sweep.conclude(received)


def _write_command(record: Record, settings: SweepConfig, request: Request, program: Program) -> None:
    """Write `multirun.yaml`: what was asked for, for people."""
    content = {
        "command": shlex.join([*program.interpreter, *program.target, *program.words, *request.words]),
        "cwd": str(Path.cwd()),
        "config_name": request.config_name,
        "overrides": list(request.overrides),
        "sweep": settings.model_dump(mode="json"),
    }
    replace_text(record.folder / "multirun.yaml", yaml.safe_dump(content, sort_keys=False, width=110))


@dataclass
class Sweep:
    """A sweep at work.

    slots: GPUs of each job that may run at once, those in use taken out.
    running: number -> attempt, with the slot that it holds.
    """

    record: Record
    request: Request
    settings: SweepConfig
    axes: Sequence[Axis]
    program: Program
    jobs: Jobs
    slots: list[tuple[str, ...] | None]
    running: dict[int, tuple[JobProcess, tuple[str, ...] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reporter = report.Reporter(self._total())
        self._curves: dict[int, Curve] = {}
        self._reached: dict[int, tuple[int, int]] = {}
        self._next_read = 0.0
        self._leaving = False

    def wait_for_leftovers(self) -> None:
        """Wait for the end of what an earlier, killed parent of this sweep left running.

        Raises:
            ConfigError: some of it cannot be ended.
        """
        text = "waiting for %d processes of the sweep that was here before to save and leave"
        self.jobs.end_leftovers(lambda processes: self._reporter.event(text, len(processes)))

    def run(self, received: Sequence[int]) -> None:
        """Start and watch jobs until all have ended, or until a signal says to leave.

        received: signals so far; grows.
        """
        self._say_what_is_there()
        try:
            while True:
                if received:
                    self._leave(hard=len(received) > 1)
                self._collect()
                if not self._leaving:
                    self._start_jobs()
                self._watch()
                if not self.running and (self._leaving or self._next_job() is None):
                    return
                time.sleep(_POLL_S)
        finally:
            self._reporter.close()
            for process, _ in self.running.values():
                process.kill()

    def conclude(self, received: Sequence[int]) -> int:
        """Write results and pictures, print the table; returns the exit code."""
        for job in self.record.current:
            self._measure(job)
        self.record.save()
        report.write_csv(self.record, self.axes)
        metric = next((job.metric for job in self.record.current if job.metric), None)
        minimize = metric is not None and direction_of(self.settings, metric) == "minimize"
        best = report.best_job(self.record.current, minimize)
        self._draw(best)
        report.print_table(self.record, self.axes, best)
        failed = report.failures(self.record)
        for line in failed:
            print(line)
        open_jobs = [job for job in self.record.current if not job.is_settled]
        if failed or open_jobs:
            print(f"go on with: {self._command_to_go_on()}")
        if received:
            return 128 + received[0]
        return 1 if failed else 0

    def _total(self) -> int:
        if self.settings.trials is not None:
            return search.number_of_trials(self.axes, self.settings)
        return len(self.record.chosen)

    def _say_what_is_there(self) -> None:
        states = [job.state for job in self.record.current]
        skipped, total = sum(state in ("done", "pruned") for state in states), self._total()
        began = sum(self.record.run_dir(job).is_dir() and not job.is_settled for job in self.record.current)
        others = len(self.record.jobs) - len(self.record.chosen)
        self._reporter.event("sweep of %d jobs in %s", total, self.record.folder)
        if skipped or began:
            self._reporter.event("%d jobs are finished and skipped, %d go on where they were", skipped, began)
        if others:
            self._reporter.event(
                "%d jobs of other configurations stay in the folder as they are, and out of the results",
                others,
            )

    # Starting

    def _next_job(self) -> Job | None:
        """The job whose turn it is, as far as its turn may come now; of a search a new trial is drawn."""
        if self.settings.stop_on_failure and any(job.state == "failed" for job in self.record.current):
            return None
        for place, job in enumerate(self.record.current):
            if job.state == "waiting":
                return job if self._may_start(place) else None
        place = len(self.record.chosen)
        if self.settings.trials is None or place >= self._total() or not self._may_start(place):
            return None
        return self._draw_trial(place)

    def _may_start(self, place: int) -> bool:
        """True once all that this job may depend on is known, so that timing has no part in the results.

        A trial, and whether a job is pruned, depend on the results of the jobs up to `sweep.jobs` places
        before: those that can have ended when all jobs take equally long.
        """
        return all(job.is_settled for job in self._known(place)) or not self._is_dependent()

    def _known(self, place: int) -> list[Job]:
        return self.record.current[: max(0, place - self.settings.jobs + 1)]

    def _is_dependent(self) -> bool:
        return self.settings.trials is not None or self.settings.prune is not None

    def _draw_trial(self, place: int) -> Job:
        known = len(self._known(place))
        history = []
        for number, job in enumerate(self.record.current):
            state = job.state if number < known else "running"
            curve = self._curve(job).points if number < known else {}
            value = job.value if number < known else None
            history.append(search.Trial(job.overrides, value, state, curve))
        metric = next((job.metric for job in self.record.current[:known] if job.metric), "")
        direction = direction_of(self.settings, metric)
        others = [job.overrides for job in self.record.current]
        words = search.draw(self.axes, self.settings, direction, place, history, others)
        digest = checked_digest(self.record, self.request, f"trial {place}", words)
        job = self.record.add(words, digest)
        self.record.chosen.append(job.number)
        self.record.save()
        return job

    def _start_jobs(self) -> None:
        while len(self.running) < self.settings.jobs and (job := self._next_job()) is not None:
            slot = self.slots.pop(0)
            run_dir, log = self.record.run_dir(job), self.record.log(job)
            words = [*self.request.options, *job.overrides, *own_words(run_dir)]
            command = self.program.command(self.settings.launcher, words)
            again = "again " if run_dir.is_dir() else ""
            composed = self.request.compose([*job.overrides, *own_words(run_dir)])
            write_hydra_files(self.record, job, composed, self.program.name)
            environment = {
                **launch.slot_environment(slot),
                **launch.thread_environment(self.settings, os.environ),
                **launch.launcher_environment(self.settings.launcher, os.environ),
            }
            job.state = "running"
            self.record.save()
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {shlex.join(command)}\n")
            self.running[job.number] = self.jobs.start(job.number, command, environment, log), slot
            where = f" on GPU {','.join(slot)}" if slot else ""
            self._reporter.event(
                "job %d started %s(%s)%s", job.number, again, report.label_of(job, self.axes), where
            )

    # Watching

    def _collect(self) -> None:
        """Take note of jobs that have ended."""
        for number, (process, slot) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[number]
            self.slots.append(slot)
            job = self.record.jobs[number]
            job.seconds += time.monotonic() - process.started
            self._settle(job, code, process)
            self.record.save()
            report.write_csv(self.record, self.axes)

    def _settle(self, job: Job, code: int, process: JobProcess) -> None:
        job.code = code
        self._curves.pop(job.number, None)
        from_outside = code < 0 or code > 128
        if job.state == "pruned":
            self._reporter.event("job %d pruned at step %s: %s %.5g", job.number, job.pruned_at, *_shown(job))
        elif code == 0:
            job.state = "done"
            self._prune_where_due(job)
            self._measure(job)
            self._reporter.event("job %d %s: %s", job.number, job.state, _result(job))
        elif self._leaving:
            # Whatever the code: launchers have their own for ranks that leave.
            job.state = "stopped"
            self._reporter.event("job %d stopped", job.number)
        elif from_outside and self._may_retry(job):
            job.state = "waiting"
            self._reporter.event("job %d was killed (code %d): it is started again", job.number, code)
        else:
            job.state, job.error = "failed", last_error(process.log, process.log_start)
            self._reporter.event("job %d failed (code %d): %s", job.number, code, job.error)

    def _may_retry(self, job: Job) -> bool:
        """True where the job has got further since it was last killed, or not yet been killed too often."""
        rows = read_rows(self.record.run_dir(job))
        step = int(rows[-1]["step"]) if rows else -1
        before, count = self._reached.get(job.number, (step - 1, 0))
        count = 1 if step > before else count + 1
        self._reached[job.number] = max(step, before), count
        return count <= self.settings.retries

    def _watch(self) -> None:
        """Look at the metrics of running jobs, once a second, where they decide or show something."""
        is_needed = self.settings.prune is not None or self._reporter.is_shown
        if not is_needed or time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + _READ_EVERY_S
        steps: dict[int, int] = {}
        for number, (process, _) in self.running.items():
            job = self.record.jobs[number]
            rows = read_rows(self.record.run_dir(job))
            steps[number] = int(rows[-1]["step"]) if rows else 0
            if job.state == "running" and self._prune_where_due(job):
                # Noted first: a job that is told to leave and not known to be pruned would be resumed.
                self.record.save()
                process.tell_to_leave(self.settings.grace_s)
        settled = sum(job.is_settled for job in self.record.current)
        self._reporter.show(settled, steps)

    def _prune_where_due(self, job: Job) -> bool:
        if self.settings.prune is None:
            return False
        place = self.record.chosen.index(job.number)
        finished = [self._curve(other) for other in self._known(place) if other.state == "done"]
        step = falls_behind(self.settings, read_curve(self.settings, self.record.run_dir(job)), finished)
        if step is None:
            return False
        job.state, job.pruned_at = "pruned", step
        self._curves.pop(job.number, None)
        self._measure(job)
        return True

    def _curve(self, job: Job) -> Curve:
        """The metric of a job; that of a settled one is read once."""
        if job.number not in self._curves or not job.is_settled:
            curve = read_curve(self.settings, self.record.run_dir(job))
            self._curves[job.number] = curve.until(job.pruned_at)
        return self._curves[job.number]

    def _measure(self, job: Job) -> None:
        """Note what a job has come to."""
        curve = self._curve(job)
        result = objective(self.settings, curve)
        if result is not None:
            job.metric, (job.step, job.value) = curve.metric, result

    # Leaving

    def _leave(self, *, hard: bool) -> None:
        if not self._leaving:
            self._leaving = True
            if self.running:
                self._reporter.event(
                    "told to leave: %d jobs finish their step and save; Ctrl-C again ends them at once",
                    len(self.running),
                )
        for process, _ in self.running.values():
            if hard:
                process.kill()
            else:
                process.tell_to_leave(self.settings.grace_s)

    def _command_to_go_on(self) -> str:
        words = [word for word in self.request.words if not _names_the_folder(word)]
        command = [*self.program.interpreter, *self.program.target, *self.program.words, *words]
        return f"{shlex.join(command)} {shlex.quote(f'sweep.dir={self.record.folder}')}"

    def _draw(self, best: Job | None) -> None:
        valued = [job for job in self.record.current if job.value is not None]
        if not valued:
            return
        metric = valued[0].metric or ""
        folder = self.record.folder
        columns: dict[str, list[str]] = {}
        for job in valued:
            for name, value in report.values_of(job, self.axes).items():
                columns.setdefault(name, []).append(value)
        if columns:
            values = [float(job.value or 0.0) for job in valued]
            pictures.draw_objective(folder / "objective.png", metric, columns, values)
        names = {job.number: f"{job.number}: {report.label_of(job, self.axes)}" for job in valued}
        curves = {names[job.number]: self._curve(job).points for job in valued}
        pictures.draw_curves(folder / "curves.png", metric, curves, names[best.number] if best else None)


def _names_the_folder(word: str) -> bool:
    return word.lstrip("+").startswith(("sweep.dir=", "hydra.sweep.dir="))


def _shown(job: Job) -> tuple[str, float]:
    return job.metric or "", float("nan") if job.value is None else job.value


def _result(job: Job) -> str:
    if job.value is None:
        return "logged none of the metrics that jobs are compared by"
    return f"{job.metric} {job.value:.5g} at step {job.step}"


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Inside, SIGTERM and Ctrl-C are noted only; gives their numbers, in order."""
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
