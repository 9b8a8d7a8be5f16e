"""What a verifier is, and what it finds.

A verifier of your own is a class with two methods:

    class Palindrome(Verifier[str]):
        name = "palindrome"
        columns = ("word",)

        def read_key(self, row):
            if "word" not in row:
                raise DataError("has no `word`")
            return row["word"]

        def verify(self, completion, key):
            return Verdict({"answer": float(completion.strip() == key[::-1])})

`conch.train(model, reward=Palindrome(), prompts=[{"prompt": "Turn it round: abc", "word": "abc"}])` learns
from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier finds in one completion.

    scores: parts of the reward by name, whose weighted sum is the reward: `{"answer": 1.0, "format": 0.1}`. A
        verifier gives the same names for every completion.
    facts: further figures, which are measured and no part of the reward: `{"correct": 1.0}`. A verifier gives
        the same names for every completion, with NaN where a fact does not apply.
    """

    scores: Mapping[str, float]
    facts: Mapping[str, float] = field(default_factory=dict)


class Verifier(ABC, Generic[KeyT]):
    """Checks completions against what each prompt's row says. Verifiers and their keys can be pickled.

    name: in messages and metrics.
    columns: keys of a prompt's row that are read.
    success: the fact that says with 1 that a completion is right; lengths are measured apart by it.
    timeout_s: longest time of one check, in seconds, for checks that can hang: they run in processes of their
        own, and one that is late is killed. None: `verify` takes a time that is bounded by the text's length.
    processes: that such checks run in, for each process of the trainer.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    success: ClassVar[str] = "correct"
    timeout_s: float | None = None
    processes: int = 2

    def warm_up(self) -> None:
        """Load what checks need, so that no check's `timeout_s` pays for it. Called once in each process that
        checks."""

    @abstractmethod
    def read_key(self, row: Mapping[str, Any]) -> KeyT:
        """Read what completions of a prompt are checked against. It is called for each prompt
        before the run, and again for each completion.

        Raises:
            DataError: the row lacks it, or it cannot be read; a phrase about the row, such as "has no
                `answer`". Any other error is told as a row that cannot be read.
        """

    @abstractmethod
    def verify(self, completion: str, key: KeyT) -> Verdict:
        """Check one completion."""
