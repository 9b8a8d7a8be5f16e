"""Whether a reward can be had now: found out by asking it, again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from conch.errors import RewardUnavailableError, first_line
from conch.log import get_logger
from conch.rewards.base import RewardSource

_log = get_logger(__name__)


class Readiness:
    """What is known of a source.

    was_reached: `check` has passed. Until then samples are refused; later they wait for a server that is
        away, as long as the source's own deadline allows.
    is_ready: it answered when it was asked last.
    reason: why it is not ready.

    on_reached: called once `check` has passed; may raise a `ConchError` where the source will not do.
    """

    def __init__(
        self, name: str, source: RewardSource, *, every_s: float, on_reached: Callable[[], object]
    ) -> None:
        self.was_reached = self.is_ready = False
        self.reason = "it was not asked yet"
        self.every_s = every_s
        self._name = name
        self._source = source
        self._on_reached = on_reached

    async def watch(self) -> None:
        """Ask until cancelled.

        Raises:
            ConchError: asking again will not help.
        """
        while True:
            await self._look()
            await asyncio.sleep(self.every_s)

    async def _look(self) -> None:
        reason = ""
        if self.was_reached:
            if not await asyncio.to_thread(self._source.is_ready):
                reason = "it does not answer"
        else:
            try:
                await asyncio.to_thread(self._source.check)
                self._on_reached()
                self.was_reached = True
            except RewardUnavailableError as error:
                reason = first_line(error)
        if reason and (self.is_ready or reason != self.reason):
            _log.warning("reward `%s` is not ready: %s; asking every %g s", self._name, reason, self.every_s)
        elif not reason and not self.is_ready:
            _log.info("reward `%s` is ready", self._name)
        self.is_ready, self.reason = not reason, reason
