"""The data of the learning gates: right where it says so, wrong where it says so, and held out."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from conch.rewards.verifiers.gsm8k import GSM8K, GSM8KConfig
from conch.rewards.verifiers.ifeval.verifier import IFEval
from examples.grpo import instructions, word_problems
from examples.grpo.learning_gate import make_tokenizer

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
IN_WORDS = {
    ("*", "+"): lambda a, b, c: a * b + c,
    ("*", "-"): lambda a, b, c: a * b - c,
    ("+", "-"): lambda a, b, c: a + b - c,
    ("+", "+"): lambda a, b, c: a + b + c,
    ("/", "-"): lambda a, b, c: a / b - c,
    ("/", "+"): lambda a, b, c: a / b + c,
    ("+", "*"): lambda a, b, c: (a + b) * c,
    ("-", "*"): lambda a, b, c: (a - b) * c,
}


def numbers_of(question: str) -> tuple[int, int, int]:
    a, b, c = map(int, re.findall(r"\d+", question))
    return a, b, c


def test_solutions_are_right_and_the_verifier_says_so() -> None:
    verifier = GSM8K(GSM8KConfig(extractor="strict"))
    problems = word_problems.problems("held_out", 400, seed=2)
    for problem in problems:
        expected = IN_WORDS[problem.template.operations](*numbers_of(problem.question))
        solution = problem.solution()
        assert solution.endswith(f"\n#### {expected:g}")
        assert len(CALCULATION.findall(solution)) == 2 and solution.count("\n") == 2
        key = verifier.read_key({"question": problem.question, "answer": solution})
        assert verifier.verify(solution, key).scores == {"answer": 1.0}
    assert set(Counter(problem.template for problem in problems).values()) == {50}


def test_held_out_problems_share_neither_numbers_nor_names_with_those_that_are_learned() -> None:
    learned = word_problems.problems("train", 4000, seed=0)
    held_out = word_problems.problems("held_out", 400, seed=2)
    sorted_numbers = [{tuple(sorted(each.numbers)) for each in part} for part in (learned, held_out)]
    assert sorted_numbers[1] and not sorted_numbers[0] & sorted_numbers[1]
    assert not {each.words["name"] for each in learned} & {each.words["name"] for each in held_out}
    assert len({each.question for each in learned}) == 4000


def test_half_right_solutions_err_in_the_end_only() -> None:
    verifier, rng = GSM8K(GSM8KConfig(extractor="strict")), random.Random(0)
    for problem in word_problems.problems("train", 800, seed=3):
        right, wrong = problem.solution(), problem.half_right_solution(rng)
        assert wrong.partition("\n")[0] == right.partition("\n")[0]
        key = verifier.read_key({"answer": right})
        verdict = verifier.verify(wrong, key)
        assert verdict.scores == {"answer": 0.0} and verdict.facts["extracted"] == 1.0


def test_three_in_ten_solutions_to_learn_from_are_right() -> None:
    rows = word_problems.half_right_rows(4000, seed=0)
    answers = {
        problem.question: problem.solution() for problem in word_problems.problems("train", 4000, seed=0)
    }
    right = sum(row["answer"] == answers[row["question"]] for row in rows)
    assert right / len(rows) == pytest.approx(0.3, abs=0.02)
    assert rows == word_problems.half_right_rows(4000, seed=0) != word_problems.half_right_rows(4000, seed=1)


def test_answers_that_follow_all_instructions_are_found_to_do_so() -> None:
    verifier, rng = IFEval(), random.Random(0)
    for request in instructions.requests("held_out", 300, seed=2):
        key = verifier.read_key(request.row)
        text = instructions.answer(request.subject, request.instructions, rng)
        assert verifier.verify(text, key).scores == {"instructions": 1.0}, (request.row, text)
        assert verifier.verify(instructions.answer(request.subject, {}, rng), key).scores == {
            "instructions": 0.0
        }


def test_answers_to_learn_from_follow_three_of_ten_instructions_of_six_types() -> None:
    verifier, rng = IFEval(), random.Random(0)
    asked, followed = Counter[str](), Counter[str]()
    for request in instructions.requests("train", 2000, seed=0):
        text = instructions.half_followed_answer(request, rng)
        for instruction in verifier.read_key(request.row).instructions:
            asked[instruction.type] += 1
            followed[instruction.type] += instruction.is_followed_by(text)
    assert len(asked) == 6
    assert all(0.23 < followed[kind] / asked[kind] < 0.4 for kind in asked)


def test_held_out_requests_are_not_learned_in_other_words_or_in_another_order() -> None:
    def ask(request: instructions.Request) -> tuple[str, frozenset[str]]:
        return request.subject, frozenset(map(str, request.instructions.items()))

    learned = {ask(request) for seed in (0, 1) for request in instructions.requests("train", 4000, seed)}
    held_out = {ask(request) for request in instructions.requests("held_out", 300, seed=2)}
    assert not learned & held_out


@pytest.mark.parametrize(
    "texts",
    [
        [problem.question + "\n" + problem.solution() for problem in word_problems.problems("train", 300, 0)],
        [row["prompt"] + "\n" + row["completion"] for row in instructions.half_followed_rows(300, 0)],
    ],
    ids=["word_problems", "instructions"],
)
def test_tokenizer_gives_texts_back_and_takes_numbers_as_wholes(texts: list[str]) -> None:
    tokenizer = make_tokenizer(texts, 640)
    unseen = "Zsófi's 3 cats (all of them)\n\n* sleep, eat.  #### 17"
    for text in [*texts, unseen]:
        ids = tokenizer(text)["input_ids"]
        assert max(ids) < len(tokenizer) <= 640 and tokenizer.decode(ids) == text
    if "####" in texts[0]:
        assert tokenizer.tokenize("4 * 3 = 12")[-1] == "\u012012"
