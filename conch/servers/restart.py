"""The parent process of a server, which starts it again when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from conch.log import get_logger

_log = get_logger(__name__)

ENGINE_DIED = 70
"""Exit code of a server whose engine (vLLM, or what computes on a GPU) has died, or was killed while it
loaded (EX_SOFTWARE of sysexits.h)."""

PARENT_PID_VARIABLE = "CONCH_SERVER_PARENT"
"""Environment variable that holds the parent's process id, for the server below it."""

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0
_STABLE_S = 300.0
"""A server that has run this long is started again after the shortest pause."""

_POLL_S = 1.0
_SLICE_S = 0.1
_INTERRUPTED = 130


def run_and_restart(command: Sequence[str]) -> int:
    """Run a server, and start it again whenever it is killed or ends with `ENGINE_DIED`.

    The pause before a restart doubles each time, from 2 s to a minute. SIGTERM ends both processes, and so
    does Ctrl-C, which reaches the server directly. Call it from the main thread.

    Returns:
        The exit code: 0 after SIGTERM, 130 after Ctrl-C, else that of the server where it ended otherwise.
    """
    exit_codes: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def terminate(*_: object) -> None:
        exit_codes.append(0)
        for server in running:
            server.terminate()

    handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: exit_codes.append(_INTERRUPTED)),
    }
    environment = {**os.environ, PARENT_PID_VARIABLE: str(os.getpid())}
    pause_s = _FIRST_PAUSE_S
    try:
        while not exit_codes:
            started = time.monotonic()
            running[:] = [subprocess.Popen(command, env=environment)]
            if exit_codes:  # a signal came while the server was being started
                running[0].terminate()
            code = running[0].wait()
            if exit_codes:
                break
            if code >= 0 and code != ENGINE_DIED:
                return code
            pause_s = _FIRST_PAUSE_S if time.monotonic() - started > _STABLE_S else pause_s
            reason = (
                "has lost its engine" if code == ENGINE_DIED else f"was ended by {signal.Signals(-code).name}"
            )
            _log.warning("the server %s; it is started again in %g s", reason, pause_s)
            _sleep(pause_s, exit_codes)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return exit_codes[0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _sleep(seconds: float, exit_codes: Sequence[int]) -> None:
    """Sleep until a signal handler has put something into `exit_codes`."""
    end = time.monotonic() + seconds
    while not exit_codes and time.monotonic() < end:
        time.sleep(min(_SLICE_S, seconds))


def exit_with_parent(exit_server: Callable[[], None]) -> None:
    """In a server: call `exit_server`, from a thread, once the parent process is gone.

    Does nothing in a server that `run_and_restart` has not started.
    """
    parent = os.environ.get(PARENT_PID_VARIABLE)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(_POLL_S)
        exit_server()

    threading.Thread(target=watch, daemon=True, name="parent").start()


def leave_with_parent() -> None:
    """Let SIGTERM, or the end of the parent process, end this server with code 0."""
    # uvicorn raises SIGTERM once more after it has stopped, while an engine is still to be ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    exit_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))


def start(main: Callable[[], None], module: str, argv: Sequence[str], *, restart: bool) -> None:
    """Run a server: in a process below this one where it is to be started again, else here.

    main: serves, in this process.
    module: with `argv`, the command line of the process below.

    Raises:
        SystemExit: with the exit code of the process below.
    """
    if restart and PARENT_PID_VARIABLE not in os.environ:
        raise SystemExit(run_and_restart([sys.executable, "-m", module, *argv]))
    main()
