"""vLLM behind the addresses of `conch.rollouts.app`; see `conch.rollouts.protocol` for the messages."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import HTTPException
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from conch.config import GenerationConfig, TokenizerConfig
from conch.errors import ModelError, first_line
from conch.log import get_logger
from conch.models.loading import load_tokenizer
from conch.rollouts.app import BAD_REQUEST, STALE_WEIGHTS, UNAVAILABLE, check_access, make_listener
from conch.rollouts.protocol import (
    MAX_COMPLETIONS,
    CompletionReply,
    Failure,
    GenerateRequest,
    Health,
    LoraCapacity,
    WeightUpdate,
    WeightVersion,
)
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
from conch.rollouts.vllm.restart import VLLM_DIED, exit_with_parent
from conch.rollouts.vllm.server_config import ServerConfig

_log = get_logger(__name__)

_MAX_STOP_CONDITIONS = 64
"""Sets of stop strings that are kept ready; a run has one or two."""


class RolloutServer:
    """vLLM's engine in processes of its own, and the version of the weights in it.

    engine: vLLM's `AsyncLLM`.
    deadline_s: longest time for new weights to arrive.
    lora: adapters that the engine takes; None for none.
    weights_dir: folder below which files with weights must lie.

    has_died: True once the engine was found dead; False where all processes are ended together.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        deadline_s: float,
        lora: LoraCapacity | None,
        weights_dir: Path,
    ) -> None:
        self.has_died = False
        self._engine = engine
        self._lora = lora
        self._tokenizer = tokenizer
        self._deadline_s = deadline_s
        self._weights_dir = weights_dir
        self._weights: WeightVersion | None = None
        self._base: str | None = None
        self._adapter: Any = None
        self._update_lock = asyncio.Lock()
        self._stop_conditions: dict[GenerationConfig, StopCondition] = {}

    async def health(self) -> Health:
        """State of this server.

        Ends the process where vLLM has died: its parent, or whatever else watches it, starts another.
        """
        if self._engine.errored:
            self.has_died = True
            signal.raise_signal(signal.SIGTERM)
            raise HTTPException(UNAVAILABLE, "vLLM has died here; its log says why")
        config = self._engine.vllm_config
        return Health(
            weights=self._weights,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            workers=config.parallel_config.world_size,
            device=config.device_config.device_type,
            lora=self._lora,
            base=self._base,
        )

    async def update_weights(self, update: WeightUpdate) -> Health:
        """Load new weights once all completions under way have ended. Until they are loaded the server holds
        none.

        Raises:
            HTTPException: 400 for what can never be loaded, 409 for an adapter without its base; what the
                server holds is unchanged then. 503 where loading failed.
        """
        async with self._update_lock:
            self._check_update(update)
            self._weights = None
            if update.part != "adapter":
                self._base = None
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._load(update)
                await self._engine.reset_prefix_cache()
                await self._engine.update_weight_version(str(update.weights.version))
                self._record(update)
            except Exception as error:
                _log.warning("weights were not loaded", exc_info=True)
                raise HTTPException(UNAVAILABLE, f"weights were not loaded: {first_line(error)}") from error
            finally:
                await self._engine.resume_generation()
        return await self.health()

    def _check_update(self, update: WeightUpdate) -> None:
        if update.part != "whole" and self._lora is None:
            raise HTTPException(BAD_REQUEST, "this server takes no adapters: start it with `max_lora_rank`")
        if update.part == "adapter" and update.weights.source != self._base:
            raise HTTPException(STALE_WEIGHTS, f"the base of {update.weights.source} is not here")
        if update.path is not None:
            _check_file(Path(update.path), self._weights_dir)

    async def _load(self, update: WeightUpdate) -> None:
        if update.path is None:
            arguments = (update.model_dump(), self._deadline_s)
            await self._engine.collective_rpc("receive_broadcast", timeout=self._deadline_s, args=arguments)
            return
        # The file that was checked, whatever a link on the way to it may say by now.
        values = {**update.model_dump(), "path": str(Path(update.path).resolve())}
        await self._engine.collective_rpc("load_file", timeout=self._deadline_s, args=(values,))

    def _record(self, update: WeightUpdate) -> None:
        """Record what the engine holds after an update."""
        if update.part == "base":
            self._base = update.weights.source
            return
        self._adapter = adapter_request(update.weights.version) if update.part == "adapter" else None
        self._weights = update.weights

    def check(self, request: GenerateRequest) -> None:
        """Refuse a request that cannot be sampled as it is.

        Raises:
            HTTPException: 409 for other weights, 400 for another eos token or a prompt that is too long.
        """
        if request.weights != self._weights:
            present = (
                "no weights"
                if self._weights is None
                else f"those of {self._weights.version} of {self._weights.source}"
            )
            raise HTTPException(
                STALE_WEIGHTS,
                f"version {request.weights.version} of {request.weights.source} was asked for, {present} are "
                "here",
            )
        if request.eos_id != self._tokenizer.eos_token_id:
            raise HTTPException(
                BAD_REQUEST,
                f"the trainer's tokenizer ends a text with token {request.eos_id}, this server's with "
                f"{self._tokenizer.eos_token_id}: serve the policy's own folder",
            )
        count = sum(len(prompt.seeds) for prompt in request.prompts)
        if count > MAX_COMPLETIONS:
            raise HTTPException(
                BAD_REQUEST, f"a request asks for {count} completions, {MAX_COMPLETIONS} are the most"
            )
        model = self._engine.vllm_config.model_config
        highest = max(max(prompt.token_ids) for prompt in request.prompts)
        size = model.get_vocab_size()  # 0 where the configuration does not tell
        if 0 < size <= highest:
            raise HTTPException(
                BAD_REQUEST,
                f"a prompt has token {highest}, this server's model knows {size} tokens: serve the policy's "
                "own folder",
            )
        longest = max(len(prompt.token_ids) for prompt in request.prompts)
        max_model_len = model.max_model_len
        if longest + request.generation.max_new_tokens > max_model_len:
            raise HTTPException(
                BAD_REQUEST,
                f"a prompt of {longest} tokens and `generation.max_new_tokens` = "
                f"{request.generation.max_new_tokens} do not fit this server's `max_model_len` of "
                f"{max_model_len}: raise it, or lower `data.max_tokens`",
            )

    async def completion_lines(self, request: GenerateRequest) -> AsyncIterator[str]:
        """Yield a line for each completion, as it ends, and where one fails a last line that says why.

        Sampling stops once the lines are no longer read.
        """
        assert self._weights is not None
        stop = self._stop_condition(request.generation)
        tasks = [
            asyncio.ensure_future(self._complete(request, stop, self._weights.version, prompt, seed))
            for prompt in range(len(request.prompts))
            for seed in range(len(request.prompts[prompt].seeds))
        ]
        try:
            for done in asyncio.as_completed(tasks):
                yield (await done).model_dump_json() + "\n"
        except Exception as error:
            _log.warning("sampling failed", exc_info=True)
            yield Failure(detail=first_line(error)).model_dump_json() + "\n"
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
        return CompletionReply(
            prompt_index=prompt_index,
            seed_index=seed_index,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            text=completion.text,
            finish_reason=completion.finish_reason,
            version=min(versions),
        )

    def _stop_condition(self, generation: GenerationConfig) -> StopCondition:
        if generation not in self._stop_conditions:
            if len(self._stop_conditions) >= _MAX_STOP_CONDITIONS:
                self._stop_conditions.clear()
            self._stop_conditions[generation] = StopCondition(self._tokenizer, generation)
        return self._stop_conditions[generation]


