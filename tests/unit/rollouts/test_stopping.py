"""Where completions end: by the model's configuration, by settings, and as `transformers.generate` does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import GenerationConfig as HFGenerationConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from conch.config import GenerationConfig, load
from conch.errors import ConfigError
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.stopping import StopCondition, configured_end_ids, with_end_ids
from conch.types import Prompt, Rollout
from tests.text_tokenizers import sentencepiece
from tests.tiny import char_tokenizer, constant_decoder

pytestmark = pytest.mark.unit

TOKENIZER = char_tokenizer("abcdef")
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<turn>", "<think>"]})  # pyright: ignore[reportArgumentType]
EOS, TURN, THINK = (int(TOKENIZER.convert_tokens_to_ids(token)) for token in ("<eos>", "<turn>", "<think>"))  # pyright: ignore[reportArgumentType]


def llama(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes, **settings))


def stop(**generation: Any) -> StopCondition:
    return StopCondition(TOKENIZER, GenerationConfig(**generation))


def completed(condition: StopCondition, ids: list[int]) -> tuple[str, int, str]:
    completion = condition.completion((0,), ids, [-0.5] * len(ids))
    assert len(completion.logprobs) == len(completion.token_ids)
    return completion.text, len(completion.token_ids), completion.finish_reason


@pytest.mark.parametrize(
    ("generation", "ids", "wanted"),
    [
        ({}, [1, 2, EOS, 3], ("bc", 3, "eos")),
        ({}, [1, TURN, 2], ("bc", 3, "length")),
        ({"stop_token_ids": (TURN,)}, [1, TURN, 2], ("b", 2, "eos")),
        ({"stop_token_ids": (2,)}, [1, 2, 3], ("b", 2, "eos")),
        ({"stop": ("<turn>",)}, [1, TURN, 2], ("b", 2, "eos")),
        ({"stop": ("<turn>", "cd")}, [1, 2, 3, TURN], ("b", 1, "stop")),
        ({"skip_special_tokens": False}, [THINK, 1, EOS], ("<think>b", 3, "eos")),
        ({"skip_special_tokens": False, "stop": ("<think>b",)}, [0, THINK, 1, 2], ("a", 1, "stop")),
    ],
)
def test_completions_end_with_end_ids_and_before_stop_strings(
    generation: dict[str, Any], ids: list[int], wanted: tuple[str, int, str]
) -> None:
    condition = stop(**generation)
    assert completed(condition, ids) == wanted
    reached = [condition.ends(ids[: length + 1]) for length in range(len(ids))]
    assert any(reached) == (wanted[2] != "length")


def test_a_stop_string_that_decoding_never_shows_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"holds 'a<turn>', which can never be found: .* give '<turn>' alone"
    ):
        stop(stop=("a<turn>",))
    assert completed(stop(stop=("a<turn>",), skip_special_tokens=False), [1, 0, TURN, 2]) == ("b", 1, "stop")


@pytest.mark.parametrize("place", ["generation_config", "config"])
@pytest.mark.parametrize("named", [EOS, TURN, [TURN, EOS]])
def test_ids_of_the_models_own_configuration_end_completions(place: str, named: int | list[int]) -> None:
    model = llama()
    model.generation_config = HFGenerationConfig(eos_token_id=named if place == "generation_config" else None)
    model.config.eos_token_id = named if place == "config" else 1
    listed = named if isinstance(named, list) else [named]
    assert configured_end_ids(model) == listed
    resolved = with_end_ids(GenerationConfig(), model, TOKENIZER)
    assert StopCondition(TOKENIZER, resolved).end_ids == {EOS, *listed}


def test_ordinary_words_and_ids_outside_the_vocabulary_end_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()  # whose class has 2 for eos, here the letter "c"
    model.generation_config = HFGenerationConfig(eos_token_id=[2, TURN, 50256])
    with caplog.at_level(logging.INFO, logger="conch"):
        resolved = with_end_ids(GenerationConfig(stop_token_ids=(3,)), model, TOKENIZER)
    assert resolved.stop_token_ids == (3, TURN)
    assert "ids [2] end a text by the model's configuration, and are ordinary tokens" in caplog.text


@pytest.mark.parametrize("chunk_size", [2, 64])
@pytest.mark.parametrize("continuous", [True, False])
def test_sampling_ends_where_generate_ends(
    chunk_size: int, continuous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, token by token, with the two end ids of a chat model."""
    model = llama()
    # Ends come early and at different places.
    with torch.no_grad():
        model.lm_head.weight[TURN] *= 3
    pad: Any = TOKENIZER.pad_token_id
    model.generation_config = HFGenerationConfig(eos_token_id=[TURN, EOS], pad_token_id=pad)
    monkeypatch.setattr("conch.rollouts.hf.engine.takes_packed_rows", lambda _: continuous)
    prompts = [Prompt("", ids) for ids in ((0, 1), (2,), (3, 4, 5), (5, 5), (1, 0, 1), (4,))]
    generation = GenerationConfig(max_new_tokens=12, chunk_size=chunk_size)
    engine = HFEngine(lambda: model, TOKENIZER, generation, version=lambda: 0)
    rollouts = [rollout for chunk in engine.generate(prompts, greedy=True) for rollout in chunk]
    ends: list[int] = []
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        whole: Any = model.generate(torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=12)  # pyright: ignore[reportCallIssue]
        assert list(rollout.completion.token_ids) == whole[0, len(prompt.token_ids) :].tolist()
        ends.append(rollout.completion.token_ids[-1])
    assert TURN in ends


