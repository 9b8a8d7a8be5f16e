"""Connect this process to Ray: to a cluster of the run's own on this machine, or to one that runs.

A cluster of the run's own asks everybody for a token, has no dashboard and sends no statistics. Its processes
die with the process that started it, whatever that dies of; `conch.rollouts.ray.janitor` deletes the rest.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conch.errors import ConfigError, RolloutUnavailableError, first_line
from conch.log import get_logger
from conch.rollouts.ray.access import MODE, TOKEN, TOKEN_PATH, asks_for_token, own_token
from conch.rollouts.ray.check import Share, spare_gpus
from conch.rollouts.ray.janitor import FOLDER_VARIABLE, clean_up

_log = get_logger(__name__)

_BREAKPOINT = "PYTHONBREAKPOINT"

_LONGEST_FOLDER = 36
"""Characters of the folder: Ray puts sockets 70 characters deeper, and a socket's path has 107 at most."""

_SETTINGS: dict[str, Any] = {
    "log_to_driver": False,
    "configure_logging": False,
    "logging_level": "ERROR",
}


@dataclass(frozen=True)
class Address:
    """How another rank gets into the cluster.

    address: `host:port`; None where no address is needed.
    token: of a cluster of the run's own; empty where the environment has the cluster's.
    """

    address: str
    token: str = field(default="", repr=False)


class Cluster:
    """This process's connection to Ray.

    address: how other ranks get in.
    """

    def __init__(self, address: Address, *, connected_here: bool, folder: Path | None = None) -> None:
        self.address = address
        self._connected_here = connected_here
        self._folder = folder
        self._janitor: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, share: Share, store_bytes: int) -> Cluster:
        """Start a cluster on this machine, of just what the actors take. Call it from the main thread: Ray's
        processes die with the thread that starts them.

        Where this process is connected to Ray already, by its own code, that connection is kept instead.

        Raises:
            ConchError: Ray does not start.
        """
        if _is_connected():
            return cls(Address(_gcs_address(), _own_token()), connected_here=False)
        _ask_for_token()
        try:
            return cls._started(share, store_bytes)
        except RolloutUnavailableError as error:
            # Ray waits 30 s for its own processes, which are not up by then on a machine that is very busy.
            _log.warning("%s; it is started once more", error)
            return cls._started(share, store_bytes)

    @classmethod
    def _started(cls, share: Share, store_bytes: int) -> Cluster:
        """A cluster with processes and a folder of its own; nothing is left of one that does not start."""
        import ray

        folder = _new_folder()
        cluster = cls(Address(""), connected_here=True, folder=folder)
        cluster._janitor = _start_janitor(folder)
        gpus = spare_gpus()
        variables = {FOLDER_VARIABLE: str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
        variables |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        try:
            with _environment(variables), _reported("Ray does not start on this machine"):
                ray.init(
                    address="local",
                    num_cpus=max(1, -int(-share.num_cpus // 1)),
                    num_gpus=len(gpus) if share.gpus else 0,
                    include_dashboard=False,
                    object_store_memory=store_bytes,
                    _temp_dir=str(folder / "ray"),  # which Ray opens to everybody, below one that is not
                    **_SETTINGS,
                )
        except BaseException:
            cluster.leave()
            raise
        cluster.address = Address(_gcs_address(), _own_token())
        return cluster

    @classmethod
    def join(cls, address: Address) -> Cluster:
        """Connect to a cluster that runs.

        Raises:
            ConchError: it does not let us in.
        """
        if _is_connected():
            return cls(address, connected_here=False)
        if address.token:
            os.environ[MODE], os.environ[TOKEN] = "token", address.token
        elif not os.environ.get(MODE) and own_token()[0] and asks_for_token(address.address):
            # `ray start` takes up a token that it finds, `ray.init` with an address does not.
            _turn_tokens_on()
        import ray

        with _reported(
            f"the Ray cluster at {address.address} does not let this process in; a cluster with a token "
            "wants the same token here (`~/.ray/auth_token`, or `RAY_AUTH_TOKEN`), and each machine of a run "
            "`ray start`"
        ):
            ray.init(address=address.address, **_SETTINGS)
        return cls(address, connected_here=True)

    def leave(self) -> None:
        """Disconnect; end the cluster, and delete its files, where this process started it."""
        if self._connected_here:
            import ray

            ray.shutdown()
            self._connected_here = False
        if self._folder is not None:
            clean_up(str(self._folder))
            self._folder = None
        if self._janitor is not None:
            self._janitor.communicate(b"done")
            self._janitor = None


def _is_connected() -> bool:
    ray: Any = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _gcs_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def _own_token() -> str:
    return os.environ.get(TOKEN, "") if os.environ.get(MODE) == "token" else ""


def _ask_for_token() -> None:
    """Have Ray in this process, and in all processes that it starts, ask for a token and show it.

    Ray reads both variables once a process, so that a second cluster of this process has the same token.

    Raises:
        ConfigError: Ray is imported, and has read them.
    """
    if os.environ.get(MODE) != "token":
        _turn_tokens_on()
    if not os.environ.get(TOKEN) and not os.environ.get(TOKEN_PATH):
        os.environ[TOKEN] = secrets.token_hex(32)


def _turn_tokens_on() -> None:
    """Have Ray show a token, and ask for it.

    Raises:
        ConfigError: Ray is imported, and has read its mode.
    """
    if "ray" in sys.modules:
        raise ConfigError(
            "this process imported ray before it asked for a token: set `RAY_AUTH_MODE=token` in its "
            "environment, or call `ray.init` yourself"
        )
    os.environ[MODE] = "token"


def _new_folder() -> Path:
    """A new folder that only this user reads, with a path short enough for sockets below it."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(parent) + len("/conch-ray-12345678") <= _LONGEST_FOLDER and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="conch-ray-", dir=parent))
    raise ConfigError("Ray needs a folder with a short path for its sockets: make /tmp writable")


def _start_janitor(folder: Path) -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("janitor.py")
    return subprocess.Popen(
        [sys.executable, "-I", str(program), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside, for processes that are started there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn what `ray.init` raises into words; keep what it does to this process's signals, output and
    breakpoints away (ray 2.60 leaves PYTHONBREAKPOINT behind, for every program that is started later).

    what: the sentence to begin with.

    Raises:
        RolloutUnavailableError: says why.
    """
    from ray._private import worker

    # Ray prints what happens to workers on stdout, where programs print results.
    worker.print_to_stdstream = _note  # pyright: ignore[reportPrivateImportUsage]
    is_main = threading.current_thread() is threading.main_thread()
    handler: Any = signal.getsignal(signal.SIGTERM)
    breakpoint_before = os.environ.get(_BREAKPOINT)
    try:
        yield
    except Exception as error:  # Ray raises a plain Exception where its raylet does not come up in time
        raise RolloutUnavailableError(
            f"{what} ({type(error).__name__}: {first_line(error)[:300]})"
        ) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, handler)
        os.environ.pop(_BREAKPOINT, None)
        if breakpoint_before is not None:
            os.environ[_BREAKPOINT] = breakpoint_before


def _note(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
    for line in data.get("lines", ()):
        _log.debug("Ray: %s", line)
