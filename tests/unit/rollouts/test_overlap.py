"""Requests for some version of the weights or a later one, beside new weights that come meanwhile."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import HTTPException
from transformers import PreTrainedModel

from conch.config import GenerationConfig
from conch.models.forward import ForwardInputs
from conch.models.policy import response_logits
from conch.ops import logprobs_of_labels
from conch.rollouts.hf import continuous_batching
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.hf.server import TransformersSampler
from conch.rollouts.hf.under_way import UnderWay
from conch.rollouts.protocol import (
    CompletionReply,
    Failure,
    GenerateRequest,
    PromptRequest,
    WeightUpdate,
    WeightVersion,
)
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.server import RolloutServer
from conch.rollouts.weight_sync import checkpoint_tensors
from conch.types import Prompt, Rollout
from tests.footprint import wait_until
from tests.tiny import char_tokenizer, tiny_decoder
from tests.transformers_servers import served

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
EOS = 22
WAIT_S = 60.0


def model(seed: int, family: str = "gptj") -> PreTrainedModel:
    """A policy of other weights for another seed. gptj knows what it wants, and never ends a text."""
    if family == "mistral":
        return tiny_decoder("llama", seed=seed, model_type="mistral", sliding_window=4)
    lm = tiny_decoder(family, seed=seed)
    if family == "gptj":
        with torch.no_grad():
            lm.get_parameter("lm_head.weight").mul_(4)
            lm.get_parameter("lm_head.bias")[EOS] = -100.0
    return lm


def ask(
    version: int, *seeds: int, or_later: bool = True, source: str = "run", **generation: Any
) -> GenerateRequest:
    return GenerateRequest(
        weights=WeightVersion(source=source, version=version),
        or_later=or_later,
        generation=GenerationConfig(**{"max_new_tokens": 12, **generation}),
        greedy=False,
        eos_id=EOS,
        prompts=(PromptRequest(token_ids=(0, 1, 2), seeds=seeds),),
    )


class Stepper:
    """Holds a model before each forward pass until it is let."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._permits = threading.Semaphore(0)
        self._open = threading.Event()
        self._open.set()
        self.passes = 0
        self.waits = False
        lm.register_forward_pre_hook(self._before)

    def _before(self, *_: Any) -> None:
        if not self._open.is_set():
            self.waits = True
            assert self._permits.acquire(timeout=WAIT_S)
            self.waits = False
        self.passes += 1

    def hold(self) -> None:
        self._open.clear()

    async def step(self, count: int) -> None:
        """Let so many passes run, and wait until the sampler stands before the next."""
        wanted = self.passes + count
        self._permits.release(count)
        await until(lambda: self.passes == wanted and self.waits)

    def go(self) -> None:
        self._open.set()
        self._permits.release(10_000)


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition, lambda: "it does not happen")


class Held:
    """A server as an actor holds it, whose model makes its steps as a test lets it.

    models: the policy's, by version.
    """

    def __init__(self, models: dict[int, PreTrainedModel], slots: int) -> None:
        lm = copy.deepcopy(models[min(models)])
        self.models = models
        self.stepper = Stepper(lm)
        self.sampler = TransformersSampler(lm, TOKENIZER, max_model_len=None, slots=slots, deadline_s=WAIT_S)
        self.server = RolloutServer(self.sampler, TOKENIZER, Path("/dev/shm"))

    async def load(self, version: int, *, source: str = "run", **update: Any) -> None:
        weights = WeightVersion(source=source, version=version)
        tensors = checkpoint_tensors(self.models[version])
        await self.server.update_weights(WeightUpdate(weights=weights, handed=True, **update), tensors)

    async def replies(self, request: GenerateRequest) -> list[CompletionReply]:
        """In the order of their seeds."""
        self.server.check(request)
        lines = [line async for line in self.server.completion_lines(request)]
        failures = [line for line in lines if "detail" in line]
        assert not failures, failures
        found = [CompletionReply.model_validate_json(line) for line in lines]
        return sorted(found, key=lambda reply: (reply.prompt_index, reply.seed_index))

    def ask(self, request: GenerateRequest) -> asyncio.Task[list[CompletionReply]]:
        return asyncio.create_task(self.replies(request))


