"""vLLM behind three addresses; `conch.rollouts.protocol` has what is said there."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from transformers import AutoConfig, PreTrainedTokenizerBase

from conch.config import TokenizerConfig
from conch.errors import ModelError
from conch.log import get_logger
from conch.models.loading import load_tokenizer
from conch.rollouts.protocol import (
    CompletionReply,
    GenerateRequest,
    Health,
    LoraRoom,
    WeightUpdate,
    WeightVersion,
)
from conch.rollouts.stopping import StopCondition
from conch.rollouts.vllm.build import (
    SERVER,
    adapter_request,
    check_architecture,
    check_installed,
    check_servable,
    engine_settings,
    explained,
    knows_lora,
    lora_settings,
    was_killed,
)
from conch.rollouts.vllm.engine import sampling_params
from conch.rollouts.vllm.restart import DIED, leave_with_keeper
from conch.rollouts.vllm.server_config import ServerConfig

_log = get_logger(__name__)

BAD, ASTRAY, GONE = 400, 409, 503


class RolloutServer:
    """One vLLM engine in processes of its own, and which weights it holds.

    engine: vLLM's `AsyncLLM`. room: for adapters; None where it was made without. has_died: True once the
    engine was found dead, not where somebody ends all processes together.
    """

    def __init__(
        self, engine: Any, tokenizer: PreTrainedTokenizerBase, deadline_s: float, room: LoraRoom | None
    ) -> None:
        self.has_died = False
        self._engine = engine
        self._room = room
        self._tokenizer = tokenizer
        self._deadline_s = deadline_s
        self._stamp: WeightVersion | None = None
        self._base: str | None = None
        self._adapter: Any = None
        self._refitting = asyncio.Lock()
        self._endings: dict[tuple[str, ...], StopCondition] = {}

    async def health(self) -> Health:
        """What a trainer must know before it asks. Where vLLM has died, this process leaves: its keeper, or
        who else watches it, starts another."""
        if self._engine.errored:
            self.has_died = True
            signal.raise_signal(signal.SIGTERM)
            raise HTTPException(GONE, "vLLM has died here; its log says why")
        config = self._engine.vllm_config
        return Health(
            stamp=self._stamp,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            workers=config.parallel_config.world_size,
            device=config.device_config.device_type,
            lora=self._room,
            base=self._base,
        )

    async def refit(self, given: WeightUpdate) -> Health:
        """Take up new weights, once what is being sampled has ended; until they are whole there are none."""
        async with self._refitting:
            if given.part == "adapter" and given.stamp.source != self._base:
                raise HTTPException(ASTRAY, f"the base of {given.stamp.source} is not here")
            self._stamp = None
            if given.part != "adapter":
                self._base = None
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._take(given)
                await self._engine.reset_prefix_cache()
                await self._engine.update_weight_version(str(given.stamp.version))
                self._hold(given)
            finally:
                await self._engine.resume_generation()
        return await self.health()

    def _hold(self, given: WeightUpdate) -> None:
        if given.part == "base":
            self._base = given.stamp.source
            return
        self._adapter = adapter_request(given.stamp.version) if given.part == "adapter" else None
        self._stamp = given.stamp

    async def _take(self, given: WeightUpdate) -> None:
        if given.path is None:
            arguments = (given.model_dump(), self._deadline_s)
            await self._engine.collective_rpc("take_broadcast", timeout=self._deadline_s, args=arguments)
            return
        if not os.path.exists(given.path):
            raise HTTPException(
                BAD, f"no {given.path} on this machine: set `rollout.weights=broadcast` in the trainer"
            )
        await self._engine.collective_rpc("take_file", timeout=self._deadline_s, args=(given.model_dump(),))

    def check(self, asked: GenerateRequest) -> None:
        """Refuse what cannot be sampled as it is asked for."""
        if asked.stamp != self._stamp:
            held = (
                "no weights"
                if self._stamp is None
                else f"those of {self._stamp.version} of {self._stamp.source}"
            )
            raise HTTPException(
                ASTRAY,
                f"version {asked.stamp.version} of {asked.stamp.source} was asked for, {held} are here",
            )
        if asked.eos_id != self._tokenizer.eos_token_id:
            raise HTTPException(
                BAD,
                f"the trainer's tokenizer ends a text with token {asked.eos_id}, this server's with "
                f"{self._tokenizer.eos_token_id}: serve the policy's own folder",
            )
        longest = max(len(wanted.token_ids) for wanted in asked.wanted)
        max_model_len = self._engine.vllm_config.model_config.max_model_len
        if longest + asked.generation.max_new_tokens > max_model_len:
            raise HTTPException(
                BAD,
                f"a prompt of {longest} tokens and `generation.max_new_tokens` = "
                f"{asked.generation.max_new_tokens} do not fit this server's `max_model_len` of "
                f"{max_model_len}: raise it, or lower `data.max_tokens`",
            )

    async def lines(self, asked: GenerateRequest) -> AsyncIterator[str]:
        """One line a completion, as they end. Whoever stops reading stops the sampling."""
        assert self._stamp is not None
        ending = self._ending(asked.generation.stop)
        tasks = [
            asyncio.ensure_future(self._complete(asked, ending, self._stamp.version, prompt, sample))
            for prompt, wanted in enumerate(asked.wanted)
            for sample in range(len(wanted.seeds))
        ]
        try:
            for done in asyncio.as_completed(tasks):
                yield (await done).model_dump_json() + "\n"
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(
        self, asked: GenerateRequest, ending: StopCondition, version: int, prompt: int, sample: int
    ) -> CompletionReply:
        wanted = asked.wanted[prompt]
        params = sampling_params(
            asked.generation,
            ending.eos_id,
            greedy=asked.greedy,
            seed=wanted.seeds[sample],
            watched=ending.watches,
        )
        tokens = {"type": "token", "prompt_token_ids": list(wanted.token_ids)}
        made: Any = None
        sampling = self._engine.generate(tokens, params, uuid4().hex, lora_request=self._adapter)
        async with aclosing(sampling) as outputs:
            async for output in outputs:
                made = output.outputs[0]
                if output.finished or ending.reached(made.token_ids):
                    break
        completion = ending.completion(made.token_ids, made.logprobs.logprobs)
        # What was ended from here has no span; no weights come in while it is sampled.
        versions = {int(span.version) for span in made.weight_versions or []} or {version}
        return CompletionReply(
            prompt=prompt,
            sample=sample,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            text=completion.text,
            finish_reason=completion.finish_reason,
            version=min(versions),
        )

    def _ending(self, stop: tuple[str, ...]) -> StopCondition:
        if stop not in self._endings:
            self._endings[stop] = StopCondition(self._tokenizer, stop)
        return self._endings[stop]


def make_app(server: RolloutServer) -> FastAPI:
    """The three addresses."""
    app = FastAPI(title="Conch rollouts")

    @app.get("/health")
    async def health() -> Health:
        return await server.health()

    @app.post("/weights")
    async def weights(given: WeightUpdate) -> Health:
        return await server.refit(given)

    @app.post("/generate")
    async def generate(asked: GenerateRequest) -> StreamingResponse:
        server.check(asked)
        return StreamingResponse(server.lines(asked), media_type="application/x-ndjson")

    # FastAPI finds these by their annotations, which it reads from the module.
    del health, weights, generate
    return app


def serve(config: ServerConfig) -> None:
    """Run until told to stop.

    Raises:
        ConchError: vLLM is not there, or cannot serve the model.
        SystemExit: 0 where it was told to stop, `DIED` where vLLM has died.
    """
    check_installed()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[SERVER] = str(os.getpid())
    # uvicorn raises it once more when it has stopped, and vLLM's processes are still to be ended then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    leave_with_keeper(lambda: os.kill(os.getpid(), signal.SIGTERM))
    tokenizer = load_tokenizer(TokenizerConfig(), config.model)
    asyncio.run(_serve(config, tokenizer))


async def _serve(config: ServerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    engine, server = _build(config), None
    try:
        room = LoraRoom(**(await engine.collective_rpc("lora_room"))[0]) if config.max_lora_rank else None
        server = RolloutServer(engine, tokenizer, config.deadline_s, room)
        listening = uvicorn.Server(
            uvicorn.Config(
                make_app(server), host=config.host, port=config.port, log_level="warning", access_log=False
            )
        )
        _log.info("serving %s on %s:%d", config.model, config.host, config.port)
        await listening.serve()
    finally:
        engine.shutdown()
        if server is not None and server.has_died:
            sys.exit(DIED)


def _build(config: ServerConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    model = AutoConfig.from_pretrained(config.model)
    for name in model.architectures or []:
        check_architecture(name)
        if config.max_lora_rank and not knows_lora(name):
            raise ModelError(
                f"vLLM has no LoRA for a {name}: leave `max_lora_rank` out; adapters come merged"
            )
    # vLLM's own "auto" takes half precision for a model that is stored in float32.
    dtype = (model.dtype or "float32") if config.dtype == "auto" else config.dtype
    settings = {
        **engine_settings(config.model, config.rollout_config(), dtype),
        **lora_settings(config.room()),
    }
    try:
        made = AsyncEngineArgs(
            **settings,
            load_format="dummy",
            tensor_parallel_size=config.tensor_parallel_size,
            disable_log_stats=True,
            enable_log_requests=False,
        )
        check_servable(made.create_engine_config())
        return AsyncLLM.from_engine_args(made)
    except (ValueError, RuntimeError) as error:
        if was_killed(error):
            _log.error("vLLM was killed while it loaded")
            sys.exit(DIED)
        raise explained(error, config.model) from error
