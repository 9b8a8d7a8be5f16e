"""What a judge is called where a reward is named; loads nothing that a run without one would not need."""

from __future__ import annotations

JUDGE = "judge:"
"""Before the name of a judge's YAML file, where an address could stand too."""
