"""What `conch serve install`, `down`, `status`, `logs` and `swap` do; `up` stands in `up.py`."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

from conch.errors import ServingError
from conch.serving.deployment import state
from conch.serving.deployment.options import (
    DownOptions,
    InstallOptions,
    LogsOptions,
    StatusOptions,
    SwapOptions,
)
from conch.serving.deployment.state import Deployment
from conch.serving.deployment.status import ServerStatus, StatusReader, status_reader, status_table
from conch.serving.deployment.up import client_access
from conch.serving.server.environment import (
    environment_beside,
    is_own_python_fit,
    make_environment_beside,
    requirements,
)
from conch.serving.server.runtime import check_platform, find_bundle
from conch.store.store import latest_version

_POLL_S = 0.2


def install(options: InstallOptions) -> int:
    """Make the environment for the bundled server's models, unless they can run in this one.

    Raises:
        ServerStartError: it cannot be made, or no bundled server runs on this machine.
    """
    check_platform(platform.system(), platform.machine(), sys.version_info[:2])
    if is_own_python_fit():
        find_bundle()
        print(f"nothing to do: the bundled server's models run in this environment, {sys.prefix}")
        return 0
    print(f"installing {' and '.join(requirements())} into {environment_beside()} ...", flush=True)
    made = make_environment_beside(anew=options.anew)
    find_bundle()
    print(f"the bundled server's models run in {made.prefix}, with the other libraries of {sys.prefix}")
    return 0


def down(options: DownOptions) -> int:
    """Stop a deployment, or all.

    Raises:
        ServingError: there is none of that name, or it does not end.
    """
    names = state.names() if options.all else [state.only_name(options.name)]
    for name in names:
        in_order = state.stop(name, options.timeout)
        print(f"stopped {name}" if in_order else f"killed {name}: it did not end in {options.timeout:g} s")
    return 0


def swap(options: SwapOptions) -> int:
    """Have the supervisor load what is new in the store, and wait until it has.

    Raises:
        ServingError: it takes longer than `timeout`, or a replica does not serve the latest versions.
    """
    name = state.only_name(options.name)
    before = state.read(name)
    models = {model for replica in before.replicas for model in replica.versions}
    latest = {model: latest_version(before.model_store, model) for model in sorted(models)}
    os.kill(before.pid, signal.SIGUSR1)
    deadline = time.monotonic() + options.timeout
    while (after := state.read(name)).swaps == before.swaps:
        if time.monotonic() > deadline:
            raise ServingError(f"deployment {name} did not finish the swap within {options.timeout:g} s")
        time.sleep(_POLL_S)
    for number, replica in enumerate(after.replicas):
        if any(replica.versions.get(model) != version for model, version in latest.items()):
            raise ServingError(f"replica {number} of {name}: {replica.problem or replica.phase}")
    for model, version in latest.items():
        print(f"{model}: version {version}")
    return 0


def status(options: StatusOptions) -> int:
    """Show the servers once, or again and again. Numbers a second need two looks.

    That nothing runs is an answer as well: code 0, and `{}` as JSON.

    Raises:
        ServingError: there is no deployment of that name.
    """
    if not options.url and not options.name and not state.names():
        print("no deployment runs; start one with conch serve up --detach", file=sys.stderr)
        if options.as_json:
            print("{}")
        return 0
    with status_reader() as reader:
        _read_status(options, reader)
        time.sleep(options.interval)
        if options.watch and not options.as_json:
            return _refresh(options, reader)
        while True:
            _print_status(options, _read_status(options, reader))
            if not options.watch:
                return 0
            time.sleep(options.interval)


def _refresh(options: StatusOptions, reader: StatusReader) -> int:
    from rich.console import Group
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            tables = [status_table(title, servers) for title, servers in _read_status(options, reader)]
            live.update(Group(*tables), refresh=True)
            time.sleep(options.interval)


def _read_status(options: StatusOptions, reader: StatusReader) -> list[tuple[str, list[ServerStatus]]]:
    """Deployment, or address, and the status of its servers."""
    if options.url:
        server = reader.server(ServerStatus(url=options.url), client_access(options))
        return [(options.url, [server])]
    names = [options.name] if options.name else state.names()
    return [(name, reader.read(state.read(name))) for name in names]


def _print_status(options: StatusOptions, statuses: list[tuple[str, list[ServerStatus]]]) -> None:
    if options.as_json:
        plain = {name: [server.model_dump(mode="json") for server in servers] for name, servers in statuses}
        print(json.dumps(plain), flush=True)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for title, servers in statuses:
        console.print(status_table(title, servers))


def logs(options: LogsOptions) -> int:
    """Print the end of a log and, with `follow`, what is added to it.

    Raises:
        ServingError: there is no such deployment, replica or log.
    """
    name = state.only_name(options.name)
    path = _log_file(state.read(name), options)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            sys.stdout.writelines(deque(file, maxlen=options.lines))
            sys.stdout.flush()
            if options.follow:
                _follow(path, file.tell(), name)
    except FileNotFoundError as error:
        raise ServingError(f"there is no log {path} (yet)") from error
    return 0


def _log_file(deployment: Deployment, options: LogsOptions) -> Path:
    if options.supervisor:
        return state.folder_of(deployment.name) / "supervisor.log"
    if not 0 <= options.replica < len(deployment.replicas):
        raise ServingError(
            f"deployment {deployment.name} has no replica {options.replica}; they are 0 to "
            f"{len(deployment.replicas) - 1}"
        )
    return deployment.replicas[options.replica].log


def _follow(path: Path, position: int, name: str) -> None:
    """Print what is added to a log, also after it was put aside, until the deployment ends."""
    folder = state.folder_of(name)
    file = path.open("rb")
    file.seek(position)
    try:
        alive = True
        while True:
            was_put_aside = _was_put_aside(path, file)  # before reading: then nothing more is added to it
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
            alive = state.is_held(folder)
    finally:
        file.close()


def _was_put_aside(path: Path, file: BinaryIO) -> bool:
    """Whether `file` has another name than `path` now."""
    try:
        return path.stat().st_ino != os.fstat(file.fileno()).st_ino
    except FileNotFoundError:  # between the two renames
        return False
