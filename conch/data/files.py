"""Rows of files, folders and hub datasets, for the trainers' command lines.

    rows.txt, rows.jsonl, rows.json, rows.csv, rows.parquet   a file, the text ones also as .gz
    some/folder                                               a dataset that was laid out or saved there
    owner/name  owner/name:split                              a dataset of the Hugging Face hub

A row that cannot be read or used is left out. One warning counts such rows by reason and names the first of
each by line; a file in which no row is good stops the run.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from conch.config import DataConfig
from conch.data.chat import without_none
from conch.data.public import as_spoken, public_form
from conch.errors import ConfigError, DataError, missing_path
from conch.log import get_logger

RowT = TypeVar("RowT")
MadeT = TypeVar("MadeT")

_log = get_logger(__name__)

_TABLES = {".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = (".txt", ".jsonl", ".json", *_TABLES)
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<split>[\w.\[\]%:-]+))?")
_NUM_NAMED = 5
_HUB_TIMEOUT_S = 10.0


class Rows(list[RowT]):
    """Rows, with the place that each was read from; a slice or a copy is a plain list.

    places: "data.jsonl line 17", one a row.
    """

    def __init__(self, rows: Iterable[RowT] = (), places: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.places = list(places)
        assert len(self.places) == len(self), "every row has a place"


def place_of(rows: Sequence[Any], index: int, what: str) -> str:
    """How a message names the row of this index: by its place where it was read from one, else by number.

    what: a row, in the singular: "prompt" gives "prompt 17".
    """
    return rows.places[index] if isinstance(rows, Rows) else f"{what} {index}"


def like_rows(rows: Sequence[Any], values: Sequence[RowT]) -> list[RowT]:
    """These values, one for each of `rows`, with the places of those."""
    return Rows(values, rows.places) if isinstance(rows, Rows) else list(values)


def rows_at(rows: Sequence[RowT], indices: Sequence[int], what: str) -> Rows[RowT]:
    """The rows of these indices, each with its name among all as its place; see `place_of`."""
    return Rows((rows[index] for index in indices), (place_of(rows, index, what) for index in indices))


def joined(rows: Mapping[str, Sequence[RowT]]) -> Rows[RowT]:
    """Rows of several lists, each with its name among its own as its place.

    rows: by what each is called, in the singular: "prompt", "evaluation prompt".
    """
    named = [
        (row, place_of(part, index, what)) for what, part in rows.items() for index, row in enumerate(part)
    ]
    return Rows((row for row, _ in named), (place for _, place in named))


def usable(
    rows: Sequence[Any], what: str, make: Callable[[Any, str], MadeT]
) -> tuple[list[MadeT], list[int]]:
    """What `make` gives for each row that it does not refuse, and the indices of these rows.

    One warning counts the others and names the first of them.

    what: one row, as messages call it ("prompt").
    make: from a row and its name ("prompt 3"); raises a DataError, one sentence with that name, to refuse it.

    Raises:
        DataError: all rows are refused.
    """
    made: list[MadeT] = []
    indices: list[int] = []
    reasons: list[str] = []
    for index, row in enumerate(rows):
        try:
            made.append(make(row, place_of(rows, index, what)))
            indices.append(index)
        except DataError as error:
            reasons.append(str(error))
    if reasons:
        named = "; ".join(reasons[:_NUM_NAMED])
        more = f"; and {len(reasons) - _NUM_NAMED} more" if len(reasons) > _NUM_NAMED else ""
        if not made:
            raise DataError(f"none of the {len(rows)} {what}s can be used: {named}{more}")
        _log.warning("%d of %d %ss left out: %s%s", len(reasons), len(rows), what, named, more)
    return made, indices


def renamed(row: Any, config: DataConfig) -> Any:
    """The row with the columns that `data.columns` names under Conch's names for them, and with messages or
    strings as `data.apply_chat_template` says.

    A row that has our name already and not the column stays as it is.

    Raises:
        DataError: the row has not the column, or nobody knows who says what, in words that follow its name.
    """
    row = _with_columns(row, config.columns)
    if config.apply_chat_template is None:
        return row
    if not config.apply_chat_template:
        return public_form(row, spoken=False)
    row = public_form({"prompt": row} if isinstance(row, str) else row)
    return as_spoken(row) if isinstance(row, Mapping) else row


def _with_columns(row: Any, columns: Mapping[str, str]) -> Any:
    if not columns or not isinstance(row, Mapping):
        return row
    taken = {name: column for name, column in columns.items() if _is_in(row, column) or name not in row}
    left = {key: value for key, value in row.items() if key not in taken.values()}
    return {**left, **{name: _column(row, name, column) for name, column in taken.items()}}


def _is_in(row: Any, column: str) -> bool:
    if column in row:
        return True
    first, _, rest = column.partition(".")
    return bool(rest) and isinstance(row.get(first), Mapping) and _is_in(row[first], rest)


def _column(row: Mapping[str, Any], name: str, column: str) -> Any:
    if not _is_in(row, column):
        keys = ", ".join(map(str, row))
        raise DataError(f"has no {column!r}, which `data.columns.{name}` names (keys here: {keys})")
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    return _column(row[first], name, rest)


def as_written(rows: Iterable[Any]) -> Iterable[Any]:
    """The rows of a split of `datasets` without the keys that Arrow adds inside of a column, None, where
    another row has a value; rows of anything else as they are."""
    if not type(rows).__module__.startswith("datasets."):
        return rows
    features = getattr(rows, "features", None)
    return (
        {key: _without_added(value, _of(features, key)) for key, value in row.items()}
        if isinstance(row, Mapping)
        else row
        for row in rows
    )


def _of(features: Any, key: str) -> Any:
    return features.get(key) if isinstance(features, Mapping) else None


def _without_added(value: Any, feature: Any) -> Any:
    """A value without the keys that a struct of this type has and the value has not; of an unknown type (of a
    streamed split) without all keys that are None. What is stored as JSON is as it was written."""
    if feature is None:
        return without_none(value)
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        items = ((key, item) for key, item in value.items() if item is not None)
        return {key: _without_added(item, feature.get(key)) for key, item in items}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [_without_added(item, inner) for item in value]
    return value


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
) -> Rows[RowT]:
    """The rows of `source` (see this module's docstring) that `form` accepts, as it returns them.

    form: brings a row into the form that is wanted, or raises a DataError that says why it cannot be used, in
        words that follow a row's name: "has no prompt".
    config: how to read a hub dataset.
    max_rows: stop after as many good ones.

    Raises:
        DataError: the source is missing, damaged, of another kind, empty, or holds no good row.
    """
    config = config or DataConfig()
    good, places = [], []
    bad: list[_Bad] = []
    for line in _lines(str(source), config):
        try:
            good.append(form(renamed(_value(line), config)))
        except DataError as error:
            bad.append(_Bad(line.place, str(error)))
        else:
            places.append(f"{source} {line.place}")
        if len(good) == max_rows:
            break
    if not good and not bad:
        raise DataError(f"{source} is empty: give at least one row")
    _report(str(source), len(good), bad)
    return Rows(good, places)


def each_row(source: str, config: DataConfig | None = None) -> Iterator[tuple[str, Any, str]]:
    """Every row of a source, good or bad, one at a time: its place ("row 3"), its value, and why it cannot be
    read; "" where it can.

    Raises:
        DataError: the source is missing, damaged or of another kind.
    """
    for line in _lines(source, config or DataConfig()):
        yield line.place, line.value, line.broken


def training_rows(config: DataConfig, what: str, *, form: Callable[[Any], RowT]) -> Rows[RowT]:
    """The rows that `data.train` names; see `read_rows`.

    what: rows, in the plural, as an error calls them.

    Raises:
        ConfigError: it names none.
        DataError: see `read_rows`.
    """
    check_rows_named(config, what)
    assert config.train is not None
    return read_rows(config.train, config, form=form, max_rows=config.max_rows)


def evaluation_rows(config: DataConfig, *, form: Callable[[Any], RowT]) -> Rows[RowT] | None:
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
    """Warn of bad rows, counted by reason.

    Raises:
        DataError: there are no others.
    """
    if not bad:
        return
    reasons = _by_reason(bad)
    if not num_good:
        raise DataError(f"none of the {len(bad)} rows of {source} can be used: {reasons}")
    _log.warning("%d of %d rows of %s left out: %s", len(bad), num_good + len(bad), source, reasons)


def _by_reason(bad: Sequence[_Bad]) -> str:
    """Each reason with the first row that has it and the number of the others, the most frequent first."""
    alike: dict[str, list[_Bad]] = {}
    for row in bad:
        # The same fault of other rows has other values in it.
        alike.setdefault(re.sub(r"'[^']*'|\d+(\.\d+)?", "", row.reason), []).append(row)
    groups = sorted(alike.values(), key=len, reverse=True)
    named = [f"{rows[0].place} {rows[0].reason}{_and_others(rows[1:])}" for rows in groups[:_NUM_NAMED]]
    num_more = sum(map(len, groups[_NUM_NAMED:]))
    return "; ".join(named) + (f"; and {num_more} more, for other reasons" if num_more else "")


def _and_others(rows: Sequence[_Bad]) -> str:
    places = ", ".join(row.place for row in rows[:2]) + (", ..." if len(rows) > 2 else "")
    return f" [and {len(rows)} more like it: {places}]" if rows else ""


def check_rows_named(config: DataConfig, what: str, *, training: bool = True) -> None:
    """See that the configuration names rows, in files that are there; of the hub nothing is asked.

    what: rows, in the plural, as an error calls them.
    training: they are those of `data.train`, else of `data.eval`.

    Raises:
        ConfigError: it names none.
        DataError: there is no such file or folder, or none that rows are read from.
    """
    if (config.train if training else config.eval) is None:
        key = "data.train" if training else "data.eval"
        raise ConfigError(f"no {what}: set `{key}` to a file, a folder or a dataset of the hub")
    for source in (config.train if training else None, config.eval):
        if source is not None:
            _check_source(source)


def _check_source(source: str) -> None:
    """See that a source is here, or may be a dataset of the hub.

    Raises:
        DataError: it is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if Path(source.removesuffix(".gz")).suffix in _SUFFIXES:
        if not path.exists():
            raise DataError(f"{path} cannot be read: there is no such file{missing_path(path)}")
        return
    if path.exists() or _HUB_NAME.fullmatch(source) is None or _is_local(source):
        what = "is read as rows" if path.exists() else f"is there{missing_path(path)}"
        raise DataError(
            f"{source}: no such file {what}; rows are read from {', '.join(_SUFFIXES)} files (text also as "
            ".gz), from a folder, or from a dataset of the hub, owner/name or owner/name:split"
        )


def _lines(source: str, config: DataConfig) -> Iterator[_Line]:
    """Every row with its place, one at a time."""
    _check_source(source)
    path = Path(source).expanduser()
    suffix = Path(source.removesuffix(".gz")).suffix
    if path.is_dir():
        is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return _saved(path) if is_saved else _dataset(str(path), "train", source, config)
    if suffix in _TABLES:
        return _table(path, _TABLES[suffix])
    if suffix in (".txt", ".jsonl"):
        return _text_lines(path, parse=suffix == ".jsonl")
    if suffix == ".json":
        return _json_rows(path)
    named = _HUB_NAME.fullmatch(source)
    assert named is not None, "what is no name was refused"
    return _dataset(named["name"], named["split"] or "train", source, config)


def _is_local(source: str) -> bool:
    """Whether the first part of `a/b` is a folder here: then something in it is meant, not `owner/name`."""
    first, slash, _ = source.partition("/")
    return bool(slash) and Path(first).is_dir()


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
        where: dict[str, Any] = {
            "name": config.subset,
            "data_dir": config.folder,
            "revision": config.revision,
        }
        arrays = _json_files(name, split, where) if Path(name).is_dir() else []
        if not arrays:
            with _asked_once(name):
                rows = load_dataset(name, split=split, streaming=config.streaming, **where)
            yield from _numbered(rows)
            return
    rows = itertools.chain.from_iterable(_json_rows(path) for path in arrays)
    for number, row in enumerate(rows, start=1):
        yield replace(row, place=f"row {number}")


def _json_files(name: str, split: str, where: Mapping[str, Any]) -> list[Path]:
    """Files of a split of a folder where one is a JSON array, of which `datasets` rounds numbers to ten
    decimals and makes NaN a missing value; else none."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name, **where)
    files: Any = builder.config.data_files or {}
    paths = [Path(str(file)) for file in files.get(split, [])]
    readable = all(path.is_file() and _is_json(path) for path in paths)
    return paths if readable and any(map(_is_array, paths)) else []


def _is_json(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix in (".json", ".jsonl")


def _is_array(path: Path) -> bool:
    with _readable(path) as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def _saved(folder: Path) -> Iterator[_Line]:
    """Rows of what `Dataset.save_to_disk` wrote; of several splits those of `train`."""
    from datasets import DatasetDict, load_from_disk

    with _refusing(str(folder)):
        saved = load_from_disk(str(folder))
        yield from _numbered(saved["train"] if isinstance(saved, DatasetDict) else saved)


def _numbered(rows: Iterable[Any]) -> Iterator[_Line]:
    return (_Line(f"row {number}", row) for number, row in enumerate(as_written(rows), start=1))


@contextmanager
def _asked_once(name: str) -> Iterator[None]:
    """Look for a dataset in the cache alone where the hub does not answer a question about it.

    `datasets` would ask five times more, for 23 seconds, before it does the same.
    """
    from datasets import config
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(name).is_dir() or _hub_answers(name):
        yield
        return
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        raise DataError(
            f"it is no file or folder here, the hub ({constants.ENDPOINT}) does not answer, and the cache "
            "has no dataset of this name"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _hub_answers(name: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
    except HfHubHTTPError:  # an answer all the same
        return True
    except Exception:  # of the library that speaks HTTP, whichever that is
        return False
    return True


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """What goes wrong in `datasets` has many types: its own, those of pandas and pyarrow, those of HTTP."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        hint = _about_cache(error) or _near(Path(source))
        raise DataError(f"{source} cannot be read: {reason}{hint}") from error


def _near(path: Path) -> str:
    """A file or folder here that was perhaps meant, where the path is none and was taken for a name."""
    hint = "" if path.exists() else missing_path(path)
    return hint if "did you mean" in hint else ""


def _about_cache(error: Exception) -> str:
    """What to do where it was not the data but the folder of `datasets` that could not be used."""
    from datasets import config

    caches = (Path(config.HF_CACHE_HOME), Path(config.HF_DATASETS_CACHE))
    file = Path(str(error.filename)) if isinstance(error, OSError) and error.filename else None
    # The folder, what is in it, or one above it that could not be made.
    if file is None or not any(file.is_relative_to(cache) or cache.is_relative_to(file) for cache in caches):
        return ""
    return "; set HF_HOME to a folder that this user can write"
