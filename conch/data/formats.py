"""The forms of rows that public datasets come in, brought into those that trainers take.

    text                 "..." or {"text"}
    dialogue             {"messages": [{"role", "content"}, ...]}
    prompt               {"prompt"}
    prompt, completion   {"prompt", "completion"}
    preference           {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} with the prompt in both
    labelled             {"prompt", "completion", "label"}, label true for a good completion

Where a form has a text it may have a list of messages instead, alike in all keys of a row, which the
tokenizer's chat template renders later. A prompt that is repeated at the beginning of its answers is taken
off them. Forms that owners of public datasets made up are brought into these by `conch.data.public`.

An error's words follow a row's name: "row 3 has no prompt".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from conch.config import DataConfig
from conch.data.chat import TEMPLATE_KEYS, dialogue_fault, messages_of, template_keys
from conch.data.files import Rows, as_written, like_rows, place_of, renamed
from conch.data.public import public_form
from conch.errors import DataError
from conch.log import get_logger
from conch.types import ASSISTANT

Text = str | list[Mapping[str, Any]]
"""A text, or messages that a chat template makes into one."""

_FORM_KEYS = {
    *("messages", "conversations", "prompt", "completion", "chosen", "rejected", "text", "label", "score"),
    *("scores", "margin", "objective", "tools", "chat_template_kwargs", "sample", "reward"),
}
"""Keys that say what form a row has; a value of None says that the row has not this key."""

_SAMPLE = (
    'is neither a string, nor a dict of strings "prompt" and "completion", nor a dialogue of messages with '
    '"role" and "content"'
)
_NOT_HELD = 'has a "prompt" string that the messages before the answers do not hold: take out one of the two'
_MIXED = "; `data.apply_chat_template=true` makes messages of strings"
_TIE = (
    'has no answer that is worse than the "chosen" one (a tie of scores, or null for "rejected"): nothing is '
    "preferred, so nothing is learned from it (rows of a file are left out; from Python, take it out)"
)
_REWARDED = 'is no {"sample", "reward"} object, preference or labelled completion'
_STEPWISE = (
    'has "completions" with "labels" for each step, as stepwise supervision has: no trainer here learns from '
    "labels of steps; join the steps, and set `data.columns.completion` and `data.columns.label`"
)

_REWARDED_FORMS = (
    ("chosen", "rejected"),
    ("prompt", "completion", "label"),
)
JUDGEMENT_FORMS = (
    ("chosen", "rejected"),
    ("prompt", "completion", "label"),
    ("prompt", "completion", "score"),
    ("text", "score"),
)
"""Keys of the forms that ILQL and reward models learn from."""

_TEXT_KEYS = ("messages", "prompt", "completion", "chosen", "rejected", "text")

_LIKELY = {
    "prompt": ("question", "problem", "query", "instruction", "input", "task", "post", "context"),
    "completion": ("answer", "solution", "response", "output", "target", "summary", "generated_solution"),
    "text": ("content", "transcript", "sentence", "document", "review"),
    "chosen": ("preferred", "better", "response_chosen", "chosen_response", "accepted", "preferred_output"),
    "rejected": ("dispreferred", "worse", "response_rejected", "rejected_response", "non_preferred_output"),
    "score": ("rating", "reward", "quality", "stars", "label"),
    "label": ("is_correct", "correct"),
}
"""What public datasets call the keys of our forms, the likeliest first."""


def in_form(rows: Iterable[Any], what: str, form: Callable[[Any, str], Any]) -> list[Any]:
    """What `form` gives for each row, with the places of the rows.

    what: one row, as messages call it ("prompt").
    form: from a row and its name ("prompt 3", or the line of a file); raises a DataError, with that name, for
        what is none.

    Raises:
        DataError: there are no rows, or one is none of that form.
    """
    given = listed(rows, f"{what}s")
    if not given:
        raise DataError(f"the list of {what}s is empty: give at least one {what}")
    return like_rows(given, [form(row, place_of(given, index, what)) for index, row in enumerate(given)])


def listed(rows: Iterable[Any], what: str, config: DataConfig | None = None) -> list[Any]:
    """Rows as a list, whatever holds them: a sequence, a column or a split of `datasets`, an iterator.

    `Rows`, which were read, stay as they are, with their places.

    what: how an error names them, in the plural.
    config: has the names of columns, see `renamed`; None changes none.

    Raises:
        DataError: they are one string, or several splits; or a row has not the columns that are named.
    """
    if isinstance(rows, (str, bytes)):  # also a sequence of strings: its letters
        raise DataError(f"the {what} are one string: give a list of {what}")
    if isinstance(rows, Mapping):
        raise DataError(f"the {what} are a dict of {', '.join(map(str, rows))}: give one of its values")
    if isinstance(rows, Rows):
        return rows
    given = list(as_written(rows))
    return given if config is None else [_named(row, index, what, config) for index, row in enumerate(given)]


def _named(row: Any, index: int, what: str, config: DataConfig) -> Any:
    try:
        return renamed(row, config)
    except DataError as error:
        raise DataError(f"row {index} of the {what} {error}") from None


def text_of(value: Any) -> Text | None:
    """A string or a list of messages, as it is; None for anything else."""
    return value if isinstance(value, str) else messages_of(value) if not isinstance(value, Mapping) else None


# ---------------------------------------------------------------------------------------------------- forms


def sample_form(row: Any) -> Any:
    """A string, {"prompt", "completion"} (both texts or both dialogues) or {"messages"}: what is to be
    learned. Of a preference, the chosen text.

    Raises:
        DataError: the row is none of these.
    """
    given, row = row, _recognised(row)
    if isinstance(row, str):
        return row
    messages = messages_of(row)
    if messages is not None:
        return {"messages": messages, **template_keys(row)} if isinstance(row, Mapping) else messages
    if not isinstance(row, Mapping):
        raise DataError(_SAMPLE + about(row))
    _refuse_stepwise(row)
    row = _prompt_apart(row)
    if "text" in row:
        row = {"chosen": row["text"], **template_keys(row)}
    answer = "completion" if "completion" in row else "chosen"
    answer_text = text_of(row.get(answer))
    if "prompt" not in row and answer == "chosen":
        if isinstance(answer_text, list):
            return {"messages": answer_text, **template_keys(row)}
        if answer_text is not None:
            return answer_text
    prompt = text_of(row.get("prompt"))
    if prompt is not None and answer_text is not None:
        _joined(prompt, answer_text, answer)
    if prompt is None or answer_text is None:
        _refuse_nulls(given, ("prompt", "completion"), ("chosen",), ("text",), ("messages",))
        raise DataError(_SAMPLE + about(row, ("prompt", "completion"), ("text",)))
    keys = {} if isinstance(prompt, str) else template_keys(row)
    return {"prompt": prompt, "completion": answer_text, **keys}


def prompt_form(row: Any) -> Any:
    """A string, or a dict whose "prompt" is a text or a dialogue; its other keys go with it, but for
    "messages", which say the same again, and which a reward function has of each rollout.

    The prompt of a dialogue is what stands before the assistant's last message, that of a preference without
    one what both texts begin with.

    Raises:
        DataError: the row has no prompt.
    """
    given, row = row, _recognised(row)
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        row = _with_prompt(_prompt_apart(row))
        if "prompt" in row:
            row = {key: value for key, value in row.items() if key != "messages"}
        prompt = text_of(row.get("prompt"))
        if prompt is not None:
            if isinstance(prompt, list):
                template_keys(row)
            return row
    _refuse_nulls(given, ("prompt",), ("messages",))
    kind = type(row.get("prompt") if isinstance(row, Mapping) else row).__name__
    needed = 'is neither a string nor a dict with a "prompt" string or dialogue'
    raise DataError(f"{needed} (got {kind}){about(row, ('prompt',))}")


def prompt_metadata(row: Any) -> Mapping[str, Any] | None:
    """What of a prompt's row reaches a reward; None for a row that is no prompt, which is refused where it is
    tokenised."""
    try:
        form = prompt_form(row)
    except DataError:
        return None
    if not isinstance(form, Mapping):
        return {}
    is_text = isinstance(form["prompt"], str)
    own_keys = ("prompt",) if is_text else ("prompt", *TEMPLATE_KEYS)
    return {key: value for key, value in form.items() if key not in own_keys}


def judgement_form(row: Any) -> Any:
    """A row for a reward model, its prompt put before its texts, a label made a score of 1 or 0.

    What is neither a comparison nor a text with a score comes back as it is, for
    `conch.data.preferences.check_rows` to refuse.

    Raises:
        DataError: a prompt that is not of the same kind as the texts, a label that is neither true nor false,
            or no answer to compare with.
    """
    given, row = row, _recognised(row)
    if not isinstance(row, Mapping):
        return row
    _refuse_stepwise(row)
    row = _prompt_apart(row)
    _refuse_uncompared(row, given)
    judgement = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    if row.keys() & {"score", "scores", "label"} and not row.keys() & {"prompt", "text"}:
        judgement |= {"text": judgement.pop("messages")} if "messages" in row else {}
    if "prompt" in row:
        for key in ("chosen", "rejected", "text"):
            if key in row:
                judgement[key] = _joined(row["prompt"], row[key], key)
        if "completion" in row:
            judgement["text"] = _joined(row["prompt"], row["completion"], "completion")
    if "label" in row and row.keys() & {"prompt", "messages"} and not row.keys() & {"score", "scores"}:
        judgement["score"] = float(_label(row))
        del judgement["label"]
    if isinstance(judgement.get("scores"), Mapping):
        judgement["scores"] = {key: score for key, score in judgement["scores"].items() if score is not None}
    if any(isinstance(text_of(judgement.get(key)), list) for key in ("text", "chosen", "rejected")):
        template_keys(row)
    judges = {"text", "score"} <= judgement.keys() or {"text", "scores"} <= judgement.keys()
    if judges or {"chosen", "rejected"} <= judgement.keys():
        return judgement
    _refuse_nulls(given, *JUDGEMENT_FORMS, ("scores",))
    return given


def rewarded_form(row: Any) -> list[tuple[Any, float]]:
    """Samples of a row with their rewards: those of {"sample", "reward"}; 1 and -1 for chosen and rejected,
    or for the two labels.

    Raises:
        DataError: the row has none of these forms.
    """
    given, row = row, _recognised(row)
    if not isinstance(row, Mapping):
        raise DataError(_REWARDED + about(row))
    _refuse_stepwise(row)
    if {"sample", "reward"} <= row.keys():
        messages = messages_of(row["sample"])
        sample = row["sample"] if messages is None else {"messages": messages, **template_keys(row)}
        return [(sample, row["reward"])]
    row = _prompt_apart(row)
    if {"prompt", "completion", "label"} <= row.keys():
        return [(_turns(row["prompt"], row["completion"], row), 1.0 if _label(row) else -1.0)]
    _refuse_uncompared(row, given)
    if {"chosen", "rejected"} <= row.keys():
        prompt, chosen, rejected = prompt_and_answers(row)
        return [(_turns(prompt, chosen, row), 1.0), (_turns(prompt, rejected, row), -1.0)]
    _refuse_nulls(given, *_REWARDED_FORMS, ("sample", "reward"))
    raise DataError(_REWARDED + about(row, *_REWARDED_FORMS))


def prompt_and_answers(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a preference; without a "prompt", what the two texts begin with alike,
    up to the last "Assistant:" of turns as in Anthropic's HH, else to the end of a word, or the messages that
    they share.

    Raises:
        DataError: they are no texts, or share nothing.
    """
    chosen, rejected = text_of(row.get("chosen")), text_of(row.get("rejected"))
    if chosen is None or rejected is None or type(chosen) is not type(rejected):
        raise DataError('needs "chosen" and "rejected", both strings or both dialogues')
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    shared = _num_shared(chosen, rejected)
    if not shared:
        raise DataError('has no "prompt", and "chosen" and "rejected" do not begin alike')
    return chosen[:shared], chosen[shared:], rejected[shared:]


