"""Rows that take the places of rows that have ended are what they are alone, and cost what they must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, PreTrainedModel

from conch.config import GenerationConfig
from conch.models.forward import ForwardInputs, takes_packed_rows
from conch.models.policy import response_logits
from conch.ops import logprobs_of_labels
from conch.rollouts.hf import continuous_batching
from conch.rollouts.hf.engine import HFEngine
from conch.types import Prompt, Rollout
from tests.tiny import DECODERS, char_tokenizer, cycle_decoder, tiny_decoder

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
TEXTS = ("abc", "d", "efghi", "a", "abc", "kl", "m", "abc", "nopq", "r")


def prompts(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(text, tuple(TOKENIZER(text).input_ids)) for text in texts]


def sample(
    lm: PreTrainedModel,
    texts: Sequence[str],
    *,
    greedy: bool = False,
    processors: Any = None,
    **settings: Any,
) -> list[Rollout]:
    from contextlib import nullcontext

    engine = HFEngine(
        lambda: lm,
        TOKENIZER,
        GenerationConfig(**settings),
        version=lambda: 0,
        processors=lambda: nullcontext(processors or ()),
    )
    torch.manual_seed(0)
    return [rollout for chunk in engine.generate(prompts(texts), greedy=greedy) for rollout in chunk]


def counted(lm: PreTrainedModel) -> list[tuple[int, int]]:
    """Rows and columns of each forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    lm.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize(
    ("spare", "on_gpu"),
    [(1, False), (64, False), (1, True)],
    ids=["growing buffers", "wide buffers", "as on a GPU"],
)
@pytest.mark.parametrize("family", DECODERS)
def test_rows_in_few_slots_are_what_they_are_alone(
    family: str, spare: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_SPARE_COLUMNS", spare)
    monkeypatch.setattr(continuous_batching, "_reading_waits", lambda _device: on_gpu)
    lm = tiny_decoder(family)
    settings: dict[str, Any] = {"max_new_tokens": 9, "stop": ("c", "ab", "q")}
    found = sample(lm, TEXTS, greedy=True, chunk_size=3, **settings)
    alone = [sample(lm, [text], greedy=True, chunk_size=1, **settings)[0] for text in TEXTS]

    assert [r.prompt.text for r in found] == list(TEXTS)
    assert [r.completion.token_ids for r in found] == [r.completion.token_ids for r in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_logprobs_of_rows_that_took_a_place_equal_recomputed_ones(family: str) -> None:
    lm = tiny_decoder(family)
    found = sample(lm, TEXTS * 3, chunk_size=4, max_new_tokens=8, temperature=1.3)
    assert len({len(r.completion.token_ids) for r in found}) > 1, "some make room early"
    for rollout in found:
        prompt, response = rollout.prompt.token_ids, rollout.completion.token_ids
        ids = torch.tensor([[*prompt, *response]])
        logits = response_logits(
            lm, ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), len(response))
        )
        expected = logprobs_of_labels(logits, torch.tensor([response]), 1.3)[0]
        assert rollout.completion.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_prompt_of_a_group_is_read_once() -> None:
    lm = tiny_decoder("gpt2")
    assert takes_packed_rows(lm)
    shapes = counted(lm)
    found = sample(lm, ["abcd"] * 5 + ["ef"] * 3, chunk_size=8, max_new_tokens=4)
    assert len({r.completion.text for r in found[:5]}) > 1, "each has a completion of its own"
    assert shapes[3:5] == [(2, 4), (8, 1)], "after the three passes that try the model out"


def test_ended_rows_make_room_and_are_dropped_in_the_end() -> None:
    lm = cycle_decoder(TOKENIZER)
    shapes = counted(lm)
    # From t it is two tokens to the end, from a 12 to the limit: no row waits for the first to end.
    texts = ["a", "t", "t", "t", "t", "t", "t"]
    found = sample(lm, texts, greedy=True, chunk_size=2, max_new_tokens=12)
    assert [r.completion.text for r in found] == ["bcdefghijklm", *["u"] * 6]
    assert len(shapes[3:]) < 6 + 12 and shapes[-1] == (1, 1)
    assert sum(rows for rows, _ in shapes[3:]) <= 2 + 5 + 2 * 11


