"""The run configuration of each algorithm, without its trainer: to read settings takes no torch.

`conch.config.algorithms.ppo` has the sections that `conch.trainers.ppo` runs by, its `RUN_CONFIG` all of them
together, and so for each file of `trainers/`. Sections that several algorithms share have files of their own.
"""

from __future__ import annotations

from importlib import import_module

from conch.config.run import RunConfig


def run_config_of(algorithm: str) -> type[RunConfig]:
    """Return what `conch.trainers.<algorithm>` runs by."""
    return import_module(f"{__name__}.{algorithm}").RUN_CONFIG