def test_an_encoder_decoders_completion_is_decoded_by_itself() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    settings = {"decoder_start_token_id": TOKENIZER.pad_token_id, **sizes}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(TOKENIZER), **settings))
    generation = GenerationConfig(max_new_tokens=4)
    (chunk,) = HFEngine(lambda: model, TOKENIZER, generation, version=lambda: 0).generate(
        [Prompt("abc", (0, 1, 2, EOS))]
    )
    completion = chunk[0].completion
    shown = [token for token in completion.token_ids if token != EOS]
    assert completion.text == TOKENIZER.decode(shown, skip_special_tokens=True)


def test_text_of_a_completion_is_read_behind_its_prompt() -> None:
    """With a decoder that takes a text's first space off, as SentencePiece's does."""
    tokenizer = sentencepiece()
    was = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("was"))
    assert isinstance(was, list)
    logits = [-50.0] * len(tokenizer)
    logits[was[0]] = 50.0
    model = constant_decoder(logits, tokenizer)
    prompt = tuple(tokenizer("The movie")["input_ids"])  # pyright: ignore[reportArgumentType]
    engine = HFEngine(lambda: model, tokenizer, GenerationConfig(max_new_tokens=1), version=lambda: 0)
    ((rollout,),) = engine.generate([Prompt("The movie", prompt)])
    assert isinstance(rollout, Rollout)
    alone = str(tokenizer.decode(list(rollout.completion.token_ids)))
    assert rollout.completion.text == " " + alone


def test_a_stop_string_that_begins_with_a_space_is_found_while_sampling() -> None:
    tokenizer = sentencepiece()
    condition = StopCondition(tokenizer, GenerationConfig(stop=(" was",)))
    prompt: Any = tuple(tokenizer("The movie")["input_ids"])  # pyright: ignore[reportArgumentType]
    ids: Any = tokenizer("was great", add_special_tokens=False)["input_ids"]
    assert condition.completion(prompt, ids, [0.0] * len(ids)).finish_reason == "stop"
    assert any(condition.ends(list(ids[: length + 1])) for length in range(len(ids)))


def test_an_end_tokens_text_is_no_stop_string() -> None:
    condition = stop(stop=(">", "<e"), skip_special_tokens=False)
    assert completed(condition, [1, 2, EOS]) == ("bc", 3, "eos")


def test_end_ids_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="stop_token_ids"):
        load(GenerationConfig, {"stop_token_ids": [-1]})
