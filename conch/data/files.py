"""Rows of files, folders and hub datasets, for the trainers' command lines.

    rows.txt, rows.jsonl, rows.json, rows.csv, rows.parquet   a file, the text ones also as .gz
    some/folder                                               a dataset that was laid out or saved there
    owner/name  owner/name:split                              a dataset of the Hugging Face hub

A row that cannot be read or used is left out. One warning counts such rows and names the first of them by
line; a file in which no row is good stops the run.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from conch.config import DataConfig
from conch.errors import ConfigError, DataError, missing_path
from conch.log import get_logger

RowT = TypeVar("RowT")

_log = get_logger(__name__)

_TABLES = {".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = (".txt", ".jsonl", ".json", *_TABLES)
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<split>[\w.\[\]%:-]+))?")
_NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class _Line:
    """One row of a file, or why it cannot be read.

    place: "line 3" of a text file, "row 3" of a table, counted from 1.
    value: the row.

    broken: why there is no value; "" where there is one.
    """

    place: str
    value: Any = None
    broken: str = ""


@dataclass(frozen=True, slots=True)
class _Bad:
    place: str
    reason: str


def read_rows(
    source: str | Path,
    config: DataConfig | None = None,
    *,
    form: Callable[[Any], RowT] = lambda row: row,
    max_rows: int | None = None,
) -> list[RowT]:
    """The rows of `source` (see this module's docstring) that `form` accepts, as it returns them.

    form: brings a row into the form that is wanted, or raises a DataError that says why it cannot be used, in
        words that follow a row's name: "has no prompt".
    config: how to read a hub dataset.
    max_rows: stop after as many good ones.

    Raises:
        DataError: the source is missing, damaged, of another kind, empty, or holds no good row.
    """
    good: list[RowT] = []
    bad: list[_Bad] = []
    for line in _lines(str(source), config or DataConfig()):
        try:
            good.append(form(_value(line)))
        except DataError as error:
            bad.append(_Bad(line.place, str(error)))
        if len(good) == max_rows:
            break
    if not good and not bad:
        raise DataError(f"{source} is empty: give at least one row")
    _report(str(source), len(good), bad)
    return good


def training_rows(config: DataConfig, what: str, *, form: Callable[[Any], RowT]) -> list[RowT]:
    """The rows that `data.train` names; see `read_rows`.

    what: rows, in the plural, as an error calls them.

    Raises:
        ConfigError: it names none.
        DataError: see `read_rows`.
    """
    if config.train is None:
        raise ConfigError(f"no {what}: set `data.train` to a file, a folder or a dataset of the hub")
    return read_rows(config.train, config, form=form, max_rows=config.max_rows)


def evaluation_rows(config: DataConfig, *, form: Callable[[Any], RowT]) -> list[RowT] | None:
    """The rows that `data.eval` names, None where it names none; see `read_rows`.

    Raises:
        DataError: see `read_rows`.
    """
    if config.eval is None:
        return None
    return read_rows(config.eval, config, form=form, max_rows=config.max_eval_rows)


def _value(line: _Line) -> Any:
    if line.broken:
        raise DataError(line.broken)
    return line.value


def _report(source: str, num_good: int, bad: list[_Bad]) -> None:
    """Warn of bad rows.

    Raises:
        DataError: there are no others.
    """
    if not bad:
        return
    named = "; ".join(f"{row.place} {row.reason}" for row in bad[:_NUM_NAMED])
    more = f"; and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
    if not num_good:
        raise DataError(f"none of the {len(bad)} rows of {source} can be used: {named}{more}")
    _log.warning("%d of %d rows of %s left out: %s%s", len(bad), num_good + len(bad), source, named, more)


def _lines(source: str, config: DataConfig) -> Iterator[_Line]:
    """Every row with its place, one at a time."""
    path = Path(source)
    suffix = Path(source.removesuffix(".gz")).suffix
    if path.is_dir():
        is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return _saved(path) if is_saved else _dataset(source, "train", source, config)
    if suffix in _SUFFIXES and not path.exists():
        raise DataError(f"{path} cannot be read: there is no such file{missing_path(path)}")
    if suffix in _TABLES:
        return _table(path, _TABLES[suffix])
    if suffix in (".txt", ".jsonl"):
        return _text_lines(path, parse=suffix == ".jsonl")
    if suffix == ".json":
        return _json_rows(path)
    named = _HUB_NAME.fullmatch(source)
    if path.exists() or named is None:
        what = "is read as rows" if path.exists() else "is there"
        raise DataError(
            f"{source}: no such file {what}; rows are read from {', '.join(_SUFFIXES)} files (text also as "
            ".gz), from a folder, or from a dataset of the hub, owner/name or owner/name:split"
        )
    return _dataset(named["name"], named["split"] or "train", source, config)


# ------------------------------------------------------------------------------------------------- text files


@contextmanager
def _readable(path: Path) -> Iterator[Iterable[str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield file
    # gzip says EOFError of a file that was cut short, and zlib.error of one with damage inside
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _text_lines(path: Path, *, parse: bool) -> Iterator[_Line]:
    """Lines that are not empty. parse: they are JSON values."""
    with _readable(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parsed(number, line) if parse else _Line(f"line {number}", line.rstrip("\n"))


def _parsed(number: int, line: str) -> _Line:
    try:
        return _Line(f"line {number}", json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
        return _Line(f"line {number}", broken=f"is not JSON: {error}")


def _json_rows(path: Path) -> Iterator[_Line]:
    """The items of a JSON array; a `.json` file that holds one value a line is read like `.jsonl`."""
    with _readable(path) as file:
        text = "".join(file)
    if not text.lstrip().startswith("["):
        return _text_lines(path, parse=True)
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return _numbered(rows)


# --------------------------------------------------------------------------------------- tables and hub names


def _table(path: Path, kind: str) -> Iterator[_Line]:
    """Rows of a CSV or Parquet file, read piece by piece."""
    from datasets import load_dataset

    # Words that pandas takes for a missing value ("None", "NA") are answers; an empty cell is none.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    # Streaming stores nothing, yet wants a cache; the user's may not be writable.
    with TemporaryDirectory(prefix="conch-table-") as cache, _refusing(str(path)):
        options |= {"streaming": True, "cache_dir": cache}
        yield from _numbered(load_dataset(kind, data_files=str(path), split="train", **options))


def _dataset(name: str, split: str, source: str, config: DataConfig) -> Iterator[_Line]:
    """Rows of a split of a dataset: of the hub, or of a folder."""
    from datasets import load_dataset

    with _refusing(source):
        dataset = load_dataset(
            name,
            config.subset,
            data_dir=config.folder,
            split=split,
            revision=config.revision,
            streaming=config.streaming,
        )
        yield from _numbered(dataset)


def _saved(folder: Path) -> Iterator[_Line]:
    """Rows of what `Dataset.save_to_disk` wrote; of several splits those of `train`."""
    from datasets import DatasetDict, load_from_disk

    with _refusing(str(folder)):
        saved = load_from_disk(str(folder))
        yield from _numbered(saved["train"] if isinstance(saved, DatasetDict) else saved)


def _numbered(rows: Iterable[Any]) -> Iterator[_Line]:
    return (_Line(f"row {number}", row) for number, row in enumerate(rows, start=1))


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """What goes wrong in `datasets` has many types: its own, those of pandas and pyarrow, those of HTTP."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise DataError(f"{source} cannot be read: {reason}{_about_cache(error)}") from error


def _about_cache(error: Exception) -> str:
    """What to do where it was not the data but the folder of `datasets` that could not be used."""
    from datasets import config

    caches = (Path(config.HF_CACHE_HOME), Path(config.HF_DATASETS_CACHE))
    file = Path(str(error.filename)) if isinstance(error, OSError) and error.filename else None
    # The folder, what is in it, or one above it that could not be made.
    if file is None or not any(file.is_relative_to(cache) or cache.is_relative_to(file) for cache in caches):
        return ""
    return "; set HF_HOME to a folder that this user can write"
