"""Settings of a server, and the tritonserver flags that express them.

Triton's releases differ in their flags and refuse those that they do not know, so flags are looked up in
`tritonserver --help` of the very binary or image that is started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from conch.access.tls import ServerTls
from conch.errors import ServerStartError
from conch.triton.contract import ADMIN_KEY, EMBEDDED_NAME, SECRET_KEY

LOOPBACK = "127.0.0.1"
EXIT_TIMEOUT_S = 5
# Loading a model runs code from the store, or code that the request itself brings.
_ADMIN_PROTOCOLS = "model-repository,shared-memory,trace,logging"
_USER_PROTOCOLS = "health,metadata,inference,model-config,statistics"
# Request objects allocated in advance: 64 gave 2,780-3,230 requests/s against 2,580 with Triton's 8.
_ALLOCATION_POOL = 64
_FLAG = re.compile(r"^\s+--([a-z0-9-]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of one tritonserver, in any runtime.

    model_store: the store's path outside of a container.
    models: names of the models to load.
    host: address to listen on, but for metrics.
    http_port, metrics_port: None leaves them closed.
    metrics_host: address on which the metrics port listens; it asks for no secret.
    gpu: value of CUDA_VISIBLE_DEVICES; "" serves on the CPU, from `configs/embedded.pbtxt`.
    cpu_threads: threads a model may compute with.
    tls: certificates; None speaks plain text.
    secret: value that every request must carry in a header; "" asks for none.
    admin_secret: the same for requests that load models, share memory, trace or log; "" asks for none.
    extra: further flags of the user, `--name=value`.
    """

    model_store: Path
    models: tuple[str, ...]
    grpc_port: int
    host: str = LOOPBACK
    http_port: int | None = None
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK
    gpu: str = ""
    cpu_threads: int = 1
    tls: ServerTls | None = None
    secret: str = field(default="", repr=False)
    admin_secret: str = field(default="", repr=False)
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerPaths:
    """Paths as the server process sees them, which in a container are others than outside.

    model_store: the model store.
    repository: folder that the server loads models from, links into the model store.
    backends: folder of back ends; None takes the image's own.
    shm_prefix: beginning of the names of the server's files in /dev/shm.
    cert, key, ca: certificate files; "" where there are none.
    """

    model_store: str
    repository: str
    backends: str | None
    shm_prefix: str
    cert: str = ""
    key: str = ""
    ca: str = ""


def known_flags(help_text: str) -> frozenset[str]:
    """Return the names of the flags in the text of `tritonserver --help`, without dashes.

    Raises:
        ServerStartError: the text lists none, so the program is no tritonserver.
    """
    names = frozenset(_FLAG.findall(help_text))
    if not {"model-repository", "grpc-port"} <= names:
        beginning = help_text.strip()[:300] or "nothing"
        raise ServerStartError(f"`tritonserver --help` does not list its flags; it says: {beginning}")
    return names


def server_flags(settings: ServerSettings, paths: ServerPaths, known: frozenset[str]) -> list[str]:
    """Return the arguments of tritonserver.

    known: names of this release's flags, from `known_flags`.

    Raises:
        ServerStartError: this release lacks a flag that is needed or that the user gave; names the flag.
    """
    address = settings.host or "0.0.0.0"
    flags = {
        "model-repository": paths.repository,
        "backend-config": f"python,shm-region-prefix-name={paths.shm_prefix}",
        "model-control-mode": "explicit",  # dead models and new versions are loaded on demand
        "disable-auto-complete-config": None,  # configs are complete; guessing doubles the start-up time
        "exit-timeout-secs": str(EXIT_TIMEOUT_S),
        "grpc-address": address,
        "grpc-port": str(settings.grpc_port),
        "grpc-infer-allocation-pool-size": str(_ALLOCATION_POOL),
        "allow-http": _switch(settings.http_port is not None),
        "allow-metrics": _switch(settings.metrics_port is not None),
    }
    if paths.backends is not None:
        flags["backend-directory"] = paths.backends
    if not settings.gpu:
        flags["model-config-name"] = EMBEDDED_NAME
    if settings.http_port is not None:
        flags |= {"http-address": address, "http-port": str(settings.http_port)}
    if settings.metrics_port is not None:
        flags |= {"metrics-address": settings.metrics_host, "metrics-port": str(settings.metrics_port)}
        # The bundled server looks for a GPU's counters in vain, for seconds.
        flags |= {"allow-gpu-metrics": _switch(bool(settings.gpu))}
    if settings.tls is not None:
        flags |= _tls_flags(settings.tls, paths)
    _refuse_unknown([*flags, *(extra.removeprefix("--").split("=", 1)[0] for extra in settings.extra)], known)
    return [
        *(f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()),
        *_restrictions(settings),
        *(f"--load-model={name}" for name in settings.models),
        *settings.extra,
    ]


def _tls_flags(tls: ServerTls, paths: ServerPaths) -> dict[str, str | None]:
    flags: dict[str, str | None] = {
        "grpc-use-ssl": "1",
        "grpc-server-cert": paths.cert,
        "grpc-server-key": paths.key,
    }
    if tls.require_client_cert:
        flags |= {"grpc-use-ssl-mutual": "1", "grpc-root-cert": paths.ca}
    return flags


def _restrictions(settings: ServerSettings) -> list[str]:
    groups = []
    if settings.secret:
        groups.append((_USER_PROTOCOLS, SECRET_KEY, settings.secret))
    if settings.admin_secret:
        groups.append((_ADMIN_PROTOCOLS, ADMIN_KEY, settings.admin_secret))
    names = ["grpc-restricted-protocol"] + ["http-restricted-api"] * (settings.http_port is not None)
    return [f"--{name}={protocols}:{key}={secret}" for name in names for protocols, key, secret in groups]


def _refuse_unknown(names: list[str], known: frozenset[str]) -> None:
    unknown = sorted(set(names) - known)
    if unknown:
        raise ServerStartError(
            f"this tritonserver has no flag {', '.join(f'--{name}' for name in unknown)}: "
            "it is of another release (see `tritonserver --help`); take another image, or leave the flag out"
        )


def _switch(value: bool) -> str:
    return "1" if value else "0"
