"""The three addresses of a rollout server; `conch.servers.listening` guards their port."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from conch.rollouts.protocol import GenerateRequest, Health, WeightUpdate
from conch.servers.listening import new_app

if TYPE_CHECKING:
    from conch.rollouts.server import RolloutServer


def make_app(server: RolloutServer) -> FastAPI:
    """The three addresses of `conch.rollouts.protocol`, without a guard, and no others."""
    app = new_app("Conch rollouts")

    @app.get("/health")
    async def health() -> Health:
        return await server.health()

    @app.post("/weights")
    async def weights(update: WeightUpdate) -> Health:
        return await server.update_weights(update)

    @app.post("/generate")
    async def generate(request: GenerateRequest) -> StreamingResponse:
        server.check(request)
        return StreamingResponse(server.completion_lines(request), media_type="application/x-ndjson")

    # FastAPI finds these by their annotations, which it reads from the module.
    del health, weights, generate
    return app
