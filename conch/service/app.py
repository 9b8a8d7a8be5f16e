"""The addresses of a training service; `conch.servers.listening` guards their port.

A request that changes something goes to the run's `Exchange`, in a thread where it may touch the disk; one
that waits does so in the event loop, and never for longer than its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from conch.errors import CheckpointError, ConchError
from conch.log import get_logger
from conch.servers.listening import new_app
from conch.servers.refusals import retry_after
from conch.service.leases.records import Answer, Asker, Handout, Post
from conch.service.openapi import describe_refusals
from conch.service.posts import handout_reply, post_of
from conch.service.protocol import (
    MODEL_VERSION_HEADER,
    MOST_VERSIONS,
    CompletionsBatch,
    CompletionsBatchResponse,
    CompletionsRequest,
    CompletionsResponse,
    ModelRequest,
    Refusal,
    ResumeRequest,
    RewardsBatch,
    RewardsBatchResponse,
    RewardsRequest,
    RewardsResponse,
    RunReply,
    RunsResponse,
    StatusResponse,
    TrainingSettings,
)
from conch.service.refusals import BUSY, INTERNAL, UNAVAILABLE, UNPROCESSABLE, RefusedError
from conch.service.runs.exchange import Ask, Exchange
from conch.service.runs.run import TrainingRun, finite
from conch.service.runs.runs import Runs
from conch.service.service_config import ServiceConfig

_log = get_logger(__name__)

_ABOUT = """
Start a run, ask for completions of prompts, send back a reward for each: the model learns from every group
of completions as soon as all its rewards are there.

1. `POST /start` with the settings of the run.
2. `POST /completions` with a prompt: several completions, each a sample with an id, leased to you.
3. `POST /rewards` with one number for each sample. Go on with 2 until the answer is 409: the run has ended.
4. `POST /model`: the model as a zip file.

