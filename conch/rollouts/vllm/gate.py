"""Who goes first in a vLLM server: completions, or new weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from conch.errors import RolloutError
from conch.rollouts.protocol import GenerateRequest, WeightVersion


@dataclass(eq=False)
class RowUnderWay:
    """A completion that vLLM has. version: of the weights that its next token is sampled from."""

    source: str
    version: int
    is_exact: bool


class Gate:
    """Lets completions to vLLM, and new weights between them.

    Of requests for some version or a later one it lets in as many completions as vLLM samples at once: those
    that wait in vLLM's own queue would have begun, and new weights are to go before what has not.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._changed = asyncio.Event()
        self._weights: WeightVersion | None = None
        self._rows: set[RowUnderWay] = set()
        self._failed_loads = 0

    @asynccontextmanager
    async def row(self, request: GenerateRequest, version: int) -> AsyncIterator[RowUnderWay]:
        """Inside, a completion is under way.

        version: of the weights of an exact request, which is let in at once.

        Raises:
            RolloutError: the weights that it waits for, or goes on with, were not loaded.
        """
        row = RowUnderWay(request.weights.source, version, is_exact=not request.or_later)
        failed = self._failed_loads
        if not row.is_exact:
            await self._until(lambda: self._failed_loads != failed or (self._weights and self._free > 0))
            self._check_loaded(failed)
            assert self._weights is not None
            if self._weights.source != row.source:
                raise RolloutError(f"the weights of another run, {self._weights.source}, have come")
            row.version = self._weights.version
            self._free -= 1
        self._rows.add(row)
        try:
            yield row
            if not row.is_exact:
                self._check_loaded(failed)
        finally:
            self._rows.remove(row)
            self._free += not row.is_exact
            self._notify()

    def _check_loaded(self, failed: int) -> None:
        if self._failed_loads != failed:
            raise RolloutError("new weights were not loaded, and those that were here are gone")

    @asynccontextmanager
    async def closed(self, weights: WeightVersion, *, is_base: bool, goes_on: bool) -> AsyncIterator[None]:
        """Inside, new weights are loaded: nothing begins, and nothing is under way but what `goes_on`.

        weights: version of what is held afterwards; that of a base cannot be sampled from.
        goes_on: True lets completions for these weights or earlier ones of their run stay under way.
        """
        self._weights = None
        try:
            await self._until(
                lambda: all(
                    goes_on and not row.is_exact and row.source == weights.source for row in self._rows
                )
            )
            yield
        except BaseException:
            self._failed_loads += 1
            raise
        else:
            for row in self._rows:
                row.version = weights.version
            self._weights = None if is_base else weights
        finally:
            self._notify()

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        """Have all who wait look again, in the order in which they came."""
        self._changed.set()
        self._changed = asyncio.Event()
