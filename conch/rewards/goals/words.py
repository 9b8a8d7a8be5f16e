"""Words of English texts: as NLTK counts them, and as a tagger reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

_TOKEN = re.compile(
    r"[^\W\d_]\.(?:[^\W\d_]\.)+"  # U.S.
    r"|[^\W\d_]+?(?=n't\b)|n't\b"  # do n't
    r"|'(?:s|m|d|ll|re|ve)\b"
    r"|\d+(?:[.,:/]\d+)*"
    r"|\w+|\.{2,}|[^\w\s]|\n{2,}",
    re.IGNORECASE,
)
_ENDS = frozenset(".!?")

_MARK = re.compile(r"""(\.{2,}|-{2,}|[;@#$%&*?!\[\](){}<>"`\u2018\u201c-\u201e\u00ab\u00bb]|[:,](?!\d))""")
_CLOSING = frozenset("])}>\"'\u201d\u00bb")
_CONTRACTION = re.compile(
    r"[^'](?:n't|'(?:s|m|d|ll|re|ve)?)$|^(?:cannot|gonna|gotta|gimme|lemme|wanna)$", re.IGNORECASE
)
"""What is two words, or one with a quotation mark behind it."""

_QUOTED = re.compile(r"^'(?!(?:s|m|d|ll|re|ve|t)$)\w", re.IGNORECASE)
_TITLES = ("mr", "mrs", "ms", "dr", "st", "jr", "sr", "prof", "gen", "col", "lt", "sgt", "capt", "rev", "hon")
_OTHERS = ("inc", "corp", "co", "ltd", "vs", "jan", "feb", "mar", "apr", "aug", "sept", "oct", "nov", "dec")
_ABBREVIATIONS = frozenset((*_TITLES, *_OTHERS))
_KEPT_CHUNKS = 200_000
_LONGEST_KEPT = 64
"""Characters of the longest word whose figures are kept, so that what is kept is bounded in bytes as well as
in number. What is longer is seldom a word, and seldom comes twice."""

ValueT = TypeVar("ValueT")


def kept(function: Callable[..., ValueT], *words: str) -> Callable[..., ValueT]:
    """Return what is to be called for these words: a function with a cache, or where one is long, the
    function within, which keeps nothing.

    function: made by `lru_cache`.
    """
    return function if max(map(len, words)) <= _LONGEST_KEPT else getattr(function, "__wrapped__", function)


def sum_of(function: Callable[[str], int], words: Sequence[str]) -> int:
    """Return the sum of what a function gives for each word.

    function: made by `lru_cache`.
    """
    if max(map(len, words), default=0) <= _LONGEST_KEPT:
        return sum(map(function, words))  # without a call of ours for each
    return sum(kept(function, word)(word) for word in words)


def tagged_sentences(text: str) -> Iterator[list[str]]:
    """Yield the words of each sentence; a punctuation mark is a word, and contractions are two."""
    sentence: list[str] = []
    for token in _TOKEN.findall(text.replace("\u2019", "'")):
        if token[0] == "\n":
            if sentence:
                yield sentence
            sentence = []
            continue
        sentence.append(token)
        if token[0] in _ENDS:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def text_length(text: str) -> float:
    """Return the number of words of a text as NLTK's `word_tokenize` counts them, nearly always.

    Punctuation marks are words, contractions two. A typographic apostrophe is one like the straight one, and
    where a sentence ends is told by the word before a full stop alone.
    """
    chunks = text.replace("\u2019", "'").split()
    if not chunks:
        return 0.0
    # Behind the last word, a full stop always ends a sentence.
    return float(sum_of(_count, chunks[:-1]) + kept(_count, chunks[-1])(chunks[-1], is_last=True))


@lru_cache(_KEPT_CHUNKS)
def _count(chunk: str, is_last: bool = False) -> int:
    """Count the words in what stands between spaces."""
    pieces = [piece for piece in _MARK.split(chunk) if piece]
    closing = len(pieces)
    while closing and pieces[closing - 1] in _CLOSING:
        closing -= 1
    words = 0
    for place, piece in enumerate(pieces, start=1):
        word, stop, _ = piece.rpartition(".") if piece.endswith(".") else (piece, "", "")
        # A stop of its own, and those of an ellipsis, are a word already.
        if place == closing and stop and word.strip(".") and (is_last or not _is_abbreviation(word)):
            words, piece = words + 1, word
        words += 1 + bool(_CONTRACTION.search(piece)) + bool(_QUOTED.search(piece))
    return words


def _is_abbreviation(word: str) -> bool:
    return (
        word.lower() in _ABBREVIATIONS
        or (len(word) == 1 and word.isalpha())
        or ("." in word and word[-1].isalpha())
    )
