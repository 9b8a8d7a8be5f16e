"""Verifiers of a user's, odd ones too, in a module of light imports: the processes that check import it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from conch.errors import DataError
from conch.rewards import Verdict, Verifier


def unchecked(scores: dict[str, Any], facts: dict[str, Any]) -> Verdict:
    """A verdict of any values: the types are checked in tests alone."""
    verdict = Verdict({})
    object.__setattr__(verdict, "scores", scores)
    object.__setattr__(verdict, "facts", facts)
    return verdict


ODD: dict[str, Any] = {
    "none": None,
    "number": 1.0,
    "null": unchecked({"answer": None, "format": 0.0}, {}),
    "text": unchecked({"answer": "yes", "format": 0.0}, {}),
    "empty": Verdict({}),
    "no fact": unchecked({"answer": 1.0, "format": 0.0}, {"correct": None}),
    "numpy": unchecked({"answer": np.float32(1), "format": np.int64(0)}, {"correct": np.bool_(True)}),
}
"""What a verifier of a user's may give, by the completion that it gives it for."""


class Letter(Verifier[str]):
    """Right where the completion begins with the row's letter; 0.5 more for an even number of letters."""

    name = "letter"
    columns = ("letter",)

    def read_key(self, row: Mapping[str, Any]) -> str:
        if row.get("letter") == 0:
            raise ZeroDivisionError("by design")
        if not isinstance(row.get("letter"), str):
            raise DataError("has no `letter`")
        return row["letter"]

    def verify(self, completion: str, key: str) -> Verdict:
        if completion == "broken":
            raise ZeroDivisionError("by design")
        if completion in ODD:
            return ODD[completion]
        if completion == "nan":
            return Verdict({"answer": math.nan, "format": 0.0}, {"correct": math.nan})
        right = float(completion.startswith(key))
        return Verdict({"answer": right, "format": 0.5 * (len(completion) % 2 == 0)}, {"correct": right})


class Slow(Letter):
    """The same in processes: sleeps for "late", dies for "dead"."""

    timeout_s = 1.0
    processes = 1

    def verify(self, completion: str, key: str) -> Verdict:
        if completion == "late":
            time.sleep(60)
        if completion == "dead":
            os._exit(3)
        return super().verify(completion, key)
