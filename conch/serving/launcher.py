"""Start the bundled tritonserver, know when it scores right, and never leave it behind.

with TritonServer("model_store", ["walks"]) as server:
    train(..., reward=server.endpoint("walks"))
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from conch.errors import ServerStartError
from conch.log import get_logger
from conch.serving import guard
from conch.serving.bundle import Bundle, find_bundle
from conch.serving.members import read_with_members
from conch.serving.store import EMBEDDED_NAME, StoredModel, verify_files
from conch.serving.triton_health import wait_until_ready

_log = get_logger(__name__)

_LOOPBACK = "127.0.0.1"
_WILDCARDS = ("0.0.0.0", "::", "")
_EXIT_TIMEOUT_S = 5
_GRACE_S = _EXIT_TIMEOUT_S + 5.0
_STOP_DEADLINE_S = _GRACE_S + 10.0
_PORT_TRIES = 3
_LOG_TAIL_LINES = 20
# What tritonserver prints when the port went to somebody else between our look and its bind.
_PORT_LOST = "already in use"


class TritonServer:
    """One tritonserver process on this machine's CPU, serving models of a store over gRPC.

    Nothing of it outlives this process: a normal stop, an exception, Ctrl-C and `kill -9` all end it and
    remove its shared memory.

    Raises, from `start` or on entering the context:
        ServerStartError: this machine or environment cannot run it, the port is taken, it died, it was not
            ready within `ready_timeout_s` seconds, or a golden sample scores wrong.
        ModelStoreError: a model is missing or damaged.
    """

    def __init__(
        self,
        model_store: str | Path,
        models: Sequence[str],
        *,
        grpc_port: int | None = None,
        host: str = _LOOPBACK,
        log_file: Path | None = None,
        ready_timeout_s: float = 120.0,
        cpu_threads: int = 1,
    ) -> None:
        """grpc_port: None takes a free one. log_file: None takes a temporary one, kept if the server fails.

        host: address to listen on; anything but loopback lets others on the network score, not change models.
        cpu_threads: threads a model may compute with.
        """
        self.log_file = log_file
        self._model_store = Path(model_store)
        self._models = tuple(models)
        self._loaded = self._models  # with the members of ensembles, once they are known
        self._wanted_port = grpc_port
        self._port = 0
        self._host = host
        self._ready_timeout_s = ready_timeout_s
        self._cpu_threads = cpu_threads
        self._guard: subprocess.Popen[str] | None = None
        self._cleanup: tuple[str, str] = ("", "")
        self._owns_log = log_file is None
        self._server_pid = 0

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """`host:port` of the running server, as seen from this machine."""
        return f"{_LOOPBACK if self._host in _WILDCARDS else self._host}:{self._port}"

    @property
    def is_running(self) -> bool:
        """Whether the server process is alive."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def pid(self) -> int:
        """Process id of tritonserver; 0 before the start."""
        return self._server_pid

    def endpoint(self, model: str) -> str:
        """`host:port/model`, which is what a reward or TRITON_HOST takes."""
        return f"{self.url}/{model}"

    def start(self) -> None:
        """Check all that can be checked, start the server, return once its golden samples score right."""
        assert not self.is_running, "start() called on a running server"
        bundle = find_bundle()
        stored = read_with_members(self._model_store, self._models)
        for model in stored:
            verify_files(model)
        self._loaded = tuple(model.name for model in stored)
        _free_port(self._host)  # says so if the host itself is wrong
        if self._wanted_port is not None:
            _check_port(self._host, self._wanted_port)
        deadline = time.monotonic() + self._ready_timeout_s
        for attempt in range(1, _PORT_TRIES + 1):
            self._port = self._wanted_port or _free_port(self._host)
            try:
                self._start_once(bundle, stored, deadline)
                return
            except _PortLostError:
                if self._wanted_port is not None or attempt == _PORT_TRIES:
                    raise

    def stop(self) -> None:
        """End the server: it finishes what it is computing, then goes. Does nothing if it is not running."""
        if self._guard is None:
            return
        code = self._stop_guard()
        if code == 0 and self._owns_log and self.log_file is not None:
            self.log_file.unlink(missing_ok=True)
            self.log_file = None

    def wait(self, timeout_s: float | None = None) -> int:
        """Block until the server ends by itself; its exit code, 128 + signal if it was killed.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout_s` seconds.
        """
        assert self._guard is not None, "wait() called before start()"
        return self._guard.wait(timeout_s)

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The last lines of the server's log."""
        if self.log_file is None or not self.log_file.exists():
            return ""
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _start_once(self, bundle: Bundle, stored: Sequence[StoredModel], deadline: float) -> None:
        self._open_log()
        try:
            self._spawn(bundle)
            wait_until_ready(self.url, stored, is_alive=lambda: self.is_running, deadline=deadline)
        except ServerStartError as error:
            tail, died = self.log_tail(), not self.is_running
            code = self._stop_guard()
            if died and _PORT_LOST in tail:
                raise _PortLostError(
                    f"port {self._port} was taken while the server started; try again"
                ) from error
            what = f"tritonserver ended with code {code} before it was ready" if died else str(error)
            raise ServerStartError(f"{what}; last lines of {self.log_file}:\n{tail}") from error
        except BaseException:
            self._stop_guard()
            raise
        _log.info("tritonserver serves %s at %s, log %s", ", ".join(self._models), self.url, self.log_file)

    def _spawn(self, bundle: Bundle) -> None:
        assert self.log_file is not None
        scratch = Path(tempfile.mkdtemp(prefix="conch-triton-"))
        shm_prefix = f"conch_{os.getpid()}_{secrets.token_hex(4)}_"
        self._cleanup = (shm_prefix, str(scratch))
        settings = {
            "command": self._command(bundle, bundle.make_backend_directory(scratch), shm_prefix),
            "log": str(self.log_file),
            "shm_prefix": shm_prefix,
            "scratch": str(scratch),
            "grace_s": _GRACE_S,
            "parent_pid": os.getpid(),
        }
        with self.log_file.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us, not it: the stop is ours to order
                env=bundle.environment(cpu_threads=self._cpu_threads),
            )
        assert self._guard.stdout is not None
        self._server_pid = int(self._guard.stdout.readline() or "0")

    def _command(self, bundle: Bundle, backends: Path, shm_prefix: str) -> list[str]:
        command = [
            str(bundle.server),
            f"--model-repository={self._model_store.resolve()}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            "--model-control-mode=explicit",  # also lets a client reload a model whose stub died
            f"--model-config-name={EMBEDDED_NAME}",
            "--disable-auto-complete-config",  # configs are complete; guessing doubles the start-up time
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            f"--grpc-address={self._host or '0.0.0.0'}",
            f"--grpc-port={self._port}",
            "--allow-http=0",
            "--allow-metrics=0",
            *(f"--load-model={name}" for name in self._loaded),
        ]
        if self._host != "localhost" and not self._host.startswith("127."):
            # Loading a model runs code from the store, so beyond loopback nobody may ask for it.
            secret = secrets.token_hex(16)
            command.append(
                f"--grpc-restricted-protocol=model-repository,shared-memory,trace,logging:admin={secret}"
            )
        return command

    def _open_log(self) -> None:
        try:
            if self.log_file is None:
                descriptor, name = tempfile.mkstemp(prefix="conch-tritonserver-", suffix=".log")
                os.close(descriptor)
                self.log_file = Path(name)
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self.log_file.write_bytes(b"")
        except OSError as error:
            raise ServerStartError(
                f"log file {self.log_file} cannot be written ({error.strerror})"
            ) from error

    def _stop_guard(self) -> int:
        if self._guard is None:
            return 0
        assert self._guard.stdin is not None and self._guard.stdout is not None
        # Forked children of ours may still hold the pipe open, so ask in words too.
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


class _PortLostError(ServerStartError):
    """Another program took the port between our look and the server's."""


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ServerStartError(
                f"cannot listen on {host} ({error.strerror}); give an IPv4 address or name of this machine"
            ) from error
        return probe.getsockname()[1]


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 65_536:
        raise ServerStartError(f"port {port} does not exist; choose one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ServerStartError(
                f"port {port} on {host or 'this machine'} {taken}; "
                "stop what listens there or choose another port"
            ) from error
