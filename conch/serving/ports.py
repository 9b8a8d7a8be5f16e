"""Ports of this machine."""

from __future__ import annotations

import errno
import socket

from conch.errors import ServerStartError


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
