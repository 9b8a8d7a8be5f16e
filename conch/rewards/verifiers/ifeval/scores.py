"""IFEval's four scores: strict and loose, of the prompt and of its instructions.

As lm-eval's task `ifeval` version 4 gives them: strict looks at the answer as it is, loose at eight readings
of it, one of which must follow an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conch.rewards.verifiers.ifeval.rows import GROUPS, Instruction


@dataclass(frozen=True, slots=True)
class Scores:
    """Which instructions of a prompt an answer follows, in the row's order.

    strict: as the answer stands.
    loose: in one of its eight readings.
    """

    instructions: tuple[Instruction, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]

    @property
    def prompt_strict(self) -> float:
        """1 if all instructions are followed."""
        return float(all(self.strict))

    @property
    def prompt_loose(self) -> float:
        """1 if all instructions are followed in a reading, not necessarily the same."""
        return float(all(self.loose))

    @property
    def inst_strict(self) -> float:
        """Share of the instructions that are followed."""
        return sum(self.strict) / len(self.strict)

    @property
    def inst_loose(self) -> float:
        """Share of the instructions that are followed in a reading."""
        return sum(self.loose) / len(self.loose)

    def by_group(self) -> dict[str, float]:
        """Share followed, strictly, of each group's instructions; NaN for a group that has none."""
        followed: dict[str, list[bool]] = {group: [] for group in GROUPS}
        for instruction, strict in zip(self.instructions, self.strict, strict=True):
            followed[instruction.group].append(strict)
        return {group: sum(each) / len(each) if each else math.nan for group, each in followed.items()}


def score(answer: str, instructions: Sequence[Instruction]) -> Scores:
    """Check an answer against a prompt's instructions."""
    texts = readings(answer)
    strict = tuple(instruction.is_followed_by(answer) for instruction in instructions)
    loose = tuple(
        followed or any(map(instruction.is_followed_by, texts[1:]))
        for instruction, followed in zip(instructions, strict, strict=True)
    )
    return Scores(tuple(instructions), strict, loose)


def readings(answer: str) -> list[str]:
    """Return the answer, and what is left of it without its first line, its last, both, each time with its
    asterisks and without; equal ones once, the answer first."""
    lines = answer.split("\n")
    shorter = ("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))
    with_asterisks = (answer, *shorter)
    return list(dict.fromkeys((*with_asterisks, *(text.replace("*", "") for text in with_asterisks))))


def pooled(scores: Iterable[Scores]) -> dict[str, float]:
    """Return the four figures of a whole set as lm-eval reports them, under its names.

    Those of instructions are pooled: a prompt of three instructions weighs three times as much as a prompt of
    one. NaN for an empty set.
    """
    every = list(scores)
    strict = [float(followed) for each in every for followed in each.strict]
    loose = [float(followed) for each in every for followed in each.loose]
    return {
        "prompt_level_strict_acc": _mean([each.prompt_strict for each in every]),
        "inst_level_strict_acc": _mean(strict),
        "prompt_level_loose_acc": _mean([each.prompt_loose for each in every]),
        "inst_level_loose_acc": _mean(loose),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
