"""From a row to the samples that a reward is asked for: one, or those of a pair.

A file holds samples or pairs, which its first rows tell. Columns are taken by the names of docs/data.md, by
those that options give, or else by names that public datasets use for the same, which the user is told.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conch.config import DataConfig
from conch.data.chat import TEMPLATE_KEYS, messages_of
from conch.data.files import renamed
from conch.data.formats import likely_columns, prompt_form
from conch.data.public import as_spoken, public_form
from conch.errors import ConfigError, DataError
from conch.rewards.base import RewardSource
from conch.rewards.score import metadata_for, reads_of, rollout_of, unreadable
from conch.scoring.reading import InputRow
from conch.types import Rollout

_SAMPLES = (("messages",), ("prompt", "completion"), ("text",))
_PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
_PARTS = {"prompt", "completion", "chosen", "rejected"}
_SUBSETS = ("subset", "domain")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for a row.

    samples: of a sample, that one; of a pair, the chosen ones and then the rejected ones.
    num_chosen: how many of them are chosen; None where the row is no pair.
    in_lists: of a pair, whether its chosen and its rejected answers stood in lists.
    subset, id: of a pair, "" and None where the row names none.
    problem: why nothing is asked, in words that follow the row's name; "" where something is.
    """

    samples: tuple[Rollout, ...] = ()
    num_chosen: int | None = None
    in_lists: tuple[bool, bool] = (False, False)
    subset: str = ""
    id: str | int | None = None
    problem: str = ""


