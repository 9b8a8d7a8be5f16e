"""Where the members of a broadcast meet: a store on one address of the trainer, for those who know its token.

torch's own store listens on all addresses of the machine, and whoever reaches it may read and write what the
members tell each other. Here it listens on one, and what is written is signed with a token that is made for
this one broadcast and travels in the request to the server. A stranger can spoil a broadcast, which then
fails and is tried again, but neither take a member's place nor lead the members elsewhere. The tensors
themselves travel as gloo and NCCL send them: in plain text.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import (
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from conch.errors import RolloutUnavailableError, first_line

_CONNECT_S = 30.0
_POLL_S = 0.005
_DIGEST_BYTES = 32


class SignedStore(Store):
    """A store whose keys and values only those can make who know `token`; for process groups of torch.

    port: of the store, on the trainer.
    """

    def __init__(self, store: TCPStore, token: str) -> None:
        super().__init__()
        self.token = token
        self.port = store.port
        self._store = store
        self._key_bytes = token.encode()

    def set(self, key: str, value: Any) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(self._name(key), self._signature(key, content) + content)  # pyright: ignore[reportArgumentType]

    def get(self, key: str) -> bytes:
        """The value of a key, as soon as it is there.

        Raises:
            RolloutUnavailableError: somebody without the token has written it.
        """
        signed = bytes(self._store.get(self._name(key)))
        signature, content = signed[:_DIGEST_BYTES], signed[_DIGEST_BYTES:]
        if not hmac.compare_digest(signature, self._signature(key, content)):
            raise RolloutUnavailableError(
                f"a stranger has written to the store on port {self.port} in which trainer and rollout "
                "server meet: close the network between them to others"
            )
        return content

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check([self._name(key) for key in keys])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        names = [self._name(key) for key in keys]
        if timeout is None:
            self._store.wait(names)
        else:
            self._store.wait(names, timeout)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._name(key))

    def has_extended_api(self) -> bool:
        return False

    def clone(self) -> SignedStore:
        return SignedStore(self._store.clone(), self.token)  # pyright: ignore[reportAttributeAccessIssue]

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        return self._store.timeout  # pyright: ignore[reportAttributeAccessIssue]

    def _name(self, key: str) -> str:
        return hmac.new(self._key_bytes, b"key " + key.encode(), "sha256").hexdigest()

    def _signature(self, key: str, content: bytes) -> bytes:
        return hmac.new(self._key_bytes, b"value " + key.encode() + b"\0" + content, "sha256").digest()


def open_store(address: str, timeout_s: float) -> SignedStore:
    """Open the store in which a group's members meet, on a free port and with a token of its own.

    address: of this machine, as the members reach it; the store listens there alone.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = listener.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store closes it
    )
    return SignedStore(store, secrets.token_hex(16))


def join(host: str, port: int, token: str, *, rank: int, timeout_s: float) -> SignedStore:
    """Come to a store as member `rank`, and return it; see `wait_for_members`.

    The store is there before anyone is told of it: where nobody listens, its owner has died. torch would go
    on trying for twice the time that it is given.

    timeout_s: longest wait for a value of the store.

    Raises:
        RolloutUnavailableError: nobody listens there.
    """
    connect_s = min(timeout_s, _CONNECT_S)
    try:
        socket.create_connection((host, port), timeout=connect_s).close()
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=connect_s))
        store.set_timeout(timedelta(seconds=timeout_s))
    except (OSError, RuntimeError) as error:
        raise RolloutUnavailableError(
            f"the trainer's store at {host}:{port} cannot be reached: {first_line(error)[:300]}"
        ) from error
    signed = SignedStore(store, token)
    signed.set(f"joined {rank}", "")
    return signed


def wait_for_members(store: SignedStore, count: int, is_over: Callable[[], bool], timeout_s: float) -> bool:
    """True once members 1 to `count` have called `join`; False where `is_over` says that they never will, or
    after `timeout_s`.

    Raises:
        RolloutUnavailableError: see `SignedStore.get`.
    """
    end = time.monotonic() + timeout_s
    names = [f"joined {rank}" for rank in range(1, count + 1)]
    while not store.check(names):
        if is_over() or time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    for name in names:
        store.get(name)
    return True


def address_towards(host: str, port: int) -> str:
    """This machine's address on the route to another machine. Sends nothing."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
        probe.connect(family[4])
        return str(probe.getsockname()[0])
