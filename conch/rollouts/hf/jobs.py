"""What the thread of a transformers sampler has to do, and in which order.

Requests and new weights wait in one line, in the order in which they came; but new weights go before requests
for some version or a later one (`GenerateRequest.or_later`), as far as these have not begun.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from conch.config import GenerationConfig
from conch.errors import RolloutError
from conch.rollouts.protocol import CompletionReply, GenerateRequest, WeightUpdate
from conch.types import Prompt


@dataclass(frozen=True, eq=False)
class Row:
    """One completion that a job asks for."""

    job: SampleJob
    prompt_index: int
    seed_index: int

    @property
    def prompt(self) -> Prompt:
        return Prompt("", self.job.message.prompts[self.prompt_index].token_ids)

    @property
    def seed(self) -> int:
        return self.job.message.prompts[self.prompt_index].seeds[self.seed_index]


@dataclass(eq=False)
class SampleJob:
    """Completions that were asked for.

    version: of the weights that an exact request asks for.
    put: hands a reply, or what went wrong, over to who reads them.
    is_read: False once nobody reads them any more.
    waiting: rows that have not begun.
    missing: completions that have not come yet.
    """

    message: GenerateRequest
    version: int
    put: Callable[[CompletionReply | Exception], None]
    is_read: bool = True
    waiting: list[Row] = field(default_factory=list)
    missing: int = 0

    def __post_init__(self) -> None:
        prompts = enumerate(self.message.prompts)
        self.waiting = [
            Row(self, index, number) for index, prompt in prompts for number in range(len(prompt.seeds))
        ]
        self.missing = len(self.waiting)

    @property
    def settings(self) -> tuple[GenerationConfig, bool]:
        """What all completions that are sampled together have in common."""
        return self.message.generation, self.message.greedy

    @property
    def prompts(self) -> list[Prompt]:
        """Of the rows that have not begun."""
        return [row.prompt for row in self.waiting]

    @property
    def is_under_way(self) -> bool:
        """True where a completion has begun and not come yet, for somebody who waits."""
        return self.is_read and self.missing > len(self.waiting)

    def begin(self) -> list[Row]:
        """The rows that have not begun, which are about to."""
        rows, self.waiting = self.waiting, []
        return rows

    def fail(self, error: Exception) -> None:
        """Tell who reads that no more will come."""
        self.is_read = False
        self.put(error)


@dataclass(eq=False)
class LoadJob:
    """New weights.

    tensors: the weights where they were handed over.
    put: takes what went wrong, or None.
    """

    update: WeightUpdate
    tensors: Mapping[str, Tensor] | None
    put: Callable[[Exception | None], None]


class JobQueue:
    """Jobs that wait. `put` is for all threads, the rest for the sampler's alone.

    source: run whose weights the sampler holds; None while it holds none that can be sampled from.
    gather_s: time for the requests of one rollout to come in together before an idle sampler begins.
    """

    def __init__(self, gather_s: float) -> None:
        self.source: str | None = None
        self._gather_s = gather_s
        self._come: queue.SimpleQueue[SampleJob | LoadJob] = queue.SimpleQueue()
        self._waiting: deque[SampleJob | LoadJob] = deque()

    def put(self, job: SampleJob | LoadJob) -> None:
        """Have a job done."""
        self._come.put(job)

    def __len__(self) -> int:
        return self._come.qsize() + len(self._waiting)

    def next(self) -> SampleJob | LoadJob:
        """Wait for a job that can be done, and take it."""
        while True:
            while not self._can_begin():
                self._insert(self._come.get())
            self._collect(self._gather_s)
            if self._can_begin():  # else nobody reads any more what could
                return self._waiting.popleft()

    def _can_begin(self) -> bool:
        # Weights stand before whatever waits for weights.
        first = self._waiting[0] if self._waiting else None
        if isinstance(first, SampleJob):
            return self.source is not None or not first.message.or_later
        return first is not None

    def _insert(self, job: SampleJob | LoadJob) -> None:
        overtaken: list[SampleJob | LoadJob] = []
        if isinstance(job, LoadJob):
            overtaken = [each for each in self._waiting if self.overtakes(job, each)]
            self._waiting = deque(each for each in self._waiting if not self.overtakes(job, each))
        self._waiting.append(job)
        self._waiting.extend(overtaken)

    def overtakes(self, load: LoadJob, job: SampleJob | LoadJob) -> bool:
        """True where new weights go before what has not begun of a job."""
        if not isinstance(job, SampleJob) or not job.message.or_later:
            return False
        return self.source is None or job.message.weights.source == load.update.weights.source

    def _collect(self, pause_s: float) -> None:
        """Queue what has come in, and forget what nobody reads any more.

        pause_s: wait so long for each further job; 0 waits for none.
        """
        with suppress(queue.Empty):
            while True:
                self._insert(self._come.get(timeout=pause_s) if pause_s else self._come.get_nowait())
        self._waiting = deque(job for job in self._waiting if isinstance(job, LoadJob) or job.is_read)

    def take_alike(self, first: SampleJob) -> list[SampleJob]:
        """Take requests with the settings of `first` that stand before any new weights."""
        alike: list[SampleJob] = []
        rest: deque[SampleJob | LoadJob] = deque()
        while self._waiting and not isinstance(self._waiting[0], LoadJob):
            job = self._waiting.popleft()
            assert isinstance(job, SampleJob)
            (alike if job.settings == first.settings else rest).append(job)
        self._waiting.extendleft(reversed(rest))
        return alike

    def take_joining(
        self, settings: tuple[GenerationConfig, bool], may_join: Callable[[list[Prompt]], bool]
    ) -> list[SampleJob]:
        """Take requests that may join what is under way with these settings: those before all that must wait
        for its end."""
        self._collect(0.0)
        joining: list[SampleJob] = []
        while self._waiting:
            job = self._waiting[0]
            if not isinstance(job, SampleJob) or job.settings != settings or not may_join(job.prompts):
                break
            joining.append(job)
            self._waiting.popleft()
        return joining

    def pending_load(self) -> LoadJob | None:
        """New weights that wait."""
        self._collect(0.0)
        return next((job for job in self._waiting if isinstance(job, LoadJob)), None)

    def take_first(self, load: LoadJob) -> bool:
        """Take new weights where nothing stands before them; False where something does."""
        if self._waiting[0] is not load:
            return False
        self._waiting.popleft()
        return True

    def put_back(self, rows: Iterable[Row]) -> None:
        """Have rows that were withdrawn sampled after the new weights that wait, before other requests."""
        jobs: dict[SampleJob, None] = {}
        for row in rows:
            row.job.waiting.append(row)
            jobs[row.job] = None
        behind = [number for number, job in enumerate(self._waiting) if isinstance(job, LoadJob)]
        place = behind[-1] + 1 if behind else 0
        for job in reversed(jobs):
            self._waiting.insert(place, job)

    def fail_waiting(self) -> None:
        """Fail all that waits for weights: those that came were not loaded, and those before are gone."""
        self._fail(lambda _source: True, "the weights that it waits for were not loaded")

    def fail_strangers(self, source: str) -> None:
        """Fail all that waits for weights of another run than this one."""
        self._fail(lambda wanted: wanted != source, f"the weights of another run, {source}, have come")

    def _fail(self, which: Callable[[str], bool], reason: str) -> None:
        kept: deque[SampleJob | LoadJob] = deque()
        for job in self._waiting:
            if isinstance(job, SampleJob) and job.message.or_later and which(job.message.weights.source):
                job.fail(RolloutError(reason))
            else:
                kept.append(job)
        self._waiting = kept
