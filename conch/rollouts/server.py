"""What every rollout server does, whatever samples in it: weights, their version, which requests it takes.

`conch.rollouts.app` has its addresses, `conch.rollouts.protocol` the messages. What samples is a `Sampler`:
vLLM (`conch/rollouts/vllm/server.py`) or transformers (`conch/rollouts/hf/server.py`).
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from fastapi import HTTPException
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conch.errors import RolloutError, RolloutUnavailableError, first_line
from conch.log import get_logger
from conch.rollouts.app import make_app
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
from conch.rollouts.server_config import ServerConfig
from conch.servers.listening import BAD_REQUEST, STALE_WEIGHTS, UNAVAILABLE, make_listener

_log = get_logger(__name__)

Refused = HTTPException
"""What a request is refused by, over whatever transport; has `status_code` and `detail`."""


@runtime_checkable
class Sampler(Protocol):
    """What samples in a server.

    name: of the engine, for messages.
    has_died: True once it can never sample again.
    max_model_len: longest prompt and completion together, in tokens.
    max_num_seqs: completions sampled at once.
    workers: processes that each hold a part of the weights.
    device: `cpu` or `cuda`.
    lora: adapters that it takes; None for none.
    vocabulary: tokens that the model knows; 0 where it does not tell.
    busy_s: seconds in which at least one completion was under way.
    """

    @property
    def name(self) -> str: ...
    @property
    def has_died(self) -> bool: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def lora(self) -> LoraCapacity | None: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def busy_s(self) -> float: ...

    async def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Load new weights.

        Completions of exact requests that came before are sampled first. Of requests for these weights or
        later ones (`or_later`) only completions that are under way go before, and with `update.goes_on` not
        even those: they go on with the new weights, where the sampler can.

        tensors: the weights of an update that is `handed` over, by their names; only read.
        """
        ...

    def completions(self, request: GenerateRequest, version: int) -> AsyncIterator[CompletionReply]:
        """Yield completions as they end. Sampling stops once they are no longer read.

        version: of the weights that are loaded; those of an exact request.
        """
        ...


class BusyClock:
    """Adds up the seconds in which something is under way, in however many threads and tasks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._total_s = self._changed_s = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """What runs inside is under way."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @property
    def seconds(self) -> float:
        """The sum until now."""
        return self._change(0)

    def _change(self, count: int) -> float:
        with self._lock:
            now = time.monotonic()
            if self._under_way:
                self._total_s += now - self._changed_s
            self._changed_s = now
            self._under_way += count
            return self._total_s