Every request has the header `api-key`. A refusal is `{"detail": "one sentence"}`: 401 the key is wrong, 409
the state forbids it, 410 it came too late, 422 it fits nothing that was given out, 429 and 503 come again
after `retry-after` seconds.
"""
_RETRY_S = 1.0
_POLL_S = 0.1
_HEARTBEAT_S = 15.0

ValueT = TypeVar("ValueT")


def make_app(runs: Runs, config: ServiceConfig, is_ending: Callable[[], bool] = lambda: False) -> FastAPI:
    """The application.

    is_ending: True once the service stops, which ends the streams of events.
    """
    app = new_app("Conch remote training", description=_ABOUT, docs_url="/docs", openapi_url="/openapi.json")
    service = _Service(runs, config, is_ending)
    _add_runs(app, service)
    _add_samples(app, service)
    _add_downloads(app, service)
    describe_refusals(app)

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        del request
        return _refusal(error)

    @app.exception_handler(ConchError)
    async def failed(request: Request, error: ConchError) -> JSONResponse:
        _log.error("%s: %s", request.url.path, error)
        status = UNAVAILABLE if isinstance(error, CheckpointError) else INTERNAL
        return _refusal(RefusedError(status, str(error)))

    # FastAPI finds these by their annotations, which it reads from the module.
    del refused, failed
    return app


class _Service:
    """What the addresses share."""

    def __init__(self, runs: Runs, config: ServiceConfig, is_ending: Callable[[], bool]) -> None:
        self.runs = runs
        self.config = config
        self.is_ending = is_ending
        self._waiting = 0

    async def wait(self, future: Future[ValueT], wait_s: float | None) -> ValueT:
        """The value of a future.

        Raises:
            RefusedError: what ended it, too many wait, or it takes longer than `wait_s`.
        """
        most = self.config.max_waiting
        if not future.done() and self._waiting >= most:
            raise RefusedError(BUSY, f"{most} requests wait already (`max_waiting`)", _RETRY_S)
        limit_s = self.config.deadline_s if wait_s is None else wait_s
        self._waiting += 1
        try:
            ending = asyncio.wrap_future(future)
            # Where the wait ends first nobody else reads why it ended, which asyncio would complain of.
            ending.add_done_callback(lambda each: each.cancelled() or each.exception())
            # Shielded: what is asked for again waits for the same future.
            return await asyncio.wait_for(asyncio.shield(ending), limit_s)
        except asyncio.TimeoutError:
            raise RefusedError(
                UNAVAILABLE, f"nothing within {limit_s:g} s: ask again with the same `request_id`", _RETRY_S
            ) from None
        finally:
            self._waiting -= 1

    async def complete(self, request: CompletionsRequest) -> CompletionsResponse:
        """Completions of one prompt."""
        run = self.runs.find(request.run_id)
        [future] = await asyncio.to_thread(self._ask_all, run, [request])
        return await self._completions(run, future, request.wait_s)

    async def complete_all(self, requests: list[CompletionsRequest]) -> list[CompletionsResponse | Refusal]:
        """Completions of several prompts, which are sampled together, in their order.

        Raises:
            RefusedError: there is no run.
        """
        run = self.runs.find(None)
        futures = await asyncio.to_thread(self._ask_all, run, requests)
        waits = [
            _or_refusal(self._completions(run, future, request.wait_s))
            for future, request in zip(futures, requests, strict=True)
        ]
        return [*await asyncio.gather(*waits)]

    def _ask_all(
        self, run: TrainingRun, requests: Sequence[CompletionsRequest]
    ) -> list[Future[Handout] | RefusedError]:
        """What each request waits for; a refusal in place of what cannot be asked for."""
        asks: dict[int, Ask] = {}
        outcomes: dict[int, Future[Handout] | RefusedError] = {}
        for index, request in enumerate(requests):
            try:
                self.runs.check_current(run, request.run_id)
                asks[index] = _ask_of(request, run.settings.num_completions_per_prompt)
            except RefusedError as refusal:
                outcomes[index] = refusal
        outcomes |= zip(asks, run.exchange.ask_all([*asks.values()]), strict=True)
        return [outcomes[index] for index in range(len(requests))]

    async def _completions(
        self, run: TrainingRun, future: Future[Handout] | RefusedError, wait_s: float | None
    ) -> CompletionsResponse:
        if isinstance(future, RefusedError):
            raise future
        try:
            handout = await self.wait(future, wait_s)
        except (RefusedError, asyncio.CancelledError):
            run.exchange.abandon(future)
            raise
        return handout_reply(run.run_id, handout, run.exchange.lease_left_s(handout))

    async def reward(self, request: RewardsRequest) -> RewardsResponse:
        """Take rewards of one group."""
        [reply] = await self.reward_all([request])
        if isinstance(reply, RefusedError):
            raise reply
        return reply

    async def reward_all(self, requests: list[RewardsRequest]) -> list[RewardsResponse | RefusedError]:
        """Take rewards of several groups, which become whole in this order."""
        outcomes = await asyncio.to_thread(self._take_all, requests)
        waits = [
            self._wait_for_version(*outcome, request.wait_s)
            for outcome, request in zip(outcomes, requests, strict=True)
            if not isinstance(outcome, RefusedError)
        ]
        await asyncio.gather(*waits)
        return [each if isinstance(each, RefusedError) else _rewards_reply(*each) for each in outcomes]

    def _take_all(self, requests: Sequence[RewardsRequest]) -> list[tuple[Exchange, Answer] | RefusedError]:
        """Have each request's run take its rewards; the answer behind the run, or why they are refused."""
        posts: dict[Exchange, dict[int, Post]] = {}
        outcomes: dict[int, tuple[Exchange, Answer] | RefusedError] = {}
        for index, request in enumerate(requests):
            try:
                exchange = self.runs.rewarded(request.run_id)
                posts.setdefault(exchange, {})[index] = post_of(request, exchange.run_id)
            except RefusedError as refusal:
                outcomes[index] = refusal
        for exchange, own in posts.items():
            for index, answer in zip(own, exchange.reward_all([*own.values()]), strict=True):
                outcomes[index] = answer if isinstance(answer, RefusedError) else (exchange, answer)
        return [outcomes[index] for index in range(len(requests))]

    async def _wait_for_version(self, exchange: Exchange, answer: Answer, wait_s: float) -> None:
        """Wait for the update that learns from what was taken, `wait_s` at most; it is taken however that
        ends."""
        if not wait_s or answer.outcome != "whole":
            return
        future = exchange.when_version(answer.version)
        with contextlib.suppress(RefusedError):
            await self.wait(future, wait_s)
        future.cancel()

    async def loaded(self, run: TrainingRun) -> RunReply:
        """A run once its model is loaded, or what it says if that takes long."""
        try:
            await self.wait(run.loaded, None)
        except RefusedError as refusal:
            if refusal.status != UNAVAILABLE:
                raise
            return _run_reply(run, "starting")
        return _run_reply(run, "started")


async def _or_refusal(reply: Awaitable[ValueT]) -> ValueT | Refusal:
    try:
        return await reply
    except RefusedError as refusal:
        return Refusal(status=refusal.status, detail=str(refusal))


def _add_runs(app: FastAPI, service: _Service) -> None:
    @app.post("/start", summary="Start a run")
    async def start(settings: TrainingSettings) -> RunReply:
        return await service.loaded(await asyncio.to_thread(service.runs.start, settings))

    @app.post("/resume", summary="Go on with a run that was stopped, or that failed")
    async def resume(request: ResumeRequest) -> RunReply:
        run = await asyncio.to_thread(service.runs.resume, request.run_id, request.settings)
        return await service.loaded(run)

    @app.post("/stop", summary="Save the run and end it")
    async def stop() -> RunReply:
        return _run_reply(await asyncio.to_thread(service.runs.stop), "stopped")

    @app.get("/status", summary="Settings, state and counts of the run")
    async def status() -> StatusResponse:
        return await asyncio.to_thread(service.runs.status)

    @app.get("/training_settings", summary="Settings of the run")
    async def training_settings() -> TrainingSettings:
        return service.runs.find(None).settings

    @app.get("/runs", summary="All runs below the service's folder")
    async def runs() -> RunsResponse:
        return RunsResponse(runs=await asyncio.to_thread(service.runs.list))

    del start, resume, stop, status, training_settings, runs


