"""Textual diversity: how many words in a row keep their variety (MTLD).

McCarthy and Jarvis (2010), MTLD, vocd-D, and HD-D: a validation study of sophisticated approaches to lexical
diversity assessment, Behavior Research Methods 42(2), 381-392.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

THRESHOLD = 0.72
"""Share of different words at which a stretch ends (page 385)."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


def diversity_words(text: str) -> list[str]:
    """Words in small letters, without punctuation; apostrophes and hyphens within a word belong to it."""
    return _WORD.findall(text.lower())


def textual_diversity(text: str) -> float:
    """Return MTLD of a text's words; 0.0 for a text without any."""
    return mtld(diversity_words(text))


def mtld(words: Sequence[str]) -> float:
    """Return the mean length of stretches in which more than 72 % of the words are different ones.

    Words over factors, where a factor is such a stretch, and the rest at the end the part of one by which its
    share has come down towards 72 %; the mean of reading forwards and backwards. Words that are all
    different make one stretch, and have less than those of which one comes twice: the nearer the share of a
    rest is to 1, the smaller is its factor. 0.0 for no words.
    """
    if not words:
        return 0.0
    return (_one_way(words) + _one_way(reversed(words), len(words))) / 2


def _one_way(words: Iterable[str], count: int | None = None) -> float:
    total = len(words) if isinstance(words, Sequence) else count
    assert total
    factors, length, different = 0.0, 0, set[str]()
    for word in words:
        length += 1
        different.add(word)
        if len(different) <= THRESHOLD * length:
            factors, length, different = factors + 1.0, 0, set()
    if length:
        factors += (1 - len(different) / length) / (1 - THRESHOLD)
    return total / (factors or 1.0)
