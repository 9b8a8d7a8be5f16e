"""The options of `conch serve install|up|down|status|logs|swap`, one section a command.

`conch/serving/__main__.py` makes the command line from these fields and their docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from conch.access.tls import ServerTls
from conch.cli import Option, option_names
from conch.config import Section
from conch.serving.server.flags import LOOPBACK

_HOST_PORT = Option(metavar="HOST:PORT")
_NAME = Option(positional=True)


@dataclass(frozen=True)
class _StartsServer:
    """Marks a field that has no effect where a server is only checked, with `--url`."""


_STARTS_SERVER = _StartsServer()


class PlacementOptions(Section):
    """Runtime and resources of the servers."""

    runtime: Annotated[Literal["bundled", "apptainer", "docker"], _STARTS_SERVER] = "bundled"
    """Program that starts a server: the binary of this environment, or a container."""

    image: Annotated[str | None, _STARTS_SERVER] = None
    """Image of the container: with apptainer its file, with docker its name."""

    url: Annotated[str | None, _HOST_PORT] = None
    """gRPC address of a server that is up already: check it and leave."""

    gpus: Annotated[tuple[str, ...], Option(("--gpu",), repeated=True), _STARTS_SERVER] = ()
    """GPU of a replica, number or UUID; may be given again, the replicas take them in turn. None serves on
    the CPU."""

    replicas: Annotated[int, _STARTS_SERVER] = Field(default=1, ge=1)
    """Servers to start."""

    cpu_threads: int = Field(default=1, ge=1)
    """Threads that a model computes with."""

    server_flags: Annotated[
        tuple[str, ...], Option(("--server-flag",), metavar="--NAME=VALUE", repeated=True), _STARTS_SERVER
    ] = ()
    """Further flag of tritonserver; may be given again."""

    @model_validator(mode="after")
    def _image_fits_runtime(self) -> PlacementOptions:
        if self.url:
            return self
        if self.runtime == "bundled" and self.image:
            raise ValueError("--image needs --runtime apptainer or --runtime docker")
        if self.runtime != "bundled" and not self.image:
            raise ValueError(f"--runtime {self.runtime} needs --image")
        return self


class NetworkOptions(Section):
    """Addresses and ports of the servers, and who is let in."""

    host: str = LOOPBACK
    """Address to listen on. Beyond this machine it needs `--secret-env`, `--require-client-cert` or
    `--allow-anyone`."""

    grpc_port: int = 8001
    """Port of gRPC."""

    http_port: int | None = None
    """Port of HTTP; closed unless given."""

    metrics_port: int | None = None
    """Port that Prometheus reads; closed unless given."""

    metrics_host: Annotated[str, _STARTS_SERVER] = LOOPBACK
    """Address of the metrics port, which shows them to whoever reaches it."""

    tls_cert: Path | None = None
    """Certificate (PEM) of the servers, which then speak TLS."""

    tls_key: Path | None = None
    """Private key (PEM, not encrypted) of `--tls-cert`."""

    tls_ca: Path | None = None
    """Authority (PEM) that signed the clients' certificates."""

    require_client_cert: Annotated[bool, _STARTS_SERVER] = False
    """Turn clients without a certificate away."""

    secret_env: str | None = None
    """Environment variable with the secret that clients must send."""

    allow_anyone: Annotated[bool, _STARTS_SERVER] = False
    """Listen beyond this machine without asking clients for a secret or a certificate."""

    def server_tls(self) -> ServerTls | None:
        """Certificates of a new server; None speaks plain text."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_ca, self.require_client_cert)


class SupervisionOptions(Section):
    """Watching, restarts and logs of the servers."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a timeout may be infinite

    ready_timeout: float = Field(default=120.0, gt=0)
    """Seconds to become ready."""

    watch_interval: float = Field(default=30.0, gt=0)
    """Seconds between golden samples."""

    max_restarts: int = Field(default=5, ge=0)
    """Restarts in a row before a server is given up."""

    follow_store: Annotated[bool, _STARTS_SERVER] = False
    """Load new versions as soon as they are in the store."""

    log_file: Annotated[Path | None, _STARTS_SERVER] = None
    """Log of the server; in the run folder unless given."""

    log_max_mb: float = Field(default=10.0, gt=0)
    """Size of a log in MB, at which it is put aside."""

    log_keep: int = Field(default=3, ge=0)
    """Old logs that are kept."""


