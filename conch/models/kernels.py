"""Kernels that are installed apart: whether those that are asked for can be used here, and by this model.

Norms, rotary embeddings and MLPs by the Triton kernels of Liger (Hsu et al. 2024, arXiv:2410.10989).

Its package is imported where it is asked for: it brings Triton, and kernels of many kinds.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ConfigError

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn (`pip install flash-attn --no-build-isolation`)"),
    "flash_attention_3": (
        "flash_attn_interface",
        "that the folder `hopper` of flash-attention's sources builds",
    ),
}
"""Attention -> the module to import, and how its package is called."""

_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
"""Attention -> where a model class of transformers says that it can be computed so; all can eagerly."""


def check_kernels(config: ModelConfig, precision: str, given: PreTrainedModel | None = None) -> None:
    """Refuse kernels that cannot run here, before anything is loaded.

    precision: the training's mixed precision ("no", "bf16", "fp16"). given: the model that a user loaded.

    Raises:
        ConfigError: a package is missing, there is no CUDA GPU, or the weights are in float32 and stay so.
    """
    asked, attention = f"`model.attention={config.attention}`", config.attention
    if attention is None and given is not None:
        attention = given.config._attn_implementation
        asked = f"the given model's attention, {attention},"
    if attention in _PACKAGES:
        _check_flash(attention, asked)
        if precision == "no":
            _check_half(asked, config, given)
    if config.liger:
        _check_liger()


def _check_flash(attention: str, asked: str) -> None:
    """asked: where the attention was named."""
    module, package = _PACKAGES[attention]
    # With `kernels`, transformers takes builds of the hub where the package itself is missing.
    if find_spec(module) is None and find_spec("kernels") is None:
        raise ConfigError(f"{asked} needs the package {package}: install it, or set `model.attention=sdpa`")
    _check_gpu(asked, "set `model.attention=sdpa`")


def _check_half(asked: str, config: ModelConfig, given: PreTrainedModel | None) -> None:
    dtype = getattr(torch, config.dtype) if given is None else given.dtype
    remedy = "set `model.dtype=bfloat16`" if given is None else "load the model in bfloat16"
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{asked} computes in half precision, the weights are in {name} and nothing casts them: set "
            f"`train.mixed_precision=bf16`, or {remedy}"
        )


def _check_liger() -> None:
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "`model.liger` needs the package liger-kernel: `pip install 'conch[liger]'`, or turn it off"
        )
    _check_gpu("`model.liger`", "turn it off")


def _check_gpu(asked: str, remedy: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(f"{asked} needs a CUDA GPU, and torch sees none here: {remedy} on this machine")


def check_architecture(config: ModelConfig, auto_class: Any, model_config: PretrainedConfig) -> None:
    """Refuse kernels that the model's architecture has no use for, before its weights are read.

    Raises:
        ConfigError: names the architecture.
    """
    if config.liger:
        check_liger_knows(model_config.model_type)
    # What a checkpoint brings as code of its own, is transformers' to judge.
    if config.attention in _SUPPORT and type(model_config) in auto_class._model_mapping:
        found = auto_class._model_mapping[type(model_config)]
        for model_class in found if isinstance(found, (list, tuple)) else [found]:
            _check_supported(model_class, config.attention)


def _check_supported(model_class: type[PreTrainedModel], attention: str) -> None:
    if attention in _SUPPORT and not getattr(model_class, _SUPPORT[attention]):
        raise ConfigError(
            f"`model.attention={attention}`: {model_class.__name__} does not support it; leave it out to "
            "take what transformers has for it"
        )


def apply_kernels(lm: PreTrainedModel, config: ModelConfig) -> None:
    """Let a loaded model compute by the kernels that `config` names, where it does not yet.

    Raises:
        ConfigError: its architecture has no use for them.
    """
    wanted = config.attention
    if wanted is not None and lm.config._attn_implementation != wanted:
        _check_supported(type(lm), wanted)
        lm.set_attn_implementation(wanted)
        if lm.config._attn_implementation != wanted:
            raise ConfigError(
                f"`model.attention={wanted}`: a loaded {type(lm).__name__} cannot change its attention; load "
                f'it with `attn_implementation="{wanted}"`'
            )
    if config.liger:
        apply_liger(lm)


_NOT_ITS_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Its losses would take the place of the head, whose logits are read here."""


def check_liger_knows(model_type: str) -> None:
    """Refuse an architecture that Liger has no kernels for.

    Raises:
        ConfigError: names it.
    """
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        raise ConfigError(
            f"`model.liger`: Liger has no kernels for the model type {model_type}; turn it off (it has some "
            f"for {', '.join(sorted(known))})"
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Put its kernels into a loaded model; its rotary embeddings reach all models of the architecture, and
    what is built of it later has its norms and MLPs, too.

    Raises:
        ConfigError: Liger does not know the architecture, or not in this form.
    """
    check_liger_knows(model.config.model_type)
    # What transformers' own trainer calls: it picks the function of the model's type and what that one takes.
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )

    try:
        _apply_liger_kernel_to_instance(model=model, **_NOT_ITS_LOSS)
    # It looks for the parts of the models that it knows, and says so in several ways where they are missing.
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`model.liger`: Liger cannot put its kernels into a {type(model).__name__} ({error}): turn it "
            "off"
        ) from error
