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
"""Exit code of a server whose vLLM has died (EX_SOFTWARE of sysexits.h)."""

KEEPER = "CONCH_ROLLOUT_KEEPER"
"""Variable by which a keeper tells the server below it its own id."""

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0
_LIVED_S = 300.0
"""Who lived that long begins anew with the shortest pause."""

_LOOK_S = 1.0


def keep(command: Sequence[str]) -> int:
    """Run a server; one that is killed, or ends with `DIED`, is started again after a pause that doubles.

    SIGTERM ends both. Call it from the main thread.

    Returns:
        The exit code of a server that ended otherwise, by itself or because it was told to.
    """
    over = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def leave(*_: object) -> None:
        over.set()
        for server in running:
            server.terminate()

    before = signal.signal(signal.SIGTERM, leave)
    pause_s = _FIRST_PAUSE_S
    try:
        while True:
            started = time.monotonic()
            running[:] = [subprocess.Popen(command, env={**os.environ, KEEPER: str(os.getpid())})]
            if over.is_set():  # told so while it was being started
                running[0].terminate()
            code = _code_of(running[0])
            if over.is_set() or not (code < 0 or code == DIED):
                return max(code, 0)
            pause_s = _FIRST_PAUSE_S if time.monotonic() - started > _LIVED_S else pause_s
            _log.warning("the rollout server %s; it is started again in %g s", _how(code), pause_s)
            if over.wait(pause_s):
                return 0
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    finally:
        signal.signal(signal.SIGTERM, before)


def _code_of(server: subprocess.Popen[bytes]) -> int:
    """Wait for its end. Ctrl-C reaches it by itself, and is its affair."""
    while True:
        try:
            return server.wait()
        except KeyboardInterrupt:
            continue


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