class InstallOptions(Section):
    """Make, once, the environment that the bundled server's models run in where this one has numpy 2."""

    anew: bool = False
    """Make it again though it is there; stop the servers that run in it first."""


class UpOptions(Section):
    """Serve models, in the foreground until Ctrl-C or SIGTERM, or detached."""

    model_store: Path = Path("model_store")
    """Folder with the converted models."""

    models: Annotated[tuple[str, ...], Option(("--model",), repeated=True)] = Field(min_length=1)
    """Model of the store to serve; may be given again."""

    name: Annotated[str | None, _STARTS_SERVER] = None
    """Name of the deployment; the first model's unless given."""

    detach: Annotated[bool, _STARTS_SERVER] = False
    """Return once the servers are ready; they go on in the background."""

    placement: PlacementOptions = Field(default_factory=PlacementOptions)
    """Runtime and resources of the servers."""

    network: NetworkOptions = Field(default_factory=NetworkOptions)
    """Network; replica n adds 10 n to each port, and 0 takes a free one."""

    supervision: SupervisionOptions = Field(default_factory=SupervisionOptions)
    """Watching, restarts and logs of the servers."""

    @model_validator(mode="after")
    def _fit_together(self) -> UpOptions:
        network = self.network
        if self.placement.url:
            _refuse_without_effect(self)
            _check_client_certificates(network.tls_ca, network.tls_cert, network.tls_key)
            return self
        if (network.tls_cert is None) != (network.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together")
        if network.tls_cert is None and (network.tls_ca is not None or network.require_client_cert):
            raise ValueError("--tls-ca and --require-client-cert need --tls-cert and --tls-key")
        if self.supervision.log_file is not None and self.placement.replicas > 1:
            raise ValueError("--log-file is for one server; the logs of several stand in the run folder")
        return self


def _refuse_without_effect(options: UpOptions) -> None:
    changed = [
        option_names(type(section), name)[-1]
        for section in (options, options.placement, options.network, options.supervision)
        for name, field in type(section).model_fields.items()
        if _STARTS_SERVER in field.metadata and getattr(section, name) != field.default
    ]
    if changed:
        raise ValueError(
            "--url checks a server that is up already and starts none, "
            f"so {', '.join(sorted(changed))} would have no effect"
        )


def _check_client_certificates(ca: Path | None, cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    if cert is not None and ca is None:
        raise ValueError("--tls-cert needs --tls-ca, the authority that signed the server's certificate")


class DownOptions(Section):
    """Stop a deployment."""

    name: Annotated[str | None, _NAME] = None
    """Deployment; may be left out if there is one."""

    all: bool = False
    """Stop all deployments of this user on this machine."""

    timeout: float = Field(default=60.0, ge=0)
    """Seconds to finish requests."""


class StatusOptions(Section):
    """Show what the servers do."""

    name: Annotated[str | None, _NAME] = None
    """Deployment; all of them unless given."""

    watch: bool = False
    """Refresh until Ctrl-C."""

    as_json: Annotated[bool, Option(("--json",))] = False
    """Print one JSON object a look."""

    interval: float = Field(default=1.0, ge=0)
    """Seconds between two looks."""

    url: Annotated[str | None, _HOST_PORT] = None
    """gRPC address of any Triton server, to show instead of a deployment."""

    tls_ca: Path | None = None
    """With `--url`: authority (PEM) that signed the server's certificate."""

    tls_cert: Path | None = None
    """With `--url`: certificate (PEM) to show the server."""

    tls_key: Path | None = None
    """With `--url`: its private key (PEM)."""

    secret_env: str | None = None
    """With `--url`: environment variable with the server's secret."""

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> StatusOptions:
        _check_client_certificates(self.tls_ca, self.tls_cert, self.tls_key)
        return self


class LogsOptions(Section):
    """Show a server's log."""

    name: Annotated[str | None, _NAME] = None
    """Deployment; may be left out if there is one."""

    follow: Annotated[bool, Option(("-f", "--follow"))] = False
    """Go on until Ctrl-C or the deployment's end."""

    lines: Annotated[int, Option(("-n", "--lines"))] = Field(default=50, ge=0)
    """Last lines to show."""

    replica: int = 0
    """Number of the server."""

    supervisor: bool = False
    """Show the supervisor's log instead of a server's."""


class SwapOptions(Section):
    """Load new versions from the store, without a lost request."""

    name: Annotated[str | None, _NAME] = None
    """Deployment; may be left out if there is one."""

    timeout: float = Field(default=600.0, ge=0)
    """Seconds to load them."""
