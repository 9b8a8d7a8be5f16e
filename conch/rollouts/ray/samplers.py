"""The actors of a run: rank 0 makes them, and all ranks speak with them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import RolloutConfig
from conch.config.rollout import RayConfig
from conch.errors import ConfigError, RolloutUnavailableError, first_line
from conch.rollouts.protocol import LoraCapacity
from conch.rollouts.ray.actor import SamplerActor
from conch.rollouts.ray.blueprint import Blueprint, blueprint_of
from conch.rollouts.ray.check import Share, check_release, check_room, share_of_machine, store_bytes
from conch.rollouts.ray.client import RayClient, SharedWeights
from conch.rollouts.ray.cluster import Address, Cluster


@dataclass(frozen=True)
class Invitation:
    """What a further rank needs to find the actors.

    address: of the cluster.
    namespace, names: of the actors.
    """

    address: Address
    namespace: str
    names: tuple[str, ...]


class RaySamplers:
    """A process's connection to the actors.

    placement: Ray's placement group, on the rank that has made the actors.
    blueprint: Ray's reference to what they build their models from, on that rank.

    clients: one for each actor.
    invitation: for further ranks.
    """

    def __init__(
        self,
        cluster: Cluster,
        invitation: Invitation,
        actors: Sequence[Any],
        deadline_s: float,
        *,
        placement: Any = None,
        blueprint: Any = None,
    ) -> None:
        self.invitation = invitation
        self._cluster = cluster
        self._weights = SharedWeights()
        self._placement = placement
        # A named actor dies with its maker's last handle, which these hold.
        self.clients = [
            RayClient(actor, name, deadline_s, self._weights, blueprint)
            for actor, name in zip(actors, invitation.names, strict=True)
        ]

    @classmethod
    def start(
        cls,
        config: RolloutConfig,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        lora: LoraCapacity | None,
    ) -> RaySamplers:
        """Start or join the cluster, and make the actors; on rank 0.

        dtype: of the samplers' weights.
        lora: adapters that vLLM is to take.

        Raises:
            ConchError: Ray or the machine lacks what is asked for, or the model cannot be served.
        """
        blueprint = blueprint_of(lm, tokenizer, config, dtype, lora)
        weight_bytes = sum(_numel(parameter) for parameter in lm.parameters()) * dtype.itemsize
        cluster, share = _connect(config.ray, weight_bytes)
        end_s = time.monotonic() + config.ray.start_timeout_s
        try:
            samplers = _make_actors(cluster, config, share, blueprint, end_s, weight_bytes)
        except BaseException:
            cluster.leave()
            raise
        try:
            samplers._build(end_s, config.ray.start_timeout_s)
        except BaseException:
            samplers.close()
            raise
        return samplers

    @classmethod
    def join(cls, invitation: Invitation, deadline_s: float) -> RaySamplers:
        """Connect to the actors that rank 0 has made; on other ranks.

        Raises:
            ConchError: the cluster does not let this process in, or the actors are gone.
        """
        check_release()
        cluster = Cluster.join(invitation.address)
        import ray

        try:
            actors = [ray.get_actor(name, namespace=invitation.namespace) for name in invitation.names]
        except ValueError as error:
            cluster.leave()
            raise RolloutUnavailableError(f"the actors of rank 0 are gone: {first_line(error)}") from error
        return cls(cluster, invitation, actors, deadline_s)

    def _build(self, end_s: float, timeout_s: float) -> None:
        """Have all actors build their models, at once; returns once they have.

        end_s: deadline on the monotonic clock.

        Raises:
            ConchError: one cannot, or not in time.
        """
        with ThreadPoolExecutor(len(self.clients)) as threads:
            left_s = max(1.0, end_s - time.monotonic())
            try:
                for health in [threads.submit(client.build, left_s) for client in self.clients]:
                    health.result()
            except RolloutUnavailableError as error:
                raise RolloutUnavailableError(
                    f"{error}; all samplers were to be ready within `rollout.ray.start_timeout_s` = "
                    f"{timeout_s:g}"
                ) from error

    def close(self) -> None:
        """Let waiting threads go, end the actors where this process made them, and leave the cluster."""
        for client in self.clients:
            client.close()
        self._weights.close()
        if self._placement is not None:
            self._end_actors(self._placement)
        self._cluster.leave()

    def _end_actors(self, placement: Any) -> None:
        import ray
        from ray.exceptions import RayError
        from ray.util import remove_placement_group

        with suppress(RayError, RuntimeError):
            for client in self.clients:
                ray.kill(client.actor)
            remove_placement_group(placement)
        self._placement = None


def _numel(parameter: torch.Tensor) -> int:
    """Numbers in a parameter; ZeRO-3 leaves it without its shape, and notes its size in `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _connect(config: RayConfig, weight_bytes: int) -> tuple[Cluster, Share]:
    """The cluster, and what the actors take of it."""
    check_release()
    if config.address is None:
        share = share_of_machine(config)
        cluster = Cluster.start(share, store_bytes(config, weight_bytes))
    else:
        cluster = Cluster.join(Address(config.address))
    try:
        return cluster, share_of_cluster(config)
    except BaseException:
        cluster.leave()
        raise


def share_of_cluster(config: RayConfig) -> Share:
    """What the actors take of the cluster that this process is connected to.

    Raises:
        ConfigError: the cluster has less.
    """
    import ray

    resources = ray.cluster_resources()
    each = None if config.num_gpus is None else float(config.num_gpus)
    if each is None:
        each = 1.0 if resources.get("GPU", 0) else 0.0
    share = Share(config.samplers, float(config.num_cpus), each)
    for kind, needed, of_one in (("CPU", share.num_cpus, share.cpus), ("GPU", share.num_gpus, each)):
        if needed > resources.get(kind, 0):
            raise ConfigError(
                f"`rollout.ray`: {share.samplers} samplers x {of_one:g} {kind}s = {needed:g} {kind}s, and "
                f"the Ray cluster has {resources.get(kind, 0):g}: lower `samplers` or "
                f"`num_{kind.lower()}s`, or add machines to the cluster (`ray start --address`)"
            )
    return share


def _check_stores(group: Any, weight_bytes: int) -> None:
    """Refuse a placement on machines of a cluster whose object stores do not hold the policy's weights; this
    one, from which they are sent, included.

    Raises:
        ConfigError: names a machine.
    """
    import ray
    from ray.util import placement_group_table

    sender = ray.get_runtime_context().get_node_id()
    used = {sender, *placement_group_table(group)["bundles_to_node_id"].values()}
    for node in ray.nodes():
        if node["NodeID"] in used:
            check_room(
                int(node["Resources"].get("object_store_memory", 0)),
                weight_bytes,
                f"Ray's object store at {node['NodeManagerAddress']}",
                "start Ray there with `ray start --object-store-memory=BYTES`, about four times as much",
            )


def _make_actors(
    cluster: Cluster,
    config: RolloutConfig,
    share: Share,
    blueprint: Blueprint,
    end_s: float,
    weight_bytes: int,
) -> RaySamplers:
    """Place the actors and start them; returns while they build their models.

    end_s: deadline on the monotonic clock.
    weight_bytes: of the policy's weights.
    """
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    group = placement_group([bundle] * share.samplers, strategy=config.ray.placement)
    if not group.wait(max(1.0, end_s - time.monotonic())):
        free = ray.available_resources()
        remove_placement_group(group)
        raise RolloutUnavailableError(
            f"Ray found no place for {share.samplers} samplers of {share.cpus:g} CPUs and "
            f"{share.gpus:g} GPUs within `rollout.ray.start_timeout_s` = {config.ray.start_timeout_s:g}: "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of the cluster are free"
        )
    try:
        _check_stores(group, weight_bytes)
    except ConfigError:
        remove_placement_group(group)
        raise
    run = uuid4().hex[:12]
    names = tuple(f"sampler-{number}" for number in range(share.samplers))
    invitation = Invitation(cluster.address, f"conch-{run}", names)
    remote_class: Any = ray.remote(SamplerActor)
    actors = [
        remote_class.options(
            name=name,
            namespace=invitation.namespace,
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=config.ray.max_restarts,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index, name in enumerate(names)
    ]
    return RaySamplers(
        cluster, invitation, actors, config.deadline_s, placement=group, blueprint=ray.put(blueprint)
    )
