"""A stand-in for an OpenAI-compatible server, FastAPI on a real socket, that answers as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tests.launches import free_port

Rule = Callable[[Mapping[str, Any]], Any]
"""Body of a request -> the answer's text, a choice (a dict with "message"), or a whole Response."""

READY_S = 30.0


def says(text: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """One choice of a chat completion."""
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}


def with_logprobs(text: str, *places: Mapping[str, float], finish_reason: str = "stop") -> dict[str, Any]:
    """A choice with log-probabilities: at each place token -> log-probability, the sampled token first."""
    content = [
        {
            "token": next(iter(place)),
            "logprob": next(iter(place.values())),
            "top_logprobs": [{"token": token, "logprob": value} for token, value in place.items()],
        }
        for place in places
    ]
    return {**says(text, finish_reason), "logprobs": {"content": content}}


def refuses(status: int, *, code: str = "", **headers: str) -> Response:
    """An error as OpenAI writes it; what it says repeats the request, as servers do."""
    content = {"error": {"message": "PRIVATE words of the request", "code": code or None}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(content, status, headers=names)


@dataclass
class Judge:
    """A running one. rule: may be exchanged; bodies, headers, times: of the requests so far."""

    url: str
    rule: Rule
    model: str = "judge"
    usage: tuple[int, int] = (100, 10)
    sent_headers: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    @property
    def shown(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def answer(self, body: dict[str, Any]) -> Response:
        """What becomes of one request."""
        if body["model"] != self.model:
            return refuses(404, code="model_not_found")
        given = self.rule(body)
        if isinstance(given, Response):
            return given
        choice = says(given) if isinstance(given, str) else given
        read, written = self.usage
        reply = {
            "object": "chat.completion",
            "model": self.model,
            "choices": [{"index": 0, **choice}],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        }
        return JSONResponse(reply, headers=self.sent_headers)


def _app(judge: Judge) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": judge.model, "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        judge.bodies.append(body)
        judge.headers.append(dict(request.headers))
        judge.times.append(time.monotonic())
        judge.under_way += 1
        judge.most_under_way = max(judge.most_under_way, judge.under_way)
        try:
            # A rule may sleep; it is no coroutine.
            from starlette.concurrency import run_in_threadpool

            return await run_in_threadpool(judge.answer, body)
        finally:
            judge.under_way -= 1

    return app


@contextmanager
def judge_server(rule: Rule = lambda _: "7", *, port: int | None = None, **settings: Any) -> Iterator[Judge]:
    """Serve inside the block, on a free port of this machine."""
    port = port or free_port()
    judge = Judge(f"http://127.0.0.1:{port}/v1", rule, **settings)
    config = uvicorn.Config(_app(judge), host="127.0.0.1", port=port, log_level="critical", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + READY_S
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the stand-in did not start"
        time.sleep(0.005)
    try:
        yield judge
    finally:
        server.should_exit = server.force_exit = True
        thread.join(READY_S)
