"""Checks of words, letters, case and punctuation: pure functions of the text, in time linear in its length.

Words of a row are taken literally, `c++` as well as `U.S.`; they are no regular expressions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal

Relation = Literal["at least", "less than"]


def compare(count: int, relation: Relation, bound: int) -> bool:
    """Tell whether a count is `at least`, or `less than`, the bound."""
    return count >= bound if relation == "at least" else count < bound


def keywords_occur(text: str, keywords: Sequence[str]) -> bool:
    """Each keyword occurs, in any case, be it inside of another word."""
    return all(_anywhere(keyword).search(text) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: Relation) -> bool:
    """Occurrences of the keyword that do not overlap, in any case and inside of other words too."""
    return compare(sum(1 for _ in _anywhere(keyword).finditer(text)), relation, frequency)


def no_forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a word of its own, in any case."""
    return not any(_whole_word(word).search(text) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    """Occurrences of one character, in any case; `#` and `!` count like letters."""
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def number_of_words(text: str, num_words: int, relation: Relation) -> bool:
    """Words are runs of letters, digits and underscores: `don't` and `well-known` are two each."""
    return compare(sum(1 for _ in _WORD.finditer(text)), relation, num_words)


def no_comma(text: str) -> bool:
    """The comma of ASCII does not occur; those of other scripts may."""
    return "," not in text


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: Relation) -> bool:
    """Words of capital letters only; `I` and `A` count, `WELL-KNOWN` is one, and `DON'T` is two."""
    return compare(sum(word.isupper() for word in treebank_words(text)), capital_relation, capital_frequency)


def treebank_words(text: str) -> list[str]:
    """Split a text into words as the Penn Treebank does, without its punctuation.

    Endings such as `n't` and `'s` stand alone, `cannot` and `gonna` are two words each. A period is split off
    every word that ends with one, abbreviations included, since capitals do not depend on it.
    """
    text = f" {' '.join(_BREAK.sub(' ', text).split())} "
    for ending in _ENDINGS:
        text = ending.sub(r" \g<0>", text)
    return _JOINED.sub(r" \g<0> ", text).split()


@functools.lru_cache(maxsize=4096)
def _anywhere(words: str) -> re.Pattern[str]:
    return re.compile(re.escape(words), re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def _whole_word(words: str) -> re.Pattern[str]:
    # `\b` would ask for a letter behind a word such as `c++`.
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


_WORD = re.compile(r"\w+")
# What separates words: punctuation, a colon or comma that no digit follows, runs of dots and dashes.
_BREAK = re.compile(
    r"[;@#$%&?!*()\[\]{}<>\"`«»\u2012-\u2015\u2018\u2019\u201c-\u201e]|[:,](?!\d)|\.{2,}|--|''"
)
_ENDINGS = (
    re.compile(r"(?<=[^.])\.(?= )"),
    re.compile(r"(?<=[^' ])'[sSmMdD]?(?= )"),
    re.compile(r"(?<=[^' ])(?:'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?= )"),
)
_JOINED = re.compile(
    r"\b(?:can(?=not\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|d(?='ye\b)|more(?='n\b)|wan(?=na\s))",
    re.IGNORECASE,
)
