"""Clients of a training service: blocking, and for asyncio. Needs httpx and pydantic alone.

    from conch.service.client import TrainingClient, TrainingSettings

    def reward(prompts, outputs, **_):
        return [float(output.strip() == "".join(sorted(prompt))) for prompt, output in zip(prompts, outputs)]

    with TrainingClient("http://127.0.0.1:8000", api_key="KEY") as client:
        client.train(reward=reward, prompts=["cab", "bac"], settings=TrainingSettings(model_id="models/tiny"))

Every request may be repeated: where the service is away, or a connection breaks, it is sent again until
`retry_s` have passed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import ssl
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from conch.errors import ServiceError, ServiceUnavailableError
from conch.service.client_calls import (
    Access,
    Asked,
    Attempts,
    Call,
    PromptRow,
    UserPrompt,
    completions_call,
    endless,
    goes_on,
    is_end,
    is_started,
    new_asked,
    new_requests,
    parsed,
    raise_first,
    reward_arguments,
    rewards_call,
    rewards_of,
    split_refusals,
)
from conch.service.protocol import (
    KEY_HEADER,
    MODEL_VERSION_HEADER,
    CompletionsBatchResponse,
    CompletionsRequest,
    CompletionsResponse,
    Refusal,
    ResumeRequest,
    RewardsBatchResponse,
    RewardsRequest,
    RewardsResponse,
    RunReply,
    RunsResponse,
    StatusResponse,
)
from conch.service.protocol import TrainingSettings as TrainingSettings
from conch.service.refusals import CONFLICT, GONE, NOT_FOUND, RefusedError

Reward = Callable[..., Any]
"""`reward(samples, prompts, outputs, **metadata)`: lists with one entry per completion; returns one number
for each, or None where there is none. For asyncio it may be a coroutine function."""

_START_S = 600.0
_PARTIAL_CONTENT = 206


class TrainingClient:
    """A blocking client. One thread at a time uses it.

    url: `http://host:port` or `https://host:port`.
    api_key: None takes the environment variable CONCH_SERVICE_KEY.
    client_id: who rewards what it was given; None makes one. A client that is started again with the same one
        can reward what it got before.
    wait_s: how long one request may wait for completions, in seconds.
    retry_s: how long to try again while the service is away or busy, in seconds.
    verify: certificates that are trusted, where it is not what the system trusts.

    Raises:
        ServiceError: from each verb: what is wrong, where; `RefusedError` with the service's own words,
            `ServiceUnavailableError` where it did not answer for `retry_s`.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        client_id: str | None = None,
        wait_s: float = 60.0,
        retry_s: float = 1800.0,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._access = Access.of(url, api_key, client_id, wait_s, retry_s)
        self._http = httpx2.Client(headers=dict(self._access.headers), verify=verify, trust_env=False)

    def __enter__(self) -> TrainingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def start(self, settings: TrainingSettings) -> RunReply:
        """Start a run."""
        return parsed(RunReply, self._ask(Call("POST", "/start", settings, _START_S, repeats=False)))

    def resume(self, run_id: str, settings: TrainingSettings | None = None) -> RunReply:
        """Go on with a run that was stopped, that failed, or that is to make more updates than it has.

        settings: from now on, see `ResumeRequest`; None takes those that it had.
        """
        request = ResumeRequest(run_id=run_id, settings=settings)
        return parsed(RunReply, self._ask(Call("POST", "/resume", request, _START_S, repeats=False)))

    def stop(self) -> RunReply:
        """Save the run and end it."""
        return parsed(RunReply, self._ask(Call("POST", "/stop", None, _START_S, repeats=False)))

    def get_status(self) -> StatusResponse:
        """Settings, state and counts of the run."""
        return parsed(StatusResponse, self._ask(Call("GET", "/status")))

    def get_runs(self) -> list[StatusResponse]:
        """All runs of the service, the newest first."""
        return parsed(RunsResponse, self._ask(Call("GET", "/runs"))).runs

    def get_completions(self, prompt: UserPrompt, **settings: Any) -> CompletionsResponse:
        """Completions of one prompt. settings: further fields of `CompletionsRequest`."""
        [request] = new_requests([PromptRow.of(prompt)], self._access)
        request = CompletionsRequest.model_validate({**request.model_dump(), **settings})
        call = Call("POST", "/completions", request, request.wait_s or self._access.wait_s)
        return parsed(CompletionsResponse, self._ask(call))

    def submit_rewards(
        self, completions: CompletionsResponse, rewards: Sequence[float | None], *, wait_s: float = 0.0
    ) -> RewardsResponse:
        """Reward all completions of a reply. wait_s: longest wait for the update that learns from them."""
        request = RewardsRequest.from_completions(completions, rewards, self._access.client_id)
        request = request.model_copy(update={"wait_s": wait_s})
        return parsed(RewardsResponse, self._ask(Call("POST", "/rewards", request, wait_s)))

    def get_completions_batch(self, prompts: Sequence[UserPrompt]) -> list[CompletionsResponse]:
        """Completions of several prompts, sampled together."""
        return self._complete(new_requests([PromptRow.of(prompt) for prompt in prompts], self._access))

    def submit_rewards_batch(self, requests: Sequence[RewardsRequest]) -> list[RewardsResponse | Refusal]:
        """Reward several groups; what comes too late is among the answers as a refusal."""
        replies: dict[int, RewardsResponse | Refusal] = {}
        missing = [*range(len(requests))]
        call = rewards_call(requests)
        attempts = Attempts(self._access, call)
        while True:
            answer = parsed(RewardsBatchResponse, self._ask(call))
            given, again, refused = split_refusals(answer.replies)
            raise_first([each for each in refused if each[1].status != GONE], "a group's rewards")
            replies |= {missing[index]: reply for index, reply in (*given.items(), *refused)}
            missing = [missing[index] for index in again]
            if not missing:
                return [replies[index] for index in range(len(requests))]
            time.sleep(attempts.postponed())
            call = rewards_call([requests[index] for index in missing])

    def get_model(self, path: Path | str) -> int:
        """Download the model as a zip file, and go on where the connection breaks.

        path: gets its name once it is whole.

        Returns:
            The number of updates that it has seen.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise ServiceError(f"the model cannot be written: there is no folder {target.parent}")
        download = _Download(target.with_name(f".{target.name}.partial"))
        download.path.unlink(missing_ok=True)
        attempts = Attempts(self._access, Call("GET", "/model", None, self._access.wait_s))
        while not download.is_whole:
            try:
                pause_s = self._download(download, attempts)
            except httpx2.RequestError as error:
                pause_s = attempts.broken(error)
            if not download.is_whole:
                time.sleep(pause_s)
        _check_zip(download.path)
        os.replace(download.path, target)
        assert download.version is not None
        return download.version

    def train(
        self,
        *,
        reward: Reward,
        prompts: Sequence[UserPrompt],
        settings: TrainingSettings | None = None,
    ) -> StatusResponse:
        """Ask, reward, and ask again until the run has made its last update; returns its status then.

        settings: of the run, which is started unless it is under way. None joins whatever is under way.

        Raises:
            ServiceError: further, where the run failed or was stopped, or `reward` gave no list of numbers.
        """
        at_once = self._join(settings).prompts_per_step
        rows = endless(prompts)
        pending: list[Asked] = []
        while True:
            pending += new_asked([next(rows) for _ in range(at_once - len(pending))], self._access)
            try:
                pending = self._train_once(pending, reward)
            except RefusedError as error:
                if error.status != CONFLICT:
                    raise
                status = self.get_status()
                if is_end(status):
                    return status
                raise

    def _join(self, settings: TrainingSettings | None) -> TrainingSettings:
        """Start a run unless it is under way; returns its settings."""
        before = self.get_status()
        if goes_on(before, settings):
            assert before.training_settings is not None
            return before.training_settings
        assert settings is not None
        attempts = Attempts(self._access, Call("POST", "/start", settings))
        while True:
            try:
                self.start(settings)
                return settings
            except ServiceError as error:
                if is_started(before, self.get_status(), settings):
                    return settings
                time.sleep(attempts.lost(error))

    def _train_once(self, asked: Sequence[Asked], reward: Reward) -> list[Asked]:
        """Reward what the service has for these prompts; returns those that it has nothing for yet.

        To wait for all of them before any is rewarded would have clients wait for each other, once all groups
        that may be under way are out.
        """
        attempts = Attempts(self._access, completions_call([each.request for each in asked], self._access))
        while True:
            call = completions_call([each.request for each in asked], self._access)
            answer = parsed(CompletionsBatchResponse, self._ask(call))
            given, again, refused = split_refusals(answer.replies)
            # What has lapsed before its answer came through is gone; its prompt comes again some day.
            raise_first([each for each in refused if each[1].status != GONE], "a prompt")
            if given or not again:
                break
            time.sleep(attempts.postponed())
        if given:
            completions = [*given.values()]
            rewards = reward(**reward_arguments([asked[index].row for index in given], completions))
            if inspect.iscoroutine(rewards):
                rewards.close()
                raise ServiceError("the reward is a coroutine function: `AsyncTrainingClient` awaits such")
            self.submit_rewards_batch(rewards_of(rewards, completions, self._access))
        return [asked[index] for index in again]

    def _complete(self, requests: Sequence[CompletionsRequest]) -> list[CompletionsResponse]:
        replies: dict[int, CompletionsResponse] = {}
        missing = [*range(len(requests))]
        attempts = Attempts(self._access, completions_call(requests, self._access))
        while True:
            call = completions_call([requests[index] for index in missing], self._access)
            answer = parsed(CompletionsBatchResponse, self._ask(call))
            given, again, refused = split_refusals(answer.replies)
            raise_first(refused, "a prompt")
            replies |= {missing[index]: reply for index, reply in given.items()}
            missing = [missing[index] for index in again]
            if not missing:
                return [replies[index] for index in range(len(requests))]
            time.sleep(attempts.postponed())

    def _download(self, download: _Download, attempts: Attempts) -> float:
        """Get what is missing of the model; returns how long to wait where that is refused, in seconds."""
        timeout = self._access.timeout(self._access.wait_s)
        url = f"{self._access.url}/model"
        with self._http.stream("GET", url, timeout=timeout, **download.request) as reply:
            if reply.is_error:
                reply.read()
                if reply.status_code == NOT_FOUND and download.version is not None:
                    download.begin_anew()  # newer versions took its place meanwhile
                    return attempts.postponed()
                return attempts.refused(reply)
            download.version = int(reply.headers[MODEL_VERSION_HEADER])
            with download.path.open("ab" if reply.status_code == _PARTIAL_CONTENT else "wb") as file:
                for block in reply.iter_bytes():  # as they come in: what is there when it breaks stays
                    file.write(block)
        download.is_whole = True
        return 0.0

    def _ask(self, call: Call) -> httpx2.Response:
        """A whole answer of success."""
        attempts, timeout = Attempts(self._access, call), self._access.timeout(call.wait_s)
        while True:
            try:
                reply = self._http.request(
                    call.method, self._access.url + call.path, timeout=timeout, **call.content
                )
            except httpx2.RequestError as error:
                pause_s = attempts.broken(error)
            else:
                if reply.is_success:
                    return reply
                pause_s = attempts.refused(reply)
            time.sleep(pause_s)


class AsyncTrainingClient:
    """The same for asyncio; see `TrainingClient` for what it is made from and what its verbs do."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        client_id: str | None = None,
        wait_s: float = 60.0,
        retry_s: float = 1800.0,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._access = Access.of(url, api_key, client_id, wait_s, retry_s)
        self._verify = verify
        self._http = httpx2.AsyncClient(headers=dict(self._access.headers), verify=verify, trust_env=False)

    async def __aenter__(self) -> AsyncTrainingClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def start(self, settings: TrainingSettings) -> RunReply:
        """Start a run."""
        return parsed(RunReply, await self._ask(Call("POST", "/start", settings, _START_S, repeats=False)))

    async def resume(self, run_id: str, settings: TrainingSettings | None = None) -> RunReply:
        """Go on with a run; see `TrainingClient.resume`."""
        request = ResumeRequest(run_id=run_id, settings=settings)
        return parsed(RunReply, await self._ask(Call("POST", "/resume", request, _START_S, repeats=False)))

    async def stop(self) -> RunReply:
        """Save the run and end it."""
        return parsed(RunReply, await self._ask(Call("POST", "/stop", None, _START_S, repeats=False)))

    async def get_status(self) -> StatusResponse:
        """Settings, state and counts of the run."""
        return parsed(StatusResponse, await self._ask(Call("GET", "/status")))

    async def get_completions(self, prompt: UserPrompt, **settings: Any) -> CompletionsResponse:
        """Completions of one prompt. settings: further fields of `CompletionsRequest`."""
        [request] = new_requests([PromptRow.of(prompt)], self._access)
        request = CompletionsRequest.model_validate({**request.model_dump(), **settings})
        call = Call("POST", "/completions", request, request.wait_s or self._access.wait_s)
        return parsed(CompletionsResponse, await self._ask(call))

    async def submit_rewards(
        self, completions: CompletionsResponse, rewards: Sequence[float | None], *, wait_s: float = 0.0
    ) -> RewardsResponse:
        """Reward all completions of a reply. wait_s: longest wait for the update that learns from them."""
        request = RewardsRequest.from_completions(completions, rewards, self._access.client_id)
        request = request.model_copy(update={"wait_s": wait_s})
        return parsed(RewardsResponse, await self._ask(Call("POST", "/rewards", request, wait_s)))

    async def get_model(self, path: Path | str) -> int:
        """Download the model as a zip file, in a thread; see `TrainingClient.get_model`."""
        access = self._access

        def download() -> int:
            settings = {"wait_s": access.wait_s, "retry_s": access.retry_s, "verify": self._verify}
            with TrainingClient(access.url, access.headers[KEY_HEADER], **settings) as client:
                return client.get_model(path)

        return await asyncio.to_thread(download)

    async def train(
        self,
        *,
        reward: Reward,
        prompts: Sequence[UserPrompt],
        settings: TrainingSettings | None = None,
        at_once: int = 8,
    ) -> StatusResponse:
        """Train to the end of the run; see `TrainingClient.train`.

        at_once: prompts that are under way at the same time.
        """
        await self._join(settings)
        rows = endless(prompts)
        workers = [asyncio.ensure_future(self._train_on(rows, reward)) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        except RefusedError as error:
            if error.status != CONFLICT:
                raise
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        status = await self.get_status()
        if not is_end(status):
            raise ServiceError(f"run {status.run_id} refuses though it is {status.state}")
        return status

    async def _join(self, settings: TrainingSettings | None) -> None:
        """Start a run unless it is under way."""
        before = await self.get_status()
        if goes_on(before, settings):
            return
        assert settings is not None
        attempts = Attempts(self._access, Call("POST", "/start", settings))
        while True:
            try:
                await self.start(settings)
                return
            except ServiceError as error:
                if is_started(before, await self.get_status(), settings):
                    return
                await asyncio.sleep(attempts.lost(error))

    async def _train_on(self, rows: Iterator[PromptRow], reward: Reward) -> None:
        """Take one prompt after the other, until the run refuses."""
        for row in rows:
            try:
                await self._train_once(row, reward)
            except RefusedError as error:
                if error.status != GONE:  # too late: the samples were given back
                    raise

    async def _train_once(self, row: PromptRow, reward: Reward) -> None:
        [request] = new_requests([row], self._access)
        call = Call("POST", "/completions", request, self._access.wait_s)
        completions = [parsed(CompletionsResponse, await self._ask(call))]
        values = reward(**reward_arguments([row], completions))
        values = await values if inspect.isawaitable(values) else values
        [post] = rewards_of(values, completions, self._access)
        await self._ask(Call("POST", "/rewards", post))

    async def _ask(self, call: Call) -> httpx2.Response:
        """A whole answer of success."""
        attempts, timeout = Attempts(self._access, call), self._access.timeout(call.wait_s)
        while True:
            try:
                reply = await self._http.request(
                    call.method, self._access.url + call.path, timeout=timeout, **call.content
                )
            except httpx2.RequestError as error:
                pause_s = attempts.broken(error)
            else:
                if reply.is_success:
                    return reply
                pause_s = attempts.refused(reply)
            await asyncio.sleep(pause_s)


@dataclass
class _Download:
    """A model that is being downloaded. version: None before the first answer."""

    path: Path
    version: int | None = None
    is_whole: bool = False

    def begin_anew(self) -> None:
        """Forget what is there, to download another version."""
        self.path.unlink(missing_ok=True)
        self.version = None

    @property
    def request(self) -> dict[str, Any]:
        """What asks for the rest, as arguments of a client of httpx."""
        have = self.path.stat().st_size if self.path.exists() else 0
        return {
            "params": {} if self.version is None else {"version": self.version},
            "headers": {"range": f"bytes={have}-"} if have else {},
        }


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ServiceUnavailableError(f"the downloaded model is no zip file: {error}") from error
    if damaged is not None:
        raise ServiceUnavailableError(f"the downloaded model is damaged: {damaged}")
