"""A port that a server cannot have is told before it loads anything."""

from __future__ import annotations

import socket

import pytest

from conch.errors import ServerStartError
from conch.servers.listening import check_port
from conch.servers.settings import ListenSettings


def test_port_that_is_free_may_be_listened_on_also_right_behind_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            connection, _ = server.accept()
            connection.close()  # by this side first: its address stays in TIME_WAIT
    check_port(ListenSettings(port=port))


def test_port_that_another_listens_on_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ServerStartError, match=f"`port` = {port} of `host` = 127.0.0.1 cannot .*in use"):
            check_port(ListenSettings(port=port))


def test_address_of_another_machine_is_told() -> None:
    with pytest.raises(ServerStartError, match=r"`host` = 192\.0\.2\.7 cannot be listened on"):
        check_port(ListenSettings(host="192.0.2.7", allow_anyone=True))
