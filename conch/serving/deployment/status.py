"""`conch serve status`: numbers of running servers, as a table or as JSON.

They come from Triton's statistics and, where metrics are on, from the page that Prometheus reads.
"""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from rich.table import Table
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from conch.config import Section
from conch.errors import ConchError, ServingError, first_line
from conch.serving.deployment.state import Deployment, Phase
from conch.triton.channel import Access, explain_refusal, open_client

_TIMEOUT_S = 5.0
_PENDING = "nv_inference_pending_request_count"
_GPU_UNITS = {"nv_gpu_utilization": 100.0, "nv_gpu_memory_used_bytes": 1e-9}
_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_COLUMNS = (
    "model",
    "version",
    "ready",
    "requests",
    "failed",
    "requests/s",
    "mean batch",
    "queue ms",
    "compute ms",
    "waiting",
)


class ModelStatus(Section):
    """One version of one model in one server."""

    model: str
    """Name."""

    version: str
    """Version that is loaded."""

    ready: bool
    """Triton's own flag; it stays true when the model's process is dead."""

    requests: int
    """Requests answered since the model was loaded."""

    failures: int
    """Requests that failed since then, clients' mistakes among them."""

    requests_per_s: float
    """Requests answered a second, between two readings."""

    mean_batch: float | None
    """Mean rows scored together: between two readings, or since the model was loaded if none came."""

    queue_ms: float | None
    """Mean milliseconds that a request waited, over the same time."""

    compute_ms: float | None
    """Mean milliseconds that its batch took in the model, over the same time."""

    pending: int | None = None
    """Requests that are waiting; only where metrics are on."""


class ServerStatus(Section):
    """Status of one server."""

    url: str
    """`host:port` of gRPC."""

    phase: Phase | None = None
    """Phase that the supervisor records; `ready`: golden samples score right. None without a supervisor."""

    pid: int = 0
    """Process id; 0 if not known."""

    restarts: int = 0
    """Times the server was started again."""

    heals: int = 0
    """Times a model was loaded again because it did not score right."""

    problem: str = ""
    """Why there are no numbers, or the last failure."""

    models: tuple[ModelStatus, ...] = ()
    """Its models."""

    gpus: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """GPU's UUID -> utilisation in percent, memory used in GB; only where metrics are on."""


class StatusReader:
    """Reads the same servers again and again; each result covers the time since the one before."""

    def __init__(self) -> None:
        self._clients: dict[str, InferenceServerClient] = {}
        self._snapshots: dict[str, tuple[float, Snapshot]] = {}

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def read(self, deployment: Deployment) -> list[ServerStatus]:
        """Return the status of a deployment's servers, in their order."""
        access = deployment.access()
        return [
            self.server(
                ServerStatus(
                    url=replica.url,
                    phase=replica.phase,
                    pid=replica.pid,
                    restarts=replica.restarts,
                    heals=replica.heals,
                    problem=replica.problem,
                ),
                access,
                replica.metrics_url,
            )
            for replica in deployment.replicas
        ]

    def server(self, status: ServerStatus, access: Access, metrics_url: str = "") -> ServerStatus:
        """Return `status` with the numbers of the server at `status.url`."""
        url = status.url
        if not url or status.phase in ("failed", "stopped"):
            return status
        if url not in self._clients:
            self._clients[url] = open_client(url, access)
        client = self._clients[url]
        try:
            snapshot = read_counters(client, url, access)
        except ConchError as error:
            return status.model_copy(update={"problem": status.problem or str(error)})
        time_s = time.monotonic()
        old_time_s, old_snapshot = self._snapshots.get(url, (time_s, snapshot))
        self._snapshots[url] = time_s, snapshot
        metrics, ready = read_metrics(metrics_url), read_ready(client, snapshot)
        models = model_statuses(old_snapshot, snapshot, max(time_s - old_time_s, 1e-3), ready, metrics)
        return status.model_copy(update={"models": tuple(models), "gpus": gpu_load(metrics)})


@contextlib.contextmanager
def status_reader():
    """Yield a `StatusReader`, and close it at the end."""
    reader = StatusReader()
    try:
        yield reader
    finally:
        reader.close()


def status_table(title: str, servers: Sequence[ServerStatus]) -> Table:
    """Return a table with a row for each model of each server."""
    table = Table(title=title, title_justify="left", caption=_problems(servers), caption_justify="left")
    for name in ("server", *_COLUMNS):
        numeric = name not in ("server", "model", "ready")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "model")
    for number, server in enumerate(servers):
        label = f"{number}  {server.url or '-'}  {_state(server)}"
        cells = [_cells(model) for model in server.models] or [("-",) * len(_COLUMNS)]
        for row, values in enumerate(cells):
            table.add_row(label if row == 0 else "", *values, end_section=row == len(cells) - 1)
    return table


def _cells(model: ModelStatus) -> tuple[str, ...]:
    return (
        model.model,
        model.version,
        "yes" if model.ready else "no",
        str(model.requests),
        str(model.failures),
        f"{model.requests_per_s:.1f}",
        _number(model.mean_batch),
        _number(model.queue_ms),
        _number(model.compute_ms),
        "-" if model.pending is None else str(model.pending),
    )


