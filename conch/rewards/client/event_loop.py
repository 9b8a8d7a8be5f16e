"""An asyncio loop in a thread of its own: the training thread waits for rewards only where it wants to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from conch.log import get_logger

_log = get_logger(__name__)
_CLOSE_TIMEOUT_S = 5.0

ResultT = TypeVar("ResultT")


class LoopThread:
    """Runs coroutines in one background thread until `close`.

    The thread is a daemon: a user's function that never returns cannot keep the program from ending.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = False
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Start `coroutine` in the thread and return at once."""
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{self._thread.name} is closed: nothing can be submitted any more")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, cleanup: Callable[[], Awaitable[None]] | None = None) -> None:
        """Cancel what is under way, await `cleanup()` there, join the thread. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._wind_down(cleanup), self._loop).result(_CLOSE_TIMEOUT_S)
        except FutureTimeout:
            _log.warning(
                "%s is still busy after %g s and is left behind", self._thread.name, _CLOSE_TIMEOUT_S
            )
            return
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)

    async def _wind_down(self, cleanup: Callable[[], Awaitable[None]] | None) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if cleanup is not None:
            await cleanup()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
