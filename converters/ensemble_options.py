"""What an ensemble is asked to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conch.converters.conversion import check_name
from conch.errors import ConversionError
from conch.serving.ensemble_manifest import Objective, OnMemberFailure


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
        check_name(self.name)
        if not (math.isfinite(self.uwo_weight) and self.uwo_weight >= 0):
            raise ConversionError(f"uwo_weight is {self.uwo_weight}; it must be a number of at least 0")
