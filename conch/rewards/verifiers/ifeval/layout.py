"""Checks of a text's form: pure functions of the text, in time linear in its length.

Where lines are meant, only `\\n` ends one.
"""

from __future__ import annotations

import json
import re

CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
DEEPEST_JSON = 256
"""Levels of nesting that a text in JSON may have. Python's reader gives up at a depth that depends on who
calls it, and a verdict must not."""


def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs between dividers `***`. A divider at an end is allowed, two with nothing
    between them are not."""
    blank = [not part.strip() for part in text.split("***")]
    if any(blank[1:-1]):
        return False
    # A text without a divider is one part, which is both the first and the last.
    return len(blank) - sum({0: blank[0], len(blank) - 1: blank[-1]}.values()) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs between blank lines, and the nth begins with the word, in any case.

    Blank paragraphs do not count for their number, but for the place of the nth. The first word ends before
    its first `.`, `,`, `?`, `!` or quote.
    """
    parts = text.split("\n\n")
    count = sum(1 for part in parts if part.strip())
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = parts[nth_paragraph - 1].split(maxsplit=1)
    if not words:
        return False
    word = _FIRST_WORD_END.split(words[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return word.lower() == first_word.lower()


def number_of_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many `[...]` that begin and end on the same line."""
    return sum(map(_placeholders, text.split("\n"))) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker occurs, in any case. `P.P.S` and `P.S.` may have a blank behind each dot."""
    marker = postscript_marker.strip()
    pattern = _POSTSCRIPTS.get(marker)
    lowered = text.lower()
    return bool(pattern.search(lowered)) if pattern else marker.lower() in lowered


def number_of_bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with `*` or `-`; `**` begins no bullet, `---` does."""
    stars = sum(1 for _ in _STAR_BULLET.finditer(text))
    return stars + sum(1 for _ in _DASH_BULLET.finditer(text)) == num_bullets


def constrained_response(text: str) -> bool:
    """One of the three answers occurs, as it is written."""
    return any(response in text for response in CONSTRAINED_RESPONSES)


def number_of_highlights(text: str, num_highlights: int) -> bool:
    """At least so many `*...*` or `**...**` that are not blank and stay on their line."""
    single = sum(1 for match in _HIGHLIGHT.finditer(text) if match[1].strip())
    double = sum(1 for match in _DOUBLE_HIGHLIGHT.finditer(text) if match[1].strip())
    return single + double >= num_highlights


def number_of_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings: the word with its case, at most one blank, a number."""
    heading = re.compile(rf"{re.escape(section_spliter.strip())}\s?\d+")
    return sum(1 for _ in heading.finditer(text)) >= num_sections


def json_format(text: str) -> bool:
    """All of the text is one value in JSON, which may stand in a fence of three backquotes.

    A string or a number is a value too. Numbers may be of any length; nesting deeper than `DEEPEST_JSON` is
    not followed.
    """
    value = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        value = value.removeprefix(fence)
    value = value.removesuffix("```").strip()
    if _depth(value) > DEEPEST_JSON:
        return False
    try:
        # Numbers stay text: Python refuses to read those of more than 4,300 digits.
        json.loads(value, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """Some line has `<<...>>` around something that is not blank."""
    return any(map(_has_title, text.split("\n")))


def two_responses(text: str) -> bool:
    """Two responses that differ, with `******` between them; a divider at an end is allowed."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    responses = [part for part in parts if part]
    return len(responses) == 2 and responses[0] != responses[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The text begins with the request, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_phrase(text: str, end_phrase: str) -> bool:
    """The text ends with the phrase, in any case, with quotation marks behind it or not."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The text begins and ends with a straight double quotation mark."""
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def _placeholders(line: str) -> int:
    count = 0
    end = -1
    while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end and bool(line[start:end].lstrip("<").rstrip(">").strip())


def _depth(text: str) -> int:
    """Deepest nesting of brackets and braces outside of strings."""
    depth = deepest = 0
    in_string = False
    for match in _JSON_STRUCTURE.finditer(text):
        mark = match[0]
        if mark == '"':
            in_string = not in_string
        elif not in_string and mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not in_string and mark in "]}":
            depth -= 1
    return deepest


_FIRST_WORD_END = re.compile(r"[.,?!'\"]")
_POSTSCRIPTS = {"P.P.S": re.compile(r"p\.\s?p\.\s?s"), "P.S.": re.compile(r"p\.\s?s\.")}
# What follows the star may be the end of its line: the next line then belongs to the bullet.
_STAR_BULLET = re.compile(r"^[^\S\n]*\*[^*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^[^\S\n]*-", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*([^\n*]*)\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*([^\n*]*)\*\*")
_JSON_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
