"""Parts of speech by Brill's rules, with the lexicon and the rules that TextBlob carries.

Eric Brill (1992), A simple rule-based part of speech tagger, Proceedings of the third conference on applied
natural language processing. A word has its commonest tag, an unknown one what its spelling says; then rules
about its neighbours change tags. The tags are those of the Penn Treebank. TextBlob tries all 290 rules at
each word; here each tag has tables of what its rules ask for, which is ten times as fast.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from conch.errors import ConfigError, install_extra
from conch.rewards.goals.words import kept

_EDGE = "STAART"
"""Word and tag of the three places before and behind a sentence."""

_NUMBER = re.compile(r"[0-9\-,.:/%$]+")
_KEPT_WORDS = 100_000

# What stands around a word, by how far behind the word it is in a row of word, tag, word, tag, ...
_WORD, _W_1, _W_2, _W1, _W2 = 0, -2, -4, 2, 4
_T_1, _T_2, _T_3, _T1, _T2, _T3 = -1, -3, -5, 3, 5, 7

_PLACES: Mapping[str, tuple[int, ...]] = {
    "prevtag": (_T_1,),
    "nexttag": (_T1,),
    "prev2tag": (_T_2,),
    "next2tag": (_T2,),
    "prev1or2tag": (_T_1, _T_2),
    "next1or2tag": (_T1, _T2),
    "prev1or2or3tag": (_T_1, _T_2, _T_3),
    "next1or2or3tag": (_T1, _T2, _T3),
    "curwd": (_WORD,),
    "prevwd": (_W_1,),
    "nextwd": (_W1,),
    "prev1or2wd": (_W_1, _W_2),
    "next1or2wd": (_W1, _W2),
}
"""Rule -> places of which one must hold its x."""

_PAIRS: Mapping[str, tuple[int, int]] = {
    "surroundtag": (_T_1, _T1),
    "prevwdtag": (_W_1, _T_1),
    "nextwdtag": (_W1, _T1),
    "wdprevtag": (_T_1, _WORD),
    "wdnexttag": (_WORD, _T1),
    "wdand2aft": (_WORD, _W2),
    "wdand2tagbfr": (_T_2, _WORD),
    "wdand2tagaft": (_WORD, _T2),
    "lbigram": (_W_1, _WORD),
    "rbigram": (_WORD, _W1),
    "prevbigram": (_T_2, _T_1),
    "nextbigram": (_T1, _T2),
}
"""Rule -> places of its x and its y."""

_CLOSED = frozenset(("IN", "DT", "PRP", "PRP$", "EX", "MD", "WDT", "RB"))
_OPEN = frozenset(("VB", "NN", "NNP", "JJ", "CD", "WDT", "DT"))
"""Brill's rules change a word to a tag that it had somewhere in the training texts. Which these were is not
in the lexicon, and without them rules make verbs of prepositions: those from a closed class are left out."""

_SPELLINGS = frozenset(
    ("char", "haspref", "hassuf", "addpref", "addsuf", "deletepref", "deletesuf", "goodleft", "goodright")
)
"""What a rule about spelling looks at."""


_Tables: TypeAlias = tuple[
    list[tuple[int, dict[str, int]]], list[tuple[int, int, dict[tuple[str, str], int]]]
]


class _Rules:
    """The rules for words of one tag: what is at a place, or at two -> number of the last such rule."""

    def __init__(self) -> None:
        self.places: dict[int, dict[str, int]] = defaultdict(dict)
        self.pairs: dict[tuple[int, int], dict[tuple[str, str], int]] = defaultdict(dict)

    def add(self, number: int, kind: str, x: str, y: str) -> None:
        """Take in a rule; numbers rise."""
        for place in _PLACES.get(kind, ()):
            self.places[place][x] = number
        if kind in _PAIRS:
            self.pairs[_PAIRS[kind]][x, y] = number

    def tables(self) -> _Tables:
        """As lists, which are read faster."""
        return list(self.places.items()), [(*places, table) for places, table in self.pairs.items()]


class Tagger:
    """Tags the words of sentences. Threads may share one.

    lexicon: word -> its commonest tag.
    morphology: rules about the spelling of unknown words, each as split at its spaces.
    context: rules about neighbours, likewise.
    """

    def __init__(
        self, lexicon: Mapping[str, str], morphology: Sequence[list[str]], context: Sequence[list[str]]
    ) -> None:
        self._lexicon = lexicon
        self._morphology = [_Spelling(*_parts(rule)) for rule in morphology]
        self._asked_before = {rule.affix for rule in self._morphology if rule.kind == "goodright"}
        self._asked_behind = {rule.affix for rule in self._morphology if rule.kind == "goodleft"}
        self._unknown = lru_cache(_KEPT_WORDS)(self._tag_unknown)
        tags = {tag for rule in context for tag in rule[:2]} | {rule.new for rule in self._morphology}
        tags |= {*lexicon.values(), "NN", "NNP", "CD"}
        rules = {tag: _Rules() for tag in tags - {"*"}}
        self._new_tags = [tag for _, tag, *_ in context]
        for number, (old, _, kind, x, *y) in enumerate(context):
            for tag in rules if old == "*" else [old]:
                rules[tag].add(number, kind.lower(), x, y[0] if y else "")
        self._tables = {tag: each.tables() for tag, each in rules.items() if each.places or each.pairs}

    def tag(self, words: Sequence[str]) -> list[str]:
        """Tag the words of one sentence; punctuation marks are words, and so are `n't` and `'s`."""
        lexicon = self._lexicon
        tags = [lexicon.get(word) for word in words]
        if words and tags[0] is None:
            tags[0] = lexicon.get(words[0].lower())
        known = [tag or self._guess(words, place) for place, tag in enumerate(tags)]
        return self._in_context(words, known)

    def _guess(self, words: Sequence[str], place: int) -> str:
        before = words[place - 1] if place else ""
        behind = words[place + 1] if place + 1 < len(words) else ""
        # What no rule asks for is left out, so that most calls for a word are the same call.
        before = before if before in self._asked_before else ""
        tag_unknown = kept(self._unknown, words[place])
        return tag_unknown(words[place], before, behind if behind in self._asked_behind else "")

    def _tag_unknown(self, word: str, before: str, behind: str) -> str:
        if word.istitle():
            return "NNP"
        if _NUMBER.fullmatch(word):
            return "CD"
        tag = "NN"
        for rule in self._morphology:
            if (rule.old is None or rule.old == tag) and rule.fits(word, before, behind, self._lexicon):
                tag = rule.new
        return tag

    def _in_context(self, words: Sequence[str], known: Sequence[str]) -> list[str]:
        edge = [_EDGE] * 6
        row = [*edge, *chain.from_iterable(zip(words, known, strict=True)), *edge]
        for here in range(6, len(row) - 6, 2):
            tables = self._tables.get(row[here + 1])
            if tables is None:
                continue
            # Of all rules that fit the tag that the word came with, the last one counts.
            last = -1
            for place, table in tables[0]:
                number = table.get(row[here + place], -1)
                last = number if number > last else last
            for first, second, pairs in tables[1]:
                number = pairs.get((row[here + first], row[here + second]), -1)
                last = number if number > last else last
            if last >= 0:
                row[here + 1] = self._new_tags[last]
        return row[7:-6:2]


class _Spelling:
    """A rule about unknown words: those of tag `old` (None: any) that fit get the tag `new`."""

    def __init__(self, old: str | None, affix: str, kind: str, new: str) -> None:
        self.old, self.affix, self.kind, self.new = old, affix, kind, new

    def fits(self, word: str, before: str, behind: str, lexicon: Mapping[str, str]) -> bool:
        """Whether the rule is about this word."""
        affix, kind = self.affix, self.kind
        if kind == "char":
            return affix in word
        if kind == "hassuf":
            return word.endswith(affix)
        if kind == "haspref":
            return word.startswith(affix)
        if kind == "addsuf":
            return word + affix in lexicon
        if kind == "addpref":
            return affix + word in lexicon
        if kind == "deletesuf":
            return word.endswith(affix) and word[: -len(affix)] in lexicon
        if kind == "deletepref":
            return word.startswith(affix) and word[len(affix) :] in lexicon
        return affix == (behind if kind == "goodleft" else before)


def _parts(rule: list[str]) -> tuple[str | None, str, str, str]:
    """`ly hassuf 2 RB x` or `NN s fhassuf 1 NNS x` -> tag that it is for, affix, kind, new tag."""
    if rule[1] in _SPELLINGS:
        return None, rule[0], rule[1], rule[-2]
    return rule[0], rule[1], rule[2].removeprefix("f"), rule[-2]


@lru_cache(2)
def english_tagger(every_rule: bool = False) -> Tagger:
    """Load the lexicon and the rules of the installed TextBlob, which itself is not imported.

    every_rule: give the tags of TextBlob, mistakes included.

    Raises:
        ConfigError: it is not installed, or has other files.
    """
    spec = find_spec("textblob")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"goal `formality` needs TextBlob's lexicon: {install_extra('goals')}")
    folder = Path(spec.submodule_search_locations[0], "en")
    try:
        lexicon = {word: tag for word, tag, *_ in _rows(folder / "en-lexicon.txt")}
        context = [
            rule for rule in _rows(folder / "en-context.txt") if every_rule or not _leaves_closed_class(rule)
        ]
        return Tagger(lexicon, list(_rows(folder / "en-morphology.txt")), context)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"goal `formality` cannot read the lexicon of TextBlob in {folder}: install a version that "
            "constraints.txt names"
        ) from error


def _leaves_closed_class(rule: Sequence[str]) -> bool:
    return rule[0] in _CLOSED and rule[1] in _OPEN


def _rows(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip() and not line.startswith(";;;"):
                yield line.split()
