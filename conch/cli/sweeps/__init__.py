"""Sweeps: `--multirun` runs a program once for each combination of values, or searches (`sweep.py`)."""

from __future__ import annotations

from conch.cli.sweeps.plan import Request
from conch.cli.sweeps.settings import SweepConfig
from conch.cli.sweeps.sweep import run_sweep

__all__ = ["Request", "SweepConfig", "run_sweep"]
