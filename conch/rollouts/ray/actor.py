"""A rollout server inside an actor of Ray: what `conch.rollouts.app` is to HTTP.

This module imports no Ray, so that it is the same in a test as in an actor. An exception of other libraries
would not come back through Ray as itself: every answer is a value, a refusal with its sentence among them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conch.distributed.stuck import thread_stacks
from conch.errors import ConchError, first_line
from conch.machine.malloc import keep_heap
from conch.rollouts.protocol import GenerateRequest, WeightUpdate
from conch.rollouts.ray.blueprint import Blueprint, build_server
from conch.rollouts.ray.handed import HandedTensors
from conch.rollouts.ray.janitor import FOLDER_VARIABLE
from conch.rollouts.server import Refused, RolloutServer
from conch.servers.listening import BAD_REQUEST, UNAVAILABLE

UNKNOWN_REQUEST = 404
"""Status of a request that this actor does not know: it was started again meanwhile."""

NOT_BUILT = 425
"""Status of an actor that is to be told its blueprint, or builds its model."""

PATIENCE_S = 5.0
"""Longest time until `more` answers, be it with nothing."""

_LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"),
)
"""Variables that an actor of a run's own cluster has from the trainer, as those of `_LAUNCHER_PREFIXES`: with
them it would take itself for a rank."""

_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "SLURM_PROCID", "PMI_")

_MAX_MESSAGES = 200
"""Messages of an actor that wait to be read; older ones are dropped."""


@dataclass(frozen=True)
class Answer:
    """What an actor says to a call.

    value: as the method says; None with a refusal.
    status: 0, or the HTTP status of a refusal.
    detail: why it refuses, in a sentence.
    messages: log records since the last answer: level and text.
    """

    value: Any = None
    status: int = 0
    detail: str = ""
    messages: tuple[tuple[int, str], ...] = ()


@dataclass(eq=False)
class _Sampling:
    """A request under way.

    lines: completions that have ended and that nobody has read; the last line is None once all have.
    """

    lines: asyncio.Queue[str | None]
    task: asyncio.Task[None]
    read_s: float


class SamplerActor:
    """The class of the actors. Its methods run on one event loop, so that they answer while it samples."""

    def __init__(self) -> None:
        leave_launcher()
        self._messages = _keep_messages()
        self._numbers = itertools.count()
        self._samplings: dict[int, _Sampling] = {}
        self._server: RolloutServer | None = None
        self._failure = ""
        self._is_building = False
        self._deadline_s = 0.0

    async def build(self, blueprint: Blueprint) -> Answer:
        """A `Health`, once the model is built, without weights; refuses while another call builds it.

        An actor that Ray starts again needs to be told again.
        """
        if self._server is None and not self._is_building:
            self._is_building, self._failure, self._deadline_s = True, "", blueprint.deadline_s
            try:
                self._server = await _build(blueprint)
            except ConchError as error:
                self._failure = first_line(error)
            except Exception as error:
                traceback.print_exc()
                self._failure = f"the model cannot be built: {type(error).__name__}: {first_line(error)}"
            finally:
                self._is_building = False
        return await self.health()

    async def health(self) -> Answer:
        """A `Health`. Ends the process where the sampler has died: Ray starts another."""
        if self._server is not None and self._server.sampler.has_died:
            os.kill(os.getpid(), signal.SIGKILL)
        return await self._answer(lambda server: server.health())

    async def update_weights(self, update: WeightUpdate, tensors: HandedTensors) -> Answer:
        """A `Health`, once the weights are loaded.

        tensors: in shared memory, as Ray gives them.
        """
        return await self._answer(lambda server: server.update_weights(update, tensors.as_torch()))

    async def begin(self, request: GenerateRequest) -> Answer:
        """Number of the request, which is under way from now on."""

        async def begin(server: RolloutServer) -> int:
            server.check(request)
            lines: asyncio.Queue[str | None] = asyncio.Queue()
            task = asyncio.create_task(self._sample(server, request, lines))
            number = next(self._numbers)
            self._samplings[number] = _Sampling(lines, task, time.monotonic())
            return number

        return await self._answer(begin)

    async def _sample(
        self, server: RolloutServer, request: GenerateRequest, lines: asyncio.Queue[str | None]
    ) -> None:
        replies = server.completion_lines(request)
        try:
            async for line in replies:
                lines.put_nowait(line)
        finally:
            await replies.aclose()  # pyright: ignore[reportAttributeAccessIssue]  a generator
            lines.put_nowait(None)

    async def more(self, number: int) -> Answer:
        """Lines of completions that have ended since the last call, as `completion_lines` has them, and None
        behind the last. Waits for the first a while, and gives an empty list then.

        number: of the request.
        """

        async def more(_: RolloutServer) -> list[str | None]:
            sampling = self._samplings.get(number)
            if sampling is None:
                raise Refused(UNKNOWN_REQUEST, "it was started again, and does not know the request")
            lines: list[str | None] = []
            try:
                lines.append(await asyncio.wait_for(sampling.lines.get(), PATIENCE_S))
                while True:
                    lines.append(sampling.lines.get_nowait())
            except (asyncio.TimeoutError, asyncio.QueueEmpty):
                pass
            sampling.read_s = time.monotonic()
            if lines and lines[-1] is None:
                del self._samplings[number]
            return lines

        self._stop_unread()
        return await self._answer(more)

    async def stop(self, number: int) -> None:
        """Sample no more for a request, which nobody reads any longer."""
        sampling = self._samplings.pop(number, None)
        if sampling is not None:
            sampling.task.cancel()

    async def stacks(self) -> str:
        """What each thread of this process is at."""
        return thread_stacks(own=True)

    async def pid(self) -> int:
        """Process id, on the machine where it runs."""
        return os.getpid()

    def _stop_unread(self) -> None:
        """Stop requests whose reader is gone without a word."""
        oldest_s = time.monotonic() - self._deadline_s - PATIENCE_S
        for number, sampling in list(self._samplings.items()):
            if sampling.read_s < oldest_s:
                sampling.task.cancel()
                del self._samplings[number]

    async def _answer(self, work: Callable[[RolloutServer], Coroutine[Any, Any, Any]]) -> Answer:
        if self._server is None:
            if self._failure:
                return self._refusal(BAD_REQUEST, self._failure)
            return self._refusal(NOT_BUILT, "it has no model yet" if self._is_building else "it has started")
        try:
            value = await work(self._server)
        except Refused as error:
            return self._refusal(error.status_code, str(error.detail))
        except Exception as error:
            traceback.print_exc()
            return self._refusal(UNAVAILABLE, f"{type(error).__name__}: {first_line(error)}")
        return Answer(value, messages=self._drained())

    def _refusal(self, status: int, detail: str) -> Answer:
        return Answer(status=status, detail=detail, messages=self._drained())

    def _drained(self) -> tuple[tuple[int, str], ...]:
        messages = []
        while self._messages:
            messages.append(self._messages.popleft())
        return tuple(messages)


async def _build(blueprint: Blueprint) -> RolloutServer:
    torch.set_num_threads(blueprint.threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns
        keep_heap()
    # Handed weights lie in the object store, whose pages are read-only, and are only read.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # In the cluster's own folder, where there is one: it is deleted whatever becomes of this process.
    parent = os.environ.get(FOLDER_VARIABLE)
    if parent is not None:
        # And so are the sockets and files that vLLM leaves among temporary files when its process is ended.
        tempfile.tempdir = os.environ["TMPDIR"] = parent
    with tempfile.TemporaryDirectory(prefix="sampler-", dir=parent) as folder:
        return await build_server(blueprint, Path(folder))


def leave_launcher() -> None:
    """Forget what a launcher of ranks told the trainer, whose environment an actor may have inherited."""
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES):
            del os.environ[name]


class _Keeper(logging.Handler):
    def __init__(self, messages: deque[tuple[int, str]]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append((record.levelno, self.format(record)))


def _keep_messages() -> deque[tuple[int, str]]:
    """Keep what Conch logs in this process, for the trainer to show."""
    messages: deque[tuple[int, str]] = deque(maxlen=_MAX_MESSAGES)
    root = logging.getLogger("conch")
    root.handlers[:] = [_Keeper(messages)]
    root.setLevel(logging.INFO)
    root.propagate = False
    return messages
