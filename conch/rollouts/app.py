"""The three addresses of a rollout server; `conch.servers.listening` guards their port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from conch.rollouts.protocol import CompletionReply, Failure, GenerateRequest, Health, WeightUpdate
from conch.servers.listening import BAD_REQUEST, STALE_WEIGHTS, UNAVAILABLE, new_app
from conch.servers.refusals import documented_refusals

if TYPE_CHECKING:
    from conch.rollouts.server import RolloutServer


class JsonLines(StreamingResponse):
    """A line of JSON for each completion, as it ends."""

    media_type = "application/x-ndjson"


def make_app(server: RolloutServer) -> FastAPI:
    """The three addresses of `conch.rollouts.protocol`, without a guard, and no others."""
    app = new_app("Conch rollouts")

    @app.get("/health", responses=documented_refusals())
    async def health() -> Health:
        """Tell how the server stands, and which weights it holds."""
        return await server.health()

    refusals = documented_refusals(BAD_REQUEST, STALE_WEIGHTS, UNAVAILABLE)

    @app.post("/weights", responses=refusals)
    async def weights(update: WeightUpdate) -> Health:
        """Load new weights; the answer comes once they are loaded."""
        return await server.update_weights(update)

    line = {"description": "A line for each completion, as it ends; the last one may be a failure."}
    lines: dict[int | str, dict[str, Any]] = {200: {**line, "model": CompletionReply | Failure}}

    @app.post("/generate", response_class=JsonLines, responses={**lines, **refusals})
    async def generate(request: GenerateRequest) -> StreamingResponse:
        """Sample completions of several prompts, each sent as it ends."""
        server.check(request)
        return JsonLines(server.completion_lines(request))

    # FastAPI finds these by their annotations, which it reads from the module.
    del health, weights, generate
    return app
