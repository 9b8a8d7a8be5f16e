"""Settings of a reference server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conch.config import Dtype, ModelConfig
from conch.servers.settings import ListenSettings


class ReferenceServerConfig(ListenSettings):
    """Keys of `conch reference-server`. Those of the model are the trainer's, and have its values."""

    model: str
    """Folder or hub name of the model that training starts from (`model.path` of the trainer)."""

    revision: str | None = None
    """Hub revision (commit, tag or branch) of `model`."""

    dtype: Dtype = "float32"
    """Precision of the weights: that which they have in the trainer (`model.dtype`; under DeepSpeed its mixed
    precision). Mixed precision without DeepSpeed needs no setting here: each request names it."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """Kernels of attention, as `model.attention` of the trainer."""

    liger: bool = False
    """Kernels of liger-kernel, as `model.liger` of the trainer."""

    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""

    port: int = Field(default=8200, ge=1, le=65535)
    """Port to listen on."""

    def harm(self) -> str:
        """What whoever is let in can do."""
        return "has its GPU compute"

    def model_config_of(self) -> ModelConfig:
        """The section `model` of a trainer that loads this model."""
        return ModelConfig(
            path=self.model,
            revision=self.revision,
            dtype=self.dtype,
            attention=self.attention,
            liger=self.liger,
            trust_remote_code=self.trust_remote_code,
        )