def test_a_free_slot_whose_columns_are_not_looked_at_any_more_does_no_harm() -> None:
    lm = cycle_decoder(TOKENIZER)
    # Four prompts of one token stand in column 9, beside a long one; all end, and four of them are replaced.
    texts = ["klmnopqrst", *"tttt", *"aaaa"]
    found = sample(lm, texts, chunk_size=5, max_new_tokens=6)
    assert [r.completion.text for r in found] == ["u"] * 5 + ["bcdefg"] * 4


@pytest.mark.parametrize("longest", range(2, 12))
def test_rows_that_are_seldom_looked_at_end_where_the_model_has_no_more_positions(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "_reading_waits", lambda _device: True)
    lm = tiny_decoder("gpt2", n_positions=5 + longest)
    found = sample(lm, TEXTS, chunk_size=4, max_new_tokens=longest)
    assert max(len(r.completion.token_ids) for r in found) == longest
    assert max(map(len, TEXTS)) == 5


class Forbid(LogitsProcessor):
    """Notes what rows were read, and forbids their last token to come again."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.seen += input_ids.tolist()
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class ForbidByLast(Forbid):
    reads_history = False


def test_a_processor_that_is_content_with_the_last_token_is_told_that_alone() -> None:
    lm, processor = tiny_decoder("gpt2"), ForbidByLast()
    settings: dict[str, Any] = {"chunk_size": 4, "max_new_tokens": 6, "temperature": 1.3}
    found = sample(lm, TEXTS, processors=[processor], **settings)
    expected = sample(lm, TEXTS, processors=[Forbid()], **settings)
    assert {len(row) for row in processor.seen} == {1}
    assert found == expected


@pytest.mark.parametrize("kind", [Forbid, ForbidByLast])
def test_a_prompt_of_a_group_is_read_once_with_processors_too(kind: type[Forbid]) -> None:
    lm, processor = tiny_decoder("gpt2"), kind()
    shapes = counted(lm)
    sample(lm, ["abcd"] * 5 + ["ef"] * 3, chunk_size=8, max_new_tokens=4, processors=[processor])
    assert shapes[3:5] == [(2, 4), (8, 1)], "after the three passes that try the model out"
    assert [row[-1] for row in processor.seen[:2]] == TOKENIZER("df").input_ids


def test_processors_are_told_what_each_row_has_read() -> None:
    lm, processor = tiny_decoder("gpt2"), Forbid()
    found = sample(lm, TEXTS, chunk_size=3, max_new_tokens=6, processors=[processor])
    pad = TOKENIZER.pad_token_id
    assert all(row[-1] != pad for row in processor.seen), "free slots are not shown"
    histories = {tuple(token for token in row if token != pad) for row in processor.seen}
    for rollout in found:
        read = (*rollout.prompt.token_ids, *rollout.completion.token_ids)
        assert all(
            one != other
            for one, other in zip(
                read[len(rollout.prompt.token_ids) - 1 :], read[len(rollout.prompt.token_ids) :], strict=False
            )
        )
        for length in range(len(rollout.prompt.token_ids), len(read)):
            assert read[:length] in histories


def bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model("bloom", **shape, pad_token_id=21, eos_token_id=22)
    return AutoModelForCausalLM.from_config(config).eval()


def narrow() -> PreTrainedModel:
    return tiny_decoder("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)


@pytest.mark.parametrize("made", [bloom, narrow])
def test_models_that_cannot_share_a_cache_are_sampled_chunk_by_chunk(made: Any) -> None:
    lm = made()
    shapes = counted(lm)
    found = sample(lm, TEXTS, greedy=True, chunk_size=3, max_new_tokens=4)
    alone = [sample(lm, [text], greedy=True, chunk_size=1, max_new_tokens=4)[0] for text in TEXTS]
    assert [r.completion.token_ids for r in found] == [r.completion.token_ids for r in alone]
    assert (3, 5) in shapes, "the first chunk, padded to its longest prompt"
