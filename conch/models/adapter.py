"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) inside a transformers model, through peft.

The model remains a `PreTrainedModel`: peft replaces some of its linear layers by layers that add
(alpha / r) * B A x to the output of the frozen layer. B starts at zero: an adapted model starts as its base.
"""

from __future__ import annotations

import copy
import difflib
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.errors import ConfigError, ModelError
from conch.models.folders import BASE_MODEL_KEY
from conch.ops import head_dtype

ADAPTER_NAME = "default"
"""Name of the one adapter that a model has, transformers' default."""

_STARTS_AS_BASE = (True, "gaussian")
_UNSUPPORTED_KEYS = (
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
_DERIVED_KEYS = {
    "task_type",
    "peft_type",
    "inference_mode",
    "auto_mapping",
    "revision",
    BASE_MODEL_KEY,
    "peft_version",
}
"""Fields of a LoraConfig that follow from the model, and no user sets."""


def add_adapter(model: PreTrainedModel, settings: dict[str, Any], *, merged_when_saved: bool) -> None:
    """Put a trainable adapter into `model` and freeze the rest.

    A classifier's head (and pooler) trains beside the adapter, in a copy; with the adapter off, the original
    is used. The adapter is float32 in half-precision models, too, where small updates would round to nothing.

    settings: keys of peft's LoraConfig.
    merged_when_saved: True where checkpoints are going to hold the merged model.

    Raises:
        ConfigError: a key or a layer is unknown, the adapter cannot be switched off to give the base, or its
            base comes from no folder to name in a checkpoint.
    """
    if has_adapter(model):
        raise ConfigError("the model carries an adapter already: merge it first, or drop `model.peft_config`")
    lora = _lora_config(model, settings)
    base = _base_path(model)
    if base is None and not merged_when_saved:
        raise ConfigError(
            "`model.peft_config` would save an adapter without its base model, which comes from no folder: "
            "set `model.merge_adapter=true`, or save the model and name its folder in `model.path`"
        )
    _check_names(model, lora)
    try:
        with warnings.catch_warnings():
            # peft corrects `fan_in_fan_out` by itself, and warns each time.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # Adapters on a tied weight are refused below where that matters.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model.add_adapter(lora, ADAPTER_NAME)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"`model.peft_config` does not fit a {type(model).__name__}: {error}") from error
    lora.base_model_name_or_path = base
    _check_adapted(model, lora, merged_when_saved)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(head_dtype(parameter.dtype))
    _cast_between(model)


def _cast_between(model: PreTrainedModel) -> None:
    """Let trained copies of whole modules read what half-precision layers give, and those read the copies.

    What a head outside of the trunk gives stays in float32: nothing reads it but the loss.
    """
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        trained = module.get_submodule(f"modules_to_save.{ADAPTER_NAME}")
        dtype = next(module.original_module.parameters()).dtype
        if dtype == next(trained.parameters()).dtype:
            continue
        trained.register_forward_pre_hook(_cast_inputs)
        if name.startswith(f"{model.base_model_prefix}."):
            trained.register_forward_hook(functools.partial(_cast_output, dtype))


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    is_float = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in inputs]
    return tuple(value.to(dtype) if cast else value for value, cast in zip(inputs, is_float, strict=True))


def _cast_output(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) else output


def has_adapter(model: nn.Module) -> bool:
    """True for a model with an adapter."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def base_of(module: nn.Module | None) -> nn.Module | None:
    """The layer below an adapter's layer; any other module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside: the model computes what its base does."""
    # `PreTrainedModel.enable_adapters` would leave trained copies of whole modules off.
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    try:
        for switch in switches:
            switch.enable_adapters(False)
        yield
    finally:
        for switch in switches:
            switch.enable_adapters(True)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter without its base, for `peft.PeftModel.from_pretrained(base, folder)`.

    Embeddings and head go with it where the model has another vocabulary than the base in its folder.
    """
    # `PreTrainedModel.save_pretrained` would ask the model hub whether the base's vocabulary has grown.
    grown = _has_grown(model)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=grown)
    if grown:  # of embeddings and head that are one weight, which is read as both, the first
        first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
        tensors = {name: tensors[name] for name in first.values()}
    on_cpu = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(on_cpu, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[ADAPTER_NAME].save_pretrained(str(folder))  # pyright: ignore[reportIndexIssue, reportArgumentType, reportOptionalSubscript]


def _has_grown(model: PreTrainedModel) -> bool:
    """Whether the vocabulary is another one than that of the base, as its folder or the hub's cache has it.

    False where neither has a config: the model comes from nowhere else, so that nothing else is read.
    """
    base = model.peft_config[ADAPTER_NAME].base_model_name_or_path  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    if base is None:
        return False
    try:
        config = type(model.config).from_pretrained(base, local_files_only=True)
    except (OSError, ValueError):
        return False
    sizes = (getattr(each.get_text_config(), "vocab_size", None) for each in (config, model.config))
    return len(set(sizes)) > 1


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU with the adapter merged into its weights, in the dtype of the base."""
    with torch.no_grad():
        memo = {id(p): nn.Parameter(p.to("cpu", copy=True), requires_grad=False) for p in model.parameters()}
        merged = copy.deepcopy(model, memo)
        merge_in_place(merged)
    return merged


