"""Families with other positions, memories and masks score a sample in any batch as they do alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conch.config import GenerationConfig as Sampling
from conch.models.attention import check_packing, sliding_window, takes_left_padding
from conch.models.forward import BatchPacker, ForwardBatch, padded_rows
from conch.models.loading import context_window, disable_dropout
from conch.models.policy import decoder_start, response_logits
from conch.ops import logprobs_of_labels
from conch.rollouts.hf.engine import HFEngine
from conch.types import Prompt, Rollout
from tests.odd_families import (
    DECODERS,
    ENCODER_DECODERS,
    PACKED,
    TOKENIZER,
    gemma3_config,
    odd_config,
    odd_model,
)
from tests.runs import ppo_trainer
from tests.tiny import padded_batch

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
RESPONSES = [[15, 16, 17], [18, 19, 20, 4, 3], [8]]


@torch.no_grad()
def alone(lm: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probs of a response as the architecture itself gives them, without mask and positions."""
    if lm.config.is_encoder_decoder:
        read = torch.cat([decoder_start(lm, 1), torch.tensor([response[:-1]], dtype=torch.long)], dim=1)
        logits = lm(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0, -len(response) :]
    else:
        ids = torch.tensor([prompt + response])
        # RoBERTa itself would take a sampled pad token for padding, and counts from 1 behind its id.
        lies = lm.config.model_type == "roberta" and 21 in response
        places = {"position_ids": torch.arange(22, 22 + ids.shape[1])[None]} if lies else {}
        logits = lm(input_ids=ids, use_cache=False, **places).logits[0, len(prompt) - 1 : -1]
    return logprobs_of_labels(logits[None], torch.tensor([response]))[0]


def check_rows(lm: PreTrainedModel, rows: ForwardBatch) -> None:
    found = rows.logprobs(response_logits(lm, rows.inputs), 1.0)
    for row, prompt, response in zip(found, PROMPTS, RESPONSES, strict=True):
        torch.testing.assert_close(row[: len(response)], alone(lm, prompt, response), rtol=0, atol=1e-5)


def a_batch() -> tuple[Tensor, Tensor, int]:
    return padded_batch(PROMPTS, RESPONSES, 21)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
@torch.no_grad()
def test_a_padded_sample_scores_as_alone(family: str) -> None:
    lm = odd_model(family)
    check_rows(lm, padded_rows(*a_batch()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_packing_is_found_out_and_scores_as_alone(family: str, dtype: torch.dtype) -> None:
    """None crashes the packer, none is refused for rounding, and none packs that cannot."""
    lm = odd_model(family, dtype=dtype)
    packer = BatchPacker(lm)
    assert packer.packs is (family in PACKED)
    if dtype == torch.float32:
        check_rows(lm, packer.pack(*a_batch()))


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "switch_transformers"])
@torch.no_grad()
def test_routers_are_silent_in_training_mode_and_as_they_were_in_evaluation(family: str) -> None:
    lm = odd_model(family)
    ids = torch.arange(20).view(2, 10)
    inputs = {"decoder_input_ids": ids} if lm.config.is_encoder_decoder else {}
    expected = lm(input_ids=ids, **inputs).logits
    lm.train()
    assert not torch.equal(lm(input_ids=ids, **inputs).logits, expected), "there was no noise to silence"
    disable_dropout(lm)
    assert torch.equal(lm(input_ids=ids, **inputs).logits, expected)
    lm.train()
    assert torch.equal(copy.deepcopy(lm)(input_ids=ids, **inputs).logits, expected)
    assert torch.equal(lm.eval()(input_ids=ids, **inputs).logits, expected)
    assert lm.config.router_jitter_noise == odd_config(family).router_jitter_noise, "it is saved as it was"


@torch.no_grad()
def test_chunks_of_attention_are_a_window() -> None:
    """Llama 4's token sees those of its own chunk; a packed row's mask would let it see further back."""
    lm = odd_model("llama4_text")
    assert sliding_window(lm.config) == 5
    packer = BatchPacker(lm)
    assert packer.pack(*a_batch()).inputs.position_ids is None, "samples are longer than a chunk"
    short = padded_batch([[5, 6], [7]], [[8, 9], [10]], 21)
    assert packer.pack(*short).inputs.position_ids is not None
    with pytest.raises(Exception, match="sliding window of 5 tokens"):
        check_packing(lm, 6)


