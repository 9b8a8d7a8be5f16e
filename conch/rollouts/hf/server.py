"""transformers in a rollout server; see `conch.rollouts.server`.

One thread runs the model. What is asked for with the same settings is sampled together, each completion from
its own seed: it joins what is under way, where the model allows it. New weights wait until all that was asked
for before has ended.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from conch.config import GenerationConfig, ModelConfig, TokenizerConfig
from conch.distributed.malloc import keep_heap
from conch.errors import ConfigError, RolloutError, first_line
from conch.log import get_logger
from conch.models.adapter import distinct_tensors
from conch.models.loading import (
    context_window,
    disable_dropout,
    fuse_activations,
    load_lm,
    load_tokenizer,
    vocabulary_size,
)
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.protocol import CompletionReply, GenerateRequest, WeightUpdate
from conch.rollouts.server import RolloutServer, listen
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.weight_sync import received_tensors
from conch.servers.listening import check_access
from conch.servers.restart import ENGINE_DIED, leave_with_parent
from conch.types import Prompt, Rollout

_log = get_logger(__name__)

_MAX_ENGINES = 64
"""Sets of sampling settings that are kept ready; a run has one or two."""

_GATHER_S = 0.005
"""Time for the requests of one rollout to come in together before an idle sampler begins."""

_NO_WINDOW = 2**31 - 1


@dataclass(eq=False)
class _Request:
    """Completions that were asked for.

    put: hands a reply, or what went wrong, over to who reads them.
    is_read: False once nobody reads them any more.
    """

    message: GenerateRequest
    version: int
    put: Callable[[CompletionReply | Exception], None]
    is_read: bool = True

    @property
    def settings(self) -> tuple[GenerationConfig, bool]:
        """What all completions that are sampled together have in common."""
        return self.message.generation, self.message.greedy

    @property
    def rows(self) -> list[tuple[_Request, int, int]]:
        """This request, the index of a prompt and that of one of its seeds, for each completion."""
        prompts = enumerate(self.message.prompts)
        return [(self, index, number) for index, prompt in prompts for number in range(len(prompt.seeds))]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each completion."""
        return [Prompt("", prompt.token_ids) for prompt in self.message.prompts for _ in prompt.seeds]


@dataclass(eq=False)
class _Load:
    """New weights. put: takes what went wrong, or None. tensors: those of an update that is `handed`."""

    update: WeightUpdate
    tensors: Mapping[str, Tensor] | None
    put: Callable[[Exception | None], None]


class NobodyReadsError(Exception):
    """Everybody who asked for the completions under way has left."""


