"""Code inside vLLM's workers: vLLM mixes `WeightReceiver` into its worker class and calls methods by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn
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
from conch.rollouts.vllm.build import ADAPTER_ID, SERVER_PID_VARIABLE
from conch.rollouts.weight_sync import adapter_rank, received_tensors

_POLL_S = 1.0


class WeightReceiver:
    """Loads weights under the names of a checkpoint, or an adapter's under peft's names."""

    # Attributes of vLLM's worker.
    model_runner: Any
    vllm_config: Any
    rank: int
    device: torch.device

    def load_part(self, part: Part, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors into the model. They may be the trainer's own: they are only read."""
        if part == "adapter":
            _load_adapter(self.model_runner.lora_manager, dict(tensors))
            return
        self.model_runner.reload_weights(weights_iterator=tensors)
        _repack_heads(self.model_runner.get_model())

    def load_file(self, update: dict[str, Any]) -> None:
        """Load a safetensors file.

        update: a `WeightUpdate` with a path, as plain values.
        """
        self._disable_compiler()
        with safe_open(update["path"], framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            self.load_part(update["part"], tensors)

    def receive_broadcast(self, update: dict[str, Any], timeout_s: float) -> None:
        """Load the tensors that a trainer broadcasts.

        update: a `WeightUpdate` with an address, as plain values.
        """
        self._disable_compiler()
        message = WeightUpdate.model_validate(update)
        rank, size = 1 + self.rank, 1 + self.vllm_config.parallel_config.world_size
        self.load_part(message.part, received_tensors(message, rank, size, timeout_s))

    def lora_capacity(self) -> dict[str, Any]:
        """A `LoraCapacity` as plain values."""
        manager = self.model_runner.lora_manager
        return {"rank": manager.lora_config.max_lora_rank, "modules": sorted(_modules_with_lora(manager))}

    def _disable_compiler(self) -> None:
        """Switch torch's compiler off for an eager engine on a CPU; see `without_compiler`."""
        if self.vllm_config.model_config.enforce_eager and self.device.type == "cpu":
            torch.compiler.set_stance("force_eager")


def _repack_heads(model: nn.Module) -> None:
    """Renew the packed copies of weights by which vLLM multiplies on a CPU.

    Loading does not renew that of a head tied to the embeddings, which would give the old model's logits.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _load_adapter(manager: Any, tensors: dict[str, Tensor]) -> None:
    """Replace the adapter in the model.

    manager: vLLM's LoRA manager.

    Raises:
        RolloutError: vLLM has no layer for a part of the adapter, and would leave that part out.
    """
    models, rank = manager._adapter_manager, adapter_rank(tensors)
    mapper = getattr(models.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # scale 1: the tensors contain theirs
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    layers = {part for name in models.modules for part in models.packed_modules.get(name, [name])}
    if not adapter.loras.keys() <= layers:
        raise RolloutError(f"vLLM has no layer for {min(adapter.loras.keys() - layers)} of the adapter")
    models.remove_adapter(ADAPTER_ID)
    models.add_adapter(adapter)
    models.activate_adapter(ADAPTER_ID)


def _modules_with_lora(manager: Any) -> set[str]:
    """Last parts of the checkpoint's names of the layers that may have an adapter.

    Layers that are fused in the checkpoint are left out: vLLM may keep their rows in another order.
    """
    models, parts_with_lora = manager._adapter_manager, set[str]()
    for name, layer in models.modules.items():
        last = name.rpartition(".")[2]
        parts = models.packed_modules_mapping.get(last, [last])
        fused = len(parts) == 1 and isinstance(
            getattr(layer, "base_layer", None), QKVParallelLinear | MergedColumnParallelLinear
        )
        if isinstance(layer, BaseLinearLayerWithLoRA) and not fused:
            parts_with_lora.update(parts)
    return parts_with_lora


def _exit_with(server_pid: int) -> None:
    """Kill this process and the engine's core beside it once the server that started them is gone.

    A server that was killed cannot end them, and they would hold their memory for ever.
    """
    engine = psutil.Process() if os.getppid() == server_pid else psutil.Process(os.getppid())
    while engine.is_running() and engine.ppid() == server_pid:
        time.sleep(_POLL_S)
    if engine.is_running() and engine.pid != os.getpid():
        engine.kill()
    os.kill(os.getpid(), signal.SIGKILL)


if SERVER_PID_VARIABLE in os.environ:
    threading.Thread(target=_exit_with, args=(int(os.environ[SERVER_PID_VARIABLE]),), daemon=True).start()
