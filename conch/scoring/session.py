"""One run of `conch score`: what is checked before anything is asked, the scoring, and what it amounts to."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.addresses import SCHEMES, Endpoint
from conch.atomic_files import replace_text
from conch.errors import ConfigError, DataError
from conch.rewards.base import RewardSource, sources_closed_on_failure
from conch.rewards.combined import refuse_groups
from conch.rewards.factory import from_user, is_function_name, named_function
from conch.rewards.score import refuse_token_ids
from conch.scoring.asking import Lines, ScoredRow, scored_rows, stop_if_away, with_columns
from conch.scoring.figures.report import Report, as_text
from conch.scoring.forms import RowForm, form_of
from conch.scoring.journal import Journal, as_bytes, is_failed
from conch.scoring.options import ScoreOptions
from conch.scoring.original import OriginalReward, is_original
from conch.scoring.progress import Progress
from conch.scoring.reading import InputRow, RowReader, fingerprint
from conch.scoring.tables import write_table

_LOOKED_AT = 64
"""Rows from which it is told how all are read."""
_NOT_OF_THE_OUTPUT = {
    *("path", "output", "report", "overwrite", "retry_failed", "url", "reward", "against", "tolerance")
}
_OF_THE_WAY = {"deadline_s", "secret_env", "tls_ca", "tls_cert", "tls_key", "batch_rows"}


class Scoring:
    """One run of the command.

    stack: closes what is opened.

    Raises:
        ConchError: nothing can be asked; nothing was sent but what a source's `check` asks.
    """

    def __init__(self, options: ScoreOptions, stack: contextlib.ExitStack) -> None:
        self.options = options
        self.report = Report(options.objective)
        self._reader = RowReader(options.path, options.input_format)
        self._check_paths()
        self._rows = _behind_first(self._reader.rows())
        first = next(self._rows)
        word = options.reward or options.url or os.environ.get("TRITON_HOST")
        if not word:
            raise ConfigError(
                "no reward given: name it with --url host:port/model or --reward, or set TRITON_HOST"
            )
        words = [word, *([options.against] if options.against else [])]
        self._sources = [stack.enter_context(self._open(each)) for each in words]
        for source in self._sources:
            source.check()
            refuse_token_ids(source)
            self._check_objective(source)
        self._form = self._form_of(first)
        self._parts_ahead = 2 + max(each.count(",") + 1 for each in words)
        self._journal = self._open_journal(words)
        if self._journal is not None:
            stack.callback(self._journal.close)

    def _check_objective(self, source: RewardSource) -> None:
        """Of a source that does not tell its names, the first score shows whether it has this one."""
        name = self.options.objective
        if name is not None and source.objectives and name not in source.objectives:
            raise ConfigError(f"--objective {name}: {source.name} gives {', '.join(source.objectives)}")

    def _check_paths(self) -> None:
        options, reader = self.options, self._reader
        if options.report is not None and not options.report.parent.is_dir():
            raise ConfigError(f"--report {options.report}: there is no folder {options.report.parent}")
        if options.report is not None and options.report.is_dir():
            raise ConfigError(f"--report {options.report} is a folder: give a file")
        if options.output is None:
            return
        if reader.path is not None and options.output.resolve() == reader.path.resolve():
            raise ConfigError(f"--output {options.output} is the input: give another file")
        if reader.path is None and options.keep and options.output.suffix != ".jsonl":
            raise ConfigError(
                f"--keep and --output {options.output}: a table takes its columns from the input a second "
                "time, and standard input is read once; write .jsonl, or give a file"
            )

    @sources_closed_on_failure()
    def _open(self, word: str) -> RewardSource:
        if word == self.options.against and is_original(word):
            return OriginalReward(word, self.options.original)
        reward = named_function(word, "--reward") if is_function_name(word) else word
        source = from_user(reward, self.options.section(None, self.options.batch_rows))
        refuse_groups(source, "conch score")
        return source

    def _form_of(self, first: Sequence[InputRow]) -> RowForm:
        options = self.options
        if not first:
            raise DataError(f"{self._input_name} is empty: give at least one row")
        columns = {
            name: column
            for name, column in options.columns.model_dump(exclude_none=True).items()
            if name != "subset"
        }
        try:
            form = form_of(
                first,
                self._sources[0],
                columns=columns,
                rows_are=options.rows_are,
                subset=options.columns.subset,
                from_text=self._reader.is_table,
            )
        except DataError as error:
            number = "row" if len(first) == 1 else f"first {len(first)} rows"
            raise DataError(f"{self._input_name}: the {number} cannot be scored: {error}") from None
        told = ", ".join(f"{name} from `{column}`" for name, column in form.taken.items())
        kind = "pairs" if form.is_pairs else "samples"
        if told:
            print(f"reading {kind}: {told} (name columns by --prompt and the like)", file=sys.stderr)
        return form

    @property
    def _input_name(self) -> str:
        return "standard input" if self._reader.path is None else self.options.path

    def _open_journal(self, words: Sequence[str]) -> Journal | None:
        options = self.options
        if options.output is None:
            return None
        path = self._reader.path
        kept = options.model_dump(mode="json", exclude=_NOT_OF_THE_OUTPUT | _OF_THE_WAY)
        kept["columns"] = {**self._form.columns, "subset": self._form.subset}
        about = {
            "input": {
                "name": options.path if path is None else path.name,
                **(fingerprint(path) if path is not None and path.is_file() else {}),
            },
            "reward": _identity(words[0], self._sources[0]),
            **({"against": _identity(words[1], self._sources[1])} if len(words) > 1 else {}),
            "options": kept,
        }
        journal = Journal(
            options.output,
            about,
            rows_at_once=options.rows_at_once,
            overwrite=options.overwrite,
            retry=options.retry_failed,
        )
        if path is None and (journal.rows or journal.report is not None):
            journal.close()
            raise ConfigError(
                f"{options.output} holds scores already, and nothing tells whether they are of this standard "
                "input: give another --output, or --overwrite"
            )
        return journal

    def run(self) -> None:
        """Score what has no line yet, and write the lines.

        Raises:
            ConchError: the input is damaged from some row on, a server went away, or the disk is full.
        """
        journal, options = self._journal, self.options
        if journal is not None and journal.report is not None:
            print(f"{journal.output} holds all scores already", file=sys.stderr)
            return
        done = 0
        if journal is not None:
            done = journal.rows
            try:
                self._pass_over(journal)
            finally:  # what is left is reported also where a server went away
                self.report.add_all(journal.lines())
        if done:
            print(f"going on behind {done:,} rows of {options.output}", file=sys.stderr)
        index = done
        with Progress(self._reader, self.report) as progress:
            for part in self._scored(self._rows):
                lines = self._lines_of(part, range(index, index + len(part)))
                self.report.add_all(lines)
                if journal is not None:
                    journal.append(self._kept(part, lines))
                else:
                    _print_bytes(b"".join(map(as_bytes, self._kept(part, lines))))
                index += len(part)
                progress.show()
        if journal is not None:
            self._finish(journal)

    def _pass_over(self, journal: Journal) -> None:
        """Read the rows that have their lines, and with --retry-failed ask again for those that failed."""
        rows = enumerate(itertools.islice(self._rows, journal.rows))
        if not (self.options.retry_failed and journal.rows):
            deque(rows, maxlen=0)
            return
        indexes: deque[int] = deque()

        def failed_rows() -> Iterator[InputRow]:
            failed = (index for index, line in enumerate(journal.lines()) if is_failed(line))
            wanted = next(failed, None)
            for index, row in rows:
                if index == wanted:
                    wanted = next(failed, None)
                    indexes.append(index)
                    yield row

        number = 0
        with journal.retried() as write:
            for part in self._scored(failed_rows()):
                write(self._kept(part, self._lines_of(part, [indexes.popleft() for _ in part])))
                number += len(part)
        print(f"asked again for {number:,} rows without a score", file=sys.stderr)

    def _scored(self, rows: Iterator[InputRow]) -> Iterator[list[ScoredRow]]:
        at_once, ahead = self.options.rows_at_once, self._parts_ahead
        return scored_rows(rows, self._form, self._sources, rows_at_once=at_once, parts_ahead=ahead)

    def _lines_of(self, part: Sequence[ScoredRow], indexes: Iterable[int]) -> list[dict[str, Any]]:
        """What came of rows.

        Raises:
            RewardUnavailableError: a server went away while they were asked for, and there is an output to go
                on from.
        """
        if self._journal is not None:
            stop_if_away(part, " and ".join(source.name for source in self._sources))
        lines = Lines(self.options.objective)
        return [lines.line(index, scored) for index, scored in zip(indexes, part, strict=True)]

    def _kept(self, part: Sequence[ScoredRow], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines as they are written: with --keep behind the columns of their rows."""
        # A table takes the input's columns from the input itself, with their types.
        if not self.options.keep or (self._journal is not None and self._journal.is_table):
            return lines
        return [with_columns(line, each.row) for line, each in zip(lines, part, strict=True)]

    def _finish(self, journal: Journal) -> None:
        if journal.is_table:
            write_table(journal, self._reader if self.options.keep else None)
        journal.finish(self.report.result())

    def conclude(self) -> int:
        """Print and write the report; returns the exit code."""
        options, journal = self.options, self._journal
        known = journal.report if journal is not None else None
        result = self.report.result() if known is None else known
        # Standard output is for the scores, unless they have a file.
        if journal is None:
            print(as_text(result), file=sys.stderr)
        else:
            _print_bytes(f"{as_text(result)}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace"))
        if options.report is not None:
            replace_text(options.report, json.dumps(result, indent=1) + "\n")
        if result["failed"]:
            failed, rows, first = (result[name] for name in ("failed", "rows", "first_failure"))
            print(f"{failed} of {rows} rows have no score; first: {first}", file=sys.stderr)
            return 2
        largest = result.get("against", {}).get("max_difference", 0.0)
        if options.tolerance is not None and largest > options.tolerance:
            print(
                f"scores differ by up to {largest:.3g}, more than --tolerance {options.tolerance:g}",
                file=sys.stderr,
            )
            return 3
        return 0


def _print_bytes(data: bytes) -> None:
    """Write to standard output as it is: JSON is UTF-8 whatever the locale says."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _behind_first(rows: Iterator[InputRow]) -> Iterator[Any]:
    """Yield the first rows as a list, then all rows, these among them."""
    first = list(itertools.islice(rows, _LOOKED_AT))
    yield first
    yield from itertools.chain(first, rows)


def _identity(word: str, source: RewardSource) -> Mapping[str, Any]:
    """What tells a reward from another one, wherever it is served."""
    content = getattr(source, "content", "") or source.digest
    if is_function_name(word):
        return {"name": word, **fingerprint(Path(word.rpartition(":")[0]))}
    if isinstance(source, OriginalReward):
        return {"name": word, "content": content}
    if word.startswith(SCHEMES):  # nothing but the address tells one endpoint from another
        return {"name": word}
    try:
        name = Endpoint.parse_all(word)[0].model
    except ConfigError:  # a verifier, say
        name = word
    return {"name": name, "content": content}
