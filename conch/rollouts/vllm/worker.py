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
from vllm.lora.layers.base_linear import (  # pyright: ignore[reportMissingImports]
    BaseLinearLayerWithLoRA,
)
from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.layers.utils import (  # pyright: ignore[reportMissingImports]
    dispatch_cpu_unquantized_gemm,
)

from conch.errors import RolloutError
from conch.rollouts.protocol import Part, WeightUpdate
from conch.rollouts.vllm.build import ADAPTER_ID, SERVER
from conch.rollouts.weight_sync import Group, adapter_rank, address_towards, join

_LOOK_S = 1.0


class WeightReceiver:
    """Takes up weights that are named as in a checkpoint, or an adapter's as peft names them."""

    # Of vLLM's worker.
    model_runner: Any
    vllm_config: Any
    rank: int
    device: torch.device

    def take_part(self, part: Part, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load them in place. They may be the trainer's own, which are read only."""
        if part == "adapter":
            _load_adapter(self.model_runner.lora_manager, dict(tensors))
            return
        self.model_runner.reload_weights(weights_iterator=tensors)
        _repack_heads(self.model_runner.get_model())

    def take_file(self, given: dict[str, Any]) -> None:
        """Load a safetensors file. given: a `WeightUpdate` as plain values."""
        self._compile_nothing()
        with safe_open(given["path"], framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            self.take_part(given["part"], tensors)

    def take_broadcast(self, given: dict[str, Any], timeout_s: float) -> None:
        """Load what a trainer broadcasts."""
        self._compile_nothing()
        offer = WeightUpdate.model_validate(given)
        store = TCPStore(offer.host, offer.port, is_master=False, timeout=timedelta(seconds=timeout_s))
        join(store)
        address = address_towards(offer.host, offer.port)
        size = 1 + self.vllm_config.parallel_config.world_size
        group = Group(store, 1 + self.rank, size, offer.backend, address=address, timeout_s=timeout_s)
        self.take_part(offer.part, group.receive(offer.tensors))

    def lora_room(self) -> dict[str, Any]:
        """A `LoraRoom` as plain values."""
        manager = self.model_runner.lora_manager
        return {"rank": manager.lora_config.max_lora_rank, "modules": sorted(_modules_with_lora(manager))}

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


def _load_adapter(manager: Any, tensors: dict[str, Tensor]) -> None:
    """Put an adapter in the place of the one that was there. manager: vLLM's, of adapters.

    Raises:
        RolloutError: vLLM has no layer for some of it, and would leave that out.
    """
    models, rank = manager._adapter_manager, adapter_rank(tensors)
    names = getattr(models.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a scale of 1: theirs is in the tensors
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if names is None else names.get_rename_mapper(),
    )
    known = {part for name in models.modules for part in models.packed_modules.get(name, [name])}
    if not adapter.loras.keys() <= known:
        raise RolloutError(f"vLLM has no layer for {min(adapter.loras.keys() - known)} of the adapter")
    models.remove_adapter(ADAPTER_ID)
    models.add_adapter(adapter)
    models.activate_adapter(ADAPTER_ID)


def _modules_with_lora(manager: Any) -> set[str]:
    """Last parts of the names, as in a checkpoint, of the layers that may have an adapter. Those that are
    fused in a checkpoint already are left out: vLLM may keep their rows in another order."""
    models, found = manager._adapter_manager, set[str]()
    for name, layer in models.modules.items():
        own = name.rpartition(".")[2]
        parts = models.packed_modules_mapping.get(own, [own])
        fused = len(parts) == 1 and isinstance(
            getattr(layer, "base_layer", None), QKVParallelLinear | MergedColumnParallelLinear
        )
        if isinstance(layer, BaseLinearLayerWithLoRA) and not fused:
            found.update(parts)
    return found


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
