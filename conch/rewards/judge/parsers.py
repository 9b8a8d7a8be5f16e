"""From an answer of a judge to numbers. What cannot be read is an error, and never a guess.

A message about an answer holds nothing of it: it may repeat the sample.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median, multimode
from typing import Any

from conch.config import JudgeConfig, RubricItem
from conch.rewards.judge.endpoint import Answer
from conch.types import DEFAULT_OBJECTIVE

# Of "8/10", "**8**/10" and "8 points out of 10" the 8 counts; the denominator is held against the range.
_NUMBER = re.compile(
    r"(?<![\d.])(?P<number>[-+]?\d+(?:[.,\u2013\u2014-]\d+)*(?:e[-+]?\d+)?)"
    r"(?:[^\d\n.!?;:]{0,20}?(?:/|\u2044|\b(?:out\s+)?of\b)[^\w\n]{0,8}(?P<of>\d+(?:\.\d+)?))?",
    re.I,
)
_PLAIN = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.I)
_AROUND = " \t\r\n*_`\"'.,:;!()[]{}<>"
_BLANKS = " \t\r\n\u2581\u0120\u010a"
"""Blanks, and the signs that some tokenizers write for them."""

_YES, _NO = {"yes", "true"}, {"no", "false"}
_VALUE_KEYS = ("score", "value", "answer", "rating")

Reading = Mapping[str, float]
"""What one answer says: objective or item -> value."""


class UnreadableError(ValueError):
    """An answer that is no score; the message goes on from "its answer"."""


def final_text(answer: Answer, thinking: tuple[str, str] | None) -> str:
    """Return an answer without its thinking.

    thinking: what it stands between.

    Raises:
        UnreadableError: a refusal, cut short, or empty.
    """
    _check_end(answer)
    if answer.finish_reason == "length":
        raise UnreadableError("was cut at `judge.max_tokens`")
    text = answer.text[_end_of_thinking(answer.text, thinking) :].strip()
    if not text:
        raise UnreadableError("is empty")
    return text


def _check_end(answer: Answer) -> None:
    if answer.refused:
        raise UnreadableError("is a refusal")
    if answer.finish_reason not in ("stop", "length"):
        raise UnreadableError(f"ended by `{answer.finish_reason[:30]}`")


def _end_of_thinking(text: str, thinking: tuple[str, str] | None) -> int:
    """Where the answer begins. A chat template may open the thinking itself: only its end shows."""
    if thinking is None:
        return 0
    begin, end = thinking
    at = text.rfind(end)
    if at >= 0:
        return at + len(end)
    if begin in text:
        raise UnreadableError("ends within its thinking: raise `judge.max_tokens`")
    return 0


# ------------------------------------------------------------------------------------------------ one number


def read_number(text: str, pattern: str | None, bounds: tuple[float, float]) -> float:
    """Return the last number of a text, or the one at the last match of `pattern`.

    bounds: lowest and highest that is an answer; "8/10" must have the highest for its denominator, and words
        that repeat the scale ("from 1 to 10", "a 10-point scale") are no answer.

    Raises:
        UnreadableError: there is none, it can be read in two ways ("7,5", "7-8"), or it is out of bounds.
    """
    if pattern is not None:
        text = _last_match(text, pattern)
    text = text.replace("\u2212", "-")  # the minus sign of typeset texts
    matches = [*_NUMBER.finditer(_scale_of(bounds).sub(" ", text))]
    if not matches:
        raise UnreadableError("holds no number")
    match = matches[-1]
    if _PLAIN.fullmatch(match["number"]) is None:
        raise UnreadableError("ends with what may be one number or several")
    value = float(match["number"])
    if match["of"] is not None and float(match["of"]) != bounds[1]:
        raise UnreadableError(f"is a number out of another than {bounds[1]:g}")
    if not bounds[0] <= value <= bounds[1]:
        raise UnreadableError(f"is a number outside `judge.number_range` {bounds[0]:g} to {bounds[1]:g}")
    return value


@functools.lru_cache
def _scale_of(bounds: tuple[float, float]) -> re.Pattern[str]:
    """What names a scale as a whole, as an answer does that repeats its question."""
    low, high = (rf"{re.escape(f'{bound:g}')}(?:\.0+)?" for bound in bounds)
    ends = rf"(?<![\d.,]){low}(?:\s*\([^()\n]{{0,60}}\))?\s*(?:to|and|[-\u2013\u2014])\s*{high}(?![.,]?\d)"
    return re.compile(rf"{ends}|(?<![\d.,]){high}[- ]points?\s+scale\b", re.I)


def _last_match(text: str, pattern: str) -> str:
    start, end = _span(text, pattern)
    return text[start:end]


def _span(text: str, pattern: str) -> tuple[int, int]:
    matches = [*re.finditer(pattern, text)]
    if not matches:
        raise UnreadableError("has nothing that `judge.pattern` matches")
    start, end = matches[-1].span(1 if matches[-1].re.groups else 0)
    if start < 0:
        raise UnreadableError("has nothing that the first group of `judge.pattern` matches")
    return start, end


def scaled(value: float, bounds: tuple[float, float], to: tuple[float, float] | None) -> float:
    """Map `bounds` onto `to`; None leaves the value as it is."""
    if to is None:
        return value
    return to[0] + (value - bounds[0]) / (bounds[1] - bounds[0]) * (to[1] - to[0])


# --------------------------------------------------------------------------------------------------- choices


class Choices:
    """Choices by what stands for them in an answer.

    values: choice -> its value.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._fold = len({name.strip().casefold() for name in values}) == len(values)
        self._values = {self._key(name): value for name, value in values.items()}
        self.bounds = (min(values.values()), max(values.values()))

    def value(self, text: str) -> float | None:
        """Return the value of the choice that a text is, less blanks; None where it is none."""
        return self._values.get(self._key(text))

    def _key(self, text: str) -> str:
        text = text.strip(_BLANKS)
        return text.casefold() if self._fold else text


