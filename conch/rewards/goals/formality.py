"""Formality: how much of a text names things, and how little of it points at who speaks, where and when.

Heylighen and Dewaele (1999), Formality of language: definition, measurement and behavioral determinants,
Free University of Brussels, and (2002), Variation in the contextuality of language: an empirical measure,
Foundations of Science 7, 293-340:

    F = (nouns + adjectives + prepositions + articles - pronouns - verbs - adverbs - interjections + 100) / 2

each a share of all words in per cent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from conch.rewards.goals.tagger import english_tagger
from conch.rewards.goals.words import tagged_sentences

_CLASSES: Mapping[str, str] = {
    **dict.fromkeys(("NN", "NNS"), "noun"),
    **dict.fromkeys(("NNP", "NNPS"), "name"),
    **dict.fromkeys(("JJ", "JJR", "JJS"), "adjective"),
    **dict.fromkeys(("IN", "RP"), "preposition"),
    **dict.fromkeys(("PRP", "PRP$", "WP", "WP$", "WDT", "EX"), "pronoun"),
    **dict.fromkeys(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ"), "verb"),
    "MD": "auxiliary",
    **dict.fromkeys(("RB", "RBR", "RBS"), "adverb"),
    "UH": "interjection",
}
_ARTICLES = frozenset(("a", "an", "the"))
_BE = frozenset(("be", "am", "is", "are", "was", "were", "been", "being", "'m", "'re", "m", "re"))
_HAVE_DO = frozenset(("have", "has", "had", "having", "do", "does", "did", "'ve", "ve"))
_CONJUNCTIONS = frozenset(("if", "because", "although", "though", "whether", "while", "unless", "whereas"))
_DEMONSTRATIVES = frozenset(("this", "these", "those", "all", "some", "any", "both", "each", "another"))
_INDEFINITE = frozenset(
    first + second for first in ("some", "any", "every", "no") for second in ("one", "body", "thing")
) | {"none"}
_NEGATIONS = frozenset(("not", "n't"))
_NOUN_PHRASE = ("NN", "JJ", "CD", "VBG", "VBN")
_UNCLEAR = frozenset(("DT", "TO"))
_SMALL = _ARTICLES | _BE | _HAVE_DO | _CONJUNCTIONS | _DEMONSTRATIVES | _INDEFINITE | _NEGATIONS | {"that"}
_WORDS = _SMALL | {word.capitalize() for word in _SMALL} | {word.upper() for word in _SMALL}
_DEICTIC = ("pronoun", "verb", "adverb", "interjection")
_NAMING = ("noun", "adjective", "preposition", "article")


def formality(text: str) -> float:
    """Return F of a text as the steerability benchmark counts: 0 to 100, and 50.0 without words.

    Proper names and auxiliary verbs are words of no class there, and of the determiners only a, an and the
    are articles, since this and that point at something.

    Raises:
        ConfigError: TextBlob, whose lexicon tells parts of speech, is not installed.
    """
    return f_score(word_classes(text))


def formality_1999(text: str) -> float:
    """Return F of a text with proper names as nouns and auxiliary verbs as verbs.

    Raises:
        ConfigError: TextBlob, whose lexicon tells parts of speech, is not installed.
    """
    counts = word_classes(text)
    counts["noun"] += counts.pop("name", 0)
    counts["verb"] += counts.pop("auxiliary", 0)
    return f_score(counts)


def f_score(counts: Mapping[str, int]) -> float:
    """Return F of numbers of words by class; classes of other names only add to all words."""
    words = sum(counts.values())
    if not words:
        return 50.0
    naming, deictic = (sum(counts.get(name, 0) for name in names) for names in (_NAMING, _DEICTIC))
    return ((naming - deictic) / words * 100 + 100) / 2


def word_classes(text: str) -> Counter[str]:
    """Count a text's words, all that consist of letters, by class: `noun`, `name`, `article`, `other`, ..."""
    tagger = english_tagger()
    counts: Counter[str] = Counter()
    for sentence in tagged_sentences(text):
        classes = _classes(sentence, tagger.tag(sentence))
        counts.update(each for each, word in zip(classes, sentence, strict=True) if word.isalpha())
    return counts


def _classes(words: Sequence[str], tags: Sequence[str]) -> list[str]:
    classes = [_CLASSES.get(tag, "other") for tag in tags]
    for place, word in enumerate(words):
        if tags[place] in _UNCLEAR or word in _WORDS:
            classes[place] = _class(word.lower(), classes[place], place, tags)
    return classes


def _class(word: str, usual: str, place: int, tags: Sequence[str]) -> str:
    """The class of a word whose tag does not say it."""
    tag, following = tags[place], tags[place + 1] if place + 1 < len(tags) else ""
    if word in _ARTICLES:
        return "article"
    if word == "that":
        return _class_of_that(place, tags)
    if word in _BE:
        return "verb" if place and tags[place - 1] == "EX" else "auxiliary"
    if word in _HAVE_DO:
        return "auxiliary" if _before_verb(tags[place + 1 : place + 4]) else "verb"
    if word in _DEMONSTRATIVES:
        return "other" if following.startswith(_NOUN_PHRASE) else "pronoun"
    if word in _INDEFINITE:
        return "pronoun"
    if word in _NEGATIONS or word in _CONJUNCTIONS:
        return "other"
    if tag == "TO":
        return "other" if following.startswith(("VB", "RB")) else "preposition"
    return usual


def _class_of_that(place: int, tags: Sequence[str]) -> str:
    """A pronoun behind a noun ("the dog that barks") and by itself, else a conjunction or a determiner."""
    before, behind = tags[place - 1] if place else "", tags[place + 1] if place + 1 < len(tags) else ""
    if before.startswith("NN") or not behind.startswith((*_NOUN_PHRASE, "PRP", "DT", "IN", "EX")):
        return "pronoun"
    return "other"


def _before_verb(tags: Sequence[str]) -> bool:
    """Whether a verb follows, with at most adverbs or a pronoun between."""
    for tag in tags:
        if tag.startswith("VB"):
            return True
        if not tag.startswith(("RB", "PRP")):
            return False
    return False