def merge_in_place(model: PreTrainedModel) -> None:
    """Merge the adapter into the weights and remove its layers.

    Raises:
        ModelError: a layer cannot be merged.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # pyright: ignore[reportCallIssue]  of all kinds of layers that LoRA has
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            dtype = next(module.original_module.parameters()).dtype
            model.set_submodule(name, module.get_submodule(f"modules_to_save.{ADAPTER_NAME}").to(dtype))
    if has_adapter(model):
        raise ModelError(
            f"the adapter of {type(model).__name__} cannot be merged: set `model.merge_adapter=false`"
        )
    del model.peft_config
    model._hf_peft_config_loaded = False
    _untie_what_differs(model)


@torch.no_grad()
def _untie_what_differs(model: PreTrainedModel) -> None:
    """Let the config say so where embeddings and head no longer share a weight: one of them was trained in a
    copy (`modules_to_save`), which who ties them on reading would lose."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    first, second = (getattr(each, "weight", None) for each in ends)
    if not model.config.tie_word_embeddings or first is None or second is None:
        return
    if first is second or (first.shape == second.shape and torch.equal(first, second)):
        return
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, equal to the embeddings'."""
    head = base_of(model.get_output_embeddings())
    assert head is not None, "a shared weight has two modules"
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # pyright: ignore[reportArgumentType, reportCallIssue]


def merge_saved_adapter(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """`model` with the adapter in `path` merged in.

    Raises:
        ModelError: the adapter is damaged, or belongs to another model.
    """
    try:
        with warnings.catch_warnings():
            _grow_vocabulary(model, path)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # Embeddings and head that share a weight are told apart below, and by peft.
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            # peft calls transformers by an older name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, path)
            if adapted_and_shared(model) is not None:
                _untie(model)  # what is merged into one of two that share a weight would change both
            merged = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
            _untie_what_differs(merged)
    except ModelError:
        raise
    # A damaged or foreign adapter surfaces as anything from SafetensorError to RuntimeError and UserWarning.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the adapter in {path!r} does not fit its base {model.name_or_path!r}: {reason}"
        ) from error
    assert isinstance(merged, PreTrainedModel)
    merged.name_or_path = path  # of an adapter on top: its base is this model, not this model's base
    return merged


def _grow_vocabulary(model: PreTrainedModel, path: str) -> None:
    """Give the base room for the embeddings that the adapter in `path` brings, where tokens were added before
    it was trained.

    Raises:
        ModelError: the adapter knows more tokens than the base, and does not bring their embeddings.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    name, head_name = (_suffix(model, each) for each in (embeddings, head))
    brought = known = 0
    for key, tensor in load_peft_weights(path, device="cpu").items():
        if f"{name}lora_embedding_A" in key:
            known = max(known, tensor.shape[1])
        elif key.endswith(".weight") and "lora_A" not in key and (name in key or head_name in key):
            known = max(known, tensor.shape[0])
            if name in key and "lora" not in key:
                brought = max(brought, tensor.shape[0])
    assert isinstance(embeddings, nn.Embedding)
    size = embeddings.num_embeddings
    if known > size and brought < known:
        raise ModelError(
            f"the adapter in {path!r} knows {known} tokens, its base {model.name_or_path!r} {size}: it lacks "
            "the embeddings of the others; save it with peft's `save_embedding_layers=True`, or merged"
        )
    if brought > size:
        model.resize_token_embeddings(brought, mean_resizing=False)


def _suffix(model: PreTrainedModel, module: nn.Module | None) -> str:
    """What a weight of the module has in its name; no weight has it where there is no module."""
    names = [name for name, each in model.named_modules() if each is module]
    return f".{names[0]}." if names else "no module"


# ----------------------------------------------------------------------------------------------------- checks


def _lora_config(model: PreTrainedModel, settings: dict[str, Any]) -> LoraConfig:
    valid = {field.name for field in fields(LoraConfig)} - _DERIVED_KEYS
    for key in settings:
        if key not in valid:
            close = difflib.get_close_matches(key, valid, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ConfigError(f"`model.peft_config.{key}` is no key of peft's LoraConfig{hint}")
    _check_start(settings)
    heads = classifier_heads(model)
    modules = list(dict.fromkeys([*(settings.get("modules_to_save") or []), *heads])) or None
    try:
        return LoraConfig(**{**settings, "modules_to_save": modules}, task_type=_task(model))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`model.peft_config` is not valid: {error}") from error


def _check_start(settings: dict[str, Any]) -> None:
    """Refuse keys under which the model with its adapter off would not be the model of the start."""
    if settings.get("bias", "none") != "none":
        raise ConfigError(
            "`model.peft_config.bias` must be none: biases of the base would move with the adapter"
        )
    if settings.get("init_lora_weights", True) not in _STARTS_AS_BASE:
        raise ConfigError(
            f"`model.peft_config.init_lora_weights` = {settings['init_lora_weights']!r} would start the "
            "model elsewhere than at its base: use true or gaussian"
        )
    for key in _UNSUPPORTED_KEYS:
        if settings.get(key):
            raise ConfigError(
                f"`model.peft_config.{key}` makes an adapter that cannot be told from its base or merged "
                "into it: leave it out"
            )


def _check_names(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuse a list with a name that no layer has; peft requires only one of the names to exist."""
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "modules_to_save"):
        targets = getattr(lora, key)
        for target in [] if targets is None or isinstance(targets, str) else sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                last = sorted({name.rpartition(".")[2] for name in names} - {""})
                layers = ", ".join(part for part in last if not part.isdigit())
                raise ConfigError(
                    f"`model.peft_config.{key}`: {type(model).__name__} has no layer {target!r}; "
                    f"there are {layers}"
                )