@asynccontextmanager
async def held(models: dict[int, PreTrainedModel], slots: int = 2) -> AsyncIterator[Held]:
    """With the first version's weights; has sampled once, so that nothing is tried out any more."""
    server = Held(models, slots)
    await server.load(min(models))
    await server.replies(ask(min(models), 7, or_later=False))
    try:
        yield server
    finally:
        server.stepper.go()


def alone(lm: PreTrainedModel, seed: int, **generation: Any) -> tuple[int, ...]:
    """What the trainer's own engine samples for this seed."""
    config = GenerationConfig(**{"max_new_tokens": 12, **generation})
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)
    ((rollout,),) = engine.generate([Prompt("", (0, 1, 2))], seeds=[seed])
    return rollout.completion.token_ids


def logprobs_under(lm: PreTrainedModel, token_ids: tuple[int, ...]) -> list[float]:
    """Of each token by one forward pass."""
    ids = torch.tensor([[0, 1, 2, *token_ids]])
    inputs = ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), len(token_ids))
    with torch.no_grad():
        return logprobs_of_labels(response_logits(lm, inputs), torch.tensor([token_ids]))[0].tolist()


MODELS = {version: model(version) for version in (1, 2, 3)}


# ------------------------------------------------------------------------------------------------- it waits


def test_request_waits_for_weights_that_are_new_enough() -> None:
    async def run() -> None:
        server = Held(MODELS, slots=4)
        early = server.ask(ask(1, 5))
        late = server.ask(ask(2, 5, 6))
        await asyncio.sleep(0.05)
        assert not early.done() and server.sampler.busy_s == 0
        await server.load(1)
        (reply,) = await early
        assert reply.version == 1 and reply.token_ids == alone(MODELS[1], 5)
        assert not late.done()
        with pytest.raises(HTTPException) as refused:
            server.server.check(ask(2, 5, or_later=False))
        assert refused.value.status_code == 409 and "those of 1 of run" in refused.value.detail
        await server.load(3)
        assert [(reply.version, reply.token_ids) for reply in await late] == [
            (3, alone(MODELS[3], seed)) for seed in (5, 6)
        ]

    asyncio.run(run())


def test_request_of_another_run_is_refused_and_fails_where_it_waited() -> None:
    async def run() -> None:
        async with held(MODELS) as server:
            with pytest.raises(HTTPException) as refused:
                server.server.check(ask(1, 5, source="other"))
            assert refused.value.status_code == 409
            waits = ask(2, 5)
            server.server.check(waits)
            lines = aiter(server.server.completion_lines(waits))
            first = asyncio.ensure_future(anext(lines))
            await asyncio.sleep(0.02)
            await server.load(3, source="other")
            failure = Failure.model_validate_json(await first)
            assert failure.detail == "version 2 or later of run was asked for, those of 3 of other are here"

    asyncio.run(run())


def test_client_that_leaves_while_it_waits_leaves_nothing_behind() -> None:
    with served(MODELS[1], TOKENIZER) as server:
        server.server._weights = WeightVersion(source="run", version=1)
        conditions = server.server._weights_changed._waiters  # pyright: ignore[reportAttributeAccessIssue]
        with (
            httpx2.Client(trust_env=False, timeout=WAIT_S) as client,
            client.stream(
                "POST", f"http://{server.address}/generate", json=ask(2, 5).model_dump(mode="json")
            ) as answer,
        ):
            assert answer.status_code == 200
            wait_until(lambda: len(conditions) == 1, lambda: "nobody waits")
        wait_until(lambda: not conditions, lambda: "somebody still waits")


# -------------------------------------------------------------------------------------------- it is overtaken


