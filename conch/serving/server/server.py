"""Start a tritonserver, wait until it scores right, and never leave it behind.

with TritonServer("model_store", ["walks"]) as server:
    train(..., reward=server.endpoint("walks"))
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conch.access.tls import ClientTls, ServerTls, own_client
from conch.addresses import is_loopback
from conch.errors import ServerStartError
from conch.log import get_logger
from conch.serving.server import process_guard as guard
from conch.serving.server.flags import (
    EXIT_TIMEOUT_S,
    LOOPBACK,
    ServerSettings,
    known_flags,
    server_flags,
)
from conch.serving.server.health import wait_until_ready
from conch.serving.server.repository import Repository
from conch.serving.server.runtime import BundledRuntime, Invocation, Runtime, repository_of
from conch.store.store import StoredModel, read_with_members, verify_files
from conch.triton.channel import Access

_log = get_logger(__name__)

_WILDCARDS = ("0.0.0.0", "::", "")
_GRACE_S = EXIT_TIMEOUT_S + 5.0
_STOP_DEADLINE_S = _GRACE_S + 25.0
_PORT_TRIES = 3
_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 5.0
_OTHER_TEMPORARY_FOLDERS = ("/tmp", "/var/tmp")
_LOG_TAIL_LINES = 20
# tritonserver prints this when another program took the port between our check and its bind.
_PORT_LOST = "already in use"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings that few servers need.

    runtime: program or container that runs the server.
    http_port, metrics_port: None leaves the port closed, 0 takes a free one.
    metrics_host: address on which the metrics port listens; Triton shows them to whoever reaches it.
    gpu: number or UUID of the GPU, several separated by commas; "" serves on the CPU.
    tls: None speaks plain text.
    secret: value that clients must send; "" asks for none.
    restrict_admin: let this process alone load models (which runs code), trace and the like. False lets all
        who share this machine do so; beyond loopback, and with a secret, it is never so.
    allow_anyone: listen beyond this machine without asking clients for a secret or a certificate.
    flags: further flags of tritonserver, `--name=value`.
    log_max_bytes: size at which a log is put aside.
    log_keep: number of old logs that are kept.
    """

    runtime: Runtime = field(default_factory=BundledRuntime)
    http_port: int | None = None
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK
    gpu: str = ""
    tls: ServerTls | None = None
    secret: str = field(default="", repr=False)
    restrict_admin: bool = True
    allow_anyone: bool = False
    flags: tuple[str, ...] = ()
    log_max_bytes: int = 10_000_000
    log_keep: int = 3


