"""A client as they were written for the first service of this kind: its verbs, plain HTTP, nothing of ours.

python -m tests.integration.first_client URL KEY MODEL_ID MAX_STEPS

Trains, and prints one JSON object: the versions that it saw, the status at the end, what the model's archive
holds.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import zipfile
from itertools import pairwise
from typing import Any

import httpx2

CONFLICT = 409


class GrpoClient:
    """Verbs of the first service; each is one request, sent once."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx2.AsyncClient(base_url=url, headers={"api-key": key}, timeout=120, trust_env=False)

    async def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        return await self._post("/start", settings)

    async def stop(self) -> dict[str, Any]:
        return await self._post("/stop")

    async def get_completions(self, prompt: str) -> dict[str, Any]:
        return await self._post("/completions", {"prompt": prompt})

    async def send_rewards(self, completions: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
        names = ("prompt", "completions", "completion_tokens")
        return await self._post(
            "/rewards", {**{name: completions[name] for name in names}, "rewards": rewards}
        )

    async def get_status(self) -> dict[str, Any]:
        reply = await self._http.get("/status")
        reply.raise_for_status()
        return reply.json()

    async def get_model(self) -> bytes:
        reply = await self._http.post("/model")
        reply.raise_for_status()
        return reply.content

    async def close(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        reply = await self._http.post(path, json=body)
        reply.raise_for_status()
        return reply.json()


def reward_of(completion: str) -> float:
    """More for letters that come in their order."""
    return float(sum(one <= other for one, other in pairwise(completion)))


async def ask_and_reward(client: GrpoClient, prompts: list[str], versions: list[list[Any]]) -> None:
    """Until the service says that the run has ended."""
    while True:
        for prompt in prompts:
            try:
                got = await client.get_completions(prompt)
                reply = await client.send_rewards(got, [reward_of(each) for each in got["completions"]])
            except httpx2.HTTPStatusError as error:
                if error.response.status_code == CONFLICT:
                    return
                raise
            versions += [got["model_version"], reply["model_version"]]


async def train(url: str, key: str, model_id: str, max_steps: int) -> dict[str, Any]:
    """All of a run, with two prompts under way."""
    client = GrpoClient(url, key)
    settings = {
        "model_id": model_id,
        "max_completion_length": 6,
        "num_completions_per_prompt": 3,
        "training_batch_size": 1,
        "learning_rate": 5e-2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "max_steps": max_steps,
    }
    before = await client.get_status()
    started = await client.start(settings)
    versions: list[list[Any]] = []
    await asyncio.gather(*(ask_and_reward(client, prompts, versions) for prompts in (["hab", "ec"], ["gdf"])))
    status, archive = await client.get_status(), await client.get_model()
    await client.close()
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = sorted(files.namelist())
    return {"before": before, "started": started, "versions": versions, "status": status, "files": names}


if __name__ == "__main__":
    address, secret, model, steps = sys.argv[1:]
    print(json.dumps(asyncio.run(train(address, secret, model, int(steps)))))
