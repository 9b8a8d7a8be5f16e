"""Completions and new weights take turns at the gate before vLLM."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from conch.config import GenerationConfig
from conch.errors import RolloutError
from conch.rollouts.protocol import GenerateRequest, PromptRequest, WeightUpdate, WeightVersion
from conch.rollouts.server import RolloutServer
from conch.rollouts.vllm.gate import Gate, RowUnderWay
from conch.rollouts.vllm.server import VLLMSampler
from tests.fakes.vllm_engine import FakeVLLM
from tests.tiny import char_tokenizer


def request(*, or_later: bool = True, source: str = "run") -> GenerateRequest:
    return GenerateRequest(
        weights=WeightVersion(source=source, version=1),
        or_later=or_later,
        generation=GenerationConfig(),
        greedy=False,
        eos_id=0,
        prompts=(PromptRequest(token_ids=(1,), seeds=(0,)),),
    )


class Rows:
    """Completions at a gate of two slots, each under way until it is told to end."""

    def __init__(self) -> None:
        self.gate = Gate(2)
        self.under_way: list[RowUnderWay] = []
        self._ends: list[asyncio.Event] = []

    async def load(self, version: int, *, goes_on: bool = False, is_base: bool = False) -> None:
        weights = WeightVersion(source="run", version=version)
        async with self.gate.closed(weights, is_base=is_base, goes_on=goes_on):
            await asyncio.sleep(0)

    async def row(self, asked: GenerateRequest, version: int = 1) -> list[int]:
        """The versions that it began and ended with."""
        async with self.gate.row(asked, version) as row:
            begun, end = row.version, asyncio.Event()
            self.under_way.append(row)
            self._ends.append(end)
            await end.wait()
            return [begun, row.version]

    async def settle(self) -> int:
        """How many are under way once nothing moves."""
        for _ in range(10):
            await asyncio.sleep(0)
        return len(self.under_way)

    async def end(self, count: int) -> None:
        for _ in range(count):
            self.under_way.pop(0)
            self._ends.pop(0).set()
        await self.settle()


def test_new_weights_wait_for_what_is_under_way_and_go_before_the_rest() -> None:
    async def run() -> None:
        rows = Rows()
        tasks = [asyncio.create_task(rows.row(request())) for _ in range(4)]
        assert await rows.settle() == 0, "no weights are here"
        await rows.load(1)
        assert await rows.settle() == 2, "as many as there are slots"
        load = asyncio.create_task(rows.load(2))
        await rows.end(1)
        assert len(rows.under_way) == 1 and not load.done()
        await rows.end(1)
        await load
        assert await rows.settle() == 2
        await rows.end(2)
        assert [await task for task in tasks] == [[1, 1], [1, 1], [2, 2], [2, 2]]

    asyncio.run(run())


def test_what_goes_on_does_so_but_for_exact_requests_and_a_base() -> None:
    async def run() -> None:
        rows = Rows()
        await rows.load(1)
        tasks = [asyncio.create_task(rows.row(request(or_later=later))) for later in (False, True)]
        assert await rows.settle() == 2
        load = asyncio.create_task(rows.load(2, goes_on=True))
        await rows.settle()
        assert not load.done(), "an exact one is under way"
        await rows.end(1)
        await load
        base = asyncio.create_task(rows.load(3, is_base=True))
        await rows.settle()
        assert not base.done()
        await rows.end(1)
        await base
        assert [await task for task in tasks] == [[1, 1], [1, 2]]
        waits = asyncio.create_task(rows.row(request()))
        assert await rows.settle() == 0, "of a base nothing can be sampled"
        await rows.load(4)
        await rows.settle()
        await rows.end(1)
        assert await waits == [4, 4]

    asyncio.run(run())


def test_weights_that_are_not_loaded_end_what_waits_and_what_goes_on() -> None:
    async def run() -> None:
        rows = Rows()
        await rows.load(1)
        tasks = [asyncio.create_task(rows.row(request())) for _ in range(3)]
        assert await rows.settle() == 2
        with suppress(OSError):
            async with rows.gate.closed(WeightVersion(source="run", version=2), is_base=False, goes_on=True):
                raise OSError
        await rows.settle()
        await rows.end(2)
        for task in tasks:
            with pytest.raises(RolloutError, match="new weights were not loaded"):
                await task
        with pytest.raises(RolloutError, match="another run, run, have come"):
            await rows.load(3)
            await rows.row(request(source="other"))

    asyncio.run(run())


def test_weights_that_are_handed_over_reach_vllms_processes_and_leave_no_file() -> None:
    async def run() -> None:
        engine, tokenizer = FakeVLLM(), char_tokenizer("abcdefgh")
        server = RolloutServer(VLLMSampler(engine, tokenizer, 60.0, None), tokenizer, Path("/dev/shm"))
        tensors = {"w": torch.ones(2, 3).t(), "v": torch.zeros(1, dtype=torch.bfloat16)}
        update = WeightUpdate(weights=WeightVersion(source="run", version=4), handed=True)
        health = await server.update_weights(update, tensors)
        assert health.weights == update.weights and engine.paused == 0
        assert engine.tensors.keys() == tensors.keys()
        assert all(torch.equal(engine.tensors[name], each) for name, each in tensors.items())

    left = {*Path("/dev/shm").glob("conch-handed-*")}
    asyncio.run(run())
    assert {*Path("/dev/shm").glob("conch-handed-*")} <= left
