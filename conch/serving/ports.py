"""Ports of this machine."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable

from conch.errors import ServerStartError

_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 5.0


def free_port(host: str) -> int:
    """A port that nobody listens on now.

    Raises:
        ServerStartError: `host` is no address of this machine.
    """
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ServerStartError(
                f"cannot listen on {host} ({error.strerror}); give an IPv4 address or name of this machine"
            ) from error
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raise ServerStartError if `port` does not exist or is taken."""
    if not 0 < port < 65_536:
        raise ServerStartError(f"port {port} does not exist; choose one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ServerStartError(
                f"port {port} on {host or 'this machine'} {taken}; "
                "stop what listens there or choose another port"
            ) from error


def wait_until_open(host: str, port: int, *, is_alive: Callable[[], bool], deadline: float) -> None:
    """Return once somebody listens there.

    deadline: on the clock of `time.monotonic`.

    Raises:
        ServerStartError: the server died, or did not open the port in time.
    """
    while not _is_open(host, port):
        if not is_alive():
            raise ServerStartError(f"tritonserver died before it opened port {port}")
        if time.monotonic() > deadline:
            raise ServerStartError(f"port {port} on {host} was not opened in time; give it longer")
        time.sleep(_POLL_S)


def _is_open(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
