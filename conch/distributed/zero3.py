"""Weights that DeepSpeed ZeRO-3 has spread over the ranks, made whole for a while.

ZeRO-3 hangs a collective before and after each layer's forward pass, so ranks that run unequal numbers of
them (one samples longer, one has fewer rows to evaluate) would wait for each other for ever. Here all weights
are gathered once and those collectives are taken off: inside, each rank is as free as under ZeRO-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import nn


def is_sharded(wrapped: nn.Module) -> bool:
    """True for what DeepSpeed wrapped under ZeRO-3."""
    return isinstance(wrapped, deepspeed.DeepSpeedEngine) and wrapped.zero_optimization_partition_weights()


@contextmanager
def whole(wrapped: Any) -> Iterator[None]:
    """Inside, all parameters of the wrapped module are there and its layers run without collectives.

    To be read only: what is written to them is lost. Called on all ranks; no gradient may be under way.
    """
    offload = wrapped.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(wrapped.module.parameters()):
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


@contextmanager
def writable(*modules: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `modules` are there, and what rank 0 writes to them is kept by all ranks."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield
