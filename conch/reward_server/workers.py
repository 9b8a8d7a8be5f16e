"""Several processes on one port, for rewards that compute in Python."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from conch.errors import ServerStartError
from conch.log import get_logger
from conch.reward_server.metrics import PROCESSES_FOLDER
from conch.servers.restart import PARENT_PID_VARIABLE
from conch.servers.settings import ListenSettings
from conch.servers.shared_folder import SharedFolder

_log = get_logger(__name__)

WORKER_VARIABLE = "CONCH_REWARD_WORKER"
"""Environment variable with the number of a process that shares its port."""

_PREFIX = "conch-reward-metrics"
_LEAVE_S = 5.0
_PAUSE_S = 2.0
_POLL_S = 0.1


def is_worker() -> bool:
    """Whether this process is one of several."""
    return WORKER_VARIABLE in os.environ


def shared_figures() -> SharedFolder:
    """In one of several processes: the folder in which all of them keep their figures. Who leaves last
    removes it, since the process above may have been killed."""
    return SharedFolder(_PREFIX, os.environ[PARENT_PID_VARIABLE])


def shared_socket(settings: ListenSettings) -> list[socket.socket]:
    """A socket on the port that other processes listen on as well: the kernel shares connections out."""
    return [_bound(settings, socket.SO_REUSEADDR, socket.SO_REUSEPORT)]


def refuse_used_port(settings: ListenSettings) -> None:
    """Find out whether anybody listens on the port: a second server that shares it would get a part of the
    first one's requests.

    Processes of a server that was killed have some seconds to leave.

    Raises:
        ServerStartError: somebody does.
    """
    deadline = time.monotonic() + _LEAVE_S
    while True:
        try:
            _bound(settings, socket.SO_REUSEADDR).close()
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ServerStartError(
                    f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}): stop what "
                    "listens there, or give another `port`"
                ) from error
        time.sleep(_POLL_S)


def _bound(settings: ListenSettings, *options: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:
        for option in options:
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((settings.host, settings.port))
    except OSError:
        listener.close()
        raise
    return listener


def run_workers(number: int, command: Sequence[str]) -> int:
    """Run so many processes until SIGTERM, and start one that was killed again.

    command: starts one, which finds its number in `WORKER_VARIABLE`.

    Returns:
        The exit code: 0 after SIGTERM, else that of the first process that ended by itself; the others are
        then ended too.
    """
    stopping: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.append(0))
    with SharedFolder(_PREFIX, str(os.getpid())) as shared:
        folder = str(shared.path)
        environment = {**os.environ, PROCESSES_FOLDER: folder, PARENT_PID_VARIABLE: str(os.getpid())}
        workers = [_start(command, environment, index) for index in range(number)]
        try:
            while not stopping:
                time.sleep(_POLL_S)
                for index, worker in enumerate(workers):
                    code = worker.poll()
                    if code is None:
                        continue
                    if code >= 0:
                        stopping.append(code)
                        break
                    _log.warning(
                        "worker %d was ended by %s; it is started again", index, signal.Signals(-code).name
                    )
                    _forget(worker.pid, folder)
                    time.sleep(_PAUSE_S)
                    workers[index] = _start(command, environment, index)
            return stopping[0]
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
            signal.signal(signal.SIGTERM, previous)


def _start(command: Sequence[str], environment: dict[str, str], index: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env={**environment, WORKER_VARIABLE: str(index)})


def _forget(process_id: int, folder: str) -> None:
    """Take out what a process that is gone showed at this moment."""
    for name in os.listdir(folder):
        if name.startswith("gauge_live") and name.endswith(f"_{process_id}.db"):
            os.remove(os.path.join(folder, name))
