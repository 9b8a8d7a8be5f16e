"""Rows that take the places of rows that have ended are what they are alone, and cost what they must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    engine = engine_of(lm, processors=processors, **settings)
    torch.manual_seed(0)
    return [rollout for chunk in engine.generate(prompts(texts), greedy=greedy) for rollout in chunk]


def engine_of(
    lm: PreTrainedModel, *, version: Callable[[], int] = lambda: 0, processors: Any = None, **settings: Any
) -> HFEngine:
    return HFEngine(
        lambda: lm,
        TOKENIZER,
        GenerationConfig(**settings),
        version=version,
        processors=lambda: nullcontext(processors or ()),
    )


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
    # One engine for all: each tries the model out before its first pass.
    engine = engine_of(lm, chunk_size=1, **settings)
    alone = [next(engine.generate(prompts([text]), greedy=True))[0] for text in TEXTS]

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


def test_a_prompt_is_read_once_however_many_completions_wait_for_a_slot() -> None:
    lm = tiny_decoder("gpt2")
    shapes = counted(lm)
    found = sample(lm, ["abcd"] * 40 + ["efg"] * 40, chunk_size=4, max_new_tokens=4)
    reads = [shape for shape in shapes[3:] if shape[1] > 1]
    assert len({r.completion.text for r in found[:40]}) > 5, "each has a completion of its own"
    assert reads in ([(1, 4), (1, 3)], [(1, 4), (1, 4)]), "after the three passes that try the model out"


@pytest.mark.parametrize("family", DECODERS)
def test_seeded_completions_of_a_shared_prompt_are_those_that_read_it_alone(family: str) -> None:
    lm = tiny_decoder(family)
    texts = ["abcdefgh"] * 13 + ["ij"] * 9 + ["abcdefgh"] * 3
    engine = engine_of(lm, chunk_size=4, max_new_tokens=6)
    seeds = [100 + number for number in range(len(texts))]
    together = [rollout for chunk in engine.generate(prompts(texts), seeds=seeds) for rollout in chunk]
    for text, seed, one in zip(texts, seeds, together, strict=True):
        ((other,),) = engine.generate(prompts([text]), seeds=[seed])
        assert one.completion.token_ids == other.completion.token_ids
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)


def test_a_shared_prompt_is_read_again_once_the_weights_have_changed() -> None:
    lm = tiny_decoder("gpt2")
    updates = [0]
    engine = engine_of(lm, version=lambda: updates[0], chunk_size=2, max_new_tokens=3)
    generation = engine.generate(prompts(["abcd"] * 12), greedy=True)
    before = next(generation)[0].completion
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    updates[0] = 1
    *_, last = [rollout for chunk in generation for rollout in chunk]
    ((alone,),) = engine_of(lm, chunk_size=1, max_new_tokens=3).generate(prompts(["abcd"]), greedy=True)
    assert last.policy_version == 1
    assert last.completion.logprobs == pytest.approx(alone.completion.logprobs, abs=1e-5)
    assert last.completion.logprobs != pytest.approx(before.logprobs, abs=1e-3)


@torch.no_grad()
def test_kept_prompts_are_few_and_forgotten_with_the_last_that_waits() -> None:
    lm = tiny_decoder("gpt2")
    rows = [tuple(TOKENIZER(letter).input_ids) for letter in "abcdefghijklmnop"]
    batcher = continuous_batching.ContinuousBatcher(
        lm, rows * 3, num_slots=16, max_new_tokens=2, pad_id=TOKENIZER.pad_token_id, has_ended=lambda _: False
    )
    sampling = continuous_batching.Sampling((), (), greedy=True)
    most = 0
    while not batcher.is_done:
        batcher.advance(sampling)
        most = max(most, len(batcher._read_prompts))
    assert most == 2
    assert not batcher._read_prompts


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