def test_new_weights_go_before_what_has_not_begun() -> None:
    async def run() -> None:
        async with held(MODELS) as server:
            server.stepper.hold()
            seeds = range(10, 16)
            replies = server.ask(ask(1, *seeds))
            await server.stepper.step(3)
            load = asyncio.create_task(server.load(2))
            joining = server.ask(ask(2, 30))
            await asyncio.sleep(0.05)
            assert not load.done()
            server.stepper.go()
            found = await replies
            assert [reply.version for reply in found] == [1, 1, 2, 2, 2, 2]
            assert all(reply.version_runs == () for reply in found)
            for seed, reply in zip(seeds, found, strict=True):
                assert reply.token_ids == alone(MODELS[reply.version], seed)
            assert [reply.version for reply in await joining] == [2]
            await load

    asyncio.run(run())


def test_exact_request_is_not_overtaken() -> None:
    async def run() -> None:
        async with held(MODELS) as server:
            server.stepper.hold()
            exact = server.ask(ask(1, *range(10, 16), or_later=False))
            await server.stepper.step(2)
            # Of the same settings, which joins, and of others, which waits for the end of all that.
            later, other = server.ask(ask(1, 20, 21)), server.ask(ask(1, 25, or_later=False, top_k=3))
            await server.stepper.step(1)
            load = asyncio.create_task(server.load(2, goes_on=True))
            await asyncio.sleep(0.05)
            server.stepper.go()
            found = await exact
            assert [reply.version for reply in found] == [1] * 6
            assert [reply.token_ids for reply in found] == [alone(MODELS[1], s) for s in range(10, 16)]
            assert [reply.token_ids for reply in await other] == [alone(MODELS[1], 25, top_k=3)]
            assert [reply.version for reply in await later] == [2, 2]
            await load

    asyncio.run(run())


def test_models_that_are_sampled_chunk_by_chunk_get_new_weights_between_chunks() -> None:
    async def run() -> None:
        models = {version: model(version, "mistral") for version in (1, 2)}
        async with held(models) as server:
            server.stepper.hold()
            replies = server.ask(ask(1, *range(10, 16)))
            await server.stepper.step(1)
            load = asyncio.create_task(server.load(2, goes_on=True))
            await asyncio.sleep(0.05)
            server.stepper.go()
            found = await replies
            assert [reply.version for reply in found] == [1, 1, 2, 2, 2, 2]
            for seed, reply in zip(range(10, 16), found, strict=True):
                assert reply.token_ids == alone(models[reply.version], seed) and not reply.version_runs
            await load

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ it goes on


def with_other_head(lm: PreTrainedModel) -> PreTrainedModel:
    """Of the same keys and values."""
    other = copy.deepcopy(lm)
    with torch.no_grad():
        head = other.get_parameter("lm_head.weight")
        head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(9)))
    return other


@pytest.mark.parametrize("reading_waits", [False, True], ids=["cpu", "gpu"])
def test_weights_apply_from_the_next_token_on(reading_waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_batching, "_reading_waits", lambda _device: reading_waits)

    async def run() -> None:
        models = {1: MODELS[1], 2: with_other_head(MODELS[1]), 3: MODELS[1]}
        async with held(models, slots=3) as server:
            server.stepper.hold()
            replies = server.ask(ask(1, *range(10, 15)))
            for version, steps in ((2, 5), (3, 3)):
                await server.stepper.step(steps)
                load = asyncio.create_task(server.load(version, goes_on=True))
                await until(lambda: len(server.sampler._jobs) > 0)
                await server.stepper.step(1)
                await load
            server.stepper.go()
            found = await replies
            # The prompt's pass gives a token, too. Weights come after the pass that they found under way.
            assert [reply.version_runs for reply in found[:3]] == [((1, 6), (2, 4), (3, 2))] * 3
            assert [reply.version for reply in found] == [1, 1, 1, 3, 3]
            assert all(not reply.version_runs for reply in found[3:])
            for reply in found:
                runs = reply.version_runs or ((reply.version, len(reply.token_ids)),)
                assert sum(count for _, count in runs) == len(reply.token_ids) == 12
                versions = [version for version, count in runs for _ in range(count)]
                by_version = {each: logprobs_under(models[each], reply.token_ids) for each in models}
                wanted = [by_version[version][place] for place, version in enumerate(versions)]
                assert reply.logprobs == pytest.approx(wanted, abs=1e-6)

    asyncio.run(run())


