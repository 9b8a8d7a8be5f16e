"""Measures against hand calculations; tests/integration/test_goals_peers.py compares with other packages."""

from __future__ import annotations

from typing import Any

import pytest

from conch.rewards.goals import words
from conch.rewards.goals.diversity import diversity_words, mtld, textual_diversity
from conch.rewards.goals.formality import f_score, formality, formality_1999, word_classes
from conch.rewards.goals.readability import count_sentences, plain_words, reading_difficulty, syllable_counter
from conch.rewards.goals.tagger import english_tagger
from conch.rewards.goals.words import text_length
from tests.goal_texts import RECORDED, Recorded


def test_reading_difficulty_is_the_grade_of_a_hand_count() -> None:
    # 13 words in 2 sentences, 18 syllables: every other word is a single one.
    text = "The committee decided on Monday. Nobody in the small room was happy then."
    syllables = [1, 3, 3, 1, 2, 3, 1, 1, 1, 1, 1, 2, 1]
    assert [syllable_counter()(word) for word in plain_words(text)] == syllables
    expected = 0.39 * 13 / 2 + 11.8 * sum(syllables) / 13 - 15.59
    assert reading_difficulty(text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("word", "syllables"),
    [
        ("don't", 1),
        ("couldn't", 2),
        ("i'm", 1),
        ("every", 3),
        ("the", 1),
        ("queue", 1),
        ("chatbot", 2),
    ],
)
def test_syllables_come_from_the_dictionary_and_else_from_hyphenation(word: str, syllables: int) -> None:
    assert syllable_counter()(word) == syllables


def test_quotes_and_marks_are_no_part_of_words() -> None:
    assert plain_words("'Tis \"well-known\", he'd said: 'no'!") == ["tis", "wellknown", "he'd", "said", "no"]


def test_stretches_of_two_words_are_no_sentences() -> None:
    assert count_sentences("Stop! He went to the shop. No way. They were all gone by then.") == 2
    assert count_sentences("Stop.") == 1
    assert count_sentences("") == 1


def test_mtld_of_a_hand_count() -> None:
    # Forwards: a b a (2/3 <= 0.72, one factor), b c a (all different, none): 6 words in 1 factor.
    # Backwards: a c b a (3/4), b -> 3/5, one factor; a alone: none.
    assert mtld(["a", "b", "a", "b", "c", "a"]) == pytest.approx((6 / 1 + 6 / 1) / 2)


def test_the_rest_of_a_text_is_a_part_of_a_factor() -> None:
    # Ten words, one of them twice: 0.9 of the words are different, 0.1 / 0.28 of a factor both ways.
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "a"]
    assert mtld(words) == pytest.approx(10 / (0.1 / 0.28))


def test_words_that_are_all_different_make_one_stretch() -> None:
    assert mtld(["a", "b", "c"]) == 3.0


def test_a_word_that_comes_twice_raises_the_diversity_as_in_lexicalrichness() -> None:
    # lexicalrichness 0.5.1, see findings/mtld_jumps_where_a_word_comes_twice.sh.
    words = list("abcdefghijklmnop")
    assert mtld(words) == 16.0
    assert mtld([*words, "a"]) == pytest.approx(80.92)
    assert mtld([*words, "a", "b"]) == pytest.approx(45.36)


def test_a_text_without_words_has_conventional_values() -> None:
    for text in ("", " \n", "... !?"):
        assert reading_difficulty(text) == 0.0
        assert formality(text) == formality_1999(text) == 50.0
        assert textual_diversity(text) == 0.0


def test_diversity_takes_spellings_of_a_word_for_one() -> None:
    assert diversity_words("Don't DON'T, up-to-date 'no'") == [
        "don't",
        "don't",
        "up-to-date",
        "no",
    ]


def test_f_is_the_formula_of_the_paper() -> None:
    counts = {"noun": 4, "adjective": 1, "preposition": 2, "article": 2, "pronoun": 1, "verb": 3, "other": 7}
    assert f_score(counts) == pytest.approx((20 + 5 + 10 + 10 - 5 - 15 + 100) / 2)


def test_word_classes_are_those_of_the_benchmark() -> None:
    counts = word_classes("The old man in London was reading a book, and I don't think that he saw us.")
    assert counts == {
        "article": 2,
        "adjective": 1,
        "noun": 2,
        "preposition": 1,
        "name": 1,
        "auxiliary": 2,
        "verb": 3,
        "pronoun": 3,
        "other": 2,
    }
    assert sum(counts.values()) == 17  # n't is no word of letters


def test_names_and_auxiliaries_count_in_the_papers_own_way() -> None:
    text = "Mr. Smith of London has been seen."
    counts = word_classes(text)
    shift = counts["name"] - counts["auxiliary"]
    assert formality_1999(text) - formality(text) == pytest.approx(50 * shift / sum(counts.values()))


def test_formal_texts_are_more_formal() -> None:
    formal = (
        "The committee of the institute published a detailed report on the structural causes of the regional "
        "decline in industrial production."
    )
    casual = "Well, I really think we should just go there now, and then they can tell us what to do!"
    assert formality(formal) > 70
    assert formality(casual) < 35


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda each: each.text[:20])
def test_values_are_those_that_other_packages_gave(recorded: Recorded) -> None:
    assert reading_difficulty(recorded.text) == pytest.approx(recorded.grade, abs=1e-9)
    assert text_length(recorded.text) == recorded.length
    assert textual_diversity(recorded.text) == pytest.approx(recorded.diversity, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I don't know.", 5),
        ("I don\u2019t know.", 5),  # NLTK: don, the apostrophe, t
        ("Mr. Smith came.", 4),
        ("e.g. squares", 2),  # NLTK takes it for the end of a sentence
        ("He cannot 'go' -- gonna wait...", 11),
        ("It costs $1,299.99 (12%).", 9),
        ("a/b x:y 5:30", 5),
    ],
)
def test_words_are_counted_as_a_treebank_does(text: str, words: int) -> None:
    assert text_length(text) == words


def test_rules_do_not_make_verbs_of_prepositions() -> None:
    text = "He sent us in , and of that you may know nothing if you ask ."
    words = text.split()
    assert english_tagger().tag(words)[3] == "IN"
    assert english_tagger().tag(words).count("IN") > english_tagger(every_rule=True).tag(words).count("IN")


def test_long_words_are_measured_and_not_kept() -> None:
    caches: tuple[Any, ...] = (words._count, syllable_counter(), english_tagger()._unknown)

    def kept() -> list[int]:
        return [each.cache_info().currsize for each in caches]

    def measured(word: str) -> list[float]:
        text = f"They saw {word} and {word}."
        return [measure(text) for measure in (text_length, reading_difficulty, formality)]

    long, longer = "xyz" * 22, "xyz" * 100
    measured("short")
    before = kept()
    first = measured(long), measured(longer)
    assert kept() == before
    assert (measured(long), measured(longer)) == first
    assert first[0][0] == 6.0 and first[0][2] == first[1][2]
    measured("xyzzy" * 12)
    assert kept() == [before[0] + 2, before[1] + 1, before[2] + 1], "a chunk with its full stop is another"


def test_hyphenation_keeps_no_words_of_its_own() -> None:
    from pyphen import hdcache  # pyright: ignore[reportAttributeAccessIssue]

    reading_difficulty("Many words like zzyzxing, frobnicate and quuxification are in no dictionary.")
    assert sum(len(each.cache) for each in hdcache.values()) == 0
