"""`conch serve up`: from its options to servers that run, in the foreground or detached.

python -m conch.serving.deployment.up NAME      what `run_detached` starts; its options come as JSON on stdin
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from conch.access.secrets import secret_from
from conch.access.tls import own_client
from conch.config import TlsConfig
from conch.errors import ConchError, ServerStartError
from conch.log import setup_logging
from conch.serving.deployment import state
from conch.serving.deployment.options import NetworkOptions, PlacementOptions, StatusOptions, UpOptions
from conch.serving.deployment.state import Deployment, Replica
from conch.serving.deployment.supervisor import RestartPolicy, Supervisor
from conch.serving.server.health import wait_until_ready
from conch.serving.server.runtime import ApptainerRuntime, BundledRuntime, DockerRuntime, Runtime
from conch.serving.server.server import ServerOptions, TritonServer
from conch.store.store import read_with_members
from conch.triton.channel import Access, configured_access

_POLL_S = 0.1
_PORT_STEP = 10


def run(options: UpOptions) -> int:
    """Serve as the options say, or only check the server at `options.placement.url`; returns the exit code.

    Raises:
        ConchError: see `run_foreground`, `run_detached` and `check_running`.
    """
    if options.placement.url:
        check_running(options, options.placement.url)
        return 0
    if options.detach:
        run_detached(options)
        return 0
    return run_foreground(options)


def check_running(options: UpOptions, url: str) -> None:
    """Check that the server at `url` scores the models right, and print how to reach it.

    Raises:
        ServerStartError: it is not ready in time, refuses us, is of another kind, or a score is wrong.
        ModelStoreError: a model is missing or damaged.
    """
    models = read_with_members(options.model_store, options.models)
    deadline = time.monotonic() + options.supervision.ready_timeout
    access = client_access(options.network)
    wait_until_ready(url, models, access, is_alive=lambda: True, deadline=deadline)
    print(f"{url} is ready: the golden samples score right", file=sys.stderr)
    _print_exports(options.models, [url])


def client_access(options: NetworkOptions | StatusOptions) -> Access:
    """Return what lets this process into a server that it did not start."""
    tls = TlsConfig(ca=options.tls_ca, cert=options.tls_cert, key=options.tls_key)
    return configured_access(tls, options.secret_env)


def plan(options: UpOptions, folder: Path) -> list[TritonServer]:
    """Return the servers that the options describe, checked as far as that goes without starting one.

    folder: where they log, unless `log_file` says otherwise.

    Raises:
        ServerStartError: a certificate is unfit.
        ConfigError: the secret's variable is not set.
    """
    placement, network, supervision = options.placement, options.network, options.supervision
    tls, secret, runtime = network.server_tls(), secret_from(network.secret_env), make_runtime(placement)
    servers: list[TritonServer] = []
    for number in range(placement.replicas):
        server_options = ServerOptions(
            runtime=runtime,
            http_port=_replica_port(network.http_port, number),
            metrics_port=_replica_port(network.metrics_port, number),
            metrics_host=network.metrics_host,
            gpu=placement.gpus[number % len(placement.gpus)] if placement.gpus else "",
            tls=tls,
            secret=secret,
            allow_anyone=network.allow_anyone,
            flags=placement.server_flags,
            log_max_bytes=int(supervision.log_max_mb * 1e6),
            log_keep=supervision.log_keep,
        )
        server = TritonServer(
            options.model_store,
            options.models,
            grpc_port=_replica_port(network.grpc_port, number) or None,
            host=network.host,
            log_file=supervision.log_file or folder / f"replica-{number}.log",
            ready_timeout_s=supervision.ready_timeout,
            cpu_threads=placement.cpu_threads,
            options=server_options,
        )
        servers.append(server)
    return servers


def _replica_port(first: int | None, number: int) -> int | None:
    """Port of replica `number`; None, which is closed, and 0, a free one, are the same for all."""
    return first + _PORT_STEP * number if first else first


def make_runtime(placement: PlacementOptions) -> Runtime:
    """Return what `placement` runs the servers in."""
    if placement.runtime == "bundled":
        return BundledRuntime()
    assert placement.image is not None
    if placement.runtime == "docker":
        return DockerRuntime(placement.image)
    return ApptainerRuntime(Path(placement.image))


def describe(options: UpOptions, name: str) -> Deployment:
    """Return the record of a deployment that this process supervises, still without servers.

    Raises:
        ServerStartError: a certificate is unfit.
    """
    tls = options.network.server_tls()
    client = own_client(tls) if tls is not None else None
    return Deployment(
        name=name,
        machine=socket.gethostname(),
        pid=os.getpid(),
        model_store=options.model_store.resolve(),
        models=options.models,
        tls_ca=client.ca.resolve() if client else None,
        tls_cert=client.cert.resolve() if client and client.cert else None,
        tls_key=client.key.resolve() if client and client.key else None,
        tls_name=client.server_name if client else "",
        secret_env=options.network.secret_env,
    )


def run_foreground(options: UpOptions) -> int:
    """Serve until a signal says stop; returns 0 then.

    Raises:
        ServerStartError: a server did not start, or all have used up their restarts.
        ServingError: the name is in use, or the run folder cannot be written.
        ConfigError: the secret's variable is not set.
        ModelStoreError: a model is missing or damaged.
    """
    read_with_members(options.model_store, options.models)  # says so before anything is started
    with state.claimed(options.name, options.models[0]) as (name, folder):
        deployment = describe(options, name)
        servers = plan(options, folder)
        setup_logging()
        stop, swap = threading.Event(), threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stop.set())
        signal.signal(signal.SIGUSR1, lambda *_: swap.set())

        def record() -> None:
            changes = {"replicas": supervisor.replicas, "swaps": supervisor.swaps}
            state.write(folder, deployment.model_copy(update=changes))

        policy = RestartPolicy(
            max_restarts=options.supervision.max_restarts,
            watch_s=options.supervision.watch_interval,
            follow_store=options.supervision.follow_store,
            load_timeout_s=max(options.supervision.ready_timeout, 60.0),
        )
        supervisor = Supervisor(servers, deployment.model_store, policy, record)
        record()
        models = ", ".join(options.models)
        print(f"starting {len(servers)} tritonserver with {models} ...", file=sys.stderr, flush=True)
        _supervise(supervisor, deployment, stop, swap)
    return 0


def _supervise(
    supervisor: Supervisor, deployment: Deployment, stop: threading.Event, swap: threading.Event
) -> None:
    """Run the servers until `stop` is set; `swap` has them load new versions."""
    supervisor.start()
    try:
        if not _wait_until_ready(supervisor, stop):
            return
        _announce(deployment, supervisor.replicas)
        while not stop.wait(_POLL_S):
            if swap.is_set():
                swap.clear()
                supervisor.swap()
            if not supervisor.is_running:
                raise ServerStartError(_problems(supervisor.replicas))
    finally:
        supervisor.stop()
    print("stopped", file=sys.stderr)


def _wait_until_ready(supervisor: Supervisor, stop: threading.Event) -> bool:
    """Wait for all servers to have been ready; False if `stop` was set before.

    Raises:
        ServerStartError: one of them does not start.
    """
    while not all(replica.versions for replica in supervisor.replicas):
        if any(replica.phase == "failed" for replica in supervisor.replicas):
            raise ServerStartError(_problems(supervisor.replicas))
        if stop.wait(_POLL_S):
            return False
    return True


def _announce(deployment: Deployment, replicas: Sequence[Replica]) -> None:
    for replica in replicas:
        addresses = [replica.url]
        addresses += [f"HTTP {replica.http_url}"] if replica.http_url else []
        addresses += [f"metrics {replica.metrics_url}"] if replica.metrics_url else []
        print(f"ready at {', '.join(addresses)}, log {replica.log}", file=sys.stderr)
    print(f"stop with Ctrl-C, or conch serve down {deployment.name}", file=sys.stderr)
    _print_exports(deployment.models, [replica.url for replica in replicas])


def _print_exports(models: Sequence[str], urls: Sequence[str]) -> None:
    for model in models:
        for url in urls:
            print(f"export TRITON_HOST={url}/{model}", flush=True)


def _problems(replicas: Sequence[Replica]) -> str:
    return "\n".join(dict.fromkeys(replica.problem for replica in replicas if replica.problem))


def run_detached(options: UpOptions) -> None:
    """Start a supervisor of these options in a session of its own, and return once its servers are ready.

    The supervisor gets the options as JSON on stdin; the name on its command line is for people who list
    processes.

    Raises:
        ServerStartError: the supervisor ended before that; says why.
        ServingError: the name is in use, or the run folder cannot be written.
    """
    with state.claimed(options.name, options.models[0]) as (name, folder):
        pass
    log = folder / "supervisor.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "conch.serving.deployment.up", name],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that died says why in its log
            child.stdin.write(options.model_copy(update={"name": name}).model_dump_json().encode())
        deployment = _wait_for(child, name, log)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    child.returncode = 0  # it lives on: no warning from Popen's finaliser
    for number, replica in enumerate(deployment.replicas):
        print(f"replica {number} ready at {replica.url}, log {replica.log}", file=sys.stderr)
    print(f"{name} runs in the background; conch serve status|logs|down {name}", file=sys.stderr)
    _print_exports(deployment.models, [replica.url for replica in deployment.replicas])


def _wait_for(child: subprocess.Popen[bytes], name: str, log: Path) -> Deployment:
    """Wait for the deployment of the supervisor `child` to be ready.

    Raises:
        ServerStartError: the supervisor ended; its last error is the reason.
    """
    while child.poll() is None:
        with contextlib.suppress(ConchError):  # it has not come so far yet
            deployment = state.read(name)
            if deployment.pid == child.pid and deployment.is_ready:
                return deployment
        time.sleep(_POLL_S)
    output = log.read_text(encoding="utf-8", errors="replace")
    _, error, reason = output.rpartition("error: ")
    reason = reason.strip() if error else output[-2000:]
    raise ServerStartError(reason or f"the supervisor ended with code {child.returncode} and said nothing")


def main() -> int:
    """Supervise in the background: options as JSON on stdin; an error goes to stderr, which is the log."""
    try:
        return run_foreground(UpOptions.model_validate_json(sys.stdin.read()))
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