def _add_samples(app: FastAPI, service: _Service) -> None:
    @app.post("/completions", summary="Sample completions of a prompt")
    async def completions(request: CompletionsRequest) -> CompletionsResponse:
        return await service.complete(request)

    @app.post("/completions/batch", summary="Sample completions of several prompts together")
    async def completions_batch(batch: CompletionsBatch) -> CompletionsBatchResponse:
        return CompletionsBatchResponse(replies=await service.complete_all(batch.requests))

    @app.post("/rewards", summary="Reward samples of one group")
    async def rewards(request: RewardsRequest) -> RewardsResponse:
        return await service.reward(request)

    @app.post("/rewards/batch", summary="Reward samples of several groups")
    async def rewards_batch(batch: RewardsBatch) -> RewardsBatchResponse:
        replies = await service.reward_all(batch.requests)
        return RewardsBatchResponse(
            replies=[
                Refusal(status=each.status, detail=str(each)) if isinstance(each, RefusedError) else each
                for each in replies
            ]
        )

    del completions, completions_batch, rewards, rewards_batch


def _add_downloads(app: FastAPI, service: _Service) -> None:
    async def zipped(version: int | None, run_id: str | None) -> FileResponse:
        deadline_s = service.config.deadline_s
        owner, path = await asyncio.to_thread(service.runs.model, version, run_id, deadline_s)
        number = path.stem.partition("_")[2]
        name = f"{owner}-{path.stem}.zip"
        headers = {MODEL_VERSION_HEADER: number}
        return FileResponse(path, media_type="application/zip", filename=name, headers=headers)

    @app.post("/model", summary="Download the model as a zip file", response_class=FileResponse)
    async def model(request: ModelRequest | None = None) -> FileResponse:
        request = request or ModelRequest()
        return await zipped(request.version, request.run_id)

    @app.get("/model", summary="The same, with `range` for the rest of one", response_class=FileResponse)
    async def get_model(
        version: int | None = Query(default=None, ge=0, le=MOST_VERSIONS), run_id: str | None = None
    ) -> FileResponse:
        return await zipped(version, run_id)

    @app.get("/events", summary="Metrics and changes of state, as server-sent events")
    async def events(last_event_id: int | None = Header(default=None)) -> StreamingResponse:
        run = service.runs.find(None)
        # Numbers begin anew with the service: a listener of the one before gets all there are.
        seen = last_event_id or 0
        lines = _event_lines(service, run, 0 if seen > run.exchange.events.last else seen)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})

    del model, get_model, events


async def _event_lines(service: _Service, run: TrainingRun, seen: int) -> AsyncIterator[str]:
    """Events of a run until it has ended, with a comment now and then that keeps the connection."""
    quiet_s = 0.0
    while not service.is_ending():
        is_over = not run.is_alive  # asked first: what it says last is still read
        for event in run.exchange.events.after(seen):
            seen, quiet_s = event.number, 0.0
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {_json(event.data)}\n\n"
        if is_over:
            return
        await asyncio.sleep(_POLL_S)
        quiet_s += _POLL_S
        if quiet_s >= _HEARTBEAT_S:
            quiet_s = 0.0
            yield ": still there\n\n"


def _json(data: dict[str, Any]) -> str:
    values = {**data, "metrics": finite(data["metrics"])} if "metrics" in data else data
    return json.dumps(values, allow_nan=False)


def _ask_of(request: CompletionsRequest, group_size: int) -> Ask:
    """What a request asks the trainer for.

    Raises:
        RefusedError: it asks for a part of a group that nobody else could have the rest of.
    """
    count = group_size if request.num_completions is None else request.num_completions
    if request.num_completions is not None and request.group is None:
        raise RefusedError(
            UNPROCESSABLE, "`num_completions` is a part of a `group` that clients share: give it a name"
        )
    if count > group_size:
        raise RefusedError(UNPROCESSABLE, f"a group has {group_size} completions, not {count}")
    # Of one name and two prompts there are two groups: nobody gets completions of what he did not ask for.
    key = f"{request.group} {_digest(request.prompt)}" if request.group else ""
    digest = _digest([request.prompt, key, count])
    return Ask(request.prompt, Asker(request.client_id, request.request_id or "", digest, count), key)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _rewards_reply(exchange: Exchange, answer: Answer) -> RewardsResponse:
    return RewardsResponse(
        model_version=(exchange.run_id, answer.version), outcome=answer.outcome, detail=answer.detail
    )


def _run_reply(run: TrainingRun, status: str) -> RunReply:
    version = (run.run_id, run.exchange.version)
    return RunReply(status=status, run_id=run.run_id, model_version=version)


def _refusal(error: RefusedError) -> JSONResponse:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = retry_after(error.retry_after_s)
    return JSONResponse({"detail": str(error)}, error.status, headers)
