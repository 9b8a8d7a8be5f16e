"""Settings of a rollout server."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from conch.access.tls import ServerTls
from conch.addresses import is_loopback
from conch.config import RolloutConfig, RolloutDtype, VLLMSettings
from conch.rollouts.protocol import MAX_LORA_RANK, LoraCapacity


class ServerConfig(VLLMSettings):
    """Keys of `conch rollout-server`. Settings of vLLM have vLLM's names."""

    model: str
    """Folder or hub name of a model of the policy's shape, with its tokenizer."""

    port: int = Field(default=8100, ge=1, le=65535)
    """Port to listen on."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine it asks for `secret_env` or `require_client_cert`, unless
    `allow_anyone` is true: whoever is let in reads what is sampled and changes the weights."""

    secret_env: str | None = None
    """Environment variable with the secret that trainers must send (`rollout.auth.secret_env`). None asks for
    none."""

    tls_cert: Path | None = None
    """Certificate (PEM) of the server, which then speaks TLS (`rollout.auth.tls.ca` in the trainer)."""

    tls_key: Path | None = None
    """Private key (PEM, not encrypted) of `tls_cert`."""

    tls_ca: Path | None = None
    """Authority (PEM) that signed the trainers' certificates."""

    require_client_cert: bool = False
    """Turn trainers without a certificate away that `tls_ca` has signed."""

    allow_anyone: bool = False
    """Listen on a `host` beyond this machine without asking for a secret or a certificate."""

    weights_dir: Path = Path("/dev/shm")
    """Folder below which files with weights must lie that trainers name (`rollout.weights=files`)."""

    max_request_mb: float = Field(default=64.0, gt=0)
    """Largest request, in millions of bytes."""

    dtype: RolloutDtype = "auto"
    """Precision of the weights; `auto` takes the one that the model is stored in."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1)
    """Fraction of a GPU's memory that vLLM may take, its weights included."""

    max_lora_rank: int = Field(default=0, ge=0, le=MAX_LORA_RANK)
    """Highest rank of an adapter that a trainer may send by itself, after its base; a trainer whose rank is
    higher sends all weights with the adapter merged in. 0 takes merged weights only, and samples faster."""

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
    def _modules_have_a_rank(self) -> ServerConfig:
        if self.lora_target_modules and not self.max_lora_rank:
            raise ValueError(
                "`lora_target_modules` says where adapters may be: give `max_lora_rank` too, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _asks_who_comes(self) -> ServerConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("`tls_cert` and `tls_key` belong together: give both or neither")
        if self.tls_cert is None and (self.tls_ca is not None or self.require_client_cert):
            raise ValueError("`tls_ca` and `require_client_cert` need `tls_cert` and `tls_key`")
        if self.require_client_cert and self.tls_ca is None:
            raise ValueError(
                "`require_client_cert` needs `tls_ca`, the authority that signs trainers' certificates"
            )
        asks = self.secret_env is not None or self.require_client_cert or self.allow_anyone
        if not asks and not is_loopback(self.host):
            raise ValueError(
                f"`host` = {self.host!r} is reached from other machines, and whoever reaches it reads what "
                "is sampled and changes the weights: name a variable with a secret in `secret_env`, ask for "
                "certificates (`require_client_cert`), or set `allow_anyone=true`"
            )
        return self

    def tls(self) -> ServerTls | None:
        """Certificates of the server; None speaks plain text."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_ca, self.require_client_cert)

    def lora_capacity(self) -> LoraCapacity | None:
        """Adapters that the server is to take; None where it takes none."""
        if not self.max_lora_rank:
            return None
        return LoraCapacity(rank=self.max_lora_rank, modules=self.lora_target_modules)

    def rollout_config(self) -> RolloutConfig:
        """The settings of vLLM that servers share with engines in a trainer's process."""
        shared = self.model_dump(include=set(VLLMSettings.model_fields))
        return RolloutConfig(engine="vllm", sleep_level=0, **shared)