def _check_adapted(model: PreTrainedModel, lora: LoraConfig, merged_when_saved: bool) -> None:
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    numbers = lora.layers_to_transform
    for number in [numbers] if isinstance(numbers, int) else numbers or []:
        if not any(str(number) in name.split(".") for name in adapted):
            raise ConfigError(
                f"`model.peft_config.layers_to_transform`: no layer {number} of {type(model).__name__} has "
                "what `target_modules` names"
            )
    shared = adapted_and_shared(model) if merged_when_saved else None
    if shared is not None:
        raise ConfigError(
            f"`model.peft_config.target_modules` names {shared}, whose weight embeddings and head share: an "
            "adapter on it cannot be merged; set `model.merge_adapter=false` or leave it out"
        )


def adapted_and_shared(model: PreTrainedModel) -> str | None:
    """Name of a layer with an adapter whose weight embeddings and head share; None where there is none."""
    if not model.config.tie_word_embeddings:
        return None
    ends = (base_of(model.get_input_embeddings()), base_of(model.get_output_embeddings()))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.get_base_layer() in ends:
            return name
    return None


def copied_and_shared(model: PreTrainedModel) -> str | None:
    """Name of a module of which a copy trains (`modules_to_save`), and whose weight embeddings and head
    share; None where there is none."""
    if not model.config.tie_word_embeddings:
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and module in ends:
            return name
    return None


def classifier_heads(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's modules beside its trunk, and of a pooler; none for a language model."""
    if model.get_output_embeddings() is not None:
        return []
    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
    return heads + ["pooler"] * isinstance(getattr(model.base_model, "pooler", None), nn.Module)


def _task(model: PreTrainedModel) -> TaskType:
    if model.get_output_embeddings() is None:
        return TaskType.SEQ_CLS
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def _base_path(model: PreTrainedModel) -> str | None:
    path = model.name_or_path
    if not path:
        return None
    return str(Path(path).resolve()) if Path(path).exists() else path


def distinct_tensors(lm: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each saved tensor once: its name without peft's layers, its name in the model, and the tensor.

    A tied tensor has the first of its names, that of the embeddings.
    """
    unsaved = _unsaved(lm)
    seen: set[int] = set()
    for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
        plain = _plain_name(name)
        if plain is None or name in unsaved or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield plain, name, tensor


def derived_tensors(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors that are not saved, for they follow from the configuration; by name, without peft's layers."""
    unsaved = _unsaved(lm)
    named = {name: tensor for name, tensor in lm.named_buffers() if name in unsaved}
    return {plain: tensor for name, tensor in named.items() if (plain := _plain_name(name)) is not None}


def _unsaved(lm: nn.Module) -> set[str]:
    """Names of the buffers that are not saved."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in lm.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _plain_name(name: str) -> str | None:
    """The name of a tensor without peft's layers around it; None for a tensor of peft's own."""
    if any(part.startswith("lora_") for part in name.split(".")) or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER_NAME}.", ".")
