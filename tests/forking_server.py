"""The process that imports libraries once and forks for each program of `tests/forking_client.py`.

    python forking_server.py SOCKET_FD ALIVE_FD LIBRARIES

LIBRARIES: JSON list of `module` or `module:name`. Ends once nobody holds the other end of ALIVE_FD.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from types import ModuleType
from typing import Any


def serve(listener: socket.socket, alive: int, libraries: list[str]) -> dict[str, Any]:
    """Fork for each connection, the first of which has the libraries imported. Returns in the forked
    processes alone: what to run."""
    is_prepared = False
    while True:
        ready, _, _ = select.select([listener, alive], [], [])
        if alive in ready:
            os._exit(0)
        if not is_prepared:
            prepare(libraries)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those that wait have ended
            is_prepared = True
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(alive)
            return begin(connection)
        connection.close()


def begin(connection: socket.socket) -> dict[str, Any]:
    """Fork once more: this process waits, for the program to end and for the client; the other returns."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as file:
        job = json.loads(file.read(int.from_bytes(file.read(8), "big")))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    child = os.fork()
    if child:
        for stream in streams:  # whoever reads the program's output waits for all who could write
            os.close(stream)
        wait(connection, woken, child)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.close()
    os.close(woken)
    os.close(wake)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return job


def wait(connection: socket.socket, woken: int, child: int) -> None:
    """Tell the client how the program ended; end it where the client is gone."""
    connection.sendall(f"{child}\n".encode())
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if connection in ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os._exit(0)
        os.read(woken, 64)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)


def run(job: dict[str, Any], paths: list[str]) -> None:
    """Run a program as `python` would have.

    paths: of a Python that was told no others.
    """
    program = job["program"]
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    os.umask(job["umask"])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else the same in each
    if program["unbuffered"] or os.environ.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]
    kind, what = program["kind"], program["what"]
    first = {"module": job["folder"], "code": "", "file": os.path.dirname(os.path.abspath(what))}[kind]
    told = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = paths if program["isolated"] else [first, *told, *paths]
    sys.argv[:] = [{"module": "-m", "code": "-c", "file": what}[kind], *program["words"]]
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    if kind == "module":
        runpy._run_module_as_main(what)  # pyright: ignore[reportAttributeAccessIssue]
        return
    name = "<string>"
    if kind == "file":
        name = main.__file__ = what
        with open(name, "rb") as file:
            what = file.read()
    exec(compile(what, name, "exec"), main.__dict__)


def prepare(libraries: list[str]) -> None:
    """Import, and keep what was made out of every later search for garbage."""
    for library in libraries:
        module, _, name = library.partition(":")
        getattr(importlib.import_module(module), name or "__name__")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    PATHS = list(sys.path)
    run(serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])), PATHS)
