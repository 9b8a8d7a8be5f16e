"""From the scores of steps to rewards of the response's tokens, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from conch.config import RewardConfig, load
from conch.data.text import TextCodec, decode
from conch.errors import ConfigError, RewardInvalidError
from conch.rewards.client.cache import ScoreCache
from conch.rewards.client.client import make_row
from conch.rewards.client.transport import ModelInfo, ScoringRow
from conch.rewards.factory import from_user
from conch.rewards.served import TritonReward
from conch.rewards.token_rewards import response_bounds, token_scores
from conch.types import Completion, Prompt, RewardResult, RewardStatus, Rollout
from tests.checkpoints import byte_tokenizer
from tests.text_tokenizers import sentencepiece

BYTES = byte_tokenizer()


def decode_bytes(ids: Sequence[int]) -> str:
    return str(BYTES.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def rollout(prompt: str, ids: Sequence[int]) -> Rollout:
    """A prompt of one token and a response of these bytes."""
    completion = Completion(decode_bytes(ids), tuple(ids), (0.0,) * len(ids), "eos")
    return Rollout(Prompt(prompt, (1,)), completion, policy_version=0)


def byte_ids(text: str) -> list[int]:
    return BYTES(text).input_ids


def test_tokens_that_make_up_one_character_end_with_it() -> None:
    """é has two bytes and 🙂 four: only the last of them ends the character. The closing eos has no text."""
    ids = [*byte_ids("aé🙂b"), BYTES.eos_token_id]
    assert response_bounds(rollout("漢字", ids), decode_bytes) == (2, 3, 3, 4, 4, 4, 4, 5, 6, 6)


def test_a_character_that_the_limit_cut_belongs_to_the_last_token() -> None:
    ids = byte_ids("a🙂")[:-1]
    assert response_bounds(rollout("", ids), decode_bytes) == (0, 1, 1, 1, len(decode_bytes(ids)))


@pytest.mark.parametrize("text", ["ab", "漢🙂 é\n", "", " leading", "\ufffd\ufffdx"])
def test_the_last_bound_is_the_length_of_the_sample(text: str) -> None:
    whole = rollout("prompt", byte_ids(text))
    assert response_bounds(whole, decode_bytes)[-1] == len(whole.sample)


def test_a_space_that_only_a_decoder_of_the_whole_keeps_is_counted() -> None:
    """SentencePiece's decoders take a text's first space off: the response's own is behind a prompt."""
    tokenizer = sentencepiece()
    codec = TextCodec(tokenizer)
    prompt_ids = codec.prompt_ids("The movie")
    ids = codec.response_ids("The movie", prompt_ids, " was great")
    text = codec.response_text(prompt_ids, ids)
    whole = Rollout(
        Prompt("The movie", prompt_ids), Completion(text, ids, (0.0,) * len(ids), "eos"), policy_version=0
    )
    bounds = response_bounds(whole, lambda each: decode(tokenizer, each))
    assert bounds[0] == len("The movie") and bounds[-1] == len("The movie was great")
    assert [whole.sample[a:b] for a, b in pairwise(bounds)] == [
        str(tokenizer.convert_ids_to_tokens(token)).replace("▁", " ") for token in ids
    ]


def test_decoding_takes_time_in_proportion_to_the_length() -> None:
    seen: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return decode_bytes(ids)

    response_bounds(rollout("", byte_ids("abcd" * 100)), counting)
    assert max(seen) <= 3


def test_without_decoding_tokens_are_counted() -> None:
    assert response_bounds(rollout("many letters", [7, 8, 9]), None) == (1, 2, 3, 4)


# Prompt of 4 characters; tokens that end at 6, 6 (none of its own), 9 and 10, then an eos.
BOUNDS = (4, 6, 6, 9, 10, 10)


@pytest.mark.parametrize(
    ("ends", "scores", "expected"),
    [
        ([10], [0.5], (0.0, 0.0, 0.0, 0.5, 0.0)),
        ([6, 10], [0.25, -1.0], (0.25, 0.0, 0.0, -1.0, 0.0)),
        ([2, 4, 5, 10], [9.0, 9.0, 0.25, 0.5], (0.25, 0.0, 0.0, 0.5, 0.0)),  # in the prompt, at its end
        ([7, 8, 9, 10], [1.0, 2.0, 4.0, 8.0], (0.0, 0.0, 7.0, 8.0, 0.0)),  # three within one token
        ([8], [0.5], (0.0, 0.0, 0.5, 0.0, 0.0)),  # cut there
    ],
)
def test_a_steps_score_lands_on_the_token_that_ends_it(
    ends: list[int], scores: list[float], expected: tuple[float, ...]
) -> None:
    assert token_scores(ends, scores, BOUNDS) == expected


def test_a_response_that_the_model_did_not_get_to_read_is_no_zero() -> None:
    with pytest.raises(RewardInvalidError, match=r"no step .* cut before it; .* --truncation_side left"):
        token_scores([2, 4], [0.5, 0.5], BOUNDS)


def test_a_response_without_text_has_no_step() -> None:
    assert token_scores([4], [0.5], (4, 4)) == (0.0,)
    assert token_scores([4], [0.5], (4,)) == ()
    # A token model that reads the closing eos ends the last step before it, in the prompt.
    assert token_scores([4], [0.5], (4, 5), may_be_cut=False) == (0.0,)


def test_samples_of_one_text_but_other_tokens_are_other_rows() -> None:
    """Each needs its own places, so neither may get the remembered result of the other."""
    info, one = ModelInfo(), rollout("p", byte_ids("ab"))

    def decode(ids: Sequence[int]) -> str:
        return "ab" if ids else ""

    two = Rollout(Prompt("p", (1,)), Completion("ab", (7,), (0.0,), "eos"), policy_version=0)
    first = make_row(one, 0, info, None, 1000, dense=True, decode=decode_bytes)
    second = make_row(two, 0, info, None, 1000, dense=True, decode=decode)
    assert isinstance(first, ScoringRow) and isinstance(second, ScoringRow)
    assert (first.bounds, second.bounds) == ((1, 2, 3), (1, 3))
    assert first != second
    cache = ScoreCache(10)
    cache.add(first, RewardResult(RewardStatus.OK, token_scores=(0.0, 1.0)))
    assert cache.get(second) is None and cache.get(first) is not None


def test_a_text_model_needs_to_know_what_the_tokens_stand_for() -> None:
    made = make_row(rollout("p", [1]), 0, ModelInfo(), None, 1000, dense=True)
    assert isinstance(made, str) and "unless `decode` is given" in made


def test_dense_is_refused_with_what_it_does_not_go_with() -> None:
    with pytest.raises(ConfigError, match="`delta` is a difference of two scores, `dense` gives more"):
        load(RewardConfig, {"dense": True, "delta": True})
    with pytest.raises(ConfigError, match="`score_range` must hold 0 with `dense`"):
        load(RewardConfig, {"dense": True, "score_range": [0.5, 1.0]})
    with pytest.raises(ConfigError, match="serve the model in the text form"):
        TritonReward("127.0.0.1:1/m", RewardConfig(dense=True), tokenizer=lambda text: [1])
    with pytest.raises(ConfigError, match="takes the scores of one served model"):
        from_user({"a": "127.0.0.1:1/m", "b": "127.0.0.1:1/n"}, RewardConfig(dense=True))