def _check_file(path: Path, folder: Path) -> None:
    """Refuse a file with weights that cannot be read, or that lies elsewhere than below `folder`.

    Raises:
        HTTPException: 400; says nothing about files elsewhere.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise HTTPException(
            BAD_REQUEST,
            f"weights are read from below {folder} alone, where {path} is not: set `weights_dir` of the "
            "server",
        )
    try:
        with safe_open(path, framework="pt"):
            return
    except FileNotFoundError:
        reason = f"no {path} on this machine: set `rollout.weights=broadcast` in the trainer"
    except (OSError, SafetensorError) as error:
        reason = f"{path} cannot be read ({first_line(error)}): run the server as the trainer's user"
    raise HTTPException(BAD_REQUEST, reason)


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone.

    Raises:
        ConchError: vLLM is absent, or cannot serve the model.
        SystemExit: 0 after SIGTERM, `VLLM_DIED` where vLLM has died.
    """
    check_access(config)  # before minutes of loading
    check_installed()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[SERVER_PID_VARIABLE] = str(os.getpid())
    # uvicorn raises SIGTERM once more after it has stopped, while vLLM's processes are still to be ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    exit_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    tokenizer = load_tokenizer(TokenizerConfig(), config.model)
    asyncio.run(_serve(config, tokenizer))


async def _serve(config: ServerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    engine, server = _build(config), None
    try:
        lora = None
        if config.max_lora_rank:
            lora = LoraCapacity(**(await engine.collective_rpc("lora_capacity"))[0])
        server = RolloutServer(engine, tokenizer, config.deadline_s, lora, config.weights_dir)
        listener = make_listener(server, config)
        _log.info("serving %s on %s:%d", config.model, config.host, config.port)
        await listener.serve()
    finally:
        engine.shutdown()
        if server is not None and server.has_died:
            sys.exit(VLLM_DIED)


def _build(config: ServerConfig) -> Any:
    """Build vLLM's engine without weights.

    Raises:
        ConchError: vLLM cannot serve the model.
        SystemExit: `VLLM_DIED` where vLLM was killed while it loaded.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    model = AutoConfig.from_pretrained(config.model)
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
            sys.exit(VLLM_DIED)
        raise explain_error(error, config.model) from error