def read_choice(text: str, pattern: str | None, choices: Choices) -> float:
    """Return the value of the choice that a text is, or ends with on a line of its own or behind a colon.

    Raises:
        UnreadableError: it is none of them.
    """
    last_line = text.strip().splitlines()[-1]
    places = [text, last_line, last_line.rpartition(":")[2]]
    if pattern is not None:
        places = [_last_match(text, pattern)]
    for place in places:
        for candidate in (place, place.strip(_AROUND)):
            if (value := choices.value(candidate)) is not None:
                return value
    raise UnreadableError("is none of `judge.choices`")


def read_logprobs(answer: Answer, config: JudgeConfig, choices: Choices) -> float:
    """Return the expected value over choices, by the probabilities of the token where the answer stands.

    p(c) = sum of exp(logprob) over tokens that are c but for blanks (and capitals); E = sum p(c) v(c) / sum
    p(c). A choice that is not among the likeliest tokens counts 0.

    Raises:
        UnreadableError: no log-probabilities, or the choices have less than `min_mass` together.
    """
    _check_end(answer)
    if not answer.tokens:
        raise UnreadableError("has no log-probabilities" if answer.text else "is empty")
    text = "".join(each.token for each in answer.tokens)
    begin = _end_of_thinking(text, config.thinking)
    if config.pattern is not None:
        begin += _span(text[begin:], config.pattern)[0]
    end = 0
    for token in answer.tokens:
        end += len(token.token)
        if end > begin and text[max(begin, end - len(token.token)) : end].strip(_BLANKS):
            return _expectation(token.top, choices, config.min_mass)
    raise UnreadableError("is empty")


def _expectation(top: Sequence[tuple[str, float]], choices: Choices, min_mass: float) -> float:
    mass = total = 0.0
    for token, logprob in top:
        value = choices.value(token)
        if value is not None:
            mass += math.exp(min(0.0, logprob))
            total += math.exp(min(0.0, logprob)) * value
    if mass < min_mass:
        raise UnreadableError(
            f"gives its choices {mass:.2g} of the probability, less than `judge.min_mass` = {min_mass:g}"
        )
    return total / mass


