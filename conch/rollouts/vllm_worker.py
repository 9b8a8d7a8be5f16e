"""What runs inside vLLM's workers: vLLM mixes this class into theirs, and calls its methods by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.utils import (  # pyright: ignore[reportMissingImports]
    dispatch_cpu_unquantized_gemm,
)


class WeightReceiver:
    """Takes up weights that are named as in a checkpoint."""

    model_runner: Any
    """Of vLLM's worker."""

    def take_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load them in place. They may be the trainer's own, which are read only."""
        self.model_runner.reload_weights(weights_iterator=tensors)
        _repack_heads(self.model_runner.get_model())


def _repack_heads(model: nn.Module) -> None:
    """On a CPU vLLM multiplies by a packed copy of the weight. That of a head whose weight is the embeddings'
    is not made anew when they are loaded, and would go on giving the old model's logits."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
