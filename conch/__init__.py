"""Conch: train language models with RL from reward models served by NVIDIA Triton Inference Server."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from conch.machine.imports import uncollected
from conch.machine.processors import let_others_work

if TYPE_CHECKING:
    from conch import runs as runs
    from conch.api import train as train
    from conch.rewards.score import score as score

__version__ = "0.1.0"
__all__ = ["runs", "score", "train"]

let_others_work()  # before torch, which loads OpenMP


def __getattr__(name: str) -> Any:
    # `import conch` must stay fast and free of torch: the trainers are loaded at first use.
    if name == "train":
        # In a notebook, of tqdm, where it lacks a package for bars that Conch does not show.
        warnings.filterwarnings("ignore", message="IProgress not found")
        with uncollected():
            from conch.api import train

        return train
    if name == "score":
        from conch.rewards.score import score

        return score
    if name == "runs":
        from importlib import import_module

        return import_module("conch.runs")
    raise AttributeError(f"module 'conch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
