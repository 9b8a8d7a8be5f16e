"""What runs inside vLLM's workers: vLLM mixes this class into theirs, and calls its methods by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from vllm.model_executor.layers.utils import (  # pyright: ignore[reportMissingImports]
    dispatch_cpu_unquantized_gemm,
)

from conch.rollouts.vllm_build import SERVER
from conch.rollouts.weight_sync import Group, address_towards, join
from conch.rollouts.wire import Given

_LOOK_S = 1.0


class WeightReceiver:
    """Takes up weights that are named as in a checkpoint."""

    # Of vLLM's worker.
    model_runner: Any
    vllm_config: Any
    rank: int
    device: torch.device

    def take_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load them in place. They may be the trainer's own, which are read only."""
        self.model_runner.reload_weights(weights_iterator=tensors)
        _repack_heads(self.model_runner.get_model())

    def take_file(self, path: str) -> None:
        """Load a safetensors file."""
        self._compile_nothing()
        with safe_open(path, framework="pt") as file:
            self.take_tensors((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def take_broadcast(self, given: dict[str, Any], timeout_s: float) -> None:
        """Load what a trainer broadcasts. given: a `Given` as plain values."""
        self._compile_nothing()
        offer = Given.model_validate(given)
        store = TCPStore(offer.host, offer.port, is_master=False, timeout=timedelta(seconds=timeout_s))
        join(store)
        address = address_towards(offer.host, offer.port)
        size = 1 + self.vllm_config.parallel_config.world_size
        group = Group(store, 1 + self.rank, size, offer.backend, address=address, timeout_s=timeout_s)
        self.take_tensors(group.receive(offer.tensors))

    def _compile_nothing(self) -> None:
        """In a process of its own an eager engine must not compile at all; see `quiet_compiler`."""
        if self.vllm_config.model_config.enforce_eager and self.device.type == "cpu":
            torch.compiler.set_stance("force_eager")


def _repack_heads(model: nn.Module) -> None:
    """On a CPU vLLM multiplies by a packed copy of the weight. That of a head whose weight is the embeddings'
    is not made anew when they are loaded, and would go on giving the old model's logits."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _leave_with(server: int) -> None:
    """End this process, and the engine's beside it, once the server that started them is gone: one that was
    killed cannot do it, and they would hold their memory for ever."""
    engine = psutil.Process() if os.getppid() == server else psutil.Process(os.getppid())
    while engine.is_running() and engine.ppid() == server:
        time.sleep(_LOOK_S)
    if engine.is_running() and engine.pid != os.getpid():
        engine.kill()
    os.kill(os.getpid(), signal.SIGKILL)


if SERVER in os.environ:
    threading.Thread(target=_leave_with, args=(int(os.environ[SERVER]),), daemon=True).start()
