"""The client of Conch's own servers, closed while another thread waits for an answer."""

from __future__ import annotations

import socket
import threading
import time

from conch.config import AuthConfig
from conch.errors import RolloutError, RolloutUnavailableError
from conch.servers.client import HttpClient


def test_who_waits_for_an_answer_is_told_that_the_client_is_closed() -> None:
    """Else the process could not end: its thread would wait on a connection that is gone."""
    failures: list[Exception] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = HttpClient(
            f"127.0.0.1:{listener.getsockname()[1]}",
            AuthConfig(),
            section="rollout",
            what="rollout server",
            timeout_s=600.0,
            refused=RolloutError,
            unavailable=RolloutUnavailableError,
        )

        def ask() -> None:
            try:
                client.ask("POST", "/weights", content="{}")
            except RolloutError as error:
                failures.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1 << 16)  # the request is there; no answer comes
            time.sleep(0.5)  # for the thread to wait in the kernel
            client.close()
            asking.join(15)
    assert not asking.is_alive()
    assert isinstance(failures[0], RolloutUnavailableError)
