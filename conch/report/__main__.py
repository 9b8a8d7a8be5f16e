"""One HTML file of runs, which needs no network: `conch report RUN [RUN ...] --output report.html`.

    conch report outputs/2026-11-30/06-30-00
    conch report single=runs/a worst=runs/b --output both.html
    conch report runs/a --live

A run is a folder, or `label=folder`. `--live` serves the page on this machine while the runs go on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from conch.cli import CommandParser, add_options, parse_options, run_main, written_with
from conch.config import Section
from conch.log import get_logger
from conch.runs.listing import labelled_runs

_log = get_logger(__name__)


class ReportOptions(Section):
    """Options of `conch report`."""

    output: Path = Path("report.html")
    """File to write."""

    live: bool = False
    """Serve the page instead of writing it, and keep it up to date."""

    host: str = "127.0.0.1"
    """With --live, loopback address to listen on."""

    port: int = Field(default=8900, ge=0, le=65535)
    """With --live, port to listen on; 0 takes a free one."""

    max_samples: int = Field(default=100_000, ge=1)
    """Most samples of a run; of each evaluation the first ones are kept, which are of the same prompts."""


def main(argv: Sequence[str]) -> None:
    """Write the report that a command line asks for, or serve it."""
    parser = CommandParser(
        prog="conch report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or label=folder")
    add_options(parser, ReportOptions)
    values = vars(parser.parse_args(written_with("-", argv)))
    runs = labelled_runs(values.pop("runs"))
    options = parse_options(ReportOptions, values)

    from conch.report.collect import Collector
    from conch.report.live import LiveReport
    from conch.report.page import plotly_script, write_page

    plotly_script()  # where it is missing, that is told before anything is read
    collector = Collector(runs, options.max_samples)
    title = f"Conch report: {', '.join(runs)}"
    if options.live:
        report = LiveReport(collector, title=title, host=options.host, port=options.port)
        _log.info("Ctrl-C ends it")
        print(report.url, flush=True)
        report.serve()
        return
    collector.refresh()
    write_page(options.output, collector.update(), title=title)
    print(options.output)


if __name__ == "__main__":
    run_main(main)
