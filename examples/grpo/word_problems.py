"""Word problems in GSM8K's form, made by a seeded generator: a story, three numbers, two steps of arithmetic.

    {"question": "There are 4 shelves with 7 books each. Lea takes 5 books away. How many books are left?",
     "answer": "The shelves hold 4 * 7 = 28 books.\\nThen 28 - 5 = 23 books are left.\\n#### 23"}

Held-out problems share no name with those that are learned from, and no three numbers, in whatever order and
story: no held-out calculation was ever seen whole.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Part = Literal["train", "held_out"]
Row = dict[str, str]

NAMES: dict[Part, tuple[str, ...]] = {
    "train": (
        *("Ada", "Amir", "Bella", "Bruno", "Carla", "Chen", "Dana", "Emil", "Fatima", "Felix", "Greta"),
        *("Hugo", "Ines", "Ivan", "Jonas", "Julia", "Karim", "Lea", "Luca", "Marta", "Nadia", "Oscar"),
        *("Paula", "Rafael", "Rosa", "Samir", "Sofia", "Tarek", "Tess", "Viktor", "Yuki", "Zoe"),
    ),
    "held_out": ("Anton", "Bianca", "Elena", "Farid", "Ida", "Kenji", "Lina", "Mateo", "Nora", "Theo"),
}
THINGS = ("apples", "beads", "books", "buttons", "cards", "cups", "eggs", "marbles", "pencils", "shells")
HELD_OUT_SHARE = 0.1
RIGHT_SHARE = 0.3
MISTAKES = {"forgotten": 16, "operation": 3, "count": 1}
"""Mistakes of half-right solutions -> how often each is made, of 20."""

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_MISTAKEN_FOR = {"+": "-", "-": "+", "*": "+"}


@dataclass(frozen=True)
class Template:
    """A story and the two sentences that solve it.

    question: names the numbers {a}, {b} and {c}, a {name} and {things}.
    first, second: sentences of the solution; {sum} stands for their calculation.
    operations: of the two steps: of a and b, and of the first result and c.
    """

    question: str
    first: str
    second: str
    operations: tuple[str, str]


TEMPLATES = (
    Template(
        "{name} buys {a} boxes of {b} {things} and gets {c} more from a friend. How many {things} are there "
        "now?",
        "The boxes hold {sum} {things}.",
        "With the new ones there are {sum} {things}.",
        ("*", "+"),
    ),
    Template(
        "There are {a} shelves with {b} {things} each. {name} takes {c} {things} away. How many {things} are "
        "left on the shelves?",
        "The shelves hold {sum} {things}.",
        "Then {sum} {things} are left.",
        ("*", "-"),
    ),
    Template(
        "{name} finds {a} {things} on Monday and {b} on Tuesday, and loses {c} of them on the way home. How "
        "many {things} come home?",
        "Both days give {sum} {things}.",
        "Then {sum} {things} come home.",
        ("+", "-"),
    ),
    Template(
        "{name} has {a} {things}, a sister has {b} and a brother has {c}. How many {things} do the three "
        "have together?",
        "The first two have {sum} {things}.",
        "All three have {sum} {things}.",
        ("+", "+"),
    ),
    Template(
        "{name} packs {a} {things} into bags of {b} and sells {c} of the bags. How many bags are left?",
        "That fills {sum} bags.",
        "Then {sum} bags are left.",
        ("/", "-"),
    ),
    Template(
        "Each day {name} paints {a} red and {b} blue {things}. How many {things} are painted in {c} days?",
        "One day gives {sum} {things}.",
        "All days give {sum} {things}.",
        ("+", "*"),
    ),
    Template(
        "{name} had {a} {things} and broke {b}. The rest is sold for {c} dollars each. How many dollars do "
        "they bring?",
        "Unbroken are {sum} {things}.",
        "They bring {sum} dollars.",
        ("-", "*"),
    ),
    Template(
        "{name} shares {a} {things} among {b} children and gives each child {c} more. How many {things} does "
        "each child have?",
        "Each child gets {sum} {things}.",
        "With the gift each has {sum} {things}.",
        ("/", "+"),
    ),
)


@dataclass(frozen=True)
class Problem:
    """One story with its numbers.

    numbers: a, b and c.
    words: the name and the things.
    """

    template: Template
    numbers: tuple[int, int, int]
    words: dict[str, str]

    @property
    def question(self) -> str:
        """The story in words."""
        a, b, c = self.numbers
        return self.template.question.format(a=a, b=b, c=c, **self.words)

    def solution(self, operations: tuple[str, str] | None = None, slip: int = 0) -> str:
        """Both steps and the answer behind `####`.

        operations: of the two steps, where they are not the right ones.
        slip: by which the second step's result is wrong.
        """
        first, second = operations or self.template.operations
        a, b, c = self.numbers
        between = _OPERATIONS[first](a, b)
        result = _OPERATIONS[second](between, c) + slip
        lines = (
            self.template.first.format(sum=f"{a} {first} {b} = {between}", **self.words),
            self.template.second.format(sum=f"{between} {second} {c} = {result}", **self.words),
            f"#### {result}",
        )
        return "\n".join(lines)

    def half_right_solution(self, rng: random.Random) -> str:
        """A solution whose first step is right, and whose answer is wrong: the second step is forgotten, or
        takes the opposite operation, or is miscounted."""
        first, second = self.template.operations
        mistake = rng.choices([*MISTAKES], weights=[*MISTAKES.values()])[0]
        if mistake == "operation":
            return self.solution((first, _MISTAKEN_FOR[second]))
        if mistake == "count":
            return self.solution(slip=rng.choice((-1, 1)))
        a, b, _ = self.numbers
        line, _, _ = self.solution().partition("\n")
        return f"{line}\n#### {_OPERATIONS[first](a, b)}"


def problems(part: Part, number: int, seed: int) -> list[Problem]:
    """So many different problems of one of the two sets, of all templates alike."""
    rng = random.Random(f"word problems, {part}, {seed}")
    drawn: dict[str, Problem] = {}
    while len(drawn) < number:
        template = TEMPLATES[len(drawn) % len(TEMPLATES)]
        numbers = _draw_numbers(template.operations, rng)
        if is_held_out(numbers) == (part == "held_out"):
            words = {"name": rng.choice(NAMES[part]), "things": rng.choice(THINGS)}
            problem = Problem(template, numbers, words)
            drawn.setdefault(problem.question, problem)
    return list(drawn.values())


def rows(part: Part, number: int, seed: int) -> list[Row]:
    """Problems as GSM8K has them: `question`, and `answer` with the solution."""
    return [
        {"question": problem.question, "answer": problem.solution()}
        for problem in problems(part, number, seed)
    ]


def half_right_rows(number: int, seed: int) -> list[Row]:
    """Problems to learn from. Three in ten solutions are right, the others in their first step only."""
    rng = random.Random(f"half right, {seed}")
    return [
        {
            "question": problem.question,
            "answer": problem.solution() if rng.random() < RIGHT_SHARE else problem.half_right_solution(rng),
        }
        for problem in problems("train", number, seed)
    ]


@cache
def is_held_out(numbers: tuple[int, int, int]) -> bool:
    """Whether no problem with these numbers, in any order, is learned from; a tenth of all are held out."""
    return random.Random(f"held out {sorted(numbers)}").random() < HELD_OUT_SHARE


def _draw_numbers(operations: tuple[str, str], rng: random.Random) -> tuple[int, int, int]:
    """Three numbers of which the second step gives a positive result, and the opposite operation another."""
    first, second = operations
    while True:
        a, b = _draw_first(first, second, rng)
        c = rng.randint(2, 6)
        between = _OPERATIONS[first](a, b)
        right, mistaken = (_OPERATIONS[each](between, c) for each in (second, _MISTAKEN_FOR[second]))
        if min(right, mistaken) > 0 and right != mistaken:
            return a, b, c


def _draw_first(first: str, second: str, rng: random.Random) -> tuple[int, int]:
    """Numbers of the first step. Its result is at most 24, so that what the second step adds to a product, or
    takes off, is added to sums as well; and at most 9 where it is multiplied afterwards."""
    if second == "*":
        whole = rng.randint(3, 9)
        part = rng.randint(1, whole - 1)
        return (part, whole - part) if first == "+" else (whole, part)
    if first == "+":
        return rng.randint(2, 12), rng.randint(2, 12)
    while True:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        if a * b <= (36 if first == "/" else 24):
            return (a * b, b) if first == "/" else (a, b)
