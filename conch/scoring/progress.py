"""How far a scoring is: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from conch.log import get_logger, progress
from conch.scoring.figures.report import Report
from conch.scoring.reading import RowReader

_log = get_logger(__name__)
_TOLD_EVERY_S = 30.0
_OUT_OF = 10_000


class Progress:
    """Tells rows, rate, failures and time left on stderr.

    reader: says which share of the input was read.
    report: counts the rows.
    """

    def __init__(self, reader: RowReader, report: Report) -> None:
        self._reader, self._report = reader, report
        self._started = self._told = time.monotonic()
        self._rows_before = report.rows
        self._bar = progress(total=_OUT_OF, desc="scoring")
        self._bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {postfix}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self) -> None:
        """Tell how far it is, if it is time to."""
        now = time.monotonic()
        if not self._bar.disable:
            self._bar.n = int(self._reader.done * _OUT_OF)
            self._bar.set_postfix_str(self.line())
        elif now - self._told >= _TOLD_EVERY_S:
            self._told = now
            _log.info("scored %s", self.line())

    def line(self) -> str:
        """`12,000 rows, 950/s, 3 failed, 4 min left`."""
        seconds = max(1e-9, time.monotonic() - self._started)
        scored = self._report.rows - self._rows_before
        parts = [
            f"{self._report.rows:,} rows",
            f"{scored / seconds:,.0f}/s",
            f"{self._report.failed:,} failed",
        ]
        read = self._reader.done
        if scored and 0 < read < 1:
            rows_left = self._report.rows * (1 - read) / read
            parts.append(f"about {_time(rows_left * seconds / scored)} left")
        return ", ".join(parts)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
