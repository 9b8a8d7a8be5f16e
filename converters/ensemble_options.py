"""What an ensemble is asked to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conch.errors import ConversionError
from conch.serving.ensemble_manifest import Objective, OnMemberFailure
from conch.serving.store import is_valid_name


@dataclass(frozen=True, slots=True)
class EnsembleOptions:
    """The arguments of `to_ensemble`, which documents them.

    Raises:
        ConversionError: the name or the weight is wrong.
    """

    name: str
    objective: Objective
    uwo_weight: float
    on_member_failure: OnMemberFailure

    def __post_init__(self) -> None:
        if not is_valid_name(self.name):
            raise ConversionError(
                f"model name {self.name!r} cannot be a folder of the store: "
                "give --name with letters, digits, dots, dashes and underscores only"
            )
        if not (math.isfinite(self.uwo_weight) and self.uwo_weight >= 0):
            raise ConversionError(f"uwo_weight is {self.uwo_weight}; it must be a number of at least 0")
