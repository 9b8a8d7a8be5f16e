"""The forms of rows that public datasets come in, brought into those that trainers take.

    text                 "..." or {"text"}
    dialogue             {"messages": [{"role", "content"}, ...]}
    prompt               {"prompt"}
    prompt, completion   {"prompt", "completion"}
    preference           {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} with the prompt in both
    labelled             {"prompt", "completion", "label"}, label true for a good completion

Where a form has a text it may have a list of messages instead, alike in all keys of a row, which the
tokenizer's chat template renders later.

An error's words follow a row's name: "row 3 has no prompt".

Rows that are too short or too long to train on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conch.config import DataConfig
from conch.data.chat import messages_of, template_keys
from conch.data.files import Rows
from conch.errors import DataError
from conch.log import get_logger

Text = str | list[Mapping[str, Any]]
"""A text, or messages that a chat template makes into one."""

_SAMPLE = (
    'is neither a string, nor a dict of strings "prompt" and "completion", nor a dialogue of messages with '
    '"role" and "content"'
)


def listed(rows: Iterable[Any], what: str) -> list[Any]:
    """Rows as a list, whatever holds them: a sequence, a column or a split of `datasets`, an iterator. `Rows`
    stay such, with their places.

    what: how an error names them, in the plural.

    Raises:
        DataError: they are one string, or several splits.
    """
    if isinstance(rows, (str, bytes)):  # also a sequence of strings: its letters
        raise DataError(f"the {what} are one string: give a list of {what}")
    if isinstance(rows, Mapping):
        raise DataError(f"the {what} are a dict of {', '.join(map(str, rows))}: give one of its values")
    return rows if isinstance(rows, Rows) else list(rows)


def text_of(value: Any) -> Text | None:
    """A string or a list of messages, as it is; None for anything else."""
    return value if isinstance(value, str) else messages_of(value) if not isinstance(value, Mapping) else None


def sample_form(row: Any) -> Any:
    """A string, {"prompt", "completion"} (both texts or both dialogues) or {"messages"}: what is to be
    learned. Of a preference, the chosen text.

    Raises:
        DataError: the row is none of these.
    """
    if isinstance(row, str):
        return row
    messages = messages_of(row)
    if messages is not None:
        return {"messages": messages, **template_keys(row)} if isinstance(row, Mapping) else messages
    if not isinstance(row, Mapping):
        raise DataError(_SAMPLE)
    if isinstance(row.get("text"), str):
        return row["text"]
    answer = "completion" if "completion" in row else "chosen"
    answer_text = text_of(row.get(answer))
    if answer_text is None:
        raise DataError(_SAMPLE)
    if "prompt" not in row:
        if answer == "completion":
            raise DataError(_SAMPLE)
        return (
            answer_text if isinstance(answer_text, str) else {"messages": answer_text, **template_keys(row)}
        )
    prompt = text_of(row["prompt"])
    if type(prompt) is not type(answer_text):
        raise DataError(_SAMPLE)
    keys = {} if isinstance(prompt, str) else template_keys(row)
    return {"prompt": prompt, "completion": answer_text, **keys}


def prompt_form(row: Any) -> Any:
    """A string, or a dict whose "prompt" is a text or a dialogue; its other keys go with it.

    Raises:
        DataError: the row is neither.
    """
    if isinstance(row, str):
        return row
    prompt = row.get("prompt") if isinstance(row, Mapping) else row
    if not isinstance(row, Mapping) or text_of(prompt) is None:
        raise DataError(
            f'is neither a string nor a dict with a "prompt" string or dialogue (got {type(prompt).__name__})'
        )
    if not isinstance(prompt, str):
        template_keys(row)
    return row


def judgement_form(row: Any) -> Any:
    """A row for a reward model, its prompt put before its texts, a label made a score of 1 or 0.

    What has none of these keys is given back as it is, for `conch.data.preferences.check_rows`.

    Raises:
        DataError: a prompt that is not of the same kind as the texts, or a label that is neither true nor
            false.
    """
    if not isinstance(row, Mapping):
        return row
    if any(isinstance(text_of(row.get(key)), list) for key in ("text", "chosen", "rejected", "completion")):
        template_keys(row)
    if "prompt" not in row:
        return row
    judgement = {key: value for key, value in row.items() if key not in ("prompt", "completion", "label")}
    for key in ("chosen", "rejected", "text"):
        if key in row:
            judgement[key] = _joined(row["prompt"], row[key], key)
    if "completion" in row:
        judgement["text"] = _joined(row["prompt"], row["completion"], "completion")
    if "label" in row:
        judgement["score"] = float(_label(row))
    return judgement


def rewarded_form(row: Any) -> list[tuple[Any, float]]:
    """Samples of a row with their rewards: those of {"sample", "reward"}; 1 and -1 for chosen and rejected,
    or for the two labels.

    Raises:
        DataError: the row has none of these forms.
    """
    if not isinstance(row, Mapping):
        raise DataError('is no {"sample", "reward"} object, preference or labelled completion')
    if {"sample", "reward"} <= row.keys():
        return [(row["sample"], row["reward"])]
    if {"prompt", "completion", "label"} <= row.keys():
        return [(_turns(row["prompt"], row["completion"], row), 1.0 if _label(row) else -1.0)]
    if {"chosen", "rejected"} <= row.keys():
        prompt, chosen, rejected = prompt_and_answers(row)
        return [(_turns(prompt, chosen, row), 1.0), (_turns(prompt, rejected, row), -1.0)]
    raise DataError('is no {"sample", "reward"} object, preference or labelled completion')


def prompt_and_answers(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a preference; without a "prompt", what the two texts begin with alike,
    up to the end of a word, or the messages that they share.

    Raises:
        DataError: they are no texts, or share nothing.
    """
    chosen, rejected = text_of(row.get("chosen")), text_of(row.get("rejected"))
    if chosen is None or type(chosen) is not type(rejected):
        raise DataError('needs "chosen" and "rejected", both strings or both dialogues')
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    assert rejected is not None
    shared = _num_shared(chosen, rejected)
    if not shared:
        raise DataError('has no "prompt", and "chosen" and "rejected" do not begin alike')
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _num_shared(one: Text, other: Text) -> int:
    """Characters or messages that both begin with, less the space and the word they end in."""
    pairs = enumerate(zip(one, other, strict=False))
    shared = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    if isinstance(one, str):
        return len(re.sub(r"\S+$", "", one[:shared]).rstrip())
    return min(shared, len(one) - 1, len(other) - 1)


