"""Words of English texts: as NLTK counts them, and as a tagger reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"[^\W\d_]\.(?:[^\W\d_]\.)+"  # U.S.
    r"|[^\W\d_]+?(?=n't\b)|n't\b"  # do n't
    r"|'(?:s|m|d|ll|re|ve)\b"
    r"|\d+(?:[.,:/]\d+)*"
    r"|\w+|\.{2,}|[^\w\s]|\n{2,}",
    re.IGNORECASE,
)
_ENDS = frozenset(".!?")


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
    """Return the number of words of a text; punctuation marks are words, and contractions are two."""
    return float(sum(map(len, tagged_sentences(text))))
