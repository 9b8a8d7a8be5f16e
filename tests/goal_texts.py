"""Texts on which measures of goals are compared with other packages, and what these said of them.

Recorded with textstat 0.7.13, NLTK 3.10.4 and lexicalrichness 0.5.1; tests/integration/test_goals_peers.py
asks them again.
"""

from __future__ import annotations

from typing import NamedTuple


class Recorded(NamedTuple):
    """A text with its grade (textstat), words (NLTK) and diversity of its words (lexicalrichness)."""

    text: str
    grade: float
    length: int
    diversity: float


TEXTS = (
    "I don't think that's a good idea. You could ask her first, and then we'll see what she says! If she "
    "can't come, I'd call Dr. Brown at 5:30 p.m. and tell him. It isn't far from here, is it?",
    "The committee of the institute published a detailed report on the structural causes of the regional "
    "decline in industrial production. According to its authors, investment in infrastructure fell by 12.5% "
    "between 1998 and 2004; employment fell further, and the population of the three largest cities "
    "decreased.",
    "the cat sat on the mat and the dog sat on the cat and the mat was flat and the cat was sad and the dog "
    "was glad that the cat was sad and flat on the mat",
    'She said, "Stop!" Nobody moved. (It was cold -- very cold.) "We cannot go on," he whispered... '
    "A state-of-the-art heater costs $1,299.99, you know? Gonna be a long night.",
    "Yes.",
    "Mix 2 cups of flour, 1/2 cup of sugar & 3 eggs; bake at 180 degrees for 25-30 minutes. Let it cool. "
    "Then cut it into squares and serve it with cream, fruit, or ice cream. Enjoy!",
)

RECORDED = tuple(
    Recorded(*each)
    for each in zip(
        TEXTS,
        (-0.01, 11.4247826087, 11.03, 2.2442857143, -3.4, 2.8566666667),
        (53, 52, 38, 47, 2, 45),
        (164.64, 61.852, 12.6666666667, 126.0, 1.0, 76.664),
        strict=True,
    )
)