def test_window_of_a_model_of_text_and_images_is_its_text_model_s() -> None:
    config = gemma3_config(sliding_window=7)
    assert sliding_window(config) == 7 and context_window(config) == 32


# --------------------------------------------------------------------------------------------------- sampling


def sample(lm: PreTrainedModel, prompts: list[list[int]], **settings: Any) -> list[Rollout]:
    """Greedy completions of all prompts in one chunk."""
    config = Sampling(max_new_tokens=6, chunk_size=8, **settings)
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)
    reported: dict[int, Rollout] = {}
    given = [Prompt("", tuple(ids)) for ids in prompts]
    [found] = list(engine.generate(given, greedy=True, on_finished=reported.update))
    assert [reported[index] for index in range(len(prompts))] == found
    return found


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
@torch.no_grad()
def test_prompts_of_several_lengths_are_completed_as_alone(family: str) -> None:
    """RWKV and RecurrentGemma remember padding, encoders with positions count it."""
    lm = odd_model(family)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 4, 5], [14, 15], [1]]
    for rollout, ids in zip(sample(lm, prompts), prompts, strict=True):
        [other] = sample(lm, [ids])
        completion = rollout.completion
        assert completion.token_ids == other.completion.token_ids
        expected = alone(lm, ids, [*completion.token_ids]).tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "mamba", "falcon", "bart", "bert"])
def test_padding_before_a_prompt_is_found_out(family: str) -> None:
    lm = odd_model(family).train()
    assert takes_left_padding(lm) is (family not in ("rwkv", "recurrent_gemma")) and lm.training


# ------------------------------------------------------------------------------ the first token of a decoder


@pytest.mark.parametrize("family", ["mbart", "bart"])
@torch.no_grad()
def test_forced_first_token_is_read_and_not_chosen(family: str) -> None:
    """mBART and NLLB name the language to write with it: without it they write another."""
    lm = odd_model(family)
    lm.generation_config.forced_bos_token_id = 4  # pyright: ignore[reportOptionalMemberAccess]
    assert decoder_start(lm, 2).tolist() == [[2, 4], [2, 4]]
    prompts = [[5, 6, 7, 8], [9, 10]]
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 21, 21]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    wanted = lm.generate(  # pyright: ignore[reportCallIssue]  typed as a Tensor attribute
        ids,
        attention_mask=mask,
        decoder_start_token_id=2,
        forced_bos_token_id=4,
        forced_eos_token_id=None,
        max_new_tokens=7,
        do_sample=False,
        num_beams=1,
    )
    for rollout, row in zip(sample(lm, prompts), wanted.tolist(), strict=True):
        assert row[:2] == [2, 4]
        completion = rollout.completion
        assert [*completion.token_ids] == row[2 : 2 + len(completion.token_ids)]
    check_rows(lm, padded_rows(*a_batch()))


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "family", [*ENCODER_DECODERS, "rwkv", "recurrent_gemma", "roberta", "mixtral", "phimoe"]
)
def test_the_first_ratio_is_one(family: str, tmp_path: Path) -> None:
    """What is sampled, what is scored and what is trained are one policy, before it has moved."""
    lm = odd_model(family)
    if family == "mbart":
        lm.generation_config.forced_bos_token_id = 4  # pyright: ignore[reportOptionalMemberAccess]
    trainer = ppo_trainer(
        tmp_path,
        lm=lm,
        tokenizer=TOKENIZER,
        prompts=["abcdefg", "hi", "jkl", "m", "nopq", "rs", "tuabc", "d"],
        ppo={"epochs": 2},
        optimizer={"learning_rate": 1e-12},
    )
    metrics = trainer.step()
    assert metrics["train/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["train/clip_fraction"] == 0 == metrics["train/clip_fraction_first"]
    assert abs(metrics["policy/kl"]) < 1e-5
    assert metrics["rollout/logprob_diff"] < 1e-5
