"""`status`: asks the servers of a deployment, or one at an address, and shows it as a table or as JSON."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from pydantic import Field
from rich.table import Table
from tritonclient.grpc import InferenceServerClient

from conch.config import Section
from conch.errors import ConchError
from conch.serving.deployment import Deployment, Phase
from conch.serving.triton_channel import Access, open_client
from conch.serving.triton_statistics import (
    ModelStatus,
    Snapshot,
    gpu_load,
    model_statuses,
    read_counters,
    read_metrics,
    read_ready,
)

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


class ServerStatus(Section):
    """One server."""

    url: str
    """`host:port` of gRPC."""

    phase: Phase | None = None
    """What the supervisor says; `ready` means that golden samples score right. None without a supervisor."""

    pid: int = 0
    """Process id; 0 if not known."""

    restarts: int = 0
    """Times it was started again."""

    heals: int = 0
    """Times a model was loaded again because it did not score right."""

    problem: str = ""
    """Why there are no numbers, or what went wrong last."""

    models: tuple[ModelStatus, ...] = ()
    """What it serves."""

    gpus: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """GPU's UUID -> utilisation in percent, memory used in GB; only where metrics are on."""


class StatusReader:
    """Asks the same servers again and again; each answer covers the time since the one before."""

    def __init__(self) -> None:
        self._clients: dict[str, InferenceServerClient] = {}
        self._before: dict[str, tuple[float, Snapshot]] = {}

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def read(self, deployment: Deployment) -> list[ServerStatus]:
        """The servers of a deployment, in its order."""
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

    def server(self, known: ServerStatus, access: Access, metrics_url: str = "") -> ServerStatus:
        """Add the numbers to what is known."""
        if not known.url or known.phase in ("failed", "stopped"):
            return known
        if known.url not in self._clients:
            self._clients[known.url] = open_client(known.url, access)
        client = self._clients[known.url]
        try:
            now = read_counters(client, known.url, access)
        except ConchError as error:
            return known.model_copy(update={"problem": known.problem or str(error)})
        at = time.monotonic()
        before_at, before = self._before.get(known.url, (at, now))
        self._before[known.url] = at, now
        metrics = read_metrics(metrics_url)
        models = model_statuses(before, now, max(at - before_at, 1e-3), read_ready(client, now), metrics)
        return known.model_copy(update={"models": tuple(models), "gpus": gpu_load(metrics)})


@contextlib.contextmanager
def status_reader():
    """A `StatusReader` that is closed at the end."""
    reader = StatusReader()
    try:
        yield reader
    finally:
        reader.close()


def status_table(title: str, servers: Sequence[ServerStatus]) -> Table:
    """The same for people; a server's line, then one for each of its models."""
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
