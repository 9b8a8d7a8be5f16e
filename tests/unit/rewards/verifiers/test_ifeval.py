"""Rows, scores and versions of the reward."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch.config import IFEvalConfig
from conch.errors import DataError
from conch.rewards.verifiers.base import Verdict
from conch.rewards.verifiers.ifeval.rows import GROUPS, TYPES
from conch.rewards.verifiers.ifeval.scores import pooled, readings, score
from conch.rewards.verifiers.ifeval.verifier import IFEval, without_thinking
from tests.ifeval_cases import ARGUMENTS, responses, rows

PROMPTS = Path(__file__).resolve().parents[5] / "shared/data/ifeval/prompts.jsonl.gz"
WORDS = "length_constraints:number_words"


def row(*instructions: tuple[str, dict[str, Any]], **columns: Any) -> dict[str, Any]:
    return {
        "prompt": "Write.",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
        **columns,
    }


NO_COMMA = ("punctuation:no_comma", {})
TITLE = ("detectable_format:title", {})
QUOTED = ("startend:quotation", {})


def verdict(completion: str, of: dict[str, Any], **config: Any) -> Verdict:
    verifier = IFEval(IFEvalConfig(**config))
    return verifier.verify(completion, verifier.read_key(of))


def test_all_25_types_have_cases() -> None:
    assert len(TYPES) == 25
    assert ARGUMENTS.keys() == TYPES.keys()
    assert len(GROUPS) == 9


@pytest.mark.skipif(not PROMPTS.exists(), reason=f"needs the prompts of IFEval: {PROMPTS}")
def test_all_published_rows_are_read_with_nulls_and_without_and_as_text() -> None:
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as lines:
        published = [json.loads(line) for line in lines]
    assert len(published) == 440
    names = sorted({name for each in TYPES.values() for name in each.arguments})
    verifier = IFEval()
    for each in published:
        key = verifier.read_key(each)
        with_nulls = [dict.fromkeys(names) | arguments for arguments in each["kwargs"]]
        assert verifier.read_key({**each, "kwargs": with_nulls}) == key
        assert verifier.read_key({**each, "kwargs": json.dumps(with_nulls)}) == key
        assert verifier.read_key({**each, "kwargs": [json.dumps(one) for one in each["kwargs"]]}) == key
        assert [one.type for one in key.instructions] == each["instruction_id_list"]


@pytest.mark.parametrize(
    ("columns", "phrase"),
    [
        ({"instruction_id_list": None}, "has no `instruction_id_list`"),
        ({"kwargs": None}, "has no `kwargs`"),
        ({"kwargs": 3}, "has 3 as `kwargs`; it must be a list"),
        ({"instruction_id_list": "no_comma"}, "has 'no_comma' as `instruction_id_list`; it must be a list"),
        ({"instruction_id_list": [], "kwargs": []}, "has no instruction in `instruction_id_list`"),
        (
            {"kwargs": [{}, {}]},
            "has 1 in `instruction_id_list`, but 2 in `kwargs`; ",
        ),
        (
            {"instruction_id_list": ["punctuation:no_commas"]},
            "has the unknown instruction `punctuation:no_commas`; did you mean `punctuation:no_comma`?",
        ),
        (
            {"instruction_id_list": [None]},
            "has the unknown instruction `None`; there are keywords:existence, ",
        ),
        (
            {"kwargs": [None]},
            "has None as arguments of punctuation:no_comma; it must be an object, `{}` for none",
        ),
        ({"kwargs": [{"n": 0}]}, "has the argument `n` for punctuation:no_comma, which takes none"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(columns: dict[str, Any], phrase: str) -> None:
    with pytest.raises(DataError) as error:
        IFEval().read_key({**row(NO_COMMA), **columns})
    assert str(error.value).startswith(phrase)


@pytest.mark.parametrize(
    ("name", "arguments", "phrase"),
    [
        (WORDS, {"relation": "at least"}, f"has no `num_words` for {WORDS} in `kwargs`"),
        (WORDS, {"relation": "at least", "num_words": None}, f"has no `num_words` for {WORDS} in `kwargs`"),
        (
            WORDS,
            {"relation": "at least", "num_words": 5, "n": 1},
            f"has the argument `n` for {WORDS}, which takes `num_words`, `relation`",
        ),
        *(
            (
                WORDS,
                {"relation": "at least", "num_words": value},
                f"has `num_words`={value!r} for {WORDS}; it must be a whole number of at least 0",
            )
            for value in (-1, "5", 5.5, True, [5])
        ),
        (
            WORDS,
            {"relation": "at most", "num_words": 5},
            f"has `relation`='at most' for {WORDS}; it must be `at least` or `less than`",
        ),
        (
            "keywords:existence",
            {"keywords": "river"},
            "has `keywords`='river' for keywords:existence; it must be a list of at least one text",
        ),
        (
            "keywords:existence",
            {"keywords": []},
            "has `keywords`=[] for keywords:existence; it must be a list of at least one text",
        ),
        (
            "keywords:forbidden_words",
            {"forbidden_words": ["a", " "]},
            "has `forbidden_words`=['a', ' '] for keywords:forbidden_words; it must be a text that is not",
        ),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
            "has `letter`='ab' for keywords:letter_frequency; it must be one character",
        ),
        (
            "language:response_language",
            {"language": "xx"},
            "has `language`='xx' for language:response_language; it must be one of af, ar, ",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
            "has `nth_paragraph`=3 for length_constraints:nth_paragraph_first_word, but `num_paragraphs`=2",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "a"},
            "has `nth_paragraph`=0 for length_constraints:nth_paragraph_first_word; it must be a whole "
            "number of at least 1",
        ),
    ],
)
def test_an_argument_that_is_missing_or_wrong_says_why(
    name: str, arguments: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(DataError) as error:
        IFEval().read_key(row((name, arguments)))
    assert str(error.value).startswith(phrase)


@pytest.mark.parametrize("name", TYPES)
def test_no_argument_of_any_type_may_be_missing(name: str) -> None:
    for missing in TYPES[name].arguments:
        arguments = {key: value for key, value in ARGUMENTS[name][0].items() if key != missing}
        with pytest.raises(DataError, match=f"has no `{missing}`"):
            IFEval().read_key(row((name, arguments)))


def test_rows_of_a_table_with_empty_cells_are_read() -> None:
    """As `to_dict("records")` of pandas gives them: arrays for lists, 5.0 and NaN for numbers."""
    filled = row(
        (WORDS, {"num_words": 5, "relation": "at least"}), ("keywords:existence", {"keywords": ["a"]})
    )
    kwargs = [
        {"num_words": np.float64(5), "relation": "at least", "keywords": None},
        {"num_words": np.nan, "relation": None, "keywords": np.array(["a"], dtype=object)},
    ]
    table = {
        "instruction_id_list": np.array(filled["instruction_id_list"], dtype=object),
        "kwargs": np.array(kwargs, dtype=object),
    }
    assert IFEval().read_key(table) == IFEval().read_key(filled)
    assert isinstance(IFEval().read_key(table).instructions[0].arguments["num_words"], int)


def test_zero_is_a_number_like_any_other() -> None:
    none = row(("detectable_format:number_bullet_lists", {"num_bullets": 0}))
    for _ in range(20):
        assert verdict("no bullets here", none).scores == {"instructions": 1.0}
        assert verdict("* a bullet", none).scores == {"instructions": 0.0}


def test_readings_drop_the_first_line_the_last_and_asterisks() -> None:
    assert readings("*a*\n b\n**c**") == [
        *("*a*\n b\n**c**", "b\n**c**", "*a*\n b", "b"),
        *("a\n b\nc", "b\nc", "a\n b"),
    ]
    assert readings("one") == ["one", ""]


@pytest.mark.parametrize(
    ("response", "instruction", "strict", "loose"),
    [
        ('"quoted"', QUOTED, True, True),
        ('Sure:\n"quoted"', QUOTED, False, True),
        ('"quoted"\nBye.', QUOTED, False, True),
        ('Sure:\n"quoted"\nBye.', QUOTED, False, True),
        ('**"quoted"**', QUOTED, False, True),
        ('Sure:\nHere:\n"quoted"', QUOTED, False, False),
        ("Sure, yes:\none two", NO_COMMA, False, True),
        ("one, two", NO_COMMA, False, False),
        ("<<a>>", TITLE, True, True),
        ("", NO_COMMA, False, False),
        (" \n ", NO_COMMA, False, False),
        ("*", NO_COMMA, True, True),
    ],
)
def test_loose_takes_the_best_reading(
    response: str, instruction: tuple[str, dict[str, Any]], strict: bool, loose: bool
) -> None:
    found = score(response, IFEval().read_key(row(instruction)).instructions)
    assert (found.strict, found.loose) == ((strict,), (loose,))


def test_scores_of_instructions_are_pooled_over_prompts() -> None:
    verifier = IFEval()
    three = verifier.read_key(row(NO_COMMA, TITLE, QUOTED)).instructions
    one = verifier.read_key(row(NO_COMMA)).instructions
    found = [score("no title", three), score("one", one), score("Yes, but\nno comma", one)]
    assert pooled(found) == {
        "prompt_level_strict_acc": pytest.approx(1 / 3),
        "inst_level_strict_acc": pytest.approx(2 / 5),
        "prompt_level_loose_acc": pytest.approx(2 / 3),
        "inst_level_loose_acc": pytest.approx(3 / 5),
    }
    assert all(map(math.isnan, pooled([]).values()))


def test_facts_give_the_pooled_scores_by_their_means() -> None:
    rows_ = [row(NO_COMMA, TITLE, QUOTED), row(NO_COMMA), row(TITLE)]
    facts = [verdict("no title", each).facts for each in rows_]
    means = {name: sum(each[name] for each in facts) / 3 for name in ("followed_strict", "instructions")}
    assert means["followed_strict"] / means["instructions"] == pytest.approx(2 / 5)


def test_share_is_the_fraction_followed_and_the_facts_have_one_set_of_names() -> None:
    of = row(NO_COMMA, TITLE, QUOTED)
    found = verdict("**<<one>>**", of)
    assert found.scores == {"instructions": pytest.approx(2 / 3)}
    facts = dict(found.facts)
    assert math.isnan(facts.pop("tripped"))
    groups = {name: facts.pop(name) for name in GROUPS}
    assert {name: value for name, value in groups.items() if not math.isnan(value)} == {
        "detectable_format": 1.0,
        "startend": 0.0,
        "punctuation": 1.0,
    }
    assert facts == {
        "prompt_strict": 0.0,
        "inst_strict": pytest.approx(2 / 3),
        "prompt_loose": 0.0,
        "inst_loose": pytest.approx(2 / 3),
        "instructions": 3.0,
        "followed_strict": 2.0,
        "followed_loose": 2.0,
        "answered": 1.0,
    }
    for completion in ("", "<think>never ends", "plain"):
        assert verdict(completion, row(NO_COMMA)).facts.keys() == found.facts.keys()


def test_share_may_be_loose() -> None:
    of = row(QUOTED, NO_COMMA)
    assert verdict('Sure, here:\n"quoted"', of).scores == {"instructions": 0.0}
    assert verdict('Sure, here:\n"quoted"', of, loose=True).scores == {"instructions": 1.0}


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("no tags\n", "no tags\n"),
        ("<think>one, two</think>\n\nthree", "three"),
        ("one, two</think>\nthree", "three"),
        ("before <think>one</think>after", "before after"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a <think> b</think>c", "c"),
        ("a</think>b</think>c", "c"),
        ("a<think>b</think>c</think>d", "d"),
        ("<think></think>", ""),
        ("<think>never ends", None),
        ("answer <think>never ends", None),
        ("<THINK>is no tag</THINK>", "<THINK>is no tag</THINK>"),
    ],
)
def test_thinking_is_removed(completion: str, answer: str | None) -> None:
    assert without_thinking(completion) == answer


def test_thinking_that_never_ends_is_no_answer() -> None:
    found = verdict("<think>no comma here", row(NO_COMMA))
    assert found.scores == {"instructions": 0.0}
    assert (found.facts["answered"], found.facts["prompt_loose"]) == (0.0, 0.0)
    assert verdict("<think>one, two</think>three", row(NO_COMMA)).scores == {"instructions": 1.0}


@pytest.mark.parametrize(
    ("completion", "parts"),
    [
        ("<think>a</think><answer>one</answer>", (0.4, 0.3, 0.2, 0.1, 0.1, 0.05)),
        ("<answer>one</answer>", (0.4, 0.3, 0.2, 0.1, 0.1, 0.0)),
        ("<answer>one, two</answer>", (0.0, 0.0, 0.0, 0.0, 0.1, 0.0)),
        ("<answer>Yes, sir\none</answer>", (0.0, 0.0, 0.2, 0.1, 0.1, 0.0)),
        ("<answer>one</answer><answer>two, three</answer>", (0.4, 0.3, 0.2, 0.1, 0.0, 0.0)),
        ("<think>a</think><think>b</think><answer>one</answer>", (0.4, 0.3, 0.2, 0.1, 0.1, 0.0)),
        ("<think>No: <answer>a, b</answer>.</think><answer>one</answer>", (0.4, 0.3, 0.2, 0.1, 0.1, 0.05)),
        ("the prompt began this</think><answer>one</answer>", (0.4, 0.3, 0.2, 0.1, 0.1, 0.05)),
        ("no tags at all", (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        ("<answer>open", (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_torchrl_weighs_four_scores_of_the_answer_block_and_two_terms_of_tags(
    completion: str, parts: tuple[float, ...]
) -> None:
    names = ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose", "answer_tags", "think_tags")
    scores = verdict(completion, row(NO_COMMA), version="torchrl").scores
    assert dict(scores) == pytest.approx(dict(zip(names, parts, strict=True)))
    assert sum(scores.values()) <= 1.15 + 1e-12


def test_torchrl_gives_shares_at_the_level_of_instructions() -> None:
    scores = verdict("<answer>one</answer>", row(NO_COMMA, TITLE), version="torchrl").scores
    assert (scores["prompt_strict"], scores["inst_strict"]) == (0.0, pytest.approx(0.15))


def test_verifier_and_keys_can_be_pickled() -> None:
    verifier = IFEval(IFEvalConfig(version="torchrl"))
    key = verifier.read_key(row(NO_COMMA, TITLE, trip_wires=row(QUOTED)))
    copied, of = pickle.loads(pickle.dumps((verifier, key)))
    assert of == key
    assert copied.verify("<answer>one</answer>", of) == verifier.verify("<answer>one</answer>", key)


HOSTILE = [
    *("[" * 100_000, "<<" * 50_000, "*" * 100_000, "* " * 50_000, " " * 100_000 + "x", "\n" * 100_000 + "x"),
    *(
        "p." * 50_000,
        '"' * 100_000,
        '\\"' * 50_000,
        "a" * 100_000,
        "A" * 100_000,
        "'" * 100_000,
        "." * 100_000,
    ),
    *('{"a":' * 20_000, "a@" * 50_000, "https://" * 12_000, "<think>" * 10_000, "</think>" * 10_000),
    *(
        "<answer>" * 10_000,
        "\ud800" * 1000,
        "\0" * 1000,
        "Dr. A. " * 5000,
        "SECTION " * 10_000,
        "1" * 100_000,
    ),
]


@pytest.mark.parametrize("version", ["share", "torchrl"])
def test_every_type_gives_a_verdict_on_hostile_text(version: Any) -> None:
    verifier = IFEval(IFEvalConfig(version=version))
    keys = [verifier.read_key(each) for each in rows()[::2]]
    for text in HOSTILE:
        completion = f"<answer>{text}</answer>" if version == "torchrl" else text
        for key in keys:
            assert all(map(math.isfinite, verifier.verify(completion, key).scores.values()))


def test_every_type_gives_a_verdict_on_random_text() -> None:
    draw = random.Random(0)
    verifier = IFEval()
    keys = [verifier.read_key(each) for each in rows()]
    for _ in range(300):
        text = "".join(
            chr(draw.choice((draw.randrange(128), draw.randrange(sys.maxunicode)))) for _ in range(40)
        )
        assert verifier.verify(text, draw.choice(keys)).scores.keys() == {"instructions"}


def test_verdicts_do_not_depend_on_the_order_of_calls() -> None:
    verifier = IFEval()
    pairs = [(each, text) for each in rows() for text in responses()[::30]]

    def ask(order: list[int]) -> dict[int, str]:
        return {n: repr(verifier.verify(pairs[n][1], verifier.read_key(pairs[n][0]))) for n in order}

    forward = list(range(len(pairs)))
    shuffled = random.Random(1).sample(forward, len(forward))
    assert ask(forward) == ask(shuffled)
