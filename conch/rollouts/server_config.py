"""Settings of a rollout server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from conch.config import RolloutConfig, RolloutDtype, VLLMSettings
from conch.rollouts.protocol import MAX_LORA_RANK, LoraCapacity
from conch.servers.settings import ListenSettings

_VLLM_ONLY = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager", "tensor_parallel_size"),
    *("max_lora_rank", "lora_target_modules"),
)
_SLOTS = 32
"""Completions that transformers samples at once where no setting says otherwise. Unlike vLLM's they all have
room for the longest."""


class ServerConfig(VLLMSettings, ListenSettings):
    """Keys of `conch rollout-server`. Settings of vLLM have vLLM's names."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples: vLLM, or transformers as in the trainer's own processes, which needs no vLLM and runs
    what vLLM does not know. Memory, room for adapters and several GPUs are settings of vLLM alone."""

    model: str
    """Folder or hub name of a model of the policy's shape, with its tokenizer."""

    revision: str | None = None
    """Hub revision (commit, tag or branch) of `model`."""

    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""

    port: int = Field(default=8100, ge=1, le=65535)
    """Port to listen on."""

    weights_dir: Path = Path("/dev/shm")
    """Folder below which files with weights must lie that trainers name (`rollout.weights=files`)."""

    dtype: RolloutDtype = "auto"
    """Precision of the weights; `auto` takes the one that the model is stored in."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1)
    """Fraction of a GPU's memory that vLLM may take, its weights included."""

    max_lora_rank: int = Field(default=0, ge=0, le=MAX_LORA_RANK)
    """Highest rank of an adapter that a trainer may send by itself, after its base; a trainer whose rank is
    higher sends all weights with the adapter merged in. 0 takes merged weights only, and samples faster. With
    transformers every server takes adapters by themselves."""

    lora_target_modules: tuple[str, ...] = ()
    """Last parts of the names of the layers that adapters may be on, `[q_proj, v_proj]`; the fewer layers,
    the faster the server samples. Empty takes adapters on all layers."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share the weights."""

    deadline_s: float = Field(default=600.0, gt=0)
    """Longest time in which a trainer may send its weights, in seconds."""

    restart: bool = True
    """Start the server again when it is killed or its vLLM has died; the trainer then sends it the weights.
    False leaves that to systemd, Slurm or Kubernetes."""

    @model_validator(mode="after")
    def _settings_are_the_engines(self) -> ServerConfig:
        given = [name for name in _VLLM_ONLY if name in self.model_fields_set]
        if self.engine == "transformers" and given:
            raise ValueError(f"`{given[0]}` is a setting of vLLM: leave it out with `engine=transformers`")
        return self

    @model_validator(mode="after")
    def _modules_have_a_rank(self) -> ServerConfig:
        if self.lora_target_modules and not self.max_lora_rank:
            raise ValueError(
                "`lora_target_modules` says where adapters may be: give `max_lora_rank` too, or leave it out"
            )
        return self

    def harm(self) -> str:
        """What whoever is let in can do."""
        return "reads what is sampled and changes the weights"

    @property
    def slots(self) -> int:
        """Completions that transformers samples at once."""
        return self.max_num_seqs if "max_num_seqs" in self.model_fields_set else _SLOTS

    def lora_capacity(self) -> LoraCapacity | None:
        """Adapters that the server is to take; None where it takes none."""
        if not self.max_lora_rank:
            return None
        return LoraCapacity(rank=self.max_lora_rank, modules=self.lora_target_modules)

    def rollout_config(self) -> RolloutConfig:
        """The settings of vLLM that servers share with engines in a trainer's process."""
        shared = self.model_dump(include=set(VLLMSettings.model_fields))
        return RolloutConfig(engine="vllm", sleep_level=0, **shared)
