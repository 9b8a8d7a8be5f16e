"""The form of a text: what follows, what does not, and what lies on the border."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conch.rewards.verifiers.ifeval.layout import DEEPEST_JSON
from conch.rewards.verifiers.ifeval.rows import read_instruction


def follows(name: str, text: str, **arguments: Any) -> bool:
    return read_instruction(name, arguments).is_followed_by(text)


@pytest.mark.parametrize(
    ("text", "paragraphs"),
    [
        ("one", 1),
        ("one\n***\ntwo", 2),
        ("one***two", 2),
        ("***\none\n***\ntwo\n***", 2),
        ("one\n\ntwo", 1),
        ("one\n***\n\n***\ntwo", None),
        ("one ****** two", None),
        ("***", 0),
    ],
)
def test_paragraphs_stand_between_dividers(text: str, paragraphs: int | None) -> None:
    name = "length_constraints:number_paragraphs"
    followed = [number for number in range(5) if follows(name, text, num_paragraphs=number)]
    assert followed == ([] if paragraphs is None else [paragraphs])


@pytest.mark.parametrize(
    ("text", "of", "nth", "word", "followed"),
    [
        ("The hill.\n\nWater falls.", 2, 2, "water", True),
        ("The hill.\n\nWater falls.", 2, 1, "THE", True),
        ("The hill.\n\nWater falls.", 3, 2, "water", False),
        ("The hill.\n\nFalling water.", 2, 2, "water", False),
        ('The hill.\n\n"Water" falls.', 2, 2, "water", True),
        ("The hill.\n\nWater's fall.", 2, 2, "water", True),
        ("The hill.\n\nWater-falls.", 2, 2, "water", False),
        ("The hill.\n\n\n\nWater falls.", 2, 2, "water", False),
        ("Water", 1, 1, "water", True),
    ],
)
def test_nth_paragraph_begins_with_the_word(text: str, of: int, nth: int, word: str, followed: bool) -> None:
    arguments = {"num_paragraphs": of, "nth_paragraph": nth, "first_word": word}
    assert follows("length_constraints:nth_paragraph_first_word", text, **arguments) is followed


@pytest.mark.parametrize(
    ("text", "placeholders"),
    [("Dear [name], pay [sum].", 2), ("[]", 1), ("[a [b] c]", 1), ("[open\nclosed]", 0), ("]none[", 0)],
)
def test_placeholders_end_on_their_line(text: str, placeholders: int) -> None:
    name = "detectable_content:number_placeholders"
    assert follows(name, text, num_placeholders=placeholders)
    assert not follows(name, text, num_placeholders=placeholders + 1)


@pytest.mark.parametrize(
    ("text", "marker", "followed"),
    [
        ("Text.\n\nP.S. Boots.", "P.S.", True),
        ("Text. p. s. boots", "P.S.", True),
        ("Text.\nPS boots", "P.S.", False),
        ("Text.\nP.S boots", "P.S.", False),
        ("Text.\nP.P.S Boots.", "P.P.S", True),
        ("Text.\np. p. s boots", "P.P.S", True),
        ("Text.\nP.S. Boots.", "P.P.S", False),
        ("Text.\nNOTE (late): boots", "Note (late):", True),
        ("Text.\nNote late: boots", "Note (late):", False),
    ],
)
def test_postscript_has_its_marker(text: str, marker: str, followed: bool) -> None:
    assert follows("detectable_content:postscript", text, postscript_marker=marker) is followed


@pytest.mark.parametrize(
    ("text", "bullets"),
    [
        ("* one\n* two", 2),
        ("- one\n   - two\n\n\n* three", 3),
        ("**bold** is none", 0),
        ("*one without a blank", 1),
        ("---", 1),
        ("1. one\n2. two", 0),
        ("*\n* the empty bullet takes this line\n* two", 2),
        ("*", 0),
        ("text - dash\ntext * star", 0),
    ],
)
def test_bullets_are_counted_exactly(text: str, bullets: int) -> None:
    name = "detectable_format:number_bullet_lists"
    assert [n for n in range(6) if follows(name, text, num_bullets=n)] == [bullets]


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("My answer is yes.", True),
        ("Well, My answer is maybe. I think.", True),
        ("my answer is no.", False),
        ("My answer is no", False),
    ],
)
def test_constrained_response_occurs_as_written(text: str, followed: bool) -> None:
    assert follows("detectable_format:constrained_response", text) is followed


@pytest.mark.parametrize(
    ("text", "highlights"),
    [
        ("*one* and **two**", 2),
        # Single and double asterisks around the same words are two.
        ("***three***", 2),
        ("** ** and * *", 0),
        ("*open\nclosed*", 0),
        ("* one * two *", 1),
        ("plain", 0),
    ],
)
def test_highlights_are_not_blank_and_stay_on_their_line(text: str, highlights: int) -> None:
    name = "detectable_format:number_highlighted_sections"
    assert follows(name, text, num_highlights=highlights)
    assert not follows(name, text, num_highlights=highlights + 1)


@pytest.mark.parametrize(
    ("text", "spliter", "sections"),
    [
        ("SECTION 1\na\nSECTION 2\nb", "SECTION", 2),
        ("Section 1 Section2", "Section", 2),
        ("section 1", "Section", 0),
        ("Day  1", "Day", 0),
        ("Part (a) 1, Part (a) 2", "Part (a)", 2),
    ],
)
def test_sections_have_a_number(text: str, spliter: str, sections: int) -> None:
    name = "detectable_format:multiple_sections"
    assert follows(name, text, section_spliter=spliter, num_sections=sections)
    assert not follows(name, text, section_spliter=spliter, num_sections=sections + 1)


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ('{"a": [1, 2.5, null]}', True),
        ('```json\n{"a": 1}\n```', True),
        ("```JSON [1] ```", True),
        ("{'a': 1}", False),
        ('Here: {"a": 1}', False),
        ('{"a": 1', False),
        ('"text"', True),
        ("12", True),
        ("[" * DEEPEST_JSON + "]" * DEEPEST_JSON, True),
        ("[" * (DEEPEST_JSON + 1) + "]" * (DEEPEST_JSON + 1), False),
        ("[" * 100_000 + "]" * 100_000, False),
        ('"' + "[" * 1000 + '\\"' + "[" * 1000 + '"', True),
        ("9" * 5000, True),
    ],
)
def test_json_is_one_value_in_a_fence_or_not(text: str, followed: bool) -> None:
    assert follows("detectable_format:json_format", text) is followed


def test_json_does_not_depend_on_the_depth_of_the_call() -> None:
    text = json.dumps([[[]]]) if DEEPEST_JSON < 3 else "[" * DEEPEST_JSON + "]" * DEEPEST_JSON

    def called_from(depth: int) -> bool:
        return called_from(depth - 1) if depth else follows("detectable_format:json_format", text)

    assert called_from(0) is called_from(400) is True


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("<<Poem>>\ntext", True),
        ("text <<late title>> text", True),
        ("<<>>", False),
        ("<< >>", False),
        ("<Poem>", False),
        ("<<open\nclosed>>", False),
        ("<<<>>>", False),
        (">> a <<", False),
        (">> a << b >>", True),
    ],
)
def test_title_stands_in_double_brackets(text: str, followed: bool) -> None:
    assert follows("detectable_format:title", text) is followed


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("one ****** two", True),
        ("******\none\n******\ntwo\n******", True),
        ("one", False),
        ("same ****** same ", False),
        ("one ****** two ****** three", False),
        ("one ****** ****** two", False),
    ],
)
def test_two_responses_differ(text: str, followed: bool) -> None:
    assert follows("combination:two_responses", text) is followed


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("Tell me of rivers. They flow.", True),
        ("  TELL me of rivers.\nThey flow.", True),
        ("Sure. Tell me of rivers.", False),
        ("Tell me of  rivers.", False),
    ],
)
def test_prompt_is_repeated_first(text: str, followed: bool) -> None:
    name = "combination:repeat_prompt"
    assert follows(name, text, prompt_to_repeat=" Tell me of rivers. ") is followed


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("Done. That is all.", True),
        ('"Done. THAT IS ALL."\n', True),
        ("That is all. Bye.", False),
        ("That is all", False),
        ("That is all.*", False),
    ],
)
def test_end_has_the_phrase(text: str, followed: bool) -> None:
    assert follows("startend:end_checker", text, end_phrase="That is all. ") is followed


@pytest.mark.parametrize(
    ("text", "followed"), [('"a"', True), (' "" ', True), ('"', False), ("'a'", False), ("“a”", False)]
)
def test_quotation_marks_are_straight_and_double(text: str, followed: bool) -> None:
    assert follows("startend:quotation", text) is followed