class RolloutServer:
    """A sampler, and the version of the weights in it.

    weights_dir: folder below which files with weights must lie.

    has_died: True once the sampler was found dead; False where all processes are ended together.
    """

    def __init__(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, weights_dir: Path) -> None:
        self.has_died = False
        self.sampler = sampler
        self._eos_id = tokenizer.eos_token_id
        self._weights_dir = weights_dir
        self._weights: WeightVersion | None = None
        self._base: str | None = None
        self._update_lock = asyncio.Lock()
        self._weights_changed = asyncio.Condition()
        self._started_s = time.monotonic()

    async def health(self) -> Health:
        """State of this server.

        Ends the process where the sampler has died: its parent, or whatever else watches it, starts another.
        """
        sampler = self.sampler
        if sampler.has_died:
            self.has_died = True
            signal.raise_signal(signal.SIGTERM)
            raise HTTPException(UNAVAILABLE, f"{sampler.name} has died here; its log says why")
        return Health(
            weights=self._weights,
            max_model_len=sampler.max_model_len,
            max_num_seqs=sampler.max_num_seqs,
            workers=sampler.workers,
            device=sampler.device,
            lora=sampler.lora,
            base=self._base,
            busy_s=sampler.busy_s,
            clock_s=time.monotonic() - self._started_s,
        )

    async def update_weights(
        self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None = None
    ) -> Health:
        """Load new weights, as `Sampler.load` says. Until they are loaded the server holds none.

        tensors: the weights of an update that is `handed` over, by their names; only read.

        Raises:
            HTTPException: 400 for what can never be loaded, 409 for an adapter without its base; 503 where
                loading failed.
        """
        async with self._update_lock:
            self._check_update(update, tensors)
            self._weights = None
            if update.part != "adapter":
                self._base = None
            if update.path is not None:
                # The file that was checked, whatever a link on the way to it may say by now.
                update = update.model_copy(update={"path": str(Path(update.path).resolve())})
            try:
                await self.sampler.load(update, tensors)
                await self._record(update)
            except Exception as error:
                if isinstance(error, RolloutError) and not isinstance(error, RolloutUnavailableError):
                    raise HTTPException(BAD_REQUEST, f"weights cannot be loaded: {error}") from error
                _log.warning("weights were not loaded", exc_info=True)
                raise HTTPException(UNAVAILABLE, f"weights were not loaded: {first_line(error)}") from error
        return await self.health()

    def _check_update(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None) -> None:
        if update.handed and tensors is None:
            raise HTTPException(
                BAD_REQUEST,
                "weights that are `handed` over come with a call in this process, none came: send a `path`, "
                "or broadcast them",
            )
        if update.part != "whole" and self.sampler.lora is None:
            raise HTTPException(BAD_REQUEST, "this server takes no adapters: start it with `max_lora_rank`")
        if update.part == "adapter" and update.weights.source != self._base:
            raise HTTPException(STALE_WEIGHTS, f"the base of {update.weights.source} is not here")
        if update.path is not None:
            _check_file(Path(update.path), self._weights_dir)

    async def _record(self, update: WeightUpdate) -> None:
        """Record what the sampler holds after an update, and let the requests go on that wait for it."""
        if update.part == "base":
            self._base = update.weights.source
            return
        async with self._weights_changed:
            self._weights = update.weights
            self._weights_changed.notify_all()

    def _may_come(self, request: GenerateRequest) -> bool:
        """True where the weights that are asked for are not here, and may be after the next update."""
        if not request.or_later:
            return False
        here, wanted = self._weights, request.weights
        return here is None or (here.source == wanted.source and here.version < wanted.version)

    def _check_weights(self, request: GenerateRequest) -> None:
        here, wanted = self._weights, request.weights
        if here == wanted or (
            request.or_later
            and here is not None
            and here.source == wanted.source
            and here.version >= wanted.version
        ):
            return
        present = "no weights" if here is None else f"those of {here.version} of {here.source}"
        later = " or later" if request.or_later else ""
        raise HTTPException(
            STALE_WEIGHTS,
            f"version {wanted.version}{later} of {wanted.source} was asked for, {present} are here",
        )

    def check(self, request: GenerateRequest) -> None:
        """Refuse a request that cannot be sampled as it is, now or (`or_later`) once newer weights are here.

        Raises:
            HTTPException: 409 for other weights, 400 for another eos token or a prompt that is too long.
        """
        if not self._may_come(request):
            self._check_weights(request)
        if request.eos_id != self._eos_id:
            raise HTTPException(
                BAD_REQUEST,
                f"the trainer's tokenizer ends a text with token {request.eos_id}, this server's with "
                f"{self._eos_id}: serve the policy's own folder",
            )
        count = sum(len(prompt.seeds) for prompt in request.prompts)
        if count > MAX_COMPLETIONS:
            raise HTTPException(
                BAD_REQUEST, f"a request asks for {count} completions, {MAX_COMPLETIONS} are the most"
            )
        highest = max(max(prompt.token_ids) for prompt in request.prompts)
        size = self.sampler.vocabulary
        if 0 < size <= highest:
            raise HTTPException(
                BAD_REQUEST,
                f"a prompt has token {highest}, this server's model knows {size} tokens: serve the policy's "
                "own folder",
            )
        longest = max(len(prompt.token_ids) for prompt in request.prompts)
        max_model_len = self.sampler.max_model_len
        if longest + request.generation.max_new_tokens > max_model_len:
            raise HTTPException(
                BAD_REQUEST,
                f"a prompt of {longest} tokens and `generation.max_new_tokens` = "
                f"{request.generation.max_new_tokens} do not fit this server's `max_model_len` of "
                f"{max_model_len}: raise it, or lower `data.max_tokens`",
            )

    async def completion_lines(self, request: GenerateRequest) -> AsyncIterator[str]:
        """Yield a line for each completion, as it ends, and where one fails a last line that says why.

        Waits first for weights that may come (`GenerateRequest.or_later`), for as long as the lines are
        read. Waiting and sampling stop once they are no longer read.

        request: one that `check` let pass.
        """
        try:
            async with self._weights_changed:
                await self._weights_changed.wait_for(lambda: not self._may_come(request))
            # What was here for `check` may be gone. From now on until the sampler has it, nothing else runs.
            self._check_weights(request)
        except HTTPException as refusal:
            yield Failure(detail=refusal.detail).model_dump_json() + "\n"
            return
        assert self._weights is not None
        replies = self.sampler.completions(request, self._weights.version)
        try:
            async for reply in replies:
                yield reply.model_dump_json() + "\n"
        except Exception as error:
            _log.warning("sampling failed", exc_info=True)
            yield Failure(detail=first_line(error)).model_dump_json() + "\n"
        finally:
            await replies.aclose()  # pyright: ignore[reportAttributeAccessIssue]  samplers write generators


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


async def listen(server: RolloutServer, config: ServerConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone."""
    listener = make_listener(make_app(server), config)
    _log.info("serving %s with %s on %s:%d", config.model, server.sampler.name, config.host, config.port)
    await listener.serve()
