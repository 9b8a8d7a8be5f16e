"""vLLM in a rollout server; see `conch.rollouts.server`."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from conch.config import GenerationConfig, TokenizerConfig
from conch.errors import ModelError, RolloutUnavailableError
from conch.log import get_logger
from conch.models.loading import load_tokenizer
from conch.rollouts.protocol import CompletionReply, GenerateRequest, LoraCapacity, WeightUpdate
from conch.rollouts.server import BusyClock, RolloutServer, listen
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.stopping import StopCondition
from conch.rollouts.vllm.build import (
    SERVER_PID_VARIABLE,
    adapter_request,
    check_architecture,
    check_installed,
    check_servable,
    engine_settings,
    explain_error,
    lora_settings,
    supports_adapters,
    was_killed,
)
from conch.rollouts.vllm.engine import sampling_params
from conch.rollouts.weight_sync import SHARED_MEMORY
from conch.servers.listening import check_access
from conch.servers.restart import ENGINE_DIED, leave_with_parent

_log = get_logger(__name__)

_MAX_STOP_CONDITIONS = 64
"""Sets of stop strings that are kept ready; a run has one or two."""


class VLLMSampler:
    """vLLM's engine in processes of its own; a `conch.rollouts.server.Sampler`.

    engine: vLLM's `AsyncLLM`.
    deadline_s: longest time for new weights to arrive.
    lora: adapters that the engine takes; None for none.
    """

    name = "vLLM"

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        deadline_s: float,
        lora: LoraCapacity | None,
    ) -> None:
        self.lora = lora
        self._engine = engine
        self._tokenizer = tokenizer
        self._deadline_s = deadline_s
        self._adapter: Any = None
        self._stop_conditions: dict[GenerationConfig, StopCondition] = {}
        self._clock = BusyClock()

    @property
    def busy_s(self) -> float:
        return self._clock.seconds

    @property
    def has_died(self) -> bool:
        return self._engine.errored

    @property
    def max_model_len(self) -> int:
        return self._engine.vllm_config.model_config.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self._engine.vllm_config.scheduler_config.max_num_seqs

    @property
    def workers(self) -> int:
        return self._engine.vllm_config.parallel_config.world_size

    @property
    def device(self) -> str:
        return self._engine.vllm_config.device_config.device_type

    @property
    def vocabulary(self) -> int:
        return self._engine.vllm_config.model_config.get_vocab_size()

    async def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None = None) -> None:
        with _in_file(update, tensors) as update:
            await self._load_update(update)

    async def _load_update(self, update: WeightUpdate) -> None:
        await self._engine.pause_generation(mode="wait", clear_cache=True)
        try:
            await self._load(update)
            await self._engine.reset_prefix_cache()
            await self._engine.update_weight_version(str(update.weights.version))
            if update.part != "base":
                is_adapter = update.part == "adapter"
                self._adapter = adapter_request(update.weights.version) if is_adapter else None
        finally:
            await self._engine.resume_generation()

    async def _load(self, update: WeightUpdate) -> None:
        if update.path is None:
            arguments = (update.model_dump(), self._deadline_s)
            await self._engine.collective_rpc("receive_broadcast", timeout=self._deadline_s, args=arguments)
            return
        arguments = (update.model_dump(),)
        await self._engine.collective_rpc("load_file", timeout=self._deadline_s, args=arguments)

    async def completions(self, request: GenerateRequest, version: int) -> AsyncIterator[CompletionReply]:
        stop = self._stop_condition(request.generation)
        tasks = [
            asyncio.ensure_future(self._complete(request, stop, version, prompt, seed))
            for prompt in range(len(request.prompts))
            for seed in range(len(request.prompts[prompt].seeds))
        ]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(
        self, request: GenerateRequest, stop: StopCondition, version: int, prompt_index: int, seed_index: int
    ) -> CompletionReply:
        prompt = request.prompts[prompt_index]
        params = sampling_params(
            request.generation,
            stop.end_ids,
            greedy=request.greedy,
            seed=prompt.seeds[seed_index],
            every_token=stop.has_stop_strings,
        )
        tokens = {"type": "token", "prompt_token_ids": list(prompt.token_ids)}
        output: Any = None
        sampling = self._engine.generate(tokens, params, uuid4().hex, lora_request=self._adapter)
        async with aclosing(sampling) as outputs:
            async for request_output in outputs:
                output = request_output.outputs[0]
                if request_output.finished or stop.reached(output.token_ids):
                    break
        completion = stop.completion(prompt.token_ids, output.token_ids, output.logprobs.logprobs)
        # vLLM reports versions with the end only. A completion that a stop string ends early has `version`,
        # since no weights are loaded while it is sampled.
        versions = {int(span.version) for span in output.weight_versions or []} or {version}
        return CompletionReply.of(completion, prompt_index, seed_index, min(versions))

    def _stop_condition(self, generation: GenerationConfig) -> StopCondition:
        if generation not in self._stop_conditions:
            if len(self._stop_conditions) >= _MAX_STOP_CONDITIONS:
                self._stop_conditions.clear()
            self._stop_conditions[generation] = StopCondition(self._tokenizer, generation)
        return self._stop_conditions[generation]


@contextmanager
def _in_file(update: WeightUpdate, tensors: Mapping[str, Tensor] | None) -> Iterator[WeightUpdate]:
    """An update whose tensors, where they are handed over, are in a file that vLLM's workers read.

    Raises:
        RolloutUnavailableError: shared memory is full or absent.
    """
    if tensors is None:
        yield update
        return
    with tempfile.TemporaryDirectory(prefix="conch-handed-", dir=SHARED_MEMORY) as folder:
        path = Path(folder) / "weights.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise RolloutUnavailableError(
                f"the weights cannot be written to {path}: {error}; make room there"
            ) from error
        yield update.model_copy(update={"handed": False, "path": str(path)})


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone.

    Raises:
        ConchError: vLLM is absent, or cannot serve the model.
        SystemExit: 0 after SIGTERM, `ENGINE_DIED` where vLLM has died.
    """
    check_access(config)  # before minutes of loading
    check_installed()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[SERVER_PID_VARIABLE] = str(os.getpid())
    leave_with_parent()
    tokenizer = load_tokenizer(TokenizerConfig(), config.model)
    asyncio.run(_serve(config, tokenizer))