class TransformersSampler:
    """A model and the thread that samples with it; a `conch.rollouts.server.Sampler`.

    max_model_len: longest prompt and completion together, in tokens; None takes the model's window.
    slots: completions sampled at once.
    deadline_s: longest time for new weights to arrive.
    """

    name = "transformers"
    workers = 1
    lora = None

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int | None,
        slots: int,
        deadline_s: float,
    ) -> None:
        window = context_window(lm.config)
        if max_model_len is not None and window is not None and max_model_len > window:
            raise ConfigError(
                f"`max_model_len` = {max_model_len} is longer than the model's window of {window} tokens"
            )
        self.max_model_len = max_model_len or window or _NO_WINDOW
        self.max_num_seqs = slots
        self.device = lm.device.type
        self.vocabulary = vocabulary_size(lm)
        self.has_died = False
        self._lm = lm.eval()
        self._tokenizer = tokenizer
        self._deadline_s = deadline_s
        self._engines: dict[GenerationConfig, HFEngine] = {}
        self._jobs: queue.SimpleQueue[_Request | _Load] = queue.SimpleQueue()
        self._waiting: deque[_Request | _Load] = deque()
        threading.Thread(target=self._work, name="sampler", daemon=True).start()

    # ------------------------------------------------------------------------------------ on the event loop

    async def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None = None) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: Exception | None) -> None:
            if done.cancelled():
                return
            done.set_result(None) if error is None else done.set_exception(error)

        self._jobs.put(_Load(update, tensors, lambda error: _call(loop, finish, error)))
        await done

    async def completions(self, request: GenerateRequest, version: int) -> AsyncIterator[CompletionReply]:
        loop = asyncio.get_running_loop()
        replies: asyncio.Queue[CompletionReply | Exception] = asyncio.Queue()
        job = _Request(request, version, lambda reply: _call(loop, replies.put_nowait, reply))
        self._jobs.put(job)
        try:
            for _ in range(sum(len(prompt.seeds) for prompt in request.prompts)):
                reply = await replies.get()
                if isinstance(reply, Exception):
                    raise reply
                yield reply
        finally:
            job.is_read = False

    # ---------------------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        while True:
            if not self._waiting:
                self._waiting.append(self._jobs.get())
            self._collect(_GATHER_S)
            job = self._waiting.popleft()
            if isinstance(job, _Load):
                self._load(job)
            else:
                self._sample([job, *self._take_alike(job)])

    def _collect(self, pause_s: float) -> None:
        """Queue what has come in; wait so long for each further job, 0 for none."""
        try:
            while True:
                self._waiting.append(self._jobs.get(timeout=pause_s) if pause_s else self._jobs.get_nowait())
        except queue.Empty:
            return

    def _take_alike(self, first: _Request) -> list[_Request]:
        """Waiting requests with the settings of `first` that came before any new weights."""
        alike: list[_Request] = []
        rest: deque[_Request | _Load] = deque()
        while self._waiting and not isinstance(self._waiting[0], _Load):
            job = self._waiting.popleft()
            assert isinstance(job, _Request)
            (alike if job.settings == first.settings else rest).append(job)
        self._waiting.extendleft(reversed(rest))
        return alike

    def _take_joining(self, settings: tuple[GenerationConfig, bool], engine: HFEngine) -> list[_Request]:
        """Requests that may join what is under way: with its settings, before all that must wait for it."""
        self._collect(0.0)
        joining: list[_Request] = []
        while self._waiting:
            job = self._waiting[0]
            if (
                not isinstance(job, _Request)
                or job.settings != settings
                or not engine.takes_joining(job.prompts)
            ):
                break
            joining.append(job)
            self._waiting.popleft()
        return joining

    def _sample(self, requests: list[_Request]) -> None:
        """Sample all completions of these requests, whose settings are the same, and of those that join."""
        rows = [row for request in requests for row in request.rows]
        generation, greedy = requests[0].settings

        def further() -> tuple[list[Prompt], list[int]]:
            joining = self._take_joining(requests[0].settings, engine)
            requests.extend(joining)
            rows.extend(row for request in joining for row in request.rows)
            return _prompts_of(joining), _seeds_of(joining)

        def tell(ended: Mapping[int, Rollout]) -> None:
            for place, rollout in ended.items():
                request, prompt_index, seed_index = rows[place]
                completion, version = rollout.completion, request.version
                request.put(CompletionReply.of(completion, prompt_index, seed_index, version))
            if not any(request.is_read for request in requests):
                raise NobodyReadsError

        try:
            engine = self._engine(generation)
            prompts, seeds = _prompts_of(requests), _seeds_of(requests)
            engine.generate_joined(prompts, seeds, further, greedy=greedy, on_finished=tell)
        except NobodyReadsError:
            return
        except Exception as error:
            self._note(error)
            for request in requests:
                request.put(RolloutError(f"transformers failed: {first_line(error)}"))

    def _engine(self, generation: GenerationConfig) -> HFEngine:
        if generation not in self._engines:
            if len(self._engines) >= _MAX_ENGINES:
                self._engines.clear()
            slots = generation.model_copy(update={"chunk_size": self.max_num_seqs})
            # Which version a completion is of is told by its request.
            self._engines[generation] = HFEngine(lambda: self._lm, self._tokenizer, slots, version=lambda: 0)
        return self._engines[generation]

    def _load(self, job: _Load) -> None:
        update = job.update
        try:
            if job.tensors is not None:
                shapes = {name: tuple(tensor.shape) for name, tensor in job.tensors.items()}
                self.load_tensors(shapes, job.tensors.items())
            elif update.path is None:
                shapes = {spec.name: spec.shape for spec in update.tensors}
                self.load_tensors(shapes, received_tensors(update, 1, 2, self._deadline_s))
            else:
                with safe_open(update.path, framework="pt") as file:
                    names = [*file.keys()]
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                    self.load_tensors(shapes, ((name, file.get_tensor(name)) for name in names))
        except Exception as error:
            self._note(error)
            job.put(error)
        else:
            job.put(None)

    @torch.no_grad()
    def load_tensors(
        self, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Copy weights, under the names of a checkpoint, into the model.

        shapes: of all of `tensors`, by name.

        Raises:
            RolloutError: they are of another model.
        """
        own = {plain: tensor for plain, _, tensor in distinct_tensors(self._lm)}
        if own.keys() != shapes.keys():
            self._lm = _converted(self._lm, dict(tensors))
            return
        for name, shape in shapes.items():
            if tuple(own[name].shape) != tuple(shape):
                raise RolloutError(
                    f"{name} has the shape {tuple(shape)}, here {tuple(own[name].shape)}: serve the policy's "
                    "own folder"
                )
        for name, tensor in tensors:
            own[name].copy_(tensor)

    def _note(self, error: Exception) -> None:
        """Log what is no refusal. After a fault on a GPU nothing can be computed in this process any more."""
        if isinstance(error, RolloutError):
            return
        _log.warning("the sampler failed", exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        elif isinstance(error, torch.AcceleratorError):
            self.has_died = True


def _prompts_of(requests: Iterable[_Request]) -> list[Prompt]:
    return [prompt for request in requests for prompt in request.prompts]


def _seeds_of(requests: Iterable[_Request]) -> list[int]:
    return [seed for request in requests for prompt in request.message.prompts for seed in prompt.seeds]


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Any], object], argument: Any) -> None:
    """Call a function on the event loop; does nothing once the server has stopped."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)


def _converted(lm: PreTrainedModel, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """A model of this kind with weights that a checkpoint holds in another shape (experts one by one, say).

    Raises:
        RolloutError: weights are missing, or of another model.
    """
    loaded: Any = type(lm).from_pretrained(
        None,
        config=lm.config,
        state_dict=tensors,
        dtype=lm.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with a tensor named
    )
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    wrong += sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise RolloutError(
            f"these are not the weights of a {type(lm).__name__} of this shape ({wrong[0]}): serve the "
            "policy's own folder"
        )
    disable_dropout(model)
    fuse_activations(model)
    return model.to(lm.device).eval()


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone.

    Raises:
        ConchError: the model cannot be loaded, or settings will not do.
        SystemExit: 0 after SIGTERM, `ENGINE_DIED` where the GPU has failed.
    """
    check_access(config)  # before minutes of loading
    leave_with_parent()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns
        keep_heap()
    tokenizer = load_tokenizer(TokenizerConfig(), config.model)
    lm = load_lm(model_config_of(config))
    lm.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    sampler = TransformersSampler(
        lm,
        tokenizer,
        max_model_len=config.max_model_len,
        slots=config.slots,
        deadline_s=config.deadline_s,
    )
    server = RolloutServer(sampler, tokenizer, config.weights_dir)
    try:
        asyncio.run(listen(server, config))
    finally:
        if server.has_died:
            sys.exit(ENGINE_DIED)


def model_config_of(config: ServerConfig) -> ModelConfig:
    """The section `model` of a trainer that loads this model; in the precision that it is stored in, where
    the setting leaves it open."""
    source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    dtype: Any = config.dtype
    if dtype == "auto":
        stored = AutoConfig.from_pretrained(config.model, **source).dtype
        dtype = "float32" if stored is None else str(stored).removeprefix("torch.")
    return ModelConfig(path=config.model, dtype=dtype, **source)