def test_what_went_on_under_new_weights_keeps_its_first_tokens() -> None:
    async def run() -> None:
        async with held(MODELS) as server:
            server.stepper.hold()
            replies = server.ask(ask(1, 10, 11))
            await server.stepper.step(4)
            load = asyncio.create_task(server.load(2, goes_on=True))
            await until(lambda: len(server.sampler._jobs) > 0)
            server.stepper.go()
            for seed, reply in zip((10, 11), await replies, strict=True):
                (first, count), (second, rest) = reply.version_runs
                assert (first, second, count + rest) == (1, 2, 12)
                wanted = alone(MODELS[1], seed)
                assert reply.token_ids[:count] == wanted[:count] and reply.token_ids != wanted
            await load

    asyncio.run(run())


def test_runs_end_where_a_stop_string_cuts() -> None:
    async def run() -> None:
        async with held({1: MODELS[1], 2: MODELS[1]}) as server:
            server.stepper.hold()
            last = alone(MODELS[1], 10)[5]
            request = ask(1, 10, stop=(TOKENIZER.convert_ids_to_tokens(last),))
            replies = server.ask(request)
            await server.stepper.step(2)
            load = asyncio.create_task(server.load(2, goes_on=True))
            await until(lambda: len(server.sampler._jobs) > 0)
            server.stepper.go()
            (reply,) = await replies
            await load
            first, second = reply.version_runs
            assert reply.finish_reason == "stop" and first[0] == 1 and second[0] == 2
            assert first[1] + second[1] == len(reply.token_ids)

    asyncio.run(run())


# -------------------------------------------------------------------------------------------- what goes wrong


def test_weights_that_are_not_loaded_end_what_waits_for_them() -> None:
    async def run(goes_on: bool) -> None:
        async with held({**MODELS, 4: model(4, "llama")}) as server:
            server.stepper.hold()
            request = ask(1, *range(10, 16))
            server.server.check(request)
            lines: list[str] = []

            async def read() -> None:
                async for line in server.server.completion_lines(request):
                    lines.append(line)

            reading = asyncio.create_task(read())
            await server.stepper.step(2)
            load = asyncio.create_task(server.load(4, goes_on=goes_on))
            await until(lambda: len(server.sampler._jobs) > 0)
            server.stepper.go()
            with pytest.raises(HTTPException, match="not the weights of a GPTJForCausalLM"):
                await load
            await asyncio.wait_for(reading, WAIT_S)
            assert len(lines) == (1 if goes_on else 3) and "not loaded" in lines[-1]
            await server.load(2)
            assert [reply.version for reply in await server.replies(request)] == [2] * 6

    asyncio.run(run(goes_on=False))
    asyncio.run(run(goes_on=True))


def test_reader_that_leaves_frees_the_slots_for_others() -> None:
    async def run() -> None:
        async with held(MODELS) as server:
            server.stepper.hold()
            gone = asyncio.create_task(server.replies(ask(1, *range(10, 20))))
            await server.stepper.step(2)
            stays = server.ask(ask(1, 30))
            await until(lambda: len(server.sampler._jobs) > 0)
            await server.stepper.step(1)
            assert len(server.sampler._jobs) == 0, "it joined"
            gone.cancel()
            await asyncio.wait([gone])
            before = server.stepper.passes
            server.stepper.go()
            (reply,) = await stays
            assert reply.token_ids == alone(MODELS[1], 30)
            assert server.stepper.passes - before <= 12 + 2, "nothing of the others was sampled"
            await until(lambda: len(server.sampler._jobs) == 0)

    asyncio.run(run())


def test_weights_that_are_handed_over_are_refused_at_the_port() -> None:
    update = WeightUpdate(weights=WeightVersion(source="run", version=1), handed=True)
    with served(MODELS[1], TOKENIZER) as server, httpx2.Client(trust_env=False, timeout=WAIT_S) as client:
        answer = client.post(f"http://{server.address}/weights", json=update.model_dump(mode="json"))
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith("weights that are `handed` over come with a call in this")