async def _serve(config: ServerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    engine, server = _build(config), None
    try:
        lora = None
        if config.max_lora_rank:
            lora = LoraCapacity(**(await engine.collective_rpc("lora_capacity"))[0])
        sampler = VLLMSampler(engine, tokenizer, config.deadline_s, lora)
        server = RolloutServer(sampler, tokenizer, config.weights_dir)
        await listen(server, config)
    finally:
        engine.shutdown()
        if server is not None and server.has_died:
            sys.exit(ENGINE_DIED)


def _build(config: ServerConfig) -> Any:
    """Build vLLM's engine without weights.

    Raises:
        ConchError: vLLM cannot serve the model.
        SystemExit: `ENGINE_DIED` where vLLM was killed while it loaded.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model = AutoConfig.from_pretrained(config.model, **source)
    for name in model.architectures or []:
        check_architecture(name)
        if config.max_lora_rank and not supports_adapters(name):
            raise ModelError(
                f"vLLM has no LoRA for a {name}: leave `max_lora_rank` out; trainers then merge adapters"
            )
    # vLLM's own "auto" takes half precision for a model that is stored in float32.
    dtype = (model.dtype or "float32") if config.dtype == "auto" else config.dtype
    settings = engine_settings(config.model, config.rollout_config(), dtype)
    try:
        arguments = AsyncEngineArgs(
            **settings,
            **source,
            **lora_settings(config.lora_capacity()),
            load_format="dummy",
            tensor_parallel_size=config.tensor_parallel_size,
            disable_log_stats=True,
            enable_log_requests=False,
        )
        check_servable(arguments.create_engine_config())
        return AsyncLLM.from_engine_args(arguments)
    except (ValueError, RuntimeError) as error:
        if was_killed(error):
            _log.error("vLLM was killed while it loaded")
            sys.exit(ENGINE_DIED)
        raise explain_error(error, config.model) from error
