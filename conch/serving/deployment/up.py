"""`python -m conch.serving up`: from its arguments to servers that run, in the foreground or detached."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from conch.config import TlsConfig
from conch.errors import ConchError, ServerStartError, ServingError
from conch.log import setup_logging
from conch.serving.deployment import state as deployment
from conch.serving.deployment.state import Deployment, Replica
from conch.serving.deployment.supervisor import Policy, Supervisor
from conch.serving.server.health import wait_until_ready
from conch.serving.server.runtime import ApptainerRuntime, BundledRuntime, DockerRuntime, Runtime
from conch.serving.server.server import ServerOptions, TritonServer
from conch.store.store import read_with_members
from conch.triton.channel import Access, configured_access, secret_from
from conch.triton.tls import ServerTls, own_client

_POLL_S = 0.1
_PORT_STEP = 10


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the arguments ask for, checked as far as that goes without starting anything."""

    servers: list[TritonServer]
    policy: Policy
    deployment: Deployment


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop (0), or until all servers have given up (1)."""
    _check_numbers(arguments)
    if arguments.url:
        _refuse_with_url(arguments)
        return _check_running(arguments)
    first = arguments.model[0]
    if arguments.detach:
        return _detach(arguments)
    with deployment.claimed(arguments.name, first) as (name, folder):
        return _supervise(_plan(arguments, name, folder), folder)


def _check_numbers(arguments: argparse.Namespace) -> None:
    lowest = {"replicas": 1, "cpu_threads": 1, "max_restarts": 0, "log_keep": 0}
    for name, low in lowest.items():
        if getattr(arguments, name) < low:
            raise ServingError(f"{_flag(name)} {getattr(arguments, name)}: at least {low} is needed")
    for name in ("ready_timeout", "watch_interval", "log_max_mb"):
        if not getattr(arguments, name) > 0:
            raise ServingError(f"{_flag(name)} {getattr(arguments, name):g}: it must be above 0")


def _refuse_with_url(arguments: argparse.Namespace) -> None:
    names = (
        "detach",
        "name",
        "image",
        "gpu",
        "server_flag",
        "follow_store",
        "log_file",
        "require_client_cert",
    )
    asked = [_flag(name) for name in names if getattr(arguments, name)]
    asked += ["--replicas"] if arguments.replicas > 1 else []
    asked += ["--runtime"] if arguments.runtime != "bundled" else []
    if asked:
        raise ServingError(
            "--url checks a server that is up already and starts none, "
            f"so {', '.join(asked)} would have no effect"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_running(arguments: argparse.Namespace) -> int:
    """Ready and right? Then say how to reach it; the server stays its owner's."""
    models = read_with_members(arguments.model_store, arguments.model)
    deadline = time.monotonic() + arguments.ready_timeout
    access = client_access(arguments)
    wait_until_ready(arguments.url, models, access, is_alive=lambda: True, deadline=deadline)
    print(f"{arguments.url} is ready: the golden samples score right", file=sys.stderr)
    _print_exports(arguments.model, [arguments.url])
    return 0


def client_access(arguments: argparse.Namespace) -> Access:
    """How to get into a server that is not ours, from `--tls-*` and `--secret-env`."""
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise ServingError("--tls-cert and --tls-key belong together")
    if arguments.tls_cert is not None and arguments.tls_ca is None:
        raise ServingError("--tls-cert needs --tls-ca, the authority that signed the server's certificate")
    tls = TlsConfig(ca=arguments.tls_ca, cert=arguments.tls_cert, key=arguments.tls_key)
    return configured_access(tls, arguments.secret_env)


def _plan(arguments: argparse.Namespace, name: str, folder: Path) -> _Plan:
    tls = _server_tls(arguments)
    client = own_client(tls) if tls is not None else None
    secret = secret_from(arguments.secret_env)
    if arguments.log_file is not None and arguments.replicas > 1:
        raise ServingError("--log-file is for one server; the logs of several stand in the run folder")
    runtime = _runtime(arguments)
    servers = [
        _server(arguments, number, runtime, tls, secret, folder) for number in range(arguments.replicas)
    ]
    policy = Policy(
        max_restarts=arguments.max_restarts,
        watch_s=arguments.watch_interval,
        follow_store=arguments.follow_store,
        load_timeout_s=max(arguments.ready_timeout, 60.0),
    )
    described = Deployment(
        name=name,
        machine=socket.gethostname(),
        pid=os.getpid(),
        model_store=arguments.model_store.resolve(),
        models=tuple(arguments.model),
        tls_ca=client.ca.resolve() if client else None,
        tls_cert=client.cert.resolve() if client and client.cert else None,
        tls_key=client.key.resolve() if client and client.key else None,
        tls_name=client.server_name if client else "",
        secret_env=arguments.secret_env,
    )
    return _Plan(servers, policy, described)


def _server(
    arguments: argparse.Namespace,
    number: int,
    runtime: Runtime,
    tls: ServerTls | None,
    secret: str,
    folder: Path,
) -> TritonServer:
    def port(first: int | None) -> int | None:
        return first + _PORT_STEP * number if first else first

    options = ServerOptions(
        runtime=runtime,
        http_port=port(arguments.http_port),
        metrics_port=port(arguments.metrics_port),
        gpu=arguments.gpu[number % len(arguments.gpu)] if arguments.gpu else "",
        tls=tls,
        secret=secret,
        restrict_admin=True,  # others who share this machine reach loopback too
        flags=tuple(arguments.server_flag),
        log_max_bytes=int(arguments.log_max_mb * 1e6),
        log_keep=arguments.log_keep,
    )
    return TritonServer(
        arguments.model_store,
        arguments.model,
        grpc_port=port(arguments.grpc_port) or None,
        host=arguments.host,
        log_file=arguments.log_file or folder / f"replica-{number}.log",
        ready_timeout_s=arguments.ready_timeout,
        cpu_threads=arguments.cpu_threads,
        options=options,
    )