# ----------------------------------------------------------------------------------------------- it is exact


def test_what_comes_to_an_idle_sampler_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    lm = tiny_decoder("llama", seed=4, dtype=torch.float32)

    async def sampled(*, after: bool) -> list[CompletionReply]:
        async with held({1: lm, 2: lm}, slots=4) as server:
            if after:  # other requests, of which one was left
                await server.replies(ask(1, *range(30), max_new_tokens=20))
                gone = server.ask(ask(1, *range(3)))
                await asyncio.sleep(0.01)
                gone.cancel()
                await asyncio.wait([gone])
                await server.load(2)
                await until(lambda: len(server.sampler._jobs) == 0)
            waits = server.ask(ask(2, *range(100, 111)))
            if not after:
                await asyncio.sleep(0.02)
                await server.load(2)
            return await waits

    first, second = asyncio.run(sampled(after=False)), asyncio.run(sampled(after=True))
    assert first == second, "token ids and log-probs alike"


def test_prompts_that_join_between_two_readings_begin_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_batching, "_reading_waits", lambda _device: True)
    lm, found = model(0, "llama"), dict[int, Rollout]()
    config = GenerationConfig(max_new_tokens=12, chunk_size=16)
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)
    later = [[seed] for seed in range(16, 40)]  # one at each step, while rows end

    def join(under_way: UnderWay) -> None:
        seeds = later.pop(0) if later else []
        under_way.add([Prompt("", (0, 1, 2))] * len(seeds), seeds)

    engine.generate_joined(
        [Prompt("", (0, 1, 2))] * 16,
        range(16),
        join,
        greedy=False,
        on_finished=lambda ended: found.update(ended),
    )
    assert [found[seed].completion.token_ids for seed in range(40)] == [alone(lm, seed) for seed in range(40)]


@pytest.mark.parametrize(("begun", "joins_after"), [(2, 3), (16, 12)], ids=["further slots", "freed slots"])
def test_prompt_that_joins_while_tokens_are_unread_changes_no_other(
    begun: int, joins_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 3 steps there are slots to add; after 12, three behind a reading, those of rows that ended."""
    monkeypatch.setattr(continuous_batching, "_reading_waits", lambda _device: True)
    lm, found, steps = model(0, "llama"), dict[int, Rollout](), 0
    config = GenerationConfig(max_new_tokens=24, chunk_size=16)
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)

    def join(under_way: UnderWay) -> None:
        nonlocal steps
        steps += 1
        if steps == joins_after:
            under_way.add([Prompt("", (0, 1, 2))], [begun])

    engine.generate_joined(
        [Prompt("", (0, 1, 2))] * begun,
        range(begun),
        join,
        greedy=False,
        on_finished=lambda ended: found.update(ended),
    )
    wanted = [alone(lm, seed, max_new_tokens=24) for seed in range(begun + 1)]
    assert [found[seed].completion.token_ids for seed in range(begun + 1)] == wanted
    assert begun == 2 or min(map(len, wanted[:begun])) < 8, "a slot is free after the first reading"


# ------------------------------------------------------------------------------------------------ its clock


def test_busy_time_is_the_time_in_which_something_is_sampled() -> None:
    with served(MODELS[1], TOKENIZER) as server, closing(ServerClient(server.address, WAIT_S)) as client:
        server.server._weights = WeightVersion(source="run", version=1)
        server.sampler._jobs.source = "run"
        idle = client.health()
        assert idle.busy_s == 0.0 <= idle.clock_s
        stepper = Stepper(server.sampler._lm)
        list(client.completions(ask(1, 5)))
        before = client.health()
        stepper.hold()
        asking = threading.Thread(target=lambda: list(client.completions(ask(1, 5))))
        asking.start()
        wait_until(lambda: client.health().busy_s > before.busy_s + 0.2, lambda: "it is idle")
        stepper.go()
        asking.join(WAIT_S)
        wait_until(lambda: client.health().busy_s == client.health().busy_s, lambda: "it is still busy")
        after = client.health()
        assert before.busy_s + 0.2 < after.busy_s <= after.clock_s
