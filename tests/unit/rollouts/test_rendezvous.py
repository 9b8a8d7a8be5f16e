"""The store in which trainer and servers meet for a broadcast, and strangers who come to it."""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from conch.errors import RolloutUnavailableError
from conch.rollouts.rendezvous import SignedStore, join, open_store, wait_for_members
from conch.rollouts.weight_sync import BroadcastGroup
from tests.footprint import wait_until

LONG_S = 60.0


def stranger_at(store: SignedStore) -> TCPStore:
    """A client of torch's own, which knows no token."""
    return TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=LONG_S))


def after(looks: int):
    """Gives False that many times, then True."""
    left = iter([False] * looks)
    return lambda: next(left, True)


def test_store_listens_on_its_address_alone() -> None:
    store = open_store("127.0.0.1", LONG_S)
    with socket.create_connection(("127.0.0.1", store.port), timeout=LONG_S):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=LONG_S)


def test_members_with_the_token_are_counted() -> None:
    store = open_store("127.0.0.1", LONG_S)
    members = [join("127.0.0.1", store.port, store.token, rank=rank, timeout_s=LONG_S) for rank in (1, 2)]
    assert wait_for_members(store, 2, lambda: False, LONG_S)
    assert not wait_for_members(store, 3, after(3), LONG_S)
    store.set("greeting", "hello")
    assert all(member.get("greeting") == b"hello" for member in members)


@pytest.mark.parametrize("token", ["", "0123456789abcdef0123456789abcdef"])
def test_member_without_the_token_or_with_another_is_not_counted(token: str) -> None:
    store = open_store("127.0.0.1", LONG_S)
    join("127.0.0.1", store.port, token, rank=1, timeout_s=LONG_S)
    stranger_at(store).set("joined 1", "")
    assert not wait_for_members(store, 1, after(3), LONG_S)


def test_each_broadcast_has_a_token_of_its_own_that_the_store_does_not_tell() -> None:
    first, second = open_store("127.0.0.1", LONG_S), open_store("127.0.0.1", LONG_S)
    assert first.token != second.token and len(first.token) == 32
    join("127.0.0.1", first.port, first.token, rank=1, timeout_s=LONG_S)
    stranger = stranger_at(first)
    (name,) = stranger.list_keys()  # pyright: ignore[reportAttributeAccessIssue]
    assert first.token not in name and "joined" not in name
    assert first.token.encode() not in stranger.get(name)


def test_what_a_stranger_writes_over_is_found_out() -> None:
    store = open_store("127.0.0.1", LONG_S)
    member = join("127.0.0.1", store.port, store.token, rank=1, timeout_s=LONG_S)
    stranger = stranger_at(store)
    (name,) = stranger.list_keys()  # pyright: ignore[reportAttributeAccessIssue]
    stranger.set(name, "x" * 40)
    with pytest.raises(RolloutUnavailableError, match="a stranger has written to the store on port"):
        wait_for_members(store, 1, lambda: False, LONG_S)
    member.set("address", "mine")
    moved = next(each for each in stranger.list_keys() if each != name)  # pyright: ignore[reportAttributeAccessIssue]
    stranger.set(name, stranger.get(moved))  # a right signature, of another key
    with pytest.raises(RolloutUnavailableError, match="a stranger has written"):
        store.get("joined 1")


def test_member_whom_a_stranger_leads_elsewhere_does_not_go() -> None:
    store = open_store("127.0.0.1", LONG_S)
    member = join("127.0.0.1", store.port, store.token, rank=1, timeout_s=LONG_S)
    stranger = stranger_at(store)
    (joined,) = stranger.list_keys()  # pyright: ignore[reportAttributeAccessIssue]

    def group(side: SignedStore, rank: int) -> BroadcastGroup:
        return BroadcastGroup(side, rank, 2, "gloo", address="127.0.0.1", timeout_s=1.0)

    with ThreadPoolExecutor(1) as thread:
        trainer = thread.submit(group, store, 0)
        wait_until(lambda: len(stranger.list_keys()) > 1, lambda: "the trainer said nothing")  # pyright: ignore[reportAttributeAccessIssue]
        for name in stranger.list_keys():  # pyright: ignore[reportAttributeAccessIssue]
            if name != joined:
                stranger.set(name, "where the stranger listens")
        with pytest.raises(RolloutUnavailableError, match="a stranger has written to the store"):
            group(member, 1)
        with contextlib.suppress(RolloutUnavailableError):  # gloo may notice, or the server's answer tells
            trainer.result(LONG_S).close()


def test_store_that_is_gone_is_named() -> None:
    with pytest.raises(RolloutUnavailableError, match=r"the trainer's store at 127\.0\.0\.1:1 cannot be"):
        join("127.0.0.1", 1, "t", rank=1, timeout_s=0.5)


def test_member_does_not_wait_for_an_owner_that_has_died() -> None:
    """A server that did could do nothing else, and the run that goes on would wait for it."""
    began = time.monotonic()
    with pytest.raises(RolloutUnavailableError):
        join("127.0.0.1", 1, "t", rank=1, timeout_s=LONG_S)
    assert time.monotonic() - began < LONG_S / 2


def test_member_waits_long_for_a_value() -> None:
    store = open_store("127.0.0.1", LONG_S)
    member = join("127.0.0.1", store.port, store.token, rank=1, timeout_s=45.0)
    assert member.timeout == timedelta(seconds=45.0)
