"""Kernels that are installed apart: whether those that are asked for can be used here, and by this model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ConfigError
from conch.models.liger import apply_liger, check_liger_knows

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
    attention = config.attention or (given.config._attn_implementation if given is not None else None)
    if attention in _PACKAGES:
        dtype = getattr(torch, config.dtype) if given is None else given.dtype
        _check_flash(attention, dtype, precision)
    if config.liger:
        _check_liger()


def _check_flash(attention: str, dtype: torch.dtype, precision: str) -> None:
    setting = f"`model.attention={attention}`"
    module, package = _PACKAGES[attention]
    # With `kernels`, transformers takes builds of the hub where the package itself is missing.
    if find_spec(module) is None and find_spec("kernels") is None:
        raise ConfigError(f"{setting} needs the package {package}: install it, or leave the setting out")
    _check_gpu(setting)
    if dtype not in (torch.float16, torch.bfloat16) and precision == "no":
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{setting} computes in half precision, the weights are in {name} and nothing casts them: set "
            "`train.mixed_precision=bf16` or `model.dtype=bfloat16`"
        )


def _check_liger() -> None:
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "`model.liger` needs the package liger-kernel: `pip install 'conch[liger]'`, or turn it off"
        )
    _check_gpu("`model.liger`")


def _check_gpu(setting: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{setting} needs a CUDA GPU, and torch sees none here: leave it out on this machine"
        )


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


def put_kernels(lm: PreTrainedModel, config: ModelConfig) -> None:
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