# --------------------------------------------------------------------------------------------------- rubrics


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield all JSON objects of a text, the last first, whatever stands around them."""
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    objects: list[dict[str, Any]] = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict):
            objects.append(value)
        at = text.find("{", end)
    yield from reversed(objects)


def read_rubric(text: str, items: Sequence[RubricItem]) -> Reading:
    """Return each item's value in [0, 1] from a JSON object with a key for each.

    Raises:
        UnreadableError: there is no such object, or a value is missing or no answer to its question.
    """
    for content in json_objects(text):
        if not any(item.name in content for item in items):
            continue
        missing = [item.name for item in items if content.get(item.name) is None]
        if missing:
            raise UnreadableError(f"lacks the rubric's {', '.join(missing)}")
        return {item.name: _item_value(content[item.name], item) for item in items}
    raise UnreadableError("holds no JSON object with the rubric's items")


def _item_value(value: Any, item: RubricItem) -> float:
    if isinstance(value, Mapping):  # with the reason beside it
        value = next((value[key] for key in _VALUE_KEYS if key in value), None)
    if item.scores is None:
        if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
            return float(value)
        return read_yes_no(str(value)) if isinstance(value, str) else _no_answer(item)
    if isinstance(value, str):
        return read_item(value, item)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _no_answer(item)
    if not item.scores[0] <= value <= item.scores[1]:
        raise UnreadableError(f"has a number outside the scores of `{item.name}`")
    return scaled(float(value), item.scores, (0.0, 1.0))


def _no_answer(item: RubricItem) -> float:
    raise UnreadableError(f"has no {'yes or no' if item.scores is None else 'number'} for `{item.name}`")


def read_item(text: str, item: RubricItem) -> float:
    """Return the value in [0, 1] of one item from an answer to it alone.

    Raises:
        UnreadableError: it is no answer.
    """
    if item.scores is None:
        return read_yes_no(text)
    return scaled(read_number(text, None, item.scores), item.scores, (0.0, 1.0))


def read_yes_no(text: str) -> float:
    """Return 1 for yes or true and 0 for no or false: the whole text, its last line, or its first word.

    Raises:
        UnreadableError: it is neither.
    """
    lines = text.strip().splitlines() or [""]
    words = re.split(r"[\s,.:;!]+", lines[0].strip(_AROUND), maxsplit=1)
    for candidate in (text, lines[-1], lines[-1].rpartition(":")[2], words[0]):
        word = candidate.strip(_AROUND).casefold()
        if word in _YES | _NO:
            return float(word in _YES)
    raise UnreadableError("is neither yes nor no")


def weighted(reading: Reading, items: Sequence[RubricItem]) -> dict[str, float]:
    """Return each item's part of the reward, which is their sum."""
    total = sum(item.weight for item in items)
    return {item.name: reading[item.name] * item.weight / total for item in items}


# ----------------------------------------------------------------------------------------------------- votes


_COMBINE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "median": median,
    # Of several that are the most frequent, their mean.
    "majority": lambda values: fmean(multimode(values)),
}


def combined(readings: Sequence[Reading], how: str) -> dict[str, float]:
    """Make one reading of several votes', name by name."""
    return {name: float(_COMBINE[how]([each[name] for each in readings])) for name in readings[0]}


def reader_of(config: JudgeConfig, item: RubricItem | None = None) -> Callable[[Answer], Reading]:
    """Return what reads an answer of a judge of single completions; it raises UnreadableError.

    item: of a rubric whose items are asked for each by itself.
    """
    bounds, to = config.number_range, config.scaled_to
    choices = Choices(config.choices) if config.choices else None

    def read(answer: Answer) -> Reading:
        if config.parser == "logprobs":
            assert choices is not None
            value = read_logprobs(answer, config, choices)
            return {DEFAULT_OBJECTIVE: scaled(value, choices.bounds, to)}
        text = final_text(answer, config.thinking)
        if config.parser == "choice":
            assert choices is not None
            return {DEFAULT_OBJECTIVE: scaled(read_choice(text, config.pattern, choices), choices.bounds, to)}
        if config.parser == "number":
            return {DEFAULT_OBJECTIVE: scaled(read_number(text, config.pattern, bounds), bounds, to)}
        if item is not None:
            return {item.name: read_item(text, item)}
        return read_rubric(text, config.rubric)

    return read


def mirrored(reading: Reading, config: JudgeConfig) -> Reading:
    """Return the reading of a comparison in which the answers stood the other way round."""
    choices = Choices(config.choices)
    low, high = choices.bounds if config.scaled_to is None else config.scaled_to
    return {name: low + high - value for name, value in reading.items()}
