"""A goal-space server for uvicorn: `app = goalspace_app(GoalspaceSettings.from_environment())`.

    uvicorn's worker: `Guard`, `add_goalspace`              a process of its own: `GoalSpace`, shared cache
                      `_Measuring`  ------ texts ------->

The worker itself measures nothing: it answers `GET /health` at once whatever a goal does, and ends a goal
that hangs. With `--workers 3` there are three such pairs and one cache.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from pydantic import Field

from conch.access.secrets import secret_from
from conch.config import Section, load
from conch.errors import ConchError, ConfigError, RewardUnavailableError
from conch.log import get_logger
from conch.reward_server.goalspace import GOAL_DIMENSIONS, NORMALIZATION_PATH, add_goalspace
from conch.reward_server.service import Admission
from conch.rewards.goals import DEFAULT_GOALS, GoalSpace
from conch.rewards.goals.cache import SharedValues
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rewards.verifiers.pool import CheckDiedError, CheckPool
from conch.servers.listening import Guard, new_app
from conch.servers.shared_folder import SharedFolder
from conch.servers.shared_log import share_log

_log = get_logger(__name__)

_AT_ONCE = 64
"""Texts that the measuring process takes at a time, so that a large request does not hold up a small one."""

_PREFIX = "conch-goalspace"


class GoalspaceSettings(Section):
    """Settings of a goal-space server, each from an environment variable."""

    goals: str = ",".join(DEFAULT_GOALS)
    """Goals with a comma between, see docs/steerability.md. GOAL_DIMENSIONS."""

    normalization: Path | None = None
    """File with each goal's range. None takes the steerability benchmark's. NORMALIZATION_PATH."""

    cache_values: int = Field(default=400_000, ge=0)
    """Values that are kept so that equal texts are not measured again, of all goals and workers together; 0
    keeps none. GOALSPACE_CACHE_VALUES."""

    max_waiting: int = Field(default=4096, ge=1)
    """Most texts under way in a worker; more are refused with 429. A request that is larger by itself is
    taken while nothing else is under way. GOALSPACE_MAX_WAITING."""

    max_request_mb: float = Field(default=8.0, gt=0)
    """Largest request, in millions of bytes; a larger one is refused with 413. GOALSPACE_MAX_REQUEST_MB."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time for 64 texts, in seconds: then the measuring process is ended, and the request answered
    with 500. GOALSPACE_TIMEOUT_S."""

    secret_env: str | None = None
    """Environment variable with the secret that clients must send. None asks for none.
    GOALSPACE_SECRET_ENV."""

    log: Path | None = None
    """File that all workers append their log to. None writes to stderr. GOALSPACE_LOG."""

    variables: ClassVar[Mapping[str, str]] = {
        GOAL_DIMENSIONS: "goals",
        NORMALIZATION_PATH: "normalization",
        "GOALSPACE_CACHE_VALUES": "cache_values",
        "GOALSPACE_MAX_WAITING": "max_waiting",
        "GOALSPACE_MAX_REQUEST_MB": "max_request_mb",
        "GOALSPACE_TIMEOUT_S": "timeout_s",
        "GOALSPACE_SECRET_ENV": "secret_env",
        "GOALSPACE_LOG": "log",
    }

    @classmethod
    def from_environment(cls) -> GoalspaceSettings:
        """Read the environment variables that are set and not empty.

        Raises:
            ConfigError: one line per mistake.
        """
        unknown = [name for name in os.environ if name.startswith("GOALSPACE_") and name not in cls.variables]
        if unknown:
            raise ConfigError(f"{unknown[0]} is no setting: there are {', '.join(cls.variables)}")
        given = {field: os.environ.get(name) for name, field in cls.variables.items()}
        return load(cls, {field: value for field, value in given.items() if value})


def goalspace_app(settings: GoalspaceSettings) -> Any:
    """Make the ASGI application of one worker.

    Raises:
        ConfigError: the secret's variable is not set, or the log cannot be written.
    """
    share_log("conch", "uvicorn", "uvicorn.error", "uvicorn.access", path=settings.log)
    app = new_app("goal space")
    measuring = _Measuring(settings)

    async def health() -> dict[str, bool]:
        return {"ready": True}

    app.add_api_route("/health", health, methods=["GET"])
    add_goalspace(app, measuring.measure, lambda: measuring.names)
    guarded = Guard(app, secret_from(settings.secret_env), int(settings.max_request_mb * 1e6))
    return _Lifespan(guarded, measuring)


class _Lifespan:
    """An ASGI application before another: opens what measures before the first request, and closes it."""

    def __init__(self, app: Any, measuring: _Measuring) -> None:
        self._app = app
        self._measuring = measuring

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()
        try:
            await self._measuring.open()
        except ConchError as error:
            await self._measuring.close()
            _log.error("%s", error)
            _end_all_workers()
            await send({"type": "lifespan.startup.failed", "message": ""})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._measuring.close()
        await send({"type": "lifespan.shutdown.complete"})


def _end_all_workers() -> None:
    """End uvicorn above its workers, which would start this one again and again."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        os.kill(parent.pid, signal.SIGTERM)


