"""A rollout server is killed among the completions of a stream, and comes back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from conch.config import GenerationConfig, RolloutConfig
from conch.errors import ConchError
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.remote.stream import GroupRequest, GroupStream
from conch.types import Prompt, Rollout
from tests.footprint import wait_until
from tests.tiny import char_tokenizer, tiny_decoder
from tests.transformers_servers import READY_S, TransformersProcess

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
SIZE = 16


def groups(numbers: range, version: int) -> list[GroupRequest]:
    return [
        GroupRequest(
            number,
            Prompt("p", (number % 8, number // 8)),
            tuple(range(number * SIZE, (number + 1) * SIZE)),
            version,
        )
        for number in numbers
    ]


def test_each_completion_comes_once_though_a_server_is_killed_among_them(tmp_path: Path) -> None:
    lm = tiny_decoder("gpt2", dtype=torch.float32)
    lm.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    victim, other = (TransformersProcess(tmp_path, "max_num_seqs=4") for _ in range(2))
    told: list[tuple[int, int]] = []
    failures: list[ConchError] = []

    def take(number: int, place: int, rollout: Rollout) -> None:
        assert rollout.prompt.token_ids == (number % 8, number // 8)
        told.append((number, place))
        if len(told) == 10:
            victim.kill()

    try:
        for server in (victim, other):
            server.wait()
        config = RolloutConfig(urls=f"{victim.address},{other.address}", weights="broadcast")
        pool = ServerPool(config, lambda: lm, source="run", sends_weights=True)
        pool.check()
        stream = GroupStream(
            pool,
            GenerationConfig(max_new_tokens=24),
            int(TOKENIZER.eos_token_id),  # pyright: ignore[reportArgumentType]
            deadline_s=READY_S,
            goes_on=False,
            on_completion=take,
            on_failure=failures.append,
        )

        def wait_for(count: int) -> None:
            wait_until(lambda: len(told) >= count or bool(failures), lambda: str(stream.describe()), READY_S)
            assert not failures, failures

        with closing(pool), closing(stream):
            stream.hand_over(0)
            stream.wait_for_weights()
            stream.submit(groups(range(8), 0))
            wait_for(8 * SIZE)
            assert stream.describe()[0] == f"{victim.address} is away"
            stream.hand_over(1)  # reaches the one that lives, and the other once it is back
            victim.start()
            victim.wait()
            stream.submit(groups(range(8, 12), 1))
            wait_for(12 * SIZE)
            wait_until(
                lambda: all("holds version 1" in line for line in stream.describe()),
                lambda: str(stream.describe()),
            )
        assert sorted(told) == [(number, place) for number in range(12) for place in range(SIZE)]
    finally:
        for server in (victim, other):
            server.stop()
