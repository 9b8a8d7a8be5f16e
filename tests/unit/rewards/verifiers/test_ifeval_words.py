"""Words, letters, case and punctuation: what follows, what does not, and what lies on the border."""

from __future__ import annotations

from typing import Any

import pytest

from conch.rewards.verifiers.ifeval.rows import read_instruction
from conch.rewards.verifiers.ifeval.words import treebank_words


def follows(name: str, text: str, **arguments: Any) -> bool:
    return read_instruction(name, arguments).is_followed_by(text)


@pytest.mark.parametrize(
    ("text", "keywords", "followed"),
    [
        ("The river is long.", ["river"], True),
        ("The RIVERBANK is green.", ["river", "green"], True),
        ("The river is long.", ["river", "bridge"], False),
        ("I write C code.", ["c++"], False),
        ("I write C++ code.", ["c++"], True),
        ("a.b", ["a.b"], True),
        ("axb", ["a.b"], False),
    ],
)
def test_existence_finds_each_keyword_literally_and_in_any_case(
    text: str, keywords: list[str], followed: bool
) -> None:
    assert follows("keywords:existence", text, keywords=keywords) is followed


@pytest.mark.parametrize(
    ("text", "relation", "frequency", "followed"),
    [
        ("a smart ARTIST makes art", "at least", 3, True),
        ("a smart ARTIST makes art", "at least", 4, False),
        ("art art", "less than", 2, False),
        ("art", "less than", 2, True),
        ("nothing", "at least", 0, True),
        ("nothing", "less than", 1, True),
    ],
)
def test_frequency_counts_within_words_too(text: str, relation: str, frequency: int, followed: bool) -> None:
    arguments = {"keyword": "art", "frequency": frequency, "relation": relation}
    assert follows("keywords:frequency", text, **arguments) is followed


@pytest.mark.parametrize(
    ("text", "words", "followed"),
    [
        ("The smart cart.", ["art"], True),
        ("The ART of it.", ["art"], False),
        ("art-house", ["art"], False),
        ("I like C.", ["c++"], True),
        ("I like C++ a lot.", ["c++"], False),
        ("I like C++17.", ["c++"], True),
        ("an e-mail", ["e.mail"], True),
    ],
)
def test_forbidden_words_are_whole_words_and_literal(text: str, words: list[str], followed: bool) -> None:
    assert follows("keywords:forbidden_words", text, forbidden_words=words) is followed


@pytest.mark.parametrize(
    ("text", "letter", "relation", "frequency", "followed"),
    [
        ("Eel", "e", "at least", 2, True),
        ("Eel", "E", "at least", 3, False),
        ("Eel", "q", "less than", 1, True),
        ("#one #two #three #four", "#", "at least", 4, True),
        ("Hi!", "!", "less than", 1, False),
        ("anything", "z", "at least", 0, True),
    ],
)
def test_letters_count_in_any_case_and_may_be_marks(
    text: str, letter: str, relation: str, frequency: int, followed: bool
) -> None:
    arguments = {"letter": letter, "let_relation": relation, "let_frequency": frequency}
    assert follows("keywords:letter_frequency", text, **arguments) is followed


@pytest.mark.parametrize(
    ("text", "relation", "number", "followed"),
    [
        ("one two three", "at least", 3, True),
        ("one two three", "less than", 3, False),
        ("don't", "at least", 2, True),
        ("well-known", "less than", 2, False),
        ("snake_case", "less than", 2, True),
        ("*** !!!", "less than", 1, True),
        ("word", "at least", 0, True),
    ],
)
def test_words_are_runs_of_letters_digits_and_underscores(
    text: str, relation: str, number: int, followed: bool
) -> None:
    assert follows("length_constraints:number_words", text, num_words=number, relation=relation) is followed


@pytest.mark.parametrize(
    ("text", "followed"), [("No comma; none.", True), ("One, two.", False), ("one\uff0c two", True)]
)
def test_no_comma_means_the_ascii_comma(text: str, followed: bool) -> None:
    assert follows("punctuation:no_comma", text) is followed


@pytest.mark.parametrize(
    ("text", "capitals"),
    [
        ("I think NASA is here.", 2),
        ("A well-known WELL-KNOWN place", 2),
        ("DON'T stop", 2),
        ("Don't stop", 0),
        ("JOHN'S BOAT", 3),
        ("WE CANNOT. WE WON'T.", 6),
        ("U.S. and U.K.!", 2),
        ('A--B, (C) "D" “E”', 5),
        ("Room 12B, 3,5 and B2", 2),
        ("no capitals", 0),
        ("ÉCOLE ΑΒΓ 中文", 2),
    ],
)
def test_capital_words_are_words_of_the_penn_treebank(text: str, capitals: int) -> None:
    name = "change_case:capital_word_frequency"
    assert follows(name, text, capital_frequency=capitals, capital_relation="at least")
    assert not follows(name, text, capital_frequency=capitals + 1, capital_relation="at least")
    assert follows(name, text, capital_frequency=capitals + 1, capital_relation="less than")


def test_treebank_words_split_joined_words_and_endings() -> None:
    assert treebank_words("They'll cannot, gonna isn't John's.") == [
        *("They", "'ll", "can", "not", "gon", "na", "is", "n't", "John", "'s", "."),
    ]