def _state(server: ServerStatus) -> str:
    parts = [server.phase or ""]
    parts += [f"{server.restarts} restarts"] if server.restarts else []
    parts += [f"{server.heals} heals"] if server.heals else []
    parts += [f"GPU {busy:.0f} % {memory:.1f} GB" for busy, memory in server.gpus.values()]
    return ", ".join(part for part in parts if part)


def _problems(servers: Sequence[ServerStatus]) -> str | None:
    lines = [f"{number}: {server.problem}" for number, server in enumerate(servers) if server.problem]
    return "\n".join(lines) or None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@dataclass(frozen=True, slots=True)
class Counters:
    """Triton's sums since a model was loaded; times in nanoseconds."""

    requests: int
    failures: int
    inferences: int
    executions: int
    queue_ns: int
    compute_ns: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))


Snapshot = dict[tuple[str, str], Counters]


def read_counters(client: InferenceServerClient, address: str, access: Access) -> Snapshot:
    """Read (model, version) -> sums from Triton's statistics.

    Raises:
        ServingError: the server is away, or refuses this client.
    """
    try:
        reply: Any = client.get_inference_statistics(client_timeout=_TIMEOUT_S)
    except InferenceServerException as error:
        why = explain_refusal(error, access) or first_line(error.message() or "")
        raise ServingError(f"the server at {address} does not tell its statistics: {why}") from error
    return {(entry.name, entry.version): _counters(entry) for entry in reply.model_stats if entry.version}


def model_statuses(
    old: Snapshot,
    new: Snapshot,
    seconds: float,
    ready: Mapping[tuple[str, str], bool],
    metrics: str,
) -> list[ModelStatus]:
    """Return what models did between two snapshots.

    seconds: time between the snapshots.
    ready: (model, version) -> Triton's ready flag.
    metrics: page that Prometheus reads, "" if there is none.
    """
    pending = pending_requests(metrics)
    return [
        _status(model, version, counters, old.get((model, version)), seconds).model_copy(
            update={
                "ready": ready.get((model, version), False),
                "pending": pending.get((model, version)),
            }
        )
        for (model, version), counters in sorted(new.items())
    ]


def read_ready(client: InferenceServerClient, snapshot: Snapshot) -> dict[tuple[str, str], bool]:
    """Read Triton's ready flags of the models in the snapshot."""
    flags = {}
    for model, version in snapshot:
        try:
            flags[model, version] = bool(client.is_model_ready(model, version, client_timeout=_TIMEOUT_S))
        except InferenceServerException:
            flags[model, version] = False
    return flags


def read_metrics(url: str) -> str:
    """Return the page that Prometheus reads; "" if there is none."""
    if not url:
        return ""
    try:
        # No proxy: the address is of this deployment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_TIMEOUT_S) as page:
            return page.read().decode("utf-8")
    except OSError:
        return ""


def pending_requests(metrics: str) -> dict[tuple[str, str], int]:
    """Return (model, version) -> requests that are waiting."""
    return {
        (labels.get("model", ""), labels.get("version", "")): int(value)
        for name, labels, value in _samples(metrics)
        if name == _PENDING
    }


def gpu_load(metrics: str) -> dict[str, tuple[float, float]]:
    """Return GPU's UUID -> (utilisation in percent, memory used in GB)."""
    values: dict[str, dict[str, float]] = {}
    for name, labels, value in _samples(metrics):
        if name in _GPU_UNITS:
            values.setdefault(labels.get("gpu_uuid", ""), {})[name] = value * _GPU_UNITS[name]
    busy, memory = _GPU_UNITS
    return {gpu: (by_name.get(busy, 0.0), by_name.get(memory, 0.0)) for gpu, by_name in values.items()}


def _samples(metrics: str) -> list[tuple[str, dict[str, str], float]]:
    return [
        (match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"]))
        for match in _SAMPLE.finditer(metrics)
    ]


def _counters(entry: Any) -> Counters:
    stats = entry.inference_stats
    return Counters(
        requests=stats.success.count,
        failures=stats.fail.count,
        inferences=entry.inference_count,
        executions=entry.execution_count,
        queue_ns=stats.queue.ns,
        compute_ns=stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns,
    )


def _status(model: str, version: str, new: Counters, old: Counters | None, seconds: float) -> ModelStatus:
    # A model that was loaded in between counts from 0 again.
    growth = new - old if old is not None and old.requests <= new.requests else new
    counters = growth if growth.requests else new
    return ModelStatus(
        model=model,
        version=version,
        ready=False,
        requests=new.requests,
        failures=new.failures,
        requests_per_s=growth.requests / seconds,
        mean_batch=counters.inferences / counters.executions if counters.executions else None,
        queue_ms=counters.queue_ns / counters.requests / 1e6 if counters.requests else None,
        compute_ms=counters.compute_ns / counters.requests / 1e6 if counters.requests else None,
    )
