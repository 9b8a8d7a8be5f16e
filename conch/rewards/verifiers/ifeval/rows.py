"""The 25 types of instructions, and how those of a row are read.

Rows are read as google/IFEval publishes them, with nulls for the arguments that a type does not take or
without. Nothing is guessed: an unknown type, or an argument that is missing, superfluous or of another type,
is a `DataError`, and 0 is a number like any other.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conch.errors import DataError
from conch.rewards.verifiers.ifeval import languages, layout, words


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a row. It can be pickled.

    type: such as `length_constraints:number_words`.
    arguments: of the type's check, by name.
    """

    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What stands before the colon of the type."""
        return self.type.partition(":")[0]

    def is_followed_by(self, text: str) -> bool:
        """Tell whether the text follows the instruction. A blank text follows none."""
        return bool(text.strip()) and TYPES[self.type].check(text, **self.arguments)


@dataclass(frozen=True, slots=True)
class InstructionType:
    """How a type of instruction is checked.

    check: of a text and the arguments.
    arguments: readers of the arguments, by name: from the row's value to the check's.
    package: module of the extra `ifeval` that the check imports.
    """

    check: Callable[..., bool]
    arguments: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    package: str | None = None


class _NotReadableError(Exception):
    """What an argument must be instead."""


def _count(value: Any) -> int:
    # Tables with empty cells hold whole numbers as 3.0.
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if whole and not isinstance(value, bool) and value >= 0:
        return int(value)
    raise _NotReadableError("a whole number of at least 0")


def _ordinal(value: Any) -> int:
    count = _count(value)
    if count >= 1:
        return count
    raise _NotReadableError("a whole number of at least 1")


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise _NotReadableError("a text that is not blank")


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return tuple(map(_text, value))
    raise _NotReadableError("a list of at least one text")


def _word(value: Any) -> str:
    return _text(value).strip()


def _character(value: Any) -> str:
    if isinstance(value, str) and len(value.strip()) == 1:
        return value.strip()
    raise _NotReadableError("one character")


def _relation(value: Any) -> str:
    if value in ("at least", "less than"):
        return value
    raise _NotReadableError("`at least` or `less than`")


def _language(value: Any) -> str:
    if value in languages.LANGUAGES:
        return value
    raise _NotReadableError(f"one of {', '.join(languages.LANGUAGES)}")


TYPES: Mapping[str, InstructionType] = {
    "keywords:existence": InstructionType(words.keywords_occur, {"keywords": _texts}),
    "keywords:frequency": InstructionType(
        words.keyword_frequency, {"keyword": _word, "frequency": _count, "relation": _relation}
    ),
    "keywords:forbidden_words": InstructionType(words.no_forbidden_words, {"forbidden_words": _texts}),
    "keywords:letter_frequency": InstructionType(
        words.letter_frequency, {"letter": _character, "let_frequency": _count, "let_relation": _relation}
    ),
    "language:response_language": InstructionType(
        languages.response_language, {"language": _language}, package="langdetect"
    ),
    "length_constraints:number_sentences": InstructionType(
        languages.number_of_sentences, {"num_sentences": _count, "relation": _relation}, package="punkt"
    ),
    "length_constraints:number_paragraphs": InstructionType(
        layout.number_of_paragraphs, {"num_paragraphs": _count}
    ),
    "length_constraints:number_words": InstructionType(
        words.number_of_words, {"num_words": _count, "relation": _relation}
    ),
    "length_constraints:nth_paragraph_first_word": InstructionType(
        layout.nth_paragraph_first_word,
        {"num_paragraphs": _ordinal, "nth_paragraph": _ordinal, "first_word": _text},
    ),
    "detectable_content:number_placeholders": InstructionType(
        layout.number_of_placeholders, {"num_placeholders": _count}
    ),
    "detectable_content:postscript": InstructionType(layout.postscript, {"postscript_marker": _word}),
    "detectable_format:number_bullet_lists": InstructionType(
        layout.number_of_bullets, {"num_bullets": _count}
    ),
    "detectable_format:constrained_response": InstructionType(layout.constrained_response),
    "detectable_format:number_highlighted_sections": InstructionType(
        layout.number_of_highlights, {"num_highlights": _count}
    ),
    "detectable_format:multiple_sections": InstructionType(
        layout.number_of_sections, {"section_spliter": _word, "num_sections": _count}
    ),
    "detectable_format:json_format": InstructionType(layout.json_format),
    "detectable_format:title": InstructionType(layout.title),
    "combination:two_responses": InstructionType(layout.two_responses),
    "combination:repeat_prompt": InstructionType(layout.repeat_prompt, {"prompt_to_repeat": _text}),
    "startend:end_checker": InstructionType(layout.end_phrase, {"end_phrase": _word}),
    "startend:quotation": InstructionType(layout.quotation),
    "change_case:capital_word_frequency": InstructionType(
        words.capital_word_frequency, {"capital_frequency": _count, "capital_relation": _relation}
    ),
    "change_case:english_capital": InstructionType(languages.english_capital, package="langdetect"),
    "change_case:english_lowercase": InstructionType(languages.english_lowercase, package="langdetect"),
    "punctuation:no_comma": InstructionType(words.no_comma),
}
"""All types of google/IFEval, by name. Arguments have the names of its rows."""

GROUPS = tuple(dict.fromkeys(Instruction(name).group for name in TYPES))


def read_instructions(row: Mapping[str, Any], where: str = "") -> tuple[Instruction, ...]:
    """Read the instructions of `instruction_id_list`, with the arguments of `kwargs`.

    row: has lists of equal length under both names, or the same as text in JSON.
    where: goes before the names of the columns in messages, such as "`trip_wires`: ".

    Raises:
        DataError: a phrase about the row.
        ConfigError: a check needs a package that is not installed.
    """
    names = _listed(row, "instruction_id_list", where)
    kwargs = _listed(row, "kwargs", where)
    if not names:
        raise DataError(f"has {where}no instruction in `instruction_id_list`")
    if len(names) != len(kwargs):
        raise DataError(
            f"has {where}{len(names)} in `instruction_id_list`, but {len(kwargs)} in `kwargs`; each "
            "instruction needs its arguments, `{}` for none"
        )
    return tuple(read_instruction(name, given, where) for name, given in zip(names, kwargs, strict=True))


def read_instruction(name: Any, given: Any, where: str = "") -> Instruction:
    """Read one instruction; see `read_instructions`.

    name: of the type.
    given: its arguments by name, or the same as text in JSON; nulls and NaN count as absent.
    """
    kind = TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        near = difflib.get_close_matches(str(name), TYPES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(TYPES)}"
        raise DataError(f"has {where}the unknown instruction `{name}`; {hint}")
    arguments = decoded(given)
    if not isinstance(arguments, Mapping):
        raise DataError(f"has {where}{given!r} as arguments of {name}; it must be an object, `{{}}` for none")
    plain = {key: _plain(value) for key, value in arguments.items()}
    present = {key: value for key, value in plain.items() if not _is_nothing(value)}
    for key in kind.arguments:
        if key not in present:
            raise DataError(f"has {where}no `{key}` for {name} in `kwargs`")
    for key in present:
        if key not in kind.arguments:
            takes = ", ".join(f"`{each}`" for each in kind.arguments) or "none"
            raise DataError(f"has {where}the argument `{key}` for {name}, which takes {takes}")
    instruction = Instruction(name, {key: _read(key, present[key], name, where) for key in kind.arguments})
    _check_together(instruction, where)
    if kind.package is not None:
        languages.require_package(kind.package, name)
    return instruction


def _read(key: str, value: Any, name: str, where: str) -> Any:
    try:
        return TYPES[name].arguments[key](value)
    except _NotReadableError as error:
        raise DataError(f"has {where}`{key}`={value!r} for {name}; it must be {error}") from None


def _check_together(instruction: Instruction, where: str) -> None:
    arguments = instruction.arguments
    nth, of = arguments.get("nth_paragraph", 0), arguments.get("num_paragraphs", 0)
    if nth > of:
        raise DataError(f"has {where}`nth_paragraph`={nth} for {instruction.type}, but `num_paragraphs`={of}")


def _listed(row: Mapping[str, Any], column: str, where: str) -> Sequence[Any]:
    value = decoded(row.get(column))
    if value is None:
        raise DataError(f"has {where}no `{column}`")
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise DataError(f"has {where}{value!r} as `{column}`; it must be a list")
    return value


def decoded(value: Any) -> Any:
    """Return what a text in JSON says; any other value, and other texts, as they are. Arrays become lists."""
    if not isinstance(value, str):
        return _plain(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _plain(value: Any) -> Any:
    """A list or number of Python's own for one of NumPy's, as pandas gives them."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_nothing(value: Any) -> bool:
    """None, or NaN, which tables have for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))
