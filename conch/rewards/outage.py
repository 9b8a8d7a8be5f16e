"""Waiting for a reward server that is away, in lock step on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, NoReturn, Protocol, runtime_checkable

from conch.config import RewardFailureConfig
from conch.log import get_logger
from conch.rewards.metrics import OverlapTimer
from conch.types import RewardResult, Rollout

_log = get_logger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_SLICE_S = 1.0
"""Longest sleep between two looks at the hooks: a signal to leave is answered within about this time."""

_LOG_EVERY_S = 60.0

AllReduceInt = Callable[[int], int]
"""Sums an integer over all ranks; a collective, so every rank must call it equally often."""


@runtime_checkable
class OutageHooks(Protocol):
    """Actions of a run that its scorer calls for."""

    def save(self) -> None:
        """Write a checkpoint of the start of the step or evaluation under way; called on all ranks.

        Raises:
            CheckpointError: on all ranks.
        """
        ...

    def leaving(self) -> bool:
        """True once this process was told to leave."""
        ...

    def leave(self) -> NoReturn:
        """Save unless that has been done, and end the program; called on all ranks."""
        ...

    def scored(self, rollouts: Sequence[Rollout], results: Sequence[RewardResult]) -> None:
        """Take note of this rank's final results, failures among them; called on all ranks."""
        ...


class Outage:
    """One absence of a server, from its discovery on.

    All methods but `log_end` are collectives: whether to go on, to save or to leave is agreed, for clocks and
    signals differ between ranks.

    name: the source's, for messages.
    overlap: timer that gets the time spent waiting.
    hooks: on all ranks or on none.
    """

    def __init__(
        self,
        name: str,
        config: RewardFailureConfig,
        all_reduce: AllReduceInt,
        overlap: OverlapTimer,
        hooks: OutageHooks | None,
    ) -> None:
        self._name = name
        self._config = config
        self._all_reduce = all_reduce
        self._overlap = overlap
        self._hooks = hooks
        self._started = time.monotonic()
        self._next_log_s = 0.0
        self._rounds = 0
        self._saved = False

    def pause(self) -> bool:
        """Pause before the next attempt. False, after a checkpoint, once `wait_budget_s` is spent."""
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(self._rounds, 10), _LONGEST_PAUSE_S)
        self._rounds += 1
        while pause_s > 0 and not self._is_spent():  # as often on all ranks: pauses are not cut by clocks
            self._run_hooks()
            time.sleep(min(pause_s, _SLICE_S))
            self._overlap.block(min(pause_s, _SLICE_S), idle=True)
            pause_s -= _SLICE_S
        if not self._is_spent():
            return True
        self._save()
        return False

    def wait_for(self, future: Future[Any] | None) -> None:
        """Wait until the futures of all ranks are done. None: this rank has nothing to wait for."""
        while self._all_reduce(int(future is not None and not future.done())):
            self._run_hooks()
            if future is not None:
                started = time.monotonic()
                wait([future], _SLICE_S)
                self._overlap.block(time.monotonic() - started)

    def log_end(self) -> None:
        """Log that all scores are there."""
        _log.info("reward server %s is back after %.0f s", self._name, self._elapsed_s)

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _is_spent(self) -> bool:
        return self._all_reduce(int(self._elapsed_s >= self._config.wait_budget_s)) > 0

    def _run_hooks(self) -> None:
        """Log, save or leave, as each is due."""
        if self._elapsed_s >= self._next_log_s:
            self._next_log_s += _LOG_EVERY_S
            left_s = self._config.wait_budget_s - self._elapsed_s
            _log.warning(
                "reward server %s away for %.0f s, asking again for %.0f s more",
                *(self._name, self._elapsed_s, left_s),
            )
        if self._hooks is None:
            return
        if self._all_reduce(int(self._hooks.leaving())):
            self._hooks.leave()
        if not self._saved and self._all_reduce(int(self._elapsed_s >= self._config.checkpoint_after_s)):
            self._save()

    def _save(self) -> None:
        if self._hooks is not None and not self._saved:
            self._hooks.save()
            self._saved = True
