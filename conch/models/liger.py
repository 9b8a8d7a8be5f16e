"""Norms, rotary embeddings and MLPs by the Triton kernels of Liger (Hsu et al. 2024, arXiv:2410.10989).

Its package is imported where it is asked for: it brings Triton, and kernels of many kinds.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from conch.errors import ConfigError

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
