"""Which model is trained, how much of it, and its tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from conch.config.auth import AuthConfig
from conch.config.base import Section

_SHORT_DTYPES = {
    "fp64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


def full_dtype(name: Any) -> Any:
    """The full name of a precision that has a short one; anything else as it is."""
    return _SHORT_DTYPES.get(name, name) if isinstance(name, str) else name


Dtype = Annotated[Literal["float64", "float32", "bfloat16", "float16"], BeforeValidator(full_dtype)]


class ModelConfig(Section):
    """Which model to train, and how much of it."""

    path: str | None = None
    """Folder or hub id of the model. Give this or `architecture`."""

    revision: str | None = None
    """Hub revision (commit, tag or branch) of `path`."""

    architecture: dict[str, Any] | None = None
    """Start from random weights of this shape: the keys of the transformers config, `model_type` among
    them."""

    dtype: Dtype = "float32"
    """Precision the weights are held in. In bfloat16 and float16 they train under DeepSpeed or below an
    adapter alone, since small updates would round to nothing; `train.mixed_precision` computes in bfloat16.
    float64 is for comparing runs to the last digits: across processors, numbers of threads or layouts of a
    batch."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """Kernels of attention; None takes sdpa where the model knows it, else eager. Those of flash-attention
    need its package, a CUDA GPU, and half precision, of the weights or by `train.mixed_precision`."""

    liger: bool = False
    """Compute norms, rotary embeddings and MLPs by the Triton kernels of the package liger-kernel, on a CUDA
    GPU. Changes the model's architecture for the whole process."""

    num_layers_unfrozen: int = Field(default=-1, ge=-1)
    """Transformer blocks to train, counted from the top; -1 trains everything. With a number, the reference
    of PPO shares the frozen trunk and copies only these blocks; with -1 it is a full copy."""

    disable_dropout: bool = True
    """Set every dropout and the noise of routers to 0, so that sampling and training see the same policy."""

    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""

    peft_config: dict[str, Any] | None = None
    """Train an adapter instead of the weights: the keys of peft's `LoraConfig` (`r`, `lora_alpha`,
    `target_modules`, ...). The reference of PPO is then the model with its adapter off."""

    merge_adapter: bool = False
    """Save the adapter merged into the weights, for programs that know no adapters, instead of on its own."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""

    trial: bool = True
    """Try the model out before the run, by a few short forward passes: a padded sample must score as it does
    alone, training mode as evaluation mode, and a completion must be able to end."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "give exactly one of `path`, a folder or hub id, and `architecture`, for random weights"
            )
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("`architecture` needs `model_type` (for example gpt2)")
        if self.num_layers_unfrozen == 0:
            raise ValueError("`num_layers_unfrozen` is 0: nothing would be trained; use -1 for all layers")
        if self.peft_config is not None and self.num_layers_unfrozen != -1:
            raise ValueError(
                "`peft_config` freezes all but the adapter: leave `num_layers_unfrozen` at -1 and choose "
                "layers with `peft_config.layers_to_transform`"
            )
        return self


class TokenizerConfig(Section):
    """Which tokenizer to use."""

    path: str | None = None
    """Folder or hub id; None takes the model's."""

    pad_token: str | None = None
    """Padding token, for tokenizers that have none (or, for reward models, no other than eos): a pad token of
    the model's own stays. Must be in the vocabulary. None chooses one, and the log says which."""

    add_special_tokens: bool = True
    """Encode plain texts with the special tokens that the tokenizer adds, such as a BOS; False for texts that
    hold theirs already. What a chat template rendered never gets any."""

    truncation_side: Literal["left", "right"] = "left"
    """Which end of a too long prompt is cut when `truncate_prompts` allows it."""

    truncate_prompts: bool = False
    """Cut prompts that do not fit the model's window instead of refusing them."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens, where that shall be less than the window leaves."""


class ReferenceConfig(Section):
    """Where PPO and GRPO have the log-probs of the starting policy from."""

    urls: str | None = None
    """`host:port` of a reference server (`conch reference-server`), or several, `host1:port,host2:port`,
    which share the micro-batches. None keeps the reference in the trainer's processes."""

    auth: AuthConfig = Field(default_factory=AuthConfig)
    """Access to the servers of `urls`."""

    request_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for one server's answer to one micro-batch, in seconds, behind others' in its queue; then
    the next server is asked."""

    deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for the log-probs of a micro-batch from any server, in seconds; then the run ends with an
    error."""
