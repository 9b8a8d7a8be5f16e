"""What a run leaves on disk: checkpoints, metrics, plots; `conch.runs.load` reads it back."""

from __future__ import annotations

from conch.runs.reading import Run as Run
from conch.runs.reading import load as load

__all__ = ["Run", "load"]