@dataclass(frozen=True)
class RowForm:
    """How the rows of one source are read.

    columns: our names -> those of the rows.
    is_pairs: whether a row is a pair.
    spoken: whether strings are made messages, for a reward that reads dialogues.
    from_text: whether lists may stand as JSON in a string.
    subset: column of the subsets; None where there is none.
    taken: those of `columns` that nobody gave, to be told.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    is_pairs: bool = False
    spoken: bool = False
    from_text: bool = False
    subset: str | None = None
    taken: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def _config(self) -> DataConfig:
        return DataConfig(columns=dict(self.columns))

    def request(self, row: InputRow, sources: Sequence[RewardSource]) -> Request:
        """What to ask of these sources, which were checked."""
        if row.broken:
            return Request(problem=row.broken)
        try:
            request = (
                self._pair(row.value, sources[0]) if self.is_pairs else self._sample(row.value, sources[0])
            )
        except DataError as error:
            return Request(problem=_in_our_words(str(error)))
        problems = (unreadable(source, sample) for source in sources for sample in request.samples)
        problem = next(filter(None, problems), "")
        return Request(problem=problem) if problem else request

    def named(self, row: Any) -> Any:
        """The row with our names, in one of the forms of docs/data.md where it has one.

        Raises:
            DataError: it has a form, and cannot be used.
        """
        if not isinstance(row, Mapping):
            return row
        row = renamed(row, self._config) if self.columns else row
        # A column that is named is meant, whatever else says the same.
        if self.columns.keys() & _PARTS:
            others = {"text", "messages"} - self.columns.keys()
            row = {key: value for key, value in row.items() if key not in others}
        elif "text" in self.columns:
            row = {key: value for key, value in row.items() if key != "messages"}
        if self.from_text:
            row = {key: _from_json(value) for key, value in row.items()}
        completion = row.get("completion")
        formed = public_form(row, spoken=False)
        # The answer of a row of GSM8K is what a verifier reads, beside a completion that somebody else wrote.
        formed = {**formed, "completion": completion} if isinstance(completion, (str, list)) else formed
        return as_spoken(formed) if self.spoken else formed

    def _sample(self, row: Any, source: RewardSource) -> Request:
        named = self.named(row)
        return Request((rollout_of(named, metadata_for(source, _both(row, named))),))

    def _pair(self, row: Any, source: RewardSource) -> Request:
        named = self.named(row)
        if not isinstance(named, Mapping) or not {"chosen", "rejected"} <= named.keys():
            keys = ", ".join(map(str, named)) if isinstance(named, Mapping) else type(named).__name__
            raise DataError(f'has no "chosen" and "rejected" (keys here: {keys})')
        metadata = metadata_for(source, _both(row, named))
        chosen, rejected = (
            [rollout_of(sample, metadata) for sample in samples] for samples in self._answers(named)
        )
        subset = named.get(self.subset) if self.subset else None
        own = named.get("id")
        return Request(
            (*chosen, *rejected),
            len(chosen),
            (_is_several(named["chosen"]), _is_several(named["rejected"])),
            "" if subset is None else str(subset),
            own if isinstance(own, (str, int)) else None,
        )

    def _answers(self, row: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """Samples of the chosen answers and of the rejected ones."""
        chosen, rejected = row["chosen"], row["rejected"]
        if chosen is None or rejected is None:
            raise DataError('has null for "chosen" or "rejected": nothing is preferred')
        if not _is_several(chosen) and not _is_several(rejected):
            return self._two(row)
        if row.get("prompt") is None:
            raise DataError('has several answers and no "prompt": name its column with --prompt')
        several = (
            ([*chosen] if _is_several(chosen) else [chosen]),
            ([*rejected] if _is_several(rejected) else [rejected]),
        )
        if not all(several):
            raise DataError('has an empty list of "chosen" or "rejected" answers')
        one, other = ([self._answered(row, answer) for answer in answers] for answers in several)
        return one, other

    def _answered(self, row: Mapping[str, Any], answer: Any) -> Any:
        """A prompt with one of several answers, as one row."""
        keys = {key: row[key] for key in TEMPLATE_KEYS if row.get(key) is not None}
        sample = {**keys, "prompt": row["prompt"], "completion": answer}
        return as_spoken(sample) if self.spoken else sample

    def _two(self, row: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        keys = {key: row[key] for key in TEMPLATE_KEYS if row.get(key) is not None}
        try:
            pair = prompt_form({key: value for key, value in row.items() if value is not None})
        except DataError as error:
            # Two texts that share no beginning are two samples, if each says all.
            if row.get("prompt") is None and all(_is_whole(row[key]) for key in ("chosen", "rejected")):
                return [row["chosen"]], [row["rejected"]]
            raise error
        one, other = (
            {**keys, "prompt": pair["prompt"], "completion": pair[key]} for key in ("chosen", "rejected")
        )
        return [one], [other]


def form_of(
    rows: Sequence[InputRow],
    source: RewardSource,
    *,
    columns: Mapping[str, str],
    rows_are: str | None = None,
    subset: str | None = None,
    from_text: bool = False,
) -> RowForm:
    """Find out how to read rows, from the first of them.

    source: the reward, which was checked.
    columns: our names -> those that the user gave.
    rows_are: `samples` or `pairs`; None finds out.
    subset: column of the subsets of pairs; None takes `subset` or `domain` where there is one.

    Raises:
        ConfigError: a column is not there.
        DataError: none of these rows can be read, or scored by this source.
    """
    form = RowForm(dict(columns), spoken=reads_of(source) == "dialogues", from_text=from_text)
    example = next((row for row in rows if not row.broken and isinstance(row.value, Mapping)), None)
    if example is not None:
        form = _with_names(form, example, rows_are)
        form = _with_subset(form, example, subset)
    elif rows_are == "pairs":
        form = replace(form, is_pairs=True)
    requests = [form.request(row, [source]) for row in rows]
    if all(request.problem for request in requests):
        first = next(iter(zip(rows, requests, strict=True)))
        raise DataError(f"{first[0].place} {first[1].problem}")
    _check_rows(rows, requests, source)
    return form


def _check_rows(rows: Sequence[InputRow], requests: Sequence[Request], source: RewardSource) -> None:
    """Raise DataError where the source can score none of these rows."""
    first = ""
    for row, request in zip(rows, requests, strict=True):
        if request.problem:
            continue
        try:
            source.check_row(request.samples[0].prompt.metadata)
            return
        except DataError as error:
            first = first or f"{row.place} {error} ({source.name} scores by it)"
    raise DataError(first)


def _with_names(form: RowForm, example: InputRow, rows_are: str | None) -> RowForm:
    row = example.value
    for name, column in form.columns.items():
        if column not in row and column.partition(".")[0] not in row:
            keys = ", ".join(map(str, row))
            raise ConfigError(f"--{name} {column}: {example.place} has no such column (columns: {keys})")
    is_pairs = rows_are == "pairs" or (
        rows_are is None and bool({"chosen", "rejected"} & form.columns.keys())
    )
    try:
        named = form.named(row)
    except DataError:
        return replace(form, is_pairs=is_pairs)
    kinds = _PAIRS if is_pairs else _SAMPLES if rows_are == "samples" else (*_PAIRS, *_SAMPLES)
    if set(form.columns) & {"text", "messages", "completion"}:
        kinds = _SAMPLES
    for kind in kinds:
        if set(kind) <= named.keys() and kind != _PAIRS[1]:
            return replace(form, is_pairs=kind in _PAIRS)
    for kind in kinds:
        if set(kind) <= named.keys():
            return replace(form, is_pairs=True)
        if columns := likely_columns(named, kind):
            both = {**form.columns, **columns}
            return replace(form, is_pairs=kind in _PAIRS, columns=both, taken=columns)
    return replace(form, is_pairs=is_pairs)


def _with_subset(form: RowForm, example: InputRow, subset: str | None) -> RowForm:
    if subset is not None and subset not in example.value:
        keys = ", ".join(map(str, example.value))
        raise ConfigError(f"--subset {subset}: {example.place} has no such column (columns: {keys})")
    there = (name for name in _SUBSETS if name in example.value)
    return replace(form, subset=subset or next(there, None)) if form.is_pairs else form


def _both(row: Any, named: Any) -> Any:
    """A row's own keys and those that they were given here, for verifiers and functions."""
    return {**row, **named} if isinstance(row, Mapping) and isinstance(named, Mapping) else row


def _is_several(answers: Any) -> bool:
    """Whether it is a list of answers, and not one answer, which may be a list of messages."""
    return isinstance(answers, list) and (not answers or messages_of(answers) is None)


def _is_whole(text: Any) -> bool:
    return isinstance(text, str) or messages_of(text) is not None


def _from_json(cell: Any) -> Any:
    """The list that a cell of a table holds as JSON; any other cell as it is."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[{", '["')):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _in_our_words(reason: str) -> str:
    """A refusal of `conch.data`, with the options of this command for its settings."""
    return reason.replace("`data.columns.", "`--").replace(
        "; `data.apply_chat_template=true` makes messages of strings", ""
    )
