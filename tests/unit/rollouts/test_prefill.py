"""Prompts of like length share a pass; what is sampled does not tell which of them did."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from conch.rollouts.hf import continuous_batching
from conch.rollouts.hf.prefill import pass_cost, prefill_passes
from conch.types import Rollout
from tests.tiny import DECODERS, tiny_decoder
from tests.unit.rollouts.test_continuous_batching import (
    TOKENIZER,
    Forbid,
    ForbidByLast,
    counted,
    engine_of,
    prompts,
)

SHORT, MEDIUM, LONG = "abc", "defghijk", "lmnopqrstuabcdefghij"
TEXTS = (SHORT, "d", LONG, MEDIUM, "a", "kl", "m", *[MEDIUM] * 3, "nopq", LONG[::-1], "r", "b")


def total(lengths: Sequence[int], passes: Sequence[Sequence[int]], cost: int) -> int:
    """Tokens that are computed, padding and what passes cost included."""
    return sum(len(rows) * max(lengths[row] for row in rows) + cost for rows in passes)


@pytest.mark.parametrize(
    ("lengths", "cost", "expected"),
    [
        ([10, 1, 1, 1, 10], 26, [[0, 4], [1, 2, 3]]),  # 3 prompts are spared 9 columns
        ([10, 1, 1, 1, 10], 27, [[0, 1, 2, 3, 4]]),
        ([9, 5, 1, 5], 3, [[0], [1, 3], [2]]),
        ([7, 7, 7], 0, [[0, 1, 2]]),
        ([], 0, []),
    ],
)
def test_a_pass_is_split_where_that_saves_more_than_a_pass_costs(
    lengths: list[int], cost: int, expected: list[list[int]]
) -> None:
    assert prefill_passes(lengths, cost) == expected


def test_no_pass_is_left_that_a_split_would_make_cheaper() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths, cost = draw.choices(range(1, 60), k=draw.randint(1, 12)), draw.randint(0, 80)
        passes = prefill_passes(lengths, cost)
        assert sorted(itertools.chain(*passes)) == [*range(len(lengths))]
        assert total(lengths, passes, cost) <= total(lengths, [range(len(lengths))], cost)
        for rows in passes:
            ordered = sorted(rows, key=lambda row: lengths[row])
            splits = [(ordered[:count], ordered[count:]) for count in range(1, len(ordered))]
            assert all(total(lengths, split, cost) >= total(lengths, [rows], cost) for split in splits)


def test_a_pass_costs_what_is_computed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        costs.append(pass_cost(torch.device("cpu")))
    assert costs == [32, 128]
    assert len(prefill_passes([200, 20, 20, 20], costs[1])) == 2
    assert len(prefill_passes([200, 20, 20, 20], pass_cost(torch.device("cuda")))) == 1


def sampled(
    family: str, cost: int, monkeypatch: pytest.MonkeyPatch, *, processors: Any = None, **settings: Any
) -> list[Rollout]:
    """Rollouts where a further pass costs so much."""
    monkeypatch.setattr(continuous_batching, "pass_cost", lambda _device: cost)
    settings = {"max_new_tokens": 9, "temperature": 1.3, "stop": ("q",), **settings}
    seeds = settings.pop("seeds", None)
    engine = engine_of(tiny_decoder(family), processors=processors, **settings)
    torch.manual_seed(0)
    return [each for chunk in engine.generate(prompts(TEXTS), seeds=seeds) for each in chunk]


@pytest.mark.parametrize("spare", [1, 64], ids=["buffers that grow and narrow", "wide buffers"])
@pytest.mark.parametrize("seeds", [None, range(100, 100 + len(TEXTS))], ids=["one stream", "seeded"])
@pytest.mark.parametrize("slots", [3, len(TEXTS)])
@pytest.mark.parametrize("family", DECODERS)
def test_what_is_sampled_does_not_depend_on_the_passes(
    family: str, slots: int, seeds: Sequence[int] | None, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_SPARE_COLUMNS", spare)
    split, together = (
        sampled(family, cost, monkeypatch, chunk_size=slots, seeds=seeds) for cost in (0, 10**9)
    )
    assert len({each.completion.text for each in split}) > len(TEXTS) // 2
    for one, other in zip(split, together, strict=True):
        assert one.completion.token_ids == other.completion.token_ids
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)


@pytest.mark.parametrize("kind", [Forbid, ForbidByLast])
def test_processors_are_called_after_each_pass(
    kind: type[LogitsProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    split, together = (
        sampled("gpt2", cost, monkeypatch, chunk_size=8, processors=[kind()]) for cost in (0, 10**9)
    )
    for one, other in zip(split, together, strict=True):
        assert one.completion.token_ids == other.completion.token_ids
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)


def test_a_long_prompt_lengthens_no_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_batching, "pass_cost", lambda _device: 32)
    lm = tiny_decoder("gpt2")
    shapes = counted(lm)
    engine = engine_of(lm, chunk_size=8, max_new_tokens=4)
    list(engine.generate(prompts([SHORT, "def", LONG, "ghi", SHORT, "jkl"])))
    assert shapes[3:6] == [(1, len(LONG)), (4, len(SHORT)), (6, 1)], (
        "after three passes that try the model out"
    )


@torch.no_grad()
def test_slots_narrow_once_a_long_prompt_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_batching, "_SPARE_COLUMNS", 1)
    rows = [tuple(TOKENIZER(text).input_ids) for text in (LONG, *["a"] * 6)]
    batcher = continuous_batching.ContinuousBatcher(
        tiny_decoder("gpt2"),
        rows,
        num_slots=2,
        max_new_tokens=3,
        pad_id=0,
        has_ended=lambda _: False,
    )
    sampling = continuous_batching.Sampling((), (), greedy=True)
    widths = []
    while not batcher.is_done:
        batcher.advance(sampling)
        widths.append({buffer.shape[2] for cache in batcher._caches for buffer in cache._buffers})
    assert max(widths[0]) >= len(LONG) and max(widths[-1]) <= 6
