"""What a server is asked to be, and the tritonserver flags that say it.

Triton's releases differ in their flags and refuse those that they do not know, so flags are looked up in
`tritonserver --help` of the very binary or image that is started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from conch.errors import ServerStartError
from conch.triton.contract import ADMIN_KEY, EMBEDDED_NAME, SECRET_KEY
from conch.triton.tls import ServerTls

LOOPBACK = "127.0.0.1"
EXIT_TIMEOUT_S = 5
# Loading a model runs code from the store, or code that the request itself brings.
_ADMIN_PROTOCOLS = "model-repository,shared-memory,trace,logging"
_USER_PROTOCOLS = "health,metadata,inference,model-config,statistics"
# Made ready in advance for requests in flight: 64 gave 2,780-3,230 requests/s against 2,580 with Triton's 8.
_ALLOCATION_POOL = 64
_FLAG = re.compile(r"^\s+--([a-z0-9-]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One tritonserver, whatever it runs in.

    host: address to listen on, for all ports.
    http_port, metrics_port: None leaves them closed.
    gpu: what CUDA_VISIBLE_DEVICES is set to; "" serves on the CPU, from `configs/embedded.pbtxt`.
    cpu_threads: threads a model may compute with.
    secret: what every request must carry in a header; "" asks for none.
    admin_secret: the same for requests that load models, share memory, trace or log; "" asks for none.
    extra: flags of the user, `--name=value`.
    """

    model_store: Path
    models: tuple[str, ...]
    grpc_port: int
    host: str = LOOPBACK
    http_port: int | None = None
    metrics_port: int | None = None
    gpu: str = ""
    cpu_threads: int = 1
    tls: ServerTls | None = None
    secret: str = field(default="", repr=False)
    admin_secret: str = field(default="", repr=False)
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Places:
    """Where the server process finds things, which in a container is not where they are outside.

    repository: what it loads models from, links into the model store.
    backends: None takes the image's own.
    shm_prefix: starts the names of its files in /dev/shm.
    """

    model_store: str
    repository: str
    backends: str | None
    shm_prefix: str
    cert: str = ""
    key: str = ""
    ca: str = ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host == "localhost" or host.startswith("127.")


def known_flags(help_text: str) -> frozenset[str]:
    """Names of the flags that `tritonserver --help` lists, without dashes.

    Raises:
        ServerStartError: it lists none, so it is no tritonserver.
    """
    found = frozenset(_FLAG.findall(help_text))
    if not {"model-repository", "grpc-port"} <= found:
        said = help_text.strip()[:300] or "nothing"
        raise ServerStartError(f"`tritonserver --help` does not list its flags; it says: {said}")
    return found


def server_flags(settings: ServerSettings, places: Places, known: frozenset[str]) -> list[str]:
    """The arguments of tritonserver.

    known: from `known_flags`.

    Raises:
        ServerStartError: a flag that is needed or asked for does not exist in this release; names it.
    """
    address = settings.host or "0.0.0.0"
    flags = {
        "model-repository": places.repository,
        "backend-config": f"python,shm-region-prefix-name={places.shm_prefix}",
        "model-control-mode": "explicit",  # dead models and new versions are loaded on demand
        "disable-auto-complete-config": None,  # configs are complete; guessing doubles the start-up time
        "exit-timeout-secs": str(EXIT_TIMEOUT_S),
        "grpc-address": address,
        "grpc-port": str(settings.grpc_port),
        "grpc-infer-allocation-pool-size": str(_ALLOCATION_POOL),
        "allow-http": _yes(settings.http_port is not None),
        "allow-metrics": _yes(settings.metrics_port is not None),
    }
    if places.backends is not None:
        flags["backend-directory"] = places.backends
    if not settings.gpu:
        flags["model-config-name"] = EMBEDDED_NAME
    if settings.http_port is not None:
        flags |= {"http-address": address, "http-port": str(settings.http_port)}
    if settings.metrics_port is not None:
        flags |= {"metrics-address": address, "metrics-port": str(settings.metrics_port)}
        # The bundled server looks for a GPU's counters in vain, for seconds.
        flags |= {"allow-gpu-metrics": _yes(bool(settings.gpu))}
    if settings.tls is not None:
        flags |= _tls_flags(settings.tls, places)
    _refuse_unknown([*flags, *(extra.removeprefix("--").split("=", 1)[0] for extra in settings.extra)], known)
    return [
        *(f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()),
        *_restrictions(settings),
        *(f"--load-model={name}" for name in settings.models),
        *settings.extra,
    ]


def _tls_flags(tls: ServerTls, places: Places) -> dict[str, str | None]:
    flags: dict[str, str | None] = {
        "grpc-use-ssl": "1",
        "grpc-server-cert": places.cert,
        "grpc-server-key": places.key,
    }
    if tls.require_client_cert:
        flags |= {"grpc-use-ssl-mutual": "1", "grpc-root-cert": places.ca}
    return flags


def _restrictions(settings: ServerSettings) -> list[str]:
    groups = []
    if settings.secret:
        groups.append((_USER_PROTOCOLS, SECRET_KEY, settings.secret))
    if settings.admin_secret:
        groups.append((_ADMIN_PROTOCOLS, ADMIN_KEY, settings.admin_secret))
    names = ["grpc-restricted-protocol"] + ["http-restricted-api"] * (settings.http_port is not None)
    return [f"--{name}={what}:{key}={value}" for name in names for what, key, value in groups]


def _refuse_unknown(names: list[str], known: frozenset[str]) -> None:
    unknown = sorted(set(names) - known)
    if unknown:
        raise ServerStartError(
            f"this tritonserver has no flag {', '.join(f'--{name}' for name in unknown)}: "
            "it is of another release (see `tritonserver --help`); take another image, or leave the flag out"
        )


def _yes(value: bool) -> str:
    return "1" if value else "0"
