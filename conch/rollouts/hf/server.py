"""transformers in a rollout server; see `conch.rollouts.server`.

One thread runs the model. What is asked for with the same settings is sampled together, each completion from
its own seed: it joins what is under way, where the model allows it. New weights wait until all that was asked
for before has ended; of what takes later weights, too (`or_later`), until what is under way has ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from conch.config import GenerationConfig, ModelConfig, TokenizerConfig
from conch.errors import ConfigError, RolloutError, first_line
from conch.log import get_logger
from conch.machine.malloc import keep_heap
from conch.machine.processors import fit_threads
from conch.models.loading import context_window, load_lm, load_tokenizer, vocabulary_size
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.hf.jobs import JobQueue, LoadJob, Row, SampleJob
from conch.rollouts.hf.under_way import UnderWay
from conch.rollouts.hf.weights import ModelWeights, lora_capacity
from conch.rollouts.protocol import CompletionReply, GenerateRequest, WeightUpdate
from conch.rollouts.server import BusyClock, RolloutServer, listen
from conch.rollouts.server_config import ServerConfig
from conch.servers.listening import check_access
from conch.servers.restart import ENGINE_DIED, leave_with_parent
from conch.types import Prompt, Rollout

_log = get_logger(__name__)

_MAX_ENGINES = 64
"""Sets of sampling settings that are kept ready; a run has one or two."""

_GATHER_S = 0.005
"""Time for the requests of one rollout to come in together before an idle sampler begins."""

_NO_WINDOW = 2**31 - 1


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
        self.lora = lora_capacity(lm)
        self.vocabulary = vocabulary_size(lm)
        self.has_died = False
        self._lm = lm.eval()
        self._tokenizer = tokenizer
        self._weights = ModelWeights(self._lm, deadline_s)
        self._version = 0
        self._engines: dict[GenerationConfig, HFEngine] = {}
        self._clock = BusyClock()
        self._jobs = JobQueue(_GATHER_S)
        threading.Thread(target=self._work, name="sampler", daemon=True).start()

    @property
    def busy_s(self) -> float:
        return self._clock.seconds

    # ------------------------------------------------------------------------------------ on the event loop

    async def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None = None) -> None:
        """See `Sampler.load`. A model that is sampled chunk by chunk gets new weights between two chunks:
        what is under way ends before them, whatever `goes_on` says. So does what is under way beside an
        exact request; and all of it before a base, from which nothing can be sampled."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: Exception | None) -> None:
            if done.cancelled():
                return
            done.set_result(None) if error is None else done.set_exception(error)

        self._jobs.put(LoadJob(update, tensors, lambda error: _call(loop, finish, error)))
        await done

    async def completions(self, request: GenerateRequest, version: int) -> AsyncIterator[CompletionReply]:
        loop = asyncio.get_running_loop()
        replies: asyncio.Queue[CompletionReply | Exception] = asyncio.Queue()
        job = SampleJob(request, version, lambda reply: _call(loop, replies.put_nowait, reply))
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
            job = self._jobs.next()
            if isinstance(job, LoadJob):
                self._load(job)
            else:
                self._sample([job, *self._jobs.take_alike(job)])

    def _sample(self, jobs: list[SampleJob]) -> None:
        """Sample all completions of these jobs, whose settings are the same, and of those that join.

        What new weights overtake is put back.
        """
        generation, greedy = jobs[0].settings
        batch = _Batch()
        try:
            engine = self._engine(generation)
            prompts, seeds = batch.begin(jobs)

            def between(under_way: UnderWay) -> None:
                batch.drop_unread(under_way)
                self._make_way(batch, under_way)
                joining = self._jobs.take_joining(jobs[0].settings, engine.takes_joining)
                if joining:
                    under_way.add(*batch.begin(joining))

            with self._clock.busy():
                engine.generate_joined(prompts, seeds, between, greedy=greedy, on_finished=batch.tell)
        except NobodyReadsError:
            return
        except Exception as error:
            self._note(error)
            for job in batch.jobs or jobs:
                job.fail(RolloutError(f"transformers failed: {first_line(error)}"))

    def _make_way(self, batch: _Batch, under_way: UnderWay) -> None:
        """Load new weights that what is under way goes on with; withdraw what others overtake."""
        load = self._jobs.pending_load()
        if load is None:
            return
        goes_on = load.update.goes_on and load.update.part != "base" and under_way.weights_may_change
        overtakes_all = all(self._jobs.overtakes(load, job) for job in batch.jobs if job.is_under_way)
        if goes_on and overtakes_all and self._jobs.take_first(load):
            if not self._load(load):
                raise RolloutError("new weights were not loaded, and those that were here are gone")
            return
        rows = batch.rows
        withdrawn = under_way.withdraw(lambda index: self._jobs.overtakes(load, rows[index].job))
        self._jobs.put_back([rows[index] for index in withdrawn])

    def _engine(self, generation: GenerationConfig) -> HFEngine:
        if generation not in self._engines:
            if len(self._engines) >= _MAX_ENGINES:
                self._engines.clear()
            slots = generation.model_copy(update={"chunk_size": self.max_num_seqs})
            lm, version = lambda: self._lm, lambda: self._version
            self._engines[generation] = HFEngine(lm, self._tokenizer, slots, version=version)
        return self._engines[generation]

    def _load(self, job: LoadJob) -> bool:
        """Load new weights; False where that fails."""
        update = job.update
        self._jobs.source = None
        try:
            self._weights.load(update, job.tensors)
        except Exception as error:
            self._note(error)
            self._jobs.fail_waiting()
            job.put(error)
            return False
        self._version = update.weights.version
        if update.part != "base":
            self._jobs.source = update.weights.source
        self._jobs.fail_strangers(update.weights.source)
        job.put(None)
        return True

    def _note(self, error: Exception) -> None:
        """Log what is no refusal. After a fault on a GPU nothing can be computed in this process any more."""
        if isinstance(error, RolloutError):
            return
        _log.warning("the sampler failed", exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        elif isinstance(error, torch.AcceleratorError):
            self.has_died = True


class _Batch:
    """Completions that are sampled together.

    rows: all of them, as they are numbered.
    jobs: that they belong to.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.jobs: list[SampleJob] = []

    def begin(self, jobs: Iterable[SampleJob]) -> tuple[list[Prompt], list[int]]:
        """Number the rows of jobs that have not begun; gives their prompts and seeds."""
        rows = [row for job in jobs for row in job.begin()]
        self.rows += rows
        self.jobs = [*dict.fromkeys([*self.jobs, *(row.job for row in rows)])]
        return [row.prompt for row in rows], [row.seed for row in rows]

    def tell(self, ended: Mapping[int, Rollout]) -> None:
        """Hand completions over to who reads them."""
        for place, rollout in ended.items():
            row = self.rows[place]
            row.job.missing -= 1
            row.job.put(
                CompletionReply.of(
                    rollout.completion,
                    row.prompt_index,
                    row.seed_index,
                    rollout.policy_version if row.job.message.or_later else row.job.version,
                    rollout.version_runs,
                )
            )
        self._check_read()

    def drop_unread(self, under_way: UnderWay) -> None:
        """Sample no more of what nobody reads."""
        self._check_read()
        if not all(job.is_read for job in self.jobs):
            under_way.abandon(lambda index: not self.rows[index].job.is_read)
            self.jobs = [job for job in self.jobs if job.is_read]

    def _check_read(self) -> None:
        if not any(job.is_read for job in self.jobs):
            raise NobodyReadsError


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Any], object], argument: Any) -> None:
    """Call a function on the event loop; does nothing once the server has stopped."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)


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
        fit_threads(torch)
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
