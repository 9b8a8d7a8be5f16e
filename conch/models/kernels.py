"""Optional kernels: check that they run on this machine and fit the model, and apply them.

Attention by flash-attention, and norms, rotary embeddings and MLPs by the Triton kernels of Liger (Hsu et al.
2024, arXiv:2410.10989). Their packages are imported only where the settings name them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ConfigError, install_extra

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn (`pip install flash-attn --no-build-isolation`)"),
    "flash_attention_3": (
        "flash_attn_interface",
        "that the folder `hopper` of flash-attention's sources builds",
    ),
}
"""Attention -> the module to import, and the package that has it."""

_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
"""Attention -> attribute of transformers' model classes True where they support it; all support eager."""


def check_kernels(config: ModelConfig, precision: str, model: PreTrainedModel | None = None) -> None:
    """Refuse kernels that cannot run here, before anything is loaded.

    precision: the training's mixed precision ("no", "bf16", "fp16").
    model: one that the user has loaded; None where `config` says which to load.

    Raises:
        ConfigError: a package is missing, there is no CUDA GPU, or the weights are in float32 and stay so.
    """
    setting, attention = f"`model.attention={config.attention}`", config.attention
    if attention is None and model is not None:
        attention = model.config._attn_implementation
        setting = f"the given model's attention, {attention},"
    if attention in _PACKAGES:
        _check_flash(attention, setting)
        if precision == "no":
            _check_half(setting, config, model)
    if config.liger:
        _check_liger()


def _check_flash(attention: str, setting: str) -> None:
    module, package = _PACKAGES[attention]
    # With `kernels`, transformers takes builds of the hub where the package itself is missing.
    if find_spec(module) is None and find_spec("kernels") is None:
        raise ConfigError(f"{setting} needs the package {package}: install it, or set `model.attention=sdpa`")
    _check_gpu(setting, "set `model.attention=sdpa`")


def _check_half(setting: str, config: ModelConfig, model: PreTrainedModel | None) -> None:
    dtype = getattr(torch, config.dtype) if model is None else model.dtype
    remedy = "`model.dtype=bfloat16`" if model is None else "load the model in bfloat16"
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{setting} computes in half precision, the weights are in {name} and nothing casts them: set "
            f"`train.mixed_precision=bf16`, or, under DeepSpeed or with an adapter, {remedy}"
        )


def _check_liger() -> None:
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            f"`model.liger` needs the package liger-kernel: `{install_extra('liger')}`, or turn it off"
        )
    _check_gpu("`model.liger`", "turn it off")


def _check_gpu(setting: str, remedy: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting} needs a CUDA GPU, and torch sees none here: {remedy} on this machine")


def check_architecture(config: ModelConfig, auto_class: Any, model_config: PretrainedConfig) -> None:
    """Refuse kernels that the model's architecture does not support, before its weights are read.

    Raises:
        ConfigError: names the architecture.
    """
    if config.liger:
        check_liger_knows(model_config.model_type)
    # transformers itself judges the code that a checkpoint brings along.
    if config.attention in _SUPPORT and type(model_config) in auto_class._model_mapping:
        classes = auto_class._model_mapping[type(model_config)]
        for model_class in classes if isinstance(classes, (list, tuple)) else [classes]:
            _check_supported(model_class, config.attention)


def _check_supported(model_class: type[PreTrainedModel], attention: str) -> None:
    if attention in _SUPPORT and not getattr(model_class, _SUPPORT[attention]):
        raise ConfigError(
            f"`model.attention={attention}`: {model_class.__name__} does not support it; leave it out to "
            "take what transformers has for it"
        )


def apply_kernels(lm: PreTrainedModel, config: ModelConfig) -> None:
    """Switch a loaded model to the kernels that `config` names.

    Raises:
        ConfigError: its architecture does not support them.
    """
    attention = config.attention
    if attention is not None and lm.config._attn_implementation != attention:
        _check_supported(type(lm), attention)
        lm.set_attn_implementation(attention)
        if lm.config._attn_implementation != attention:
            raise ConfigError(
                f"`model.attention={attention}`: a loaded {type(lm).__name__} cannot change its attention; "
                f'load it with `attn_implementation="{attention}"`'
            )
    if config.liger:
        apply_liger(lm)


_WITHOUT_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Arguments of Liger that keep its fused losses out: they replace the head, whose logits are needed."""


def check_liger_knows(model_type: str) -> None:
    """Refuse an architecture that Liger has no kernels for.

    Raises:
        ConfigError: names the model types that it has kernels for.
    """
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    functions = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in functions:
        raise ConfigError(
            f"`model.liger`: Liger has no kernels for the model type {model_type}; turn it off (it has some "
            f"for {', '.join(sorted(functions))})"
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Put Liger's kernels into a loaded model.

    Liger changes more than this model: its rotary embeddings reach all loaded models of the architecture, and
    models that are built later have its norms and MLPs, too.

    Raises:
        ConfigError: Liger does not know the architecture, or not in this form.
    """
    check_liger_knows(model.config.model_type)
    # transformers' own trainer calls this function, which chooses by the model's type.
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )

    try:
        _apply_liger_kernel_to_instance(model=model, **_WITHOUT_LOSS)
    # Liger fails in several ways where a module that it replaces is missing.
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`model.liger`: Liger cannot put its kernels into a {type(model).__name__} ({error}): turn it "
            "off"
        ) from error
