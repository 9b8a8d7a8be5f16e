"""Calls of reward functions as TRL makes them, without it: tests/integration/test_interop_trl_peers.py holds
them against those of the real trainers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Logged:
    """What a reward function has logged by the functions that TRL hands it."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(value)

    def log_extra(self, column: str, values: list[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)


def of_grpo(
    logged: Logged, prompts: list[Any], completions: list[Any], **columns: list[Any]
) -> dict[str, Any]:
    """The keyword arguments of TRL 1.16's GRPOTrainer and RLOOTrainer.

    prompts, completions: texts, or lists of messages.
    columns: of the dataset, repeated for each completion of a prompt.
    """
    return {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [[3, 1, 2]] * len(prompts),
        **columns,
        "trainer_state": SimpleNamespace(global_step=1),
        "log_extra": logged.log_extra,
        "log_metric": logged.log_metric,
    }


def of_async_grpo(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> dict[str, Any]:
    """The keyword arguments of its AsyncGRPOTrainer: a whole group, and nothing but columns beside it."""
    return {
        "completions": completions,
        "prompts": prompts,
        "completion_ids": [[3, 1, 2]] * len(prompts),
        **columns,
    }
