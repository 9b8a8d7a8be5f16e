"""Which layers of a model train, and which activations are kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ConfigError, ModelError, first_line
from conch.log import get_logger
from conch.models.adapter import add_adapter, classifier_heads
from conch.models.attention import trial_ids, trial_precision
from conch.models.loading import decoder_layers, disable_dropout

_log = get_logger(__name__)


def freeze_layers(model: PreTrainedModel, config: ModelConfig) -> None:
    """Freeze all but the top blocks, or add an adapter and freeze all but it, as `config` says.

    A classifier's head always trains. Call it before the model is given to an optimizer or a reference.

    Raises:
        ConfigError: the model has fewer blocks, or the adapter does not fit; see `add_adapter`.
        ModelError: the blocks cannot be found.
    """
    if config.peft_config is not None:
        add_adapter(model, config.peft_config, merged_when_saved=config.merge_adapter)
        if config.disable_dropout:
            disable_dropout(model)  # the adapter's own
    else:
        freeze_trunk(model, config.num_layers_unfrozen)
        for name in classifier_heads(model):
            owner = model.base_model if name == "pooler" else model
            getattr(owner, name).requires_grad_(True)
    if config.gradient_checkpointing:
        checkpoint_activations(model)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of each block, in training mode, and recompute the rest in the backward pass.

    Raises:
        ConfigError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"`model.gradient_checkpointing`: {type(model).__name__} does not support it")
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its name in older releases of transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # Only reentrant checkpoints need inputs with a gradient, which would send the backward pass through all
    # of a frozen trunk for nothing.
    model.disable_input_require_grads()


def freeze_trunk(model: PreTrainedModel, num_layers_unfrozen: int) -> None:
    """Leave only the top `num_layers_unfrozen` blocks trainable; -1 leaves all.

    Embeddings, an encoder, final norm and head are frozen with the trunk: the reference shares them.
    """
    if num_layers_unfrozen == -1:
        return
    layers = decoder_layers(model)
    if num_layers_unfrozen > len(layers):
        raise ConfigError(
            f"`model.num_layers_unfrozen` is {num_layers_unfrozen}; the model has {len(layers)} layers"
        )
    model.requires_grad_(False)
    for layer in layers[len(layers) - num_layers_unfrozen :]:
        layer.requires_grad_(True)


def freeze_unreached(model: PreTrainedModel) -> list[str]:
    """Freeze trained parameters that no text reaches (an image encoder, say): DDP would wait for their
    gradients. Call it after `freeze_layers`, with `model` on its device.

    A backward pass over a few tokens finds them. Experts that these tokens did not choose stay as they are.

    Raises:
        ModelError: the pass fails.

    Returns:
        Names of the largest modules that are frozen as a whole; those of parameters that stand alone.
    """
    (ids,) = trial_ids(model, (4,))
    inputs = {"input_ids": ids.to(model.device)}
    if model.get_output_embeddings() is not None and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached: set[Tensor] = set()

    def note(parameter: Tensor) -> None:
        reached.add(parameter)
        parameter.grad = None  # all gradients at once may not fit before training begins

    handles = [p.register_post_accumulate_grad_hook(note) for p in trained.values()]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), trial_precision(model):
            model(**inputs, use_cache=False).logits.float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: the architecture's own
        raise ModelError(
            f"{type(model).__name__} cannot be trained on text, a pass over a few tokens fails: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    unreached = [name for name, p in trained.items() if p not in reached and "expert" not in name]
    for name in unreached:
        trained[name].requires_grad_(False)
    names = _modules_of(model, unreached)
    if names:
        _log.info("no text reaches %s of %s: frozen", ", ".join(names), type(model).__name__)
    return names


def _modules_of(model: nn.Module, parameters: Sequence[str]) -> list[str]:
    """The largest modules that have no other trained parameters than these, all frozen by now."""
    names: dict[str, None] = {}
    for parameter in parameters:
        name = parameter
        while (parent := name.rpartition(".")[0]) and not _trains(model.get_submodule(parent)):
            name = parent
        names[name] = None
    return [*names]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
