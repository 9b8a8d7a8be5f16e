"""The state of a deployment, servers that run under one name, in a folder of the user's own:

$XDG_STATE_HOME/conch/serving/<name>/    (by default below ~/.local/state)
    lock              held by the supervisor as long as it lives; the kernel releases it when it dies
    deployment.json   `Deployment`, written by the supervisor whenever something changes
    supervisor.log    output of a detached supervisor
    replica-0.log     output of the server; older output in `.1`, `.2`, ...
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from conch.access.secrets import secret_from
from conch.access.tls import ClientTls
from conch.atomic_files import replace_text
from conch.config import Section
from conch.errors import ServingError
from conch.store.store import is_valid_name
from conch.triton.channel import Access

_FORMAT = 1
_STATE = "deployment.json"
_LOCK = "lock"
_POLL_S = 0.1

Phase = Literal["starting", "ready", "restarting", "failed", "stopped"]


class Replica(Section):
    """One server of a deployment."""

    phase: Phase = "starting"
    """`restarting`: the server died or could not be healed, and is started again after a pause."""

    url: str = ""
    """`host:port` of gRPC."""

    http_url: str = ""
    """`host:port` of HTTP; empty if it is off."""

    metrics_url: str = ""
    """URL that Prometheus reads; empty if metrics are off."""

    gpu: str = ""
    """GPU of the server; empty on the CPU."""

    pid: int = 0
    """Process id of tritonserver."""

    log: Path
    """Log of the server."""

    versions: dict[str, int] = Field(default_factory=dict)
    """Model -> version that is served."""

    restarts: int = 0
    """Times the server was started again."""

    heals: int = 0
    """Times a model was loaded again because it did not score right."""

    problem: str = ""
    """Why the server is not ready, or why the last swap failed."""


class Deployment(Section):
    """What the supervisor records of its servers. It holds no secret, only the variable that does."""

    format: int = _FORMAT
    """Version of this file's layout."""

    name: str
    """Name for `status`, `down`, `logs` and `swap`."""

    machine: str
    """Host name of the machine that the servers run on."""

    pid: int
    """Process id of the supervisor."""

    model_store: Path
    """Store of the models."""

    models: tuple[str, ...]
    """Models that the user named."""

    replicas: tuple[Replica, ...] = ()
    """The servers."""

    tls_ca: Path | None = None
    """Certificate to trust; None if the servers speak plain text."""

    tls_cert: Path | None = None
    """Certificate to show; None if the servers ask for none."""

    tls_key: Path | None = None
    """Private key of `tls_cert`."""

    tls_name: str = ""
    """Name in the servers' certificate."""

    secret_env: str | None = None
    """Environment variable with the secret that clients must send; None if there is none."""

    swaps: int = 0
    """Searches for new versions that are over."""

    @property
    def is_ready(self) -> bool:
        """Whether all servers score right."""
        return bool(self.replicas) and all(replica.phase == "ready" for replica in self.replicas)

    def access(self) -> Access:
        """Return what lets this process into the servers, to score and to read their statistics.

        Raises:
            ConfigError: the secret's variable is not set here.
        """
        tls = None
        if self.tls_ca is not None:
            tls = ClientTls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)
        return Access(tls, secret_from(self.secret_env))


def run_folder() -> Path:
    """Return the folder with the deployments of this user."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "conch" / "serving"


def folder_of(name: str) -> Path:
    """Return the folder of a deployment, which may not exist.

    Raises:
        ServingError: `name` is no plain name.
    """
    if not is_valid_name(name):
        raise ServingError(
            f"{name!r} is no name for a deployment: take letters, digits, dots, dashes and underscores"
        )
    return run_folder() / name


@contextlib.contextmanager
def claimed(name: str | None, first_choice: str) -> Iterator[tuple[str, Path]]:
    """Hold a name as long as the context lasts; yields the name and its folder.

    name: None takes `first_choice` or, if that is in use, `first_choice-2` and so on.

    Raises:
        ServingError: the name is in use, or the folder cannot be written.
    """
    candidates = [name] if name else [first_choice, *(f"{first_choice}-{n}" for n in range(2, 100))]
    for candidate in candidates:
        folder = folder_of(candidate)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServingError(
                f"the run folder {folder} cannot be written ({error.strerror}); "
                "set XDG_STATE_HOME to one that can"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        try:
            (folder / _STATE).unlink(missing_ok=True)  # of one that was killed
            yield candidate, folder
        finally:
            (folder / _STATE).unlink(missing_ok=True)
            os.close(descriptor)
        return
    raise ServingError(
        f"a deployment called {candidates[0]} runs already: stop it (conch serve down "
        f"{candidates[0]}) or give this one another --name"
    )


def is_held(folder: Path) -> bool:
    """Whether a supervisor lives that holds this folder's name."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def write(folder: Path, deployment: Deployment) -> None:
    """Replace the record of a deployment."""
    replace_text(folder / _STATE, deployment.model_dump_json(indent=2))


def read(name: str) -> Deployment:
    """Read the record of a deployment that runs.

    Raises:
        ServingError: none of that name runs (the message lists those that do), or it is of another release.
    """
    folder = folder_of(name)
    if not is_held(folder):
        running = names()
        others = f"there are: {', '.join(running)}" if running else "none runs"
        raise ServingError(
            f"no deployment called {name} runs on {socket.gethostname()}; {others}. Start one with "
            "conch serve up --detach"
        )
    try:
        text = (folder / _STATE).read_text(encoding="utf-8")
        deployment = Deployment.model_validate_json(text)
    except FileNotFoundError as error:
        raise ServingError(f"deployment {name} is just starting or stopping; ask again") from error
    except ValidationError as error:
        raise ServingError(_other_release(folder)) from error
    if deployment.format != _FORMAT:
        raise ServingError(_other_release(folder))
    return deployment


def names() -> list[str]:
    """Return the names of the deployments that run, sorted."""
    folder = run_folder()
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if is_valid_name(entry.name) and is_held(entry))


def only_name(name: str | None) -> str:
    """Return `name`, or where it is None the name of the only deployment that runs.

    Raises:
        ServingError: `name` is None and there is not exactly one.
    """
    if name is not None:
        return name
    running = names()
    if len(running) != 1:
        raise ServingError(
            f"several deployments run, name one: {', '.join(running)}" if running else "no deployment runs"
        )
    return running[0]


def stop(name: str, timeout_s: float) -> bool:
    """Stop a deployment by SIGTERM to its supervisor, and after `timeout_s` seconds by SIGKILL.

    After SIGKILL the process guards end the servers.

    Returns:
        whether SIGTERM was enough.

    Raises:
        ServingError: none of that name runs, or its supervisor does not end.
    """
    pid = read(name).pid
    folder = folder_of(name)
    for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, timeout_s)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while is_held(folder) or _is_alive(pid):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        else:
            return number == signal.SIGTERM
    raise ServingError(f"supervisor {pid} of deployment {name} does not end, not even by SIGKILL")


def _is_alive(pid: int) -> bool:
    """Whether a process runs that has not ended; it gives its lock back shortly before it ends."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def _other_release(folder: Path) -> str:
    return (
        f"{folder / _STATE} was written by another release of Conch: look at and stop this "
        "deployment with the release that started it"
    )