# --------------------------------------------------------------------------------------------- parts of a row


def _recognised(row: Any) -> Any:
    """The row in one of our forms, without those keys of them that have no value."""
    if not isinstance(row, Mapping):
        return row
    return _without_nulls(public_form(_without_nulls(row)))


def _without_nulls(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in row.items() if value is not None or key not in _FORM_KEYS}


def _prompt_apart(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with a prompt that its answers do not repeat, of the same kind as they are.

    Raises:
        DataError: the prompt is a string, and nowhere in the answers' messages.
    """
    answers = {key: text_of(row[key]) for key in ("completion", "chosen", "rejected") if key in row}
    prompt, texts = text_of(row.get("prompt")), list(answers.values())
    if prompt is None or not texts:
        return row
    if isinstance(prompt, str) and all(isinstance(text, list) for text in texts):
        shared = _shared_messages(prompt, texts)  # pyright: ignore[reportArgumentType]
        first = 0 if all(text[0]["role"] == ASSISTANT for text in texts) else len(shared)  # pyright: ignore[reportOptionalSubscript, reportArgumentType]
        return {**row, "prompt": shared, **{key: text[first:] for key, text in answers.items() if text}}
    # Of strings, one word in front may be chance: "1" before "10" and "11".
    says_much = isinstance(prompt, list) or len(prompt.split()) > 1
    repeated = all(
        type(text) is type(prompt) and len(text) > len(prompt) and text[: len(prompt)] == prompt  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        for text in texts
    )
    is_pair = "completion" in answers and isinstance(prompt, str)
    if not (says_much and repeated) or is_pair:
        return row
    return {**row, **{key: text[len(prompt) :] for key, text in answers.items() if text}}


def _shared_messages(prompt: str, texts: list[list[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The messages that all texts begin with, less their last one; the prompt as the user's where the
    assistant begins."""
    if all(text[0]["role"] == ASSISTANT for text in texts):
        return [{"role": "user", "content": prompt}]
    shared = texts[0][: min(_num_shared(texts[0], text) for text in texts)]
    if not any(prompt.strip() in _said(message) for message in shared):
        raise DataError(_NOT_HELD)
    return shared


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message, parts of it joined, without white space around it."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return text.strip()


def _with_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the prompt of its dialogue or of its preference, where it has none of its own; of a prompt
    in words that is a message of the dialogue, what goes up to that.

    Raises:
        DataError: no message is the prompt, or the texts of a preference do not begin alike.
    """
    messages = messages_of(row.get("messages"))
    prompt = row.get("prompt")
    if isinstance(prompt, str) and messages is not None:
        ends = [number for number, said in enumerate(messages, 1) if _said(said) == prompt.strip()]
        if not ends:
            raise DataError(_NOT_HELD)
        return {**row, "prompt": messages[: ends[0]]}
    if "prompt" in row:
        return row
    if messages is not None:
        others = {key: value for key, value in row.items() if key != "messages"}
        answered = messages[-1]["role"] == ASSISTANT and len(messages) > 1
        if not answered:
            return {**others, "prompt": messages}
        return {**others, "prompt": messages[:-1], "completion": messages[-1:]}
    if {"chosen", "rejected"} <= row.keys():
        prompt, chosen, rejected = prompt_and_answers(row)
        return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row


def _num_shared(one: Text, other: Text) -> int:
    """Characters or messages that both begin with, less the space and the word they end in."""
    pairs = enumerate(zip(one, other, strict=False))
    shared = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    if not isinstance(one, str):
        return min(shared, len(one) - 1, len(other) - 1)
    *_, last = [None, *re.finditer(r"\n\nAssistant:", one[:shared])]
    return last.end() if last is not None else len(re.sub(r"\S+$", "", one[:shared]).rstrip())


def _turns(prompt: Any, output: Any, row: Mapping[str, Any]) -> Any:
    """A prompt of a row with its output, as `conch.data.multi_turn` takes it."""
    if isinstance(prompt, str) and isinstance(output, str):
        return [prompt, output]
    if text_of(prompt) is None or type(text_of(prompt)) is not type(text_of(output)):
        raise DataError(f"needs a prompt and outputs that are all strings or all dialogues{_MIXED}")
    return {"prompt": prompt, "completion": output, **template_keys(row)}


def _joined(prompt: Any, text: Any, key: str) -> Text:
    before, behind = text_of(prompt), text_of(text)
    if isinstance(before, str) and isinstance(behind, str):
        return before + behind
    if isinstance(before, list) and isinstance(behind, list):
        return [*before, *behind]
    raise DataError(f'needs a "prompt" and a "{key}" that are both strings or both dialogues{_MIXED}')


def _label(row: Mapping[str, Any]) -> bool:
    if row["label"] not in (True, False):
        raise DataError(f"has the label {row['label']!r}: it must be true or false")
    return bool(row["label"])


# -------------------------------------------------------------------------------------------------- refusals


def _refuse_stepwise(row: Mapping[str, Any]) -> None:
    if isinstance(row.get("completions"), Sequence) and isinstance(row.get("labels"), Sequence):
        raise DataError(_STEPWISE)


def _refuse_uncompared(row: Mapping[str, Any], given: Any) -> None:
    """Refuse a "chosen" text with nothing to prefer it to.

    row: `given`, as `_recognised` has it.
    """
    if "chosen" not in row or "rejected" in row:
        return
    if "rejected" in {**given, **public_form(_without_nulls(given))}:
        raise DataError(_TIE)
    raise DataError('has no "rejected" text beside "chosen"' + about(row, ("rejected",)))


def _refuse_nulls(given: Any, *forms: tuple[str, ...]) -> None:
    """Refuse a row that has one of these forms but for values that are null: it is its values that are at
    fault, not the names of its columns."""
    if not isinstance(given, Mapping):
        return
    nulls = [
        key
        for form in forms
        for key in form
        if key in given and given[key] is None and all(name in given for name in form)
    ]
    if nulls:
        named = " and ".join(f'"{key}"' for key in dict.fromkeys(nulls))
        raise DataError(f"has null for {named}: give a value, or take the row out")


def about(row: Any, *forms: tuple[str, ...]) -> str:
    """What a refusal adds: which dialogue is none and why, the row's keys, and what to set.

    forms: keys that the row might have had, of one form each.
    """
    values = {"": row} if not isinstance(row, Mapping) else {key: row.get(key) for key in _TEXT_KEYS}
    faults = ((key, dialogue_fault(value)) for key, value in values.items())
    named = ((f'"{key}": ' if key else "") + fault for key, fault in faults if fault)
    faulty = "".join(f"; {fault}" for fault in list(named)[:1])
    if not isinstance(row, Mapping):
        return faulty
    keys = ", ".join(str(key) for key in list(row)[:20])
    columns = next(filter(None, (likely_columns(row, form) for form in forms)), {})
    set_to = " ".join(f"data.columns.{key}={column}" for key, column in columns.items())
    remedy = f"set `{set_to}`" if set_to else "name columns by `data.columns`, see docs/data.md"
    return f"{faulty} (keys here: {keys}): {remedy}"


def likely_columns(row: Mapping[str, Any], form: tuple[str, ...]) -> dict[str, str]:
    """Key of the form -> the column that likely is what the row lacks of it; none where it lacks more or
    nothing."""
    lacking = [key for key in form if key not in row]
    columns: dict[str, str] = {}
    for key in lacking:
        left = (name for name in _LIKELY.get(key, ()) if name in row and name not in columns.values())
        if (column := next(left, None)) is not None:
            columns[key] = column
    return columns if len(columns) == len(lacking) else {}


# --------------------------------------------------------------------------------------------------- lengths


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
