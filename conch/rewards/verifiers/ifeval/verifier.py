"""The verifier `ifeval`: a reward for instructions that are followed.

import conch
from conch.rewards.verifiers.ifeval.verifier import IFEval

conch.train(model, reward=IFEval(), prompts=rows_of_ifeval)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conch.config import IFEvalConfig
from conch.errors import DataError
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rewards.verifiers.ifeval.rows import Instruction, decoded, read_instructions
from conch.rewards.verifiers.ifeval.scores import Scores, score
from conch.rewards.verifiers.tags import Tags, read_tags

TRIP_WIRES = "trip_wires"
"""Column of instructions that a prompt does not give, see `conch.rewards.verifiers.ifeval.trip_wires`."""


@dataclass(frozen=True, slots=True)
class IFEvalKey:
    """What completions of a prompt are checked against.

    instructions: of the row, at least one.
    trip_wires: instructions that the prompt does not give; following them earns nothing.
    """

    instructions: tuple[Instruction, ...]
    trip_wires: tuple[Instruction, ...] = ()


class IFEval(Verifier[IFEvalKey]):
    """Checks the instructions of rows of google/IFEval.

    Versions of the reward, by the names of its parts:

    - `share`: `instructions`, the share of the instructions that are followed, strictly or, with `loose`,
      loosely. The answer is the completion without its thinking, see `without_thinking`.
    - `torchrl`: `prompt_strict`, `inst_strict`, `prompt_loose` and `inst_loose`, weighed by 0.4, 0.3, 0.2 and
      0.1, then `answer_tags`, 0.1 for exactly one `<answer>` block, and `think_tags`, 0.05 for exactly one
      `<think>` block. The answer is the first `<answer>` block outside of the thinking, or nothing; see
      `conch.rewards.verifiers.tags`.

    Facts, of the same answer: the four scores of IFEval (`prompt_strict`, `inst_strict`, `prompt_loose`,
    `inst_loose`), how many `instructions` there are and how many of them are `followed_strict` and
    `followed_loose`, whether the completion is `answered` at all, the share of the row's trip wires that is
    `tripped` (NaN without any), and the share of each group's instructions that is followed strictly (NaN
    without any).
    """

    name = "ifeval"
    columns = ("instruction_id_list", "kwargs")
    success = "prompt_strict"

    def __init__(self, config: IFEvalConfig | None = None) -> None:
        self.config = IFEvalConfig() if config is None else config

    def read_key(self, row: Mapping[str, Any]) -> IFEvalKey:
        wires = decoded(row.get(TRIP_WIRES))
        if wires is None:
            return IFEvalKey(read_instructions(row))
        if not isinstance(wires, Mapping):
            raise DataError(
                f"has {wires!r} as `{TRIP_WIRES}`; it must be an object with `instruction_id_list` and "
                "`kwargs`"
            )
        return IFEvalKey(read_instructions(row), read_instructions(wires, f"in `{TRIP_WIRES}` "))

    def verify(self, completion: str, key: IFEvalKey) -> Verdict:
        if self.config.version == "torchrl":
            tags = read_tags(completion)
            answer = tags.answers[0] if tags.answers else ""
            found = score(answer, key.instructions)
            return Verdict(_torchrl_parts(found, tags), _facts(found, answer, key))
        answer = without_thinking(completion) or ""
        found = score(answer, key.instructions)
        share = found.inst_loose if self.config.loose else found.inst_strict
        return Verdict({"instructions": share}, _facts(found, answer, key))


def without_thinking(completion: str) -> str | None:
    """Return what a completion says outside of `<think>...</think>`; None if its thinking never ends.

    A `</think>` without a `<think>` before it ends thinking that the prompt's template began: all before it
    is thinking. A completion without either tag is returned as it is, others without blanks at their ends.
    """
    answer: list[str] = []
    thinks = False
    end = 0
    for tag in _THINK_TAG.finditer(completion):
        if tag[0] == "</think>":
            if not thinks:
                answer.clear()
            thinks = False
        elif not thinks:
            answer.append(completion[end : tag.start()])
            thinks = True
        end = tag.end()
    if thinks:
        return None
    return "".join((*answer, completion[end:])).strip() if end else completion


def _torchrl_parts(found: Scores, tags: Tags) -> dict[str, float]:
    return {
        "prompt_strict": 0.4 * found.prompt_strict,
        "inst_strict": 0.3 * found.inst_strict,
        "prompt_loose": 0.2 * found.prompt_loose,
        "inst_loose": 0.1 * found.inst_loose,
        "answer_tags": 0.1 if len(tags.answers) == 1 else 0.0,
        "think_tags": 0.05 if len(tags.thoughts) == 1 else 0.0,
    }


def _facts(found: Scores, answer: str, key: IFEvalKey) -> dict[str, float]:
    tripped = [wire.is_followed_by(answer) for wire in key.trip_wires]
    return {
        "prompt_strict": found.prompt_strict,
        "inst_strict": found.inst_strict,
        "prompt_loose": found.prompt_loose,
        "inst_loose": found.inst_loose,
        "instructions": float(len(found.strict)),
        "followed_strict": float(sum(found.strict)),
        "followed_loose": float(sum(found.loose)),
        "answered": float(bool(answer.strip())),
        "tripped": sum(tripped) / len(tripped) if tripped else math.nan,
        **found.by_group(),
    }


_THINK_TAG = re.compile(r"</?think>")
