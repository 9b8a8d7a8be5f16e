"""What answers of a judge say: numbers, choices, probabilities, rubrics, rankings, and what is no answer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conch.config import JudgeConfig, RewardConfig, load
from conch.errors import ConfigError
from conch.rewards.judge.endpoint import Answer, TokenChoice
from conch.rewards.judge.parsers import (
    Choices,
    UnreadableError,
    combined,
    final_text,
    json_objects,
    mirrored,
    read_choice,
    read_logprobs,
    read_number,
    read_rubric,
    read_yes_no,
    reader_of,
    weighted,
)
from conch.rewards.judge.ranking import read_group, shuffled

THINKING = ("<think>", "</think>")


def config(**settings: Any) -> JudgeConfig:
    return load(JudgeConfig, {"url": "http://h:1/v1", "model": "m", **settings})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7.0),
        ("Rating: **8/10**", 8.0),
        ("I first thought 3, but it is 6.5.", 6.5),
        ("8 out of 10", 8.0),
        ("[[9]]", 9.0),
        ("On a scale of 1-10, I say 4", 4.0),
        ("Rating: **8**/10", 8.0),
        ("Score: **8** / **10**", 8.0),
        (r"\boxed{3}/10", 3.0),
        ("[[3]]/10", 3.0),
        ("3 (out of 10)", 3.0),
        ("3 points out of 10", 3.0),
        ("3 of 10", 3.0),
        ("I rate it 3 on a scale from 1 to 10.", 3.0),
        ("4, on the scale from 1.0 (useless) to 10 (could not be better)", 4.0),
        ("3, on a 10-point scale", 3.0),
        ("1e1", 10.0),
    ],
)
def test_last_number_counts_and_its_denominator_does_not(text: str, number: float) -> None:
    assert read_number(text, None, (1.0, 10.0)) == number


def test_minus_sign_of_typeset_texts_is_one() -> None:
    assert read_number("\u22125", None, (-10.0, 10.0)) == -5.0


@pytest.mark.parametrize("text", ["7,5", "1,000", "7-8", "7\u20138", "2024-05-03", "1.2.3"])
def test_number_that_can_be_read_in_two_ways_is_none(text: str) -> None:
    with pytest.raises(UnreadableError, match="one number or several"):
        read_number(text, None, (0.0, 3000.0))


def test_group_of_a_pattern_that_matches_nothing_is_no_answer() -> None:
    with pytest.raises(UnreadableError, match="first group of"):
        read_number("Score: 7", r"Score:\s*(x)?\d", (1.0, 10.0))


@pytest.mark.parametrize(
    "text", ["no number here", "11", "0", "-3", "4/5", "3 out of 5", "on a scale from 1 to 10"]
)
def test_number_out_of_range_or_of_another_scale_is_none(text: str) -> None:
    with pytest.raises(UnreadableError):
        read_number(text, None, (1.0, 10.0))


def test_number_stands_where_the_pattern_says() -> None:
    text = "Score: 3\nOf 9 sentences 2 are wrong."
    assert read_number(text, r"Score:\s*(\S+)", (1.0, 10.0)) == 3
    with pytest.raises(UnreadableError, match="pattern"):
        read_number("3", r"Score:\s*(\S+)", (1.0, 10.0))


def test_numbers_are_scaled_unless_told_otherwise() -> None:
    answer = Answer("7", "stop")
    assert reader_of(config(number_range=[1, 9]))(answer) == {"reward": 0.75}
    assert reader_of(config(number_range=[1, 9], scaled_to=[-1, 1]))(answer) == {"reward": 0.5}
    assert reader_of(config(number_range=[1, 9], scaled_to=None))(answer) == {"reward": 7.0}


@pytest.mark.parametrize(
    "text",
    ["A", " a\n", "**A**", "The first is longer.\n\nA", "It is better.\nVerdict: [[A]]", '"A".'],
)
def test_choice_is_the_answer_or_its_end(text: str) -> None:
    assert read_choice(text, None, Choices({"A": 1.0, "B": 0.0})) == 1


@pytest.mark.parametrize("text", ["A good answer", "A or B", "C", "neither A nor B is good"])
def test_letter_within_a_sentence_is_no_choice(text: str) -> None:
    with pytest.raises(UnreadableError):
        read_choice(text, None, Choices({"A": 1.0, "B": 0.0}))


def test_capitals_count_where_nothing_else_tells_choices_apart() -> None:
    choices = Choices({"a": 1.0, "A": 0.0})
    assert (choices.value("a"), choices.value("A ")) == (1, 0)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a 3?</think>\n7", "7"),
        ("the template opened it</think>7", "7"),
        ("<think>1</think><think>2</think>7", "7"),
        ("no thinking", "no thinking"),
    ],
)
def test_thinking_is_removed(text: str, rest: str) -> None:
    assert final_text(Answer(text, "stop"), THINKING) == rest


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer("<think>7", "stop"), "within its thinking"),
        (Answer("7", "length"), "cut"),
        (Answer("7", "content_filter"), "content_filter"),
        (Answer("", "tool_calls"), "tool_calls"),
        (Answer("7", "stop", refused=True), "refusal"),
        (Answer(" \n", "stop"), "empty"),
    ],
)
def test_answer_that_ended_badly_is_none(answer: Answer, words: str) -> None:
    with pytest.raises(UnreadableError, match=words):
        final_text(answer, THINKING)


# ---------------------------------------------------------------------------------------------- probabilities


def place(**probabilities: float) -> TokenChoice:
    """One place of an answer, by probabilities; `_` in a name is a blank."""
    top = tuple((name.replace("_", " "), math.log(value)) for name, value in probabilities.items())
    return TokenChoice(top[0][0], top)


def expected(*places: TokenChoice, text: str = "A", **settings: Any) -> float:
    judge = config(parser="logprobs", choices={"A": 1.0, "B": 0.0, "C": 0.25}, **settings)
    answer = Answer(text, "length", tokens=places)
    return read_logprobs(answer, judge, Choices(judge.choices))


def test_expected_value_sums_blanks_and_capitals_and_is_renormalised() -> None:
    # p(A) = 0.3 + 0.2 + 0.1, p(B) = 0.2, C is not among the likeliest: 0.6 / 0.8
    assert expected(place(A=0.3, _A=0.2, a=0.1, B=0.2, The=0.2)) == pytest.approx(0.75, abs=1e-12)
    assert expected(place(A=0.4, C=0.4, x=0.2)) == pytest.approx((0.4 + 0.1) / 0.8, abs=1e-12)


def test_signs_that_tokenizers_write_for_a_blank_are_blanks() -> None:
    top = (("\u2581A", math.log(0.5)), ("\u0120B", math.log(0.5)))
    assert expected(TokenChoice("\u2581A", top)) == pytest.approx(0.5, abs=1e-12)


def test_too_little_probability_on_choices_is_no_answer() -> None:
    with pytest.raises(UnreadableError, match=r"0\.4 of the probability"):
        expected(place(The=0.6, A=0.4))
    assert expected(place(The=0.6, A=0.4), min_mass=0.3) == 1.0


def test_answer_stands_behind_blank_tokens_and_thinking() -> None:
    blank, a, b = place(_=1.0), place(A=0.9, B=0.1), place(B=0.9, A=0.1)
    assert expected(blank, a, b) == pytest.approx(0.9)
    thought = [TokenChoice(token, ((token, 0.0),)) for token in ("<think>", "A", " is", "</think>", "\n\n")]
    assert expected(*thought, b) == pytest.approx(0.1)
    with pytest.raises(UnreadableError, match="thinking"):
        expected(*thought[:3])


def test_pattern_says_at_which_token_the_choice_stands() -> None:
    words = [TokenChoice(token, ((token, 0.0),)) for token in ("It", " is", " A", " clear", " case:")]
    assert expected(*words, place(_B=0.75, _A=0.25), pattern=r"case:\s*(\w)") == pytest.approx(0.25)


def test_answer_without_log_probabilities_is_none() -> None:
    judge = config(parser="logprobs", choices={"A": 1, "B": 0})
    with pytest.raises(UnreadableError, match="log-probabilities"):
        read_logprobs(Answer("A", "stop"), judge, Choices(judge.choices))


def test_mirrored_comparison_turns_the_scale_round() -> None:
    plain = config(parser="choice", choices={"1": 1.0, "2": 0.0}, against="other", scaled_to=None)
    assert mirrored({"reward": 0.75}, plain) == {"reward": 0.25}
    scaled = config(parser="choice", choices={"1": 1.0, "2": 0.0}, against="other", scaled_to=[-1, 1])
    assert mirrored({"reward": 0.5}, scaled) == {"reward": -0.5}


# ---------------------------------------------------------------------------------------------------- rubrics

ITEMS = [
    {"name": "true", "question": "Is it true?", "weight": 3.0},
    {"name": "style", "question": "How well is it written?", "scores": [1, 5]},
]
RUBRIC = config(parser="rubric", rubric=ITEMS).rubric


@pytest.mark.parametrize(
    "text",
    [
        '{"true": true, "style": 4}',
        'Here it is:\n```json\n{"true": "Yes", "style": "4/5"}\n```\nDone.',
        '{"draft": 1} then {"true": 1, "style": {"reason": "a {brace}", "score": 4}}',
        '{"true": {"reason": "because", "answer": "yes"}, "style": 4.0, "more": null}',
    ],
)
def test_rubric_is_read_from_the_last_object_that_has_its_items(text: str) -> None:
    reading = read_rubric(text, RUBRIC)
    assert reading == {"true": 1.0, "style": 0.75}
    parts = weighted(reading, RUBRIC)
    assert parts == {"true": 0.75, "style": 0.1875}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"true": true}', "lacks the rubric's style"),
        ('{"true": true, "style": 9}', "outside"),
        ('{"true": "perhaps", "style": 3}', "neither yes nor no"),
        ('{"true": true, "style": true}', "number"),
        ('{"true": true, "style": NaN}', "lacks"),
        ("[1, 2]", "no JSON object"),
    ],
)
def test_rubric_that_is_not_whole_is_none(text: str, words: str) -> None:
    with pytest.raises(UnreadableError, match=words):
        read_rubric(text, RUBRIC)


def test_broken_objects_are_passed_over() -> None:
    assert [*json_objects('{"a": {"b": 1}, "c": } {"d": 2} {')] == [{"d": 2}, {"b": 1}]
    assert [*json_objects("{" * 5000)] == []


@pytest.mark.parametrize(
    ("text", "value"), [("Yes.", 1.0), ("no", 0.0), ("Yes, it does.", 1.0), ("Let me see.\nAnswer: No", 0.0)]
)
def test_yes_and_no(text: str, value: float) -> None:
    assert read_yes_no(text) == value


def test_votes_become_one() -> None:
    votes = [{"a": 1.0}, {"a": 0.0}, {"a": 0.0}, {"a": 0.5}]
    assert combined(votes, "mean") == {"a": 0.375}
    assert combined(votes, "median") == {"a": 0.25}
    assert combined(votes, "majority") == {"a": 0.0}
    assert combined([{"a": 1.0}, {"a": 0.0}], "majority") == {"a": 0.5}


# --------------------------------------------------------------------------------------------------- rankings

RANKING, BEST_WORST = config(parser="ranking"), config(parser="best-worst")


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("2 > 3 > 1", [0.0, 1.0, 0.5]),
        ("Answer 1 is bad.\nSo 2, 3, 1.", [0.0, 1.0, 0.5]),
        ('{"ranking": [2, 3, 1]}', [0.0, 1.0, 0.5]),
        ('{"ranking": [["2", "3"], 1]}', [0.0, 0.75, 0.75]),
        ("2 = 3 > 1", [0.0, 0.75, 0.75]),
        ("1 = 2 = 3", [0.5, 0.5, 0.5]),
    ],
)
def test_ranks_become_scores(text: str, scores: list[float]) -> None:
    assert read_group(text, 3, RANKING) == scores


@pytest.mark.parametrize(
    "text",
    [
        *("2 > 1", "1 > 2 > 2", "1 > 2 > 4", "4 > 3 > 2 > 1", "none", '{"ranking": ["a", 1, 2]}'),
        "2 > 1 > " + "3" * 5000,
    ],
    ids=lambda text: text[:20],
)
def test_ranking_that_is_not_of_all_answers_is_none(text: str) -> None:
    with pytest.raises(UnreadableError):
        read_group(text, 3, RANKING)


@pytest.mark.parametrize(
    "text", ['{"best": 3, "worst": 1}', "Best: 3, worst: answer 1", "The best is 3; worst: 1"]
)
def test_best_and_worst_become_scores(text: str) -> None:
    assert read_group(text, 3, BEST_WORST) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        *('{"best": 1, "worst": 1}', '{"best": 4, "worst": 1}', '{"best": 1}', "best: 2"),
        f"best: {'1' * 5000}, worst: 1",
    ],
    ids=lambda text: text[:20],
)
def test_best_and_worst_must_be_two_that_are_there(text: str) -> None:
    with pytest.raises(UnreadableError):
        read_group(text, 3, BEST_WORST)


def test_order_is_drawn_from_seed_prompt_and_answers() -> None:
    answers = [str(number) for number in range(8)]
    first = shuffled(answers, "p", 0)
    assert sorted(first) == [*range(8)] and first == shuffled(answers, "p", 0)
    assert first != shuffled(answers, "p", 1) and first != shuffled(answers, "q", 0)


# --------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parser": "choice"}, "at least two `choices`"),
        ({"parser": "logprobs", "choices": {"A": 1, "B": 1}}, "same value"),
        ({"parser": "rubric"}, "needs `rubric`"),
        ({"choices": {"A": 1, "B": 0}}, "acts with `parser`"),
        ({"votes": 3}, "temperature"),
        ({"votes": 2, "temperature": 1, "min_votes": 3}, "more than `votes`"),
        ({"budget": 5.0}, "price_in"),
        (
            {"budget": 0.01, "price_out": 10.0, "max_tokens": 2000},
            "one answer of `max_tokens` = 2000 may cost",
        ),
        ({"body": {"seed": 7}}, "`body` holds `seed`, which comes from `seed`"),
        ({"body": {"stream": True}}, "answers are read as a whole"),
        ({"number_range": [10, 1]}, "lowest, highest"),
        ({"number_range": [0, math.inf]}, "lowest, highest"),
        ({"number_range": [-math.inf, 10]}, "lowest, highest"),
        ({"scaled_to": [0, math.inf]}, "lowest, highest"),
        ({"parser": "choice", "choices": {"A": math.nan, "B": 0}}, "`A` the value nan, which is no score"),
        ({"parser": "choice", "choices": {"A": 1, "B": math.inf}}, "`B` the value inf, which is no score"),
        ({"parser": "choice", "choices": {True: 1, False: 0}}, "in quotes"),
        ({"parser": "choice", "choices": {1: 1, 2: 0}}, "in quotes"),
        ({"parser": "rubric", "rubric": [{"name": "a", "question": "q", "weight": math.inf}]}, "finite"),
        ({"parser": "rubric", "rubric": [{"name": "a", "question": "q", "scores": [0, math.inf]}]}, "lowest"),
        (
            {"parser": "rubric", "rubric": [{"name": "a", "question": "q"}], "scaled_to": [-1, 1]},
            "`scaled_to` acts",
        ),
        ({"pattern": "("}, "no regular expression"),
        ({"rubrik": []}, "did you mean `rubric`"),
        ({"template": "a", "template_file": "b"}, "not both"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


@pytest.mark.parametrize("more", [{"url": "h:1/m"}, {"members": {"a": "judge:a.yaml", "b": "h:1/m"}}])
def test_settings_of_a_judge_that_nobody_names_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"`judge.max_tokens` .* names none"):
        load(RewardConfig, {**more, "judge": {"max_tokens": 8}})
    assert load(RewardConfig, load(RewardConfig, more).model_dump()).judge == JudgeConfig()


def test_saved_section_that_holds_every_key_can_be_read_again() -> None:
    judge = config(votes=3, temperature=0.5)
    assert load(JudgeConfig, judge.model_dump()) == judge
