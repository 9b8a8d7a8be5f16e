"""Completions for GSM8K's verifiers: real solutions with the answer in many forms, right and wrong."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conch.errors import ConchError

_CALCULATION = re.compile(r"<<([^>=]*)=([^>]*)>>")

_ENDINGS: tuple[Callable[[str], str], ...] = (
    "#### {}".format,
    "#### {}.".format,
    "#### ${}".format,
    "#### {}.00".format,
    "#### {} dollars".format,
    "####{}".format,
    "#### **{}**".format,
    "So the answer is {}.".format,
    "So the answer is ${}.00, no less.".format,
    "**Answer: {}**".format,
    "The answer is {}...".format,
    "The total comes to {} (see step 2).".format,
    lambda number: rf"The answer is \boxed{{{number}}}.",
    lambda number: rf"Therefore $$x = {number}$$",
    lambda number: rf"Hence \(\frac{{2 \cdot {number}}}{{2}} = {number}\).",
    "<answer>{}</answer>".format,
    "#### {}\nCheck: it is more than 3.".format,
    "#### 7\nNo, one is missing.\n#### {}".format,
    "It is {}%.".format,
    "Answer: {}/1".format,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion, and the row's `answer` that it is checked against."""

    completion: str
    answer: str


def read_answers(path: Path) -> list[str]:
    """The column `answer` of a file of GSM8K, one JSON object a line, packed with gzip or not.

    Raises:
        ConchError: the file cannot be read or is of another form.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as lines:
            return [json.loads(line)["answer"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConchError(
            f"{path} does not hold JSON lines with `answer` ({type(error).__name__}: {error})"
        ) from error


def make_samples(answers: list[str], count: int, seed: int = 0) -> list[Sample]:
    """Turn solutions into completions: calculations as they are, left out or in LaTeX; cut short or whole; in
    tags or not; and a last line in one of 20 forms, with the right number or with one near it."""
    draw = random.Random(seed)
    samples = []
    for index in range(count):
        answer = answers[index % len(answers)]
        solution, _, gold = answer.rpartition("\n#### ")
        number = gold
        if draw.random() < 0.35:
            value = int(gold.replace(",", ""))
            number = str(draw.choice([value + 1, value - 1, value * 10, -value, value // 2]))
        elif draw.random() < 0.3:
            number = gold.replace(",", "")
        style = draw.random()
        if style < 0.5:
            solution = _CALCULATION.sub("", solution)
        elif style < 0.65:
            solution = _CALCULATION.sub(r" ($\1 = \2$) ", solution)
        completion = f"{solution}\n{draw.choice(_ENDINGS)(number)}"
        form = draw.random()
        if form < 0.08:
            completion = completion[: draw.randrange(len(completion))]
        elif form < 0.2:
            completion = f"<think>{solution}</think>\n{draw.choice(_ENDINGS)(number)}"
        elif form < 0.25:
            completion += "\n" + "That is all that the problem asks for, and nothing was left out. " * 5
        samples.append(Sample(completion, answer))
    return samples
