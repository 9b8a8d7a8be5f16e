"""A stream over rollout servers with transformers: the weights that they get, and what they sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conch.config import GenerationConfig, RolloutConfig, load
from conch.errors import ConchError
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.remote.stream import GroupRequest, GroupStream
from conch.rollouts.weight_sync import checkpoint_tensors
from conch.types import Prompt, Rollout
from tests.footprint import wait_until
from tests.tiny import char_tokenizer, tiny_decoder
from tests.transformers_servers import ServedTransformers, served

LETTERS = "abcdefghijklmnopqrstu"
TOKENIZER = char_tokenizer(LETTERS)
GENERATION = GenerationConfig(max_new_tokens=6)
TEXTS = ["a", "bcd", "hgf", "aabbccd"]


class Streamed:
    """A stream, and the rollouts that it has brought, by number and place."""

    def __init__(self, *servers: ServedTransformers, lm: PreTrainedModel, weights: str) -> None:
        urls = ",".join(server.address for server in servers)
        config = load(RolloutConfig, {"urls": urls, "weights": weights})
        self.pool = ServerPool(config, lambda: lm, source=f"run-{id(lm)}", sends_weights=True)
        self.pool.check()
        self.rollouts: dict[tuple[int, int], Rollout] = {}
        self.failures: list[ConchError] = []
        self.stream = GroupStream(
            self.pool,
            GENERATION,
            int(TOKENIZER.eos_token_id),  # pyright: ignore[reportArgumentType]
            deadline_s=60.0,
            goes_on=False,
            on_completion=self._take,
            on_failure=self.failures.append,
        )

    def _take(self, number: int, place: int, rollout: Rollout) -> None:
        assert (number, place) not in self.rollouts
        self.rollouts[number, place] = rollout

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.rollouts) >= count or bool(self.failures), lambda: "not all come", 60.0)
        assert not self.failures, self.failures

    def close(self) -> None:
        self.stream.close()
        self.pool.close()


@contextmanager
def streamed(*servers: ServedTransformers, lm: PreTrainedModel, weights: str) -> Iterator[Streamed]:
    with closing(Streamed(*servers, lm=lm, weights=weights)) as stream:
        yield stream


def groups(version: int, size: int = 3) -> list[GroupRequest]:
    return [
        GroupRequest(
            number,
            Prompt(text, tuple(LETTERS.index(letter) for letter in text)),
            tuple(range(100 * number, 100 * number + size)),
            version,
        )
        for number, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("weights", ["files", "broadcast"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_server_holds_the_weights_of_the_moment_bit_for_bit(family: str, weights: str) -> None:
    lm = tiny_decoder(family)
    with (
        served(tiny_decoder(family, seed=1), TOKENIZER) as server,
        streamed(server, lm=lm, weights=weights) as run,
    ):
        for version in range(3):
            moment = {name: tensor.clone() for name, tensor in checkpoint_tensors(lm).items()}
            run.stream.hand_over(version)
            with torch.no_grad():
                for parameter in lm.parameters():
                    parameter.add_(torch.randn_like(parameter))
            run.stream.wait_for_weights()
            held = checkpoint_tensors(server.sampler._lm)
            assert held.keys() == moment.keys()
            assert all(torch.equal(held[name], moment[name]) for name in moment)


def test_stream_samples_what_an_engine_samples_by_the_same_seeds() -> None:
    lm = tiny_decoder("gpt2")
    with (
        served(tiny_decoder("gpt2", seed=1), TOKENIZER) as first,
        served(tiny_decoder("gpt2", seed=2), TOKENIZER) as second,
        streamed(first, second, lm=lm, weights="files") as run,
    ):
        torch.manual_seed(7)
        seeds = torch.randint(2**31, (12,)).tolist()
        requests = [
            GroupRequest(group.number, group.prompt, tuple(seeds[3 * place : 3 * place + 3]), 0)
            for place, group in enumerate(groups(0))
        ]
        run.stream.hand_over(0)
        run.stream.wait_for_weights()
        run.stream.submit(requests)
        run.wait_for(12)
        engine: Any = RemoteEngine(run.pool, TOKENIZER, GENERATION, version=lambda: 0, deadline_s=60.0)
        torch.manual_seed(7)
        wanted = [
            rollout
            for chunk in engine.generate([group.prompt for group in requests for _ in group.seeds])
            for rollout in chunk
        ]
    for number, group in enumerate(requests):
        for place in range(3):
            found, other = run.rollouts[number, place], wanted[3 * number + place]
            assert found.prompt is group.prompt and found.policy_version == 0
            assert found.completion.token_ids == other.completion.token_ids
            assert found.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-9)
