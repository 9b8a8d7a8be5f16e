"""A rollout server that is started again when it dies: the process above it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from conch.log import get_logger

_log = get_logger(__name__)

DIED = 70
"""Exit code of a server whose vLLM has died, or was killed as it loaded (EX_SOFTWARE of sysexits.h)."""

KEEPER = "CONCH_ROLLOUT_KEEPER"
"""Variable by which a keeper tells the server below it its own id."""

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0
_LIVED_S = 300.0
"""Who lived that long begins anew with the shortest pause."""

_LOOK_S = 1.0
_SLICE_S = 0.1
_INTERRUPTED = 130


def keep(command: Sequence[str]) -> int:
    """Run a server; one that is killed, or ends with `DIED`, is started again after a pause that doubles.

    SIGTERM ends both, as Ctrl-C does, which reaches the server by itself. Call it from the main thread.

    Returns:
        The exit code: 0 after SIGTERM, 130 after Ctrl-C, else that of a server that ended otherwise.
    """
    told: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def leave(*_: object) -> None:
        told.append(0)
        for server in running:
            server.terminate()

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, leave),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: told.append(_INTERRUPTED)),
    }
    pause_s = _FIRST_PAUSE_S
    try:
        while not told:
            started = time.monotonic()
            running[:] = [subprocess.Popen(command, env={**os.environ, KEEPER: str(os.getpid())})]
            if told:  # while it was being started
                running[0].terminate()
            code = running[0].wait()
            if told:
                break
            if code >= 0 and code != DIED:
                return code
            pause_s = _FIRST_PAUSE_S if time.monotonic() - started > _LIVED_S else pause_s
            _log.warning("the rollout server %s; it is started again in %g s", _how(code), pause_s)
            _pause(pause_s, told)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return told[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pause(seconds: float, told: Sequence[int]) -> None:
    end = time.monotonic() + seconds
    while not told and time.monotonic() < end:
        time.sleep(min(_SLICE_S, seconds))


def _how(code: int) -> str:
    return "has lost its vLLM" if code == DIED else f"was ended by {signal.Signals(-code).name}"


def leave_with_keeper(leave: Callable[[], None]) -> None:
    """In a server: call `leave`, from a thread, once the keeper that started it is gone. Without one, nothing
    happens."""
    keeper = os.environ.get(KEEPER)
    if keeper is None:
        return

    def watch() -> None:
        while os.getppid() == int(keeper):
            time.sleep(_LOOK_S)
        leave()

    threading.Thread(target=watch, daemon=True, name="keeper").start()
