"""Texts of three registers, from short words to long ones, and a corpus that a small policy begins with.

The same seed gives the same texts. A text is so many sentences of one pattern; how hard it is to read depends
on the share of its sentences in each register, and both follow the instruction of a corpus only in part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Targets that texts are steered to, in both goals."""

LENGTH, DIFFICULTY = "text_length", "reading_difficulty"
STEERED = (LENGTH, DIFFICULTY)

FOLLOWED_SHARE = 0.4
"""Of the corpus' answers: how often one does what its instruction says, in each goal for itself."""

_SENTENCES = {0.1: 1, 0.3: 3, 0.5: 5, 0.7: 7, 0.9: 9}
"""Level of length -> sentences of seven words, the stop included; see `configs/ranges_tiny.yaml`."""

_REGISTERS = {0.1: ("plain",), 0.3: ("plain", "middling"), 0.5: ("middling",)}
_REGISTERS |= {0.7: ("middling", "learned"), 0.9: ("learned",)}
"""Level of difficulty -> registers that sentences are drawn from."""

_MOST_SOURCE_SENTENCES = 5


@dataclass(frozen=True)
class Words:
    """What a sentence of a register is made of."""

    adjectives: Sequence[str]
    nouns: Sequence[str]
    verbs: Sequence[str]


REGISTERS = {
    "plain": Words(
        ("old", "small", "kind", "happy", "little", "brave", "young", "quiet"),
        ("dog", "girl", "farmer", "boat", "garden", "river", "bird", "baker", "child", "horse"),
        ("saw", "liked", "found", "carried", "painted", "watched", "called", "followed"),
    ),
    "middling": Words(
        ("careful", "modern", "local", "famous", "silent", "distant", "clever", "foreign"),
        ("teacher", "village", "picture", "visitor", "market", "holiday", "musician", "neighbour", "library"),
        ("admired", "described", "remembered", "visited", "protected", "discovered", "surprised", "examined"),
    ),
    "learned": Words(
        ("political", "original", "technical", "natural", "historical", "national", "critical", "practical"),
        (
            "committee",
            "government",
            "industry",
            "authority",
            "director",
            "technology",
            "community",
            "minister",
        ),
        ("considered", "established", "evaluated", "reconsidered", "continued", "exhibited", "abandoned"),
    ),
}


CHATTY_SHARE = 0.3
"""Of all sentences: those with a pronoun and an adverb, which are less formal."""


def sentence(register: str, rng: random.Random) -> str:
    """Six words and a stop: the adjective noun verb the noun, or what somebody often does."""
    words = REGISTERS[register]
    adjective, verb, noun = rng.choice(words.adjectives), rng.choice(words.verbs), rng.choice(words.nouns)
    if rng.random() < CHATTY_SHARE:
        who, when = rng.choice(("They", "We", "You")), rng.choice(("often", "never"))
        return f"{who} {when} {verb} the {adjective} {noun}."
    return f"The {adjective} {noun} {verb} the {rng.choice(words.nouns)}."


def text(length: float, difficulty: float, rng: random.Random) -> str:
    """A text of these two levels."""
    registers = _REGISTERS[difficulty]
    return " ".join(sentence(rng.choice(registers), rng) for _ in range(_SENTENCES[length]))


def source_text(rng: random.Random) -> str:
    """A text to be rewritten: short, of any register."""
    registers = _REGISTERS[rng.choice(LEVELS)]
    number = rng.randint(1, _MOST_SOURCE_SENTENCES)
    return " ".join(sentence(rng.choice(registers), rng) for _ in range(number))


def corpus(number: int, seed: int) -> list[Row]:
    """Prompts with answers for SFT: in each goal, the answer does what is asked for in `FOLLOWED_SHARE` of
    the rows and anything else in the others."""
    rng = random.Random(f"corpus {seed}")
    rows: list[Row] = []
    for _ in range(number):
        asked = {goal: rng.choice(LEVELS) for goal in STEERED}
        done = {
            goal: level if rng.random() < FOLLOWED_SHARE else rng.choice(LEVELS)
            for goal, level in asked.items()
        }
        here = {goal: rng.choice(LEVELS) for goal in STEERED}
        prompt = tiny_prompt(source_text(rng), here, asked)
        rows.append({"prompt": prompt, "completion": text(done[LENGTH], done[DIFFICULTY], rng)})
    return rows


def tiny_prompt(source: str, here: dict[str, float], asked: dict[str, float]) -> str:
    """Where a text is and where it shall go, in tenths, and the text: few words for a small policy."""
    moves = ", ".join(
        f"{name} {_tenths(here[goal])} to {_tenths(asked[goal])}"
        for name, goal in (("length", LENGTH), ("difficulty", DIFFICULTY))
    )
    return f"{moves}: {source}\n"


def _tenths(value: float) -> int:
    return round(10 * value)
