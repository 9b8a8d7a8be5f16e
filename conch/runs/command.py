"""List runs, or tell what differs in the settings of some.

    conch runs outputs
    conch runs diff outputs/a outputs/b
    conch runs diff old=outputs/a new=outputs/b

A list has the newest run first: how it stands, its steps, the best evaluation so far, and for how long
nothing has been written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conch.cli import CommandParser, run_main, written_with
from conch.runs.listing import RunSummary, find_runs, labelled_runs, summarise, told_differences

_LONGEST = 40


def main(argv: Sequence[str]) -> None:
    """Command line: see the head of this file."""
    words = written_with("-", argv)
    if words[:1] == ["diff"]:
        _diff(words[1:])
    else:
        _list(words)


def _list(words: Sequence[str]) -> None:
    parser = CommandParser(
        prog="conch runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="conch runs diff RUN RUN ... tells what differs in the settings of runs.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), help="where to look (default: outputs)"
    )
    parser.add_argument("--json", action="store_true", help="an object for each run, one a line")
    arguments = parser.parse_args(words)
    runs = [summarise(run) for run in find_runs(arguments.folder)]
    if arguments.json:
        for run in runs:
            print(json.dumps(asdict(run) | {"folder": str(run.folder)}))
        return
    print(run_table(runs, arguments.folder, time.time()) if runs else f"no runs in {arguments.folder}")


def _diff(words: Sequence[str]) -> None:
    parser = CommandParser(prog="conch runs diff", description="Tell what differs in the settings of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or label=folder")
    parser.add_argument(
        "--all",
        action="store_true",
        help="also where the runs are, and keys that stand at their defaults where not every run has them",
    )
    parser.add_argument("--json", action="store_true", help="one object: key -> value in each run")
    arguments = parser.parse_args(words)
    if len(arguments.runs) < 2:
        parser.refuse("name at least two runs")
    runs = labelled_runs(arguments.runs)
    shown = told_differences([*runs.values()], everything=arguments.all)
    if arguments.json:
        print(json.dumps({name: [_plain(value) for value in each] for name, each in shown.items()}))
        return
    print(difference_table(shown, [*runs]) if shown else "no setting differs")


def run_table(runs: Sequence[RunSummary], below: Path, now: float) -> str:
    """A line for each run.

    below: folder that the names of the runs are relative to.
    now: in seconds since the epoch.
    """
    head = ("run", "algorithm", "state", "step", "best", "age")
    rows = [
        (
            *(str(run.folder.relative_to(below)), run.algorithm or "-", run.state),
            f"{'-' if run.step is None else run.step}/{run.total_steps or '-'}",
            "-" if run.best is None else f"{run.metric} {run.best:.4g} at {run.best_step}",
            age(now - run.changed),
        )
        for run in runs
    ]
    reasons = [f"{row[0]}: {run.reason}" for row, run in zip(rows, runs, strict=True) if run.reason]
    return "\n".join([_table([head, *rows]), *(["", *reasons] if reasons else [])])


def difference_table(values: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> str:
    """A line for each setting that differs, with its value in each run; `-` where a run has none."""
    head = ("setting", *labels)
    return _table([head, *((name, *(_short(value) for value in each)) for name, each in values.items())])


def age(seconds: float) -> str:
    """A span of time in its largest unit: `45 s`, `12 min`, `3 h`, `2 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _plain(value: Any) -> Any:
    return None if value is ... else value


def _short(value: Any) -> str:
    text = "-" if value is ... else json.dumps(value, ensure_ascii=False, default=str)
    return (
        text if len(text) <= _LONGEST else f"{text[: _LONGEST // 3]}...{text[_LONGEST // 3 + 3 - _LONGEST :]}"
    )


if __name__ == "__main__":
    run_main(main)
