"""What `down`, `status`, `logs` and `swap` do; `up` stands in `up.py`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

from conch.errors import ServingError
from conch.serving.deployment import state as deployment
from conch.serving.deployment import up as up_command
from conch.serving.deployment.state import Deployment
from conch.serving.deployment.status import ServerStatus, StatusReader, status_reader, status_table
from conch.store.store import latest_version

_POLL_S = 0.2

up = up_command.run


def down(arguments: argparse.Namespace) -> int:
    """Stop a deployment, or all."""
    names = deployment.names() if arguments.all else [deployment.only_name(arguments.name)]
    for name in names:
        in_order = deployment.stop(name, arguments.timeout)
        print(f"stopped {name}" if in_order else f"killed {name}: it did not end in {arguments.timeout:g} s")
    return 0


def swap(arguments: argparse.Namespace) -> int:
    """Ask the supervisor to load what is new in the store, and wait until it has."""
    name = deployment.only_name(arguments.name)
    before = deployment.read(name)
    served = {model for replica in before.replicas for model in replica.versions}
    wanted = {model: latest_version(before.model_store, model) for model in sorted(served)}
    os.kill(before.pid, signal.SIGUSR1)
    deadline = time.monotonic() + arguments.timeout
    while (now := deployment.read(name)).swaps == before.swaps:
        if time.monotonic() > deadline:
            raise ServingError(f"deployment {name} did not finish the swap within {arguments.timeout:g} s")
        time.sleep(_POLL_S)
    for number, replica in enumerate(now.replicas):
        if any(replica.versions.get(model) != version for model, version in wanted.items()):
            raise ServingError(f"replica {number} of {name}: {replica.problem or replica.phase}")
    for model, version in wanted.items():
        print(f"{model}: version {version}")
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Show the servers once, or again and again. Numbers a second need two looks."""
    with status_reader() as reader:
        _look(arguments, reader)
        time.sleep(arguments.interval)
        if arguments.watch and not arguments.json:
            return _refresh(arguments, reader)
        while True:
            _show(arguments, _look(arguments, reader))
            if not arguments.watch:
                return 0
            time.sleep(arguments.interval)


def _refresh(arguments: argparse.Namespace, reader: StatusReader) -> int:
    from rich.console import Group
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            tables = [status_table(title, servers) for title, servers in _look(arguments, reader)]
            live.update(Group(*tables), refresh=True)
            time.sleep(arguments.interval)


def _look(arguments: argparse.Namespace, reader: StatusReader) -> list[tuple[str, list[ServerStatus]]]:
    if arguments.url:
        access = up_command.client_access(arguments)
        return [(arguments.url, [reader.server(ServerStatus(url=arguments.url), access)])]
    names = [arguments.name] if arguments.name else deployment.names()
    if not names:
        raise ServingError("no deployment runs; start one with python -m conch.serving up --detach")
    return [(name, reader.read(deployment.read(name))) for name in names]


def _show(arguments: argparse.Namespace, looked: list[tuple[str, list[ServerStatus]]]) -> None:
    if arguments.json:
        found = {name: [server.model_dump(mode="json") for server in servers] for name, servers in looked}
        print(json.dumps(found), flush=True)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for title, servers in looked:
        console.print(status_table(title, servers))


def logs(arguments: argparse.Namespace) -> int:
    """Print the end of a log, and with --follow what comes."""
    name = deployment.only_name(arguments.name)
    path = _log_file(deployment.read(name), arguments)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            sys.stdout.writelines(deque(file, maxlen=arguments.lines))
            sys.stdout.flush()
            if arguments.follow:
                _follow(path, file.tell(), name)
    except FileNotFoundError as error:
        raise ServingError(f"there is no log {path} (yet)") from error
    return 0


def _log_file(described: Deployment, arguments: argparse.Namespace) -> Path:
    if arguments.supervisor:
        return deployment.folder_of(described.name) / "supervisor.log"
    if not 0 <= arguments.replica < len(described.replicas):
        raise ServingError(
            f"deployment {described.name} has no replica {arguments.replica}; they are 0 to "
            f"{len(described.replicas) - 1}"
        )
    return described.replicas[arguments.replica].log


def _follow(path: Path, position: int, name: str) -> None:
    """Print what is added, also after the log was put aside, until the deployment ends."""
    folder = deployment.folder_of(name)
    file = path.open("rb")
    file.seek(position)
    try:
        alive = True
        while True:
            was_put_aside = _was_put_aside(path, file)  # asked first: then all that it got can be read
            while chunk := file.read(1 << 16):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            if was_put_aside:
                file.close()
                file = path.open("rb")
                continue
            if not alive:
                return
            time.sleep(_POLL_S)
            alive = deployment.is_held(folder)
    finally:
        file.close()


def _was_put_aside(path: Path, file: BinaryIO) -> bool:
    """Whether the file goes by another name now, and a new one by this."""
    try:
        return path.stat().st_ino != os.fstat(file.fileno()).st_ino
    except FileNotFoundError:  # between the two renames
        return False