class _Job(NamedTuple):
    texts: list[str]
    normalize: bool


class _Measuring:
    """The process that measures, seen from the worker."""

    def __init__(self, settings: GoalspaceSettings) -> None:
        self.names: list[str] = []
        self._settings = settings
        self._admission = Admission(settings.max_waiting, "texts")
        self._pool: CheckPool[Any] | None = None
        self._folder: SharedFolder | None = None

    async def open(self) -> None:
        """Start the process, and wait until it knows its goals.

        Raises:
            ConfigError: there is no such goal, a package is not installed, a range is missing or none.
            RewardError: the process could not be started.
        """
        settings = self._settings
        if settings.cache_values:
            parent = multiprocessing.parent_process()
            self._folder = SharedFolder(_PREFIX, str(os.getpid() if parent is None else parent.pid))
        path = None if self._folder is None else self._folder.path / "values.sqlite"
        self._pool = CheckPool(_MeasuringProcess(settings, path))
        self.names = list(await self._run(None))

    async def measure(self, texts: Sequence[str], normalize: bool) -> dict[str, list[float]]:
        """Return goal -> one value per text; NaN where there is none.

        Raises:
            OverloadedError: too many texts wait.
            RewardUnavailableError: a goal's model is away, or the process that measures died.
            TimeoutError: a goal hung.
        """
        if not texts:
            return {name: [] for name in self.names}
        self._admission.take(len(texts))
        parts = [_Job(list(texts[at : at + _AT_ONCE]), normalize) for at in range(0, len(texts), _AT_ONCE)]
        try:
            columns = await asyncio.gather(*map(self._run, parts))
        finally:
            self._admission.end(len(texts))
        return {name: [value for part in columns for value in part[name]] for name in self.names}

    async def _run(self, job: _Job | None) -> Mapping[str, Any]:
        assert self._pool is not None, "the server is not open"
        future = cast("Future[Mapping[str, Any]]", self._pool.submit("", job))
        try:
            return await asyncio.wrap_future(future)
        except CheckDiedError as error:
            raise RewardUnavailableError(f"the process that measures ended: {error}") from error

    async def close(self) -> None:
        """End the process, and remove the cache if no other worker has it."""
        if self._pool is not None:
            await asyncio.to_thread(self._pool.close)
            self._pool = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None


class _MeasuringProcess(Verifier[Any]):
    """What the measuring process runs. It is no verifier but for the pool that runs it, which ends a process
    at a deadline and starts another."""

    name = "goal space"
    columns = ()
    processes = 1

    def __init__(self, settings: GoalspaceSettings, cache: Path | None) -> None:
        self.timeout_s = settings.timeout_s
        self._settings = settings
        self._cache = cache
        self._space: GoalSpace | None = None

    def warm_up(self) -> None:
        settings = self._settings
        share_log("conch", path=settings.log)
        store = None if self._cache is None else SharedValues(self._cache, settings.cache_values)
        self._space = GoalSpace(settings.goals, settings.normalization, store=store, setting=GOAL_DIMENSIONS)
        self._space.ranges()

    def read_key(self, row: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def verify(self, completion: str, key: Any) -> Verdict:
        space = self._space
        assert space is not None
        if key is None:
            return cast(Verdict, dict.fromkeys(space.names, 0.0))
        return cast(Verdict, space.measure(key.texts, normalize=key.normalize))
