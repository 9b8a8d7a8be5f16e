"""Which layers of a model train, and which activations are kept for the backward pass."""

from __future__ import annotations

from transformers import PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ConfigError
from conch.models.adapter import add_adapter, classifier_heads
from conch.models.loading import decoder_layers, disable_dropout


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
