"""What becomes of a run: `run.json` in its folder says whether it runs, was stopped, or came to its end."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from conch.atomic_files import replace_text
from conch.errors import first_line
from conch.log import get_logger

STATE_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
BEST_METRIC_FILE = "best_metric.txt"
"""Files of a run's folder, whoever writes them."""

_log = get_logger(__name__)


State = Literal["running", "finished", "stopped", "failed", "killed"]


class RunStoppedError(Exception):
    """A run was told to end between two steps, and can go on from its checkpoint."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Whose run it is and how it stands.

    algorithm: as `conch train` names it.
    state: `killed` is never written: it is what a run is found as whose process is gone.
    total_steps: steps that it was to do.
    host, pid, born: of the process, with the time of its start where the system tells (ticks since boot).
    reason: what made it fail.
    """

    algorithm: str
    state: State
    total_steps: int
    host: str
    pid: int
    born: str = ""
    reason: str = ""


@contextmanager
def noted_state(folder: Path, algorithm: str, total_steps: int) -> Iterator[None]:
    """Inside, the run in `folder` is on record as running; afterwards as what it came to. One rank alone."""
    pid = os.getpid()
    state = RunState(algorithm, "running", total_steps, socket.gethostname(), pid, _born(pid))
    _write(folder, state)
    try:
        yield
    except (SystemExit, KeyboardInterrupt, RunStoppedError):  # SIGTERM and Ctrl-C: saved, and can go on
        _write(folder, replace(state, state="stopped"))
        raise
    except BaseException as error:
        _write(folder, replace(state, state="failed", reason=first_line(error)))
        raise
    _write(folder, replace(state, state="finished"))


def read_state(folder: Path) -> RunState | None:
    """Return how the run in `folder` stands; None where nothing readable is on record."""
    try:
        state = RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    # Of another machine's process nothing is known but what it wrote.
    if state.state == "running" and state.host == socket.gethostname() and not _lives(state):
        return replace(state, state="killed")
    return state


def _write(folder: Path, state: RunState) -> None:
    try:
        replace_text(folder / STATE_FILE, json.dumps(asdict(state)) + "\n")
    except OSError as error:  # a full disk; the run itself goes on, or ends by what ended it
        _log.warning("%s cannot be written: %s", folder / STATE_FILE, error.strerror)


def _lives(state: RunState) -> bool:
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # The number may be another process's by now.
    return _born(state.pid) == state.born


def _born(pid: int) -> str:
    """Start time of a process as Linux has it; "" elsewhere."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name of the program, in parentheses, may hold blanks and parentheses.
    return text.rpartition(")")[2].split()[19]