class TritonServer:
    """One tritonserver process on this machine, serving models of a store over gRPC.

    Nothing of the server outlives this process: a normal stop, an exception, Ctrl-C and `kill -9` all end it
    and remove its shared memory.

    log_file: the server's log; None before a start without one.
    stored: models that are served, the versions of the last start or swap.
    repository: folder that the server loads from; None before the start.

    Raises, from `start` or on entering the context:
        ServerStartError: this machine or environment cannot run it, the port is taken, a certificate is
            unfit, it died, it was not ready within `ready_timeout_s` seconds, or golden samples score wrong.
        ModelStoreError: a model is missing or damaged.
    """

    def __init__(
        self,
        model_store: str | Path,
        models: Sequence[str],
        *,
        grpc_port: int | None = None,
        host: str = LOOPBACK,
        log_file: Path | None = None,
        ready_timeout_s: float = 120.0,
        cpu_threads: int = 1,
        options: ServerOptions | None = None,
    ) -> None:
        """grpc_port: None takes a free one.

        host: address to listen on; beyond loopback others on the network may score, but not change models.
        log_file: None takes a temporary one, kept if the server fails.
        ready_timeout_s: seconds to become ready.
        cpu_threads: threads a model may compute with.
        """
        self.log_file = log_file
        self.options = options or ServerOptions()
        self.stored: tuple[StoredModel, ...] = ()
        self.repository: Repository | None = None
        self._model_store = Path(model_store)
        self._models = tuple(models)
        self._fixed_port = grpc_port
        self._port = 0
        self._host = host
        self._ready_timeout_s = ready_timeout_s
        self._cpu_threads = cpu_threads
        self._guard: subprocess.Popen[str] | None = None
        self._cleanup: tuple[str, str] = ("", "")
        self._owns_log = log_file is None
        self._server_pid = 0
        self._aborted = False
        self._metrics_port: int | None = None
        self._http_port: int | None = None
        self._client_tls: ClientTls | None = None
        restricted = self.options.restrict_admin or bool(self.options.secret) or not is_loopback(host)
        self._admin_secret = secrets.token_hex(16) if restricted else ""

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """`host:port` of the running server, as seen from this machine."""
        return f"{self._reachable_host}:{self._port}"

    @property
    def metrics_url(self) -> str:
        """URL that Prometheus reads; "" if metrics are off."""
        host = reachable_host(self.options.metrics_host)
        return f"http://{host}:{self._metrics_port}/metrics" if self._metrics_port else ""

    @property
    def http_url(self) -> str:
        """`host:port` of the HTTP service; "" if it is off."""
        return f"{self._reachable_host}:{self._http_port}" if self._http_port else ""

    @property
    def access(self) -> Access:
        """Credentials of a client that may also load models; complete once started."""
        return Access(self._client_tls, self.options.secret, self._admin_secret)

    @property
    def is_running(self) -> bool:
        """Whether the server process is alive."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def pid(self) -> int:
        """Process id of tritonserver, or of the program that runs its container; 0 before the start."""
        return self._server_pid

    def endpoint(self, model: str) -> str:
        """Return `host:port/model`, which `reward.url` and TRITON_HOST take."""
        return f"{self.url}/{model}"

    def start(self, *, again: bool = False) -> None:
        """Check all that can be checked, start the server, return once its golden samples score right.

        again: serve the versions in `stored` instead of the store's latest, if the store still has them, and
            append to the log instead of emptying it.
        """
        assert not self.is_running, "start() called on a running server"
        options = self.options
        if options.tls is not None and options.http_port is not None:
            raise ServerStartError(
                "Triton's HTTP port knows no TLS: leave it closed (no http_port), or put a TLS proxy "
                "before a server that speaks plain text on loopback"
            )
        if not again or not self._store_has_served_versions():
            self.stored = tuple(read_with_members(self._model_store, self._models))
        options.runtime.check(self._settings())
        for model in self.stored:
            verify_files(model)
        self._client_tls = own_client(options.tls) if options.tls is not None else None
        ports = [(self._host, self._fixed_port), (self._host, options.http_port)]
        ports += [(options.metrics_host, options.metrics_port)]
        fixed = [(host, port) for host, port in ports if port]
        for host in (self._host, options.metrics_host):
            free_port(host)  # raises if the host itself is wrong
        self._check_exposure()
        for host, port in fixed:
            check_port(host, port)
        known = known_flags(options.runtime.help_text())
        deadline = time.monotonic() + self._ready_timeout_s
        for attempt in range(1, _PORT_TRIES + 1):
            self._choose_ports()
            try:
                self._start_once(known, deadline, keep_log=again)
                return
            except _PortLostError:
                if fixed or attempt == _PORT_TRIES:
                    raise

    def abort(self) -> None:
        """End the server from another thread, whose `start` or `wait` then returns and which calls `stop`."""
        self._aborted = True
        guard_process = self._guard
        if guard_process is not None:
            guard_process.terminate()

    def stop(self) -> None:
        """End the server once it has finished its computations. Does nothing if it is not running."""
        if self._guard is None:
            return
        code = self._stop_guard()
        if code == 0 and self._owns_log and self.log_file is not None:
            self.log_file.unlink(missing_ok=True)
            self.log_file = None

    def wait(self, timeout_s: float | None = None) -> int:
        """Block until the server ends by itself; returns its exit code, 128 + signal if it was killed.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout_s` seconds.
        """
        assert self._guard is not None, "wait() called before start()"
        return self._guard.wait(timeout_s)

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """Return the last lines of the server's log."""
        if self.log_file is None or not self.log_file.exists():
            return ""
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _store_has_served_versions(self) -> bool:
        gone = [part for model in self.stored for part in model.folders if not part.path.is_dir()]
        for part in gone:
            _log.warning(
                "version %d of %s is gone from the store; taking the latest", part.version, part.name
            )
        return bool(self.stored) and not gone

    @property
    def _reachable_host(self) -> str:
        return reachable_host(self._host)

    def _check_exposure(self) -> None:
        """Refuse to listen beyond this machine for everybody, unless that is what was asked for."""
        options = self.options
        asks = bool(options.secret) or (options.tls is not None and options.tls.require_client_cert)
        if not (asks or options.allow_anyone or is_loopback(self._host)):
            raise ServerStartError(
                f"host {self._host or '0.0.0.0'} is reached from other machines, and whoever reaches it may "
                "have texts scored: ask for a secret (--secret-env) or for certificates "
                "(--require-client-cert), or let everybody in with --allow-anyone (`allow_anyone=True`)"
            )

    def _settings(self) -> ServerSettings:
        return ServerSettings(
            model_store=self._model_store.resolve(),
            models=tuple(model.name for model in self.stored),
            grpc_port=self._port,
            host=self._host,
            http_port=self._http_port,
            metrics_port=self._metrics_port,
            metrics_host=self.options.metrics_host,
            gpu=self.options.gpu,
            cpu_threads=self._cpu_threads,
            tls=self.options.tls,
            secret=self.options.secret,
            admin_secret=self._admin_secret,
            extra=self.options.flags,
        )

    def _choose_ports(self) -> None:
        self._port = self._fixed_port or free_port(self._host)
        http, metrics = self.options.http_port, self.options.metrics_port
        self._http_port = None if http is None else http or free_port(self._host)
        self._metrics_port = None if metrics is None else metrics or free_port(self.options.metrics_host)

    def _start_once(self, known: frozenset[str], deadline: float, *, keep_log: bool) -> None:
        self._open_log(keep=keep_log)
        try:
            self._spawn(known)
            self._wait_until_ready(deadline)
        except ServerStartError as error:
            died = not self.is_running
            code = self._stop_guard()
            tail = self.log_tail()
            if died and _PORT_LOST in tail:
                raise _PortLostError(
                    f"port {self._port} was taken while the server started; try again"
                ) from error
            reason = f"tritonserver ended with code {code} before it was ready" if died else str(error)
            raise ServerStartError(f"{reason}; last lines of {self.log_file}:\n{tail}") from error
        except BaseException:
            self._stop_guard()
            raise
        _log.info("tritonserver serves %s at %s, log %s", ", ".join(self._models), self.url, self.log_file)

    def _wait_until_ready(self, deadline: float) -> None:
        def is_alive() -> bool:
            return self.is_running and not self._aborted

        wait_until_ready(self.url, self.stored, self.access, is_alive=is_alive, deadline=deadline)
        # tritonserver opens gRPC's port first, and models may be scored before the others are open.
        metrics_host = reachable_host(self.options.metrics_host)
        for host, port in ((self._reachable_host, self._http_port), (metrics_host, self._metrics_port)):
            if port is not None:
                wait_until_open(host, port, is_alive=is_alive, deadline=deadline)

    def _spawn(self, known: frozenset[str]) -> None:
        assert self.log_file is not None
        scratch = scratch_folder()
        shm_prefix = f"conch_{os.getpid()}_{secrets.token_hex(4)}_"
        self._cleanup = (shm_prefix, str(scratch))
        runtime, settings = self.options.runtime, self._settings()
        try:
            paths = runtime.paths(settings, scratch, shm_prefix)
            self.repository = Repository(repository_of(scratch), paths.model_store)
            for model in self.stored:
                self.repository.place(model)
            flags = server_flags(settings, paths, known)
            invocation = runtime.invocation(settings, scratch, flags, f"conch-{shm_prefix.strip('_')}")
        except BaseException:
            guard.clean_up(*self._cleanup)
            raise
        self._guard = self._start_guard(invocation)
        assert self._guard.stdout is not None
        self._server_pid = int(self._guard.stdout.readline() or "0")

    def _start_guard(self, invocation: Invocation) -> subprocess.Popen[str]:
        assert self.log_file is not None
        shm_prefix, scratch = self._cleanup
        settings = {
            "command": invocation.command,
            "end_command": invocation.end_command,
            "log": str(self.log_file),
            "log_max_bytes": self.options.log_max_bytes,
            "log_keep": self.options.log_keep,
            "shm_prefix": shm_prefix,
            "scratch": scratch,
            "grace_s": _GRACE_S,
            "parent_pid": os.getpid(),
        }
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the server
                env=invocation.environment,
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        return process

    def _open_log(self, *, keep: bool) -> None:
        try:
            if self.log_file is None:
                descriptor, name = tempfile.mkstemp(prefix="conch-tritonserver-", suffix=".log")
                os.close(descriptor)
                self.log_file = Path(name)
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("ab") as log:
                if not keep:
                    log.truncate(0)
        except OSError as error:
            raise ServerStartError(
                f"log file {self.log_file} cannot be written ({error.strerror})"
            ) from error

    def _stop_guard(self) -> int:
        if self._guard is None:
            return 0
        assert self._guard.stdin is not None and self._guard.stdout is not None
        # Forked children of this process may still hold the pipe open: a signal as well.
        self._guard.stdin.close()
        self._guard.terminate()
        try:
            code = self._guard.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # the kernel then ends the server
            code = self._guard.wait()
        self._guard.stdout.close()
        self._guard = None
        guard.clean_up(*self._cleanup)  # for a guard that was killed
        return code


def reachable_host(host: str) -> str:
    """Return where this machine reaches a server that listens on `host`."""
    return LOOPBACK if host in _WILDCARDS else host


def scratch_folder() -> Path:
    """Create a temporary folder whose path needs no quotes: the server's back end passes it to a shell bare.

    Raises:
        ServerStartError: no such folder can be created.
    """
    default = tempfile.gettempdir()
    for parent in (default, *_OTHER_TEMPORARY_FOLDERS):
        if shlex.quote(parent) == parent and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="conch-triton-", dir=parent))
    raise ServerStartError(
        f"the temporary folder {default!r} has a space or another character in its name that tritonserver's "
        "python back end does not take; set TMPDIR to one without, for example TMPDIR=/var/tmp"
    )


class _PortLostError(ServerStartError):
    """Another program took the port between our check and the server's bind."""


def free_port(host: str) -> int:
    """Return a port that no program listens on now.

    Raises:
        ServerStartError: `host` is no address of this machine.
    """
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ServerStartError(
                f"cannot listen on {host} ({error.strerror}); give an IPv4 address or name of this machine"
            ) from error
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raise ServerStartError if `port` does not exist or is taken."""
    if not 0 < port < 65_536:
        raise ServerStartError(f"port {port} does not exist; choose one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            problem = "is taken" if in_use else f"cannot be used ({error.strerror})"
            raise ServerStartError(
                f"port {port} on {host or 'this machine'} {problem}; "
                "stop what listens there or choose another port"
            ) from error


def wait_until_open(host: str, port: int, *, is_alive: Callable[[], bool], deadline: float) -> None:
    """Return once a program listens at the port.

    is_alive: whether the server's process runs.
    deadline: seconds on the clock of `time.monotonic`.

    Raises:
        ServerStartError: the server died, or did not open the port in time.
    """
    while not _is_open(host, port):
        if not is_alive():
            raise ServerStartError(f"tritonserver died before it opened port {port}")
        if time.monotonic() > deadline:
            raise ServerStartError(f"port {port} on {host} was not opened in time; give it longer")
        time.sleep(_POLL_S)


def _is_open(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
