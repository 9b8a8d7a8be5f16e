"""The starting policy behind two addresses; see `conch.reference.protocol` for the messages."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from torch import Tensor
from transformers import PreTrainedModel

from conch.errors import DataError, first_line
from conch.log import get_logger
from conch.machine.malloc import keep_heap
from conch.machine.processors import fit_threads
from conch.models.forward import BatchPacker
from conch.models.freezing import freeze_trunk, freeze_unreached
from conch.models.kernels import check_kernels
from conch.models.loading import context_window, load_lm, vocabulary_size
from conch.models.policy import response_logits
from conch.reference.digest import weights_digest
from conch.reference.protocol import (
    MEDIA_TYPE,
    LogprobReply,
    LogprobRequest,
    ReferenceHealth,
    check_rows,
    decode,
    encode,
)
from conch.reference.server_config import ReferenceServerConfig
from conch.servers.listening import BAD_REQUEST, UNAVAILABLE, check_access, make_listener, new_app
from conch.servers.refusals import documented_refusals
from conch.servers.restart import ENGINE_DIED, leave_with_parent

_log = get_logger(__name__)


class ReferenceServer:
    """A frozen model that gives log-probs, one request at a time.

    Weights take part in products as the trainer's do: `requires_grad` is set as there, though no gradient is
    computed.

    has_died: True after a fault on a GPU: nothing can be computed in this process any more.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.has_died = False
        self._lm = lm.eval()
        freeze_unreached(lm)
        self._reached = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
        self._trained_layers = -1
        self._packer = BatchPacker(lm)
        self._health = ReferenceHealth(
            digest=weights_digest(lm),
            dtype=str(lm.dtype).removeprefix("torch."),
            vocabulary=vocabulary_size(lm),
            window=None if lm.config.is_encoder_decoder else context_window(lm.config),
            packing=self._packer.kind,
            device=lm.device.type,
            versions={name: version(name) for name in ("torch", "transformers")},
        )
        # One thread: torch keeps a pool of threads for each thread that computes.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference")
        self._turn = asyncio.Lock()

    def health(self) -> ReferenceHealth:
        """State of this server."""
        return self._health

    async def answer(self, content: bytes, request: Request) -> bytes:
        """Log-probs for the rows in `content`, in the turn of the request.

        Raises:
            HTTPException: 400 for what cannot be read, 503 where the forward pass failed.
        """
        health = self._health
        try:
            message, tensors = decode(LogprobRequest, content)
            check_rows(tensors, message.num_response, health.vocabulary, health.window)
        except DataError as error:
            raise HTTPException(BAD_REQUEST, f"the body of /logprobs cannot be read: {error}") from error
        async with self._turn:
            if await request.is_disconnected():  # it waited too long, and asks another server by now
                raise HTTPException(UNAVAILABLE, "nobody waits for this answer any more")
            loop = asyncio.get_running_loop()
            try:
                logprobs = await loop.run_in_executor(self._thread, self.logprobs, message, tensors)
            except RuntimeError as error:  # out of memory is one
                _log.warning("a forward pass failed", exc_info=True)
                if isinstance(error, torch.AcceleratorError):
                    self.has_died = True
                    signal.raise_signal(signal.SIGTERM)  # the parent, or whatever watches, starts another
                raise HTTPException(UNAVAILABLE, f"the forward pass failed: {first_line(error)}") from error
        return encode(LogprobReply(digest=health.digest), {"logprobs": logprobs})

    @torch.no_grad()
    def logprobs(self, message: LogprobRequest, tensors: Mapping[str, Tensor]) -> Tensor:
        """Log-probs [B, R] of the response tokens."""
        device = self._lm.device
        self._train_as(message.trained_layers)
        ids, mask = tensors["input_ids"].to(device), tensors["attention_mask"].to(device)
        packed = self._packer.pack(ids, mask, message.num_response)
        dtype = None if message.autocast is None else getattr(torch, message.autocast)
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
            return packed.logprobs(response_logits(self._lm, packed.inputs), message.temperature).cpu()

    def _train_as(self, trained_layers: int) -> None:
        """Set each weight's `requires_grad` as it is in a trainer that trains so many blocks."""
        if trained_layers == self._trained_layers:
            return
        self._lm.requires_grad_(trained_layers != 0)
        if trained_layers > 0:
            freeze_trunk(self._lm, trained_layers)
        for name, parameter in self._lm.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in self._reached)
        self._trained_layers = trained_layers


class TensorResponse(Response):
    """A safetensors file."""

    media_type = MEDIA_TYPE


def make_app(server: ReferenceServer) -> FastAPI:
    """The two addresses of `conch.reference.protocol`, without a guard, and no others."""
    app = new_app("Conch reference")

    @app.get("/health", responses=documented_refusals())
    async def health() -> ReferenceHealth:
        """Tell which weights the server holds, and how it computes."""
        return server.health()

    body = {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}

    @app.post(
        "/logprobs",
        response_class=TensorResponse,
        responses=documented_refusals(BAD_REQUEST, UNAVAILABLE),
        openapi_extra={"requestBody": {**body, "required": True}},
    )
    async def logprobs(request: Request) -> Response:
        """Compute the log-probs of response tokens.

        Body and answer are safetensors files, whose metadata holds a message as JSON under the key `message`:
        `LogprobRequest` beside `input_ids` (int64) and `attention_mask` (bool), both [B, T], prompts
        padded left and responses right; `LogprobReply` beside `logprobs` [B, R], 0 where there is no token.
        """
        return TensorResponse(await server.answer(await request.body(), request))

    # FastAPI finds these by their annotations, which it reads from the module.
    del health, logprobs
    return app


def serve(config: ReferenceServerConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone.

    Raises:
        ConchError: the model cannot be loaded, or the port's settings will not do.
        SystemExit: 0 after SIGTERM, `ENGINE_DIED` where the GPU has failed.
    """
    check_access(config)  # before minutes of loading
    leave_with_parent()
    model_config = config.model_config_of()
    check_kernels(model_config, "bf16")  # requests name their own precision
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns
        keep_heap()
        fit_threads(torch)
    lm = load_lm(model_config)
    lm.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    server = ReferenceServer(lm)
    listener = make_listener(make_app(server), config)
    _log.info("serving %s as the reference on %s:%d", config.model, config.host, config.port)
    try:
        asyncio.run(listener.serve())
    finally:
        if server.has_died:
            sys.exit(ENGINE_DIED)