def _runtime(arguments: argparse.Namespace) -> Runtime:
    if arguments.runtime == "bundled":
        if arguments.image:
            raise ServingError("--image needs --runtime apptainer or --runtime docker")
        return BundledRuntime()
    if not arguments.image:
        raise ServingError(f"--runtime {arguments.runtime} needs --image")
    if arguments.runtime == "docker":
        return DockerRuntime(arguments.image)
    return ApptainerRuntime(Path(arguments.image))


def _server_tls(arguments: argparse.Namespace) -> ServerTls | None:
    if arguments.tls_cert is None and arguments.tls_key is None:
        if arguments.tls_ca is not None or arguments.require_client_cert:
            raise ServingError("--tls-ca and --require-client-cert need --tls-cert and --tls-key")
        return None
    if arguments.tls_cert is None or arguments.tls_key is None:
        raise ServingError("--tls-cert and --tls-key belong together")
    return ServerTls(arguments.tls_cert, arguments.tls_key, arguments.tls_ca, arguments.require_client_cert)


def _supervise(plan: _Plan, folder: Path) -> int:
    setup_logging()
    stop, swap = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGUSR1, lambda *_: swap.set())

    def tell() -> None:
        now = plan.deployment.model_copy(update={"replicas": supervisor.replicas, "swaps": supervisor.swaps})
        deployment.write(folder, now)

    supervisor = Supervisor(plan.servers, plan.deployment.model_store, plan.policy, tell)
    tell()
    models = ", ".join(plan.deployment.models)
    print(f"starting {len(plan.servers)} tritonserver with {models} ...", file=sys.stderr, flush=True)
    supervisor.start()
    try:
        if not _wait_until_ready(supervisor, stop):
            return 0
        _announce(plan.deployment, supervisor.replicas)
        while not stop.wait(_POLL_S):
            if swap.is_set():
                swap.clear()
                supervisor.swap()
            if not supervisor.is_running:
                raise ServerStartError(_problems(supervisor.replicas))
    finally:
        supervisor.stop()
    print("stopped", file=sys.stderr)
    return 0


def _wait_until_ready(supervisor: Supervisor, stop: threading.Event) -> bool:
    """True once all servers have been ready, False if told to stop before.

    Raises:
        ServerStartError: one of them does not start.
    """
    while not all(replica.versions for replica in supervisor.replicas):
        if any(replica.phase == "failed" for replica in supervisor.replicas):
            raise ServerStartError(_problems(supervisor.replicas))
        if stop.wait(_POLL_S):
            return False
    return True


def _announce(described: Deployment, replicas: tuple[Replica, ...]) -> None:
    for replica in replicas:
        more = [f"HTTP {replica.http_url}"] if replica.http_url else []
        more += [f"metrics {replica.metrics_url}"] if replica.metrics_url else []
        where = ", ".join([replica.url, *more, f"log {replica.log}"])
        print(f"ready at {where}", file=sys.stderr)
    print(f"stop with Ctrl-C, or python -m conch.serving down {described.name}", file=sys.stderr)
    _print_exports(described.models, [replica.url for replica in replicas])


def _print_exports(models: tuple[str, ...] | list[str], urls: list[str]) -> None:
    for model in models:
        for url in urls:
            print(f"export TRITON_HOST={url}/{model}", flush=True)


def _problems(replicas: tuple[Replica, ...]) -> str:
    return "\n".join(dict.fromkeys(replica.problem for replica in replicas if replica.problem))


def _detach(arguments: argparse.Namespace) -> int:
    """Start this same command in a session of its own, and wait with it until it is ready."""
    with deployment.claimed(arguments.name, arguments.model[0]) as (name, folder):
        pass
    log = folder / "supervisor.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            _command(arguments, name),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        described = _wait_for(child, name, log)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    child.returncode = 0  # it lives on: no warning from Popen's finaliser
    for number, replica in enumerate(described.replicas):
        print(f"replica {number} ready at {replica.url}, log {replica.log}", file=sys.stderr)
    print(f"{name} runs in the background; python -m conch.serving status|logs|down {name}", file=sys.stderr)
    _print_exports(described.models, [replica.url for replica in described.replicas])
    return 0


def _wait_for(child: subprocess.Popen[bytes], name: str, log: Path) -> Deployment:
    while child.poll() is None:
        with contextlib.suppress(ConchError):  # it has not come so far yet
            described = deployment.read(name)
            if described.pid == child.pid and described.is_ready:
                return described
        time.sleep(_POLL_S)
    said = log.read_text(encoding="utf-8", errors="replace")
    reason = (
        said[said.rfind("error: ") :].removeprefix("error: ").strip() if "error: " in said else said[-2000:]
    )
    raise ServerStartError(reason or f"the supervisor ended with code {child.returncode} and said nothing")


def _command(arguments: argparse.Namespace, name: str) -> list[str]:
    """The command line of `arguments`, in the foreground and with this name."""
    words = [sys.executable, "-m", "conch.serving", "up", f"--name={name}"]
    for key, value in vars(arguments).items():
        if key in ("run", "detach", "name", "url"):
            continue
        flag = _flag(key)
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag}={item}" for item in value]
        elif value not in (None, False):
            words.append(f"{flag}={value}")
        elif value == 0 and value is not False:
            words.append(f"{flag}=0")
    return words
