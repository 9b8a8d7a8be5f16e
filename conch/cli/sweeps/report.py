"""What a sweep shows: a line for each event, a bar on a terminal, `sweep.csv`, and a table at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from conch.atomic_files import replace_text
from conch.cli.sweeps.grammar import Axis
from conch.cli.sweeps.record import Job, Record
from conch.log import get_logger, progress

_log = get_logger(__name__)

CSV_FILE = "sweep.csv"
_LONGEST_ERROR = 160


class Reporter:
    """Shows how a sweep gets on.

    total: jobs of the sweep.
    """

    def __init__(self, total: int) -> None:
        self._bar = progress(total=total, desc="sweep")

    @property
    def is_shown(self) -> bool:
        """True where a person may be watching the bar."""
        return not self._bar.disable

    def event(self, text: str, *values: Any) -> None:
        """Log one line."""
        self._bar.clear()
        _log.info(text, *values)
        self._bar.refresh()

    def show(self, settled: int, running: Mapping[int, int]) -> None:
        """Move the bar.

        settled: jobs that have ended.
        running: job -> its step.
        """
        self._bar.update(settled - self._bar.n)
        self._bar.set_postfix_str("  ".join(f"job {number}: step {step}" for number, step in running.items()))

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def values_of(job: Job, axes: Sequence[Axis]) -> dict[str, str]:
    """Return swept key -> its value in this job, as text."""
    words = {word.partition("=")[0]: word.partition("=")[2] for word in job.overrides}
    return {axis.name: words.get(axis.key, "") for axis in axes if axis.is_swept}


def label_of(job: Job, axes: Sequence[Axis]) -> str:
    """Name a job by what is special about it."""
    return " ".join(f"{name}={value}" for name, value in values_of(job, axes).items()) or "as configured"


def write_csv(record: Record, axes: Sequence[Axis]) -> None:
    """Write `sweep.csv`, one row a job of the present command."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [axis.name for axis in axes if axis.is_swept]
    writer.writerow(["job", "state", *names, "metric", "value", "step", "seconds", "run_dir", "error"])
    for job in record.current:
        shown = [job.metric or "", "" if job.value is None else repr(job.value), _text(job.step)]
        where = [f"{job.seconds:.1f}", str(job.number), job.error]
        writer.writerow([job.number, job.state, *values_of(job, axes).values(), *shown, *where])
    replace_text(record.folder / CSV_FILE, text.getvalue())


def best_job(jobs: Sequence[Job], minimize: bool) -> Job | None:
    """Return the job with the best value among those that came to their end; of equal ones the first."""
    valued = [job for job in jobs if job.value is not None and job.state == "done"]
    sign = -1.0 if minimize else 1.0
    return max(valued, key=lambda job: sign * float(job.value or 0.0), default=None)


def print_table(record: Record, axes: Sequence[Axis], best: Job | None) -> None:
    """Print the jobs with their results, the best one marked."""
    from rich.console import Console
    from rich.table import Table

    metric = next((job.metric for job in record.current if job.metric), "value")
    table = Table(title=str(record.folder))
    names = [axis.name for axis in axes if axis.is_swept]
    for name in ("job", "state", *names, metric, "at step", "seconds"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for job in record.current:
        value = "" if job.value is None else f"{job.value:.5g}"
        mark = " *" if best is not None and job.number == best.number else ""
        swept = [_short(value) for value in values_of(job, axes).values()]
        cells = [f"{job.number}", job.state, *swept]
        style = "bold" if mark else None
        table.add_row(*cells, f"{value}{mark}", _text(job.step), f"{job.seconds:.0f}", style=style)
    console = Console(soft_wrap=True)
    console.print(table)


def failures(record: Record) -> list[str]:
    """Return one line for each failed job: its number, why, and where to read more."""
    lines = []
    for job in record.current:
        if job.state == "failed":
            error = job.error if len(job.error) <= _LONGEST_ERROR else f"{job.error[:_LONGEST_ERROR]}..."
            lines.append(f"job {job.number} failed (code {job.code}): {error}; {record.log(job)}")
    return lines


def _short(value: str) -> str:
    """Return a number that a search drew with four digits, other values as they are."""
    try:
        return f"{float(value):.4g}" if len(value) > len("0.0001234") else value
    except ValueError:
        return value


def _text(value: int | None) -> str:
    return "" if value is None else str(value)
