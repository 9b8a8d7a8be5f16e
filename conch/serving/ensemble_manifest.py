"""The `manifest.json` of an ensemble; its `golden.json` is like any model's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conch.config import Section
from conch.serving.manifest import ParitySummary
from conch.serving.spec import Form

Objective = Literal["mean", "wco", "uwo"]
OnMemberFailure = Literal["fail", "renormalise"]


class EnsembleMember(Section):
    """One model of the store whose score goes into the combined reward."""

    name: str
    """Model in the same store."""

    reward: str
    """Which of its rewards is used."""

    column: int = Field(ge=0)
    """Where that reward stands in the model's `rewards`."""

    columns: int = Field(ge=1)
    """How many rewards the model returns."""

    version: int
    """Version that the ensemble was made with."""

    content_sha256: str
    """Hash of that version's manifest."""


class EnsembleManifest(Section):
    """Who the members are and how their scores become one. The ensemble's `model.py` reads it."""

    format: Literal[1] = 1
    """Version of this file's layout."""

    name: str
    """Model the version belongs to."""

    form: Form
    """`text` or `token`, the same for all members."""

    created_at: str
    """Time of writing, UTC, ISO 8601."""

    members: tuple[EnsembleMember, ...] = Field(min_length=2)
    """The members, in the order of the columns of `member_rewards`."""

    objective: Objective
    """`mean`: mean of the scores. `wco`: the lowest. `uwo`: mean - uwo_weight * population variance."""

    uwo_weight: float = Field(ge=0, allow_inf_nan=False)
    """Weight of the variance; used by `uwo` alone."""

    on_member_failure: OnMemberFailure
    """A sample without one member's score: `fail` refuses it, `renormalise` combines the scores there are."""

    reward_names: tuple[str]
    """Name of the combined reward."""

    max_length: int = Field(ge=1)
    """The lowest limit of the members, in tokens."""

    tools: dict[str, str]
    """Versions of python and numpy."""

    parity: ParitySummary | None = None
    """Result of the comparison with the formula; None only while it runs."""

    files: dict[str, str] = Field(default_factory=dict)
    """Path below the version folder -> sha256, for every other file."""
