"""What can be known to be wrong with `rollout.engine=ray` before a model is loaded. Imports no Ray."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from conch.addresses import host_and_port
from conch.config import RolloutConfig
from conch.config.rollout import RayConfig
from conch.errors import ConfigError, install_extra
from conch.rollouts.ray.access import check_token
from conch.rollouts.vllm.build import check_installed as check_vllm

LEAST_RELEASE = (2, 60)
"""First release of Ray whose behaviour was tried: token authentication and what becomes of a killed actor."""

LEAST_STORE_BYTES = 80 * 2**20
"""Smallest object store of a cluster of this run's own; Ray asks for 75 MiB."""

SHARED_MEMORY = Path("/dev/shm")
_CONNECT_S = 5.0

# Ray speaks gRPC, so HTTP/2 (RFC 9113, section 3.4): each side begins with a frame of settings.
_FRAME_HEADER, _SETTINGS_FRAME = 9, b"\x04"
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS_FRAME + b"\0" * 5


@dataclass(frozen=True)
class Share:
    """What the actors of a run take together.

    cpus, gpus: of each.
    """

    samplers: int
    cpus: float
    gpus: float

    @property
    def num_cpus(self) -> float:
        return self.samplers * self.cpus

    @property
    def num_gpus(self) -> float:
        return self.samplers * self.gpus


def check_ray(config: RolloutConfig) -> None:
    """Check Ray's release, and the machine or the cluster's address and token.

    Raises:
        ConfigError: names what is missing, and the remedy.
    """
    check_release()
    if config.ray.engine == "vllm" and config.ray.address is None:
        check_vllm("rollout.ray.engine=vllm", "rollout.ray.engine=transformers")
    if config.ray.address is not None:
        check_address(config.ray.address)
        check_token(config.ray.address)
        return
    share_of_machine(config.ray)
    if config.ray.object_store_memory is not None:
        check_store(int(config.ray.object_store_memory))


def check_store(size: int) -> None:
    """Refuse an object store of `size` bytes that Ray does not make, or that shared memory has no room for.

    Raises:
        ConfigError: says what there is.
    """
    if size < LEAST_STORE_BYTES:
        raise ConfigError(
            f"`rollout.ray.object_store_memory` = {size:,} bytes is less than the {LEAST_STORE_BYTES >> 20} "
            "MiB that Ray's object store takes at least: give it with a unit, as 2GiB, or leave it out"
        )
    check_shared_memory(size, "`rollout.ray.object_store_memory`")


def check_release() -> None:
    """Refuse to go on without a release of Ray that is known.

    Raises:
        ConfigError: it is absent, or older.
    """
    try:
        release = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"`rollout.engine=ray` needs Ray, which is not installed here: `{install_extra('ray')}`, or set "
            "`rollout.engine=hf`"
        ) from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if numbers < LEAST_RELEASE:
        least = ".".join(map(str, LEAST_RELEASE))
        raise ConfigError(
            f'Ray {release} is installed, and Conch needs {least} or later: `pip install "ray>={least}"`'
        )


def check_address(address: str) -> None:
    """Refuse an address where no Ray answers: `ray.init` would wait there for minutes.

    Raises:
        ConfigError: it is no `host:port`, or does not answer within seconds.
    """
    parsed = host_and_port(address)
    if parsed is None:
        raise ConfigError(
            f"`rollout.ray.address` = {address!r} is not of the form host:port: give the one that `ray start "
            "--head` prints, or leave it out for a cluster on this machine"
        )
    try:
        with socket.create_connection((parsed[0].strip("[]"), parsed[1]), timeout=_CONNECT_S) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(_FRAME_HEADER)
        if answer[3:4] != _SETTINGS_FRAME:
            raise ConnectionError("what listens there is not Ray")
    except OSError as error:
        raise ConfigError(
            f"`rollout.ray.address` = {address!r} does not answer ({error}): start the cluster with `ray "
            "start --head`, or leave the address out for a cluster on this machine"
        ) from error


def share_of_machine(config: RayConfig) -> Share:
    """What the actors take of this machine, where the run starts a cluster of its own.

    Raises:
        ConfigError: the machine has less.
    """
    cpus, gpus = len(os.sched_getaffinity(0)), len(spare_gpus())
    all_gpus = torch.cuda.device_count()
    each = None if config.num_gpus is None else float(config.num_gpus)
    if each is None:
        each = 1.0 if all_gpus else 0.0
    share = Share(config.samplers, float(config.num_cpus), each)
    if share.num_cpus > cpus:
        raise ConfigError(
            f"`rollout.ray`: {share.samplers} samplers x {share.cpus:g} CPUs = {share.num_cpus:g} CPUs, and "
            f"this machine has {cpus}: lower `samplers` or `num_cpus`, or join a larger cluster (`address`)"
        )
    if gpus_needed(share) > gpus:
        raise ConfigError(
            f"`rollout.ray`: {share.samplers} samplers x {each:g} GPUs = {share.num_gpus:g} GPUs, and of "
            f"this machine's {all_gpus} training takes {all_gpus - gpus}, which leaves {gpus}: lower "
            "`samplers`, set `num_gpus=0` to sample on CPUs, or train with fewer processes"
        )
    return share


def gpus_needed(share: Share) -> int:
    """Whole GPUs that must be there: an actor with less than one shares it, and no actor spans a part."""
    if share.gpus <= 0:
        return 0
    if share.gpus >= 1:
        return share.samplers * math.ceil(share.gpus)
    return math.ceil(share.samplers / int(1 / share.gpus))


def spare_gpus() -> list[str]:
    """GPUs of this machine that no training process takes, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return names[:count]
    return names[int(os.environ.get("LOCAL_WORLD_SIZE", "1")) : count]


def store_bytes(config: RayConfig, weight_bytes: int) -> int:
    """Size of the object store of a cluster of this run's own.

    weight_bytes: of the policy's weights.

    Raises:
        ConfigError: shared memory has not so much room, or what was set holds less than the weights.
    """
    if config.object_store_memory is not None:
        size, why = int(config.object_store_memory), "`rollout.ray.object_store_memory`"
        check_room(size, weight_bytes, why, "raise it, or leave it out for room for four copies")
    else:
        size, why = 4 * weight_bytes, "room for four copies of the policy"
    size = max(size, LEAST_STORE_BYTES)
    check_shared_memory(size, why)
    return size


def check_room(size: int, weight_bytes: int, what: str, remedy: str) -> None:
    """Refuse an object store that does not hold the policy once: Ray would write each version of the weights
    to the disk instead, and say nothing.

    size: of the object store, in bytes.
    what: names it.
    remedy: how to make it larger.

    Raises:
        ConfigError: it is too small.
    """
    if size < weight_bytes:
        raise ConfigError(
            f"{what} = {size / 2**20:.0f} MiB does not hold the policy's weights, "
            f"{weight_bytes / 2**20:.0f} MiB, which go to the samplers through it: {remedy}"
        )


def check_shared_memory(size: int, why: str) -> None:
    """Refuse an object store that shared memory has no room for.

    why: what asks for so much.

    Raises:
        ConfigError: says what there is.
    """
    size = max(size, LEAST_STORE_BYTES)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if size > free:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and Ray's object store takes "
            f"{size / 2**20:.0f} MiB ({why}): make it larger (`docker run --shm-size`), or lower "
            "`rollout.ray.object_store_memory`"
        )
