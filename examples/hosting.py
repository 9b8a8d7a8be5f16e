"""The served reward model of an example: a server that somebody named, or else one of our own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conch.atomic_files import replace_text
from conch.config import RewardConfig, Section
from conch.converters.to_triton import to_triton
from conch.errors import ConfigError, ServerStartError
from conch.log import get_logger
from conch.rewards.base import sources_closed_on_failure
from conch.serving.server.server import ServerOptions, TritonServer
from conch.store.manifest import ServedDtype
from conch.triton.contract import Form, Granularity

_log = get_logger("conch.hosting")

_LONGEST_WAIT_S = 3600.0
_POLL_S = 0.5


class HostedConfig(Section):
    """The reward model that a program serves by itself where neither `reward.url` nor TRITON_HOST names a
    server. It is converted first where the store has none of this name."""

    name: str
    """Model in the store."""

    checkpoint: str
    """Folder or hub id of the reward model."""

    base_model: str | None = None
    """What a checkpoint builds on that holds no model of its own; None for one that does."""

    revision: str | None = None
    """Commit of the checkpoint."""

    dtype: ServedDtype = "float16"
    """Precision of the served weights."""

    form: Form = "text"
    """What clients send: `text`, or the sampled ids, `token`."""

    granularity: Granularity = "sample"
    """What gets a score of its own beside the sample."""

    model_store: Path = Path("model_store")
    """Folder of converted models."""


@contextmanager
def served_reward(config: RewardConfig, hosted: HostedConfig) -> Iterator[str]:
    """`host:port/model` of the reward model, for as long as the context lasts.

    The first process of a machine hosts it on the last GPU, or on the CPU where there is none; the others
    wait until it is ready. Processes on several machines need a server that is named. Sources that are opened
    within the context are closed where it fails.

    Raises:
        ConchError: it cannot be hosted. The launcher then ends the processes that wait.
    """
    with _named_or_hosted(config, hosted) as endpoint, sources_closed_on_failure():
        yield endpoint


@contextmanager
def _named_or_hosted(config: RewardConfig, hosted: HostedConfig) -> Iterator[str]:
    if others := [key for key in config.named_by if key != "url"]:
        raise ConfigError(
            f"`reward.{others[0]}` is no server, and this example learns from a served reward model: give "
            "`reward.url=host:port/model`, or leave it out and have one hosted"
        )
    told = config.url or os.environ.get("TRITON_HOST")
    if told:
        yield told
        return
    if _number("WORLD_SIZE", 1) != _number("LOCAL_WORLD_SIZE", 1):
        raise ServerStartError("a run on several machines needs a server for its reward: set TRITON_HOST")
    if _number("LOCAL_RANK", 0) == 0:
        with _hosting(hosted) as endpoint:
            yield endpoint
    else:
        yield wait_for_host()


@contextmanager
def _hosting(hosted: HostedConfig) -> Iterator[str]:
    """Convert and serve, and tell the other processes of this machine."""
    gpu = last_gpu()
    if not (hosted.model_store / hosted.name).is_dir():
        _convert(hosted, gpu)
    server = TritonServer(
        hosted.model_store, [hosted.name], options=ServerOptions(gpu=gpu), ready_timeout_s=600.0
    )
    _log.info("hosting %s on %s", hosted.name, f"GPU {gpu}" if gpu else "the CPU")
    note = launchers_note()
    with server:
        endpoint = server.endpoint(hosted.name)
        tell(note, endpoint)
        try:
            yield endpoint
        finally:
            note.unlink(missing_ok=True)


def _convert(hosted: HostedConfig, gpu: str) -> None:
    _log.info("converting %s for Triton into %s", hosted.checkpoint, hosted.model_store / hosted.name)
    to_triton(
        hosted.checkpoint,
        name=hosted.name,
        model_store=hosted.model_store,
        form=hosted.form,
        dtype=hosted.dtype,
        instance_kind="gpu" if gpu else "cpu",
        base_model=hosted.base_model,
        revision=hosted.revision,
        granularity=hosted.granularity,
    )


def last_gpu() -> str:
    """The last GPU that this process may use, as CUDA_VISIBLE_DEVICES names it; "" where there is none."""
    import torch  # not for help and mistyped keys, which do without

    if not torch.cuda.is_available():
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[-1].strip() if visible else str(torch.cuda.device_count() - 1)


def wait_for_host() -> str:
    """What the first process of this launcher has left by `tell`, as soon as it is there.

    Raises:
        ServerStartError: nothing, for an hour.
    """
    note, deadline = launchers_note(), time.monotonic() + _LONGEST_WAIT_S
    while not note.is_file():
        if time.monotonic() > deadline:
            raise ServerStartError(
                f"the first process hosts no reward model after {_LONGEST_WAIT_S:.0f} s: see its output"
            )
        time.sleep(_POLL_S)
    return note.read_text(encoding="utf-8")


def launchers_note() -> Path:
    """A file that the processes of one launcher agree on, and no others: named by the launcher's number and
    the moment at which it was started."""
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return Path(tempfile.gettempdir()) / f"conch-hosting-{os.getuid()}-{parent}-{started}.txt"


def tell(note: Path, endpoint: str) -> None:
    """Leave the endpoint in a file that is whole as soon as it is there."""
    replace_text(note, endpoint)


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable) or default)
