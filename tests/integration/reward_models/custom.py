"""Custom classes: replicas whose score only the code that comes with them computes, and pairwise models."""

from __future__ import annotations

from tests.integration.reward_models.replica import Replica

CUSTOM: tuple[Replica, ...] = ()
