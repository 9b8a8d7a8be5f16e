"""Section `rollout`: the engine that samples, transformers or vLLM, and where it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from conch.config.auth import AuthConfig
from conch.config.base import Section
from conch.config.model import full_dtype

RolloutDtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(full_dtype)]


class VLLMSettings(Section):
    """Settings of vLLM, by vLLM's names, that an engine in a trainer's process and a server share."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt and completion together, in tokens; less than the model's window saves memory. None
    takes the model's window."""

    gpu_memory_utilization: float = Field(default=0.3, gt=0, lt=1)
    """Fraction of a GPU's memory that vLLM may take, its weights included."""

    kv_cache_memory_bytes: ByteSize | None = Field(default=None, gt=0)
    """Memory for keys and values, in bytes or as `2GiB`, instead of what `gpu_memory_utilization` leaves.
    None takes 1 GiB on a CPU."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Completions that one vLLM samples at once."""

    enforce_eager: bool | None = None
    """True neither compiles nor records graphs: vLLM starts at once and samples more slowly. None is True on
    a CPU only."""


class RayConfig(Section):
    """Samplers that are actors of Ray (`rollout.engine=ray`): each holds a copy of the policy."""

    samplers: int = Field(default=1, ge=1)
    """Actors."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples in an actor; vLLM takes its settings from `rollout`."""

    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs that Ray sets aside for an actor, which computes on no more."""

    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs that Ray sets aside for an actor. None takes one where the cluster has GPUs, else none."""

    address: str | None = None
    """`host:port` of a cluster that runs (`ray start --head`). None starts one on this machine for this run,
    and ends it with the run."""

    placement: Literal["PACK", "SPREAD"] = "PACK"
    """Actors on few machines of a cluster, or on many, as Ray names it."""

    max_restarts: int = Field(default=100, ge=0)
    """How often Ray starts an actor again that died."""

    object_store_memory: ByteSize | None = Field(default=None, gt=0)
    """Shared memory that a cluster of this run's own takes, in bytes or as `2GiB`. None takes room for four
    copies of the policy. Of a cluster at `address`, `ray start --object-store-memory` says it."""

    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest time until the cluster answers and all actors are placed and have loaded the model."""

    @model_validator(mode="after")
    def _store_is_its_own(self) -> RayConfig:
        if self.address is not None and self.object_store_memory is not None:
            raise ValueError(
                "`object_store_memory` is of a cluster that the run starts, and `address` names one that "
                "runs: leave one of them out; `ray start --object-store-memory=BYTES` sets it there"
            )
        return self


class RolloutConfig(VLLMSettings):
    """How completions are sampled for learning and evaluation. Settings of vLLM have vLLM's names."""

    engine: Literal["hf", "vllm", "ray"] = "hf"
    """`hf` samples with the policy itself in the trainer's processes, `vllm` with vLLM there; `ray` in actors
    of Ray, as the section `rollout.ray` says. Servers of `urls` have an engine of their own."""

    ray: RayConfig = RayConfig()
    """Samplers of `engine: ray`."""

    urls: str | None = None
    """`host:port` of a rollout server (`conch rollout-server`), or several, `host1:port,host2:port`, which
    sample with what they were started with, whatever `engine` says here. None samples in the trainer's
    processes, or in actors of Ray."""

    dtype: RolloutDtype = "auto"
    """Precision of the weights of vLLM, and of whatever samples in actors; `auto` takes that of the policy's
    training. A server has a setting of its own."""

    sleep_level: Literal[0, 1, 2] = 2
    """GPU memory that vLLM releases while the trainer computes, as vLLM numbers it: 0 none; 1 the cache, and
    the weights move to the CPU's memory; 2 cache and weights. On a CPU it releases none."""

    weights: Literal["broadcast", "files"] = "broadcast"
    """How servers get new weights: `broadcast` sends them over the network (gloo, or NCCL between GPUs);
    `files` writes them to shared memory, for servers on the trainer's machine."""

    merge_adapter: bool | None = None
    """False sends a LoRA adapter by itself wherever vLLM can take it, and its base once. True merges it and
    sends all weights each time. None leaves the choice to servers (their `max_lora_rank`); in the trainer's
    processes it merges on a CPU only, where sampling through an adapter costs more than merging."""

    auth: AuthConfig = Field(default_factory=AuthConfig)
    """Access to the servers of `urls`."""

    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds without a new completion from any server after which sampling fails, and the longest time in
    which a server may load new weights."""

    logprob_diff_alarm: float | None = Field(default=0.1, gt=0)
    """Nats of `rollout/logprob_diff` above which a warning is written; None writes none."""
