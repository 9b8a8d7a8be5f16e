"""Tests check the annotations of the library: a wrong argument or shape does not go by unseen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

from conch.ops import logprobs_of_labels
from conch.rewards.scorer import weight_of
from conch.types import Prompt
from tests import type_checks

pytestmark = pytest.mark.skipif(
    os.environ.get("CONCH_TESTS_CHECK_TYPES") == "0", reason="types are not checked in this run"
)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: weight_of(5, {}),  # pyright: ignore[reportArgumentType]
        lambda: Prompt("text", ["1"]),  # pyright: ignore[reportArgumentType]
        lambda: logprobs_of_labels(torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.long), 1.0),
    ],
    ids=["a function", "a dataclass", "axes of two arguments"],
)
def test_a_wrong_argument_is_refused(wrong: Callable[[], Any]) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        wrong()


def test_each_closure_of_a_function_is_checked_and_is_itself() -> None:
    def make(offset: Any) -> Callable[[Any], Any]:
        def add(number: int, /, *, twice: bool = False) -> int:
            return (number + offset) * (1 + twice)

        return type_checks.checked(add)

    first, second, wrong = make(1), make(2), make("a")
    assert (first(1), second(1), second(1, twice=True)) == (2, 3, 6)  # pyright: ignore[reportCallIssue]
    for call in (lambda: first("1"), lambda: second("1"), lambda: make(0.5)(1)):
        with pytest.raises(jaxtyping.TypeCheckError):
            call()
    with pytest.raises(TypeError, match="unsupported operand"):
        wrong(1)