def _turns(prompt: Any, output: Any, row: Mapping[str, Any]) -> Any:
    """A prompt of a row with its output, as `conch.data.multi_turn` takes it."""
    if isinstance(prompt, str) and isinstance(output, str):
        return [prompt, output]
    if text_of(prompt) is None or type(text_of(prompt)) is not type(text_of(output)):
        raise DataError("needs a prompt and outputs that are all strings or all dialogues")
    return {"prompt": prompt, "completion": output, **template_keys(row)}


def _joined(prompt: Any, text: Any, key: str) -> Text:
    before, behind = text_of(prompt), text_of(text)
    if isinstance(before, str) and isinstance(behind, str):
        return before + behind
    if isinstance(before, list) and isinstance(behind, list):
        return [*before, *behind]
    raise DataError(f'needs a "prompt" and a "{key}" that are both strings or both dialogues')


def _label(row: Mapping[str, Any]) -> bool:
    if row["label"] not in (True, False):
        raise DataError(f"has the label {row['label']!r}: it must be true or false")
    return bool(row["label"])


_log = get_logger(__name__)


def fitting(lengths: Sequence[int], config: DataConfig, what: str) -> list[int]:
    """Numbers of the rows whose length `data.min_tokens` and `data.max_tokens` allow; one warning counts the
    others.

    lengths: in tokens, before anything is cut.
    what: how the warning names rows, in the plural.

    Raises:
        DataError: none is left.
    """
    shortest, longest = config.min_tokens, config.max_tokens
    num_short = sum(length < shortest for length in lengths)
    num_long = sum(longest is not None and length > longest for length in lengths)
    if num_short + num_long == len(lengths):
        raise DataError(
            f"none of the {len(lengths)} {what} has the length that `data.min_tokens` = {shortest} and "
            f"`data.max_tokens` = {longest} ask for: the shortest has {min(lengths)} tokens, the longest "
            f"{max(lengths)}"
        )
    if num_short + num_long:
        _log.warning(
            "%d of %d %s left out: %d of fewer than %d tokens, %d of more than %s",
            *(num_short + num_long, len(lengths), what, num_short, shortest, num_long, longest),
        )
    return [
        row
        for row, length in enumerate(lengths)
        if length >= shortest and (longest is None or length <= longest)
    ]
