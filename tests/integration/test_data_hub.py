"""Rows of a dataset of the hub, by its name, as a program of its own reads them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import fake_hub

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "README.md": b"# rows\n",
    "train.jsonl": b'{"a": 1}\n{"a": 2}\n',
    "test.jsonl": b'{"a": 3}\n',
    "small/train.jsonl": b'{"a": 4}\n',
}
# The hub's address is read when its library is imported, so that another process has to ask this one.
READ = """
import json, sys
from conch.config import DataConfig, load
from conch.data.files import read_rows
from conch.errors import DataError
for source, values in json.loads(sys.argv[1]):
    try:
        print(json.dumps(read_rows(source, load(DataConfig, values))))
    except DataError as error:
        print(json.dumps(str(error)))
"""


@contextmanager
def hung_up() -> Iterator[tuple[str, list[bytes]]]:
    """A port that closes each connection without an answer: its address, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_each() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        asked.append(connection.recv(4096).partition(b"\r\n")[0])

        thread = threading.Thread(target=close_each)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with fake_hub("some/rows", FILES) as address:
        yield address


def read(hub: str, home: Path, *asked: tuple[str, dict[str, Any]]) -> list[Any]:
    """What `read_rows` gives for each source and configuration, or the text of its error."""
    result = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_hub_name_gives_the_rows_of_its_split(hub: str, tmp_path: Path) -> None:
    whole, test, folder, missing, split = read(
        hub,
        tmp_path,
        ("some/rows", {}),
        ("some/rows:test", {}),
        ("some/rows", {"folder": "small"}),
        ("no/rows", {}),
        ("some/rows:last", {}),
    )
    assert sorted(row["a"] for row in whole) == [1, 2, 4]
    assert [row["a"] for row in test] == [3]
    assert [row["a"] for row in folder] == [4]
    assert missing.startswith("no/rows cannot be read: ") and "no/rows" in missing[15:]
    assert split.startswith("some/rows:last cannot be read: ") and "train" in split


def test_streamed_rows_leave_no_copy(hub: str, tmp_path: Path) -> None:
    (rows,) = read(hub, tmp_path / "home", ("some/rows", {"streaming": True}))
    assert sorted(row["a"] for row in rows) == [1, 2, 4]
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    with hung_up() as (address, asked):
        (said,) = read(address, tmp_path, ("imdb", {}))
    # Beside, the hub's library may ask for a list of its own.
    assert [line for line in asked if b"imdb" in line] == [b"GET /api/datasets/imdb HTTP/1.1"]
    assert said.startswith(f"imdb cannot be read: it is no file or folder here, the hub ({address})")


def test_a_dataset_in_the_cache_needs_no_answer(hub: str, tmp_path: Path) -> None:
    (first,) = read(hub, tmp_path, ("some/rows:test", {}))
    with hung_up() as (address, _asked):
        (second,) = read(address, tmp_path, ("some/rows:test", {}))
    assert second == first
