"""vLLM's side of an adapter that is handed over by itself: its settings, and the name that requests call it
by."""

from __future__ import annotations

from typing import Any, get_args

from conch.rollouts.wire import LoraRoom

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
